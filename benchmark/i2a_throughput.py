"""How fast i2a.py trains on one thread: benchmark/results/i2a_throughput.csv.

    OMP_NUM_THREADS=1 python benchmark/i2a_throughput.py

Times rollouts and updates as the script's loop has them, with an untrained model (the same work). Seconds are the
processor's: on one thread those of the clock, if nothing else runs. `cost`: seconds a frame over those of the
model-free agent.
"""

import itertools

import torch
import tyro
from common import show, write_rows
from gpu import CPU, FLAGSHIP, i2a, i2a_frames

WIDE = f"{FLAGSHIP} --cnn-channels 64 64 64 --no-cnn-padding --dense 512"  # on a CPU, benchmark/flagship.py's
TASKS = {"7x7-2": "", "10x10-4": FLAGSHIP, "10x10-4, wide": WIDE, "10x10-4, wide, bf16": f"{WIDE} --bf16"}
AGENTS = {"model-free": "--agent model-free"} | {f"depth {d}": f"--imagination-depth {d}" for d in (3, 8)}


def main(seconds: float = 20.0) -> None:
    torch.set_num_threads(1)
    i2a.keep_freed_memory()
    rows, baseline = [], 0.0
    for task, agent in itertools.product(TASKS, AGENTS):
        speed = i2a_frames(f"{TASKS[task]} {AGENTS[agent]}", "float32", CPU, seconds)["value"]
        baseline = speed if agent == "model-free" else baseline
        row = {"task": task, "agent": agent, "frames_per_second": round(speed), "cost": round(baseline / speed, 2)}
        rows.append(show(row))
    write_rows(rows, "i2a_throughput.csv")


if __name__ == "__main__":
    tyro.cli(main)
