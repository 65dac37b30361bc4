"""Does a learned model beat replay? dyna_dqn.py's three modes, and CleanRL's DQN settings, by real steps to a return.

    OMP_NUM_THREADS=1 python benchmark/dyna_neural.py                  # run what is missing, then table and figure
    OMP_NUM_THREADS=1 python benchmark/dyna_neural.py --report-only    # table and figure of the runs that there are
    OMP_NUM_THREADS=1 python benchmark/dyna_neural.py --speed          # what runs in lockstep cost

Seeds are 1 to `--seeds`, trained `--lockstep` at once. A run that has ended leaves its own CSV file in
benchmark/results/dyna_neural, one row an evaluation (10 greedy episodes); a run whose file exists isn't repeated, so
that an interrupted grid goes on. A run reaches a return at its first evaluation whose mean is that or more; the curves
go on behind it, but CleanRL's stop there, so they run one by one. CleanRL's runs are evaluated every 2,500 real steps,
the others every 500: ratios take all modes at multiples of 2,500, or the others would have five times the lucky draws.
A run that never gets there counts with all its steps, which is less than the truth. Interquartile mean: of the middle
half of the seeds; intervals are 95 % bootstrap ones over the seeds. Replay against model: a permutation test.
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

import dyna_dqn

GOALS = {"CartPole-v1": 475.0, "Acrobot-v1": -100.0}
# CleanRL's dqn.py, all of its published hyperparameters; its network is (120, 84), its loss that of plain DQN
CLEANRL = {
    "planning": "none", "double": False, "standardize": False, "hidden": (120, 84), "total_timesteps": 500_000,
    "learning_rate": 2.5e-4, "buffer_size": 10_000, "gamma": 0.99, "tau": 1.0, "target_network_frequency": 500,
    "batch_size": 128, "start_e": 1.0, "end_e": 0.05, "exploration_fraction": 0.5, "learning_starts": 10_000,
    "train_frequency": 10, "eval_frequency": 2500,
}  # fmt: skip
# The script's defaults, chosen on seeds 1001 to 1006, and these budgets. ε falls over as many real steps in every mode.
STEPS = {
    ("CartPole-v1", "none"): 20_000, ("CartPole-v1", "replay"): 10_000, ("CartPole-v1", "model"): 10_000,
    ("Acrobot-v1", "none"): 20_000, ("Acrobot-v1", "replay"): 10_000, ("Acrobot-v1", "model"): 10_000,
}  # fmt: skip
EXPLORATION_STEPS = 1000
MODES = ("none", "replay", "model", "cleanrl")
COLOURS = {"none": "#888888", "replay": "#1f6fb4", "model": "#c03a2b", "cleanrl": "#2c8a4b"}


@dataclass
class Args:
    env_ids: tuple[str, ...] = tuple(GOALS)
    """which environments"""
    modes: tuple[str, ...] = MODES
    """which modes"""
    seeds: int = 10
    """seeds 1 to N"""
    lockstep: int = 10
    """seeds that are trained at once, and whose files are written at once"""
    output_dir: str = "benchmark/results"
    """where the tables go"""
    figure_dir: str = "docs"
    """where the figure goes"""
    report_only: bool = False
    """run nothing"""
    speed: bool = False
    """measure only what one run and ten in lockstep cost"""


def settings(env_id: str, mode: str) -> dict[str, Any]:
    if mode == "cleanrl":
        return CLEANRL | {"env_id": env_id, "stop_return": GOALS[env_id]}
    steps = STEPS[env_id, mode]
    fall = {"exploration_fraction": EXPLORATION_STEPS / steps}
    return {"env_id": env_id, "planning": mode, "total_timesteps": steps} | fall


def write(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    os.replace(temporary, path)


def read(path: pathlib.Path) -> list[dict[str, float]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def run(env_id: str, mode: str, first_seed: int, num_seeds: int, folder: pathlib.Path) -> None:
    start, home = time.process_time(), os.getcwd()
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(io.StringIO()):
        os.chdir(scratch)  # the script's own metrics go there, and away
        try:
            rows = dyna_dqn.main(dyna_dqn.Args(seed=first_seed, num_seeds=num_seeds, **settings(env_id, mode)))
        finally:
            os.chdir(home)
    seconds = (time.process_time() - start) / num_seeds
    for e in range(num_seeds):
        own = [{k: v[e] if isinstance(v, list) else v for k, v in row.items()} for row in rows]
        write(folder / f"{env_id}__{mode}__{first_seed + e}.csv", [row | {"cpu_seconds": seconds} for row in own])
    best = np.max([row["eval/return"] for row in rows], 0)
    print(
        f"  {env_id} {mode}, seeds from {first_seed}: {rows[-1]['global_step']} steps, best {best.round().tolist()}, "
        f"{seconds:.0f} CPU seconds a seed", file=sys.stderr, flush=True,
    )  # fmt: skip


def steps_to(rows: list[dict[str, float]], goal: float, every: int = 1) -> tuple[float, bool]:
    """Real steps to the first evaluation, of those at multiples of `every`, that meets the goal, and whether one does.

    Without one: all steps of the run.
    """
    for row in rows:
        if row["eval/return"] >= goal and row["global_step"] % every == 0:
            return row["global_step"], True
    return rows[-1]["global_step"], False


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


def permutation_p(x: Any, y: Any, num: int = 10_000) -> float:
    """How often seeds dealt anew to x and y differ in the interquartile mean as much as x and y do."""
    both, rng = np.array([*x, *y], dtype=float), np.random.default_rng(2)
    dealt = rng.permuted(np.tile(both, (num, 1)), axis=1)
    differences = np.abs(iqm(dealt[:, : len(x)], 1) - iqm(dealt[:, len(x) :], 1))
    return float((differences >= abs(iqm(x) - iqm(y)) - 1e-9).mean())


def hardware() -> str:
    cpu = platform.processor() or "unknown"
    if pathlib.Path("/proc/cpuinfo").exists():
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return f"{cpu}, one thread, Python {platform.python_version()}, torch {torch.__version__}"


def report(args: Args, folder: pathlib.Path) -> None:
    table: list[dict[str, Any]] = []
    figure, axes = plt.subplots(2, len(args.env_ids), figsize=(5.5 * len(args.env_ids), 6.5), squeeze=False)
    print(
        "| environment | mode | seeds | reached | real steps (IQM) | 95 % | reached, by 2,500 | real steps | "
        "CleanRL's / these | 95 % | CPU s a seed |"
    )
    print("|---|---|--:|--:|--:|---|--:|--:|--:|---|--:|")
    for column, env_id in enumerate(args.env_ids):
        goal, fine, coarse = GOALS[env_id], {}, {}
        for mode in MODES:
            paths = [folder / f"{env_id}__{mode}__{seed}.csv" for seed in range(1, args.seeds + 1)]
            runs = [read(path) for path in paths if path.exists()]
            if not runs:
                continue
            reached = [steps_to(rows, goal) for rows in runs]
            steps = fine[mode] = [step for step, _ in reached]
            coarse[mode] = [steps_to(rows, goal, CLEANRL["eval_frequency"]) for rows in runs]
            low, high = np.quantile(bootstrap(steps), (0.025, 0.975))
            row = {
                "env_id": env_id, "mode": mode, "goal": goal, "seeds": len(runs),
                "reached": sum(ok for _, ok in reached), "budget": int(max(rows[-1]["global_step"] for rows in runs)),
                "steps_iqm": float(iqm(steps)), "steps_low": float(low), "steps_high": float(high),
                "steps_median": float(np.median(steps)), "reached_coarse": sum(ok for _, ok in coarse[mode]),
                "steps_coarse_iqm": float(iqm([step for step, _ in coarse[mode]])),
                "cpu_seconds": float(np.mean([rows[-1]["cpu_seconds"] for rows in runs])),
            }  # fmt: skip
            if mode != "cleanrl":  # all runs are of one length: learning curves
                x = [row_["global_step"] for row_ in runs[0]]
                curves = np.array([[row_["eval/return"] for row_ in rows] for rows in runs])  # (seeds, evaluations)
                row["final_return_iqm"] = float(iqm(curves[:, -4:].mean(1)))
                draw_curve(axes[0, column], x, curves, COLOURS[mode], mode)
            if mode == "model":
                errors = {}
                for name, colour, label in (
                    ("model/delta_error", "#c03a2b", "Δs, in units of its spread"),
                    ("model/reward_error", "#888888", "r"),
                    ("model/termination_error", "#1f6fb4", "termination, share wrong"),
                ):  # fmt: skip
                    # the evaluation at learning_starts comes before the model's first update
                    errors[name] = np.array([[row_[name] for row_ in rows[1:]] for rows in runs])
                    draw_curve(axes[1, column], x[1:], errors[name], colour, label)
                    row[name] = float(iqm(errors[name][:, -4:].mean(1)))
            table.append(row)
        for row in table:
            mode = row["mode"]
            if row["env_id"] == env_id and "cleanrl" in coarse and mode != "cleanrl":
                theirs, ours = ([step for step, _ in coarse[which]] for which in ("cleanrl", mode))
                ratios = np.random.default_rng(1).permutation(bootstrap(theirs)) / bootstrap(ours)
                row["ratio"] = float(iqm(theirs) / iqm(ours))
                row["ratio_low"], row["ratio_high"] = map(float, np.quantile(ratios, (0.025, 0.975)))
        if {"replay", "model"} <= {*fine}:
            (row,) = (row for row in table if row["env_id"] == env_id and row["mode"] == "model")
            row["replay_model_p"] = permutation_p(fine["replay"], fine["model"])
        axes[0, column].axhline(goal, color="black", lw=0.8, ls=":")
        axes[0, column].set(title=env_id, xlabel="real steps", ylabel="return of the greedy policy")
        if len(axes[0, column].lines) > 1:
            axes[0, column].legend(loc="lower right")
        axes[1, column].set(ylim=(0, 2), xlabel="real steps", ylabel="the model's error on unseen steps")
        axes[1, column].set_yscale("symlog", linthresh=1e-3)  # an error can be 0
        if axes[1, column].lines:
            axes[1, column].legend(loc="upper right")
    for row in table:
        ratio = f"{row['ratio']:.1f} | {row['ratio_low']:.1f} to {row['ratio_high']:.1f}" if "ratio" in row else " | "
        less = "" if row["reached"] == row["seeds"] else "≥ "
        print(
            f"| {row['env_id']} | {row['mode']} | {row['seeds']} | {row['reached']} | {less}{row['steps_iqm']:.0f} | "
            f"{row['steps_low']:.0f} to {row['steps_high']:.0f} | {row['reached_coarse']} | "
            f"{row['steps_coarse_iqm']:.0f} | {ratio} | {row['cpu_seconds']:.0f} |"
        )
        row["hardware"] = hardware()
    write(pathlib.Path(args.output_dir) / "dyna_dqn_summary.csv", table)
    figure.tight_layout()
    pathlib.Path(args.figure_dir).mkdir(parents=True, exist_ok=True)
    figure.savefig(pathlib.Path(args.figure_dir) / "dyna_dqn.png", dpi=110)


def draw_curve(axis: Any, x: list[float], values: np.ndarray, colour: str, label: str) -> None:
    low, high = np.quantile(bootstrap(values, 1000), (0.025, 0.975), axis=0)
    axis.plot(x, iqm(values, 0), color=colour, label=label)
    axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)


def lockstep_speed(args: Args) -> None:
    """CPU milliseconds of an update of Q, all else included, by the number of runs in lockstep; CartPole-v1."""
    rows = []
    for mode in ("replay", "model"):
        for num_seeds in (1, 10):
            common = {"planning": mode, "num_seeds": num_seeds, "learning_starts": 50, "eval_episodes": 1}
            with tempfile.TemporaryDirectory() as scratch, redirect_stdout(io.StringIO()):
                home = os.getcwd()
                os.chdir(scratch)
                try:
                    for steps in (100, 650):  # the first run warms up
                        start = time.process_time()
                        result = dyna_dqn.main(dyna_dqn.Args(total_timesteps=steps, eval_frequency=steps, **common))
                finally:
                    os.chdir(home)
                milliseconds = 1000 * (time.process_time() - start) / result[-1]["charts/updates"]
            rows.append({"mode": mode, "num_seeds": num_seeds, "cpu_ms_an_update": milliseconds})
            rows[-1] |= {"cpu_ms_an_update_and_seed": milliseconds / num_seeds, "hardware": hardware()}
            print(rows[-1])
    write(pathlib.Path(args.output_dir) / "dyna_dqn_speed.csv", rows)


def main(args: Args) -> None:
    unknown = {*args.env_ids} - {*GOALS} | {*args.modes} - {*MODES}
    if unknown or args.seeds < 1:
        sys.exit(f"unknown {', '.join(sorted(unknown))}" if unknown else "--seeds must be 1 or more")
    torch.set_num_threads(1)
    if args.speed:
        lockstep_speed(args)
        return
    folder = pathlib.Path(args.output_dir).resolve() / "dyna_neural"
    for mode in args.modes:
        for env_id in args.env_ids:
            missing = [e for e in range(1, args.seeds + 1) if not (folder / f"{env_id}__{mode}__{e}.csv").exists()]
            most = 1 if mode == "cleanrl" else args.lockstep  # so that each of CleanRL's runs stops for itself
            while missing and not args.report_only:
                group = [e for i, e in enumerate(missing[:most]) if e == missing[0] + i]  # without a gap
                run(env_id, mode, group[0], len(group), folder)
                missing = missing[len(group) :]
    report(args, folder)


if __name__ == "__main__":
    main(tyro.cli(Args))
