"""distillation.py: losses against closed forms and finite differences, teachers from files, both loops."""

import itertools
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import RampEnv, assert_same, seeded

import distillation
from distillation import Args, PolicyNet, Rollout, Task, corrected_loss, distillation_losses, main, parse_args
from dyna_dqn import RunsMLP

CPU = torch.device("cpu")
SMALL = {
    "env_ids": ("DistilRamp-v0",), "teacher_timesteps": 320, "num_envs": 4, "buffer_size": 200, "distill_steps": 12,
    "eval_episodes": 4, "log_frequency": 6, "student_scale": (0.25,), "save_model": False,
}  # fmt: skip


for name, kwargs in {"": {}, "Truncated": {"truncates": True}, "Forever": {"length": math.inf}}.items():
    kwargs = {"num_actions": 3, "first": 2, "length": 5} | kwargs
    gym.register(f"DistilRamp{name}-v0", RampEnv, disable_env_checker=True, kwargs=kwargs)


LOSSES = [("kl", "forward"), ("kl", "reverse"), ("nll", "forward"), ("mse", "forward")]


def test_both_divergences_against_their_closed_forms():
    # two actions: D_KL = p log(p/q) + (1-p) log((1-p)/(1-q)); the temperature is the teacher's only
    p, q = 0.9, 0.3
    teacher, student = (torch.tensor([[x, 1 - x]]).log() + 3 for x in (p, q))  # off by a constant, as logits may be
    forward = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    reverse = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    for direction, expected in (("forward", forward), ("reverse", reverse)):
        loss = distillation_losses(student, 0.01 * teacher, "kl", direction, 0.01)
        assert loss.shape == (1,) and loss.item() == pytest.approx(expected, rel=1e-4)


def test_nll_and_mse_by_hand():
    student, teacher = torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([[2.0, 1.0, 1.5]])
    nll = distillation_losses(student, teacher, "nll", "forward", 0.01)
    assert nll.item() == pytest.approx(math.log(math.exp(1) + math.exp(3) + 1) - 1, rel=1e-6)  # of action 0
    mse = distillation_losses(student, teacher, "mse", "forward", 0.01)
    assert mse.item() == pytest.approx(1 + 4 + 2.25, rel=1e-6)
    for loss, direction in LOSSES:
        assert not distillation_losses(student, teacher.requires_grad_(), loss, direction, 0.7).requires_grad


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
    total, zeros = torch.zeros_like(theta), torch.zeros(3, 1, dtype=torch.float64)
    ends = torch.tensor([[False], [False], [True]])
    for states, actions, p in trajectories(theta):
        leaf = theta.detach().clone().requires_grad_()
        logits = leaf[states][:, None]  # (T, 1, A)
        losses = loss(logits, TEACHER[states][:, None])
        value = losses.mean()
        if corrected:
            rollout = Rollout(None, logits, zeros, zeros, torch.tensor(actions)[:, None], None, ends, ends)
            value, _ = corrected_loss(losses, rollout, 1.0)
        value.backward()
        total += 3 * p.detach() * leaf.grad
    return total


def slopes(value, x: torch.Tensor) -> torch.Tensor:
    """The gradient of value(x), by central differences."""
    result, step = torch.zeros_like(x), 1e-5
    for index in itertools.product(*map(range, x.shape)):
        away = torch.zeros_like(x)
        away[index] = step
        with torch.no_grad():
            result[index] = (value(x + away) - value(x - away)) / (2 * step)
    return result


THETA = torch.tensor([[0.3, -0.2], [0.8, 0.1], [-0.4, 0.5]], dtype=torch.float64)


@pytest.mark.parametrize(("loss", "direction"), LOSSES)
def test_the_correction_makes_the_update_a_gradient(loss, direction):
    def losses(student, teacher):
        return distillation_losses(student, teacher, loss, direction, 1.0)

    exact = slopes(lambda theta: objective(theta, losses), THETA)
    torch.testing.assert_close(expected_update(THETA, losses, corrected=True), exact, rtol=1e-6, atol=1e-8)
    assert (expected_update(THETA, losses, corrected=False) - exact).abs().max() > 0.02


