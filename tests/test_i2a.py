"""I2A: each part against what it must compute, and each defect of the public implementations that the spec lists."""

import csv
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import i2a
from i2a import A, Args
from sokoban_env import (
    SokobanVectorEnv,
    convert_observation,
    exclude_levels,
    generate_levels,
    load_levels,
    save_levels,
)

ROOT = pathlib.Path(__file__).parent.parent
CPU = torch.device("cpu")
torch.set_num_threads(1)  # as in the processes that tests start: results differ in the last bit otherwise
KINDS = ["cells", "tiny_rgb", "rgb"]
SMALL = {
    "size": 5,
    "cnn_channels": (8,),
    "encoder_channels": (8,),
    "dense": 16,
    "lstm": 8,
    "model_width": 4,
    "num_envs": 8,
    "num_steps": 4,
}
TINY = [
    "--size", "5", "--cnn-channels", "8", "--encoder-channels", "8", "--dense", "16", "--lstm", "8",
    "--model-width", "4", "--num-envs", "8", "--num-steps", "4", "--model-frames", "1000", "--model-steps", "40",
    "--eval-episodes", "20", "--log-frequency", "200", "--max-episode-steps", "20", "--total-timesteps", "2000",
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)


def boards(num: int, size: int = 6, num_boxes: int = 2, seed: int = 1) -> torch.Tensor:
    """Boards (num, H, W) in the middle of random play, some with a box on its target."""
    envs = SokobanVectorEnv(num, size=size, num_boxes=num_boxes, max_episode_steps=1000)
    observation, _ = envs.reset(seed=seed)
    rng = np.random.default_rng(seed)
    for _ in range(60):
        observation, *_ = envs.step(rng.integers(A, size=num))
    return observation


def exp_noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.empty(shape).exponential_(generator=torch.Generator().manual_seed(seed))


def rows_of(path: pathlib.Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def only_run() -> pathlib.Path:
    (folder,) = pathlib.Path("runs").iterdir()
    return folder


# ------------------------------------------------------------------------------------------ observations and the model


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_an_encoded_frame_is_the_identity(kind: str):
    frames = convert_observation(boards(40), "cells", kind)
    classes = i2a.encode(frames, kind)
    assert classes.shape == frames.shape[:3]
    assert torch.equal(i2a.decode(classes, kind), frames)


def test_planes_say_what_each_cell_is():
    cells = torch.arange(7, dtype=torch.uint8).reshape(1, 1, 1, 7)
    planes = i2a.to_planes(cells, "cells")[0, :, 0]  # (4, 7): wall, target, box, player
    expected = [[1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0, 1], [0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1]]
    assert planes.tolist() == expected
    rgb = convert_observation(boards(3), "cells", "tiny_rgb")[:, None]
    assert torch.allclose(i2a.to_planes(rgb, "tiny_rgb"), rgb[:, 0].movedim(-1, 1) / 255)


def test_the_action_reaches_the_model_as_one_hot_planes():
    model = i2a.EnvModel("cells", 1, 4)
    frames, action = boards(30)[:, None], torch.arange(30) % A
    planes = torch.cat([i2a.to_planes(frames, "cells"), F.one_hot(action, A)[..., None, None].expand(-1, -1, 6, 6)], 1)
    kernel = torch.zeros(8, 4 + A, 3, 3)  # conv1 on the frame's planes, a 1x1 kernel on the action's
    kernel[:, :4], kernel[:, 4:, 1, 1] = model.conv1.weight, model.action.weight.T
    h = F.relu(F.conv2d(planes, kernel, model.conv1.bias, padding=1))
    h = F.relu(model.conv2(h) + model.inject(h.amax((2, 3)))[:, :, None, None])
    frame = model.frame(h) + 4 * F.one_hot(frames[:, 0].long(), 7).movedim(-1, 1)
    assert torch.allclose(model(frames, action)[0], frame, atol=1e-5)


def test_pool_and_inject_carries_a_far_change_to_every_cell():
    model = i2a.EnvModel("cells", 1, 16)
    near, far = torch.zeros(2, 1, 1, 12, 12, dtype=torch.uint8)
    far[0, 0, 11, 11] = 5
    difference = (model(near, torch.tensor([1]))[0] - model(far, torch.tensor([1]))[0]).abs()
    assert difference[0, :, 0, 0].max() > 0


@pytest.mark.parametrize("which", range(8))
def test_a_symmetry_of_a_transition_is_a_transition(which: int):
    before, action = boards(200, seed=which), torch.arange(200) % A
    simulator = i2a.PerfectModel("cells", 6)
    following, reward, end = simulator.predict(before[:, None], action)
    turned = i2a.symmetry({"frames": before[:, None], "next": following, "action": action}, which)
    again, same_reward, same_end = simulator.predict(turned["frames"], turned["action"])
    assert torch.equal(again, turned["next"])
    assert torch.equal(reward, same_reward)
    assert torch.equal(end, same_end)


def test_the_eight_symmetries_differ():
    board = torch.arange(9, dtype=torch.uint8).reshape(1, 1, 3, 3)
    batch = {"frames": board, "next": board[:, 0], "action": torch.tensor([1])}
    assert len({tuple(i2a.symmetry(batch, which)["frames"].flatten().tolist()) for which in range(8)}) == 8


def test_boards_near_rewards_lie_on_solutions_shortly_before_an_arrival():
    levels, solutions = generate_levels(50, size=7, num_boxes=2, seed=3)
    starts = i2a.near_rewards(levels, solutions, np.random.default_rng(0))
    rewards_ahead = []
    for i, solution in enumerate(solutions):
        envs = SokobanVectorEnv(1, size=7, levels=levels[i : i + 1])
        boards, rewards = [envs.reset(options={"levels": levels[i : i + 1]})[0][0]], []
        for move in solution.lower():
            board, reward, *_ = envs.step(torch.tensor(["udlr".index(move) + 1]))
            boards.append(board[0])
            rewards.append(round(reward.item(), 1))
        visits = [t for t, board in enumerate(boards[:-1]) if torch.equal(board, starts[i])]
        rewards_ahead.append(max(max(rewards[t : t + 8]) for t in visits))
    assert rewards_ahead[1::2] == [10.9] * 25  # every other one ends there
    assert 0.9 in rewards_ahead[::2]
    assert min(rewards_ahead) > 0


@pytest.mark.parametrize("frame_stack", [1, 3])
def test_collected_transitions_are_the_simulators(frame_stack: int):
    args = Args(size=6, num_boxes=2, max_episode_steps=9, frame_stack=frame_stack)
    data = i2a.collect_transitions(args, None, 2000, 1, CPU)
    following, reward, end = i2a.PerfectModel("cells", 6).predict(data["frames"], data["action"])
    assert torch.equal(following, data["next"])  # a transition across a reset would differ
    assert torch.allclose(reward, data["reward"])
    assert torch.equal(end, data["end"])
    assert end.sum() > 5 and (reward > 10).sum() > 5 and ((reward - 0.9).abs() < 0.01).any()
    assert data["frames"].shape == (len(reward), frame_stack, 6, 6)
    changes = (data["frames"][:, 1:] != data["frames"][:, :-1]).flatten(1).any(1).float().mean()
    assert (changes > 0.3) == (frame_stack > 1)


def test_data_of_a_trained_policy_differs_from_random_data():
    def climb(frames: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0, 50, 0, 0, 0]).expand(len(frames), A)

    assert (i2a.collect_transitions(Args(size=6), climb, 1000, 1, CPU)["action"] == 1).all()
    assert i2a.collect_transitions(Args(size=6), None, 1000, 1, CPU)["action"].bincount().min() > 150


