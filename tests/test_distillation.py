"""distillation.py: losses against closed forms and finite differences, whose states, buffers, stages, files, flags."""

import itertools
import math
import pathlib

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn

import distillation
from distillation import (
    Args,
    PolicyNet,
    StateBuffer,
    Task,
    acting_parameters,
    corrected_loss,
    cross_entropies,
    distillation_losses,
    double_q_loss,
    main,
    play_episodes,
    student_widths,
    true_next_values,
    visited_states,
)

CPU = torch.device("cpu")
SMALL = {
    "env_ids": ("CartPole-v1",), "teacher_timesteps": 1024, "num_envs": 4, "buffer_size": 400, "distill_steps": 30,
    "eval_episodes": 4, "log_frequency": 10, "learning_starts": 64, "student_scale": (0.25,), "dqn_updates": 1,
}  # fmt: skip


class RampEnv(gym.Env):
    """State (t, episode), both scaled. Ends by itself, or is truncated, after 5 steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), dtype=np.float32)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, truncates: bool = False, render_mode: str | None = None) -> None:
        self.truncates, self.episode = truncates, 0

    def _observe(self):
        return np.array([self.t / 10, self.episode / 100], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.episode = (self.episode + 1) % 3
        return self._observe(), {}

    def step(self, action):
        self.t += 1
        end = self.t == 5
        return self._observe(), float(action), end and not self.truncates, end and self.truncates, {}


gym.register("DistilRamp-v0", entry_point=RampEnv)
gym.register("DistilRampTruncated-v0", entry_point=RampEnv, kwargs={"truncates": True})


def outputs(*probabilities: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits (1, A) of these probabilities, off by a constant, as logits may be."""
    return torch.tensor([probabilities], dtype=dtype).log() + 3.0


# ---------------------------------------------------------------------------------------------------------- the losses


def test_both_divergences_against_their_closed_forms():
    # two actions: D_KL = p log(p/q) + (1-p) log((1-p)/(1-q))
    p, q = 0.9, 0.3
    teacher, student = outputs(p, 1 - p), outputs(q, 1 - q)
    forward = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    reverse = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    assert forward != pytest.approx(reverse, rel=0.1)
    for direction, expected in (("forward", forward), ("reverse", reverse)):
        loss = distillation_losses(student, teacher, "kl", direction, 1.0)
        assert loss.shape == (1,) and loss.item() == pytest.approx(expected, rel=1e-5)
        assert distillation_losses(teacher + 7, teacher, "kl", direction, 1.0).item() == pytest.approx(0, abs=1e-6)


def test_divergences_agree_with_torchs_own():
    torch.manual_seed(1)
    a, b = torch.randn(50, 6), torch.randn(50, 6)
    pi, pi_hat = (torch.distributions.Categorical(logits=x) for x in (b / 0.5, a))
    for direction, pair in (("forward", (pi, pi_hat)), ("reverse", (pi_hat, pi))):
        expected = torch.distributions.kl_divergence(*pair)
        torch.testing.assert_close(distillation_losses(a, b, "kl", direction, 0.5), expected, rtol=1e-4, atol=1e-5)


def test_nll_and_mse_by_hand():
    student, teacher = torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([[2.0, 1.0, 1.5]])
    nll = distillation_losses(student, teacher, "nll", "forward", 0.01)
    assert nll.item() == pytest.approx(math.log(math.exp(1) + math.exp(3) + 1) - 1, rel=1e-6)  # of action 0
    mse = distillation_losses(student, teacher, "mse", "forward", 0.01)
    assert mse.item() == pytest.approx(1 + 4 + 2.25, rel=1e-6)


def test_the_temperature_is_the_teachers_only():
    teacher, student = torch.tensor([[0.02, 0.0]]), torch.tensor([[2.0, 0.0]])
    for direction in ("forward", "reverse"):  # 0.02 / 0.01 = 2: the same policy
        assert distillation_losses(student, teacher, "kl", direction, 0.01).item() == pytest.approx(0, abs=1e-6)
        assert cross_entropies(student, teacher, direction, 0.01).item() == pytest.approx(
            cross_entropies(student, student, direction, 1.0).item(), rel=1e-5
        )
    # NLL and MSE know no temperature
    for loss in ("nll", "mse"):
        losses = [distillation_losses(student, teacher, loss, "forward", t).item() for t in (0.01, 1.0)]
        assert losses[0] == losses[1]


