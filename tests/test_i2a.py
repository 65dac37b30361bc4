"""I2A: each part against what it must compute, and each defect of the public implementations that the spec lists."""

import contextlib
import csv
import itertools
import os
import pathlib
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import i2a
from i2a import A, Args
from sokoban_env import SokobanVectorEnv, convert_observation, exclude_levels, generate_levels, load_levels, save_levels

ROOT = pathlib.Path(__file__).parent.parent
CPU = torch.device("cpu")
torch.set_num_threads(1)  # as in the processes that tests start: results differ in the last bit otherwise
SMALL = Args(
    size=6, num_boxes=1, cnn_channels=(8,), encoder_channels=(8,), dense=16, lstm=8, model_width=4, imagination_depth=2
)
TINY = [
    "--size", "6", "--num-boxes", "1", "--cnn-channels", "8", "--encoder-channels", "8", "--dense", "16", "--lstm", "8",
    "--model-width", "4", "--imagination-depth", "2", "--num-envs", "8", "--num-steps", "4", "--num-minibatches", "2",
    "--update-epochs", "2", "--model-frames", "640", "--model-steps", "20", "--eval-episodes", "20",
    "--max-episode-steps", "10", "--log-frequency", "64", "--total-timesteps", "896",
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)


def boards(num: int, size: int | tuple[int, int] = 6, num_boxes: int = 2, seed: int = 1) -> torch.Tensor:
    """Boards (num, H, W) in the middle of random play, some with a box on its target."""
    envs = SokobanVectorEnv(num, size=size, num_boxes=num_boxes, max_episode_steps=1000)
    observation, _ = envs.reset(seed=seed)
    rng = np.random.default_rng(seed)
    for _ in range(60):
        observation, *_ = envs.step(rng.integers(A, size=num))
    return observation


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def train(*flags: str) -> pathlib.Path:
    """Run i2a.py in this process; the folder that it wrote to."""
    before = set(pathlib.Path("runs").glob("*"))
    i2a.main(i2a.parse_args([*flags]))
    (folder,) = set(pathlib.Path("runs").glob("*")) - before
    return folder


def rows_of(folder: pathlib.Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: float(x) for name, x in row.items() if x} for row in csv.DictReader(file)]


def assert_equal(one: object, other: object) -> None:
    """`other` holds all that `one` holds, to the last bit."""
    if isinstance(one, dict):
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, torch.Tensor]]:
    """The levels (L, H, W) of each start of episodes, with the number of environments."""
    levels, place = [], SokobanVectorEnv._place

    def watched(self: SokobanVectorEnv, rows: object, chosen: object, number: object) -> None:
        levels.append((self.num_envs, torch.as_tensor(chosen).clone()))
        place(self, rows, chosen, number)

    monkeypatch.setattr(SokobanVectorEnv, "_place", watched)
    return levels


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.ModuleDict]:
    """The networks of each run."""
    networks, make = [], i2a.make_networks
    monkeypatch.setattr(i2a, "make_networks", lambda *a: networks.append(make(*a)) or networks[-1])
    return networks


# ------------------------------------------------------------------------------------------- observations and symmetry


@pytest.mark.parametrize("kind", ["cells", "rgb"])
def test_decoding_an_encoded_frame_is_the_identity(kind: str):
    frames = convert_observation(boards(40), "cells", kind)
    classes = i2a.encode(frames, kind)
    assert classes.shape == frames.shape[:3]
    assert torch.equal(i2a.decode(classes, kind), frames)


def test_planes_say_what_each_cell_is():
    cells = torch.arange(7, dtype=torch.uint8).reshape(1, 1, 1, 7)
    planes = i2a.to_planes(cells, "cells", "board")[0, :, 0]  # (4, 7): wall, target, box, player
    expected = [[1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0, 1], [0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1]]
    assert planes.tolist() == expected
    stack = boards(6).reshape(2, 3, 6, 6)
    for view in ("board", "player"):
        each = [i2a.to_planes(frame[:, None], "cells", view) for frame in stack.unbind(1)]
        assert torch.equal(i2a.to_planes(stack, "cells", view), torch.cat(each, 1))
    rgb = convert_observation(stack, "cells", "rgb")
    assert torch.equal(i2a.to_planes(rgb, "rgb", "board")[:, 3:6], rgb[:, 1].movedim(-1, 1) / 255)