def test_the_critic_of_the_correction_learns_the_discounted_losses():
    losses, values = torch.tensor([[1.0], [2.0], [4.0]]), torch.zeros(3, 1)
    done, no = torch.tensor([[False], [True], [False]]), torch.zeros(3, 1, dtype=torch.bool)
    next_values = torch.tensor([[0.0], [-10.0], [-20.0]])
    actions, logits = torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1, 2)
    for terminated, expected in ((done, [-2.0, -2.0, -14.0]), (no, [-4.5, -7.0, -14.0])):  # γ = 1/2; truncated: -2 - 5
        rollout = Rollout(None, logits, values, next_values, actions, None, terminated, done)
        _, value_loss = corrected_loss(losses, rollout, 0.5)
        assert value_loss.item() == pytest.approx(np.square(expected).mean())


# ------------------------------------------------------------------------------------- environments, acting, evaluation


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


def test_sokobans_true_next_state_is_the_solved_board(monkeypatch):
    level = torch.tensor([[[0] * 5, [0, 5, 3, 2, 0], [0] * 5]], dtype=torch.uint8)
    monkeypatch.setattr(distillation, "unseen_levels", lambda *_: torch.nn.functional.pad(level, (0, 0, 0, 2)))
    task = Task(Args(size=5), "Sokoban-v0", 1, CPU, evaluation=True)
    x = task.reset(1)
    assert torch.equal(x[:, :3], level)
    following, reward, terminated, truncated, true_next = task.step(torch.tensor([4]))
    assert terminated.item() and not truncated.item() and reward.item() == pytest.approx(10.9)
    assert (true_next == 4).any() and torch.equal(following, x)  # a box on its target; the level anew


def test_training_never_gets_a_level_of_the_evaluation():
    held_out = {board.numpy().tobytes() for board in distillation.unseen_levels(50, 5, 1)}
    task = Task(Args(size=5, eval_episodes=50), "Sokoban-v0", 200, CPU)
    seen = {board.numpy().tobytes() for seed in range(3) for board in task.reset(seed)}
    assert len(seen) > 100 and not seen & held_out


@pytest.mark.parametrize("truncates", [False, True])
def test_a_rollout_holds_values_of_true_next_states(truncates):
    torch.manual_seed(1)
    net = PolicyNet([(2,)], [3], (8,), "board")
    task = Task(Args(), "DistilRampTruncated-v0" if truncates else "DistilRamp-v0", 2, CPU)
    rollout, x = distillation.act(net, 0, task, task.reset(1), 7, seeded())
    states = rollout.observations
    true_next = states + torch.tensor([0.1, 0.0])
    expected = net.with_value(true_next.flatten(0, 1))[1].view(7, 2)
    known = ~rollout.terminated  # where an episode terminates the value is of no use
    torch.testing.assert_close(rollout.next_values[known], expected[known].detach())
    assert torch.equal(rollout.done, states[..., 0] > 0.39) and rollout.terminated.any() != truncates
    assert not rollout.next_values.requires_grad and rollout.logits.requires_grad and rollout.values.requires_grad
    torch.testing.assert_close(rollout.logits, net(states.flatten(0, 1)).view(7, 2, 3))
    torch.testing.assert_close(rollout.rewards, rollout.actions.float())
    torch.testing.assert_close(x[:, 0], torch.full((2,), 0.2))  # two steps into the second episode
    for apart in (True, False):  # the critic's gradient stops at its head, or goes on to the trunk
        net.zero_grad()
        distillation.act(net, 0, task, x, 2, torch.Generator(), apart)[0].values.sum().backward()
        assert (net.trunk[0].weight.grad is None) == apart and net.critics[0].weight.grad.any()


def always(action: int):
    return lambda x: torch.nn.functional.one_hot(torch.full((len(x),), action), 3).float() * 50