def test_nll_is_the_limit_of_a_cold_teacher():
    torch.manual_seed(1)
    student, teacher = torch.randn(20, 4), torch.randn(20, 4)
    cold = distillation_losses(student, teacher, "kl", "forward", 1e-3)
    torch.testing.assert_close(cold, distillation_losses(student, teacher, "nll", "forward", 1.0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", ["kl forward", "kl reverse", "nll", "mse", "ce forward", "ce reverse"])
def test_gradients_match_finite_differences_and_the_teacher_has_none(loss):
    torch.manual_seed(1)
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    name, _, direction = loss.partition(" ")

    def value(x):
        if name == "ce":
            return cross_entropies(x, teacher, direction, 0.7).mean()
        return distillation_losses(x, teacher, name, direction, 0.7).mean()

    value(student).backward()
    assert teacher.grad is None
    for i, j in itertools.product(range(3), range(4)):
        step = torch.zeros_like(student)
        step[i, j] = 1e-6
        with torch.no_grad():
            slope = (value(student + step) - value(student - step)) / 2e-6
        assert slope.item() == pytest.approx(student.grad[i, j].item(), rel=1e-5, abs=1e-8)


def test_a_step_against_the_gradient_lowers_the_loss():
    torch.manual_seed(1)
    teacher = torch.randn(64, 5)
    for loss, direction in (("kl", "forward"), ("kl", "reverse"), ("nll", "forward"), ("mse", "forward")):
        student = torch.zeros(64, 5, requires_grad=True)
        before = distillation_losses(student, teacher, loss, direction, 1.0).mean()
        before.backward()
        after = distillation_losses(student - 0.5 * student.grad, teacher, loss, direction, 1.0).mean()
        assert after < before  # a loss of the wrong sign rises


def test_a_loss_does_not_grow_with_the_batch():
    torch.manual_seed(1)
    student, teacher = torch.randn(8, 4), torch.randn(8, 4)
    for loss, direction in (("kl", "forward"), ("kl", "reverse"), ("nll", "forward"), ("mse", "forward")):
        one = distillation_losses(student, teacher, loss, direction, 1.0)
        many = distillation_losses(student.repeat(5, 1), teacher.repeat(5, 1), loss, direction, 1.0)
        assert one.shape == (8,) and many.mean().item() == pytest.approx(one.mean().item(), rel=1e-6)


def fit_gaussian(direction: str) -> tuple[float, float]:
    """The discretised normal distribution nearest to a teacher with modes at -6 and 6: its mean and deviation."""
    points = torch.linspace(-30, 30, 241)
    modes = torch.stack([math.log(0.45) - (points + 6) ** 2 / 2, math.log(0.55) - (points - 6) ** 2 / 2])
    teacher = modes.logsumexp(0)[None]
    mean, log_std = torch.tensor(0.5, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_std], 0.05)
    for _ in range(800):
        student = -((points - mean) ** 2) / (2 * log_std.exp() ** 2)
        loss = distillation_losses(student[None], teacher, "kl", direction, 1.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return mean.item(), log_std.exp().item()


def test_a_bimodal_teacher_separates_the_directions():
    mean, std = fit_gaussian("forward")  # covers: matches the mean and the variance, 36 - .6² + 1
    assert mean == pytest.approx(0.6, abs=0.1) and std == pytest.approx((36 - 0.36 + 1) ** 0.5, rel=0.1)
    mean, std = fit_gaussian("reverse")  # seeks a mode
    assert abs(mean) == pytest.approx(6.0, abs=0.1) and std == pytest.approx(1.0, abs=0.1)


# ------------------------------------------------------------------- the student's own states: theorem 2 on a small MDP

NEXT = torch.tensor([[1, 2], [2, 0], [0, 1]])  # s' = NEXT[s, a]; three states, two actions, episodes of 3 steps
TEACHER = torch.tensor([[1.0, -0.5], [-1.0, 0.3], [0.2, 0.9]], dtype=torch.float64)


def trajectories(theta: torch.Tensor):
    """Every action sequence of an episode from state 0: states (3,), actions (3,), its probability."""
    for actions in itertools.product(range(2), repeat=3):
        states, s = [], 0
        for a in actions:
            states.append(s)
            s = int(NEXT[s, a])
        log_pi = theta.log_softmax(-1)
        yield states, actions, sum(log_pi[s, a] for s, a in zip(states, actions, strict=True)).exp()


def objective(theta: torch.Tensor, loss) -> torch.Tensor:
    """E_π̂[Σ_t ℓ(s_t)], exactly."""
    return sum(p * loss(theta[states], TEACHER[states]).sum() for states, _, p in trajectories(theta))


def expected_update(theta: torch.Tensor, loss, corrected: bool) -> torch.Tensor:
    """The mean gradient of what the script minimises, over the student's trajectories; three steps, so times 3."""
    total = torch.zeros_like(theta)
    ends = torch.tensor([[False], [False], [True]])
    zeros = torch.zeros(3, 1, dtype=torch.float64)
    for states, actions, p in trajectories(theta):
        leaf = theta.detach().clone().requires_grad_()
        logits = leaf[states][:, None]  # (T, 1, A)
        losses = loss(logits, TEACHER[states][:, None])
        value = losses.mean()
        if corrected:
            value, _ = corrected_loss(losses, logits, zeros, zeros, torch.tensor(actions)[:, None], ends, ends, 1.0)
        value.backward()
        total += 3 * p.detach() * leaf.grad
    return total


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_correction_makes_the_update_a_gradient(direction):
    theta = torch.tensor([[0.3, -0.2], [0.8, 0.1], [-0.4, 0.5]], dtype=torch.float64)

    def loss(student, teacher):
        return cross_entropies(student, teacher, direction, 1.0)

    slopes = torch.zeros_like(theta)
    for i, j in itertools.product(range(3), range(2)):
        step = torch.zeros_like(theta)
        step[i, j] = 1e-5
        slopes[i, j] = (objective(theta + step, loss) - objective(theta - step, loss)) / 2e-5
    torch.testing.assert_close(expected_update(theta, loss, corrected=True), slopes, rtol=1e-6, atol=1e-8)
    assert (expected_update(theta, loss, corrected=False) - slopes).abs().max() > 0.02


def test_without_the_correction_the_update_has_no_potential():
    """Its Jacobian isn't symmetric, the corrected one's is."""
    theta = torch.tensor([[0.3, -0.2], [0.8, 0.1], [-0.4, 0.5]], dtype=torch.float64)

    def loss(student, teacher):
        return cross_entropies(student, teacher, "forward", 1.0)

    for corrected in (False, True):
        columns = []
        for k in range(6):
            step = torch.zeros(6, dtype=torch.float64)
            step[k] = 1e-5
            updates = [expected_update(theta + sign * step.view(3, 2), loss, corrected) for sign in (1, -1)]
            columns.append((updates[0] - updates[1]).flatten() / 2e-5)
        jacobian = torch.stack(columns, 1)
        asymmetry = (jacobian - jacobian.T).abs().max().item()
        assert (asymmetry < 1e-6) == corrected and (corrected or asymmetry > 0.01)


def test_the_critic_of_the_correction_learns_the_discounted_losses():
    losses, values = torch.tensor([[1.0], [2.0], [4.0]]), torch.zeros(3, 1)
    done, no = torch.tensor([[False], [True], [False]]), torch.zeros(3, 1, dtype=torch.bool)
    next_values = torch.tensor([[0.0], [-10.0], [-20.0]])
    actions, logits = torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1, 2)
    for terminated, expected in ((done, [-2.0, -2.0, -14.0]), (no, [-4.5, -7.0, -14.0])):  # γ = 1/2; truncated: -2 - 5
        _, value_loss = corrected_loss(losses, logits, values, next_values, actions, terminated, done, 0.5)
        assert value_loss.item() == pytest.approx(np.square(expected).mean())


# ---------------------------------------------------------------------------------------------- buffers and the teacher


def test_the_buffer_is_drawn_from_uniformly():
    buffer = StateBuffer(torch.arange(50), torch.arange(50) * 2.0)
    states, out = buffer.draw(50_000, torch.Generator().manual_seed(1))
    assert torch.equal(out, states * 2.0)
    counts = torch.bincount(states, minlength=50).double()
    chi_square = ((counts - 1000) ** 2 / 1000).sum().item()
    assert 25 < chi_square < 85  # 49 degrees of freedom: .3 % and 99.9 %


@pytest.mark.parametrize("env_id", ["DistilRamp-v0", "DistilRampTruncated-v0"])
def test_a_step_gives_the_true_next_state(env_id):
    task = Task(Args(), env_id, 3, CPU)
    x = task.reset(1)
    for t in range(1, 12):
        following, reward, terminated, truncated, true_next = task.step(torch.tensor([0, 1, 2]))
        assert reward.tolist() == [0, 1, 2]
        torch.testing.assert_close(true_next[:, 0], x[:, 0] + 0.1)
        assert torch.equal(true_next[:, 1], x[:, 1])  # of the same episode
        ends, by_itself = t % 5 == 0, "Truncated" not in env_id
        assert terminated.all().item() == (ends and by_itself) and truncated.all().item() == (ends and not by_itself)
        assert (following[:, 0] == 0).all() if ends else torch.equal(following, true_next)
        x = following


def test_sokobans_true_next_state_is_the_solved_board():
    task = Task(Args(size=5), "Sokoban-v0", 1, CPU, levels=["#####\n#@$.#\n#####"])
    task.reset(1, options={"levels": ["#####\n#@$.#\n#####"]})
    following, reward, terminated, truncated, true_next = task.step(torch.tensor([4]))
    assert terminated.item() and not truncated.item() and reward.item() == pytest.approx(10.9)
    assert (true_next == 4).any() and (following == 3).any()  # a box on its target; a box off it


def test_the_teachers_states_are_its_own():
    task = Task(Args(), "DistilRamp-v0", 4, CPU)

    def teacher(x):
        return torch.stack([x[:, 0] * 0, x[:, 0] * 0 + 1, x[:, 0] * 0], 1)

    seen, step = [], task.step
    task.step = lambda action: seen.append(action) or step(action)
    for epsilon, share in ((0.0, 0.0), (0.3, 0.2)):
        seen.clear()
        states = visited_states(task, teacher, 4000, epsilon, True, 1, torch.Generator().manual_seed(1))
        assert states.shape == (4000, 2) and set(states[:, 0].mul(10).round().int().tolist()) == set(range(5))
        assert (torch.cat(seen) != 1).float().mean().item() == pytest.approx(share, abs=0.02)


class TableNet(nn.Module):
    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table))

    def forward(self, x):
        return self.table[x[:, 0].long()]


