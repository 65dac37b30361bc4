"""How fast i2a.py trains on one thread, and what part of the machine's peak that is: results/i2a_throughput.csv.

    OMP_NUM_THREADS=1 python benchmark/i2a_throughput.py

Times rollouts and updates as the script's loop has them, with an untrained model (the same work). Seconds are the
processor's: on one thread those of the clock, if nothing else runs. `cost`: seconds a frame over those of the
model-free agent with the same flags. The peak is a 1024 x 1024 float32 matrix product in the same process; the
arithmetic of a frame is counted by torch. (The file's shares of the parts are by an earlier version.)
"""

from dataclasses import dataclass

import torch
import tyro
from common import show, write_rows
from gpu import CPU, FLAGSHIP, i2a, i2a_frames, peaks

MODEL_FREE = "--agent model-free"
# By task, the flags of its agents; the model-free one, with which they are compared, comes first
CASES = {
    "7x7-2": {"model-free": MODEL_FREE, "depth 3": "", "depth 8": "--imagination-depth 8"},
    "10x10-4": {"model-free": f"{FLAGSHIP} {MODEL_FREE}"}
    | {f"depth {depth}": f"{FLAGSHIP} --imagination-depth {depth}" for depth in (1, 3, 5, 8)},
    "7x7-2, paper-small": {
        "model-free": f"--preset paper-small {MODEL_FREE}",
        "depth 3": "--preset paper-small",
    },
}


@dataclass
class Args:
    tasks: tuple[str, ...] = tuple(CASES)  # which of the cases
    seconds: float = 20.0  # how long each is measured


def main(args: Args) -> None:
    torch.set_num_threads(1)
    i2a.keep_freed_memory()
    rows = []
    for task in args.tasks:
        baseline = 0.0
        for name, flags in CASES[task].items():
            peak = peaks(CPU, 1024)
            result = i2a_frames(flags, "float32", CPU, args.seconds, peak)
            speed = result["value"]
            baseline = baseline or speed
            row = {"task": task, "agent": name, "frames_per_second": round(speed), "cost": round(baseline / speed, 2)}
            row |= {"mflop_per_frame": round(result["mflop_per_frame"], 2)}
            row |= {"peak_gflops": round(peak["float32"] / 1e9, 1), "share_of_peak": round(result["share_of_peak"], 3)}
            rows.append(show(row))
    write_rows(rows, "i2a_throughput.csv")


if __name__ == "__main__":
    main(tyro.cli(Args))
