"""Distral with networks: Teh et al. 2017, "Distral: Robust Multitask Reinforcement Learning", arXiv 1707.04175.

Several Sokoban tasks are learned at once: rooms of different sizes, with different numbers of boxes. The policy π_i of
task i learns from the regularised reward R + (α/β) log π_0 - (1/β) log π_i (equation 1), which keeps it close to the
distilled policy π_0. And π_0 is fitted to all π_i. In two columns π_0 = softmax(h) and π_i = softmax(α h + β f_i)
(equations 6 to 8): h learns what the tasks have in common, f_i learns what differs. In one column each of these
policies is a network of its own. Block 4 of the loop in `main` follows the gradients of equations 9 and 10.

Different from the paper: synchronous A2C on Sokoban instead of A3C on DeepMind Lab. The network of task i puts out
β f_i, not f_i. As in any A3C, step t of an episode isn't weighted by γ^t. The rest is in docs/distral.md.

    python distral.py                                          # Distral with KL + entropy, in two columns
    python distral.py --alpha 1 --columns 1                    # KL only, separate networks
    python distral.py --algorithm multitask                    # baselines: independent, multitask, two-column
    python distral.py --resume runs/NAME/checkpoint.pt; python distral.py --evaluate runs/NAME/agent.pt

Shapes: `T` steps of a rollout, `n` tasks, `N` environments of each, `A` actions, `L` levels of each task in an
evaluation. `H, W` are the largest height and width among the tasks: smaller boards are padded with wall.
"""

import contextlib
import csv
import functools
import math
import os
import pathlib
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

from sokoban_env import SokobanVectorEnv, generate_levels

A = 5  # actions: no-op, up, down, left, right
EVAL_SEED = 10**9  # seed of the held-out levels; those of training are below it


@dataclass
class Args:
    exp_name: str = pathlib.Path(__file__).stem  # the name of this experiment (of this file)
    seed: int = 1  # seed of the experiment
    torch_deterministic: bool = True  # only deterministic algorithms
    cuda: bool = True  # use a GPU if there is one
    track: bool = False  # track the run in Weights and Biases
    wandb_project_name: str = "model-based-rl"  # the Weights and Biases project
    wandb_entity: str | None = None  # the Weights and Biases team
    save_model: bool = True  # write agent.pt (weights only) at the end

    # Algorithm specific arguments
    tasks: tuple[str, ...] = ("5x5-1", "5x5-2", "6x5-1", "6x6-1")  # tasks: HxW-boxes
    held_out: str = "6x6-2"  # a task that nothing learns on: pi_0 is evaluated on it
    algorithm: Literal["distral", "independent", "multitask", "two-column"] = "distral"  # others: A2C without a pull
    columns: Literal[1, 2] = 2  # 2: pi_i = softmax(alpha h + beta f_i); 1: a network for each policy
    alpha: float = 0.5  # c_KL / (c_KL + c_Ent). 1: KL only; 0: entropy only
    beta: float = 500.0  # 1 / (c_KL + c_Ent), where rewards are scaled by reward_scale
    view: Literal["player", "board"] = "player"  # player: networks see the board with the player in the middle
    total_timesteps: int = 1_000_000  # environment frames, over all tasks
    num_envs: int = 16  # parallel environments N of each task
    num_steps: int = 8  # steps T of a rollout before each update
    learning_rate: float = 3e-3  # learning rate of Adam
    gamma: float = 0.97  # discount
    ent_coef: float = 0.001  # entropy bonus of the baselines
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 1.0  # largest norm of a column's gradient: each column is clipped separately
    reward_scale: float = 0.1  # rewards are multiplied by this before anything learns from them
    max_episode_steps: int = 60  # steps after which an episode is truncated
    channels: int = 16  # channels of a column's two convolutions
    dense: int = 128  # units of a column's dense layer
    log_frequency: int = 20_000  # frames between rows of metrics, each with a checkpoint
    resume: str | None = None  # continue from this checkpoint.pt, with its flags; others beside it override them
    evaluate: str | None = None  # evaluate this checkpoint.pt or agent.pt, with its flags, and stop
    eval_episodes: int = 200  # held-out levels of each task in an evaluation


