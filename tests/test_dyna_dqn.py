"""dyna_dqn.py: losses and gradients by hand, imagination, the loop watched from inside, awkward environments."""

import copy
import itertools
import pathlib

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import rows_of, seeded

import dyna_dqn
from dyna_dqn import Args, DeltaModel, RunsMLP, delta_model_loss, dqn_loss, greedy_returns, imagine_rows, main

SMALL = {"hidden": (16,), "eval_episodes": 2, "learning_starts": 50, "batch_size": 16, "planning_steps": 2}


class RampEnv(gym.Env):
    """State (t / 10, episode / 100, real steps / 1000); action 4 adds to t what action 3 doesn't; ends after 7 steps.

    Awkward: it fills one array again, counts actions from 3, and pays arrays. As `kind` says it ends by truncation or
    never; the kind "uneven" ends when t reaches 7, and pays 1 a step.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), dtype=np.float32)
    action_space = gym.spaces.Discrete(2, start=3)

    def __init__(self, kind: str = "") -> None:
        self.kind, self.episode, self.steps, self.buffer = kind, 0, 0, np.zeros(3, dtype=np.float32)

    def _observe(self):
        self.buffer[:] = self.t / 10, self.episode / 100, self.steps / 1000
        return self.buffer

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.count = 0, 0
        self.episode += 1
        return self._observe(), {}

    def step(self, action):
        assert action in self.action_space and isinstance(action, int)
        self.t += action - 2
        self.count += 1
        self.steps += 1
        end, reward = self.count == 7 and self.kind != "endless", float(self.t == 1)
        if self.kind == "uneven":
            end, reward = self.t >= 7, 1.0
        truncates = self.kind == "truncated"
        return self._observe(), np.array([reward]), end and not truncates, end and truncates, {}


for kind in ("", "truncated", "endless", "uneven"):
    gym.register(f"TestRamp{kind}-v0", entry_point=RampEnv, kwargs={"kind": kind})


class TableNet(nn.Module):
    """Q-values that are rows of a table; the state (E, B, 1) is the row's number."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table))

    def forward(self, s):
        return self.table[s[..., 0].round().long()]


def row(s: list[float], s2: list[float], a: int, r: float, end: float) -> torch.Tensor:
    return torch.tensor([[[*s, *s2, float(a), r, end]]])


def test_dqn_targets_by_hand():
    online, target = TableNet([[1.0, 2.0], [5.0, 3.0]]), TableNet([[0.0, 0.0], [10.0, 20.0]])
    for end, double, expected in (
        (0.0, True, 0.5 + 0.9 * 10),  # the online network picks action 0 of state 1, the target network values it
        (0.0, False, 0.5 + 0.9 * 20),
        (1.0, True, 0.5),  # terminated
        (0.25, True, 0.5 + 0.9 * 0.75 * 10),  # a probability, as the model gives it
    ):
        loss, q = dqn_loss(online, target, row([0], [1], 1, 0.5, end), 0.9, double)
        assert loss.item() == pytest.approx((expected - 2.0) ** 2, rel=1e-6)
        assert q.item() == 2.0
    online.zero_grad()
    rows = torch.cat([row([0], [1], 1, 0.5, 0), row([0], [1], 1, 0.5, 0)], 1)  # the mean of two equal ones
    dqn_loss(online, target, rows, 0.9, True)[0].backward()
    np.testing.assert_allclose(online.table.grad, [[0, 2 * (2.0 - 9.5)], [0, 0]], rtol=1e-6)
    assert target.table.grad is None


def test_runs_are_separate_networks_that_start_like_torchs_own():
    torch.manual_seed(1)
    net, x = RunsMLP(2, [3, 5, 4]), torch.randn(2, 7, 3)
    for e in range(2):
        own = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4))
        for i, layer in enumerate((own[0], own[2])):
            layer.weight.data, layer.bias.data = net.weights[i][e].t(), net.biases[i][e, 0]
        torch.testing.assert_close(net(x)[e], own(x[e]))
    net(x)[1].sum().backward()
    assert all((p.grad[0] == 0).all() and (p.grad[1] != 0).any() for p in net.parameters())
    values = RunsMLP(50, [4, 120]).weights[0]
    assert values.abs().max() <= 0.5 and values.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.05)


