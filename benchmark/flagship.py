"""An agent for 10x10 rooms with four boxes, measured on DeepMind's levels on the way.

    python benchmark/flagship.py model-free --flags="--agent model-free --total-timesteps 5000000"
    python benchmark/flagship.py gpu-model-free --seconds 470 --flags="--agent model-free"

Runs i2a.py on the levels in the folder levels/ (benchmark/gpu.sh makes it). Without --seconds it is one run, to the
frames that the flags say; --until stops it before, so that it can go on with other flags. With --seconds it is a
race against the clock, in pieces:
1. to 4 M frames at a constant rate;
2. from there, as a branch, 1 M frames with a rate that falls to 0: what 5 M frames can do;
3. from the end of the first piece at the constant rate, from 10 M frames on in minibatches of 1,024 rows, not 256;
4. in the last quarter of the time, on from there with a rate that falls to 0. Where no time was left for 3, it goes on
   from the branch.
With --contest only the first, until the time is up. Each evaluation is a row of flagship_NAME.csv in `--output`, the
agent is NAME.pt beside it (float16, under 5 MB), and checkpoints are in the folder of the run, flagship-NAME, under
runs/. With `--resume` among the flags a run goes on with its own, but for what stands beside it, and its rows go on.
"""

import contextlib
import functools
import math
import pathlib
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import tyro
from common import RESULTS, read_rows, show, wilson, write_rows

import i2a
import sokoban_env

TASK = (
    "--size 10 --num-boxes 4 --max-episode-steps 120 --levels levels --seed 11 --no-cnn-padding --dense 512 "
    "--no-save-model"
)
ON_CPU = "--cnn-channels 64 64 64 --bf16 --anneal-from 0.5 --log-frequency 50000"
ON_GPU = (
    "--cnn-channels 128 128 128 --num-envs 1024 --num-steps 8 --num-minibatches 32 --learning-rate 7e-4 "
    "--no-torch-deterministic --cuda-graph --log-frequency 250000"
)


@dataclass
class Args:
    name: tyro.conf.Positional[str]  # of the run
    seconds: float | None = None  # time limit; without it one run, to the end
    flags: str = ""  # of i2a.py, behind those of the task
    until: float = math.inf  # frames after which it stops, so that it can go on with other flags
    contest: bool = False  # only the first piece, until the time is up
    first: int = 4_000_000  # frames of the first piece
    branch: int = 1_000_000  # frames of the branch
    large_from: int = 10_000_000  # frames after which minibatches are larger
    every: int = 500_000  # frames between evaluations
    valid: str = "boxoban-levels/unfiltered/valid"  # the levels of the evaluations, of which
    num_levels: int = 1000  # so many are played
    output: str = str(RESULTS)  # folder of the table


class TimeIsUp(Exception):
    """Raised where i2a.py saves a checkpoint."""


