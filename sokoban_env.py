"""Sokoban for reinforcement learning: batched, endless, on torch tensors (CPU or GPU), with gymnasium's API.

The game of Racaniere, Weber et al. 2017 ("Imagination-Augmented Agents for Deep Reinforcement Learning",
arXiv 1707.06203): an agent pushes boxes onto targets, and cannot pull them back. Actions 0-4: no-op, up, down, left,
right. Each step pays -0.1, a box pushed onto a target +1, off a target -1, the last box +10. An episode ends when
the level is solved (`terminated`) or after 120 steps (`truncated`).

    envs = SokobanVectorEnv(64)                                            # endless 10x10 levels with 4 boxes
    observation, info = envs.reset(seed=1)                                 # (64, 10, 10) uint8, on `device`
    observation, reward, terminated, truncated, info = envs.step(actions)  # gymnasium's same-step autoreset

    env = gymnasium.make("Sokoban-v0", size=7, num_boxes=1)                # one environment, numpy in and out
    levels, solutions = generate_levels(1000, size=8, num_boxes=2, seed=1)

One text serves two backends. A board is one byte a cell, and each function below runs on numpy arrays (`xp` is numpy:
the CPU, where a numpy operation costs a fifth of a torch one to dispatch) or on torch tensors (`xp` is torch: the GPU).

Shapes: `N` environments, `L` levels, `B` boards in the generator, `K` boxes, `H, W` board. Board `n` starts at `n*H*W`
in a flat array, and a "position" is an index into it: up is -W, right is +1. Positions can leave a board by one row
(the cell behind a border wall), so flat arrays end in W spare cells, which negative positions reach too.
"""

import copy
import html
import itertools
import math
import operator
import os
import pathlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

WALL, FLOOR, TARGET, BOX, BOX_ON_TARGET, PLAYER, PLAYER_ON_TARGET = range(7)
CELL_CHARS = "# .$*@+"  # XSB's character for each cell value
_CELL_OF_CHAR = {ord(char): cell for cell, char in enumerate(CELL_CHARS)}
_OTHER_LETTERS = str.maketrans("-_pPbBo", "  @+$*.")  # as .sok files may have them
_ROW_CHARS = {*CELL_CHARS, *"-_pPbBo|0123456789"}
NOOP, UP, DOWN, LEFT, RIGHT = range(5)
STEP_REWARD, BOX_REWARD, SOLVED_REWARD = -0.1, 1.0, 10.0
MAX_SIZE = 64

# The seven sprites side by side, 8x8 pixels each. Row 4, column 4 of each has the cell's `tiny_rgb` colour.
_ART = """
wwwwwwww|ffffffff|ffffffff|dddddddd|rrrrrrrr|ffkkkkff|ttkkkktt
wwwmwwww|ffffffff|fttttttf|dbbbbbbd|roooooor|ffpkpkff|tfqkqkft
wwwmwwww|ffffffff|ftfffftf|dbddddbd|rorrrror|ffppppff|tfqqqqft
mmmmmmmm|ffffffff|ftfttftf|dbdbbdbd|rorooror|fppppppf|tqqqqqqt
wwwwwwwm|ffffffff|ftfttftf|dbdbbdbd|rorooror|fppppppf|tqqqqqqt
wwwwwwwm|ffffffff|ftfffftf|dbddddbd|rorrrror|ffppppff|tfqqqqft
mmmmmmmm|ffffffff|fttttttf|dbbbbbbd|roooooor|ffpffpff|tfqffqft
wwwmwwww|ffffffff|ffffffff|dddddddd|rrrrrrrr|fkkffkkf|tkkttkkt
"""
_INK = {
    "w": (0, 0, 0), "f": (243, 248, 238), "t": (254, 126, 125), "b": (142, 121, 56), "o": (254, 95, 56),
    "p": (160, 212, 56), "q": (219, 212, 56), "m": (72, 72, 80), "d": (96, 78, 36), "r": (178, 50, 36),
    "k": (40, 40, 48),
}  # fmt: skip
SPRITE_PALETTE = np.array(list(_INK.values()), dtype=np.uint8)  # (11, 3): every colour of an `rgb` observation
_PIXELS = np.array([[_INK[pixel] for pixel in row.replace("|", "")] for row in _ART.split()], dtype=np.uint8)
SPRITES = np.stack(np.split(_PIXELS, 7, axis=1))  # (7, 8, 8, 3)
TINY_PALETTE = SPRITES[:, 4, 4]  # (7, 3)
_BLOCKS = {"tiny_rgb": TINY_PALETTE[:, None, None], "rgb": SPRITES}  # what one cell looks like: (7, s, s, 3)
OBSERVATIONS = ("cells", *_BLOCKS)


def _rule(player: int, ahead: int, beyond: int) -> tuple[int, int, int, bool, int]:
    """The rules: the player's cell, the one it walks into and the one behind that; all three after the move, whether
    the player moved, and the change in the number of boxes on targets."""
    push = ahead in (BOX, BOX_ON_TARGET) and beyond in (FLOOR, TARGET)
    if not (push or ahead in (FLOOR, TARGET)):
        return player, ahead, beyond, False, 0  # blocked; or a no-op, for which all three are the player's own cell
    left = TARGET if player == PLAYER_ON_TARGET else FLOOR
    entered = PLAYER_ON_TARGET if ahead in (TARGET, BOX_ON_TARGET) else PLAYER
    if not push:
        return left, entered, beyond, True, 0
    gain = (beyond == TARGET) - (ahead == BOX_ON_TARGET)
    return left, entered, BOX_ON_TARGET if beyond == TARGET else BOX, True, gain


# `_rule` for every case (player is 5 or 6, the other two 0-6), so that a step is a few table look-ups.
_CASES = [_rule(*cells) for cells in itertools.product((PLAYER, PLAYER_ON_TARGET), range(7), range(7))]
_NEXT_CELLS = np.array([case[:3] for case in _CASES], dtype=np.uint8).T.ravel()  # (3 * 98,)
_MOVED = np.array([case[3] for case in _CASES])  # (98,) bool
_GAIN = np.array([case[4] for case in _CASES])  # (98,) boxes that came onto a target
_REWARD = (STEP_REWARD + BOX_REWARD * _GAIN).astype(np.float32)  # (98,)


# --------------------------------------------------------------------------------------------- observations and text


def convert_observation(array: Any, source: str, target: str) -> Any:
    """Turn an observation into another kind: `cells` (..., H, W), `tiny_rgb` (..., H, W, 3), `rgb` (..., 8H, 8W, 3).

    All are uint8; leading axes (environments, stacked frames) are kept, numpy gives numpy, torch gives torch on the
    same device. A ValueError says that a kind is unknown, or a pixel no sprite's.
    """
    for kind in (source, target):
        _check_observation(kind)
    xp, like = (torch, {"device": array.device}) if isinstance(array, torch.Tensor) else (np, {})
    if source == target:
        return xp.asarray(array, copy=True)
    if source != "cells":
        tiny = array if source == "tiny_rgb" else array[..., 4::8, 4::8, :]
        match = (tiny[..., None, :] == xp.asarray(TINY_PALETTE, **like)).all(-1)  # (..., H, W, 7)
        if not match.any(-1).all():
            raise ValueError(f"the {source} image has a pixel that is no sprite's: is it really {source}?")
        array = xp.asarray(xp.asarray(match, dtype=xp.uint8).argmax(-1), dtype=xp.uint8)
    if target == "cells":
        return array
    blocks = xp.asarray(_BLOCKS[target], **like)[xp.asarray(array, dtype=xp.int64)]  # (..., H, W, s, s, 3)
    *lead, height, width, s, _, _ = blocks.shape
    return xp.moveaxis(blocks, -4, -3).reshape(*lead, height * s, width * s, 3)


def cells_to_text(cells: Any) -> str:
    """A board (H, W) as XSB text, one line a row: `#` wall, `@` player, `$` box, `.` target, `*` and `+` on target."""
    return "\n".join("".join(CELL_CHARS[cell] for cell in row) for row in _to_numpy(cells))