def test_the_buffer_holds_where_the_teacher_goes_and_what_it_says_there():
    flat = lambda x: torch.zeros(len(x), 3)  # noqa: E731
    for teacher, greedy, epsilon, ones in (
        (always(1), True, 0.0, 1.0), (always(1), True, 0.3, 0.8), (always(1), False, 0.3, 0.8), (flat, True, 0.0, 0.0),
        (flat, False, 0.0, 1 / 3),  # Q-values greedily, policies sampled
    ):  # fmt: skip
        task, seen = Task(Args(), "DistilRamp-v0", 4, CPU), []
        step = task.step
        task.step = lambda action, step=step, seen=seen: seen.append(action) or step(action)
        states, outputs = distillation.fill_buffer(task, teacher, 4000, epsilon, greedy, 1, seeded())
        assert states.shape == (4000, 2) and torch.equal(outputs, teacher(states))
        assert set(states[:, 0].mul(10).round().int().tolist()) == set(range(5))
        assert (torch.cat(seen) == 1).float().mean().item() == pytest.approx(ones, abs=0.03)


def test_an_evaluation_plays_each_episode_once(monkeypatch, capsys):
    args = Args(eval_episodes=3)
    result = distillation.play_episodes(args, "DistilRamp-v0", always(2), True, CPU)
    assert result == {"return": 10.0, "error": 0.0, "terminated": 1.0}
    assert distillation.play_episodes(args, "DistilRampTruncated-v0", always(2), False, CPU)["terminated"] == 0.0
    random = distillation.play_episodes(Args(eval_episodes=400), "DistilRamp-v0", None, True, CPU)
    assert random["return"] == pytest.approx(5.0, abs=0.4)  # also where Q-values are acted on greedily
    assert random["error"] == pytest.approx((5 * 2 / 3 / 400) ** 0.5, rel=0.1)
    flat = distillation.play_episodes(args, "DistilRamp-v0", lambda x: torch.zeros(len(x), 3), True, CPU)
    assert flat["return"] == 0.0  # greedy: the first
    monkeypatch.setattr(distillation, "MOST_EVAL_STEPS", 7)
    endless = distillation.play_episodes(args, "DistilRampForever-v0", always(1), True, CPU)
    assert endless["return"] == 7.0 and "3 episodes cut after 7 steps" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ networks


def test_students_have_the_size_that_was_asked_for():
    for shapes, actions, total in (([(7, 7)], [5], 413_381), ([(4,)], [2], 4610), ([(4,), (7, 7)], [2, 5], 400_000)):
        for scale in (0.25, 0.04):
            widths = distillation.student_widths(shapes, actions, int(scale * total), "player")
            size = distillation.acting_parameters(PolicyNet(shapes, actions, widths, "player"))
            assert 0.9 * scale * total < size <= scale * total
    with pytest.raises(SystemExit, match="--student-scale"):
        distillation.student_widths([(4,)], [2], 5, "player")
    assert (
        distillation.acting_parameters(PolicyNet([(4,)], [2], (8, 8), "board")) == 4 * 8 + 8 + 8 * 8 + 8 + 8 * 2 + 2
    )  # no critic


@pytest.mark.parametrize("shapes", [[(8, 6)], [(8, 6), (3,)]])
def test_networks_see_the_board_from_the_player(shapes):
    boards = torch.randint(5, (6, 8, 6), dtype=torch.uint8)
    boards[:, 3, 2] = 5
    for view in ("player", "board"):
        net = PolicyNet(shapes, [5, 2][: len(shapes)], (4, 4, 8), view)
        seen = distillation.cell_planes(distillation.player_view(boards) if view == "player" else boards)
        if len(shapes) == 2:
            seen = seen.flatten(1)
        torch.testing.assert_close(net(boards), net.heads[0](net.trunk(seen)))


def test_tasks_share_the_trunk_and_nothing_else():
    torch.manual_seed(1)
    net = PolicyNet([(6,), (7, 7)], [3, 5], (16, 16), "board")
    net.mean[0, :6], net.std[0, :6] = 2.0, 4.0
    vectors, boards = torch.randn(3, 6), torch.randint(0, 7, (3, 7, 7), dtype=torch.uint8)
    out = net(boards, 1)
    out.square().sum().backward()
    assert out.shape == (3, 5) and net.trunk[0].weight.grad.any()
    assert net.heads[0].weight.grad is None and net.heads[1].weight.grad.any()
    padded = torch.nn.functional.pad((vectors - 2) / 4, (0, 4 * 7 * 7 - 6))
    torch.testing.assert_close(net(vectors, 0), net.heads[0](net.trunk(padded)))


