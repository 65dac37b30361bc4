"""dyna_dqn.py: losses by hand, gradients of the model, imagination, rows at episode ends, checkpoints, flags."""

import random
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn

import dyna_dqn
from dyna_dqn import Args, DeltaModel, RunsMLP, delta_model_loss, dqn_loss, imagine_rows, main

SMALL = {"hidden": (16,), "model_hidden": (16,), "eval_episodes": 2, "learning_starts": 50, "batch_size": 16}


class RampEnv(gym.Env):
    """State (t, episode), both scaled; action 1 adds to t what action 0 doesn't. Ends by itself after `end` steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), dtype=np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, end: int = 7, truncates: bool = False) -> None:
        self.end, self.truncates, self.episode = end, truncates, 0

    def _observe(self):
        return np.array([self.t / 10, self.episode / 100], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.count = 0, 0
        self.episode += 1
        return self._observe(), {}

    def step(self, action):
        self.t += 1 + int(action)
        self.count += 1
        end = self.count == self.end
        return self._observe(), 1.0, end and not self.truncates, end and self.truncates, {}


gym.register("TestRamp-v0", entry_point=RampEnv)
gym.register("TestRampTruncated-v0", entry_point=RampEnv, kwargs={"truncates": True})


class TableNet(nn.Module):
    """Q-values that are rows of a table; the state (E, B, 1) is the row's number."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table))

    def forward(self, s):
        return self.table[s[..., 0].round().long()]


def row(s: list[float], s2: list[float], a: int, r: float, end: float) -> torch.Tensor:
    return torch.tensor([[[*s, *s2, float(a), r, end]]])


# ------------------------------------------------------------------------------------------------------------ the loss


def test_dqn_targets_by_hand():
    online, target = TableNet([[1.0, 2.0], [5.0, 3.0]]), TableNet([[0.0, 0.0], [10.0, 20.0]])
    for end, double, expected in (
        (0.0, True, 0.5 + 0.9 * 10),  # the online network picks action 0 of state 1, the target network values it
        (0.0, False, 0.5 + 0.9 * 20),
        (1.0, True, 0.5),  # terminated
        (0.25, True, 0.5 + 0.9 * 0.75 * 10),  # a probability, as the model gives it
    ):
        loss, q = dqn_loss(online, target, row([0], [1], 1, 0.5, end), None, 0.9, double)
        assert loss.item() == pytest.approx((expected - 2.0) ** 2, rel=1e-6)
        assert q.item() == 2.0


def test_only_q_of_the_taken_action_learns_and_the_target_is_a_constant():
    online, target = TableNet([[1.0, 2.0], [5.0, 3.0]]), TableNet([[0.0, 0.0], [10.0, 20.0]])
    dqn_loss(online, target, row([0], [1], 1, 0.5, 0), None, 0.9, True)[0].backward()
    np.testing.assert_allclose(online.table.grad, [[0, 2 * (2.0 - 9.5)], [0, 0]], rtol=1e-6)
    assert target.table.grad is None


def test_the_loss_is_a_mean_and_weights_scale_it():
    online = TableNet([[1.0, 2.0], [0.0, 0.0]])
    rows = torch.cat([row([0], [1], 0, 0.0, 1), row([0], [1], 1, 0.0, 1)], 1)  # errors 1 and 2
    assert dqn_loss(online, online, rows, None, 0.9, True)[0].item() == 2.5
    assert dqn_loss(online, online, rows.repeat(1, 3, 1), None, 0.9, True)[0].item() == 2.5
    assert dqn_loss(online, online, rows, torch.tensor([[1.0, 0.5]]), 0.9, True)[0].item() == 1.5


# ------------------------------------------------------------------------------------------------- runs in lockstep