def test_values_of_true_next_states():
    torch.manual_seed(1)
    net = PolicyNet([(2,)], [2], (8,), critic=True)
    states, last, final = torch.randn(3, 2, 2), torch.randn(2, 2), torch.randn(2)
    truncated = torch.tensor([[False, False], [True, False], [False, False]])
    true_next = torch.cat([states[1:], last[None]])
    true_next[1, 0] = final  # the state after it belongs to the next episode
    values = net.with_value(states.flatten(0, 1))[1].view(3, 2)
    result = true_next_values(net, 0, values, last, true_next, truncated)
    torch.testing.assert_close(result, net.with_value(true_next.flatten(0, 1))[1].view(3, 2).detach())
    assert not result.requires_grad


def test_double_dqn_targets_by_hand():
    online, target = TableNet([[1.0, 2.0], [5.0, 3.0]]), TableNet([[0.0, 0.0], [10.0, 20.0]])
    for end, expected in ((False, 0.5 + 0.9 * 10), (True, 0.5)):
        rows = (
            torch.tensor([[0.0]]),
            torch.tensor([1]),
            torch.tensor([0.5]),
            torch.tensor([end]),
            torch.tensor([[1.0]]),
        )
        loss, q = double_q_loss(online, target, rows, 0.9)
        assert loss.item() == pytest.approx((expected - 2.0) ** 2, rel=1e-6) and q.item() == 2.0
    loss.backward()
    np.testing.assert_allclose(online.table.grad, [[0, 3.0], [0, 0]], rtol=1e-6)
    assert target.table.grad is None


