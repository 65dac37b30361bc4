"""What trained I2A agents can do beside their task. A sub-command each, and its table under benchmark/results:

    python benchmark/i2a_evaluate.py retries runs/NAME/agent.pt --levels boxoban-levels/unfiltered/valid
    python benchmark/i2a_evaluate.py random
    python benchmark/i2a_evaluate.py boxes runs/NAME/agent.pt
    python benchmark/i2a_evaluate.py ablation runs/NAME/agent.pt
    python benchmark/i2a_evaluate.py search runs/NAME/agent.pt
    python benchmark/i2a_evaluate.py picture runs/NAME/agent.pt --seed 1
    python benchmark/i2a_evaluate.py film checkpoints/i2a_7x7_2boxes.pt --fewest 8 --most 16 --output docs/i2a_film.gif

Agents are agent.pt or checkpoint.pt. Shares solved have their 95 % interval (Wilson's) beside them.
"""

import itertools
import pathlib
from collections.abc import Sequence
from dataclasses import replace

import torch
import tyro
from common import show, wilson, write_rows
from curves import plt, save
from matplotlib.animation import PillowWriter
from torch import Tensor, nn

import i2a
from sokoban_env import convert_observation

CPU = torch.device("cpu")
ACTIONS = ("no-op", "up", "down", "left", "right")
ROLLOUTS, DEPTH = 10, 5  # of each action in a search, and their steps
Row = dict[str, object]


def load_agent(path: str, **changes: object) -> tuple[i2a.Args, nn.ModuleDict]:
    """The flags of an agent's file, with changes, and its networks."""
    args = replace(i2a.saved_args(path), **changes)
    networks = i2a.make_networks(args, CPU)
    i2a.load_networks(networks, path)
    return args, networks


def about(path: str, args: i2a.Args) -> Row:
    """What tells an agent apart in the tables, and how long it was trained."""
    task, frames = f"{args.size}x{args.size}-{args.num_boxes}", i2a.load_checkpoint(path, CPU)["global_step"]
    return {"task": task, "variant": args.agent, "seed": args.seed, "frames": frames}


def evaluated(args: i2a.Args, networks: nn.ModuleDict, levels: Tensor) -> Row:
    metrics, _ = i2a.evaluate(args, networks, levels, CPU)
    solved = metrics["eval/solved"]
    low, high = wilson(solved, len(levels))
    interval = {"eval/solved": solved, "eval/solved_low": low, "eval/solved_high": high}
    return {"levels": len(levels)} | interval | metrics


def retries(paths: tuple[str, ...], /, levels: str, most: int = 10) -> None:
    """The share of the first 1,000 levels of a file or folder solved in 1 to `most` tries with sampled actions."""
    rows = []
    for path in paths:
        args, networks = load_agent(path)
        boards = i2a.read_levels(levels, args.size)[:1000]
        ever = torch.zeros(len(boards), dtype=torch.bool)
        for tries in range(1, most + 1):
            _, solved = i2a.evaluate(replace(args, seed=tries), networks, boards, CPU)
            ever |= solved
            share = ever.double().mean().item()
            low, high = wilson(share, len(boards))
            numbers = {"tries": tries, "solved": share, "solved_low": low, "solved_high": high}
            rows.append(show(about(path, args) | {"file": levels, "levels": len(boards)} | numbers))
    write_rows(rows, "i2a_retries.csv")


def random(episodes: int = 5000) -> None:
    """What random play solves of the default task's held-out levels."""
    args = i2a.Args(agent="model-free", symmetry=False, eval_episodes=episodes)
    networks = i2a.make_networks(args, CPU)
    nn.init.zeros_(networks["agent"].actor.weight)  # every action alike
    row = {"size": args.size, "num_boxes": args.num_boxes, "max_episode_steps": args.max_episode_steps}
    write_rows([show(row | evaluated(args, networks, i2a.held_out_levels(args)))], "i2a_random.csv")


