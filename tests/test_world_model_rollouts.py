"""world_model_rollouts.py: likelihoods, Gaussian processes, ensembles, imagination, policy gradients, data, loop."""

import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

import world_model_rollouts
from world_model_rollouts import (
    EXPERTS,
    TRUE_REWARDS,
    Args,
    EnsembleModel,
    GaussianProcessModel,
    ImaginedEnvs,
    RealEnvs,
    RolloutActorCritic,
    cholesky_with_jitter,
    clipped_losses,
    collect,
    evaluate_in_reality,
    fit_networks,
    held_out_rows,
    imagined_returns,
    improve_policy,
    load_data,
    main,
    open_loop_errors,
    policy_rollout,
    save_data,
    spreads,
    targets,
)

CPU = torch.device("cpu")
SMALL = {
    "total_timesteps": 160, "initial_steps": 80, "steps_per_iteration": 80, "model_epochs": 5, "model_hidden": (8,),
    "hidden": (8,), "num_envs": 20, "num_steps": 10, "horizon": 8, "policy_updates": 4, "check_frequency": 4,
    "eval_episodes": 2, "num_minibatches": 2, "gp_points": 40, "gp_steps": 3, "improvement_share": 0.0,
}  # fmt: skip


class RampEnv(gym.Env):
    """State (t, episode), scaled. Ends by itself, or is truncated, after 7 steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), dtype=np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, truncates: bool = False) -> None:
        self.truncates, self.episode = truncates, 0

    def _observe(self):
        return np.array([self.t / 10, self.episode / 100], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.episode += 1
        return self._observe(), {}

    def step(self, action):
        self.t += 1
        return self._observe(), float(action), self.t == 7 and not self.truncates, self.t == 7 and self.truncates, {}


gym.register("TestWorldRamp-v0", entry_point=RampEnv)
gym.register("TestWorldRampTruncated-v0", entry_point=RampEnv, kwargs={"truncates": True})


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wide(S: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((S,), -torch.inf), torch.full((S,), torch.inf)


def linear_data(N: int = 400) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """s' = A s + B a, r = s_0 - a, ends where s'_0 > 1; 20 episodes of N / 20 steps."""
    rng = generator()
    A, B = torch.tensor([[0.9, 0.2], [-0.1, 1.05]]), torch.tensor([[0.0], [0.5]])
    s, a = torch.randn(N, 2, generator=rng), torch.rand(N, 1, generator=rng) * 2 - 1
    s2 = s @ A.T + a @ B.T
    data = {"s": s, "a": a, "s2": s2, "r": s[:, 0] - a[:, 0], "end": (s2[:, 0] > 1).float()}
    return data | {"episode": torch.arange(N) // (N // 20), "first": torch.arange(N) % (N // 20) == 0}, A, B


# ----------------------------------------------------------------------------------------------------- likelihoods


def test_the_loss_is_the_gaussian_likelihood_and_the_cross_entropy():
    torch.manual_seed(1)
    data, _, _ = linear_data(40)
    model = EnsembleModel(3, 2, 1, (8,), True, wide(2))
    model.standardize(data)
    columns = (torch.cat([data["s"], data["a"]], 1), targets(data), data["s2"], data["end"])
    x, y, s2, end = (c.expand(3, *c.shape) for c in columns)
    mean, logvar = model(x)
    normal = torch.distributions.Normal(mean, (logvar / 2).exp())
    likelihood = normal.log_prob((y - y[0].mean(0)) / y[0].std(0)) + math.log(2 * math.pi) / 2
    p = model.end_logit(s2).sigmoid()
    entropy = -(end * p.log() + (1 - end) * (1 - p).log()).mean(1)
    torch.testing.assert_close(model.loss(x, y, s2, end), -likelihood.mean((1, 2)) + entropy, rtol=1e-4, atol=1e-5)
    squares = EnsembleModel(3, 2, 1, (8,), False, wide(2))
    squares.standardize(data)
    expected = ((squares(x)[0] - (y - y[0].mean(0)) / y[0].std(0)) ** 2).mean((1, 2))
    p = squares.end_logit(s2).sigmoid()
    expected -= (end * p.log() + (1 - end) * (1 - p).log()).mean(1)
    torch.testing.assert_close(squares.loss(x, y, s2, end), expected, rtol=1e-4, atol=1e-5)


def test_log_variance_is_bounded():
    model = EnsembleModel(2, 2, 1, (), True, wide(2))
    for bias, low, high in ((100.0, 0.4, 0.51), (-100.0, -10.01, -9.9)):
        with torch.no_grad():
            model.net.biases[0][..., 3:] = bias
        _, logvar = model(torch.zeros(2, 1, 3))
        assert (logvar > low).all() and (logvar < high).all()


def numpy_posterior(x, y, z, scale, signal, noise):
    def k(u, v):
        return signal**2 * np.exp(-0.5 * (((u[:, None] - v[None]) / scale) ** 2).sum(-1))

    K = k(x, x) + (noise**2 + 1e-6) * np.eye(len(x))
    inverse = np.linalg.inv(K)
    mean = k(z, x) @ inverse @ y
    variance = signal**2 - np.einsum("ij,jk,ik->i", k(z, x), inverse, k(z, x)) + noise**2 + 1e-6
    nll = 0.5 * y @ inverse @ y + 0.5 * np.linalg.slogdet(K)[1] + len(x) / 2 * np.log(2 * np.pi)
    return mean, variance, nll / len(x)


def small_process() -> tuple[GaussianProcessModel, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    model = GaussianProcessModel(1, 1, (4,), wide(1))
    with torch.no_grad():
        model.log_scale.copy_(torch.tensor([[0.1, -0.4], [0.5, 0.2]]))
        model.log_signal.copy_(torch.tensor([0.3, -0.2]))
        model.log_noise.copy_(torch.tensor([-1.5, -2.5]))
    return model, torch.randn(25, 2, dtype=torch.float64), torch.randn(2, 25, dtype=torch.float64)


def test_gaussian_process_posterior_and_marginal_likelihood_in_closed_form():
    model, x, y = small_process()
    model.condition(x, y)
    z = torch.randn(7, 2)
    mean, logvar = model(z[None])
    nll = model.negative_log_likelihood(x, y)
    for o in range(2):
        hyper = (model.log_scale[o].exp(), model.log_signal[o].exp(), model.log_noise[o].exp())
        expected = numpy_posterior(x.numpy(), y[o].numpy(), z.numpy(), *(h.detach().double().numpy() for h in hyper))
        np.testing.assert_allclose(mean[0, :, o].detach(), expected[0], rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(logvar[0, :, o].exp().detach(), expected[1], rtol=5e-3, atol=2e-4)
        assert nll[o].item() == pytest.approx(expected[2], rel=1e-6)


def test_gaussian_process_is_sure_where_smooth_data_are_dense():
    """k** - |L⁻¹k*|² is a small difference of large numbers: rounded to single precision, it would be 0 or far off."""
    model = GaussianProcessModel(1, 1, (4,), wide(1))
    with torch.no_grad():
        model.log_signal.fill_(3.0)
        model.log_noise.fill_(-5.5)
    x = torch.cartesian_prod(*[torch.linspace(-1, 1, 7, dtype=torch.float64)] * 2)
    model.condition(x, x.sin().T.contiguous())
    z = torch.rand(50, 2) * 2 - 1
    _, logvar = model(z[None])
    hyper = (model.log_scale[0].exp(), model.log_signal[0].exp(), model.log_noise[0].exp())
    expected = numpy_posterior(
        x.numpy(), x[:, 0].sin().numpy(), z.double().numpy(), *(h.detach().double().numpy() for h in hyper)
    )
    np.testing.assert_allclose(logvar[0, :, 0].exp().detach(), expected[1], rtol=0.2)


def test_every_update_of_the_policy_is_judged(tmp_path, monkeypatch):
    """Updates after the last multiple of --check-frequency too: else they would be thrown away unseen."""
    monkeypatch.chdir(tmp_path)
    checks, imagined = [], world_model_rollouts.imagined_returns
    monkeypatch.setattr(
        world_model_rollouts, "imagined_returns", lambda *args: checks.append(args[5]) or imagined(*args)
    )
    main(Args(**SMALL | {"policy_updates": 5, "total_timesteps": 80, "improvement_share": 0.7}))
    assert checks == [False, False, False, True]  # after 0, 4 and 5 updates; greedy, for the gap


def test_gaussian_process_as_scikit_learns():
    gaussian_process = pytest.importorskip("sklearn.gaussian_process")
    model, x, y = small_process()
    model.condition(x, y)
    z = torch.randn(7, 2)
    mean, _ = model(z[None])
    for o in range(2):
        scale, signal = model.log_scale[o].exp().tolist(), (2 * model.log_signal[o]).exp().item()
        kernel = signal * gaussian_process.kernels.RBF(scale)
        noise = (2 * model.log_noise[o]).exp().item() + 1e-6
        theirs = gaussian_process.GaussianProcessRegressor(kernel, alpha=noise, optimizer=None).fit(x, y[o])
        np.testing.assert_allclose(mean[0, :, o].detach(), theirs.predict(z), rtol=2e-3, atol=2e-4)


def test_marginal_likelihood_gradient_matches_finite_differences():
    model, x, y = small_process()
    model.double()
    model.negative_log_likelihood(x, y).sum().backward()
    for parameter in (model.log_scale, model.log_signal, model.log_noise):
        flat = parameter.data.view(-1)
        for i in range(len(flat)):
            old, values = flat[i].item(), []
            for step in (1e-6, -1e-6):
                flat[i] = old + step
                values.append(model.negative_log_likelihood(x, y).sum().item())
            flat[i] = old
            slope = (values[0] - values[1]) / 2e-6
            assert slope == pytest.approx(parameter.grad.view(-1)[i].item(), rel=1e-4, abs=1e-7)


def test_jitter_grows_until_the_factor_exists():
    low_rank = torch.ones(2, 6, 6, dtype=torch.float64)
    low_rank[1] -= 3e-5 * torch.eye(6)  # an eigenvalue of -3e-5: only a jitter of 1e-4 helps
    L = cholesky_with_jitter(low_rank)
    torch.testing.assert_close(L @ L.mT, low_rank + 1e-4 * torch.eye(6, dtype=torch.float64))
    exact = torch.eye(3, dtype=torch.float64)[None] * 4
    torch.testing.assert_close(cholesky_with_jitter(exact), exact / 2, rtol=0, atol=0)
    with pytest.raises(SystemExit, match="finite"):
        cholesky_with_jitter(torch.full((1, 3, 3), torch.nan))


def test_gaussian_process_learns_a_linear_system_and_keeps_to_its_limit():
    data, A, B = linear_data(400)
    model = GaussianProcessModel(2, 1, (4,), wide(2))
    model.standardize(data)
    first = model.fit(data, Args(gp_points=60, gp_steps=1), generator())
    assert model.fit(data, Args(gp_points=60, gp_steps=60), generator()) < first - 1
    assert len(model.points) == 60
    s, a = torch.randn(50, 2), torch.rand(50, 1) * 2 - 1
    mean, logvar = model(torch.cat([s, a], 1)[None])
    error = mean[0] * model.y_std + model.y_mean - torch.cat([s @ A.T + a @ B.T - s, s[:, :1] - a], 1)
    assert error.square().mean() < 1e-3 and logvar.isfinite().all()
    copy = GaussianProcessModel(2, 1, (4,), wide(2))
    copy.load_state_dict(model.state_dict())
    torch.testing.assert_close(copy(torch.cat([s, a], 1)[None])[0], mean, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------- ensembles


@pytest.mark.parametrize("gaussian", [False, True])
def test_a_linear_system_is_learned_to_its_matrices(gaussian):
    torch.manual_seed(1)
    data, A, B = linear_data()
    model = EnsembleModel(3, 2, 1, (), gaussian, wide(2))
    model.standardize(data)
    args = Args(model_epochs=150, model_learning_rate=1e-2, model_patience=150)
    fit_networks(model, data, held_out_rows(data["episode"], 0.2), args, generator())
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
    held_out = held_out_rows(data["episode"], 0.2)
    args = Args(model_epochs=40, model_learning_rate=0.3, model_batch_size=16)  # too fast: the loss goes up and down
    _, validation, _ = fit_networks(model, data, held_out, args, generator())
    test = [x[held_out] for x in (torch.cat([data["s"], data["a"]], 1), targets(data), data["s2"], data["end"])]
    assert model.loss(*(x.expand(2, *x.shape) for x in test)).mean().item() == pytest.approx(validation, rel=1e-5)


def test_standardisation_there_and_back():
    data, _, _ = linear_data(300)
    data["s"] = data["s"] * torch.tensor([3.0, 0.1]) + torch.tensor([5.0, -2.0])
    data["s2"] = data["s"] + 2.0 + 0.5 * torch.randn(300, 2, generator=generator())
    model = EnsembleModel(2, 2, 1, (), False, wide(2))
    model.standardize(data)
    x = (torch.cat([data["s"], data["a"]], 1) - model.x_mean) / model.x_std
    np.testing.assert_allclose(x[:, :2].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(x[:, :2].std(0), 1, rtol=1e-4)
    assert torch.equal(x[:, 2:], data["a"])  # actions stay as they are
    with torch.no_grad():
        model.net.weights[0].zero_()
        model.net.biases[0].copy_(((targets(data)[0] - model.y_mean) / model.y_std).expand(2, 1, 3))
    s2, r, _ = model.step(data["s"][:1], data["a"][:1], generator())  # predicts row 0's target
    torch.testing.assert_close(s2[0], data["s2"][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(r[0], data["r"][0], rtol=1e-5, atol=1e-5)
    assert spreads(torch.ones(5, 2)).tolist() == [1, 1]


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
    model, rng = marked_model(5), generator()
    s, a = torch.zeros(1003, 1), torch.zeros(1003, 1)  # 1003: the shares aren't even
    drawn = torch.stack([model.step(s, a, rng)[0][:, 0] for _ in range(60)])  # (steps, rows)
    counts = torch.stack([(drawn == k).sum(1) for k in range(5)])
    assert counts.min() >= 197 and counts.max() <= 204  # a fifth of the rows each, at every step
    share = torch.stack([(drawn == k).float().mean(0) for k in range(5)])  # and a row draws them all
    assert share.min() > 0 and share.std().item() == pytest.approx(math.sqrt(0.2 * 0.8 / 60), rel=0.15)
    follows = (drawn[1:] == drawn[:-1]).float().mean().item()  # independent of the member before
    assert follows == pytest.approx(0.2, abs=0.01)
    fixed = model.step(torch.zeros(10, 1), torch.zeros(10, 1), rng, fixed=True)[0][:, 0]
    assert fixed.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_each_place_in_the_batch_keeps_its_member_over_a_trajectory():
    starts = torch.linspace(0, 0.9, 10)[:, None]  # the members move by whole numbers: s mod 1 tells the start
    model, moved = marked_model(5), {}
    with torch.no_grad():
        model.end_net.weights[0].zero_()
        model.end_net.biases[0].fill_(-100.0)
    for fixed in (False, True):
        envs, steps = ImaginedEnvs(model, starts, 13, 3, generator(), fixed), []  # 13: not a multiple of 5
        for _ in range(9):  # three episodes of 3 steps
            s = envs.s
            s2, _, _, truncated = envs.step(torch.zeros(13, 1))
            steps.append((s2 - s)[:, 0].round())
        assert truncated.all()
        moved[fixed] = torch.stack(steps)
    assert (moved[True] == moved[True][0]).all()
    assert moved[True][0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    assert (moved[False] != moved[False][0]).any(0).all()


def test_the_flag_chooses_between_members(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen, step = [], ImaginedEnvs.step
    monkeypatch.setattr(ImaginedEnvs, "step", lambda self, a: seen.append(self.fixed) or step(self, a))
    for how, fixed in (("step", False), ("trajectory", True)):
        main(Args(**SMALL | {"sample_member": how, "iterations": 1}))
        assert set(seen) == {fixed}
        seen.clear()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Acrobot-v1"])
def test_true_rewards_are_those_of_the_environment(env_id):
    envs, rng, seen = RealEnvs(env_id, 4, CPU, 1), np.random.default_rng(1), []
    for t in range(400):
        s = envs.s
        if env_id == "Acrobot-v1" and t >= 50:  # random steps hardly ever end it
            a = torch.eye(3)[[EXPERTS[env_id](x.numpy()) for x in s]]
        elif envs.discrete:
            a = torch.eye(envs.action_size)[rng.integers(envs.action_size, size=4)]
        else:
            a = torch.as_tensor(rng.uniform(-1, 1, (4, envs.action_size)), dtype=torch.float32)
        s2, r, terminated, _ = envs.step(a)
        torch.testing.assert_close(TRUE_REWARDS[env_id](s, a, s2), r, rtol=0, atol=1e-4)
        assert env_id != "Acrobot-v1" or torch.equal(r == 0, terminated)
        seen.append(terminated)
    assert torch.stack(seen).any() == (env_id != "Pendulum-v1")


def test_the_true_reward_replaces_the_learned_one(tmp_path, monkeypatch):
    torch.manual_seed(1)
    model = EnsembleModel(3, 2, 1, (8,), True, wide(2))
    s, a = torch.randn(9, 2), torch.randn(9, 1)
    learned, again = (model.step(s, a, generator()) for _ in range(2))
    model.true_reward = lambda s, a, s2: 100 * s[..., 1] + 10 * a[..., 0] + s2[..., 0]
    s2, r, end = model.step(s, a, generator())
    torch.testing.assert_close(r, 100 * s[:, 1] + 10 * a[:, 0] + s2[:, 0])
    assert torch.equal(s2, learned[0]) and torch.equal(end, learned[2])  # nothing else changes
    assert torch.equal(learned[1], again[1]) and not torch.allclose(learned[1], r)
    monkeypatch.chdir(tmp_path)
    paid, rollout = [], world_model_rollouts.policy_rollout
    monkeypatch.setattr(world_model_rollouts, "policy_rollout", lambda *x: paid.append(rollout(*x)) or paid[-1])
    main(Args(**SMALL | {"iterations": 1, "true_reward": True}))
    assert len(paid) == 4 and all((batch["r"] == 1).all() for batch in paid)


def test_a_step_belongs_to_its_row():
    torch.manual_seed(1)
    model = EnsembleModel(1, 2, 1, (8,), False, wide(2))
    s, a = torch.randn(50, 2), torch.randn(50, 1)
    mean, _ = model(torch.cat([s, a], 1)[None])
    s2, r, end = model.step(s, a, generator())
    torch.testing.assert_close(s2, s + mean[0, :, :2].detach())
    torch.testing.assert_close(r, mean[0, :, 2].detach())
    torch.testing.assert_close(end, model.end_logit(s2[None])[0].sigmoid().detach())


def test_gaussian_steps_have_the_predicted_spread_and_stay_in_the_space():
    model = EnsembleModel(2, 1, 1, (), True, (torch.tensor([-1.0]), torch.tensor([40.0])))
    with torch.no_grad():
        model.net.weights[0].zero_()
        model.net.biases[0].copy_(torch.tensor([1.0, 0.0, math.log(0.25), -9.0]))
    model.y_std[0] = 3.0
    s2, _, _ = model.step(torch.full((20_000, 1), 20.0), torch.zeros(20_000, 1), generator())
    assert s2.mean().item() == pytest.approx(23.0, abs=0.05)
    _, logvar = model(torch.zeros(2, 1, 2))
    sigma = 3 * (logvar[0, 0, 0] / 2).exp().item()
    assert s2.std().item() == pytest.approx(sigma, rel=0.02) and sigma == pytest.approx(1.5, rel=0.3)
    assert model.step(torch.full((10, 1), 40.0), torch.zeros(10, 1), generator())[0].max() <= 40.0


def test_disagreement_is_the_spread_of_the_members_means():
    disagreement = marked_model(2).disagreement(torch.zeros(3, 1), torch.zeros(3, 1))  # means 0 and 1
    assert disagreement.tolist() == pytest.approx(3 * [math.sqrt(0.25 / 2)])  # the reward's part is 0


# -------------------------------------------------------------------------------------------------------- imagination


class CountingModel:
    """s' = s + 1, r = s, the end where s' >= 3 (or with probability `end`)."""

    K = 1

    def __init__(self, end: float | None = None) -> None:
        self.end = end

    def step(self, s, a, rng, fixed=False):
        s2 = s + 1
        end = (s2[:, 0] >= 3).float() if self.end is None else torch.full_like(s[:, 0], self.end)
        return s2, s[:, 0], end


def test_imagined_episodes_stop_at_the_predicted_end_and_at_the_horizon():
    envs = ImaginedEnvs(CountingModel(), torch.tensor([[0.0]]), 4, 10, generator())
    seen = []
    for _ in range(6):
        s2, _, terminated, truncated = envs.step(torch.zeros(4, 1))
        seen.append((s2[0, 0].item(), terminated[0].item(), truncated[0].item(), envs.s[0, 0].item()))
    assert seen == 2 * [(1, False, False, 1), (2, False, False, 2), (3, True, False, 0)]
    envs = ImaginedEnvs(CountingModel(0.0), torch.tensor([[7.0]]), 4, 2, generator())
    seen = [
        (x[0][0, 0].item(), x[2][0].item(), x[3][0].item()) for x in (envs.step(torch.zeros(4, 1)) for _ in range(4))
    ]
    assert seen == 2 * [(8, False, False), (9, False, True)] and (envs.s == 7).all()
    # an unsure end is drawn, and an end at the horizon is no truncation
    envs = ImaginedEnvs(CountingModel(0.3), torch.tensor([[0.0]]), 10_000, 1, generator())
    _, _, terminated, truncated = envs.step(torch.zeros(10_000, 1))
    assert terminated.float().mean().item() == pytest.approx(0.3, abs=0.02) and not (terminated & truncated).any()
    assert (terminated | truncated).all()


def test_imagined_return_counts_the_steps_that_are_reached():
    agent = RolloutActorCritic(1, 2, (), True)
    r = imagined_returns(CountingModel(), agent, torch.zeros(6, 1), 50, generator(), True)
    assert r.tolist() == [0 + 1 + 2]
    r = imagined_returns(CountingModel(0.5), agent, torch.ones(6, 1), 3, generator(), True)
    assert r.tolist() == [1 + 0.5 * 2 + 0.25 * 3]
    model = marked_model(3, 2)  # each member by itself: s = 0, k, 2k; the reward is 0 but for the bias
    with torch.no_grad():
        model.net.biases[0][:, 0, 1] = torch.tensor([1.0, 2.0, 3.0])
        model.end_net.weights[0].zero_()
        model.end_net.biases[0].fill_(-100.0)
    assert imagined_returns(model, agent, torch.zeros(6, 1), 4, generator(), True).tolist() == [4, 8, 12]


def test_open_loop_errors_of_a_known_model():
    steps = {
        "s": torch.arange(5.0)[:, None, None].expand(5, 2, 1),
        "s2": torch.arange(1.0, 6)[:, None, None].expand(5, 2, 1),
        "a": torch.zeros(5, 2, 1), "alive": torch.tensor([[True, True]] * 3 + [[True, False]] * 2),
    }  # fmt: skip
    model = marked_model(1)
    model.x_std[0] = 2.0
    with torch.no_grad():
        model.net.biases[0][0, 0, 0] = 1.1  # a tenth too far at each step
    errors = open_loop_errors(model, steps, (1, 3, 5, 10), generator())
    assert errors == pytest.approx(
        {"model/error_at_1": 0.05, "model/error_at_3": 0.15, "model/error_at_5": 0.25}, rel=1e-4
    )


# ---------------------------------------------------------------------------------------------------- policy gradients


def test_clipped_losses_by_hand():
    advantage, old = torch.tensor([1.0, -1.0, 3.0, -3.0]), torch.zeros(4)
    A = advantage / advantage.std()
    log_prob = torch.tensor([1.5, 1.5, 0.9, 0.5]).log()
    expected = -(1.2 * A[0] + 1.5 * A[1] + 0.9 * A[2] + 0.8 * A[3]) / 4  # min of both is 0.8 A for ρ = 0.5 and A < 0
    policy_loss, value_loss = clipped_losses(log_prob, old, advantage, torch.ones(4), torch.zeros(4), Args())
    assert policy_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert value_loss.item() == pytest.approx((0 + 4 + 4 + 16) / 8)
    _, clipped = clipped_losses(log_prob, old, advantage, torch.ones(4), torch.zeros(4), Args(clip_vloss=True))
    assert clipped.item() == pytest.approx((0.8**2 + 4 + 2.8**2 + 16) / 8)


def actor_gradient(agent: RolloutActorCritic, batch: dict[str, torch.Tensor], advantage: torch.Tensor) -> torch.Tensor:
    """The gradient of PPO's objective at ρ = 1 by the logits of one-hot states, advantages not standardised."""
    log_prob, _ = agent.log_prob(agent.policy(batch["s"].flatten(0, 1)), batch["a"].flatten(0, 1))
    flat = advantage.flatten()
    loss, _ = clipped_losses(
        log_prob, batch["log_prob"].flatten(), flat, torch.zeros_like(flat), torch.zeros_like(flat), Args()
    )
    agent.zero_grad()
    loss.backward()
    return -agent.actor[0].weight.grad.T * flat.std()  # (states, actions)