def test_an_evaluation_plays_each_episode_once(tmp_path):
    args = Args(eval_episodes=3)

    def policy(x):  # action 2 pays 2 a step
        return torch.tensor([[0.0, 0.0, 1.0]]).expand(len(x), 3)

    result = play_episodes(args, "DistilRamp-v0", policy, True, CPU)
    assert result == {"return": 10.0, "error": 0.0, "terminated": 1.0}
    assert play_episodes(args, "DistilRampTruncated-v0", policy, True, CPU)["terminated"] == 0.0
    random = play_episodes(Args(eval_episodes=400), "DistilRamp-v0", None, True, CPU)
    assert random["return"] == pytest.approx(5.0, abs=0.4)  # also where Q-values are acted on greedily
    film = tmp_path / "film.gif"
    levels = Args(size=5, eval_episodes=2, max_episode_steps=10, capture_video=True)
    play_episodes(levels, "Sokoban-v0", None, False, CPU, film)
    assert film.read_bytes().startswith(b"GIF") and not list(tmp_path.glob("*.tmp"))


# ------------------------------------------------------------------------------------------------------------ networks


def test_students_have_the_size_that_was_asked_for():
    for shapes, actions, total in (([(7, 7)], [5], 413_381), ([(4,)], [2], 4610), ([(4,), (7, 7)], [2, 5], 400_000)):
        for scale in (0.25, 0.07, 0.04):
            widths = student_widths(shapes, actions, int(scale * total))
            size = acting_parameters(PolicyNet(shapes, actions, widths, critic=False))
            assert 0.9 * scale * total < size <= scale * total
    with pytest.raises(SystemExit, match="--student-scale"):
        student_widths([(4,)], [2], 5)


