"""What trained I2A agents can do beside their task. A sub-command each, and its table under benchmark/results:

    python benchmark/i2a_evaluate.py levels runs/NAME/agent.pt --levels boxoban-levels/unfiltered/valid --plays 5
    python benchmark/i2a_evaluate.py random
    python benchmark/i2a_evaluate.py boxes runs/NAME/agent.pt
    python benchmark/i2a_evaluate.py search runs/NAME/agent.pt --env-models own perfect
    python benchmark/i2a_evaluate.py lesions runs/NAME/agent.pt
    python benchmark/i2a_evaluate.py picture runs/NAME/agent.pt
    python benchmark/i2a_evaluate.py film runs/NAME/agent.pt

Shares solved have their 95 % interval (Wilson's) beside them.
"""

import functools
import itertools
import pathlib
import sys
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import matplotlib
import torch
import tyro
from common import ROOT, wilson, write_rows
from PIL import Image, ImageDraw, ImageFont  # comes with matplotlib
from torch import Tensor, nn

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(ROOT))
from i2a_model import CPU, load_agent, task_settings

import i2a
from sokoban_env import convert_observation

ACTIONS = ("no-op", "up", "down", "left", "right")
TELLING = ("view", "imagination_depth", "model_width", "reward_prediction", "rollout_policy", "gae_lambda", "bf16")
Paths = Annotated[tuple[str, ...], tyro.conf.Positional]
Row = dict[str, object]


def about(path: str, args: i2a.Args) -> Row:
    """What tells an agent apart in the tables, and how long it was trained."""
    variant = args.env_model if args.agent == "i2a" and args.env_model != "learned" else args.agent
    for name in TELLING:
        if getattr(args, name) != getattr(i2a.Args(), name):
            variant += f" {name}={getattr(args, name)}"
    frames = i2a.load_checkpoint(path, CPU)["global_step"]
    return {
        "task": f"{args.size}x{args.size}-{args.num_boxes}",
        "variant": variant,
        "seed": args.seed,
        "frames": frames,
    }


def share(solved: float, number: int) -> Row:
    """A share of levels with its interval, as columns."""
    low, high = wilson(solved, number)
    return {"levels": number, "eval/solved": solved, "eval/solved_low": low, "eval/solved_high": high}


def evaluated(args: i2a.Args, networks: nn.ModuleDict, levels: Tensor) -> Row:
    metrics, _ = i2a.evaluate(args, networks, levels, CPU)
    return share(metrics["eval/solved"], len(levels)) | metrics


def shown(row: Row) -> Row:
    print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    return row


def random_player(args: i2a.Args) -> tuple[i2a.Args, nn.ModuleDict]:
    """An agent that takes every action alike."""
    args = replace(args, agent="model-free")
    networks = i2a.make_networks(args, CPU)
    nn.init.zeros_(networks["agent"].actor.weight)
    return args, networks


@dataclass
class Levels:
    """Agents on the levels of Boxoban files: sampled actions, more than once if asked, and greedy ones."""

    paths: Paths  # agent.pt or checkpoint.pt of each agent
    levels: str  # a Boxoban file or folder
    most_levels: int = 1000  # the first so many are played
    plays: int = 1  # sampled plays of each level until it is solved
    max_episode_steps: int | None = None  # steps of a play; None: the agent's own


def levels_command(flags: Levels) -> None:
    rows = []
    for path in flags.paths:
        args, networks = load_agent(path)
        args = replace(args, max_episode_steps=flags.max_episode_steps or args.max_episode_steps)
        boards = i2a.read_levels(flags.levels, args.size)[: flags.most_levels]
        who = about(path, args) | {"file": flags.levels, "steps": args.max_episode_steps}
        greedy = i2a.evaluate(replace(args, greedy=True, seed=1), networks, boards, CPU)[0]["eval/solved"]
        rows.append(shown(who | {"actions": "greedy", "plays": 1} | share(greedy, len(boards))))
        solved = torch.zeros(len(boards), dtype=torch.bool)
        for play in range(1, flags.plays + 1):
            left = (~solved).nonzero()[:, 0]
            if len(left):
                playing = replace(args, greedy=False, seed=play)
                solved[left] = i2a.evaluate(playing, networks, boards[left], CPU)[1]
            row = who | {"actions": "sampled", "plays": play}
            rows.append(shown(row | share(solved.float().mean().item(), len(boards))))
    write_rows(rows, "i2a_levels.csv")


@dataclass
class Random:
    """What random play solves, or how hard tasks are."""

    tasks: tuple[str, ...] = ("7x7-1", "7x7-2", "8x8-2", "10x10-4")  # sizes and numbers of boxes
    max_episode_steps: int = 60  # steps of an episode
    episodes: int = 5000  # held-out levels of each