def set_tables(agent: RolloutActorCritic, logits: torch.Tensor, values: torch.Tensor) -> None:
    with torch.no_grad():
        agent.actor[0].weight.copy_(logits.T)
        agent.critic[0].weight.copy_(values[None])


class BanditModel:
    def step(self, s, a, rng, fixed=False):
        return s, a @ torch.tensor([1.0, 0.0, 3.0]) + torch.randn(len(s), generator=rng), torch.ones(len(s))


def test_policy_gradient_of_a_bandit():
    agent, logits = RolloutActorCritic(1, 3, (), True), torch.tensor([[0.3, 0.0, -0.5]])
    set_tables(agent, logits, torch.zeros(1))
    batch = policy_rollout(
        ImaginedEnvs(BanditModel(), torch.ones(1, 1), 200_000, 5, generator()), agent, 1, generator(2)
    )
    assert batch["terminated"].all()
    p, r = logits[0].softmax(0), torch.tensor([1.0, 0.0, 3.0])
    exact = p * (r - p @ r)  # ∂/∂θ_a Σ_b p_b r_b
    np.testing.assert_allclose(actor_gradient(agent, batch, batch["r"])[0], exact, atol=0.02)


class TwoStateModel:
    """Action 0 stays, 1 goes over; r(s, a) below; each step ends with probability 0.2."""

    r = torch.tensor([[0.0, 0.5], [1.0, -1.0]])

    def step(self, s, a, rng, fixed=False):
        state, action = s.argmax(1), a.argmax(1)
        s2 = torch.eye(2)[(state + action) % 2]
        return s2, self.r[state, action], torch.full((len(s),), 0.2)


