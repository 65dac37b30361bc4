"""How exact i2a.py's learned environment model is, on held-out levels: benchmark/results/i2a_model.csv.

    OMP_NUM_THREADS=1 python benchmark/i2a_model.py --agent-paths runs/NAME/agent.pt

For each task and budget a model is pretrained as i2a.py does it, then tested on transitions of levels of another seed:
random play from fresh levels, and random play from points along their solutions, where boxes already stand on targets.
With --agent-paths also on the states that these trained agents visit, each on boards of its own size.
"""

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch
import tyro
from common import ROOT, half_interval, write_rows
from torch import Tensor

sys.path.insert(0, str(ROOT))
import i2a
import sokoban_env
from sokoban_env import SokobanVectorEnv, convert_observation, generate_levels

CPU = torch.device("cpu")


@dataclass
class Args:
    tasks: tuple[str, ...] = ("7x7-1", "8x8-2", "10x10-4")  # sizes and numbers of boxes
    seeds: tuple[int, ...] = (11, 12, 13)  # seeds of data and training
    test_frames: int = 40_000  # transitions of each test set, half as many of an agent's own
    model_frames: tuple[int, ...] = (20_000, 40_000)  # transitions that a model learns from
    model_steps: tuple[int, ...] = (3000, 6000)  # for each of these numbers, the steps of the training
    agent_paths: tuple[str, ...] = ()  # agents whose own states are tested too, one of each size


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


def play_solutions(levels: Tensor, solutions: list[str]) -> tuple[Tensor, Tensor]:
    """Boards (S + 1, L, H, W) and rewards (S, L) while the levels' solutions are played; another level follows each."""
    actions = torch.zeros(max(map(len, solutions)), len(levels), dtype=torch.int64)  # 0: no-op
    for i, solution in enumerate(solutions):
        actions[: len(solution), i] = torch.tensor(["udlr".index(move) + 1 for move in solution.lower()])
    env = SokobanVectorEnv(len(levels), size=tuple(levels.shape[1:]), levels=levels, max_episode_steps=None)
    boards, rewards = [env.reset(options={"levels": levels})[0]], []
    for action in actions:
        board, reward, *_ = env.step(action)
        boards.append(board)
        rewards.append(reward)
    return torch.stack(boards), torch.stack(rewards)


def along_solutions(levels: Tensor, solutions: list[str], rng: np.random.Generator, most: int) -> Tensor:
    """Of each level, the board (L, H, W) 1 to `most` moves before a box reaches its target: the last box in every other
    level, any box in the rest."""
    back = rng.integers(1, most + 1, len(levels))
    boards, rewards = play_solutions(levels, solutions)
    cut = []
    for i, solution in enumerate(solutions):
        arrivals = np.flatnonzero(rewards[: len(solution), i] > 0) + 1
        cut.append(arrivals[-1 if i % 2 else rng.integers(len(arrivals))])
    return boards[np.maximum(0, cut - back), np.arange(len(levels))]