@pytest.mark.parametrize("size", [6, 7, (6, 9), (9, 6)])
def test_the_player_stands_in_the_middle_of_its_view(size: int | tuple[int, int]):
    cells = boards(60, size=size)
    height, width = cells.shape[1:]
    views = i2a.player_view(cells)
    assert views.dtype == torch.uint8 and views.shape == (60, height - 1, width - 1)
    for board, view in zip(cells.tolist(), views.tolist(), strict=True):
        (at,) = [(y, x) for y in range(height) for x in range(width) if board[y][x] >= 5]
        middle = ((height - 1) // 2, (width - 1) // 2)
        assert view[middle[0]][middle[1]] == board[at[0]][at[1]]
        again = [[0] * width for _ in range(height)]  # and back: nothing is lost
        for y, x in itertools.product(range(height - 1), range(width - 1)):
            source = ((at[0] + y - middle[0]) % (height - 1), (at[1] + x - middle[1]) % (width - 1))
            assert view[y][x] == board[source[0]][source[1]]
            again[source[0]][source[1]] = view[y][x]
        assert again == board
    stack = cells.reshape(4, 5, 3, height, width)  # each frame from its own player
    assert torch.equal(i2a.player_view(stack), views.reshape(4, 5, 3, height - 1, width - 1))


def test_which_networks_see_from_the_players_place():
    """A room that lies elsewhere on the board is the same room: for a network that sees the player in the middle."""
    room = boards(8, size=6)
    moved = [torch.zeros(8, 9, 9, dtype=torch.uint8) for _ in range(2)]
    moved[0][:, :6, :6], moved[1][:, 2:8, 3:9] = room, room
    for view in ("player", "board"):
        networks = i2a.make_networks(replace(SMALL, size=9, view=view), CPU)
        encoder, ones = networks["agent"].encoder, torch.ones(8, A, 1)
        outputs = [
            (
                encoder(frames[:, None, None].expand(-1, A, -1, -1, -1), ones, ones),
                networks["rollout_policy"](frames[:, None]),
                networks["agent"].features(frames[:, None]),
            )
            for frames in moved
        ]
        same = [torch.allclose(a, b, atol=1e-6) for a, b in zip(*outputs, strict=True)]
        assert same == [view == "player"] * 3


@pytest.mark.parametrize("which", range(8))
def test_a_symmetry_of_a_transition_is_a_transition(which: int):
    before, action = boards(200, seed=which), torch.arange(200) % A
    simulator = i2a.PerfectModel(SMALL)
    frame, reward, end = simulator.predict(before[:, None], action)
    turned = i2a.turn_boards(before, which)
    again, *outcome = simulator.predict(turned[:, None], i2a.turned_actions(which, CPU)[action])
    assert torch.equal(again, i2a.turn_boards(frame, which))
    assert_equal([reward, end], outcome)


def test_the_eight_symmetries_differ():
    board = torch.arange(9, dtype=torch.uint8).reshape(1, 3, 3)
    assert len({tuple(i2a.turn_boards(board, which).flatten().tolist()) for which in range(8)}) == 8
    assert torch.equal(i2a.turn_boards(board, 0), board)
    assert i2a.turned_actions(0, CPU).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("which", range(8))
def test_rollouts_of_a_turned_board_are_the_turned_rollouts(which: int, monkeypatch: pytest.MonkeyPatch):
    """Under the perfect model, if π̂ does on the turned boards the turned actions."""
    frames = generate_levels(20, size=6, num_boxes=2, seed=1, max_pulls=2)[0][:, None]
    actions = torch.randint(A, (3, 20, A))  # of steps 2 to 4 of rollout b * A + a
    table = i2a.turned_actions(which, CPU)
    turned_actions = torch.empty_like(actions)
    turned_actions[:, :, table] = table[actions]
    networks = {"env_model": i2a.PerfectModel(SMALL), "rollout_policy": i2a.RandomPolicy()}

    def play(frames: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        steps = iter(actions.flatten(1))
        monkeypatch.setattr(i2a, "sample", lambda *_: next(steps))
        return i2a.imagine(networks, frames, 4, seeded())

    straight, turned = play(frames, actions), play(i2a.turn_boards(frames, which), turned_actions)
    assert_equal([*i2a.turn_rollouts(straight, which)], [*turned])
    assert (straight[2] == 0).any() and (straight[1] > 0).any()
    assert i2a.turn_rollouts((), which) == ()


# --------------------------------------------------------------------------------------------------- environment model


def test_the_action_reaches_the_model_as_one_hot_planes():
    model = i2a.EnvModel(SMALL, 4)
    frames, action = boards(30)[:, None], torch.arange(30) % A
    one_hot = F.one_hot(action, A)[..., None, None].expand(-1, -1, 6, 6)
    planes = torch.cat([i2a.to_planes(frames, "cells", "board"), one_hot], 1)
    kernel = torch.zeros(8, 4 + A, 3, 3)  # conv1 on the frame's planes, a 1x1 kernel on the action's
    kernel[:, :4], kernel[:, 4:, 1, 1] = model.conv1.weight, model.action.weight.T
    h = F.relu(F.conv2d(planes, kernel, model.conv1.bias))  # inside the outer wall, which never changes
    h = F.relu(model.conv2(h) + model.inject(h.amax((2, 3)))[:, :, None, None])
    frame = model.frame(h) + 4 * F.one_hot(frames[:, 0, 1:-1, 1:-1].long(), 7).movedim(-1, 1)
    assert torch.allclose(model(frames, action)[0], frame, atol=1e-5)


def test_pool_and_inject_carries_a_far_change_to_every_cell():
    model = i2a.EnvModel(replace(SMALL, size=12), 16)
    near, far = torch.zeros(2, 1, 1, 12, 12, dtype=torch.uint8)
    far[0, 0, 10, 10] = 5
    difference = (model(near, torch.tensor([1]))[0] - model(far, torch.tensor([1]))[0]).abs()
    assert difference.shape[2:] == (10, 10) and (difference[0].amax(0) > 0).all()


def test_the_outer_wall_stays():
    model = i2a.EnvModel(SMALL, 4)
    for parameter in model.parameters():
        parameter.data *= 30  # a model that believes anything of what is inside
    frames = boards(50)
    predicted, _, _ = model.predict(frames[:, None], torch.arange(50) % A)
    border = torch.ones(6, 6, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert not predicted[:, border].any() and not torch.equal(predicted, frames)


def test_the_copy_model_has_i2as_parameters_and_knows_nothing():
    count = {
        name: sum(p.numel() for p in i2a.make_networks(replace(Args(), env_model=name), CPU).parameters())
        for name in ("learned", "copy", "poor")
    }
    assert count["copy"] == count["learned"] > count["poor"]
    frames = boards(20).reshape(10, 2, 6, 6)
    model = i2a.CopyModel(replace(SMALL, frame_stack=2), 16)
    frame, reward, end = model.predict(frames, torch.ones(10, dtype=torch.int64))
    assert torch.equal(frame, frames[:, 1]) and not reward.any() and not end.any()
    assert reward.dtype == torch.float32 and end.dtype == torch.bool


@pytest.mark.parametrize("frame_stack", [1, 3])
def test_collected_transitions_are_the_simulators(frame_stack: int):
    args = replace(SMALL, num_boxes=2, max_episode_steps=9, frame_stack=frame_stack)
    data = i2a.collect_transitions(args, i2a.RandomPolicy(), 2560, 1, CPU, None)
    following, reward, end = i2a.PerfectModel(args).predict(data["frames"], data["action"])
    assert torch.equal(following, data["next"])  # a transition across a reset would differ
    assert torch.allclose(reward, data["reward"]) and torch.equal(end, data["end"])
    assert data["frames"].shape == (2560, frame_stack, 6, 6)
    assert {round(x, 1) for x in reward.tolist()} == {-1.1, -0.1, 0.9, 10.9}
    near = torch.arange(2560) >= 1920  # a quarter begins a few pulls before the end
    assert end[near].float().mean() > 4 * end[~near].float().mean()
    changes = (data["frames"][:, 1:] != data["frames"][:, :-1]).flatten(1).any(1).float().mean()
    assert (changes > 0.3) == (frame_stack > 1)
    assert data["action"].bincount().min() > 400
    again, other = (i2a.collect_transitions(args, i2a.RandomPolicy(), 2560, seed, CPU, None) for seed in (1, 2))
    assert_equal(data, again)
    assert not torch.equal(data["frames"], other["frames"])


def test_the_models_data_come_from_the_levels_and_the_policy_of_the_run():
    def climb(frames: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0, 50, 0, 0, 0]).expand(len(frames), A)

    levels = generate_levels(3, size=6, num_boxes=1, seed=4)[0]
    data = i2a.collect_transitions(replace(SMALL, max_episode_steps=9), climb, 1280, 1, CPU, levels)
    assert (data["action"] == 1).all()
    walls = {board.numpy().tobytes() for board in (levels == 0)}
    assert {board.numpy().tobytes() for board in (data["frames"][:960, 0] == 0)} == walls


def test_pretraining_learns_the_rules(monkeypatch: pytest.MonkeyPatch):
    args = replace(SMALL, model_frames=8000, model_steps=900, model_width=16)
    collect, collected = i2a.collect_transitions, []
    monkeypatch.setattr(
        i2a, "collect_transitions", lambda *a: collected.append((a[3], collect(*a))) or collected[-1][1]
    )
    model, logger = i2a.EnvModel(args, 16), i2a.Logger(args, "pretraining")
    i2a.pretrain_model(model, args, None, seeded(), logger)
    fresh = collect(args, i2a.RandomPolicy(), 2560, 77, CPU, None)
    metrics = i2a.model_metrics(model, fresh)
    assert metrics["model/exact_board_accuracy"] > 0.98 and metrics["model/all_right"] > 0.97
    _, _, end = model.predict(fresh["frames"], fresh["action"])
    assert end[fresh["end"]].float().mean() > 0.9 and not end[~fresh["end"]].float().mean() > 0.01
    (seed, training), (other_seed, held_out) = collected
    assert seed != other_seed  # other levels
    assert len(training["action"]) + len(held_out["action"]) == pytest.approx(8000, abs=64)  # all of them are counted
    assert [row["model/step"] for row in logger.rows] == [500, 900] and logger.rows[-1]["global_step"] == 8000
    assert logger.rows[-1]["model/all_right"] == i2a.model_metrics(model, held_out)["model/all_right"]


def test_pretraining_sees_rare_transitions_most_and_all_under_symmetries(monkeypatch: pytest.MonkeyPatch):
    args, shares, simulator = replace(SMALL, model_frames=2000, model_steps=80), [], i2a.PerfectModel(SMALL)

    def loss(model: i2a.EnvModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        frame, _, end = simulator.predict(batch["frames"], batch["action"])
        assert torch.equal(frame, batch["next"]) and torch.equal(end, batch["end"])
        shares.append(batch["end"].float().mean().item())
        seen.append(batch["frames"])
        return batch["end"].float() + 1e-3 + 0 * model.conv1.bias.sum()

    seen: list[torch.Tensor] = []
    monkeypatch.setattr(i2a, "model_loss", loss)
    monkeypatch.setattr(i2a, "collect_transitions", one_level)
    monkeypatch.setattr(i2a, "model_metrics", lambda *_: {})
    i2a.pretrain_model(i2a.EnvModel(args, 4), args, None, seeded(), i2a.Logger(args, "x"))
    uniform = one_level(args, None, 1800, 1, CPU, None)["end"].float().mean().item()
    assert np.mean(shares[-20:]) > 0.45 > 10 * uniform  # half of a batch, where their loss outweighs all the others'
    walls = {tuple((board == 0).flatten().tolist()) for batch in seen for board in batch[:, 0]}
    assert len(walls) == 8  # one room, in all its symmetries


def one_level(args: Args, policy: object, num: int, seed: int, *_: object) -> dict[str, torch.Tensor]:
    """Transitions from random play in one room that has no symmetry of its own."""
    level = load_levels(save("######\n#    #\n#@$. #\n#  ###\n######\n######"), 6)
    envs = SokobanVectorEnv(50, size=6, levels=level, max_episode_steps=40)
    frames, _ = envs.reset(seed=seed)
    parts, rng = [], np.random.default_rng(seed)
    for _ in range(num // 50):
        action = torch.as_tensor(rng.integers(A, size=50))
        observation, reward, end, _, info = envs.step(action)
        true_next = info.get("final_obs", observation)
        parts.append({"frames": frames[:, None], "next": true_next, "action": action, "reward": reward, "end": end})
        frames = observation
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_the_models_loss_by_hand():
    model, args = i2a.EnvModel(SMALL, 4), SMALL
    data = i2a.collect_transitions(args, i2a.RandomPolicy(), 1280, 1, CPU, None)
    frame, reward, end = model(data["frames"], data["action"])
    target = data["next"][:, None, 1:-1, 1:-1].long()  # the outer wall never changes
    expected = -frame.log_softmax(1).gather(1, target).sum((1, 2, 3))
    value = [[-1.1, -0.1, 0.9, 10.9].index(round(x, 1)) for x in data["reward"].tolist()]
    expected -= reward.log_softmax(1)[torch.arange(1280), value]
    expected -= torch.where(data["end"], end.sigmoid(), 1 - end.sigmoid()).log()
    assert torch.allclose(i2a.model_loss(model, data), expected, atol=1e-4)


def test_model_metrics_by_hand():
    class Wrong(torch.nn.Module):  # right about everything but pushes; and it sees no end
        kind = "cells"

        def predict(self, frames: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, ...]:
            following, reward, _ = i2a.PerfectModel(SMALL).predict(frames, action)
            pushed = (following == 3).flatten(1).ne((frames[:, -1] == 3).flatten(1)).any(1)
            wrong = action == 2  # down: a reward that isn't paid
            return torch.where(pushed[:, None, None], frames[:, -1], following), reward + wrong, torch.zeros_like(wrong)

    rooms = ["#@$. #", "#@$  #", "#.$@ #"], ["#    #", "#   .#", "#    #"]
    text = ["\n".join(["######", top, below, "######"]) for top, below in zip(*rooms, strict=True)]
    frames = load_levels(save(*text), 6).repeat_interleave(A, 0)
    action = torch.arange(A).repeat(3)
    following, reward, end = i2a.PerfectModel(SMALL).predict(frames[:, None], action)
    data = {"frames": frames[:, None], "next": following, "action": action, "reward": reward, "end": end}
    metrics = i2a.model_metrics(Wrong(), data)
    assert set(metrics) == {"model/exact_board_accuracy", "model/all_right"}
    assert metrics["model/exact_board_accuracy"] == pytest.approx(12 / 15)  # three pushes: right, right, left
    assert metrics["model/all_right"] == pytest.approx(9 / 15)  # and three steps down
    assert i2a.model_metrics(i2a.PerfectModel(SMALL), data)["model/all_right"] == 1
    many = {name: x.repeat_interleave(100, 0) for name, x in data.items()}  # more than are predicted at once
    assert i2a.model_metrics(Wrong(), many)["model/all_right"] == pytest.approx(9 / 15)


def test_exact_rollouts_compare_with_the_simulator():
    frames = load_levels(save("######\n#@ $.#\n######", "######\n# @$.#\n######"), 6)[:, None]
    shares = []
    for env_model in ("perfect", "copy"):
        networks = i2a.make_networks(replace(SMALL, env_model=env_model), CPU)
        networks["rollout_policy"].forward = lambda x: torch.tensor([1e6, 0.0, 0, 0, 0]).expand(len(x), A)
        shares.append(i2a.rollout_accuracy(SMALL, networks, frames, 1)["model/exact_rollouts"])
    # the copy model is right where nothing moves: no-op, up, down, and left in the first; the win is two moves away
    assert shares == [1, pytest.approx(7 / 10)]


def save(*texts: str) -> str:
    pathlib.Path("levels.txt").write_text("\n\n".join(texts) + "\n")
    return "levels.txt"


# ---------------------------------------------------------------------------------------------------------- imagination


@pytest.mark.parametrize(("kind", "frame_stack"), [("cells", 1), ("cells", 4), ("rgb", 2)])
def test_perfect_imagination_is_what_the_environment_does(kind: str, frame_stack: int, monkeypatch: pytest.MonkeyPatch):
    """Rollout a of row b: environment b, stepped with a, then with the actions that the rollout policy saw fit."""
    start = boards(7, seed=5)
    frames = convert_observation(start, "cells", kind)[:, None].repeat_interleave(frame_stack, 1)
    actions, seen, drawn = torch.randint(A, (4, 7, A)), [], []
    actions[0] = torch.arange(A)

    def policy(stack: torch.Tensor) -> torch.Tensor:
        seen.append(stack.clone())
        return torch.full((len(stack), A), len(seen))

    def sample(logits: torch.Tensor, rng: object) -> torch.Tensor:
        drawn.append(logits[0, 0].item())
        return actions[len(drawn)].flatten()

    monkeypatch.setattr(i2a, "sample", sample)
    model = i2a.PerfectModel(replace(SMALL, observation=kind))
    imagined, rewards, alive = i2a.imagine({"env_model": model, "rollout_policy": policy}, frames, 4, seeded())
    assert drawn == [1, 2, 3]  # what was drawn is π̂'s
    assert imagined.shape == (7, A, 4, *frames.shape[2:]) and rewards.shape == alive.shape == (7, A, 4)
    for b, a in itertools.product(range(7), range(A)):
        envs = SokobanVectorEnv(1, size=6, num_boxes=2, observation=kind, max_episode_steps=None)
        envs.reset(seed=1)
        envs.set_state({"cells": start[b : b + 1]})
        for d in range(4):
            observation, reward, terminated, _, info = envs.step(actions[d, b, a : a + 1])
            assert torch.equal(imagined[b, a, d], info.get("final_obs", observation)[0])
            assert rewards[b, a, d] == reward and alive[b, a, d] == 1
            if terminated:
                assert not alive[b, a, d + 1 :].any() and not rewards[b, a, d + 1 :].any()
                break
    stack = seen[1].unflatten(
        0, (7, A)
    )  # imagination shifts the stack: the last two steps' frames, after the real ones
    kept = min(2, frame_stack)
    assert torch.equal(stack[:, :, -kept:], imagined[:, :, 2 - kept : 2])
    assert torch.equal(stack[:, :, :-kept], frames[:, None, 2:].expand(-1, A, *[-1] * (frames.ndim - 1)))


def test_imagination_stops_where_the_model_says_so():
    class Ends(i2a.CopyModel):
        def predict(self, frames: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return frames[:, -1], torch.ones(len(action)), action == 2

    networks = {"env_model": Ends(SMALL, 4), "rollout_policy": i2a.RandomPolicy()}
    _, rewards, alive = i2a.imagine(networks, boards(3)[:, None], 3, seeded())
    assert alive[:, 2].tolist() == [[1, 0, 0]] * 3 and alive[:, 1, 1].tolist() == [1] * 3
    assert torch.equal(rewards, alive)
    assert i2a.imagine({"agent": None}, boards(3)[:, None], 3, seeded()) == ()  # a model-free agent has none


@pytest.mark.parametrize("shown", [True, False])
def test_without_reward_prediction_the_encoder_sees_no_rewards_nor_ends(shown: bool):
    encoder = i2a.RolloutEncoder(replace(SMALL, reward_prediction=shown))
    frames, rewards, alive = boards(2 * A * 3).reshape(2, A, 3, 6, 6), torch.zeros(2, A, 3), torch.ones(2, A, 3)
    plain, paid = encoder(frames, rewards, alive), encoder(frames, rewards + 10.9, alive)
    ended = encoder(frames, rewards, torch.tensor([1.0, 0, 0]).expand(2, A, 3))
    assert torch.equal(plain, paid) == torch.equal(plain, ended) == (not shown)


def test_sampled_actions_follow_the_policy():
    logits = torch.tensor([0.0, 1, 2, -1, -3]).expand(200_000, A)
    share = i2a.sample(logits, seeded()).bincount(minlength=A) / 200_000
    assert torch.allclose(share, logits[0].softmax(-1), atol=0.005)


def test_the_rollout_encoder_is_an_lstm_over_the_reversed_rollout():
    encoder = i2a.RolloutEncoder(SMALL)
    frames, rewards = boards(2 * A * 3).reshape(2, A, 3, 6, 6), torch.randn(2, A, 3, requires_grad=True)
    features = [encoder.features(frames[:, :, d].reshape(-1, 1, 6, 6), rewards[:, :, d].flatten()) for d in range(3)]
    lstm = torch.nn.LSTM(4, 8)  # torch's own LSTM with the cell's weights, fed backwards
    lstm.load_state_dict({f"{name}_l0": value for name, value in encoder.lstm.state_dict().items()})
    expected = lstm(torch.stack(features).flip(0))[0][-1].reshape(2, A * 8)
    embedding = encoder(frames, rewards, torch.ones(2, A, 3))
    assert torch.allclose(embedding, expected, atol=1e-6)
    reversed_rollout = encoder(frames.flip(2), rewards.flip(2), torch.ones(2, A, 3))
    assert not torch.allclose(reversed_rollout, embedding, atol=1e-3)
    embedding.square().sum().backward()
    assert (rewards.grad.abs().sum((0, 1)) > 0).all()  # gradient reaches every depth
    ended = encoder(frames, rewards, torch.tensor([1.0, 1, 0]).expand(2, A, 3))  # nothing is read past the imagined end
    assert torch.allclose(ended, encoder(frames[:, :, :2], rewards[:, :, :2], torch.ones(2, A, 2)), atol=1e-6)


def test_the_aggregator_keeps_environments_and_actions_apart():
    networks = i2a.make_networks(SMALL, CPU)
    frames = boards(4)[:, None]
    imagined = i2a.imagine(networks, frames, 2, seeded())
    logits, value = networks["agent"](frames, imagined)
    rewards = imagined[1].clone()
    rewards[2] += 1  # another reward in the rollouts of environment 2 only
    new_logits, new_value = networks["agent"](frames, (imagined[0], rewards, imagined[2]))
    assert (logits != new_logits).any(1).tolist() == (value != new_value).tolist() == [False, False, True, False]
    rewards[0, 1], rewards[0, 3] = imagined[1][0, 3] + 1, imagined[1][0, 1]  # it matters whose rollout it is
    assert not torch.equal(networks["agent"](frames, (imagined[0], rewards, imagined[2]))[0][0], logits[0])


# --------------------------------------------------------------------------------------------------------------- losses


def test_n_step_returns_by_hand():
    rewards = torch.tensor([[1.0, 1, 1], [2, 2, 2], [3, 3, 3]])  # (T, B); γ = .5
    values = torch.tensor([[0.5, 0.5, 0.5], [0.25, 0.25, 0.25], [1.0, 1, 1]])
    next_values = torch.tensor([[0.25, 0.25, 0.25], [1, 8.0, 8], [4, 4, 4.0]])
    terminated = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    truncated = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)
    result = i2a.generalized_advantages(rewards, values, next_values, terminated, terminated | truncated, 0.5, 1.0)
    whole = [1 + 0.5 * 2 + 0.25 * 3 + 0.125 * 4 - 0.5, 2 + 0.5 * 3 + 0.25 * 4 - 0.25, 3 + 0.5 * 4 - 1]
    ended = [1 + 0.5 * 2 - 0.5, 2 - 0.25, 3 + 0.5 * 4 - 1]  # terminated: no bootstrap, and nothing of the next episode
    cut = [1 + 0.5 * 2 + 0.25 * 8 - 0.5, 2 + 0.5 * 8 - 0.25, 3 + 0.5 * 4 - 1]  # truncated: V of its own last frame
    assert torch.allclose(result, torch.tensor([whole, ended, cut]).T)


def test_gae_against_its_definition():
    rewards, values, next_values = (torch.randn(6, 1) for _ in range(3))
    never = torch.zeros(6, 1, dtype=torch.bool)
    result = i2a.generalized_advantages(rewards, values, next_values, never, never, 0.9, 0.8)
    deltas = rewards + 0.9 * next_values - values
    for t in range(6):
        assert result[t, 0] == pytest.approx(sum((0.72**k * deltas[t + k, 0]).item() for k in range(6 - t)), abs=1e-5)


def test_ppo_losses_by_hand():
    ratios, advantages = [0.5, 0.5, 1.0, 1.5, 1.5], [2.0, -2.0, 3.0, 2.0, -2.0]
    logits = torch.randn(5, A, dtype=torch.float64, requires_grad=True)
    values = torch.randn(5, dtype=torch.float64, requires_grad=True)
    actions, returns = torch.arange(5), torch.randn(5, dtype=torch.float64)
    p = logits.detach().softmax(-1)
    old = (p[torch.arange(5), actions] / torch.tensor(ratios, dtype=torch.float64)).log()
    advantage = torch.tensor(advantages, dtype=torch.float64)
    policy_loss, value_loss, entropy, clipfrac = i2a.ppo_losses(logits, values, actions, old, advantage, returns, 0.2)
    # the worse of both: a good action gains up to 1.2, and loses without bound; a bad one the other way round
    assert policy_loss.item() == pytest.approx(-(0.5 * 2 - 0.8 * 2 + 3 + 1.2 * 2 - 1.5 * 2) / 5)
    assert value_loss.item() == pytest.approx(((returns - values) ** 2).mean().item())
    assert entropy.item() == pytest.approx(-(p * p.log()).sum(-1).mean().item())
    assert clipfrac.item() == pytest.approx(4 / 5)
    gradient = torch.autograd.grad(policy_loss, logits, retain_graph=True)[0]
    score = F.one_hot(actions, A) - p  # of log π; a clipped ratio has no gradient
    free = torch.tensor([0.5 * 2, 0, 3, 0, -1.5 * 2], dtype=torch.float64)
    assert torch.allclose(gradient, -score * free[:, None] / 5)
    entropy_gradient = -p * (p.log() + 1 - (p * (p.log() + 1)).sum(-1, keepdim=True))
    assert torch.allclose(torch.autograd.grad(entropy, logits)[0], entropy_gradient / 5)
    assert torch.allclose(torch.autograd.grad(value_loss, values)[0], 2 * (values - returns) / 5)


def test_distillation_is_a_kl_and_its_gradient_lowers_it():
    teacher, student = torch.randn(16, A, requires_grad=True), torch.randn(16, A, requires_grad=True)
    loss = i2a.distillation_loss(teacher, student)
    p, q = teacher.softmax(-1), student.softmax(-1)
    assert loss.item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), abs=1e-6)
    loss.backward()
    assert teacher.grad is None  # π is a constant target
    assert torch.allclose(student.grad, (q - p) / 16, atol=1e-6)  # that of the cross-entropy
    with torch.no_grad():
        assert i2a.distillation_loss(teacher, student - student.grad) < loss
    assert i2a.distillation_loss(teacher, teacher.detach()).item() == pytest.approx(0, abs=1e-6)
    twice = i2a.distillation_loss(torch.cat([teacher] * 2), torch.cat([student] * 2))
    assert twice.item() == pytest.approx(loss.item(), rel=1e-5)  # a mean over the batch, not a sum


# ----------------------------------------------------------------------------------------------------------- the update


def some_rows(networks: torch.nn.ModuleDict, num: int = 16) -> list[torch.Tensor]:
    """What `update` takes: frames, actions, log π_old, advantages, returns, and what was imagined."""
    frames, imagined = boards(num)[:, None], i2a.imagine(networks, boards(num)[:, None], 2, seeded())
    actions = torch.arange(num) % A
    logits, _ = networks["agent"](frames, imagined)
    return [frames, actions, i2a.log_probabilities(logits, actions).detach(), *torch.randn(2, num), *imagined]


def step_of(args: Args, which: int = 0, rows: list[torch.Tensor] | None = None) -> tuple[dict, torch.Tensor]:
    """The gradient by which `update` moves each weight (by plain gradient descent of rate 1), and what it returns."""
    torch.manual_seed(3)
    networks = i2a.make_networks(args, CPU)
    rows = some_rows(networks) if rows is None else rows
    before = {name: p.detach().clone() for name, p in networks.named_parameters()}
    groups = [{"params": list(networks[name].parameters())} for name in ("agent", "rollout_policy")]
    losses = i2a.update(args, networks, torch.optim.SGD(groups, 1.0), rows, which)
    return {name: before[name] - p.detach() for name, p in networks.named_parameters()}, losses


def norm(gradient: dict[str, torch.Tensor], part: str) -> float:
    return torch.cat([x.flatten() for name, x in gradient.items() if name.startswith(part)]).norm().item()


FREE = replace(SMALL, norm_adv=False, symmetry=False, max_grad_norm=1e9)  # nothing but the losses


def test_whose_gradient_goes_where():
    whole, losses = step_of(FREE)
    assert norm(whole, "agent.encoder.lstm") > 1e-3 and norm(whole, "rollout_policy") > 1e-6
    assert norm(whole, "env_model") == 0  # frozen
    assert losses[5].item() == pytest.approx(norm(whole, "agent"), rel=1e-5)  # before it is clipped
    alone, _ = step_of(replace(FREE, distill_coef=0.0))
    assert norm(alone, "rollout_policy") == 0
    assert all(torch.equal(x, whole[name]) for name, x in alone.items() if name.startswith("agent"))
    double, _ = step_of(replace(FREE, distill_coef=2.0))
    assert norm(double, "rollout_policy") == pytest.approx(2 * norm(whole, "rollout_policy"), rel=1e-4)


def test_the_two_gradients_are_clipped_apart():
    whole, _ = step_of(replace(FREE, distill_coef=100.0))
    limit = norm(whole, "rollout_policy") / 2
    assert norm(whole, "agent") > limit
    clipped, losses = step_of(replace(FREE, distill_coef=100.0, max_grad_norm=limit))
    for part in ("agent", "rollout_policy"):
        assert norm(clipped, part) == pytest.approx(limit, rel=1e-3)
    assert losses[5].item() == pytest.approx(norm(whole, "agent"), rel=1e-5)
    between, _ = step_of(replace(FREE, distill_coef=0.0, max_grad_norm=limit))
    assert norm(between, "agent") == pytest.approx(limit, rel=1e-3)


def test_losses_are_weighed_by_the_flags(monkeypatch: pytest.MonkeyPatch):
    leaves = [
        torch.tensor(x, requires_grad=True) for x in (1.0, 2.0, 3.0, 4.0, 5.0)
    ]  # the fourth is the share of clipped rows
    monkeypatch.setattr(i2a, "ppo_losses", lambda *a: (clips.append(a[-1]), leaves[:4])[1])
    monkeypatch.setattr(i2a, "distillation_loss", lambda *_: leaves[4])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(6.0))
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *_: None)
    clips: list[float] = []
    _, losses = step_of(replace(FREE, vf_coef=0.3, ent_coef=0.02, distill_coef=0.6, clip_coef=0.17))
    assert losses.tolist() == [1, 2, 3, 4, 5, 6] and clips == [0.17]
    assert [leaf.grad and leaf.grad.item() for leaf in leaves] == pytest.approx([1, 0.3, -0.02, None, 0.6])


