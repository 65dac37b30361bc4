"""I2A: each part against what it must compute, and each defect of the public implementations that the spec lists."""

import itertools
import pathlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, seeded

import i2a
from i2a import A, Args
from sokoban_env import SokobanVectorEnv, convert_observation, generate_levels, load_levels

ROOT = pathlib.Path(__file__).parent.parent
CPU = torch.device("cpu")
SMALL = Args(
    size=6, num_boxes=1, cnn_channels=(8,), dense=16, encoder_channels=(8,), encoder_dense=8, lstm=16,
    rollout_channels=(8,), rollout_dense=16, model_width=4, imagination_depth=2,
)  # fmt: skip


def boards(num: int, size: int | tuple[int, int] = 6, num_boxes: int = 2, seed: int = 1) -> torch.Tensor:
    """Boards (num, H, W) in the middle of random play, some with a box on its target."""
    envs = SokobanVectorEnv(num, size=size, num_boxes=num_boxes, max_episode_steps=1000)
    observation, _ = envs.reset(seed=seed)
    rng = np.random.default_rng(seed)
    for _ in range(60):
        observation, *_ = envs.step(rng.integers(A, size=num))
    return observation


# ------------------------------------------------------------------------------------------- observations and symmetry


def test_the_models_classes_are_its_pixels():
    model, cells = i2a.EnvModel(replace(SMALL, observation="rgb", view="board")), boards(40)
    frames = convert_observation(cells, "cells", "rgb")
    classes = model.classes(frames)
    assert classes.shape == frames.shape[:3] and torch.equal(model.palette[classes], frames)
    assert torch.equal(i2a.EnvModel(SMALL).classes(cells), cells[:, 1:-1, 1:-1].long())  # the outer wall never changes


def test_planes_of_stacked_frames():
    stack = boards(6).reshape(2, 3, 6, 6)
    for view in ("board", "player"):
        each = [i2a.to_planes(frame[:, None], "cells", view) for frame in stack.unbind(1)]
        assert torch.equal(i2a.to_planes(stack, "cells", view), torch.cat(each, 1))
    rgb = convert_observation(stack, "cells", "rgb")
    assert torch.equal(i2a.to_planes(rgb, "rgb", "board")[:, 3:6], rgb[:, 1].movedim(-1, 1) / 255)


def test_which_networks_see_from_the_players_place():
    """A room that lies elsewhere on the board is the same room: for a network that sees the player in the middle."""
    room = boards(8, size=6)
    moved = [torch.zeros(8, 9, 9, dtype=torch.uint8) for _ in range(2)]
    moved[0][:, :6, :6], moved[1][:, 2:8, 3:9] = room, room
    for view in ("player", "board"):
        networks = i2a.make_networks(replace(SMALL, size=9, view=view, symmetry=view == "player"), CPU)
        encoder, ones = networks["agent"].encoder, torch.ones(8, A, 1)
        rollouts = [frames[:, None, None].expand(-1, A, -1, -1, -1) for frames in moved]
        pairs = [tuple(encoder(frames, ones, ones) for frames in rollouts)]
        for network in (networks["rollout_policy"], networks["agent"].features):
            pairs.append(tuple(network(frames[:, None]) for frames in moved))
        assert [torch.allclose(one, other, atol=1e-6) for one, other in pairs] == [view == "player"] * 3


def test_without_padding_the_view_shrinks_to_the_players_place():
    args = replace(SMALL, size=9, cnn_channels=(8, 16, 24), cnn_padding=False)
    for symmetry in (True, False):
        features = i2a.make_networks(replace(args, symmetry=symmetry), CPU)["agent"].features
        assert features.convs(torch.zeros(1, 4, 9, 9)).shape == (1, 24, 5, 5)  # 9x9, padded to 9x9, 7x7, 5x5
        assert features(boards(2, size=9)[:, None]).shape == (2, 16)
    with pytest.raises(SystemExit, match="--no-cnn-padding leaves nothing of a 5x5 view after 4 convolutions"):
        i2a.make_networks(replace(args, size=6, cnn_channels=(8,) * 4), CPU)


@pytest.mark.parametrize("which", range(8))
def test_a_symmetry_of_a_transition_is_a_transition(which: int):
    before, action = boards(200, seed=which), torch.arange(200) % A
    simulator = i2a.PerfectModel(SMALL)
    frame, reward, end = simulator.predict(before[:, None], action)
    turned = i2a.turn_boards(before, which)
    again, *outcome = simulator.predict(turned[:, None], torch.tensor(i2a.TURNED[which])[action])
    assert torch.equal(again, i2a.turn_boards(frame, which))
    assert_same([reward, end], outcome)


def test_the_eight_symmetries_differ():
    board = torch.arange(9, dtype=torch.uint8).reshape(1, 3, 3)
    assert len({tuple(i2a.turn_boards(board, which).flatten().tolist()) for which in range(8)}) == 8
    assert torch.equal(i2a.turn_boards(board, 0), board)
    assert i2a.TURNED[0] == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("which", range(8))
