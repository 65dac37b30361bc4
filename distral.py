"""Distral with networks: Teh et al. 2017, "Distral: Robust Multitask Reinforcement Learning", arXiv 1707.04175.

Several Sokoban tasks (rooms and numbers of boxes that differ) at once. Each task's policy π_i learns from
R + (α/β) log π_0 - (1/β) log π_i: it stays close to the distilled policy π_0, which is fitted to all π_i (equations 1
to 10 of the paper). In two columns, π_0 = softmax(h) and π_i = softmax(α h + β f_i): f_i learns what differs.

Different from the paper: synchronous A2C on Sokoban for A3C on DeepMind Lab; the network of column i puts out β f_i,
not f_i; the sums over time carry no γ^t (as in any A3C). The rest is in docs/distral.md.

    python distral.py                                          # KL + entropy, two columns
    python distral.py --variant kl --columns 1                 # KL only (α = 1), separate networks
    python distral.py --algorithm multitask                    # baselines: independent, multitask, two-column
    python distral.py --resume runs/NAME/checkpoint.pt; python distral.py --evaluate runs/NAME/checkpoint.pt

Shapes: `T` steps of a rollout, `n` tasks, `N` environments of each, `A` actions, `H, W` the board of the largest task;
the boards of smaller ones are padded with wall.
"""

import contextlib
import csv
import ctypes
import functools
import math
import os
import pathlib
import random
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

from sokoban_env import SokobanVectorEnv, convert_observation, generate_levels

A = 5  # actions: no-op, up, down, left, right
EVAL_SEED = 10**9  # of the held-out levels


@dataclass
class Args:
    exp_name: str = pathlib.Path(__file__).stem  # the name of this experiment (of this file)
    seed: int = 1  # seed of the experiment
    torch_deterministic: bool = True  # only deterministic algorithms
    cuda: bool = True  # use a GPU if there is one
    track: bool = False  # track the run in Weights and Biases
    wandb_project_name: str = "model-based-rl"  # the Weights and Biases project
    wandb_entity: str | None = None  # the Weights and Biases team
    capture_video: bool = False  # write a GIF of each task's policy into the run folder
    save_model: bool = True  # write checkpoint.pt, for --resume and --evaluate

    # Algorithm specific arguments
    tasks: tuple[str, ...] = ("5x5-1", "5x5-2", "6x5-1", "6x6-1")  # tasks: HxW-boxes
    held_out: str = "6x6-2"  # a task that nothing learns on: the distilled policy is evaluated on it
    algorithm: Literal["distral", "independent", "multitask", "two-column"] = "distral"  # or A2C
    variant: Literal["kl", "kl+ent"] = "kl+ent"  # kl: alpha is 1 (no entropy term)
    columns: Literal[1, 2] = 2  # 1: each policy is a network of its own
    alpha: float = 0.5  # c_KL / (c_KL + c_Ent), of kl+ent
    beta: float = 500.0  # 1 / (c_KL + c_Ent), in units of the scaled reward
    total_timesteps: int = 1_000_000  # environment frames, over all tasks
    num_envs: int = 16  # parallel environments N of each task
    num_steps: int = 8  # steps T of a rollout before each update
    learning_rate: float = 3e-3  # learning rate of Adam
    gamma: float = 0.97  # discount
    gae_lambda: float = 1.0  # 1: n-step returns, as in A3C
    ent_coef: float = 0.001  # entropy bonus of the baselines
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 1.0  # gradient clipping, of each column by itself
    reward_scale: float = 0.1  # the losses see rewards times this
    max_episode_steps: int = 60  # steps after which an episode is truncated
    channels: int = 16  # channels of a column's two convolutions
    dense: int = 128  # units of a column's dense layer
    log_frequency: int = 20_000  # frames between rows of metrics
    checkpoint_minutes: float = 3.0  # minutes between checkpoints
    eval_episodes: int = 200  # held-out levels of each task in an evaluation
    resume: str | None = None  # continue from this checkpoint.pt, with its flags; --total-timesteps may be raised
    evaluate: str | None = None  # evaluate this checkpoint.pt, and stop


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
                sys.exit(f"--track: {str(e).splitlines()[0]}; log in by `wandb login`, or set WANDB_MODE=offline")

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
    except Exception as e:  # a damaged file can fail anywhere in torch's reader
        sys.exit(f"can't read the checkpoint {path}: {e!r:.120}")


