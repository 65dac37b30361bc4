"""world_model_gp.py: posterior and marginal likelihood in closed form, and termination.

The loop and what it shares with world_model_rollouts.py are tested in test_world_model_rollouts.py.
"""

import numpy as np
import pytest
import test_world_model_rollouts as shared
import torch
from conftest import seeded

import world_model_gp
from world_model_gp import Args, GaussianProcessModel


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
    model = GaussianProcessModel(1, 1, shared.wide(1))
    with torch.no_grad():
        model.log_scale.copy_(torch.tensor([[0.1, -0.4], [0.5, 0.2]]))
        model.log_signal.copy_(torch.tensor([0.3, -0.2]))
        model.log_noise.copy_(torch.tensor([-1.5, -2.5]))
    return model, torch.randn(25, 2, dtype=torch.float64), torch.randn(2, 25, dtype=torch.float64)


def test_gaussian_process_posterior_and_marginal_likelihood_in_closed_form():
    model, x, y = small_process()
    model.condition(x, y)
    z = torch.randn(7, 2)
    mean, variance = model(z)
    nll = model.negative_log_likelihood(x, y)
    for o in range(2):
        hyper = (model.log_scale[o].exp(), model.log_signal[o].exp(), model.log_noise[o].exp())
        expected = numpy_posterior(x.numpy(), y[o].numpy(), z.numpy(), *(h.detach().double().numpy() for h in hyper))
        np.testing.assert_allclose(mean[:, o].detach(), expected[0], rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(variance[:, o].detach(), expected[1], rtol=5e-3, atol=2e-4)
        assert nll[o].item() == pytest.approx(expected[2], rel=1e-6)


def test_gaussian_process_is_sure_where_smooth_data_are_dense():
    """k** - |L⁻¹k*|² is a small difference of large numbers: rounded to single precision, it would be 0 or far off."""
    model = GaussianProcessModel(1, 1, shared.wide(1))
    with torch.no_grad():
        model.log_signal.fill_(3.0)
        model.log_noise.fill_(-5.5)
    x = torch.cartesian_prod(*[torch.linspace(-1, 1, 7, dtype=torch.float64)] * 2)
    model.condition(x, x.sin().T.contiguous())
    z = torch.rand(50, 2) * 2 - 1
    _, variance = model(z)
    hyper = (model.log_scale[0].exp(), model.log_signal[0].exp(), model.log_noise[0].exp())
    expected = numpy_posterior(
        x.numpy(), x[:, 0].sin().numpy(), z.double().numpy(), *(h.detach().double().numpy() for h in hyper)
    )
    np.testing.assert_allclose(variance[:, 0].detach(), expected[1], rtol=0.2)


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
    L = world_model_gp.cholesky_with_jitter(low_rank)
    torch.testing.assert_close(L @ L.mT, low_rank + 1e-4 * torch.eye(6, dtype=torch.float64))
    exact = torch.eye(3, dtype=torch.float64)[None] * 4
    torch.testing.assert_close(world_model_gp.cholesky_with_jitter(exact), exact / 2, rtol=0, atol=0)
    with pytest.raises(SystemExit, match="finite"):
        world_model_gp.cholesky_with_jitter(torch.full((1, 3, 3), torch.nan))


def test_gaussian_process_learns_a_linear_system_and_keeps_to_its_limit():
    data, A, B = shared.linear_data(400)
    model = GaussianProcessModel(2, 1, shared.wide(2))
    model.standardize(data)
    first = model.fit(data, Args(gp_points=60, gp_steps=1), seeded())
    assert model.fit(data, Args(gp_points=60, gp_steps=60), seeded()) < first - 1
    assert len(model.points) == 60
    s, a = torch.randn(50, 2), torch.rand(50, 1) * 2 - 1
    mean, variance = model(torch.cat([s, a], 1))
    error = mean * model.y_std + model.y_mean - torch.cat([s @ A.T + a @ B.T - s, s[:, :1] - a], 1)
    assert error.square().mean() < 1e-3 and variance.isfinite().all()


def test_a_state_that_never_changes_keeps_its_scale():
    data, _, _ = shared.linear_data(50)
    data["s"][:, 1] = 3.0
    model = GaussianProcessModel(2, 1, shared.wide(2))
    model.standardize(data)
    assert model.x_std[0] == data["s"][:, 0].std() and model.x_std[1] == 1


def test_steps_are_drawn_from_the_posterior_and_stay_in_the_space():
    model, x, y = small_process()
    model.bounds = (torch.tensor([-1e9]), torch.tensor([0.5]))
    model.x_mean[0], model.x_std[0] = 0.2, 2.0
    model.y_mean.copy_(torch.tensor([0.1, -3.0]))
    model.y_std.copy_(torch.tensor([0.01, 2.0]))
    model.condition(x, y)
    s, a = torch.full((20_000, 1), 0.3), torch.full((20_000, 1), -0.4)
    mean, variance = model(torch.tensor([[0.3, -0.4]]))
    s2, r, end = model.step(s, a, seeded())
    assert s2.mean().item() == pytest.approx(0.3 + 0.1 + 0.01 * mean[0, 0].item(), abs=1e-3)
    assert s2.std().item() == pytest.approx(0.01 * variance[0, 0].sqrt().item(), rel=0.03)
    assert r.mean().item() == pytest.approx(-3 + 2 * mean[0, 1].item(), abs=0.05)
    assert r.std().item() == pytest.approx(2 * variance[0, 1].sqrt().item(), rel=0.03)
    torch.testing.assert_close(end, model.end_net((s2 - 0.2) / 2).sigmoid()[:, 0].detach())
    assert model.step(s + 5, a, seeded())[0].max() == 0.5
    assert model.step(s - 1e6, a, seeded())[0].min().item() == pytest.approx(0.2 - 50 * 2)  # in sight of the data


def test_termination_is_learned_and_its_best_weights_come_back():
    torch.manual_seed(1)
    data, _, _ = shared.linear_data()
    model, held_out = GaussianProcessModel(2, 1, shared.wide(2)), world_model_gp.held_out_rows(data["episode"])
    model.standardize(data)
    args = Args(model_epochs=100, model_learning_rate=0.1)  # too fast: the loss goes up and down
    metrics = world_model_gp.fit_termination(model, data, held_out, args, seeded())
    with torch.no_grad():
        logits = model.end_logit(data["s2"][held_out])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, data["end"][held_out]).item()
    assert loss == pytest.approx(metrics["losses/validation_loss"], rel=1e-5) and loss < 0.1
    assert 20 < metrics["model/epochs"] < 100  # ended 20 epochs after the last better one
    assert ((logits > 0) == (data["end"][held_out] == 1)).float().mean() > 0.95