def test_runs_are_separate_networks_with_separate_gradients():
    torch.manual_seed(1)
    net, x = RunsMLP(2, [3, 5, 4]), torch.randn(2, 7, 3)
    for e in range(2):
        own = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4))
        for i, layer in enumerate((own[0], own[2])):
            layer.weight.data, layer.bias.data = net.weights[i][e].t(), net.biases[i][e, 0]
        torch.testing.assert_close(net(x)[e], own(x[e]))
    net(x)[1].sum().backward()
    assert all((p.grad[0] == 0).all() and (p.grad[1] != 0).any() for p in net.parameters())


def test_networks_start_like_torchs_own():
    torch.manual_seed(1)
    net, own = RunsMLP(50, [4, 120]), nn.Linear(4, 120)
    for values, reference in ((net.weights[0], own.weight), (net.biases[0], own.bias)):
        assert values.abs().max() <= 0.5 and values.std().item() == pytest.approx(reference.std().item(), rel=0.1)


@pytest.mark.parametrize("planning", ["replay", "model"])
def test_lockstep_runs_learn_apart(tmp_path, monkeypatch, planning):
    monkeypatch.chdir(tmp_path)
    rows = main(Args(**SMALL | {"num_seeds": 3, "planning": planning, "total_timesteps": 100, "eval_frequency": 50,
                                "planning_steps": 2, "save_model": True}))  # fmt: skip
    assert len(rows[-1]["eval/return"]) == 3 and len(set(rows[-1]["losses/td_loss"])) == 3
    (path,) = tmp_path.glob("runs/*/agent.pt")
    replay = torch.load(path, weights_only=True)["replay"]
    assert replay.shape == (3, 100, 11) and not torch.equal(replay[0], replay[1])
    # a row goes on where the last one of the same run stopped, unless that ended
    for run in replay:
        goes_on = run[:-1, 10] == 0
        torch.testing.assert_close(run[:-1, 4:8][goes_on], run[1:, :4][goes_on])


# ----------------------------------------------------------------------------------------------------------- the model


