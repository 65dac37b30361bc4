"""Distral with networks: Teh et al. 2017, "Distral: Robust Multitask Reinforcement Learning", arXiv 1707.04175.

Several Sokoban tasks (rooms and numbers of boxes that differ) at once. Each task's policy π_i learns from
R + (α/β) log π_0 - (1/β) log π_i: it stays close to the distilled policy π_0, which is fitted to all π_i (equations 1
to 10 of the paper). In two columns, π_0 = softmax(h) and π_i = softmax(α h + β f_i): f_i learns what differs.

Different from the paper: synchronous A2C on Sokoban for A3C on DeepMind Lab; the network of column i puts out β f_i,
not f_i; the sums over time carry no γ^t (as in any A3C). The rest is in docs/distral.md.

    python distral.py                                          # KL + entropy, two columns
    python distral.py --alpha 1 --columns 1                    # KL only, separate networks
    python distral.py --algorithm multitask                    # baselines: independent, multitask, two-column
    python distral.py --resume runs/NAME/checkpoint.pt; python distral.py --evaluate runs/NAME/agent.pt

Shapes: `T` steps of a rollout, `n` tasks, `N` environments of each, `A` actions, `L` levels, `H, W` the board of the
largest task; the boards of smaller ones are padded with wall.
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
    save_model: bool = True  # write agent.pt (weights only) at the end

    # Algorithm specific arguments
    tasks: tuple[str, ...] = ("5x5-1", "5x5-2", "6x5-1", "6x6-1")  # tasks: HxW-boxes
    held_out: str = "6x6-2"  # a task that nothing learns on: the distilled policy is evaluated on it
    algorithm: Literal["distral", "independent", "multitask", "two-column"] = "distral"  # the others are A2C
    columns: Literal[1, 2] = 2  # 1: each policy is a network of its own
    alpha: float = 0.5  # c_KL / (c_KL + c_Ent); 1: KL only
    beta: float = 500.0  # 1 / (c_KL + c_Ent), in units of the scaled reward
    view: Literal["player", "board"] = "player"  # player: networks see the board with the player in its middle
    total_timesteps: int = 1_000_000  # environment frames, over all tasks
    num_envs: int = 16  # parallel environments N of each task
    num_steps: int = 8  # steps T of a rollout before each update
    learning_rate: float = 3e-3  # learning rate of Adam
    gamma: float = 0.97  # discount
    ent_coef: float = 0.001  # entropy bonus of the baselines
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 1.0  # gradient clipping, of each column by itself
    reward_scale: float = 0.1  # the losses see rewards times this
    max_episode_steps: int = 60  # steps after which an episode is truncated
    channels: int = 16  # channels of a column's two convolutions
    dense: int = 128  # units of a column's dense layer
    log_frequency: int = 20_000  # frames between rows of metrics, each with a checkpoint
    resume: str | None = None  # continue from this checkpoint.pt, with its flags; others beside it override them
    evaluate: str | None = None  # evaluate this checkpoint.pt or agent.pt, and stop
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
    """Two convolutions and a dense layer, to A numbers and a value."""

    def __init__(self, channels: int, dense: int, height: int, width: int) -> None:
        super().__init__()
        self.conv1 = layer_init(nn.Conv2d(4, channels, 3, padding=1))
        self.conv2 = layer_init(nn.Conv2d(channels, channels, 3, padding=1))
        self.dense = layer_init(nn.Linear(channels * height * width, dense))
        self.actor = layer_init(nn.Linear(dense, A), 0.01)
        self.critic = layer_init(nn.Linear(dense, 1), 1.0)

    def forward(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """Planes (..., 4, H, W) -> (..., A), value (...)."""
        x = F.relu(self.conv2(F.relu(self.conv1(planes.flatten(0, -4)))))
        x = F.relu(self.dense(x.flatten(1))).unflatten(0, planes.shape[:-3])  # (..., dense)
        return self.actor(x), self.critic(x).squeeze(-1)


class DistralAgent(nn.Module):
    """The columns: `own`, one for each task (multitask: the same one for all), and `shared`, that of π_0."""

    def __init__(self, args: Args, height: int, width: int) -> None:
        super().__init__()
        self.view = args.view
        if args.view == "player":
            height, width = (height - 1) // 2 * 2 + 1, (width - 1) // 2 * 2 + 1
        columns = [PolicyColumn(args.channels, args.dense, height, width) for _ in range(1 + len(args.tasks))]
        self.own = nn.ModuleList(columns[:1] * len(args.tasks) if args.algorithm == "multitask" else columns[1:])
        self.shared = columns[0] if args.algorithm in ("distral", "two-column") else None
        self.two_columns = args.algorithm == "two-column" or (args.algorithm == "distral" and args.columns == 2)
        self.alpha = args.alpha if args.algorithm == "distral" else 1.0

    def forward(self, boards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boards (..., n, N, H, W) -> logits of π_i and of π_0 (..., n, N, A), values (..., n, N).

        Without a π_0 (independent, multitask), π_i stands in its place.
        """
        planes = cell_planes(player_view(boards) if self.view == "player" else boards)  # (..., n, N, 4, H, W)
        outputs = [column(x) for column, x in zip(self.own, planes.unbind(-5), strict=True)]
        logits = torch.stack([output for output, _ in outputs], -3)
        values = torch.stack([value for _, value in outputs], -2)
        if self.shared is None:
            return logits, logits, values
        h, _ = self.shared(planes)
        if self.two_columns:  # π_i = softmax(α h + β f_i), that is π_0^α exp(β f_i) normalised
            logits = self.alpha * h + logits
        return logits, h, values