@pytest.mark.parametrize("horizon", [3, 1000])  # truncated episodes go on with their value: the gradient is the same
def test_policy_gradient_of_two_states(horizon):
    args = Args(gamma=0.9, gae_lambda=0.8)
    agent, logits = RolloutActorCritic(2, 2, (), True), torch.tensor([[0.4, 0.0], [-0.2, 0.1]])
    p, over = logits.softmax(1), torch.tensor([[0, 1], [1, 0]])  # the next state by state and action
    P = torch.stack([torch.stack([p[s, 0] if s == n else p[s, 1] for n in range(2)]) for s in range(2)])
    V = torch.linalg.solve(torch.eye(2) - args.gamma * 0.8 * P, (p * TwoStateModel.r).sum(1))
    Q = TwoStateModel.r + args.gamma * 0.8 * V[over]
    torch.testing.assert_close((p * Q).sum(1), V)
    set_tables(agent, logits, V)
    envs = ImaginedEnvs(TwoStateModel(), torch.eye(2)[:1], 40_000, horizon, generator())
    batch = policy_rollout(envs, agent, 8, generator(2))
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.0)
    improve_policy(
        agent, optimizer, batch, 1.0, replace(args, update_epochs=1), generator(3)
    )  # fills in the advantages
    visits = batch["s"].mean((0, 1))  # d(s)
    exact = visits[:, None] * p * (Q - V[:, None])  # Σ_s d(s) Σ_a ∂π(a|s) Q(s, a)
    np.testing.assert_allclose(actor_gradient(agent, batch, batch["advantage"]), exact, atol=0.006)
    assert exact.abs().min() > 0.04