def test_tasks_share_the_trunk_and_nothing_else():
    torch.manual_seed(1)
    net = PolicyNet([(4,), (6,), (7, 7)], [2, 3, 5], (16, 16), critic=False)
    assert net.width == 196
    net.standardize(torch.randn(100, 6) * 5 + 2, task=1)
    assert (net.std[0] == 1).all() and (net.std[1, 6:] == 1).all() and (net.mean[1, 6:] == 0).all()
    inputs = (torch.randn(3, 4), torch.randn(3, 6), torch.randint(0, 7, (3, 7, 7), dtype=torch.uint8))
    for task, x in enumerate(inputs):
        net.zero_grad()
        out = net(x, task)
        assert out.shape == (3, (2, 3, 5)[task])
        out.square().sum().backward()
        assert [head.weight.grad is not None for head in net.heads] == [i == task for i in range(3)]
        assert net.trunk[0].weight.grad.abs().sum() > 0


def test_a_critic_apart_moves_its_head_only():
    net = distillation.PolicyNet([(7, 7)], [5], (4, 4, 8), critic=True)
    boards = torch.randint(7, (6, 7, 7), dtype=torch.uint8)
    for apart in (True, False):
        net.zero_grad()
        net.with_value(boards, apart=apart)[1].sum().backward()
        assert (net.trunk[0].weight.grad is None or not net.trunk[0].weight.grad.any()) == apart
        assert net.critics[0].weight.grad.any()


def test_counting_leaves_the_critic_out():
    with_critic, without = (PolicyNet([(4,)], [2], (8, 8), critic) for critic in (True, False))
    assert acting_parameters(with_critic) == acting_parameters(without) == 4 * 8 + 8 + 8 * 8 + 8 + 8 * 2 + 2


# -------------------------------------------------------------------------------------------------- whole runs, watched


def saved(folder: pathlib.Path) -> dict:
    (path,) = folder.glob("runs/*/agent.pt")
    return torch.load(path, weights_only=True) | {"path": path}


