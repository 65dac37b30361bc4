"""Train variants of a script over seeds, and collect their metrics in one file: benchmark/results/STUDY.csv.

    python benchmark/run.py --study i2a_7x7 --variants "i2a=" "model-free=--agent model-free" \
        --flags="--total-timesteps 1000000" --seeds 11 12 13 14 15 --jobs 2

A run is known by its --exp-name, STUDY-VARIANT, and its seed. One that is finished (agent.pt is there) is not run
again; one that was cut off goes on from its checkpoint. Rows of runs that are still under way are collected too, and
rows of runs that are no longer under runs/ stay in the file.
"""

import os
import pathlib
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import tyro
from common import RESULTS, ROOT, read_rows, write_rows

# Columns, by the start of their names
KEPT = ("global_step", "charts/", "eval/", "model/", "losses/entropy", "losses/kl_to_pi_0")


@dataclass
class Args:
    study: str  # a name for the runs and their results
    variants: tuple[str, ...]  # "NAME=FLAGS" of each
    script: str = "i2a.py"  # what is run
    flags: str = ""  # flags of all variants, behind an equals sign: --flags="--size 8"
    seeds: tuple[int, ...] = (11, 12, 13, 14, 15)  # seeds of each
    jobs: int = 2  # runs at a time, one thread each
    collect_only: bool = False  # run nothing


def folder_of(args: Args, variant: str, seed: int) -> pathlib.Path | None:
    """The latest folder of a run."""
    found = pathlib.Path("runs").glob(f"*__{args.study}-{variant}__{seed}__*/metrics.csv")
    return max((path.parent for path in found), default=None, key=os.path.getmtime)


def train(args: Args, variant: str, flags: str, seed: int) -> None:
    folder = folder_of(args, variant, seed)
    if folder and (folder / "agent.pt").exists():
        return
    command = [sys.executable, str(ROOT / args.script), *shlex.split(args.flags), *shlex.split(flags)]
    command += ["--seed", str(seed), "--exp-name", f"{args.study}-{variant}"]
    if folder and (folder / "checkpoint.pt").exists():
        command = [sys.executable, str(ROOT / args.script), "--resume", str(folder / "checkpoint.pt")]
    log = pathlib.Path("runs") / f"{args.study}-{variant}-{seed}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        if subprocess.run(command, env=environment, stdout=file, stderr=file, check=False).returncode:
            sys.exit(f"{args.study}-{variant}, seed {seed} failed: see {log}")
    print(f"{args.study}-{variant}, seed {seed}: done", flush=True)


def main(args: Args) -> None:
    variants = dict(variant.split("=", 1) for variant in args.variants)
    if not args.collect_only:
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = [pool.submit(train, args, v, flags, s) for s in args.seeds for v, flags in variants.items()]
            try:
                for job in jobs:
                    job.result()
            finally:  # after a failure or Ctrl-C: waits for those under way, starts no others
                pool.shutdown(cancel_futures=True)
    results = RESULTS / f"{args.study}.csv"
    runs = {(v, str(s)): folder_of(args, v, s) for v in variants for s in args.seeds}
    found = {run: folder for run, folder in runs.items() if folder}
    rows = [row for row in read_rows(results) if (row["variant"], row["seed"]) not in found] if results.exists() else []
    for (variant, seed), folder in found.items():
        for row in read_rows(folder / "metrics.csv"):
            kept = {k: f"{float(v):.6g}" for k, v in row.items() if v and k.startswith(KEPT)}
            kept["global_step"] = str(round(float(row["global_step"])))
            rows.append({"study": args.study, "variant": variant, "seed": seed} | kept)
    write_rows(rows, f"{args.study}.csv")


if __name__ == "__main__":
    main(tyro.cli(Args))