def test_the_value_behind_a_truncation_is_that_of_the_true_last_state():
    agent = RolloutActorCritic(1, 2, (), True)
    set_tables(agent, torch.zeros(1, 2), torch.tensor([10.0]))  # V(s) = 10 s
    envs = ImaginedEnvs(CountingModel(0.0), torch.zeros(1, 1), 3, 2, generator())
    batch = policy_rollout(envs, agent, 3, generator())
    assert batch["truncated"][:, 0].tolist() == [False, True, False]
    assert batch["next_value"][:, 0].tolist() == [10, 20, 10]  # 20, not the 0 of the reset state


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
    a = agent.sample_action(out, generator())
    log_prob, entropy = agent.log_prob(out, a)
    sigma = agent.log_std.exp()
    expected = (-(((a - out) / sigma) ** 2) / 2 - agent.log_std - math.log(2 * math.pi) / 2).sum(1)
    torch.testing.assert_close(log_prob, expected)
    torch.testing.assert_close(entropy[0], (agent.log_std + math.log(2 * math.pi * math.e) / 2).sum())
    assert torch.equal(agent.sample_action(out, None), out)


def test_environments_take_clipped_actions_and_the_policy_learns_from_those_before():
    class Watching(CountingModel):
        def step(self, s, a, rng, fixed=False):
            taken.append(a)
            return super().step(s, a, rng, fixed)

    torch.manual_seed(1)
    agent, taken, s = RolloutActorCritic(1, 2, (), False), [], torch.zeros(40, 1)
    with torch.no_grad():
        agent.actor[-1].bias.copy_(torch.tensor([0.3, -3.0]))
    assert agent.act(s, None)[0].tolist() == pytest.approx([0.3, -1.0])
    imagined_returns(Watching(), agent, s, 3, generator(), False)
    batch = policy_rollout(ImaginedEnvs(Watching(), s, 40, 5, generator()), agent, 3, generator())
    assert len(taken) == 6 and torch.stack(taken).abs().max() == 1
    assert torch.equal(torch.stack(taken[3:]), batch["a"].clamp(-1, 1)) and (batch["a"] < -2).any()