def test_the_student_is_trained_and_the_teacher_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(Args(**SMALL))
    before = saved(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    rows = main(
        Args(**SMALL | {"teacher_path": (str(before["path"]),), "distill_steps": 60, "student_scale": (0.25, 0.1)})
    )
    after = saved(other)
    for name, weights in before["teachers"]["CartPole-v1"]["network"].items():
        assert torch.equal(weights, after["teachers"]["CartPole-v1"]["network"][name])  # the right optimiser stepped
    for name, weights in before["students"]["0.25"]["network"].items():
        same = torch.equal(weights, after["students"]["0.25"]["network"][name])
        assert same == (name in ("mean", "std"))
    assert [row["scale"] for row in rows] == [0.25, 0.1]
    lines = (after["path"].parent / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("losses/distillation")
    losses = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    assert losses[5] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"teacher": "dqn", "loss": "mse"},
        {"states": "student", "kl_direction": "reverse", "correction": True},
        {"env_ids": ("Sokoban-v0",), "size": 5, "student_scale": (0.04,)},
    ],
)
def test_a_seed_reproduces_the_run(tmp_path, monkeypatch, kwargs):
    results = []
    for i, seed in enumerate((1, 1, 2)):
        folder = tmp_path / str(i)
        folder.mkdir()
        monkeypatch.chdir(folder)
        main(Args(**SMALL | {"teacher_timesteps": 512, "seed": seed} | kwargs))
        state = saved(folder)
        networks = [entry["network"] for kind in ("teachers", "students") for entry in state[kind].values()]
        results.append([x for network in networks for x in network.values()])
    same = [[torch.equal(x, y) for x, y in zip(results[0], other, strict=True)] for other in results[1:]]
    assert all(same[0]) and not all(same[1])


def test_the_loss_of_the_loop_is_a_mean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(Args(**SMALL | {"distill_steps": 1, "save_model": True}))
    (path,) = tmp_path.glob("runs/*/agent.pt")
    losses = []
    for batch_size in (32, 512):
        flags = {"teacher_path": (str(path),), "distill_steps": 1, "batch_size": batch_size, "save_model": False}
        main(Args(**SMALL | flags | {"exp_name": f"of{batch_size}"}))
        (folder,) = tmp_path.glob(f"runs/*of{batch_size}*")
        header, *rows = (folder / "metrics.csv").read_text().splitlines()
        column = header.split(",").index("losses/distillation")
        losses.append(next(float(row.split(",")[column]) for row in rows if row.split(",")[column]))
    assert losses[0] == pytest.approx(losses[1], rel=0.5) and losses[0] > 0


def test_three_tasks_in_one_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env_ids = ("CartPole-v1", "Acrobot-v1", "Sokoban-v0")
    drawn, draw = [], StateBuffer.draw
    monkeypatch.setattr(
        StateBuffer, "draw", lambda self, n, rng: drawn.append(self.states.shape[1:]) or draw(self, n, rng)
    )
    rows = main(Args(**SMALL | {"env_ids": env_ids, "teacher_timesteps": 256}))
    assert [row["env_id"] for row in rows] == list(env_ids)
    assert drawn == [(4,), (6,), (7, 7)] * 30  # each task's buffer in every update
    state = saved(tmp_path)
    assert [tuple(state["students"]["0.25"]["network"][f"heads.{i}.bias"].shape) for i in range(3)] == [
        (2,),
        (3,),
        (5,),
    ]
    assert rows[0]["teacher_parameters"] == 4610 + 4803 + 413_381


@pytest.mark.parametrize("correction", [False, True])
def test_students_act_on_their_own_outputs_and_visit_their_own_states(tmp_path, monkeypatch, correction):
    monkeypatch.chdir(tmp_path)
    acted_on, updates, sample = [], [], distillation.sample
    monkeypatch.setattr(distillation, "sample", lambda logits, rng: acted_on.append(logits) or sample(logits, rng))
    name = "cross_entropies" if correction else "distillation_losses"
    losses = getattr(distillation, name)

    def watch(student, teacher, *rest):
        updates.append((student.detach(), torch.stack(acted_on[-8:])))
        return losses(student, teacher, *rest)

    monkeypatch.setattr(distillation, name, watch)
    monkeypatch.delattr(StateBuffer, "draw")
    args = {"env_ids": ("DistilRamp-v0",), "teacher_timesteps": 320, "distill_steps": 12, "states": "student"}
    main(Args(**SMALL | args | {"correction": correction}))
    assert len(updates) == 12 and all(torch.equal(*pair) for pair in updates)  # (T, B, A)


@pytest.mark.parametrize("teacher", ["actor-critic", "dqn"])
def test_teachers_learn(tmp_path, monkeypatch, teacher):
    """Action 2 pays most: 10 an episode, random play gets 5."""
    monkeypatch.chdir(tmp_path)
    steps = {"actor-critic": 4_000, "dqn": 800}[teacher]
    (row,) = main(Args(**SMALL | {"env_ids": ("DistilRamp-v0",), "teacher": teacher, "teacher_timesteps": steps,
                           "learning_rate": 3e-3, "reward_scale": 0.2, "ent_coef": 0.02, "gamma": 0.5}))  # fmt: skip
    assert row["teacher"] > 9 and 3 < row["random"] < 7


