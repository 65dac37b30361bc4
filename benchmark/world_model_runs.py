"""What world_model_rollouts.py reaches, by real steps; ensembles, early stopping, horizons, noise, Gaussian processes.

    OMP_NUM_THREADS=1 python benchmark/world_model_runs.py                       # run what is missing, then the report
    OMP_NUM_THREADS=1 python benchmark/world_model_runs.py --rows pendulum gp    # only these rows
    OMP_NUM_THREADS=1 python benchmark/world_model_runs.py --report-only         # tables and figures of what there is

A row is a setting, run once for each of its seeds from 1 on. A run that has ended leaves its own CSV file in
benchmark/results/world_model, one line an iteration; a run whose file exists isn't repeated. A run reaches a return at
its first evaluation (50 greedy episodes in the true environment) with that mean or more; one that never gets there
counts with all its steps, which is less than the truth. Interquartile mean: of the middle half of the seeds; intervals
are 95 % bootstrap ones over the seeds.
"""

import csv
import io
import os
import pathlib
import platform
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import world_model_rollouts as wm

GOALS = {"CartPole-v1": 475.0, "Acrobot-v1": -100.0, "Pendulum-v1": -200.0}
CARTPOLE = {"total_timesteps": 2000, "stop_return": 475.0}
PENDULUM = {
    "env_id": "Pendulum-v1", "total_timesteps": 4000, "initial_steps": 600, "steps_per_iteration": 400, 
    "stop_return": -200.0,
}  # fmt: skip
ACROBOT = {
    "env_id": "Acrobot-v1", "total_timesteps": 20_000, "initial_steps": 1000, "steps_per_iteration": 500, 
    "stop_return": -100.0,
}  # fmt: skip
REAL = {
    "model": "real", "num_steps": 128, "stop_return": 475.0, "policy_updates": 10, "hidden": (64, 64),
    "num_minibatches": 4,
}  # fmt: skip
# CleanRL's ppo.py, all of its hyperparameters
CLEANRL = REAL | {
    "total_timesteps": 500_000, "num_envs": 4, "learning_rate": 2.5e-4, "anneal_lr": True,
    "update_epochs": 4, "ent_coef": 0.01, "clip_vloss": True,
}  # fmt: skip
GP = {"model": "gp", "num_envs": 200, "total_timesteps": 500, "steps_per_iteration": 100, "stop_return": 475.0}
NOISY = {"total_timesteps": 600}
# row: (settings, seeds). The most important first
GRID: dict[str, tuple[dict[str, Any], int]] = {
    "cartpole": (CARTPOLE, 10),
    "cartpole_single": (CARTPOLE | {"ensemble_size": 1}, 10),
    "cartpole_cleanrl": (CLEANRL, 10),
    "cartpole_real": (REAL | {"total_timesteps": 300_000, "num_envs": 8, "reward_scale": 0.01}, 10),
    "pendulum": (PENDULUM, 10),
    "acrobot": (ACROBOT, 10),
    "gp": (GP, 10),
    "cartpole_never_stop": (CARTPOLE | {"improvement_share": 0.0}, 5),
    **{f"horizon_{h}": (CARTPOLE | {"horizon": h, "iterations": 1}, 5) for h in (5, 20, 50, 200, 500)},
    **{
        f"noise_{noise}_{model}": (NOISY | {"model": model, "action_noise": noise}, 5)
        for noise in (0.0, 0.2, 0.4)
        for model in ("ensemble", "deterministic")
    },
    "pendulum_single": (PENDULUM | {"ensemble_size": 1}, 5),
    "cartpole_initial": (CARTPOLE | {"start_states": "initial"}, 5),
}