def random_command(flags: Random) -> None:
    rows = []
    for task in flags.tasks:
        settings = task_settings(task) | {"max_episode_steps": flags.max_episode_steps, "eval_episodes": flags.episodes}
        args, networks = random_player(i2a.Args(**settings))
        settings.pop("eval_episodes")
        rows.append(shown(settings | evaluated(args, networks, i2a.held_out_levels(args))))
    write_rows(rows, "i2a_random.csv")


@dataclass
class Lesions:
    """What is left of trained I2A agents without one of their parts."""

    paths: Paths  # agent.pt or checkpoint.pt of each I2A
    episodes: int = 1000  # held-out levels


def lesions_of(path: str, episodes: int) -> list[Row]:
    args, networks = load_agent(path, eval_episodes=episodes)
    agent, env_model, rollout_policy = networks["agent"], networks["env_model"], networks["rollout_policy"]
    who, boards, rows = about(path, args), i2a.held_out_levels(args), []

    def measure(name: str, **changes: object) -> None:
        rows.append(shown(who | {"lesion": name} | evaluated(replace(args, **changes), networks, boards)))

    measure("none")
    for depth in (1, 2, 5, 8):
        if depth != args.imagination_depth:
            measure(f"imagines {depth} steps, not {args.imagination_depth}", imagination_depth=depth)
    agent.encoder.reads_rewards = False
    measure("no imagined rewards and ends")
    agent.encoder.reads_rewards = args.reward_prediction
    networks["env_model"] = i2a.CopyModel(args)
    measure("imagines that nothing moves or pays")
    networks["env_model"] = env_model
    networks["rollout_policy"] = i2a.RandomPolicy()
    measure("rollouts act at random")
    networks["rollout_policy"] = rollout_policy
    # Negative before a ReLU is 0 after it
    hook = agent.features.dense.register_forward_hook(lambda _module, _inputs, x: torch.full_like(x, -1.0))
    measure("no model-free path")
    hook.remove()
    agent.encoder.register_forward_hook(lambda _module, _inputs, x: torch.zeros_like(x))
    measure("no embeddings")
    return rows


def lesions_command(flags: Lesions) -> None:
    for path in flags.paths:
        if i2a.saved_args(path).agent != "i2a":
            sys.exit(f"{path} is a model-free agent: nothing to take out")
    write_rows([row for path in flags.paths for row in lesions_of(path, flags.episodes)], "i2a_lesions.csv")


@dataclass
class Boxes:
    """Levels with 1 to `most` boxes: the paper's generalisation table."""

    paths: Paths  # agent.pt or checkpoint.pt of each agent
    most: int = 7  # most boxes (no more than the generator makes at this size)
    episodes: int = 500  # levels of each


