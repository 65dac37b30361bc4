"""How exact the learned environment model is, on held-out levels: benchmark/results/i2a_model.csv.

    OMP_NUM_THREADS=1 python benchmark/i2a_model.py

For each size, number of boxes and budget a model is pretrained as i2a.py does it, then tested on transitions of levels
of another seed: random play from fresh levels, and random play from points along the solutions, where boxes already
stand on targets. With --agent-paths also on the states that these trained agents visit, each on boards of its own size.
"""

import csv
import itertools
import os
import pathlib
import sys
import time
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import torch
import tyro

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import i2a  # noqa: E402
from sokoban_env import SokobanVectorEnv, generate_levels  # noqa: E402

CPU = torch.device("cpu")


@dataclass
class Args:
    tasks: tuple[str, ...] = ("7x7-1", "8x8-2", "10x10-4")
    """sizes and numbers of boxes"""
    seeds: tuple[int, ...] = (11, 12, 13)
    """seeds of data and training"""
    test_frames: int = 40_000
    """transitions of each test set, half as many of an agent's own"""
    model_frames: tuple[int, ...] = (20_000, 40_000)
    """transitions that a model learns from"""
    model_steps: tuple[int, ...] = (3000, 6000)
    """for each of these numbers, the most optimiser steps of the training"""
    agent_paths: tuple[str, ...] = ()
    """agent.pt files whose own states are tested too, one of each size"""


def transitions(envs: SokobanVectorEnv, observation: torch.Tensor, num: int, act: object) -> dict[str, torch.Tensor]:
    """`num` transitions of `act`, with the true next boards."""
    parts = []
    while len(parts) * envs.num_envs < num:
        action = act(observation[:, None])
        following, reward, end, _, info = envs.step(action)
        true = following.clone()
        if "final_obs" in info:
            true[info["_final_obs"]] = info["final_obs"]
        parts.append((observation[:, None], true, action, reward, end))
        observation = following
    names = ("frames", "next", "action", "reward", "end")
    return dict(zip(names, map(torch.cat, zip(*parts, strict=True)), strict=True))


def test_sets(size: int, boxes: int, num: int, agent_paths: tuple[str, ...]) -> dict[str, dict[str, torch.Tensor]]:
    rng, generator = np.random.default_rng(5), torch.Generator().manual_seed(5)
    settings = {"size": size, "num_boxes": boxes}

    def random_play(frames: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(rng.integers(i2a.A, size=len(frames)))

    envs = SokobanVectorEnv(64, **settings)
    sets = {"random": transitions(envs, envs.reset(seed=77_777)[0], num, random_play)}
    levels, solutions = generate_levels(1024, **settings, seed=77_778)
    along = i2a.near_rewards(levels, solutions, rng, most=60)
    envs = SokobanVectorEnv(64, size=size, levels=along, max_episode_steps=8)
    sets["along solutions"] = transitions(envs, envs.reset(seed=77_779)[0], num, random_play)
    for state in (i2a.load_checkpoint(path, CPU) for path in agent_paths):
        if state["args"]["size"] != size:
            continue
        if "the agent's own" in sets:
            sys.exit(f"--agent-paths has two agents of size {size}: give one")
        args = i2a.Args(**state["args"])
        networks = i2a.make_networks(args, CPU)
        networks.load_state_dict(state["networks"])
        dream = i2a.imagination(args, networks, generator)

        @torch.no_grad()
        def play(frames: torch.Tensor, agent: i2a.I2AAgent = networks["agent"], dream: object = dream) -> torch.Tensor:
            logits, _ = agent(frames, dream(frames) if dream else None)
            return i2a.sample(logits, torch.empty_like(logits).exponential_(generator=generator))

        envs = SokobanVectorEnv(64, **settings, max_episode_steps=args.max_episode_steps)
        sets["the agent's own"] = transitions(envs, envs.reset(seed=77_780)[0], num // 2, play)
    return sets


def write_rows(rows: list[dict], name: str) -> list[str]:
    """The rows as benchmark/results/`name`; returns the columns."""
    target = ROOT / "benchmark" / "results" / name
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with target.with_suffix(".tmp").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(target.with_suffix(".tmp"), target)
    return columns


def main(args: Args) -> None:
    rows = []
    if len(args.model_frames) != len(args.model_steps):
        sys.exit("--model-frames and --model-steps must be as many")
    for task in args.tasks:
        size, boxes = int(task.split("x")[0]), int(task.split("-")[1])
        sets = test_sets(size, boxes, args.test_frames, args.agent_paths)
        budgets = zip(args.model_frames, args.model_steps, strict=True)
        for (frames, steps), seed in itertools.product(budgets, args.seeds):
            settings = {"size": size, "num_boxes": boxes, "seed": seed, "model_steps": steps}
            settings = replace(i2a.Args(), **settings, imagination_depth=5)
            i2a.seed_everything(seed, True)
            rng, start = torch.Generator().manual_seed(seed), time.time()
            networks = torch.nn.ModuleDict({"env_model": i2a.EnvModel("cells", 1, settings.model_width)})
            with mock.patch.object(i2a, "Logger") as logger:
                data = i2a.collect_transitions(settings, None, frames - frames // 10, seed, CPU)
                held_out = i2a.collect_transitions(settings, None, frames // 10, i2a.EVAL_SEED // 2 + seed, CPU)
                i2a.pretrain_model(networks["env_model"], data, held_out, settings, rng, logger, [])
            seconds = time.time() - start
            for name, data in sets.items():
                metrics = i2a.model_metrics(networks["env_model"], data)
                starts = data["frames"][torch.randperm(len(data["frames"]), generator=rng)[:2000]]
                metrics |= i2a.depth_metrics(settings, networks, starts, seed)
                row = {
                    "task": task,
                    "model_frames": frames,
                    "model_steps": steps,
                    "states": name,
                    "seed": seed,
                }
                rows.append(row | {"seconds": round(seconds, 1)} | {k[6:]: round(v, 5) for k, v in metrics.items()})
                print(rows[-1], flush=True)
    columns = write_rows(rows, "i2a_model.csv")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.values())[:4], []).append(row)
    for group, chosen in groups.items():
        means = {k: np.mean([row[k] for row in chosen]) for k in columns[6:] if all(k in row for row in chosen)}
        print(*group, ", ".join(f"{k} {v:.4f}" for k, v in means.items()))


if __name__ == "__main__":
    main(tyro.cli(Args))
