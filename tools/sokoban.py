"""Sokoban at the terminal: play levels, write them to files, draw them, check solutions.

    python tools/sokoban.py play --size 8 --num-boxes 2                      # arrow keys; or --levels levels.txt
    python tools/sokoban.py generate --num-levels 1000 --output levels.txt --solutions solutions.txt
    python tools/sokoban.py check levels.txt solutions.txt
    python tools/sokoban.py render --levels levels.txt --output levels.png   # without --levels: generated ones

A levels path is a Boxoban or XSB file, or a folder of them. `python tools/sokoban.py play --help` lists the options.
"""

import os
import pathlib
import re
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import torch
import tyro

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from sokoban_env import (
    BOX,
    BOX_ON_TARGET,
    CELL_CHARS,
    DOWN,
    LEFT,
    NOOP,
    RIGHT,
    UP,
    SokobanEnv,
    SokobanVectorEnv,
    convert_observation,
    generate_levels,
    load_levels,
    save_levels,
)

LETTERS = {"u": UP, "d": DOWN, "l": LEFT, "r": RIGHT}
CHUNK = 1024  # levels replayed at once
GAP = 8  # pixels between the boards of a contact sheet, and around them


def play(
    levels: Path | None = None, size: int | tuple[int, int] = 10, num_boxes: int = 4, seed: int | None = None
) -> None:
    """Play in the terminal: arrow keys move, u undoes, r restarts, n goes to the next level, q quits.

    The counters count what moved the player; walking into a wall is free here.

    Args:
        levels: file or folder of levels, played in order; without it they are generated and never end.
        size: board size of generated levels, one number or height and width.
        num_boxes: boxes of generated levels.
        seed: seed of generated levels; without it they differ from time to time.
    """
    try:
        import curses  # not there on every system, and only this command needs it
    except ImportError:
        raise ValueError("play needs the module curses; on Windows: pip install windows-curses") from None

    _check_least("seed", seed, 0)
    boards = None if levels is None else load_levels(levels)
    if boards is not None:
        size = tuple(boards.shape[1:])
    env = SokobanEnv(size=size, num_boxes=num_boxes, max_episode_steps=None, levels=boards)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ValueError("play needs a terminal")
    if boards is None:
        print("generating levels ...", flush=True)
        env.reset(seed=seed)  # the slow part, while the message can be seen
    try:
        played, solved = curses.wrapper(_play, env, 0 if boards is None else len(boards))
    except curses.error as e:
        raise ValueError(f"can't use this terminal: {e}") from None
    print(f"solved {solved} of {played} level{'s' * (played != 1)}")


def _play(screen, env: SokobanEnv, num_levels: int) -> tuple[int, int]:
    """The game's loop; returns how many levels were shown and how many were solved."""
    import curses

    arrows = {curses.KEY_UP: UP, curses.KEY_DOWN: DOWN, curses.KEY_LEFT: LEFT, curses.KEY_RIGHT: RIGHT}
    curses.curs_set(0)
    styles = [curses.A_NORMAL] * 7
    if curses.has_colors():
        curses.use_default_colors()
        colors = (curses.COLOR_BLUE, -1, curses.COLOR_RED, curses.COLOR_YELLOW, curses.COLOR_GREEN, curses.COLOR_CYAN)
        for pair, color in enumerate((*colors, curses.COLOR_CYAN), start=1):
            curses.init_pair(pair, color, -1)
            styles[pair - 1] = curses.color_pair(pair) | (curses.A_BOLD if color >= 0 else 0)

    number, solved, options = 0, set(), None
    while True:  # a level
        if num_levels:
            options = {"level_index": number % num_levels}
        elif number:
            options = {}
        # The first generated level is already there, drawn by the reset that was given the seed.
        board = env.get_state(pool=False)["cells"][0].numpy() if options is None else env.reset(options=options)[0]
        history, pushes = [], [0]  # the boards before each step, and the pushes up to each
        key = None
        while key != ord("n"):  # a key
            done = not (board == BOX).any()
            if done:
                solved.add(number)
            on_target, num_boxes = int((board == BOX_ON_TARGET).sum()), int(_boxes(board).sum())
            _draw(
                screen,
                board,
                styles,
                f"level {number % num_levels + 1} of {num_levels}" if num_levels else f"level {number + 1}",
                f"steps {len(history)}  pushes {pushes[-1]}  boxes on target {on_target}/{num_boxes}",
                "solved! n next level, u undo, r restart, q quit"
                if done
                else "arrows move, u undo, r restart, n next level, q quit",
            )
            key = screen.getch()
            if key == ord("q"):
                return number + 1, len(solved)
            if key in arrows and not done:
                after = env.step(arrows[key])[0]
                if (after != board).any():
                    history.append(board)
                    pushes.append(pushes[-1] + int((_boxes(after) != _boxes(board)).any()))
                    board = after
            elif key in (ord("u"), ord("r")) and history:
                keep = len(history) - 1 if key == ord("u") else 0
                board = env.set_state({"cells": torch.from_numpy(history[keep])[None]})
                del history[keep:], pushes[keep + 1 :]
        number += 1