def test_advantages_are_normalised_over_a_minibatch(monkeypatch: pytest.MonkeyPatch):
    losses, seen = i2a.ppo_losses, []
    monkeypatch.setattr(i2a, "ppo_losses", lambda *a: seen.append(a[4]) or losses(*a))
    rows = some_rows(i2a.make_networks(SMALL, CPU))
    rows[3] = torch.arange(16) * 2.0 + 5
    for norm_adv in (True, False):
        step_of(replace(FREE, norm_adv=norm_adv), rows=rows)
    assert torch.allclose(seen[0], (rows[3] - rows[3].mean()) / rows[3].std(), atol=1e-6)
    assert torch.equal(seen[1], rows[3])


@pytest.mark.parametrize("which", [1, 6])
def test_an_update_under_a_symmetry_is_that_of_the_turned_rows(which: int):
    rows = some_rows(i2a.make_networks(replace(SMALL, env_model="perfect"), CPU))
    frames, actions, *others = rows[:5]
    turned = [i2a.turn_boards(frames, which), i2a.turned_actions(which, CPU)[actions], *others]
    gradient, _ = step_of(FREE, which, rows)
    expected, _ = step_of(FREE, 0, [*turned, *i2a.turn_rollouts(rows[5:], which)])
    assert_equal(gradient, expected)
    assert norm(gradient, "agent") != norm(step_of(FREE, 0, rows)[0], "agent")


