"""What trained agents can do beside their task: other numbers of boxes, Monte-Carlo search; how far from a win they
find it, what they live on; pictures; and chance.

python benchmark/i2a_evaluate.py boxes agent.pt other_agent.pt
python benchmark/i2a_evaluate.py search agent.pt --env-models own perfect other --model-paths poor_agent.pt
python benchmark/i2a_evaluate.py lesions agent.pt
python benchmark/i2a_evaluate.py near agent.pt other_agent.pt
python benchmark/i2a_evaluate.py picture agent.pt --output docs/i2a_imagined.png
python benchmark/i2a_evaluate.py film checkpoints/i2a_7x7.pt --output docs/i2a_film.gif
"""

import functools
import itertools
import json
import os
import pathlib
import sys
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import matplotlib
import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont  # comes with matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from i2a_model import write_rows

import i2a
from sokoban_env import SokobanVectorEnv, convert_observation

CPU = torch.device("cpu")
ACTIONS = ("no-op", "up", "down", "left", "right")


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


def variant_of(args: i2a.Args) -> dict[str, object]:
    """What tells an agent apart in the tables."""
    variant = args.agent if args.agent == "model-free" or args.env_model == "learned" else args.env_model
    for differs, name in (
        (args.agent == "i2a" and args.imagination_depth != 3, f"depth-{args.imagination_depth}"),
        (args.agent == "i2a" and args.model_width != 16, f"width-{args.model_width}"),
        (args.agent == "i2a" and not args.reward_prediction, "no-reward"),
        (args.width_multiplier != 1, f"width x {args.width_multiplier:g}"),
        (args.bf16, "bf16"),
        (args.gae_lambda == 1, "nstep"),
    ):
        variant += f" {name}" if differs else ""
    task = f"{args.size}x{args.size}-{args.num_boxes}"
    return {"task": task, "variant": variant, "seed": args.seed}


def frames_of(path: str) -> dict[str, object]:
    """How long an agent was trained."""
    return {"frames": i2a.load_checkpoint(path, CPU)["global_step"]}


@dataclass
class Lesions:
    """What is left of trained agents without one of their parts: benchmark/results/i2a_lesions.csv."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional]
    """agent.pt or checkpoint.pt of each i2a agent"""
    episodes: int = 1000
    """held-out levels"""


def silence(module: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
    """Let the module's output be nothing: negative before a ReLU is 0 after it."""
    return module.register_forward_hook(lambda _module, _inputs, output: torch.full_like(output, -1.0))


def lesions(flags: Lesions) -> None:
    rows: list[dict[str, object]] = []
    for path in flags.paths:
        if "rollout_policy" not in load(path)[1]:
            sys.exit(f"{path} is no i2a agent with a rollout policy: nothing to take out")
    for path in flags.paths:
        rows += lesions_of(path, flags.episodes)
    write_rows(rows, "i2a_lesions.csv")


def lesions_of(path: str, episodes: int) -> list[dict[str, object]]:
    args, networks = load(path, eval_episodes=episodes)
    agent, env_model, rollout_policy = networks["agent"], networks["env_model"], networks["rollout_policy"]
    who = variant_of(args) | frames_of(path)
    rows = []

    def measure(name: str, **changes: object) -> None:
        metrics, _ = i2a.evaluate(replace(args, **changes), networks, i2a.held_out_levels(args), CPU)
        rows.append(who | {"lesion": name, "levels": episodes} | metrics)
        print(f"{path}, {name}: {metrics['eval/solved']:.3f}", flush=True)

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
    return rows