def test_discrete_actions_are_drawn_by_their_probabilities():
    agent = RolloutActorCritic(1, 3, (), True)
    out = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(30_000, 3)
    np.testing.assert_allclose(agent.sample_action(out, generator()).mean(0), [0.2, 0.5, 0.3], atol=0.015)
    assert agent.sample_action(out, None)[0].tolist() == [0, 1, 0]
    log_prob, entropy = agent.log_prob(out[:1], torch.tensor([[0.0, 0.0, 1.0]]))
    assert log_prob.item() == pytest.approx(math.log(0.3))
    assert entropy.item() == pytest.approx(-sum(p * math.log(p) for p in (0.2, 0.5, 0.3)))


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("env_id", ["TestWorldRamp-v0", "TestWorldRampTruncated-v0"])
def test_no_row_crosses_a_reset(env_id):
    envs = RealEnvs(env_id, 1, CPU, 1)
    data = collect(envs, lambda s: torch.tensor([[0.0, 1.0]]), 30, 5)
    torch.testing.assert_close(data["s2"][:, 0] - data["s"][:, 0], torch.full((30,), 0.1))  # no teleport to t = 0
    assert torch.equal(data["s2"][:, 1], data["s"][:, 1])  # the environment's own episode number
    torch.testing.assert_close(data["episode"] - 4.0, 100 * data["s"][:, 1])
    assert torch.equal(data["first"], data["s"][:, 0] == 0) and data["first"].sum() == 5
    at_the_end = (data["s2"][:, 0] * 10).round() == 7
    assert torch.equal(data["end"] == 1, at_the_end & ("Truncated" not in env_id))  # a truncation is no end