def dqn_file(sizes: list[int]) -> RunsMLP:
    """A file as dyna_dqn.py writes it, of two runs."""
    q_net = RunsMLP(2, sizes)
    q_net.mean.normal_()
    q_net.std.uniform_(0.5, 2)
    networks = {f"q_net.{name}": weight for name, weight in q_net.state_dict().items()}
    args = {"env_id": "DistilRamp-v0", "hidden": tuple(sizes[1:-1]), "size": 5, "num_boxes": 1}
    torch.save({"args": args, "networks": networks, "global_step": 1}, "dqn.pt")
    return q_net


@pytest.mark.parametrize(("hidden", "shape"), [((6, 5), (2,)), ((7,), (5, 6))])
def test_a_dqn_is_read_with_its_standardised_inputs(hidden, shape):
    x = torch.randn(4, 2) if len(shape) == 1 else torch.randint(7, (4, *shape), dtype=torch.uint8)
    features = x if len(shape) == 1 else distillation.cell_planes(x).flatten(1)
    q_net = dqn_file([features.shape[1], *hidden, 3])
    (entry,) = distillation.read_teachers("dqn.pt", Args(), CPU).values()
    assert entry["kind"] == "dqn"
    expected = q_net(features.expand(2, -1, -1))[0]  # the first run's
    torch.testing.assert_close(distillation.make_net(entry, CPU)(x), expected)


# -------------------------------------------------------------------------------------------------- the loops, watched


def watch_optimizer(watch) -> tuple[list, list]:
    """Of each step, which does nothing, the result (parameters, learning rate); and what cleared the gradients."""
    steps = watch(torch.optim.Adam, "step", lambda self: (self.param_groups[0]["params"], self.param_groups[0]["lr"]))
    return steps, watch(torch.optim.Adam, "zero_grad")


def leaves(number: int):
    values = [torch.tensor(1.0 + i, requires_grad=True) for i in range(number)]
    return values, lambda *_: tuple(values)


@pytest.mark.parametrize("truncates", [False, True])
def test_the_teachers_loop(monkeypatch, watch, truncates):
    (policy_loss, value_loss, entropy), change = leaves(3)
    losses = watch(distillation, "actor_critic_losses", change)
    advantages = watch(distillation, "generalized_advantages")
    clipped, logged = [], []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: clipped.append(norm))
    steps, cleared = watch_optimizer(watch)
    args = Args(num_envs=2, num_steps=3, teacher_timesteps=237, reward_scale=0.2, gamma=0.6, vf_coef=0.3, ent_coef=0.02,
                max_grad_norm=0.7, learning_rate=0.004)  # fmt: skip
    task = Task(args, "DistilRampTruncated-v0" if truncates else "DistilRamp-v0", 2, CPU)
    net = PolicyNet([(2,)], [3], (4,), "board")
    logger = type("Log", (), {"log": lambda self, step, metrics: logged.append((step, metrics))})()
    distillation.train_teacher(net, task, args, seeded(), logger)
    assert len(losses) == len(steps) == len(cleared) == 40 and clipped == [0.7] * 40  # 237 frames, 6 an update
    assert all(lr == 0.004 and [*map(id, used)] == [*map(id, net.parameters())] for _, (used, lr) in steps)
    assert [x.grad.item() for x in (policy_loss, value_loss, entropy)] == pytest.approx([40, 12, -0.8])  # 40 times
    for t, ((rewards, values, next_values, terminated, done, gamma, lam), result) in enumerate(advantages):
        (logits, with_graph, actions, used), _ = losses[t]
        torch.testing.assert_close(rewards, 0.2 * actions)
        assert used is result and torch.equal(values, with_graph) and values.grad_fn is None and logits.requires_grad
        ends = torch.tensor([[(3 * t + k) % 5 == 4] * 2 for k in range(3)])  # episodes go on from rollout to rollout
        assert torch.equal(done, ends) and torch.equal(terminated, ends & (not truncates))
        assert (gamma, lam) == (0.6, 1.0) and next_values.shape == (3, 2)
    assert [step for step, _ in logged] == [12 * row for row in range(1, 21)]
    for _, metrics in logged:
        assert [metrics[f"losses/{name}"] for name in ("policy_loss", "value_loss", "entropy")] == [1, 2, 3]
    actions = torch.cat([call[2] for call, _ in losses])  # (T, B) of the whole run
    returns = actions.view(24, 5, 2).sum(1).float().mean(1)  # of each episode
    for row, (_, metrics) in enumerate(logged):  # of steps 6 row + 1 to 6 row + 6
        ended = [returns[e] for e in range(24) if 6 * row < 5 * (e + 1) <= 6 * row + 6]
        assert metrics["charts/episodic_return"] == pytest.approx(sum(ended) / len(ended))


