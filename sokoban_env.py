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
the CPU, where a numpy operation costs a fifth of a torch one to dispatch) or on torch tensors (`xp` is torch: the GPU,
where nothing in a step waits for the device).

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
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

WALL, FLOOR, TARGET, BOX, BOX_ON_TARGET, PLAYER, PLAYER_ON_TARGET = range(7)
CELL_CHARS = "# .$*@+"  # XSB's character for each cell value
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


# `_rule` for every case, number 49 player + 7 ahead + beyond, so that a step is a few table look-ups.
_CASES = [_rule(*cells) for cells in itertools.product(range(7), repeat=3)]
_GAIN = np.array([case[4] for case in _CASES])  # (343,) boxes that came onto a target
_NEXT_CELLS = np.array([case[:3] for case in _CASES], dtype=np.uint8).T.copy()  # (3, 343)
_CHANGES = np.stack([[case[3] for case in _CASES], -_GAIN, np.ones_like(_GAIN)])  # of position, boxes to go and steps
_PAY = np.stack([STEP_REWARD + BOX_REWARD * _GAIN, SOLVED_REWARD * (_GAIN > 0)]).astype(np.float32)  # and if it solves


# --------------------------------------------------------------------------------------------- observations and text


def convert_observation(array: Any, source: str, target: str) -> Any:
    """Turn an observation into another kind: `cells` (..., H, W), `tiny_rgb` (..., H, W, 3), `rgb` (..., 8H, 8W, 3).

    All are uint8; leading axes (environments, stacked frames) are kept; numpy gives numpy, torch gives torch.
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


_OTHER_LETTERS = str.maketrans("-_pPbBo", "  @+$*.")  # as .sok files may have them


def _plain_row(line: str) -> str:
    """A line without run lengths (`3#`, `2(-$)`), in XSB's letters, with spaces for floor."""
    runs = r"(\d{1,3})(?:\(([^()]*)\)|([^\d()]))"
    line, expanded = "", line.rstrip()
    while line != expanded and len(expanded) < 1000:
        line, expanded = expanded, re.sub(runs, lambda run: int(run[1]) * (run[2] or run[3] or ""), expanded)
    return expanded.translate(_OTHER_LETTERS)


