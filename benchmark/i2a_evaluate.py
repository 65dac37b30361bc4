"""What a trained agent can do beside its task: other numbers of boxes, Monte-Carlo search, a picture; and chance.

python benchmark/i2a_evaluate.py boxes agent.pt
python benchmark/i2a_evaluate.py search agent.pt --env-model perfect
python benchmark/i2a_evaluate.py lesions agent.pt
python benchmark/i2a_evaluate.py picture agent.pt --output docs/i2a_imagined.png
"""

import json
import pathlib
import sys
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import matplotlib
import numpy as np
import torch
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from i2a_model import write_rows

import i2a
from sokoban_env import SokobanVectorEnv, convert_observation

CPU = torch.device("cpu")


def load(path: str, **changes: object) -> tuple[i2a.Args, torch.nn.ModuleDict]:
    """The flags of an agent's file, with changes, and its networks."""
    state = i2a.load_checkpoint(path, CPU)
    args = replace(i2a.Args(**state["args"]), **changes)
    networks = i2a.make_networks(args, CPU)
    i2a.load_networks(networks, state, path)
    return args, networks


@dataclass
class Random:
    """What random play solves, or how hard tasks are: benchmark/results/i2a_random.csv."""

    tasks: tuple[str, ...] = ("7x7-1", "7x7-2", "8x8-2", "10x10-4")
    """sizes and numbers of boxes"""
    max_episode_steps: int = 60
    """steps of an episode"""
    episodes: int = 5000
    """held-out levels of each"""


def random_play(flags: Random) -> None:
    rows = []
    for task in flags.tasks:
        settings = {"size": int(task.split("x")[0]), "num_boxes": int(task.split("-")[1])}
        settings |= {"max_episode_steps": flags.max_episode_steps, "eval_episodes": flags.episodes}
        args = i2a.Args(agent="model-free", **settings)
        networks = i2a.make_networks(args, CPU)
        torch.nn.init.zeros_(networks["agent"].actor.weight)
        rows.append(settings | i2a.evaluate(args, networks, i2a.held_out_levels(args), CPU)[0])
        print(json.dumps(rows[-1]), flush=True)
    write_rows(rows, "i2a_random.csv")


@dataclass
class Lesions:
    """What is left of a trained agent without one of its parts: benchmark/results/i2a_lesions.csv."""

    path: Annotated[str, tyro.conf.Positional]
    """agent.pt or checkpoint.pt of an i2a agent"""
    episodes: int = 1000
    """held-out levels"""