# ------------------------------------------------------------------------------------------------- the loop, end to end


class Watch:
    """What the environments of the training loop (of 8 rows) were told and did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_envs: int = 8) -> None:
        self.steps, step = [], SokobanVectorEnv.step

        def watched(env: SokobanVectorEnv, actions: torch.Tensor) -> tuple:
            before = env.get_state(pool=False)["cells"] if env.max_episode_steps != float("inf") else None
            result = step(env, actions)
            if before is not None and env.num_envs == num_envs:
                true_next = result[4].get("final_obs", result[0]).clone()
                self.steps.append((before, actions, *result[1:4], true_next))
                self.final.append(result[4].get("final_info"))
            return result

        self.final: list[dict | None] = []
        monkeypatch.setattr(SokobanVectorEnv, "step", watched)

    def last(self, num: int) -> tuple[torch.Tensor, ...]:
        """Boards, actions, rewards, terminated, truncated, true next boards: (num, B, ...) each."""
        return tuple(torch.stack(column) for column in zip(*self.steps[-num:], strict=True))


@pytest.mark.parametrize("agent", ["i2a", "model-free"])
def test_one_epoch_of_one_minibatch_is_a2c(agent: str, made: list, monkeypatch: pytest.MonkeyPatch):
    """Of the whole loop under --preset paper-small, against a plain n-step A2C gradient written here."""
    pairs, ends, watch = [], [], Watch(monkeypatch, 32)

    def agent_on(boards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # at depth 1 under the perfect model the imagination is the same each time
        return made[0]["agent"](boards[:, None], i2a.imagine(made[0], boards[:, None], 1, seeded()))

    def a2c_gradient() -> list[torch.Tensor]:
        boards, actions, rewards, terminated, truncated, following = watch.last(8)
        after, losses = [agent_on(x)[1].detach() for x in following], []
        for t, (logits, values) in enumerate(map(agent_on, boards)):
            for b in range(32):
                n_step, k = 0.1 * rewards[t, b], t
                while k < 7 and not terminated[k, b] and not truncated[k, b]:
                    k += 1
                    n_step = n_step + 0.9 ** (k - t) * 0.1 * rewards[k, b]
                if not terminated[k, b]:
                    n_step = n_step + 0.9 ** (k - t + 1) * after[k][b]
                log_pi = logits[b].log_softmax(-1)
                entropy = -(log_pi.exp() * log_pi).sum()
                policy_loss = -log_pi[actions[t, b]] * (n_step - values[b].detach())
                losses.append(policy_loss + 0.5 * (n_step - values[b]) ** 2 - 0.001 * entropy)
        ends.append((int(terminated.sum()), int(truncated.sum())))
        return torch.autograd.grad(torch.stack(losses).mean(), list(made[0]["agent"].parameters()))

    class Recorder(torch.optim.SGD):
        def step(self) -> None:
            pairs.append(([p.grad.clone() for p in made[0]["agent"].parameters()], a2c_gradient()))

    monkeypatch.setattr(torch.optim, "Adam", lambda groups, *_, **__: Recorder(groups, 1.0))
    save_levels("near.txt", generate_levels(40, size=6, num_boxes=1, seed=3, max_pulls=3)[0])
    flags = ["--preset", "paper-small", "--levels", "near.txt", "--size", "6", "--dense", "16", "--lstm", "8"]
    flags += ["--imagination-depth", "1", "--env-model", "perfect", "--max-episode-steps", "10", "--gamma", "0.9"]
    flags += ["--gae-lambda", "1", "--max-grad-norm", "1e9", "--eval-episodes", "4", "--total-timesteps", "768"]
    train(*flags, "--agent", agent)
    assert len(pairs) == 3 and all(sum(column) > 0 for column in zip(*ends, strict=True))
    for gradients, expected in pairs:
        assert torch.cat([x.flatten() for x in expected]).norm() > 0.01
        for one, other in zip(gradients, expected, strict=True):
            assert (one - other).abs().max() < 1e-6


def test_the_loop_bootstraps_from_the_true_last_frames(made: list, monkeypatch: pytest.MonkeyPatch):
    """V(s_{t+1}) in the advantage: of the next frame, and of its own last one where an episode was truncated."""
    watch, checked, advantages = Watch(monkeypatch), [], i2a.generalized_advantages

    def check(rewards: torch.Tensor, values: torch.Tensor, next_values: torch.Tensor, *rest: object) -> torch.Tensor:
        boards, _, reward, terminated, truncated, following = watch.last(4)
        for x, expected in ((boards, values), (following, next_values)):
            own = torch.stack([made[0]["agent"](frames[:, None], ())[1] for frames in x])
            assert torch.allclose(own[~terminated], expected[~terminated], atol=1e-5)
        assert torch.allclose(rewards, 0.1 * reward)
        assert torch.equal(rest[0], terminated) and torch.equal(rest[1], terminated | truncated)
        assert rest[2:] == (0.9, 0.7)
        checked.append(int(truncated.sum()))
        return advantages(rewards, values, next_values, *rest)

    monkeypatch.setattr(i2a, "generalized_advantages", check)
    train(*TINY, "--agent", "model-free", "--max-episode-steps", "6", "--gamma", "0.9", "--gae-lambda", "0.7")
    assert sum(checked) > 50


def test_the_loop_reads_each_frame_with_its_own_rollouts(monkeypatch: pytest.MonkeyPatch):
    """In acting, in the bootstrap of the next frames and of an episode's own last one, and in each minibatch under each
    symmetry: rollout a begins with what action a does in the frame that stands beside it."""
    forward, seen = i2a.I2AAgent.forward, []

    def watch(self: i2a.I2AAgent, frames: torch.Tensor, imagined: tuple) -> tuple:
        seen.append((frames.clone(), [x.clone() for x in imagined]))
        return forward(self, frames, imagined)

    monkeypatch.setattr(i2a.I2AAgent, "forward", watch)
    train(*TINY, "--env-model", "perfect", "--frame-stack", "2", "--total-timesteps", "960")
    model = i2a.PerfectModel(SMALL)
    for frames, (imagined, rewards, _) in seen:
        actions = torch.arange(A).repeat(len(frames))
        frame, reward, _ = model.predict(frames.repeat_interleave(A, 0), actions)
        assert torch.equal(imagined[:, :, 0].flatten(0, 1), frame)
        assert torch.equal(rewards[:, :, 0].flatten(), reward)
    # acting; two minibatches of 16 in each of two epochs and, as many, the bootstraps; then the evaluation
    assert [len(frames) for frames, _ in seen[:18]] == ([8] * 4 + [16] * 5) * 2


@pytest.mark.parametrize("symmetry", [True, False])
def test_each_epoch_sees_each_row_once(symmetry: bool, monkeypatch: pytest.MonkeyPatch):
    calls, watch, update = [], Watch(monkeypatch), i2a.update
    monkeypatch.setattr(i2a, "update", lambda *a: calls.append((a[3], a[4], a[2].param_groups)) or update(*a))
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *_: None)
    flags = ["--update-epochs", "3", "--num-minibatches", "4", "--total-timesteps", "32", "--no-anneal-lr"]
    train(*TINY, "--agent", "model-free", *flags, *["--no-symmetry"] * (not symmetry))
    boards, actions, *_ = watch.last(4)
    epochs = [[torch.cat(x) for x in zip(*(rows for rows, *_ in calls[i : i + 4]), strict=True)] for i in (0, 4, 8)]
    assert [len(rows[0]) for rows, *_ in calls] == [8] * 12
    for frames, action, _, advantages, _ in epochs:
        keys = [(*b, a) for b, a in zip(frames.flatten(1).tolist(), action.tolist(), strict=True)]
        there = [
            (*b, a) for b, a in zip(boards.flatten(0, 1).flatten(1).tolist(), actions.flatten().tolist(), strict=True)
        ]
        assert sorted(keys) == sorted(there)  # and each action beside its board
        assert torch.equal(advantages.sort()[0], epochs[0][3].sort()[0])
    assert not torch.equal(epochs[0][3], epochs[1][3])  # in another order
    assert len({which for _, which, _ in calls}) > 1 if symmetry else {which for _, which, _ in calls} == {0}


@pytest.mark.parametrize("anneal", [True, False])
def test_the_learning_rate_falls_to_nothing(anneal: bool, monkeypatch: pytest.MonkeyPatch):
    rates, update = [], i2a.update
    monkeypatch.setattr(i2a, "update", lambda *a: rates.append([g["lr"] for g in a[2].param_groups]) or update(*a))
    flags = ["--env-model", "copy", "--update-epochs", "1", "--num-minibatches", "1", "--total-timesteps", "128"]
    folder = train(*TINY, *flags, "--learning-rate", "0.004", *["--no-anneal-lr"] * (not anneal))
    expected = [0.004, 0.003, 0.002, 0.001] if anneal else [0.004] * 4
    assert rates == [pytest.approx([x, x]) for x in expected]
    assert [row.get("charts/learning_rate") for row in rows_of(folder)[:2]] == pytest.approx(expected[1::2])


def test_a_row_holds_the_means_since_the_last(monkeypatch: pytest.MonkeyPatch):
    watch, calls = Watch(monkeypatch), itertools.count()
    monkeypatch.setattr(i2a, "update", lambda *_: next(calls) + torch.arange(6.0))
    rows = rows_of(train(*TINY, "--agent", "model-free", "--total-timesteps", "256", "--log-frequency", "128"))
    assert [row["global_step"] for row in rows] == [128, 256, 256]
    names = ["policy_loss", "value_loss", "entropy", "clipfrac", "distillation", "gradient_norm"]
    for i, row in enumerate(rows[:2]):  # 4 updates of 2 epochs of 2 minibatches
        assert [row[f"losses/{name}"] for name in names] == pytest.approx([16 * i + 7.5 + k for k in range(6)])
        final = [x for x in watch.final[16 * i : 16 * i + 16] if x]
        ended = torch.cat([x["_success"] for x in final])
        for name, values in (
            ("solved", torch.cat([x["success"] for x in final])),
            ("episodic_return", torch.cat([x["episode"]["r"] for x in final])),
            ("episodic_length", torch.cat([x["episode"]["l"] for x in final])),
        ):
            assert row[f"charts/{name}"] == pytest.approx(values[ended].float().mean().item())


def test_finetuning_sees_no_reset(monkeypatch: pytest.MonkeyPatch):
    loss, batches = i2a.model_loss, []
    monkeypatch.setattr(i2a, "model_loss", lambda model, batch: batches.append(batch) or loss(model, batch))
    folder = train(*TINY, "--finetune-model", "--max-episode-steps", "5", "--env-model", "poor")
    fresh = [batch for batch in batches if len(batch["action"]) == 32]
    assert len(fresh) == 8  # one for each update
    model = i2a.PerfectModel(SMALL)
    for batch in fresh:
        frame, reward, end = model.predict(batch["frames"], batch["action"])
        assert torch.equal(frame, batch["next"]) and torch.equal(end, batch["end"])
        assert torch.allclose(reward, batch["reward"])
    assert rows_of(folder)[-2]["losses/model_loss"] > 0


@pytest.mark.parametrize("finetune", [False, True])
def test_a_run_moves_what_it_should(finetune: bool, made: list, monkeypatch: pytest.MonkeyPatch):
    first, pretrain = {}, i2a.pretrain_model

    def watch(*args: object) -> None:
        pretrain(*args)
        first.update({name: value.clone() for name, value in made[0].state_dict().items()})

    monkeypatch.setattr(i2a, "pretrain_model", watch)
    folder = train(*TINY, *["--finetune-model"] * finetune)
    after = made[0].state_dict()
    moved = {name.split(".")[0] for name, value in first.items() if not torch.equal(value, after[name])}
    assert moved == {"agent", "rollout_policy", *["env_model"] * finetune}
    rows = rows_of(folder)
    assert rows[0]["global_step"] == 640  # the model's frames are counted
    metrics = {name for row in rows for name in row}
    assert metrics >= {
        "charts/episodic_return", "charts/episodic_length", "charts/solved", "charts/SPS", "charts/minutes",
        "losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/distillation", "losses/gradient_norm",
        "model/exact_board_accuracy", "model/all_right", "model/exact_rollouts", "eval/solved",
    }  # fmt: skip
    export = torch.load(folder / "agent.pt")
    assert export["global_step"] == 896
    assert_equal(dict(after), export["networks"])


def test_what_is_held_out_is_held_out(drawn: list, monkeypatch: pytest.MonkeyPatch):
    played, evaluate = [], i2a.evaluate
    monkeypatch.setattr(i2a, "evaluate", lambda *a: played.append(a[2]) or evaluate(*a))
    flags = ["--max-episode-steps", "4", "--eval-episodes", "200", "--agent", "model-free", "--seed", "3"]
    train(*TINY, *flags)
    training = torch.cat([chosen for num_envs, chosen in drawn if num_envs == 8])
    assert len(training) > 200 and exclude_levels(training, played[0]).all()
    evaluated = torch.cat([chosen for num_envs, chosen in drawn if num_envs == 200])
    assert torch.equal(evaluated[:200], played[0]) and len(set(map(bytes, played[0].numpy()))) == 200
    train(*TINY, *flags, "--seed", "4", "--exp-name", "other")
    assert torch.equal(played[0], played[1])  # the same for every seed


def test_measuring_and_compiling_change_nothing(monkeypatch: pytest.MonkeyPatch):
    compiler, calls = torch.compile, []  # traces the whole loop as --compile does, but for the compiler itself
    monkeypatch.setattr(torch, "compile", lambda f, **_: calls.append(f) or compiler(f, backend="eager"))
    changes = ["--log-frequency", "32"], ["--log-frequency", "1000"], ["--compile"]
    often, once, traced = (torch.load(train(*TINY, *flags) / "agent.pt")["networks"] for flags in changes)
    assert_equal(often, once)
    assert len(calls) == 3  # agent, model and rollout policy
    for name, value in once.items():
        torch.testing.assert_close(value, traced[name], atol=1e-5, rtol=1e-4)


VARIANTS = [
    ["--agent", "model-free", "--view", "board", "--no-norm-adv"],
    ["--env-model", "perfect", "--rollout-policy", "random", "--no-symmetry", "--capture-video"],
    ["--env-model", "copy", "--bf16", "--lstm", "6"],
    ["--env-model", "poor", "--no-reward-prediction", "--imagination-depth", "1"],
    ["--frame-stack", "4", "--optimizer", "rmsprop", "--finetune-model"],
    ["--preset", "paper-small", "--view", "player"],
    ["--preset", "paper", "--model-steps", "2", "--cnn-channels", "8", "8", "--frame-stack", "2"],
]  # fmt: skip


@pytest.mark.parametrize("flags", VARIANTS, ids=lambda flags: "-".join(flags[:2]).strip("-"))
def test_every_variant_runs(flags: list[str]):
    folder = train(*TINY, "--model-frames", "640", "--total-timesteps", "768", "--eval-episodes", "4", *flags)
    rows = rows_of(folder)
    assert rows[-1]["eval/solved"] >= 0 and all(np.isfinite(x) for row in rows for x in row.values())
    assert (folder / "episodes.gif").exists() == ("--capture-video" in flags)


def test_a_pretrained_policy_acts_in_imagination_and_collects(made: list, monkeypatch: pytest.MonkeyPatch):
    folder, policies, collect = (
        train(*TINY, "--agent", "model-free", "--total-timesteps", "64"),
        [],
        i2a.collect_transitions,
    )
    path = folder / "agent.pt"
    monkeypatch.setattr(i2a, "collect_transitions", lambda *a: policies.append(a[1]) or collect(*a))
    second = train(*TINY, "--rollout-policy", "pretrained", "--pretrained-path", str(path), "--total-timesteps", "704")
    teacher, networks = made
    frames = boards(5)[:, None]
    expected, _ = teacher["agent"](frames, ())
    assert torch.equal(networks["rollout_policy"](frames), expected)  # and it has stayed so
    assert len(policies) == 2 and all(torch.equal(policy(frames), expected) for policy in policies)
    path.unlink()  # the export holds all that it needs
    i2a.main(i2a.parse_args(["--evaluate", str(second / "agent.pt"), "--eval-episodes", "5"]))


def test_a_model_from_another_runs_file_is_not_pretrained(made: list):
    first = train(*TINY, "--total-timesteps", "672") / "agent.pt"
    second = train(*TINY, "--env-model-path", str(first), "--rollout-policy", "random", "--total-timesteps", "64")
    assert_equal(made[0]["env_model"].state_dict(), made[1]["env_model"].state_dict())
    assert rows_of(second)[0]["global_step"] == 64


def test_everything_stays_on_its_device(monkeypatch: pytest.MonkeyPatch):
    """On the meta device an operation that mixes devices, or waits for a value, raises."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which knows no such device
    args, device = replace(SMALL, frame_stack=2), torch.device("meta")
    networks = i2a.make_networks(args, device)
    frames = torch.zeros(8, 2, 6, 6, dtype=torch.uint8, device=device)
    imagined = i2a.imagine(networks, frames, 3, None)
    logits, values = networks["agent"](frames, imagined)
    action = i2a.sample(logits, None)
    flags, reward = torch.zeros(1, 8, dtype=torch.bool, device=device), torch.zeros(1, 8, device=device)
    advantages = i2a.generalized_advantages(reward, values[None], values[None], flags, flags, 0.9, 1.0)
    losses = i2a.ppo_losses(logits, values, action, values, advantages[0], values, 0.2)
    (losses[0] + losses[1] - losses[2]).backward()
    turned = [i2a.turn_boards(frames, 5), i2a.turned_actions(5, device)[action], *i2a.turn_rollouts(imagined, 5)]
    assert all(x.device == device for x in (*turned, *(p.grad for p in networks["agent"].parameters())))
    batch = {"frames": frames, "next": frames[:, 0], "action": action, "reward": reward[0], "end": flags[0]}
    assert i2a.model_loss(networks["env_model"].requires_grad_(), batch).device == device


