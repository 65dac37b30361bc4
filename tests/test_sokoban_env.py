"""Tests of sokoban_env.py: its rules, levels, level text, state, copies and gymnasium API.

What an episode gives out is compared with `ScalarSokoban`, one game on sets of cells, which knows nothing of the
environment's arrays and tables. Its use on a GPU: tests/test_gpu.py. Shapes: `N` environments, `L` levels, `H, W`
board, `T` steps.
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
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import assert_same
from gymnasium.utils.env_checker import check_env, data_equivalence
from torch.utils._pytree import tree_leaves

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
ACTION_OF_LETTER = {"0": 0, "u": 1, "d": 2, "l": 3, "r": 4}
both_backends = pytest.mark.parametrize("backend", ["numpy", "torch"])


# ------------------------------------------------------------------------------------------------ reference and helpers


class ScalarSokoban:
    """One game of Sokoban, from the rules alone; a cell is its number in reading order."""

    def __init__(self, board: np.ndarray, limit: float = float("inf"), level: int | None = None):
        flat = board.ravel().tolist()
        self.shape, self.limit, self.level = board.shape, limit, level
        self.walls = {p for p, cell in enumerate(flat) if CHARS[cell] == "#"}
        self.targets = {p for p, cell in enumerate(flat) if CHARS[cell] in ".*+"}
        self.boxes = {p for p, cell in enumerate(flat) if CHARS[cell] in "$*"}
        (self.player,) = (p for p, cell in enumerate(flat) if CHARS[cell] in "@+")
        self.moves = (0, -board.shape[1], board.shape[1], -1, 1)
        self.steps, self.total, self.solved = 0, 0.0, False

    def step(self, action: int) -> tuple[float, bool, bool]:
        """Reward, terminated, truncated; `moved` and `pushed` say what happened."""
        move, reward = self.moves[action], -0.1
        ahead, behind = self.player + move, self.player + 2 * move
        taken = self.walls | self.boxes
        self.pushed = ahead in self.boxes and behind not in taken
        self.moved = self.pushed or (move != 0 and ahead not in taken)
        if self.pushed:
            self.boxes = self.boxes - {ahead} | {behind}
            reward += (behind in self.targets) - (ahead in self.targets)
        if self.moved:
            self.player = ahead
        self.steps += 1
        self.solved = self.boxes == self.targets
        if self.solved:
            reward += 10
        self.total += reward
        return reward, self.solved, not self.solved and self.steps >= self.limit

    def board(self) -> np.ndarray:
        cells = np.ones(self.shape, dtype=np.uint8)
        cells.flat[list(self.targets)] += 1
        cells.flat[list(self.boxes)] += 2
        cells.flat[self.player] += 4
        cells.flat[list(self.walls)] = 0
        return cells


def to_board(*rows: str) -> np.ndarray:
    """A board from its rows, without the module's own parser."""
    return np.array([[CHARS.index(char) for char in row] for row in rows], dtype=np.uint8)


def pad(board: np.ndarray, height: int, width: int) -> np.ndarray:
    """A smaller board in the upper left corner of a wall."""
    return np.pad(board, ((0, height - board.shape[0]), (0, width - board.shape[1])))


def picture(boards: np.ndarray, kind: str) -> np.ndarray:
    """The observation of boards (..., H, W), put together sprite by sprite."""
    if kind == "cells":
        return boards.copy()
    if kind == "tiny_rgb":
        return TINY_PALETTE[boards]
    *lead, height, width = boards.shape
    return SPRITES[boards].swapaxes(-4, -3).reshape(*lead, 8 * height, 8 * width, 3)


def random_board(rng: np.random.Generator, height: int, width: int, num_boxes: int) -> np.ndarray:
    """Scattered walls, boxes on and off targets, the player anywhere: some unsolvable, some one push from done."""
    board = np.zeros((height, width), dtype=np.uint8)
    while board.sum() < 2 * num_boxes + 1:
        board[1:-1, 1:-1] = rng.random((height - 2, width - 2)) < 0.8
    player, *floor = rng.permutation(np.flatnonzero(board))
    boxes, other = floor[:num_boxes], [player, *floor[num_boxes:]]
    loose = int(rng.integers(1, num_boxes + 1))
    board.flat[[*boxes[loose:], *rng.choice(other, loose, replace=False)]] += 1
    board.flat[boxes] += 2
    board.flat[player] += 4
    return board


@functools.cache
def generated(height: int, width: int, num_boxes: int, num: int) -> tuple[torch.Tensor, list[str]]:
    return generate_levels(num, size=(height, width), num_boxes=num_boxes, seed=1)


@functools.cache
def mixed_boards(height: int, width: int, most_boxes: int) -> np.ndarray:
    """Distinct boards (L, H, W) with 1 to `most_boxes` boxes; some are a few moves before the end of a solution."""
    rng, boards = np.random.default_rng([height, width, most_boxes]), []
    for num_boxes in range(1, most_boxes + 1):
        boards += [random_board(rng, height, width, num_boxes) for _ in range(20)]
        levels, solutions = generated(height, width, num_boxes, 24)
        for i, (level, solution) in enumerate(zip(levels.numpy(), solutions, strict=True)):
            game = ScalarSokoban(level)
            for letter in solution[: max(0, len(solution) - i % 6 - 1)]:
                game.step(ACTION_OF_LETTER[letter.lower()])
            boards.append(game.board())
    return np.unique(boards, axis=0)


def play(envs: SokobanVectorEnv, actions: np.ndarray) -> list[tuple]:
    """Everything that `step` returns over actions (T, N)."""
    return [envs.step(row) for row in actions]


def random_actions(seed: int, steps: int, num_envs: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, size=(steps, num_envs))


# ------------------------------------------------------------------------------------------------------------ the rules