@dataclass
class Boxes:
    """Levels with 1 to `most` boxes: the paper's generalisation table, benchmark/results/i2a_boxes.csv."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional]
    """agent.pt or checkpoint.pt of each agent"""
    most: int = 7
    """most boxes (no more than the generator makes at this size)"""
    episodes: int = 500
    """levels of each"""


def boxes(flags: Boxes) -> None:
    rows = []
    for path in flags.paths:
        args, networks = load(path, eval_episodes=flags.episodes)
        for num_boxes in range(1, min(flags.most, args.size // 2) + 1):
            levels = i2a.held_out_levels(replace(args, num_boxes=num_boxes))
            metrics, _ = i2a.evaluate(args, networks, levels, CPU)
            rows.append(variant_of(args) | frames_of(path) | {"boxes": num_boxes, "levels": flags.episodes} | metrics)
            print(json.dumps(rows[-1]), flush=True)
    write_rows(rows, "i2a_boxes.csv")


@dataclass
class Near:
    """How far from a win agents find it: boards k moves before the end of a held-out level's generated solution (so at
    most k moves from the win), with 2 k steps to play. With chance beside them: benchmark/results/i2a_near.csv."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional]
    """agent.pt or checkpoint.pt of each agent"""
    moves: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 12)
    """k"""
    episodes: int = 1000
    """held-out levels; those whose solution is shorter than the largest k are left out"""


def near(flags: Near) -> None:
    rows = []

    def measure(args: i2a.Args, networks: torch.nn.ModuleDict, who: dict[str, object]) -> None:
        settings = {"size": args.size, "num_boxes": args.num_boxes, "seed": i2a.EVAL_SEED}
        levels, solutions = i2a.generate_levels(flags.episodes, **settings)
        boards, _ = i2a.play_solutions(levels, solutions)
        long = [i for i, solution in enumerate(solutions) if len(solution) >= max(flags.moves)]
        for k in flags.moves:
            starts = torch.stack([boards[len(solutions[i]) - k, i] for i in long])
            metrics, _ = i2a.evaluate(replace(args, max_episode_steps=2 * k), networks, starts, CPU)
            rows.append(who | {"moves": k, "levels": len(long)} | metrics)
        shares = " ".join(f"{row['moves']}:{row['eval/solved']:.3f}" for row in rows[-len(flags.moves) :])
        print(who, shares, flush=True)

    tasks = {}
    for path in flags.paths:
        args, networks = load(path)
        measure(args, networks, variant_of(args) | frames_of(path))
        tasks[args.size, args.num_boxes] = replace(args, agent="model-free")
    for args in tasks.values():
        networks = i2a.make_networks(args, CPU)
        torch.nn.init.zeros_(networks["agent"].actor.weight)
        measure(args, networks, variant_of(args) | {"variant": "random", "seed": "", "frames": 0})
    write_rows(rows, "i2a_near.csv")


@dataclass
class Search:
    """The paper's Monte-Carlo search: roll out each action with π̂ in a model, and take the best mean of discounted
    rewards and the agent's value of the last frame (for which it imagines once more, in its own model):
    benchmark/results/i2a_search.csv, with each agent's own play beside it."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional]
    """agent.pt or checkpoint.pt of each I2A"""
    env_models: tuple[Literal["own", "perfect", "copy", "other"], ...] = ("own", "perfect")
    """own: the agent's; perfect: the simulator; other: that of --model-paths"""
    model_paths: tuple[str, ...] = ()
    """for each agent, the agent.pt or checkpoint.pt of another I2A in whose model to search, for instance a poor one"""
    rollouts: int = 10
    """rollouts of each action"""
    depth: int = 5
    """steps of each"""
    episodes: int = 100
    """held-out levels"""


@torch.no_grad()
def search_with(path: str, env_model: str, other: str | None, flags: Search) -> dict[str, object]:
    """A row of the table: the agent of `path`, searching in `env_model`; `other` is the file of an other one."""
    args, networks = load(path, eval_episodes=flags.episodes)
    agent, rollout_policy = networks["agent"], getattr(networks, "rollout_policy", None)
    model = networks["env_model"]
    if env_model == "other":
        model = load(other)[1]["env_model"]
    elif env_model != "own":
        kind = args.observation
        model = i2a.PerfectModel(kind, args.size) if env_model == "perfect" else i2a.CopyModel(kind, 1, 1)
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
    settings = {"search_model": env_model, "rollouts": flags.rollouts, "depth": flags.depth, "levels": flags.episodes}
    return (
        variant_of(args) | frames_of(path) | settings | {"imagined_steps_per_solved": imagined_steps / solved} | metrics
    )