def test_rollouts_of_a_turned_board_are_the_turned_rollouts(which: int, monkeypatch: pytest.MonkeyPatch):
    """Under the perfect model, if π̂ does on the turned boards the turned actions; permuted, as their first actions."""
    frames = generate_levels(20, size=6, num_boxes=2, seed=1, max_pulls=2)[0][:, None]
    actions = torch.randint(A, (3, 20, A))  # of steps 2 to 4 of rollout b * A + a
    table = torch.tensor(i2a.TURNED[which])
    turned_actions = torch.empty_like(actions)
    turned_actions[:, :, table] = table[actions]
    networks = {"env_model": i2a.PerfectModel(SMALL), "rollout_policy": i2a.RandomPolicy()}

    def play(frames: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        steps = iter(actions.flatten(1))
        monkeypatch.setattr(i2a, "sample", lambda *_: next(steps))
        return i2a.imagine(networks, frames, 4, seeded())

    straight, turned = play(frames, actions), play(i2a.turn_boards(frames, which), turned_actions)
    expected, *outcome = (torch.empty_like(x).index_copy_(1, table, x) for x in straight)
    assert_same([i2a.turn_boards(expected, which), *outcome], [*turned])
    assert (straight[2] == 0).any() and (straight[1] > 0).any()


# ------------------------------------------------------------------------------------ networks that know the symmetries


def turn_features(x: torch.Tensor, which: int) -> torch.Tensor:
    """Features (B, 8 * K, ...) of the turned board: each is found where the turned symmetry is, maps are turned."""
    moved = torch.empty_like(x.unflatten(1, (-1, 8)))
    for h in range(8):
        board = torch.arange(9).view(3, 3)
        both = i2a.turn_boards(i2a.turn_boards(board, h), which)  # first h, then the turn
        to = next(g for g in range(8) if torch.equal(i2a.turn_boards(board, g), both))
        part = x.unflatten(1, (-1, 8))[:, :, h]
        moved[:, :, to] = i2a.turn_boards(part, which) if x.ndim == 4 else part
    return moved.flatten(1, 2)


def test_the_table_of_symmetries_is_a_groups():
    table, board = i2a.symmetry_table(), torch.rand(5, 5)
    for g, h in itertools.product(range(8), range(8)):  # g after g⁻¹h is h
        assert torch.equal(i2a.turn_boards(i2a.turn_boards(board, int(table[g, h])), g), i2a.turn_boards(board, h))
    assert table[0].tolist() == [*range(8)] and table.diagonal().tolist() == [0] * 8


def original(layer: torch.nn.Module, name: str) -> torch.Tensor:
    """The parameter that TurnedWeights lays out."""
    return layer.parametrizations[name].original


def test_an_equivariant_layer_is_a_convolution_with_turned_weights():
    layer = i2a.make_equivariant(torch.nn.Conv2d(3, 16, 3, stride=2, padding=1), 3, planes=True)
    x, psi, bias = torch.randn(2, 3, 7, 7), original(layer, "weight"), original(layer, "bias")
    assert psi.shape == (2, 3, 9) and bias.flatten().tolist() == [0, 0]
    assert psi.flatten(1).norm(dim=1).tolist() == pytest.approx([2**0.5] * 2)  # orthogonal weights
    bias.data.normal_()
    y = layer(x)
    assert y.shape == (2, 16, 4, 4)
    for k, g in itertools.product(range(2), range(8)):
        weight = i2a.turn_boards(psi[k].view(3, 3, 3), g)
        expected = F.conv2d(x, weight[None], bias[k].flatten(), 2, 1)[:, 0]
        torch.testing.assert_close(y[:, 8 * k + g], expected, atol=1e-5, rtol=1e-5)
    second, table = i2a.make_equivariant(torch.nn.Conv2d(16, 8, 3), 3), i2a.symmetry_table()
    psi, maps, expected = original(second, "weight").view(2, 8, 3, 3), y.unflatten(1, (2, 8)), torch.empty(2, 8, 2, 2)
    for g in range(8):  # Σ_h f(h) ψ(g⁻¹h)
        turned = [i2a.turn_boards(psi[:, table[g, h]], g)[None] for h in range(8)]
        expected[:, g] = sum(F.conv2d(maps[:, :, h], turned[h]) for h in range(8))[:, 0]
    torch.testing.assert_close(second(y), expected, atol=1e-5, rtol=1e-5)
    dense = i2a.make_equivariant(torch.nn.Linear(16 * 9, 8), 3)
    original(dense, "weight").data = original(second, "weight").data
    corner = y[:, :, :3, :3]  # of a map of the kernel's size: a dense layer of its flat values
    torch.testing.assert_close(dense(corner.flatten(1)), second(corner)[..., 0, 0], atol=1e-5, rtol=1e-5)


def test_turned_weights_give_their_originals_back():
    for turned, shape in (
        (i2a.TurnedWeights(torch.Size([16, 3, 3, 3]), 3, planes=True), (2, 3, 9)),
        (i2a.TurnedWeights(torch.Size([16, 24 * 4]), 2, planes=False), (2, 3, 32)),
        (i2a.TurnedWeights(torch.Size([16]), 1, planes=True), (2, 1, 1)),
    ):
        psi = torch.randn(shape)
        assert torch.equal(turned.right_inverse(turned(psi)), psi)


@pytest.mark.parametrize("which", range(1, 8))
def test_layers_turn_with_their_inputs(which: int):
    planes = torch.randn(2, 3, 7, 7)
    first = i2a.make_equivariant(torch.nn.Conv2d(3, 16, 3, stride=2, padding=1), 3, planes=True)
    second = i2a.make_equivariant(torch.nn.Conv2d(16, 24, 3), 3)
    dense = i2a.make_equivariant(torch.nn.Linear(24 * 4, 32), 2)
    cell = i2a.make_equivariant(torch.nn.LSTMCell(32, 16), std=0.5)
    for name in ("bias_ih", "bias_hh"):
        original(cell, name).data.normal_()

    def run(planes: torch.Tensor, turn) -> list[torch.Tensor]:
        maps = first(planes)
        more = second(maps)
        features = dense(more.relu().flatten(1))
        h, c = cell(features, (turn(state[0]), turn(state[1])))
        return [maps, more, features, h, c]

    state = torch.randn(2, 2, 16)
    straight = run(planes, lambda x: x)
    turned = run(i2a.turn_boards(planes, which), lambda x: turn_features(x, which))
    for one, other in zip(straight, turned, strict=True):
        torch.testing.assert_close(turn_features(one, which), other, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(one, other, atol=0.01)


@pytest.mark.parametrize("symmetry", [True, False])
def test_the_first_step_of_the_optimiser_by_hand(symmetry: bool):
    """Adam's first step is the rate times each gradient's sign, of all parameters, whatever their layout in memory."""
    args = replace(SMALL, symmetry=symmetry, num_envs=16, num_steps=8)
    networks, envs = i2a.make_networks(args, CPU), i2a.make_envs(args, 16, None, CPU)
    rows, *_ = i2a.rollout(args, networks, envs, envs.reset(seed=1)[0][:, None], seeded())
    before = {name: p.detach().clone() for name, p in networks.named_parameters()}
    i2a.update(args, networks, i2a.make_optimizer(args, networks), *rows)
    for name, p in networks.named_parameters():
        assert (p.grad is not None) == p.requires_grad
        if p.requires_grad:
            step = p.grad / (p.grad.abs() + 1e-5)
            torch.testing.assert_close(before[name] - p, args.learning_rate * step, atol=1e-6, rtol=0, msg=name)


def test_weights_are_laid_out_once_a_rollout_and_anew_after_an_update(monkeypatch: pytest.MonkeyPatch):
    args = replace(SMALL, num_envs=4, num_steps=3)
    networks, envs = i2a.make_networks(args, CPU), i2a.make_envs(args, 4, None, CPU)
    laid_out, lay_out = [], i2a.TurnedWeights.forward
    monkeypatch.setattr(i2a.TurnedWeights, "forward", lambda self, psi: laid_out.append(self) or lay_out(self, psi))
    rows, *_ = i2a.rollout(args, networks, envs, envs.reset(seed=1)[0][:, None], seeded())
    every = sum(isinstance(module, i2a.TurnedWeights) for module in networks.modules())
    assert len(laid_out) == len(set(laid_out)) == every
    before = networks["agent"](rows[0], rows[5:])[0]
    laid_out.clear()
    i2a.update(args, networks, i2a.make_optimizer(args, networks), *rows)
    assert len(laid_out) == len(set(laid_out)) == every
    assert not torch.equal(networks["agent"](rows[0], rows[5:])[0], before)


def test_the_actor_by_hand():
    actor = i2a.Actor(8)
    actor.layer = torch.nn.Identity()
    stay, up = torch.arange(8.0), torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 9])
    # up is made of up by 0 and 4, down by 2 and 6, left by 1 and 7, right by 3 and 5
    assert actor(torch.cat([stay, up])[None]).tolist() == [[3.5, (1 + 5) / 2, (3 + 7) / 2, (2 + 9) / 2, (4 + 6) / 2]]
    logits = i2a.Actor(32)(torch.randn(1000, 32))
    assert 0 < logits.std() < 0.02  # the first policy is near uniform