def test_the_presets():
    args = i2a.parse_args(["--preset", "paper", "--num-envs", "64"])
    assert (args.size, args.num_boxes, args.observation, args.imagination_depth) == (10, 4, "rgb", 5)
    assert (args.cnn_channels, args.dense, args.lstm, args.optimizer) == ((32, 64, 64), 512, 512, "rmsprop")
    assert args.num_envs == 64 and args.ent_coef == 0.01 and args.gae_lambda == 1
    small = i2a.parse_args(["--preset", "paper-small", "--gae-lambda", "1"])
    for preset in (args, small):  # A2C on the board as it lies
        assert (preset.update_epochs, preset.num_minibatches, preset.norm_adv, preset.symmetry) == (1, 1, False, False)
        assert preset.view == "board" and preset.gae_lambda == 1
    assert i2a.parse_args([]) == Args() and Args().view == "player" and Args().symmetry
    networks = i2a.make_networks(args, CPU)
    frames = convert_observation(boards(2, size=10, num_boxes=4), "cells", "rgb")[:, None]
    imagined = i2a.imagine(networks, frames, 5, seeded())
    assert imagined[0].shape == (2, A, 5, 80, 80, 3)
    assert networks["agent"].actor.in_features == 512 + 2560  # c_ia = 5 x 512
    assert networks["agent"](frames, imagined)[0].shape == (2, A)
    convolutions = [m for m in networks["agent"].features.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(m.kernel_size[0], m.stride[0], m.out_channels) for m in convolutions] == [
        (8, 4, 32),
        (4, 2, 64),
        (3, 1, 64),
    ]