def _parse_levels(text: str, name: str) -> list[np.ndarray]:
    """Every level of a text as a board of its own size; `name` stands before the line in errors."""
    if "<L>" in text:  # an .slc collection
        text = re.sub(r"</Level>(?=[^\n]*<L>)", "</Level>\n\n", text)
        text = "\n".join(html.unescape("|".join(re.findall("<L>(.*?)</L>", line))) for line in text.splitlines())
    text = re.sub(r"(?ims)^comment:\s*?$.*?^comment.end:", lambda comment: "\n" * comment[0].count("\n"), text)
    levels, rows = [], []  # a row is (number of its line, text)
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        plain = _plain_row(line)
        known = not set(plain) - {*CELL_CHARS, "|"}
        if not known and plain.lstrip().startswith("#"):
            odd = re.search(r"[^# .$*@+_pPbBo|\d()-]", line) or re.search(r"[()\d]", line)
            place = f"{name}:{number}:{odd.start() + 1}"
            raise ValueError(f"{place}: unknown character {odd[0]!r}, known are {CELL_CHARS!r}")
        parts = plain.split("|")
        if known and any("#" in (part.strip()[:1], part.strip()[-1:]) for part in parts):
            rows += [(number, part) for part in parts]
        elif known and rows and line.strip() and not plain.strip():
            rows.append((number, ""))  # dashes: a row of floor, or a line between two levels
        elif rows:  # a blank line, a comment or a title ends the level, or levels, if each of the parts has a player
            parts = [list(part) for filled, part in itertools.groupby(rows, lambda row: row[1].strip() != "") if filled]
            players = [any("@" in row or "+" in row for _, row in part) for part in parts]
            levels += parts if all(players) else [rows]
            rows = []
    if not levels:
        return []
    shapes = [(len(rows), max(len(row) for _, row in rows)) for rows in levels]
    height, width = np.max(shapes, axis=0)
    lines = [row.ljust(width) for rows in levels for _, row in rows + [(0, "")] * (height - len(rows))]
    values = "".join(lines).translate({ord(char): cell for cell, char in enumerate(CELL_CHARS)}).encode()
    boards = np.full((len(levels), height + 2, width + 2), FLOOR, dtype=np.uint8)  # with a rim of outside around each
    boards[:, 1:-1, 1:-1] = np.frombuffer(values, dtype=np.uint8).reshape(len(levels), height, width)
    corners = np.arange(len(levels)) * boards[0].size
    outside = _flood(np, boards.ravel() != WALL, corners, width + 2, boards[0].size)[0].reshape(boards.shape)
    if (outside & (boards != FLOOR)).any():
        i, row, column = np.argwhere(outside & (boards != FLOOR))[0]
        number, row = levels[i][row - 1]
        raise ValueError(f"{name}:{number}:{column}: {row[column - 1]!r} is outside the walls, or they are not closed")
    boards[outside] = WALL
    places, solved = [f"{name}:{rows[0][0]}" for rows in levels], ~(boards == BOX).any((1, 2))
    _check_boards(boards, places, unsolved=bool(solved.all()))
    for place in itertools.compress(places, solved):
        warnings.warn(f"{place}: the level is skipped: it is solved already", stacklevel=2)
    boards = [board[1 : 1 + h, 1 : 1 + w] for board, (h, w) in zip(boards, shapes, strict=True)]
    return list(itertools.compress(boards, ~solved))


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
        (boards[:, rim].any(1), "an opening: every cell of the outer border must be wall"),
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
    names file and line of what can't be played.
    """
    path, boards, errors = pathlib.Path(path), [], []
    suffixes = (".txt", ".xsb", ".sok", ".slc")
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in suffixes) if path.is_dir() else [path]
    for file in files:
        try:
            found = _parse_levels(file.read_text(encoding="utf-8-sig", errors="replace"), str(file))
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
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(f"; {i}\n{cells_to_text(board)}\n\n" for i, board in enumerate(levels)))
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


def _to_numpy(array: Any) -> Any:
    return array.cpu().numpy() if isinstance(array, torch.Tensor) else array


def _to_torch(array: Any) -> torch.Tensor:
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


def _copy_to(xp: Any, array: Any, device: str) -> Any:
    """A copy of a tensor or array for the backend, on its device."""
    return np.array(_to_numpy(array)) if xp is np else torch.asarray(array, device=device, copy=True)


def _columns(table: Any, index: Any) -> Any:
    """table[:, index]"""
    return table.take(index, 1) if isinstance(table, np.ndarray) else table[:, index]


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
    xp: Any, device: str, settings: tuple[int, int, int], seed: int, batches: range, solve: bool, max_pulls: int = 0
) -> tuple[Any, list[str]]:
    """Make batches of levels side by side: boards (L, H, W), and their solutions if `solve`.

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
        return levels, []

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
    return levels, [row[row > 0].tobytes().decode() for row in text]