def test_held_out_rows_are_whole_episodes():
    episode = torch.arange(20).repeat_interleave(3)
    held_out = held_out_rows(episode, 0.2)
    assert held_out.sum() == 12 and torch.equal(held_out.view(20, 3).any(1), held_out.view(20, 3).all(1))
    assert held_out_rows(torch.tensor([0, 0, 1]), 0.2).tolist() == [False, False, True]
    assert torch.equal(held_out_rows(episode, 0.2)[:30], held_out_rows(episode[:30], 0.2))  # once held out, for good


def test_of_a_single_episode_the_end_is_held_out(tmp_path, monkeypatch):
    assert held_out_rows(torch.full((15,), 3), 0.2).tolist() == [False] * 12 + [True] * 3
    for share, num in ((0.0, 1), (1.0, 5), (0.5, 5)):  # both parts have some
        assert held_out_rows(torch.zeros(10, dtype=torch.long), share).tolist() == [False] * (10 - num) + [True] * num
    with pytest.raises(SystemExit, match=r"hold 9 steps of one episode, .*initial-steps"):
        held_out_rows(torch.full((9,), 3), 0.2)
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(
        world_model_rollouts, "held_out_rows", lambda *args: seen.append(held_out_rows(*args)) or seen[-1]
    )
    main(Args(**SMALL | {"env_id": "Pendulum-v1", "initial_steps": 200, "total_timesteps": 250}))
    assert seen[0].tolist() == [False] * 160 + [True] * 40  # one episode of 200 steps
    assert seen[1].tolist() == [False] * 200 + [True] * 50  # two: the last one


def test_data_sets_there_and_back_and_refused(tmp_path):
    envs = RealEnvs("CartPole-v1", 1, CPU, 1)
    data = collect(envs, lambda s: torch.tensor([[1.0, 0.0]]), 30, 0)
    path = tmp_path / "data.npz"
    save_data(str(path), data, "CartPole-v1")
    loaded = load_data(str(path), "CartPole-v1", envs)
    assert loaded.keys() == data.keys() and all(torch.equal(loaded[name], data[name]) for name in data)
    with pytest.raises(SystemExit, match=r"holds steps of CartPole-v1.*--env-id CartPole-v1"):
        load_data(str(path), "Acrobot-v1", RealEnvs("Acrobot-v1", 1, CPU, 1))
    for change, message in (
        ({"s": data["s"][:9]}, "damaged"),
        ({name: x[:0] for name, x in data.items()}, "is empty"),
        ({"r": data["r"] * torch.nan}, "not finite"),
    ):
        save_data(str(path), data | change, "CartPole-v1")
        with pytest.raises(SystemExit, match=message):
            load_data(str(path), "CartPole-v1", envs)
    save_data(str(path), data, "CartPole-v1")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"nothing", b""):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match=r"data\.npz"):
            load_data(str(path), "CartPole-v1", envs)
    with pytest.raises(SystemExit, match="can't read"):
        load_data(str(tmp_path / "none.npz"), "CartPole-v1", envs)