def text_to_cells(text: str) -> np.ndarray:
    """One level of XSB text as a board (H, W) of uint8 cells; `load_levels` says what is read and what is refused."""
    boards = _parse_levels(text, "level")
    if len(boards) != 1:
        raise ValueError(f"the text holds {len(boards)} levels, expected one")
    return boards[0]


def _parse_row(line: str, place: str) -> list[str] | None:
    """The board rows in a line, in XSB's letters and floor as spaces: one, or several with `|` between them.

    None for a title, a comment or a separator. A ValueError names what begins as a row and can't be read.
    """
    line = line.rstrip()
    text = re.sub(r"(\d{1,3})(\D)", lambda run: run[2] * int(run[1]), line).translate(_OTHER_LETTERS)
    known = not set(text) - set(CELL_CHARS) - {"|"}
    if not known and text.lstrip().startswith("#"):
        i = next(i for i, char in enumerate(line) if char not in _ROW_CHARS)
        raise ValueError(f"{place}:{i + 1}: unknown character {line[i]!r}, known are {CELL_CHARS!r}")
    only_letters_or_one_sign = line.isalpha() or (len(set(text)) == 1 and text[0] in ".$*@+")
    return text.split("|") if text and known and not only_letters_or_one_sign else None


def _parse_levels(text: str, name: str) -> list[np.ndarray]:
    """Every level of a text as a board of its own size; `name` stands before the line in errors."""
    if "<L>" in text:  # an .slc collection
        text = re.sub(r"</Level>(?=[^\n]*<L>)", "</Level>\n\n", text)
        text = "\n".join(html.unescape("|".join(re.findall("<L>(.*?)</L>", line))) for line in text.splitlines())
    levels, places, rows = [], [], []
    lines = [*text.splitlines(), ""]
    for number, line in enumerate(lines, start=1):
        new = _parse_row(line, f"{name}:{number}")
        walled = new is not None and any("#" in (row.strip()[:1], row.strip()[-1:]) for row in new)
        if walled:
            rows += [(number, row) for row in new]
        elif rows and new is not None and not "".join(new).strip():
            rows.append((number, ""))  # an empty row, or a separator: `_split_level` knows
        elif rows and new is not None and lines[number].lstrip().startswith("#"):
            raise ValueError(f"{name}:{number}:1: a row inside a level, with no wall at either end")
        elif rows:  # a blank line, a comment or a title ends the level
            for part in _split_level(rows):
                levels.append(part)
                places.append(f"{name}:{part[0][0]}")
            rows = []
    if not levels:
        return []
    shapes = [(len(rows), max(len(row) for _, row in rows)) for rows in levels]
    height, width = (max(axis) for axis in zip(*shapes, strict=True))
    lines = [row.ljust(width) for rows in levels for _, row in rows + [(0, "")] * (height - len(rows))]
    values = np.frombuffer("".join(lines).translate(_CELL_OF_CHAR).encode(), dtype=np.uint8)
    boards = np.full((len(levels), height + 2, width + 2), FLOOR, dtype=np.uint8)  # with a rim of outside around each
    boards[:, 1:-1, 1:-1] = values.reshape(len(levels), height, width)
    corners = np.arange(len(levels)) * boards[0].size
    outside = _flood(np, boards.ravel() != WALL, corners, width + 2, boards[0].size)[0].reshape(boards.shape)
    for i in np.flatnonzero((outside & (boards != FLOOR)).any((1, 2)))[:1]:
        if (outside & (boards >= PLAYER))[i].any():
            raise ValueError(f"{places[i]}: the level is not closed: no wall between the player and the outside")
        row, column = np.argwhere((outside & (boards != FLOOR))[i])[0]
        number, text = levels[i][row - 1]
        raise ValueError(f"{name}:{number}:{column}: {text[column - 1]!r} is outside the walls")
    boards[outside] = WALL
    solved = ~(boards == BOX).any((1, 2))
    _check_boards(boards, places, unsolved=bool(solved.all()))
    for place in itertools.compress(places, solved):
        warnings.warn(f"{place}: the level is skipped: it is solved already", stacklevel=2)
    boards = [board[1 : 1 + h, 1 : 1 + w] for board, (h, w) in zip(boards, shapes, strict=True)]
    return list(itertools.compress(boards, ~solved))