@dataclass
class Args:
    rows: tuple[str, ...] = ()
    """which rows of the grid; none: all"""
    seeds: int = 10
    """at most so many seeds a row"""
    minutes: float = 1e9
    """start no run after so many minutes"""
    output_dir: str = "benchmark/results"
    """where the tables go"""
    figure_dir: str = "docs"
    """where the figures go"""
    report_only: bool = False
    """run nothing"""
    speed: bool = False
    """measure only the imagined steps per second of an ensemble of five at batch 4096"""
    likelihood: bool = False
    """measure only Gaussian processes against networks, by held-out likelihood and coverage"""
    trajectories: bool = False
    """record only imagined and real trajectories"""


def write(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    os.replace(temporary, path)


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    def number(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text

    with path.open(newline="", encoding="utf-8") as file:
        return [{k: number(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def train(**settings: Any) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """A run in a scratch folder: its rows, and its checkpoint if it was to save one."""
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(io.StringIO()):
        os.chdir(scratch)
        try:
            rows = wm.main(wm.Args(**settings))
            paths = [*pathlib.Path().glob("runs/*/agent.pt")]
            return rows, wm.load_checkpoint(paths[0], "cpu") if paths else None
        finally:
            os.chdir(home)


def run(name: str, seed: int, folder: pathlib.Path) -> None:
    settings = GRID[name][0]
    start = time.process_time()
    try:
        rows, _ = train(seed=seed, **settings)
    except SystemExit as e:
        print(f"  {name} {seed}: {e}", file=sys.stderr)
        return
    seconds = time.process_time() - start
    write(folder / f"{name}__{seed}.csv", [row | {"cpu_seconds": seconds} for row in rows])
    print(
        f"  {name} {seed}: {rows[-1]['global_step']} real steps, returns "
        f"{[round(row['eval/return'], 1) for row in rows[-6:]]}, {seconds:.0f} s of CPU",
        file=sys.stderr, flush=True,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ measurements


def speed(args: Args) -> None:
    """Imagined steps a CPU second, policy and value included: Gaussian 2x64 networks, batch 4096, CartPole's sizes."""
    wm.keep_freed_memory()
    wm.seed_everything(1, True)
    rng = torch.Generator().manual_seed(1)
    bounds = (torch.full((4,), -torch.inf), torch.full((4,), torch.inf))
    rows = []
    for K in (1, 5):
        env_model = wm.EnsembleModel(K, 4, 2, (64, 64), True, bounds)
        agent = wm.RolloutActorCritic(4, 2, (64, 64), True)
        envs = wm.ImaginedEnvs(env_model, 0.1 * torch.randn(1000, 4), 4096, 100, rng)
        wm.policy_rollout(envs, agent, 20, rng)
        best = {}
        for what in ("rollout", "model"):
            times = []
            for _ in range(5):
                clock = time.process_time()
                if what == "rollout":
                    wm.policy_rollout(envs, agent, 50, rng)
                else:
                    a = torch.eye(2)[torch.randint(2, (4096,), generator=rng)]
                    for _ in range(50):
                        env_model.step(envs.s, a, rng)
                times.append(time.process_time() - clock)
            best[what] = 50 * 4096 / min(times)
        rows.append({
            "members": K, "batch": 4096, "rollout_steps_per_second": best["rollout"],
            "model_steps_per_second": best["model"], "hardware": hardware(),
        })  # fmt: skip
        print(rows[-1])
    write(pathlib.Path(args.output_dir) / "world_model_speed.csv", rows)


def random_steps(env_id: str, num: int, seed: int) -> dict[str, torch.Tensor]:
    envs = wm.RealEnvs(env_id, 1, torch.device("cpu"), seed)
    rng = torch.Generator().manual_seed(seed)

    def act(_: torch.Tensor) -> torch.Tensor:
        a = torch.rand(1, envs.action_size, generator=rng)
        return torch.nn.functional.one_hot(a.argmax(1), envs.action_size).float() if envs.discrete else 2 * a - 1

    return wm.collect(envs, act, num, 0) | {"low": envs.low, "high": envs.high}


def likelihood(args: Args) -> None:
    """Mean held-out log density of a number of Δs (in units of its spread), and how often 90 % intervals hold it."""
    path, rows = pathlib.Path(args.output_dir) / "world_model_likelihood.csv", []
    wm.keep_freed_memory()
    for env_id in ("CartPole-v1", "Pendulum-v1"):
        test = random_steps(env_id, 2000, 900)
        S, A = test["s"].shape[1], test["a"].shape[1]
        bounds = (test.pop("low"), test.pop("high"))
        for num in (100, 300):
            for seed in range(1, min(args.seeds, 5) + 1):
                data = random_steps(env_id, num, 10_000 + seed)
                data = {name: data[name] for name in test}
                if data["episode"][-1] == 0:  # half of Pendulum's one episode is held out from the networks
                    data["episode"] = (torch.arange(num) >= 0.8 * num).long()
                for model in ("gp", "ensemble", "single"):
                    wm.seed_everything(seed, True)
                    rng = torch.Generator().manual_seed(seed)
                    if model == "gp":
                        env_model: Any = wm.GaussianProcessModel(S, A, (64, 64), bounds)
                    else:
                        env_model = wm.EnsembleModel(5 if model == "ensemble" else 1, S, A, (64, 64), True, bounds)
                    env_model.standardize(data)
                    settings = wm.Args()
                    if model == "gp":
                        env_model.fit(data, settings, rng)
                    else:
                        wm.fit_networks(env_model, data, wm.held_out_rows(data["episode"], 0.2), settings, rng)
                    with torch.no_grad():
                        x = torch.cat([test["s"], test["a"]], 1).expand(env_model.K, -1, -1)
                        mean, logvar = (y[..., :S] for y in env_model(x))  # (K, B, S)
                        target = ((wm.targets(test) - env_model.y_mean) / env_model.y_std)[:, :S]
                        normal = torch.distributions.Normal(mean, (logvar / 2).exp())
                        density = normal.log_prob(target).logsumexp(0) - np.log(env_model.K)  # of the mixture
                        inside = (normal.cdf(target).mean(0) - 0.5).abs() < 0.45
                        error = (mean.mean(0) - target).square().mean().sqrt()
                    rows.append({
                        "env_id": env_id, "points": num, "model": model, "seed": seed,
                        "log_density": density.mean().item(), "median_log_density": density.median().item(),
                        "coverage_90": inside.float().mean().item(), "rmse": error.item(),
                    })  # fmt: skip
                    write(path, rows)
    print(f"wrote {path}")


def trajectories(args: Args) -> None:
    """Closed-loop episodes from the same start states, real and imagined, by a policy trained on this model."""
    rows = []
    for name, column, steps in (("cartpole", 2, 500), ("pendulum", 0, 200)):
        _, state = train(seed=1, save_model=True, **GRID[name][0] | {"stop_return": GOALS.get(
            GRID[name][0].get("env_id", "CartPole-v1"))})  # fmt: skip
        settings = wm.Args(**state["args"])
        real = wm.RealEnvs(settings.env_id, 3, torch.device("cpu"), 77)
        env_model = wm.EnsembleModel(settings.ensemble_size, real.state_size, real.action_size, settings.model_hidden,
                                     True, (real.low, real.high))  # fmt: skip
        env_model.load_state_dict(state["env_model"])
        agent = wm.RolloutActorCritic(real.state_size, real.action_size, settings.hidden, real.discrete)
        agent.load_state_dict(state["agent"])
        rng, particles = torch.Generator().manual_seed(1), 5
        s = real.s.repeat_interleave(particles, 0)
        _, episodes = wm.evaluate_in_reality(real, agent)
        alive = torch.ones(len(s))
        for t in range(steps):
            for e in range(3):
                if t < len(episodes["s"]) and episodes["alive"][t, e]:
                    value = episodes["s"][t, e, column].item()
                    rows.append(
                        {"env_id": settings.env_id, "kind": "real", "episode": e, "particle": 0, "t": t, "x": value}
                    )
            for i in range(len(s)):
                if alive[i]:
                    rows.append({"env_id": settings.env_id, "kind": "imagined", "episode": i // particles,
                                 "particle": i % particles, "t": t, "x": s[i, column].item()})  # fmt: skip
            with torch.no_grad():
                a = agent.sample_action(agent.policy(s), None)
                s, _, end = env_model.step(s, a if agent.discrete else a.clamp(-1, 1), rng)
                alive *= end < 0.5
    write(pathlib.Path(args.output_dir) / "world_model_trajectories.csv", rows)


# ------------------------------------------------------------------------------------------------------------ report


def iqm(values: Any, axis: int = -1) -> Any:
    """Mean of the middle half, a quarter (rounded down) cut off at each end."""
    values = np.sort(np.asarray(values, dtype=float), axis)
    cut = values.shape[axis] // 4
    return np.take(values, range(cut, values.shape[axis] - cut), axis).mean(axis)


def interval(values: Any, num: int = 5000) -> tuple[float, float, float]:
    """Interquartile mean of values (seeds,), and its 95 % bootstrap interval."""
    values = np.asarray(values, dtype=float)
    draws = np.random.default_rng(0).integers(len(values), size=(num, len(values)))
    low, high = np.quantile(iqm(values[draws]), (0.025, 0.975))
    return float(iqm(values)), float(low), float(high)


def hardware() -> str:
    cpu = platform.processor() or "unknown"
    if pathlib.Path("/proc/cpuinfo").exists():
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return f"{cpu}, one thread, shared, torch {torch.__version__}"


def steps_to(rows: list[dict[str, Any]], goal: float) -> tuple[float, bool]:
    for row in rows:
        if row["eval/return"] >= goal:
            return row["global_step"], True
    return rows[-1]["global_step"], False


def curve(axis: Any, runs: list[list[dict[str, Any]]], key: str, colour: str, label: str) -> None:
    """Interquartile mean over the runs; one that has stopped keeps its last value."""
    x = sorted({row["global_step"] for rows in runs for row in rows})
    values = np.array(
        [[[r[key] for r in rows if r["global_step"] <= t or r is rows[0]][-1] for t in x] for rows in runs]
    )
    draws = np.random.default_rng(0).integers(len(runs), size=(500, len(runs)))
    low, high = np.quantile(iqm(values[draws], 1), (0.025, 0.975), axis=0)
    axis.plot(x, iqm(values, 0), color=colour, label=f"{label} ({len(runs)} seeds)", marker="o", ms=3)
    axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)


def report(args: Args, folder: pathlib.Path) -> None:
    runs = {
        name: {s: read(path) for s in range(1, seeds + 1) if (path := folder / f"{name}__{s}.csv").exists()}
        for name, (_, seeds) in GRID.items()
    }
    table = []
    print("| row | seeds | got there | real steps | 95 % | return at the end | 95 % | imagined - real | CPU s |")
    print("|---|--:|--:|--:|---|--:|---|--:|--:|")
    for name, by_seed in runs.items():
        if not by_seed:
            continue
        settings, rows = GRID[name][0], list(by_seed.values())
        goal = GOALS[settings.get("env_id", "CartPole-v1")]
        reached = [steps_to(r, goal) for r in rows]
        steps, final = interval([s for s, _ in reached]), interval([r[-1]["eval/return"] for r in rows])
        row = {
            "row": name, "seeds": len(rows), "reached": sum(ok for _, ok in reached), "goal": goal,
            "steps_iqm": steps[0], "steps_low": steps[1], "steps_high": steps[2],
            "steps_most": max(s for s, _ in reached),
            "return_iqm": final[0], "return_low": final[1], "return_high": final[2],
            "cpu_seconds": float(np.mean([r[-1]["cpu_seconds"] for r in rows])), "hardware": hardware(),
        }  # fmt: skip
        gap = ""
        if "charts/gap" in rows[0][-1]:
            gaps = interval([np.mean([abs(x["charts/gap"]) for x in r]) for r in rows])
            row |= {"gap_iqm": gaps[0], "gap_low": gaps[1], "gap_high": gaps[2]}
            row["signed_gap_mean"] = float(np.mean([x["charts/gap"] for r in rows for x in r]))
            gap = f"{gaps[0]:.0f} ({gaps[1]:.0f} to {gaps[2]:.0f})"
        table.append(row)
        less = "" if row["reached"] == row["seeds"] else "≥ "
        print(
            f"| {name} | {row['seeds']} of {GRID[name][1]} | {row['reached']} | {less}{steps[0]:.0f} | "
            f"{steps[1]:.0f} to {steps[2]:.0f} | {final[0]:.1f} | {final[1]:.1f} to {final[2]:.1f} | "
            f"{gap} | {row['cpu_seconds']:.0f} |"
        )
    for one, other in (("cartpole", "cartpole_single"), ("pendulum", "pendulum_single")):  # paired by seed
        seeds = sorted(set(runs[one]) & set(runs[other]))
        if seeds:
            gaps = {n: [np.mean([abs(r["charts/gap"]) for r in runs[n][s]]) for s in seeds] for n in (one, other)}
            paired = interval(np.subtract(gaps[other], gaps[one]))
            first = {n: [r["charts/gap"] for s in seeds for r in runs[n][s][:1]] for n in (one, other)}
            first_paired = interval(np.abs(first[other]) - np.abs(first[one]))
            table.append({"row": f"{other} - {one}: |gap|, paired", "seeds": len(seeds), "gap_iqm": paired[0],
                          "gap_low": paired[1], "gap_high": paired[2]})  # fmt: skip
            table.append({"row": f"{other} - {one}: |gap| of iteration 1, paired", "seeds": len(seeds),
                          "gap_iqm": first_paired[0], "gap_low": first_paired[1],
                          "gap_high": first_paired[2]})  # fmt: skip
            for row in table[-2:]:
                print(f"{row['row']}: {row['gap_iqm']:.1f} ({row['gap_low']:.1f} to {row['gap_high']:.1f})")
    for other in ("cartpole_cleanrl", "cartpole_real"):  # how many times fewer real steps
        if runs[other] and runs["cartpole"]:
            steps = [np.array([steps_to(r, 475.0)[0] for r in runs[n].values()]) for n in (other, "cartpole")]
            rng = np.random.default_rng(0)
            means = [iqm(x[rng.integers(len(x), size=(5000, len(x)))]) for x in steps]
            ratio, (low, high) = iqm(steps[0]) / iqm(steps[1]), np.quantile(means[0] / means[1], (0.025, 0.975))
            print(f"{other} / cartpole: {ratio:.0f} ({low:.0f} to {high:.0f}) times the real steps")
            table.append({"row": f"{other} / cartpole: real steps", "steps_iqm": float(ratio), "steps_low": float(low),
                          "steps_high": float(high)})  # fmt: skip
    missing = [n for n, (_, seeds) in GRID.items() if len(runs[n]) < min(seeds, args.seeds)]
    print("missing runs in:", *(missing or ["nothing"]))
    output, figures = pathlib.Path(args.output_dir), pathlib.Path(args.figure_dir)

    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    for axis, (env_id, rows) in zip(axes, {
        "CartPole-v1": {"cartpole": ("#c03a2b", "ensemble of 5"), "cartpole_single": ("#d99a2b", "one network"),
                        "gp": ("#7a3fa0", "Gaussian process"), "cartpole_real": ("#1f6fb4", "model-free, own settings"),
                        "cartpole_cleanrl": ("#888888", "model-free, CleanRL's settings")},
        "Pendulum-v1": {"pendulum": ("#c03a2b", "ensemble of 5"), "pendulum_single": ("#d99a2b", "one network")},
        "Acrobot-v1": {"acrobot": ("#c03a2b", "ensemble of 5")},
    }.items(), strict=True):  # fmt: skip
        for name, (colour, label) in rows.items():
            if runs[name]:
                curve(axis, list(runs[name].values()), "eval/return", colour, label)
        axis.axhline(GOALS[env_id], color="black", lw=0.8, ls=":")
        axis.set(title=env_id, xlabel="real steps", ylabel="return of the greedy policy")
        if env_id == "CartPole-v1":
            axis.set(xscale="log")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, loc="lower right" if env_id != "CartPole-v1" else "center right")
    save(figure, figures / "world_model_curves.png")

    figure, axes = plt.subplots(1, 4, figsize=(18, 4))
    hs = (1, 5, 10, 20, 50, 100, 200, 500)
    for name, colour in (("cartpole", "#c03a2b"), ("cartpole_single", "#d99a2b"), ("pendulum", "#1f6fb4"),
                         ("acrobot", "#2c8a4b"), ("gp", "#7a3fa0")):  # fmt: skip
        lasts = [r[-1] for r in runs[name].values()]
        errors = [(h, [row[f"model/error_at_{h}"] for row in lasts if f"model/error_at_{h}" in row]) for h in hs]
        points = [(h, iqm(values)) for h, values in errors if values]
        if points:
            axes[0].plot(*zip(*points, strict=True), marker="o", ms=3, color=colour, label=name)
    axes[0].set(title="open-loop error", xscale="log", yscale="log", xlabel="steps imagined without a look",
                ylabel="error of s, in units of its spread")  # fmt: skip
    axes[0].axhline(1, color="black", lw=0.8, ls=":")
    for name, colour in (("cartpole", "#c03a2b"), ("cartpole_single", "#d99a2b"), ("cartpole_never_stop", "#1f6fb4")):
        points = [(r["eval/return"], r["charts/imagined_return"]) for rows in runs[name].values() for r in rows]
        if points:
            axes[1].scatter(*zip(*points, strict=True), s=10, alpha=0.5, color=colour, label=name)
    axes[1].plot([0, 500], [0, 500], color="black", lw=0.8, ls=":")
    axes[1].set(title="the exploitation gap", xlabel="real return", ylabel="imagined return")
    firsts = {h: [r[0] for r in runs[f"horizon_{h}"].values()] for h in (5, 20, 50, 200, 500)}
    firsts = dict(sorted((firsts | {100: [r[0] for r in runs["cartpole"].values()]}).items()))  # the default is 100
    for h, own in firsts.items():
        if own:
            real, low, high = interval([r["eval/return"] for r in own])
            dreamt = iqm([r["charts/imagined_return"] for r in own])
            print(f"horizon {h}, {len(own)} seeds: real {real:.0f} ({low:.0f} to {high:.0f}), imagined {dreamt:.0f}")
            table.append({"row": f"horizon {h}, iteration 1", "seeds": len(own), "return_iqm": real, "return_low": low,
                          "return_high": high, "imagined_iqm": float(dreamt)})  # fmt: skip
    if rows := [(h, *interval([r["eval/return"] for r in own])) for h, own in firsts.items() if own]:
        x, y, low, high = map(np.array, zip(*rows, strict=True))
        axes[2].errorbar(x, y, (y - low, high - y), marker="o", ms=3, color="#c03a2b", label="real return")
        imagined = [iqm([r["charts/imagined_return"] for r in firsts[h]]) for h in x]
        axes[2].plot(x, imagined, marker="o", ms=3, ls=":", color="#888888", label="imagined return")
    axes[2].set(
        title="200 real steps, one iteration", xscale="log", xlabel="horizon of imagined episodes", ylabel="return"
    )
    for model, colour in (("ensemble", "#c03a2b"), ("deterministic", "#1f6fb4")):
        for key, style in (("eval/return", "-"), ("charts/imagined_return", ":")):
            points = [(noise, *interval([r[-1][key] for r in runs[f"noise_{noise}_{model}"].values()]))
                      for noise in (0.0, 0.2, 0.4) if runs[f"noise_{noise}_{model}"]]  # fmt: skip
            if points:
                x, y, low, high = map(np.array, zip(*points, strict=True))
                label = f"{model}, {'real' if style == '-' else 'imagined'}"
                axes[3].errorbar(x, y, (y - low, high - y), marker="o", ms=3, ls=style, color=colour, label=label)
    axes[3].set(title="600 real steps, noisy actions", xlabel="share of random actions", ylabel="return")
    for axis in axes:
        axis.set_visible(bool(axis.get_legend_handles_labels()[0]))  # nothing measured yet
        if axis.get_visible():
            axis.legend(fontsize=7)
    save(figure, figures / "world_model_limits.png")
    write(output / "world_model_summary.csv", table)

    if (path := output / "world_model_likelihood.csv").exists():
        rows = read(path)
        print("\n| environment | points | model | seeds | log density | median | 90 % intervals hold | error |")
        print("|---|--:|---|--:|--:|--:|--:|--:|")
        for key in dict.fromkeys((r["env_id"], r["points"], r["model"]) for r in rows):
            own = [r for r in rows if (r["env_id"], r["points"], r["model"]) == key]
            columns = ("log_density", "median_log_density", "coverage_90", "rmse")
            a, b, c, d = (float(iqm([r[n] for r in own])) for n in columns)
            print(
                f"| {key[0]} | {key[1]:.0f} | {key[2]} | {len(own)} | {a:.2f} | {b:.2f} | {100 * c:.0f} % | {d:.4f} |"
            )
    if (path := output / "world_model_trajectories.csv").exists():
        rows = read(path)
        figure, axes = plt.subplots(2, 3, figsize=(13, 5), sharex="row")
        for i, (env_id, what) in enumerate((("CartPole-v1", "angle of the pole"), ("Pendulum-v1", "cos θ"))):
            for e in range(3):
                for kind, particles in (("imagined", range(5)), ("real", (0,))):
                    for particle in particles:
                        own = [
                            r
                            for r in rows
                            if (r["env_id"], r["kind"], r["episode"], r["particle"]) == (env_id, kind, e, particle)
                        ]
                        style = {"color": "black", "lw": 1.5} if kind == "real" else {"color": "#c03a2b", "lw": 0.7}
                        label = kind if particle == 0 else None
                        axes[i, e].plot([r["t"] for r in own], [r["x"] for r in own], label=label, **style)
                axes[i, e].set(xlabel="step", ylabel=f"{env_id}: {what}" if e == 0 else "")
        axes[0, 0].legend(fontsize=7)
        save(figure, figures / "world_model_trajectories.png")


def save(figure: Any, path: pathlib.Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(args: Args) -> None:
    if unknown := {*args.rows} - {*GRID}:
        sys.exit(f"unknown rows: {', '.join(sorted(unknown))}; there are {', '.join(GRID)}")
    torch.set_num_threads(1)
    for part in ("speed", "likelihood", "trajectories"):
        if getattr(args, part):
            globals()[part](args)
            return
    folder = pathlib.Path(args.output_dir).resolve() / "world_model"
    start = time.perf_counter()
    for name in args.rows or GRID:
        for seed in range(1, min(args.seeds, GRID[name][1]) + 1):
            late = time.perf_counter() - start > 60 * args.minutes
            if not args.report_only and not late and not (folder / f"{name}__{seed}.csv").exists():
                run(name, seed, folder)
    report(args, folder)


if __name__ == "__main__":
    main(tyro.cli(Args))
