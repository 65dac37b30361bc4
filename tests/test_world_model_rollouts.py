"""world_model_rollouts.py: likelihoods, ensembles, imagination, policy gradients, environments, and the loop."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import RampEnv, seeded

import world_model_gp as gp
import world_model_rollouts as wm
from world_model_rollouts import Args, EnsembleModel, ImaginedEnvs, RealEnvs, RolloutActorCritic, main

CPU = torch.device("cpu")
SMALL = {
    "total_timesteps": 160, "initial_steps": 80, "steps_per_iteration": 80, "model_epochs": 3, "hidden": (8,),
    "num_envs": 20, "num_steps": 10, "horizon": 8, "policy_updates": 2, "check_frequency": 2, "eval_episodes": 2,
    "num_minibatches": 2,
}  # fmt: skip


for name, truncates in (("TestWorldRamp-v0", False), ("TestWorldRampTruncated-v0", True)):
    kwargs = {"num_actions": 2, "first": 3, "length": 7, "truncates": truncates}
    gym.register(name, RampEnv, max_episode_steps=100, kwargs=kwargs)


def wide(S: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((S,), -torch.inf), torch.full((S,), torch.inf)


def linear_data(N: int = 400) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """s' = A s + B a, r = s_0 - a, ends where s'_0 > 1; 20 episodes of N / 20 steps."""
    rng = seeded()
    A, B = torch.tensor([[0.9, 0.2], [-0.1, 1.05]]), torch.tensor([[0.0], [0.5]])
    s, a = torch.randn(N, 2, generator=rng), torch.rand(N, 1, generator=rng) * 2 - 1
    s2 = s @ A.T + a @ B.T
    data = {"s": s, "a": a, "s2": s2, "r": s[:, 0] - a[:, 0], "end": (s2[:, 0] > 1).float()}
    return data | {"episode": torch.arange(N) // (N // 20), "first": torch.arange(N) % (N // 20) == 0}, A, B


# ----------------------------------------------------------------------------------------------------- the networks


@pytest.mark.parametrize("gaussian", [False, True])
def test_the_loss_is_the_likelihood_and_the_cross_entropy(gaussian):
    torch.manual_seed(1)
    data, _, _ = linear_data(40)
    model = EnsembleModel(3, 2, 1, (8,), gaussian, wide(2))
    model.standardize(data)
    columns = (torch.cat([data["s"], data["a"]], 1), wm.targets(data), data["s2"], data["end"])
    x, y, s2, end = (c.expand(3, *c.shape) for c in columns)
    mean, logvar = model(x)
    scaled = (y - y[0].mean(0)) / y[0].std(0)
    expected = (mean - scaled) ** 2
    if gaussian:
        normal = torch.distributions.Normal(mean, (logvar / 2).exp())
        expected = -normal.log_prob(scaled) - math.log(2 * math.pi) / 2
    p = model.end_logit(s2).sigmoid()
    entropy = -(end * p.log() + (1 - end) * (1 - p).log()).mean(1)
    torch.testing.assert_close(model.loss(x, y, s2, end), expected.mean((1, 2)) + entropy, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gaussian", [False, True])
def test_a_linear_system_is_learned_to_its_matrices(gaussian):
    torch.manual_seed(1)
    data, A, B = linear_data()
    model = EnsembleModel(3, 2, 1, (), gaussian, wide(2))
    model.standardize(data)
    args = Args(model_epochs=120, model_learning_rate=1e-2)
    wm.fit_networks(model, data, wm.held_out_rows(data["episode"], 0.2), args, seeded())
    rows = torch.cat([torch.eye(3), torch.zeros(1, 3)])  # unit vectors of (s, a), and the origin
    mean, _ = model(rows.expand(3, -1, -1))
    mean = mean * model.y_std + model.y_mean
    slopes = (mean[:, :3] - mean[:, 3:]).mT.detach()  # (K, O, S + A)
    expected = torch.cat([torch.cat([A - torch.eye(2), B], 1), torch.tensor([[1.0, 0.0, -1.0]])])
    for member in slopes:
        np.testing.assert_allclose(member, expected, atol=0.02)
    x = torch.tensor([[0.5, 0.0], [1.5, 0.0]]).expand(3, -1, -1)
    assert (model.end_logit(x)[:, 0] < 0).all() and (model.end_logit(x)[:, 1] > 0).all()


def test_a_fit_gives_each_member_its_best_weights_back():
    torch.manual_seed(1)
    data, _, _ = linear_data(100)
    model = EnsembleModel(2, 2, 1, (8,), False, wide(2))
    model.standardize(data)
    held_out = wm.held_out_rows(data["episode"], 0.2)
    args = Args(model_epochs=150, model_learning_rate=0.3)  # too fast: the loss goes up and down
    metrics = wm.fit_networks(model, data, held_out, args, seeded())
    test = [x[held_out] for x in (torch.cat([data["s"], data["a"]], 1), wm.targets(data), data["s2"], data["end"])]
    assert model.loss(*(x.expand(2, *x.shape) for x in test)).mean().item() == pytest.approx(
        metrics["losses/validation_loss"], rel=1e-5
    )
    assert 20 < metrics["model/epochs"] < 150  # ended 20 epochs after the last better one


def test_standardisation_there_and_back():
    data, _, _ = linear_data(300)
    data["s"] = data["s"] * torch.tensor([3.0, 0.1]) + torch.tensor([5.0, -2.0])
    model = EnsembleModel(2, 2, 1, (), False, wide(2))
    model.standardize(data)
    torch.testing.assert_close(model.x_mean, torch.tensor([*data["s"].mean(0), 0]))  # actions stay as they are
    torch.testing.assert_close(model.x_std, torch.tensor([*data["s"].std(0), 1]))
    with torch.no_grad():
        model.net.weights[0].zero_()
        model.net.biases[0].copy_(((wm.targets(data)[0] - model.y_mean) / model.y_std).expand(2, 1, 3))
    s2, r, _ = model.step(data["s"][:1], data["a"][:1], seeded())  # predicts row 0's target
    torch.testing.assert_close(torch.cat([s2[0], r]), torch.cat([data["s2"][0], data["r"][:1]]))
    model.standardize(data | {"s": torch.ones(300, 2)})
    assert model.x_std.tolist() == [1, 1, 1]  # where nothing varies


def marked_model(K: int, A: int = 1) -> EnsembleModel:
    """Member k moves s by k."""
    model = EnsembleModel(K, 1, A, (), False, wide(1))
    with torch.no_grad():
        model.net.weights[0].zero_()
        model.net.biases[0].zero_()
        model.net.biases[0][:, 0, 0] = torch.arange(K)
    return model


def test_members_differ_and_are_drawn_at_random_at_each_step():
    torch.manual_seed(1)
    model = EnsembleModel(5, 2, 1, (8,), True, wide(2))
    assert len({tuple(w.flatten().tolist()) for w in model.net.weights[0]}) == 5
    model, rng = marked_model(5), seeded()
    s, a = torch.linspace(-40, 40, 1003)[:, None], torch.zeros(1003, 1)  # 1003: the shares aren't even
    drawn = torch.stack([(model.step(s, a, rng)[0] - s)[:, 0].round() for _ in range(60)])  # (steps, rows)
    counts = torch.stack([(drawn == k).sum(1) for k in range(5)])
    assert counts.min() >= 197 and counts.max() <= 204  # a fifth of the rows each, at every step
    share = torch.stack([(drawn == k).float().mean(0) for k in range(5)])  # and a row draws them all
    assert share.min() > 0 and share.std().item() == pytest.approx(math.sqrt(0.2 * 0.8 / 60), rel=0.15)
    follows = (drawn[1:] == drawn[:-1]).float().mean().item()  # independent of the member before
    assert follows == pytest.approx(0.2, abs=0.01)
    fixed = model.step(torch.zeros(10, 1), torch.zeros(10, 1), rng, fixed=True)[0][:, 0]
    assert fixed.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_gaussian_steps_have_the_predicted_spread_and_stay_in_the_space():
    model = EnsembleModel(2, 1, 1, (), True, (torch.tensor([-1.0]), torch.tensor([40.0])))
    with torch.no_grad():
        model.net.weights[0].zero_()
        model.net.biases[0].copy_(torch.tensor([1.0, 0.0, math.log(0.25), -9.0]))
    model.y_std[0] = 3.0
    s2, _, _ = model.step(torch.full((20_000, 1), 20.0), torch.zeros(20_000, 1), seeded())
    assert s2.mean().item() == pytest.approx(23.0, abs=0.05)
    _, logvar = model(torch.zeros(2, 1, 2))
    sigma = 3 * (logvar[0, 0, 0] / 2).exp().item()
    assert s2.std().item() == pytest.approx(sigma, rel=0.02) and sigma == pytest.approx(1.5, rel=0.3)
    assert model.step(torch.full((10, 1), 40.0), torch.zeros(10, 1), seeded())[0].max() <= 40.0


# -------------------------------------------------------------------------------------------------------- imagination


class CountingModel:
    """s' = s + 1, r = s, the end where s' >= 3 (or with probability `end`)."""

    def __init__(self, end: float | None = None) -> None:
        self.end = end

    def step(self, s, a, rng):
        s2 = s + 1
        end = (s2[:, 0] >= 3).float() if self.end is None else torch.full_like(s[:, 0], self.end)
        return s2, s[:, 0], end


def test_imagined_episodes_stop_at_the_predicted_end_and_at_the_horizon():
    envs = ImaginedEnvs(CountingModel().step, torch.tensor([[0.0]]), 4, 10, seeded())
    seen = []
    for _ in range(6):
        s2, _, terminated, truncated = envs.step(torch.zeros(4, 1))
        seen.append((s2[0, 0].item(), terminated[0].item(), truncated[0].item(), envs.s[0, 0].item()))
    assert seen == 2 * [(1, False, False, 1), (2, False, False, 2), (3, True, False, 0)]
    envs = ImaginedEnvs(CountingModel(0.0).step, torch.tensor([[7.0]]), 4, 2, seeded())
    steps = [envs.step(torch.zeros(4, 1)) for _ in range(4)]
    seen = [(s2[0, 0].item(), terminated[0].item(), truncated[0].item()) for s2, _, terminated, truncated in steps]
    assert seen == 2 * [(8, False, False), (9, False, True)] and (envs.s == 7).all()
    # an unsure end is drawn, and an end at the horizon is no truncation
    envs = ImaginedEnvs(CountingModel(0.3).step, torch.tensor([[0.0]]), 10_000, 1, seeded())
    _, _, terminated, truncated = envs.step(torch.zeros(10_000, 1))
    assert terminated.float().mean().item() == pytest.approx(0.3, abs=0.02) and not (terminated & truncated).any()
    assert (terminated | truncated).all()


def test_imagined_return_counts_the_steps_that_are_reached():
    agent = RolloutActorCritic(1, 2, (), True)
    r = wm.imagined_returns(CountingModel().step, agent, torch.zeros(6, 1), 50, seeded(), True)
    assert r.tolist() == 6 * [0 + 1 + 2]
    r = wm.imagined_returns(CountingModel(0.5).step, agent, torch.ones(6, 1), 3, seeded(), True)
    assert r.tolist() == 6 * [1 + 0.5 * 2 + 0.25 * 3]


def test_open_loop_errors_of_a_known_model():
    s, alive = torch.arange(5.0)[:, None, None].expand(5, 2, 1), torch.tensor([[True, True]] * 3 + [[True, False]] * 2)
    steps = {"s": s, "s2": s + 1, "a": torch.zeros(5, 2, 1), "alive": alive}
    model = marked_model(1)
    model.x_std[0] = 2.0
    with torch.no_grad():
        model.net.biases[0][0, 0, 0] = 1.1  # a tenth too far at each step
    errors = wm.open_loop_errors(model, steps, seeded())
    assert errors == pytest.approx({"model/error_at_1": 0.05, "model/error_at_5": 0.25}, rel=1e-4)


# ---------------------------------------------------------------------------------------------------- policy gradients


def test_clipped_losses_by_hand():
    advantage, old = torch.tensor([1.0, -1.0, 3.0, -3.0]), torch.zeros(4)
    A = advantage / advantage.std()
    log_prob = torch.tensor([1.5, 1.5, 0.9, 0.5]).log()
    expected = -(1.2 * A[0] + 1.5 * A[1] + 0.9 * A[2] + 0.8 * A[3]) / 4  # min of both is 0.8 A for ρ = 0.5 and A < 0
    policy_loss, value_loss = wm.clipped_losses(log_prob, old, advantage, torch.ones(4), torch.zeros(4), Args())
    assert policy_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert value_loss.item() == pytest.approx((0 + 4 + 4 + 16) / 8)
    _, clipped = wm.clipped_losses(log_prob, old, advantage, torch.ones(4), torch.zeros(4), Args(clip_vloss=True))
    assert clipped.item() == pytest.approx((0.8**2 + 4 + 2.8**2 + 16) / 8)


class TwoStateModel:
    """Action 0 stays, 1 goes over; r(s, a) below; each step ends with probability 0.2."""

    r = torch.tensor([[0.0, 0.5], [1.0, -1.0]])

    def step(self, s, a, rng, fixed=False):
        state, action = s.argmax(1), a.argmax(1)
        s2 = torch.eye(2)[(state + action) % 2]
        return s2, self.r[state, action], torch.full((len(s),), 0.2)


@pytest.mark.parametrize("horizon", [1, 1000])  # truncated episodes go on with their value: the gradient is the same
def test_policy_gradient_of_two_states(horizon):
    agent, logits, go_on = RolloutActorCritic(2, 2, (), True), torch.tensor([[0.4, 0.0], [-0.2, 0.1]]), 0.9 * 0.8
    p = logits.softmax(1)
    P = torch.tensor([[p[0, 0], p[0, 1]], [p[1, 1], p[1, 0]]])  # of the next state
    V = torch.linalg.solve(torch.eye(2) - go_on * P, (p * TwoStateModel.r).sum(1))
    Q = TwoStateModel.r + go_on * V[torch.tensor([[0, 1], [1, 0]])]
    with torch.no_grad():
        agent.actor[0].weight.copy_(logits.T)
        agent.critic[0].weight.copy_(V[None])
    envs = ImaginedEnvs(TwoStateModel().step, torch.eye(2), 40_000, horizon, seeded())
    batch = wm.policy_rollout(envs, agent, 8, seeded(2))
    args = Args(gamma=0.9, gae_lambda=0.8, update_epochs=1)
    wm.improve_policy(agent, torch.optim.SGD(agent.parameters(), lr=0.0), batch, 1.0, args, seeded(3))
    log_prob, _ = agent.log_prob(agent.policy(batch["s"]), batch["a"])
    gradient = torch.autograd.grad((log_prob * batch["advantage"]).mean(), agent.actor[0].weight)[0].T
    visits = batch["s"].mean((0, 1))  # d(s)
    exact = visits[:, None] * p * (Q - V[:, None])  # Σ_s d(s) Σ_a ∂π(a|s) Q(s, a)
    np.testing.assert_allclose(gradient, exact, atol=0.006)
    assert exact.abs().min() > 0.025


@pytest.mark.parametrize("max_grad_norm", [1e9, 0.01])
def test_an_update_follows_the_gradient_of_the_whole_loss(max_grad_norm):
    torch.manual_seed(1)
    agent, rng = RolloutActorCritic(2, 3, (4,), True), seeded()
    s, a = torch.randn(6, 5, 2), torch.eye(3)[torch.randint(3, (6, 5))]
    log_prob, entropy = agent.log_prob(agent.policy(s), a)
    value, r = torch.randn(6, 5), torch.randn(6, 5)
    terminated, next_value = torch.rand(6, 5) < 0.5, torch.randn(6, 5)
    batch = {"s": s, "a": a, "log_prob": log_prob.detach(), "value": value, "next_value": next_value, "r": r}
    batch |= {"terminated": terminated, "truncated": ~terminated}
    target = 2 * r + 0.99 * next_value * ~terminated  # of episodes of one step
    advantage = target - value
    policy_loss = -(log_prob * (advantage - advantage.mean()) / advantage.std()).mean()  # its gradient at ρ = 1
    value_loss = ((agent.value(s) - target) ** 2).mean() / 2
    parameters = [p for p in agent.parameters() if p is not agent.log_std]
    gradient = torch.autograd.grad(policy_loss + 0.3 * value_loss - 0.2 * entropy.mean(), parameters)
    norm = math.sqrt(sum(g.square().sum() for g in gradient))
    expected = [p.detach() - g * min(1, max_grad_norm / norm) for p, g in zip(parameters, gradient, strict=True)]
    args = Args(update_epochs=1, num_minibatches=1, vf_coef=0.3, ent_coef=0.2, max_grad_norm=max_grad_norm)
    losses = wm.improve_policy(agent, torch.optim.SGD(agent.parameters(), lr=1.0), batch, 2.0, args, rng)
    for p, x in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses[1:], torch.stack([value_loss, entropy.mean()]).detach())


def test_new_scales_leave_the_policy_as_it_is():
    torch.manual_seed(1)
    agent, s = RolloutActorCritic(3, 2, (8,), True), torch.randn(9, 3)
    agent.standardize(torch.tensor([1.0, 0.0, -2.0]), torch.tensor([0.1, 3.0, 1.0]), keep=False)
    out, value = agent.policy(s), agent.value(s)
    agent.standardize(torch.tensor([0.5, 4.0, -2.0]), torch.tensor([2.0, 0.5, 1.5]), keep=True)
    torch.testing.assert_close(agent.policy(s), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(agent.value(s), value, rtol=1e-4, atol=1e-5)
    assert agent.mean.tolist() == [0.5, 4.0, -2.0]


def test_continuous_log_probabilities_and_greedy_actions():
    torch.manual_seed(1)
    agent = RolloutActorCritic(2, 3, (8,), False)
    out = agent.policy(torch.randn(5, 2))
    a = agent.sample_action(out, seeded())
    log_prob, entropy = agent.log_prob(out, a)
    sigma = agent.log_std.exp()
    expected = (-(((a - out) / sigma) ** 2) / 2 - agent.log_std - math.log(2 * math.pi) / 2).sum(1)
    torch.testing.assert_close(log_prob, expected)
    torch.testing.assert_close(entropy[0], (agent.log_std + math.log(2 * math.pi * math.e) / 2).sum())
    assert torch.equal(agent.sample_action(out, None), out)


def test_environments_take_clipped_actions_and_the_policy_learns_from_those_before():
    class Watching(CountingModel):
        def step(self, s, a, rng):
            taken.append(a)
            return super().step(s, a, rng)

    torch.manual_seed(1)
    agent, taken, s = RolloutActorCritic(1, 2, (), False), [], torch.zeros(40, 1)
    with torch.no_grad():
        agent.actor[-1].bias.copy_(torch.tensor([0.3, -3.0]))
    assert agent.act(s, None)[0].tolist() == pytest.approx([0.3, -1.0])
    wm.imagined_returns(Watching().step, agent, s, 3, seeded(), False)
    batch = wm.policy_rollout(ImaginedEnvs(Watching().step, s, 40, 5, seeded()), agent, 3, seeded())
    assert len(taken) == 6 and torch.stack(taken).abs().max() == 1
    assert torch.equal(torch.stack(taken[3:]), batch["a"].clamp(-1, 1)) and (batch["a"] < -2).any()


def test_discrete_actions_are_drawn_by_their_probabilities():
    agent = RolloutActorCritic(1, 3, (), True)
    out = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(30_000, 3)
    np.testing.assert_allclose(agent.sample_action(out, seeded()).mean(0), [0.2, 0.5, 0.3], atol=0.015)
    assert agent.sample_action(out, None)[0].tolist() == [0, 1, 0]
    log_prob, entropy = agent.log_prob(out[:1], torch.tensor([[0.0, 0.0, 1.0]]))
    assert log_prob.item() == pytest.approx(math.log(0.3))
    assert entropy.item() == pytest.approx(-sum(p * math.log(p) for p in (0.2, 0.5, 0.3)))


# -------------------------------------------------------------------------------------------------------- environments


@pytest.mark.parametrize("env_id", ["TestWorldRamp-v0", "TestWorldRampTruncated-v0"])
def test_no_row_crosses_a_reset(env_id):
    envs = RealEnvs(env_id, 1, CPU, 1)
    data = wm.collect(envs, lambda s, rng: torch.tensor([[0.0, 1.0]]), 30, 5, seeded())
    torch.testing.assert_close(data["s2"][:, 0] - data["s"][:, 0], torch.full((30,), 0.1))  # no teleport to t = 0
    assert torch.equal(data["s2"][:, 1], data["s"][:, 1])  # the environment's own episode number
    assert (data["r"] == 1).all()  # the second action, counted from 3
    torch.testing.assert_close(data["episode"] - 4.0, 1000 * data["s"][:, 1])
    assert torch.equal(data["first"], data["s"][:, 0] == 0) and data["first"].sum() == 5
    at_the_end = (data["s2"][:, 0] * 10).round() == 7
    assert torch.equal(data["end"] == 1, at_the_end & ("Truncated" not in env_id))  # a truncation is no end


def test_held_out_rows_are_whole_episodes():
    episode = torch.arange(20).repeat_interleave(3)
    held_out = wm.held_out_rows(episode, 0.2)
    assert held_out.sum() == 12 and torch.equal(held_out.view(20, 3).any(1), held_out.view(20, 3).all(1))
    assert wm.held_out_rows(torch.tensor([0, 0, 1]), 0.2).tolist() == [False, False, True]
    assert torch.equal(
        wm.held_out_rows(episode, 0.2)[:30], wm.held_out_rows(episode[:30], 0.2)
    )  # once held out, for good
    # of a single episode the end is held out, and both parts have some
    assert wm.held_out_rows(torch.full((15,), 3), 0.2).tolist() == [False] * 12 + [True] * 3
    for share, num in ((0.0, 1), (1.0, 5)):
        assert (
            wm.held_out_rows(torch.zeros(10, dtype=torch.long), share).tolist() == [False] * (10 - num) + [True] * num
        )
    with pytest.raises(SystemExit, match=r"hold 9 steps of one episode, .*initial-steps"):
        wm.held_out_rows(torch.full((9,), 3), 0.2)


def test_random_actions_and_noise():
    envs = RealEnvs("TestWorldRamp-v0", 1000, CPU, 1, noise=0.5)
    _, r, _, _ = envs.step(torch.tensor([[0.0, 1.0]]).expand(1000, 2))
    assert r.mean().item() == pytest.approx(0.75, abs=0.05)  # half of the actions are random
    first, second = (RealEnvs("Pendulum-v1", 1, CPU, 1, noise) for noise in (0.0, 0.3))
    assert not torch.equal(first.step(torch.zeros(1, 1))[0], second.step(torch.zeros(1, 1))[0])
    a = envs.random_action(torch.zeros(4000, 2), seeded())
    assert (a.sum(1) == 1).all() and a[:, 0].mean().item() == pytest.approx(0.5, abs=0.03)
    a = first.random_action(torch.zeros(4000, 3), seeded())
    assert a.abs().max() <= 1 and a.mean().abs() < 0.03 and a.std().item() == pytest.approx(3**-0.5, abs=0.02)


def test_evaluation_counts_one_episode_each():
    agent = RolloutActorCritic(2, 2, (4,), True)
    with torch.no_grad():
        agent.actor[-1].bias.copy_(torch.tensor([0.0, 50.0]))  # action 4
    returns, steps = wm.evaluate_in_reality(RealEnvs("TestWorldRamp-v0", 3, CPU, 1), agent)
    assert returns.tolist() == [7, 7, 7] and steps["alive"].all() and len(steps["s"]) == 7


# ---------------------------------------------------------------------------------------------------------- the loop


both_scripts = pytest.mark.parametrize("script", [wm, gp], ids=["ensemble", "process"])


class Watched:
    """A script's parts, replaced by ones that do next to nothing and note how they are called."""

    def __init__(self, monkeypatch, script=wm, checks=()) -> None:
        self.script, self.members = script, 5 if script is wm else 1
        self.envs, self.fits, self.rollouts, self.updates = [], [], [], []
        self.checks, self.gaps, self.evaluations, self.left = [], [], [], [*checks]
        names = ("policy_rollout", "improve_policy", "imagined_returns", "evaluate_in_reality", "open_loop_errors")
        for name in (*names, "RealEnvs", "fit_networks" if script is wm else "fit_termination"):
            monkeypatch.setattr(script, name, getattr(self, name))
        monkeypatch.setattr(gp.GaussianProcessModel, "fit", lambda model, data, args, rng: len(data["s"]))

    def main(self, **flags):
        return self.script.main(self.script.Args(**RAMP | flags))

    def RealEnvs(self, env_id, num_envs, device, seed, noise=0.0, video=None):
        self.envs.append((num_envs, seed, noise))
        return RealEnvs(env_id, num_envs, device, seed, noise, video)

    def fit_networks(self, env_model, data, held_out, args, rng):
        torch.testing.assert_close(env_model.x_mean[:2], data["s"].mean(0))
        assert torch.equal(held_out, wm.held_out_rows(data["episode"]))
        self.fits.append(data)
        return {"losses/model_loss": 0.5}

    fit_termination = fit_networks

    def policy_rollout(self, envs, agent, num_steps, rng):
        self.rollouts.append((envs, num_steps))
        torch.testing.assert_close(agent.mean, self.fits[-1]["s"].mean(0) if self.fits else torch.zeros(2))
        return {}

    def improve_policy(self, agent, optimizer, batch, scale, args, rng):
        with torch.no_grad():
            agent.actor[-1].bias += torch.tensor([1.0, 0.0])
            agent.critic[-1].bias += 1
        self.updates.append((scale, optimizer.param_groups[0]["lr"]))
        return torch.tensor([1.0, 2.0, 3.0]) * len(self.updates)

    def imagined_returns(self, imagine, agent, s, horizon, rng, greedy):
        assert horizon == 100 and getattr(imagine, "keywords", {"fixed": True}) == {"fixed": True}
        if greedy:
            self.gaps.append(s)
            return torch.full((len(s),), 40.0)
        self.checks.append((s, rng.initial_seed(), rng.get_state()))
        returns = torch.tensor(self.left.pop(0)[: self.members]) if self.left else torch.zeros(1)
        return returns.repeat_interleave(len(s) // returns.numel())

    def evaluate_in_reality(self, envs, agent):
        self.evaluations.append((len(envs.s), agent.actor[-1].bias[0].item(), agent.critic[-1].bias[0].item()))
        return np.array([20.0, 30.0]), {}

    def open_loop_errors(self, env_model, steps, rng):
        return {"model/error_at_1": 0.25}


RAMP = SMALL | {"env_id": "TestWorldRamp-v0", "total_timesteps": 50, "initial_steps": 21, "steps_per_iteration": 20}


@both_scripts
def test_the_loop_collects_fits_and_measures(monkeypatch, watch, script):
    watched, random_actions = Watched(monkeypatch, script), watch(RealEnvs, "random_action")
    scaled = watch(script.RolloutActorCritic, "standardize")
    flags = {"action_noise": 0.5} if script is wm else {}
    rows = watched.main(seed=3, **flags)
    assert {noise for _, _, noise in watched.envs} == {flags.get("action_noise", 0.0)}
    assert [row["global_step"] for row in rows] == [21, 41, 50]  # the last iteration is cut at the end
    assert len(random_actions) == 21  # in the first iteration only
    assert [seed for num, seed, _ in watched.envs if num == 1] == [300_000, 300_001, 300_002, 300_003]
    assert [seed for num, seed, _ in watched.envs if num == 2] == 3 * [350_000]  # the same episodes each time
    assert [len(data["s"]) for data in watched.fits] == [21, 41, 50]
    assert [call[-1] for call, _ in scaled] == [False, True, True]  # `keep`: from the second fit on
    assert script is wm or [row["losses/gp_loss"] for row in rows] == [21, 41, 50]
    numbers = [*(i // 7 for i in range(21)), *(3 + i // 7 for i in range(20)), *(6 + i // 7 for i in range(9))]
    assert watched.fits[-1]["episode"].tolist() == numbers
    assert torch.equal(watched.fits[-1]["first"], watched.fits[-1]["s"][:, 0] == 0)
    for row, data, before, starts in zip(rows, watched.fits, (0, 21, 41), watched.gaps, strict=True):
        new = data["r"][before:]
        episodes = math.ceil(len(new) / 7)
        assert row["charts/episodic_return"] == pytest.approx(new.sum().item() / episodes)
        assert row["charts/episodic_length"] == len(new) / episodes
        assert row["eval/return"] == 25 and row["charts/imagined_return"] == 40 and row["charts/gap"] == 15
        assert row["losses/model_loss"] == 0.5 and row["model/error_at_1"] == 0.25
        assert len(starts) == 20 * watched.members and (starts[:, 0] == 0).all()  # from real first states
        assert set(starts[:, 1].tolist()) <= set(data["s"][:, 1].tolist())
    assert rows == sorted(rows, key=lambda row: row["charts/minutes"])  # they are added up


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (wm, {"start_states": "visited", "sample_member": "trajectory"}),
        (wm, {"start_states": "initial", "sample_member": "step"}),
        (gp, {}),
    ],
)
def test_the_loop_trains_in_imagination(monkeypatch, script, flags):
    watched = Watched(monkeypatch, script)
    (row,) = watched.main(total_timesteps=21, policy_updates=4, gamma=0.9, **flags)
    data, (envs, num_steps) = watched.fits[0], watched.rollouts[0]
    starts = data["s"][data["first"]] if flags.get("start_states") == "initial" else data["s"]
    assert num_steps == 10 and envs.s.shape == (20, 2) and envs.horizon == 8 and torch.equal(envs.starts, starts)
    assert all(other is envs for other, _ in watched.rollouts) and len(watched.rollouts) == 4
    assert watched.updates == 4 * [(pytest.approx(0.1 / data["r"].mean().item()), 1e-3)]
    (chosen, seed, state), *later = watched.checks
    assert len(chosen) == 40 * watched.members and seed == 1 and {*chosen[:, 0].tolist()} <= {*starts[:, 0].tolist()}
    assert all(torch.equal(x[0], chosen) and torch.equal(x[2], state) for x in later)  # the same luck at each check
    assert [row[f"losses/{name}"] for name in ("policy_loss", "value_loss", "entropy")] == [2.5, 5, 7.5]
    if script is wm:
        assert envs.imagine.keywords == {"fixed": flags["sample_member"] == "trajectory"}
        watched.main(total_timesteps=21, reward_scale=0.5)
        assert watched.updates[-1][0] == 0.5


@both_scripts
@pytest.mark.parametrize(
    ("checks", "kwargs", "made", "kept"),
    [
        # 4 of 5 members improve, then 3 of 5, then 4 of 5 over the best; then it fails twice in a row. The process has
        # the first of them
        ([[0.0] * 5, [1.0, 1, 1, 1, -1], [0.0, 2, 2, 2, -2], [2.0, 2, 2, 2, -2], [2.0] * 5, [2.0] * 5], {}, 10, 6),
        ([[0.0] * 5, [1.0, 1, 1, 1, -1], [0.0, 2, 2, 2, -2]], {"check_patience": 1}, 4, 2),  # the paper's rule
        ([[0.0] * 5] + [[-1.0] * 5] * 4 + [[1.0] * 5] * 3, {}, 14, 10),  # goes on until a first improvement
        ([[0.0] * 5] * 11, {"improvement_share": 0.0}, 20, 20),  # without the rule
        ([[0.0] * 5] + [[-1.0] * 5] * 10, {}, 20, 0),  # never an improvement: the first actor comes back
        ([[0.0] * 5, [1.0] * 5, [2.0] * 5], {"policy_updates": 3}, 3, 3),  # the last update is judged too
    ],
)
def test_the_stopping_rule(monkeypatch, script, checks, kwargs, made, kept):
    if script is gp and "improvement_share" in kwargs:
        pytest.skip("the process has no members that could disagree")
    watched = Watched(monkeypatch, script, checks)
    (row,) = watched.main(**{"policy_updates": 20, "total_timesteps": 21} | kwargs)
    assert watched.left == [] and row["charts/policy_updates"] == made == len(watched.updates)
    assert watched.evaluations == [(2, kept, made)]  # the best actor is back, the critic stays


@both_scripts
def test_imagination_that_is_not_finite_is_named(monkeypatch, script):
    flag = "--model-learning-rate" if script is wm else "--gp-learning-rate"
    with pytest.raises(SystemExit, match=rf"iteration 1 imagines .* not finite: lower {flag}"):
        Watched(monkeypatch, script, [[math.nan]]).main()


def test_the_loop_without_a_model(monkeypatch):
    watched = Watched(monkeypatch)
    flags = {"model": "real", "num_envs": 4, "num_steps": 10, "total_timesteps": 200, "anneal_lr": True}
    rows = watched.main(**flags)
    assert [row["global_step"] for row in rows] == [80, 160, 200] and watched.fits == watched.checks == []
    assert watched.envs == [(4, 100_000, 0.0)] + 3 * [(2, 150_000, 0.0)]
    assert all(envs is watched.rollouts[0][0] and n == 10 for envs, n in watched.rollouts)  # one environment, no resets
    assert watched.rollouts[0][0].s.shape == (4, 2)
    assert watched.updates == [(1.0, pytest.approx(1e-3 * (1 - 0.2 * i))) for i in range(5)]
    assert watched.evaluations[-1] == (2, 5, 5) and "charts/gap" not in rows[0]
    watched.main(**flags, reward_scale=0.01)
    assert watched.updates[-1][0] == 0.01


@both_scripts
def test_a_run_stops_at_its_return(monkeypatch, script, tmp_path):
    watched = Watched(monkeypatch, script)
    assert len(watched.main(stop_return=25.0)) == 1
    assert len(watched.main(stop_return=25.1, save_model=False, exp_name="other")) == 3
    (folder,) = tmp_path.glob("runs/*other*")
    assert {path.name for path in folder.iterdir()} == {"metrics.csv", "checkpoint.pt"}


@pytest.mark.parametrize(
    ("script", "flags", "cut", "more"),
    [
        (wm, {"env_id": "TestWorldRamp-v0"}, {"iterations": 1}, ["--iterations", "9"]),
        (wm, {"env_id": "Pendulum-v1", "model": "deterministic"}, {"iterations": 1}, ["--iterations", "9"]),
        (gp, {"gp_points": 40, "gp_steps": 3}, {"total_timesteps": 80}, ["--total-timesteps", "160"]),
    ],
)
def test_a_resumed_run_is_the_whole_run(script, flags, cut, more, tmp_path):
    whole = script.main(script.Args(**SMALL | flags, exp_name="whole"))
    half = script.main(script.Args(**SMALL | flags | cut, exp_name="half"))
    (path,) = tmp_path.glob("runs/*half*/checkpoint.pt")
    resume = ["--resume", str(path)]
    with pytest.raises(SystemExit, match=r"agent.pt can't go on: --resume takes a checkpoint.pt"):
        script.main(script.parse_args(["--resume", str(path.with_name("agent.pt"))]))
    rest = script.main(script.parse_args([*resume, *more]))
    times = {"charts/minutes": 0}
    assert [row | times for row in rest] == [row | times for row in whole] and half == rest[:1]
    assert rest[1]["charts/minutes"] > rest[0]["charts/minutes"]
    with pytest.raises(SystemExit, match="has had all of its 160 steps"):
        script.main(script.parse_args(resume))
    with pytest.raises(SystemExit, match="made with another environment, or other sizes"):
        script.main(script.parse_args([*resume, "--hidden", "9", "--total-timesteps", "200"]))


@both_scripts
def test_evaluation_of_a_file(script, tmp_path, capsys):
    script.main(script.Args(**SMALL | {"total_timesteps": 80, "seed": 2}))
    (path,) = tmp_path.glob("runs/*/agent.pt")
    rows = script.main(script.parse_args(["--evaluate", str(path), "--eval-episodes", "9"]))
    agent = RolloutActorCritic(4, 2, (8,), True)
    agent.load_state_dict(torch.load(path, weights_only=True)["agent"])
    envs = RealEnvs("CartPole-v1", 9, CPU, 275_000)  # other episodes than training's and --stop-return's
    returns, _ = wm.evaluate_in_reality(envs, agent)
    assert rows == [{"eval/return": returns.mean()}]
    assert f"9 episodes: return {returns.mean():.4g} ± {1.96 * returns.std() / 3:.2g}" in capsys.readouterr().out


def test_cartpole_gets_better_in_imagination():
    args = {"num_envs": 100, "num_steps": 40, "policy_updates": 12, "eval_episodes": 5, "model_epochs": 60}
    (row,) = main(Args(total_timesteps=300, initial_steps=300, seed=101, **args))  # fifteen random episodes
    assert row["eval/return"] >= 60  # a random policy has 20
