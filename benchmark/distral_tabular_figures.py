"""Distral on two rooms: speed against independent soft Q-learning, the sweep over α, what π_0 knows, held-out goals.

    OMP_NUM_THREADS=1 python benchmark/distral_tabular_figures.py                 # what is missing, then the report
    OMP_NUM_THREADS=1 python benchmark/distral_tabular_figures.py --report-only

Seeds 1 to `--seeds` run in lockstep, none left out; learning rate, β and decay were chosen on seeds 101 to 110. Each
setting is one file in benchmark/results/distral_tabular/; the report writes distral_tabular_summary.csv beside them and
two figures into docs/. Scores: 0 is random play, 1 the optimum (discounted return, exact, means over starts and tasks).
"""

import csv
import io
import os
import pathlib
import platform
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import distral_tabular as script

NEW = {"first_goal": 8, "num_tasks": 4, "total_timesteps": 8000}  # four goals that no π_0 has seen
# In the order of importance; "+distilled" starts from the π_0 that the named setting learned
SETTINGS: dict[str, dict[str, Any]] = {
    "distral_0.8_beta50": {"alpha": 0.8, "beta": 50.0},
    "independent_beta100": {"alpha": 0.0, "beta": 100.0},
    "distral_1_beta50": {"alpha": 1.0, "beta": 50.0},
    "independent_beta50": {"alpha": 0.0, "beta": 50.0},
    "uniform_0.8_beta50": {"alpha": 0.8, "beta": 50.0, "freeze": True},
    "distral_0.8_beta5": {"alpha": 0.8, "beta": 5.0},
    "independent_beta5": {"alpha": 0.0, "beta": 5.0},
    "uniform_0.8_beta5": {"alpha": 0.8, "beta": 5.0, "freeze": True},
    "no-action_distral_0.8_beta50": {"alpha": 0.8, "beta": 50.0, "previous_action": False, "total_timesteps": 6000},
    "no-action_independent_beta50": {"alpha": 0.0, "beta": 50.0, "previous_action": False, "total_timesteps": 6000},
    "new_frozen": NEW | {"alpha": 0.8, "beta": 50.0, "freeze": True, "+distilled": "distral_0.8_beta50"},
    "new_started": NEW | {"alpha": 0.8, "beta": 50.0, "+distilled": "distral_0.8_beta50"},
    "new_scratch": NEW | {"alpha": 0.8, "beta": 50.0},
    "new_independent": NEW | {"alpha": 0.0, "beta": 100.0},
    "distral_0.8_beta20": {"alpha": 0.8, "beta": 20.0},
    "independent_beta20": {"alpha": 0.0, "beta": 20.0},
    "distral_0.5_beta5": {"alpha": 0.5, "beta": 5.0},
    "distral_1_beta5": {"alpha": 1.0, "beta": 5.0},
    "distral_1_beta20": {"alpha": 1.0, "beta": 20.0},
    "distral_0.5_beta50": {"alpha": 0.5, "beta": 50.0},
    "uniform_0.8_beta20": {"alpha": 0.8, "beta": 20.0, "freeze": True},
    "distral_0.8_beta100": {"alpha": 0.8, "beta": 100.0},
    "distral_1_beta100": {"alpha": 1.0, "beta": 100.0},
    "gradient_0.8_beta50": {"alpha": 0.8, "beta": 50.0, "distillation": "gradient"},
}
KEYS = ("eval/greedy", "eval/policy", "eval/distilled", "eval/going_on")
RED, ORANGE, BLUE, GREY, GREEN = "#c03a2b", "#e08b3e", "#1f6fb4", "#888888", "#2c8a4b"
ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 1.0)


@dataclass
class Args:
    seeds: int = 20
    """seeds 1 to N, in lockstep"""
    total_timesteps: int = 14_000
    """steps in each task, where a setting doesn't say otherwise"""
    report_only: bool = False
    """train nothing"""
    output_dir: str = "benchmark/results"
    """where the tables go"""
    figure_dir: str = "docs"
    """where the figures go"""