def test_action_noise():
    envs = RealEnvs("TestWorldRamp-v0", 4000, CPU, 1, noise=0.5)
    _, r, _, _ = envs.step(torch.tensor([[0.0, 1.0]]).expand(4000, 2))
    assert r.mean().item() == pytest.approx(0.75, abs=0.03)  # half of the actions are random
    first, second = (RealEnvs("Pendulum-v1", 1, CPU, 1, noise) for noise in (0.0, 0.3))
    assert not torch.equal(first.step(torch.zeros(1, 1))[0], second.step(torch.zeros(1, 1))[0])


@pytest.mark.parametrize(("env_id", "least"), [("CartPole-v1", 499), ("Pendulum-v1", -250), ("Acrobot-v1", -150)])
def test_experts_are_good(env_id, least):
    envs, returns = [gym.make(env_id) for _ in range(5)], []
    for i, env in enumerate(envs):
        (o, _), total, done = env.reset(seed=i), 0.0, False
        while not done:
            a = EXPERTS[env_id](o)
            o, r, terminated, truncated, _ = env.step(np.array([2 * np.clip(a, -1, 1)]) if "Pend" in env_id else a)
            total, done = total + float(r), terminated or truncated
        returns.append(total)
    assert np.mean(returns) >= least


def test_evaluate_counts_one_episode_each():
    agent = RolloutActorCritic(2, 2, (4,), True)
    envs = RealEnvs("TestWorldRamp-v0", 3, CPU, 1)
    with torch.no_grad():
        agent.actor[-1].bias.copy_(torch.tensor([0.0, 50.0]))  # action 1 pays 1
    returns, steps = evaluate_in_reality(envs, agent)
    assert returns.tolist() == [7, 7, 7] and steps["alive"].all() and len(steps["s"]) == 7


# ---------------------------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize(
    ("env_id", "model"),
    [("CartPole-v1", "ensemble"), ("Pendulum-v1", "deterministic"), ("CartPole-v1", "gp"), ("CartPole-v1", "real"),
     ("Pendulum-v1", "real")],
)  # fmt: skip
def test_training_moves_the_weights_and_reproduces(tmp_path, monkeypatch, env_id, model):
    monkeypatch.chdir(tmp_path)
    args = SMALL | {"env_id": env_id, "model": model, "save_model": True}
    args |= {"initial_steps": 401, "total_timesteps": 440} if env_id == "Pendulum-v1" else {}
    args |= {"total_timesteps": 400} if model == "real" else {}
    states = []
    for seed, total in (
        (1, args["total_timesteps"] // 2),
        (1, args["total_timesteps"]),
        (1, args["total_timesteps"]),
        (2, 160),
    ):
        total = max(total, args["initial_steps"]) if model != "real" else total
        main(Args(**args | {"seed": seed, "total_timesteps": total, "exp_name": f"run{len(states)}"}))
        (path,) = tmp_path.glob(f"runs/*run{len(states)}*/agent.pt")
        states.append(torch.load(path, weights_only=True))
        if len(states) == 3 and env_id == "Pendulum-v1":
            return
    first, later, again, other = (state["agent"]["actor.0.weight"] for state in states)
    assert not torch.equal(first, later) and torch.equal(later, again) and not torch.equal(later, other)
    if model != "real":
        first, later = (state["env_model"]["end_net.weights.0"] for state in states[:2])
        assert not torch.equal(first, later) and len(states[1]["data"]["s"]) == 160


def stopping(monkeypatch, tmp_path, returns: list[list[float]], **kwargs) -> tuple[dict, list[dict]]:
    """A run whose members report these returns at the checks of its one iteration."""
    monkeypatch.chdir(tmp_path)
    states, left, original = [], [*returns], world_model_rollouts.imagined_returns

    def watched(env_model, agent, s, horizon, rng, greedy):
        if greedy:  # the measurement at the end of an iteration
            return original(env_model, agent, s, horizon, rng, greedy)
        states.append({name: x.clone() for name, x in agent.state_dict().items()})
        return torch.tensor(left.pop(0))

    monkeypatch.setattr(world_model_rollouts, "imagined_returns", watched)
    rows = main(
        Args(
            **SMALL
            | {
                "iterations": 1,
                "save_model": True,
                "policy_updates": 20,
                "improvement_share": 0.7,
                "check_frequency": 2,
            }
            | kwargs
        )
    )
    (path,) = tmp_path.glob("runs/*/agent.pt")
    return torch.load(path, weights_only=True)["agent"], states, rows


def test_an_iteration_ends_when_too_few_members_improve(tmp_path, monkeypatch):
    # 4 of 5 improve, then 3 of 5, then 4 of 5 over the best; then it fails twice in a row
    returns = [[0.0] * 5, [1.0, 1, 1, 1, -1], [2.0, 2, 2, 0, -2], [2.0, 2, 2, 2, -2], [2.0] * 5, [2.0] * 5]
    agent, states, rows = stopping(monkeypatch, tmp_path, returns, check_patience=2)
    assert len(states) == 6 and rows[0]["charts/policy_updates"] == 10
    assert all(torch.equal(agent[name], states[3][name]) for name in agent if "critic" not in name)  # the best is back
    assert torch.equal(agent["critic.0.weight"], states[5]["critic.0.weight"])  # but the critic stays
    assert not torch.equal(states[3]["actor.0.weight"], states[5]["actor.0.weight"])


def test_the_papers_rule_ends_at_the_first_failure(tmp_path, monkeypatch):
    returns = [[0.0] * 5, [1.0, 1, 1, 1, -1], [2.0, 2, 2, 0, -2]]
    agent, states, rows = stopping(monkeypatch, tmp_path, returns, check_patience=1)
    assert len(states) == 3 and rows[0]["charts/policy_updates"] == 4
    assert all(torch.equal(agent[name], states[1][name]) for name in agent if "critic" not in name)


def test_an_iteration_goes_on_until_a_first_improvement(tmp_path, monkeypatch):
    returns = [[0.0] * 5] + [[-1.0] * 5] * 4 + [[1.0] * 5] * 3  # four failures, an improvement, two failures
    agent, states, _ = stopping(monkeypatch, tmp_path, returns, check_patience=2)
    assert len(states) == 8 and torch.equal(agent["actor.0.weight"], states[5]["actor.0.weight"])


def test_without_the_rule_all_updates_are_made(tmp_path, monkeypatch):
    agent, states, rows = stopping(monkeypatch, tmp_path, [[0.0] * 5] * 11, improvement_share=0.0)
    assert len(states) == 11 and rows[0]["charts/policy_updates"] == 20
    assert torch.equal(agent["actor.0.weight"], states[-1]["actor.0.weight"])


def test_a_model_that_says_nan_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = EnsembleModel.step

    def broken(self, s, a, rng, fixed=False):
        s2, r, end = step(self, s, a, rng, fixed)
        return (s2 if fixed else s2 * torch.nan), r, end

    monkeypatch.setattr(EnsembleModel, "step", broken)
    with pytest.raises(SystemExit, match=r"the model imagines .* not finite, in iteration 1: lower --model-learning"):
        main(Args(**SMALL))


def test_a_fit_that_diverges_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="model"):
        main(Args(**SMALL | {"model_learning_rate": 1e30}))