class Trainer:
    """Runs pieces of a training, and measures the agent on the way."""

    def __init__(self, args: Args) -> None:
        self.args, self.start, self.rows, self.piece = args, time.time(), [], ""
        self.deadline, self.next, self.speeds = 0.0, args.every, []
        self.levels = i2a.read_levels(args.valid, 10)[: args.num_levels]
        self.save_checkpoint, i2a.save_checkpoint = i2a.save_checkpoint, self.save
        self.path, self.step = pathlib.Path(), 0  # of the last checkpoint
        self.table = pathlib.Path(args.output).resolve() / f"flagship_{args.name}.csv"
        if "--resume" in args.flags and self.table.exists():
            self.rows = read_rows(self.table)
            self.next = self.after(int(self.rows[-1]["frames"]))

    def save(self, path: pathlib.Path, state: dict[str, Any]) -> None:
        """In the place of i2a.py's save_checkpoint."""
        self.save_checkpoint(path, state)
        self.path, self.step = path, state["global_step"]
        self.speeds.append(state["rows"][-1]["charts/SPS"])
        if self.step >= self.next:
            self.next = self.after(self.step)
            self.measure(state)
        if time.time() > self.deadline or self.step >= self.args.until:
            raise TimeIsUp

    def after(self, step: int) -> int:
        """The frames of the next evaluation."""
        return (step // self.args.every + 1) * self.args.every

    def measure(self, state: dict[str, Any]) -> None:
        args, device = i2a.Args(**state["args"]), next(iter(state["networks"].values())).device
        networks = i2a.make_networks(args, device)
        networks.load_state_dict(state["networks"])
        for greedy in (False, True):
            metrics, _ = i2a.evaluate(replace(args, greedy=greedy), networks, self.levels, device)
            low, high = wilson(metrics["eval/solved"], len(self.levels))
            last = state["rows"][-1]
            row = {
                "agent": self.args.name, "piece": self.piece, "frames": self.step,
                "minutes": last["charts/minutes"], "actions": "greedy" if greedy else "sampled",
                "solved": metrics["eval/solved"], "low": low, "high": high,
                "training": last.get("charts/solved", ""), "SPS": self.speeds[-1],
                "minibatch": args.num_envs * args.num_steps // args.num_minibatches,
            }  # fmt: skip
            self.rows.append(show(row))
        write_rows(self.rows, str(self.table))

    def run(self, piece: str, flags: str, deadline: float) -> None:
        """Train until --total-timesteps, or until the deadline."""
        self.piece, self.deadline, self.speeds = piece, deadline, []
        print(f"{time.time() - self.start:.0f} s: {piece} {flags}", flush=True)
        with contextlib.suppress(TimeIsUp):
            i2a.main(i2a.parse_args(flags.split()))

    def export(self) -> None:
        """The agent for a CPU, its weights as float16 but for the environment model's."""
        state = i2a.load_checkpoint(str(self.path), "cpu")
        args = replace(i2a.Args(**state["args"]), env_model_path=None, cuda_graph=False)
        half = {k: x if k.startswith("env_model.") else x.half() for k, x in state["networks"].items()}
        agent = {"args": asdict(args), "networks": half, "global_step": state["global_step"]}
        self.save_checkpoint(pathlib.Path(self.args.output) / f"{self.args.name}.pt", agent)

    def keep(self, name: str) -> pathlib.Path:
        """A copy of the last checkpoint, which the next piece would overwrite."""
        return pathlib.Path(shutil.copy(self.path, self.path.with_name(name)))


def falling(rate: float, step: int, total: int) -> str:
    """Flags for a rate that falls from `rate` at `step` to 0 at `total`."""
    line = f"--anneal-lr --anneal-from {min(step / total, 0.999999):.6f} --learning-rate {rate}"
    return f"{line} --ent-coef 0.005 --total-timesteps {total}"


def main(args: Args) -> None:
    sokoban_env.load_levels = functools.cache(sokoban_env.load_levels)  # each piece reads them again
    if args.contest and args.seconds is None:
        sys.exit("--contest needs --seconds")
    trainer = Trainer(args)
    task = f"{TASK} {ON_GPU if torch.cuda.is_available() else ON_CPU} --exp-name flagship-{args.name} {args.flags}"
    if "--resume" in args.flags:  # the checkpoint brings the others
        task = args.flags
    if args.seconds is None:
        trainer.run("one run", task, math.inf)
        if trainer.step:
            trainer.export()
        return
    task += " --no-anneal-lr"
    end, last = trainer.start + args.seconds, trainer.start + 0.75 * args.seconds
    if args.contest:
        trainer.run("contest", f"{task} --total-timesteps 1000000000", end)
        return
    trainer.run("constant", f"{task} --total-timesteps {args.first}", end)
    start, step = trainer.keep("first.pt"), trainer.step
    trainer.run("branch", f"--resume {start} {falling(3e-4, step, step + args.branch)}", end)
    trainer.keep("branch.pt")
    if time.time() < last:
        trainer.next = trainer.after(step)
        trainer.run("constant", f"--resume {start} --total-timesteps {args.large_from}", last)
    if time.time() < last:
        flags = f"--resume {trainer.path} --num-minibatches 8 --total-timesteps 1000000000"
        trainer.run("large", flags, last)
    # Nine tenths of what the time allows: a piece takes time to start, and should be over
    total = trainer.step + max(1, int(0.9 * statistics.median(trainer.speeds) * (end - time.time())))
    trainer.run("falling", f"--resume {trainer.keep('constant.pt')} {falling(5e-4, trainer.step, total)}", end)
    trainer.export()


if __name__ == "__main__":
    main(tyro.cli(Args))
