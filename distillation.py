"""Policy distillation: Rusu et al. 2016, arXiv 1511.06295; Czarnecki et al. 2019, arXiv 1902.02186.

A teacher is trained by reinforcement learning, then smaller students learn to copy its outputs on the states that it
visits (or that they visit themselves). One student may copy the teachers of several tasks.

Different from Rusu et al.: the teacher may be an actor-critic instead of a DQN (I2A's rollout policy copies one),
networks and tasks are small, and all tasks of a student stand in every update.

    python distillation.py                                      # Sokoban: a teacher, students of 25, 7 and 4 % of it
    python distillation.py --env-ids CartPole-v1 --teacher dqn --loss mse
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
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

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
NEEDS_Q_VALUES = "--loss mse compares Q-values: it needs teachers of --teacher dqn"


@dataclass
class Args:
    exp_name: str = pathlib.Path(__file__).stem  # the name of this experiment (of this file)
    seed: int = 1  # seed of the experiment
    torch_deterministic: bool = True  # only deterministic algorithms
    cuda: bool = True  # use a GPU if there is one
    track: bool = False  # track the run in Weights and Biases
    wandb_project_name: str = "model-based-rl"  # the Weights and Biases project
    wandb_entity: str | None = None  # the Weights and Biases team
    capture_video: bool = False  # write a GIF of an evaluation episode of each teacher and student into the run folder
    save_model: bool = True  # write agent.pt after each teacher and each student

    # Algorithm specific arguments
    env_ids: tuple[str, ...] = ("Sokoban-v0",)  # the tasks of a student
    teacher: Literal["actor-critic", "dqn"] = "actor-critic"  # what the teachers are: policies, or Q-values
    student_scale: tuple[float, ...] = (0.25, 0.07, 0.04)  # students, by share of parameters
    loss: Literal["kl", "nll", "mse"] = "kl"  # all of the policy, its best action, or Q-values
    kl_direction: Literal["forward", "reverse"] = "forward"  # teacher to student (Rusu et al.), or back
    temperature: float | None = None  # of the teacher only (None: .01 for Q-values, 1 for a policy)
    states: Literal["teacher", "student"] = "teacher"  # who visits the states
    correction: bool = False  # student's states: reward it for lower losses at later steps

    teacher_path: tuple[str, ...] = ()  # take the teachers from these agent.pt
    teacher_timesteps: int | None = None  # environment frames of each teacher (None: TEACHER_TIMESTEPS)
    num_envs: int = 32  # parallel environments
    num_steps: int = 8  # steps of a rollout: of the actor-critic teacher, and of a student that visits its own states
    gamma: float | None = None  # discount (None: .97 for Sokoban, .99 for others)
    vf_coef: float = 0.5  # weight of value losses
    learning_rate: float | None = None  # of teachers (None: 3e-3 on Sokoban, 1e-3, dqn 5e-4)
    max_grad_norm: float = 1.0  # actor-critic: gradient clipping
    ent_coef: float = 0.001  # actor-critic: entropy bonus
    reward_scale: float = 0.1  # actor-critic: its losses see rewards times this
    dqn_batch_size: int = 64  # dqn: transitions of an update
    dqn_envs: int = 1  # dqn: parallel environments
    dqn_updates: int = 4  # dqn: updates after each step of all environments
    replay_size: int = 100_000  # dqn: transitions of the replay
    learning_starts: int = 500  # dqn: frames before the first update
    exploration_fraction: float = 0.1  # dqn: share of the frames over which epsilon falls
    tau: float = 0.05  # dqn: how far an update of the target network goes

    buffer_size: int = 100_000  # states N of each task's buffer
    epsilon: float = 0.05  # probability of a random action while the teacher fills the buffer
    distill_steps: int = 6_000  # updates of a student
    batch_size: int = 256  # states of each task in an update
    distill_learning_rate: float = 1e-2  # learning rate of a student, decays linearly

    size: int = 7  # Sokoban: board size
    num_boxes: int = 1  # Sokoban: boxes
    max_episode_steps: int = 60  # Sokoban: steps after which an episode is truncated
    eval_episodes: int = 500  # episodes of an evaluation, held-out levels for Sokoban
    log_frequency: int = 1_000  # updates of a student between rows of metrics; a teacher has 20
    resume: str | None = None  # continue from this agent.pt, with its flags
    evaluate: str | None = None  # evaluate the teachers and students of this agent.pt, and stop


BOARD_WIDTHS, VECTOR_WIDTHS = (32, 32, 256), (64, 64)  # of teachers: two convolutions and a dense layer, or dense ones
TEACHER_TIMESTEPS = {  # by kind of teacher and environment; others take the first
    "actor-critic": {"default": 400_000, "Sokoban-v0": 1_500_000},
    "dqn": {"default": 10_000},
}


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


# ------------------------------------------------------------------------------------------------------ environments


class Task:
    """B copies of an environment with same-step autoreset: gymnasium's and Sokoban's under one interface."""

    def __init__(self, args: Args, env_id: str, num_envs: int, device: torch.device, levels: Tensor | None = None):
        self.device, self.num_envs, film = device, num_envs, "rgb_array" if args.capture_video else None
        try:
            if env_id == "Sokoban-v0":
                self.envs: gym.vector.VectorEnv = SokobanVectorEnv(
                    num_envs, size=args.size, num_boxes=args.num_boxes, max_episode_steps=args.max_episode_steps,
                    levels=levels, device=device, render_mode=film,
                )  # fmt: skip
            else:
                kwargs = {"vector_kwargs": {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}}
                kwargs |= {"render_mode": film} if film else {}  # an environment need not know it
                self.envs = gym.make_vec(env_id, num_envs, "sync", **kwargs)
            if film:
                self.envs.reset()
                self.envs.render()  # what is missing for it is said here
        except (gym.error.Error, ValueError, TypeError, ImportError) as e:
            sys.exit(f"can't make {env_id} of --env-ids: {str(e).splitlines()[0]}")
        actions, states = self.envs.single_action_space, self.envs.single_observation_space
        if not isinstance(actions, gym.spaces.Discrete):
            sys.exit(f"{env_id} has the action space {actions}, must be Discrete: try CartPole-v1")
        if not isinstance(states, gym.spaces.Box) or len(states.shape) != 1 + (env_id == "Sokoban-v0"):
            sys.exit(f"{env_id} has the states {states}, must be vectors: try CartPole-v1")
        self.num_actions, self.shape = int(actions.n), states.shape

    def reset(self, seed: int, **kwargs: Any) -> Tensor:
        """Observations (B, S), or (B, H, W) uint8."""
        return torch.as_tensor(self.envs.reset(seed=seed, **kwargs)[0], device=self.device)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Observations to act on, rewards, terminated, truncated, and the true next observations: before resets."""
        step = self.envs.step(actions if isinstance(self.envs, SokobanVectorEnv) else actions.cpu().numpy())
        x, reward, terminated, truncated = (torch.as_tensor(column, device=self.device) for column in step[:4])
        true_next, info = x, step[4]
        if "final_obs" in info:
            true_next, ended = x.clone(), info["_final_obs"]
            final = info["final_obs"]
            if not isinstance(final, Tensor):  # gymnasium: an array of objects, None where the episode goes on
                final, ended = np.stack(final[ended]), torch.as_tensor(ended)
            else:
                final = final[ended]
            true_next[ended] = torch.as_tensor(final, device=self.device)
        return x, reward.float(), terminated, truncated, true_next


