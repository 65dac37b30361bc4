"""Chapter 8 of Sutton & Barto with dyna_q.py: figures 8.2, 8.4 and 8.5, prioritised sweeping, FrozenLake, speed.

    OMP_NUM_THREADS=1 python benchmark/dyna_figures.py                              # all, 100 seeds
    OMP_NUM_THREADS=1 python benchmark/dyna_figures.py --parts maze --seeds 30      # figure 8.2 alone
    OMP_NUM_THREADS=1 python benchmark/dyna_figures.py --seeds 2 --output-dir OUT --figure-dir OUT   # does it run?

Seeds are 1 to `--seeds`, none left out. Each part writes its table benchmark/results/dyna_q_<part>.csv, a figure in
docs/ (`sokoban` only the table, `speed` neither), and its lines of benchmark/results/dyna_q_summary.csv. Intervals are
95 %: 1.96 standard errors over the seeds.
"""

import csv
import math
import multiprocessing
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import dyna_q

PARTS = ("maze", "changing", "sweeping", "frozenlake", "sokoban", "speed")
# The independent implementation that the figures are held against: mean steps by K and episode, and 30 seeds
REFERENCE = {
    0: {2: 743, 3: 506, 5: 294, 10: 146, 20: 39.1, "last 10": 17.7},
    5: {2: 150, 3: 53.0, 5: 24.5, 10: 16.6, 20: 16.9, "last 10": 17.1},
    50: {2: 38.7, 3: 17.6, 5: 17.0, 10: 16.8, 20: 16.8, "last 10": 17.0},
}
REFERENCE_SEEDS = 30
GREY, BLUE, RED, GREEN = "#888888", "#1f6fb4", "#c03a2b", "#2c8a4b"


@dataclass
class Args:
    parts: tuple[str, ...] = PARTS
    """which parts to run"""
    seeds: int = 100
    """seeds 1 to N for every setting"""
    processes: int = 1
    """processes that share the seeds"""
    output_dir: str = "benchmark/results"
    """where the tables go"""
    figure_dir: str = "docs"
    """where the figures go"""


# -------------------------------------------------------------------------------------------------------------- tools


def interval(values: Any, axis: int = 0) -> tuple[Any, Any]:
    """Mean, and half of its 95 % interval."""
    values = np.asarray(values, dtype=float)
    return values.mean(axis), 1.96 * values.std(axis, ddof=1) / math.sqrt(values.shape[axis])


