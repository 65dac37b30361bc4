"""What world models are asked beside learning curves.

    python benchmark/world_model_extras.py speed          # imagined steps a CPU second
    python benchmark/world_model_extras.py likelihood     # Gaussian processes against networks, on held-out steps
    python benchmark/world_model_extras.py trajectories   # imagined episodes over real ones
    python benchmark/world_model_extras.py train --expert --true-reward --flags="--iterations 1 --initial-steps 1000"

`train` is a run of world_model_rollouts.py with the environment's own reward in imagination, or with first data of a
hand-written controller; `--flags` are the script's. The others write benchmark/results/world_model_<WHAT>.csv.
"""

import contextlib
import math
import pathlib
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Literal
from unittest import mock

import torch
import tyro
from common import ROOT, write_rows
from torch import Tensor

sys.path.insert(0, str(ROOT))

import world_model_gp as gp
import world_model_rollouts as wm

PENDULUM = "--env-id Pendulum-v1 --total-timesteps 4000 --initial-steps 600 --steps-per-iteration 400"


@dataclass
class Args:
    what: tyro.conf.Positional[Literal["speed", "likelihood", "trajectories", "train"]]  # what is measured
    seeds: int = 5  # seeds of likelihood
    flags: str = ""  # flags of world_model_rollouts.py, behind an equals sign
    expert: bool = False  # train: a hand-written controller collects the first data
    true_reward: bool = False  # train: imagined steps pay the environment's own reward


def speed(_: Args) -> list[dict]:
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
        rows.append({"members": K, "batch": 4096, "rollout_steps_per_second": round(50 * 4096 / min(times[1:]))})
    return rows


def random_steps(env_id: str, num: int, seed: int) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    envs = wm.RealEnvs(env_id, 1, torch.device("cpu"), seed)
    data = wm.collect(envs, envs.random_action, num, 0, torch.Generator().manual_seed(seed))
    if data["episode"][-1] == 0:  # hold a fifth of a single episode out from the networks
        data["episode"] = (torch.arange(num) >= 0.8 * num).long()
    return data, envs.bounds


@torch.no_grad()
def scores(mean: Tensor, deviation: Tensor, target: Tensor) -> dict[str, float]:
    """Of the mixture of K Gaussians (K, B, S): log density of a number of Δs, how often central 90 % intervals hold."""
    normal = torch.distributions.Normal(mean, deviation)
    density = normal.log_prob(target).logsumexp(0) - math.log(len(mean))
    inside = (normal.cdf(target).mean(0) - 0.5).abs() < 0.45
    error = (mean.mean(0) - target).square().mean().sqrt()
    result = {"log_density": density.mean(), "median_log_density": density.median()}
    result |= {"coverage_90": inside.float().mean(), "rmse": error}
    result["disagreement"] = mean.var(0, correction=0).mean(1).sqrt().mean()  # of the members: epistemic uncertainty
    return {name: x.item() for name, x in result.items()}


def likelihood(args: Args) -> list[dict]:
    rows, flags = [], wm.parse_args(shlex.split(args.flags))
    for env_id in ("CartPole-v1", "Pendulum-v1"):
        test, bounds = random_steps(env_id, 2000, 900)
        S, A = test["s"].shape[1], test["a"].shape[1]
        x = torch.cat([test["s"], test["a"]], 1)
        for num in (100, 300):
            for seed in range(1, args.seeds + 1):
                data, _ = random_steps(env_id, num, 10_000 + seed)
                for model, K in (("gp", 1), ("ensemble", 5), ("single", 1)):
                    wm.seed_everything(seed, True)
                    rng = torch.Generator().manual_seed(seed)
                    if model == "gp":
                        env_model = gp.GaussianProcessModel(S, A, bounds)
                        env_model.standardize(data)
                        env_model.fit(data, gp.Args(), rng)
                        mean, variance = (y[None, :, :S].detach() for y in env_model(x))
                    else:
                        env_model = wm.EnsembleModel(K, S, A, (64, 64), True, bounds)
                        env_model.standardize(data)
                        wm.fit_networks(env_model, data, wm.held_out_rows(data["episode"]), flags, rng)
                        mean, logvar = (y[..., :S].detach() for y in env_model(x.expand(K, -1, -1)))
                        variance = logvar.exp()
                    target = ((wm.targets(test) - env_model.y_mean) / env_model.y_std)[:, :S]
                    row = {"env_id": env_id, "points": num, "model": model, "seed": seed}
                    rows.append(row | scores(mean, variance.sqrt(), target))
    return rows