@functools.cache
def unseen_levels(num: int, size: int, num_boxes: int) -> Tensor:
    try:
        return generate_levels(num, size=size, num_boxes=num_boxes, seed=EVAL_SEED)[0]
    except ValueError as e:
        sys.exit(str(e))


@torch.no_grad()
def play_episodes(
    args: Args, env_id: str, policy: Any, greedy: bool, device: torch.device, film: pathlib.Path | None = None
) -> dict[str, float]:
    """One episode in each of `--eval-episodes` copies: return and its standard error, share terminated (solved).

    `policy` maps observations to outputs (B, A), None is random play. Policies are sampled, Q-values acted on greedily.
    """
    levels, options = None, {}
    if env_id == "Sokoban-v0":
        levels = unseen_levels(args.eval_episodes, args.size, args.num_boxes)
        options = {"options": {"levels": levels}}
    task = Task(args, env_id, args.eval_episodes, device, levels)
    x, rng, pictures = task.reset(EVAL_SEED, **options), torch.Generator(device).manual_seed(EVAL_SEED), []
    playing = torch.ones(args.eval_episodes, dtype=torch.bool, device=device)
    returns, ended = torch.zeros(args.eval_episodes, device=device), torch.zeros_like(playing)
    while playing.any():
        if film and playing[0]:
            pictures.append(task.envs.render()[0])
        out = torch.zeros(len(x), task.num_actions, device=device) if policy is None else policy(x)
        action = out.argmax(-1) if greedy and policy is not None else sample(out, rng)
        x, reward, terminated, truncated, _ = task.step(action)
        returns += reward * playing  # what comes after an episode's end doesn't count
        ended |= terminated & playing
        playing &= ~(terminated | truncated)
    task.envs.close()
    if film:
        from PIL import Image  # comes with matplotlib

        first, *rest = [Image.fromarray(picture) for picture in pictures]
        temporary = film.with_name(film.name + ".tmp")
        first.save(temporary, format="GIF", save_all=True, append_images=rest, duration=100, loop=0)
        os.replace(temporary, film)
    error = returns.std() / args.eval_episodes**0.5 if args.eval_episodes > 1 else torch.tensor(math.nan)
    return {"return": returns.mean().item(), "error": error.item(), "terminated": ended.float().mean().item()}