def boxes(paths: tuple[str, ...], /, episodes: int = 500) -> None:
    """Levels with 1 to 7 boxes, or as many as the generator makes: the paper's generalisation table."""
    rows = []
    for path in paths:
        args, networks = load_agent(path, eval_episodes=episodes)
        for num_boxes in range(1, min(7, args.size // 2) + 1):
            boards = i2a.held_out_levels(replace(args, num_boxes=num_boxes))
            rows.append(show(about(path, args) | {"boxes": num_boxes} | evaluated(args, networks, boards)))
    write_rows(rows, "i2a_boxes.csv")


class Distracted(nn.Module):
    """An agent that is shown, of each board, what was imagined from another one."""

    def __init__(self, agent: nn.Module) -> None:
        super().__init__()
        self.agent = agent

    def forward(self, frames: Tensor, imagined: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.agent(frames, [x.roll(1, 0) for x in imagined])


def ablation(paths: tuple[str, ...], /, episodes: int = 1000) -> None:
    """What agents that imagine solve of held-out levels by their own rollouts, and by those of another level."""
    rows = []
    for path in paths:
        args, networks = load_agent(path, eval_episodes=episodes)
        about_it = about(path, args) | {"depth": args.imagination_depth, "env_model": args.env_model}
        for rollouts in ("own", "another's"):
            boards = i2a.held_out_levels(args)
            rows.append(show(about_it | {"rollouts": rollouts} | evaluated(args, networks, boards)))
            networks["agent"] = Distracted(networks["agent"])
    write_rows(rows, "i2a_ablation.csv")


class Planner(nn.Module):
    """An agent that searches in `env_model`."""

    def __init__(self, args: i2a.Args, networks: nn.ModuleDict, env_model: nn.Module) -> None:
        super().__init__()
        self.args, self.networks = args, networks
        self.searched = {"env_model": env_model, "rollout_policy": networks["rollout_policy"]}
        self.rng = torch.Generator().manual_seed(args.seed)
        self.imagined_steps = 0

    def plan(self, frames: Tensor) -> Tensor:
        """The best action (B,) of frames (B, F, H, W)."""
        args = self.args
        many = frames.repeat_interleave(ROLLOUTS, 0)  # (B * N, F, H, W)
        imagined, rewards, alive = i2a.imagine(self.searched, many, DEPTH, self.rng)
        last = torch.cat([many.repeat_interleave(i2a.A, 0), imagined.flatten(0, 1)], 1)[:, -args.frame_stack :]
        values = self.networks["agent"](last, i2a.imagine(self.networks, last, args.imagination_depth, self.rng))[1]
        self.imagined_steps += len(last) * (DEPTH + i2a.A * args.imagination_depth)
        discounts = args.gamma ** torch.arange(DEPTH)
        alive_at_end = alive[..., -1] * (rewards[..., -1] < 10)  # (B * N, A)
        returns = (discounts * rewards * args.reward_scale).sum(-1)
        returns = returns + args.gamma**DEPTH * alive_at_end * values.view(-1, i2a.A)
        return returns.unflatten(0, (len(frames), -1)).mean(1).argmax(1)

    def forward(self, frames: Tensor, _: object) -> tuple[Tensor, Tensor]:
        best = torch.cat([self.plan(part) for part in frames.split(64)])
        return 1e6 * nn.functional.one_hot(best, i2a.A).float(), torch.zeros(len(best))


def search(paths: tuple[str, ...], /, model_paths: tuple[str, ...] = (), episodes: int = 100) -> None:
    """The paper's Monte-Carlo search, in the agent's own and in a perfect model, beside the agent's own play.

    It rolls out each action with π̂, and takes the best mean of discounted rewards and the agent's value of the last
    frame (for which the agent imagines once more, in its own model).

    Args:
        model_paths: for each agent, another I2A in whose model to search as well
        episodes: held-out levels
    """
    rows = []
    for path, other in itertools.zip_longest(paths, model_paths):
        args, networks = load_agent(path, eval_episodes=episodes)
        who, boards = about(path, args), i2a.held_out_levels(args)
        rows.append(show(who | {"search_model": "none: the agent itself"} | evaluated(args, networks, boards)))
        models = {"own": networks["env_model"], "perfect": i2a.PerfectModel(args)}
        if other:
            models["other"] = load_agent(other)[1]["env_model"]
        for name, env_model in models.items():
            planner = Planner(args, networks, env_model)
            result = evaluated(replace(args, agent="model-free"), nn.ModuleDict({"agent": planner}), boards)
            solved = max(1, round(result["eval/solved"] * len(boards)))
            result["eval/imagined_steps_per_solved"] = planner.imagined_steps / solved
            rows.append(show(who | {"search_model": name} | result))
    write_rows(rows, "i2a_search.csv")


def draw_board(axis: plt.Axes, board: Tensor, kind: str, frame: str = "black") -> None:
    axis.imshow(convert_observation(board, kind, "rgb").numpy())
    axis.set(xticks=[], yticks=[])
    plt.setp(axis.spines.values(), color=frame, linewidth=0.5 if frame == "black" else 3)


def picture(path: str, /, seed: int = 1) -> None:
    """What the agent imagined beside what then happened: a row an action, a column a step, errors framed in red."""
    args, networks = load_agent(path)
    observation, _ = i2a.make_envs(args, 1, None, CPU).reset(seed=seed)
    frames, both = i2a.as_frames(observation, args.frame_stack), []
    for model in (networks["env_model"], i2a.PerfectModel(args)):
        models = {"env_model": model, "rollout_policy": networks["rollout_policy"]}
        both.append(i2a.imagine(models, frames, DEPTH, torch.Generator().manual_seed(seed)))
    (ours, rewards, _), (true, true_rewards, alive) = ([x[0] for x in rollouts] for rollouts in both)  # (A, D, ...)
    right = (ours == true).flatten(2).all(2) | (alive == 0)
    figure, axes = plt.subplots(2 * i2a.A, DEPTH + 1, figsize=(8, 13))
    for a, row in itertools.product(range(i2a.A), (0, 1)):
        boards, paid = ((ours, rewards), (true, true_rewards))[row]
        start, *later = axes[2 * a + row]
        draw_board(start, frames[0, -1], args.observation)
        start.set_ylabel(f"{ACTIONS[a]}\n{('imagined', 'happened')[row]}", fontsize=8)
        for d, axis in enumerate(later):
            draw_board(axis, boards[a, d], args.observation, "black" if right[a, d] else "red")
            axis.set_title(f"{float(paid[a, d]):+.1f}" if alive[a, d] else "over", fontsize=7)
    save(figure, "i2a_imagined")


@torch.no_grad()
def play_level(args: i2a.Args, networks: nn.ModuleDict, level: Tensor) -> list[dict]:
    """A scene for each step: the board, what was imagined from it, the policy, the action; empty if it isn't solved."""
    rng = torch.Generator().manual_seed(1)
    envs = i2a.make_envs(args, 1, level[None], CPU)
    observation, _ = envs.reset(options={"levels": level[None]})
    scenes = []
    for step in range(1, args.max_episode_steps + 1):
        frames = i2a.as_frames(observation, args.frame_stack)
        imagined = i2a.imagine(networks, frames, args.imagination_depth, rng, args.greedy_rollouts)
        logits, _ = networks["agent"](frames, imagined)
        action = i2a.sample(logits, rng)
        scene = {"title": f"step {step}", "board": frames[0, -1].clone(), "imagined": [x[0] for x in imagined]}
        scenes.append(scene | {"policy": logits.softmax(-1)[0], "action": int(action)})
        observation, _, terminated, truncated, info = envs.step(action)
        if terminated[0]:
            last = i2a.as_frames(info["final_obs"], args.frame_stack)[0, -1]
            return [*scenes, scenes[-1] | {"board": last, "title": f"solved in {step} steps"}]
        if truncated[0]:
            break
    return []


def draw_scene(figure: plt.Figure, scene: dict, kind: str) -> None:
    """The board on the left; on the right a row for each action and a column for each imagined step."""
    boards, rewards, alive = scene["imagined"]  # (A, D, ...)
    grid = figure.add_gridspec(i2a.A, 4 + boards.shape[1], left=0.02, right=0.99, top=0.9, bottom=0.02)
    axis = figure.add_subplot(grid[:, :3])
    draw_board(axis, scene["board"], kind)
    axis.set_title(scene["title"], fontsize=16)
    figure.suptitle("right: what it imagined before its step, by first action", x=0.7)
    for a, d in itertools.product(range(i2a.A), range(boards.shape[1])):
        axis, chosen = figure.add_subplot(grid[a, 4 + d]), a == scene["action"]
        if alive[a, d]:
            draw_board(axis, boards[a, d], kind, "orange" if chosen else "black")
        else:  # behind the end that it foresees
            axis.set(xticks=[], yticks=[], facecolor="gainsboro")
        if alive[a, d] and abs(rewards[a, d] + 0.1) > 0.01:  # more than the price of a step
            axis.set_title(f"{float(rewards[a, d]):+.1f}", color="green" if rewards[a, d] > 0 else "firebrick", pad=2)
        if d == 0:
            axis.set_ylabel(f"{ACTIONS[a]}\n{float(scene['policy'][a]):.0%}", color="black" if chosen else "gray")


def film(
    path: str, /, output: pathlib.Path = pathlib.Path("docs/i2a_film.gif"), fewest: int = 8, most: int = 16
) -> None:
    """A GIF: an I2A solves a held-out level, and beside the board stands what it imagines before each step.

    The level is the first of 200 that it solves in `fewest` to `most` steps.
    """
    args, networks = load_agent(path, eval_episodes=200)
    games = (play_level(args, networks, level) for level in i2a.held_out_levels(args))
    scenes = next(game for game in games if fewest <= len(game) - 1 <= most)
    figure = plt.figure(figsize=(8.8, 7))
    writer = PillowWriter(fps=2)
    with writer.saving(figure, output, dpi=75):
        for scene in scenes:
            figure.clear()
            draw_scene(figure, scene, args.observation)
            writer.grab_frame()
        for _ in range(5):  # the last one stays for a while
            writer.grab_frame()
    print(f"wrote {output}: a held-out level, solved in {len(scenes) - 1} steps")


if __name__ == "__main__":
    i2a.keep_freed_memory()
    commands = (retries, random, boxes, ablation, search, picture, film)
    tyro.extras.subcommand_cli_from_dict({command.__name__: command for command in commands})
