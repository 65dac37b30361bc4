"""Chapter 8 of Sutton & Barto with dyna_q.py: figures 8.2, 8.4 and 8.5, prioritised sweeping, FrozenLake, Sokoban.

    OMP_NUM_THREADS=1 python benchmark/dyna_figures.py

Each part has a file benchmark/results/dyna_q_PART.csv with a row for each method and seed, which is made if it isn't
there, and (maze, changing, frozenlake) a figure in docs/. What the page quotes is in dyna_q_summary.csv. Seeds are 1 to
100 or 30. Intervals are 95 %, Student's t over the seeds.
"""

import math
import statistics
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import tyro
from common import RESULTS, half_interval, read_rows, show, write_rows
from curves import draw_mean, plt, save

import dyna_q

# The independent implementation that figure 8.2 is held against: mean steps by K and episode, over 30 seeds
REFERENCE = {
    0: {2: 743, 3: 506, 5: 294, 10: 146, 20: 39.1, "last 10": 17.7},
    5: {2: 150, 3: 53.0, 5: 24.5, 10: 16.6, 20: 16.9, "last 10": 17.1},
    50: {2: 38.7, 3: 17.6, 5: 17.0, 10: 16.8, 20: 16.8, "last 10": 17.0},
}
SHORTEST = 14  # steps of the Dyna maze
Values = dict[str, np.ndarray]  # by method: a row of numbers for each seed
Lines = dict[str, Any]  # of the summary: numbers of the seeds, or one number


def train(seed: int, watch: Callable | None = None, **flags: Any) -> dict[str, Any]:
    return dyna_q.main(dyna_q.Args(seed=seed, log_frequency=0, **flags), watch)


def study(part: str, run: Callable[..., list[float]], methods: dict[str, dict[str, Any]], seeds: int) -> Values:
    """What `run(seed, **flags)` gave for every method and seed. It is called if the part has no file yet."""
    path = RESULTS / f"dyna_q_{part}.csv"
    if not path.exists():
        rows = []
        for method, flags in methods.items():
            for seed in range(1, seeds + 1):
                values = " ".join(f"{value:.6g}" for value in run(seed, **flags))
                rows.append({"method": method, "seed": seed, "values": values})
        write_rows(rows, path.name)
    found: dict[str, list[list[str]]] = {}
    for row in read_rows(path):
        found.setdefault(row["method"], []).append(row["values"].split())
    return {method: np.array(found[method], dtype=float) for method in methods}


def greedy_path(Q: list[list[float]], ids: dict[Any, int]) -> float:
    """Steps of the greedy path through the Dyna maze; infinite if it runs in a circle."""
    env = dyna_q.MazeEnv(dyna_q.DYNA_MAZE)
    s, _ = env.reset()
    for step in range(1, len(dyna_q.DYNA_MAZE)):
        q = Q[ids[s]] if s in ids else [0.0]
        s, _, goal, _, _ = env.step(q.index(max(q)))
        if goal:
            return step
    return math.inf


# ------------------------------------------------------------------------------------------------------- figure 8.2


def maze_run(seed: int, **flags: Any) -> list[float]:
    """Steps of each of 50 episodes."""
    result = train(seed, num_episodes=50, total_timesteps=10**7, **flags)
    return [length for _, _, length in result["episodes"]]