def silence(module: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
    """Let the module's output be nothing: negative before a ReLU is 0 after it."""
    return module.register_forward_hook(lambda _module, _inputs, output: torch.full_like(output, -1.0))


def lesions(flags: Lesions) -> None:
    args, networks = load(flags.path, eval_episodes=flags.episodes)
    agent, env_model, rollout_policy = networks["agent"], networks["env_model"], networks["rollout_policy"]
    rows = []

    def measure(name: str, **changes: object) -> None:
        metrics, _ = i2a.evaluate(replace(args, **changes), networks, i2a.held_out_levels(args), CPU)
        rows.append({"agent": flags.path, "lesion": name, "levels": flags.episodes} | metrics)
        print(f"{name}: {metrics['eval/solved']:.3f}", flush=True)

    measure("none")
    for depth in (1, 2, 5):
        measure(f"imagines {depth} steps, not {args.imagination_depth}", imagination_depth=depth)
    measure("no imagined rewards", reward_prediction=False)
    networks["env_model"] = i2a.CopyModel(args.observation, args.frame_stack, args.model_width)
    measure("imagines that nothing moves or pays")
    networks["env_model"] = env_model
    networks["rollout_policy"] = torch.nn.Sequential(rollout_policy, torch.nn.Threshold(torch.inf, 0.0))  # logits 0
    measure("rollouts act at random")
    networks["rollout_policy"] = rollout_policy
    handle = silence(agent.dense)
    measure("no model-free path")
    handle.remove()
    agent.encoder.register_forward_hook(lambda _module, _inputs, output: torch.zeros_like(output))
    measure("no embeddings")
    write_rows(rows, "i2a_lesions.csv")


@dataclass
class Boxes:
    """Levels with 1 to `most` boxes: the paper's generalisation table."""

    path: Annotated[str, tyro.conf.Positional]
    """agent.pt or checkpoint.pt"""
    most: int = 7
    """most boxes (no more than the generator makes at this size)"""
    episodes: int = 500
    """levels of each"""


def boxes(flags: Boxes) -> None:
    args, networks = load(flags.path, eval_episodes=flags.episodes)
    for num_boxes in range(1, min(flags.most, args.size // 2) + 1):
        levels = i2a.held_out_levels(replace(args, num_boxes=num_boxes))
        metrics, _ = i2a.evaluate(args, networks, levels, CPU)
        print(json.dumps({"boxes": num_boxes} | metrics), flush=True)


@dataclass
class Search:
    """The paper's Monte-Carlo search: roll out each action with π̂ in a model, and take the best mean of discounted
    rewards and the agent's value of the last frame (for which it imagines once more, in its own model)."""

    path: Annotated[str, tyro.conf.Positional]
    """agent.pt or checkpoint.pt of an I2A"""
    env_model: Literal["own", "perfect", "copy"] = "own"
    """own: the agent's; perfect: the simulator"""
    rollouts: int = 10
    """rollouts of each action"""
    depth: int = 5
    """steps of each"""
    episodes: int = 100
    """held-out levels"""


@torch.no_grad()
def search(flags: Search) -> None:
    args, networks = load(flags.path, eval_episodes=flags.episodes)
    agent, rollout_policy = networks["agent"], getattr(networks, "rollout_policy", None)
    model = networks["env_model"]
    if flags.env_model != "own":
        kind = args.observation
        model = i2a.PerfectModel(kind, args.size) if flags.env_model == "perfect" else i2a.CopyModel(kind, 1, 1)
    rng = torch.Generator().manual_seed(args.seed)
    dream = i2a.imagination(args, networks, rng)
    discounts = args.gamma ** torch.arange(flags.depth)[:, None, None, None]
    imagined_steps = 0

    def plan(frames: torch.Tensor) -> torch.Tensor:
        """The best action (B,) of frames (B, F, H, W)."""
        nonlocal imagined_steps
        many = frames.repeat_interleave(flags.rollouts, 0)  # (B * N, F, H, W)
        noise = torch.empty(flags.depth, len(many) * i2a.A, i2a.A).exponential_(generator=rng)
        imagined, rewards, alive = i2a.imagine(model, rollout_policy, many, noise)
        imagined_steps += flags.depth * len(many) * i2a.A
        history = [many.repeat_interleave(i2a.A, 0), *imagined[:, :, None]]
        last = torch.cat(history, 1)[:, -args.frame_stack :]
        values = agent(last, dream(last))[1]
        imagined_steps += len(last) * i2a.A * args.imagination_depth
        shape = (len(frames), flags.rollouts, i2a.A)
        returns = (discounts * (rewards * args.reward_scale).view(-1, *shape)).sum(0)
        alive_at_end = alive[-1].view(shape) * (rewards[-1].view(shape) < 10)
        return (returns + args.gamma**flags.depth * alive_at_end * values.view(shape)).mean(1).argmax(1)

    class Planner(torch.nn.Module):
        def forward(self, frames: torch.Tensor, _: object) -> tuple[torch.Tensor, torch.Tensor]:
            best = torch.cat([plan(part) for part in frames.split(64)])
            return 1e6 * torch.nn.functional.one_hot(best, i2a.A).float(), torch.zeros(len(best))

    searching = torch.nn.ModuleDict({"agent": Planner()})
    metrics, _ = i2a.evaluate(replace(args, agent="model-free"), searching, i2a.held_out_levels(args), CPU)
    solved = max(1, round(metrics["eval/solved"] * flags.episodes))
    print(json.dumps({"env_model": flags.env_model, "imagined_steps_per_solved": imagined_steps / solved} | metrics))


@dataclass
class Picture:
    """What the agent imagined beside what then happened: a row an action, a column a step, errors framed in red."""

    path: Annotated[str, tyro.conf.Positional]
    """agent.pt or checkpoint.pt of an I2A"""
    output: pathlib.Path = pathlib.Path("docs/i2a_imagined.png")
    """the picture's file"""
    seed: int = 1
    """of the level and of the steps"""
    depth: int = 5
    """imagined steps"""


@torch.no_grad()
def picture(flags: Picture) -> None:
    args, networks = load(flags.path)
    rng = torch.Generator().manual_seed(flags.seed)
    envs = SokobanVectorEnv(1, size=args.size, num_boxes=args.num_boxes, observation=args.observation)
    frames = envs.reset(seed=flags.seed)[0][:, None].repeat_interleave(args.frame_stack, 1)
    noise = torch.empty(flags.depth, i2a.A, i2a.A).exponential_(generator=rng)
    rollout_policy = getattr(networks, "rollout_policy", None)
    models = (networks["env_model"], i2a.PerfectModel(args.observation, args.size))
    (ours, rewards, _), (true, true_rewards, alive) = (i2a.imagine(m, rollout_policy, frames, noise) for m in models)
    figure, axes = plt.subplots(2 * i2a.A, flags.depth + 1, figsize=(1.3 * flags.depth + 1.5, 2.6 * i2a.A))
    names = ("no-op", "up", "down", "left", "right")
    for a in range(i2a.A):
        for row, (boards, paid) in enumerate(((ours, rewards), (true, true_rewards))):
            pictures = [frames[0, -1], *boards[:, a]]
            for d, axis in enumerate(axes[2 * a + row]):
                axis.imshow(convert_observation(pictures[d], args.observation, "rgb").numpy())
                axis.set(xticks=[], yticks=[])
                if d:
                    axis.set_title(f"{float(paid[d - 1, a]):+.1f}" if alive[d - 1, a] else "over", fontsize=7)
                wrong = d > 0 and bool(alive[d - 1, a]) and not torch.equal(ours[d - 1, a], true[d - 1, a])
                plt.setp(axis.spines.values(), color="red" if wrong else "black", linewidth=3 if wrong else 0.5)
            axes[2 * a + row, 0].set_ylabel(f"{names[a]}\n{'imagined' if row == 0 else 'happened'}", fontsize=8)
    figure.tight_layout(pad=0.3)
    figure.savefig(flags.output, dpi=90)
    exact = np.mean([torch.equal(x, y) for x, y in zip(ours, true, strict=True)])
    print(f"{flags.output}: {exact:.2f} of the steps are exact in every rollout")


if __name__ == "__main__":
    command = tyro.extras.subcommand_cli_from_dict({
        "random": Random, "lesions": Lesions, "boxes": Boxes, "search": Search, "picture": Picture,
    })  # fmt: skip
    {Random: random_play, Lesions: lesions, Boxes: boxes, Search: search, Picture: picture}[type(command)](command)