def saved_args(path: str) -> Any:
    """The `Args` of a checkpoint: the defaults for the flags that are given beside it."""
    try:
        return Args(**load_checkpoint(path, "cpu")["args"])
    except (KeyError, TypeError):
        sys.exit(f"{path} was written by another script, or another version of this one")


def resumed_args(args: Any, path: str) -> Any:
    """The `Args` of a checkpoint, under those of `args` that may stand beside it; exits if others were given."""
    free = {"resume", "evaluate", "track", "capture_video"}  # never the checkpoint's
    beside = free | {"total_timesteps", "eval_episodes", "cuda", "wandb_project_name", "wandb_entity"}
    typed = {re.sub(r"^--(no-)?|=.*", "", word).replace("-", "_") for word in sys.argv if word.startswith("--")}
    names = [field.name for field in fields(Args)]
    given = {name for name in names if name in typed or getattr(args, name) != getattr(Args(), name)}
    if wrong := given - beside:
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(wrong))
        sys.exit(f"{flags}: {path} brings its own flags, leave these out")
    return replace(saved_args(path), **{name: getattr(args, name) for name in free | given})


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next tensors: page faults cost more than small networks' arithmetic."""
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to do
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-3, 2**25), (-1, 2**31 - 1), (-2, 2**26)):  # M_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD
            libc.mallopt(option, value)


# `cells` as four planes (wall, target, box, player), one row a cell value: lossless, and fewer than one-hot's seven
CELL_PLANES = ((1, 0, 0, 0), (0, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 1, 1, 0), (0, 0, 0, 1), (0, 1, 0, 1))


@functools.cache
def cell_table(device: torch.device) -> Tensor:
    """CELL_PLANES on the device, copied there once."""
    return torch.tensor(CELL_PLANES, dtype=torch.float32, device=device)


def cell_planes(cells: Tensor) -> Tensor:
    """Boards (..., H, W) of uint8 cells to network input (..., 4, H, W), float32 (channels last in memory: faster)."""
    return F.embedding(cells.int(), cell_table(cells.device)).movedim(-1, -3)


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
    """Two convolutions and a dense layer, to A numbers and, with `critic`, a value."""

    def __init__(self, channels: int, dense: int, height: int, width: int, critic: bool) -> None:
        super().__init__()
        self.conv1 = layer_init(nn.Conv2d(4, channels, 3, padding=1))
        self.conv2 = layer_init(nn.Conv2d(channels, channels, 3, padding=1))
        self.dense = layer_init(nn.Linear(channels * height * width, dense))
        self.actor = layer_init(nn.Linear(dense, A), 0.01)
        self.critic = layer_init(nn.Linear(dense, 1), 1.0) if critic else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Planes (rows, 4, H, W) -> (rows, A), value (rows,)."""
        x = F.relu(self.conv2(F.relu(self.conv1(x), inplace=True)), inplace=True)
        x = F.relu(self.dense(x.flatten(1)), inplace=True)
        return self.actor(x), self.critic(x).squeeze(-1) if self.critic else None


class DistralAgent(nn.Module):
    """All columns: `own`, one for each task (or one for all: multitask), and `shared`, that of π_0."""

    def __init__(self, args: Args, height: int, width: int) -> None:
        super().__init__()
        n = 1 if args.algorithm == "multitask" else len(args.tasks)
        sizes = (args.channels, args.dense, height, width)
        self.own = nn.ModuleList([PolicyColumn(*sizes, critic=True) for _ in range(n)])
        has_shared = args.algorithm in ("distral", "two-column")
        self.shared = PolicyColumn(*sizes, critic=False) if has_shared else None
        self.two_columns = args.algorithm == "two-column" or (args.algorithm == "distral" and args.columns == 2)
        self.alpha = effective_alpha(args)

    def column(self, i: int) -> PolicyColumn:
        return self.own[min(i, len(self.own) - 1)]

    def forward(self, boards: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Boards (n, rows, H, W) of each task -> logits of π_i (n, rows, A), values (n, rows), logits of π_0."""
        x = cell_planes(boards)  # (n, rows, 4, H, W)
        logits, values = map(torch.stack, zip(*[self.column(i)(x[i]) for i in range(len(x))], strict=True))
        if self.shared is None:
            return logits, values, None
        h = self.shared(x.flatten(0, 1))[0].unflatten(0, x.shape[:2])  # (n, rows, A)
        if self.two_columns:
            logits = two_column_logits(h, logits, self.alpha)
        return logits, values, h

    def task_policy(self, i: int, boards: Tensor) -> Tensor:
        """Boards (rows, H, W) -> logits of π_i (rows, A)."""
        x = cell_planes(boards)
        logits = self.column(i)(x)[0]
        return two_column_logits(self.shared(x)[0], logits, self.alpha) if self.two_columns else logits

    def distilled_policy(self, boards: Tensor) -> Tensor:
        """Boards (rows, H, W) -> logits of π_0 (rows, A); multitask: of the one policy."""
        return (self.shared or self.column(0))(cell_planes(boards))[0]