# ---------------------------------------------------------------------------------------------------------- networks


class PolicyNet(nn.Module):
    """A trunk and, for each task i, a head of A_i outputs (logits or Q-values); a critic has a value head each too.

    One task of boards (H, W) has a trunk of two 3x3 convolutions and a dense layer, of the widths (c1, c2, dense).
    Else the observations, flat and zero-padded to one width, go into dense layers of `widths`.
    """

    def __init__(self, shapes: list[tuple[int, ...]], actions: list[int], widths: tuple[int, ...], critic: bool):
        super().__init__()
        self.conv = len(shapes) == 1 and len(shapes[0]) == 2
        self.width = max(math.prod(shape) * (4 if len(shape) == 2 else 1) for shape in shapes)
        if self.conv:
            c1, c2, dense = widths
            self.trunk = nn.Sequential(
                layer_init(nn.Conv2d(4, c1, 3, padding=1)), nn.ReLU(), layer_init(nn.Conv2d(c1, c2, 3, padding=1)),
                nn.ReLU(), nn.Flatten(), layer_init(nn.Linear(c2 * math.prod(shapes[0]), dense)), nn.ReLU(),
            )  # fmt: skip
        else:
            sizes, layers = (self.width, *widths), []
            for n_in, n_out in itertools.pairwise(sizes):
                layers += [layer_init(nn.Linear(n_in, n_out)), nn.ReLU()]
            self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(layer_init(nn.Linear(widths[-1], n), 0.01) for n in actions)
        self.critics = nn.ModuleList(layer_init(nn.Linear(widths[-1], 1), 1.0) for _ in actions if critic)
        self.register_buffer("mean", torch.zeros(len(shapes), self.width))
        self.register_buffer("std", torch.ones(len(shapes), self.width))

    def standardize(self, x: Tensor, task: int = 0) -> None:
        """Take the scales of vector observations (N, S); boards stay as they are, and so does what is constant."""
        if x.dtype != torch.uint8:
            std = x.std(0)
            self.mean[task, : x.shape[1]] = x.mean(0)
            self.std[task, : x.shape[1]] = torch.where(std > 1e-6, std, 1.0)

    def features(self, x: Tensor, task: int = 0) -> Tensor:
        """Observations (B, S) or (B, H, W) to what the heads read (B, last width)."""
        x = cell_planes(x) if x.dtype == torch.uint8 else x.float()  # (B, 4, H, W) or (B, S)
        if not self.conv:
            x = x.flatten(1)
            x = (F.pad(x, (0, self.width - x.shape[1])) - self.mean[task]) / self.std[task]
        return self.trunk(x)

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        """Outputs (B, A)."""
        return self.heads[task](self.features(x, task))

    def with_value(self, x: Tensor, task: int = 0, apart: bool = False) -> tuple[Tensor, Tensor]:
        """Outputs (B, A), values (B,); `apart`: the critic's gradient stops at its head."""
        features = self.features(x, task)
        read = features.detach() if apart else features
        return self.heads[task](features), self.critics[task](read).squeeze(-1)


def acting_parameters(net: PolicyNet) -> int:
    """Parameters that acting needs: all but the critic's."""
    return sum(p.numel() for name, p in net.named_parameters() if not name.startswith("critics"))


def student_widths(shapes: list[tuple[int, ...]], actions: list[int], most: int) -> tuple[int, ...]:
    """The widths of the largest student with at most `most` parameters.

    Vectors: the teacher's times f. Boards: f for the convolutions, f² for the dense layer, which holds nearly all
    parameters (in Rusu et al.'s students too, the convolutions shrink less).
    """
    boards = len(shapes) == 1 and len(shapes[0]) == 2

    def count(widths: tuple[int, ...]) -> int:
        with torch.device("meta"):
            return acting_parameters(PolicyNet(shapes, actions, widths, critic=False))

    candidates = []
    for factor in np.geomspace(0.01, 64, 2000):  # each 0.4 % above the last
        factors = (factor, factor, factor**2) if boards else (factor,) * len(VECTOR_WIDTHS)
        base = BOARD_WIDTHS if boards else VECTOR_WIDTHS
        candidates.append(tuple(max(1, round(f * width)) for f, width in zip(factors, base, strict=True)))
    if count(candidates[0]) > most:
        sys.exit(f"even a student with one unit a layer has over {most} parameters: raise --student-scale")
    return candidates[bisect.bisect_right(candidates, most, key=count) - 1]


