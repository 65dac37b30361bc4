"""How fast i2a.py trains on one thread, 7x7 rooms with two boxes: benchmark/results/i2a_throughput.csv.

    OMP_NUM_THREADS=1 python benchmark/i2a_throughput.py

Times rollouts and updates as the script's loop has them, with an untrained model (the same work). Seconds are the
processor's: on one thread those of the clock, if nothing else runs. `cost`: seconds a frame over those of the
model-free agent. (The file's other columns, and 10x10 rooms, are by an earlier version.)
"""

import torch
import tyro
from common import show, write_rows
from gpu import CPU, i2a, i2a_frames

AGENTS = {"model-free": "--agent model-free", "depth 3": "", "depth 8": "--imagination-depth 8"}


def main(seconds: float = 20.0) -> None:
    torch.set_num_threads(1)
    i2a.keep_freed_memory()
    speeds = {agent: i2a_frames(flags, "float32", CPU, seconds)["value"] for agent, flags in AGENTS.items()}
    rows = []
    for agent, speed in speeds.items():
        cost = round(speeds["model-free"] / speed, 2)
        rows.append(show({"task": "7x7-2", "agent": agent, "frames_per_second": round(speed), "cost": cost}))
    write_rows(rows, "i2a_throughput.csv")


if __name__ == "__main__":
    tyro.cli(main)