def write(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def train(args: Args, name: str, folder: pathlib.Path) -> None:
    """One setting: its curves, a row a seed and evaluation, and its tables (an agent.pt, kept only where needed)."""
    home, kwargs = os.getcwd(), dict(SETTINGS[name])
    source = kwargs.pop("+distilled", None)
    kwargs = {"total_timesteps": args.total_timesteps, "num_seeds": args.seeds, "eval_frequency": 250} | kwargs
    if source:
        kwargs["distilled"] = str(folder / f"{source}.pt")
    keep = any(setting.get("+distilled") == name for setting in SETTINGS.values())
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(io.StringIO()):
        os.chdir(scratch)
        try:
            out = script.main(script.Args(save_model=keep, **kwargs))
            for path in pathlib.Path("runs").glob("*/agent.pt"):
                shutil.copy(path, folder / f"{name}.pt")
        finally:
            os.chdir(home)
    if name == "distral_0.8_beta50":
        write_prior(np.exp(out["log_prior"]), folder / "prior.csv")
    rows = [
        {"seed": 1 + e, "global_step": row["global_step"], **{key: round(row[key][e], 5) for key in KEYS}}
        for row in out["rows"]
        for e in range(args.seeds)
    ]
    write(folder / f"{name}.csv", rows)
    print(f"{name} is there", flush=True)


def write_prior(prior: np.ndarray, path: pathlib.Path) -> None:
    """π_0 (E, S, A), the mean over the seeds, a row a state."""
    cells, _, _ = script.read_rooms()
    rows = []
    for s, probability in enumerate(prior.mean(0)):
        y, x = cells[s // 5]
        names = ("up", "down", "left", "right")
        rows.append({"row": y, "column": x, "previous": ("none", *names)[s % 5]})
        rows[-1] |= {name: round(float(p), 5) for name, p in zip(names, probability, strict=True)}
    write(path, rows)


def read(path: pathlib.Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps (K,), and each metric as (seeds, K)."""
    with path.open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    seeds = len({row["seed"] for row in rows})
    table = {key: np.array([row[key] for row in rows]).reshape(-1, seeds).T for key in ("global_step", *KEYS)}
    return table["global_step"][0], table


# ---------------------------------------------------------------------------------------------------- exact iteration


def exact_distral(seed: int, num_tasks: int, alpha: float, beta: float, gamma: float = 0.95) -> tuple[float, float]:
    """The two steps of Distral with expectations in the place of samples, up to their fixed point.

    Returns: the probability that π_0 goes on in the corridor, and the mean score of the π_i.
    """
    _, ahead, corridor = script.read_rooms()
    goals, C, P = script.draw_goals(seed, num_tasks), len(ahead), 5
    following = (ahead * P + 1 + np.arange(4)).repeat(P, 0)  # (S, A)
    end = ahead.repeat(P, 0)[..., None] == goals  # (S, A, n)
    reward, S = np.where(end, 1.0, -0.1), C * P
    start = np.zeros((num_tasks, S))
    start[:, ::P] = (np.arange(C) != goals[:, None]) / (C - 1)
    log_prior, V = np.full((S, 4), -np.log(4)), np.zeros((S, num_tasks))
    for _ in range(40):
        for _ in range(200):
            Q = reward + gamma * ~end * V[following]  # (S, A, n)
            V, log_pi = script.soft_values(np.moveaxis(Q, 1, -1), log_prior[:, None], alpha, beta)  # (S, n), (S, n, A)
        pi = np.exp(log_pi)
        flow = np.zeros((num_tasks, S, S))  # flow[i, s', s]: probability of s -> s', if the episode goes on
        for a in range(4):
            flow[:, following[:, a], np.arange(S)] += (pi[:, :, a] * ~end[:, a]).T
        visits = np.linalg.solve(np.eye(S) - gamma * flow, start[..., None])[..., 0]  # Σ_t γ^t P(s_t = s), (n, S)
        log_prior = script.distilled_from_counts(np.einsum("ns,sna->sa", visits, pi), 1e-9)
    returns = script.episode_returns(np.moveaxis(pi, -1, 1), ahead, goals, P, gamma, 100)
    best = script.episode_returns(None, ahead, goals, P, gamma, 100)
    worst = script.episode_returns(np.full((S, 4, num_tasks), 0.25), ahead, goals, P, gamma, 100)
    return float(script.going_on(np.exp(log_prior)[None], corridor, P)[0]), float(
        ((returns - worst) / (best - worst)).mean()
    )


def exact_sweep(folder: pathlib.Path) -> None:
    rows = []
    for alpha in ALPHAS:
        for seed in (1, 2, 3):
            going_on, score = exact_distral(seed, 8, alpha, 5.0)
            rows.append({"alpha": alpha, "seed": seed, "going_on": round(going_on, 5), "policy": round(score, 5)})
    write(folder / "exact.csv", rows)


# ------------------------------------------------------------------------------------------------------------- report


def steps_to(x: np.ndarray, scores: np.ndarray, goal: float) -> tuple[np.ndarray, np.ndarray]:
    """First evaluation at `goal` or more of each seed (the whole budget if there is none), and whether there is one."""
    hit = scores >= goal
    return np.where(hit.any(1), x[hit.argmax(1)], x[-1]), hit.any(1)


def iqm(values: Any, axis: int = -1) -> Any:
    """Mean of the middle half, a quarter (rounded down) cut off at each end."""
    values = np.sort(np.asarray(values, dtype=float), axis)
    cut = values.shape[axis] // 4
    return np.take(values, range(cut, values.shape[axis] - cut), axis).mean(axis)


def bootstrap(values: Any, num: int = 10_000) -> np.ndarray:
    """`num` interquartile means, each over as many seeds, drawn with replacement; values (seeds, ...) -> (num, ...)."""
    values = np.asarray(values, dtype=float)
    draws = np.random.default_rng(0).integers(len(values), size=(num, len(values)))
    return iqm(values[draws], 1)


def summary_row(name: str, x: np.ndarray, table: dict[str, np.ndarray], reference: np.ndarray | None) -> dict[str, Any]:
    row: dict[str, Any] = {"setting": name, "seeds": len(table["eval/policy"]), "budget": int(x[-1])}
    for key in ("policy", "greedy"):
        steps, reached = steps_to(x, table[f"eval/{key}"], 0.9)
        draws = bootstrap(steps)
        row |= {f"steps_{key}": round(float(iqm(steps))), f"reached_{key}": int(reached.sum())}
        row |= {f"steps_{key}_{k}": round(float(np.quantile(draws, q))) for k, q in (("low", 0.025), ("high", 0.975))}
        if key == "policy" and reference is not None and len(reference) == len(steps):
            ratios = draws / np.random.default_rng(1).permutation(bootstrap(reference))
            row["ratio"] = round(float(iqm(steps) / iqm(reference)), 3)
            row["ratio_low"], row["ratio_high"] = (round(float(np.quantile(ratios, q)), 3) for q in (0.025, 0.975))
    for key in KEYS:
        values = table[key][:, -1]
        row[f"final_{key.removeprefix('eval/')}"] = round(float(values.mean()), 4)
        row[f"final_{key.removeprefix('eval/')}_half"] = round(float(1.96 * values.std(ddof=1) / len(values) ** 0.5), 4)
    return row | {"hardware": f"one thread of a shared {platform.machine()} CPU"}


def curve(axis: Any, x: np.ndarray, values: np.ndarray, colour: str, label: str, style: str = "-") -> None:
    half = 1.96 * values.std(0, ddof=1) / len(values) ** 0.5
    axis.plot(x, values.mean(0), style, color=colour, label=label)
    axis.fill_between(x, values.mean(0) - half, values.mean(0) + half, color=colour, alpha=0.15, lw=0)


def report(args: Args, folder: pathlib.Path) -> None:
    data = {name: read(folder / f"{name}.csv") for name in SETTINGS if (folder / f"{name}.csv").exists()}
    references = {"new": "new_independent", "no-action": "no-action_independent_beta50"}
    table = []
    for name, (x, metrics) in data.items():
        reference = references.get(name.split("_")[0], "independent_beta100")
        steps = steps_to(data[reference][0], data[reference][1]["eval/policy"], 0.9)[0] if reference in data else None
        table.append(summary_row(name, x, metrics, None if name == reference else steps))
        row = table[-1]
        same = f"independent_{name.split('_')[-1]}"  # independent learning with the same β
        if same in data and not name.startswith(("independent", "no-action")):
            steps = steps_to(data[same][0], data[same][1]["eval/policy"], 0.9)[0]
            row["ratio_same_beta"] = round(row["steps_policy"] / float(iqm(steps)), 3)
        print(
            f"| {name} | {row['reached_policy']} | {row['steps_policy']} | {row['steps_policy_low']} to "
            f"{row['steps_policy_high']} | {row.get('ratio', '')} | {row['steps_greedy']} | "
            f"{row['final_policy']} | {row['final_distilled']} | {row['final_going_on']} |"
        )
    if table:
        write(folder.parent / "distral_tabular_summary.csv", table)
    draw_curves(args, data, table, folder)
    if (folder / "prior.csv").exists():
        draw_arrows(args, folder)


def draw_curves(args: Args, data: dict[str, Any], table: list[dict[str, Any]], folder: pathlib.Path) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(14, 7.4))
    panels = (
        (axes[0, 0], "β = 5", (
            ("distral_1_beta5", ORANGE, r"Distral, $\alpha$ = 1"),
            ("distral_0.8_beta5", RED, r"Distral, $\alpha$ = .8"),
            ("uniform_0.8_beta5", BLUE, "π_0 frozen at uniform"),
            ("distral_0.5_beta5", GREEN, r"Distral, $\alpha$ = .5"),
            ("independent_beta5", GREY, r"independent ($\alpha$ = 0)"),
        )),
        (axes[0, 1], "β = 50, and the best independent one", (
            ("distral_1_beta50", ORANGE, r"Distral, $\alpha$ = 1"),
            ("distral_0.8_beta50", RED, r"Distral, $\alpha$ = .8"),
            ("uniform_0.8_beta50", BLUE, "π_0 frozen at uniform"),
            ("independent_beta100", GREY, "independent, β = 100"),
        )),
        (axes[1, 1], "without the last action in the state", (
            ("no-action_distral_0.8_beta50", RED, r"Distral, $\alpha$ = .8"),
            ("no-action_independent_beta50", GREY, "independent"),
        )),
        (axes[1, 2], "four held-out goals", (
            ("new_frozen", RED, "with the π_0 of eight other goals"),
            ("new_started", ORANGE, "the same, π_0 learns on"),
            ("new_scratch", GREEN, "Distral from nothing"), ("new_independent", GREY, "independent, β = 100"),
        )),
    )  # fmt: skip
    for axis, title, curves in panels:
        for name, colour, label in curves:
            if name in data:
                curve(axis, data[name][0], data[name][1]["eval/policy"], colour, label)
        axis.axhline(0.9, color="black", lw=0.7, ls=":")
        axis.set(title=title, xlabel="steps in each task", ylabel="score of π_i", ylim=(-0.1, 1.02))
    axis = axes[0, 2]
    for kind, colour, label in (
        ("distral_1", ORANGE, r"Distral, $\alpha$ = 1"), ("distral_0.8", RED, r"Distral, $\alpha$ = .8"),
        ("uniform_0.8", BLUE, "π_0 frozen at uniform"), ("independent", GREY, "independent"),
    ):  # fmt: skip
        rows = {float(r["setting"].split("beta")[1]): r for r in table if r["setting"].startswith(f"{kind}_beta")}
        betas = sorted(rows)
        steps, low, high = (
            [rows[b][k] for b in betas] for k in ("steps_policy", "steps_policy_low", "steps_policy_high")
        )
        bars = [np.subtract(steps, low), np.subtract(high, steps)]
        axis.errorbar(betas, steps, bars, fmt="o-", color=colour, label=label, capsize=2, ms=4)
    axis.axhline(args.total_timesteps, color="black", lw=0.7, ls=":")
    axis.set(
        title="steps until π_i is at .9", xlabel="β", ylabel="steps in each task (dotted: the budget)", xscale="log"
    )
    axis.set_ylim(0, 1.1 * args.total_timesteps)
    axis = axes[1, 0]
    if (folder / "exact.csv").exists():
        with (folder / "exact.csv").open(newline="") as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        for key, colour, label in (("going_on", RED, "π_0 goes on in the corridor"), ("policy", BLUE, "score of π_i")):
            means = [np.mean([row[key] for row in rows if row["alpha"] == alpha]) for alpha in ALPHAS]
            axis.plot(ALPHAS, means, "o-", ms=4, color=colour, label=f"{label} (exact)")
    for alpha in (0.5, 0.8, 1.0):
        name = f"distral_{alpha:g}_beta5"
        if name in data:
            for key, colour in (("eval/going_on", RED), ("eval/policy", BLUE)):
                axis.plot(alpha, data[name][1][key][:, -1].mean(), "x", ms=8, mew=2, color=colour)
    axis.axvline(1 - 0.1 * 5 / np.log(4), color="black", lw=0.7, ls=":")
    axis.set(title="β = 5: exact iteration, and learned (crosses)", xlabel=r"$\alpha$", ylim=(-0.1, 1.02))
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(pathlib.Path(args.figure_dir) / "distral_tabular.png", dpi=100)
    plt.close(figure)


def draw_arrows(args: Args, folder: pathlib.Path) -> None:
    """π_0 over the two rooms, for who came by right and by left: an arrow's length is its probability."""
    with (folder / "prior.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(2, 1, figsize=(9, 7.6))
    directions = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}
    for axis, previous in zip(axes, ("right", "left"), strict=True):
        axis.set_facecolor("#3a3a42")
        for row in (row for row in rows if row["previous"] == previous):
            x, y = int(row["column"]), int(row["row"])
            axis.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, fc="#f3f8ee", ec="#d8ded0", lw=0.8))
            for name, (dx, dy) in directions.items():
                p = float(row[name])
                if p > 0.03:
                    style = {"width": 0.06, "head_width": 0.2, "head_length": 0.14, "length_includes_head": True}
                    colour = RED if name == previous else BLUE
                    length = 0.13 + 0.35 * p  # of an arrow that no one takes: hardly more than its head
                    axis.arrow(x, y, dx * length, dy * length, fc=colour, ec="none", alpha=0.25 + 0.75 * p, **style)
        axis.set(xlim=(-0.8, 12.8), ylim=(4.8, -0.8), aspect="equal", xticks=[], yticks=[])
        axis.set_title(f"π_0(a | place, last action = {previous}); red: goes on")
    figure.tight_layout()
    figure.savefig(pathlib.Path(args.figure_dir) / "distral_tabular_arrows.png", dpi=90)
    plt.close(figure)


def main(args: Args) -> None:
    folder = pathlib.Path(args.output_dir).resolve() / "distral_tabular"
    folder.mkdir(parents=True, exist_ok=True)
    if not args.report_only:
        for name, setting in SETTINGS.items():
            source = setting.get("+distilled")
            wanted = any(
                s.get("+distilled") == name and not (folder / f"{k}.csv").exists() for k, s in SETTINGS.items()
            )
            if not (folder / f"{name}.csv").exists() or (wanted and not (folder / f"{name}.pt").exists()):
                if source and not (folder / f"{source}.pt").exists():
                    train(args, source, folder)
                train(args, name, folder)
        if not (folder / "exact.csv").exists():
            exact_sweep(folder)
        for path in folder.glob("*.pt"):
            path.unlink()
    report(args, folder)


if __name__ == "__main__":
    main(tyro.cli(Args))
