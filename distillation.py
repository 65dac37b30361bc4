"""Policy distillation: Rusu et al. 2016, arXiv 1511.06295; Czarnecki et al. 2019, arXiv 1902.02186.

A teacher is trained by reinforcement learning. Then smaller students learn to copy its outputs, on the states that it
visits or on those that they visit themselves. One student may copy the teachers of several tasks.

Different from Rusu et al.: the teacher trained here is an actor-critic (a DQN is read from a file of dyna_dqn.py),
networks and tasks are small, and every update of a student holds a batch of each of its tasks.

    python distillation.py                                      # Sokoban: a teacher, students of 25, 7 and 4 % of it
    python distillation.py --teacher-path runs/NAME/agent.pt --student-scale 0.02 --loss nll      # other students of it
    python distillation.py --teacher-path runs/NAME/agent.pt --states student --kl-direction reverse --correction
    python distillation.py --teacher-path A/agent.pt B/agent.pt --env-ids CartPole-v1 Sokoban-v0    # one for both tasks
    python distillation.py --evaluate runs/NAME/agent.pt

Shapes: `T` steps of a rollout, `B` environments or states of a batch, `A` actions, `N` states of a buffer, `S` features
of a state, `H, W` board. π, q: the teacher's; π̂: the student's.
"""

import bisect
import contextlib
import csv
import ctypes
import functools
import itertools
import math
import os
import pathlib
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

from sokoban_env import SokobanVectorEnv, generate_levels

EVAL_SEED = 10**9  # of the held-out levels and episodes
MOST_EVAL_STEPS = 10_000  # of an evaluation, for environments without a time limit
BOARD_WIDTHS = (32, 32, 256)  # of a teacher on boards: two convolutions and a dense layer
VECTOR_WIDTHS = (64, 64)  # of a teacher on vectors: two dense layers


@dataclass
class Args:
    exp_name: str = pathlib.Path(__file__).stem  # the name of this experiment (of this file)
    seed: int = 1  # seed of the experiment
    torch_deterministic: bool = True  # only deterministic algorithms
    cuda: bool = True  # use a GPU if there is one
    track: bool = False  # track the run in Weights and Biases
    wandb_project_name: str = "model-based-rl"  # the Weights and Biases project
    wandb_entity: str | None = None  # the Weights and Biases team
    save_model: bool = True  # write agent.pt after each teacher and each student

    # Algorithm specific arguments
    env_ids: tuple[str, ...] = ("Sokoban-v0",)  # the tasks of a student
    teacher_path: tuple[str, ...] = ()  # read teachers from agent.pt files of this script or of dyna_dqn.py (Q-values)
    student_scale: tuple[float, ...] = (0.25, 0.07, 0.04)  # a student for each: its share of the teachers' parameters
    loss: Literal["kl", "nll", "mse"] = "kl"  # copy the whole policy, its best action, or the Q-values
    kl_direction: Literal["forward", "reverse"] = "forward"  # D_KL(teacher || student) (Rusu et al.), or the reverse
    temperature: float | None = None  # of the teacher only (None: .01 for Q-values, 1 for a policy)
    states: Literal["teacher", "student"] = "teacher"  # who visits the states
    correction: bool = False  # with the student's states: reward it for lower losses at later steps

    teacher_timesteps: int = 400_000  # frames of a teacher
    num_envs: int = 32  # parallel environments
    num_steps: int = 8  # steps of a rollout
    learning_rate: float = 3e-3  # learning rate of a teacher
    gamma: float = 0.97  # discount
    ent_coef: float = 0.001  # a teacher's entropy bonus
    vf_coef: float = 0.5  # weight of value losses
    max_grad_norm: float = 1.0  # gradient clipping, of teachers and with --states student
    reward_scale: float = 0.1  # a teacher's losses see rewards times this

    buffer_size: int = 100_000  # states N of each task's buffer
    epsilon: float = 0.05  # probability of a random action while the teacher fills the buffer
    distill_steps: int = 6_000  # updates of a student
    batch_size: int = 256  # states of each task in an update
    distill_learning_rate: float = 1e-2  # learning rate of a student, decays linearly

    size: int = 7  # Sokoban: board size
    num_boxes: int = 1  # Sokoban: boxes
    max_episode_steps: int = 60  # Sokoban: steps after which an episode is truncated
    view: Literal["player", "board"] = "player"  # Sokoban; player: networks see the board with the player in its middle
    eval_episodes: int = 500  # episodes of an evaluation, held-out levels for Sokoban
    log_frequency: int = 1_000  # updates of a student between rows of metrics; a teacher has 20
    evaluate: str | None = None  # play the teachers and students of this agent.pt, and stop


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