# ----------------------------------------------------------------------------------------------------------- algorithm


def effective_alpha(args: Args) -> float:
    """α; 1 for KL only, and for the two-column baseline, whose policies are softmax(h + f_i)."""
    return args.alpha if args.algorithm == "distral" and args.variant == "kl+ent" else 1.0


def two_column_logits(h: Tensor, beta_f: Tensor, alpha: float) -> Tensor:
    """π_i = softmax(α h + β f_i), that is π_0^α exp(β f_i) normalised."""
    return alpha * h + beta_f


def regularized_rewards(
    rewards: Tensor, log_pi: Tensor, log_prior: Tensor, actions: Tensor, alpha: float, beta: float
) -> Tensor:
    """R + (α/β) log π_0(a|s) - (1/β) log π_i(a|s); rewards and actions (...), log-probabilities (..., A).

    A constant for the losses. It holds both the pull to π_0 and the entropy: neither is in the losses again.
    """
    log_pi, log_prior = (x.detach().gather(-1, actions[..., None]).squeeze(-1) for x in (log_pi, log_prior))
    return rewards + (alpha / beta) * log_prior - log_pi / beta


def distilled_policy_loss(log_pi: Tensor, log_prior: Tensor, alpha: float, beta: float) -> Tensor:
    """-(α/β) Σ_a π_i(a|s) log π_0(a|s), the mean over all steps; only π_0 learns from it.

    Its gradient in h is (α/β) (π_0 - π_i), the last term of equation 10.
    """
    return -(alpha / beta) * (log_pi.detach().exp() * log_prior).sum(-1).mean()


def read_task(task: str) -> tuple[int, int, int]:
    """Height, width and number of boxes of a task's name."""
    match = re.fullmatch(r"(\d+)x(\d+)-(\d+)", task)
    if not match:
        sys.exit(f"unknown task {task!r}: a task is HxW-boxes, like 6x6-1")
    return tuple(map(int, match.groups()))


def pad_boards(boards: Tensor, height: int, width: int) -> Tensor:
    """Boards (..., h, w) to (..., H, W), with wall (cell 0) below and to the right."""
    return F.pad(boards, (0, width - boards.shape[-1], 0, height - boards.shape[-2]))


def task_levels(task: str, num: int) -> Tensor:
    """Held-out levels (L, h, w) of a task."""
    h, w, boxes = read_task(task)
    return generate_levels(num, size=(h, w), num_boxes=boxes, seed=EVAL_SEED)[0]