# ----------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize(("greedy", "lead"), [(False, 1000.0), (True, 0.1)])
def test_evaluation_plays_each_level_once(greedy: bool, lead: float):
    rooms = ["######\n#@$ .#\n######", "######\n#@ $.#\n######", "######\n#@. $#\n######"]  # in 2, 2 and no steps right
    levels = load_levels(save(*rooms), 6)
    args = replace(SMALL, max_episode_steps=7, greedy=greedy)
    networks = i2a.make_networks(args, CPU)
    networks["agent"].forward = lambda frames, imagined: (
        torch.tensor([0, 0, 0, 0, lead]).expand(len(frames), A),
        torch.zeros(len(frames)),
    )
    metrics, film = i2a.evaluate(args, networks, levels, CPU)
    assert metrics["eval/solved"] == pytest.approx(2 / 3) and metrics["eval/mean_steps"] == 2
    assert metrics["eval/imagined_steps_per_solved"] == A * 2 * (2 + 2 + 7) / 2
    assert len(film) == 8 and torch.equal(film[0], levels)
    assert (
        not (film[2:, :2] == 3).any() and (film[2:, :2] == 4).flatten(2).sum(2).eq(1).all()
    )  # solved games stand still
    wall = torch.stack([levels[2]] * 2)
    assert i2a.evaluate(args, networks, wall, CPU)[0] == {"eval/solved": 0}
    many = levels.repeat(400, 1, 1)  # more than are played at once
    assert i2a.evaluate(args, networks, many, CPU)[0]["eval/solved"] == pytest.approx(2 / 3)