def test_initial_weights_of_the_lstm_and_the_critics_sum():
    args = Args(lstm=32)
    networks = i2a.make_networks(args, CPU)
    psi = original(networks["agent"].encoder.lstm, "weight_hh")  # (16, 4, 8): rows of norm .5, as in torch's own cell
    assert psi.flatten(1).norm(dim=1).tolist() == pytest.approx([0.5] * 16)
    agent = i2a.I2AAgent(replace(args, agent="model-free"))
    agent.features.forward = lambda frames: torch.arange(256.0).expand(2, -1)
    agent.critic = torch.nn.Identity()  # of each feature, the sum over its eight channels / √8
    value = agent(boards(2, size=7)[:, None], ())[1]
    assert value[0].tolist() == pytest.approx([(8 * 8 * k + 28) / 8**0.5 for k in range(32)])


def test_every_layer_of_a_frame_net_has_its_relu():
    net, frames = i2a.FrameNet(Args(symmetry=False), 4, (8, 8), 16), boards(3, size=7)[:, None]
    x = i2a.to_planes(frames, "cells", "player")
    for layer in net.convs:
        x = F.relu(layer(x))
    torch.testing.assert_close(net(frames), F.relu(net.dense(x.flatten(1))))


def test_sizes_of_the_parts():
    """Of 7x7 boards, and their numbers of weights: an eighth of a plain network's."""
    networks, frames = i2a.make_networks(Args(), CPU), boards(2, size=7)[:, None]
    for part, planes, channels, side in (
        (networks["agent"].features, 4, 32, 7),
        (networks["agent"].encoder.features, 5, 32, 4),  # the first stride is 2
        (networks["rollout_policy"].features, 4, 64, 4),
    ):
        assert part.convs(torch.zeros(1, planes, 7, 7)).shape == (1, channels, side, side)
    plain = i2a.make_networks(Args(symmetry=False), CPU)["agent"].features
    sizes = [sum(p.numel() for p in part.parameters()) for part in (networks["agent"].features, plain)]
    assert sizes[0] * 8 == sizes[1]
    assert networks["agent"].features(frames).shape == plain(frames).shape == (2, 256)


