"""Distral on Sokoban tasks against independent and multitask A2C: learning curves over seeds, π_0 on a held-out task.

    OMP_NUM_THREADS=1 python benchmark/distral_runs.py                  # all runs that are missing, then the report
    OMP_NUM_THREADS=1 python benchmark/distral_runs.py --report-only    # table and figure of what is there

Runs go seed by seed through all variants, so that a grid that is cut off compares equals. Each finished run is one file
in benchmark/results/distral/; the report writes benchmark/results/distral_summary.csv and docs/distral_sokoban.png.
Settings were chosen on seed 101; seeds 1 to 5 are reported. Intervals: 95 %, Student's t over the seeds.
"""

import csv
import io
import math
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
import torch
import tyro

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import distral

VARIANTS: dict[str, dict[str, Any]] = {
    "kl+ent, two columns": {"variant": "kl+ent", "columns": 2},
    "multitask": {"algorithm": "multitask"},
    "independent": {"algorithm": "independent"},
    "kl, two columns": {"variant": "kl", "columns": 2},
    "kl+ent, one column": {"variant": "kl+ent", "columns": 1},
    "A2C, two columns": {"algorithm": "two-column"},
}
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % points, 1 to 9 degrees of freedom
COLOURS = dict(zip(VARIANTS, ("#c03a2b", "#1f6fb4", "#888888", "#e08b3e", "#8e5ea2", "#2c8a4b"), strict=True))


@dataclass
class Args:
    variants: tuple[str, ...] = tuple(VARIANTS)
    """which of the variants above"""
    seeds: int = 5
    """seeds 1 to N"""
    total_timesteps: int = 400_000
    """frames a run, over all tasks"""
    report_only: bool = False
    """train nothing"""
    output_dir: str = "benchmark/results"
    """where the tables go"""
    figure_dir: str = "docs"
    """where the figure goes"""


def result_path(args: Args, variant: str, seed: int) -> pathlib.Path:
    name = variant.replace(", ", "_").replace(" ", "-")
    return pathlib.Path(args.output_dir).resolve() / "distral" / f"{name}__{seed}.csv"


def train(args: Args, variant: str, seed: int) -> None:
    path, home = result_path(args, variant, seed), os.getcwd()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(io.StringIO()):
        os.chdir(scratch)
        try:
            flags = {"seed": seed, "total_timesteps": args.total_timesteps, "save_model": False, "cuda": False}
            distral.main(distral.Args(**flags | VARIANTS[variant]))
            (metrics,) = pathlib.Path("runs").glob("*/metrics.csv")
            temporary = path.with_suffix(".tmp")
            shutil.copy(metrics, temporary)
            os.replace(temporary, path)
        finally:
            os.chdir(home)
    print(f"{path.name} is there", flush=True)


def read(path: pathlib.Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def hardware() -> str:
    return f"one thread of a shared {platform.machine()} CPU, torch {torch.__version__}"


def mean_and_half(values: Any) -> tuple[float, float]:
    """Mean and 95 % half-width over seeds."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), math.nan
    t = STUDENT[min(len(values) - 2, len(STUDENT) - 1)]
    return float(values.mean()), float(t * values.std(ddof=1) / math.sqrt(len(values)))


def report(args: Args) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    table: list[dict[str, Any]] = []
    for variant in VARIANTS:
        paths = [result_path(args, variant, seed) for seed in range(1, args.seeds + 1)]
        runs_by_seed = {path.stem.split("__")[1]: read(path) for path in paths if path.exists()}
        runs = list(runs_by_seed.values())
        if not runs:
            continue
        row: dict[str, Any] = {"variant": variant, "seeds": len(runs), "frames": int(runs[0][-1]["global_step"])}
        row["solved_auc"], row["solved_auc_half"] = mean_and_half(
            [np.mean([r["charts/solved"] for r in rows if "charts/solved" in r]) for rows in runs]
        )
        for key in ("eval/solved", "eval/distilled", "eval/held_out"):
            if key in runs[0][-1]:
                name = key.removeprefix("eval/")
                row[name], row[f"{name}_half"] = mean_and_half([rows[-1][key] for rows in runs])
        both = [seed for seed in runs_by_seed if result_path(args, "multitask", int(seed)).exists()]
        if both and variant != "multitask":  # seed by seed, against multitask A2C
            others = [read(result_path(args, "multitask", int(seed))) for seed in both]
            pairs = zip((runs_by_seed[seed] for seed in both), others, strict=True)
            differences = [rows[-1]["eval/solved"] - other[-1]["eval/solved"] for rows, other in pairs]
            row["minus_multitask"], row["minus_multitask_half"] = mean_and_half(differences)
        row["kl_to_distilled"] = float(np.mean([rows[-2]["losses/kl_to_distilled"] for rows in runs]))
        row["hardware"] = hardware()
        table.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if k != "hardware"})
        curves = [rows[:-1] for rows in runs]  # the last row covers a few episodes only
        x = [r["global_step"] for r in curves[0]]
        y = np.array([[r.get("charts/solved", math.nan) for r in rows] for rows in curves])
        axes[0].plot(x, y.mean(0), color=COLOURS[variant], label=f"{variant} ({len(runs)} seeds)")
        if len(runs) > 2:
            low, high = y.mean(0) - y.std(0, ddof=1), y.mean(0) + y.std(0, ddof=1)
            axes[0].fill_between(x, low, high, color=COLOURS[variant], alpha=0.15, lw=0)
    axes[0].set(xlabel="frames, all tasks together", ylabel="solved while training (band: one deviation)", ylim=(0, 1))
    axes[0].legend(fontsize=8)
    width = 0.27
    for k, (name, label) in enumerate(
        (("solved", "π_i, own task"), ("distilled", "π_0, the same tasks"), ("held_out", "π_0, held-out task"))
    ):
        for j, row in enumerate(table):
            if name in row:
                axes[1].bar(
                    j + (k - 1) * width, row[name], width * 0.92, yerr=row[f"{name}_half"], capsize=2,
                    color=COLOURS[row["variant"]], alpha=(1.0, 0.65, 0.35)[k], ecolor="#444444",
                )  # fmt: skip
        axes[1].bar(0, 0, color="#555555", alpha=(1.0, 0.65, 0.35)[k], label=label)
    axes[1].set_xticks(range(len(table)), [row["variant"].replace(", ", ",\n") for row in table], fontsize=8)
    axes[1].set(ylabel="held-out levels solved", ylim=(0, 1))
    axes[1].legend(fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(pathlib.Path(args.figure_dir) / "distral_sokoban.png", dpi=110)
    path = pathlib.Path(args.output_dir) / "distral_summary.csv"
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in table for name in row)))
        writer.writeheader()
        writer.writerows(table)
    os.replace(temporary, path)


def main(args: Args) -> None:
    if unknown := {*args.variants} - {*VARIANTS}:
        sys.exit(f"unknown {', '.join(sorted(unknown))}, known are {'; '.join(VARIANTS)}")
    torch.set_num_threads(1)
    for seed in range(1, args.seeds + 1):
        for variant in args.variants:
            if not args.report_only and not result_path(args, variant, seed).exists():
                train(args, variant, seed)
    report(args)


if __name__ == "__main__":
    main(tyro.cli(Args))
