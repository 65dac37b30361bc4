"""How fast the Sokoban environment steps and makes levels on one thread, beside its peers.

    OMP_NUM_THREADS=1 python benchmark/env_speed.py
    OMP_NUM_THREADS=1 python benchmark/env_speed.py --peer-pythons PATH/bin/python OTHER_PATH/bin/python

Stepping is by random actions, handed in as tensors, on a fixed pool of 10x10 levels with 4 boxes, if not said
otherwise. The step counters start at random, so that episodes end (and new ones begin) spread out, as in a long run. A
rate is measured `--repeats` times for `--seconds` each. Seconds are of the processor, so that a busy machine doesn't
count. A peer python is an interpreter in whose environment gym-sokoban or Jumanji is installed.
"""

import json
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from common import ROOT, hardware, rates, show, write_rows

import sokoban_env

LIMIT = 120  # steps of an episode


@dataclass
class Args:
    peer_pythons: tuple[str, ...] = ()  # interpreters in which gym-sokoban or Jumanji may be installed
    seconds: float = 0.4  # how long one measurement takes
    repeats: int = 5  # measurements of each rate
    output: str = "env_speed.csv"  # file under benchmark/results/


def stepping(num_envs: int, ends: bool = True, **kwargs: Any) -> Callable[[], int]:
    """A function that does some work, and returns how much that was."""
    envs = sokoban_env.SokobanVectorEnv(num_envs, max_episode_steps=LIMIT if ends else None, **kwargs)
    envs.reset(seed=1)
    rng = torch.Generator().manual_seed(1)
    envs.set_state(envs.get_state(pool=False) | {"steps": torch.randint(LIMIT, (num_envs,), generator=rng)})
    actions = torch.randint(5, (64, num_envs), generator=rng)

    def work() -> int:
        for action in actions:
            envs.step(action)
        return actions.numel()

    return work


def single_stepping(levels: torch.Tensor) -> Callable[[], int]:
    env = gym.make("Sokoban-v0", levels=levels, max_episode_steps=LIMIT)
    env.reset(seed=1)
    actions = np.random.default_rng(1).integers(5, size=256).tolist()

    def work() -> int:
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        return len(actions)

    return work


def generating(num: int, size: int, num_boxes: int) -> Callable[[], int]:
    seeds = iter(range(1, 10**9))
    return lambda: len(sokoban_env.generate_levels(num, seed=next(seeds), size=size, num_boxes=num_boxes)[0])


def cases(levels: torch.Tensor) -> Iterator[tuple[str, int | str, Callable[[], int]]]:
    """What is measured, in how many environments, and the work."""
    for num_envs in (1, 64, 1024, 4096):
        yield "step, cells", num_envs, stepping(num_envs, levels=levels)
    for num_envs in (64, 1024, 4096):
        yield "step, cells, no episode ends", num_envs, stepping(num_envs, ends=False, levels=levels)
    yield "step, cells, endless levels", 64, stepping(64)
    for num_envs in (1, 1024):
        yield "step, rgb", num_envs, stepping(num_envs, levels=levels, observation="rgb")
    yield "step, rgb, copy=False", 1024, stepping(1024, levels=levels, observation="rgb", copy=False)
    yield "step, tiny_rgb", 1024, stepping(1024, levels=levels, observation="tiny_rgb")
    yield "step, cells, gymnasium.make", 1, single_stepping(levels)
    yield "generate 10x10, 4 boxes", "", generating(200, 10, 4)
    yield "generate 7x7, 2 boxes", "", generating(2000, 7, 2)


def our_rows(levels: torch.Tensor, args: Args) -> Iterator[dict[str, Any]]:
    for what, envs, work in cases(levels):
        yield {"package": "ours", "what": what, "envs": envs} | rates(work, args.seconds, args.repeats)


def peer_rows(levels: torch.Tensor, args: Args) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "levels.npy"
        np.save(path, levels.numpy())
        for python in args.peer_pythons:
            program = str(ROOT / "benchmark" / "env_speed_peer.py")
            command = [python, program, str(path), str(args.seconds), str(args.repeats)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
            yield from (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))


def main(args: Args) -> None:
    torch.set_num_threads(1)
    levels, _ = sokoban_env.generate_levels(1000, seed=1)
    rows, ours = [], {}
    for source in (our_rows(levels, args), peer_rows(levels, args)):
        for row in source:
            case = row["what"], row["envs"]
            ours.setdefault(case, row["best"])
            row["unit"] = "levels/s" if "generate" in row["what"] else "steps/s"
            row["ours / this"] = f"{ours[case] / row['best']:.3g}" if row["best"] else ""
            rows.append(show(row) | {"hardware": hardware()})
    write_rows(rows, args.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