# ---------------------------------------------------------------------------------- utilities, the same in every script


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python, numpy and torch; with `deterministic`, let torch use deterministic algorithms only."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.deterministic = deterministic


def layer_init(layer: nn.Module, std: float = 2**0.5, bias: float = 0.0) -> nn.Module:
    """Orthogonal weights of gain `std`, constant bias."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias)
    return layer


def new_run(name: str) -> str:
    """Make the folder runs/<name>__<time> of a new run, with a suffix where that is taken; returns the run's name."""
    stem = re.sub("[:/]", "-", f"{name}__{int(time.time())}")
    try:
        for suffix in ("", "-2", "-3", "-4", "-5", "-6"):
            with contextlib.suppress(FileExistsError):
                os.makedirs(f"runs/{stem}{suffix}")
                print(f"writing to runs/{stem}{suffix}", flush=True)
                return stem + suffix
    except OSError as e:
        sys.exit(f"can't create runs/{stem}: {e.strerror}; run from a folder that you can write to")
    sys.exit(f"runs/{stem} exists, and five more like it: wait a second")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path to write to, which takes the place of `path` when all went well; exits with a line if not."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        sys.exit(f"can't write {path}: {str(e).splitlines()[0]}; what stood there before is whole")


class Logger:
    """Metrics to `runs/<run_name>/metrics.csv`, to the terminal and, with `args.track`, to Weights and Biases.

    One call of `log` is one row. `rows` go into checkpoints: a resumed run takes them up, and has each row once.
    """

    def __init__(self, args: Any, run_name: str, rows: Iterable[dict[str, float]] = ()) -> None:
        self.path = pathlib.Path("runs") / run_name / "metrics.csv"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows, self.wandb = list(rows), None
        if args.track:
            import wandb

            try:
                self.wandb = wandb.init(
                    project=args.wandb_project_name, entity=args.wandb_entity, name=run_name, id=run_name,
                    resume="allow", config=vars(args), dir=str(self.path.parent),
                )  # fmt: skip
            except wandb.Error as e:
                sys.exit(f"--track: log in by `wandb login`, or set WANDB_MODE=offline: {str(e).splitlines()[0]}")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write a row. A loss that is not finite ends the run: log before you save, and the checkpoint is good."""
        row = {"global_step": step, **metrics}
        self.rows.append(row)
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in self.rows for name in row)))
            writer.writeheader()
            writer.writerows(self.rows)
        if self.wandb:
            self.wandb.log(row, step=len(self.rows))  # a row that a resumed run writes again is dropped
        if not sys.stderr.isatty():  # a terminal has a progress bar instead
            print(" ".join(f"{name}={value:.6g}" for name, value in row.items()), flush=True)
        for name, value in metrics.items():
            if name.startswith("losses/") and not math.isfinite(value):
                sys.exit(f"{name} is {value} at step {step}: lower the learning rate; the last checkpoint is good")

    def close(self) -> None:
        if self.wandb:
            self.wandb.finish()


def save_checkpoint(path: pathlib.Path, state: dict[str, Any]) -> None:
    """torch.save, so that a run that dies in it keeps its last checkpoint."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: str, device: str | torch.device) -> dict[str, Any]:
    """What `save_checkpoint` wrote, its tensors on `device`. `weights_only`: a foreign file can't run code."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except OSError as e:
        sys.exit(f"can't read the checkpoint {path}: {e.strerror or e}")
    except Exception as e:  # a damaged file can fail anywhere in torch's reader
        sys.exit(f"can't read the checkpoint {path}: damaged, or not made by torch.save ({type(e).__name__})")


def saved_args(path: str) -> Any:
    """The `Args` of a checkpoint: the defaults for the flags that are given beside it."""
    try:
        return Args(**load_checkpoint(path, "cpu")["args"])
    except (KeyError, TypeError):
        sys.exit(f"{path} was written by another script, or another version of this one")


# `cells` as four planes (wall, target, box, player), one row a cell value: lossless, and fewer than one-hot's seven
CELL_PLANES = ((1, 0, 0, 0), (0, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 1, 1, 0), (0, 0, 0, 1), (0, 1, 0, 1))


@functools.cache
def cell_table(device: torch.device) -> Tensor:
    """CELL_PLANES on the device, copied there once."""
    return torch.tensor(CELL_PLANES, dtype=torch.float32, device=device)


def cell_planes(cells: Tensor) -> Tensor:
    """Boards (..., H, W) of uint8 cells to network input (..., 4, H, W), float32 (channels last in memory: faster)."""
    return F.embedding(cells.int(), cell_table(cells.device)).movedim(-1, -3)


def player_view(cells: Tensor) -> Tensor:
    """Boards (..., H, W) rolled so that the player stands in the middle: (..., V, V'), odd sides.

    Where H is even V is H-1: rows 0 and H-1 are both wall, and one is left out. So the middle is a cell, and to turn
    the board is to turn the view.
    """
    height, width = cells.shape[-2:]
    view_height, view_width = (height - 1) // 2 * 2 + 1, (width - 1) // 2 * 2 + 1
    boards = cells.reshape(-1, height * width)
    player = boards.argmax(1)[:, None]  # (N, 1), its value is the highest
    y, x = torch.arange(view_height, device=cells.device), torch.arange(view_width, device=cells.device)
    rows = (player // width + y - view_height // 2) % view_height  # (N, V)
    columns = (player % width + x - view_width // 2) % view_width  # (N, V')
    index = rows[:, :, None] * width + columns[:, None, :]
    return boards.gather(1, index.flatten(1)).reshape(*cells.shape[:-2], view_height, view_width)


def generalized_advantages(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, done: Tensor, gamma: float, lam: float
) -> Tensor:
    """A_t = Σ_k (γλ)^k δ_{t+k} with δ_t = r_{t+1} + γ V(s_{t+1}) - V(s_t); all (T, B), flags bool.

    λ = 1 is the n-step return: Σ_{k<n} γ^k r_{t+k+1} + γ^n V(s_{t+n}) - V(s_t). `terminated` stops the bootstrap,
    `done` (terminated or truncated) cuts the sum; `next_values` are those of the true next observations, before resets.
    """
    deltas = rewards + gamma * next_values * ~terminated - values
    result, running = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        running = deltas[t] + gamma * lam * ~done[t] * running
        result[t] = running
    return result


def sample(logits: Tensor, rng: torch.Generator) -> Tensor:
    """Actions (B,) ~ softmax(logits): the Gumbel-max trick (-log of Exp(1) is Gumbel noise)."""
    return (logits - torch.empty_like(logits).exponential_(generator=rng).log()).argmax(-1)


def actor_critic_losses(logits: Tensor, values: Tensor, actions: Tensor, advantages: Tensor) -> tuple[Tensor, ...]:
    """-log π(a_t|s_t) A_t; (R_t - V(s_t))², the return R_t being A_t + V(s_t); the entropy of π: means over (T, B)."""
    log_pi = logits.log_softmax(-1)  # (T, B, A)
    policy_loss = -(log_pi.gather(-1, actions[..., None]).squeeze(-1) * advantages).mean()
    value_loss = F.mse_loss(values, advantages + values.detach())
    return policy_loss, value_loss, -(log_pi.exp() * log_pi).sum(-1).mean()


# ------------------------------------------------------------------------------------------------------------ networks


class PolicyColumn(nn.Module):
    """Two convolutions and a dense layer, then A outputs (h, β f_i, or logits of π_i) and a value."""

    def __init__(self, channels: int, dense: int, height: int, width: int) -> None:
        super().__init__()
        self.conv1 = layer_init(nn.Conv2d(4, channels, 3, padding=1))
        self.conv2 = layer_init(nn.Conv2d(channels, channels, 3, padding=1))
        self.dense = layer_init(nn.Linear(channels * height * width, dense))
        self.actor = layer_init(nn.Linear(dense, A), 0.01)
        self.critic = layer_init(nn.Linear(dense, 1), 1.0)

    def forward(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """Planes (..., 4, H, W) -> outputs (..., A), value (...)."""
        x = planes.flatten(0, -4)  # (B, 4, H, W): convolutions take one leading axis
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))  # (B, channels, H, W)
        x = F.relu(self.dense(x.flatten(1)))
        x = x.unflatten(0, planes.shape[:-3])  # (..., dense)
        return self.actor(x), self.critic(x).squeeze(-1)


class DistralAgent(nn.Module):
    """All policies: column `own[i]` belongs to task i (multitask: one column for all), column `shared` to π_0."""

    def __init__(self, args: Args, height: int, width: int) -> None:
        super().__init__()
        n = len(args.tasks)
        self.view = args.view
        if args.view == "player":  # the odd sides of `player_view`
            height, width = (height - 1) // 2 * 2 + 1, (width - 1) // 2 * 2 + 1
        columns = [PolicyColumn(args.channels, args.dense, height, width) for _ in range(1 + n)]
        if args.algorithm == "multitask":
            self.own = nn.ModuleList([columns[0]] * n)
        else:
            self.own = nn.ModuleList(columns[1:])
        self.shared = columns[0] if args.algorithm in ("distral", "two-column") else None
        self.two_columns = args.algorithm == "two-column" or (args.algorithm == "distral" and args.columns == 2)
        self.alpha = args.alpha if args.algorithm == "distral" else 1.0  # two-column baseline: π_i = softmax(h + f_i)

    def forward(self, boards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boards (..., n, N, H, W) -> logits of π_i and of π_0 (..., n, N, A), values (..., n, N).

        Without a π_0 (independent, multitask), π_i stands in its place.
        """
        if self.view == "player":
            boards = player_view(boards)
        planes = cell_planes(boards)  # (..., n, N, 4, H, W)
        outputs, values = [], []
        for column, task_planes in zip(self.own, planes.unbind(-5), strict=True):
            output, value = column(task_planes)  # (..., N, A), (..., N)
            outputs.append(output)
            values.append(value)
        own, values = torch.stack(outputs, -3), torch.stack(values, -2)  # (..., n, N, A), (..., n, N)
        if self.shared is None:
            return own, own, values
        h, _ = self.shared(planes)  # (..., n, N, A); nothing uses this column's value
        if self.two_columns:  # `own` is β f_i: π_i = softmax(α h + β f_i), that is π_0^α exp(β f_i) normalised
            return self.alpha * h + own, h, values
        return own, h, values


# ----------------------------------------------------------------------------------------------------------- algorithm


def regularized_rewards(
    rewards: Tensor, log_pi_i: Tensor, log_pi_0: Tensor, actions: Tensor, alpha: float, beta: float
) -> Tensor:
    """R + (α/β) log π_0(a|s) - (1/β) log π_i(a|s); rewards and actions (...), log-probabilities (..., A).

    The KL and the entropy are both in it, so π_i's loss has no term of its own for them. No gradient goes through it:
    that of log π_i(a|s) is zero on average, and π_0 has `distilled_policy_loss`.
    """
    taken_i = log_pi_i.detach().gather(-1, actions[..., None]).squeeze(-1)  # log π_i(a|s) of the actions taken
    taken_0 = log_pi_0.detach().gather(-1, actions[..., None]).squeeze(-1)
    return rewards + (alpha / beta) * taken_0 - taken_i / beta


def distilled_policy_loss(log_pi_i: Tensor, log_pi_0: Tensor) -> Tensor:
    """The cross-entropy -Σ_a π_i(a|s) log π_0(a|s), the mean over all steps. Only π_0 learns from it.

    Its gradient in h(a|s) is π_0(a|s) - π_i(a|s). A step down it, times α/β, is the last term of equation 10.
    """
    return -(log_pi_i.detach().exp() * log_pi_0).sum(-1).mean()


# --------------------------------------------------------------------------------------------------------------- tasks


def read_task(task: str) -> tuple[int, int, int]:
    """Height, width and number of boxes from a task's name, HxW-boxes."""
    match = re.fullmatch(r"(\d+)x(\d+)-(\d+)", task)
    if not match:
        sys.exit(f"unknown task {task!r}: a task is HxW-boxes, like 6x6-1")
    height, width, boxes = match.groups()
    return int(height), int(width), int(boxes)


def pad_boards(boards: Tensor, height: int, width: int) -> Tensor:
    """Boards (..., h, w) to (..., H, W), with wall (cell 0) below and to the right."""
    return F.pad(boards, (0, width - boards.shape[-1], 0, height - boards.shape[-2]))


@torch.no_grad()
def solved_share(agent: DistralAgent, args: Args, levels: Tensor, distilled: bool) -> Tensor:
    """Of each task's levels (n, L, H, W) the share that is solved (n,).

    Each level is played once, by π_0 if `distilled`, else by π_i. Actions are sampled.
    """
    rng = torch.Generator(levels.device).manual_seed(args.seed)
    n, L, H, W = levels.shape
    flat, limit = levels.flatten(0, 1), args.max_episode_steps  # an environment for each level
    envs = SokobanVectorEnv(n * L, size=(H, W), levels=flat, max_episode_steps=limit, device=levels.device)
    boards, _ = envs.reset(seed=args.seed, options={"levels": flat})  # environment k starts on level k
    solved = torch.zeros(n * L, dtype=torch.bool, device=levels.device)
    for _ in range(limit):
        logits_i, logits_0, _ = agent(boards.unflatten(0, (n, L)))
        action = sample(logits_0 if distilled else logits_i, rng)  # (n, L)
        boards, _, terminated, _, _ = envs.step(action.flatten())
        solved |= terminated  # a solved environment goes on with another level, which can't change this
    return solved.unflatten(0, (n, L)).float().mean(1)


def evaluate_tasks(agent: DistralAgent, args: Args, H: int, W: int, device: torch.device) -> dict[str, float]:
    """Shares of held-out levels solved: by π_i on its task, by π_0 on all tasks, and by π_0 on the held-out task."""
    levels = []
    for task in (*args.tasks, args.held_out):
        h, w, boxes = read_task(task)
        cells, _ = generate_levels(args.eval_episodes, size=(h, w), num_boxes=boxes, seed=EVAL_SEED)
        levels.append(pad_boards(cells, H, W).to(device))
    own = torch.stack(levels[:-1])  # (n, L, H, W)
    shares = solved_share(agent, args, own, distilled=False)
    metrics = {f"eval/solved_{task}": share for task, share in zip(args.tasks, shares.tolist(), strict=True)}
    metrics["eval/solved"] = shares.mean().item()
    metrics["eval/distilled"] = solved_share(agent, args, own, distilled=True).mean().item()
    # The agent takes levels of n tasks, so the held-out ones are there n times. Without a π_0 (independent) each π_i
    # plays them once, and this is the mean over the π_i
    held_out = torch.stack([levels[-1]] * len(args.tasks))  # (n, L, H, W)
    metrics["eval/held_out"] = solved_share(agent, args, held_out, distilled=True).mean().item()
    return metrics


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line, over the flags of the checkpoint to resume or evaluate."""
    args = tyro.cli(Args, args=argv)
    if args.resume and args.evaluate:
        sys.exit("--resume goes on with a run, --evaluate plays an agent: give one of them")
    if args.resume or args.evaluate:
        args = tyro.cli(Args, args=argv, default=saved_args(args.resume or args.evaluate))
    tasks = (*args.tasks, args.held_out)
    if not args.tasks or len(set(tasks)) < len(tasks):
        sys.exit("--tasks needs at least one, each once, and --held-out another one")
    if not 0 <= args.alpha <= 1:
        sys.exit(f"--alpha {args.alpha} must be from 0 to 1")
    if min(args.total_timesteps, args.num_envs, args.num_steps) < 1:
        sys.exit("--total-timesteps, --num-envs and --num-steps must be at least 1")
    if not 0 < args.beta < math.inf:
        sys.exit(f"--beta {args.beta} must be above 0 and finite")
    if not 0 <= args.seed < EVAL_SEED // 1000:  # training takes the seeds 1000 * seed + i
        sys.exit(f"--seed must be from 0 to {EVAL_SEED // 1000 - 1}")
    try:
        for task in tasks:
            height, width, boxes = read_task(task)
            generate_levels(1, size=(height, width), num_boxes=boxes)  # a ValueError if there are no such levels
    except ValueError as e:
        sys.exit(str(e))
    return args


def main(args: Args) -> dict[str, float]:
    """Train, or evaluate; returns the last evaluation."""
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    seed_everything(args.seed, args.torch_deterministic)
    rng = torch.Generator(device).manual_seed(args.seed)
    T, n, N = args.num_steps, len(args.tasks), args.num_envs
    sizes = [read_task(task) for task in (*args.tasks, args.held_out)]
    H = max(height for height, _, _ in sizes)
    W = max(width for _, width, _ in sizes)
    agent = DistralAgent(args, H, W).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5)
    path = args.evaluate or args.resume
    state = load_checkpoint(path, device) if path else None
    if state:
        try:
            agent.load_state_dict(state["agent"])
        except RuntimeError as e:
            sys.exit(f"{path} was made with other parts or sizes than these flags: {str(e).splitlines()[1].strip()}")
    if args.evaluate:
        metrics = evaluate_tasks(agent, args, H, W, device)
        print(" ".join(f"{name}={value:.4g}" for name, value in metrics.items()))
        return metrics

    # ---- everything that the loop touches; a new run, or one that goes on
    envs, observations = [], []
    for i, (h, w, boxes) in enumerate(sizes[:n]):  # the tasks without the held-out one
        env = SokobanVectorEnv(N, size=(h, w), num_boxes=boxes, max_episode_steps=args.max_episode_steps, device=device)
        observation, _ = env.reset(seed=1000 * args.seed + i)
        envs.append(env)
        observations.append(observation)  # (N, h, w)
    global_step, rows = 0, []
    if state:
        if "envs" not in state or state["global_step"] >= args.total_timesteps:  # agent.pt has no "envs"
            sys.exit(f"{path} is of a finished run: --evaluate it, or give its checkpoint.pt more --total-timesteps")
        run_name, rows, global_step = state["run_name"], state["rows"], state["global_step"]
        optimizer.load_state_dict(state["optimizer"])
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate  # load_state_dict brings the old rate back
        rng.set_state(state["rng"].cpu())
        observations = [env.set_state(saved) for env, saved in zip(envs, state["envs"], strict=True)]
    else:
        run_name = new_run(f"Sokoban-{n}-tasks__{args.exp_name}__{args.seed}")
    logger = Logger(args, run_name, rows)
    boards = torch.stack([pad_boards(x, H, W) for x in observations])  # (n, N, H, W)
    columns = [module for module in agent.modules() if isinstance(module, PolicyColumn)]
    # Sums since the last row of metrics. Of each task: how many episodes ended, how many were solved
    loss_names = ("policy_loss", "value_loss", "entropy", "distillation", "kl_to_pi_0")
    loss_sums, iterations = torch.zeros(len(loss_names), device=device), 0
    ended, solved = torch.zeros(n, device=device), torch.zeros(n, device=device)
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" frames", disable=not sys.stderr.isatty())
    while global_step < args.total_timesteps:
        # 1. Act for T steps in every task, a_t ~ π_i
        steps = []
        for _ in range(T):
            with torch.no_grad():
                logits_i, _, _ = agent(boards)
            action = sample(logits_i, rng)  # (n, N)
            by_task = []
            for i, env in enumerate(envs):
                observation, reward, terminated, truncated, info = env.step(action[i])
                true_next = info.get("final_obs", observation)  # an episode's last board, before its reset
                observation, true_next = pad_boards(observation, H, W), pad_boards(true_next, H, W)
                by_task.append((observation, true_next, reward, terminated, truncated))
            next_boards, true_next, reward, terminated, truncated = map(torch.stack, zip(*by_task, strict=True))
            steps.append((boards, action, true_next, reward, terminated, truncated))
            boards = next_boards
        # Boards and true next boards (T, n, N, H, W), all others (T, n, N)
        all_boards, actions, true_next, rewards, terminated, truncated = map(torch.stack, zip(*steps, strict=True))
        done = terminated | truncated
        ended += done.sum((0, 2))
        solved += terminated.sum((0, 2))  # an episode terminates when its level is solved

        # 2. All networks on the whole rollout, with gradients
        logits_i, logits_0, values = agent(all_boards)  # (T, n, N, A) twice, (T, n, N)
        log_pi_i, log_pi_0 = logits_i.log_softmax(-1), logits_0.log_softmax(-1)
        with torch.no_grad():
            _, _, next_values = agent(true_next)  # V_i(s_{t+1})

        # 3. Advantages of the regularised reward R + (α/β) log π_0 - (1/β) log π_i
        rewards = args.reward_scale * rewards
        if args.algorithm == "distral":
            rewards = regularized_rewards(rewards, log_pi_i, log_pi_0, actions, args.alpha, args.beta)
        # λ = 1: the n-step returns of A3C
        advantages = generalized_advantages(rewards, values.detach(), next_values, terminated, done, args.gamma, 1.0)

        # 4. Update. The policy gradient trains π_i, and in two columns h too, which is part of π_i. The distillation
        # trains π_0 alone
        policy_loss, value_loss, entropy = actor_critic_losses(logits_i, values, actions, advantages)
        distillation = distilled_policy_loss(log_pi_i, log_pi_0)
        loss = policy_loss + args.vf_coef * value_loss
        if args.algorithm == "distral":
            # In one column nothing else trains π_0: Adam would undo the factor α/β, and α = 0 would leave π_0 untrained
            weight = args.alpha / args.beta if args.columns == 2 else 1.0
            loss = loss + weight * distillation
        else:  # the baselines have a bonus for entropy, Distral has it in its rewards
            loss = loss - args.ent_coef * entropy
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for column in columns:  # separately, so that a large gradient of one column does not shrink the others'
            nn.utils.clip_grad_norm_(column.parameters(), args.max_grad_norm)
        optimizer.step()
        with torch.no_grad():
            kl = (log_pi_i.exp() * (log_pi_i - log_pi_0)).sum(-1).mean()  # KL(π_i‖π_0); 0 without a π_0
            loss_sums += torch.stack([policy_loss, value_loss, entropy, distillation, kl])  # as in loss_names
        iterations += 1

        # 5. Every log_frequency frames: log, then save what was logged
        before, global_step = global_step, global_step + T * n * N
        bar.update(T * n * N)
        finished = global_step >= args.total_timesteps
        if global_step // args.log_frequency == before // args.log_frequency and not finished:
            continue
        means = (loss_sums / iterations).tolist()
        metrics = {f"losses/{name}": mean for name, mean in zip(loss_names, means, strict=True)}
        if ended.all():  # a share for every task
            shares = (solved / ended).tolist()
            metrics |= {f"charts/solved_{task}": share for task, share in zip(args.tasks, shares, strict=True)}
            metrics["charts/solved"] = sum(shares) / n
        if finished:
            metrics |= evaluate_tasks(agent, args, H, W, device)
        logger.log(global_step, metrics)
        export = {"args": asdict(replace(args, resume=None)), "agent": agent.state_dict(), "global_step": global_step}
        progress = {"run_name": run_name, "rows": logger.rows, "optimizer": optimizer.state_dict()}
        progress |= {"rng": rng.get_state(), "envs": [env.get_state() for env in envs]}
        save_checkpoint(logger.path.with_name("checkpoint.pt"), export | progress)
        for total in (loss_sums, ended, solved):
            total.zero_()
        iterations = 0

    bar.close()
    logger.close()
    if args.save_model:
        save_checkpoint(logger.path.with_name("agent.pt"), export)
        print(f"to measure it again: python {sys.argv[0]} --evaluate runs/{run_name}/agent.pt")
    return {name: value for name, value in metrics.items() if name.startswith("eval/")}


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("stopped; --resume runs/NAME/checkpoint.pt goes on from the last row of metrics, if there is one")