# ------------------------------------------------------------------------------------------------------ environments


@functools.cache
def unseen_levels(num: int, size: int, num_boxes: int) -> Tensor:
    return generate_levels(num, size=size, num_boxes=num_boxes, seed=EVAL_SEED)[0]


class Task:
    """B copies of an environment with same-step autoreset: gymnasium's and Sokoban's under one interface."""

    def __init__(self, args: Args, env_id: str, num_envs: int, device: torch.device, evaluation: bool = False):
        self.device, self.options = device, None
        try:
            if env_id == "Sokoban-v0":
                held_out = unseen_levels(args.eval_episodes, args.size, args.num_boxes)
                levels = held_out if evaluation else None
                self.options = {"levels": levels} if evaluation else None  # the first episodes play one level each
                self.envs: gym.vector.VectorEnv = SokobanVectorEnv(
                    num_envs, size=args.size, num_boxes=args.num_boxes, max_episode_steps=args.max_episode_steps,
                    levels=levels, exclude=held_out, device=device,
                )  # fmt: skip
            else:
                # An environment may write every observation into the same array: copy it before a reset does
                copied = functools.partial(gym.wrappers.TransformObservation, func=np.array, observation_space=None)
                same_step = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
                self.envs = gym.make_vec(env_id, num_envs, "sync", same_step, [copied])
        except (gym.error.Error, ValueError, ImportError) as e:
            sys.exit(f"can't make {env_id} of --env-ids: {e!r:.200}".splitlines()[0])
        actions, states = self.envs.single_action_space, self.envs.single_observation_space
        fits = isinstance(states, gym.spaces.Box) and len(states.shape) == (2 if env_id == "Sokoban-v0" else 1)
        if not isinstance(actions, gym.spaces.Discrete) or not fits:
            sys.exit(f"{env_id} has actions {actions} and states {states}, not Discrete and vectors: try CartPole-v1")
        self.num_actions, self.first_action, self.shape = int(actions.n), int(actions.start), states.shape

    def reset(self, seed: int) -> Tensor:
        """Observations (B, S), or (B, H, W) uint8."""
        return torch.as_tensor(self.envs.reset(seed=seed, options=self.options)[0], device=self.device)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Observations to act on, rewards, terminated, truncated, and the true next observations: before resets."""
        if isinstance(self.envs, SokobanVectorEnv):
            x, reward, terminated, truncated, info = self.envs.step(actions)
            return x, reward, terminated, truncated, info.get("final_obs", x)
        *step, info = self.envs.step((actions + self.first_action).cpu().numpy())
        x, reward, terminated, truncated = (torch.as_tensor(column, device=self.device) for column in step)
        true_next = x.clone()
        for b in np.flatnonzero(info.get("_final_obs", ())):
            true_next[b] = torch.as_tensor(info["final_obs"][b], device=self.device)
        return x, reward.float(), terminated, truncated, true_next


@torch.no_grad()
def play_episodes(args: Args, env_id: str, policy: Any, greedy: bool, device: torch.device) -> dict[str, float]:
    """One episode in each of `--eval-episodes` copies: mean return, its standard error, share terminated (solved).

    `policy` maps observations to outputs (B, A); None: random play. Policies are sampled, Q-values acted on greedily.
    """
    task = Task(args, env_id, args.eval_episodes, device, evaluation=True)
    x, rng = task.reset(EVAL_SEED), torch.Generator(device).manual_seed(EVAL_SEED)
    playing = torch.ones(args.eval_episodes, dtype=torch.bool, device=device)
    returns, ended = torch.zeros(args.eval_episodes, device=device), torch.zeros_like(playing)
    for _ in range(MOST_EVAL_STEPS):
        out = policy(x) if policy else torch.zeros(len(x), task.num_actions, device=device)
        action = out.argmax(-1) if policy and greedy else sample(out, rng)
        x, reward, terminated, truncated, _ = task.step(action)
        returns += reward * playing  # what comes after an episode's end doesn't count
        ended |= terminated & playing
        playing &= ~(terminated | truncated)
        if not playing.any():
            break
    else:
        print(f"{env_id}: {playing.sum()} episodes cut after {MOST_EVAL_STEPS:,} steps; give it max_episode_steps")
    task.envs.close()
    error = returns.std(correction=min(1, len(returns) - 1)) / len(returns) ** 0.5
    return {"return": returns.mean().item(), "error": error.item(), "terminated": ended.float().mean().item()}


# ---------------------------------------------------------------------------------------------------------- networks


def on_one_board(shapes: list[tuple[int, ...]]) -> bool:
    return len(shapes) == 1 and len(shapes[0]) == 2  # a single task, of boards: the trunk is convolutional


class PolicyNet(nn.Module):
    """One trunk; for each task a head of outputs (logits or Q-values) and a critic.

    A single task of boards (H, W) has a trunk of two 3x3 convolutions and a dense layer: `widths` (c1, c2, dense).
    Else the trunk is dense layers of `widths`, on flat observations with zeros up to the longest task's.
    """

    def __init__(self, shapes: list[tuple[int, ...]], actions: list[int], widths: tuple[int, ...], view: str):
        super().__init__()
        self.made_with = {"shapes": shapes, "actions": actions, "widths": widths, "view": view}
        self.conv, self.view = on_one_board(shapes), view
        inputs = [self.planes(torch.zeros(1, *shape)).shape[1:] for shape in shapes]
        self.width = max(math.prod(shape) for shape in inputs)
        if self.conv:
            (planes, height, width), (c1, c2, dense) = inputs[0], widths
            self.trunk = nn.Sequential(
                layer_init(nn.Conv2d(planes, c1, 3, padding=1)), nn.ReLU(),
                layer_init(nn.Conv2d(c1, c2, 3, padding=1)), nn.ReLU(),
                nn.Flatten(), layer_init(nn.Linear(c2 * height * width, dense)), nn.ReLU(),
            )  # fmt: skip
        else:
            layers: list[nn.Module] = []
            for n_in, n_out in itertools.pairwise((self.width, *widths)):
                layers += [layer_init(nn.Linear(n_in, n_out)), nn.ReLU()]
            self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(layer_init(nn.Linear(widths[-1], n), 0.01) for n in actions)
        self.critics = nn.ModuleList(layer_init(nn.Linear(widths[-1], 1), 1.0) for _ in actions)
        # a DQN standardises its inputs by these; other networks leave them at 0 and 1
        self.register_buffer("mean", torch.zeros(len(shapes), self.width))
        self.register_buffer("std", torch.ones(len(shapes), self.width))

    def planes(self, x: Tensor) -> Tensor:
        """Boards (B, H, W) to planes (B, 4, V, V'); vectors (B, S) stay as they are."""
        if x.ndim == 3:
            return cell_planes(player_view(x) if self.view == "player" else x)
        return x

    def features(self, x: Tensor, task: int = 0) -> Tensor:
        """Observations (B, S) or (B, H, W) to what the heads read (B, last width)."""
        x = self.planes(x)
        if not self.conv:
            x = x.float().flatten(1)
            x = (F.pad(x, (0, self.width - x.shape[1])) - self.mean[task]) / self.std[task]
        return self.trunk(x)

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        """Outputs (B, A)."""
        return self.heads[task](self.features(x, task))

    def with_value(self, x: Tensor, task: int = 0, detach_critic: bool = False) -> tuple[Tensor, Tensor]:
        """Outputs (B, A), values (B,). With `detach_critic` the critic's gradient doesn't reach the trunk."""
        features = self.features(x, task)
        critic_input = features.detach() if detach_critic else features
        return self.heads[task](features), self.critics[task](critic_input).squeeze(-1)


def acting_parameters(net: PolicyNet) -> int:
    """Parameters that acting needs: all but the critic's."""
    return sum(p.numel() for name, p in net.named_parameters() if not name.startswith("critics"))


def student_widths(shapes: list[tuple[int, ...]], actions: list[int], most: int, view: str) -> tuple[int, ...]:
    """The widths of the largest student with at most `most` parameters.

    Vectors: the teacher's widths times f. Boards: the convolutions' times f, the dense layer's times f², since that
    layer holds nearly all parameters (in Rusu et al.'s students too, the convolutions shrink less).
    """
    candidates = []
    for f in np.geomspace(0.01, 64, 2000):  # each 0.4 % above the last
        scaled = [(f, width) for width in VECTOR_WIDTHS]
        if on_one_board(shapes):
            scaled = list(zip((f, f, f**2), BOARD_WIDTHS, strict=True))
        candidates.append(tuple(max(1, round(factor * width)) for factor, width in scaled))

    def parameters(widths: tuple[int, ...]) -> int:
        with torch.device("meta"):  # shapes only: no memory, no numbers
            return acting_parameters(PolicyNet(shapes, actions, widths, view))

    fitting = bisect.bisect_right(candidates, most, key=parameters)  # so many candidates, from the smallest on
    if fitting == 0:
        sys.exit(f"even a student with one unit a layer has over {most} parameters: raise --student-scale")
    return candidates[fitting - 1]


def saved_net(net: PolicyNet) -> dict[str, Any]:
    return {**net.made_with, "weights": net.state_dict()}


def make_net(saved: dict[str, Any], device: torch.device) -> PolicyNet:
    net = PolicyNet(*(saved[name] for name in ("shapes", "actions", "widths", "view"))).to(device)
    net.load_state_dict(saved["weights"], strict=False)  # a DQN has no critic
    return net


def read_teachers(path: str, args: Args, device: torch.device) -> dict[str, dict[str, Any]]:
    """The teachers of a file, by environment: policies of this script, or run 0 of dyna_dqn.py's Q-networks."""
    saved = load_checkpoint(path, device)
    teachers = saved.get("teachers", {})
    if "q_net.mean" in saved.get("networks", {}):
        teachers = {saved["args"]["env_id"]: q_network(saved["args"]["hidden"], saved["networks"])}
    if not teachers or any("shapes" not in teacher for teacher in teachers.values()):
        sys.exit(f"{path} holds no teacher: give an agent.pt of distillation.py or of dyna_dqn.py")
    if "Sokoban-v0" in teachers:
        for name in ("size", "num_boxes"):
            if (value := saved["args"][name]) != getattr(args, name):
                sys.exit(f"the teacher of {path} learned with --{name.replace('_', '-')} {value}: give that flag, too")
    return teachers


def q_network(hidden: tuple[int, ...], weights: dict[str, Tensor]) -> dict[str, Any]:
    """The first of dyna_dqn.py's Q-networks as a saved PolicyNet: there weights are (in, out), boards flat."""
    net = {"mean": weights["q_net.mean"][0], "std": weights["q_net.std"][0]}  # (1, S)
    layers = [f"trunk.{2 * i}" for i in range(len(hidden))] + ["heads.0"]  # every second layer of a trunk is a ReLU
    for i, layer in enumerate(layers):
        net[f"{layer}.weight"] = weights[f"q_net.weights.{i}"][0].T
        net[f"{layer}.bias"] = weights[f"q_net.biases.{i}"][0, 0]
    shapes, actions = [tuple(net["mean"].shape[1:])], [len(net["heads.0.bias"])]
    return {"kind": "dqn", "shapes": shapes, "actions": actions, "widths": hidden, "view": "board", "weights": net}


# ---------------------------------------------------------------------------------------------------------- teachers


class Rollout(NamedTuple):
    """T steps of a network in B environments; all (T, B), observations (T, B, ...), logits (T, B, A)."""

    observations: Tensor
    logits: Tensor
    values: Tensor
    next_values: Tensor  # of the true next observations, without a gradient
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    done: Tensor


def act(
    net: PolicyNet, i: int, task: Task, x: Tensor, num_steps: int, rng: torch.Generator, detach_critic: bool = False
) -> tuple[Rollout, Tensor]:
    """`num_steps` of actions a_t ~ π(s_t) in task i, from x (B, ...) on: the rollout, and the next x.

    Logits and values keep their graph: a loss of the rollout has a gradient without a second forward pass.
    """
    steps = []
    for _ in range(num_steps):
        logits, value = net.with_value(x, i, detach_critic)
        action = sample(logits.detach(), rng)
        next_x, reward, terminated, truncated, true_next = task.step(action)
        steps.append((x, logits, value, action, reward, terminated, truncated, true_next))
        x = next_x
    columns = zip(*steps, strict=True)
    observations, logits, values, actions, rewards, terminated, truncated, true_next = map(torch.stack, columns)
    with torch.no_grad():  # where an episode goes on, the next step has computed V(s_{t+1}); terminated: not used
        next_values = torch.cat([values[1:], net.with_value(x, i)[1][None]])
        if truncated.any():
            next_values[truncated] = net.with_value(true_next[truncated], i)[1]
    return Rollout(observations, logits, values, next_values, actions, rewards, terminated, terminated | truncated), x


def train_teacher(net: PolicyNet, task: Task, args: Args, rng: torch.Generator, logger: Logger) -> None:
    """Advantage actor-critic with n-step returns; `net` learns in place."""
    x = task.reset(1000 * args.seed)
    optimizer = torch.optim.Adam(net.parameters(), args.learning_rate, eps=1e-5)
    frames = args.num_envs * args.num_steps  # of an iteration
    iterations = math.ceil(args.teacher_timesteps / frames)
    rows = {math.ceil(iterations * k / 20) for k in range(1, 21)}  # the iterations after which a row is logged
    start, last_row = time.time(), 0
    running = torch.zeros(args.num_envs, device=task.device)  # returns of the episodes under way
    episodes = torch.zeros(2, device=task.device)  # since the last row: the sum of their returns, their number
    losses = torch.zeros(3, device=task.device)  # sums since the last row
    for iteration in tqdm(range(1, iterations + 1), desc="teacher", disable=not sys.stderr.isatty()):
        rollout, x = act(net, 0, task, x, args.num_steps, rng)
        advantages = generalized_advantages(
            args.reward_scale * rollout.rewards, rollout.values.detach(), rollout.next_values, rollout.terminated,
            rollout.done, args.gamma, 1.0,
        )  # fmt: skip
        policy_loss, value_loss, entropy = actor_critic_losses(
            rollout.logits, rollout.values, rollout.actions, advantages
        )
        optimizer.zero_grad(set_to_none=True)
        (policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy).backward()
        nn.utils.clip_grad_norm_(net.parameters(), args.max_grad_norm)
        optimizer.step()

        losses += torch.stack([policy_loss, value_loss, entropy]).detach()
        for reward, done in zip(rollout.rewards, rollout.done, strict=True):
            running += reward
            episodes += torch.stack([(running * done).sum(), done.sum()])
            running *= ~done
        if iteration in rows:
            names = ("losses/policy_loss", "losses/value_loss", "losses/entropy")
            metrics = dict(zip(names, (losses / (iteration - last_row)).tolist(), strict=True))
            metrics["charts/SPS"] = iteration * frames / (time.time() - start)
            if episodes[1]:
                metrics["charts/episodic_return"] = (episodes[0] / episodes[1]).item()
            logger.log(iteration * frames, metrics)
            last_row = iteration
            episodes.zero_()
            losses.zero_()


# ------------------------------------------------------------------------------------------------------- distillation


@torch.no_grad()
def fill_buffer(
    task: Task, teacher: Any, num: int, epsilon: float, greedy: bool, seed: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """At least `num` states (N, ...) that the teacher visits, and its outputs there (N, A). ε: the random actions."""
    x, states, outputs = task.reset(seed), [], []
    for _ in range(math.ceil(num / len(x))):
        out = teacher(x)
        states.append(x)
        outputs.append(out)
        action = out.argmax(-1) if greedy else sample(out, rng)
        explore = torch.rand(action.shape, generator=rng, device=x.device) < epsilon
        random_action = torch.randint(task.num_actions, action.shape, generator=rng, device=x.device)
        x, *_ = task.step(torch.where(explore, random_action, action))
    return torch.cat(states), torch.cat(outputs)


def distillation_losses(student: Tensor, teacher: Tensor, loss: str, direction: str, temperature: float) -> Tensor:
    """Rusu et al.'s losses (...,) of outputs (..., A): logits, or Q-values q. Only the student's have a gradient.

    The temperature τ sharpens the teacher, π = softmax(q / τ); the student has none: π̂ = softmax(its outputs).
    """
    teacher = teacher.detach()
    log_pi, log_pi_hat = (teacher / temperature).log_softmax(-1), student.log_softmax(-1)
    if loss == "mse":
        return ((teacher - student) ** 2).sum(-1)  # ‖q - q̂‖²
    if loss == "nll":
        return -log_pi_hat.gather(-1, teacher.argmax(-1, keepdim=True)).squeeze(-1)  # -log π̂(argmax_a q)
    if direction == "reverse":
        return (log_pi_hat.exp() * (log_pi_hat - log_pi)).sum(-1)  # D_KL(π̂‖π)
    return (log_pi.exp() * (log_pi - log_pi_hat)).sum(-1)  # D_KL(π‖π̂)


def corrected_loss(losses: Tensor, rollout: Rollout, gamma: float) -> tuple[Tensor, Tensor]:
    """The loss whose gradient is ∇ E_π̂[Σ_t ℓ(s_t)] (Czarnecki et al., theorem 2), and the critic's loss.

    Which states come depends on the student, too: ∇ E_π̂[Σ_t ℓ_t] = E_π̂[Σ_t ∇ℓ_t - ∇log π̂(a_t|s_t) R̂_t], with
    R̂_t = -Σ_{i>t} ℓ_i. So the second term is a policy gradient, of the reward -ℓ. Here R̂_t = -Σ_{i>=t} γ^{i-t} ℓ_i:
    ℓ_t doesn't depend on a_t, so it adds no bias, and the critic V(s_t) learns the same sum.
    """
    advantages = generalized_advantages(
        -losses.detach(), rollout.values.detach(), rollout.next_values, rollout.terminated, rollout.done, gamma, 1.0
    )
    policy_loss, value_loss, _ = actor_critic_losses(rollout.logits, rollout.values, rollout.actions, advantages)
    return losses.mean() + policy_loss, value_loss


# --------------------------------------------------------------------------------------------------------------- runs


def train_student(
    student: PolicyNet, scale: float, tasks: list[Task], teachers: list[PolicyNet], temperatures: list[float],
    buffers: list[tuple[Tensor, Tensor]], args: Args, rng: torch.Generator, logger: Logger,
) -> None:  # fmt: skip
    """Each update lowers the mean of all tasks' losses; `student` learns in place."""
    optimizer = torch.optim.Adam(student.parameters(), args.distill_learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 - update / args.distill_steps)
    policy_parameters = [*student.trunk.parameters(), *student.heads.parameters()]
    observations = [task.reset(1000 * args.seed + 700) for task in tasks]
    sums, last_row, start = torch.zeros(2, device=rng.device), 0, time.time()
    for update in tqdm(range(1, args.distill_steps + 1), desc="student", disable=not sys.stderr.isatty()):
        loss = torch.zeros(2, device=rng.device)  # the student's and its critic's: means over the tasks
        for i, (task, teacher) in enumerate(zip(tasks, teachers, strict=True)):
            if args.states == "teacher":
                states, outputs = buffers[i]
                index = torch.randint(len(states), (args.batch_size,), generator=rng, device=rng.device)
                logits, target = student(states[index], i), outputs[index]  # (B, A)
            else:  # the student acts, and learns where it goes; the critic doesn't shape its trunk
                rollout, observations[i] = act(
                    student, i, task, observations[i], args.num_steps, rng, detach_critic=True
                )
                logits = rollout.logits  # (T, B, A)
                with torch.no_grad():
                    target = teacher(rollout.observations.flatten(0, 1)).view_as(logits)
            losses = distillation_losses(logits, target, args.loss, args.kl_direction, temperatures[i])
            distill_loss, value_loss = losses.mean(), torch.zeros_like(loss[1])
            if args.correction:
                distill_loss, value_loss = corrected_loss(losses, rollout, args.gamma)
            loss = loss + torch.stack([distill_loss, value_loss]) / len(tasks)
        optimizer.zero_grad(set_to_none=True)
        (loss[0] + args.vf_coef * loss[1]).backward()
        if args.states == "student":  # clip the two apart, so that a large gradient of the critic's doesn't shrink π̂'s
            nn.utils.clip_grad_norm_(policy_parameters, args.max_grad_norm)
            nn.utils.clip_grad_norm_(student.critics.parameters(), args.max_grad_norm)
        optimizer.step()
        schedule.step()

        sums += loss.detach()
        if update % args.log_frequency == 0 or update == args.distill_steps:
            distill_loss, value_loss = (sums / (update - last_row)).tolist()
            metrics = {"charts/student_scale": scale, "losses/distillation": distill_loss}
            if args.correction:
                metrics["losses/student_value"] = value_loss
            metrics["charts/updates_per_second"] = update / (time.time() - start)
            logger.log(update, metrics)
            last_row = update
            sums.zero_()


# --------------------------------------------------------------------------------------------------------------- runs


def play_all(args: Args, state: dict[str, Any], device: torch.device) -> list[dict[str, float]]:
    """Play at random, and every teacher and student. A row for each student and task; score: 0 random, 1 teacher."""
    rows = []
    teachers = [make_net(state["teachers"][env_id], device) for env_id in args.env_ids]
    total = sum(map(acting_parameters, teachers))
    for i, env_id in enumerate(args.env_ids):
        greedy = state["teachers"][env_id]["kind"] == "dqn"
        played = {"random": play_episodes(args, env_id, None, greedy, device)}
        played["teacher"] = play_episodes(args, env_id, teachers[i], greedy, device)
        for scale, saved in state["students"].items():
            student = make_net(saved, device)
            played["student"] = play_episodes(args, env_id, functools.partial(student, task=i), greedy, device)
            low, high, own = (played[who]["return"] for who in ("random", "teacher", "student"))
            row = {"charts/task": i, "charts/student_scale": float(scale), "charts/teacher_parameters": total}
            row["charts/student_parameters"] = acting_parameters(student)
            row["eval/score"] = (own - low) / (high - low) if high != low else math.nan
            for who, result in played.items():
                row |= {f"eval/{who}_{name}": value for name, value in result.items()}
            rows.append(row)
            print(
                f"{env_id}, student of {scale}: random {low:.4g}, teacher {high:.4g}, student {own:.4g} ± "
                f"{1.96 * played['student']['error']:.2g}, score {row['eval/score']:.3f}", flush=True,
            )  # fmt: skip
    return rows


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line, over the flags of the file to evaluate; refuses what would go wrong without a word."""
    args = tyro.cli(Args, args=argv)
    if args.evaluate:
        saved = saved_args(args.evaluate)
        args = tyro.cli(Args, args=argv, default=saved)
        if args.env_ids != saved.env_ids:  # a student's heads are in the order of its tasks
            sys.exit(f"--evaluate plays the tasks of the file, {' '.join(saved.env_ids)}: leave out --env-ids")
    if not args.env_ids or len(set(args.env_ids)) < len(args.env_ids):
        sys.exit(f"--env-ids {' '.join(args.env_ids)}: give one or more, each once")
    if args.temperature is not None and args.temperature <= 0:
        sys.exit(f"--temperature {args.temperature}: must be above 0")
    if args.correction and args.states != "student":
        sys.exit("--correction needs --states student: it is about the states that the student comes to")
    return args


def stage_rng(args: Args, number: int, device: torch.device) -> torch.Generator:
    """Every teacher, buffer and student has random numbers of its own, whatever was trained before it."""
    seed_everything(1000 * args.seed + number, args.torch_deterministic)
    return torch.Generator(device).manual_seed(1000 * args.seed + number)


def main(args: Args) -> list[dict[str, float]]:
    """Train or load the teachers, distil the students, evaluate; returns a row for each student and task."""
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    known: dict[str, dict[str, Any]] = {}  # teachers that needn't be trained, by task
    files = (args.evaluate,) if args.evaluate else args.teacher_path
    for file in files:
        known |= read_teachers(file, args, device)
    missing = [env_id for env_id in args.env_ids if env_id not in known]
    if files and missing:
        sys.exit(f"{' '.join(files)}: no teacher for {', '.join(missing)} there")
    if args.evaluate:
        return play_all(args, load_checkpoint(args.evaluate, device), device)
    greedy = [env_id in known and known[env_id]["kind"] == "dqn" for env_id in args.env_ids]  # Q-values, not a policy
    if args.loss == "mse" and not all(greedy):
        sys.exit("--loss mse compares Q-values: give --teacher-path a file of dyna_dqn.py for each task")
    temperatures = [args.temperature or (0.01 if q_values else 1.0) for q_values in greedy]
    tasks = [Task(args, env_id, args.num_envs, device) for env_id in args.env_ids]
    shapes, actions = [task.shape for task in tasks], [task.num_actions for task in tasks]
    logger = Logger(args, new_run(f"{'+'.join(args.env_ids)}__{args.exp_name}__{args.seed}"))
    path = logger.path.with_name("agent.pt")
    state: dict[str, Any] = {"args": asdict(args), "teachers": {}, "students": {}}

    # ---- 1. The teachers, one a task
    teachers = []
    for i, (env_id, task) in enumerate(zip(args.env_ids, tasks, strict=True)):
        rng = stage_rng(args, i, device)
        if env_id not in known:
            widths = BOARD_WIDTHS if on_one_board([task.shape]) else VECTOR_WIDTHS
            teacher = PolicyNet([task.shape], [task.num_actions], widths, args.view).to(device)
            train_teacher(teacher, task, args, rng, logger)
            known[env_id] = {"kind": "actor-critic", **saved_net(teacher)}
        state["teachers"][env_id] = known[env_id]
        teachers.append(make_net(known[env_id], device))
        if args.save_model:
            save_checkpoint(path, state)

    # ---- 2. A buffer for each task: where its teacher goes, and what it says there
    buffers = []
    if args.states == "teacher":
        for i, (task, teacher) in enumerate(zip(tasks, teachers, strict=True)):
            rng, seed = stage_rng(args, 100 + i, device), 1000 * args.seed + 600
            buffers.append(fill_buffer(task, teacher, args.buffer_size, args.epsilon, greedy[i], seed, rng))

    # ---- 3. The students, one for each scale: each of them for all tasks
    total = sum(map(acting_parameters, teachers))
    for number, scale in enumerate(args.student_scale):
        rng = stage_rng(args, 200 + number, device)
        widths = student_widths(shapes, actions, int(scale * total), args.view)
        student = PolicyNet(shapes, actions, widths, args.view).to(device)
        for i, teacher in enumerate(teachers):
            if len(shapes[i]) == 1:  # the student standardises vectors as its teacher does
                student.mean[i, : teacher.width], student.std[i, : teacher.width] = teacher.mean[0], teacher.std[0]
        size = acting_parameters(student)
        print(f"student {scale:g}: {size:,} of the teachers' {total:,} parameters, widths {widths}", flush=True)
        train_student(student, scale, tasks, teachers, temperatures, buffers, args, rng, logger)
        state["students"][f"{scale:g}"] = saved_net(student)
        if args.save_model:
            save_checkpoint(path, state)

    # ---- 4. Evaluate
    rows = play_all(args, state, device)
    for row in rows:
        logger.log(args.distill_steps, row)
    logger.close()
    if args.save_model:
        print(f"to measure them again: python {sys.argv[0]} --evaluate {path}")
    return rows


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("stopped; --teacher-path runs/NAME/agent.pt goes on from the teachers that were finished")