def transitions(envs: SokobanVectorEnv, stack: int, seed: int, num: int, act: Callable) -> dict[str, Tensor]:
    """`num` transitions of `act`, with the true next boards."""
    observation, _ = envs.reset(seed=seed)
    parts = []
    for _ in range(num // envs.num_envs):
        frames = i2a.as_frames(observation, stack)
        action = act(frames)
        observation, reward, end, _, info = envs.step(action)
        true_next = i2a.as_frames(info.get("final_obs", observation), stack)[:, -1]
        parts.append({"frames": frames, "next": true_next, "action": action, "reward": reward, "end": end})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_sets(task: str, num: int, agent_paths: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    rng, generator = np.random.default_rng(5), torch.Generator().manual_seed(5)
    settings = task_settings(task)

    def random_play(frames: Tensor) -> Tensor:
        return torch.from_numpy(rng.integers(i2a.A, size=len(frames)))

    sets = {"random": transitions(SokobanVectorEnv(64, **settings), 1, 77_777, num, random_play)}
    along = along_solutions(*generate_levels(1024, **settings, seed=77_778), rng, most=60)
    envs = SokobanVectorEnv(64, size=settings["size"], levels=along, max_episode_steps=8)
    sets["along solutions"] = transitions(envs, 1, 77_779, num, random_play)
    for path in agent_paths:
        args, networks = load_agent(path)
        if args.size != settings["size"]:
            continue
        if "the agent's own" in sets:
            sys.exit(f"--agent-paths has two agents of size {args.size}: give one")

        @torch.no_grad()
        def play(frames: Tensor, args: i2a.Args = args, networks: torch.nn.ModuleDict = networks) -> Tensor:
            logits, _ = networks["agent"](frames, i2a.imagine(networks, frames, args.imagination_depth, generator))
            return i2a.sample(logits, generator)

        envs = i2a.make_envs(replace(args, **settings), 64, None, CPU)
        data = transitions(envs, args.frame_stack, 77_780, num // 2, play)
        for name in ("frames", "next"):
            data[name] = convert_observation(data[name], args.observation, "cells")
        sets["the agent's own"] = data | {"frames": data["frames"][:, -1:]}
    return sets


@torch.no_grad()
def kinds_metrics(env_model: torch.nn.Module, data: dict[str, Tensor]) -> dict[str, float]:
    """How often the model is right: whole boards (all, pushes, blocked pushes), rewards of each value, ends."""
    parts = []
    for frames, action in zip(data["frames"].split(1024), data["action"].split(1024), strict=True):
        parts.append(env_model.predict(frames, action))
    frame, reward, end = map(torch.cat, zip(*parts, strict=True))
    exact = (frame == data["next"]).flatten(1).all(1)
    reward = (reward - data["reward"]).abs() < 0.01
    end = end == data["end"]
    board, width = data["frames"][:, -1].flatten(1), data["next"].shape[-1]
    step = torch.tensor([0, -width, width, -1, 1])
    ahead = (board >= sokoban_env.PLAYER).byte().argmax(1) + step[data["action"]]
    ahead = board.gather(1, ahead[:, None])[:, 0]
    at_box = (ahead == sokoban_env.BOX) | (ahead == sokoban_env.BOX_ON_TARGET)
    moved = (data["frames"][:, -1] != data["next"]).flatten(1).any(1)
    everything = torch.ones_like(moved)
    masks = {
        "exact_board_accuracy": (exact, everything),
        "exact_board_accuracy_pushes": (exact, at_box & moved),
        "exact_board_accuracy_blocked_pushes": (exact, at_box & ~moved),
        "termination_recall": (end, data["end"]),
        "all_right": (exact & reward & end, everything),
    }
    for value in i2a.REWARDS:
        masks[f"reward_recall_{value:+.1f}"] = (reward, (data["reward"] - value).abs() < 0.01)
    return {name: right[mask].float().mean().item() for name, (right, mask) in masks.items() if mask.any()}


@torch.no_grad()
def depth_metrics(args: i2a.Args, env_model: torch.nn.Module, frames: Tensor, seed: int) -> dict[str, float]:
    """The share of rollouts of random actions that are imagined exactly as the simulator plays them, to each depth."""
    both = []
    for model in (env_model, i2a.PerfectModel(args)):
        networks = {"env_model": model, "rollout_policy": i2a.RandomPolicy()}
        both.append(i2a.imagine(networks, frames, args.imagination_depth, torch.Generator().manual_seed(seed)))
    (ours, _, _), (true, _, alive) = both
    right = (ours == true).flatten(3).all(3) | (alive == 0)  # (B, A, D); nothing counts after the true end
    shares = right.float().cumprod(2).mean((0, 1)).tolist()
    return {f"exact_board_accuracy_depth_{d}": share for d, share in enumerate(shares, start=1)}


def main(args: Args) -> None:
    rows: list[dict] = []
    if len(args.model_frames) != len(args.model_steps):
        sys.exit("--model-frames and --model-steps must be as many")
    silent = SimpleNamespace(log=lambda *_: None)
    for task in args.tasks:
        sets = test_sets(task, args.test_frames, args.agent_paths)
        budgets = zip(args.model_frames, args.model_steps, strict=True)
        for (frames, steps), seed in itertools.product(budgets, args.seeds):
            settings = replace(i2a.Args(), **task_settings(task), seed=seed, model_frames=frames, model_steps=steps)
            settings = replace(settings, imagination_depth=5)
            i2a.seed_everything(seed, True)
            rng, start = torch.Generator().manual_seed(seed), time.time()
            env_model = i2a.EnvModel(settings)
            i2a.pretrain_model(env_model, settings, None, rng, silent)
            budget = {"task": task, "model_frames": frames, "model_steps": steps}
            seconds = round(time.time() - start, 1)
            for name, data in sets.items():
                metrics = kinds_metrics(env_model, data)
                starts = data["frames"][torch.randperm(len(data["frames"]), generator=rng)[:2000]]
                metrics |= depth_metrics(settings, env_model, starts, seed)
                row = budget | {"states": name, "seed": seed, "seconds": seconds}
                rows.append(row | {k: round(v, 5) for k, v in metrics.items()})
                print(rows[-1], flush=True)
    write_rows(rows, "i2a_model.csv")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.values())[:4], []).append(row)
    for group, chosen in groups.items():
        print(*group)
        for name in list(chosen[0])[6:]:
            values = [row[name] for row in chosen if name in row]
            print(f"  {name} {np.mean(values):.4f} +- {half_interval(values):.4f}")


if __name__ == "__main__":
    i2a.keep_freed_memory()
    main(tyro.cli(Args))
