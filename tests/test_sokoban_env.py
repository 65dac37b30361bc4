"""Tests of sokoban_env.py: its rules, levels, level text, state, copies, gymnasium API and device handling.

    python -m pytest tests/test_sokoban_env.py

Everything that an episode gives out is compared with `ScalarSokoban`, one game on sets of cells, which knows nothing of
the environment's arrays and tables.

Shapes: `N` environments, `L` levels, `K` boxes, `H, W` board, `T` steps.
"""

import copy
import functools
import hashlib
import io
import itertools
import pathlib
import pickle
import re
import sys
import time
from collections import Counter
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import sokoban_env
from sokoban_env import (
    SPRITES,
    TINY_PALETTE,
    SokobanEnv,
    SokobanVectorEnv,
    cells_to_text,
    convert_observation,
    exclude_levels,
    generate_levels,
    load_levels,
    save_levels,
    text_to_cells,
)
from tools import sokoban as tool

CHARS = "# .$*@+"  # cell values 0-6: wall, floor, target, box, box on target, player, player on target
KINDS = ("cells", "tiny_rgb", "rgb")
BACKENDS = ("numpy", "torch")
ACTION_OF_LETTER = {"u": 1, "d": 2, "l": 3, "r": 4}


# ------------------------------------------------------------------------------------------------ reference and helpers


class ScalarSokoban:
    """One game of Sokoban, from the rules alone; a cell is its number in reading order."""

    def __init__(self, board: np.ndarray, limit: float = float("inf"), level: int = -1):
        flat = board.ravel().tolist()
        self.shape, self.limit, self.level = board.shape, limit, level
        self.walls = {p for p, cell in enumerate(flat) if CHARS[cell] == "#"}
        self.targets = {p for p, cell in enumerate(flat) if CHARS[cell] in ".*+"}
        self.boxes = {p for p, cell in enumerate(flat) if CHARS[cell] in "$*"}
        (self.player,) = (p for p, cell in enumerate(flat) if CHARS[cell] in "@+")
        self.steps, self.total, self.solved = 0, 0.0, False
        self.moves = (0, -board.shape[1], board.shape[1], -1, 1)

    def step(self, action: int) -> tuple[float, bool, bool, tuple[int, ...]]:
        """Reward, terminated, truncated, and the cells that changed: none, two (a walk) or three (a push)."""
        reward, changed, move, old = -0.1, (), self.moves[action], self.player
        ahead, behind = old + move, old + 2 * move
        if move and ahead not in self.walls:
            if ahead not in self.boxes:
                self.player, changed = ahead, (old, ahead)
            elif behind not in self.walls and behind not in self.boxes:
                self.boxes.remove(ahead)
                self.boxes.add(behind)
                reward += (behind in self.targets) - (ahead in self.targets)
                self.player, changed = ahead, (old, ahead, behind)
        self.steps += 1
        self.solved = self.boxes == self.targets
        if self.solved:
            reward += 10
        self.total += reward
        return reward, self.solved, not self.solved and self.steps >= self.limit, changed

    def cell(self, p: int) -> int:
        if p in self.walls:
            return 0
        return (5 if p == self.player else 3 if p in self.boxes else 1) + (p in self.targets)

    def board(self) -> np.ndarray:
        height, width = self.shape
        return np.array([self.cell(p) for p in range(height * width)], dtype=np.uint8).reshape(self.shape)

    @property
    def boxes_on_target(self) -> int:
        return len(self.boxes & self.targets)


def to_board(*rows: str) -> np.ndarray:
    """A board from its rows, without the module's own parser."""
    return np.array([[CHARS.index(char) for char in row] for row in rows], dtype=np.uint8)


def pad(board: np.ndarray, height: int, width: int) -> np.ndarray:
    """A smaller board in the upper left corner of a wall."""
    padded = np.zeros((height, width), dtype=np.uint8)
    padded[: board.shape[0], : board.shape[1]] = board
    return padded


def picture(board: np.ndarray, kind: str) -> np.ndarray:
    """The observation of a board, put together sprite by sprite."""
    if kind == "cells":
        return board.copy()
    blocks = SPRITES if kind == "rgb" else TINY_PALETTE[:, None, None]
    return np.concatenate([np.concatenate([blocks[cell] for cell in row], axis=1) for row in board], axis=0)


def random_board(rng: np.random.Generator, height: int, width: int, num_boxes: int) -> np.ndarray:
    """Scattered walls, boxes on and off targets, the player anywhere: some unsolvable, some one push from done."""
    while True:
        board = np.zeros((height, width), dtype=np.uint8)
        board[1:-1, 1:-1] = rng.random((height - 2, width - 2)) < 0.8
        floor = rng.permutation(np.flatnonzero(board))
        if len(floor) < 2 * num_boxes + 1:
            continue
        loose = int(rng.integers(1, num_boxes + 1))
        player, boxes, other = floor[0], floor[1 : num_boxes + 1], np.append(floor[num_boxes + 1 :], floor[0])
        targets = np.concatenate([boxes[loose:], rng.choice(other, loose, replace=False)])
        flat = board.ravel()
        flat[targets] += 1
        flat[boxes] += 2
        flat[player] += 4
        return board


def almost_solved(board: np.ndarray, solution: str, moves: int) -> np.ndarray:
    """The position `moves` moves before the end of a solution."""
    game = ScalarSokoban(board)
    for letter in solution[: max(0, len(solution) - moves)]:
        game.step(ACTION_OF_LETTER[letter.lower()])
    return game.board()


@functools.cache
def generated(height: int, width: int, num_boxes: int, num: int, seed: int = 1) -> tuple[torch.Tensor, list[str]]:
    return generate_levels(num, size=(height, width), num_boxes=num_boxes, seed=seed)