def test_evaluation_of_an_export(capsys: pytest.CaptureFixture):
    folder = train(*TINY, "--env-model", "perfect", "--rollout-policy", "random", "--total-timesteps", "64")
    solved = rows_of(folder)[-1]["eval/solved"]
    path = folder / "agent.pt"
    capsys.readouterr()
    i2a.main(i2a.parse_args(["--evaluate", str(path)]))  # the same levels again
    text = capsys.readouterr().out
    assert text.startswith(f"{path}, trained on 64 frames: ") and f'"eval/solved": {solved}' in text
    save_levels("held_out.txt", generate_levels(6, size=6, num_boxes=2, seed=9)[0])
    i2a.main(i2a.parse_args(["--evaluate", str(path), "--eval-levels", "held_out.txt", "--capture-video", "--greedy"]))
    assert path.with_suffix(".gif").read_bytes()[:3] == b"GIF"
    assert len(list(pathlib.Path("runs").iterdir())) == 1  # no run of its own


def test_learning_raises_the_solve_rate():
    flags = [
        "--num-envs",
        "32",
        "--num-steps",
        "30",
        "--num-minibatches",
        "4",
        "--update-epochs",
        "4",
        "--dense",
        "128",
    ]
    flags += ["--max-episode-steps", "30", "--learning-rate", "3e-3", "--log-frequency", "8000", "--cnn-channels"]
    flags += ["16", "16", "--agent", "model-free", "--total-timesteps", "32000", "--eval-episodes", "300"]
    rows = rows_of(train(*TINY, *flags))
    assert rows[-1]["eval/solved"] > rows[0]["charts/solved"] + 0.25
    assert rows[-2]["losses/entropy"] < rows[0]["losses/entropy"] - 0.2


# ------------------------------------------------------------------------------------------------- checkpoints and runs