def maze(seeds: int) -> Lines:
    rules = [("visited", 0), ("visited", 5), ("visited", 50), ("q", 5), ("q", 50)]
    methods = {f"{rule}, K = {K}": {"planning_action": rule, "planning_steps": K} for rule, K in rules}
    values, lines, worst = study("maze", maze_run, methods, seeds), {}, 0.0
    for K, cells in REFERENCE.items():
        for episode, reference in cells.items():
            steps = values[f"visited, K = {K}"][:, :50]
            steps = steps[:, -10:].mean(1) if episode == "last 10" else steps[:, episode - 1]
            lines[f"visited, K = {K}: steps, episode {episode}"] = steps
            # the reference's spread is not known for every cell: ours, at its number of seeds
            error = steps.std(ddof=1) * math.sqrt(1 / len(steps) + 1 / 30)
            worst = max(worst, abs(steps.mean() - reference) / error)
    lines["reference table: the cell farthest off, combined standard errors"] = worst
    for K in (5, 50):
        last = {rule: values[f"{rule}, K = {K}"][:, 40:50].mean(1) for rule in ("visited", "q")}
        lines[f"q, K = {K}: steps, episode last 10"] = last["q"]
        lines[f"K = {K}: q minus visited, last 10 episodes"] = last["q"] - last["visited"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, rule in zip(axes, ("visited", "q"), strict=True):
        for method in ("visited, K = 0", f"{rule}, K = 5", f"{rule}, K = 50"):
            draw_mean(axis, range(2, 51), values[method][:, 1:50], method)
        axis.axhline(SHORTEST, color="black", linestyle=":")
        axis.set(xlabel="episode", ylabel="steps in the episode", yscale="log")
        axis.legend()
    save(figure, "dyna_q_maze")
    return lines


# ----------------------------------------------------------------------------------------------- figures 8.4 and 8.5


def changing_run(seed: int, total_timesteps: int, **flags: Any) -> list[float]:
    """Cumulative reward after every 100 steps."""
    episodes = train(seed, alpha=1.0, total_timesteps=total_timesteps, **flags)["episodes"]
    ends = np.array([end for end, _, _ in episodes])  # each pays 1
    return [int((ends <= step).sum()) for step in range(0, total_timesteps + 1, 100)]


def changing(seeds: int) -> Lines:
    mazes = (("Blocking", 1e-4, 10, 3000, 1000), ("Shortcut", 1e-3, 50, 6000, 3000))
    methods: dict[str, dict[str, Any]] = {}
    for name, kappa, K, total, _ in mazes:
        flags = {"env_id": f"{name}Maze-v0", "planning_steps": K, "total_timesteps": total}
        for rule in ("visited", "q"):
            methods[f"{name}, {rule}, Dyna-Q"] = flags | {"planning_action": rule, "kappa": 0.0}
            methods[f"{name}, {rule}, Dyna-Q+"] = flags | {"planning_action": rule, "kappa": kappa}
    rewards, lines = study("changing", changing_run, methods, seeds), {}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, (name, kappa, K, total, change) in zip(axes, mazes, strict=True):
        for method in (method for method in methods if method.startswith(name)):
            draw_mean(axis, range(0, total + 1, 100), rewards[method], method)
        axis.axvline(change, color="black", linestyle=":")
        axis.set(title=f"K = {K}, κ = {kappa:g}", xlabel="real steps", ylabel="cumulative reward")
        axis.legend()
    for method, reward in rewards.items():
        if method.startswith("Blocking"):
            lines[f"{method}: reward at 3000"] = reward[:, 30]
        else:
            late = 1000 / np.maximum(reward[:, -1] - reward[:, -11], 1)
            lines[f"{method}: steps a reward after the opening"] = 3000 / (reward[:, -1] - reward[:, 30])
            lines[f"{method}: share with <= 14.5 in the last 1000 steps"] = float((late <= 14.5).mean())
    save(figure, "dyna_q_changing")
    return lines


# ------------------------------------------------------------------------------------------------ prioritised sweeping


def sweeping_run(seed: int, **flags: Any) -> list[float]:
    """Backups and real steps until the greedy path is a shortest one; 50,000 if it isn't within so many of both."""
    found = []

    def watch(global_step: int, backups: int, Q: list[list[float]], ids: dict[Any, int]) -> bool:
        if greedy_path(Q, ids) == SHORTEST:
            found.append([backups, global_step])
        return bool(found) or max(backups, global_step) >= 50_000

    train(seed, watch, alpha=0.5, planning_steps=5, total_timesteps=10**7, **flags)
    return found[0] if found else [50_000, 50_000]


def sweeping(seeds: int) -> Lines:
    methods = {"prioritised sweeping": {"prioritized": True}, "Dyna-Q, visited": {"planning_action": "visited"}}
    values, lines = study("sweeping", sweeping_run, methods | {"Dyna-Q, by Q": {}}, seeds), {}
    for method, value in values.items():
        backups = value[:, 0]
        lines[f"{method}: backups"] = backups
        lines[f"{method}: backups, median"] = float(np.median(backups))
    return lines


# ---------------------------------------------------------------------------------------------------------- FrozenLake


def lake_model() -> tuple[np.ndarray, np.ndarray]:
    """FrozenLake-v1's P (S, A, S) and R (S, A), read out of the environment; a terminal state has no way on."""
    P, R = np.zeros((16, 4, 16)), np.zeros((16, 4))
    for s, row in gym.make("FrozenLake-v1").unwrapped.P.items():
        for a, outcomes in row.items():
            for p, s2, r, end in outcomes:
                P[s, a, s2] += p * (not end)
                R[s, a] += p * r
    return P, R


def success_rate(policy: Any, P: np.ndarray, R: np.ndarray, steps: int = 100) -> float:
    """The exact probability that `policy` (S,) reaches the goal from state 0: V_{n+1} = R + P V_n."""
    rows, V = np.arange(16), np.zeros(16)
    for _ in range(steps):
        V = R[rows, policy] + P[rows, policy] @ V
    return float(V[0])


def lake_run(seed: int, **flags: Any) -> list[float]:
    """The exact success rate of the greedy policy after every 250 real steps."""
    (P, R), rates = lake_model(), []

    def watch(global_step: int, backups: int, Q: list[list[float]], ids: dict[Any, int]) -> None:
        if global_step % 250 == 0:
            policy = [Q[ids[s]].index(max(Q[ids[s]])) if s in ids else 0 for s in range(16)]
            rates.append(success_rate(policy, P, R))

    train(seed, watch, env_id="FrozenLake-v1", gamma=0.99, total_timesteps=30_000, **flags)
    return rates


def frozenlake(seeds: int) -> Lines:
    (P, R), V = lake_model(), np.zeros(16)
    for _ in range(10_000):
        V = (R + 0.99 * P @ V).max(1)
    best = success_rate((R + 0.99 * P @ V).argmax(1), P, R)
    # The best of alpha 0.02, 0.05, 0.1, 0.2 and epsilon 0.1, 0.3, 1 on seeds 1001 to 1006 (for counts, then also
    # epsilon 0.2 on seeds 1001 to 1020). Q-learning has two: the soonest within 2 points of the optimum, and the best
    # in the end.
    methods = {
        "Q-learning, alpha 0.2": {"planning_steps": 0, "alpha": 0.2, "epsilon": 0.3},
        "Q-learning, alpha 0.1": {"planning_steps": 0, "alpha": 0.1, "epsilon": 0.3},
        "Dyna-Q, last outcome": {"planning_steps": 20, "alpha": 0.02, "epsilon": 0.1},
        "Dyna-Q, counts": {"planning_steps": 20, "model": "counts", "alpha": 0.02, "epsilon": 0.2},
    }
    lines: dict[str, Any] = {"success rate of the optimal policy within 100 steps, exact": best}
    figure, axis = plt.subplots(figsize=(6.5, 4))
    for method, rates in study("frozenlake", lake_run, methods, seeds).items():
        draw_mean(axis, np.arange(1, 121) * 250, rates, method)
        lines[f"{method}: success rate, mean of the last 5000 of 30000 steps"] = rates[:, -20:].mean(1)
        good = np.lib.stride_tricks.sliding_window_view(rates >= best - 0.02, 5, axis=1).all(-1)  # five in a row
        steps = [250 * (row.argmax() + 1) if row.any() else math.inf for row in good]
        lines[f"{method}: real steps to within 2 points of it, median"] = statistics.median(steps)
        lines[f"{method}: seeds that get there"] = sum(map(math.isfinite, steps))
    axis.axhline(best, color="black", linestyle=":", label="optimal policy")
    axis.set(xlabel="real steps", ylabel="success rate of the greedy policy, exact")
    axis.legend()
    save(figure, "dyna_q_frozenlake")
    return lines


# ------------------------------------------------------------------------------------------------------------- Sokoban


def sokoban_run(seed: int, **flags: Any) -> list[float]:
    """Real steps until the first of 10 episodes in a row of at most 22 steps each (the generator solves it in 11)."""
    episodes = train(seed, env_id="Sokoban-v0", gamma=0.99, total_timesteps=10_000, **flags)["episodes"]
    for i in range(len(episodes) - 9):
        if all(length <= 22 for _, _, length in episodes[i : i + 10]):
            return [episodes[i][0]]
    return [math.inf]


def sokoban(seeds: int) -> Lines:
    methods = {f"K = {K}": {"planning_steps": K} for K in (0, 5, 50)}
    values = study("sokoban", sokoban_run, methods, seeds)
    return {f"{method}: real steps, median": float(np.median(steps)) for method, steps in values.items()}


PARTS = ((maze, 100), (changing, 100), (sweeping, 30), (frozenlake, 30), (sokoban, 30))  # with their seeds


def main(most_seeds: int = 100) -> None:
    rows = []
    for part, seeds in PARTS:
        for what, values in part(min(seeds, most_seeds)).items():
            row = {"part": part.__name__, "what": what, "value": f"{np.mean(values):.6g}"}
            if np.ndim(values):
                row |= {"half_interval": f"{half_interval(values):.4g}", "seeds": len(values)}
            rows.append(show(row))
    write_rows(rows, "dyna_q_summary.csv")


if __name__ == "__main__":
    tyro.cli(main)
