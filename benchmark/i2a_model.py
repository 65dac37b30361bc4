"""How exact i2a.py's learned environment model is, on held-out levels: benchmark/results/i2a_model.csv.

    OMP_NUM_THREADS=1 python benchmark/i2a_model.py

For each task, number of transitions and seed a model is pretrained as i2a.py does it, then tested on transitions of
levels of another seed: random play from fresh levels, and random play from points along their solutions, where boxes
already stand on targets. Columns: the share of next boards that are right in every cell, of those with reward and end
(`all_right`), and of rollouts of five random actions that the simulator plays alike.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import torch
import tyro
from common import show, write_rows
from torch import Tensor

import i2a
from sokoban_env import SokobanVectorEnv, generate_levels

TASKS = {
    "7x7-1": {"size": 7, "num_boxes": 1}, "7x7-2": {"size": 7, "num_boxes": 2}, "10x10-4": {"size": 10, "num_boxes": 4},
}  # fmt: skip


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


def test_sets(settings: dict[str, int], num: int) -> dict[str, dict[str, Tensor]]:
    rng = np.random.default_rng(5)
    sets = {"random": random_play(SokobanVectorEnv(64, **settings), 77_777, num, rng)}
    along = along_solutions(*generate_levels(1024, **settings, seed=77_778), rng, most=60)
    envs = SokobanVectorEnv(64, size=settings["size"], levels=along, max_episode_steps=8)
    return sets | {"along solutions": random_play(envs, 77_779, num, rng)}


def main(
    seeds: tuple[int, ...] = (11, 12, 13),
    test_frames: int = 40_000,
    model_frames: tuple[int, ...] = (5_000, 20_000),  # transitions to learn from
    model_steps: int = 3000,
) -> None:
    i2a.keep_freed_memory()
    rows: list[dict] = []
    silent = SimpleNamespace(log=lambda *_: None)
    for (task, settings), frames, seed in itertools.product(TASKS.items(), model_frames, seeds):
        budget = {"model_frames": frames, "model_steps": model_steps}
        args = i2a.Args(seed=seed, imagination_depth=5, **budget, **settings)
        i2a.seed_everything(seed, True)
        rng = torch.Generator().manual_seed(seed)
        networks = {"env_model": i2a.EnvModel(args), "rollout_policy": i2a.RandomPolicy()}
        i2a.pretrain_model(networks["env_model"], args, None, rng, silent)
        for name, data in test_sets(settings, test_frames).items():
            starts = data["frames"][torch.randperm(len(data["frames"]), generator=rng)[:2000]]
            rollouts = i2a.rollout_accuracy(args, networks, starts, seed)
            metrics = i2a.model_metrics(networks["env_model"], data)
            row = {"task": task} | budget | {"states": name, "seed": seed}
            row["exact_board_accuracy"] = round(metrics["model/exact_board_accuracy"], 5)
            row["all_right"] = round(metrics["model/all_right"], 5)
            row["exact_board_accuracy_depth_5"] = round(rollouts["model/exact_rollouts"], 5)
            rows.append(show(row))
    write_rows(rows, "i2a_model.csv")


if __name__ == "__main__":
    tyro.cli(main)