def search(flags: Search) -> None:
    if len(flags.model_paths) != len(flags.paths) * ("other" in flags.env_models):
        sys.exit(
            "--env-models other goes with --model-paths: for each agent, the file of the I2A in whose model to search"
        )
    rows = []
    for path, other in itertools.zip_longest(flags.paths, flags.model_paths):  # equally many, or none of the latter
        args, networks = load(path, eval_episodes=flags.episodes)
        metrics, _ = i2a.evaluate(args, networks, i2a.held_out_levels(args), CPU)
        settings = {"search_model": "none: the agent itself", "rollouts": 0, "depth": 0, "levels": flags.episodes}
        row = variant_of(args) | frames_of(path) | settings
        rows.append(row | {"imagined_steps_per_solved": metrics.pop("eval/imagined_steps_per_solved", "")} | metrics)
        rows += [search_with(path, env_model, other, flags) for env_model in flags.env_models]
        for row in rows[-1 - len(flags.env_models) :]:
            print(json.dumps(row), flush=True)
    write_rows(rows, "i2a_search.csv")


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
            axes[2 * a + row, 0].set_ylabel(f"{ACTIONS[a]}\n{'imagined' if row == 0 else 'happened'}", fontsize=8)
    figure.tight_layout(pad=0.3)
    figure.savefig(flags.output, dpi=90)
    exact = np.mean([torch.equal(x, y) for x, y in zip(ours, true, strict=True)])
    print(f"{flags.output}: {exact:.2f} of the steps are exact in every rollout")


@dataclass
class Film:
    """A GIF: an agent solves a held-out level, and beside the board stands what it imagines before each step.

    The level is the first held-out one that it solves in `fewest` to `most` steps.
    """

    path: Annotated[str, tyro.conf.Positional]
    """agent.pt or checkpoint.pt of an I2A"""
    output: pathlib.Path = pathlib.Path("docs/i2a_film.gif")
    """the film's file"""
    seed: int = 1
    """of the agent's actions and of those that it imagines"""
    fewest: int = 8
    """steps that the solution takes at least"""
    most: int = 16
    """and at most"""


@torch.no_grad()
def play_level(args: i2a.Args, networks: torch.nn.ModuleDict, level: torch.Tensor, seed: int) -> list[dict]:
    """A scene for each step: the board, what was imagined from it, the policy, the action; empty if it isn't solved."""
    rng = torch.Generator().manual_seed(seed)
    dream = i2a.imagination(args, networks, rng)
    settings = {"observation": args.observation, "frame_stack": args.frame_stack}
    envs = SokobanVectorEnv(1, size=args.size, levels=level[None], max_episode_steps=args.max_episode_steps, **settings)
    observation, _ = envs.reset(options={"levels": level[None]})
    scenes = []
    for step in range(1, args.max_episode_steps + 1):
        frames = observation if args.frame_stack > 1 else observation[:, None]
        imagined, rewards, alive = dream(frames)
        logits, _ = networks["agent"](frames, (imagined, rewards, alive))
        action = i2a.sample(logits, torch.empty_like(logits).exponential_(generator=rng))
        scene = {"board": frames[0, -1].clone(), "imagined": imagined, "rewards": rewards, "alive": alive}
        scenes.append(scene | {"policy": logits.softmax(-1)[0], "action": int(action), "title": f"step {step}"})
        observation, _, terminated, truncated, info = envs.step(action)
        if terminated[0]:
            last = info["final_obs"][0] if args.frame_stack == 1 else info["final_obs"][0, -1]
            return [*scenes, scenes[-1] | {"board": last, "title": f"solved in {step} steps"}]
        if truncated[0]:
            break
    return []