# ----------------------------------------------------------------------------------------------------------- algorithm


def regularized_rewards(
    rewards: Tensor, log_pi: Tensor, log_prior: Tensor, actions: Tensor, alpha: float, beta: float
) -> Tensor:
    """R + (α/β) log π_0(a|s) - (1/β) log π_i(a|s); rewards and actions (...), log-probabilities (..., A).

    A constant for the losses. It holds both the pull to π_0 and the entropy: neither is in the losses again.
    """
    log_pi, log_prior = (x.detach().gather(-1, actions[..., None]).squeeze(-1) for x in (log_pi, log_prior))
    return rewards + (alpha / beta) * log_prior - log_pi / beta


def distilled_policy_loss(log_pi: Tensor, log_prior: Tensor) -> Tensor:
    """-Σ_a π_i(a|s) log π_0(a|s), the mean over all steps; only π_0 learns from it.

    Its gradient in h is π_0 - π_i: times α/β, the last term of equation 10.
    """
    return -(log_pi.detach().exp() * log_prior).sum(-1).mean()


# --------------------------------------------------------------------------------------------------------------- tasks


def read_task(task: str) -> tuple[int, int, int]:
    """Height, width and number of boxes of a task's name."""
    match = re.fullmatch(r"(\d+)x(\d+)-(\d+)", task)
    if not match:
        sys.exit(f"unknown task {task!r}: a task is HxW-boxes, like 6x6-1")
    return tuple(map(int, match.groups()))


def pad_boards(boards: Tensor, height: int, width: int) -> Tensor:
    """Boards (..., h, w) to (..., H, W), with wall (cell 0) below and to the right."""
    return F.pad(boards, (0, width - boards.shape[-1], 0, height - boards.shape[-2]))


@torch.no_grad()
def solved_share(agent: DistralAgent, args: Args, levels: Tensor, distilled: bool) -> Tensor:
    """The shares of levels (n, L, H, W) solved (n,), played once by π_i or by π_0, whose actions are sampled."""
    rng = torch.Generator(levels.device).manual_seed(args.seed)
    n, L, H, W = levels.shape
    limit, flat = args.max_episode_steps, levels.flatten(0, 1)
    envs = SokobanVectorEnv(n * L, size=(H, W), levels=flat, max_episode_steps=limit, device=levels.device)
    boards, _ = envs.reset(seed=args.seed, options={"levels": flat})
    solved = torch.zeros(n * L, dtype=torch.bool, device=levels.device)
    for _ in range(limit):
        logits, prior, _ = agent(boards.unflatten(0, (n, L)))
        boards, _, terminated, _, _ = envs.step(sample(prior if distilled else logits, rng).flatten())
        solved |= terminated  # what an environment does after that adds nothing
    return solved.unflatten(0, (n, L)).float().mean(1)


