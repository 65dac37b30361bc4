"""A first measure at the paper's full size, 10x10 rooms with four boxes: I2A or model-free, on a CPU thread.

    OMP_NUM_THREADS=1 python benchmark/i2a_full_size.py --agent i2a --eval-levels boxoban-levels/unfiltered/valid

A curriculum over the number of boxes, all else as in the default command, and DeepMind's levels to judge by after every
half million frames. The model is learned on four boxes and serves all stages.
benchmark/results/i2a/10x10-4_AGENT_SEED.csv grows with each part; a run that was cut off goes on from its checkpoint.
"""

import csv
import os
import pathlib
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results" / "i2a"


@dataclass
class Args:
    eval_levels: str
    """this Boxoban file or folder is what it is judged by"""
    agent: Literal["i2a", "model-free"] = "i2a"
    """who learns"""
    seed: int = 11
    """seed of the run"""
    boxes: tuple[int, ...] = (1, 4)
    """boxes of each stage"""
    until: tuple[int, ...] = (4_000_000, 8_000_000)
    """frames after which each stage ends"""
    part: int = 500_000
    """frames between evaluations"""
    eval_episodes: int = 500
    """levels of each evaluation"""


def latest(args: Args) -> pathlib.Path | None:
    """The checkpoint of this run, if there is one."""
    found = pathlib.Path("runs").glob(f"Sokoban-10x10-4__full-{args.agent}__{args.seed}__*/checkpoint.pt")
    return max(found, default=None, key=os.path.getmtime)


def keep_rows(metrics: pathlib.Path, result: pathlib.Path) -> None:
    """Copy a run's rows, and keep the evaluations of its earlier parts: a run that goes on begins at its checkpoint,
    which is older than its last row."""
    files = [[*csv.DictReader(path.open(newline=""))] if path.exists() else [] for path in (metrics, result)]
    steps = {row["global_step"] for row in files[0] if row["eval/solved"]}
    rows = files[0] + [row for row in files[1] if row["eval/solved"] and row["global_step"] not in steps]
    rows.sort(key=lambda row: float(row["global_step"]))
    temporary = result.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*dict.fromkeys(name for row in rows for name in row)])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, result)


def main(args: Args) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    first = ["--size", "10", "--num-boxes", "4", "--max-episode-steps", "120", "--agent", args.agent]
    first += ["--seed", str(args.seed), "--exp-name", f"full-{args.agent}", "--eval-levels", args.eval_levels]
    first += ["--eval-episodes", str(args.eval_episodes), "--total-timesteps", "20000"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = RESULTS / f"10x10-4_{args.agent}_{args.seed}.csv"
    checkpoint = latest(args)
    while True:
        step = torch.load(checkpoint, weights_only=True)["global_step"] if checkpoint else 0
        if step >= args.until[-1]:
            return
        stage = next(i for i, last in enumerate(args.until) if step < last)
        goal = min((step // args.part + 1) * args.part, args.until[stage])
        flags = ["--resume", str(checkpoint), "--num-boxes", str(args.boxes[stage]), "--total-timesteps", str(goal)]
        subprocess.run(
            [sys.executable, str(ROOT / "i2a.py"), *(flags if checkpoint else first)], env=environment, check=True
        )
        checkpoint = latest(args)
        keep_rows(checkpoint.with_name("metrics.csv"), result)


if __name__ == "__main__":
    main(tyro.cli(Args))