def check_final_info(info: dict, ended: list[int], games: list[ScalarSokoban], frames: np.ndarray) -> None:
    """`final_obs` and `final_info` of the games in `ended`; `frames` (N, ...) is what the step led to in every game."""
    final, episode = info["final_info"], info["final_info"]["episode"]
    masks = [values[name] for values in (info, final, episode) for name in values if name.startswith("_")]
    assert len(masks) == 8
    for mask in masks:
        assert mask.dtype == torch.bool and mask.nonzero().flatten().tolist() == ended
    assert np.array_equal(info["final_obs"].numpy(), frames)
    for i in ended:
        game = games[i]
        assert final["success"][i].item() is game.solved
        assert final["boxes_on_target"][i] == len(game.boxes & game.targets)
        assert game.level is None or final["level"][i] == game.level
        assert episode["l"][i] == game.steps and episode["r"][i].item() == pytest.approx(game.total, abs=1e-4)


def compare_with_scalar(envs: SokobanVectorEnv, boards: np.ndarray, stack: int, limit: int, steps: int) -> Counter:
    """Step `envs` (on the levels `boards`, or endless ones) at random beside scalar games; compare all that comes out.

    Returns how often each reward and each end came.
    """
    numbers = {picture(board, envs.observation).tobytes(): i for i, board in enumerate(boards)}
    seen: Counter = Counter()

    def start(frame: np.ndarray) -> ScalarSokoban:
        if not numbers:  # endless levels are observed as `cells`
            return ScalarSokoban(frame, limit)
        level = numbers[frame.tobytes()]  # an autoreset gives exactly one of the levels
        seen[f"level {level}"] += 1
        return ScalarSokoban(boards[level], limit, level)

    def newest(observation: torch.Tensor) -> np.ndarray:
        return (observation[:, -1] if stack > 1 else observation).numpy().copy()

    observation, info = envs.reset(seed=7)
    assert info == {} and observation.dtype == torch.uint8
    games = [start(frame) for frame in newest(observation)]
    history = np.repeat(newest(observation)[:, None], stack, axis=1)  # (N, stack, ...)
    forms = (lambda a: a, torch.from_numpy, np.ndarray.tolist, lambda a: a.astype(np.uint8))
    for t, actions in enumerate(random_actions(1, steps, envs.num_envs)):
        observation, reward, terminated, truncated, info = envs.step(forms[t % 4](actions))
        results = [game.step(action) for game, action in zip(games, actions.tolist(), strict=True)]
        rewards, ends, cuts = map(list, zip(*results, strict=True))
        frames = picture(np.stack([game.board() for game in games]), envs.observation)
        history = np.concatenate([history[:, 1:], frames[:, None]], axis=1)
        assert reward.dtype == torch.float32 and np.abs(reward.numpy() - rewards).max() < 2e-6
        assert terminated.dtype == truncated.dtype == torch.bool
        assert terminated.tolist() == ends and truncated.tolist() == cuts
        ended = [i for i in range(len(games)) if ends[i] or cuts[i]]
        if ended:
            check_final_info(info, ended, games, history if stack > 1 else frames)
        assert bool(ended) == bool(info.get("_final_obs", torch.tensor(False)).any())
        for i in ended:
            first = newest(observation)[i]
            games[i], history[i] = start(first), first
        assert np.array_equal(observation.numpy(), history if stack > 1 else history[:, 0])
        seen.update(round(value, 1) for value in rewards)
        seen.update({"solved": sum(ends), "cut": sum(cuts)})
    return seen


@pytest.mark.parametrize(
    ("backend", "kind", "stack", "shape", "most_boxes", "limit"),
    [
        ("numpy", "cells", 1, (5, 5), 2, 12),
        ("numpy", "cells", 4, (7, 9), 3, 25),
        ("numpy", "tiny_rgb", 3, (12, 6), 3, 30),
        ("numpy", "rgb", 1, (7, 7), 2, 20),
        ("torch", "cells", 1, (10, 10), 4, 20),
        ("torch", "tiny_rgb", 4, (5, 11), 3, 20),
        ("torch", "rgb", 1, (6, 6), 2, 20),
    ],
)
def test_every_output_equals_the_scalar_simulator(backend, kind, stack, shape, most_boxes, limit):
    boards = mixed_boards(*shape, most_boxes)
    settings = {"observation": kind, "frame_stack": stack, "backend": backend, "max_episode_steps": limit}
    envs = SokobanVectorEnv(32, size=shape, levels=boards, **settings)
    seen = compare_with_scalar(envs, boards, stack, limit, 300)
    assert {key for key in seen if isinstance(key, float)} == {-0.1, 0.9, -1.1, 10.9}
    assert min(seen["solved"], seen["cut"]) > 0.02 * (seen["solved"] + seen["cut"])
    assert sum(f"level {i}" in seen for i in range(len(boards))) > 0.6 * len(boards)


@pytest.mark.parametrize(("backend", "stack"), [("numpy", 4), ("torch", 1)])
def test_every_output_equals_the_scalar_simulator_on_endless_levels(backend, stack):
    settings = {"size": (5, 6), "num_boxes": 2, "max_episode_steps": 40, "frame_stack": stack, "backend": backend}
    seen = compare_with_scalar(SokobanVectorEnv(32, **settings), np.array([]), stack, 40, 300)
    assert seen["solved"] > 1 and seen["cut"] > 200


@both_backends
def test_levels_are_drawn_uniformly(backend):
    envs = SokobanVectorEnv(200, levels=mixed_boards(10, 10, 4)[:20], max_episode_steps=1, backend=backend)
    envs.reset(seed=1)
    drawn = torch.cat([envs.step([0] * 200)[4]["final_info"]["level"] for _ in range(50)]).bincount(minlength=20)
    assert ((drawn - 500).abs() < 5 * (500 * 0.95) ** 0.5).all()


ROUNDABOUT = ["########", "#      #", "# @$.  #", "#  $.  #", "########"]


