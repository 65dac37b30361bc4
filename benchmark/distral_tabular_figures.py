"""Distral on two rooms: speed against independent soft Q-learning, the sweep over α, what π_0 knows, held-out goals.

    python benchmark/distral_tabular_figures.py

Seeds 1 to 20 run in lockstep; learning rate, β and decay were chosen on seeds 101 to 110. Trainings whose file isn't
there are run: benchmark/results/distral_tabular.csv (a row a setting, seed and evaluation), _prior.csv and _exact.csv.
From these come _summary.csv and docs/distral_tabular.png. Scores: 0 is random play, 1 the optimum (discounted return,
exact, means over starts and tasks). Steps: those until the score of the π_i is .9, the whole budget if it never is.
Intervals: 95 %, Student's t.
"""

import itertools
import pathlib
import shlex
from typing import Any

import numpy as np
import tyro
from common import RESULTS, columns, geometric, half_interval, read_rows, read_runs, show, write_rows
from curves import draw_mean, plt, save

import distral_tabular as script

STUDY = "distral_tabular"
BASE = "--num-seeds 20 --total-timesteps 14000 --eval-frequency 250"
NEW = "--first-goal 8 --num-tasks 4 --total-timesteps 8000"  # four goals that no π_0 has seen
SETTINGS = {
    "distral_1_beta5": "--alpha 1 --beta 5",
    "distral_0.8_beta5": "--alpha 0.8 --beta 5",
    "distral_0.5_beta5": "--alpha 0.5 --beta 5",
    "independent_beta5": "--alpha 0 --beta 5",
    "distral_1_beta20": "--alpha 1 --beta 20",
    "independent_beta20": "--alpha 0 --beta 20",
    "distral_1_beta50": "--alpha 1 --beta 50",
    "uniform_1_beta50": "--alpha 1 --beta 50 --freeze",
    "independent_beta50": "--alpha 0 --beta 50",
    "distral_1_beta100": "--alpha 1 --beta 100",
    "independent_beta100": "--alpha 0 --beta 100",
    "no-action_distral_1_beta50": "--alpha 1 --beta 50 --no-previous-action --total-timesteps 6000",
    "no-action_independent_beta50": "--alpha 0 --beta 50 --no-previous-action --total-timesteps 6000",
    "new_frozen": f"--alpha 1 --beta 50 {NEW} --freeze --distilled PRIOR",  # the π_0 of distral_1_beta50
    "new_started": f"--alpha 1 --beta 50 {NEW} --distilled PRIOR",
    "new_scratch": f"--alpha 1 --beta 50 {NEW}",
    "new_independent": f"--alpha 0 --beta 50 {NEW}",
}
SOURCE = "distral_1_beta50"
KEYS = ("eval/policy", "eval/distilled", "eval/going_on")
DRAWN = ("distral_1_beta50", "uniform_1_beta50", "independent_beta50", "distral_1_beta5", "independent_beta5")
MOVES = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}  # x, y
ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 1.0)


def train(name: str) -> list[dict[str, Any]]:
    """One setting: a row a seed and evaluation. SOURCE comes before those that take its π_0."""
    flags = SETTINGS[name]
    if "PRIOR" in flags:
        *_, path = sorted(pathlib.Path("runs").glob(f"*__{STUDY}-{SOURCE}__1__*/agent.npz"))
        flags = flags.replace("PRIOR", str(path))
    out = script.main(tyro.cli(script.Args, args=shlex.split(f"{BASE} {flags} --exp-name {STUDY}-{name}")))
    if name == SOURCE:
        write_prior(np.exp(out["log_prior"]))
    rows = []
    for row, e in itertools.product(out["rows"], range(20)):
        values = {key: round(float(row[key][e]), 5) for key in KEYS}
        rows.append({"variant": name, "seed": 1 + e, "global_step": row["global_step"]} | values)
    return rows