def test_plain_recipe_on_a_data_set_of_an_expert(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(Args(**SMALL | {"iterations": 1, "behavior": "expert", "initial_steps": 900, "total_timesteps": 5000,
                         "save_data": "expert.npz", "exp_name": "first"}))  # fmt: skip
    with np.load("expert.npz") as file:
        assert len(file["s"]) == 900 and file["end"].sum() == 0 and file["first"].sum() == 2
    (row,) = main(Args(**SMALL | {"iterations": 1, "data": "expert.npz", "total_timesteps": 5000, "save_model": True}))
    assert row["global_step"] == 900
    (path,) = tmp_path.glob("runs/*/agent.pt")
    main(Args(**SMALL | {"iterations": 1, "behavior": str(path), "exp_name": "third"}))
    with pytest.raises(SystemExit, match="holds no agent for Acrobot-v1"):
        main(Args(**SMALL | {"env_id": "Acrobot-v1", "behavior": str(path)}))


@pytest.mark.parametrize("model", ["ensemble", "gp"])
def test_resume_and_evaluate(tmp_path, monkeypatch, capsys, model):
    monkeypatch.chdir(tmp_path)
    args = SMALL | {"save_model": True, "model": model}
    whole = main(Args(**args | {"total_timesteps": 160, "exp_name": "whole"}))
    main(Args(**args | {"total_timesteps": 160, "iterations": 1, "exp_name": "half"}))
    (path,) = tmp_path.glob("runs/*half*/agent.pt")
    state = torch.load(path, weights_only=True)
    state["args"]["iterations"] = None  # as if it had been stopped after its first iteration
    torch.save(state, path)
    rest = main(Args(resume=str(path)))
    assert [row["global_step"] for row in rest] == [160]
    for name in ("eval/return", "losses/model_loss", "losses/policy_loss"):
        assert rest[0][name] == pytest.approx(whole[1][name], rel=1e-6)  # bit for bit, but for the episode's luck
    lines = (path.parent / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["global_step", "80", "160"]
    seeds, init = [], RealEnvs.__init__
    monkeypatch.setattr(RealEnvs, "__init__", lambda self, *a: seeds.append(range(a[3], a[3] + a[1])) or init(self, *a))
    main(Args(**args | {"total_timesteps": 80, "eval_episodes": 30}))
    training = {seed for part in seeds for seed in part}
    evaluation = main(Args(evaluate=str(path), eval_episodes=30))[0]["eval/return"]
    assert len(seeds[-1]) == 30 and not training & set(seeds[-1])  # other episodes than those that stopped the run
    agent = RolloutActorCritic(4, 2, (8,), True)
    agent.load_state_dict(torch.load(path, weights_only=True)["agent"])
    assert evaluation == evaluate_in_reality(RealEnvs("CartPole-v1", 30, CPU, seeds[-1][0]), agent)[0].mean()
    with pytest.raises(SystemExit, match="has had all of its 160 steps"):
        main(Args(resume=str(path)))
    with pytest.raises(SystemExit, match=r"--horizon: .* brings its own flags"):
        main(Args(resume=str(path), horizon=7))
    assert [row["global_step"] for row in main(Args(resume=str(path), total_timesteps=200))] == [200]
    torch.save({"args": {"not_a_flag": 7}}, path)
    with pytest.raises(SystemExit, match=r"was written by another script"):
        main(Args(evaluate=str(path)))
    path.write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="can't read the checkpoint"):
        main(Args(resume=str(path)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"horizon": 0}, "--horizon 0"),
        ({"env_id": "NoPole-v0"}, "NoPole"),
        ({"env_id": "FrozenLake-v1"}, "vectors"),
        ({"gamma": 1.1}, "--gamma"),
        ({"gp_points": 501}, "from 2 to 500"),
        ({"initial_steps": 5}, "more --initial-steps"),
        ({"behavior": "expert", "env_id": "MountainCar-v0"}, "no expert for MountainCar-v0"),
        ({"true_reward": True, "env_id": "MountainCar-v0"}, "--true-reward is known for .*MountainCar-v0's is learned"),
        ({"behavior": "none.pt"}, "can't read the checkpoint none.pt"),
        ({"data": "none.npz"}, "can't read none.npz"),
        ({"evaluate": "none.pt"}, "can't read the checkpoint none.pt"),
        ({"num_envs": 1, "num_steps": 3, "num_minibatches": 2}, "--num-minibatches"),
    ],
)
def test_bad_flags_are_one_clear_line(tmp_path, monkeypatch, kwargs, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as error:
        main(Args(**SMALL | kwargs))
    assert "\n" not in str(error.value)


def test_cartpole_is_solved_in_imagination(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = {"num_envs": 250, "num_steps": 40, "policy_updates": 40, "eval_episodes": 5, "model_epochs": 150}
    (row,) = main(Args(total_timesteps=300, initial_steps=300, seed=101, **args))  # fifteen random episodes
    assert row["eval/return"] >= 80  # a random policy has 20