class _Pool:
    """Where an environment's levels come from: a fixed set, drawn at random, or the generator, each level once.

    They lie in a ring, and the p-th draw takes slot p % size, so that a GPU draws without waiting. `fill` puts new
    ones where the old are used up. For that it reads how far the draws went, and so waits for the device, once in
    sixteen steps or more; a program that captures steps in a CUDA graph calls it between rollouts, as `envs.refill()`.
    """

    _COUNTERS = ("seed", "batch", "serial", "most")
    _TENSORS = ("boards", "facts", "spare", "last")
    SIDE_BY_SIDE = 64  # batches made at once on a GPU, by some 23,000 kernels however many they are

    def __init__(
        self, backend: str, device: str, settings: tuple[int, int, int], levels: Any, num_envs: int, exclude: Any
    ):
        self.backend, self.on, self.settings = backend, {"device": device}, settings
        self.levels, self.exclude = levels, exclude
        if device == "cpu":  # where asking how far the draws went costs nothing
            self.size, self.least, self.batches = max(64, 2 * num_envs), num_envs, 1
        else:
            self.size, self.least, self.batches = max(4096, 32 * num_envs), max(2048, 16 * num_envs), self.SIDE_BY_SIDE
        self.restart(0)

    @property
    def xp(self) -> Any:
        return np if self.backend == "numpy" else torch

    def describe(self, boards: Any, number: Any) -> Any:
        """What an episode on each board begins with: the rows of the environment's `_episode`, (5, L)."""
        flat = boards.reshape(len(boards), -1)
        loose, zero = (flat == BOX).sum(1), self.xp.zeros_like(flat[:, 0], dtype=self.xp.int64)
        # the player's value is the highest
        return self.xp.stack([flat.argmax(1), loose, zero, zero + number, loose + (flat == BOX_ON_TARGET).sum(1)])

    def restart(self, seed: int) -> None:
        xp, shape = self.xp, (self.size, *self.settings[:2])
        vars(self).update(dict.fromkeys(self._COUNTERS, 0), seed=seed, rng=np.random.default_rng(seed))
        self.boards = xp.zeros(shape, dtype=xp.uint8, **self.on)
        self.facts = xp.zeros((5, self.size), dtype=xp.int64, **self.on)
        self.spare = self.boards[:0]
        self.last = xp.full((), -1, **self.on)  # the number of the last draw, which is at most the `most`-th

    def draw(self, done: Any) -> tuple[Any, Any]:
        """A board for each environment in `done`, and its facts: indices for numpy, for torch a mask (N,), which gets
        a row for every environment."""
        capturing = self.on["device"].startswith("cuda") and torch.cuda.is_current_stream_capturing()
        if self.most + len(done) > self.serial and not capturing:
            self.fill()
        self.most += len(done)
        number = self.last + (1 + np.arange(len(done)) if self.backend == "numpy" else done.cumsum(0))
        self.last[...] = number[-1]
        slot = number % len(self.boards)
        return self.boards[slot], _columns(self.facts, slot)

    def fill(self) -> None:
        """Put levels where the ring is used up, until every environment can have a fresh one."""
        size = len(self.boards)  # of another device, after `set_state`
        self.most = int(self.last) + 1
        if self.most > self.serial:  # the ring went round, in a CUDA graph without `refill`
            self.most = self.serial
            self.last[...] = self.serial - 1
        while self.serial - self.most < min(self.least, size // 2):
            number, boards = self.next_levels(size - self.serial + self.most)
            slots = (self.serial + self.xp.arange(len(boards), **self.on)) % size
            self.boards[slots], self.facts[:, slots] = boards, self.describe(boards, number)
            self.serial += len(boards)

    def next_levels(self, most: int) -> tuple[Any, Any]:
        """At most so many new levels: their numbers and boards."""
        if self.levels is not None:
            index = (self.rng.random(most) * len(self.levels)).astype(np.int64)  # twice as fast as `integers`
            index = self.xp.asarray(index, **self.on)
            return index, self.levels[index]
        for _ in range(20):
            if not len(self.spare):
                batches = range(self.batch, self.batch + self.batches)
                self.batch = batches.stop
                self.spare, _ = _generate(self.xp, self.on["device"], self.settings, self.seed, batches, solve=False)
                if self.exclude is not None:
                    kept = exclude_levels(self.spare, self.exclude)
                    self.spare = self.spare[self.xp.asarray(kept, **self.on)]
        if not len(self.spare):
            height, width, boxes = self.settings
            raise ValueError(f"the generator finds no {height}x{width} level with {boxes} boxes besides `exclude`")
        boards, self.spare = self.spare[:most], self.spare[most:]
        return self.serial + self.xp.arange(len(boards), **self.on), boards

    def get_state(self) -> dict[str, Any]:
        tensors = {name: _to_torch(_copy_to(self.xp, getattr(self, name), **self.on)) for name in self._TENSORS}
        counters = {name: getattr(self, name) for name in self._COUNTERS}
        return {"random": self.rng.bit_generator.state, **tensors, **counters}

    def set_state(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state = state["random"]
        vars(self).update({name: state[name] for name in self._COUNTERS})
        vars(self).update({name: _copy_to(self.xp, state[name], **self.on) for name in self._TENSORS})


def generate_levels(
    num_levels: int,
    *,
    size: int | tuple[int, int] = 10,
    num_boxes: int = 4,
    seed: int = 0,
    max_pulls: int | None = None,
) -> tuple[torch.Tensor, list[str]]:
    """Levels (L, H, W), uint8, all different, and a LURD solution of each (udlr moves, UDLR pushes).

    The same seed gives the same levels, another one others (on the smallest boards chance repeats some: see
    `exclude_levels`). A ValueError names a size or number of boxes that can't be generated, or says that there are
    fewer levels than asked for.

    With `max_pulls` the levels stand at most that many pulls of the generator's reverse play before their end, some
    boxes on their targets and the player beside the box that it is to push: a model of rewards and ends learns from it.
    """
    height, width = _check_size(size)
    num_levels, num_boxes, seed = map(operator.index, (num_levels, num_boxes, seed))
    max_pulls = operator.index(max_pulls or 0)
    _check_generator(height, width, num_boxes)
    found, batch, barren = {}, 0, 0
    while len(found) < num_levels:
        before = len(found)
        settings = height, width, num_boxes
        boards, solutions = _generate(np, "cpu", settings, seed, range(batch, batch + 1), True, max_pulls)
        found |= dict(zip((board.tobytes() for board in boards), solutions, strict=True))
        # Twenty batches without a level, or two with only known ones: there are no more.
        batch, barren = batch + 1, 0 if len(found) > before else barren + 10 * bool(solutions) + 1
        if barren >= 20:
            what = f"{height}x{width} levels with {num_boxes} boxes"
            raise ValueError(f"found only {before} different {what}, asked for {num_levels}")
    chosen = np.frombuffer(bytearray().join([*found][:num_levels]), dtype=np.uint8).reshape(-1, height, width)
    return torch.tensor(chosen), [*found.values()][:num_levels]


# ------------------------------------------------------------------------------------------------------- environments
class SokobanVectorEnv(gym.vector.VectorEnv):
    """`num_envs` games of Sokoban in lockstep, with same-step autoreset.

    Args:
        num_envs: `N`.
        size: board size, an int or (height, width).
        num_boxes: boxes of each generated level; levels that are handed in may have any number.
        max_episode_steps: steps after which an unsolved episode is truncated; None for no limit.
        levels: (L, H, W), or a list of boards or texts, of which each episode draws one at random; smaller boards are
            padded with wall. None: fresh levels for ever, from the generator.
        observation: `cells` (H, W), `tiny_rgb` (H, W, 3) or `rgb` (8H, 8W, 3), all uint8.
        device: where the state lives and what is returned is: "cpu", "cuda", "cuda:1".
        frame_stack: above 1, an observation is the last frames (frame_stack, ...), oldest first; a reset fills it.
        render_mode: `rgb_array` or `ansi`.
        copy: False returns a view of the environment's observation buffer (if frames aren't stacked), which the next
            `step`, `reset` or `set_state` overwrites. Everything else that is returned is the caller's own.
        backend: "numpy" or "torch"; None takes numpy on the CPU and torch elsewhere.
        exclude: levels, as in `levels`, that the generator must not hand out: those of an evaluation.

    `step` returns tensors on `device`: observation (N, ...), reward (N,) float32, terminated (N,) and truncated (N,)
    bool (a level solved in its last step is terminated, not truncated), and info. When an episode ends (with torch
    always, for the host does not wait to learn that) info holds
    - `final_obs` (N, ...): the last observation of the episode where the mask `_final_obs` (N,) is True, elsewhere what
      `step` returns: `info.get("final_obs", observation)` is the true next observation of every row;
    - `final_info`: a dict of (N,) tensors, each with its mask `_...` (N,): `success`, `boxes_on_target`, `level` (index
      in `levels`, serial number of a generated one, or -1), and `episode`, a dict of `r` (return) and `l` (length).
    """

    metadata = {"render_modes": ["rgb_array", "ansi"], "render_fps": 8, "autoreset_mode": AutoresetMode.SAME_STEP}
    _VIEWS = ("_board", "_frame", "_player", "_loose", "_steps", "_level", "_boxes")  # what `_link` makes
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
        self.device = torch.empty(0, device=device).device  # with its index
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
        xp, on = self._xp, {"device": str(self.device)}
        if levels is None:
            _check_generator(height, width, num_boxes)
        else:
            levels = self._own(_pad_levels(levels, (height, width), "levels"))
        exclude = None if exclude is None else _pad_levels(exclude, (height, width), "exclude")
        self.num_envs, self.observation, self.render_mode, self.copy = num_envs, observation, render_mode, copy
        self.max_episode_steps = math.inf if max_episode_steps is None else steps
        self._pool = _Pool(self.backend, str(self.device), (height, width, num_boxes), levels, num_envs, exclude)

        s = {"cells": 0, "tiny_rgb": 1, "rgb": 8}[observation]  # pixels of a cell's side
        frame = (s * height, s * width, 3) if s else (height, width)
        stack = (frame_stack,) if frame_stack > 1 else ()
        self.single_observation_space = gym.spaces.Box(0, 255 if s else 6, stack + frame, dtype=np.uint8)
        self.single_action_space = gym.spaces.Discrete(5)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

        strides = np.arange(3)[:, None] * [0, -width, width, -1, 1]  # from the player to the three cells of a rule
        tables = strides, np.array([[49], [7], [1]], dtype=np.int16), _NEXT_CELLS, _CHANGES, _PAY
        self._strides, self._place_value, self._next_cells, self._changes, self._pay = map(self._own, tables)
        self._flat = xp.zeros(num_envs * height * width + width, dtype=xp.uint8, **on)
        self._start = xp.arange(num_envs, **on) * (height * width)  # where each board starts
        self._all = xp.arange(num_envs) if xp is np else xp.ones(num_envs, dtype=xp.bool, **on)
        # rows of (N,): position, boxes off target, steps, number of the level, boxes
        self._episode = xp.zeros((5, num_envs), dtype=xp.int64, **on)
        self._return = xp.zeros(num_envs, dtype=xp.float64, **on)
        # numpy asks the system for huge pages for `full`, not for `zeros`
        self._image = xp.full((num_envs * height, s, width, s, 3), 0, dtype=xp.uint8, **on) if s else None
        self._blocks = self._own(_BLOCKS[observation]) if s else None  # (7, s, s, 3)
        self._link()
        self._past = [xp.zeros_like(self._frame) for _ in range(*stack)] if stack else []  # oldest first
        self._started = False

    @property
    def _xp(self) -> Any:
        return np if self.backend == "numpy" else torch

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
        """For copy and pickle: a copied view would no longer share its buffer."""
        return {name: value for name, value in vars(self).items() if name not in self._VIEWS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
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
        if seed is not None and not hasattr(seed, "__index__"):
            raise TypeError(f"seed must be an integer, got {seed!r}: all environments share one random generator")
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
            number, levels = self._own(options["level_indices"]), self._pool.levels
            if levels is None or ((number < 0) | (number >= len(levels))).any():
                raise ValueError("level_indices must point into the `levels` that the environment was made with")
            boards = levels[number]
        else:
            self._place(self._all, *self._pool.draw(self._all))
            return self._observe(), {}
        if len(boards) != self.num_envs:
            raise ValueError(f"reset options hold {len(boards)} levels for {self.num_envs} environments")
        self._place(self._all, boards, self._pool.describe(boards, number))
        return self._observe(), {}

    def step(self, actions: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Move in every environment; those whose episode ends start the next level at once (see the class)."""
        reward, terminated, truncated = self._move(actions)
        done = terminated | truncated
        info: dict[str, Any] = {}
        if self.backend == "torch" or done.any():  # torch: a fixed sequence of kernels, which waits for nothing
            info = self._final_info(done, terminated)
            self._restart(done)
        return self._observe(), _to_torch(reward), _to_torch(terminated), _to_torch(truncated), info

    def _move(self, actions: Any) -> tuple[Any, Any, Any]:
        """The rules, for all environments at once: reward, terminated, truncated, (N,) each; boards change in place."""
        strides = _columns(self._strides, self._check_actions(actions))
        at = self._player + strides  # (3, N): the player, the cell ahead, the one behind
        before = self._flat[at]
        case = (before * self._place_value).sum(0)  # which of `_CASES`
        cells, changes = _columns(self._next_cells, case), _columns(self._changes, case)
        moves, episode = changes[0], self._episode[:3]  # names, for `x[0] += y` would copy x[0] onto itself
        moves *= strides[1]
        episode += changes
        terminated = self._loose == 0
        reward, bonus = _columns(self._pay, case)
        reward += bonus * terminated
        self._flat[at] = cells
        self._return += reward
        truncated = (self._steps >= self.max_episode_steps) > terminated
        if self._image is not None:
            # Only what changed, where asking is cheap: the pixels of a cell are spread over memory that no cache holds.
            drawn = cells != before if self.backend == "numpy" else slice(None)
            at, cells = at[drawn], self._xp.asarray(cells[drawn], dtype=self._xp.int64)
            # A row above or below all boards is, modulo their number, another border: wall on wall.
            row = at // self.width % (self.num_envs * self.height)
            self._image[row, :, at % self.width] = self._blocks[cells]
        if self._past and self.backend == "numpy":
            self._past.append(self._past.pop(0))
        for past, following in itertools.pairwise(self._past) if self.backend == "torch" else ():
            past.copy_(following)  # in place, for a CUDA graph
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
            in_range = (actions.clamp(0, RIGHT) == actions).all()
            torch._assert_async(in_range, "an action is out of range, they are 0 to 4")
            return actions.long()
        wrong = (actions < 0) | (actions > RIGHT)
        if wrong.any():
            i = int(xp.where(wrong)[0][0])
            raise ValueError(f"action {int(actions[i])} of environment {i} is out of range, actions are 0 to 4")
        return xp.asarray(actions, dtype=xp.int64)

    def _place(self, done: Any, boards: Any, facts: Any) -> None:
        """New episodes on these boards, of which `_Pool.describe` gives the facts.

        `done` and the rows of `boards`: indices for numpy; for torch a mask (N,), and a row for every environment.
        """
        indexed = self.backend == "numpy"
        position = facts[0]
        position += self._start[done] if indexed else self._start

        def put(old: Any, new: Any) -> None:
            if indexed:
                old[done] = new
            else:
                torch.where(done.reshape(-1, *[1] * (old.ndim - 1)), new, old, out=old)

        put(self._board, boards)
        put(self._episode.T, facts.T)
        put(self._return, facts[2])  # zeros
        if self._image is not None:
            put(self._frame, self._pictures(boards))
        for past in self._past:
            put(past, self._frame[done] if indexed else self._frame)
        self._started = True

    def _restart(self, done: Any) -> None:
        """New episodes on levels of the pool, where `done` (N,)."""
        done = np.flatnonzero(done) if self.backend == "numpy" else done
        self._place(done, *self._pool.draw(done))

    def _pictures(self, boards: Any) -> Any:
        pixels = self._xp.moveaxis(self._blocks[self._xp.asarray(boards, dtype=self._xp.int64)], 3, 2)
        return pixels.reshape(-1, *self._frame.shape[1:])  # from (..., H, s, W, s, 3)

    def _observe(self) -> torch.Tensor:
        if self._past:
            return _to_torch(self._xp.stack(self._past, 1))
        return _to_torch(self._xp.asarray(self._frame, copy=True) if self.copy else self._frame)

    def _final_info(self, done: Any, terminated: Any) -> dict[str, Any]:
        """What gymnasium's same-step autoreset reports of the episodes that have just ended."""
        xp, mask = self._xp, _to_torch(done)
        last = xp.stack(self._past, 1) if self._past else xp.asarray(self._frame, copy=True)  # before the next begins
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
        boards = self._own(cells)
        self._place(self._all, boards, self._pool.describe(boards, -1))
        for name in self._COUNTERS:
            if name in state:
                getattr(self, f"_{name}")[:] = self._own(state[name])
        for i, past in enumerate(self._past):
            past[:] = self._own(state["frames"][:, i]) if "frames" in state else past
        if "pool" in state:
            self._pool.set_state(state["pool"])
        return self._observe()

    def render(self) -> tuple[Any, ...] | None:
        """One picture (8H, 8W, 3) or text for each environment, by `render_mode`."""
        boards = _to_numpy(self._board)
        if self.render_mode == "ansi":
            return tuple(map(cells_to_text, boards))
        return tuple(convert_observation(boards, "cells", "rgb")) if self.render_mode == "rgb_array" else None


class SokobanEnv(gym.Env):
    """One game of Sokoban, numpy in and out: the arguments and rules of `SokobanVectorEnv`, without autoreset.

    info holds `success`, `boxes_on_target` and `level`; `reset` takes options {"level": board or text} or
    {"level_index": int}.
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
        info = self._info(bool(terminated[0]))
        if self.render_mode == "human":
            self.render()
        return env._observe()[0].numpy(), float(reward[0]), info["success"], bool(truncated[0]), info

    def _info(self, success: bool) -> dict[str, Any]:
        boxes, level = int((self._env._flat == BOX_ON_TARGET).sum()), int(self._env._level[0])
        return {"success": success, "boxes_on_target": boxes, "level": level}

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
        elif seed is not None or options or not self._started or np.shape(mask) != (self.num_envs,) or not np.any(mask):
            raise ValueError(
                f"reset_mask: {self.num_envs} bools, some True, without seed or options, after a full reset"
            )
        else:
            self._restart(self._own(np.asarray(mask, dtype=bool)))
            observation = self._observe()
        self._ended &= ~mask
        return _to_numpy(observation), self._info(mask)

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        mode, begin = self.metadata["autoreset_mode"], self._ended
        if mode == AutoresetMode.DISABLED and begin.any():
            raise gym.error.ResetNeeded('an episode has ended: reset(options={"reset_mask": terminated | truncated})')
        actions = np.where(begin, NOOP, _to_numpy(self._check_actions(actions)))
        reward, terminated, _ = (np.array(_to_numpy(array)) for array in self._move(actions))
        truncated = _to_numpy(self._steps) >= self.max_episode_steps
        for array in (reward, terminated, truncated):
            array[begin] = 0
        done, info = terminated | truncated, {}
        if mode != AutoresetMode.SAME_STEP:
            self._ended = done
        elif done.any():
            last, final_obs = _to_numpy(self._observe()), np.full(self.num_envs, None, dtype=object)
            for i in np.flatnonzero(done):
                final_obs[i] = last[i].copy()
            info = {"final_obs": final_obs, "_final_obs": done, "_final_info": done.copy()}
            info["final_info"] = self._info(done, terminated)
            begin = done
        if begin.any():
            self._restart(self._own(begin))
        info |= self._info(np.ones_like(done), terminated & ~begin)
        return _to_numpy(self._observe()), reward, terminated, truncated, info

    def _info(self, mask: np.ndarray, success: np.ndarray | bool = False) -> dict[str, Any]:
        """What `SokobanEnv` reports of each environment in `mask`."""
        boxes = _to_numpy((self._board == BOX_ON_TARGET).sum((1, 2)))
        info = {}
        for name, value in (("success", success), ("boxes_on_target", boxes), ("level", _to_numpy(self._level))):
            info |= {name: mask * value, f"_{name}": mask.copy()}
        return info


def _make_single(**kwargs: Any) -> SokobanEnv:
    """gymnasium.make's entry point: there the TimeLimit wrapper keeps the step limit, so that its argument counts."""
    return SokobanEnv(**{"max_episode_steps": None} | kwargs)


gym.register(
    "Sokoban-v0",
    "sokoban_env:_make_single",
    vector_entry_point="sokoban_env:SokobanGymVectorEnv",
    max_episode_steps=120,
)