def trained(flags: str) -> tuple[wm.Args, dict]:
    """The flags and the last checkpoint of a run in a scratch folder."""
    args = wm.parse_args(shlex.split(flags))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        wm.main(args)
        (path,) = pathlib.Path("runs").glob("*/checkpoint.pt")
        return args, wm.load_checkpoint(str(path), "cpu")


def trajectories(args: Args) -> list[dict]:
    """Greedy episodes from the same three start states, real and five times imagined, by a policy of the model."""
    rows, particles, rng = [], 5, torch.Generator().manual_seed(1)
    for flags, column in (("--stop-return 475 --total-timesteps 2000", 2), (f"{PENDULUM} --stop-return -200", 0)):
        flags, state = trained(f"{flags} {args.flags}")
        real = wm.RealEnvs(flags.env_id, 3, torch.device("cpu"), 77)
        S, A = real.state_size, real.action_size
        env_model = wm.EnsembleModel(flags.ensemble_size, S, A, flags.model_hidden, True, real.bounds)
        agent = wm.RolloutActorCritic(S, A, flags.hidden, real.discrete)
        wm.load_parts({"env_model": env_model, "agent": agent}, state, flags.env_id)
        s = real.s.repeat_interleave(particles, 0)
        _, steps = wm.evaluate_in_reality(real, agent)
        for t, (states, alive) in enumerate(zip(steps["s"], steps["alive"], strict=True)):
            for e in alive.nonzero().flatten().tolist():
                row = {"env_id": flags.env_id, "kind": "real", "episode": e, "particle": 0}
                rows.append(row | {"t": t, "x": f"{states[e, column].item():.6g}"})
        alive = torch.ones(len(s))
        for t in range(real.max_steps):
            for i in (alive > 0).nonzero().flatten().tolist():
                row = {"env_id": flags.env_id, "kind": "imagined", "episode": i // particles, "particle": i % particles}
                rows.append(row | {"t": t, "x": f"{s[i, column].item():.6g}"})
            s, _, end = env_model.step(s, agent.act(s, None), rng)
            alive *= end < 0.5
    return rows


# Hand-written controllers: state -> action (continuous ones in units of the bounds)
def swing_up(s: list[float]) -> float:
    """Pendulum: pump energy until it suffices, then hold the top."""
    angle, energy = math.atan2(s[1], s[0]), s[2] ** 2 / 2 + 15 * (s[0] - 1)
    return -(12 * angle + 3 * s[2]) / 2 if abs(angle) < 0.5 else math.copysign(1, -s[2] if energy > 0.5 else s[2])


EXPERTS = {
    "CartPole-v1": lambda s: int(s[2] + 0.3 * s[3] + 0.03 * s[0] + 0.06 * s[1] > 0),
    "Pendulum-v1": swing_up,
    "Acrobot-v1": lambda s: 0 if s[4] > 0 else 2,
}
# The environments' own rewards, of tensors: (..., S), (..., A), (..., S) -> (...)
TRUE_REWARDS = {
    "CartPole-v1": lambda s, a, s2: torch.ones_like(s[..., 0]),
    "Pendulum-v1": lambda s, a, s2: (
        -(torch.atan2(s[..., 1], s[..., 0]) ** 2 + 0.1 * s[..., 2] ** 2 + 0.001 * (2 * a[..., 0]) ** 2)
    ),
    "Acrobot-v1": lambda s, a, s2: (s2[..., 1] * s2[..., 3] - s2[..., 0] * (1 + s2[..., 2]) > 1).float() - 1,
}


def train(args: Args) -> None:
    flags = wm.parse_args(shlex.split(args.flags))

    class TrueReward(wm.EnsembleModel):
        def step(self, s: Tensor, a: Tensor, rng: torch.Generator, fixed: bool = False) -> tuple[Tensor, ...]:
            s2, _, end = super().step(s, a, rng, fixed)
            return s2, TRUE_REWARDS[flags.env_id](s, a, s2), end

    class Expert(wm.RealEnvs):
        def random_action(self, s: Tensor, rng: torch.Generator) -> Tensor:
            a = torch.tensor([EXPERTS[flags.env_id](row) for row in s.tolist()])
            return torch.eye(self.action_size)[a] if self.discrete else a[:, None].clamp(-1, 1)

    model = TrueReward if args.true_reward else wm.EnsembleModel
    envs = Expert if args.expert else wm.RealEnvs
    with mock.patch.multiple(wm, EnsembleModel=model, RealEnvs=envs):
        wm.main(flags)


if __name__ == "__main__":
    args = tyro.cli(Args)
    rows = globals()[args.what](args)
    if rows:
        write_rows(rows, f"world_model_{args.what}.csv")