def test_the_models_data_come_from_the_levels_of_the_run():
    levels = generate_levels(3, size=6, num_boxes=1, seed=4)[0]
    data = i2a.collect_transitions(Args(size=6, max_episode_steps=9), None, 1000, 1, CPU, levels)
    walls = {board.numpy().tobytes() for board in (levels == 0)}
    fresh = data["frames"][: round(0.75 * 1000 / 64) * 64, 0]
    assert {board.numpy().tobytes() for board in (fresh == 0)} == walls


@pytest.mark.parametrize("kind", ["cells", "tiny_rgb"])
def test_pretraining_learns_the_rules(kind: str):
    args = Args(size=5, num_boxes=1, observation=kind, model_frames=4000, model_steps=800)
    model, rng = i2a.EnvModel(kind, 1, 16), torch.Generator().manual_seed(1)
    with torch.no_grad():
        data = i2a.collect_transitions(args, None, 3600, 1, CPU)
        test = i2a.collect_transitions(args, None, 2000, 2, CPU)
        before = i2a.model_loss(model, {k: v[:500] for k, v in data.items()}).mean()
    i2a.pretrain_model(model, data, test, args, rng, i2a.Logger(args, "pretraining"), [])
    metrics = i2a.model_metrics(model, test)
    assert i2a.model_loss(model, {k: v[:500] for k, v in test.items()}).mean() < before / 20
    assert metrics["model/exact_board_accuracy"] > 0.97
    assert metrics["model/exact_board_accuracy_pushes"] > 0.8
    assert metrics["model/termination_recall"] > 0.9


def test_model_metrics_by_hand():
    class Wrong(torch.nn.Module):  # right about everything but pushes, which it believes to be blocked
        kind = "cells"

        def predict(self, frames: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, ...]:
            following, reward, end = i2a.PerfectModel("cells", 5).predict(frames, action)
            pushed = (following == 3).flatten(1).ne((frames[:, -1] == 3).flatten(1)).any(1)
            return torch.where(pushed[:, None, None], frames[:, -1], following), torch.where(pushed, -0.1, reward), end

    levels = [
        "#####\n#@$.#\n#   #\n#   #\n#####",
        "#####\n#@$ #\n#  .#\n#   #\n#####",
        "#####\n#.$@#\n#   #\n#   #\n#####",
    ]
    frames = SokobanVectorEnv(3, size=5, levels=levels).reset(options={"levels": levels})[0].repeat_interleave(A, 0)
    action = torch.arange(A).repeat(3)
    following, reward, end = i2a.PerfectModel("cells", 5).predict(frames[:, None], action)
    data = {"frames": frames[:, None], "next": following, "action": action, "reward": reward, "end": end}
    metrics = i2a.model_metrics(Wrong(), data, "_here")
    assert metrics["model/exact_board_accuracy_here"] == pytest.approx(12 / 15)  # three pushes: right, right, left
    assert metrics["model/exact_board_accuracy_pushes_here"] == 0
    assert "model/exact_board_accuracy_blocked_pushes_here" not in metrics  # there are none
    assert metrics["model/termination_recall_here"] == 1
    assert metrics["model/reward_recall_+10.9_here"] == 0
    assert metrics["model/reward_recall_-0.1_here"] == 1


def test_the_copy_model_has_i2as_parameters_and_knows_nothing():
    count = {
        name: sum(p.numel() for p in i2a.make_networks(Args(env_model=name), CPU).parameters())
        for name in ("learned", "copy", "poor")
    }
    assert count["copy"] == count["learned"] > count["poor"]
    frames = boards(10)[:, None]
    frame, reward, end = i2a.CopyModel("cells", 1, 16).predict(frames, torch.ones(10, dtype=torch.int64))
    assert torch.equal(frame, frames[:, 0]) and not reward.any() and not end.any()


# ---------------------------------------------------------------------------------------------------------- imagination


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frame_stack", [1, 4])
def test_perfect_imagination_is_what_the_environment_does(kind: str, frame_stack: int):
    """Row b * A + a: environment b, stepped with a, then with the actions that the rollout policy saw fit."""
    start = convert_observation(boards(7, seed=5), "cells", kind)
    frames = start[:, None].repeat_interleave(frame_stack, 1)
    seen = []

    def policy(stack: torch.Tensor) -> torch.Tensor:
        seen.append(stack.clone())
        return torch.zeros(len(stack), A)

    noise = exp_noise(4, 7 * A, A)
    imagined, rewards, alive = i2a.imagine(i2a.PerfectModel(kind, 6), policy, frames, noise)
    actions = [torch.arange(A).repeat(7), *(n.argmin(1) for n in noise[:-1])]  # a uniform policy: argmax of 1 / noise
    for b in range(7):
        for a in range(A):
            row = b * A + a
            envs = SokobanVectorEnv(1, size=6, levels=["#####\n#@$.#\n#####"], observation=kind, max_episode_steps=None)
            envs.reset(seed=1)
            envs.set_state({"cells": convert_observation(start[b : b + 1], kind, "cells")})
            assert actions[0][row] == a
            for d in range(4):
                observation, reward, terminated, _, info = envs.step([int(actions[d][row])])
                observation = info["final_obs"] if terminated else observation
                assert torch.equal(imagined[d, row], observation[0])
                assert rewards[d, row] == reward and alive[d, row] == 1
                if terminated:
                    assert not alive[d + 1 :, row].any() and not rewards[d + 1 :, row].any()
                    break
    if frame_stack > 1:  # imagination shifts the stack: the last two steps' frames, after the real ones
        assert torch.equal(seen[1][:, -2:], imagined[:2].transpose(0, 1))
        assert torch.equal(seen[1][:, :2], frames.repeat_interleave(A, 0)[:, 2:])


