"""Neural Dyna-Q: a double DQN whose extra updates come out of a learned model. Sutton 1990 (Dyna); Mnih et al. 2015
(DQN); van Hasselt et al. 2016 (double DQN, arXiv 1509.06461); van Hasselt, Hessel & Aslanides 2019 (arXiv 1906.05243).

After each real step: one update of Q on replayed real transitions, then K more. `--planning replay` takes the K from
the replay too (DQN with as many updates: the fair baseline), `model` imagines them: a network M(s, a) predicts Δs, r
and termination, the states come from the replay, the actions from Q. `none` is DQN.

Different from tabular Dyna-Q: updates are minibatches with a target network, and the K batches of one real step are
imagined in one go, with the Q from before them.

    python dyna_dqn.py --num-seeds 10                               # CartPole-v1, K = 7 imagined updates a real step
    python dyna_dqn.py --planning replay --env-id Acrobot-v1        # the equal-updates baseline
    python dyna_dqn.py --env-id Sokoban-v0 --total-timesteps 20000  # one generated 5x5 level with one box
    python dyna_dqn.py --evaluate runs/NAME/agent.pt

A small network costs what it takes to start an operation, not the arithmetic. So `--num-seeds E` trains E runs in
lockstep, each tensor with an axis for the run: ten seeds take a quarter of the time of ten runs.

Shapes: `E` runs, `B` batch, `K` planning steps, `D` imagination depth, `A` actions, `S` features of a state, `N` size
of the replay, `T` steps of an episode. A row is a transition (s, s', a, r, end): `R` = 2S + 3 numbers.
"""

import contextlib
import csv
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

import sokoban_env


@dataclass
class Args:
    exp_name: str = pathlib.Path(__file__).stem  # the name of this experiment (of this file)
    seed: int = 1  # seed of the experiment
    torch_deterministic: bool = True  # only deterministic algorithms
    cuda: bool = True  # use a GPU if there is one
    track: bool = False  # track the run in Weights and Biases
    wandb_project_name: str = "model-based-rl"  # the Weights and Biases project
    wandb_entity: str | None = None  # the Weights and Biases team
    capture_video: bool = False  # film episodes into videos/<run_name>
    save_model: bool = False  # write runs/<run_name>/agent.pt at every evaluation: for --evaluate and --resume

    # Algorithm specific arguments
    num_seeds: int = 1  # independent runs E in lockstep, with seeds from --seed on
    env_id: str = "CartPole-v1"  # a gymnasium environment with vector states and discrete actions, or Sokoban-v0
    total_timesteps: int = 4000  # real steps
    planning: Literal["none", "replay", "model"] = "model"  # where further updates come from
    planning_steps: int = 7  # further updates K
    planning_epsilon: float = 0.5  # probability of a random action in imagination
    imagination_depth: int = 1  # steps D that the model is fed its own predictions
    learning_rate: float = 5e-4  # learning rate of Q
    buffer_size: int = 100_000  # transitions N of the replay
    gamma: float = 0.99  # discount
    tau: float = 0.05  # how far an update of the target network goes
    target_network_frequency: int = 1  # real steps between updates of the target network
    batch_size: int = 64  # transitions B of an update
    start_e: float = 1.0  # probability of a random action at the start
    end_e: float = 0.05  # and in the end
    exploration_fraction: float = 0.25  # share of the real steps over which it falls
    learning_starts: int = 500  # real steps before the first update
    train_frequency: int = 1  # real steps between updates
    double: bool = True  # double DQN; --no-double: DQN
    hidden: tuple[int, ...] = (64, 64)  # units of Q's hidden layers
    standardize: bool = True  # let Q read states in units of their spread in the replay
    model_hidden: tuple[int, ...] = (64, 64)  # units of the model's hidden layers
    model_learning_rate: float = 1e-3  # learning rate of the model
    model_batch_size: int = 128  # transitions of an update of the model
    model_updates: int = 2  # updates of the model after each real step
    size: int = 5  # Sokoban: board size
    num_boxes: int = 1  # Sokoban: boxes
    num_levels: int = 1  # Sokoban: generated levels to learn on (0: ever new ones)
    eval_frequency: int = 500  # real steps between evaluations of the greedy policy, each a row of metrics
    eval_episodes: int = 10  # episodes of an evaluation
    stop_return: float | None = None  # stop once an evaluation of every run has reached this mean return
    resume: str | None = None  # continue from this agent.pt, with its flags and a new episode
    evaluate: str | None = None  # evaluate the greedy policy of this agent.pt, and stop