@pytest.mark.parametrize("which", range(1, 8))
@pytest.mark.parametrize(
    "changes",
    [
        {"agent": "model-free"},
        {"agent": "model-free", "size": 7, "frame_stack": 2, "cnn_padding": False},
        {"env_model": "perfect"},
    ],
    ids=["model-free", "no-padding", "i2a"],
)
def test_a_turned_board_has_the_turned_policy_and_the_same_value(changes: dict, which: int):
    """Of the whole agent, imagination included, and of π̂; without --symmetry it is not so."""
    for symmetry in (True, False):
        args = replace(SMALL, greedy_rollouts=True, symmetry=symmetry, cnn_channels=(8, 16), **changes)
        frames = boards(20 * args.frame_stack, size=args.size).unflatten(0, (20, -1))
        networks = i2a.make_networks(args, CPU)
        for name, p in networks.named_parameters():
            p.data *= 100 if "actor" in name else 1

        def play(frames: torch.Tensor, networks=networks, args=args) -> list[torch.Tensor]:
            logits, value = networks["agent"](frames, i2a.imagine(networks, frames, 2, seeded(), True))
            pi_hat = networks["rollout_policy"](frames) if args.agent == "i2a" else logits
            return [logits, pi_hat, value]

        straight, turned = play(frames), play(i2a.turn_boards(frames, which))
        table = torch.tensor(i2a.TURNED[which])
        straight[:2] = (x[:, table.argsort()] for x in straight[:2])
        same = [torch.allclose(one, other, atol=1e-5) for one, other in zip(straight, turned, strict=True)]
        assert same == [symmetry] * 3 and straight[0].std() > 0.01


# --------------------------------------------------------------------------------------------------- environment model


def test_the_action_reaches_the_model_as_one_hot_planes():
    model = i2a.EnvModel(SMALL)
    frames, action = boards(30)[:, None], torch.arange(30) % A
    one_hot = F.one_hot(action, A)[..., None, None].expand(-1, -1, 6, 6)
    planes = torch.cat([i2a.to_planes(frames, "cells", "board"), one_hot], 1)
    kernel = torch.zeros(8, 4 + A, 3, 3)  # conv1 on the frame's planes, a 1x1 kernel on the action's
    kernel[:, :4], kernel[:, 4:, 1, 1] = model.conv1.weight, model.action.weight.T
    h = F.relu(F.conv2d(planes, kernel, model.conv1.bias))  # inside the outer wall, which never changes
    h = F.relu(model.conv2(h) + model.inject(h.amax((2, 3)))[:, :, None, None])
    frame = model.frame(h) + 4 * F.one_hot(frames[:, 0, 1:-1, 1:-1].long(), 7).movedim(-1, 1)
    assert torch.allclose(model(frames, action)[0], frame, atol=1e-5)


def test_the_outer_wall_stays():
    model = i2a.EnvModel(SMALL)
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
    model = i2a.CopyModel(replace(SMALL, frame_stack=2))
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
    assert_same(data, again)
    assert not torch.equal(data["frames"], other["frames"])


def test_the_models_data_come_from_the_levels_and_the_policy_of_the_run():
    def climb(frames: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0, 50, 0, 0, 0]).expand(len(frames), A)

    levels = generate_levels(3, size=6, num_boxes=1, seed=4)[0]
    data = i2a.collect_transitions(replace(SMALL, max_episode_steps=9), climb, 1280, 1, CPU, levels)
    assert (data["action"] == 1).all()
    walls = {board.numpy().tobytes() for board in (levels == 0)}
    assert {board.numpy().tobytes() for board in (data["frames"][:960, 0] == 0)} == walls