TWO_TASKS = ("CartPole-v1", "DistilRamp-v0")


def test_the_students_loop_on_the_teachers_states(monkeypatch, watch):
    def buffer(task, teacher, *rest):
        states = torch.linspace(-1, 1, 50)[:, None].expand(50, task.shape[0])  # the output tells the state
        return states, states[:, :1].expand(50, task.num_actions)

    leaf = torch.ones(256, requires_grad=True)
    buffers = watch(distillation, "fill_buffer", buffer)
    losses = watch(distillation, "distillation_losses", lambda *_: leaf)
    saved, logged, clipped = watch(distillation, "saved_net"), [], []
    steps, cleared = watch_optimizer(watch)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: clipped.append(args))
    monkeypatch.setattr(distillation.Logger, "log", lambda self, step, metrics: logged.append((step, metrics)))
    flags = {"env_ids": TWO_TASKS, "seed": 3, "loss": "nll", "kl_direction": "reverse", "temperature": 0.3,
             "teacher_timesteps": 32, "distill_learning_rate": 0.02, "log_frequency": 9}  # fmt: skip
    main(Args(**SMALL | flags))
    teachers, (student,) = [call[0] for call, _ in saved[:2]], saved[2][0]
    assert [call[2:6] for call, _ in buffers] == [(200, 0.05, False, 3600)] * 2
    assert_same([call[1].state_dict() for call, _ in buffers], [teacher.state_dict() for teacher in teachers])
    assert len(losses) == 24  # 12 updates, both tasks in each
    for k, ((logits, target, *rest), _) in enumerate(losses):
        x = target[:, :1].expand(256, (4, 2)[k % 2])
        torch.testing.assert_close(logits, student(x, k % 2))  # leaves as losses: it stays as it was
        assert rest == ["nll", "reverse", 0.3]
    drawn = torch.cat([call[1][:, 0] for call, _ in losses])
    _, counts = drawn.unique(return_counts=True)
    share = len(drawn) / 50
    assert len(counts) == 50 and 25 < ((counts - share) ** 2 / share).sum() < 85  # 49 degrees of freedom
    torch.testing.assert_close(leaf.grad, torch.full((256,), 12 / 256))  # the mean over batch and tasks, 12 times
    updates = [step for _, step in steps if step[0][0] is next(student.parameters())]
    assert [lr for _, lr in updates] == pytest.approx([0.02 * (1 - k / 12) for k in range(12)])
    assert len(steps) == len(cleared) == 14 and len(clipped) == 2  # those of the teachers, one update each
    assert len(updates[0][0]) == len(list(student.parameters()))
    rows = [(step, row["losses/distillation"]) for step, row in logged if "losses/distillation" in row]
    assert rows == [(9, 1.0), (12, 1.0)]