@functools.cache
def mixed_boards(height: int, width: int, most_boxes: int) -> tuple[np.ndarray, ...]:
    """Boards of several sizes up to (height, width), with 1 to `most_boxes` boxes, some nearly solved; all distinct."""
    rng = np.random.default_rng([height, width, most_boxes])
    boards = []
    for i in range(72):
        h, w = (height, width) if i % 3 else (rng.integers(3, height + 1), rng.integers(5, width + 1))
        most = max(1, min(most_boxes, (h - 2) * (w - 2) // 4))
        boards.append(random_board(rng, h, w, int(rng.integers(1, most + 1))))
    if min(height, width) >= 5:
        for num_boxes in range(1, min(most_boxes, (height + width) // 4) + 1):
            levels, solutions = generated(height, width, num_boxes, 24)
            boards += [
                almost_solved(level, solution, i % 6 + 1)
                for i, (level, solution) in enumerate(zip(levels.numpy(), solutions, strict=True))
            ]
    return tuple({pad(board, height, width).tobytes(): board for board in boards}.values())


def tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def assert_same(one: Any, other: Any, where: str = "output") -> None:
    """Bit for bit the same: nested containers, tensors and arrays with their types, numbers, strings."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.device == other.device and torch.equal(one, other), where
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and np.array_equal(one, other), where
    else:
        assert one == other, where


def nothing_ended(info: dict) -> bool:
    """Whether info reports the end of no episode; the torch backend always has the names for it."""
    ends = {"final_obs", "_final_obs", "final_info", "_final_info"}
    return info.keys() <= ends and not any(info[name].any() for name in info.keys() & {"_final_obs", "_final_info"})


def play(envs: SokobanVectorEnv, actions: np.ndarray) -> list[tuple]:
    """Everything that `step` returns over actions (T, N)."""
    return [envs.step(row) for row in actions]


def random_actions(seed: int, steps: int, num_envs: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, size=(steps, num_envs))


# ------------------------------------------------------------------------------------------- rules, against the scalar


def check_final_info(info: dict, ended: list[int], games: list[ScalarSokoban], frames: np.ndarray) -> None:
    """`final_obs` and `final_info` of the games in `ended`; `frames` (N, ...) is what the step led to in every game."""
    mask = np.zeros(len(games), dtype=bool)
    mask[ended] = True
    final = info["final_info"]
    values = {name: final[name] for name in ("success", "boxes_on_target", "level")} | {
        name: final["episode"][name] for name in "rl"
    }
    masks = [info["_final_obs"], info["_final_info"], *(final[f"_{name}"] for name in final if name[0] != "_")]
    for tensor in [*masks, *(final["episode"][f"_{name}"] for name in "rl")]:
        assert tensor.dtype == torch.bool and np.array_equal(tensor.numpy(), mask)
    assert all(value.shape == mask.shape for value in values.values())
    done = [games[i] for i in ended]
    assert info["final_obs"].dtype == torch.uint8 and np.array_equal(info["final_obs"].numpy(), frames)
    assert values["success"].dtype == torch.bool and values["r"].dtype == torch.float32
    assert values["success"][mask].tolist() == [game.solved for game in done]
    assert values["boxes_on_target"][mask].tolist() == [game.boxes_on_target for game in done]
    if done[0].level is not None:
        assert values["level"][mask].tolist() == [game.level for game in done]
    assert values["l"][mask].tolist() == [game.steps for game in done]
    np.testing.assert_allclose(values["r"].numpy()[mask], [game.total for game in done], rtol=0, atol=1e-4)


def compare_with_scalar(
    envs: SokobanVectorEnv,
    boards: tuple[np.ndarray, ...] | None,
    shape: tuple[int, int],
    kind: str,
    stack: int,
    limit: int,
    steps: int,
) -> Counter:
    """Step `envs` (on the levels `boards`, or endless ones) at random beside scalar games; compare all that comes out.

    Returns:
        how often each reward came up, each level was finished, and an episode was solved or cut.
    """
    num, (height, width) = envs.num_envs, shape
    padded = [pad(board, height, width) for board in boards or ()]
    number = {picture(board, kind).tobytes(): i for i, board in enumerate(padded)}
    cells = np.zeros((num, height, width), dtype=np.uint8)
    views = [memoryview(row.reshape(-1)) for row in cells]
    frame = cells if kind == "cells" else np.stack([picture(board, kind) for board in cells])
    blocks, s = (SPRITES, 8) if kind == "rgb" else (TINY_PALETTE[:, None, None], 1)
    stacked = np.zeros((num, stack, *frame.shape[1:]), dtype=np.uint8)
    expected = stacked if stack > 1 else frame
    games: list[ScalarSokoban] = [None] * num
    seen = Counter()

    def start(i: int, observation: np.ndarray) -> None:
        first = observation[-1] if stack > 1 else observation
        level = number[first.tobytes()] if boards else None  # an autoreset gives exactly one of the levels
        board = padded[level] if boards else first.copy()  # endless levels are observed as `cells`
        games[i] = ScalarSokoban(board, limit, level)
        cells[i], frame[i], stacked[i] = board, first, first

    observation, info = envs.reset(seed=7)
    assert info == {} and observation.dtype == torch.uint8 and observation.device.type == "cpu"
    for i in range(num):
        start(i, observation[i].numpy())
    assert np.array_equal(observation.numpy(), expected)
    forms = (lambda a: a, torch.from_numpy, np.ndarray.tolist, lambda a: a.astype(np.uint8))
    for t, actions in enumerate(random_actions(1, steps, num)):
        observation, reward, terminated, truncated, info = envs.step(forms[t % len(forms)](actions))
        rewards, ends, cuts, ended = [], [], [], []
        for i, action in enumerate(actions.tolist()):
            game = games[i]
            value, end, cut, changed = game.step(action)
            for p in changed:
                views[i][p] = cell = game.cell(p)
                if s > 1 or frame is not cells:
                    y, x = divmod(p, width)
                    frame[i, y * s : y * s + s, x * s : x * s + s] = blocks[cell]
            rewards.append(value)
            ends.append(end)
            cuts.append(cut)
            if end or cut:
                ended.append(i)
        stacked[:, :-1] = stacked[:, 1:]
        stacked[:, -1] = frame
        where = f"step {t}"
        assert reward.dtype == torch.float32 and terminated.dtype == truncated.dtype == torch.bool
        assert np.abs(reward.numpy() - rewards).max() < 2e-6, where
        assert terminated.tolist() == ends and truncated.tolist() == cuts, where
        if ended:
            check_final_info(info, ended, games, expected)
            seen.update(f"level {games[i].level}" for i in ended)
            for i in ended:
                start(i, observation[i].numpy())
        else:
            assert nothing_ended(info), where
        assert np.array_equal(observation.numpy(), expected), where
        seen.update(rewards)
        seen["solved"] += sum(ends)
        seen["cut"] += sum(cuts)
    return seen


class Case(NamedTuple):
    backend: str
    kind: str
    stack: int
    shape: tuple[int, int]
    most_boxes: int
    limit: int
    num_envs: int
    steps: int


CASES = [
    Case("numpy", "cells", 1, (5, 5), 2, 12, 64, 1200),
    Case("numpy", "cells", 4, (7, 9), 3, 25, 64, 800),
    Case("numpy", "cells", 1, (20, 20), 8, 60, 32, 600),
    Case("numpy", "cells", 2, (3, 14), 2, 20, 16, 800),
    Case("numpy", "tiny_rgb", 4, (12, 6), 4, 30, 32, 800),
    Case("numpy", "rgb", 1, (7, 7), 2, 20, 32, 600),
    Case("torch", "cells", 1, (10, 10), 4, 40, 128, 600),
    Case("torch", "tiny_rgb", 4, (5, 11), 3, 20, 32, 600),
    Case("torch", "rgb", 1, (6, 6), 2, 20, 32, 500),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.backend}-{c.kind}-{c.stack}-{c.shape[0]}x{c.shape[1]}")
def test_every_output_equals_the_scalar_simulator(case: Case):
    boards = mixed_boards(*case.shape, case.most_boxes)
    envs = SokobanVectorEnv(
        case.num_envs,
        size=case.shape,
        levels=list(boards),
        max_episode_steps=case.limit,
        observation=case.kind,
        frame_stack=case.stack,
        backend=case.backend,
    )
    seen = compare_with_scalar(envs, boards, case.shape, case.kind, case.stack, case.limit, case.steps)
    assert {round(key, 1) for key in seen if isinstance(key, float)} == {-0.1, 0.9, -1.1, 10.9}
    episodes = seen["solved"] + seen["cut"]
    assert seen["solved"] > 0.02 * episodes and seen["cut"] > 0.02 * episodes
    if episodes > 20 * len(boards):
        assert all(seen[f"level {i}"] for i in range(len(boards)))


@pytest.mark.parametrize("stack", [1, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_output_equals_the_scalar_simulator_on_endless_levels(backend: str, stack: int):
    settings = {"size": (5, 6), "num_boxes": 2, "max_episode_steps": 40, "frame_stack": stack}
    envs = SokobanVectorEnv(32, **settings, backend=backend)
    seen = compare_with_scalar(envs, None, (5, 6), "cells", stack, limit=40, steps=600)
    assert seen["solved"] > 1 and seen["cut"] > 200


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_single_environment_equals_the_scalar_simulator(kind: str, backend: str):
    boards = mixed_boards(6, 7, 3)
    env = SokobanEnv(size=(6, 7), levels=list(boards), max_episode_steps=25, observation=kind, backend=backend)
    number = {picture(pad(board, 6, 7), kind).tobytes(): i for i, board in enumerate(boards)}
    rng, solved = np.random.default_rng(3), 0
    for episode in range(60):
        observation, info = env.reset(seed=5 if episode == 0 else None)
        level = number[observation.tobytes()]
        game = ScalarSokoban(pad(boards[level], 6, 7), 25, level)
        assert info == {"success": False, "boxes_on_target": game.boxes_on_target, "level": level}
        ended = False
        while not ended:
            action = rng.integers(5)
            observation, reward, terminated, truncated, info = env.step(action if episode % 2 else int(action))
            value, end, cut, _ = game.step(int(action))
            assert np.array_equal(observation, picture(game.board(), kind)) and observation.dtype == np.uint8
            assert isinstance(reward, float) and reward == pytest.approx(value, abs=2e-6)
            assert terminated is end and truncated is cut
            assert info == {"success": end, "boxes_on_target": game.boxes_on_target, "level": level}
            ended = end or cut
        solved += game.solved
    assert solved > 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_levels_are_drawn_uniformly(backend: str):
    boards = [pad(board, 10, 10) for board in mixed_boards(10, 10, 4)[:20]]
    envs = SokobanVectorEnv(200, levels=boards, max_episode_steps=1, backend=backend)
    envs.reset(seed=1)
    drawn = torch.cat([envs.step([0] * 200)[4]["final_info"]["level"] for _ in range(50)]).bincount(minlength=20)
    assert ((drawn - 500).abs() < 5 * (500 * 0.95) ** 0.5).all()


# ------------------------------------------------------------------------------------------------ rules, cases by hand


ROUNDABOUT = "########/#      #/# @$.  #/#  $.  #/########"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("start", "actions", "limit", "rewards", "end"),
    [
        ("#@$.#", "r", 120, [10.9], "terminated"),
        ("#+$.$#", "r", 120, [0.9], ""),
        ("#@$.#", "r", 1, [10.9], "terminated"),  # solved in the last step: not truncated
        ("#@$.#", "0", 1, [-0.1], "truncated"),
        ("#@$ .#", "rr", 2, [-0.1, 10.9], "terminated"),
        ("#@$ .#", "r", 1, [-0.1], "truncated"),
        ("#@$ .#", "r0l", 3, [-0.1, -0.1, -0.1], "truncated"),
        ("#@*  $.#", "rr", 9, [-1.1, -0.1], ""),
        ("#@*. $#", "rr", 9, [-0.1, -1.1], ""),  # from target to target, then off
        ("#@$.$.*#", "rr", 9, [0.9, -0.1], ""),  # then two boxes in a row
        # on, off, around, on again, and the other box from below: the last one pays 10.9
        (ROUNDABOUT, "rrurrdlullldd" + "r", 14, [0.9, -1.1, *[-0.1] * 4, 0.9, *[-0.1] * 6, 10.9], "terminated"),
        (ROUNDABOUT, "rrurrdlullldd", 13, [0.9, -1.1, *[-0.1] * 4, 0.9, *[-0.1] * 6], "truncated"),
    ],
)
def test_rewards_and_ends(start: str, actions: str, limit: int, rewards: list[float], end: str, backend: str):
    rows = start.split("/") if "/" in start else ["#" * len(start), start, "#" * len(start)]
    board = to_board(*rows)
    envs = SokobanVectorEnv(1, size=board.shape, levels=[board], max_episode_steps=limit, backend=backend)
    envs.reset(seed=1)
    for i, (letter, expected) in enumerate(zip(actions, rewards, strict=True), start=1):
        _, reward, terminated, truncated, info = envs.step([ACTION_OF_LETTER.get(letter, 0)])
        assert reward.item() == pytest.approx(expected, abs=1e-6)
        assert terminated.item() == (i == len(actions) and end == "terminated")
        assert truncated.item() == (i == len(actions) and end == "truncated")
    if end:
        episode = info["final_info"]["episode"]
        assert episode["r"].item() == pytest.approx(sum(rewards), abs=1e-5)
        assert episode["l"].item() == len(rewards)
        assert info["final_info"]["success"].item() == (end == "terminated")
    else:
        assert nothing_ended(info)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_step_limit(backend: str):
    envs = SokobanVectorEnv(2, size=(3, 6), levels=[to_board("######", "#@$ .#", "######")], max_episode_steps=None)
    envs.reset(seed=1)
    assert not any(envs.step([0, 0])[3].any() for _ in range(500))
    envs.step([4, 0])
    info = envs.step([4, 0])[4]
    assert info["final_info"]["episode"]["l"].tolist()[0] == 502
    assert info["final_info"]["episode"]["r"].tolist()[0] == pytest.approx(11 - 50.2, abs=1e-4)


# ---------------------------------------------------------------------------------------------------- generated levels


def shifts(boards: np.ndarray) -> list[np.ndarray]:
    """What lies below, above, right and left of each cell; borders are wall, so that wrapping around does no harm."""
    return [np.roll(boards, shift, axis) for axis, shift in ((1, -1), (1, 1), (2, -1), (2, 1))]


def reach(free: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The cells (L, H, W) reached from `start` over `free` ones."""
    reached = start.copy()
    while True:
        grown = (np.logical_or.reduce(shifts(reached)) | reached) & free
        if (grown == reached).all():
            return reached
        reached = grown


def statistics(levels: np.ndarray) -> dict[str, np.ndarray]:
    """What spec/sokoban.md measures, one value a level (a box for `nearest`)."""
    floor, player = levels > 0, levels >= 5
    box, target = (levels == 3) | (levels == 4), (levels == 2) | (levels == 4) | (levels == 6)
    num_boxes = int(box[0].sum())
    spots = [np.argwhere(mask)[:, 1:].reshape(len(levels), num_boxes, 2) for mask in (box, target)]
    distance = np.abs(spots[0][:, :, None] - spots[1][:, None]).sum(-1)  # (L, K, K)
    orders = itertools.permutations(range(num_boxes)) if num_boxes < 6 else []
    matchings = [sum(distance[:, i, j] for i, j in enumerate(order)) for order in orders]
    reachable = reach(floor & ~box, player)
    near, free = shifts(reachable), shifts(floor & ~box)
    to_box = np.abs(spots[0] - np.argwhere(player)[:, None, 1:]).sum(-1).min(1)
    return {
        "floor": floor.sum((1, 2)),
        "nearest": distance.min(2).ravel(),
        "matching": np.min(matchings, 0) if matchings else None,
        "to_box": to_box,
        "reachable": reachable.sum((1, 2)) / (floor & ~box).sum((1, 2)),
        # stand below a box and push it up, and so on: the free cell is on the other side
        "pushes": sum((box & near[i] & free[i ^ 1]).sum((1, 2)) for i in range(4)),
        "connected": (reach(floor, player) == floor).all((1, 2)),
    }


def check_levels(levels: np.ndarray, num_boxes: int) -> dict[str, np.ndarray]:
    """Closed, one player, boxes off their as many targets, connected, with a push, all distinct; the statistics."""
    assert levels.dtype == np.uint8 and levels.max() <= 6
    assert not levels[:, [0, -1]].any() and not levels[:, :, [0, -1]].any()
    assert ((levels >= 5).sum((1, 2)) == 1).all() and not (levels == 4).any()
    assert ((levels == 3).sum((1, 2)) == num_boxes).all()
    assert (((levels == 2) | (levels == 6)).sum((1, 2)) == num_boxes).all()
    assert len({level.tobytes() for level in levels}) == len(levels)
    values = statistics(levels)
    assert values["connected"].all() and (values["pushes"] > 0).all()
    return values


def check_bands(values: dict[str, np.ndarray], errors: float = 0) -> None:
    """At 10x10 with 4 boxes, beside DeepMind's levels; a small sample may be `errors` standard errors further off."""
    full = (values["reachable"] == 1).astype(float)
    for name, value, mean, band in (
        ("floor", values["floor"], 31.7, 1.5),
        ("nearest", values["nearest"], 1.95, 0.1),
        ("matching", values["matching"], 10.6, 0.7),
        ("pushes", values["pushes"], 7.1, 0.7),
        ("all reachable", full, 0.51, 0.05),
    ):
        assert value.mean() == pytest.approx(mean, abs=band + errors * value.std() / len(value) ** 0.5), name
    assert values["floor"].std() == pytest.approx(6.5, abs=1)


def check_solutions(levels: torch.Tensor, solutions: list[str]) -> None:
    """Each ends solved at its last letter; capital letters are pushes, small ones steps, none of them is blocked."""
    for level, solution in zip(levels.numpy(), solutions, strict=True):
        game = ScalarSokoban(level)
        for letter in solution:
            assert not game.solved
            *_, changed = game.step(ACTION_OF_LETTER[letter.lower()])
            assert len(changed) == (3 if letter.isupper() else 2)
        assert game.solved


@pytest.mark.parametrize(
    ("height", "width", "num_boxes", "num"),
    [(10, 10, 4, 2000), (5, 5, 1, 200), (5, 5, 2, 100), (7, 7, 1, 200), (6, 11, 3, 100), (20, 20, 8, 40)],
)
def test_generated_levels_are_solved_by_their_solutions(height: int, width: int, num_boxes: int, num: int):
    levels, solutions = generated(height, width, num_boxes, num)
    assert levels.shape == (num, height, width) and levels.device.type == "cpu" and len(solutions) == num
    check_levels(levels.numpy(), num_boxes)
    check_solutions(levels, solutions)


@pytest.mark.parametrize("backend", BACKENDS)
def test_levels_look_like_deepminds(backend: str):
    levels = generated(10, 10, 4, 2000)[0].numpy()
    if backend == "torch":  # endless ones
        levels = SokobanVectorEnv(1000, backend=backend).reset(seed=3)[0].numpy()
    values = check_levels(levels, 4)
    check_bands(values, errors=3)
    assert values["floor"].min() >= 9 and values["floor"].max() <= 64
    assert values["reachable"].mean() == pytest.approx(0.65, abs=0.1)
    assert values["to_box"].mean() == pytest.approx(1.73, abs=0.25)


@pytest.mark.parametrize("max_pulls", [1, 6])
@pytest.mark.parametrize("num_boxes", [1, 2])
def test_levels_a_few_pulls_before_their_end(max_pulls: int, num_boxes: int):
    levels, solutions = generate_levels(200, size=7, num_boxes=num_boxes, seed=3, max_pulls=max_pulls)
    check_solutions(levels, solutions)
    pushes = [sum(letter.isupper() for letter in solution) for solution in solutions]
    assert min(pushes) == 1 and max(pushes) == max_pulls
    assert all(solution[0].isupper() for solution in solutions)  # the player stands beside its first box
    assert len({level.numpy().tobytes() for level in levels}) == 200
    assert (levels == 4).any() == (num_boxes > 1)  # boxes on targets, which other levels do not have


def test_the_levels_of_a_seed_stay_the_same():
    levels, solutions = generate_levels(50, size=7, num_boxes=2, seed=3)
    digest = hashlib.sha256(levels.numpy().tobytes() + "".join(solutions).encode()).hexdigest()
    assert digest[:16] == "39b0385b04085f09"
    envs = SokobanVectorEnv(16, size=6, num_boxes=1, max_episode_steps=2)
    boards = [envs.reset(seed=9)[0], *(envs.step([0] * 16)[0] for _ in range(60))]
    assert hashlib.sha256(torch.stack(boards).numpy().tobytes()).hexdigest()[:16] == "02dbfff869d0ca04"


def test_a_seed_gives_the_same_levels_and_another_seed_others():
    first = generate_levels(100, size=8, num_boxes=2, seed=11)
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert_same(generate_levels(100, size=8, num_boxes=2, seed=11), first)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    other, _ = generate_levels(100, size=8, num_boxes=2, seed=12)
    assert exclude_levels(first[0], other).all()
    one, other = (SokobanVectorEnv(16, size=7, num_boxes=2).reset()[0] for _ in range(2))  # no seed
    assert not torch.equal(one, other)


def test_a_seed_gives_the_same_endless_episodes_on_both_backends():
    def episodes(seed: int, backend: str) -> list[Any]:
        envs = SokobanVectorEnv(8, size=(6, 7), num_boxes=2, max_episode_steps=9, backend=backend)
        played = [envs.reset(seed=seed), *(envs.step(row)[:4] for row in random_actions(1, 60, 8))]
        return [*played, envs.reset(), envs.reset(seed=seed)]

    one, other = episodes(4, "numpy"), episodes(5, "numpy")
    assert_same(one, episodes(4, "torch"))
    assert_same(one[0][0], one[-1][0])
    assert not torch.equal(one[0][0], other[0][0]) and not torch.equal(one[-1][0], one[-2][0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_excluded_levels_are_never_handed_out(backend: str, monkeypatch: pytest.MonkeyPatch):
    held_out, _ = generate_levels(300, size=5, num_boxes=1, seed=1)

    def seen(**kwargs) -> torch.Tensor:
        env = SokobanVectorEnv(64, size=5, num_boxes=1, max_episode_steps=1, backend=backend, **kwargs)
        return torch.cat([env.reset(seed=7)[0], *(env.step([0] * 64)[0] for _ in range(20))])

    free, kept = seen(), seen(exclude=held_out)
    assert not exclude_levels(free, held_out).all()  # there are so few that the same ones come again
    assert exclude_levels(kept, held_out).all() and len(kept.unique(dim=0)) > 300
    assert torch.equal(free[exclude_levels(free, held_out)][:500], kept[:500])  # the others, in the same order

    monkeypatch.setattr(sokoban_env, "_generate", lambda xp, *_, **__: (sokoban_env._copy_to(xp, held_out, "cpu"), []))
    with pytest.raises(ValueError, match="finds no 5x5 level with 1 boxes besides `exclude`"):
        seen(exclude=held_out)


def test_exclude_levels():
    levels, _ = generated(7, 7, 1, 200)
    mask = exclude_levels(levels, levels[100:150].numpy())
    assert mask.dtype == torch.bool and mask.tolist() == [not 100 <= i < 150 for i in range(200)]
    assert exclude_levels(levels, levels[:0]).all()


@pytest.mark.parametrize(("num_envs", "limit"), [(1, 1), (32, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_endless_level_comes_twice(num_envs: int, limit: int, backend: str):
    envs = SokobanVectorEnv(num_envs, size=8, num_boxes=2, max_episode_steps=limit, backend=backend)
    starts, numbers = [*envs.reset(seed=2)[0]], []
    for _ in range(120):
        observation, _, _, _, info = envs.step([0] * num_envs)
        if not nothing_ended(info):
            ended = info["_final_info"]
            starts += [*observation[ended]]
            numbers += info["final_info"]["level"][ended].tolist()
    check_levels(torch.stack(starts).numpy(), 2)
    assert numbers == list(range(num_envs * 120 // limit))  # their serial numbers


# ------------------------------------------------------------------------------------------------- autoreset and state


@pytest.mark.parametrize("backend", BACKENDS)
def test_autoreset_by_hand(backend: str):
    one, two = to_board("######", "#@$. #", "#    #", "######"), to_board("######", "#    #", "# .$@#", "######")
    envs = SokobanVectorEnv(2, size=(4, 6), levels=[one, two], max_episode_steps=2, frame_stack=3, backend=backend)
    observation, _ = envs.reset(seed=1, options={"level_indices": [0, 1]})
    assert np.array_equal(observation.numpy(), [[one] * 3, [two] * 3])  # a reset fills the stack
    envs.step([0, 2])
    observation, reward, terminated, truncated, info = envs.step([4, 1])
    solved, walked = to_board("######", "# @* #", "#    #", "######"), to_board("######", "#   @#", "# .$ #", "######")
    assert terminated.tolist() == [True, False] and truncated.tolist() == [False, True]
    assert reward.tolist() == pytest.approx([10.9, -0.1])
    assert np.array_equal(info["final_obs"].numpy(), [[one, one, solved], [two, two, walked]])
    assert info["final_info"]["success"].tolist() == [True, False]
    assert info["final_info"]["episode"]["r"].tolist() == pytest.approx([10.8, -0.2])
    for row in observation.numpy():  # nothing of the old episode in any frame of the new one
        assert any(np.array_equal(row, [board] * 3) for board in (one, two))
    assert nothing_ended(envs.step([0, 0])[4])


def make_maker(pool: str, backend: str, kind: str, stack: int) -> Any:
    levels = list(mixed_boards(8, 8, 2)) if pool == "fixed" else None  # else endless
    return lambda: SokobanVectorEnv(
        16,
        size=8,
        num_boxes=2,
        levels=levels,
        max_episode_steps=15,
        observation=kind,
        frame_stack=stack,
        backend=backend,
    )


def save_and_load(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("kind", "stack"), [("cells", 1), ("tiny_rgb", 3), ("rgb", 1)])
@pytest.mark.parametrize("pool", ["fixed", "endless"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_resumes_bit_for_bit(backend: str, pool: str, kind: str, stack: int):
    make = make_maker(pool, backend, kind, stack)
    envs = make()
    envs.reset(seed=3)
    for chunk in range(2):
        observation = play(envs, random_actions(chunk, 37, 16))[-1][0]
        state = envs.get_state()
        kept, loaded = copy.deepcopy(state), save_and_load(state)
        assert_same(loaded, state)
        actions = random_actions(100 + chunk, 40, 16)
        played = [play(envs, actions), envs.reset(), play(envs, actions[:5])]
        assert_same(state, kept)  # a state is a copy
        fresh = make()  # never reset
        assert_same(fresh.set_state(loaded), observation)
        assert_same([play(fresh, actions), fresh.reset(), play(fresh, actions[:5])], played)
        assert_same(loaded, kept)  # nor does playing on write into the state that was set
        assert_same(envs.set_state(state), observation)  # back in the same environment
        assert_same(play(envs, actions[:20]), played[0][:20])
        assert_same(envs.get_state()["cells"], envs.get_state(pool=False)["cells"])


@pytest.mark.parametrize("pool", ["fixed", "endless"])
@pytest.mark.parametrize(("source", "target"), [BACKENDS, BACKENDS[::-1]])
def test_a_state_of_the_other_backend(source: str, target: str, pool: str):
    envs, others = (make_maker(pool, backend, "cells", 2)() for backend in (source, target))
    envs.reset(seed=3)
    observation = play(envs, random_actions(1, 50, 16))[-1][0]
    assert torch.equal(others.set_state(save_and_load(envs.get_state())), observation)
    for actions in random_actions(2, 60, 16):
        assert_same(others.step(actions)[:4], envs.step(actions)[:4])
    assert_same(others.reset(), envs.reset())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", ["fixed", "endless"])
def test_setting_only_cells(pool: str, backend: str):
    envs = make_maker(pool, backend, "cells", 3)()
    envs.reset(seed=1)
    play(envs, random_actions(1, 10, 16))
    boards = generated(8, 8, 2, 24)[0][:16]
    given = boards.clone()
    observation = envs.set_state({"cells": given})
    assert torch.equal(observation, boards[:, None].expand(-1, 3, -1, -1))  # fresh counters, and a full stack
    given.zero_()
    for i in range(15):
        observation, _, _, truncated, info = envs.step([0] * 16)
        assert truncated.all() if i == 14 else torch.equal(observation, boards[:, None].expand(-1, 3, -1, -1))
    final = info["final_info"]
    assert final["level"].tolist() == [-1] * 16 and final["episode"]["l"].tolist() == [15] * 16
    assert torch.allclose(final["episode"]["r"], torch.tensor(-1.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_solved_board_can_be_set(backend: str):
    envs = SokobanVectorEnv(1, size=(3, 5), levels=[to_board("#####", "#@$.#", "#####")], backend=backend)
    envs.reset(seed=1)
    observation = envs.set_state({"cells": torch.from_numpy(to_board("#####", "# @*#", "#####"))[None]})
    assert np.array_equal(observation[0].numpy(), to_board("#####", "# @*#", "#####"))
    _, reward, terminated, _, info = envs.step([0])  # the episode ends; nothing was solved in it, so that it pays -0.1
    assert terminated.item() and reward.item() == pytest.approx(-0.1)
    assert info["final_info"]["episode"]["r"].item() == pytest.approx(-0.1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["options", "set_state"])
def test_an_endless_environment_can_start_from_given_boards(how: str, backend: str):
    envs = SokobanVectorEnv(4, size=7, num_boxes=1, max_episode_steps=2, backend=backend)
    boards = generated(7, 7, 1, 400)[0][:4]
    if how == "options":
        observation, _ = envs.reset(seed=1, options={"levels": boards})
    else:
        observation = envs.set_state({"cells": boards})
    assert torch.equal(observation, boards)
    for _ in range(6):  # an autoreset draws as ever
        observation, *_ = envs.step([0] * 4)
    check_levels(observation.numpy(), 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reset_options(backend: str):
    boards = mixed_boards(6, 7, 3)
    padded = np.stack([pad(board, 6, 7) for board in boards])
    envs = SokobanVectorEnv(3, size=(6, 7), levels=list(boards), max_episode_steps=1, backend=backend)
    observation, _ = envs.reset(seed=1, options={"level_indices": [4, 0, 4]})
    assert np.array_equal(observation.numpy(), padded[[4, 0, 4]])
    assert envs.step([0] * 3)[4]["final_info"]["level"].tolist() == [4, 0, 4]
    small, text = to_board("#####", "#@$.#", "#####"), "#####\n#.$@#\n#####"
    observation, _ = envs.reset(options={"levels": [small, torch.from_numpy(padded[7]), text]})
    expected = [pad(small, 6, 7), padded[7], pad(small[:, ::-1], 6, 7)]
    assert np.array_equal(observation.numpy(), expected)
    assert envs.step([0] * 3)[4]["final_info"]["level"].tolist() == [-1] * 3
    observation, _ = envs.reset(options={"levels": padded[[9, 8, 7]]})
    assert np.array_equal(observation.numpy(), padded[[9, 8, 7]])


def test_the_state_of_the_single_environment():
    env, fresh = (SokobanEnv(size=7, num_boxes=2, max_episode_steps=30) for _ in range(2))
    env.reset(seed=1)
    observation, *_ = env.step(1)
    assert np.array_equal(fresh.set_state(save_and_load(env.get_state())), observation)
    for action in random_actions(0, 20, 1)[:, 0]:
        assert_same(fresh.step(action), env.step(action))
    assert_same(fresh.reset(), env.reset())


# --------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_returned_never_changes_nor_what_is_written_into_it(backend: str, kind: str, stack: int):
    one, other = (make_maker("endless", backend, kind, stack)() for _ in range(2))
    kept = [one.reset(seed=1), one.get_state()]
    results, clones = [other.reset(seed=1), other.get_state()], copy.deepcopy(kept)
    for i, actions in enumerate(random_actions(1, 40, 16)):
        for tensor in tensors(results):
            tensor.fill_(1)
        returned, results = ([envs.step(actions)] for envs in (one, other))
        if i == 20:
            returned, results = ([envs.get_state(), envs.set_state(envs.get_state())] for envs in (one, other))
        if i == 30:
            returned, results = ([envs.reset()] for envs in (one, other))
        assert_same(results, returned)
        kept.append(returned)
        clones.append(copy.deepcopy(returned))
    assert_same(kept, clones)


@pytest.mark.parametrize("backend", BACKENDS)
def test_levels_handed_in_are_copied(backend: str):
    boards = np.stack([pad(board, 7, 7) for board in mixed_boards(7, 7, 2)[:12]])
    given = [torch.from_numpy(boards.copy()), boards.copy()]
    envs = SokobanVectorEnv(12, size=7, levels=given[0], max_episode_steps=1, backend=backend)
    envs.reset(seed=1, options={"levels": given[1]})
    given[0].zero_()
    given[1][:] = 0
    assert np.array_equal(envs.get_state(pool=False)["cells"].numpy(), boards)
    known = {board.tobytes() for board in boards}
    assert all(board.tobytes() in known for board in envs.step([0] * 12)[0].numpy())


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_holds_until_the_next_step(backend: str, kind: str, stack: int):
    settings = {"size": 8, "levels": list(mixed_boards(8, 8, 2)), "max_episode_steps": 15, "observation": kind}
    settings |= {"frame_stack": stack, "backend": backend}
    views, copies = (SokobanVectorEnv(16, **settings, copy=c) for c in (False, True))
    view, expected = (envs.reset(seed=1)[0] for envs in (views, copies))
    kept, others = [], []
    for actions in random_actions(3, 50, 16):
        assert torch.equal(view, expected)
        clone = view.clone()
        new, *rest = views.step(actions)
        expected, *expected_rest = copies.step(actions)
        # afterwards a view shows the new observation; stacked frames are the caller's own
        assert torch.equal(view, clone if stack > 1 else new)
        assert (view.data_ptr() == new.data_ptr()) == (stack == 1)
        kept.append(rest)
        others.append(expected_rest)
        view = new
    assert_same(kept, others)  # all but the observation is the caller's own


COPIERS = [copy.deepcopy, copy.copy, lambda env: pickle.loads(pickle.dumps(env))]


@pytest.mark.parametrize("how", COPIERS, ids=["deepcopy", "copy", "pickle"])
@pytest.mark.parametrize(("kind", "stack"), [("cells", 1), ("tiny_rgb", 3), ("rgb", 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_goes_on_alike_and_by_itself(backend: str, kind: str, stack: int, how: Any):
    envs = make_maker("endless", backend, kind, stack)()
    assert_same(how(envs).reset(seed=4), envs.reset(seed=4))
    play(envs, random_actions(1, 37, 16))
    twin, other = how(envs), how(envs)
    play(other, random_actions(9, 20, 16))  # must not touch the two
    actions = random_actions(2, 40, 16)
    assert_same(play(twin, actions), play(envs, actions))
    assert_same(twin.get_state(), envs.get_state())
    assert_same(twin.reset(), envs.reset())
    twin.close()


@pytest.mark.parametrize("how", COPIERS[::2], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hundred_copies_of_a_running_environment(backend: str, how: Any):
    env = gym.make("Sokoban-v0", size=5, num_boxes=1, max_episode_steps=15, backend=backend)
    env.reset(seed=1)

    def played(env: gym.Env, actions: np.ndarray) -> list[Any]:
        outputs = []
        for action in actions.tolist():
            observation, *rest = env.step(action)
            outputs.append((observation.tobytes(), rest))
            if rest[1] or rest[2]:
                outputs.append(env.reset()[0].tobytes())
        return outputs

    actions = random_actions(1, 107, 1)[:, 0]
    played(env, actions[:7])  # in the middle of an episode
    copies = [how(env) for _ in range(100)]
    expected = played(env, actions[7:])
    for twin in copies:
        assert played(twin, actions[7:]) == expected


# ----------------------------------------------------------------------------------------- level text and observations


XSB = """\
Two levels, by nobody in particular
; a comment
' another one

  #####
###   #
#@$ . ##
#### -_#
   #####
a title ends a level
#####
#+$*#
#####
  ; 3

#######
#  @  ##
#.$$$..#
########
"""
XSB_BOARDS = [
    to_board("########", "###   ##", "#@$ . ##", "####   #", "########"),
    to_board("#####", "#+$*#", "#####"),
    to_board("########", "#  @  ##", "#.$$$..#", "########"),
]
BOXOBAN = """\
; 0
##########
##########
##########
##########
##   #####
##.$  ####
##  @.$ ##
##  . $.##
### $   ##
##########
"""


def test_reading_xsb(tmp_path: Any):
    path = tmp_path / "levels.xsb"
    path.write_text(XSB)
    expected = np.stack([pad(board, 5, 8) for board in XSB_BOARDS])
    levels = load_levels(path)
    assert levels.dtype == torch.uint8 and np.array_equal(levels.numpy(), expected)
    path.write_bytes(XSB.replace("\n", "\r\n").rstrip().encode())  # another system's line ends, none at the end
    assert np.array_equal(load_levels(str(path)).numpy(), expected)
    expected = np.stack([pad(board, 7, 12) for board in XSB_BOARDS])
    assert np.array_equal(load_levels(path, size=(7, 12)).numpy(), expected)
    board = text_to_cells(XSB.split("a title")[0])
    assert board.dtype == np.uint8 and np.array_equal(board, XSB_BOARDS[0])


def test_reading_boxoban_and_a_folder(tmp_path: Any):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "deep" / "000.txt").write_text(BOXOBAN)
    (tmp_path / "a.sok").write_text(XSB)
    (tmp_path / "readme.md").write_text("#### this is no level")
    boxoban = load_levels(tmp_path / "b" / "deep" / "000.txt")
    rows = [row for row in BOXOBAN.splitlines() if row.startswith("#")]
    assert np.array_equal(boxoban.numpy(), [to_board(*rows)])
    everything = load_levels(tmp_path)
    assert np.array_equal(everything.numpy(), [*(pad(board, 10, 10) for board in XSB_BOARDS), *boxoban.numpy()])


def test_text_round_trips(tmp_path: Any):
    boards = [*mixed_boards(7, 9, 3), *generated(20, 20, 8, 40)[0].numpy()[:5]]
    for board in boards:
        text = cells_to_text(board)
        assert text == "\n".join("".join(CHARS[cell] for cell in row) for row in board)
        assert np.array_equal(text_to_cells(text), board)
    assert cells_to_text(torch.from_numpy(boards[0])) == cells_to_text(boards[0])
    levels = np.stack([pad(board, 7, 9) for board in boards[:-5]])
    for given in (levels, torch.from_numpy(levels)):
        save_levels(tmp_path / "levels.txt", given)
        assert np.array_equal(load_levels(tmp_path / "levels.txt").numpy(), levels)
    assert [path.name for path in tmp_path.iterdir()] == ["levels.txt"]
    assert (tmp_path / "levels.txt").read_text().splitlines()[8:10] == ["", "; 1"]


def test_texts_and_padded_boards_as_levels():
    texts = ["#####\n#@$.#\n#####", "  #####\n###   #\n#@$ . ##\n####   #\n   #####"]
    envs = SokobanVectorEnv(2, size=9, levels=texts)
    observation, _ = envs.reset(seed=1, options={"level_indices": [0, 1]})
    assert np.array_equal(observation.numpy(), [pad(text_to_cells(text), 9, 9) for text in texts])


LEVEL_ROWS = ("#####", "#@$.#", "#   #", "#####")
LEVEL = "\n".join(LEVEL_ROWS)
BOARD = to_board(*LEVEL_ROWS)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("\ufeff" + LEVEL, 1),  # a byte-order mark
        (f"{LEVEL}\n\n5#\n#@$.#\n#3-#\n5#\n\n{LEVEL}", 3),  # run-length rows between plain ones
        ("5#|#@$.#|#3 #|5#", 1),
        ("2(2#)#\n#@$.#\n#2(-)-#\n1(3(#)2#)", 1),  # groups
        (f"Comment:\n{LEVEL}\n## not a level\nComment-End:\n{LEVEL}\n", 1),
        ("#####|#@$.#|#---#|#####\nTitle: several on a line", 1),
        ("#####\n#pbo#\n#   #\n#####", 1),
        (f"Set: one\nDate: 2001\n\n{LEVEL}\nTitle: a\nAuthor: b\n\n:: another collection\n\n{LEVEL}\nComment: c\n", 2),
        (f"----------\n{LEVEL}\n____\n", 1),  # rules
        (f"{LEVEL}\n-----\n{LEVEL}\n", 2),
        (f"*****\n{LEVEL}\n*****\n{LEVEL}\n.....\n", 2),
        (
            '<?xml version="1.0"?>\n<SokobanLevels><LevelCollection><Level Id="1">\n'
            + "".join(f"<L>{row}</L>\n" for row in LEVEL_ROWS)
            + "</Level><Level>"
            + "".join(f"<L>{row}</L>" for row in LEVEL_ROWS)
            + "\n</Level></LevelCollection></SokobanLevels>",
            2,
        ),
    ],
)
def test_level_files_as_the_sokoban_world_writes_them(text: str, count: int, tmp_path: Any):
    path = tmp_path / "levels.sok"
    path.write_text(text, encoding="utf-8")
    assert np.array_equal(load_levels(path).numpy(), [BOARD] * count)


def test_an_empty_row_inside_a_level_and_the_letters_on_targets():
    text = "#######\n#  $  #\n#@ . *#\n#######\n-------\n#######"
    assert text_to_cells(text).shape == (6, 7)
    assert np.array_equal(text_to_cells("#####\n#PbB#\n#####"), to_board("#####", "#+$*#", "#####"))


def test_what_is_skipped_is_named(tmp_path: Any):
    (tmp_path / "A.TXT").write_bytes(f"Author: Jos\xe9\n{LEVEL}".encode("latin-1"))
    (tmp_path / "README.txt").write_text("# About these levels\n")
    (tmp_path / "._A.TXT").write_bytes(b"\0\5\x16\7\0#")
    with pytest.warns(UserWarning) as caught:
        assert np.array_equal(load_levels(tmp_path).numpy(), [BOARD])
    names = sorted(str(warning.message) for warning in caught)
    assert len(names) == 2 and "._A.TXT" in names[0] and "README.txt:1:3" in names[1]
    path = tmp_path / "some.txt"
    path.write_text(f"{LEVEL}\n\n#####\n#@* #\n#####\n\n{LEVEL}")
    with pytest.warns(UserWarning, match=r"some\.txt:6: .*solved already"):
        assert len(load_levels(path)) == 2


@pytest.mark.parametrize(
    ("text", "place", "fault"),
    [
        ("; 0\n#####\n#$. #\n#####\n", ":2", "0 players"),
        ("#####\n#@$.#\n#####\n\ntitle\n\n#####\n#@$.#\n#@  #\n#####\n", ":7", "2 players"),
        ("#####\n#+$.#\n#@$ #\n#####\n", ":1", "2 players"),
        ("#####\n#@$ #\n#####\n", ":1", "1 boxes and 0 targets"),
        ("#####\n#@$.#\n#####\n\n#####\n#@*.#\n#####\n", ":5", "1 boxes and 2 targets"),
        ("title\n#####\n#@$.#\n#+  é#\n######\n", ":4:5", "unknown character 'é'"),
        ("5#\n2#x2#\n5#", ":2:3", "unknown character 'x'"),
        ("#####\n#@(2$.#\n#####", ":2:3", "unknown character '('"),
        ("#####\n#@$.#\n## ##\n", ":2:2", "'@' is outside the walls"),
        ("#####\n#@$.#\n @ . \n#####", ":2:2", "'@' is outside the walls"),
        ("   .#####\n    #@$.#\n    #####", ":1:4", "'.' is outside the walls"),
        ("#####\n#@* #\n#####\n", ":1", "solved already"),
        ("#####\n#@  #\n#####\n", ":1", "solved already"),
    ],
)
def test_bad_level_texts(text: str, place: str, fault: str, tmp_path: Any):
    path = tmp_path / "bad.txt"
    path.write_text(text, encoding="utf-8")
    for given in (path, tmp_path):  # the file, or a folder that it lies in
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}{place}: .*{re.escape(fault)}") as e:
            load_levels(given)
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=f"^level{place}: .*{re.escape(fault)}"):
        text_to_cells(text)


def test_bad_level_files(tmp_path: Any):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path)) + ".*no levels"):
        load_levels(tmp_path)
    (tmp_path / "empty.txt").write_text("; nothing but\n\ncomments\n")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "empty.txt")) + ".*no levels"):
        load_levels(tmp_path / "empty.txt")
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "image.txt"))):
        load_levels(tmp_path / "image.txt")
    with pytest.raises(OSError, match="nowhere"):
        load_levels(tmp_path / "nowhere.txt")
    (tmp_path / "large.txt").write_text(XSB)
    with pytest.raises(ValueError, match=r"large\.txt.*level 0 .*5x8.*too large for size 4x9"):
        load_levels(tmp_path / "large.txt", size=(4, 9))
    for text, count in (("", 0), (XSB, 3)):
        with pytest.raises(ValueError, match=f"{count} levels"):
            text_to_cells(text)


def test_the_tool_takes_solutions_of_all_kinds(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("levels.txt").write_text("########\n#@  $ .#\n########\n\n" * 4)

    def run(*words: str, solutions: str = "") -> str:
        pathlib.Path("solutions.txt").write_text(solutions)
        monkeypatch.setattr(sys, "argv", ["sokoban.py", *words])
        tool.main()
        return capsys.readouterr().out

    check = ("check", "levels.txt", "solutions.txt")
    assert "4 of 4" in run(*check, solutions="rrRR\nrrrr\n2r2R\n4r\n")
    with pytest.raises(SystemExit, match="lower case"):
        run(*check, solutions="rrRR\nrrrR\n2r2R\n4r\n")
    with pytest.raises(SystemExit, match=r"solutions\.txt:4:1: unknown character '4'"):
        run(*check, solutions="rrRR\nrrrr\n2r2R\n4x\n")
    run(
        "generate",
        "--output",
        "made.txt",
        "--num-levels",
        "3",
        "--size",
        "6",
        "--num-boxes",
        "1",
        "--solutions",
        "s.txt",
    )
    assert "3 of 3" in run("check", "made.txt", "s.txt")
    monkeypatch.setitem(sys.modules, "curses", None)
    with pytest.raises(SystemExit, match="windows-curses"):
        run("play")


@pytest.mark.parametrize("lead", [(), (2, 3), (0,)])
@pytest.mark.parametrize(("source", "target"), list(itertools.product(KINDS, KINDS)))
def test_every_observation_turns_into_every_other(source: str, target: str, lead: tuple[int, ...]):
    rng = np.random.default_rng(5)
    cells = rng.integers(7, size=(*lead, 4, 6)).astype(np.uint8)
    flat = cells.reshape(-1, 4, 6)

    def drawn(kind: str) -> np.ndarray:
        shape = {"cells": (4, 6), "tiny_rgb": (4, 6, 3), "rgb": (32, 48, 3)}[kind]
        return np.array([picture(board, kind) for board in flat], dtype=np.uint8).reshape(*lead, *shape)

    given, expected = drawn(source), drawn(target)
    clone = given.copy()
    array, tensor = convert_observation(given, source, target), convert_observation(torch.tensor(given), source, target)
    assert isinstance(array, np.ndarray) and array.dtype == np.uint8 and np.array_equal(array, expected)
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.uint8
    assert tensor.shape == expected.shape and np.array_equal(tensor.numpy(), expected)
    array.fill(1)
    assert np.array_equal(given, clone)  # the result is a new array


def test_sprites_and_constants():
    assert SPRITES.shape == (7, 8, 8, 3) and TINY_PALETTE.shape == (7, 3) and SPRITES.dtype == np.uint8
    assert len({sprite.tobytes() for sprite in SPRITES}) == len({tuple(colour) for colour in TINY_PALETTE}) == 7
    names = ("WALL", "FLOOR", "TARGET", "BOX", "BOX_ON_TARGET", "PLAYER", "PLAYER_ON_TARGET")
    assert [getattr(sokoban_env, name) for name in names] == list(range(7))
    assert [getattr(sokoban_env, name) for name in ("NOOP", "UP", "DOWN", "LEFT", "RIGHT")] == list(range(5))
    assert sokoban_env.CELL_CHARS == CHARS


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("levels", "fault"),
    [
        ([], "no levels"),
        (np.zeros((1, 12, 9), dtype=np.uint8), "level 0 .*12x9.*too large for size 10x10"),
        ([to_board("#####", "#@$.#", "#####"), to_board("#####", "# $.#", "#####")], "level 1 .*0 players"),
        ([to_board("######", "#@$.@#", "######")], "level 0 .*2 players"),
        ([to_board("#####", "#@$ #", "#####")], "level 0 .*1 boxes and 0 targets"),
        ([to_board("#####", "#@* #", "#####")], "level 0 .*solved already"),
        ([to_board(*["##########"] * 9, "###@$.####")], "level 0 .*(opening|border)"),
        (np.full((1, 3, 3), 9, dtype=np.uint8), "level 0"),
        ("levels.txt", "load_levels"),
    ],
)
def test_bad_levels(levels: Any, fault: str):
    with pytest.raises(ValueError, match=fault):
        SokobanVectorEnv(1, levels=levels)
    envs = SokobanVectorEnv(1, size=10, levels=[to_board("#####", "#@$.#", "#####")])
    with pytest.raises(ValueError, match=fault):
        envs.reset(seed=1, options={"levels": levels})


@pytest.mark.parametrize(
    ("size", "num_boxes", "fault"),
    [
        (4, 1, "4x4"),
        ((10, 4), 1, "10x4"),
        ((2, 10), 1, "2x10"),
        (-5, 1, "-5"),
        (1000, 4, "1000x1000"),
        (10, 0, "num_boxes=0"),
        (5, 9, "num_boxes=9"),
        ((5, 64), 17, "17"),
    ],
)
def test_sizes_and_boxes_that_cannot_be_generated_are_found_at_once(size: Any, num_boxes: int, fault: str):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=fault):
        generate_levels(1, size=size, num_boxes=num_boxes)
    with pytest.raises(ValueError, match=fault):
        SokobanVectorEnv(1, size=size, num_boxes=num_boxes)
    with pytest.raises(ValueError, match=fault):
        SokobanEnv(size=size, num_boxes=num_boxes)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("shape", [(5, 5), (8, 40), (5, 64)])
def test_as_many_boxes_as_are_accepted_can_be_generated(shape: tuple[int, int]):
    def accepted(num_boxes: int) -> bool:
        try:
            SokobanVectorEnv(1, size=shape, num_boxes=num_boxes)
        except ValueError:
            return False
        return True

    most = next(k for k in itertools.count(1) if not accepted(k + 1))
    levels, _ = generate_levels(1, size=shape, num_boxes=most)
    check_levels(levels.numpy(), most)


def test_more_levels_than_there_are():
    with pytest.raises(ValueError, match=r"5x5.*1 boxes.*1000000"):
        generate_levels(1_000_000, size=5, num_boxes=1)


@pytest.mark.parametrize(
    ("arguments", "error", "fault"),
    [
        ({"observation": "pixels"}, ValueError, "'pixels'.*cells, tiny_rgb, rgb"),
        ({"device": "nonsense"}, RuntimeError, "nonsense"),
        ({"render_mode": "pixels"}, ValueError, "'pixels'.*rgb_array.*ansi"),
        ({"backend": "jax"}, ValueError, "'jax'"),
        ({"max_episode_steps": 0}, ValueError, "max_episode_steps is 0"),
        ({"frame_stack": 0}, ValueError, "frame_stack is 0"),
        ({"size": 6.0}, TypeError, "float"),
    ],
)
def test_bad_arguments(arguments: dict, error: type, fault: str):
    for make in (lambda: SokobanVectorEnv(2, **arguments), lambda: SokobanEnv(**arguments)):
        with pytest.raises(error, match=fault):
            make()


def test_more_bad_arguments():
    with pytest.raises(ValueError, match="num_envs is 0"):
        SokobanVectorEnv(0)
    for source, target in (("pixels", "cells"), ("cells", "pixels")):
        with pytest.raises(ValueError, match="'pixels'"):
            convert_observation(np.zeros((5, 5), dtype=np.uint8), source, target)
    for kind, shape in (("tiny_rgb", (4, 4, 3)), ("rgb", (32, 32, 3))):
        with pytest.raises(ValueError, match=f"{kind}.*pixel"):
            convert_observation(np.full(shape, 7, dtype=np.uint8), kind, "cells")
    with pytest.raises(TypeError, match="seed must be an integer, got \\[1, 2\\]"):
        gym.make_vec("Sokoban-v0", 2, size=6, num_boxes=1).reset(seed=[1, 2])


def test_numpy_integers():
    i = np.int64
    sizes = {
        "size": (i(6), np.uint8(7)),
        "num_boxes": np.int32(1),
        "max_episode_steps": i(3),
        "frame_stack": np.int8(2),
    }
    plain = {name: tuple(map(int, value)) if name == "size" else int(value) for name, value in sizes.items()}
    assert_same(SokobanVectorEnv(i(2), **sizes).reset(seed=i(5)), SokobanVectorEnv(2, **plain).reset(seed=5))
    assert_same(SokobanEnv(**sizes).reset(seed=i(5)), SokobanEnv(**plain).reset(seed=5))
    levels = generate_levels(i(4), size=i(6), num_boxes=i(1), seed=i(2), max_pulls=i(3))
    assert_same(levels, generate_levels(4, size=6, num_boxes=1, seed=2, max_pulls=3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_actions(backend: str):
    envs = SokobanVectorEnv(3, size=6, num_boxes=1, backend=backend)
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        envs.step([0, 0, 0])
    envs.reset(seed=1)
    before = envs.get_state()
    for actions, fault in (
        ([0, 5, 0], "action 5 of environment 1"),
        ([0, 0, -1], "action -1 of environment 2"),
        (torch.tensor([7, 0, 0]), "action 7 of environment 0"),
        ([0, 0], "3 integers"),
        (np.zeros((3, 1), dtype=int), "3 integers"),
        ([0.0, 1.0, 2.0], "3 integers"),
        (torch.rand(3), "3 integers"),
        (np.ones(3, dtype=bool), "3 integers"),
        (2, "3 integers"),
    ):
        with pytest.raises(ValueError, match=fault):
            envs.step(actions)
        assert_same(envs.get_state(), before)  # nothing moved
    with pytest.raises(gym.error.ResetNeeded):
        gym.make("Sokoban-v0", backend=backend).step(0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_options_and_states(backend: str):
    board = to_board("#####", "#@$.#", "#####")
    envs = SokobanVectorEnv(2, size=(3, 5), levels=[board], backend=backend)
    for options, fault in (
        ({"level": board}, "level"),
        ({"levels": [board]}, "1 levels for 2 environments"),
        ({"level_indices": [0, 0, 0]}, "3 levels for 2 environments"),
        ({"level_indices": [0, 1]}, "level_indices"),
        ({"level_indices": [-1, 0]}, "level_indices"),
    ):
        with pytest.raises(ValueError, match=fault):
            envs.reset(seed=1, options=options)
    with pytest.raises(ValueError, match="level_indices"):
        SokobanVectorEnv(2, size=6, num_boxes=1, backend=backend).reset(options={"level_indices": [0, 0]})
    envs.reset(seed=1)
    before = envs.get_state()
    for cells in (torch.zeros(2, 3, 5), torch.zeros(1, 3, 5), torch.zeros(2, 5, 3)):
        with pytest.raises(ValueError, match="cells"):
            envs.set_state({"cells": cells.to(torch.uint8)})
        assert_same(envs.get_state(), before)


# ------------------------------------------------------------------------------------------------------------ gymnasium


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_spaces_and_check_env_without_a_warning(kind: str, stack: int):
    shape = {"cells": (6, 9), "tiny_rgb": (6, 9, 3), "rgb": (48, 72, 3)}[kind]
    shape = (stack, *shape) if stack > 1 else shape
    settings = {"size": (6, 9), "num_boxes": 2, "observation": kind, "frame_stack": stack, "render_mode": "rgb_array"}
    env, envs = gym.make("Sokoban-v0", **settings), gym.make_vec("Sokoban-v0", num_envs=3, **settings)
    check_env(env.unwrapped)
    assert env.observation_space == envs.single_observation_space and env.observation_space.shape == shape
    assert env.action_space == envs.single_action_space == gym.spaces.Discrete(5)
    assert envs.reset(seed=1)[0] in envs.observation_space
    assert envs.step(envs.action_space.sample())[0] in envs.observation_space


def test_stable_baselines3():
    """Not a dependency: `pip install stable-baselines3` runs this."""
    baselines = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common import env_checker, env_util, vec_env

    env_checker.check_env(SokobanEnv(size=7, num_boxes=1, observation="rgb"))
    settings = {"size": 7, "num_boxes": 1, "observation": "cells"}
    for kind in (vec_env.DummyVecEnv, vec_env.SubprocVecEnv):
        envs = env_util.make_vec_env("sokoban_env:Sokoban-v0", 2, seed=1, env_kwargs=settings, vec_env_cls=kind)
        baselines.PPO("MlpPolicy", envs, n_steps=250, batch_size=100, n_epochs=1, seed=1).learn(1000)
        envs.close()


@pytest.mark.filterwarnings("error")
def test_make_vec():
    envs = gym.make_vec("Sokoban-v0", num_envs=5, size=7, num_boxes=2)
    assert isinstance(envs.unwrapped, SokobanVectorEnv) and envs.num_envs == 5
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
    assert SokobanVectorEnv.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP
    observation, _ = envs.reset(seed=1)
    assert np.array_equal(observation, SokobanVectorEnv(5, size=7, num_boxes=2).reset(seed=1)[0].numpy())
    ends = [t for t in range(1, 245) if envs.step([0] * 5)[3].all()]
    assert ends == [120, 241]  # after the first a step resets


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("mode", list(gym.vector.AutoresetMode))
def test_make_vec_equals_gymnasiums_own_vector_of_single_ones(mode: Any, stack: int, backend: str):
    boards = [to_board("#######", "#@$ . #", "#######"), to_board("#######", "#@$.  #", "#  $ .#", "#######")]
    for board, limit in itertools.product(boards, (4, 7)):
        settings = {"size": (4, 7), "levels": [board], "frame_stack": stack, "max_episode_steps": limit}
        theirs = gym.make_vec(
            "Sokoban-v0", 16, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}, **settings
        )
        ours = gym.make_vec("Sokoban-v0", 16, autoreset_mode=mode, backend=backend, **settings)
        assert ours.metadata["autoreset_mode"] == mode
        assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
        assert_equal_vectors(ours.reset(seed=1), theirs.reset(seed=1))
        rng, both = np.random.default_rng(1), 0
        for _ in range(60):
            actions = rng.choice([0, 2, 4, 4, 4, 4], size=16)
            one, other = ours.step(actions), theirs.step(actions)
            assert_equal_vectors(one, other)
            ended = one[2] | one[3]
            both += (one[2] & one[3]).sum()
            if mode == gym.vector.AutoresetMode.DISABLED and ended.any():
                with pytest.raises(gym.error.ResetNeeded):
                    ours.step(actions)
                assert_equal_vectors(*(envs.reset(options={"reset_mask": ended}) for envs in (ours, theirs)))
        if board is boards[1] and limit == 7:
            continue
        assert both or limit == 7  # a level solved in its very last step is both, as TimeLimit has it


def assert_equal_vectors(one: Any, other: Any, where: str = "output") -> None:
    """As `assert_same`, for what vector environments return: arrays of the same values and kinds of numbers."""
    if isinstance(other, dict):
        assert one.keys() == other.keys(), where
        for key in other:
            assert_equal_vectors(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(other, tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_equal_vectors(*pair, f"{where}[{i}]")
    elif isinstance(other, np.ndarray) and other.dtype == object:
        assert one.dtype == object and [x is None for x in one] == [x is None for x in other], where
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True) if a is not None), where
    else:
        assert isinstance(one, np.ndarray) and one.dtype.kind == other.dtype.kind, where
        assert one.shape == other.shape and np.allclose(one, other, atol=1e-6), where


VECTOR_WRAPPERS = {
    "RecordEpisodeStatistics": (), "NormalizeReward": (), "NormalizeObservation": (), "FlattenObservation": (),
    "DtypeObservation": (np.float32,), "DictInfoToList": (), "RescaleObservation": (0.0, 1.0), "ClipReward": (0.0, 1.0),
    "ReshapeObservation": ((49,),), "TransformReward": (lambda reward: 2 * reward,), "TransformAction": (np.copy,),
    "TransformObservation": (np.copy,),
}  # fmt: skip


@pytest.mark.parametrize("mode", list(gym.vector.AutoresetMode))
@pytest.mark.parametrize("name", VECTOR_WRAPPERS)
def test_gymnasiums_vector_wrappers(name: str, mode: Any):
    """Those that apply, in the modes that they allow: they refuse the others for gymnasium's own vector, too."""
    board = to_board("#######", "#@$ . #", *["#######"] * 5)
    outputs = []
    for own in (True, False):
        chosen = {"autoreset_mode": mode}
        more = chosen if own else {"vectorization_mode": "sync", "vector_kwargs": chosen}
        envs = gym.make_vec("Sokoban-v0", 4, size=7, levels=[board], max_episode_steps=4, **more)
        try:
            envs = getattr(gym.wrappers.vector, name)(envs, *VECTOR_WRAPPERS[name])
        except ValueError as e:
            outputs.append(str(e))
            continue
        played = [envs.reset(seed=1)[0]]
        for actions in np.random.default_rng(1).choice([0, 4, 4], size=(20, 4)):
            played.append(envs.step(actions))
            ended = played[-1][2] | played[-1][3]
            if mode == gym.vector.AutoresetMode.DISABLED and ended.any():
                played.append(envs.reset(options={"reset_mask": ended})[0])
        outputs.append([(step[:4] if isinstance(step, tuple) else step) for step in played])
        # Without autoreset gymnasium's own vector takes the mask out of the options, which misleads this wrapper.
        if name == "RecordEpisodeStatistics" and mode != gym.vector.AutoresetMode.DISABLED:
            assert list(envs.length_queue) and max(envs.length_queue) <= 4
            outputs[-1] += [np.array(envs.length_queue), np.array(envs.return_queue)]
    one, other = outputs
    if isinstance(other, str) or isinstance(one, str):
        assert one == other and mode != gym.vector.AutoresetMode.NEXT_STEP
    else:
        assert_equal_vectors(tuple(one), tuple(other))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("arguments", "length"), [({}, 120), ({"max_episode_steps": 200}, 200)])
def test_the_time_limit_counts(arguments: dict, length: int):
    env = gym.make("Sokoban-v0", size=7, num_boxes=1, **arguments)
    for _ in range(2):
        env.reset(seed=1)
        ends = [env.step(0)[2:4] for _ in range(length)]
        assert ends == [(False, False)] * (length - 1) + [(False, True)]
    env = gym.wrappers.TimeLimit(SokobanEnv(size=7, num_boxes=1, max_episode_steps=None), length)
    env.reset(seed=1)
    assert [env.step(0)[3] for _ in range(length)].index(True) == length - 1
    envs = gym.make_vec("Sokoban-v0", num_envs=2, size=7, num_boxes=1, **arguments)
    envs.reset(seed=1)
    assert [envs.step([0, 0])[3].all().item() for _ in range(length)].index(True) == length - 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_frame_stack_observation(kind: str):
    ours = gym.make("Sokoban-v0", size=7, num_boxes=2, observation=kind, frame_stack=4)
    theirs = gym.make("Sokoban-v0", size=7, num_boxes=2, observation=kind)
    theirs = gym.wrappers.FrameStackObservation(theirs, 4, padding_type="reset")
    assert ours.observation_space == theirs.observation_space
    assert np.array_equal(ours.reset(seed=3)[0], theirs.reset(seed=3)[0])
    for action in np.random.default_rng(3).integers(5, size=40):
        one, other = ours.step(int(action)), theirs.step(int(action))
        assert np.array_equal(one[0], other[0]) and one[1:] == other[1:]


@pytest.mark.parametrize("kind", KINDS)
def test_rendering(kind: str):
    boards = [pad(board, 6, 7) for board in mixed_boards(6, 7, 3)]
    settings = {"size": (6, 7), "levels": boards, "observation": kind}
    for mode in ("rgb_array", "ansi", None):
        env = gym.make("Sokoban-v0", render_mode=mode, **settings).unwrapped
        envs = SokobanVectorEnv(3, render_mode=mode, **settings)
        assert env.render_mode == envs.render_mode == mode
        env.reset(seed=1, options={"level_index": 5})
        envs.reset(seed=1, options={"level_indices": [5, 6, 7]})
        env.step(0)
        if mode is None:
            assert env.render() is None and envs.render() is None
        elif mode == "ansi":
            assert env.render() == cells_to_text(boards[5])
            assert list(envs.render()) == [cells_to_text(board) for board in boards[5:8]]
        else:
            assert isinstance(env.render(), np.ndarray) and np.array_equal(env.render(), picture(boards[5], "rgb"))
            assert np.array_equal(np.stack(envs.render()), [picture(board, "rgb") for board in boards[5:8]])


def test_a_window(monkeypatch: pytest.MonkeyPatch):
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    board = mixed_boards(6, 7, 3)[5]
    env = gym.make("Sokoban-v0", size=(6, 7), levels=[board], render_mode="human")
    start = time.perf_counter()
    env.reset(seed=1)
    for _ in range(3):
        env.step(0)
    assert time.perf_counter() - start > 2.5 / env.metadata["render_fps"]  # a frame for each step, no faster
    shown = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
    assert np.array_equal(shown[::4, ::4], picture(pad(board, 6, 7), "rgb"))
    assert copy.deepcopy(env.unwrapped)._window is None
    env.close()
    assert pygame.display.get_surface() is None
    env.close()


def test_reset_options_of_the_single_environment():
    boards = mixed_boards(6, 7, 3)
    env = SokobanEnv(size=(6, 7), levels=list(boards))
    observation, info = env.reset(seed=1, options={"level_index": 3})
    assert np.array_equal(observation, pad(boards[3], 6, 7)) and info["level"] == 3
    for level in (boards[4], cells_to_text(boards[4])):
        observation, info = env.reset(options={"level": level})
        assert np.array_equal(observation, pad(boards[4], 6, 7)) and info["level"] == -1
    for options in ({"level_index": len(boards)}, {"levels_": 1}):
        with pytest.raises(ValueError, match="level"):
            env.reset(options=options)


# -------------------------------------------------------------------------------------------------------------- devices


class Elsewhere(torch.Tensor):
    """A tensor that says it is on the device "meta", with its values in `inside`, on the CPU."""

    @staticmethod
    def __new__(cls, inside: torch.Tensor) -> "Elsewhere":
        layout = {"strides": inside.stride(), "storage_offset": inside.storage_offset(), "dtype": inside.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, inside.shape, **layout, device="meta")
        tensor.inside = inside
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor elsewhere, outside SimulatedDevice")


class _Arguments(TorchFunctionMode):
    """Lists of numbers reach the simulated device through a CPU tensor (torch drops them where it makes meta ones)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") is not None:
            device, values = kwargs.pop("device"), args[0]
            if not isinstance(values, torch.Tensor):
                return func(*args, **kwargs).to(device)
            kwargs["device"] = device
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(i) if isinstance(i, list) else i for i in index)
            args = (args[0], index, *args[2:])
        return func(*args, **kwargs)


class SimulatedDevice(TorchDispatchMode):
    """A second device, computed on the CPU: an operation on tensors of both devices fails, as it would on a GPU.

    `waits` lists the operations for which the host would have had to wait for a GPU, `kernels` those for which it
    would have started one: all but views.
    """

    VIEWS = (
        *("view", "reshape", "expand", "permute", "select", "slice", "unsqueeze", "squeeze", "transpose", "t"),
        *("alias", "unbind", "detach", "split", "as_strided", "_unsafe_view", "lift_fresh", "movedim"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.waits, self.kernels, self.arguments = [], [], _Arguments()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # whose import takes longer than the tests
        return True

    def __enter__(self) -> "SimulatedDevice":
        self.arguments.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.arguments.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), dict(kwargs or {})
        given = tensors((args, kwargs))
        here = [tensor for tensor in given if isinstance(tensor, Elsewhere)]
        assert all(tensor.device.type == "cpu" for tensor in given if not isinstance(tensor, Elsewhere)), name
        moves = name in ("_to_copy", "copy_") or name.startswith(("index", "_index"))  # an index may be on the CPU
        if here and not moves and any(tensor.ndim for tensor in given if not isinstance(tensor, Elsewhere)):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = "cpu"
        elsewhere = torch.device(device).type == "meta" if device is not None else bool(here)
        masks = name.startswith(("index", "_index")) and any(tensor.dtype == torch.bool for tensor in tensors(args[1]))
        leaves = name == "copy_" and not isinstance(args[0], Elsewhere)
        if here and (name in ("_local_scalar_dense", "nonzero", "equal") or not elsewhere or masks or leaves):
            self.waits.append(name)
        if name not in self.VIEWS:
            self.kernels.append(name)
        inside = tree_map(lambda leaf: leaf.inside if isinstance(leaf, Elsewhere) else leaf, (args, kwargs))
        result = func(*inside[0], **inside[1])
        if not elsewhere:
            return result
        known = {id(tensor.inside): tensor for tensor in here}  # what was changed in place stays the same object
        return tree_map(lambda leaf: known.get(id(leaf), Elsewhere(leaf)) if tensors(leaf) else leaf, result)


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice()


def assert_elsewhere_and_same(there: Any, here: Any) -> None:
    """All tensors of `there` are on the simulated device, and hold what `here` holds."""
    assert all(isinstance(tensor, Elsewhere) for tensor in tensors(there))
    assert_same(tree_map(lambda leaf: leaf.inside if isinstance(leaf, Elsewhere) else leaf, there), here)


def test_the_simulated_device_tells_devices_apart(device: SimulatedDevice):
    with device:
        there = torch.arange(4, device="meta")
        assert there.device.type == "meta" and (there + 1).cpu().tolist() == [1, 2, 3, 4] and device.waits
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.arange(4)


@pytest.mark.parametrize(("kind", "stack"), [("cells", 1), ("cells", 3), ("tiny_rgb", 3), ("rgb", 1)])
@pytest.mark.parametrize("pool", ["fixed", "endless"])
def test_another_device_gives_the_same_without_waiting(device: SimulatedDevice, pool: str, kind: str, stack: int):
    boards = list(mixed_boards(6, 7, 3))
    settings = {"size": (6, 7), "num_boxes": 1, "levels": boards if pool == "fixed" else None, "max_episode_steps": 8}
    settings |= {"observation": kind, "frame_stack": stack}
    here = SokobanVectorEnv(8, **settings, backend="torch")
    first = here.reset(seed=1)
    with device, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sokoban_env._Pool, "SIDE_BY_SIDE", 3)
        there = SokobanVectorEnv(8, **settings, device="meta")
        assert there.device.type == "meta"
        assert_elsewhere_and_same(there.reset(seed=1), first)
        kernels = []
        for i, actions in enumerate(random_actions(1, 30, 8)):
            given = torch.from_numpy(actions).to("meta")
            device.waits.clear()
            device.kernels.clear()
            outputs = there.step(given)
            assert not device.waits
            kernels.append(len(device.kernels))
            assert_elsewhere_and_same(outputs, here.step(actions))
            if i == 10:
                state, shown = there.get_state(), outputs[0].inside
        assert set(kernels) == {kernels[0]}  # always the same
        assert kernels[0] <= 40 or (kind, stack) != ("cells", 1), Counter(device.kernels)
        assert_elsewhere_and_same(there.set_state(state), shown)
        there.step([0] * 8)
        assert there.reset(options={"levels": boards[:8]})[0].device.type == "meta"
        if pool == "fixed":
            assert there.reset(options={"level_indices": range(8)})[0].device.type == "meta"
        with pytest.raises(RuntimeError, match="out of range"):
            there.step([5] * 8)


def test_another_device_converts_the_same(device: SimulatedDevice):
    cells = np.stack([pad(board, 6, 7) for board in mixed_boards(6, 7, 3)[:5]])
    for source, target in itertools.product(KINDS, KINDS):
        given = torch.from_numpy(np.stack([picture(board, source) for board in cells]))
        expected = convert_observation(given, source, target)
        with device:
            assert_elsewhere_and_same(convert_observation(given.to("meta"), source, target), expected)


def test_levels_repeat_only_without_refills():
    envs = SokobanVectorEnv(128, size=7, num_boxes=1, max_episode_steps=1, backend="torch")
    envs.reset(seed=2)
    envs._pool.serial += 10**9  # as in a CUDA graph, which does not run what the host does
    starts = [envs.step([0] * 128)[0] for _ in range(8)]
    assert len(torch.cat(starts).unique(dim=0)) <= len(envs._pool.boards) < 8 * 128  # the ring went round
    envs._pool.serial -= 10**9
    envs.refill()
    assert int(envs._pool.last) + 1 == envs._pool.most < envs._pool.serial
    starts = torch.cat([envs.step([0] * 128)[0] for _ in range(8)])
    assert len(starts.unique(dim=0)) > 0.95 * 8 * 128