# ---------------------------------------------------------------------------------------------------------- teachers


class TeacherLog:
    """Counts a teacher's episodes and losses, and writes 20 rows of metrics."""

    def __init__(self, logger: Logger, frames: int, first_step: int, number: int, num_envs: int, device: torch.device):
        self.logger, self.frames, self.first_step, self.number, self.done = logger, frames, first_step, number, 0
        self.running = torch.zeros(2, num_envs, device=device)  # return and length of the episodes under way
        self.ended, self.sums, self.updates, self.start = torch.zeros(3, device=device), {}, 0, time.time()
        self.bar = tqdm(total=frames, unit=" frames", disable=not sys.stderr.isatty())

    def __call__(self, rewards: Tensor, done: Tensor, losses: dict[str, Tensor]) -> None:
        """Rewards and ends (T, B) of a rollout, and the losses of its update, if there was one."""
        for reward, end in zip(rewards, done, strict=True):
            self.running += torch.stack([reward, torch.ones_like(reward)])
            self.ended += torch.stack([*(self.running * end).sum(1), end.sum()])
            self.running *= ~end
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        self.updates += bool(losses)
        before, self.done = self.done, self.done + rewards.numel()
        self.bar.update(rewards.numel())
        if 20 * self.done // self.frames == 20 * before // self.frames:
            return
        metrics = {"charts/task": self.number, "charts/SPS": self.done / (time.time() - self.start)}
        total_return, total_length, episodes = self.ended.tolist()
        if episodes:
            metrics |= {"charts/episodic_return": total_return / episodes}
            metrics |= {"charts/episodic_length": total_length / episodes}
        metrics |= {f"losses/{name}": value.item() / self.updates for name, value in self.sums.items()}
        self.logger.log(self.first_step + self.done, metrics)
        self.ended.zero_()
        self.sums, self.updates = {}, 0


@torch.no_grad()
def true_next_values(
    net: PolicyNet, task: int, values: Tensor, last: Tensor, true_next: Tensor, truncated: Tensor
) -> Tensor:
    """V(s_{t+1}) of the true next states (T, B): known values where an episode goes on, new ones where it was cut."""
    next_values = torch.cat([values[1:], net.with_value(last, task)[1][None]])
    t, b = truncated.nonzero(as_tuple=True)
    if len(t):
        next_values[t, b] = net.with_value(true_next[t, b], task)[1]
    return next_values