def test_the_replay_holds_true_transitions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for env_id in ("DistilRamp-v0", "DistilRampTruncated-v0"):
        seen, loss = [], double_q_loss

        def watch(net, target_net, rows, gamma, seen=seen, loss=loss):
            seen.append(rows)
            return loss(net, target_net, rows, gamma)

        monkeypatch.setattr(distillation, "double_q_loss", watch)
        main(Args(**SMALL | {"env_ids": (env_id,), "teacher": "dqn", "teacher_timesteps": 400, "replay_size": 200}))
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        x, action, reward, end, following = (torch.cat(column) for column in zip(*seen, strict=True))
        torch.testing.assert_close(following[:, 0], x[:, 0] + 0.1)
        assert torch.equal(following[:, 1], x[:, 1]) and torch.equal(reward, action.float())
        last = following[:, 0] > 0.49
        assert torch.equal(end, last & ("Truncated" not in env_id))


# ------------------------------------------------------------------------------------------------------ files and flags


def test_evaluate_and_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = main(Args(**SMALL | {"student_scale": (0.25, 0.1)}))
    state = saved(tmp_path)
    path = state.pop("path")
    again = main(Args(evaluate=str(path)))
    assert [row["student"] for row in again] == [row["student"] for row in rows]
    # as if it had been stopped after the first student: the second one comes out the same
    removed = state["students"].pop("0.1")
    torch.save(state, path)
    resumed = main(Args(resume=str(path)))
    assert [row["student"] for row in resumed] == [row["student"] for row in rows]
    after = torch.load(path, weights_only=True)["students"]["0.1"]["network"]
    assert all(torch.equal(weights, after[name]) for name, weights in removed["network"].items())
    with pytest.raises(SystemExit, match=r"--loss: .* brings its own flags"):
        main(Args(resume=str(path), loss="nll"))
    path.write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="can't read the checkpoint"):
        main(Args(resume=str(path)))
    assert "0.25: 1,142 of the teachers' 4,610 parameters" in capsys.readouterr().out


def test_a_foreign_teacher_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(Args(**SMALL | {"distill_steps": 1}))
    path = str(saved(tmp_path)["path"])
    for kwargs, message in (
        ({"loss": "mse"}, "needs teachers of --teacher dqn"),
        ({"env_ids": ("Acrobot-v1",)}, "no teacher for Acrobot-v1"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(Args(**SMALL | {"teacher_path": (path,)} | kwargs))
    torch.save({"args": {}}, "other.pt")
    with pytest.raises(SystemExit, match=r"other\.pt is of another script"):
        main(Args(evaluate="other.pt"))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"losses/distillation is .*lower"):
        main(Args(**SMALL | {"distill_learning_rate": math.inf}))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"loss": "mse"}, "--loss mse compares Q-values: it needs teachers of --teacher dqn"),
        ({"correction": True}, "--correction needs --states student"),
        ({"correction": True, "states": "student", "loss": "nll"}, "--correction is for --loss kl"),
        ({"env_ids": ("NoMaze-v0",)}, "NoMaze"),
        ({"env_ids": ("CartPole-v1", "CartPole-v1")}, "each once"),
        ({"env_ids": ()}, "--env-ids"),
        ({"env_ids": ("Pendulum-v1",)}, "action space.*Discrete"),
        ({"env_ids": ("FrozenLake-v1",)}, "must be vectors"),
        ({"env_ids": ("Sokoban-v0",), "num_boxes": 30}, "num_boxes"),
        ({"temperature": 0.0}, "--temperature 0.0"),
        ({"student_scale": (0.0,)}, "--student-scale"),
        ({"epsilon": 2.0}, "--epsilon"),
        ({"gamma": 1.5}, "--gamma"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"evaluate": "no_such_file.pt"}, "can't read the checkpoint no_such_file.pt"),
        ({"teacher_path": ("no_such_file.pt",)}, "can't read the checkpoint no_such_file.pt"),
    ],
)
def test_bad_flags_are_one_clear_line(tmp_path, monkeypatch, kwargs, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as error:
        main(Args(**SMALL | kwargs))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