def _draw(screen, board: np.ndarray, styles: list[int], title: str, counters: str, help_line: str) -> None:
    rows, columns = screen.getmaxyx()
    height, width = board.shape
    cell_width = 2 if columns > 2 * width else 1  # a character is twice as high as wide
    screen.erase()
    if rows < height + 3 or columns <= width:
        screen.addnstr(0, 0, f"the terminal is too small: {width + 1}x{height + 3} needed", columns - 1)
    else:
        screen.addnstr(0, 0, title, columns - 1)
        for y, row in enumerate(board):
            for x, cell in enumerate(row):
                text = CELL_CHARS[cell] * 2 if CELL_CHARS[cell] == "#" else CELL_CHARS[cell] + " "
                screen.addnstr(1 + y, cell_width * x, text, cell_width, styles[cell])
        screen.addnstr(height + 1, 0, counters, columns - 1)
        screen.addnstr(height + 2, 0, help_line, columns - 1)
    screen.refresh()


def _boxes(board):
    return (board == BOX) | (board == BOX_ON_TARGET)


def generate(
    output: Path,
    num_levels: int = 1000,
    size: int | tuple[int, int] = 10,
    num_boxes: int = 4,
    seed: int = 0,
    solutions: Path | None = None,
) -> None:
    """Write levels to a Boxoban text file.

    Args:
        output: the file to write.
        num_levels: how many levels, all different.
        size: board size, one number or height and width.
        num_boxes: boxes of each level.
        seed: the same seed gives the same levels.
        solutions: also write a solution of each here, a line of LURD letters (udlr moves, UDLR pushes).
    """
    _check_least("num_levels", num_levels, 1)
    _check_least("seed", seed, 0)
    for path in (output, solutions):
        _check_parent(path)
    if solutions is not None and solutions.resolve() == output.resolve():
        raise ValueError(f"{output}: levels and solutions can't go to the same file")
    levels, texts = generate_levels(num_levels, size=size, num_boxes=num_boxes, seed=seed)
    save_levels(output, levels)
    if solutions is not None:
        temporary = solutions.with_name(solutions.name + ".tmp")
        temporary.write_text("".join(f"{text}\n" for text in texts))
        os.replace(temporary, solutions)
    print(f"wrote {num_levels} levels to {output}" + (f", their solutions to {solutions}" if solutions else ""))