def evaluate_tasks(agent: DistralAgent, args: Args, H: int, W: int, device: torch.device) -> dict[str, float]:
    """Shares of held-out levels solved: by π_i on its task, by π_0 on all tasks, and by π_0 on the held-out task."""
    levels = []
    for task in (*args.tasks, args.held_out):
        h, w, boxes = read_task(task)
        cells, _ = generate_levels(args.eval_episodes, size=(h, w), num_boxes=boxes, seed=EVAL_SEED)
        levels.append(pad_boards(cells, H, W).to(device))
    own, held_out = torch.stack(levels[:-1]), torch.stack(levels[-1:] * len(args.tasks))  # (n, L, H, W)
    shares = solved_share(agent, args, own, distilled=False)
    metrics = {f"eval/solved_{task}": share for task, share in zip(args.tasks, shares.tolist(), strict=True)}
    metrics["eval/solved"] = shares.mean().item()
    metrics["eval/distilled"] = solved_share(agent, args, own, distilled=True).mean().item()
    # The held-out levels n times, over all columns: independent A2C has no π_0, its policies stand in for it
    metrics["eval/held_out"] = solved_share(agent, args, held_out, distilled=True).mean().item()
    return metrics


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line, over the flags of the checkpoint to resume or evaluate."""
    args = tyro.cli(Args, args=argv)
    if args.resume or args.evaluate:
        args = tyro.cli(Args, args=argv, default=saved_args(args.resume or args.evaluate))
    tasks = (*args.tasks, args.held_out)
    if len(tasks) < 2 or len(set(tasks)) < len(tasks):
        sys.exit("--tasks needs at least one, each once, and --held-out another one")
    if not 0 <= args.alpha <= 1 or not 0 < args.beta < math.inf:
        sys.exit(f"--alpha {args.alpha} must be from 0 to 1, --beta {args.beta} above 0 and finite")
    if not 0 <= args.seed < EVAL_SEED // 1000:
        sys.exit(f"--seed must be from 0 to {EVAL_SEED // 1000 - 1}")
    try:
        for height, width, boxes in map(read_task, tasks):
            generate_levels(1, size=(height, width), num_boxes=boxes)
    except ValueError as e:
        sys.exit(str(e))
    return args


def main(args: Args) -> dict[str, float]:
    """Train, or evaluate; returns the last evaluation."""
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    seed_everything(args.seed, args.torch_deterministic)
    rng = torch.Generator(device).manual_seed(args.seed)
    T, n, N, alpha, beta = args.num_steps, len(args.tasks), args.num_envs, args.alpha, args.beta
    heights, widths, num_boxes = zip(*map(read_task, (*args.tasks, args.held_out)), strict=True)
    H, W = max(heights), max(widths)
    agent = DistralAgent(args, H, W).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5)
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
    envs, limit = [], args.max_episode_steps
    for h, w, boxes in zip(heights[:n], widths[:n], num_boxes[:n], strict=True):
        envs.append(SokobanVectorEnv(N, size=(h, w), num_boxes=boxes, max_episode_steps=limit, device=device))
    observations = [env.reset(seed=1000 * args.seed + i)[0] for i, env in enumerate(envs)]
    global_step, rows = 0, []
    if state:
        if "envs" not in state or state["global_step"] >= args.total_timesteps:
            sys.exit(f"{path} is of a finished run: --evaluate it, or give its checkpoint.pt more --total-timesteps")
        run_name, rows, global_step = (state[name] for name in ("run_name", "rows", "global_step"))
        optimizer.load_state_dict(state["optimizer"])
        rng.set_state(state["rng"].cpu())
        observations = [env.set_state(saved) for env, saved in zip(envs, state["envs"], strict=True)]
    else:
        run_name = new_run(f"Sokoban-{n}-tasks__{args.exp_name}__{args.seed}")
    for group in optimizer.param_groups:
        group["lr"] = args.learning_rate
    logger = Logger(args, run_name, rows)
    boards = torch.stack([pad_boards(x, H, W) for x in observations])  # (n, N, H, W)
    columns = [module for module in agent.modules() if isinstance(module, PolicyColumn)]
    losses, iterations = torch.zeros(5, device=device), 0  # sums since the last row
    episodes = torch.zeros(2, n, device=device)  # of each task: how many ended, how many were solved
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" frames", disable=not sys.stderr.isatty())
    while global_step < args.total_timesteps:
        # 1. Act for T steps in every task, a_t ~ π_i
        steps = []
        for _ in range(T):
            with torch.no_grad():
                action = sample(agent(boards)[0], rng)  # (n, N)
            results = []
            for i, env in enumerate(envs):
                observation, *result, info = env.step(action[i])
                true_next = info.get("final_obs", observation)  # an episode's last board, before its reset
                results.append((pad_boards(observation, H, W), pad_boards(true_next, H, W), *result))
            following, *result = map(torch.stack, zip(*results, strict=True))
            steps.append((boards, action, *result))
            boards = following
        # (T, n, N, H, W), (T, n, N), (T, n, N, H, W), and three times (T, n, N)
        batch, actions, true_next, rewards, terminated, truncated = map(torch.stack, zip(*steps, strict=True))
        done = terminated | truncated
        episodes += torch.stack([done.sum((0, 2)), terminated.sum((0, 2))])

        # 2. All networks on the whole rollout
        logits, prior, values = agent(batch)  # (T, n, N, A) twice, (T, n, N)
        with torch.no_grad():
            next_values = agent(true_next)[2]  # V_i(s_{t+1})

        # 3. Advantages of the regularised reward R + (α/β) log π_0 - (1/β) log π_i
        rewards = args.reward_scale * rewards
        log_pi, log_prior = logits.log_softmax(-1), prior.log_softmax(-1)
        if args.algorithm == "distral":
            rewards = regularized_rewards(rewards, log_pi, log_prior, actions, alpha, beta)
        # λ = 1: the n-step returns of A3C
        advantages = generalized_advantages(rewards, values.detach(), next_values, terminated, done, args.gamma, 1.0)

        # 4. Update: the policy gradient reaches π_i (in two columns h too, through π_i), the distillation only h
        policy_loss, value_loss, entropy = actor_critic_losses(logits, values, actions, advantages)
        distillation = distilled_policy_loss(log_pi, log_prior)
        loss = policy_loss + args.vf_coef * value_loss
        if args.algorithm == "distral":  # in one column π_0 learns from nothing else, and Adam undoes any factor
            loss = loss + (alpha / beta if args.columns == 2 else 1.0) * distillation
        else:  # Distral has the entropy in its rewards
            loss = loss - args.ent_coef * entropy
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for column in columns:
            nn.utils.clip_grad_norm_(column.parameters(), args.max_grad_norm)
        optimizer.step()
        with torch.no_grad():
            kl = (log_pi.exp() * (log_pi - log_prior)).sum(-1).mean()
            losses += torch.stack([policy_loss, value_loss, entropy, distillation, kl])
        iterations += 1

        # 5. Log, then save what was logged
        before, global_step = global_step, global_step + T * n * N
        bar.update(T * n * N)
        over = global_step >= args.total_timesteps
        if global_step // args.log_frequency == before // args.log_frequency and not over:
            continue
        names = ("policy_loss", "value_loss", "entropy", "distillation", "kl_to_pi_0")
        means = (losses / iterations).tolist()
        metrics = {f"losses/{name}": mean for name, mean in zip(names, means, strict=True)}
        ended, solved = episodes
        if ended.all():
            shares = (solved / ended).tolist()
            metrics |= {f"charts/solved_{task}": share for task, share in zip(args.tasks, shares, strict=True)}
            metrics["charts/solved"] = sum(shares) / n
        if over:
            metrics |= evaluate_tasks(agent, args, H, W, device)
        logger.log(global_step, metrics)
        saved = {"args": asdict(replace(args, resume=None)), "agent": agent.state_dict(), "global_step": global_step}
        progress = {"run_name": run_name, "rows": logger.rows, "optimizer": optimizer.state_dict()}
        progress |= {"rng": rng.get_state(), "envs": [env.get_state() for env in envs]}
        save_checkpoint(logger.path.with_name("checkpoint.pt"), saved | progress)
        losses.zero_()
        episodes.zero_()
        iterations = 0

    bar.close()
    logger.close()
    if args.save_model:
        save_checkpoint(logger.path.with_name("agent.pt"), saved)
    return {name: value for name, value in metrics.items() if name.startswith("eval/")}


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("stopped; --resume runs/NAME/checkpoint.pt goes on from the last row of metrics, if there is one")