def boxes_command(flags: Boxes) -> None:
    rows = []
    for path in flags.paths:
        args, networks = load_agent(path, eval_episodes=flags.episodes)
        who = about(path, args)
        for num_boxes in range(1, min(flags.most, args.size // 2) + 1):
            boards = i2a.held_out_levels(replace(args, num_boxes=num_boxes))
            rows.append(shown(who | {"boxes": num_boxes} | evaluated(args, networks, boards)))
    write_rows(rows, "i2a_boxes.csv")


@dataclass
class Search:
    """The paper's Monte-Carlo search: roll out each action with π̂ in a model, and take the best mean of discounted
    rewards and the agent's value of the last frame (for which it imagines once more, in its own model). With each
    agent's own play beside it."""

    paths: Paths  # agent.pt or checkpoint.pt of each I2A
    env_models: tuple[Literal["own", "perfect", "copy", "other"], ...] = ("own", "perfect")  # other: of --model-paths
    model_paths: tuple[str, ...] = ()  # for each agent, the file of the I2A in whose model to search
    rollouts: int = 10  # rollouts of each action
    depth: int = 5  # steps of each
    episodes: int = 100  # held-out levels


class Planner(nn.Module):
    """An agent that searches in `env_model`."""

    def __init__(self, args: i2a.Args, networks: nn.ModuleDict, env_model: nn.Module, flags: Search) -> None:
        super().__init__()
        self.args, self.networks, self.flags = args, networks, flags
        self.searched = {"env_model": env_model, "rollout_policy": networks["rollout_policy"]}
        self.rng = torch.Generator().manual_seed(args.seed)
        self.imagined_steps = 0

    def plan(self, frames: Tensor) -> Tensor:
        """The best action (B,) of frames (B, F, H, W)."""
        args, depth = self.args, self.flags.depth
        many = frames.repeat_interleave(self.flags.rollouts, 0)  # (B * N, F, H, W)
        imagined, rewards, alive = i2a.imagine(self.searched, many, depth, self.rng)
        last = torch.cat([many.repeat_interleave(i2a.A, 0), imagined.flatten(0, 1)], 1)[:, -args.frame_stack :]
        values = self.networks["agent"](last, i2a.imagine(self.networks, last, args.imagination_depth, self.rng))[1]
        self.imagined_steps += len(last) * (depth + i2a.A * args.imagination_depth)
        discounts = args.gamma ** torch.arange(depth)
        alive_at_end = alive[..., -1] * (rewards[..., -1] < 10)  # (B * N, A)
        returns = (discounts * rewards * args.reward_scale).sum(-1)
        returns = returns + args.gamma**depth * alive_at_end * values.view(-1, i2a.A)
        return returns.unflatten(0, (len(frames), -1)).mean(1).argmax(1)

    def forward(self, frames: Tensor, _: object) -> tuple[Tensor, Tensor]:
        best = torch.cat([self.plan(part) for part in frames.split(64)])
        return 1e6 * nn.functional.one_hot(best, i2a.A).float(), torch.zeros(len(best))


def search_command(flags: Search) -> None:
    if len(flags.model_paths) != len(flags.paths) * ("other" in flags.env_models):
        sys.exit("--env-models other goes with --model-paths: for each agent, the I2A in whose model to search")
    rows = []
    for path, other in itertools.zip_longest(flags.paths, flags.model_paths):  # equally many, or none of the latter
        args, networks = load_agent(path, eval_episodes=flags.episodes)
        who, boards = about(path, args), i2a.held_out_levels(args)
        row = {"search_model": "none: the agent itself", "rollouts": 0, "depth": 0}
        rows.append(shown(who | row | evaluated(args, networks, boards)))
        models = {"own": networks["env_model"], "perfect": i2a.PerfectModel(args), "copy": i2a.CopyModel(args)}
        if other:
            models["other"] = load_agent(other)[1]["env_model"]
        for name in flags.env_models:
            planner = Planner(args, networks, models[name], flags)
            result = evaluated(replace(args, agent="model-free"), nn.ModuleDict({"agent": planner}), boards)
            solved = max(1, round(result["eval/solved"] * len(boards)))
            result["eval/imagined_steps_per_solved"] = planner.imagined_steps / solved
            row = {"search_model": name, "rollouts": flags.rollouts, "depth": flags.depth}
            rows.append(shown(who | row | result))
    write_rows(rows, "i2a_search.csv")


@dataclass
class Picture:
    """What the agent imagined beside what then happened: a row an action, a column a step, errors framed in red."""

    path: Annotated[str, tyro.conf.Positional]  # agent.pt or checkpoint.pt of an I2A
    output: pathlib.Path = pathlib.Path("docs/i2a_imagined.png")  # the picture's file
    seed: int = 1  # of the level and of the steps
    depth: int = 5  # imagined steps


def picture_command(flags: Picture) -> None:
    args, networks = load_agent(flags.path)
    observation, _ = i2a.make_envs(args, 1, None, CPU).reset(seed=flags.seed)
    frames, both = i2a.as_frames(observation, args.frame_stack), []
    for model in (networks["env_model"], i2a.PerfectModel(args)):
        models = {"env_model": model, "rollout_policy": networks["rollout_policy"]}
        both.append(i2a.imagine(models, frames, flags.depth, torch.Generator().manual_seed(flags.seed)))
    (ours, rewards, _), (true, true_rewards, alive) = ([x[0] for x in rollouts] for rollouts in both)  # (A, D, ...)
    figure, axes = plt.subplots(2 * i2a.A, flags.depth + 1, figsize=(1.3 * flags.depth + 1.5, 2.6 * i2a.A))
    for a in range(i2a.A):
        for row, (boards, paid) in enumerate(((ours, rewards), (true, true_rewards))):
            pictures = [frames[0, -1], *boards[a]]
            for d, axis in enumerate(axes[2 * a + row]):
                axis.imshow(convert_observation(pictures[d], args.observation, "rgb").numpy())
                axis.set(xticks=[], yticks=[])
                if d:
                    axis.set_title(f"{float(paid[a, d - 1]):+.1f}" if alive[a, d - 1] else "over", fontsize=7)
                wrong = d > 0 and bool(alive[a, d - 1]) and not torch.equal(ours[a, d - 1], true[a, d - 1])
                plt.setp(axis.spines.values(), color="red" if wrong else "black", linewidth=3 if wrong else 0.5)
            axes[2 * a + row, 0].set_ylabel(f"{ACTIONS[a]}\n{'imagined' if row == 0 else 'happened'}", fontsize=8)
    figure.tight_layout(pad=0.3)
    figure.savefig(flags.output, dpi=90)
    right = (ours == true).flatten(2).all(2) | (alive == 0)
    print(f"wrote {flags.output}: {right.float().mean():.2f} of the imagined boards are exact")


@dataclass
class Film:
    """A GIF: an agent solves a held-out level, and beside the board stands what it imagines before each step.

    The level is the first held-out one that it solves in `fewest` to `most` steps.
    """

    path: Annotated[str, tyro.conf.Positional]  # agent.pt or checkpoint.pt of an I2A
    output: pathlib.Path = pathlib.Path("docs/i2a_film.gif")  # the film's file
    seed: int = 1  # of the agent's actions and of those that it imagines
    fewest: int = 8  # steps that the solution takes at least
    most: int = 16  # and at most


@torch.no_grad()
def play_level(args: i2a.Args, networks: nn.ModuleDict, level: Tensor, seed: int) -> list[dict]:
    """A scene for each step: the board, what was imagined from it, the policy, the action; empty if it isn't solved."""
    rng = torch.Generator().manual_seed(seed)
    envs = i2a.make_envs(args, 1, level[None], CPU)
    observation, _ = envs.reset(options={"levels": level[None]})
    scenes = []
    for step in range(1, args.max_episode_steps + 1):
        frames = i2a.as_frames(observation, args.frame_stack)
        imagined = i2a.imagine(networks, frames, args.imagination_depth, rng, args.greedy_rollouts)
        logits, _ = networks["agent"](frames, imagined)
        action = i2a.sample(logits, rng)
        scene = dict(zip(("imagined", "rewards", "alive"), (x[0] for x in imagined), strict=True))  # (A, D, ...)
        scene |= {"board": frames[0, -1].clone(), "policy": logits.softmax(-1)[0], "action": int(action)}
        scenes.append(scene | {"title": f"step {step}"})
        observation, _, terminated, truncated, info = envs.step(action)
        if terminated[0]:
            last = i2a.as_frames(info["final_obs"], args.frame_stack)[0, -1]
            return [*scenes, scenes[-1] | {"board": last, "title": f"solved in {step} steps"}]
        if truncated[0]:
            break
    return []


def draw_scene(scene: dict, kind: str, tile: int = 112, large: int = 336) -> Image.Image:
    """The board on the left; on the right a row for each action and a column for each imagined step."""
    depth, gap, left, top = scene["rewards"].shape[1], 8, large + 96, 50
    picture = Image.new("RGB", (left + depth * (tile + gap) + gap, top + i2a.A * (tile + gap)), "white")
    draw = ImageDraw.Draw(picture)
    font = functools.cache(ImageFont.load_default)

    def board(frame: Tensor, x: int, y: int, width: int) -> None:
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
            if not scene["alive"][a, d]:  # behind the end that it foresees
                draw.rectangle((x, y, x + tile - 1, y + tile - 1), "gainsboro")
                continue
            board(scene["imagined"][a, d], x, y, tile)
            paid = float(scene["rewards"][a, d])
            if abs(paid + 0.1) > 0.01:  # more than the price of a step
                colour = "green" if paid > 0 else "firebrick"
                draw.rectangle((x, y, x + 50, y + 20), colour)
                draw.text((x + 25, y + 10), f"{paid:+.1f}", "white", font(16), anchor="mm")
        if chosen:
            draw.rectangle((left - 80, y - 4, left + depth * (tile + gap) - 5, y + tile + 3), outline="orange", width=4)
    return picture


def film_command(flags: Film) -> None:
    args, networks = load_agent(flags.path, eval_episodes=200)
    if args.agent != "i2a":
        sys.exit(f"{flags.path} is a model-free agent: it imagines nothing")
    games = (play_level(args, networks, level, flags.seed) for level in i2a.held_out_levels(args))
    scenes = next((game for game in games if flags.fewest <= len(game) - 1 <= flags.most), [])
    if not scenes:
        sys.exit(f"{flags.path} solves none of {args.eval_episodes} levels in {flags.fewest} to {flags.most} steps")
    pictures = [draw_scene(scene, args.observation).quantize(64) for scene in scenes]
    times = [500] * (len(pictures) - 1) + [3000]
    with i2a.replacing(flags.output) as path:
        pictures[0].save(path, format="GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0)
    print(f"wrote {flags.output}: a held-out level, solved in {len(scenes) - 1} steps")


if __name__ == "__main__":
    i2a.keep_freed_memory()
    commands = {
        "levels": (Levels, levels_command),
        "random": (Random, random_command),
        "lesions": (Lesions, lesions_command),
        "boxes": (Boxes, boxes_command),
        "search": (Search, search_command),
        "picture": (Picture, picture_command),
        "film": (Film, film_command),
    }
    command = tyro.extras.subcommand_cli_from_dict({name: flags for name, (flags, _) in commands.items()})
    dict(commands.values())[type(command)](command)
