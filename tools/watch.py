"""Watch an agent of i2a.py play in the terminal: what it would do, how sure it is, and what it expects.

    python tools/watch.py checkpoints/i2a_7x7_2boxes.pt
    python tools/watch.py checkpoints/i2a_10x10_4boxes.pt --levels levels.txt --delay 0.5

Without --levels it plays held-out levels of its own size. A levels path is a Boxoban or XSB file, or a folder of them.
Beside each board stand the actions with their probabilities and, of an I2A, the rewards that its model imagines after
each; `*` marks the action that is taken. Ctrl-C ends it.
"""

import os
import pathlib
import sys
import time
from dataclasses import dataclass, replace

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import i2a
from sokoban_env import cells_to_text, convert_observation

ACTIONS = ("no-op", "up", "down", "left", "right")
CPU = torch.device("cpu")


@dataclass
class Args:
    path: tyro.conf.Positional[str]  # agent.pt or checkpoint.pt of i2a.py
    levels: str | None = None  # play this Boxoban or XSB file, or folder
    first: int = 0  # the level to begin with
    most: int = 10  # how many levels are played
    delay: float = 0.4  # seconds between steps
    greedy: bool = False  # take the likeliest action instead of a sampled one
    seed: int = 1  # of sampled and imagined actions


def describe(args: i2a.Args, logits: Tensor, value: Tensor, imagined: tuple[Tensor, ...], action: int) -> list[str]:
    """A line for each action and one for the value, from logits (A,) and imagined rollouts (A, D, ...)."""
    lines = []
    for a, probability in enumerate(logits.softmax(-1).tolist()):
        mark = "*" if a == action else " "
        line = f"{mark} {ACTIONS[a]:5} {probability:4.0%} {'#' * round(20 * probability):20}"
        if imagined:
            _, rewards, alive = imagined
            paid = " ".join(f"{reward:+.1f}" for reward, on in zip(rewards[a], alive[a], strict=True) if on)
            line += f"  imagines {paid}{' and the end' if not alive[a].all() else ''}"
        lines.append(line)
    expected = value.item() / args.reward_scale
    return [*lines, f"  expects {expected:+.1f} from here, discounted by {args.gamma} a step"]


def side_by_side(board: list[str], lines: list[str]) -> str:
    height, width = max(len(board), len(lines)), max(map(len, board))
    left = board + [""] * (height - len(board))
    right = lines + [""] * (height - len(lines))
    return "\n".join(f"{a:{width}}   {b}".rstrip() for a, b in zip(left, right, strict=True))


@torch.no_grad()
def play(args: i2a.Args, networks: torch.nn.ModuleDict, level: Tensor, flags: Args) -> bool:
    """Play a level (H, W), a picture a step; returns whether it was solved."""
    rng = torch.Generator().manual_seed(flags.seed)
    envs = i2a.make_envs(args, 1, level[None], CPU)
    observation, _ = envs.reset(options={"levels": level[None]})
    for step in range(1, args.max_episode_steps + 1):
        frames = i2a.as_frames(observation, args.frame_stack)
        imagined = i2a.imagine(networks, frames, args.imagination_depth, rng, args.greedy_rollouts)
        logits, value = networks["agent"](frames, imagined)
        action = logits.argmax(-1) if flags.greedy else i2a.sample(logits, rng)
        board = cells_to_text(convert_observation(frames[0, -1], args.observation, "cells")).splitlines()
        lines = describe(args, logits[0], value[0], tuple(x[0] for x in imagined), int(action))
        print(f"step {step}\n{side_by_side(board, lines)}\n", flush=True)
        time.sleep(flags.delay)
        observation, _, terminated, truncated, _ = envs.step(action)
        if terminated[0] or truncated[0]:
            break
    return bool(terminated[0])


def main(flags: Args) -> None:
    args = replace(i2a.saved_args(flags.path), eval_levels=flags.levels, eval_episodes=flags.first + flags.most)
    networks = i2a.make_networks(args, CPU)
    i2a.load_networks(networks, flags.path)
    levels = i2a.held_out_levels(args)[flags.first :]
    if not len(levels):
        sys.exit(f"--first {flags.first}: {flags.levels} has fewer levels")
    solved = 0
    for number, level in enumerate(levels, start=flags.first):
        print(f"level {number}")
        won = play(args, networks, level, flags)
        solved += won
        print(f"level {number}: {'solved' if won else 'not solved'}; {solved} of {number + 1 - flags.first} so far\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except KeyboardInterrupt:
        sys.exit("stopped")
    except BrokenPipeError:  # what it was piped into reads no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