@pytest.mark.parametrize("correction", [False, True])
def test_the_students_loop_on_its_own_states(monkeypatch, watch, correction):
    (distill_loss, value_loss), change = leaves(2)
    leaf = torch.ones(8, 4, requires_grad=True)
    losses = watch(distillation, "distillation_losses", lambda *_: leaf)
    corrected = watch(distillation, "corrected_loss", change)
    saved, acted, clipped = watch(distillation, "saved_net"), watch(distillation, "act"), []
    monkeypatch.setattr(distillation, "fill_buffer", None)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: clipped.append((parameters, norm)))
    flags = {"env_ids": TWO_TASKS, "loss": "kl", "kl_direction": "reverse", "states": "student", "vf_coef": 0.3,
             "correction": correction, "teacher_timesteps": 32, "gamma": 0.6, "max_grad_norm": 0.7}  # fmt: skip
    main(Args(**SMALL | flags))
    (first, second), (student,) = [call[0] for call, _ in saved[:2]], saved[2][0]
    acted = acted[2:]  # without the teachers' own: one each
    assert len(acted) == len(losses) == 24 and len(corrected) == 24 * correction
    assert [call[6:] for call, _ in acted] == [(True,)] * 24  # the critic's gradient apart
    for k, ((net, i, task, x, num_steps, *_), (rollout, _)) in enumerate(acted):
        assert net is student and i == k % 2 and num_steps == 8 and task.num_actions == (2, 3)[i]
        assert torch.equal(rollout.observations[0], x) and (k < 2 or x is acted[k - 2][1][1])  # it goes on
        (logits, target, *rest), _ = losses[k]
        assert logits is rollout.logits and rest == ["kl", "reverse", 1.0]
        torch.testing.assert_close(target.flatten(0, 1), (first, second)[i](rollout.observations.flatten(0, 1)))
        if correction:
            assert corrected[k][0][0] is leaf and corrected[k][0][1] is rollout and corrected[k][0][2] == 0.6
    if correction:
        assert (distill_loss.grad.item(), value_loss.grad.item()) == pytest.approx((12.0, 12 * 0.3))  # /2 tasks, *24
        assert leaf.grad is None
    else:
        torch.testing.assert_close(leaf.grad, torch.full((8, 4), 12 / 32))
    assert [norm for _, norm in clipped] == [0.7] * 26  # a teacher's update once, a student's twice
    (policy, _), (critic, _) = clipped[2:4]
    critic, acting = list(critic), list(policy)
    assert [*map(id, critic)] == [*map(id, student.critics.parameters())]
    assert {*map(id, acting)} == {*map(id, student.parameters())} - {*map(id, critic)}


def test_each_is_evaluated_on_its_task(watch):
    def result(args, env_id, policy, greedy, device):
        mean = 1.0 if policy is None else 2.5
        if isinstance(policy, PolicyNet):  # a teacher
            mean = 3.0 + (env_id == TWO_TASKS[1])
        return {"return": mean, "error": 0.1, "terminated": 0.5}

    played, saved = watch(distillation, "play_episodes", result), watch(distillation, "saved_net")
    rows = main(Args(**SMALL | {"env_ids": TWO_TASKS, "student_scale": (0.25, 0.1), "teacher_timesteps": 32}))
    first, second, *students = (call[0].state_dict() for call, _ in saved)
    for i, teacher in enumerate((first, second)):
        calls = [call for call, _ in played[4 * i : 4 * i + 4]]
        assert {env_id for _, env_id, *_ in calls} == {TWO_TASKS[i]}
        nothing, policy, *others = (policy for _, _, policy, *_ in calls)
        assert nothing is None
        assert_same(policy.state_dict(), teacher)
        assert [other.keywords for other in others] == [{"task": i}] * 2
        assert_same([other.func.state_dict() for other in others], students)
    names = ("charts/task", "charts/student_scale", "eval/score")
    expected = [(0, 0.25, 0.75), (0, 0.1, 0.75), (1, 0.25, 0.5), (1, 0.1, 0.5)]
    assert [tuple(row[name] for name in names) for row in rows] == expected
    assert rows[0]["charts/teacher_parameters"] == 4610 + 4547


def test_teachers_learn_and_students_follow():
    """Action 2 pays most: 10 an episode, random play gets 5."""
    args = {"teacher_timesteps": 4000, "reward_scale": 0.2, "ent_coef": 0.02, "gamma": 0.5, "distill_steps": 60}
    (row,) = main(Args(**SMALL | args))
    assert row["eval/teacher_return"] > 9 and 3 < row["eval/random_return"] < 7 and row["eval/score"] > 0.9


