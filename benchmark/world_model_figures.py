"""The table and figures of docs/world_model_rollouts.md, from benchmark/results/world_model*.csv.

    python benchmark/world_model_figures.py

benchmark/world_model.sh makes the runs. A run reaches its goal at its first evaluation (50 greedy episodes) with that
mean or more; one that never does counts with all its steps, which is less than the truth. Means over seeds, geometric
ones of steps, with 95 % intervals (Student's t; of steps, on their logarithms).
"""

from collections import defaultdict

import numpy as np
import tyro
from common import columns, geometric, interval, read_runs, show, steps_to, write_rows
from curves import draw_mean, plt, save

GOALS = {"CartPole-v1": 475.0, "Pendulum-v1": -200.0, "Acrobot-v1": -100.0}
CURVES = {
    "CartPole-v1": ("cartpole", "cartpole_single", "gp", "cartpole_real", "cartpole_cleanrl"),
    "Pendulum-v1": ("pendulum", "pendulum_single"),
    "Acrobot-v1": ("acrobot",),
}
Run = list[dict[str, float]]  # a row an iteration


def steps_of(variant: str, run: Run) -> tuple[float, bool]:
    """The real steps to the goal, or all of them; and whether the run got there."""
    env_ids = [env_id for env_id in GOALS if variant.startswith(env_id.split("-")[0].lower())]
    goal = GOALS[env_ids[0] if env_ids else "CartPole-v1"]
    return steps_to([(row["global_step"], row["eval/return"]) for row in run], goal)


def table(runs: dict[str, dict[int, Run]]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for variant, seeds in runs.items():
        ends = [steps_of(variant, run) for run in seeds.values()]
        seconds = np.mean([run[-1].get("cpu_seconds") or 60 * run[-1]["charts/minutes"] for run in seeds.values()])
        row = {"row": variant, "seeds": len(seeds), "reached": sum(ok for _, ok in ends)}
        row |= columns("steps", geometric([steps for steps, _ in ends]))
        row |= columns("return", interval([run[-1]["eval/return"] for run in seeds.values()]))
        rows.append(row | {"seconds": f"{seconds:.0f}"})
    for one, other in (("cartpole", "cartpole_single"), ("pendulum", "pendulum_single")):
        gaps = {name: {s: abs(run[0]["charts/gap"]) for s, run in runs[name].items()} for name in (one, other)}
        differences = [gap - gaps[one][s] for s, gap in gaps[other].items() if s in gaps[one]]
        row = {"row": f"{other} - {one}: gap of iteration 1", "seeds": len(differences)}
        rows.append(row | columns("gap", interval(differences)))
    for other in ("cartpole_cleanrl", "cartpole_real"):
        ratios = [steps_of(other, run)[0] / steps_of(other, runs["cartpole"][s])[0] for s, run in runs[other].items()]
        row = {"row": f"{other} / cartpole: steps, paired", "seeds": len(ratios)}
        rows.append(row | columns("steps", geometric(ratios)))
    for horizon in (5, 20, 50, 100, 200, 500):
        variant = "cartpole" if horizon == 100 else f"horizon_{horizon}"  # 100 is the default
        returns = [run[0]["eval/return"] for run in runs[variant].values()]
        row = {"row": f"horizon {horizon}, iteration 1", "seeds": len(returns)}
        rows.append(row | columns("return", interval(returns)))
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
                    points[int(name.rsplit("_", 1)[1])].append(value)
        errors.plot(sorted(points), [geometric(points[h])[0] for h in sorted(points)], marker=".", label=variant)
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
    runs = read_runs("world_model")
    rows = table(runs)
    for row in rows:
        show(row)
    write_rows(rows, "world_model_summary.csv")
    draw_curves(runs)
    draw_limits(runs)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