def train_actor_critic(
    net: PolicyNet, task: Task, args: Args, frames: int, learning_rate: float, gamma: float, rng: torch.Generator,
    log: TeacherLog,
) -> None:  # fmt: skip
    """Advantage actor-critic with n-step returns; `net` learns in place."""
    x = task.reset(1000 * args.seed)
    optimizer = torch.optim.Adam(net.parameters(), learning_rate, eps=1e-5)
    for _ in range(frames // (args.num_envs * args.num_steps)):
        steps = []
        for _ in range(args.num_steps):
            logits, value = net.with_value(x)  # with its graph: the policy stays as it is until the update
            action = sample(logits.detach(), rng)
            x, reward, terminated, truncated, true_next = task.step(action)
            steps.append((action, reward, terminated, truncated, true_next, logits, value))
        actions, rewards, terminated, truncated, true_next, logits, values = map(torch.stack, zip(*steps, strict=True))
        next_values = true_next_values(net, 0, values, x, true_next, truncated)
        advantages = generalized_advantages(
            args.reward_scale * rewards, values.detach(), next_values, terminated, terminated | truncated, gamma, 1.0
        )
        policy_loss, value_loss, entropy = actor_critic_losses(logits, values, actions, advantages)
        optimizer.zero_grad(set_to_none=True)
        (policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy).backward()
        nn.utils.clip_grad_norm_(net.parameters(), args.max_grad_norm)
        optimizer.step()
        losses = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
        log(rewards, terminated | truncated, losses)


def double_q_loss(
    net: nn.Module, target_net: nn.Module, rows: tuple[Tensor, ...], gamma: float
) -> tuple[Tensor, Tensor]:
    """Means of (r + γ (1 - end) Q'(s', argmax_a Q(s', a)) - Q(s, a))² and of Q(s, a)."""
    x, action, reward, end, following = rows
    q, next_q = net(torch.cat([x, following])).chunk(2)  # (B, A) each
    with torch.no_grad():
        best = next_q.argmax(-1, keepdim=True)
        target = reward + gamma * ~end * target_net(following).gather(-1, best).squeeze(-1)
    q = q.gather(-1, action[:, None]).squeeze(-1)
    return F.mse_loss(q, target), q.detach().mean()


def train_dqn(
    net: PolicyNet, target_net: PolicyNet, task: Task, args: Args, frames: int, learning_rate: float, gamma: float,
    rng: torch.Generator, log: TeacherLog,
) -> None:  # fmt: skip
    """Double DQN with `--dqn-updates` after each step of all environments; `net` learns in place."""
    B, device = task.num_envs, task.device
    x = task.reset(1000 * args.seed)
    size = max(1, args.replay_size // B) * B  # a multiple of B: a step's rows never wrap round
    replay = (
        x.new_zeros(size, *x.shape[1:]), torch.zeros(size, dtype=torch.int64, device=device),
        torch.zeros(size, device=device), torch.zeros(size, dtype=torch.bool, device=device),
        x.new_zeros(size, *x.shape[1:]),
    )  # fmt: skip
    target_net.load_state_dict(net.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), learning_rate, fused=True)
    for step in range(frames // B):
        epsilon = max(0.05, 1 - 0.95 * step * B / max(1.0, args.exploration_fraction * frames))
        with torch.no_grad():
            action = explored(net(x).argmax(-1), task.num_actions, epsilon, rng)
        following, reward, terminated, truncated, true_next = task.step(action)
        at = step * B % size
        # `end` is the termination only: a truncation doesn't stop the bootstrap
        for column, value in zip(replay, (x, action, reward, terminated, true_next), strict=True):
            column[at : at + B] = value
        x, losses = following, {}
        if (step + 1) * B > args.learning_starts:
            known = min((step + 1) * B, size)
            if step % 100 == 0:
                for network in (net, target_net):
                    network.standardize(replay[0][:known])
            for _ in range(args.dqn_updates):
                index = torch.randint(known, (args.dqn_batch_size,), generator=rng, device=device)
                loss, q_values = double_q_loss(net, target_net, tuple(column[index] for column in replay), gamma)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                for target, parameter in zip(target_net.parameters(), net.parameters(), strict=True):
                    target.lerp_(parameter, args.tau)
            losses = {"td_loss": loss, "q_values": q_values}
        log(reward[None], (terminated | truncated)[None], losses)


def explored(action: Tensor, num_actions: int, epsilon: float, rng: torch.Generator) -> Tensor:
    """The actions (B,), each replaced by a random one with probability ε."""
    explore = torch.rand(action.shape, generator=rng, device=action.device) < epsilon
    return torch.where(explore, torch.randint(num_actions, action.shape, generator=rng, device=action.device), action)


# ------------------------------------------------------------------------------------------------------- distillation


class StateBuffer:
    """The states (N, ...) of a task, and its teacher's outputs (N, A) there."""

    def __init__(self, states: Tensor, outputs: Tensor) -> None:
        self.states, self.outputs = states, outputs

    def draw(self, num: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """`num` of them, uniformly over the whole buffer."""
        index = torch.randint(len(self.states), (num,), generator=rng, device=self.states.device)
        return self.states[index], self.outputs[index]


@torch.no_grad()
def visited_states(
    task: Task, teacher: Any, num: int, epsilon: float, greedy: bool, seed: int, rng: torch.Generator
) -> Tensor:
    """About `num` states (N, ...) that the teacher visits, with random actions mixed in."""
    x, states = task.reset(seed), []
    for _ in range(math.ceil(num / task.num_envs)):
        states.append(x)
        out = teacher(x)
        action = out.argmax(-1) if greedy else sample(out, rng)
        x, *_ = task.step(explored(action, task.num_actions, epsilon, rng))
    return torch.cat(states)


def distillation_losses(student: Tensor, teacher: Tensor, loss: str, direction: str, temperature: float) -> Tensor:
    """Rusu et al.'s losses, (B,), of outputs (B, A): logits, or Q-values q. Only the student's have a gradient.

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


def cross_entropies(student: Tensor, teacher: Tensor, direction: str, temperature: float) -> Tensor:
    """H×(π‖π̂) = -Σ_a π log π̂, or `reverse`, H×(π̂‖π), (B,): what Czarnecki et al.'s corrected updates minimise."""
    log_pi, log_pi_hat = (teacher.detach() / temperature).log_softmax(-1), student.log_softmax(-1)
    return -(log_pi_hat.exp() * log_pi if direction == "reverse" else log_pi.exp() * log_pi_hat).sum(-1)


def corrected_loss(
    losses: Tensor, logits: Tensor, values: Tensor, next_values: Tensor, actions: Tensor, terminated: Tensor,
    done: Tensor, gamma: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Czarnecki et al.'s theorem 2: the loss whose gradient is that of E_π̂[Σ_t ℓ(s_t)], and the value loss.

    The states depend on the student too: ∇ E_π̂[Σ_t ℓ_t] = E_π̂[Σ_t ∇ℓ_t - ∇log π̂(a_t|s_t) R̂_t], R̂_t = Σ_{i>=t} r̂_i with
    r̂_i = -ℓ_{i+1}. Here the reward of step t is -ℓ_t, which adds to R̂_t what a_t doesn't change: no bias, and the
    critic learns the same sum, V(s_t) = -Σ_{i>=t} γ^{i-t} ℓ_i. All (T, B), logits (T, B, A).
    """
    advantages = generalized_advantages(-losses.detach(), values.detach(), next_values, terminated, done, gamma, 1.0)
    policy_loss, value_loss, _ = actor_critic_losses(logits, values, actions, advantages)
    return losses.mean() + policy_loss, value_loss


def check_distillation(args: Args) -> None:
    """Refuse flags that can't work, before anything is written."""
    for name in (
        "num_envs", "num_steps", "buffer_size", "distill_steps", "batch_size", "eval_episodes", "log_frequency",
        "dqn_envs", "dqn_updates", "dqn_batch_size", "replay_size",
    ):  # fmt: skip
        if getattr(args, name) < 1:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    doubled = len(set(args.env_ids)) < len(args.env_ids)
    for wrong, message in (
        (not args.env_ids or doubled, f"--env-ids {' '.join(args.env_ids)}: give one or more, each once"),
        (
            not args.student_scale or not all(0 < scale < math.inf for scale in args.student_scale),
            "--student-scale: give one or more shares above 0",
        ),
        (
            args.temperature is not None and not 0 < args.temperature < math.inf,
            f"--temperature {args.temperature}: must be above 0, and finite",
        ),
        (not 0 <= args.seed < 4_000_000, f"--seed {args.seed}: must be from 0 to 3,999,999"),
        (args.teacher_timesteps is not None and args.teacher_timesteps < 1, "--teacher-timesteps: must be 1 or more"),
        (args.learning_rate is not None and not args.learning_rate > 0, "--learning-rate: must be above 0"),
        (not args.distill_learning_rate > 0, "--distill-learning-rate: must be above 0"),
        (not args.max_grad_norm > 0, "--max-grad-norm: must be above 0"),
        (not 0 < args.tau <= 1, f"--tau {args.tau}: must be above 0 and at most 1"),
        (not 0 <= args.epsilon <= 1, f"--epsilon {args.epsilon}: must be from 0 to 1"),
        (args.gamma is not None and not 0 <= args.gamma <= 1, f"--gamma {args.gamma}: must be from 0 to 1"),
        (args.loss == "mse" and args.teacher != "dqn" and not args.teacher_path, NEEDS_Q_VALUES),
        (args.correction and args.states != "student", "--correction needs --states student"),
        (args.correction and args.loss != "kl", "--correction is for --loss kl"),
    ):  # fmt: skip
        if wrong:
            sys.exit(message)


def main(args: Args) -> list[dict[str, Any]]:
    """Train or load the teachers, distil the students, evaluate; returns a row for each student and task."""
    check_distillation(args)
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    path = args.evaluate or args.resume
    if path:
        state = load_checkpoint(path, device)
        if not {"teachers", "students", "run_name"} <= set(state):
            sys.exit(f"{path} is of another script or version: give an agent.pt of this distillation.py")
        args = resumed_args(args, path)
    else:
        state = {"args": asdict(args), "run_name": "", "teachers": {}, "students": {}}
        state |= {"global_step": 0, "rows": []}
    for teacher_path in () if path else args.teacher_path:
        saved = load_checkpoint(teacher_path, device)
        same = ("size", "num_boxes", "max_episode_steps") if "Sokoban-v0" in saved.get("teachers", {}) else ()
        if wrong := [name for name in same if saved["args"].get(name) != getattr(args, name)]:
            sys.exit(f"{teacher_path} has another --{wrong[0].replace('_', '-')}: {saved['args'].get(wrong[0])}")
        state["teachers"] |= {k: v for k, v in saved.get("teachers", {}).items() if k in args.env_ids}
    if args.teacher_path and (missing := set(args.env_ids) - set(state["teachers"])):
        sys.exit(f"--teacher-path {' '.join(args.teacher_path)}: no teacher for {' '.join(sorted(missing))}")
    kinds = [state["teachers"].get(env_id, {"kind": args.teacher})["kind"] for env_id in args.env_ids]
    dqn = [kind == "dqn" for kind in kinds]
    if args.loss == "mse" and not all(dqn):
        sys.exit(NEEDS_Q_VALUES)
    temperatures = [args.temperature or (0.01 if q_values else 1.0) for q_values in dqn]
    discounts = [
        {"Sokoban-v0": 0.97}.get(env_id, 0.99) if args.gamma is None else args.gamma for env_id in args.env_ids
    ]
    tasks = [Task(args, env_id, args.num_envs, device) for env_id in args.env_ids]
    shapes, actions = [task.shape for task in tasks], [task.num_actions for task in tasks]
    if not path:
        state["run_name"] = new_run(f"{'+'.join(args.env_ids)}__{args.exp_name}__{args.seed}")
    folder = pathlib.Path(args.evaluate).parent if args.evaluate else pathlib.Path("runs") / state["run_name"]
    logger = None if args.evaluate else Logger(args, state["run_name"], state["rows"])

    def save() -> None:
        state["rows"] = logger.rows
        if args.save_model:
            save_checkpoint(folder / "agent.pt", state)

    def begin_stage(number: int) -> torch.Generator:
        """Every teacher and student has random numbers of its own: a resumed run is the uninterrupted one."""
        seed_everything(1000 * args.seed + number, args.torch_deterministic)
        return torch.Generator(device).manual_seed(1000 * args.seed + number)

    def evaluated(i: int, policy: Any, name: str) -> dict[str, float]:
        film = folder / f"{args.env_ids[i]}_{name}.gif" if args.capture_video else None
        return play_episodes(args, args.env_ids[i], policy, dqn[i], device, film)

    # ---- 1. The teachers, one a task
    teachers = []
    for i, (env_id, task) in enumerate(zip(args.env_ids, tasks, strict=True)):
        rng, known = begin_stage(i), state["teachers"].get(env_id)
        conv = len(task.shape) == 2
        widths = tuple(known["widths"]) if known else BOARD_WIDTHS if conv else VECTOR_WIDTHS
        teacher, target_net = (
            PolicyNet([task.shape], [task.num_actions], widths, not dqn[i]).to(device) for _ in range(2)
        )
        teachers.append(teacher)
        if known:
            teacher.load_state_dict(known["network"])
            continue
        if args.evaluate:
            sys.exit(f"{args.evaluate} has no teacher for {env_id} yet: --resume it first")
        table = TEACHER_TIMESTEPS[kinds[i]]
        num_envs, num_steps = (args.dqn_envs, 1) if dqn[i] else (args.num_envs, args.num_steps)
        rollout, own_task = num_envs * num_steps, Task(args, env_id, num_envs, device)
        frames = math.ceil((args.teacher_timesteps or table.get(env_id, table["default"])) / rollout) * rollout
        begun, log = time.time(), TeacherLog(logger, frames, state["global_step"], i, num_envs, device)
        learning_rate = args.learning_rate or (5e-4 if dqn[i] else 3e-3 if conv else 1e-3)
        settings = (own_task, args, frames, learning_rate, discounts[i], rng, log)
        if dqn[i]:
            train_dqn(teacher, target_net, *settings)
        else:
            train_actor_critic(teacher, *settings)
        state["global_step"] += frames
        known = {"kind": kinds[i], "widths": list(widths), "network": teacher.state_dict()}
        known["minutes"] = (time.time() - begun) / 60
        known |= {"random": evaluated(i, None, "random"), "teacher": evaluated(i, teacher, "teacher")}
        state["teachers"][env_id] = known
        save()

    # ---- 2. A buffer for each task: what its teacher says where it goes
    buffers = []
    for i, (task, teacher) in enumerate(zip(tasks, teachers, strict=True)):
        if args.states == "teacher" and not args.evaluate and len(state["students"]) < len(args.student_scale):
            rng = begin_stage(100 + i)
            x = visited_states(task, teacher, args.buffer_size, args.epsilon, dqn[i], 1000 * args.seed + 600, rng)
            with torch.no_grad():
                buffers.append(StateBuffer(x, torch.cat([teacher(part) for part in x.split(4096)])))

    # ---- 3. The students, one for each scale: each of them for all tasks
    total = sum(map(acting_parameters, teachers))
    rows: list[dict[str, Any]] = []
    for number, scale in enumerate(args.student_scale):
        rng, known = begin_stage(200 + number), state["students"].get(f"{scale:g}")
        widths = tuple(known["widths"]) if known else student_widths(shapes, actions, int(scale * total))
        student = PolicyNet(shapes, actions, widths, critic=args.correction).to(device)
        for i, teacher in enumerate(teachers):  # the student reads states in its teacher's units
            student.mean[i, : teacher.width], student.std[i, : teacher.width] = teacher.mean[0], teacher.std[0]
        size = acting_parameters(student)
        print(f"student {scale:g}: {size:,} of the teachers' {total:,} parameters, widths {widths}", flush=True)
        if known:
            student.load_state_dict(known["network"])
        elif args.evaluate:
            continue
        optimizer = torch.optim.Adam(student.parameters(), args.distill_learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / args.distill_steps)
        observations = [task.reset(1000 * args.seed + 700) for task in tasks]
        sums, begun = torch.zeros(2, device=device), time.time()
        steps = range(0 if known else args.distill_steps)
        for step in tqdm(steps, desc=f"student {scale:g}", disable=not sys.stderr.isatty()):
            loss = torch.zeros(2, device=device)  # of distillation, and of the student's critic: means over the tasks
            for i, (task, teacher) in enumerate(zip(tasks, teachers, strict=True)):
                if args.states == "teacher":
                    x, target = buffers[i].draw(args.batch_size, rng)
                    losses = distillation_losses(student(x, i), target, args.loss, args.kl_direction, temperatures[i])
                    loss = loss + torch.stack([losses.mean(), torch.zeros_like(losses[0])]) / len(tasks)
                    continue
                # The student acts: a_t ~ π̂(s_t), and learns where it comes to
                rollout = []
                for _ in range(args.num_steps):
                    x = observations[i]
                    # apart: sums of divergences are large, and the trunk is the policy's
                    both = student.with_value(x, i, apart=True) if args.correction else (student(x, i), x.new_zeros(()))
                    logits, value = both
                    action = sample(logits.detach(), rng)
                    observations[i], _, terminated, truncated, true_next = task.step(action)
                    rollout.append((x, logits, value, action, terminated, truncated, true_next))
                x, logits, values, action, terminated, truncated, true_next = map(
                    torch.stack, zip(*rollout, strict=True)
                )  # (T, B, ...)
                with torch.no_grad():
                    target = teacher(x.flatten(0, 1)).view_as(logits)
                if args.correction:
                    losses = cross_entropies(logits, target, args.kl_direction, temperatures[i])
                    next_values = true_next_values(student, i, values, observations[i], true_next, truncated)
                    distill_loss, value_loss = corrected_loss(
                        losses, logits, values, next_values, action, terminated, terminated | truncated, discounts[i]
                    )
                else:
                    losses = distillation_losses(logits, target, args.loss, args.kl_direction, temperatures[i])
                    distill_loss, value_loss = losses.mean(), torch.zeros_like(loss[0])
                loss = loss + torch.stack([distill_loss, value_loss]) / len(tasks)
            optimizer.zero_grad(set_to_none=True)
            (loss[0] + args.vf_coef * loss[1]).backward()
            if args.correction:  # a policy gradient, as the teacher's
                nn.utils.clip_grad_norm_(student.parameters(), args.max_grad_norm)
            optimizer.step()
            schedule.step()
            sums += loss.detach()
            if (step + 1) % args.log_frequency == 0 or step + 1 == args.distill_steps:
                count = step % args.log_frequency + 1
                metrics = {"charts/student_scale": scale, "losses/distillation": sums[0].item() / count}
                if args.correction:
                    metrics["losses/student_value"] = sums[1].item() / count
                metrics["charts/updates_per_second"] = (step + 1) / (time.time() - begun)
                logger.log(state["global_step"] + step + 1, metrics)
                sums.zero_()
        seconds = known["seconds"] if known else time.time() - begun

        # ---- 4. Evaluate: the score is 0 for random play, 1 for the teacher
        for i, env_id in enumerate(args.env_ids):
            taught = state["teachers"][env_id]
            own = evaluated(i, functools.partial(student, task=i), f"student_{scale:g}")
            low, high = taught["random"]["return"], taught["teacher"]["return"]
            row = {"env_id": env_id, "scale": scale, "student_parameters": size, "teacher_parameters": total}
            row |= {"random": low, "teacher": high, "student": own["return"], "student_error": own["error"]}
            row |= {"score": (own["return"] - low) / (high - low) if high != low else math.nan}
            row |= {"teacher_terminated": taught["teacher"]["terminated"], "student_terminated": own["terminated"]}
            row |= {"teacher_minutes": taught["minutes"], "student_seconds": seconds}
            rows.append(row)
            print(
                f"{env_id}: random {low:.4g}, teacher {high:.4g}, student {own['return']:.4g} ± "
                f"{1.96 * own['error']:.2g}, score {row['score']:.3f}", flush=True,
            )  # fmt: skip
        if not known:
            state["global_step"] += args.distill_steps
            scores = [row["score"] for row in rows if row["scale"] == scale]
            logger.log(state["global_step"], {"charts/student_scale": scale, "eval/score": sum(scores) / len(scores)})
            network = {"widths": list(widths), "network": student.state_dict(), "seconds": seconds}
            state["students"][f"{scale:g}"] = network
            save()
    if logger:
        if args.save_model:
            print(f"wrote {folder / 'agent.pt'}")
        logger.close()
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args))