def random_rows(num: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    s = torch.randn(num, 3, generator=rng, dtype=dtype)
    s2 = s + torch.tensor([0.1, 2.0, 0.0], dtype=dtype) * torch.randn(num, 3, generator=rng, dtype=dtype)
    a = torch.randint(2, (num, 1), generator=rng).to(dtype)
    r, end = torch.randn(num, 1, generator=rng, dtype=dtype), (torch.rand(num, 1, generator=rng) < 0.3).to(dtype)
    return torch.cat([s, s2, a, r, end], 1)[None]


def test_model_gradients_match_finite_differences():
    torch.manual_seed(1)
    rows = random_rows(12, torch.float64)
    model = DeltaModel(1, 3, 2, (8,)).double()
    model.standardize(rows[..., :3], rows[..., 3:6])
    loss = delta_model_loss(model, rows)
    loss.backward()
    for parameter in model.parameters():
        flat, grad = parameter.data.view(-1), parameter.grad.view(-1)
        for i in range(0, len(flat), max(1, len(flat) // 5)):
            old = flat[i].item()
            values = []
            for step in (1e-6, -1e-6):
                flat[i] = old + step
                values.append(delta_model_loss(model, rows).item())
            flat[i] = old  # no ReLU has its kink within a step of 1e-6 here
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(grad[i].item(), rel=1e-4, abs=1e-7)


def test_model_loss_by_hand():
    model = DeltaModel(1, 1, 2, ())  # one linear layer on (s, one-hot a)
    with torch.no_grad():
        model.net.weights[0].zero_()
        model.net.biases[0].copy_(torch.tensor([5.0, 0.5]))  # Δs = 5 spreads, r = .5
        model.end_net.weights[0].fill_(np.log(3.0) / 4)  # at s' = 4: p(end) = 3/4
        model.end_net.biases[0].zero_()
    model.delta_std.fill_(3.0)
    loss = delta_model_loss(model, row([1], [4], 0, 1.0, 1.0))  # Δs = 3: one spread
    assert loss.item() == pytest.approx((5 - 1) ** 2 + 0.25 - np.log(0.75), rel=1e-6)


def test_standardize_takes_the_scales_and_leaves_constants_alone():
    rows = random_rows(4000)
    model = DeltaModel(1, 3, 2, (8,))
    model.standardize(rows[..., :3], rows[..., 3:6])
    np.testing.assert_allclose(model.net.std[0, 0, :3], 1.0, atol=0.05)
    assert (model.net.std[0, 0, 3:] == 1).all()  # the action's one-hot stays as it is
    np.testing.assert_allclose(model.delta_std[0, 0], [0.1, 2.0, 1.0], rtol=0.05)


class ExactModel(DeltaModel):
    """Moves by +1 for action 1 and -1 for action 0, pays s, ends with probability 1/4."""

    def forward(self, s, a):
        return (2.0 * a - 1)[..., None], s[..., 0]

    def end_logit(self, s2):
        return torch.full_like(s2[..., 0], -np.log(3.0))


def test_imagination_acts_by_q_and_feeds_predictions_back():
    q_net = TableNet([[0.0, 1.0], [1.0, 0.0], *[[0.0, 1.0]] * 5])  # from 1 down, from all others up
    model = ExactModel(1, 1, 2, ())
    rng = torch.Generator().manual_seed(1)
    expected = [[0, 1, 1, 0], [2, 3, 1, 2], [1, 0, 0, 1], [3, 4, 1, 3], [0, 1, 1, 0], [4, 5, 1, 4]]  # (s, s', a, r)
    rows, weights = imagine_rows(q_net, model, torch.tensor([[[0.0], [2.0]]]), 3, 0.0, rng)
    np.testing.assert_allclose(rows[0, :, :4], expected)
    np.testing.assert_allclose(rows[0, :, 4], 0.25, rtol=1e-6)
    np.testing.assert_allclose(weights[0], [1, 1, 0.75, 0.75, 0.5625, 0.5625], rtol=1e-6)
    assert not rows.requires_grad


def test_imagination_explores_as_told():
    q_net, model = TableNet([[0.0, 1.0]]), ExactModel(1, 1, 2, ())
    rng = torch.Generator().manual_seed(1)
    for epsilon, share in ((0.0, 0.0), (0.5, 0.25), (1.0, 0.5)):
        rows, _ = imagine_rows(q_net, model, torch.zeros(1, 4000, 1), 1, epsilon, rng)
        assert (rows[0, :, 2] == 0).float().mean().item() == pytest.approx(share, abs=0.03)


# ------------------------------------------------------------------------------------------------ the loop, watched


def watched(monkeypatch, **kwargs) -> list[torch.Tensor]:
    """The rows of every update of Q in a run."""
    seen, loss = [], dqn_loss

    def watch(q_net, target_net, rows, weight, gamma, double):
        seen.append(rows[0].clone())
        return loss(q_net, target_net, rows, weight, gamma, double)

    monkeypatch.setattr(dyna_dqn, "dqn_loss", watch)
    main(Args(**SMALL | {"env_id": "TestRamp-v0", "total_timesteps": 80, "eval_frequency": 80} | kwargs))
    return seen


@pytest.mark.parametrize("env_id", ["TestRamp-v0", "TestRampTruncated-v0"])
def test_no_row_crosses_a_reset(tmp_path, monkeypatch, env_id):
    monkeypatch.chdir(tmp_path)
    rows = torch.cat(watched(monkeypatch, env_id=env_id, planning="replay", planning_steps=3))
    s, s2 = rows[:, :2], rows[:, 2:4]
    assert torch.equal(s[:, 1], s2[:, 1])  # the episode's number
    torch.testing.assert_close(s2[:, 0] - s[:, 0], (1 + rows[:, 4]) / 10)  # no teleport to t = 0
    last = rows[:, 6] == 1
    assert bool(last.any()) == (env_id == "TestRamp-v0")  # a truncation is no `end`, a termination is


def test_imagined_states_are_real_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = watched(monkeypatch, planning="model", planning_steps=4, imagination_depth=1)
    real = {tuple(np.round(x, 4)) for rows in seen[::5] for x in rows[:, :2].tolist()}
    imagined = [tuple(np.round(x, 4)) for rows in seen[1::5] for x in rows[:, :2].tolist()]
    steps = {round(t, 1) for t, _ in imagined}
    assert len(real & set(imagined)) > 10 and steps <= {round(0.1 * t, 1) for t in range(14)}


@pytest.mark.parametrize(("planning", "updates"), [("none", 1), ("replay", 5), ("model", 5)])
def test_replay_and_model_make_as_many_updates(tmp_path, monkeypatch, planning, updates):
    monkeypatch.chdir(tmp_path)
    seen = watched(monkeypatch, planning=planning, planning_steps=4)
    assert len(seen) == 30 * updates  # 80 steps, the first 50 without
    assert all(rows.shape == (16, 7) for rows in seen)


def test_imagination_depth_keeps_the_batch_size_and_its_chains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = watched(monkeypatch, planning="model", planning_steps=4, imagination_depth=4)
    assert len(seen) == 30 * 5 and all(len(rows) == 16 for rows in seen)
    for rows in (rows for i, rows in enumerate(seen) if i % 5):
        for d in range(3):  # the 4 states of depth d + 1 are the predictions of depth d
            torch.testing.assert_close(rows[4 * d : 4 * d + 4, 2:4], rows[4 * d + 4 : 4 * d + 8, :2])


@pytest.mark.parametrize("planning", ["none", "replay", "model"])
def test_training_moves_the_weights_and_reproduces(tmp_path, monkeypatch, planning):
    monkeypatch.chdir(tmp_path)
    args = {"total_timesteps": 120, "eval_frequency": 60, "planning": planning, "planning_steps": 2, "save_model": True}
    states = []
    for seed, steps in ((1, 60), (1, 120), (1, 120), (2, 120)):
        name = f"run{len(states)}"
        main(Args(**SMALL | args | {"seed": seed, "total_timesteps": 120, "exp_name": name}
                  | ({"stop_return": -1.0} if steps == 60 else {})))  # fmt: skip
        (path,) = tmp_path.glob(f"runs/*{name}*/agent.pt")
        states.append(torch.load(path, weights_only=True))
    assert [state["global_step"] for state in states] == [60, 120, 120, 120]
    first, later, again, other = (state["q_net"]["weights.0"] for state in states)
    assert not torch.equal(first, later) and torch.equal(later, again) and not torch.equal(later, other)
    models = [state["env_model"]["net.weights.0"] for state in states]
    assert torch.equal(models[0], models[1]) == (planning != "model")


def test_sokoban_learns_on_planes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = main(Args(**SMALL | {"env_id": "Sokoban-v0", "total_timesteps": 100, "eval_frequency": 100}))
    assert np.isfinite(results[-1]["losses/model_loss"]).all() and results[-1]["charts/updates"] == 50 * 8


def test_the_model_learns_the_pole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = {"total_timesteps": 400, "eval_frequency": 400, "learning_starts": 100, "planning_steps": 0, "end_e": 1.0}
    rows = main(Args(**args | {"eval_episodes": 2, "model_updates": 3}))
    # 1 is a model without change; the untrained one is worse than that
    assert rows[-1]["model/delta_error"][0] < 0.25 and rows[-1]["model/reward_error"][0] < 0.1


# ---------------------------------------------------------------------------------------------- files and flags


def test_resume_and_evaluate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(Args(**SMALL | {"total_timesteps": 120, "eval_frequency": 40, "save_model": True, "planning_steps": 1}))
    (path,) = tmp_path.glob("runs/*/agent.pt")
    state = torch.load(path, weights_only=True)
    assert state["replay"].shape == (1, 120, 11) and len(state["rows"]) == 3
    assert main(Args(evaluate=str(path), eval_episodes=3))[0]["eval/return"][0] > 0
    assert "policy, 3 episodes" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has had all of its 120 steps"):
        main(Args(resume=str(path)))
    with pytest.raises(SystemExit, match=r"--batch-size: .* brings its own flags"):
        main(Args(resume=str(path), batch_size=7))
    with monkeypatch.context() as patch:  # a flag counts as given even if it says what is the default
        patch.setattr(sys, "argv", ["dyna_dqn.py", f"--resume={path}", "--gamma", "0.99", "--total-timesteps=9"])
        with pytest.raises(SystemExit, match=r"^--gamma: .* brings its own flags"):
            main(Args(resume=str(path)))
        patch.setattr(sys, "argv", ["dyna_dqn.py", "--total-timesteps", str(Args().total_timesteps), "--no-cuda"])
        assert dyna_dqn.resumed_args(Args(resume="x"), path).total_timesteps == Args().total_timesteps != 120
    # as if it had been stopped half way
    state["global_step"], state["rows"] = 80, state["rows"][:2]
    torch.save(state, path)
    rows = main(Args(resume=str(path)))
    assert [r["global_step"] for r in rows] == [120]
    lines = (path.parent / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["global_step", "40", "80", "120"]
    assert [r["global_step"] for r in main(Args(resume=str(path), total_timesteps=200))] == [160, 200]
    torch.save({"args": {"not_a_flag": 7}}, path)
    with pytest.raises(SystemExit, match=r"agent\.pt was written by another script"):
        main(Args(evaluate=str(path)))
    path.write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="can't read the checkpoint"):
        main(Args(resume=str(path)))


def test_video(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(Args(**SMALL | {"total_timesteps": 60, "capture_video": True}))
    (film,) = tmp_path.glob("videos/CartPole-v1__*/rl-video-episode-0.mp4")
    assert film.stat().st_size


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="lower the learning rate"):
        main(
            Args(**SMALL | {"total_timesteps": 200, "eval_frequency": 100, "learning_rate": 1e20, "planning_steps": 1})
        )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"planning_steps": -1}, "--planning-steps -1"),
        ({"env_id": "NoMaze-v0"}, "NoMaze"),
        ({"env_id": "Pendulum-v1"}, "action space.*Discrete"),
        ({"env_id": "FrozenLake-v1"}, "vectors.*dyna_q.py"),
        ({"gamma": 1.1}, "--gamma"),
        ({"imagination_depth": 3}, "--imagination-depth 3.*divide"),
        ({"imagination_depth": 2, "planning": "replay"}, "--planning model"),
        ({"batch_size": 0}, "--batch-size"),
        ({"hidden": (64, 0)}, "--hidden"),
        ({"model_learning_rate": -1.0}, "--model-learning-rate -1"),
        ({"env_id": "no_such_module:Pole-v0"}, "no_such_module"),
        ({"env_id": "Sokoban-v0", "num_boxes": 9}, "num_boxes=9"),
        ({"evaluate": "no_such_file.pt"}, "can't read the checkpoint no_such_file.pt"),
    ],
)
def test_bad_flags_are_one_clear_line(kwargs, message):
    with pytest.raises(SystemExit, match=message) as error:
        main(Args(**kwargs))
    assert "\n" not in str(error.value)


def test_epsilon_falls_and_cleanrl_settings_can_be_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    rows = main(Args(**SMALL | {"planning": "none", "total_timesteps": 200, "eval_frequency": 50, "start_e": 1.0,
                "end_e": 0.2, "exploration_fraction": 0.5, "train_frequency": 10, "tau": 1.0, "double": False,
                "target_network_frequency": 50}))  # fmt: skip
    assert [r["charts/epsilon"] for r in rows] == pytest.approx([0.6, 0.2, 0.2, 0.2])
    assert [r["charts/updates"] for r in rows] == [0, 5, 10, 15]