def draw_scene(scene: dict, kind: str, tile: int = 112, large: int = 336) -> Image.Image:
    """The board on the left; on the right a row for each action and a column for each imagined step."""
    depth, gap, left, top = len(scene["rewards"]), 8, large + 96, 50
    picture = Image.new("RGB", (left + depth * (tile + gap) + gap, top + i2a.A * (tile + gap)), "white")
    draw = ImageDraw.Draw(picture)
    font = functools.cache(ImageFont.load_default)

    def board(frame: torch.Tensor, x: int, y: int, width: int) -> None:
        pixels = convert_observation(frame, kind, "rgb").numpy()
        picture.paste(Image.fromarray(pixels).resize((width, width * pixels.shape[0] // pixels.shape[1]), 0), (x, y))

    down = (picture.height - large) // 2
    board(scene["board"], gap, down, large)
    draw.text((gap, down - 34), scene["title"], "black", font(22))
    when = "imagined before the last step" if scene["title"].startswith("solved") else "imagines from here"
    draw.text((left, 4), f"what it {when}, by first action", "black", font(15))
    for d in range(depth):
        draw.text((left + d * (tile + gap) + tile // 2, 36), f"{d + 1}", "black", font(15), anchor="mm")
    for a, name in enumerate(ACTIONS):
        y, chosen = top + a * (tile + gap), a == scene["action"]
        ink = "black" if chosen else "gray"
        draw.text((left - 12, y + tile // 2 - 10), name, ink, font(18), anchor="rm")
        draw.text((left - 12, y + tile // 2 + 12), f"{float(scene['policy'][a]):.0%}", ink, font(15), anchor="rm")
        for d in range(depth):
            x = left + d * (tile + gap)
            if not scene["alive"][d, a]:  # behind the end that it foresees
                draw.rectangle((x, y, x + tile - 1, y + tile - 1), "gainsboro")
                continue
            board(scene["imagined"][d, a], x, y, tile)
            paid = float(scene["rewards"][d, a])
            if abs(paid + 0.1) > 0.01:  # more than the price of a step
                colour = "green" if paid > 0 else "firebrick"
                draw.rectangle((x, y, x + 50, y + 20), colour)
                draw.text((x + 25, y + 10), f"{paid:+.1f}", "white", font(16), anchor="mm")
        if chosen:
            draw.rectangle((left - 80, y - 4, left + depth * (tile + gap) - 5, y + tile + 3), outline="orange", width=4)
    return picture


def film(flags: Film) -> None:
    args, networks = load(flags.path, eval_episodes=200)
    if args.agent != "i2a":
        sys.exit(f"{flags.path} is a model-free agent: it imagines nothing")
    games = (play_level(args, networks, level, flags.seed) for level in i2a.held_out_levels(args))
    found = ((i, game) for i, game in enumerate(games) if flags.fewest <= len(game) - 1 <= flags.most)
    number, scenes = next(found, (0, []))
    if not scenes:
        sys.exit(f"{flags.path} solves none of {args.eval_episodes} levels in {flags.fewest} to {flags.most} steps")
    pictures = [draw_scene(scene, args.observation).quantize(64) for scene in scenes]
    temporary = flags.output.with_name(flags.output.name + ".tmp")
    times = [500] * (len(pictures) - 1) + [3000]
    pictures[0].save(temporary, format="GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0)
    os.replace(temporary, flags.output)
    print(f"{flags.output}: held-out level {number}, solved in {len(scenes) - 1} steps")


if __name__ == "__main__":
    commands = {
        "random": (Random, random_play), "lesions": (Lesions, lesions), "boxes": (Boxes, boxes), "near": (Near, near),
        "search": (Search, search), "picture": (Picture, picture), "film": (Film, film),
    }  # fmt: skip
    command = tyro.extras.subcommand_cli_from_dict({name: flags for name, (flags, _) in commands.items()})
    dict(commands.values())[type(command)](command)
