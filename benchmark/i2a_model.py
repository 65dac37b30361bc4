"""How exact i2a.py's learned environment model is, on held-out levels: benchmark/results/i2a_model.csv.

    OMP_NUM_THREADS=1 python benchmark/i2a_model.py

For each task and seed a model is pretrained as i2a.py does it, then tested on transitions of levels of another seed:
random play from fresh levels, and random play from points along their solutions, where boxes already stand on targets.
Columns: the share of next boards that are right in every cell, of those with reward and end (`all_right`), and of
rollouts of five random actions that the simulator plays alike.
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch
import tyro
from common import show, write_rows
from torch import Tensor

import i2a
from sokoban_env import SokobanVectorEnv, generate_levels

CPU = torch.device("cpu")


@dataclass
class Args:
    tasks: tuple[str, ...] = ("7x7-1", "10x10-4")  # sizes and numbers of boxes
    seeds: tuple[int, ...] = (11,)  # seeds of data and training
    test_frames: int = 40_000  # transitions of each test set
    model_frames: int = 20_000  # transitions that a model learns from
    model_steps: int = 3000  # steps of the training


def load_agent(path: str, **changes: object) -> tuple[i2a.Args, torch.nn.ModuleDict]:
    """The flags of an agent's file, with changes, and its networks."""
    args = replace(i2a.saved_args(path), **changes)
    networks = i2a.make_networks(args, CPU)
    i2a.load_networks(networks, path)
    return args, networks


def task_settings(task: str) -> dict[str, int]:
    """The flags of a task's name, such as 7x7-1."""
    size, boxes = task.split("-")
    return {"size": int(size.split("x")[0]), "num_boxes": int(boxes)}


def along_solutions(levels: Tensor, solutions: list[str], rng: np.random.Generator, most: int) -> Tensor:
    """Of each level, the board (L, H, W) 1 to `most` moves before a box reaches its target: the last box in every other
    level, any box in the rest."""
    actions = torch.zeros(max(map(len, solutions)), len(levels), dtype=torch.int64)  # 0: no-op
    for i, solution in enumerate(solutions):
        actions[: len(solution), i] = torch.tensor(["udlr".index(move) + 1 for move in solution.lower()])
    env = SokobanVectorEnv(len(levels), size=tuple(levels.shape[1:]), levels=levels, max_episode_steps=None)
    boards, rewards = [env.reset(options={"levels": levels})[0]], []
    for action in actions:
        board, reward, *_ = env.step(action)  # another level follows a solved one
        boards.append(board)
        rewards.append(reward)
    back = rng.integers(1, most + 1, len(levels))
    starts = []
    for i, solution in enumerate(solutions):
        arrivals = [t + 1 for t in range(len(solution)) if rewards[t][i] > 0]
        arrival = arrivals[-1 if i % 2 else rng.integers(len(arrivals))]
        starts.append(boards[max(0, arrival - back[i])][i])
    return torch.stack(starts)


def random_play(envs: SokobanVectorEnv, seed: int, num: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """`num` transitions, with the true next boards."""
    frames, _ = envs.reset(seed=seed)
    parts = []
    for _ in range(num // envs.num_envs):
        action = torch.from_numpy(rng.integers(i2a.A, size=len(frames)))
        observation, reward, end, _, info = envs.step(action)
        true_next = info.get("final_obs", observation)
        parts.append({"frames": frames[:, None], "next": true_next, "action": action, "reward": reward, "end": end})
        frames = observation
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_sets(task: str, num: int) -> dict[str, dict[str, Tensor]]:
    rng, settings = np.random.default_rng(5), task_settings(task)
    sets = {"random": random_play(SokobanVectorEnv(64, **settings), 77_777, num, rng)}
    along = along_solutions(*generate_levels(1024, **settings, seed=77_778), rng, most=60)
    envs = SokobanVectorEnv(64, size=settings["size"], levels=along, max_episode_steps=8)
    return sets | {"along solutions": random_play(envs, 77_779, num, rng)}


def main(args: Args) -> None:
    rows: list[dict] = []
    silent = SimpleNamespace(log=lambda *_: None)
    for task in args.tasks:
        sets = test_sets(task, args.test_frames)
        budget = {"model_frames": args.model_frames, "model_steps": args.model_steps}
        for seed in args.seeds:
            settings = i2a.Args(seed=seed, imagination_depth=5, **budget, **task_settings(task))
            i2a.seed_everything(seed, True)
            rng = torch.Generator().manual_seed(seed)
            env_model = i2a.EnvModel(settings)
            i2a.pretrain_model(env_model, settings, None, rng, silent)
            for name, data in sets.items():
                starts = data["frames"][torch.randperm(len(data["frames"]), generator=rng)[:2000]]
                networks = {"env_model": env_model, "rollout_policy": i2a.RandomPolicy()}
                rollouts = i2a.rollout_accuracy(settings, networks, starts, seed)
                metrics = i2a.model_metrics(env_model, data)
                row = {"task": task} | budget | {"states": name, "seed": seed}
                row["exact_board_accuracy"] = round(metrics["model/exact_board_accuracy"], 5)
                row["all_right"] = round(metrics["model/all_right"], 5)
                row["exact_board_accuracy_depth_5"] = round(rollouts["model/exact_rollouts"], 5)
                rows.append(show(row))
    write_rows(rows, "i2a_model.csv")


if __name__ == "__main__":
    i2a.keep_freed_memory()
    main(tyro.cli(Args))
