"""Train I2A and its baselines over seeds, and keep each finished run's metrics under benchmark/results/i2a/.

    OMP_NUM_THREADS=1 python benchmark/i2a_runs.py --jobs 2 --seeds 11 12 13 14 15

A finished run whose agent is still under runs/ is not run again, unless it was shorter; one that was cut off goes on
from its checkpoint. A fresh clone has results, but no agents: there each run starts anew.
"""

import csv
import os
import pathlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import tyro

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results" / "i2a"
VARIANTS = {
    "i2a": [],
    "model-free": ["--agent", "model-free"],
    "wide": ["--agent", "model-free", "--width-multiplier", "2"],
    "copy": ["--env-model", "copy"],
    "depth-1": ["--imagination-depth", "1"],
    "depth-5": ["--imagination-depth", "5"],
    "depth-10": ["--imagination-depth", "10"],
    "poor": ["--env-model", "poor"],
    "width-4": ["--model-width", "4"],
    "perfect": ["--env-model", "perfect"],
    "no-reward": ["--no-reward-prediction"],
    "bf16": ["--bf16"],
    "i2a-nstep": ["--gae-lambda", "1"],
    "model-free-nstep": ["--agent", "model-free", "--gae-lambda", "1"],
    "copy-nstep": ["--env-model", "copy", "--gae-lambda", "1"],
}


@dataclass
class Args:
    task: str = "7x7-1"
    """a name for the results, and the size and number of boxes: HxW-boxes"""
    variants: tuple[str, ...] = ("i2a", "model-free", "copy")
    """which of the variants above"""
    seeds: tuple[int, ...] = (11, 12, 13)
    """seeds of each"""
    total_timesteps: int = 800_000
    """frames a run, those of the model's pretraining included"""
    jobs: int = 2
    """runs at a time, one thread each"""


def train(args: Args, variant: str, seed: int) -> None:
    result = RESULTS / f"{args.task}_{variant}_{seed}.csv"
    folders = f"Sokoban-{args.task}__study-{variant}__{seed}__*"
    if result.exists() and any(pathlib.Path("runs").glob(f"{folders}/agent.pt")):
        with result.open(newline="") as file:
            if int(list(csv.DictReader(file))[-1]["global_step"]) >= args.total_timesteps:
                return
    size, boxes = args.task.split("x")[0], args.task.split("-")[1]
    flags = ["--size", size, "--num-boxes", boxes, "--seed", str(seed), "--exp-name", f"study-{variant}"]
    flags += VARIANTS[variant]
    earlier = sorted(pathlib.Path("runs").glob(f"{folders}/checkpoint.pt"))
    command = [sys.executable, str(ROOT / "i2a.py"), *(["--resume", str(earlier[-1])] if earlier else flags)]
    command += ["--total-timesteps", str(args.total_timesteps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = pathlib.Path("runs") / f"study-{args.task}-{variant}-{seed}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as file:
        subprocess.run(command, env=environment, stdout=file, stderr=file, check=True)
    (folder,) = (path.parent for path in pathlib.Path("runs").glob(f"{folders}/agent.pt"))
    RESULTS.mkdir(parents=True, exist_ok=True)
    temporary = result.with_suffix(".tmp")
    shutil.copy(folder / "metrics.csv", temporary)
    os.replace(temporary, result)
    print(f"{result.name} is there", flush=True)


def main(args: Args) -> None:
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(train, args, variant, seed) for seed in args.seeds for variant in args.variants]
    for run in runs:
        run.result()


if __name__ == "__main__":
    main(tyro.cli(Args))