def test_imagination_stops_where_the_model_says_so():
    class Ends(i2a.CopyModel):
        def predict(self, frames: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return frames[:, -1], torch.ones(len(action)), action == 2

    _, rewards, alive = i2a.imagine(Ends("cells", 1, 4), None, boards(3)[:, None], exp_noise(3, 3 * A, A))
    assert alive[:, 2].tolist() == [1, 0, 0]
    assert torch.equal(rewards, alive)


@pytest.mark.parametrize("shown", [True, False])
def test_without_reward_prediction_the_encoder_sees_no_rewards(shown: bool):
    args = Args(**SMALL, env_model="perfect", reward_prediction=shown)
    networks = i2a.make_networks(args, CPU)
    dream = i2a.imagination(args, networks, torch.Generator().manual_seed(1))
    _, rewards, _ = dream(boards(4, size=5, num_boxes=1)[:, None])
    assert bool(rewards.any()) == shown


def test_sampled_actions_follow_the_policy():
    logits = torch.tensor([0.0, 1, 2, -1, -3]).expand(200_000, A)
    share = i2a.sample(logits, exp_noise(200_000, A)).bincount(minlength=A) / 200_000
    assert torch.allclose(share, logits[0].softmax(-1), atol=0.005)


def test_the_rollout_encoder_is_an_lstm_over_the_reversed_rollout():
    encoder = i2a.RolloutEncoder("cells", (8, 8), 8, 6)
    frames, rewards = torch.stack([boards(10, seed=s) for s in range(3)]), exp_noise(3, 10)
    x = torch.cat([i2a.cell_planes(frames), rewards[..., None, None, None].expand(-1, -1, 1, 6, 6)], 2)
    features = torch.stack([F.relu(encoder.project(encoder.trunk(step))) for step in x])
    lstm = torch.nn.LSTM(4, 8)  # torch's own LSTM with the cell's weights, fed backwards
    lstm.load_state_dict({f"{name}_l0": value for name, value in encoder.lstm.state_dict().items()})
    expected = lstm(features.flip(0))[0][-1]
    embedding = encoder(frames, rewards, torch.ones(3, 10))
    assert torch.allclose(embedding, expected, atol=1e-6)
    assert not torch.allclose(encoder(frames.flip(0), rewards.flip(0), torch.ones(3, 10)), embedding, atol=1e-3)


def test_nothing_past_the_imagined_end_reaches_the_embedding():
    encoder, frames, rewards = i2a.RolloutEncoder("cells", (8,), 8, 6), torch.stack([boards(6)] * 4), exp_noise(4, 6)
    alive = torch.tensor([1.0, 1, 0, 0])[:, None].expand(4, 6)
    short = encoder(frames[:2], rewards[:2], torch.ones(2, 6))
    assert torch.allclose(encoder(frames, rewards, alive), short, atol=1e-6)


def test_the_encoder_gets_gradient_from_every_depth():
    encoder, rewards = i2a.RolloutEncoder("cells", (8,), 8, 6), exp_noise(4, 6).requires_grad_()
    encoder(torch.stack([boards(6, seed=s) for s in range(4)]), rewards, torch.ones(4, 6)).square().sum().backward()
    assert (rewards.grad.abs().sum(1) > 0).all()


def test_the_aggregator_keeps_environments_apart():
    args = Args(**SMALL)
    networks = i2a.make_networks(args, CPU)
    frames = boards(4, size=5, num_boxes=1)[:, None]
    imagined = i2a.imagination(args, networks, torch.Generator().manual_seed(1))(frames)
    logits, value = networks["agent"](frames, imagined)
    changed = tuple(x.clone() for x in imagined)
    changed[1][:, 2 * A : 3 * A] += 1  # another reward in the rollouts of environment 2 only
    new_logits, new_value = networks["agent"](frames, changed)
    assert ((logits != new_logits).any(1) == torch.tensor([False, False, True, False])).all()
    assert ((value != new_value) == torch.tensor([False, False, True, False])).all()
    order = imagined[1].clone()
    order[:, 1], order[:, 3] = imagined[1][:, 3] + 1, imagined[1][:, 1]  # it matters which action a rollout belongs to
    assert not torch.equal(networks["agent"](frames, (imagined[0], order, imagined[2]))[0][0], logits[0])


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


def test_actor_critic_losses_and_their_gradients():
    logits = torch.randn(3, 2, A, dtype=torch.float64, requires_grad=True)
    values = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    actions, advantages = torch.arange(6).reshape(3, 2) % A, torch.randn(3, 2, dtype=torch.float64)
    returns = advantages + values.detach()
    policy_loss, value_loss, entropy = i2a.actor_critic_losses(logits, values, actions, advantages)
    p = logits.detach().softmax(-1)
    by_hand = np.mean(
        [-p[t, b, actions[t, b]].log().item() * advantages[t, b].item() for t in range(3) for b in range(2)]
    )
    assert policy_loss.item() == pytest.approx(by_hand)
    assert value_loss.item() == pytest.approx(((returns - values) ** 2).mean().item())
    assert entropy.item() == pytest.approx(-(p * p.log()).sum(-1).mean().item())
    gradient = torch.autograd.grad(policy_loss - 0.1 * entropy + value_loss, (logits, values))
    score = F.one_hot(actions, A) - p
    entropy_gradient = -p * (p.log() + 1 - (p * (p.log() + 1)).sum(-1, keepdim=True))
    assert torch.allclose(gradient[0], (-score * advantages[..., None] - 0.1 * entropy_gradient) / 6)
    assert torch.allclose(gradient[1], 2 * (values - returns) / 6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_distillation_is_a_kl_and_its_gradient_lowers_it(direction: str):
    teacher, student = torch.randn(16, A, requires_grad=True), torch.randn(16, A, requires_grad=True)
    loss = i2a.distillation_loss(teacher, student, direction)
    p, q = teacher.softmax(-1), student.softmax(-1)
    p, q = (p, q) if direction == "forward" else (q, p)
    assert loss.item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), abs=1e-6)
    loss.backward()
    assert teacher.grad is None  # π is a constant target
    with torch.no_grad():
        assert i2a.distillation_loss(teacher, student - student.grad, direction) < loss
    assert i2a.distillation_loss(teacher, teacher.detach(), direction).item() == pytest.approx(0, abs=1e-6)
    twice = i2a.distillation_loss(torch.cat([teacher] * 2), torch.cat([student] * 2), direction)
    assert twice.item() == pytest.approx(loss.item(), rel=1e-5)  # a mean over the batch, not a sum


def test_whose_gradient_goes_where():
    args = Args(**SMALL)
    networks = i2a.make_networks(args, CPU)
    frames = boards(8, size=5, num_boxes=1)[:, None]
    imagined = i2a.imagination(args, networks, torch.Generator().manual_seed(1))(frames)
    logits, value = networks["agent"](frames, imagined)
    (logits.square().sum() + value.sum()).backward()
    touched = {name for name, p in networks.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.split(".")[0] for name in touched} == {"agent"}
    assert any(name.startswith("agent.encoder.lstm") for name in touched)
    networks.zero_grad()
    i2a.distillation_loss(
        networks["agent"](frames, imagined)[0], networks["rollout_policy"](frames), "forward"
    ).backward()
    touched = {name.split(".")[0] for name, p in networks.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"rollout_policy"}