# ---------------------------------------------------------------------------------- utilities, the same in every script


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python, numpy and torch; with `deterministic`, let torch use deterministic algorithms only."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.deterministic = deterministic


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


# `cells` as four planes (wall, target, box, player), one row a cell value: lossless, and fewer than one-hot's seven
CELL_PLANES = ((1, 0, 0, 0), (0, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 1, 1, 0), (0, 0, 0, 1), (0, 1, 0, 1))


@functools.cache
def cell_table(device: torch.device) -> Tensor:
    """CELL_PLANES on the device, copied there once."""
    return torch.tensor(CELL_PLANES, dtype=torch.float32, device=device)


def cell_planes(cells: Tensor) -> Tensor:
    """Boards (..., H, W) of uint8 cells to network input (..., 4, H, W), float32 (channels last in memory: faster)."""
    return F.embedding(cells.int(), cell_table(cells.device)).movedim(-1, -3)


# ------------------------------------------------------------------------------------------------------ environments


def make_feature_env(args: Args, video: str | None = None) -> gym.Env:
    """The environment of `args`, refused unless its states are vectors or Sokoban's cells, and its actions discrete."""
    kwargs: dict[str, Any] = {"render_mode": "rgb_array"} if video else {}
    try:
        if args.env_id == "Sokoban-v0":
            kwargs |= {"size": args.size, "num_boxes": args.num_boxes}
            if args.num_levels:
                size = {"size": args.size, "num_boxes": args.num_boxes}
                kwargs["levels"], _ = sokoban_env.generate_levels(args.num_levels, seed=1, **size)
        env = gym.make(args.env_id, disable_env_checker=True, **kwargs)
        if video:
            env.reset()
            env.render()  # what is missing for it is said here
            env = gym.wrappers.RecordVideo(env, video)
    except (gym.error.Error, ValueError, TypeError, ImportError) as e:
        sys.exit(f"can't make --env-id {args.env_id}: {str(e).splitlines()[0]}")
    if not isinstance(env.action_space, gym.spaces.Discrete):
        sys.exit(f"{args.env_id} has the action space {env.action_space}, DQN needs a Discrete one: try CartPole-v1")
    states = env.observation_space
    cells = args.env_id == "Sokoban-v0"
    if not cells and not (isinstance(states, gym.spaces.Box) and len(states.shape) == 1):
        sys.exit(f"{args.env_id} has the states {states}, dyna_dqn.py needs vectors: for discrete ones take dyna_q.py")
    return env


def state_features(observations: Any, device: torch.device) -> Tensor:
    """Observations (E, ...) as features (E, S): vectors as they are, Sokoban's cells as planes."""
    observations = torch.as_tensor(np.asarray(observations), device=device)
    return cell_planes(observations).flatten(1) if observations.ndim == 3 else observations.float()