def test_model_loss_by_hand(monkeypatch):
    monkeypatch.setattr(dyna_dqn, "MODEL_HIDDEN", ())
    model = DeltaModel(1, 1, 2)  # one linear layer on (s, one-hot a)
    with torch.no_grad():
        model.net.weights[0].zero_()
        model.net.biases[0].copy_(torch.tensor([5.0, 0.5]))  # Δs = 5 spreads, r = .5
        model.end_net.weights[0].fill_(np.log(3.0) / 4)  # at s' = 4: p(end) = 3/4
        model.end_net.biases[0].zero_()
    model.delta_std.fill_(3.0)
    loss = delta_model_loss(model, row([1], [4], 0, 1.0, 1.0))  # Δs = 3: one spread
    assert loss.item() == pytest.approx((5 - 1) ** 2 + 0.25 - np.log(0.75), rel=1e-6)


class ExactModel(DeltaModel):
    """Moves by +1 for action 1 and -1 for action 0, pays s, ends with probability 1/4."""

    def forward(self, s, a):
        return (a - 0.5)[..., None], s[..., 0]

    def end_logit(self, s2):
        return torch.full_like(s2[..., 0], -np.log(3.0))


def test_imagination_acts_by_q_and_explores_as_told():
    q_net = TableNet([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])  # from 1 down, from the others up
    model, rng = ExactModel(1, 1, 2), seeded()
    model.delta_std.fill_(2.0)
    rows = imagine_rows(q_net, model, torch.tensor([[[0.0], [1.0], [2.0]]]), 0.0, rng)
    np.testing.assert_allclose(rows[0], [[0, 1, 1, 0, 0.25], [1, 0, 0, 1, 0.25], [2, 3, 1, 2, 0.25]], rtol=1e-6)
    assert not rows.requires_grad
    for epsilon, share in ((0.5, 0.25), (1.0, 0.5)):
        rows = imagine_rows(q_net, model, torch.zeros(1, 4000, 1), epsilon, rng)
        assert (rows[0, :, 2] == 0).float().mean().item() == pytest.approx(share, abs=0.03)


def test_greedy_returns_are_those_of_each_run_and_its_first_episodes():
    net = RunsMLP(2, [3, 2])  # run 0 always takes action 1 and ends after 4 steps, run 1 action 0
    with torch.no_grad():
        net.weights[0].zero_()
        net.biases[0].copy_(torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]]))
    envs = dyna_dqn.make_feature_envs(Args(env_id="TestRampuneven-v0"), 6)
    assert greedy_returns(envs, net, torch.device("cpu"), seed=1).tolist() == [[4, 4, 4], [7, 7, 7]]


