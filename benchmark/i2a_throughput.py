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
NARROW = "--encoder-channels 16 --encoder-dense 16 --lstm 32 --rollout-channels 16 --rollout-dense 32"
AGENTS = {
    "model-free": "--agent model-free",
    "depth 3, narrow": f"--imagination-depth 3 {NARROW}",
    "depth 3": "--imagination-depth 3",
    "depth 8": "--imagination-depth 8",
}


def main(seconds: float = 15.0) -> None:
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