@pytest.mark.parametrize(("loss", "temperature"), [("mse", 0.01), ("kl", 0.01), ("kl", 0.7)])
def test_students_of_a_dqn(monkeypatch, watch, loss, temperature):
    q_net = dqn_file([2, 8, 3])
    buffers, losses = (
        watch(distillation, "fill_buffer"),
        watch(distillation, "distillation_losses"),
    )
    saved, played = watch(distillation, "saved_net"), watch(distillation, "play_episodes")
    monkeypatch.setattr(distillation, "train_teacher", None)
    flags = {"teacher_path": ("dqn.pt",), "loss": loss, "temperature": None if temperature == 0.01 else temperature}
    (row,) = main(Args(**SMALL | flags))
    ((_, _, _, _, greedy, *_), (states, outputs)), student = buffers[0], saved[0][0][0]
    assert greedy and [call[3] for call, _ in played] == [True] * 3 and "eval/teacher_return" in row
    torch.testing.assert_close(outputs, q_net(states.expand(2, -1, -1))[0])
    assert {tuple(call[2:]) for call, _ in losses} == {(loss, "forward", temperature)}
    assert torch.equal(student.mean, q_net.mean[0]) and torch.equal(student.std, q_net.std[0])  # its teacher's units


# ------------------------------------------------------------------------------------------------------ files and flags


def test_what_is_saved_is_played_and_goes_on(watch, capsys):
    write = lambda path, state: torch.save(state, path) or [*state["students"]]  # noqa: E731
    writes = watch(distillation, "save_checkpoint", write)
    flags = SMALL | {"save_model": True, "student_scale": (0.25, 0.1), "eval_episodes": 6}
    rows = main(Args(**flags))
    assert [students for _, students in writes] == [[], ["0.25"], ["0.25", "0.1"]]  # after the teacher, each student
    path = str(writes[0][0][0])
    trained = watch(distillation, "train_teacher", lambda *_: None)
    assert main(parse_args(["--evaluate", path])) == rows  # one set of episodes, for all of them
    assert main(parse_args(["--evaluate", path, "--eval-episodes", "3"])) != rows
    again = main(Args(**flags | {"teacher_path": (path,), "seed": 2, "eval_episodes": 6}))
    assert not trained and again[0]["eval/teacher_return"] == rows[0]["eval/teacher_return"]
    states = [torch.load(file, weights_only=True) for file in (path, writes[-1][0][0])]
    networks = [[state[kind][name]["weights"] for kind, name in (("teachers", "DistilRamp-v0"), ("students", "0.25"))]
                for state in states]  # fmt: skip
    same = [all(map(torch.equal, *(network[i].values() for network in networks))) for i in range(2)]
    assert same == [True, False]  # another seed's student, the same teacher
    assert "0.25: 1,113 of the teachers' 4,547 parameters" in capsys.readouterr().out


def test_a_seed_reproduces_the_run(watch):
    saved = watch(distillation, "saved_net")
    for seed in (1, 1, 2):
        main(Args(**SMALL | {"seed": seed, "states": "student", "correction": True}))
    students = [[*call[0].state_dict().values()] for call, _ in saved[1::2]]
    assert all(map(torch.equal, students[0], students[1])) and not all(map(torch.equal, students[0], students[2]))


def test_sokoban_end_to_end(tmp_path):
    flags = {"env_ids": ("Sokoban-v0",), "size": 5, "max_episode_steps": 10, "save_model": True}
    rows = main(Args(**SMALL | flags))
    (path,) = tmp_path.glob("runs/*/agent.pt")
    assert main(parse_args(["--evaluate", str(path)])) == rows
    with pytest.raises(SystemExit, match="learned with --size 5: give that flag"):
        main(Args(**SMALL | flags | {"teacher_path": (str(path),), "size": 6}))
    with pytest.raises(SystemExit, match="plays the tasks of the file, Sokoban-v0"):  # heads are in the tasks' order
        parse_args(["--evaluate", str(path), "--env-ids", "DistilRamp-v0"])
    dqn_file([2, 8, 3])
    with pytest.raises(SystemExit, match=r"dqn\.pt: no teacher for Acrobot-v1"):
        main(parse_args(["--teacher-path", "dqn.pt", "--env-ids", "Acrobot-v1"]))