def _split_level(rows: list[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """Rows (line number, text) without the empty ones at the end, as one level; or as several, where each of the parts
    between empty rows has a player."""
    while not rows[-1][1].strip():
        rows.pop()
    parts = [list(group) for filled, group in itertools.groupby(rows, lambda row: bool(row[1].strip())) if filled]
    players = [any("@" in text or "+" in text for _, text in part) for part in parts]
    return parts if all(players) else [rows]


def _pad_levels(boards: Any, size: tuple[int, int] | None, name: str) -> np.ndarray:
    """Boards of any sizes, or their texts, to one array (L, H, W), filled up with wall below and to the right."""
    if isinstance(boards, (str, os.PathLike)):
        raise ValueError(f"{name}: expected a list of boards, got {str(boards)[:40]!r}; for a path: load_levels(path)")
    boards = [text_to_cells(board) if isinstance(board, str) else board for board in _to_numpy(boards)]
    height, width = size or [max(board.shape[axis] for board in boards) for axis in (0, 1)]
    padded = np.full((len(boards), height, width), WALL, dtype=np.uint8)
    for i, board in enumerate(boards):
        if board.ndim != 2 or board.shape[0] > height or board.shape[1] > width:
            shape = "x".join(map(str, board.shape))
            raise ValueError(f"{name}: level {i} is {shape}, too large for size {height}x{width}: take a larger size")
        padded[i, : board.shape[0], : board.shape[1]] = board
    _check_boards(padded, name)
    return padded


def _check_boards(boards: np.ndarray, name: str | list[str], *, unsolved: bool = True) -> None:
    """Refuse boards (L, H, W) on which the rules would not hold; `name` says where they come from, all or each."""
    if len(boards) == 0:
        raise ValueError(f"{name}: no levels")
    flat = boards.reshape(len(boards), -1)
    players, boxes = (flat >= PLAYER).sum(1), ((flat == BOX) | (flat == BOX_ON_TARGET)).sum(1)
    targets = ((flat == TARGET) | (flat == BOX_ON_TARGET) | (flat == PLAYER_ON_TARGET)).sum(1)
    rim = np.ones(boards.shape[1:], dtype=bool)
    rim[1:-1, 1:-1] = False
    for wrong, message in (
        (players != 1, "{players} players, needs exactly one"),
        (boxes != targets, "{boxes} boxes and {targets} targets, needs as many of each"),
        (flat[:, rim.ravel()].any(1), "an opening: every cell of the outer border must be wall"),
        (flat.max(1) > PLAYER_ON_TARGET, "a cell value above 6"),
        (unsolved & ~(flat == BOX).any(1), "no box off its target: it is solved already"),
    ):
        if wrong.any():
            i = int(wrong.argmax())
            message = message.format(players=players[i], boxes=boxes[i], targets=targets[i])
            place = f"{name}: level {i}" if isinstance(name, str) else f"{name[i]}: the level"
            raise ValueError(f"{place} has {message}")


def load_levels(path: str | os.PathLike, size: int | tuple[int, int] | None = None) -> torch.Tensor:
    """Levels (L, H, W), uint8, of a file (Boxoban, XSB, .sok, .slc), or of every .txt, .xsb, .sok and .slc of a folder.

    Rows may be ragged or run-length coded (`3#`), with `|` between them; `-` and `_` are floor too. Blank lines,
    comments and titles part levels; floor outside the walls becomes wall; smaller levels are padded with wall to
    `size`, or to the largest. A warning names a solved level, and in a folder a file, that is skipped. A ValueError
    names file and line of what can't be played: an unknown character, not one player, unequal numbers of boxes and
    targets, no box to push, no closed wall, a level too large for `size`.
    """
    path, boards, errors = pathlib.Path(path), [], []
    suffixes = (".txt", ".xsb", ".sok", ".slc")
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in suffixes) if path.is_dir() else [path]
    for file in files:
        text = file.read_bytes()
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = text.decode("latin-1")  # names of authors, in older collections
        try:
            found = _parse_levels(text, str(file)) if "\0" not in text else []
            if not found:
                raise ValueError(f"{file}: no levels found")
            boards += found
        except ValueError as e:
            errors.append(e)
    if not boards:
        raise errors[0] if errors else ValueError(f"{path}: no levels found (in {', '.join(suffixes)} files)")
    for error in errors:
        warnings.warn(f"skipped the file of {error}", stacklevel=2)
    return torch.from_numpy(_pad_levels(boards, None if size is None else _check_size(size), str(path)))


def save_levels(path: str | os.PathLike, levels: Any) -> None:
    """Write levels (L, H, W) as a Boxoban text file, which `load_levels` reads back; never leaves half a file."""
    text = "".join(f"; {i}\n{cells_to_text(board)}\n\n" for i, board in enumerate(_to_numpy(levels)))
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def exclude_levels(levels: Any, seen: Any) -> torch.Tensor:
    """A mask (L,) that is True for the levels (L, H, W) that are not among `seen`, for a clean held-out set."""
    known = {board.tobytes() for board in _to_numpy(seen)}
    return torch.tensor([board.tobytes() not in known for board in _to_numpy(levels)], dtype=torch.bool)


# ------------------------------------------------------------------------------------------------- checks and backend


def _check_observation(observation: str) -> None:
    if observation not in OBSERVATIONS:
        raise ValueError(f"unknown observation {observation!r}, choose one of {', '.join(OBSERVATIONS)}")


def _check_size(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = map(operator.index, size if isinstance(size, (tuple, list)) else (size, size))
    if not (3 <= height <= MAX_SIZE and 3 <= width <= MAX_SIZE):
        raise ValueError(f"size {height}x{width} is out of range, height and width go from 3 to {MAX_SIZE}")
    return height, width


def _check_generator(height: int, width: int, num_boxes: int) -> None:
    most = min((height + width) // 4, height, width, 12)  # beyond, hardly a room in a thousand becomes a level
    if min(height, width) < 5 or not 1 <= num_boxes <= most:
        allowed = f"choose 1 to {most} boxes" if min(height, width) >= 5 else "the smallest board is 5x5"
        raise ValueError(f"can't generate {height}x{width} levels with num_boxes={num_boxes}: {allowed}")


def _check_device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"can't use device {str(device)!r}: {str(e).splitlines()[0]}") from None


def _to_numpy(array: Any) -> Any:
    return array.cpu().numpy() if isinstance(array, torch.Tensor) else array


def _to_torch(array: Any) -> torch.Tensor:
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


def _copy_to(xp: Any, array: Any, device: str) -> Any:
    """A copy of a tensor or array for the backend, on its device."""
    return np.array(_to_numpy(array)) if xp is np else torch.asarray(array, device=device, copy=True)


# ---------------------------------------------------------------------------------------------------------- generator

# The 3x3 patterns that a walker carves (gym-sokoban's, as in the paper's appendix).
_CARVE = ("...###...", ".#..#..#.", "...##..#.", "...##.##.", "....##.#.")
# Ours, fitted to the statistics of DeepMind's levels (docs/sokoban_env.md): how many steps the walker takes for each
# row and column, how often it turns, and how much likelier a pull is for each thing that it has.
_WALK_STEPS, _TURN = 1.8, 0.35
_SAME_BOX, _SAME_DIRECTION, _AWAY = 10.0, 4.0, 5.0


def _flood(xp: Any, free: Any, start: Any, width: int, rounds: int) -> tuple[Any, Any]:
    """The cells reached from `start` in `rounds` moves over `free` ones, and each cell's distance (at most `rounds`).

    All flat. No move leaves a board whose border is not free; what is not reached gets a distance above the others'.
    """
    reached = xp.zeros_like(free)
    reached[start] = True
    distance = xp.zeros_like(free, dtype=xp.uint8)
    for i in range(rounds):
        distance += ~reached
        grown = xp.asarray(reached, copy=True)
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[width:] |= reached[:-width]
        grown[:-width] |= reached[width:]
        grown &= free
        # Stop early where asking is cheap; on a GPU it would wait for the device.
        if xp is np and i % 4 == 3 and (grown == reached).all():
            break
        reached = grown
    return reached, distance


def _generate(
    xp: Any,
    device: str,
    settings: tuple[int, int, int],
    seed: int,
    batches: range,
    solve: bool,
    max_pulls: int | None = None,
) -> Iterator:
    """Make batches of levels side by side, in slices of work: yields None after each, in the end (boards, solutions).

    The paper's appendix: (1) a random walk carves the room, (2) targets and the player fall on random floor cells,
    (3) the level is played backwards from its solution, pulling boxes, and the position with the best (box swaps) ×
    (displacement of the boxes from their targets) is kept, (4) the player starts on any cell it can then reach. Here a
    batch of rooms is played at once, a pull a round, each drawn at random among all that are possible.

    With `max_pulls`, (3) keeps the position after 1 to so many pulls instead, and (4) leaves the player where it is.
    """
    height, width, num_boxes = settings
    cells = height * width
    each, like = max(64, 2**17 // cells), {"device": device}
    num = each * len(batches)
    rngs = [np.random.default_rng((seed, batch)) for batch in batches]  # so that every device makes the same levels

    def uniform(*shape: int) -> Any:
        return xp.asarray(np.concatenate([rng.random((each, *shape), dtype=np.float32) for rng in rngs]), **like)

    def integers(high: int) -> Any:
        return xp.asarray(np.concatenate([rng.integers(high, size=each) for rng in rngs]), **like)

    board = xp.arange(num, **like) * cells  # (B,) where each board starts
    step = xp.asarray([-width, width, -1, 1], **like)  # up, down, left, right

    # (1) The walker carves a pattern around itself, and turns now and then.
    floor = xp.zeros(num * cells + width, dtype=xp.bool, **like)
    around = xp.asarray([dy * width + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)], **like)[:, None]  # (9, 1)
    carve = xp.asarray([[row[i] == "#" for row in _CARVE] for i in range(9)], **like)  # (9, 5)
    y, x = 1 + integers(height - 2), 1 + integers(width - 2)
    heading, dy, dx = integers(4), xp.asarray([-1, 1, 0, 0], **like), xp.asarray([0, 0, -1, 1], **like)
    for _ in range(int(_WALK_STEPS * (height + width))):
        heading = xp.where(uniform() < _TURN, integers(4), heading)
        y = xp.clip(y + dy[heading], 1, height - 2)
        x = xp.clip(x + dx[heading], 1, width - 2)
        at = board + y * width + x + around  # (9, B)
        floor[at] |= carve[:, integers(len(_CARVE))]
    room = floor[: num * cells].reshape(num, height, width)
    room[:, [0, -1]] = False
    room[:, :, [0, -1]] = False

    # (2) Targets, with their boxes, and the player: the K + 1 floor cells with the highest lots.
    lots = uniform(cells) * room.reshape(num, cells)
    spots = []
    for _ in range(num_boxes + 1):
        spots.append(lots.argmax(1) + board)
        lots.reshape(-1)[spots[-1]] = 0
    target, player = xp.stack(spots[:-1]), spots[-1]  # (K, B), (B,)
    roomy = room.sum((1, 2)) >= 2 * num_boxes + 1
    yield

    # (3) Reverse play. `free`: floor without a box.
    rounds, num_pulls = min(2 * (height + width), 255), max_pulls or 8 * (num_boxes + 1)  # distances are bytes
    box, free = xp.asarray(target, copy=True), xp.asarray(floor, copy=True)
    free[box] = False
    is_target = xp.zeros_like(floor)
    is_target[target] = True
    rows = xp.arange(num, **like)
    boxes, headings = xp.arange(num_boxes, **like)[:, None], xp.arange(4, **like)[:, None, None]
    last_box, last_heading = xp.full((2, num), -1, **like)
    swaps, best, best_round = xp.zeros((3, num), dtype=xp.int64, **like)
    best_box, best_player = target, player
    quota = 1 + integers(max_pulls) if max_pulls else None
    pulls = []  # per round: the box's new position and the step that it made, 0 where none was possible

    def displacement(box: Any, target: Any) -> Any:
        return abs(box // width - target // width) + abs(box % width - target % width)

    for i in range(num_pulls):
        reached, _ = _flood(xp, free, player, width, rounds)
        near = box + step[:, None, None]  # (4, K, B) where the player stands to pull, and the box goes to
        possible = reached[near] & reached[near + step[:, None, None]]
        same_box = boxes == last_box  # (K, B)
        weight = 1 + (_SAME_BOX - 1) * same_box
        weight = weight * (1 + (_SAME_DIRECTION - 1) * (same_box & (headings == last_heading)))
        weight = weight * (1 + (_AWAY - 1) * (displacement(near, target) > displacement(box, target)))  # (4, K, B)
        # One of the possible pulls, in proportion to its weight: exact in float32, and so the same on every device.
        shares = xp.asarray(weight * possible, dtype=xp.float32).reshape(-1, num).cumsum(0)
        pull = xp.clip((shares <= uniform() * shares[-1]).sum(0), 0, len(shares) - 1)
        heading, which = pull // num_boxes, pull % num_boxes
        moves = possible.reshape(-1, num)[pull, rows]
        stride = xp.where(moves, step[heading], 0)
        old = box[which, rows]
        new = old + stride
        free[old] = True
        free[new] = False
        box[which, rows] = new
        player = xp.where(moves, new + stride, player)
        swaps += moves & (which != last_box)
        last_box, last_heading = xp.where(moves, which, last_box), xp.where(moves, heading, last_heading)
        if max_pulls:
            score = (i + 1) * ((i < quota) & ~is_target[box].all(0))
        else:
            score = swaps * displacement(box, target).sum(0) * (roomy & ~is_target[box].any(0))
        better = score > best
        best, best_round = xp.where(better, score, best), xp.where(better, i, best_round)
        best_box, best_player = xp.where(better, box, best_box), xp.where(better, player, best_player)
        pulls.append((new, stride))
        yield

    # (4) The player starts anywhere in its region. The levels in which no box stayed on a target are kept.
    free = xp.asarray(floor, copy=True)
    free[best_box] = False
    reached, _ = _flood(xp, free, best_player, width, rounds)
    start = (uniform(cells) * reached[: num * cells].reshape(num, cells)).argmax(1) + board
    if max_pulls:
        start = best_player
    level = xp.asarray(floor, dtype=xp.uint8)
    level[target] = TARGET
    level[best_box] = BOX + xp.asarray(is_target[best_box], dtype=xp.uint8)
    level[start] = PLAYER + xp.asarray(is_target[start], dtype=xp.uint8)
    kept = xp.where(best > 0)[0]
    levels = level[: num * cells].reshape(num, height, width)[kept]
    if not solve:
        yield levels, None
        return

    # The solution: the pulls up to the best round, reversed; the player walks from push to push.
    player, on_target, active = start, xp.asarray(is_target[best_box].sum(0), dtype=xp.int64), best > 0
    walk_letters, push_letters = (xp.asarray([*text], dtype=xp.uint8, **like) for text in (b"udlr", b"UDLR"))
    letters = []  # each (B,) uint8, an ASCII code or 0
    for i in reversed(range(num_pulls)):
        new, stride = pulls[i]
        pushing = active & (i <= best_round) & (stride != 0)
        goal = xp.where(pushing, new + stride, player)
        _, distance = _flood(xp, free, goal, width, rounds)
        while True:
            near = player + step[:, None]  # (4, B)
            closer = distance[near] < distance[player]
            walking = closer.any(0)
            if not walking.any():
                break
            heading = xp.asarray(closer, dtype=xp.uint8).argmax(0)
            player = xp.where(walking, near[heading, rows], player)
            letters.append(xp.where(walking, walk_letters[heading], 0))
        free[xp.where(pushing, new, -1)] = True  # -1 is a spare cell
        free[xp.where(pushing, new - stride, -1)] = False
        free[-1] = False
        player = xp.where(pushing, new, player)
        push = xp.asarray(step[:, None] == -stride, dtype=xp.uint8).argmax(0)
        letters.append(xp.where(pushing, push_letters[push], 0))
        on_target += pushing & is_target[new - stride]
        on_target -= xp.asarray(pushing & is_target[new], dtype=xp.int64)
        active = active & (on_target < num_boxes)  # reverse play may have passed through a solved board
    text = _to_numpy(xp.stack(letters, 1)[kept])
    yield levels, [row[row > 0].tobytes().decode() for row in text]


class _Pool:
    """Where an environment's levels come from: a fixed set, drawn at random, or the generator, each level once."""

    # boards[head:] are fresh, boards[0] was the `serial`-th made; `slices` of batch number `batch` are done
    _COUNTERS = ("head", "serial", "seed", "batch", "slices", "frames", "drawn", "repeated", "due")

    def __init__(self, xp: Any, device: str, settings: tuple[int, int, int], levels: Any, num_envs: int, exclude: Any):
        self.xp, self.device, self.settings, self.num_envs = xp, device, settings, num_envs
        weights = np.random.default_rng(0).integers(2**62, size=settings[0] * settings[1])
        self.weights, self.barren = xp.asarray(weights, device=device), 0
        self.excluded = None if exclude is None else self.numbers(exclude)
        self.endless = levels is None
        self.boards = xp.zeros((0, *settings[:2]), dtype=xp.uint8, device=device) if self.endless else levels
        self.restart(0)

    def numbers(self, boards: Any) -> Any:
        """A number (L,) for each board, the same for the same board: a sum with random weights, modulo 2^64."""
        return (self.xp.asarray(boards.reshape(len(boards), -1), dtype=self.xp.int64) * self.weights).sum(1)

    def restart(self, seed: int) -> None:
        self.rng, self.work = np.random.default_rng(seed), None
        self.boards = self.boards[:0] if self.endless else self.boards
        vars(self).update(dict.fromkeys(self._COUNTERS, 0), seed=seed)

    def draw(self, num: int) -> tuple[Any, Any]:
        """`num` boards (num, H, W) and their numbers (num,)."""
        if not len(self.boards):  # the first episodes began on boards that were handed in
            self.fill()
        fresh = min(num, len(self.boards) - self.head) if self.endless else 0
        # From a fixed set, or where demand outran the generator, any; `random` is twice as fast as `integers`.
        index = (self.rng.random(num) * len(self.boards)).astype(np.int64)
        index[:fresh] = np.arange(self.head, self.head + fresh)
        index = self.xp.asarray(index, device=self.device)
        self.head, self.drawn, self.repeated = self.head + fresh, self.drawn + num, self.repeated + num - fresh
        return self.boards[index], index + self.serial

    def fill(self) -> None:
        """Generate until every environment can have a fresh level."""
        while self.endless and len(self.boards) - self.head < self.num_envs:
            self._advance()

    def refill(self) -> None:
        """After each step: at most one slice of a batch for every 32 frames stepped, and only if levels run low."""
        before, self.frames = self.frames, self.frames + self.num_envs
        for _ in range(self.frames // 32 - before // 32):
            if self.endless and len(self.boards) - self.head < max(256, 2 * self.num_envs):
                self._advance()

    def info(self) -> dict[str, float]:
        return {"level_repeats": self.repeated / max(1, self.drawn)} if self.endless else {}

    def batches(self) -> range:
        return range(self.batch, self.batch + 1)

    def _advance(self) -> None:
        """A slice of work; when that completes a batch, its levels join the pool."""
        if self.work is None:  # a batch follows from its seed and number, so a restored pool replays its slices
            self.work = _generate(self.xp, self.device, self.settings, self.seed, self.batches(), solve=False)
            for _ in range(self.slices):
                next(self.work)
        made = next(self.work)
        self.slices += 1
        if made is not None:
            fresh = made[0]
            if self.excluded is not None:
                fresh = fresh[~self.xp.isin(self.numbers(fresh), self.excluded)]
            self.barren = 0 if len(fresh) else self.barren + 1
            if self.barren >= 20:
                height, width, boxes = self.settings
                raise ValueError(f"the generator finds no {height}x{width} level with {boxes} boxes besides `exclude`")
            self.batch, self.slices, self.work = self.batches().stop, 0, None
            self.add(fresh)

    def add(self, fresh: Any) -> None:
        start = max(0, self.head - 1024)  # some that were handed out stay, to be repeated if need be
        self.boards = self.xp.concatenate([self.boards[start:], fresh])
        self.head, self.serial = self.head - start, self.serial + start

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle; the unfinished batch is made again, up to where it was."""
        return vars(self) | {"work": None, "xp": self.xp.__name__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"xp": {"numpy": np, "torch": torch}[state["xp"]]})

    def __deepcopy__(self, memo: dict) -> "_Pool":
        new = copy.copy(self)  # which shares the boards, for they never change
        new.rng = copy.deepcopy(self.rng)
        return new

    def get_state(self) -> dict[str, Any]:
        boards = _to_torch(_copy_to(self.xp, self.boards, self.device))
        counters = {name: getattr(self, name) for name in self._COUNTERS}
        return {"boards": boards, "random": self.rng.bit_generator.state, **counters}

    def set_state(self, state: dict[str, Any]) -> None:
        self.restart(state["seed"])
        self.rng.bit_generator.state = state["random"]
        self.batch = state["batch"]
        if "last" in state:  # the torch backend's: the same boards, and from here on levels of the next batch
            return
        self.boards = _copy_to(self.xp, state["boards"], self.device)
        vars(self).update({name: state.get(name, 0) for name in self._COUNTERS})  # old ones lack `due`


class _DevicePool(_Pool):
    """The same for torch, so that a step waits for nothing: levels lie in a ring, and are drawn by arithmetic.

    The p-th draw takes the ring's slot p % size: of `boards` that were generated, or of `order`, random indices into
    `boards` that were handed in. `refill` puts new ones where the old are used up. It reads how far the draws went,
    and so waits for the device, once in thousands of frames; a program that captures steps in a CUDA graph calls it
    between rollouts, as `envs.refill()`. All tensors stay where they are.
    """

    _TENSORS = ("boards", "facts", "order", "spare", "last")
    SLOTS, BATCHES = 2**13, 64  # on a GPU; batches are made side by side, by some 23,000 kernels however many they are

    def restart(self, seed: int) -> None:
        vars(self).update(dict.fromkeys(self._COUNTERS, 0), seed=seed, rng=np.random.default_rng(seed), work=None)
        like = {"dtype": torch.int64, "device": self.device}
        self.size = max(256 if self.device == "cpu" else self.SLOTS, 2 * self.num_envs)
        if self.endless:
            self.boards = torch.zeros((self.size, *self.settings[:2]), dtype=torch.uint8, device=self.device)
        self.facts = self.describe(self.boards, torch.arange(len(self.boards), **like))
        self.order, self.spare = torch.zeros(self.size, **like), self.boards[:0]
        self.last = torch.full((), -1, **like)  # the number of the last draw

    def describe(self, boards: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """(5, L): what an episode on each board begins with, as in the environment's `_episode`."""
        flat = boards.reshape(len(boards), -1)
        loose = (flat == BOX).sum(1)
        return torch.stack([flat.argmax(1), loose, 0 * number, number, loose + (flat == BOX_ON_TARGET).sum(1)])

    def draw_masked(self, done: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A board for each environment (N, H, W), fresh where `done` (N,); and its facts (5, N)."""
        if not self.serial:
            self.fill()
        number = done.cumsum(0) + self.last
        self.last.copy_(number[-1])
        slot = number % self.size
        if not self.endless:
            slot = self.order[slot]
        return self.boards[slot], self.facts[:, slot]

    def draw(self, num: int) -> tuple[torch.Tensor, torch.Tensor]:
        boards, facts = self.draw_masked(torch.ones(num, dtype=torch.bool, device=self.device))
        return boards, facts[3]

    def refill(self) -> None:
        self.frames += self.num_envs
        capturing = self.device.startswith("cuda") and torch.cuda.is_current_stream_capturing()
        if self.frames >= self.due and not capturing:
            self.fill()

    def fill(self) -> None:
        used = int(self.last) + 1  # waits for the device
        if used > self.serial:  # the ring went round: what it gave again
            self.repeated, used = self.repeated + used - self.serial, self.serial
            self.last.fill_(used - 1)
        self.drawn = used + self.repeated
        if self.serial - used < self.size // 2:
            while self.serial - used < self.size:
                self.put(self.size - self.serial + used)
        self.due = self.frames + (self.serial - used) // 2  # no step draws more than it has frames

    def put(self, room: int) -> None:
        """New levels, or indices, into the next slots, at most `room`."""
        if self.endless:
            while not len(self.spare):
                self._advance()
            new, self.spare = self.spare[:room], self.spare[room:]
        else:
            new = torch.from_numpy((self.rng.random(room) * len(self.boards)).astype(np.int64)).to(self.device)
        number = self.serial + torch.arange(len(new), device=self.device)
        slots = number % self.size
        if self.endless:
            self.boards[slots], self.facts[:, slots] = new, self.describe(new, number)
        else:
            self.order[slots] = new
        self.serial += len(new)

    def batches(self) -> range:
        return range(self.batch, self.batch + (1 if self.device == "cpu" else self.BATCHES))

    def add(self, fresh: torch.Tensor) -> None:
        self.spare = torch.cat([self.spare, fresh])

    def __deepcopy__(self, memo: dict) -> "_DevicePool":
        new = copy.copy(self)
        vars(new).update({name: copy.deepcopy(value) for name, value in vars(new).items() if name != "xp"})
        return new

    def get_state(self) -> dict[str, Any]:
        tensors = {name: getattr(self, name).clone() for name in self._TENSORS}
        counters = {name: getattr(self, name) for name in self._COUNTERS}
        return {"random": self.rng.bit_generator.state, **tensors, **counters}

    def set_state(self, state: dict[str, Any]) -> None:
        self.restart(state["seed"])
        self.rng.bit_generator.state = state["random"]
        self.batch = state["batch"]
        if "last" not in state:  # numpy's, as above
            return
        vars(self).update({name: state[name] for name in self._COUNTERS})
        vars(self).update({name: _copy_to(torch, state[name], self.device) for name in self._TENSORS})


def generate_levels(
    num_levels: int,
    *,
    size: int | tuple[int, int] = 10,
    num_boxes: int = 4,
    seed: int = 0,
    device: Any = "cpu",
    max_pulls: int | None = None,
) -> tuple[torch.Tensor, list[str]]:
    """Levels (L, H, W), uint8 on `device`, all different, and a LURD solution of each (udlr moves, UDLR pushes).

    The same seed gives the same levels, another one others (on the smallest boards chance repeats some: see
    `exclude_levels`). A ValueError names a size or number of boxes that can't be generated, or says that there are
    fewer levels than asked for.

    With `max_pulls` the levels stand at most that many pulls of the generator's reverse play before their end, some
    boxes on their targets and the player beside the box that it is to push: a model of rewards and ends learns from it.
    """
    height, width = _check_size(size)
    num_levels, num_boxes, seed = map(operator.index, (num_levels, num_boxes, seed))
    max_pulls = None if max_pulls is None else operator.index(max_pulls)
    _check_generator(height, width, num_boxes)
    device = _check_device(device)
    xp, found, batch, barren = np if device.type == "cpu" else torch, {}, 0, 0
    while len(found) < num_levels:
        before = len(found)
        made = _generate(xp, str(device), (height, width, num_boxes), seed, range(batch, batch + 1), True, max_pulls)
        *_, (boards, solutions) = made
        found |= dict(zip((board.tobytes() for board in _to_numpy(boards)), solutions, strict=True))
        # Twenty batches without a level, or two with only known ones: there are no more.
        batch, barren = batch + 1, 0 if len(found) > before else barren + 10 * bool(solutions) + 1
        if barren >= 20:
            what = f"{height}x{width} levels with {num_boxes} boxes"
            raise ValueError(f"found only {before} different {what}, asked for {num_levels}")
    chosen = np.frombuffer(bytearray().join([*found][:num_levels]), dtype=np.uint8).reshape(-1, height, width)
    return torch.tensor(chosen, device=device), [*found.values()][:num_levels]


# ------------------------------------------------------------------------------------------------------- environments


class SokobanVectorEnv(gym.vector.VectorEnv):
    """`num_envs` games of Sokoban in lockstep, with same-step autoreset.

    Args:
        num_envs: `N`.
        size: board size, an int or (height, width).
        num_boxes: boxes of each generated level; levels that are handed in may have any number.
        max_episode_steps: steps after which an unsolved episode is truncated; None for no limit.
        levels: levels (L, H, W), or a list of boards or texts, of which each episode draws one at random; smaller
            boards are padded with wall. None: fresh levels for ever, from the generator.
        observation: `cells` (H, W), `tiny_rgb` (H, W, 3) or `rgb` (8H, 8W, 3), all uint8.
        device: where the state lives and what is returned is: "cpu", "cuda", "cuda:1".
        frame_stack: above 1, an observation is the last frames (frame_stack, ...), oldest first; a reset fills it.
        render_mode: `rgb_array` or `ansi`.
        copy: False returns a view of the environment's own observation buffer, which the next `step`, `reset` or
            `set_state` overwrites. (Stacked frames, rewards, flags and info are the caller's own in either case.)
        backend: "numpy" or "torch"; None takes numpy on the CPU and torch elsewhere.
        exclude: levels, as in `levels`, that the generator must not hand out: those of an evaluation.

    `step` returns tensors on `device`: observation (N, ...), reward (N,) float32, terminated (N,) and truncated (N,)
    bool (a level solved in its last step is terminated, not truncated), and info. When episodes end (on the torch
    backend, which does not wait to learn that: always) info holds
    - `final_obs` (N, ...): what the step led to, before any reset: the last observation of the episode where the mask
      `_final_obs` (N,) is True, elsewhere what `step` returns. So `info.get("final_obs", observation)` is the true next
      observation of every row;
    - `final_info`: a dict of (N,) tensors, each with its mask `_...` (N,): `success`, `boxes_on_target`, `level` (index
      in `levels`, serial number of a generated one, or -1), and `episode`, a dict of `r` (return) and `l` (length).
    With generated levels, info["level_repeats"] is the share of levels so far that had been handed out before.
    """

    metadata = {"render_modes": ["rgb_array", "ansi"], "render_fps": 8, "autoreset_mode": AutoresetMode.SAME_STEP}
    _VIEWS = ("_xp", "_board", "_frame", "_player", "_loose", "_steps", "_level", "_boxes")  # what `_link` makes
    _COUNTERS = ("steps", "return", "level")  # of each environment's episode

    def __init__(
        self,
        num_envs: int,
        *,
        size: int | tuple[int, int] = 10,
        num_boxes: int = 4,
        max_episode_steps: int | None = 120,
        levels: Any = None,
        observation: str = "cells",
        device: str | torch.device = "cpu",
        frame_stack: int = 1,
        render_mode: str | None = None,
        copy: bool = True,
        backend: str | None = None,
        exclude: Any = None,
    ):
        self.height, self.width = height, width = _check_size(size)
        _check_observation(observation)
        self.device = _check_device(device)
        steps = 1 if max_episode_steps is None else operator.index(max_episode_steps)
        num_envs, num_boxes, frame_stack = map(operator.index, (num_envs, num_boxes, frame_stack))
        for name, value in (("num_envs", num_envs), ("max_episode_steps", steps), ("frame_stack", frame_stack)):
            if value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"unknown render_mode {render_mode!r}, choose one of {self.metadata['render_modes']}")
        if backend not in (None, "torch", *["numpy"] * (self.device.type == "cpu")):
            raise ValueError(f"unknown backend {backend!r} for {self.device}: numpy (on the CPU only) or torch")
        self.backend = backend or ("numpy" if self.device.type == "cpu" else "torch")
        self._xp = xp = {"numpy": np, "torch": torch}[self.backend]
        on = {"device": str(self.device)}
        if levels is None:
            _check_generator(height, width, num_boxes)
        else:
            levels = self._own(_pad_levels(levels, (height, width), "levels"))
        exclude = None if exclude is None else self._own(_pad_levels(exclude, (height, width), "exclude"))
        self.num_envs, self.observation, self.render_mode, self.copy = num_envs, observation, render_mode, copy
        self.max_episode_steps = math.inf if max_episode_steps is None else steps
        pool = _Pool if xp is np else _DevicePool
        self._pool = pool(xp, str(self.device), (height, width, num_boxes), levels, num_envs, exclude)

        s = {"cells": 0, "tiny_rgb": 1, "rgb": 8}[observation]  # pixels of a cell's side
        frame = (s * height, s * width, 3) if s else (height, width)
        stack = (frame_stack,) if frame_stack > 1 else ()
        self.single_observation_space = gym.spaces.Box(0, 255 if s else 6, stack + frame, dtype=np.uint8)
        self.single_action_space = gym.spaces.Discrete(5)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

        strides, three = np.array([0, -width, width, -1, 1]), np.arange(3)[:, None]
        if xp is np:
            self._strides, self._three = strides, three
            self._next_cells, self._moved, self._gain, self._reward = _NEXT_CELLS, _MOVED, _GAIN, _REWARD
        else:
            changes = np.stack(
                [_MOVED, -_GAIN, np.ones_like(_GAIN)]
            )  # of position (in strides), boxes off target, steps
            pay = np.stack([_REWARD, np.float32(SOLVED_REWARD) * (_GAIN > 0)])  # at once, and if that solves the level
            tables = _NEXT_CELLS.reshape(3, 98), changes, pay.astype(np.float32)
            tables = [np.pad(table, ((0, 0), (49 * PLAYER, 0))) for table in tables]  # their first case is player 5
            tables += [strides * three, np.array([[49], [7], [1]])]
            self._next_cells, self._changes, self._pay, self._strides, self._place_value = map(self._own, tables)
        self._flat = xp.zeros(num_envs * height * width + width, dtype=xp.uint8, **on)
        self._rows = xp.arange(num_envs, **on)
        # rows of (N,): position, boxes off target, steps, number of the level, boxes
        self._episode = xp.zeros((5, num_envs), dtype=xp.int64, **on)
        self._return = xp.zeros(num_envs, dtype=xp.float64, **on)
        # numpy asks the system for huge pages for `full`, not for `zeros`
        self._image = xp.full((num_envs * height, s, width, s, 3), 0, dtype=xp.uint8, **on) if s else None
        self._blocks = self._own(_BLOCKS[observation]) if s else None  # (7, s, s, 3)
        self._link()
        self._past = [xp.zeros_like(self._frame) for _ in range(*stack)] if stack else []  # oldest first
        self._started = False

    def _own(self, array: Any) -> Any:
        return _copy_to(self._xp, array, str(self.device))

    def _link(self) -> None:
        """The views into the buffers."""
        self._player, self._loose, self._steps, self._level, self._boxes = self._episode
        shape = self.num_envs, self.height, self.width
        self._board = self._flat[: -self.width].reshape(shape)  # (N, H, W)
        frame = self.single_observation_space.shape[-3 if self._image is not None else -2 :]
        self._frame = self._board if self._image is None else self._image.reshape(self.num_envs, *frame)  # up to date

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: a module can't be copied, and a copied view would no longer share its buffer."""
        return {name: value for name, value in vars(self).items() if name not in self._VIEWS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._xp = {"numpy": np, "torch": torch}[self.backend]
        self._link()

    def __copy__(self) -> "SokobanVectorEnv":
        return copy.deepcopy(self)  # one that shares a buffer would be of no use

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[torch.Tensor, dict]:
        """Start an episode in every environment.

        Args:
            seed: restarts the random generator and the endless levels; the same seed gives the same levels.
            options: what to start from, {"levels": N boards or texts} or {"level_indices": N indices into the
                environment's `levels`}. Autoreset draws as ever.
        """
        seed = None if seed is None else operator.index(seed)
        super().reset(seed=seed)
        if seed is not None or not self._started:
            self._pool.restart(int(self.np_random.integers(2**62)) if seed is None else seed)
        options = options or {}
        if unknown := set(options) - {"levels", "level_indices"}:
            raise ValueError(f"unknown reset options {sorted(unknown)}, known are levels and level_indices")
        if "levels" in options:
            boards, number = self._own(_pad_levels(options["levels"], (self.height, self.width), "options levels")), -1
        elif "level_indices" in options:
            number = self._own(options["level_indices"])
            if self._pool.endless or ((number < 0) | (number >= len(self._pool.boards))).any():
                raise ValueError("level_indices must point into the `levels` that the environment was made with")
            boards = self._pool.boards[number]
        else:
            self._pool.fill()
            boards, number = self._pool.draw(self.num_envs)
        if len(boards) != self.num_envs:
            raise ValueError(f"reset options hold {len(boards)} levels for {self.num_envs} environments")
        self._place(self._rows, boards, number)
        self._started = True
        return self._observe(), self._pool.info()

    def step(self, actions: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Move in every environment; those whose episode ends start the next level at once (see the class)."""
        reward, terminated, truncated = self._move(actions)
        done = terminated | truncated
        info: dict[str, Any] = {}
        if self._xp is torch:  # a fixed sequence of kernels, which waits for nothing
            info = self._final_info(done, terminated)
            self._replace(done)
        elif done.any():
            info = self._final_info(done, terminated)
            finished = np.flatnonzero(done)
            self._place(finished, *self._pool.draw(len(finished)))
        self._pool.refill()
        return self._observe(), _to_torch(reward), _to_torch(terminated), _to_torch(truncated), info | self._pool.info()

    def _move(self, actions: Any) -> tuple[Any, Any, Any]:
        """The rules, for all environments at once: reward, terminated, truncated, (N,) each; boards change in place."""
        xp = self._xp
        actions = self._check_actions(actions)
        if xp is np:
            at = (
                self._player + self._three * self._strides[actions]
            )  # (3, N): the player, the cell ahead, the one behind
            before = self._flat[at]
            case = ((before[0] - PLAYER) * 49 + before[1] * 7 + before[2]).astype(np.int64)  # which of `_CASES`
            cells = self._next_cells.take(case + 98 * self._three)
            self._player[:] = np.where(self._moved[case], at[1], at[0])
            gain, reward = self._gain[case], self._reward[case]
            self._loose -= gain
            self._steps += 1
            terminated = self._loose == 0
            reward = np.where(terminated & (gain > 0), reward + SOLVED_REWARD, reward)
        else:  # the same in fewer kernels
            strides = self._strides[:, actions]
            at = self._player + strides
            before = self._flat[at]
            case = (before * self._place_value).sum(0)
            cells = self._next_cells[:, case]
            changes = self._changes[:, case]
            changes[0].mul_(strides[1])
            self._episode[:3].add_(changes)
            terminated = self._loose == 0
            reward, bonus = self._pay[:, case]
            reward += bonus * terminated
        self._flat[at] = cells
        self._return += reward
        truncated = (self._steps >= self.max_episode_steps) > terminated
        if self._image is not None:
            # Only what changed, where asking is cheap: the pixels of a cell are spread over memory that no cache holds.
            drawn = cells != before if xp is np else slice(None)
            at, cells = at[drawn], xp.asarray(cells[drawn], dtype=xp.int64)
            # A row above or below all boards is, modulo their number, another border: wall on wall.
            row = at // self.width % (self.num_envs * self.height)
            self._image[row, :, at % self.width] = self._blocks[cells]
        if self._past and xp is np:
            self._past.append(self._past.pop(0))
        elif self._past:  # in place, for a CUDA graph
            for past, following in itertools.pairwise(self._past):
                past.copy_(following)
        if self._past:
            self._past[-1][:] = self._frame
        return reward, terminated, truncated

    def _check_actions(self, actions: Any) -> Any:
        if not self._started:
            raise gym.error.ResetNeeded("call reset() before step()")
        xp = self._xp
        actions = np.asarray(_to_numpy(actions)) if xp is np else torch.as_tensor(actions, device=self.device)
        if actions.shape != (self.num_envs,) or actions.dtype in (xp.float32, xp.float64, xp.bool):
            raise ValueError(f"actions must be {self.num_envs} integers, got {actions.dtype} {tuple(actions.shape)}")
        if self.device.type != "cpu":  # without waiting for the device
            torch._assert_async(
                (actions.clamp(0, RIGHT) == actions).all(), "an action is out of range, they are 0 to 4"
            )
            return actions.long()
        wrong = (actions < 0) | (actions > RIGHT)
        if wrong.any():
            i = int(xp.where(wrong)[0][0])
            raise ValueError(f"action {int(actions[i])} of environment {i} is out of range, actions are 0 to 4")
        return xp.asarray(actions, dtype=xp.int64)

    def _place(self, rows: Any, boards: Any, number: Any) -> None:
        """Put boards (len(rows), H, W) into environments `rows`, as new episodes."""
        flat = boards.reshape(len(boards), -1)
        self._board[rows] = boards
        self._player[rows] = rows * flat.shape[1] + flat.argmax(1)  # the player's value is the highest
        self._loose[rows] = loose = (flat == BOX).sum(1)
        self._boxes[rows] = loose + (flat == BOX_ON_TARGET).sum(1)
        self._steps[rows] = self._return[rows] = 0
        self._level[rows] = number
        if self._image is not None:
            self._frame[rows] = self._pictures(boards)
        for past in self._past:
            past[rows] = self._frame[rows]

    def _pictures(self, boards: Any) -> Any:
        pixels = self._xp.moveaxis(self._blocks[self._xp.asarray(boards, dtype=self._xp.int64)], 3, 2)
        return pixels.reshape(-1, *self._frame.shape[1:])  # from (..., H, s, W, s, 3)

    def _replace(self, done: torch.Tensor) -> None:
        """`_place` fresh levels under a mask (N,), without waiting for the device."""
        boards, episode = self._pool.draw_masked(done)
        episode[0].add_(self._rows, alpha=boards[0].numel())

        def put(new: torch.Tensor, old: torch.Tensor) -> None:
            torch.where(done.reshape(-1, *[1] * (new.ndim - 1)), new, old, out=old)

        put(boards, self._board)
        torch.where(done, episode, self._episode, out=self._episode)
        self._return.masked_fill_(done, 0)
        if self._image is not None:
            put(self._pictures(boards), self._frame)
        for past in self._past:
            put(self._frame, past)

    def _observe(self) -> torch.Tensor:
        if self._past:
            return _to_torch(self._xp.stack(self._past, 1))
        return _to_torch(self._xp.asarray(self._frame, copy=True) if self.copy else self._frame)

    def _final_info(self, done: Any, terminated: Any) -> dict[str, Any]:
        """What gymnasium's same-step autoreset reports of the episodes that have just ended."""
        xp, mask = self._xp, _to_torch(done)
        last = xp.stack(self._past, 1) if self._past else xp.asarray(self._frame, copy=True)
        _, loose, steps, level, boxes = self._episode * done
        total = xp.asarray(self._return * done, dtype=xp.float32)

        def masked(**values: Any) -> dict[str, Any]:
            return {k: v for name, value in values.items() for k, v in ((name, _to_torch(value)), (f"_{name}", mask))}

        final_info = masked(
            success=xp.asarray(terminated, copy=True),
            boxes_on_target=boxes - loose,
            level=level,
            episode=masked(r=total, l=steps),
        )
        return masked(final_obs=last, final_info=final_info)

    def refill(self) -> None:
        """Put fresh levels where the pool's are used up. `step` does it by itself; for steps inside a CUDA graph."""
        self._pool.fill()

    def get_state(self, *, pool: bool = True) -> dict[str, Any]:
        """A copy of all that the future depends on: tensors, numbers and strings, fit for torch.save.

        `cells` (N, H, W); `steps`, `return` (the rewards so far), `level`, (N,) each; `frames` (N, frame_stack, ...) if
        stacked; and, unless `pool=False`, `pool`: levels, random generator, how far the next ones are made.
        """
        names = {"cells": self._board} | {name: getattr(self, f"_{name}") for name in self._COUNTERS}
        state: dict[str, Any] = {name: _to_torch(self._own(array)) for name, array in names.items()}
        if self._past:
            state["frames"] = self._observe()
        return state | ({"pool": self._pool.get_state()} if pool else {})

    def set_state(self, state: dict[str, Any]) -> torch.Tensor:
        """Go to a state of `get_state`, and return its observation.

        Only `cells` must be there: a planner that sets boards, solved ones too, gets fresh counters and keeps the pool.
        A ValueError refuses boards of another number or size, or (on the CPU) on which the rules don't hold.
        """
        cells = state["cells"]
        if tuple(cells.shape) != tuple(self._board.shape):
            raise ValueError(f"state['cells'] is {tuple(cells.shape)}, this environment's {tuple(self._board.shape)}")
        if self.device.type == "cpu":
            _check_boards(_to_numpy(cells), "state['cells']", unsolved=False)
        self._place(self._rows, self._own(cells), -1)
        for name in self._COUNTERS:
            if name in state:
                getattr(self, f"_{name}")[:] = self._own(state[name])
        for i, past in enumerate(self._past):
            past[:] = self._own(state["frames"][:, i]) if "frames" in state else past
        if "pool" in state:
            self._pool.set_state(state["pool"])
        self._started = True
        return self._observe()

    def render(self) -> tuple[Any, ...] | None:
        """One picture (8H, 8W, 3) or text for each environment, by `render_mode`."""
        boards = _to_numpy(self._board)
        if self.render_mode == "ansi":
            return tuple(map(cells_to_text, boards))
        return tuple(convert_observation(boards, "cells", "rgb")) if self.render_mode == "rgb_array" else None


class SokobanEnv(gym.Env):
    """One game of Sokoban, numpy in and out: the arguments and rules of `SokobanVectorEnv`, without autoreset.

    info holds `success`, `boxes_on_target`, `level` and, with generated levels, `level_repeats`; `reset` takes options
    {"level": board or text} or {"level_index": int}.
    """

    metadata = {"render_modes": ["human", "rgb_array", "ansi"], "render_fps": 8}

    def __init__(self, *, render_mode: str | None = None, **kwargs: Any):
        self._env = SokobanVectorEnv(1, render_mode="rgb_array" if render_mode == "human" else render_mode, **kwargs)
        self.render_mode, self._window = render_mode, None
        self.observation_space, self.action_space = self._env.single_observation_space, self._env.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        seed = None if seed is None else operator.index(seed)
        super().reset(seed=seed)
        plural = {"level": "levels", "level_index": "level_indices"}
        observation, _ = self._env.reset(seed=seed, options={plural.get(k, k): [v] for k, v in (options or {}).items()})
        if self.render_mode == "human":
            self.render()
        return observation[0].numpy(), self._info(False)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        env = self._env
        reward, terminated, truncated = env._move([action])
        env._pool.refill()
        info = self._info(bool(terminated[0]))
        if self.render_mode == "human":
            self.render()
        return env._observe()[0].numpy(), float(reward[0]), info["success"], bool(truncated[0]), info

    def _info(self, success: bool) -> dict[str, Any]:
        boxes, level = int((self._env._flat == BOX_ON_TARGET).sum()), int(self._env._level[0])
        return {"success": success, "boxes_on_target": boxes, "level": level, **self._env._pool.info()}

    def get_state(self, *, pool: bool = True) -> dict[str, Any]:
        return self._env.get_state(pool=pool)

    def set_state(self, state: dict[str, Any]) -> np.ndarray:
        return self._env.set_state(state)[0].numpy()

    def render(self) -> np.ndarray | str | None:
        frames = self._env.render()
        if self.render_mode != "human":
            return frames and frames[0]
        import pygame  # only for a window

        picture = frames[0].repeat(4, axis=0).repeat(4, axis=1).swapaxes(0, 1)  # pygame's first axis is x
        if self._window is None:
            pygame.display.init()
            pygame.display.set_caption("Sokoban")
            self._window = pygame.display.set_mode(picture.shape[:2]), pygame.time.Clock()
        screen, clock = self._window
        pygame.surfarray.blit_array(screen, picture)
        pygame.event.pump()
        pygame.display.flip()
        clock.tick(self.metadata["render_fps"])

    def close(self) -> None:
        if self._window is not None:
            import pygame

            pygame.display.quit()
            self._window = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_window": None}  # a copy opens its own

    def __copy__(self) -> "SokobanEnv":
        return copy.deepcopy(self)


class SokobanGymVectorEnv(SokobanVectorEnv):
    """What gymnasium.make_vec gives: `SokobanVectorEnv` with the conventions of gymnasium's `SyncVectorEnv`.

    numpy arrays; `autoreset_mode` NEXT_STEP, SAME_STEP or DISABLED, and for that the reset option `reset_mask`; info
    holds what `SokobanEnv` reports, an array and a mask `_...` for each name; a level solved in its very last step is
    terminated and truncated, as the wrapper TimeLimit has it.
    """

    def __init__(self, num_envs: int, *, autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP, **kwargs: Any):
        super().__init__(num_envs, **kwargs)
        self.metadata = self.metadata | {"autoreset_mode": AutoresetMode(autoreset_mode)}
        self._ended = np.zeros(self.num_envs, dtype=bool)  # the last step ended the episode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        options = dict(options or {})
        mask = options.pop("reset_mask", None)
        if mask is None:
            observation, _ = super().reset(seed=seed, options=options)
            mask = np.ones(self.num_envs, dtype=bool)
        elif seed is not None or options or not self._started or np.shape(mask) != (self.num_envs,):
            raise ValueError(f"reset_mask: {self.num_envs} bools, without seed or other options, after a full reset")
        else:
            observation = self._restart(np.asarray(mask, dtype=bool))
        self._ended &= ~mask
        return _to_numpy(observation), self._info(mask)

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        mode, started = self.metadata["autoreset_mode"], self._ended
        if mode == AutoresetMode.DISABLED and started.any():
            raise gym.error.ResetNeeded('an episode has ended: reset(options={"reset_mask": terminated | truncated})')
        if started.any():
            actions = np.where(started, NOOP, _to_numpy(self._check_actions(actions)))
        reward, terminated, _ = (np.array(_to_numpy(array)) for array in self._move(actions))
        truncated = _to_numpy(self._steps) >= self.max_episode_steps
        info: dict[str, Any] = {}
        if mode == AutoresetMode.SAME_STEP:
            ended = terminated | truncated
            if ended.any():
                last, final_obs = _to_numpy(self._observe()), np.full(self.num_envs, None, dtype=object)
                for i in np.flatnonzero(ended):
                    final_obs[i] = last[i].copy()
                final = self._info(ended, terminated)
                info = {"final_obs": final_obs, "_final_obs": ended, "final_info": final, "_final_info": ended.copy()}
                self._restart(ended)
            info |= self._info(np.ones_like(ended), terminated & ~ended)
        else:
            for array in (reward, terminated, truncated):
                array[started] = 0
            if started.any():
                self._restart(started)
            info = self._info(np.ones_like(started), terminated)
            self._ended = terminated | truncated
        self._pool.refill()
        return _to_numpy(self._observe()), reward, terminated, truncated, info

    def _restart(self, mask: np.ndarray) -> torch.Tensor:
        rows = self._xp.asarray(np.flatnonzero(mask), device=str(self.device))
        self._place(rows, *self._pool.draw(len(rows)))
        return self._observe()

    def _info(self, mask: np.ndarray, success: np.ndarray | bool = False) -> dict[str, Any]:
        """What `SokobanEnv` reports of each environment in `mask`."""
        boxes = _to_numpy((self._board == BOX_ON_TARGET).sum((1, 2)))
        values = {"success": mask & success, "boxes_on_target": boxes, "level": _to_numpy(self._level)}
        for name, share in self._pool.info().items():
            values[name] = np.full(self.num_envs, float(share))
        return {
            key: array
            for name, value in values.items()
            for key, array in ((name, np.where(mask, value, np.zeros_like(value))), (f"_{name}", mask.copy()))
        }


def _make_single(**kwargs: Any) -> SokobanEnv:
    """gymnasium.make's entry point: there the TimeLimit wrapper keeps the step limit, so that its argument counts."""
    return SokobanEnv(**{"max_episode_steps": None} | kwargs)


gym.register(
    "Sokoban-v0",
    "sokoban_env:_make_single",
    vector_entry_point="sokoban_env:SokobanGymVectorEnv",
    max_episode_steps=120,
)