def write_prior(prior: np.ndarray) -> None:
    """π_0 (E, S, A), the mean over the seeds, a row a state."""
    cells, _, _ = script.read_rooms()
    rows = []
    for s, probabilities in enumerate(prior.mean(0)):
        y, x = cells[s // 5]
        row = {"row": y, "column": x, "previous": ("none", *MOVES)[s % 5]}
        rows.append(row | {name: round(float(p), 5) for name, p in zip(MOVES, probabilities, strict=True)})
    write_rows(rows, f"{STUDY}_prior.csv")


def exact_distral(seed: int, alpha: float, beta: float = 5.0, gamma: float = 0.95) -> tuple[float, float]:
    """The two steps of Distral with expectations in the place of samples, up to their fixed point; eight tasks.

    Returns: the probability that π_0 goes on in the corridor, and the mean score of the π_i.
    """
    _, ahead, corridor = script.read_rooms()
    goals, C, P = script.draw_goals(seed, 8), len(ahead), 5
    following = (ahead * P + 1 + np.arange(4)).repeat(P, 0)  # (S, A)
    end = ahead.repeat(P, 0)[..., None] == goals  # (S, A, n)
    reward, S = np.where(end, 1.0, -0.1), C * P
    start = np.zeros((8, S))
    start[:, ::P] = (np.arange(C) != goals[:, None]) / (C - 1)
    log_prior, V = np.full((S, 4), -np.log(4)), np.zeros((S, 8))
    for _ in range(40):
        for _ in range(200):
            Q = reward + gamma * ~end * V[following]  # (S, A, n)
            V, log_pi = script.soft_values(np.moveaxis(Q, 1, -1), log_prior[:, None], alpha, beta)  # (S, n), (S, n, A)
        pi = np.exp(log_pi)
        flow = np.zeros((8, S, S))  # flow[i, s', s]: probability of s -> s', if the episode goes on
        for a in range(4):
            flow[:, following[:, a], np.arange(S)] += (pi[:, :, a] * ~end[:, a]).T
        visits = np.linalg.solve(np.eye(S) - gamma * flow, start[..., None])[..., 0]  # Σ_t γ^t P(s_t = s), (n, S)
        log_prior = script.distilled_from_counts(np.einsum("ns,sna->sa", visits, pi), 1e-9)
    policies = (pi.swapaxes(0, 1)[None], None, np.full((1, 8, S, 4), 0.25))
    returns, best, worst = (script.episode_returns(x, ahead, goals[None], P, gamma, 100) for x in policies)
    going_on = script.going_on(np.exp(log_prior)[None], corridor, P)
    return float(going_on[0]), float(((returns - worst) / (best - worst)).mean())


def exact_sweep() -> None:
    rows = []
    for alpha, seed in itertools.product(ALPHAS, (1, 2, 3)):
        going_on, score = exact_distral(seed, alpha)
        rows.append({"alpha": alpha, "seed": seed, "going_on": round(going_on, 5), "policy": round(score, 5)})
    write_rows(rows, f"{STUDY}_exact.csv")


def read() -> dict[str, dict[str, np.ndarray]]:
    """Of each setting: global_step (K,), and each metric as (seeds, K)."""
    data = {}
    for name, seeds in read_runs(STUDY).items():
        data[name] = {key: np.array([[row[key] for row in rows] for rows in seeds.values()]) for key in KEYS}
        data[name]["global_step"] = np.array([row["global_step"] for row in seeds[1]])
    return data


def steps_of(table: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The steps of each seed until the π_i have .9 (all if they never do), and whether they get there."""
    x, hit = table["global_step"], table["eval/policy"] >= 0.9
    return np.where(hit.any(1), x[hit.argmax(1)], x[-1]), hit.any(1)


def summary(data: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    rows = []
    for name, table in data.items():
        steps, reached = steps_of(table)
        row: dict[str, Any] = {"setting": name, "seeds": len(steps)}
        row |= {"steps_policy": round(steps.mean()), "steps_policy_half": round(half_interval(steps))}
        row["reached_policy"] = int(reached.sum())
        others = {"new": "new_independent", "no-action": "no-action_independent_beta50"}
        other = others.get(name.split("_")[0], f"independent_{name.split('_')[-1]}")
        if "independent" not in name:  # steps as a share of independent learning's, seed by seed
            row |= columns("ratio", geometric(steps / steps_of(data[other])[0]), ".3f")
        for key in KEYS:
            values, short = table[key][:, -1], key.removeprefix("eval/")
            row |= {f"final_{short}": round(values.mean(), 4), f"final_{short}_half": round(half_interval(values), 4)}
        rows.append(show(row))
    return rows


def draw(data: dict[str, dict[str, np.ndarray]]) -> None:
    figure, ((curves, sweep), arrows) = plt.subplots(2, 2, figsize=(12, 7.4), height_ratios=(1.4, 1))
    for name in DRAWN:
        draw_mean(curves, data[name]["global_step"], data[name]["eval/policy"], name)
    curves.axhline(0.9, color="black", linestyle=":")
    curves.set(xlabel="steps in each task", ylabel="score of π_i", ylim=(-0.1, 1.02))
    rows = [{k: float(v) for k, v in row.items()} for row in read_rows(RESULTS / f"{STUDY}_exact.csv")]
    for key, colour, label in (("going_on", "C0", "π_0 goes on in the corridor"), ("policy", "C1", "score of π_i")):
        means = [np.mean([row[key] for row in rows if row["alpha"] == alpha]) for alpha in ALPHAS]
        sweep.plot(ALPHAS, means, "o-", color=colour, label=f"{label} (exact)")
        learned = [data[f"distral_{alpha:g}_beta5"][f"eval/{key}"][:, -1].mean() for alpha in (0.5, 0.8, 1.0)]
        sweep.plot((0.5, 0.8, 1.0), learned, "x", color=colour, label="learned")
    sweep.axvline(1 - 0.1 * 5 / np.log(4), color="black", linestyle=":")
    sweep.set(title="β = 5", xlabel=r"$\alpha$", ylim=(-0.1, 1.02))
    curves.legend(fontsize=8)
    sweep.legend(fontsize=8)
    for axis, previous in zip(arrows, ("right", "left"), strict=True):  # an arrow's length is its probability
        rows = [row for row in read_rows(RESULTS / f"{STUDY}_prior.csv") if row["previous"] == previous]
        x, y = (np.array([int(row[name]) for row in rows]) for name in ("column", "row"))
        for name, (dx, dy) in MOVES.items():
            p = np.array([float(row[name]) for row in rows])
            colour = "C3" if name == previous else "C0"
            axis.quiver(x, y, dx * p, dy * p, color=colour, angles="xy", scale_units="xy", scale=2, width=0.005)
        axis.set(aspect="equal", xlim=(-1, 13), ylim=(5, -1), xticks=[], yticks=[])
        axis.set_title(f"π_0(a | place, last action = {previous}); red: goes on")
    save(figure, STUDY)


def main() -> None:
    """Train what isn't there; then the table and the figure."""
    if not (RESULTS / f"{STUDY}.csv").exists():
        write_rows([row for name in SETTINGS for row in train(name)], f"{STUDY}.csv")
    if not (RESULTS / f"{STUDY}_exact.csv").exists():
        exact_sweep()
    data = read()
    write_rows(summary(data), f"{STUDY}_summary.csv")
    draw(data)


if __name__ == "__main__":
    tyro.cli(main)