def write(path: pathlib.Path, rows: list[list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [[f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows]
        )
    os.replace(temporary, path)
    print(f"  wrote {path}", file=sys.stderr)


def run(job: tuple[Callable, dict[str, Any], int]) -> Any:
    function, settings, seed = job
    return function(settings, seed)


def over_seeds(function: Callable, settings: dict[str, Any], args: Args) -> list[Any]:
    """`function(settings, seed)` for every seed."""
    jobs = [(function, settings, seed) for seed in range(1, args.seeds + 1)]
    if args.processes == 1:
        return list(map(run, jobs))
    with multiprocessing.Pool(args.processes) as pool:
        return pool.map(run, jobs, chunksize=1)


def hardware() -> str:
    cpu = platform.processor() or "unknown"
    if pathlib.Path("/proc/cpuinfo").exists():
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return f"{cpu}, {os.cpu_count()} cores, one thread, Python {platform.python_version()}"


class Summary:
    """The lines that the algorithm has to reach, each with what was measured."""

    def __init__(self, part: str, args: Args) -> None:
        self.part, self.args, self.rows = part, args, []

    def add(self, what: str, value: float, half: float | None, target: str, holds: bool | None) -> None:
        verdict = "" if holds is None else "yes" if holds else "NO"
        self.rows.append([self.part, what, float(value), "" if half is None else float(half), target, verdict])
        plus = "" if half is None else f" ± {half:.3g}"
        print(f"| {what} | {value:.4g}{plus} | {target} | {verdict} |", flush=True)

    def close(self) -> None:
        """Replace this part's lines in the summary file."""
        path = pathlib.Path(self.args.output_dir) / "dyna_q_summary.csv"
        old = list(csv.reader(path.open(encoding="utf-8")))[1:] if path.exists() else []
        rows = [row for row in old if row[0] != self.part]
        rows += [[*row, self.args.seeds, hardware()] for row in self.rows]
        rows.sort(key=lambda row: PARTS.index(row[0]))
        write(path, [["part", "what", "measured", "interval95", "target", "holds", "seeds", "hardware"], *rows])


def greedy_path(Q: list[list[float]], ids: dict[Any, int], env: dyna_q.MazeEnv, later: bool = False) -> float:
    """Steps of the greedy path from start to goal; infinite if it runs in a circle."""
    s = env.start
    for step in range(1, env.height * env.width + 1):
        q = Q[ids[s]] if s in ids else [0.0]
        s = env.ahead[later][s][q.index(max(q))]
        if env.goal[s]:
            return step
    return math.inf


def shortest_path(env: dyna_q.MazeEnv) -> int:
    """By breadth-first search."""
    reached, steps = {env.start}, 0
    while not any(env.goal[s] for s in reached):
        reached |= {s2 for s in reached for s2 in env.ahead[0][s]}
        steps += 1
    return steps


def maze_env(env_id: str, scale: int = 1) -> dyna_q.MazeEnv:
    return gym.make(env_id, scale=scale, disable_env_checker=True).unwrapped


# ------------------------------------------------------------------------------------------------------- figure 8.2


def maze_run(settings: dict[str, Any], seed: int) -> tuple[list[int], float]:
    """Steps of each of 50 episodes, and the greedy path's length after them."""
    result = dyna_q.main(dyna_q.Args(seed=seed, num_episodes=50, total_timesteps=10**7, log_frequency=0, **settings))
    return [episode[2] for episode in result["episodes"]], greedy_path(
        result["Q"], result["ids"], maze_env("DynaMaze-v0")
    )


def maze(args: Args) -> None:
    summary, start = Summary("maze", args), time.perf_counter()
    table = [["rule", "planning_steps", "episode", "steps_mean", "interval95", "sd", "seeds"]]
    check = [["planning_steps", "episode", "reference", "measured", "interval95", "combined_standard_errors_off"]]
    lengths, greedy = {}, {}
    for rule in ("visited", "q"):
        for K in (0, 5, 50):
            if rule == "q" and K == 0:
                continue
            runs = over_seeds(maze_run, {"planning_action": rule, "planning_steps": K}, args)
            lengths[rule, K] = np.array([run[0] for run in runs])  # (seeds, 50)
            greedy[rule, K] = np.array([run[1] for run in runs])
            mean, half = interval(lengths[rule, K])
            sd = lengths[rule, K].std(0, ddof=1)
            table += [[rule, K, e + 1, *map(float, (mean[e], half[e], sd[e])), args.seeds] for e in range(50)]
    for K, episode, most in ((50, 3, 20), (5, 10, 18)):
        mean, half = interval(lengths["visited", K][:, episode - 1])
        summary.add(f"K={K}, episode {episode}: steps", mean, half, f"<= {most}", mean <= most)
    mean, half = interval(lengths["visited", 0][:, 9])
    summary.add("K=0, episode 10: steps", mean, half, ">= 90", mean >= 90)
    worst = 0.0
    for K, cells in REFERENCE.items():
        for episode, reference in cells.items():
            steps = lengths["visited", K]
            steps = steps[:, -10:].mean(1) if episode == "last 10" else steps[:, episode - 1]
            mean, half = interval(steps)
            # the reference's spread is not known for every cell: ours, at its number of seeds
            combined = steps.std(ddof=1) * math.sqrt(1 / len(steps) + 1 / REFERENCE_SEEDS)
            off = abs(mean - reference) / combined
            worst = max(worst, off)
            check.append([K, episode, reference, *map(float, (mean, half, off))])
    summary.add("reference table: the cell farthest off, combined standard errors", worst, None, "<= 3", worst <= 3)
    for K in (5, 50):
        near, exact = ((greedy["visited", K] <= length).mean() for length in (16, 14))
        summary.add(
            f"K={K}: share of seeds whose greedy path is <= 16 after 50", near, None, ">= 29/30", near >= 29 / 30
        )
        summary.add(f"K={K}: share whose greedy path is 14, the optimum", exact, None, "", None)
        for rule in ("visited", "q"):
            mean, half = interval(lengths[rule, K][:, -10:].mean(1))
            summary.add(f"K={K}, {rule}: steps in the last 10 episodes", mean, half, "", None)
        difference = lengths["q", K][:, -10:].mean(1) - lengths["visited", K][:, -10:].mean(1)
        mean, half = interval(difference)
        summary.add(f"K={K}: the lecture's rule minus visited, last 10 episodes", mean, half, "", None)
        near, exact = ((greedy["q", K] <= length).mean() for length in (16, 14))
        summary.add(f"K={K}, q: share whose greedy path is <= 16 after 50", near, None, "", None)
        summary.add(f"K={K}, q: share whose greedy path is 14", exact, None, "", None)
    summary.add("this part took, seconds", time.perf_counter() - start, None, "", None)
    write(pathlib.Path(args.output_dir) / "dyna_q_maze.csv", table)
    write(pathlib.Path(args.output_dir) / "dyna_q_reference.csv", check)
    summary.close()

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, rule, title in zip(
        axes, ("visited", "q"), ("any tried action (the book)", "by Q (the lecture)"), strict=True
    ):
        for K, colour in ((0, GREY), (5, BLUE), (50, RED)):
            mean, half = interval(lengths["visited" if K == 0 else rule, K])
            axis.plot(range(2, 51), mean[1:], color=colour, label=f"K = {K}")
            axis.fill_between(range(2, 51), (mean - half)[1:], (mean + half)[1:], color=colour, alpha=0.2, lw=0)
        axis.axhline(14, color="black", lw=0.8, ls=":")
        axis.set(title=f"Planning picks {title}", xlabel="episode", ylim=(0, 800), xlim=(2, 50))
        axis.set_yscale("symlog", linthresh=20)
        axis.set_yticks([0, 14, 20, 50, 100, 200, 400, 800], ["0", "14", "20", "50", "100", "200", "400", "800"])
        axis.legend()
    axes[0].set_ylabel("steps in the episode")
    save(figure, "dyna_q_maze.png", args)


def save(figure: Any, name: str, args: Args) -> None:
    path = pathlib.Path(args.figure_dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"  wrote {path}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------- figures 8.4 and 8.5


def changing_run(settings: dict[str, Any], seed: int) -> list[int]:
    """Cumulative reward after every 100 steps."""
    result = dyna_q.main(dyna_q.Args(seed=seed, alpha=1.0, log_frequency=0, **settings))
    ends = np.array([episode[0] for episode in result["episodes"]])  # each pays 1
    return [int((ends <= step).sum()) for step in range(0, settings["total_timesteps"] + 1, 100)]


def changing(args: Args) -> None:
    summary = Summary("changing", args)
    table = [["env_id", "kappa", "rule", "step", "cumulative_reward", "interval95", "seeds"]]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, env_id, kappa, K, total, change in (
        (axes[0], "BlockingMaze-v0", 1e-4, 10, 3000, 1000),
        (axes[1], "ShortcutMaze-v0", 1e-3, 50, 6000, 3000),
    ):
        reward = {}
        for rule in ("visited", "q"):
            for k in (0.0, kappa):
                settings = {"env_id": env_id, "planning_steps": K, "total_timesteps": total, "kappa": k}
                reward[rule, k] = np.array(over_seeds(changing_run, settings | {"planning_action": rule}, args))
                mean, half = interval(reward[rule, k])
                steps = range(0, total + 1, 100)
                table += [
                    [env_id, k, rule, t, float(m), float(h), args.seeds]
                    for t, m, h in zip(steps, mean, half, strict=True)
                ]
                label = f"{'Dyna-Q+' if k else 'Dyna-Q'}{', by Q' if rule == 'q' else ''}"
                colour, style = (RED if k else BLUE), ("--" if rule == "q" else "-")
                axis.plot(steps, mean, style, color=colour, label=label)
                axis.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.15, lw=0)
                name = f"{env_id}, {label}"
                if env_id == "BlockingMaze-v0":
                    for t in (1000, 3000):
                        summary.add(f"{name}: reward at {t}", mean[t // 100], half[t // 100], "", None)
        axis.axvline(change, color="black", lw=0.8, ls=":")
        axis.set(title=f"{env_id}, K = {K}, κ = {kappa:g}", xlabel="real steps", xlim=(0, total), ylim=(0, None))
        axis.legend()
        for rule in ("visited", "q"):
            only = rule == "visited"
            if env_id == "BlockingMaze-v0":
                ratio = reward[rule, kappa][:, -1].mean() / reward[rule, 0.0][:, -1].mean()
                summary.add(
                    f"{env_id}, {rule}: reward at 3000, Dyna-Q+ / Dyna-Q",
                    ratio,
                    None,
                    ">= 1.4" * only,
                    ratio >= 1.4 if only else None,
                )
            else:
                for k in (0.0, kappa):
                    gained = reward[rule, k][:, -1] - reward[rule, k][:, change // 100]
                    mean, half = interval(3000 / np.maximum(gained, 1))
                    target = ("<= 14.5" if k else "> 14.5") if only else ""
                    holds = ((mean <= 14.5) if k else (mean > 14.5)) if only else None
                    what = f"{env_id}, {rule}, {'Dyna-Q+' if k else 'Dyna-Q'}"
                    summary.add(f"{what}: steps a reward after the opening", mean, half, target, holds)
                    late = reward[rule, k][:, -1] - reward[rule, k][:, -11]
                    found = (1000 / np.maximum(late, 1) <= 14.5).mean()
                    summary.add(f"{what}: share of seeds with <= 14.5 in the last 1000 steps", found, None, "", None)
    axes[0].set_ylabel("cumulative reward")
    write(pathlib.Path(args.output_dir) / "dyna_q_changing.csv", table)
    summary.close()
    save(figure, "dyna_q_changing.png", args)


# ------------------------------------------------------------------------------------------------ prioritised sweeping


SCALES = (1,)  # (1, 2) adds the maze with each cell as 2 x 2, which takes many times longer


def sweeping_run(settings: dict[str, Any], seed: int) -> tuple[int, int]:
    """Backups and real steps until the greedy path is a shortest one; -1 if it is not within `limit` backups."""
    limit, scale = settings["limit"], settings["maze_scale"]
    env = maze_env("DynaMaze-v0", scale)
    optimum, found = shortest_path(env), []

    def watch(global_step: int, backups: int, Q: list[list[float]], ids: dict[Any, int]) -> bool:
        if greedy_path(Q, ids, env) == optimum:
            found.append((backups, global_step))
        # once it has converged, prioritised sweeping makes no more backups: real steps are limited too
        return bool(found) or backups >= limit or global_step >= limit

    settings = {name: value for name, value in settings.items() if name != "limit"}
    dyna_q.main(
        dyna_q.Args(seed=seed, alpha=0.5, planning_steps=5, total_timesteps=10**7, log_frequency=0, **settings), watch
    )
    return found[0] if found else (-1, -1)


def sweeping(args: Args) -> None:
    summary = Summary("sweeping", args)
    table = [["maze_scale", "method", "seed", "backups", "real_steps", "limit"]]
    means = {}
    for scale in SCALES:
        limit = 50_000 * scale**2
        for method, settings in (
            ("prioritised sweeping", {"prioritized": True}),
            ("Dyna-Q, visited", {"planning_action": "visited"}),
            ("Dyna-Q, by Q", {"planning_action": "q"}),
        ):
            runs = over_seeds(sweeping_run, settings | {"maze_scale": scale, "limit": limit}, args)
            table += [[scale, method, seed, *run, limit] for seed, run in enumerate(runs, start=1)]
            # a run that did not get there counts with the limit: its true number is larger
            backups = np.array([run[0] if run[0] >= 0 else limit for run in runs])
            means[scale, method] = (*interval(backups), np.median(backups))
            missed = sum(run[0] < 0 for run in runs)
            what = f"scale {scale}, {method}: backups to a shortest path"
            summary.add(f"{what} (missed by {missed} seeds within {limit})", *means[scale, method][:2], "", None)
            summary.add(f"{what}, median", means[scale, method][2], None, "", None)
        for statistic, i in (("mean", 0), ("median", 2)):
            for method in ("Dyna-Q, visited", "Dyna-Q, by Q"):
                share = means[scale, "prioritised sweeping"][i] / means[scale, method][i]
                what = f"scale {scale}: prioritised sweeping's {statistic} backups / those of {method}"
                summary.add(what, share, None, "<= 1/3", share <= 1 / 3)
    write(pathlib.Path(args.output_dir) / "dyna_q_sweeping.csv", table)
    summary.close()

    figure, axis = plt.subplots(figsize=(6.5, 4))
    for method, colour in (("prioritised sweeping", GREEN), ("Dyna-Q, visited", BLUE), ("Dyna-Q, by Q", RED)):
        own = sorted(row[3] for row in table[1:] if row[0] == 1 and row[1] == method and row[3] >= 0)
        axis.step([0, *own], np.arange(len(own) + 1) / args.seeds, where="post", color=colour, label=method)
    axis.set(xscale="symlog", xlabel="backups", ylabel="share of seeds with a shortest greedy path", ylim=(0, 1))
    axis.set_xlim(100, 50_000)
    axis.legend()
    save(figure, "dyna_q_sweeping.png", args)


# ---------------------------------------------------------------------------------------------------------- FrozenLake


def lake_model() -> tuple[np.ndarray, np.ndarray]:
    """FrozenLake-v1's P (S, A, S) and R (S, A), read out of the environment; a terminal state has no way on."""
    table = gym.make("FrozenLake-v1", is_slippery=True).unwrapped.P
    P, R = np.zeros((16, 4, 16)), np.zeros((16, 4))
    for s, row in table.items():
        for a, outcomes in row.items():
            for p, s2, r, end in outcomes:
                P[s, a, s2] += p * (not end)
                R[s, a] += p * r
    return P, R


def success_rate(policy: Any, P: np.ndarray, R: np.ndarray, steps: int = 100) -> float:
    """The exact probability that `policy` (S,) reaches the goal from state 0 within `steps`."""
    rows = np.arange(16)
    P, R = P[rows, policy], R[rows, policy]
    state, total = np.eye(16)[0], 0.0
    for _ in range(steps):
        total += state @ R
        state = state @ P
    return float(total)


def optimal_policy(P: np.ndarray, R: np.ndarray, gamma: float) -> np.ndarray:
    V = np.zeros(16)
    for _ in range(10_000):
        V = (R + gamma * P @ V).max(1)
    return (R + gamma * P @ V).argmax(1)


LAKE_STEPS, LAKE_EVERY = 30_000, 250
LAKE_METHODS = {
    # the best of alpha 0.02, 0.05, 0.1, 0.2 and epsilon 0.1, 0.3, 1 on seeds 1001 to 1006 (for counts, then also
    # epsilon 0.2 on seeds 1001 to 1020). Q-learning has two: the soonest within 2 points of the optimum, and the best
    # in the end.
    "Q-learning, alpha 0.2": {"planning_steps": 0, "alpha": 0.2, "epsilon": 0.3},
    "Q-learning, alpha 0.1": {"planning_steps": 0, "alpha": 0.1, "epsilon": 0.3},
    "Dyna-Q, last outcome": {"planning_steps": 20, "model": "last", "alpha": 0.02, "epsilon": 0.1},
    "Dyna-Q, counts": {"planning_steps": 20, "model": "counts", "alpha": 0.02, "epsilon": 0.2},
}


def lake_run(settings: dict[str, Any], seed: int) -> list[float]:
    """The exact success rate of the greedy policy after every LAKE_EVERY real steps."""
    P, R = lake_model()
    rates = []

    def watch(global_step: int, backups: int, Q: list[list[float]], ids: dict[Any, int]) -> None:
        if global_step % LAKE_EVERY == 0:
            policy = [Q[ids[s]].index(max(Q[ids[s]])) if s in ids else 0 for s in range(16)]
            rates.append(success_rate(policy, P, R))

    settings = {"total_timesteps": LAKE_STEPS} | settings
    dyna_q.main(dyna_q.Args(env_id="FrozenLake-v1", gamma=0.99, seed=seed, log_frequency=0, **settings), watch)
    return rates


def first_lasting(reached: np.ndarray, window: int = 5) -> float:
    """The real step of the first of `window` evaluations in a row that reached it; infinite if there is none."""
    for i in range(len(reached) - window + 1):
        if reached[i : i + window].all():
            return (i + 1) * LAKE_EVERY
    return math.inf


def frozenlake(args: Args) -> None:
    summary = Summary("frozenlake", args)
    P, R = lake_model()
    best = success_rate(optimal_policy(P, R, 0.99), P, R)
    summary.add("success rate of the optimal policy within 100 steps, exact", best, None, "", None)
    table, steps = [["method", "real_steps", "success_rate", "interval95", "seeds"]], {}
    figure, axis = plt.subplots(figsize=(6.5, 4))
    for (method, settings), colour in zip(LAKE_METHODS.items(), (GREY, "black", RED, GREEN), strict=True):
        rates = np.array(over_seeds(lake_run, settings, args))
        mean, half = interval(rates)
        at = np.arange(1, len(mean) + 1) * LAKE_EVERY
        table += [[method, int(t), float(m), float(h), args.seeds] for t, m, h in zip(at, mean, half, strict=True)]
        axis.plot(at, mean, color=colour, label=method)
        axis.fill_between(at, mean - half, mean + half, color=colour, alpha=0.2, lw=0)
        final = interval(rates[:, -20:].mean(1))
        counts = method == "Dyna-Q, counts"
        summary.add(
            f"{method}: success rate, mean of the last {20 * LAKE_EVERY} of {LAKE_STEPS} steps",
            *final,
            f">= {best - 0.02:.4f}" * counts,
            final[0] >= best - 0.02 if counts else None,
        )
        steps[method] = np.array([first_lasting(row >= best - 0.02) for row in rates])
        summary.add(
            f"{method}: share of seeds within 2 points of it (5 evaluations in a row)",
            np.isfinite(steps[method]).mean(),
            None,
            "",
            None,
        )
        summary.add(f"{method}: real steps to that, median over the seeds", np.median(steps[method]), None, "", None)
        over = np.flatnonzero(mean >= best - 0.02)
        summary.add(
            f"{method}: real steps until the mean over the seeds is within 2 points",
            at[over[0]] if len(over) else math.inf,
            None,
            "",
            None,
        )
    fastest = min(np.median(steps[method]) for method in LAKE_METHODS if method.startswith("Q-learning"))
    ratio = np.median(steps["Dyna-Q, counts"]) / fastest
    summary.add("real steps, Dyna-Q with counts / the faster Q-learning, medians", ratio, None, "< 1", ratio < 1)
    axis.axhline(best, color="black", lw=0.8, ls=":", label="optimal policy, exact")
    axis.set(
        xlabel="real steps", ylabel="success rate of the greedy policy, exact", ylim=(0, 0.8), xlim=(0, LAKE_STEPS)
    )
    axis.legend()
    write(pathlib.Path(args.output_dir) / "dyna_q_frozenlake.csv", table)
    summary.close()
    save(figure, "dyna_q_frozenlake.png", args)


# ------------------------------------------------------------------------------------------------- Sokoban, and speed


def sokoban_run(settings: dict[str, Any], seed: int) -> float:
    """Real steps until the first of 10 episodes in a row of at most 22 steps each (the generator solves it in 11)."""
    result = dyna_q.main(
        dyna_q.Args(env_id="Sokoban-v0", seed=seed, gamma=0.99, total_timesteps=10_000, log_frequency=0, **settings)
    )
    solved = [length <= 22 for _, _, length in result["episodes"]]
    for i in range(len(solved) - 9):
        if all(solved[i : i + 10]):
            return result["episodes"][i][0]
    return math.inf


def sokoban(args: Args) -> None:
    """One fixed 6x6 level with a box, the script's default; infinite where a run gets there in none of its steps."""
    summary, table = Summary("sokoban", args), [["planning_steps", "seed", "real_steps"]]
    for K in (0, 5, 50):
        steps = np.array(over_seeds(sokoban_run, {"planning_steps": K}, args))
        table += [[K, seed, float(step)] for seed, step in enumerate(steps, start=1)]
        summary.add(
            f"Sokoban 6x6, K={K}: real steps to 10 episodes in a row of at most 22 steps, median",
            np.median(steps),
            None,
            "",
            None,
        )
    write(pathlib.Path(args.output_dir) / "dyna_q_sokoban.csv", table)
    summary.close()


def speed(args: Args) -> None:
    """Backups a second of whole runs, real steps included: the best of five runs of 10,000 real steps with K = 50."""
    summary = Summary("speed", args)
    for rule, target in (("visited", 400_000), ("q", 250_000)):
        rates = []
        for seed in range(1, 6):
            settings = {"planning_action": rule, "planning_steps": 50, "total_timesteps": 10_000}
            result = dyna_q.main(dyna_q.Args(seed=seed, log_frequency=0, **settings))
            rates.append(result["backups"] / result["seconds"])
        summary.add(
            f"planning updates a second, {rule}, best of 5", max(rates), None, f">= {target}", max(rates) >= target
        )
        summary.add(f"planning updates a second, {rule}, median of 5", float(np.median(rates)), None, "", None)
    summary.close()


def main(args: Args) -> None:
    if unknown := set(args.parts) - set(PARTS):
        sys.exit(f"unknown --parts {', '.join(sorted(unknown))}: choose of {', '.join(PARTS)}")
    if args.seeds < 2 or args.processes < 1:
        sys.exit("--seeds must be 2 or more, --processes 1 or more")
    print(f"{hardware()}; {args.seeds} seeds\n\n| what | measured | target | holds |\n|---|---|---|---|")
    for part in args.parts:
        globals()[part](args)


if __name__ == "__main__":
    main(tyro.cli(Args))