def test_pretraining_learns_the_rules(watch):
    args = replace(SMALL, model_frames=8000, model_steps=900, model_width=16)
    collected = watch(i2a, "collect_transitions")
    model, logger = i2a.EnvModel(args), i2a.Logger(args, "pretraining")
    i2a.pretrain_model(model, args, None, seeded(), logger)
    fresh = i2a.collect_transitions(args, i2a.RandomPolicy(), 2560, 77, CPU, None)
    metrics = i2a.model_metrics(model, fresh)
    assert metrics["model/exact_board_accuracy"] > 0.98 and metrics["model/all_right"] > 0.97
    _, _, end = model.predict(fresh["frames"], fresh["action"])
    assert end[fresh["end"]].float().mean() > 0.9 and not end[~fresh["end"]].float().mean() > 0.01
    (first, training), (second, held_out), _ = collected
    assert first[3] != second[3]  # the seeds: other levels
    assert len(training["action"]) + len(held_out["action"]) == pytest.approx(8000, abs=64)  # all of them are counted
    assert [row["model/step"] for row in logger.rows] == [500, 900] and logger.rows[-1]["global_step"] == 8000
    assert logger.rows[-1]["model/all_right"] == i2a.model_metrics(model, held_out)["model/all_right"]


def test_pretraining_sees_what_it_knows_least_most(monkeypatch: pytest.MonkeyPatch):
    args, shares, simulator = replace(SMALL, model_frames=2000, model_steps=60), [], i2a.PerfectModel(SMALL)
    turned, turn = set(), i2a.turn_boards

    def loss(model: i2a.EnvModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        frame, _, end = simulator.predict(batch["frames"], batch["action"])
        assert torch.equal(frame, batch["next"]) and torch.equal(end, batch["end"])  # under each symmetry
        shares.append((batch["reward"] > 0).float().mean().item())
        return (batch["reward"] > 0) + 1e-3 + 0 * model.conv1.bias.sum()

    monkeypatch.setattr(i2a, "model_loss", loss)
    monkeypatch.setattr(i2a, "turn_boards", lambda cells, which: turned.add(which) or turn(cells, which))
    i2a.pretrain_model(i2a.EnvModel(args), args, None, seeded(), i2a.Logger(args, "x"))
    assert shares[0] < 0.2 and 0.4 < np.mean(shares[-20:]) < 0.75  # half of a batch goes by the loss
    assert turned == {*range(8)}


def test_the_models_loss_by_hand():
    model, args = i2a.EnvModel(SMALL), SMALL
    data = i2a.collect_transitions(args, i2a.RandomPolicy(), 1280, 1, CPU, None)
    frame, reward, end = model(data["frames"], data["action"])
    target = data["next"][:, None, 1:-1, 1:-1].long()  # the outer wall never changes
    expected = -frame.log_softmax(1).gather(1, target).sum((1, 2, 3))
    value = [[-1.1, -0.1, 0.9, 10.9].index(round(x, 1)) for x in data["reward"].tolist()]
    expected -= reward.log_softmax(1)[torch.arange(1280), value]
    expected -= torch.where(data["end"], end.sigmoid(), 1 - end.sigmoid()).log()
    assert torch.allclose(i2a.model_loss(model, data), expected, atol=1e-4)


def test_model_metrics_by_hand():
    class Wrong(torch.nn.Module):  # wrong about pushes, about the reward of down and the end of up
        kind = "cells"

        def predict(self, frames: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, ...]:
            following, reward, _ = i2a.PerfectModel(SMALL).predict(frames, action)
            pushed = (following == 3).flatten(1).ne((frames[:, -1] == 3).flatten(1)).any(1)
            frame = torch.where(pushed[:, None, None], frames[:, -1], following)
            return frame, reward + (action == 2), action == 1

    rooms = ["#@$. #", "#@$  #", "#.$@ #"], ["#    #", "#   .#", "#    #"]
    text = ["\n".join(["######", top, below, "######"]) for top, below in zip(*rooms, strict=True)]
    frames = load_levels(save(*text), 6).repeat_interleave(A, 0)
    action = torch.arange(A).repeat(3)
    following, reward, end = i2a.PerfectModel(SMALL).predict(frames[:, None], action)
    data = {"frames": frames[:, None], "next": following, "action": action, "reward": reward, "end": end}
    metrics = i2a.model_metrics(Wrong(), data)
    assert set(metrics) == {"model/exact_board_accuracy", "model/all_right"}
    assert metrics["model/exact_board_accuracy"] == pytest.approx(12 / 15)  # three pushes: right, right, left
    assert metrics["model/all_right"] == pytest.approx(6 / 15)  # and three steps down, three up
    assert i2a.model_metrics(i2a.PerfectModel(SMALL), data)["model/all_right"] == 1


def test_exact_rollouts_compare_with_the_simulator():
    class Lost(i2a.PerfectModel):  # right up to the end, and wrong about what would come after it
        def predict(self, frames: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, ...]:
            frame, reward, end = super().predict(frames, action)
            over = (frames[:, -1] != 3).flatten(1).all(1)
            return torch.where(over[:, None, None], 0, frame), reward, end

    frames = load_levels(save("######\n#@$. #\n######", "######\n#@ $.#\n######", "######\n# @$.#\n######"), 6)[:, None]
    stay = torch.nn.Module()
    stay.forward = lambda x: torch.tensor([1e6, 0.0, 0, 0, 0]).expand(len(x), A)
    models = i2a.PerfectModel(SMALL), Lost(SMALL), i2a.CopyModel(SMALL)
    networks = [{"env_model": model, "rollout_policy": stay} for model in models]
    shares = [i2a.rollout_accuracy(SMALL, x, frames, 1)["model/exact_rollouts"] for x in networks]
    # the copy model is right where nothing moves: no-op, up and down, and left where the wall is
    assert shares == [1, 1, pytest.approx(11 / 15)]


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
    # Imagination shifts the stack: the last two steps' frames, after the real ones
    stack, kept = seen[1].unflatten(0, (7, A)), min(2, frame_stack)
    assert torch.equal(stack[:, :, -kept:], imagined[:, :, 2 - kept : 2])
    assert torch.equal(stack[:, :, :-kept], frames[:, None, 2:].expand(-1, A, *[-1] * (frames.ndim - 1)))


def test_imagination_stops_where_the_model_says_so():
    class Ends(i2a.CopyModel):
        def predict(self, frames: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return frames[:, -1], torch.ones(len(action)), action == 2

    networks = {"env_model": Ends(SMALL), "rollout_policy": i2a.RandomPolicy()}
    _, rewards, alive = i2a.imagine(networks, boards(3)[:, None], 3, seeded())
    assert alive[:, 2].tolist() == [[1, 0, 0]] * 3 and alive[:, 1, 1].tolist() == [1] * 3
    assert torch.equal(rewards, alive)
    assert i2a.imagine({"agent": None}, boards(3)[:, None], 3, seeded()) == ()  # a model-free agent has none


def test_greedy_rollouts_take_the_likeliest_action(watch):
    def policy(frames: torch.Tensor) -> torch.Tensor:  # up is likeliest, but only just
        return torch.tensor([0.0, 0.1, 0, 0, 0]).expand(len(frames), A)

    networks = {"env_model": i2a.CopyModel(SMALL), "rollout_policy": policy}
    predicted = watch(networks["env_model"], "predict")
    i2a.imagine(networks, boards(30)[:, None], 3, seeded(), greedy=True)
    actions = torch.stack([call[1] for call, _ in predicted])
    assert torch.equal(actions, torch.stack([torch.arange(A).repeat(30), *torch.ones(2, 30 * A).long()]))


@pytest.mark.parametrize("shown", [True, False])
def test_without_reward_prediction_the_encoder_sees_no_rewards_nor_ends(shown: bool):
    encoder = i2a.RolloutEncoder(replace(SMALL, reward_prediction=shown))
    frames, rewards, alive = boards(2 * A * 3).reshape(2, A, 3, 6, 6), torch.zeros(2, A, 3), torch.ones(2, A, 3)
    plain, paid = encoder(frames, rewards, alive), encoder(frames, rewards + 10.9, alive)
    ended = encoder(frames, rewards, torch.tensor([1.0, 0, 0]).expand(2, A, 3))
    assert torch.equal(plain, paid) == torch.equal(plain, ended) == (not shown)


def test_the_rollout_encoder_is_an_lstm_over_the_reversed_rollout():
    encoder = i2a.RolloutEncoder(replace(SMALL, symmetry=False))
    frames, rewards = boards(2 * A * 3).reshape(2, A, 3, 6, 6), torch.randn(2, A, 3, requires_grad=True)
    features = [encoder.features(frames[:, :, d].reshape(-1, 1, 6, 6), rewards[:, :, d].flatten()) for d in range(3)]
    lstm = torch.nn.LSTM(8, 16)  # torch's own LSTM with the cell's weights, fed backwards
    lstm.load_state_dict({f"{name}_l0": value for name, value in encoder.lstm.state_dict().items()})
    expected = lstm(torch.stack(features).flip(0))[0][-1].reshape(2, A * 16)
    embedding = encoder(frames, rewards, torch.ones(2, A, 3))
    assert torch.allclose(embedding, expected, atol=1e-6)
    reversed_rollout = encoder(frames.flip(2), rewards.flip(2), torch.ones(2, A, 3))
    assert not torch.allclose(reversed_rollout, embedding, atol=1e-3)
    embedding.square().sum().backward()
    assert (rewards.grad.abs().sum((0, 1)) > 0).all()  # gradient reaches every depth
    ended = encoder(frames, rewards, torch.tensor([1.0, 1, 0]).expand(2, A, 3))  # nothing is read past the imagined end
    assert torch.allclose(ended, encoder(frames[:, :, :2], rewards[:, :, :2], torch.ones(2, A, 2)), atol=1e-6)


def test_the_aggregator_keeps_environments_and_actions_apart():
    args = replace(SMALL, encoder_channels=(32,), encoder_dense=32, lstm=64)  # not all of it is dead
    networks = i2a.make_networks(args, CPU)
    frames = boards(4)[:, None]
    imagined = i2a.imagine(networks, frames, 2, seeded())
    logits, value = networks["agent"](frames, imagined)
    rewards = imagined[1].clone()
    rewards[2] += 1  # another reward in the rollouts of environment 2 only
    new_logits, new_value = networks["agent"](frames, (imagined[0], rewards, imagined[2]))
    assert (logits != new_logits).any(1).tolist() == (value != new_value).tolist() == [False, False, True, False]
    rewards[0, 1], rewards[0, 3] = 1, 2
    swapped = rewards.clone()
    swapped[0, 1], swapped[0, 3] = 2, 1  # it matters whose rollout it is
    one, other = (networks["agent"](frames, (imagined[0], x, imagined[2]))[0][0] for x in (rewards, swapped))
    assert not torch.allclose(one, other, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- losses


def test_ppo_losses_by_hand():
    ratios, advantages = [0.5, 0.5, 1.0, 1.5, 1.5], [2.0, -2.0, 3.0, 2.0, -2.0]
    logits = torch.randn(5, A, dtype=torch.float64, requires_grad=True)
    values, actions, returns = torch.randn(5, dtype=torch.float64), torch.arange(5), torch.randn(5, dtype=torch.float64)
    p = logits.detach().softmax(-1)
    old = (p[torch.arange(5), actions] / torch.tensor(ratios, dtype=torch.float64)).log()
    advantage = torch.tensor(advantages, dtype=torch.float64)
    policy_loss, value_loss, entropy, clipfrac = i2a.ppo_losses(logits, values, actions, old, advantage, returns, 0.2)
    # the worse of both: a good action gains up to 1.2, and loses without bound; a bad one the other way round
    assert policy_loss.item() == pytest.approx(-(0.5 * 2 - 0.8 * 2 + 3 + 1.2 * 2 - 1.5 * 2) / 5)
    assert value_loss.item() == pytest.approx(((returns - values) ** 2).mean().item())
    assert entropy.item() == pytest.approx(-(p * p.log()).sum(-1).mean().item())
    assert clipfrac.item() == pytest.approx(4 / 5)
    entropy_gradient = -p * (p.log() + 1 - (p * (p.log() + 1)).sum(-1, keepdim=True))
    assert torch.allclose(torch.autograd.grad(entropy, logits)[0], entropy_gradient / 5)


def test_distillation_is_a_kl_from_a_constant_target():
    teacher, student = torch.randn(16, A, requires_grad=True), torch.randn(16, A, requires_grad=True)
    loss = i2a.distillation_loss(teacher, student)
    p, q = teacher.softmax(-1), student.softmax(-1)
    assert loss.item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), abs=1e-6)
    loss.backward()
    assert teacher.grad is None
    assert torch.allclose(student.grad, (q - p) / 16, atol=1e-6)  # that of the cross-entropy


# ----------------------------------------------------------------------------------------------------------- the update


def some_rows(networks: torch.nn.ModuleDict, num: int = 16) -> list[torch.Tensor]:
    """What `update` takes: frames, actions, log π_old, advantages, returns, and what was imagined."""
    frames, imagined = boards(num)[:, None], i2a.imagine(networks, boards(num)[:, None], 2, seeded())
    actions = torch.arange(num) % A
    logits, _ = networks["agent"](frames, imagined)
    return [frames, actions, i2a.log_probabilities(logits, actions).detach(), *torch.randn(2, num), *imagined]


def step_of(args: Args, rows: list[torch.Tensor]) -> tuple[dict, torch.Tensor]:
    """The gradient by which `update` moves each weight (by plain gradient descent of rate 1), and what it returns."""
    torch.manual_seed(3)
    networks = i2a.make_networks(args, CPU)
    before = {name: p.detach().clone() for name, p in networks.named_parameters()}
    groups = [{"params": list(networks[name].parameters())} for name in ("agent", "rollout_policy")]
    losses = i2a.update(args, networks, torch.optim.SGD(groups, 1.0), *rows)
    return {name: before[name] - p.detach() for name, p in networks.named_parameters()}, losses


FREE = replace(SMALL, norm_adv=False, max_grad_norm=1e9)  # nothing but the losses


@pytest.mark.parametrize(
    ("norm_adv", "distill_coef", "max_grad_norm"), [(True, 0.6, 1e9), (False, 100.0, 0.01), (False, 0.0, 1e9)]
)
def test_an_update_follows_the_gradient_of_the_losses(norm_adv, distill_coef, max_grad_norm):
    """The agent's gradient and the rollout policy's are clipped apart, the model has none."""
    flags = {"norm_adv": norm_adv, "distill_coef": distill_coef, "max_grad_norm": max_grad_norm}
    args = replace(SMALL, vf_coef=0.3, ent_coef=0.02, clip_coef=0.17, **flags)
    rows = some_rows(i2a.make_networks(args, CPU))
    rows[2] += torch.randn(16) / 2  # the ratios are not 1
    moved, losses = step_of(args, rows)
    torch.manual_seed(3)
    networks, (frames, actions, old, advantages, returns, *imagined) = i2a.make_networks(args, CPU), rows
    if norm_adv:
        advantages = (advantages - advantages.mean()) / advantages.std()
    logits, values = networks["agent"](frames, imagined)
    policy_loss, value_loss, entropy, clipfrac = i2a.ppo_losses(logits, values, actions, old, advantages, returns, 0.17)
    distillation = i2a.distillation_loss(logits, networks["rollout_policy"](frames))
    loss, norms = policy_loss + 0.3 * value_loss - 0.02 * entropy + distill_coef * distillation, []
    for part in ("agent", "rollout_policy"):
        names, parameters = zip(*networks[part].named_parameters(), strict=True)
        gradient = torch.autograd.grad(loss, parameters, retain_graph=True)
        norms.append(torch.cat([x.flatten() for x in gradient]).norm())
        for name, x in zip(names, gradient, strict=True):
            expected = x * min(1, max_grad_norm / norms[-1])
            torch.testing.assert_close(moved[f"{part}.{name}"], expected, rtol=1e-3, atol=1e-6)
    assert not any(x.any() for name, x in moved.items() if name.startswith("env_model"))
    expected = torch.stack([policy_loss, value_loss, entropy, clipfrac, distillation, norms[0]]).detach()
    torch.testing.assert_close(losses, expected)
    assert 0 < clipfrac < 1 and norms[0] > 0.1 and (norms[1] > 0) == (distill_coef > 0)


def test_the_presets():
    args = i2a.parse_args(["--preset", "paper", "--num-envs", "64"])
    assert (args.size, args.num_boxes, args.observation, args.imagination_depth) == (10, 4, "rgb", 5)
    assert (args.cnn_channels, args.dense, args.lstm, args.optimizer) == ((32, 64, 64), 512, 512, "rmsprop")
    assert (args.encoder_channels, args.encoder_dense, args.rollout_channels) == ((32, 64, 64), 512, (16, 16))
    assert args.num_envs == 64 and args.ent_coef == 0.01 and args.gae_lambda == 1
    small = i2a.parse_args(["--preset", "paper-small", "--gae-lambda", "1"])
    for preset in (args, small):  # A2C on the board as it lies
        assert (preset.update_epochs, preset.num_minibatches, preset.norm_adv, preset.symmetry) == (1, 1, False, False)
        assert preset.view == "board" and preset.gae_lambda == 1 and not preset.greedy_rollouts
        assert (preset.gamma, preset.vf_coef) == (0.97, 0.5)
    assert i2a.parse_args(["--preset", "paper-small"]).gae_lambda == 0.95
    assert (small.imagination_depth, small.rollout_channels, small.model_frames) == (3, (16,), 20_000)
    assert i2a.parse_args([]) == Args() and Args().view == "player" and Args().symmetry
    networks = i2a.make_networks(args, CPU)
    frames = convert_observation(boards(2, size=10, num_boxes=4), "cells", "rgb")[:, None]
    imagined = i2a.imagine(networks, frames, 5, seeded())
    assert imagined[0].shape == (2, A, 5, 80, 80, 3)
    assert networks["agent"].actor.in_features == 512 + 2560  # c_ia = 5 x 512
    assert networks["agent"](frames, imagined)[0].shape == (2, A)
    layers = [m for m in networks["agent"].features.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(m.kernel_size[0], m.stride[0], m.out_channels) for m in layers] == [(8, 4, 32), (4, 2, 64), (3, 1, 64)]


def test_a_random_rollout_policy_is_sampled():
    assert i2a.parse_args([]).greedy_rollouts
    assert not i2a.parse_args(["--rollout-policy", "random"]).greedy_rollouts


@pytest.mark.parametrize(("greedy", "lead"), [(False, 1000.0), (True, 0.1)])
def test_evaluation_plays_each_level_once(greedy: bool, lead: float):
    rooms = ["######\n#@$ .#\n######", "######\n#@ $.#\n######", "######\n#@. $#\n######"]  # in 2, 2 and no steps right
    levels = load_levels(save(*rooms), 6)
    args = replace(SMALL, max_episode_steps=7, greedy=greedy)
    networks = i2a.make_networks(args, CPU)
    networks["agent"].forward = lambda frames, _: (torch.tensor([[0.0, 0, 0, 0, lead]] * len(frames)), None)
    metrics, solved = i2a.evaluate(args, networks, levels, CPU)
    assert metrics["eval/solved"] == pytest.approx(2 / 3) and metrics["eval/mean_steps"] == 2
    assert metrics["eval/imagined_steps_per_solved"] == A * 2 * (2 + 2 + 7) / 2
    assert solved.tolist() == [True, True, False]
    many = levels.repeat(400, 1, 1)  # more than are played at once
    assert torch.equal(i2a.evaluate(args, networks, many, CPU)[1], solved.repeat(400))
    networks["agent"].forward = lambda frames, _: (torch.zeros(len(frames), A), None)
    games = [i2a.evaluate(args, networks, many, CPU)[1] for _ in range(2)]
    assert torch.equal(*games)  # the seed's
    wall = torch.stack([levels[2]] * 2)
    assert i2a.evaluate(replace(args, greedy=True), networks, wall, CPU)[0] == {"eval/solved": 0}