def run(**flags) -> tuple[dict, list[dict[str, float]]]:
    """A run's checkpoint and rows of metrics."""
    flags = SMALL | {"env_id": "TestRamp-v0", "total_timesteps": 80, "eval_frequency": 80} | flags
    main(Args(**flags))
    folder = max(pathlib.Path("runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return torch.load(folder / "checkpoint.pt", weights_only=True), rows_of(folder)


@pytest.fixture
def watched(monkeypatch):
    """watched["q"], watched["model"]: a record of every update, made by the loss that the loop calls."""
    seen: dict[str, list[dict]] = {"q": [], "model": [], "imagined": []}
    losses = {"q": dqn_loss, "model": delta_model_loss}

    def record(kind, net, rows, loss, **others):
        parameters = list(net.parameters())
        if seen[kind]:
            seen[kind][-1]["used"] = [p.grad.clone() for p in parameters]
        seen[kind].append({"rows": rows[0].clone(), "net": copy.deepcopy(net), **others,
                           "gradient": torch.autograd.grad(loss.sum(), parameters, retain_graph=True)})  # fmt: skip

    def q(q_net, target_net, rows, *others):
        result = losses["q"](q_net, target_net, rows, *others)
        record("q", q_net, rows, result[0], target=copy.deepcopy(target_net), others=others)
        return result

    def model(env_model, rows):
        result = losses["model"](env_model, rows)
        record("model", env_model, rows, result)
        return result

    def imagine(q_net, env_model, s, epsilon, rng):
        seen["imagined"].append((copy.deepcopy(q_net), s.clone(), epsilon))
        return imagine_rows(q_net, env_model, s, epsilon, rng)

    for name, function in (("dqn_loss", q), ("delta_model_loss", model), ("imagine_rows", imagine)):
        monkeypatch.setattr(dyna_dqn, name, function)
    return seen


def assert_used(record: dict) -> None:
    """The gradient that the optimizer used is that of the loss."""
    assert all(torch.equal(x, y) for x, y in zip(record["gradient"], record["used"], strict=True))


def same(net, other) -> bool:
    return all(torch.equal(x, y) for x, y in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["", "truncated"])
def test_no_row_crosses_a_reset_and_the_oldest_are_replaced(watched, kind):
    state, rows = run(env_id=f"TestRamp{kind}-v0", planning="replay", buffer_size=32)
    replay = state["replay"][0]
    assert (replay[:, 5] * 1000).round().tolist() == [65 + i if i < 16 else 33 + i for i in range(32)]  # steps
    for r in (replay, torch.cat([record["rows"] for record in watched["q"]])):
        assert (r[:, 1] > 0).all() and torch.equal(r[:, 1], r[:, 4])  # within one episode, never an empty row
        torch.testing.assert_close(r[:, 3] - r[:, 0], (1 + r[:, 6]) / 10)  # no teleport to t = 0
        assert torch.equal(r[:, 7], (r[:, 3] * 10).round().eq(1).float())
        last = (r[:, 5] * 1000).round() % 7 == 0
        assert torch.equal(r[:, 8], last.float() * (kind != "truncated"))  # a truncation is no `end`
    assert rows[0]["charts/episodic_length"] == 7
    assert rows[0]["charts/episodic_return"] == pytest.approx(0.5, abs=0.35)


def test_q_acts_and_learns_from_its_own_batches(watched):
    state, _ = run(planning="replay", start_e=0.0, end_e=0.0, learning_rate=0.01, gamma=0.9, double=False, seed=7)
    records, replay = watched["q"], state["replay"][0]
    assert len(records) == 30 * 3 and all(len(r["rows"]) == 16 for r in records)  # 80 steps, the first 50 without
    assert all(r["others"] == (0.9, False) for r in records)
    rng = seeded(7)
    assert torch.equal(records[0]["rows"], replay[torch.randint(51, (1, 16), generator=rng)[0]])
    for r in records[:-1]:
        assert_used(r)
    moved = (records[1]["net"].weights[0] - records[0]["net"].weights[0]).abs().max()
    assert moved.item() == pytest.approx(0.01, rel=1e-3)  # Adam's first step is the learning rate
    assert not any(torch.equal(a["rows"], b["rows"]) for a, b in itertools.pairwise(records))
    assert max(float(r["rows"][:, 5].max()) for r in records) > 0.078  # the newest are in
    for i in range(1, 30):  # the network before the updates of step 51 + i acted at that step
        assert records[3 * i]["net"](replay[None, None, 50 + i, :3]).argmax() == replay[50 + i, 6]


@pytest.mark.parametrize("every", [1, 3])
def test_the_target_network_follows(watched, every):
    run(planning="none", tau=0.25, target_network_frequency=every)
    records, target = watched["q"], watched["q"][0]["net"]
    assert len(records) == 30
    assert same(records[0]["target"], target)  # starts as a copy of Q
    for i in range(29):
        after = records[i + 1]["net"]  # Q after the update of step 51 + i
        expected = [
            p + 0.25 * (q - p) if (51 + i) % every == 0 else p
            for p, q in zip(records[i]["target"].parameters(), after.parameters(), strict=True)
        ]
        for x, y in zip(records[i + 1]["target"].parameters(), expected, strict=True):
            torch.testing.assert_close(x, y)


def test_imagined_batches_start_from_real_states_with_the_q_of_the_step(watched):
    run(planning="model", planning_steps=3)
    assert len(watched["q"]) == 30 * 4 and len(watched["imagined"]) == 30 and len(watched["model"]) == 60
    for i, (q_net, s, epsilon) in enumerate(watched["imagined"]):
        records = watched["q"][4 * i : 4 * i + 4]
        assert epsilon == 0.5 and s.shape == (1, 48, 3) and same(q_net, records[0]["net"])
        assert torch.equal(torch.cat([r["rows"][:, :3] for r in records[1:]]), s[0])
        assert (s[0, :, 1] > 0).all() and torch.equal(s, (s * 1000).round() / 1000)
    ends = torch.cat([r["rows"][:, 8] for i, r in enumerate(watched["q"]) if i % 4])
    assert ((ends > 0) & (ends < 1)).all()  # a probability


def test_the_model_learns_from_real_rows_in_their_own_units(watched):
    state, rows = run(planning="model", total_timesteps=101, eval_frequency=101)
    records = watched["model"]
    for r in records[:-1]:
        assert_used(r)
        assert len(r["rows"]) == 128 and ((r["rows"][:, 8] == 0) | (r["rows"][:, 8] == 1)).all()
    moved = (records[1]["net"].net.weights[0] - records[0]["net"].net.weights[0]).abs().max()
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)
    for net, size in ((records[0]["net"], 51), (records[-1]["net"], 100)):  # at the first update, and at step 100
        known = state["replay"][:, :size]
        torch.testing.assert_close(net.net.mean[..., :3], known[..., :3].mean(1, keepdim=True))
        spread = (known[..., 3:6] - known[..., :3]).std(1)
        torch.testing.assert_close(net.delta_std[:, 0], torch.where(spread > 1e-6, spread, 1.0))  # constants stay
    for r in (watched["q"][0], watched["q"][-1]):
        assert torch.equal(r["net"].std, r["target"].std) and not (r["net"].std == 1).all()
    assert 0 < rows[-1]["losses/model_loss"] < 20


def test_metrics_are_means_since_the_last_row(monkeypatch, watch):
    calls, seen = [], watch(dyna_dqn, "dqn_loss")

    def returns(envs, net, device, seed):
        calls.append((envs.num_envs, seed, net))
        return np.full((1, 2), float(len(calls)))

    monkeypatch.setattr(dyna_dqn, "greedy_returns", returns)
    flags = {"planning": "none", "total_timesteps": 200, "eval_frequency": 50, "start_e": 1.0, "end_e": 0.2,
             "exploration_steps": 100, "train_frequency": 10, "seed": 5}  # fmt: skip
    state, rows = run(**flags)
    assert [r["charts/epsilon"] for r in rows] == pytest.approx([0.6, 0.2, 0.2, 0.2])
    assert [r["charts/updates"] for r in rows] == [0, 5, 10, 15]
    assert [r["eval/return"] for r in rows] == [1, 2, 3, 4] and {c[:2] for c in calls} == {(2, 10_005)}
    assert same(calls[0][2], _network(state, "q_net"))
    for i, r in enumerate(rows[1:]):
        loss, q = zip(*(result for _, result in seen[5 * i : 5 * i + 5]), strict=True)
        assert r["losses/td_loss"] == pytest.approx(torch.stack(loss).mean().item(), rel=1e-5)
        assert r["losses/q_values"] == pytest.approx(torch.stack(q).mean().item(), rel=1e-4)
    returns = state["replay"][0, :196, 7].view(28, 7).sum(1)  # of each episode
    for i, r in enumerate(rows):
        ended = [returns[j].item() for j in range(28) if 50 * i < 7 * (j + 1) <= 50 * (i + 1)]
        assert r["charts/episodic_return"] == pytest.approx(np.mean(ended)) and r["charts/episodic_length"] == 7
    _, rows = run(**flags, stop_return=2.0, exp_name="stops")
    assert [r["global_step"] for r in rows] == [50]


def _network(state: dict, name: str) -> RunsMLP:
    net = RunsMLP(1, [3, 16, 2])
    net.load_state_dict({k.removeprefix(f"{name}."): x for k, x in state["networks"].items() if k.startswith(name)})
    return net


def test_lockstep_runs_learn_apart_and_a_seed_reproduces():
    flags = {"num_seeds": 2, "total_timesteps": 60, "eval_frequency": 60, "seed": 4, "env_id": "CartPole-v1"}
    state, rows = run(**flags, exp_name="a")
    again, _ = run(**flags, exp_name="b")
    other, _ = run(**flags | {"seed": 5}, exp_name="c")
    weights = [x["networks"]["q_net.weights.0"] for x in (state, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0][0], weights[0][1]) and not torch.equal(*state["replay"])
    assert rows[-1]["eval/return"] == pytest.approx((rows[-1]["eval/return_4"] + rows[-1]["eval/return_5"]) / 2)
    # half of the random actions are the greedy one
    state, _ = run(start_e=0.4, end_e=0.4, learning_starts=400, total_timesteps=400, eval_frequency=400)
    rows = state["replay"][0]
    strayed = _network(state, "q_net")(rows[None, :, :3])[0].argmax(-1) != rows[:, 6]
    assert strayed.float().mean().item() == pytest.approx(0.2, abs=0.06)


def test_sokoban_is_planes():
    state, _ = run(env_id="Sokoban-v0", total_timesteps=55, eval_frequency=55)
    planes = state["replay"][0, :, :100].unflatten(1, (4, 5, 5))
    assert torch.equal(planes[:, 3].sum((1, 2)), torch.ones(55)) and planes[0, 0, 0].eq(1).all()  # one player; walls


def test_resume_and_evaluate(watched, capsys):
    state, _ = run(total_timesteps=60, eval_frequency=60, planning="none")
    (path,) = pathlib.Path("runs").glob("*/checkpoint.pt")
    main(dyna_dqn.parse_args(["--evaluate", str(path.with_name("agent.pt")), "--eval-episodes", "3"]))
    assert "policy, 3 episodes: return" in capsys.readouterr().out
    for words, message in (
        (["--resume", str(path)], "has had all of its 60 steps"),
        (["--resume", str(path), "--hidden", "3", "--total-timesteps", "99"], "other parts or sizes"),
        (["--resume", str(path), "--buffer-size", "70", "--total-timesteps", "99"], "--buffer-size"),
        (["--resume", str(path.with_name("agent.pt")), "--total-timesteps", "99"], "takes a checkpoint.pt"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(dyna_dqn.parse_args(words))
    watched["q"].clear()
    flags = dyna_dqn.parse_args(["--resume", str(path), "--total-timesteps", "120", "--eval-frequency", "120"])
    main(flags)
    first, later = watched["q"][0], torch.load(path, weights_only=True)
    assert same(first["net"], _network(state, "q_net")) and same(first["target"], _network(state, "target_net"))
    assert torch.equal(later["replay"][:, :60], state["replay"]) and later["replay"].shape[1] == 120
    assert later["updates"] == 70 == later["optimizer"]["state"][0]["step"]
    rng = torch.Generator()
    rng.set_state(state["rng"])  # goes on with the random numbers, too
    assert torch.equal(first["rows"], later["replay"][0, torch.randint(61, (1, 16), generator=rng)[0]])
    rows = rows_of(path.parent)
    assert [r["global_step"] for r in rows] == [60, 120]
    assert [r["charts/epsilon"] for r in rows] == pytest.approx([0.943, 0.886])  # goes on where it was


def test_an_evaluation_without_end_is_cut(monkeypatch, capsys):
    monkeypatch.setattr(dyna_dqn, "MOST_STEPS", 30)
    run(env_id="TestRampendless-v0", planning="none", save_model=False)
    assert "2 evaluated episodes were cut after 30 steps" in capsys.readouterr().out
    assert not list(pathlib.Path("runs").glob("*/agent.pt"))


def test_video():
    run(env_id="CartPole-v1", total_timesteps=30, eval_frequency=30, capture_video=True, num_seeds=2, planning="none")
    (film,) = pathlib.Path("videos").glob("CartPole-v1__*/rl-video-episode-0.mp4")
    assert film.stat().st_size