def render(
    output: Path,
    levels: Path | None = None,
    num_levels: int = 16,
    columns: int = 8,
    size: int | tuple[int, int] = 10,
    num_boxes: int = 4,
    seed: int = 0,
) -> None:
    """Draw a contact sheet of levels.

    Args:
        output: the PNG file to write.
        levels: file or folder of levels; without it they are generated.
        num_levels: how many levels, from the first on.
        columns: boards beside each other.
        size: board size of generated levels, one number or height and width.
        num_boxes: boxes of generated levels.
        seed: seed of generated levels.
    """
    _check_least("num_levels", num_levels, 1)
    _check_least("seed", seed, 0)
    _check_least("columns", columns, 1)
    _check_parent(output)
    if levels is None:
        boards, _ = generate_levels(num_levels, size=size, num_boxes=num_boxes, seed=seed)
    else:
        boards = load_levels(levels)[:num_levels]
    images = convert_observation(boards.numpy(), "cells", "rgb")  # (L, 8H, 8W, 3)
    num, height, width, _ = images.shape
    columns = min(columns, num)
    rows = -(-num // columns)
    sheet = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        y, x = GAP + i // columns * (height + GAP), GAP + i % columns * (width + GAP)
        sheet[y : y + height, x : x + width] = image
    temporary = output.with_name(output.name + ".tmp")
    matplotlib.image.imsave(temporary, sheet, format="png")
    os.replace(temporary, output)
    print(f"drew {num} levels to {output}")


def check(levels: tyro.conf.Positional[Path], solutions: tyro.conf.Positional[Path]) -> None:
    """Replay LURD solutions in the environment; exits with code 1 if one of them is wrong.

    A solution is right if its last letter solves the level, every letter moves the player, and those that push a box,
    and no others, are upper case. One in lower case only says nothing of pushes. Moves may be run-length coded (3r).

    Args:
        levels: file or folder of levels.
        solutions: text file with a solution a line, in the order of the levels; blank lines don't count.
    """
    boards = load_levels(levels)
    lines = solutions.read_text(encoding="utf-8").splitlines()
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if len(numbered) != len(boards):
        raise ValueError(f"{solutions}: {len(numbered)} solutions, but {levels} holds {len(boards)} levels")
    for number, line in numbered:
        plain = re.sub(r"\d+(?=[udlrUDLR])", lambda run: " " * len(run[0]), line)
        if unknown := [(i, char) for i, char in enumerate(plain, start=1) if char.lower() not in (*LETTERS, " ")]:
            column, char = unknown[0]
            place = f"{solutions}:{number}:{column}"
            raise ValueError(f"{place}: unknown character {char!r}, a solution is written in udlrUDLR")
    runs = [re.sub(r"(\d+)(.)", lambda run: run[2] * int(run[1]), line) for _, line in numbered]
    texts = [line.replace(" ", "") for line in runs]
    faults = [
        fault
        for start in range(0, len(texts), CHUNK)
        for fault in replay(boards[start : start + CHUNK], texts[start : start + CHUNK])
    ]
    print(f"{faults.count('')} of {len(faults)} solutions are right")
    for i, fault in enumerate(faults):
        if fault:
            sys.exit(f"wrong: {solutions}:{numbered[i][0]}: of level {i} of {levels}: {fault}")


def replay(levels: torch.Tensor, solutions: list[str]) -> list[str]:
    """What is wrong with the solution of each level (L, H, W), or "" where nothing is."""
    num, length = len(solutions), max(map(len, solutions))
    text = np.array([list(solution.ljust(length, "_")) for solution in solutions])  # (L, length)
    actions = np.vectorize(lambda char: LETTERS.get(char.lower(), NOOP), otypes=[np.int64])(text)
    given, upper = torch.from_numpy(text != "_"), torch.from_numpy(np.char.isupper(text))
    tells_pushes = upper.any(1)
    envs = SokobanVectorEnv(num, size=tuple(levels.shape[1:]), levels=levels, max_episode_steps=None)
    board, _ = envs.reset(seed=0, options={"level_indices": torch.arange(num)})
    faults, open_ = [""] * num, torch.ones(num, dtype=torch.bool)
    for i in range(length):
        next_board, _, terminated, _, info = envs.step(actions[:, i])
        after = info.get("final_obs", next_board)  # what the step led to, also where the next episode has begun
        moved = (after != board).flatten(1).any(1)
        pushed = (_boxes(after) != _boxes(board)).flatten(1).any(1)
        last = ~given[:, i + 1] if i + 1 < length else torch.ones_like(given[:, i])
        for wrong, fault in (
            (given[:, i] & ~moved, "is blocked"),
            (moved & upper[:, i] & ~pushed, "is upper case, but pushes no box"),
            (pushed & ~upper[:, i] & tells_pushes, "pushes a box, but is lower case"),
            (terminated & ~last, "solves the level, but more letters follow"),
            (given[:, i] & last & ~terminated, "is the last, and the level is not solved"),
        ):
            for row in (wrong & open_).nonzero()[:, 0].tolist():
                faults[row] = f"letter {i + 1} ({text[row, i]}) {fault}"
            open_ &= ~wrong
        open_ &= ~terminated
        board = next_board
    return faults


def _check_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name} is {value}, must be at least {least}")


def _check_parent(path: Path | None) -> None:
    """Find out before the work, not after it, that there is no place for the file."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"can't write {path}: it is a folder" if path.is_dir() else f"no folder {path.parent}")


def main() -> None:
    commands = {"play": play, "generate": generate, "render": render, "check": check}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, description="Play, generate, draw and check Sokoban levels.")
    except OSError as e:
        sys.exit(f"error: {e.filename}: {e.strerror}")
    except ValueError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