@torch.no_grad()
def solve_levels(policy: Any, levels: Tensor, args: Args, height: int, width: int, device: torch.device) -> Tensor:
    """Play each level (L, h, w) once, actions sampled; which were solved (L,), and the boards (S, L, h, w)."""
    rng = torch.Generator(device).manual_seed(args.seed)
    size = tuple(levels.shape[1:])
    limit = args.max_episode_steps
    envs = SokobanVectorEnv(len(levels), size=size, levels=levels, max_episode_steps=limit, device=device)
    boards, _ = envs.reset(seed=args.seed, options={"levels": levels})
    solved = torch.zeros(len(levels), dtype=torch.bool, device=device)
    film = [boards]
    for _ in range(limit):
        logits = policy(pad_boards(boards, height, width))
        boards, _, terminated, _, info = envs.step(sample(logits, rng))
        last = info.get("final_obs", boards)  # solved: it plays another level from here on, which doesn't count
        film.append(torch.where(solved[:, None, None], film[-1], last))
        solved |= terminated  # a later episode of the same board adds nothing
    return solved, torch.stack(film)


def evaluate_tasks(agent: DistralAgent, args: Args, height: int, width: int, device: torch.device) -> dict[str, float]:
    """Shares of held-out levels solved: by π_i on its task, by π_0 on every task and on the held-out one."""
    metrics: dict[str, float] = {}

    def share(policy: Any, task: str) -> float:
        levels = task_levels(task, args.eval_episodes)
        return solve_levels(policy, levels, args, height, width, device)[0].float().mean().item()

    for i, task in enumerate(args.tasks):
        metrics[f"eval/solved_{task}"] = share(functools.partial(agent.task_policy, i), task)
    metrics["eval/solved"] = sum(metrics.values()) / len(args.tasks)
    if args.algorithm == "independent":  # it has no π_0: what its policies do on the held-out task, on average
        shares = [share(functools.partial(agent.task_policy, i), args.held_out) for i in range(len(args.tasks))]
        return metrics | {"eval/held_out": sum(shares) / len(shares)}
    shares = {f"eval/distilled_{task}": share(agent.distilled_policy, task) for task in args.tasks}
    metrics |= shares | {"eval/distilled": sum(shares.values()) / len(shares)}
    return metrics | {"eval/held_out": share(agent.distilled_policy, args.held_out)}


def write_films(agent: DistralAgent, args: Args, folder: pathlib.Path, size: tuple[int, int], device: Any) -> None:
    """A GIF of four games of each task's policy."""
    from PIL import Image  # comes with matplotlib

    for i, task in enumerate(args.tasks):
        policy = functools.partial(agent.task_policy, i)
        boards = solve_levels(policy, task_levels(task, 4), args, *size, device)[1]
        pictures = convert_observation(boards.cpu(), "cells", "rgb").transpose(1, 2).flatten(2, 3).numpy()
        film = [Image.fromarray(picture) for picture in pictures]
        film[0].save(folder / f"{task}.gif", save_all=True, append_images=film[1:], duration=150, loop=0)


def check_distral(args: Args) -> None:
    for name in (
        "total_timesteps", "num_envs", "num_steps", "log_frequency", "eval_episodes", "max_episode_steps", "channels",
        "dense",
    ):  # fmt: skip
        if getattr(args, name) < 1:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    for name in ("learning_rate", "max_grad_norm"):
        if not getattr(args, name) > 0:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")
    if not 0 <= args.seed < 4_000_000:
        sys.exit(f"--seed {args.seed}: must be from 0 to 3,999,999")
    for name in ("alpha", "gamma", "gae_lambda"):
        if not 0 <= getattr(args, name) <= 1:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be from 0 to 1")
    if not 0 < args.beta < math.inf:
        sys.exit(f"--beta {args.beta}: must be above 0, and finite")
    if not args.tasks or len(set(args.tasks)) < len(args.tasks):
        sys.exit("--tasks: needs at least one, and each once")