@both_backends
@pytest.mark.parametrize(
    ("rows", "actions", "limit", "rewards", "end"),
    [
        (["#####", "#@$.#", "#####"], "r", 1, [10.9], "terminated"),  # solved in the last step: not truncated
        (["######", "#@$ .#", "######"], "0" * 500 + "rr", None, [-0.1] * 501 + [10.9], "terminated"),  # no limit
        (["######", "#@$ .#", "######"], "r0l", 3, [-0.1] * 3, "truncated"),
        (["########", "#@$.$.*#", "########"], "rr", 9, [0.9, -0.1], ""),  # then two boxes in a row
        # on, off, around, on again, and the other box from below: the last one pays 10.9
        (ROUNDABOUT, "rrurrdlullldd" + "r", 14, [0.9, -1.1, *[-0.1] * 4, 0.9, *[-0.1] * 6, 10.9], "terminated"),
    ],
)
def test_rewards_and_ends(rows, actions, limit, rewards, end, backend):
    board = to_board(*rows)
    envs = SokobanVectorEnv(1, size=board.shape, levels=[board], max_episode_steps=limit, backend=backend)
    envs.reset(seed=1)
    for i, (letter, expected) in enumerate(zip(actions, rewards, strict=True), start=1):
        _, reward, terminated, truncated, _ = envs.step([ACTION_OF_LETTER[letter]])
        assert reward.item() == pytest.approx(expected, abs=1e-6)
        assert terminated.item() == (i == len(actions) and end == "terminated")
        assert truncated.item() == (i == len(actions) and end == "truncated")


# ---------------------------------------------------------------------------------------------------- generated levels


def check_levels(levels: np.ndarray, num_boxes: int) -> None:
    """Closed, one player, boxes off their as many targets, connected, all distinct."""
    floor, player, box = levels > 0, levels >= 5, levels == 3
    assert levels.dtype == np.uint8 and levels.max() <= 6
    assert not levels[:, [0, -1]].any() and not levels[:, :, [0, -1]].any()
    assert (player.sum((1, 2)) == 1).all() and not (levels == 4).any()
    assert (box.sum((1, 2)) == num_boxes).all()
    assert (((levels == 2) | (levels == 6)).sum((1, 2)) == num_boxes).all()
    assert len(np.unique(levels, axis=0)) == len(levels)
    reached, grown = np.zeros_like(floor), player
    while (grown != reached).any():  # borders are wall, so that a roll around them does no harm
        reached = grown
        near = [np.roll(reached, step, axis) for step in (1, -1) for axis in (1, 2)]
        grown = floor & np.logical_or.reduce([reached, *near])
    assert (reached == floor).all()


def check_solutions(levels: torch.Tensor, solutions: list[str]) -> None:
    """Each ends solved at its last letter; capital letters are pushes, small ones steps, none of them is blocked."""
    for level, solution in zip(levels.numpy(), solutions, strict=True):
        game = ScalarSokoban(level)
        for letter in solution:
            assert not game.solved
            game.step(ACTION_OF_LETTER[letter.lower()])
            assert game.moved and game.pushed == letter.isupper()
        assert game.solved


@pytest.mark.parametrize(
    ("height", "width", "num_boxes", "num"),
    [(10, 10, 4, 1000), (5, 5, 1, 200), (5, 5, 2, 100), (6, 11, 3, 100), (20, 20, 8, 40), (8, 40, 8, 1), (5, 64, 5, 1)],
)
def test_generated_levels_are_solved_by_their_solutions(height, width, num_boxes, num):
    levels, solutions = generated(height, width, num_boxes, num)
    assert levels.shape == (num, height, width) and len(solutions) == num
    check_levels(levels.numpy(), num_boxes)
    check_solutions(levels, solutions)


@pytest.mark.parametrize(("num_boxes", "max_pulls"), [(1, 1), (2, 6)])
def test_levels_a_few_pulls_before_their_end(num_boxes, max_pulls):
    levels, solutions = generate_levels(200, size=7, num_boxes=num_boxes, seed=3, max_pulls=max_pulls)
    check_solutions(levels, solutions)
    pushes = [sum(letter.isupper() for letter in solution) for solution in solutions]
    assert min(pushes) == 1 and max(pushes) == max_pulls
    assert all(solution[0].isupper() for solution in solutions)  # the player stands beside its first box
    assert len(levels.unique(dim=0)) == 200
    assert (levels == 4).any() == (num_boxes > 1)  # boxes on targets, which other levels do not have


def test_the_levels_of_a_seed_stay_the_same():
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    levels, solutions = generate_levels(50, size=7, num_boxes=2, seed=3)
    digest = hashlib.sha256(levels.numpy().tobytes() + "".join(solutions).encode()).hexdigest()
    assert digest[:16] == "39b0385b04085f09"
    assert np.array_equal(np.random.get_state()[1], before[0]) and torch.equal(torch.get_rng_state(), before[1])
    envs = SokobanVectorEnv(16, size=6, num_boxes=1, max_episode_steps=2)
    boards = [envs.reset(seed=9)[0], *(envs.step([0] * 16)[0] for _ in range(60))]
    assert hashlib.sha256(torch.stack(boards).numpy().tobytes()).hexdigest()[:16] == "02dbfff869d0ca04"


def test_a_seed_gives_the_same_endless_episodes_on_both_backends():
    def episodes(seed: int, backend: str) -> list[Any]:
        envs = SokobanVectorEnv(8, size=(6, 7), num_boxes=2, max_episode_steps=9, backend=backend)
        played = [envs.reset(seed=seed), *(envs.step(row)[:4] for row in random_actions(1, 60, 8))]
        return [*played, envs.reset(), envs.reset(seed=seed)]

    one, other = episodes(4, "numpy"), episodes(5, "numpy")
    assert_same(one, episodes(4, "torch"))
    assert_same(one[0][0], one[-1][0])
    assert not torch.equal(one[0][0], other[0][0]) and not torch.equal(one[-1][0], one[-2][0])
    one, other = (SokobanVectorEnv(16, size=7, num_boxes=2).reset()[0] for _ in range(2))  # without a seed
    assert not torch.equal(one, other)