@pytest.mark.parametrize(
    ("flags", "when"),
    [
        (["--frame-stack", "2"], "update"),
        (["--finetune-model"], "update"),
        (["--env-model", "copy", "--optimizer", "rmsprop", "--no-anneal-lr"], "save_checkpoint"),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(flags: list[str], when: str, monkeypatch: pytest.MonkeyPatch):
    whole = train(*TINY, *flags)
    original, calls = getattr(i2a, when), itertools.count(1)
    deadly = 2 * 4 * 3 + 2 if when == "update" else 3  # in the fourth update, or after a row and before its checkpoint

    def die(*args: object) -> object:
        if next(calls) == deadly:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(i2a, when, die)
        i2a.main(i2a.parse_args([*TINY, *flags, "--exp-name", "killed"]))
    (killed,) = pathlib.Path("runs").glob("*killed*")
    assert not (killed / "agent.pt").exists()
    i2a.main(i2a.parse_args(["--resume", str(killed / "checkpoint.pt")]))
    one, other = (torch.load(folder / "checkpoint.pt") for folder in (whole, killed))
    same = ("networks", "optimizer", "model_optimizer", "global_step", "processes")
    assert_equal({name: one[name] for name in same}, other)
    rows = [
        [
            {name: x for name, x in row.items() if name not in ("charts/SPS", "charts/minutes")}
            for row in rows_of(folder)
        ]
        for folder in (whole, killed)
    ]
    assert rows[0] == rows[1]
    minutes = [row["charts/minutes"] for row in rows_of(killed) if "charts/minutes" in row]
    assert minutes == sorted(minutes) and all(x == y for x, y in zip(other["rows"], other["rows"], strict=True))
    i2a.main(i2a.parse_args(["--evaluate", str(killed / "agent.pt")]))  # knows of no resuming
    assert torch.load(killed / "agent.pt")["args"]["resume"] is None


@pytest.mark.parametrize("anneal", [["--anneal-lr"], ["--no-anneal-lr"]])
def test_flags_beside_resume_win(anneal: list[str], drawn: list, monkeypatch: pytest.MonkeyPatch):
    flags = ["--agent", "model-free", "--num-boxes", "1", "--total-timesteps", "320", *anneal]
    path, rates, update = train(*TINY, *flags) / "checkpoint.pt", [], i2a.update
    assert torch.load(path)["processes"][0]["env"]["pool"]["boards"].eq(3).flatten(1).sum(1).max() == 1
    drawn.clear()
    monkeypatch.setattr(i2a, "update", lambda *a: rates.append(a[2].param_groups[0]["lr"]) or update(*a))
    changes = ["--num-boxes", "2", "--learning-rate", "1e-4", "--total-timesteps", "640"]
    i2a.main(i2a.parse_args(["--resume", str(path), *changes]))
    assert rates[0] == pytest.approx(0.5e-4 if anneal == ["--anneal-lr"] else 1e-4)
    after = [chosen for num, chosen in drawn if num == 8 and len(chosen) < 8]  # what followed on finished episodes
    assert len(after) > 10 and all((chosen.eq(3) | chosen.eq(4)).flatten(1).sum(1).eq(2).all() for chosen in after)
    assert torch.load(path)["global_step"] == 640 and torch.load(path)["args"]["num_boxes"] == 2


def test_ctrl_c_ends_in_one_line():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "i2a.py"), *TINY, "--agent", "model-free", "--total-timesteps", "1000000"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()  # the first row
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in message
    assert message.strip().startswith("stopped; ") and "--resume runs/" in message


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


def one_of_two(rank: int, folder: str, port: str, rows: list[torch.Tensor]) -> None:
    """A whole run, as torchrun starts it; then one update on every other row."""
    os.chdir(folder)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    networks, make = [], i2a.make_networks
    i2a.make_networks = lambda *a: networks.append(make(*a)) or networks[-1]
    i2a.main(i2a.parse_args(TINY))
    i2a.make_networks = make
    torch.save(networks[0].state_dict(), f"weights{rank}.pt")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    gradient, _ = step_of(replace(FREE, max_grad_norm=0.05), rows=[x[rank::2] for x in rows])
    torch.save(gradient, f"gradient{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_one_agent(tmp_path: pathlib.Path):
    rows = some_rows(i2a.make_networks(SMALL, CPU))
    whole, _ = step_of(replace(FREE, max_grad_norm=0.05), rows=rows)
    mp.spawn(one_of_two, (str(tmp_path), free_port(), rows), nprocs=2)
    for rank in range(2):  # the mean of the gradients is the whole batch's; it is what is clipped
        for name, gradient in torch.load(f"gradient{rank}.pt").items():
            assert torch.allclose(gradient, whole[name], atol=1e-6)
    (folder,) = pathlib.Path("runs").iterdir()
    state = torch.load(folder / "checkpoint.pt")
    assert len(state["processes"]) == 2
    assert not torch.equal(state["processes"][0]["env"]["cells"], state["processes"][1]["env"]["cells"])
    assert not torch.equal(state["processes"][0]["rng"], state["processes"][1]["rng"])
    assert state["global_step"] == 640 + 4 * 64  # 2 x 8 environments x 4 steps an update
    assert_equal(torch.load("weights0.pt"), torch.load("weights1.pt"))
    assert_equal(torch.load("weights0.pt"), state["networks"])
    assert "in 1 processes" in refused("--resume", str(folder / "checkpoint.pt"), "--total-timesteps", "2000")


# ------------------------------------------------------------------------------------------------------------ bad input


def refused(*flags: str) -> str:
    """The one line that a run with these flags ends with."""
    with pytest.raises(SystemExit) as error:
        i2a.main(i2a.parse_args(list(flags)))
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    return error.value.code


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval-levels", "nowhere.txt"], "can't read nowhere.txt: No such file"),
        (["--levels", "nowhere.txt"], "can't read nowhere.txt: No such file"),
        (["--resume", "nowhere.pt"], "can't read the checkpoint nowhere.pt"),
        (["--evaluate", "nowhere.pt"], "can't read the checkpoint nowhere.pt"),
        (["--rollout-policy", "pretrained"], "--pretrained-path"),
        (["--finetune-model", "--env-model", "perfect"], "--finetune-model needs"),
        (["--finetune-model", "--env-model", "copy"], "--finetune-model needs"),
        (["--finetune-model", "--agent", "model-free"], "--finetune-model needs"),
        (["--num-boxes", "9"], "num_boxes=9"),
        (["--num-steps", "11"], "--num-steps must be at most --max-episode-steps"),
        (["--observation", "rgb"], "--view board"),
        (["--observation", "rgb", "--view", "board"], "--no-symmetry"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--seed", "1000000"], "--seed must be from 0"),
    ],
    ids=lambda x: "-".join(x).replace("--", "") if isinstance(x, list) else "",
)
def test_bad_flags(flags: list[str], message: str):
    assert message in refused(*TINY, *flags)
    assert not pathlib.Path("runs").exists()


def test_what_a_levels_file_brings():
    save_levels("large.txt", generate_levels(2, size=9, num_boxes=1)[0])
    assert "large.txt: level 0 is 9x9, too large for size 6x6" in refused(*TINY, "--levels", "large.txt")
    save_levels("two.txt", generate_levels(2, size=6, num_boxes=2)[0])
    args = i2a.parse_args([*TINY, "--levels", "two.txt", "--num-boxes", "1"])
    assert args.num_boxes == 2 and i2a.held_out_levels(args).eq(3).flatten(1).sum(1).min() == 2


def test_bad_checkpoints():
    folder = train(*TINY, "--agent", "model-free", "--total-timesteps", "64")
    good = folder / "checkpoint.pt"
    state = torch.load(good)
    pathlib.Path("damaged.pt").write_bytes(good.read_bytes()[:5000])
    torch.save({"args": {"learning_rate": 1, "no_such_flag": 2}}, "script.pt")
    for name in ("damaged.pt", "script.pt"):
        for flag in ("--resume", "--evaluate"):
            assert name in refused(flag, name)
    export = str(good.with_name("agent.pt"))
    assert export in refused("--resume", export)  # weights only
    for flags in (
        ["--evaluate", "--dense", "17"],
        ["--resume", "--size", "7"],
        ["--resume", "--lstm", "9", "--agent", "i2a"],
    ):
        assert f"{good} was made with other parts or sizes" in refused(flags[0], str(good), *flags[1:])
    assert "other parts or sizes" in refused(*TINY, "--env-model-path", str(good))  # it has no model
    del state["networks"]["agent.actor.weight"]
    torch.save(state, "hollow.pt")
    assert "hollow.pt was made with other parts" in refused("--evaluate", "hollow.pt")


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(monkeypatch: pytest.MonkeyPatch):
    losses, calls = i2a.ppo_losses, itertools.count(1)

    def breaking(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        policy_loss, *others = losses(*args)
        if next(calls) == 13:  # of the fourth update; every loss is finite, and the weights are lost all the same
            policy_loss.register_hook(lambda gradient: gradient * float("nan"))
        return policy_loss, *others

    monkeypatch.setattr(i2a, "ppo_losses", breaking)
    message = refused(*TINY, "--agent", "model-free")
    assert " is nan at step 128: " in message
    (folder,) = pathlib.Path("runs").iterdir()
    state = torch.load(folder / "checkpoint.pt")
    assert state["global_step"] == 64 and all(value.isfinite().all() for value in state["networks"].values())