def main(args: Args) -> dict[str, float]:
    """Train, or evaluate; returns the last evaluation."""
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    path = args.evaluate or args.resume
    state = load_checkpoint(path, device) if path else None
    if state is not None:
        if "agent" not in state or "envs" not in state:
            sys.exit(f"{path} is no checkpoint of distral.py")
        args = resumed_args(args, path)
    check_distral(args)
    seed_everything(args.seed, args.torch_deterministic)
    rng = torch.Generator(device).manual_seed(args.seed)
    T, n, N, alpha, beta = args.num_steps, len(args.tasks), args.num_envs, effective_alpha(args), args.beta
    sizes = [read_task(task) for task in (*args.tasks, args.held_out)]
    H, W = max(h for h, _, _ in sizes), max(w for _, w, _ in sizes)
    try:
        envs = [
            SokobanVectorEnv(N, size=(h, w), num_boxes=boxes, max_episode_steps=args.max_episode_steps, device=device)
            for h, w, boxes in sizes
        ][:n]  # the held-out task's only to see that it can be made
    except ValueError as e:
        sys.exit(str(e))
    agent = DistralAgent(args, H, W).to(device)
    columns = [[*column.parameters()] for column in (*agent.own, *([agent.shared] if agent.shared else []))]
    groups: list[dict[str, Any]] = [{"params": [*agent.own.parameters()]}]
    if agent.shared:
        # In one column π_0's gradient holds nothing without the factor α/β: Adam's eps has to be as small
        alone = args.algorithm == "distral" and args.columns == 1
        groups.append({"params": [*agent.shared.parameters()], "eps": 1e-5 * (alpha / beta if alone else 1)})
    optimizer = torch.optim.Adam(groups, args.learning_rate, eps=1e-5)
    if state:
        agent.load_state_dict(state["agent"])
        optimizer.load_state_dict(state["optimizer"])
    if args.evaluate:
        metrics = evaluate_tasks(agent, args, H, W, device)
        print(" ".join(f"{name}={value:.4g}" for name, value in metrics.items()))
        if args.capture_video:
            write_films(agent, args, pathlib.Path(args.evaluate).parent, (H, W), device)
        return metrics
    if state and state["global_step"] >= args.total_timesteps:
        sys.exit(f"{args.resume} is of a finished run: --evaluate it, or give more --total-timesteps")
    run_name = state["run_name"] if state else new_run(f"Sokoban-{n}-tasks__{args.exp_name}__{args.seed}")
    logger = Logger(args, run_name, state["rows"] if state else ())
    folder = logger.path.parent
    global_step = 0
    if state:
        global_step = state["global_step"]
        rng.set_state(state["rng"].cpu())
        observations = [env.set_state(saved) for env, saved in zip(envs, state["envs"], strict=True)]
    else:
        observations = [env.reset(seed=1000 * args.seed + i)[0] for i, env in enumerate(envs)]
    boards = torch.stack([pad_boards(x, H, W) for x in observations])  # (n, N, H, W)

    sums, iterations = torch.zeros(5, device=device), 0
    outcomes = torch.zeros(4, n, device=device)  # of each task: episodes, solved, returns, lengths
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" frames", disable=not sys.stderr.isatty())
    first_step, first_time, saved_at = global_step, time.time(), time.time()
    stop: list[int] = []
    handlers = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    while global_step < args.total_timesteps:
        # 1. Act for T steps in every task, a_t ~ π_i
        steps, lasts = [], []
        for t in range(T):
            with torch.no_grad():
                logits = agent(boards)[0]  # (n, N, A)
            action = sample(logits, rng)
            following, results = torch.empty_like(boards), []
            for i, env in enumerate(envs):
                observation, *result, info = env.step(action[i])
                following[i] = pad_boards(observation, H, W)
                results.append(result)
                if "final_obs" in info:  # same-step autoreset: `observation` is the next episode's first
                    lasts.append((t, i, info["_final_obs"], pad_boards(info["final_obs"][info["_final_obs"]], H, W)))
                    final = info["final_info"]
                    counted = (info["_final_info"], final["success"], final["episode"]["r"], final["episode"]["l"])
                    outcomes[:, i] += torch.stack([x.sum() for x in counted])
            steps.append((boards, action, *map(torch.stack, zip(*results, strict=True))))
            boards = following
        batch, actions, rewards, terminated, truncated = map(torch.stack, zip(*steps, strict=True))  # (T, n, N, ...)

        # 2. All networks on the whole rollout
        rows = torch.cat([batch, boards[None]]).transpose(0, 1).flatten(1, 2)  # (n, (T + 1) * N, H, W)
        outputs = [x if x is None else x.unflatten(1, (T + 1, N)).transpose(0, 1) for x in agent(rows)]
        (logits, values), prior_logits = (x[:-1] for x in outputs[:2]), outputs[2]  # (T, n, N, A), (T, n, N)
        next_values = outputs[1][1:].detach().clone()  # V_i(s_{t+1})
        with torch.no_grad():
            for t, i, ended, last in lasts:  # of a truncated episode, the value of its own last board
                next_values[t, i, ended] = agent.column(i)(cell_planes(last))[1]

        # 3. Advantages of the regularised reward R + (α/β) log π_0 - (1/β) log π_i
        rewards = args.reward_scale * rewards
        log_pi, distill_loss = logits.log_softmax(-1), torch.zeros((), device=device)
        if args.algorithm == "distral":
            log_prior = prior_logits[:-1].log_softmax(-1)
            rewards = regularized_rewards(rewards, log_pi, log_prior, actions, alpha, beta)
            distill_loss = distilled_policy_loss(log_pi, log_prior, alpha, beta)
        advantages = generalized_advantages(
            rewards, values.detach(), next_values, terminated, terminated | truncated, args.gamma, args.gae_lambda
        )

        # 4. Update: the policy gradient reaches π_i (in two columns h too, through π_i), the distillation only h
        policy_loss, value_loss, entropy = actor_critic_losses(logits, values, actions, advantages)
        loss = policy_loss + args.vf_coef * value_loss + distill_loss
        if args.algorithm != "distral":  # there, the entropy is in the reward
            loss = loss - args.ent_coef * entropy
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for column in columns:
            nn.utils.clip_grad_norm_(column, args.max_grad_norm)
        optimizer.step()
        with torch.no_grad():
            kl = torch.zeros_like(entropy)
            if agent.shared is not None:
                kl = (log_pi.exp() * (log_pi - prior_logits[:-1].log_softmax(-1))).sum(-1).mean()
            sums += torch.stack([policy_loss, value_loss, entropy, distill_loss, kl])
        iterations += 1

        # 5. Log, then save what was logged
        before, global_step = global_step, global_step + T * n * N
        bar.update(T * n * N)
        over = global_step >= args.total_timesteps
        if global_step // args.log_frequency == before // args.log_frequency and not (over or stop):
            continue
        names = ("policy_loss", "value_loss", "entropy", "distillation", "kl_to_distilled")
        metrics = {f"losses/{k}": v for k, v in zip(names, (sums / iterations).tolist(), strict=True)}
        episodes, solved, returned, lengths = outcomes.tolist()
        for i, task in enumerate(args.tasks):
            if episodes[i]:
                metrics[f"charts/solved_{task}"] = solved[i] / episodes[i]
        shares = [v for k, v in metrics.items() if k.startswith("charts/solved_")]
        if shares:
            metrics["charts/solved"] = sum(shares) / len(shares)
            metrics["charts/episodic_return"] = sum(returned) / sum(episodes)
            metrics["charts/episodic_length"] = sum(lengths) / sum(episodes)
        metrics["charts/SPS"] = (global_step - first_step) / (time.time() - first_time)
        if over:
            metrics |= evaluate_tasks(agent, args, H, W, device)
        logger.log(global_step, metrics)
        sums.zero_()
        outcomes.zero_()
        iterations = 0
        if args.save_model and (over or stop or time.time() - saved_at > 60 * args.checkpoint_minutes):
            save_checkpoint(folder / "checkpoint.pt", {
                "args": asdict(replace(args, resume=None)), "run_name": run_name, "global_step": global_step,
                "agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng.get_state(),
                "envs": [env.get_state() for env in envs], "rows": logger.rows,
            })  # fmt: skip
            saved_at = time.time()
        if over or stop:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if stop and not over:
            kept = f"; to go on: python distral.py --resume {folder}/checkpoint.pt" if args.save_model else ""
            sys.exit(f"stopped after {global_step:,} frames{kept}")
    bar.close()
    if args.capture_video:
        write_films(agent, args, folder, (H, W), device)
    logger.close()
    return {name: value for name, value in metrics.items() if name.startswith("eval/")}


if __name__ == "__main__":
    main(tyro.cli(Args))