def two_process_gradient(rank: int, path: str, batch: dict[str, torch.Tensor]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    network = update_gradient({name: value[rank::2] for name, value in batch.items()})
    i2a.average_gradients(list(network.parameters()))
    if rank == 0:
        torch.save([p.grad for p in network.parameters()], path + ".pt")
    dist.destroy_process_group()


def update_gradient(batch: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The gradient of one update of agent and rollout policy, from a rollout (B environments, one step)."""
    torch.manual_seed(3)
    args = Args(**SMALL)
    networks = i2a.make_networks(args, CPU)
    frames = batch["frames"]
    noise = batch["noise"].flatten(0, 1)[None]
    imagined = i2a.imagine(networks["env_model"], None, frames, noise)
    logits, values = networks["agent"](frames, imagined)
    losses = i2a.actor_critic_losses(logits, values, batch["action"], batch["advantage"])
    distill = i2a.distillation_loss(logits, networks["rollout_policy"](frames), "forward")
    (losses[0] + 0.5 * losses[1] - 0.01 * losses[2] + distill).backward()
    return torch.nn.ModuleList([networks["agent"], networks["rollout_policy"]])


def test_two_processes_average_to_the_whole_gradient(tmp_path: pathlib.Path):
    batch = {
        "frames": boards(16, size=5, num_boxes=1)[:, None],
        "noise": exp_noise(16, A, A),
        "action": torch.arange(16) % A,
        "advantage": torch.randn(16),
    }
    whole = [p.grad for p in update_gradient(batch).parameters()]
    mp.spawn(two_process_gradient, (str(tmp_path / "store"), batch), nprocs=2)
    for one, both in zip(whole, torch.load(tmp_path / "store.pt"), strict=True):
        assert (one - both).norm() <= 1e-6 * max(1e-3, one.norm())


# ------------------------------------------------------------------------------------------------- the loop, end to end


def test_the_loop_bootstraps_from_the_true_last_frames(monkeypatch: pytest.MonkeyPatch):
    """V(s_{t+1}) in the advantage: of the next frame, and of its own last one where an episode was truncated."""
    networks, transitions, checked = [], [], []
    make, step, advantages = i2a.make_networks, SokobanVectorEnv.step, i2a.generalized_advantages

    def watch_step(self: SokobanVectorEnv, actions: torch.Tensor) -> tuple:
        result = step(self, actions)
        following = result[0].clone()
        if "final_obs" in result[4]:
            following[result[4]["_final_obs"]] = result[4]["final_obs"]
        transitions.append((following, *result[1:4]))
        return result

    def check(rewards: torch.Tensor, values: torch.Tensor, next_values: torch.Tensor, *rest: object) -> torch.Tensor:
        following, reward, terminated, truncated = map(torch.stack, zip(*transitions[-4:], strict=True))
        expected = torch.stack([networks[-1]["agent"](frames[:, None], None)[1] for frames in following])
        assert torch.allclose(next_values[~terminated], expected[~terminated], atol=1e-5)
        assert torch.allclose(rewards, 0.1 * reward)
        assert torch.equal(rest[0], terminated) and torch.equal(rest[1], terminated | truncated)
        checked.append(int(truncated.sum()))
        return advantages(rewards, values, next_values, *rest)

    monkeypatch.setattr(i2a, "make_networks", lambda *a: networks.append(make(*a)) or networks[-1])
    monkeypatch.setattr(SokobanVectorEnv, "step", watch_step)
    monkeypatch.setattr(i2a, "generalized_advantages", check)
    i2a.main(i2a.parse_args([*TINY, "--agent", "model-free", "--max-episode-steps", "6", "--total-timesteps", "640"]))
    assert sum(checked) > 50


def test_the_loop_reads_each_frame_with_its_own_rollouts(monkeypatch: pytest.MonkeyPatch):
    """In acting, in the bootstrap of the next frames, and in that of an episode's own last one: row b * A + a of what
    the agent reads begins with action a in the frame that it reads beside it."""
    forward, seen = i2a.I2AAgent.forward, []

    def watch(self: i2a.I2AAgent, frames: torch.Tensor, imagined: tuple) -> tuple:
        seen.append((frames.clone(), imagined[0][0].clone()))
        return forward(self, frames, imagined)

    monkeypatch.setattr(i2a.I2AAgent, "forward", watch)
    flags = ["--env-model", "perfect", "--max-episode-steps", "6", "--total-timesteps", "640"]
    i2a.main(i2a.parse_args([*TINY, *flags]))
    model = i2a.PerfectModel("cells", 5)
    for frames, first in seen:
        expected, _, _ = model.predict(frames.repeat_interleave(A, 0), torch.arange(A).repeat(len(frames)))
        assert torch.equal(first, expected)
    sizes = {len(frames) for frames, _ in seen}
    assert len(sizes & {*range(1, 8)}) > 2  # truncated ones among them


@pytest.mark.parametrize("agent", ["i2a", "model-free"])
def test_the_update_weighs_its_losses_by_the_flags(agent: str, monkeypatch: pytest.MonkeyPatch):
    leaves = [torch.ones((), requires_grad=True) for _ in range(4)]
    advantages, clip, seen, clipped = i2a.generalized_advantages, torch.nn.utils.clip_grad_norm_, [], []
    monkeypatch.setattr(i2a, "actor_critic_losses", lambda *_: leaves[:3])
    monkeypatch.setattr(i2a, "distillation_loss", lambda *_: leaves[3])
    monkeypatch.setattr(i2a, "generalized_advantages", lambda *a: seen.append(a[5:]) or advantages(*a))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: clipped.append(a[1]) or clip(*a))
    flags = ["--gamma", "0.9", "--gae-lambda", "0.7", "--vf-coef", "0.3", "--ent-coef", "0.02", "--distill-coef", "0.6"]
    flags += ["--env-model", "perfect", "--max-grad-norm", "0.123", "--total-timesteps", "32"]
    i2a.main(i2a.parse_args([*TINY, *flags, "--agent", agent]))
    policy, value, entropy, distillation = (leaf.grad for leaf in leaves)
    assert (policy, value, entropy) == (1, pytest.approx(0.3), pytest.approx(-0.02))
    assert distillation == (pytest.approx(0.6) if agent == "i2a" else None)
    assert seen == [(0.9, 0.7)]
    assert clipped == [0.123] * (1 + (agent == "i2a"))


def test_the_rollout_policy_acts_in_imagination():
    args = Args(**SMALL, env_model="perfect")
    networks = i2a.make_networks(args, CPU)
    networks["rollout_policy"].forward = lambda frames: torch.tensor([0.0, 0, 0, 0, 1e6]).expand(len(frames), A)
    frames = boards(6, size=5, num_boxes=1)[:, None]
    imagined, _, alive = i2a.imagination(args, networks, torch.Generator().manual_seed(1))(frames)
    model = networks["env_model"]
    for d in (1, 2):
        expected = model.predict(imagined[d - 1][:, None], torch.full((6 * A,), 4))[0]
        assert torch.equal(imagined[d][alive[d] > 0], expected[alive[d] > 0])


def test_depth_metrics_compare_with_the_simulator():
    frames = boards(20, size=5, num_boxes=1)[:, None]
    shares = {}
    for kind in ("perfect", "copy"):
        args = Args(**SMALL, env_model=kind)
        metrics = i2a.depth_metrics(args, i2a.make_networks(args, CPU), frames, 1)
        shares[kind] = [metrics[f"model/exact_board_accuracy_depth_{d}"] for d in (1, 2, 3)]
    assert shares["perfect"] == [1, 1, 1]
    copied = (i2a.PerfectModel("cells", 5).predict(frames.repeat_interleave(A, 0), torch.arange(A).repeat(20))[0]
              == frames[:, 0].repeat_interleave(A, 0)).flatten(1).all(1).float().mean()  # fmt: skip
    assert 1 > shares["copy"][0] == pytest.approx(float(copied)) and shares["copy"][2] < shares["copy"][0]


def test_finetuning_sees_no_reset(monkeypatch: pytest.MonkeyPatch):
    loss, batches = i2a.model_loss, []
    monkeypatch.setattr(i2a, "model_loss", lambda model, batch: batches.append(batch) or loss(model, batch))
    i2a.main(i2a.parse_args([*TINY, "--finetune-model", "--max-episode-steps", "5", "--env-model", "poor"]))
    fresh = [batch for batch in batches if len(batch["action"]) == 32]
    assert len(fresh) > 20
    model = i2a.PerfectModel("cells", 5)
    for batch in fresh:
        following, reward, end = model.predict(batch["frames"], batch["action"])
        assert torch.equal(following, batch["next"]) and torch.equal(end, batch["end"])
        assert torch.allclose(reward, batch["reward"])


def test_what_is_held_out_is_held_out(monkeypatch: pytest.MonkeyPatch):
    collect, make, seeds, drawn = i2a.collect_transitions, i2a.SokobanVectorEnv, [], []

    class Watched(make):
        def _place(self, rows: object, chosen: object, number: object) -> None:
            drawn.append((self, torch.as_tensor(chosen).clone()))
            super()._place(rows, chosen, number)

    monkeypatch.setattr(i2a, "collect_transitions", lambda *a: seeds.append(a[3]) or collect(*a))
    monkeypatch.setattr(i2a, "SokobanVectorEnv", Watched)
    args = i2a.parse_args([*TINY, "--max-episode-steps", "2", "--eval-episodes", "300", "--seed", "3"])
    i2a.main(args)
    assert len(seeds) == len(set(seeds)) == 2  # the model's training and its judging
    levels = i2a.held_out_levels(args)
    training = torch.cat([chosen for env, chosen in drawn if env.num_envs == 8])
    assert len(training) > 400 and exclude_levels(training, levels).all()
    played = torch.cat([chosen for env, chosen in drawn if env.num_envs == 300])
    assert torch.equal(played[:300], levels)


def test_measuring_changes_nothing():
    for log_frequency in ("100", "1000"):
        i2a.main(i2a.parse_args([*TINY, "--log-frequency", log_frequency, "--exp-name", f"every{log_frequency}"]))
    one, other = (torch.load(next(pathlib.Path("runs").glob(f"*every{n}__*/agent.pt"))) for n in (100, 1000))
    assert all(torch.equal(value, other["networks"][name]) for name, value in one["networks"].items())


@pytest.mark.parametrize("finetune", [False, True])
def test_a_run_moves_what_it_should(finetune: bool, monkeypatch: pytest.MonkeyPatch):
    networks, first = [], []
    make, pretrain = i2a.make_networks, i2a.pretrain_model

    def watch(*args: object) -> None:
        pretrain(*args)
        first.append({name: value.clone() for name, value in networks[0].state_dict().items()})

    monkeypatch.setattr(i2a, "make_networks", lambda *a: networks.append(make(*a)) or networks[-1])
    monkeypatch.setattr(i2a, "pretrain_model", watch)
    i2a.main(i2a.parse_args([*TINY, *["--finetune-model"] * finetune]))
    after = networks[0].state_dict()
    moved = {name.split(".")[0] for name, value in first[0].items() if not torch.equal(value, after[name])}
    assert moved == {"agent", "rollout_policy", *["env_model"] * finetune}
    rows = rows_of(only_run() / "metrics.csv")
    assert int(rows[0]["global_step"]) == 1000  # the model's frames are counted
    assert float(rows[-1]["eval/solved_low"]) <= float(rows[-1]["eval/solved"]) <= float(rows[-1]["eval/solved_high"])
    metrics = {name for row in rows for name, value in row.items() if value}
    assert metrics >= {
        "charts/episodic_return", "charts/episodic_length", "charts/solved", "charts/SPS", "losses/policy_loss",
        "charts/imagined_steps_per_second", "losses/value_loss", "losses/entropy", "losses/distillation",
        "model/exact_board_accuracy", "model/exact_board_accuracy_own_states", "model/exact_board_accuracy_depth_3",
        "model/reward_recall_-0.1", "model/termination_recall",
    }  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        ["--agent", "model-free"],
        ["--env-model", "perfect", "--rollout-policy", "random"],
        ["--env-model", "copy", "--kl-direction", "reverse"],
        ["--env-model", "poor", "--no-reward-prediction", "--width-multiplier", "2"],
        ["--frame-stack", "4", "--optimizer", "rmsprop"],
        ["--observation", "tiny_rgb", "--bf16"],
        ["--observation", "rgb", "--cnn-channels", "8", "8", "--imagination-depth", "1"],
    ],
    ids=lambda flags: "-".join(flags).replace("--", ""),
)
def test_every_variant_runs(flags: list[str]):
    i2a.main(i2a.parse_args([*TINY, "--total-timesteps", "1600", *flags]))
    assert float(rows_of(only_run() / "metrics.csv")[-1]["eval/solved"]) >= 0


def test_a_pretrained_policy_acts_in_imagination_and_collects():
    i2a.main(i2a.parse_args([*TINY, "--agent", "model-free", "--total-timesteps", "400"]))
    path = str(only_run() / "agent.pt")
    pretrained = ["--rollout-policy", "pretrained", "--model-data", "pretrained", "--pretrained-path", path]
    args = i2a.parse_args([*TINY, *pretrained, "--exp-name", "second"])
    i2a.main(args)
    (run,) = pathlib.Path("runs").glob("*second*")
    networks = i2a.make_networks(args, CPU)
    i2a.load_networks(networks, torch.load(run / "agent.pt"), "agent.pt")
    agent = i2a.I2AAgent(dataclasses.replace(args, agent="model-free"))
    i2a.load_networks(agent, torch.load(path), path, "agent.")
    frames = boards(5, size=5, num_boxes=1)[:, None]
    assert torch.equal(networks["rollout_policy"](frames), agent(frames, None)[0])
    pathlib.Path(path).unlink()  # the export holds all that it needs
    i2a.main(i2a.parse_args(["--evaluate", str(run / "agent.pt"), "--eval-episodes", "5"]))


@pytest.mark.skipif(sys.platform == "win32", reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_computes_the_same():
    args = Args(**SMALL)
    networks = i2a.make_networks(args, CPU)
    frames = boards(8, size=5, num_boxes=1)[:, None]
    noise = exp_noise(2, 8 * A, A)
    imagined = i2a.imagine(networks["env_model"], networks["rollout_policy"], frames, noise)
    compiled = torch.compile(i2a.imagine)(networks["env_model"], networks["rollout_policy"], frames, noise)
    assert all(torch.equal(a, b) for a, b in zip(imagined, compiled, strict=True))
    logits, value = networks["agent"](frames, imagined)
    again = torch.compile(networks["agent"])(frames, imagined)
    assert torch.allclose(logits, again[0], atol=1e-5) and torch.allclose(value, again[1], atol=1e-5)


def test_a_compiled_run_is_the_same_run(monkeypatch: pytest.MonkeyPatch):
    """The whole loop, traced as --compile traces it, without the compiler. A traced Adam rounds its step otherwise."""
    given, compiler = [], torch.compile

    def compile_eagerly(function: object) -> object:
        given.append(getattr(function, "__qualname__", type(function).__name__))
        return compiler(function, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    for name, flags in (("plain", []), ("traced", ["--compile"])):
        i2a.main(i2a.parse_args([*TINY, *flags, "--exp-name", name]))
    plain, traced = (torch.load(next(pathlib.Path("runs").glob(f"*__{n}__*/agent.pt"))) for n in ("plain", "traced"))
    for name, value in plain["networks"].items():
        torch.testing.assert_close(value, traced["networks"][name], atol=1e-5, rtol=1e-4)
    parts = ["I2AAgent", "imagination.<locals>.dream", "RolloutPolicy", "generalized_advantages", "actor_critic_losses"]
    assert given[:-1] == parts and "Adam.step" in given[-1]


def test_everything_stays_on_its_device():
    """On the meta device an operation that mixes devices, or waits for a value, raises."""
    args, device = Args(**SMALL, frame_stack=2), torch.device("meta")
    networks = i2a.make_networks(args, device)
    frames = torch.zeros(8, 2, 5, 5, dtype=torch.uint8, device=device)
    noise = torch.zeros(3, 8 * A, A, device=device)
    imagined = i2a.imagine(networks["env_model"], networks["rollout_policy"], frames, noise)
    logits, values = networks["agent"](frames, imagined)
    action = i2a.sample(logits, noise[0, :8])
    flags = torch.zeros(1, 8, dtype=torch.bool, device=device)
    reward = torch.zeros(1, 8, device=device)
    advantages = i2a.generalized_advantages(reward, values[None], values[None], flags, flags, 0.9, 1.0)
    losses = i2a.actor_critic_losses(logits[None], values[None], action[None], advantages)
    (losses[0] + losses[1] - losses[2]).backward()
    batch = {"frames": frames, "next": frames[:, 0], "action": action, "reward": reward[0], "end": flags[0]}
    networks["env_model"].requires_grad_()
    assert i2a.model_loss(networks["env_model"], batch).device == device
    assert all(p.grad.device == device for p in networks["agent"].parameters())


def test_the_papers_preset():
    args = i2a.parse_args(["--preset", "paper", "--num-envs", "64"])
    assert (args.size, args.num_boxes, args.observation, args.imagination_depth) == (10, 4, "rgb", 5)
    assert (args.cnn_channels, args.dense, args.lstm, args.optimizer) == ((32, 64, 64), 512, 512, "rmsprop")
    assert args.num_envs == 64 and args.ent_coef == 0.01 and args.gae_lambda == 1
    assert i2a.parse_args([]).gae_lambda == 0.95 and i2a.parse_args(["--gae-lambda", "1"]).gae_lambda == 1
    networks = i2a.make_networks(args, CPU)
    frames = convert_observation(boards(2, size=10, num_boxes=4), "cells", "rgb")[:, None]
    imagined = i2a.imagination(args, networks, torch.Generator())(frames)
    assert imagined[0].shape == (5, 2 * A, 80, 80, 3)
    assert networks["agent"].actor.in_features == 512 + 2560  # c_ia = 5 x 512
    assert networks["agent"](frames, imagined)[0].shape == (2, A)
    assert [type(m).__name__ for m in networks["agent"].trunk] == ["Conv2d", "ReLU"] * 3 + ["Flatten"]
    convolutions = [(m.kernel_size[0], m.stride[0]) for m in networks["agent"].trunk if hasattr(m, "stride")]
    assert convolutions == [(8, 4), (4, 2), (3, 1)]


@pytest.mark.parametrize("moves", [0, 1])
def test_evaluation_plays_each_level_once(moves: int, monkeypatch: pytest.MonkeyPatch):
    level, wall = "#####\n#@$ .\n#####".replace(".", ".#").replace("#####", "######"), "######\n#@ $.#\n######"
    levels = load_levels(save(level, level, wall), 6)
    args = Args(**(SMALL | {"size": 6}), agent="model-free", max_episode_steps=7)
    networks = i2a.make_networks(args, CPU)
    networks["agent"].forward = lambda frames, imagined: (
        torch.tensor([0.0, 0, 0, 0, 200 * moves]).expand(len(frames), A) + torch.tensor([100.0, 0, 0, 0, 0]),
        torch.zeros(len(frames)),
    )
    metrics, film = i2a.evaluate(args, networks, levels, CPU)
    assert metrics["eval/solved"] == moves
    assert metrics.get("eval/mean_steps") == (2 if moves else None)
    if moves:
        assert metrics["eval/solved_low"] == pytest.approx(3 / (3 + 1.96**2))  # Wilson's interval at p = 1
        assert len(film) == 3 and not (film[-1] == 3).any()  # every box is on its target in the last picture
    else:
        assert len(film) == 8 and torch.equal(film[-1], levels)


def save(*texts: str) -> str:
    pathlib.Path("levels.txt").write_text("\n\n".join(texts) + "\n")
    return "levels.txt"


def test_learning_raises_the_solve_rate():
    i2a.main(i2a.parse_args(LEARNING))
    rows = rows_of(only_run() / "metrics.csv")
    solved = [float(row["charts/solved"]) for row in rows if row.get("charts/solved")]
    assert np.mean(solved[-2:]) > np.mean(solved[:2]) + 0.15
    assert float(rows[-1]["eval/solved"]) > np.mean(solved[:2]) + 0.15


LEARNING = [
    "--size", "5", "--total-timesteps", "45000", "--model-frames", "4000", "--model-steps", "800", "--log-frequency",
    "4000", "--imagination-depth", "2", "--max-episode-steps", "20", "--lstm", "32", "--eval-episodes", "300",
    "--num-envs", "16", "--learning-rate", "2e-3",
]  # fmt: skip


# ------------------------------------------------------------------------------------------------- checkpoints and runs


def run(*flags: str, **kwargs: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "i2a.py"), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False, **kwargs)


@pytest.mark.parametrize("when", ["pretraining", "training"])
def test_a_killed_run_resumes_bit_for_bit(when: str):
    flags = [*TINY, "--checkpoint-minutes", "0", "--finetune-model", "--frame-stack", "2"]
    i2a.main(i2a.parse_args([*flags, "--exp-name", "whole"]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "i2a.py"), *flags, "--exp-name", "killed"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while time.time() < deadline and process.poll() is None:
        found = list(
            pathlib.Path("runs").glob("*killed*/" + ("checkpoint.pt" if when == "pretraining" else "metrics.csv"))
        )
        if found and (when == "pretraining" or len(rows_of(found[0])) >= 3):
            break
        time.sleep(0.002)
    process.kill()
    process.wait()
    (killed,) = pathlib.Path("runs").glob("*killed*")
    assert not (killed / "agent.pt").exists()
    i2a.main(i2a.parse_args(["--resume", str(killed / "checkpoint.pt")]))
    i2a.main(
        i2a.parse_args(["--evaluate", str(killed / "agent.pt")])
    )  # what a resumed run exports knows of no resuming
    assert torch.load(killed / "agent.pt")["args"]["resume"] is None
    (whole,) = pathlib.Path("runs").glob("*whole*")
    one, other = (torch.load(folder / "checkpoint.pt") for folder in (whole, killed))
    assert_equal(
        {k: one[k] for k in ("networks", "optimizer", "model_optimizer", "global_step", "processes", "rows")}, other
    )
    timed = ("charts/SPS", "charts/minutes", "charts/imagined_steps_per_second")
    rows = [
        [{k: v for k, v in row.items() if k not in timed} for row in rows_of(folder / "metrics.csv")]
        for folder in (whole, killed)
    ]
    assert rows[0] == rows[1]


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(number: int):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        str(ROOT / "i2a.py"),
        *TINY,
        "--total-timesteps",
        "100000000",
        "--log-frequency",
        "100000000",
    ]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline, pretrained = time.time() + 60, False
    while time.time() < deadline and not pretrained:
        time.sleep(0.05)
        found = list(pathlib.Path("runs").glob("*/checkpoint.pt"))
        pretrained = bool(found) and torch.load(found[0])["has_model"]
    time.sleep(1)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"--resume {only_run()}/checkpoint.pt" in message
    assert torch.load(only_run() / "checkpoint.pt")["global_step"] > 1000


def test_a_run_goes_on_with_more_boxes_and_another_learning_rate(monkeypatch: pytest.MonkeyPatch):
    flags = ["--size", "6", "--num-boxes", "2", "--env-model", "copy", "--total-timesteps", "640"]
    i2a.main(i2a.parse_args([*TINY, *flags, "--num-boxes", "1"]))
    path, drawn, made = str(only_run() / "checkpoint.pt"), [], []
    assert torch.load(path)["processes"][0]["env"]["pool"]["boards"].eq(3).flatten(1).sum(1).max() == 1

    class Watched(SokobanVectorEnv):
        def _place(self, rows: object, chosen: object, number: object) -> None:
            drawn.append((self.num_envs, torch.as_tensor(chosen).clone()))
            super()._place(rows, chosen, number)

    adam = torch.optim.Adam
    monkeypatch.setattr(i2a, "SokobanVectorEnv", Watched)
    monkeypatch.setattr(torch.optim, "Adam", lambda *a, **k: made.append(adam(*a, **k)) or made[-1])
    changes = ["--num-boxes", "2", "--learning-rate", "1e-4", "--total-timesteps", "1280"]
    i2a.main(i2a.parse_args(["--resume", path, *changes]))
    assert made[0].param_groups[0]["lr"] == 1e-4
    after = [chosen for num, chosen in drawn if num == 8 and len(chosen) < 8]  # what followed on finished episodes
    assert len(after) > 10 and all((chosen.eq(3) | chosen.eq(4)).flatten(1).sum(1).eq(2).all() for chosen in after)


def test_a_signal_while_the_model_learns(monkeypatch: pytest.MonkeyPatch):
    pretrain = i2a.pretrain_model

    def interrupted(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        pretrain(*args)

    monkeypatch.setattr(i2a, "pretrain_model", interrupted)
    message = refused(*TINY)
    assert message.startswith("stopped while the model learned") and f"--resume {only_run()}/checkpoint.pt" in message
    assert not torch.load(only_run() / "checkpoint.pt")["has_model"]


def test_the_graph_kept_from_acting_gives_the_gradient_of_a_second_pass():
    args = Args(**SMALL)
    networks, rng = i2a.make_networks(args, CPU), torch.Generator().manual_seed(1)
    dream, agent = i2a.imagination(args, networks, rng), networks["agent"]
    frames = [boards(6, size=5, num_boxes=1, seed=seed)[:, None] for seed in range(4)]
    imagined = [dream(x) for x in frames]
    actions, advantages = torch.randint(A, (4, 6)), torch.randn(4, 6)

    def gradients(logits: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
        policy_loss, value_loss, entropy = i2a.actor_critic_losses(logits, values, actions, advantages)
        return torch.autograd.grad(policy_loss + value_loss - entropy, list(agent.parameters()))

    kept = gradients(*map(torch.stack, zip(*map(agent, frames, imagined), strict=True)))
    together = agent(torch.cat(frames), tuple(torch.cat(x, 1) for x in zip(*imagined, strict=True)))
    for one, other in zip(kept, gradients(*(x.unflatten(0, (4, 6)) for x in together)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


WORKER = """
import os, sys, torch, i2a
networks, make = [], i2a.make_networks
i2a.make_networks = lambda *args: networks.append(make(*args)) or networks[-1]
i2a.main(i2a.parse_args(sys.argv[1:]))
torch.save(networks[0].state_dict(), f"weights{os.environ['RANK']}.pt")
"""


def test_two_processes_train_one_agent():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pathlib.Path("worker.py").write_text(WORKER)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "worker.py",
        *TINY,
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    state = torch.load(only_run() / "checkpoint.pt")
    assert len(state["processes"]) == 2
    assert not torch.equal(state["processes"][0]["env"]["cells"], state["processes"][1]["env"]["cells"])
    assert state["global_step"] == 1000 + 64 * 16  # 2 x 8 environments x 4 steps an update
    assert_equal(torch.load("weights0.pt"), torch.load("weights1.pt"))


def test_evaluation_of_an_export():
    i2a.main(i2a.parse_args([*TINY, "--capture-video"]))
    path = only_run() / "agent.pt"
    assert (only_run() / "episodes.gif").read_bytes()[:3] == b"GIF"
    save_levels("held_out.txt", generate_levels(6, size=5, num_boxes=1, seed=9)[0])
    result = run("--evaluate", str(path), "--eval-levels", "held_out.txt", "--capture-video")
    assert result.returncode == 0, result.stderr
    assert "eval/solved" in result.stdout
    assert path.with_suffix(".gif").exists()


def test_monte_carlo_search_takes_the_win_that_a_perfect_model_shows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    import i2a_evaluate

    pushes = (("#@$.#", "#   #"), ("#.$@#", "#   #"), ("#  .#", "#  $#", "#  @#"), ("#@  #", "#$  #", "#.  #"))
    text = ("\n".join(["#####", *(rows + ("#   #",) * 3)[:3], "#####"]) for rows in pushes)
    pathlib.Path("near.txt").write_text("\n\n".join(text))
    flags = ["--env-model", "perfect", "--total-timesteps", "64", "--eval-levels", "near.txt"]
    i2a.main(i2a.parse_args([*TINY, *flags]))  # two updates: its value and its policy know nothing
    settings = i2a_evaluate.Search((), rollouts=20, depth=2, episodes=4)
    rows = {m: i2a_evaluate.search_with(str(only_run() / "agent.pt"), m, "", settings) for m in ("perfect", "copy")}
    assert (rows["perfect"]["eval/solved"], rows["perfect"]["eval/mean_steps"]) == (1, 1)
    # for each action 20 rollouts of 2 steps, and for the value of each one's last frame A rollouts of 3 steps
    assert rows["perfect"]["imagined_steps_per_solved"] == 20 * A * (2 + A * 3)
    assert rows["copy"]["eval/mean_steps"] != 1


def test_chance_one_move_before_a_win(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    import i2a_evaluate

    i2a.main(i2a.parse_args([*TINY, "--agent", "model-free", "--total-timesteps", "64"]))
    rows = []
    monkeypatch.setattr(i2a_evaluate, "write_rows", lambda written, _: rows.extend(written))
    i2a_evaluate.near(i2a_evaluate.Near((str(only_run() / "agent.pt"),), moves=(1, 3), episodes=400))
    chance = {row["moves"]: row["eval/solved"] for row in rows if row["variant"] == "random"}
    # 1/5 at once; else, if the board is still the same (a no-op or a blocked move: 1 to 4 of 5), 1/5 again
    assert 0.24 - 0.06 < chance[1] < 0.36 + 0.06
    assert chance[3] < chance[1] / 2


def test_tracking_without_a_login_says_what_to_do():
    keys = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED")
    environment = {k: v for k, v in os.environ.items() if k not in keys} | {"HOME": os.getcwd()}
    command = [sys.executable, str(ROOT / "i2a.py"), *TINY, "--agent", "model-free", "--track"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("--track: ") and "WANDB_MODE=offline" in message and "Traceback" not in result.stderr


def wandb_records(path: pathlib.Path) -> list[bytes]:
    """The records of an offline run's file: LevelDB's log format, after a header of 7 bytes."""
    data, records, part, at = path.read_bytes(), [], b"", 7
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # a block's last bytes, too few for a record's header
            at += 2**15 - at % 2**15
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(part)
            part = b""
    return records


def test_wandb_offline_has_what_the_csv_has(monkeypatch: pytest.MonkeyPatch):
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    i2a.main(i2a.parse_args([*TINY, "--track", "--agent", "model-free", "--total-timesteps", "600"]))
    rows = [{k: float(v) for k, v in row.items() if v} for row in rows_of(only_run() / "metrics.csv")]
    assert len(rows) > 2
    (path,) = only_run().rglob("*.wandb")
    deadline, history = time.time() + 30, []
    while len(history) < len(rows) and time.time() < deadline:  # another process writes the file
        time.sleep(0.2)
        records = [wandb_internal_pb2.Record.FromString(data) for data in wandb_records(path)]
        histories = [record.history for record in records if record.WhichOneof("record_type") == "history"]
        items = [{i.key or "/".join(i.nested_key): i.value_json for i in history.item} for history in histories]
        history = [{k: float(v) for k, v in row.items() if not k.startswith("_")} for row in items]
    assert history == [pytest.approx(row) for row in rows]


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
        (["--imagination-depth", "0"], "imagination_depth must be at least 1"),
        (["--frame-stack", "5"], "frame_stack is 5"),
        (["--num-envs", "0"], "--num-envs 0: must be 1 or more"),
        (["--lstm", "1"], "--lstm 1: must be 2 or more"),
        (["--gamma", "2"], "gamma"),
        (["--learning-rate", "-1"], "learning rate"),
        (["--width-multiplier", "0"], "width_multiplier makes a width of 0"),
        (["--cnn-channels"], "channels"),
        (["--agent", "model-free", "--env-model-path", "x.pt"], "--env-model-path needs"),
        (["--eval-levels", "nowhere.txt"], "can't read nowhere.txt: No such file"),
        (["--env-model-path", "nowhere.pt"], "nowhere.pt"),
        (["--rollout-policy", "pretrained"], "--pretrained-path"),
        (["--finetune-model", "--env-model", "perfect"], "--finetune-model needs"),
        (["--finetune-model", "--agent", "model-free"], "--finetune-model needs"),
        (["--num-boxes", "9"], "num_boxes=9"),
        (["--levels", "nowhere.txt"], "nowhere.txt"),
        (["--resume", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_bad_flags(flags: list[str], message: str):
    assert message in refused(*TINY, *flags)
    assert not pathlib.Path("runs").exists()


def test_levels_of_another_size():
    save_levels("large.txt", generate_levels(2, size=9, num_boxes=1)[0])
    assert "large.txt: level 0 is 9x9, too large for size 5x5" in refused(*TINY, "--levels", "large.txt")


def test_bad_checkpoints():
    i2a.main(i2a.parse_args([*TINY, "--agent", "model-free", "--total-timesteps", "300"]))
    good = only_run() / "checkpoint.pt"
    pathlib.Path("damaged.pt").write_bytes(good.read_bytes()[:5000])
    pathlib.Path("text.pt").write_text("not a checkpoint")
    torch.save({"weights": torch.zeros(3)}, "foreign.pt")
    torch.save({"args": {"learning_rate": 1}}, "script.pt")
    torch.save({"args": 3}, "number.pt")
    torch.save(pathlib.Path, "code.pt")  # something that only unpickling code could bring back
    for name in ("damaged.pt", "text.pt", "code.pt", "foreign.pt", "script.pt", "number.pt"):
        for flag in ("--resume", "--evaluate"):
            assert name in refused(flag, name)
    assert "holds weights only" in refused("--resume", str(good.with_name("agent.pt")))
    state = torch.load(good)
    torch.save({"args": state["args"], "global_step": 1}, "hollow.pt")
    assert "hollow.pt was made with other parts" in refused("--evaluate", "hollow.pt")
    assert "hollow.pt was made with other parts" in refused(*TINY, "--env-model-path", "hollow.pt")
    assert "other parts or sizes" in refused("--evaluate", str(good), "--dense", "17")
    changes = ["--size", "6", "--seed", "7", "--num-envs", "4", "--total-timesteps", "900", "--num-boxes", "2"]
    assert refused("--resume", str(good), *changes).startswith(f"--num-envs, --seed, --size: {good} brings its own")


def test_an_unwritable_run_folder():
    pathlib.Path("runs").write_text("in the way")
    assert "can't create runs" in refused(*TINY)


@pytest.mark.parametrize("what", ["value_loss", "gradient_norm"])
def test_what_is_not_a_number_stops_the_run_and_keeps_the_last_checkpoint(what: str, monkeypatch: pytest.MonkeyPatch):
    losses, calls = i2a.actor_critic_losses, []

    def breaking(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        calls.append(1)
        policy_loss, value_loss, entropy = losses(*args)
        if len(calls) == 25 and what == "value_loss":
            value_loss = value_loss * float("nan")
        if len(calls) == 25 and what == "gradient_norm":  # every loss is finite, and the weights are lost all the same
            policy_loss.register_hook(lambda gradient: gradient * float("nan"))
        return policy_loss, value_loss, entropy

    monkeypatch.setattr(i2a, "actor_critic_losses", breaking)
    message = refused(*TINY, "--agent", "model-free", "--checkpoint-minutes", "0", "--log-frequency", "160")
    assert message.startswith(f"losses/{what} is nan at step 800: ")
    state = torch.load(only_run() / "checkpoint.pt")
    assert all(value.isfinite().all() for value in state["networks"].values())
    assert state["global_step"] == 640
