"""The table and figures of docs/world_model_rollouts.md, from benchmark/results/world_model*.csv.

    python benchmark/world_model_figures.py

benchmark/world_model.sh makes the runs. A run reaches its goal at its first evaluation (50 greedy episodes) with that
mean or more; one that never does counts with all its steps, which is less than the truth. Means over seeds, geometric
ones of steps, with 95 % intervals (Student's t; of steps, on their logarithms).
"""

import math
from collections import defaultdict

import numpy as np
import tyro
from common import RESULTS, half_interval, read_rows, show, write_rows
from curves import draw_mean, plt, save

GOALS = {"CartPole-v1": 475.0, "Pendulum-v1": -200.0, "Acrobot-v1": -100.0}
CURVES = {
    "CartPole-v1": ("cartpole", "cartpole_single", "gp", "cartpole_real", "cartpole_cleanrl"),
    "Pendulum-v1": ("pendulum", "pendulum_single"),
    "Acrobot-v1": ("acrobot",),
}
Run = list[dict[str, float]]  # a row an iteration


def read_runs() -> dict[str, dict[int, Run]]:
    runs: dict[str, dict[int, Run]] = {}
    for row in read_rows(RESULTS / "world_model.csv"):
        numbers = {name: float(x) for name, x in row.items() if x and name not in ("study", "variant")}
        runs.setdefault(row["variant"], {}).setdefault(int(row["seed"]), []).append(numbers)
    return runs


def goal_of(variant: str) -> float:
    env_ids = [env_id for env_id in GOALS if variant.startswith(env_id.split("-")[0].lower())]
    return GOALS[env_ids[0] if env_ids else "CartPole-v1"]


def reached(run: Run, goal: float) -> tuple[float, bool]:
    """The real steps to the goal, or all of them."""
    for row in run:
        if row["eval/return"] >= goal:
            return row["global_step"], True
    return run[-1]["global_step"], False


def interval(values: list[float]) -> tuple[float, float, float]:
    mean, half = float(np.mean(values)), half_interval(values)
    return mean, mean - half, mean + half


def geometric(values: list[float]) -> tuple[float, float, float]:
    mean, low, high = (math.exp(x) for x in interval([math.log(x) for x in values]))
    return mean, low, high


def gap(run: Run) -> float:
    """The size of imagined minus real, a mean over the iterations."""
    return float(np.mean([abs(row["charts/gap"]) for row in run]))


def columns(name: str, numbers: tuple[float, float, float]) -> dict[str, str]:
    return {f"{name}{end}": f"{x:.5g}" for end, x in zip(("", "_low", "_high"), numbers, strict=True)}


def table(runs: dict[str, dict[int, Run]]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for variant, seeds in runs.items():
        ends = [reached(run, goal_of(variant)) for run in seeds.values()]
        seconds = np.mean([run[-1].get("cpu_seconds") or 60 * run[-1]["charts/minutes"] for run in seeds.values()])
        row = {"row": variant, "seeds": len(seeds), "reached": sum(ok for _, ok in ends), "goal": goal_of(variant)}
        row |= columns("steps", geometric([steps for steps, _ in ends]))
        row |= columns("return", interval([run[-1]["eval/return"] for run in seeds.values()]))
        row |= {"seconds": f"{seconds:.0f}", "most_steps": max(steps for steps, _ in ends)}
        if "charts/gap" in next(iter(seeds.values()))[0]:
            row |= columns("gap", interval([gap(run) for run in seeds.values()]))
        rows.append(row)
    for one, other in (("cartpole", "cartpole_single"), ("pendulum", "pendulum_single")):
        pairs = [(runs[one][s], runs[other][s]) for s in runs[other] if s in runs[one]]
        differences = interval([gap(single) - gap(ensemble) for ensemble, single in pairs])
        rows.append({"row": f"{other} - {one}: gap, paired", "seeds": len(pairs)} | columns("gap", differences))
        first = interval([gap(single[:1]) - gap(ensemble[:1]) for ensemble, single in pairs])
        rows.append({"row": f"{other} - {one}: gap of iteration 1", "seeds": len(pairs)} | columns("gap", first))
    for other in ("cartpole_cleanrl", "cartpole_real"):
        pairs = [(reached(run, 475)[0], reached(runs["cartpole"][s], 475)[0]) for s, run in runs[other].items()]
        ratio = geometric([theirs / own for theirs, own in pairs])
        rows.append({"row": f"{other} / cartpole: steps, paired", "seeds": len(pairs)} | columns("steps", ratio))
    for horizon in (5, 20, 50, 100, 200, 500):
        variant = "cartpole" if horizon == 100 else f"horizon_{horizon}"  # 100 is the default
        firsts = [run[0] for run in runs[variant].values()]
        row = {"row": f"horizon {horizon}, iteration 1", "seeds": len(firsts)}
        row |= columns("return", interval([x["eval/return"] for x in firsts]))
        rows.append(row | {"imagined": f"{np.mean([x['charts/imagined_return'] for x in firsts]):.5g}"})
    return rows


def value_at(run: Run, step: float) -> float:
    """The return of the last evaluation until then; a run that has stopped keeps its last value."""
    return [row["eval/return"] for row in run if row["global_step"] <= step or row is run[0]][-1]


def draw_curves(runs: dict[str, dict[int, Run]]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    for axis, (env_id, variants) in zip(axes, CURVES.items(), strict=True):
        for variant in variants:
            own = runs[variant].values()
            x = sorted({row["global_step"] for run in own for row in run})
            values = np.array([[value_at(run, step) for step in x] for run in own])  # (seeds, steps)
            draw_mean(axis, x, values, f"{variant} (seeds: {len(own)})", marker="o", markersize=3)
        axis.axhline(GOALS[env_id], color="black", linestyle=":")
        axis.set(title=env_id, xlabel="real steps", ylabel="return of the greedy policy")
        axis.legend(fontsize=7, loc="lower right")
    axes[0].set(xscale="log", ylim=(0, 520))
    save(figure, "world_model_curves")


def draw_limits(runs: dict[str, dict[int, Run]]) -> None:
    figure, (errors, gaps) = plt.subplots(1, 2, figsize=(11, 4))
    for variant in ("cartpole", "cartpole_single", "pendulum", "acrobot", "gp"):
        points = defaultdict(list)
        for run in runs[variant].values():
            for name, value in run[-1].items():
                if name.startswith("model/error_at_"):
                    points[int(name.rsplit("_", 1)[1])].append(math.log(value))
        errors.plot(sorted(points), [math.exp(np.mean(points[h])) for h in sorted(points)], marker=".", label=variant)
    errors.set(title="open-loop error", xscale="log", yscale="log", xlabel="steps imagined without a look")
    errors.set(ylabel="error of s, in units of its spread")
    for variant in ("cartpole", "cartpole_single", "cartpole_never_stop"):
        points = [(r["eval/return"], r["charts/imagined_return"]) for run in runs[variant].values() for r in run]
        gaps.scatter(*zip(*points, strict=True), s=10, alpha=0.5, label=variant)
    gaps.plot([0, 500], [0, 500], color="black", linestyle=":")
    gaps.set(title="the exploitation gap", xlabel="real return", ylabel="imagined return")
    errors.legend(fontsize=7)
    gaps.legend(fontsize=7)
    save(figure, "world_model_limits")


def main() -> None:
    runs = read_runs()
    rows = table(runs)
    for row in rows:
        show(row)
    write_rows(rows, "world_model_summary.csv")
    draw_curves(runs)
    draw_limits(runs)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