@both_backends
def test_excluded_levels_are_never_handed_out(backend, monkeypatch):
    held_out, _ = generate_levels(300, size=5, num_boxes=1, seed=1)

    def seen(**kwargs) -> torch.Tensor:
        env = SokobanVectorEnv(64, size=5, num_boxes=1, max_episode_steps=1, backend=backend, **kwargs)
        return torch.cat([env.reset(seed=7)[0], *(env.step([0] * 64)[0] for _ in range(20))])

    free, kept = seen(), seen(exclude=held_out)
    mask = exclude_levels(free, held_out)
    known = {level.numpy().tobytes() for level in held_out}
    assert mask.tolist() == [level.numpy().tobytes() not in known for level in free]
    assert not mask.all()  # there are so few that the same ones come again
    assert exclude_levels(kept, held_out).all() and torch.equal(free[mask][:500], kept[:500])  # in the same order

    monkeypatch.setattr(sokoban_env, "_generate", lambda xp, *_, **__: (sokoban_env._copy_to(xp, held_out, "cpu"), []))
    with pytest.raises(ValueError, match="finds no 5x5 level with 1 boxes besides `exclude`"):
        seen(exclude=held_out)


@both_backends
def test_no_endless_level_comes_twice(backend):
    envs = SokobanVectorEnv(32, size=8, num_boxes=2, max_episode_steps=3, backend=backend)
    starts, numbers = [envs.reset(seed=2)[0]], []
    for step in range(120):
        observation, _, _, _, info = envs.step([0] * 32)
        if step % 3 == 2:
            starts.append(observation)
            numbers += info["final_info"]["level"].tolist()
    check_levels(torch.cat(starts).numpy(), 2)
    assert numbers == list(range(32 * 40))  # their serial numbers


def test_batches_made_side_by_side_are_those_made_one_by_one():
    def made(batches: range) -> torch.Tensor:
        return sokoban_env._generate(torch, "cpu", (6, 7, 2), 5, batches, solve=False)[0]

    assert_same(made(range(3)), torch.cat([made(range(i, i + 1)) for i in range(3)]))


# ------------------------------------------------------------------------------------------------- autoreset and state


def make_envs(pool: str, backend: str, kind: str = "cells", stack: int = 1, **settings: Any) -> SokobanVectorEnv:
    settings |= {"size": 8, "num_boxes": 2, "max_episode_steps": 15, "observation": kind}
    levels = mixed_boards(8, 8, 2) if pool == "fixed" else None  # else endless
    return SokobanVectorEnv(16, levels=levels, frame_stack=stack, backend=backend, **settings)