@torch.no_grad()
def greedy_rollouts(
    envs: list[gym.Env], q_net: nn.Module, num_runs: int, device: torch.device, seed: int
) -> tuple[np.ndarray, Tensor, Tensor]:
    """One greedy episode in each environment, as many for each of the E runs.

    Returns:
        returns (E, episodes), the rows (E, T, R) of each run's first episode, and which of them it had (E, T).
    """
    observations = [env.reset(seed=seed + i)[0] for i, env in enumerate(envs)]
    returns, running, rows, masks = np.zeros(len(envs)), np.ones(len(envs), dtype=bool), [], []
    firsts = slice(None, None, len(envs) // num_runs)
    s = state_features(observations, device)  # (E * episodes, S)
    while running.any():
        actions = q_net(s.unflatten(0, (num_runs, -1))).argmax(-1).flatten()  # (E * episodes,)
        rewards, ends, before = np.zeros(len(envs)), np.zeros(len(envs)), running.copy()
        for i, a in enumerate(actions.tolist()):
            if running[i]:
                observations[i], rewards[i], terminated, truncated, _ = envs[i].step(a)
                ends[i], running[i] = terminated, not (terminated or truncated)
        returns += rewards
        s2 = state_features(observations, device)
        last = torch.as_tensor(np.stack([rewards, ends], 1), dtype=torch.float32, device=device)
        rows.append(torch.cat([s, s2, actions[:, None], last], 1)[firsts])
        masks.append(torch.as_tensor(before[firsts]))
        s = s2
    return returns.reshape(num_runs, -1), torch.stack(rows, 1), torch.stack(masks, 1).to(device)


# ---------------------------------------------------------------------------------------------------------- networks


class RunsMLP(nn.Module):
    """E multilayer perceptrons with ReLUs, one for each run: (E, B, in) -> (E, B, out). Initialised like nn.Linear.

    Inputs are standardised by `mean` and `std`, which are 0 and 1 until `standardize` sets them.
    """

    def __init__(self, num_runs: int, sizes: list[int]) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n_in, n_out in itertools.pairwise(sizes):
            bound = n_in**-0.5
            self.weights.append(torch.empty(num_runs, n_in, n_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(num_runs, 1, n_out).uniform_(-bound, bound))
        self.register_buffer("mean", torch.zeros(num_runs, 1, sizes[0]))
        self.register_buffer("std", torch.ones(num_runs, 1, sizes[0]))

    def standardize(self, s: Tensor) -> None:
        """Take the scales of the first S inputs from states (E, B, S). A feature that is constant keeps the scale 1."""
        self.mean[..., : s.shape[-1]] = s.mean(1, keepdim=True)
        self.std[..., : s.shape[-1]] = spread(s)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x.relu() if i else x, weight)
        return x


def spread(x: Tensor) -> Tensor:
    """Standard deviations (E, 1, S) of x (E, B, S); 1 where nothing varies."""
    std = x.std(1, keepdim=True)
    return torch.where(std > 1e-6, std, 1.0)


class DeltaModel(nn.Module):
    """M(s, a): a network for Δs (in units of its own spread) and r, and one for the logit of termination.

    The second one reads s': where a step leads decides whether it ends the episode, and ends are too rare to be learned
    from (s, a).
    """

    def __init__(self, num_runs: int, num_features: int, num_actions: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.net = RunsMLP(num_runs, [num_features + num_actions, *hidden, num_features + 1])
        self.end_net = RunsMLP(num_runs, [num_features, *hidden, 1])
        self.num_actions = num_actions
        self.register_buffer("delta_std", torch.ones(num_runs, 1, num_features))

    def standardize(self, s: Tensor, s2: Tensor) -> None:
        """Take the scales of states and changes from rows of the replay (E, B, S)."""
        self.net.standardize(s)
        self.end_net.standardize(s)
        self.delta_std.copy_(spread(s2 - s))

    def forward(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """s (E, B, S), a (E, B) -> Δs / its spread (E, B, S), r (E, B)."""
        y = self.net(torch.cat([s, F.one_hot(a, self.num_actions)], -1))  # (E, B, S + 1)
        return y[..., :-1], y[..., -1]

    def end_logit(self, s2: Tensor) -> Tensor:
        """s' (E, B, S) -> (E, B)."""
        return self.end_net(s2).squeeze(-1)


# --------------------------------------------------------------------------------------------------------- algorithm


def split_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows (E, B, R) to s (E, B, S), a (E, B) int64, r (E, B), s' (E, B, S), end (E, B)."""
    S = (rows.shape[-1] - 3) // 2
    return rows[..., :S], rows[..., -3].long(), rows[..., -2], rows[..., S : 2 * S], rows[..., -1]


def dqn_loss(
    q_net: nn.Module, target_net: nn.Module, rows: Tensor, weight: Tensor | None, gamma: float, double: bool
) -> tuple[Tensor, Tensor]:
    """Means (E,) of (r + γ (1 - end) Q'(s', a*) - Q(s, a))² and of Q(s, a), with a* = argmax_a Q(s', a).

    Not `double`: a* = argmax_a Q'(s', a). `end` may be a probability; it is 0 at a truncation, which doesn't stop the
    bootstrap.
    """
    s, a, r, s2, end = split_rows(rows)
    with torch.no_grad():
        next_q = target_net(s2)  # (E, B, A)
        best = (q_net(s2) if double else next_q).argmax(-1, keepdim=True)
        target = r + gamma * (1 - end) * next_q.gather(-1, best).squeeze(-1)
    q = q_net(s).gather(-1, a[..., None]).squeeze(-1)
    error = (q - target) ** 2
    return (error if weight is None else error * weight).mean(1), q.detach().mean(1)


def delta_model_loss(env_model: DeltaModel, rows: Tensor) -> Tensor:
    """Squared errors of Δs (in units of its spread) and r, and the cross-entropy of termination; means (E,), added."""
    s, a, r, s2, end = split_rows(rows)
    delta, reward = env_model(s, a)
    delta_loss = ((delta - (s2 - s) / env_model.delta_std) ** 2).mean((1, 2))
    end_loss = F.binary_cross_entropy_with_logits(env_model.end_logit(s2), end, reduction="none").mean(1)
    return delta_loss + ((reward - r) ** 2).mean(1) + end_loss


@torch.no_grad()
def imagine_rows(
    q_net: nn.Module, env_model: DeltaModel, s: Tensor, depth: int, epsilon: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rows (E, D * B, R) imagined from states (E, B, S), acting ε-greedily by Q, and their weights (E, D * B).

    A weight is the probability that the imagined episode got as far as this step.
    """
    rows, weights, weight = [], [], torch.ones(s.shape[:2], device=s.device)
    for _ in range(depth):
        q = q_net(s)  # (E, B, A)
        explore = torch.rand(s.shape[:2], generator=rng, device=s.device) < epsilon
        random_action = torch.randint(q.shape[-1], s.shape[:2], generator=rng, device=s.device)
        a = torch.where(explore, random_action, q.argmax(-1))
        delta, r = env_model(s, a)  # s', r, end = M(s, a)
        s2 = s + delta * env_model.delta_std
        end = env_model.end_logit(s2).sigmoid()
        rows.append(torch.cat([s, s2, torch.stack([a.float(), r, end], -1)], -1))
        weights.append(weight)
        s, weight = s2, weight * (1 - end)
    return torch.cat(rows, 1), torch.cat(weights, 1)


@torch.no_grad()
def model_errors(env_model: DeltaModel, rows: Tensor, mask: Tensor) -> dict[str, list[float]]:
    """What each run's model gets wrong on rows (E, T, R) that it never learned from, where `mask` (E, T) says so.

    A delta_error of 1 is about that of a model in which nothing moves.
    """
    s, a, r, s2, end = split_rows(rows)
    delta, reward = env_model(s, a)
    wrong = (env_model.end_logit(s + delta * env_model.delta_std) > 0) != (end > 0)
    squares = (((delta - (s2 - s) / env_model.delta_std) ** 2).mean(-1), (reward - r) ** 2, wrong.float())
    delta_error, reward_error, end_error = ((x * mask).sum(1) / mask.sum(1) for x in squares)  # (E,) each
    return {
        "model/delta_error": delta_error.sqrt().tolist(),
        "model/reward_error": reward_error.sqrt().tolist(),
        "model/termination_error": end_error.tolist(),
    }


def check_dyna_dqn(args: Args) -> None:
    least = {
        "seed": 0, "num_seeds": 1, "planning_steps": 0, "imagination_depth": 1, "total_timesteps": 1, "buffer_size": 1,
        "batch_size": 1, "learning_starts": 0, "train_frequency": 1, "target_network_frequency": 1,
        "model_updates": 1, "model_batch_size": 1, "num_levels": 0, "eval_frequency": 1, "eval_episodes": 1,
    }  # fmt: skip
    for name, value in least.items():
        if getattr(args, name) < value:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {value} or more")
    for name in ("learning_rate", "model_learning_rate"):
        if getattr(args, name) <= 0:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")
    if min(*args.hidden, *args.model_hidden, 1) < 1:
        sys.exit(f"--hidden {args.hidden} --model-hidden {args.model_hidden}: a layer has at least one unit")
    for name in ("gamma", "tau", "start_e", "end_e", "exploration_fraction", "planning_epsilon"):
        if not 0 <= getattr(args, name) <= 1:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be from 0 to 1")
    if args.imagination_depth > 1 and (args.planning != "model" or args.batch_size % args.imagination_depth):
        sys.exit(f"--imagination-depth {args.imagination_depth} needs --planning model, and must divide --batch-size")


def main(args: Args) -> list[dict[str, Any]]:
    """Train, or evaluate; returns the rows of metrics, evaluations with a number for each run."""
    check_dyna_dqn(args)
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    path = args.evaluate or args.resume
    state = load_checkpoint(path, device) if path else None
    if state is not None:
        args = resumed_args(args, path)
    seed_everything(args.seed, args.torch_deterministic)
    E, K, B, D = args.num_seeds, args.planning_steps, args.batch_size, args.imagination_depth
    eval_envs = [make_feature_env(args) for _ in range(E * args.eval_episodes)]
    name = f"{args.env_id}__{args.exp_name}__{args.seed}"
    run_name = state["run_name"] if state else new_run(name)
    envs = [make_feature_env(args, f"videos/{run_name}-{e}" if args.capture_video else None) for e in range(E)]
    A = int(envs[0].action_space.n)
    s = state_features([env.reset(seed=args.seed + e)[0] for e, env in enumerate(envs)], device)  # (E, S)
    S = s.shape[1]

    q_net, target_net = (RunsMLP(E, [S, *args.hidden, A]).to(device) for _ in range(2))
    target_net.load_state_dict(q_net.state_dict())
    env_model = DeltaModel(E, S, A, args.model_hidden).to(device)
    optimizer = torch.optim.Adam(q_net.parameters(), lr=args.learning_rate, fused=True)
    model_optimizer = torch.optim.Adam(env_model.parameters(), lr=args.model_learning_rate, fused=True)
    modules = {
        "q_net": q_net, "target_net": target_net, "env_model": env_model, "optimizer": optimizer,
        "model_optimizer": model_optimizer,
    }  # fmt: skip
    replay = torch.zeros(E, args.buffer_size, 2 * S + 3, device=device)  # (E, N, R)
    rng, coin = torch.Generator(device).manual_seed(args.seed), random.Random(args.seed)
    done_steps, updates = 0, 0
    if state is not None:
        for name, module in modules.items():
            module.load_state_dict(state[name])
        done_steps, updates = state["global_step"], state["updates"]
        replay[:, : state["replay"].shape[1]] = state["replay"]
        rng.set_state(state["rng"].cpu())
        coin.seed(f"{args.seed} {done_steps}")
        if args.resume and done_steps >= args.total_timesteps:
            sys.exit(f"{path} has had all of its {done_steps} steps: --evaluate it, or give more --total-timesteps")
    if args.evaluate:
        returns, _, _ = greedy_rollouts(eval_envs, q_net, E, device, seed=10_000 + args.seed)
        half = 1.96 * returns.std() / math.sqrt(returns.size)
        print(f"greedy policy, {returns.size} episodes: return {returns.mean():.4g} ± {half:.2g}")
        return [{"eval/return": returns.mean(1).tolist()}]
    logger = Logger(args, run_name, state["rows"] if state else ())

    episodes: list[tuple[float, int]] = []  # (return, length) of those since the last row
    losses: dict[str, list[Tensor]] = {"td_loss": [], "q_values": [], "model_loss": []}
    episodic_return, episodic_length, reached = [0.0] * E, [0] * E, np.zeros(E, dtype=bool)
    results: list[dict[str, Any]] = []
    runs = torch.arange(E, device=device)[:, None]
    start = time.perf_counter()

    def sampled(num: int) -> Tensor:
        """Rows (E, num, R) out of the replay."""
        size = min(global_step, args.buffer_size)
        return replay[runs, torch.randint(size, (E, num), generator=rng, device=device)]

    def planned() -> Iterator[tuple[Tensor, Tensor | None]]:
        """The K batches (E, B, R) of a real step, with their weights (E, B)."""
        if args.planning == "replay" and K:
            yield from ((rows, None) for rows in sampled(K * B).split(B, 1))
        elif args.planning == "model" and K:
            states = sampled(K * B // D)[..., :S]
            rows, weights = imagine_rows(q_net, env_model, states, D, args.planning_epsilon, rng)
            # (E, D * K * (B / D), R): batch k holds the D steps of its own B / D states
            rows = rows.unflatten(1, (D, K, -1)).permute(2, 0, 1, 3, 4).flatten(2, 3)  # (K, E, B, R)
            weights = weights.unflatten(1, (D, K, -1)).permute(2, 0, 1, 3).flatten(2, 3)  # (K, E, B)
            yield from zip(rows, weights, strict=True)

    for global_step in tqdm(range(done_steps + 1, args.total_timesteps + 1), disable=not sys.stderr.isatty()):
        # 1. Act: a_t by Q, ε-greedily.
        duration = args.exploration_fraction * args.total_timesteps
        epsilon = max(args.end_e, args.start_e + (args.end_e - args.start_e) * global_step / max(1, duration))
        with torch.no_grad():
            actions = q_net(s[:, None]).argmax(-1).flatten().tolist()  # (E,)
        actions = [coin.randrange(A) if coin.random() < epsilon else a for a in actions]
        observations, starts, outcomes = [], [], []
        for e, a in enumerate(actions):
            observation, r, terminated, truncated, _ = envs[e].step(a)
            observations.append(observation)
            outcomes.append((a, float(r), terminated))
            episodic_return[e] += float(r)
            episodic_length[e] += 1
            if terminated or truncated:
                episodes.append((episodic_return[e], episodic_length[e]))
                episodic_return[e], episodic_length[e] = 0.0, 0
                observation, _ = envs[e].reset()
            starts.append(observation)
        # s' is the true next state, also where the episode ends; the next step starts from `starts`
        s2 = state_features(observations, device)
        replay[:, (global_step - 1) % args.buffer_size] = torch.cat([s, s2, s.new_tensor(outcomes)], 1)
        s = state_features(starts, device)

        if global_step > args.learning_starts and global_step % args.train_frequency == 0:
            if updates == 0 or global_step % 100 == 0:
                known = replay[:, : min(global_step, args.buffer_size)]
                env_model.standardize(known[..., :S], known[..., S : 2 * S])
                if args.standardize:
                    q_net.standardize(known[..., :S])
                    target_net.standardize(known[..., :S])
            # 2. Model: M(s, a) <- (Δs, r, end), on replayed real transitions.
            if args.planning == "model":
                for _ in range(args.model_updates):
                    model_loss = delta_model_loss(env_model, sampled(args.model_batch_size))  # (E,)
                    model_optimizer.zero_grad()
                    model_loss.sum().backward()  # the sum: each run has its own gradient
                    model_optimizer.step()
                losses["model_loss"].append(model_loss.detach())
            # 3. Learn from a real batch, and 4. plan, K times.
            for rows, weight in [(sampled(B), None), *planned()]:
                loss, q_values = dqn_loss(q_net, target_net, rows, weight, args.gamma, args.double)  # (E,)
                optimizer.zero_grad()
                loss.sum().backward()
                optimizer.step()
                losses["td_loss"].append(loss.detach())
                losses["q_values"].append(q_values)
                updates += 1

        if global_step > args.learning_starts and global_step % args.target_network_frequency == 0:
            with torch.no_grad():
                for target, parameter in zip(target_net.parameters(), q_net.parameters(), strict=True):
                    target.lerp_(parameter, args.tau)

        if global_step % args.eval_frequency == 0 or global_step == args.total_timesteps:
            seconds = time.perf_counter() - start
            returns, rows, mask = greedy_rollouts(eval_envs, q_net, E, device, seed=10_000 + args.seed)
            result: dict[str, Any] = {"eval/return": returns.mean(1).tolist()}  # (E,)
            result |= {f"losses/{name}": torch.stack(x).mean(0).tolist() for name, x in losses.items() if x}
            if args.planning == "model":
                result |= model_errors(env_model, rows, mask)
            metrics = {name: sum(values) / E for name, values in result.items()}
            metrics |= {"charts/SPS": (global_step - done_steps) * E / seconds, "charts/epsilon": epsilon}
            metrics["charts/updates"] = updates
            if episodes:
                metrics["charts/episodic_return"], metrics["charts/episodic_length"] = np.mean(episodes, 0).tolist()
            logger.log(global_step, metrics)
            results.append({"global_step": global_step, **metrics, **result})
            episodes, losses = [], {name: [] for name in losses}
            start += time.perf_counter() - start - seconds  # the time of an evaluation doesn't count
            if args.save_model:
                state = {name: module.state_dict() for name, module in modules.items()}
                state |= {"args": asdict(args), "run_name": run_name, "global_step": global_step, "updates": updates}
                state |= {"rng": rng.get_state(), "rows": logger.rows}
                state["replay"] = replay[:, : min(global_step, args.buffer_size)].clone()
                save_checkpoint(logger.path.with_name("agent.pt"), state)
            reached |= returns.mean(1) >= (math.inf if args.stop_return is None else args.stop_return)
            if reached.all():
                break
    if args.save_model and results:
        print(f"wrote {logger.path.with_name('agent.pt')}")
    logger.close()
    for env in envs:
        env.close()
    return results


if __name__ == "__main__":
    main(tyro.cli(Args))
