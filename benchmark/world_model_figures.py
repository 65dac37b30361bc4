"""The table and figures of docs/world_model_rollouts.md, from benchmark/results/world_model*.csv.

    python benchmark/world_model_figures.py

benchmark/world_model.sh makes the runs. A run reaches its goal at its first evaluation (50 greedy episodes) with that
mean or more; one that never does counts with all its steps, which is less than the truth. Means over seeds, geometric
ones of steps, with 95 % intervals (Student's t; of steps, on their logarithms).
"""

import math

import matplotlib
import numpy as np
from common import RESULTS, ROOT, half_interval, read_rows, write_rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GOALS = {"CartPole-v1": 475.0, "Pendulum-v1": -200.0, "Acrobot-v1": -100.0}
RED, ORANGE, PURPLE, BLUE, GREY, GREEN = "#c03a2b", "#d99a2b", "#7a3fa0", "#1f6fb4", "#888888", "#2c8a4b"
CURVES = {
    "CartPole-v1": [
        ("cartpole", RED, "ensemble of 5"),
        ("cartpole_single", ORANGE, "one network"),
        ("gp", PURPLE, "Gaussian process"),
        ("cartpole_real", BLUE, "model-free, own settings"),
        ("cartpole_cleanrl", GREY, "model-free, CleanRL's settings"),
    ],
    "Pendulum-v1": [("pendulum", RED, "ensemble of 5"), ("pendulum_single", ORANGE, "one network")],
    "Acrobot-v1": [("acrobot", RED, "ensemble of 5")],
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
    print("| row | got there | real steps | return at the end | imagined - real | seconds |\n|---|--:|--:|--:|--:|--:|")
    for variant, seeds in runs.items():
        ends = [reached(run, goal_of(variant)) for run in seeds.values()]
        there, steps = sum(ok for _, ok in ends), geometric([n for n, _ in ends])
        final = interval([run[-1]["eval/return"] for run in seeds.values()])
        seconds = np.mean([run[-1].get("cpu_seconds") or 60 * run[-1]["charts/minutes"] for run in seeds.values()])
        row = {"row": variant, "seeds": len(seeds), "reached": there, "goal": goal_of(variant)}
        row |= columns("steps", steps) | columns("return", final) | {"seconds": f"{seconds:.0f}"}
        row["most_steps"] = max(n for n, _ in ends)
        shown = ""
        if "charts/gap" in next(iter(seeds.values()))[0]:
            gaps = interval([gap(run) for run in seeds.values()])
            row |= columns("gap", gaps)
            shown = f"{gaps[0]:.0f} ± {gaps[2] - gaps[0]:.0f}"
        rows.append(row)
        least = "" if there == len(seeds) else "≥ "
        print(
            f"| {variant} | {there} of {len(seeds)} | {least}{steps[0]:.0f} ({steps[1]:.0f} to {steps[2]:.0f}) | "
            f"{final[0]:.0f} ± {final[2] - final[0]:.0f} | {shown} | {seconds:.0f} |"
        )
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
    for horizon, firsts in horizons(runs).items():
        row = {"row": f"horizon {horizon}, iteration 1", "seeds": len(firsts)}
        row |= columns("return", interval([x["eval/return"] for x in firsts]))
        rows.append(row | {"imagined": f"{np.mean([x['charts/imagined_return'] for x in firsts]):.5g}"})
    for row in rows[len(runs) :]:
        print(", ".join(f"{name} {x}" for name, x in row.items()))
    return rows


def horizons(runs: dict[str, dict[int, Run]]) -> dict[int, Run]:
    """By horizon of imagination, the first iteration of each seed; 100 is the default."""
    variants = {100: "cartpole"} | {h: f"horizon_{h}" for h in (5, 20, 50, 200, 500)}
    return {h: [run[0] for run in runs[variants[h]].values()] for h in sorted(variants)}


def save(figure: plt.Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / name, dpi=80)
    plt.close(figure)
    print(f"wrote docs/{name}")


def draw_curves(runs: dict[str, dict[int, Run]]) -> None:
    """The mean over seeds; a run that has stopped keeps its last value."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    for axis, (env_id, variants) in zip(axes, CURVES.items(), strict=True):
        for variant, colour, label in variants:
            own = runs[variant].values()
            x = sorted({row["global_step"] for run in own for row in run})
            values = [
                [[r for r in run if r["global_step"] <= t or r is run[0]][-1]["eval/return"] for t in x] for run in own
            ]
            mean, low, high = np.array([interval(list(column)) for column in np.array(values).T]).T
            axis.plot(x, mean, color=colour, label=f"{label} ({len(own)} seeds)", marker="o", ms=3)
            axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
        axis.axhline(GOALS[env_id], color="black", lw=0.8, ls=":")
        axis.set(title=env_id, xlabel="real steps", ylabel="return of the greedy policy")
        axis.legend(fontsize=7, loc="lower right")
    axes[0].set(xscale="log", ylim=(0, 520))
    save(figure, "world_model_curves.png")


def draw_limits(runs: dict[str, dict[int, Run]]) -> None:
    figure, (errors, gaps, horizon, noise) = plt.subplots(1, 4, figsize=(18, 4))
    colours = {"cartpole": RED, "cartpole_single": ORANGE, "pendulum": BLUE, "acrobot": GREEN, "gp": PURPLE}
    for variant, colour in colours.items():
        lasts, points = [run[-1] for run in runs[variant].values()], []
        for h in (1, 5, 10, 20, 50, 100, 200, 500):
            values = [row[f"model/error_at_{h}"] for row in lasts if f"model/error_at_{h}" in row]
            if values:
                points.append((h, math.exp(np.mean(np.log(values)))))
        errors.plot(*zip(*points, strict=True), marker="o", ms=3, color=colour, label=variant)
    errors.axhline(1, color="black", lw=0.8, ls=":")
    errors.set(title="open-loop error", xscale="log", yscale="log", xlabel="steps imagined without a look")
    errors.set(ylabel="error of s, in units of its spread")
    for variant, colour in (("cartpole", RED), ("cartpole_single", ORANGE), ("cartpole_never_stop", BLUE)):
        points = [(r["eval/return"], r["charts/imagined_return"]) for run in runs[variant].values() for r in run]
        gaps.scatter(*zip(*points, strict=True), s=10, alpha=0.5, color=colour, label=variant)
    gaps.plot([0, 500], [0, 500], color="black", lw=0.8, ls=":")
    gaps.set(title="the exploitation gap", xlabel="real return", ylabel="imagined return")
    for key, style in (("eval/return", "-"), ("charts/imagined_return", ":")):
        kind = "real" if style == "-" else "imagined"
        points = [(h, *interval([row[key] for row in firsts])) for h, firsts in horizons(runs).items()]
        x, y, low, high = np.array(points).T
        horizon.errorbar(x, y, (y - low, high - y), marker="o", ms=3, ls=style, color=RED, label=f"{kind} return")
        for model, colour in (("ensemble", RED), ("deterministic", BLUE)):
            lasts = {p: [run[-1][key] for run in runs[f"noise_{p}_{model}"].values()] for p in (0.0, 0.2, 0.4)}
            x, y, low, high = np.array([(p, *interval(values)) for p, values in lasts.items()]).T
            noise.errorbar(
                x, y, (y - low, high - y), marker="o", ms=3, ls=style, color=colour, label=f"{model}, {kind}"
            )
    horizon.set(title="200 real steps, one iteration", xscale="log", xlabel="horizon of imagination", ylabel="return")
    noise.set(title="600 real steps, noisy actions", xlabel="share of random actions", ylabel="return")
    for axis in (errors, gaps, horizon, noise):
        axis.legend(fontsize=7)
    save(figure, "world_model_limits.png")


def draw_trajectories() -> None:
    figure, axes = plt.subplots(2, 3, figsize=(13, 5), sharex="row")
    lines: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for row in read_rows(RESULTS / "world_model_trajectories.csv"):
        key = (row["env_id"], row["episode"], row["kind"], row["particle"])
        lines.setdefault(key, []).append((float(row["t"]), float(row["x"])))
    names = {"CartPole-v1": "angle of the pole", "Pendulum-v1": "cos θ"}
    for (env_id, episode, kind, particle), points in lines.items():
        axis = axes[[*names].index(env_id), int(episode)]
        style = {"color": "black", "lw": 1.5, "zorder": 3} if kind == "real" else {"color": RED, "lw": 0.7}
        axis.plot(*zip(*points, strict=True), label=kind if particle == "0" else None, **style)
        axis.set(xlabel="step", ylabel=f"{env_id}: {names[env_id]}" if episode == "0" else "")
    axes[0, 0].legend(fontsize=7)
    save(figure, "world_model_trajectories.png")


def print_likelihood() -> None:
    print("| environment | points | model | log density | median | 90 % intervals hold | error |")
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in read_rows(RESULTS / "world_model_likelihood.csv"):
        groups.setdefault((row["env_id"], row["points"], row["model"]), []).append(row)
    for key, own in groups.items():
        names = ("log_density", "median_log_density", "coverage_90", "rmse")
        a, b, c, d = (np.mean([float(row[name]) for row in own]) for name in names)
        print(f"| {' | '.join(key)} | {a:.2f} | {b:.2f} | {100 * c:.0f} % | {d:.4f} |")


if __name__ == "__main__":
    runs = read_runs()
    write_rows(table(runs), "world_model_summary.csv")
    draw_curves(runs)
    draw_limits(runs)
    draw_trajectories()
    print_likelihood()