def save_and_load(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("pool", ["fixed", "endless"])
@pytest.mark.parametrize(
    ("source", "target", "kind", "stack"),
    [
        ("numpy", "numpy", "tiny_rgb", 3),
        ("torch", "torch", "cells", 1),
        ("torch", "torch", "rgb", 3),
        ("numpy", "torch", "cells", 2),
        ("torch", "numpy", "cells", 2),
    ],
)
def test_a_state_resumes_bit_for_bit(source, target, kind, stack, pool):
    def go_on(envs: SokobanVectorEnv, actions: np.ndarray) -> list:
        """With a reset in between; `info` has other names in the other backend."""
        played = [step[:4] for step in play(envs, actions)]
        final = envs.step(np.zeros(16, dtype=int))[4].get("final_info")
        return [played, final if source == target else None, envs.reset(), play(envs, actions[:5])[-1][:4]]

    envs, fresh = make_envs(pool, source, kind, stack), make_envs(pool, target, kind, stack)  # `fresh` is never reset
    envs.reset(seed=3)
    for chunk in range(2):
        observation = play(envs, random_actions(chunk, 37, 16))[-1][0]
        state = envs.get_state()
        kept, loaded = copy.deepcopy(state), save_and_load(state)
        assert_same(loaded, state)
        actions = random_actions(100 + chunk, 40, 16)
        played = go_on(envs, actions)
        assert_same(state, kept)  # a state is a copy
        assert_same(fresh.set_state(loaded), observation)
        assert_same(go_on(fresh, actions), played)
        assert_same(loaded, kept)  # nor does playing on write into the state that was set
        assert_same(fresh.get_state(pool=False), envs.get_state(pool=False))


@both_backends
@pytest.mark.parametrize("pool", ["fixed", "endless"])
def test_setting_only_cells(pool, backend):
    envs = make_envs(pool, backend, stack=3)
    envs.reset(seed=1)
    play(envs, random_actions(1, 10, 16))
    boards = generated(8, 8, 2, 24)[0][:16]
    given, expected = boards.clone(), boards[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(envs.set_state({"cells": given}), expected)  # fresh counters, and a full stack
    given.zero_()
    for _ in range(14):
        observation, _, _, truncated, _ = envs.step([0] * 16)
        assert torch.equal(observation, expected) and not truncated.any()
    observation, _, _, truncated, info = envs.step([0] * 16)
    assert truncated.all() and not torch.equal(observation, expected)  # an autoreset draws as ever
    final = info["final_info"]
    assert final["level"].tolist() == [-1] * 16 and final["episode"]["l"].tolist() == [15] * 16
    assert torch.allclose(final["episode"]["r"], torch.tensor(-1.5))


@both_backends
def test_a_solved_board_can_be_set(backend):
    envs = SokobanVectorEnv(1, size=(3, 5), levels=[to_board("#####", "#@$.#", "#####")], backend=backend)
    envs.reset(seed=1)
    solved = to_board("#####", "# @*#", "#####")
    assert np.array_equal(envs.set_state({"cells": torch.from_numpy(solved)[None]})[0].numpy(), solved)
    _, reward, terminated, _, _ = envs.step([0])  # the episode ends; nothing was solved in it, so that it pays -0.1
    assert terminated.item() and reward.item() == pytest.approx(-0.1)


@both_backends
def test_reset_options(backend):
    boards = mixed_boards(6, 7, 3)
    envs = SokobanVectorEnv(3, size=(6, 7), levels=boards, max_episode_steps=1, backend=backend)
    observation, _ = envs.reset(seed=1, options={"level_indices": [4, 0, 4]})
    assert np.array_equal(observation.numpy(), boards[[4, 0, 4]])
    assert envs.step([0] * 3)[4]["final_info"]["level"].tolist() == [4, 0, 4]
    small, text = to_board("#####", "#@$.#", "#####"), "#####\n#.$@#\n#####"
    observation, _ = envs.reset(options={"levels": [small, torch.from_numpy(boards[7]), text]})
    assert np.array_equal(observation.numpy(), [pad(small, 6, 7), boards[7], pad(small[:, ::-1], 6, 7)])
    assert envs.step([0] * 3)[4]["final_info"]["level"].tolist() == [-1] * 3


def test_state_and_options_of_the_single_environment():
    boards = mixed_boards(6, 7, 3)
    env, fresh = (SokobanEnv(size=(6, 7), levels=boards, max_episode_steps=30) for _ in range(2))
    observation, info = env.reset(seed=1, options={"level_index": 3})
    assert np.array_equal(observation, boards[3]) and info["level"] == 3
    for level in (boards[4], cells_to_text(boards[4])):
        observation, info = env.reset(options={"level": level})
        assert np.array_equal(observation, boards[4]) and info["level"] == -1
    observation, *_ = env.step(1)
    assert np.array_equal(fresh.set_state(save_and_load(env.get_state())), observation)
    for action in random_actions(0, 20, 1)[:, 0]:
        assert_same(fresh.step(action), env.step(action))
    assert_same(fresh.reset(), env.reset())
    for options in ({"level_index": len(boards)}, {"levels_": 1}):
        with pytest.raises(ValueError, match="level"):
            env.reset(options=options)


# --------------------------------------------------------------------------------------------------------------- copies


both_frames = pytest.mark.parametrize(("kind", "stack"), [("cells", 1), ("cells", 3), ("tiny_rgb", 3), ("rgb", 1)])


@both_frames
@both_backends
def test_what_was_returned_never_changes_nor_what_is_written_into_it(backend, kind, stack):
    one, other = (make_envs("endless", backend, kind, stack) for _ in range(2))
    kept = [one.reset(seed=1), one.get_state()]
    results, clones = [other.reset(seed=1), other.get_state()], copy.deepcopy(kept)
    for i, actions in enumerate(random_actions(1, 40, 16)):
        for leaf in tree_leaves(results):
            if isinstance(leaf, torch.Tensor):
                leaf.fill_(1)
        returned, results = ([envs.step(actions)] for envs in (one, other))
        if i == 20:
            returned, results = ([envs.get_state(), envs.set_state(envs.get_state())] for envs in (one, other))
        if i == 30:
            returned, results = ([envs.reset()] for envs in (one, other))
        assert_same(results, returned)
        kept.append(returned)
        clones.append(copy.deepcopy(returned))
    assert_same(kept, clones)


@both_backends
def test_levels_handed_in_are_copied(backend):
    boards = mixed_boards(7, 7, 2)[:12]
    given = [torch.from_numpy(boards.copy()), boards.copy()]
    envs = SokobanVectorEnv(12, size=7, levels=given[0], max_episode_steps=1, backend=backend)
    envs.reset(seed=1, options={"levels": given[1]})
    given[0].zero_()
    given[1][:] = 0
    assert np.array_equal(envs.get_state(pool=False)["cells"].numpy(), boards)
    known = {board.tobytes() for board in boards}
    assert all(board.tobytes() in known for board in envs.step([0] * 12)[0].numpy())


@both_frames
@both_backends
def test_a_view_holds_until_the_next_step(backend, kind, stack):
    views, copies = (make_envs("fixed", backend, kind, stack, copy=c) for c in (False, True))
    view, expected = (envs.reset(seed=1)[0] for envs in (views, copies))
    kept, others = [], []
    for actions in random_actions(3, 50, 16):
        assert torch.equal(view, expected)
        clone = view.clone()
        new, *rest = views.step(actions)
        expected, *expected_rest = copies.step(actions)
        # afterwards a view shows the new observation; stacked frames are the caller's own
        assert torch.equal(view, clone if stack > 1 else new)
        kept.append(rest)
        others.append(expected_rest)
        view = new
    assert_same(kept, others)  # all but the observation is the caller's own


@pytest.mark.parametrize(
    "how", [copy.deepcopy, copy.copy, lambda env: pickle.loads(pickle.dumps(env))], ids=["deepcopy", "copy", "pickle"]
)
@pytest.mark.parametrize(("kind", "stack"), [("cells", 1), ("tiny_rgb", 3)])
@both_backends
def test_a_copy_goes_on_alike_and_by_itself(backend, kind, stack, how):
    envs = make_envs("endless", backend, kind, stack)
    assert_same(how(envs).reset(seed=4), envs.reset(seed=4))
    play(envs, random_actions(1, 37, 16))
    twin, other = how(envs), how(envs)
    play(other, random_actions(9, 20, 16))  # must not touch the two
    actions = random_actions(2, 40, 16)
    assert_same(play(twin, actions), play(envs, actions))
    assert_same(twin.get_state(), envs.get_state())
    single = SokobanEnv(size=5, num_boxes=1, backend=backend)
    single.reset(seed=1)
    twin = how(single)
    for action in random_actions(1, 30, 1)[:, 0]:
        assert_same(twin.step(action), single.step(action))


# ----------------------------------------------------------------------------------------------------------- level text


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
"""
XSB_BOARDS = [
    to_board("########", "###   ##", "#@$ . ##", "####   #", "########"),
    to_board("#####", "#+$*#", "#####"),
]
BOXOBAN_ROWS = ["##########"] * 4 + ["##   #####", "##.$  ####", "##  @.$ ##", "##  . $.##", "### $   ##", "##########"]


def test_reading_files_and_folders(tmp_path):
    path = tmp_path / "levels.xsb"
    path.write_text(XSB)
    expected = np.stack([pad(board, 5, 8) for board in XSB_BOARDS])
    levels = load_levels(path)
    assert levels.dtype == torch.uint8 and np.array_equal(levels.numpy(), expected)
    path.write_bytes(XSB.replace("\n", "\r\n").rstrip().encode())  # another system's line ends, none at the end
    assert np.array_equal(load_levels(str(path)).numpy(), expected)
    larger = load_levels(path, size=(7, 12))
    assert np.array_equal(larger.numpy(), [pad(board, 7, 12) for board in XSB_BOARDS])
    board = text_to_cells(XSB.split("a title")[0])
    assert board.dtype == np.uint8 and np.array_equal(board, XSB_BOARDS[0])
    (tmp_path / "very" / "deep").mkdir(parents=True)
    (tmp_path / "very" / "deep" / "000.txt").write_text("\n".join(["; 0", *BOXOBAN_ROWS]))
    (tmp_path / "readme.md").write_text("#### this is no level")
    everything = load_levels(tmp_path)
    assert np.array_equal(everything.numpy(), [*(pad(x, 10, 10) for x in XSB_BOARDS), to_board(*BOXOBAN_ROWS)])


def test_text_round_trips(tmp_path):
    levels = mixed_boards(7, 9, 3)
    for board in levels:
        text = cells_to_text(board)
        assert text == "\n".join("".join(CHARS[cell] for cell in row) for row in board)
        assert np.array_equal(text_to_cells(text), board)
    for given in (levels, torch.from_numpy(levels)):
        save_levels(tmp_path / "levels.txt", given)
        assert np.array_equal(load_levels(tmp_path / "levels.txt").numpy(), levels)
    assert [path.name for path in tmp_path.iterdir()] == ["levels.txt"]
    texts = [cells_to_text(XSB_BOARDS[0]), "#####\n#@$.#\n#####"]  # as levels, padded
    envs = SokobanVectorEnv(2, size=9, levels=texts)
    observation, _ = envs.reset(seed=1, options={"level_indices": [0, 1]})
    assert np.array_equal(observation.numpy(), [pad(text_to_cells(text), 9, 9) for text in texts])


LEVEL_ROWS = ("#####", "#@$.#", "#   #", "#####")
LEVEL = "\n".join(LEVEL_ROWS)
BOARD = to_board(*LEVEL_ROWS)
SLC_ROWS = [f"<L>{row}</L>" for row in LEVEL_ROWS]
SLC = "\n".join(["<Level>", *SLC_ROWS, "</Level><Level>" + "".join(SLC_ROWS), "</Level>"])


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("\ufeff" + LEVEL, 1),  # a byte-order mark
        (f"{LEVEL}\n\n5#\n#@$.#\n#3-#\n5#\n\n{LEVEL}", 3),  # run-length rows between plain ones
        ("5#|#@$.#|#3 #|5#", 1),
        ("2(2#)#\n#@$.#\n#2(-)-#\n1(3(#)2#)", 1),  # groups
        (f"Comment:\n{LEVEL}\n## not a level\nComment-End:\n{LEVEL}\n", 1),
        ("#####\n#pbo#\n#   #\n#####", 1),
        (f"Set: one\nDate: 2001\n\n{LEVEL}\nTitle: a\nAuthor: b\n\n:: another collection\n\n{LEVEL}\nComment: c\n", 2),
        (f"----------\n{LEVEL}\n____\n", 1),  # rules
        (f"{LEVEL}\n-----\n{LEVEL}\n", 2),
        (f"*****\n{LEVEL}\n*****\n{LEVEL}\n.....\n", 2),
        (f"<LevelCollection>{SLC}</LevelCollection>", 2),
    ],
)
def test_level_files_as_the_sokoban_world_writes_them(text, count, tmp_path):
    path = tmp_path / "levels.sok"
    path.write_text(text, encoding="utf-8")
    assert np.array_equal(load_levels(path).numpy(), [BOARD] * count)


def test_an_empty_row_inside_a_level_and_the_letters_on_targets():
    text = "#######\n#  $  #\n#@ . *#\n#######\n-------\n#######"
    assert text_to_cells(text).shape == (6, 7)
    assert np.array_equal(text_to_cells("#####\n#PbB#\n#####"), to_board("#####", "#+$*#", "#####"))


def test_what_is_skipped_is_named(tmp_path):
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
        ("#####\n#@$.#\n#####\n\ntitle\n\n#####\n#@$.#\n#@  #\n#####\n", ":7", "2 players"),
        ("#####\n#@$ #\n#####\n", ":1", "1 boxes and 0 targets"),
        ("#####\n#@$.#\n#####\n\n#####\n#@*.#\n#####\n", ":5", "1 boxes and 2 targets"),
        ("title\n#####\n#@$.#\n#+  é#\n######\n", ":4:5", "unknown character 'é'"),
        ("5#\n2#x2#\n5#", ":2:3", "unknown character 'x'"),
        ("#####\n#@(2$.#\n#####", ":2:3", "unknown character '('"),
        ("#####\n#@$.#\n## ##\n", ":2:2", "'@' is outside the walls"),
        ("   .#####\n    #@$.#\n    #####", ":1:4", "'.' is outside the walls"),
        ("#####\n#@* #\n#####\n", ":1", "solved already"),
        ("#####\n#@  #\n#####\n", ":1", "solved already"),
    ],
)
def test_bad_level_texts(text, place, fault, tmp_path):
    path = tmp_path / "bad.txt"
    path.write_text(text, encoding="utf-8")
    for given in (path, tmp_path):  # the file, or a folder that it lies in
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}{place}: .*{re.escape(fault)}"):
            load_levels(given)
    with pytest.raises(ValueError, match=f"^level{place}: .*{re.escape(fault)}"):
        text_to_cells(text)


def test_bad_level_files(tmp_path):
    (tmp_path / "empty.txt").write_text("; nothing but\n\ncomments\n")
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "folder").mkdir()
    for name in ("empty.txt", "image.txt", "folder"):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name)) + ".*no levels"):
            load_levels(tmp_path / name)
    with pytest.raises(OSError, match="nowhere"):
        load_levels(tmp_path / "nowhere.txt")
    (tmp_path / "large.txt").write_text(XSB)
    with pytest.raises(ValueError, match=r"large\.txt.*level 0 .*5x8.*too large for size 4x9"):
        load_levels(tmp_path / "large.txt", size=(4, 9))
    for text, count in (("", 0), (XSB, 2)):
        with pytest.raises(ValueError, match=f"{count} levels"):
            text_to_cells(text)


def test_the_tool_takes_solutions_of_all_kinds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("levels.txt").write_text("########\n#@  $ .#\n########\n\n" * 4)

    def run(words: str, solutions: str = "") -> str:
        pathlib.Path("solutions.txt").write_text(solutions)
        monkeypatch.setattr(sys, "argv", ["sokoban.py", *words.split()])
        tool.main()
        return capsys.readouterr().out

    assert "4 of 4" in run("check levels.txt solutions.txt", "rrRR\nrrrr\n2r2R\n4r\n")
    for last, message in (("rrrR", "lower case"), ("4x", r"solutions\.txt:4:1: unknown character '4'")):
        with pytest.raises(SystemExit, match=message):
            run("check levels.txt solutions.txt", f"rrRR\nrrrr\n2r2R\n{last}\n")
    run("generate --output made.txt --num-levels 3 --size 6 --num-boxes 1 --solutions s.txt")
    assert "3 of 3" in run("check made.txt s.txt")
    monkeypatch.setitem(sys.modules, "curses", None)
    with pytest.raises(SystemExit, match="windows-curses"):
        run("play")


def test_every_observation_turns_into_every_other():
    assert len({tuple(colour) for colour in TINY_PALETTE}) == 7
    for source, target, lead in itertools.product(KINDS, KINDS, [(), (2, 3), (0,)]):
        cells = np.random.default_rng(5).integers(7, size=(*lead, 4, 6)).astype(np.uint8)
        given, expected = picture(cells, source), picture(cells, target)
        clone = given.copy()
        array = convert_observation(given, source, target)
        tensor = convert_observation(torch.tensor(given), source, target)
        assert_same(array, expected)
        assert_same(tensor, torch.from_numpy(expected))
        array.fill(1)
        assert np.array_equal(given, clone)  # the result is a new array


# ------------------------------------------------------------------------------------------------------------ bad input


NO_PLAYER, OPEN = to_board("#####", "# $.#", "#####"), to_board(*["##########"] * 9, "###@$.####")


@pytest.mark.parametrize(
    ("arguments", "error", "fault"),
    [
        ({"observation": "pixels"}, ValueError, "'pixels'.*cells, tiny_rgb, rgb"),
        ({"render_mode": "pixels"}, ValueError, "'pixels'.*rgb_array.*ansi"),
        ({"backend": "jax"}, ValueError, "'jax'"),
        ({"max_episode_steps": 0}, ValueError, "max_episode_steps is 0"),
        ({"frame_stack": 0}, ValueError, "frame_stack is 0"),
        ({"size": 6.0}, TypeError, "float"),
        ({"size": (10, 4), "num_boxes": 1}, ValueError, "10x4"),
        ({"size": -5}, ValueError, "-5"),
        ({"size": 1000}, ValueError, "1000x1000"),
        ({"num_boxes": 0}, ValueError, "num_boxes=0"),
        ({"size": (5, 64), "num_boxes": 17}, ValueError, "num_boxes=17"),
        ({"levels": []}, ValueError, "no levels"),
        ({"levels": "levels.txt"}, ValueError, "load_levels"),
        ({"levels": np.zeros((1, 12, 9), dtype=np.uint8)}, ValueError, "level 0 .*12x9.*too large for size 10x10"),
        ({"levels": ["#####\n#@$.#\n#####", NO_PLAYER]}, ValueError, "level 1 .*0 players"),
        ({"levels": [OPEN]}, ValueError, "level 0 .*(opening|border)"),
        ({"levels": np.full((1, 3, 3), 9, dtype=np.uint8)}, ValueError, "level 0"),
    ],
)
def test_bad_arguments(arguments, error, fault):
    for make in (functools.partial(SokobanVectorEnv, 2), SokobanEnv):
        with pytest.raises(error, match=fault):
            make(**arguments)


def test_more_bad_arguments():
    with pytest.raises(ValueError, match="num_envs is 0"):
        SokobanVectorEnv(0)
    with pytest.raises(ValueError, match="'pixels'"):
        convert_observation(np.zeros((5, 5), dtype=np.uint8), "cells", "pixels")
    for kind, shape in (("tiny_rgb", (4, 4, 3)), ("rgb", (32, 32, 3))):
        with pytest.raises(ValueError, match=f"{kind}.*pixel"):
            convert_observation(np.full(shape, 7, dtype=np.uint8), kind, "cells")
    with pytest.raises(TypeError, match=r"seed must be an integer, got \[1, 2\]"):
        gym.make_vec("Sokoban-v0", 2, size=6, num_boxes=1).reset(seed=[1, 2])
    with pytest.raises(ValueError, match="10x4"):
        generate_levels(1, size=(10, 4), num_boxes=1)
    with pytest.raises(ValueError, match=r"5x5.*1 boxes.*1000000"):  # there are not so many
        generate_levels(1_000_000, size=5, num_boxes=1)


@both_backends
def test_bad_actions(backend):
    envs = SokobanVectorEnv(3, size=6, num_boxes=1, backend=backend)
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        envs.step([0, 0, 0])
    envs.reset(seed=1)
    before = envs.get_state()
    for actions, fault in (
        ([0, 5, 0], "action 5 of environment 1"),
        ([0, 0, -1], "action -1 of environment 2"),
        ([0, 0], "3 integers"),
        (np.zeros((3, 1), dtype=int), "3 integers"),
        ([0.0, 1.0, 2.0], "3 integers"),
        (np.ones(3, dtype=bool), "3 integers"),
        (2, "3 integers"),
    ):
        with pytest.raises(ValueError, match=fault):
            envs.step(actions)
        assert_same(envs.get_state(), before)  # nothing moved


@both_backends
def test_bad_options_and_states(backend):
    board = to_board("#####", "#@$.#", "#####")
    envs = SokobanVectorEnv(2, size=(3, 5), levels=[board], backend=backend)
    for options, fault in (
        ({"level": board}, "level"),
        ({"levels": [board]}, "1 levels for 2 environments"),
        ({"levels": [board, NO_PLAYER]}, "level 1 .*0 players"),
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
    for shape in ((2, 3, 5), (1, 3, 5), (2, 5, 3)):
        with pytest.raises(ValueError, match="cells"):
            envs.set_state({"cells": torch.zeros(shape, dtype=torch.uint8)})
        assert_same(envs.get_state(), before)


# ------------------------------------------------------------------------------------------------------------ gymnasium


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("kind", "stack", "shape"), [("cells", 1, (6, 9)), ("tiny_rgb", 3, (3, 6, 9, 3)), ("rgb", 1, (48, 72, 3))]
)
def test_spaces_and_check_env_without_a_warning(kind, stack, shape):
    settings = {"size": (6, 9), "num_boxes": 2, "observation": kind, "frame_stack": stack, "render_mode": "rgb_array"}
    env, envs = gym.make("Sokoban-v0", **settings), gym.make_vec("Sokoban-v0", num_envs=3, **settings)
    check_env(env.unwrapped)
    assert env.observation_space == envs.single_observation_space and env.observation_space.shape == shape
    assert env.action_space == envs.single_action_space == gym.spaces.Discrete(5)
    assert envs.reset(seed=1)[0] in envs.observation_space
    assert envs.step(envs.action_space.sample())[0] in envs.observation_space


def assert_equal_vectors(one: Any, other: Any) -> None:
    """Of what two vector environments return; a reward may have another precision."""
    if len(one) == 5:
        one = (one[0], one[1].astype(other[1].dtype), *one[2:])
    assert data_equivalence(one, other)


@both_backends
@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("mode", list(gym.vector.AutoresetMode))
def test_make_vec_equals_gymnasiums_own_vector_of_single_ones(mode, stack, backend):
    """So a single environment is tested, too, which the vector's steps are compared with."""
    boards = [to_board("#######", "#@$ . #", "#######"), to_board("#######", "#@$.  #", "#  $ .#", "#######")]
    for board, limit in itertools.product(boards, (4, 7)):
        settings = {"size": (4, 7), "levels": [board], "frame_stack": stack, "max_episode_steps": limit}
        theirs = gym.make_vec(
            "Sokoban-v0", 16, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}, **settings
        )
        ours = gym.make_vec("Sokoban-v0", 16, autoreset_mode=mode, backend=backend, **settings)
        assert ours.metadata["autoreset_mode"] == mode
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
        assert both or limit == 7  # a level solved in its very last step is both, as TimeLimit has it


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("arguments", "length"), [({}, 120), ({"max_episode_steps": 200}, 200)])
def test_the_time_limit_counts(arguments, length):
    env = gym.make("Sokoban-v0", size=7, num_boxes=1, **arguments)
    limited = gym.wrappers.TimeLimit(SokobanEnv(size=7, num_boxes=1, max_episode_steps=None), length)
    for one in (env, env, limited):
        one.reset(seed=1)
        assert [one.step(0)[2:4] for _ in range(length)] == [(False, False)] * (length - 1) + [(False, True)]
    envs = gym.make_vec("Sokoban-v0", num_envs=2, size=7, num_boxes=1, **arguments)
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
    envs.reset(seed=1)
    ends = [t for t in range(1, 2 * length + 2) if envs.step([0, 0])[3].all()]
    assert ends == [length, 2 * length + 1]  # after the first a step resets


@pytest.mark.parametrize("kind", KINDS)
def test_rendering(kind):
    boards = mixed_boards(6, 7, 3)
    pictures = [*picture(boards[5:8], "rgb")]
    for mode, expected in (("rgb_array", pictures), ("ansi", [*map(cells_to_text, boards[5:8])])):
        settings = {"size": (6, 7), "levels": boards, "observation": kind, "render_mode": mode}
        env, envs = gym.make("Sokoban-v0", **settings).unwrapped, SokobanVectorEnv(3, **settings)
        env.reset(seed=1, options={"level_index": 5})
        envs.reset(seed=1, options={"level_indices": [5, 6, 7]})
        assert_same([*envs.render()], expected)
        assert_same(env.render(), expected[0])


def test_a_window(monkeypatch):
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
    assert np.array_equal(shown[::4, ::4], picture(board, "rgb"))
    copy.deepcopy(env.unwrapped)  # a window can't be copied
    env.close()
    assert pygame.display.get_surface() is None
    env.close()
