"""How fast i2a.py trains on one thread, what part of the machine's peak that is, and where the time goes.

    OMP_NUM_THREADS=1 python benchmark/i2a_throughput.py

Calls `rollout` and `update` as the script's loop does, with an untrained model (the same work), and times what they
call. Seconds are the processor's: on one thread those of the clock, if nothing else runs. `cost`: seconds a frame over
those of the model-free agent with the same flags. The peak is a 1024 x 1024 float32 matrix product in the same process;
the arithmetic of a frame is counted by torch. Writes benchmark/results/i2a_throughput.csv.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
import tyro
from common import ROOT, write_rows
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT))
import i2a

TEN = "--size 10 --num-boxes 4 --max-episode-steps 120"
CASES = {  # by the name of their model-free baseline, which comes first
    "7x7-2": {"model-free": "--agent model-free", "depth 3": "", "depth 8": "--imagination-depth 8"},
    "10x10-4": {
        "model-free": f"{TEN} --agent model-free",
        "depth 1": f"{TEN} --imagination-depth 1",
        "depth 3": TEN,
        "depth 5": f"{TEN} --imagination-depth 5",
        "depth 8": f"{TEN} --imagination-depth 8",
    },
    "7x7-2, paper-small": {
        "model-free": "--preset paper-small --agent model-free",
        "depth 3": "--preset paper-small",
    },
}


@dataclass
class Args:
    tasks: tuple[str, ...] = tuple(CASES)  # which of the cases
    frames: int = 16_384  # frames of each case


class Clock:
    """Seconds spent in functions, each without those that it calls, if they are timed too."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner = [0.0]  # of each function under way, the seconds of the timed functions that it called

    def timed(self, function: Callable, name: str, in_update: str = "") -> Callable:
        """The function, timed as `name`, or as `in_update` where gradients are on."""

        def call(*args: object, **kwargs: object) -> object:
            part = in_update if in_update and torch.is_grad_enabled() else name
            self.inner.append(0.0)
            start = time.process_time()
            result = function(*args, **kwargs)
            took = time.process_time() - start
            self.seconds[part] += took - self.inner.pop()
            self.inner[-1] += took
            return result

        return call


def peak() -> float:
    """Floating-point operations a second of a large matrix product, the fastest of ten."""
    a, b = torch.randn(2, 1024, 1024)
    times = []
    for _ in range(10):
        start = time.process_time()
        a @ b
        times.append(time.process_time() - start)
    return 2 * 1024**3 / min(times)


def measure(flags: str, frames_in_all: int) -> dict[str, float]:
    """Of one case: frames a second, operations a frame, and the share of the time of each part."""
    args = i2a.parse_args(flags.split())
    device, rng, clock = torch.device("cpu"), torch.Generator().manual_seed(1), Clock()
    networks, envs = i2a.make_networks(args, device), i2a.make_envs(args, args.num_envs, None, device)
    networks["agent"].forward = clock.timed(networks["agent"].forward, "acting networks", "update, forward")
    envs.step = clock.timed(envs.step, "environment")
    if args.agent == "i2a":
        model, policy = networks["env_model"], networks["rollout_policy"]
        model.predict = clock.timed(model.predict, "environment model")
        policy.forward = clock.timed(policy.forward, "rollout policy", "update, forward")
    optimizer = i2a.make_optimizer(args, networks)
    optimizer.step = clock.timed(optimizer.step, "optimiser")
    frames = i2a.as_frames(envs.reset(seed=1)[0], args.frame_stack)
    size = args.num_steps * args.num_envs

    def iteration() -> None:
        nonlocal frames
        batch, _, frames, _ = i2a.rollout(args, networks, envs, frames, rng)
        for step in range(args.update_epochs):
            for index in torch.randperm(size, generator=rng).tensor_split(args.num_minibatches):
                i2a.update(args, networks, optimizer, [x[index] for x in batch], step % 8 if args.symmetry else 0)

    with (
        mock.patch.object(i2a, "imagine", clock.timed(i2a.imagine, "other imagination")),
        mock.patch.object(torch.Tensor, "backward", clock.timed(torch.Tensor.backward, "update, backward")),
        mock.patch.object(i2a, "rollout", clock.timed(i2a.rollout, "other acting")),
        mock.patch.object(i2a, "update", clock.timed(i2a.update, "update, the rest")),
    ):
        with FlopCounterMode(display=False) as counter:  # warm-up
            iteration()
        clock.seconds.clear()
        times = []
        for _ in range(max(2, frames_in_all // size)):
            start = time.process_time()
            iteration()
            times.append(time.process_time() - start)
    result = {"frames_per_second": size / float(np.median(times)), "flop_per_frame": counter.get_total_flops() / size}
    return result | {f"share: {name}": seconds / sum(times) for name, seconds in clock.seconds.items()}


def main(args: Args) -> None:
    torch.set_num_threads(1)
    i2a.keep_freed_memory()
    rows = []
    for task in args.tasks:
        baseline = 0.0
        for name, flags in CASES[task].items():
            maximum, result = peak(), measure(flags, args.frames)
            speed, flop = result.pop("frames_per_second"), result.pop("flop_per_frame")
            baseline = baseline or speed
            row = {"task": task, "agent": name, "frames_per_second": round(speed), "cost": round(baseline / speed, 2)}
            row |= {"mflop_per_frame": round(flop / 1e6, 2), "peak_gflops": round(maximum / 1e9, 1)}
            row["share_of_peak"] = round(speed * flop / maximum, 3)
            rows.append(row | {part: round(share, 3) for part, share in result.items()})
            print(rows[-1], flush=True)
    write_rows(rows, "i2a_throughput.csv")


if __name__ == "__main__":
    main(tyro.cli(Args))
