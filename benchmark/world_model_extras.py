"""What world models are asked beside learning curves.

    python benchmark/world_model_extras.py speed          # imagined steps a CPU second
    python benchmark/world_model_extras.py likelihood     # Gaussian processes against networks, on held-out steps

Each writes benchmark/results/world_model_<WHAT>.csv.
"""

import itertools
import math
import time
from typing import Literal

import numpy as np
import torch
import tyro
from common import show, write_rows
from torch import Tensor

import world_model_gp as gp
import world_model_rollouts as wm


def speed() -> list[dict]:
    """Policy and value included: Gaussian 2x64 networks, batch 4096, CartPole's sizes."""
    wm.keep_freed_memory()
    rng, rows = torch.Generator().manual_seed(1), []
    bounds = (torch.full((4,), -torch.inf), torch.full((4,), torch.inf))
    for K in (1, 5):
        env_model = wm.EnsembleModel(K, 4, 2, (64, 64), True, bounds)
        agent = wm.RolloutActorCritic(4, 2, (64, 64), True)
        envs = wm.ImaginedEnvs(env_model.step, 0.1 * torch.randn(1000, 4), 4096, 100, rng)
        times = []
        for _ in range(6):  # the first one warms up
            clock = time.process_time()
            wm.policy_rollout(envs, agent, 50, rng)
            times.append(time.process_time() - clock)
        row = {"members": K, "batch": 4096, "rollout_steps_per_second": round(50 * 4096 / min(times[1:]))}
        rows.append(show(row))
    return rows


def random_steps(env_id: str, num: int, seed: int) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    envs = wm.RealEnvs(env_id, 1, torch.device("cpu"), seed)
    data = wm.collect(envs, envs.random_action, num, 0, torch.Generator().manual_seed(seed))
    if data["episode"][-1] == 0:  # hold a fifth of a single episode out from the networks
        data["episode"] = (torch.arange(num) >= 0.8 * num).long()
    return data, envs.bounds


def scores(mean: Tensor, deviation: Tensor, target: Tensor) -> dict[str, float]:
    """Of the mixture of K Gaussians (K, B, S): the log density of Δs, in the mean and the median, and its error."""
    density = torch.distributions.Normal(mean, deviation).log_prob(target).logsumexp(0) - math.log(len(mean))
    error = (mean.mean(0) - target).square().mean().sqrt()
    result = {"log_density": density.mean(), "median_log_density": density.median(), "rmse": error}
    return {name: x.item() for name, x in result.items()}


def predicted(model: str, data: dict[str, Tensor], bounds: tuple, x: Tensor, rng: torch.Generator):
    """A fitted model, and the means and deviations (K, B, S) of what it expects of x (B, S + A)."""
    S, A = data["s"].shape[1], data["a"].shape[1]
    if model == "gp":
        env_model = gp.GaussianProcessModel(S, A, bounds)
        env_model.standardize(data)
        env_model.fit(data, gp.Args(), rng)
        mean, variance = (y[None, :, :S].detach() for y in env_model(x))
        return env_model, mean, variance.sqrt()
    env_model = wm.EnsembleModel(5 if model == "ensemble" else 1, S, A, (64, 64), True, bounds)
    env_model.standardize(data)
    wm.fit_networks(env_model, data, wm.held_out_rows(data["episode"]), wm.Args(), rng)
    mean, logvar = (y[..., :S].detach() for y in env_model(x.expand(env_model.K, -1, -1)))
    return env_model, mean, (logvar / 2).exp()


def likelihood(seeds: int, points: int) -> list[dict]:
    """Models that are fitted to `points` random steps, on 2,000 others."""
    rows = []
    for env_id, model in itertools.product(("CartPole-v1", "Pendulum-v1"), ("gp", "ensemble", "single")):
        test, bounds = random_steps(env_id, 2000, 900)
        own = []
        for seed in range(1, seeds + 1):
            data, _ = random_steps(env_id, points, 10_000 + seed)
            wm.seed_everything(seed, True)
            rng, x = torch.Generator().manual_seed(seed), torch.cat([test["s"], test["a"]], 1)
            env_model, mean, deviation = predicted(model, data, bounds, x, rng)
            target = ((wm.targets(test) - env_model.y_mean) / env_model.y_std)[:, : mean.shape[2]]
            own.append(scores(mean, deviation, target))
            rows.append({"env_id": env_id, "points": points, "model": model, "seed": seed} | own[-1])
        means = {name: float(np.mean([row[name] for row in own])) for name in own[0]}
        show({"env_id": env_id, "model": model, "seeds": seeds} | means)
    return rows


def main(what: tyro.conf.Positional[Literal["speed", "likelihood"]], seeds: int = 5, points: int = 300) -> None:
    rows = speed() if what == "speed" else likelihood(seeds, points)
    write_rows(rows, f"world_model_{what}.csv")


if __name__ == "__main__":
    tyro.cli(main)
