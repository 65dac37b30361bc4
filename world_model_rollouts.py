"""World models and training in imagination: fit M(s, a) = (s', r, end) to real transitions, then train on its rollouts.
Kurutach et al. 2018 (ME-TRPO, arXiv 1802.10592), its ensemble of Gaussian networks from Chua et al. 2018 (PETS, arXiv
1805.12114). Policy: Schulman et al. 2017 (PPO).

Three steps, repeated: collect with the current policy (at first a random one), fit the model to all data, improve the
policy on thousands of imagined episodes at once. Only the first costs real steps. `--iterations 1` is the plain recipe:
one data set, one model, one policy. `--model real` is the model-free counterpart: the same PPO on real environments.

Different from ME-TRPO: PPO for TRPO, Gaussian heads, reward and termination are learned too, and imagined episodes are
cut at a horizon, where the critic's value stands for the rest.

    python world_model_rollouts.py                                     # CartPole-v1 in 1,000 real steps
    python world_model_rollouts.py --env-id Pendulum-v1 --total-timesteps 4000 --initial-steps 600
    python world_model_rollouts.py --model real --num-envs 8 --num-steps 128 --total-timesteps 300000   # model-free
    python world_model_rollouts.py --evaluate runs/NAME/agent.pt

Shapes: `K` members of the ensemble, `B` batch or imagined environments, `T` steps, `S` features of a state, `A` of an
action (one-hot, or in units of its bounds), `O` = S + 1 predicted numbers (Δs, r), `N` real transitions.
"""

import contextlib
import csv
import ctypes
import itertools
import math
import os
import pathlib
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = pathlib.Path(__file__).stem  # the name of this experiment (of this file)
    seed: int = 1  # seed of the experiment
    torch_deterministic: bool = True  # only deterministic algorithms
    cuda: bool = True  # use a GPU if there is one
    track: bool = False  # track the run in Weights and Biases
    wandb_project_name: str = "model-based-rl"  # the Weights and Biases project
    wandb_entity: str | None = None  # the Weights and Biases team
    capture_video: bool = False  # with --evaluate: film an episode into the folder videos beside the file
    save_model: bool = True  # write runs/<run_name>/agent.pt at the end

    # Algorithm specific arguments
    env_id: str = "CartPole-v1"  # vector states; discrete or bounded continuous actions
    model: Literal["deterministic", "ensemble", "real"] = "ensemble"  # ensemble: Gaussian; real: PPO without a model
    total_timesteps: int = 1000  # real steps; evaluations don't count
    iterations: int | None = None  # stop after so many iterations; 1: the plain recipe, on one fixed data set
    initial_steps: int = 200  # real steps of the first iteration
    steps_per_iteration: int = 200  # real steps of each later one
    action_noise: float = 0.0  # in the real environment: probability of a random action, or Gaussian deviation
    ensemble_size: int = 5  # networks K; 1: a single model
    model_hidden: tuple[int, ...] = (64, 64)  # units of the networks' hidden layers
    model_learning_rate: float = 2e-3  # learning rate of the networks
    model_epochs: int = 300  # most epochs of a fit
    sample_member: Literal["step", "trajectory"] = "step"  # how often an imagined episode draws its member
    start_states: Literal["visited", "initial"] = "visited"  # where imagined episodes start
    horizon: int = 100  # most steps of an imagined episode
    policy_updates: int = 60  # most PPO updates in an iteration
    check_frequency: int = 10  # PPO updates between checks of the imagined return under each member
    improvement_share: float = 0.7  # an iteration ends when fewer members see an improvement; 0: never
    check_patience: int = 2  # consecutive checks of which that must be true (1 in the paper)
    num_envs: int = 500  # environments B, imagined ones (or real ones with --model real)
    num_steps: int = 50  # steps T between PPO updates
    learning_rate: float = 1e-3  # learning rate of PPO
    anneal_lr: bool = False  # let it fall to zero over the real steps
    hidden: tuple[int, ...] = (32, 32)  # units of the hidden layers of actor and critic
    reward_scale: float | None = None  # factor on rewards (default: (1 - gamma) / mean |r|; 1 with --model real)
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # lambda of the advantages
    num_minibatches: int = 5  # minibatches of an epoch of PPO
    update_epochs: int = 3  # epochs of PPO
    clip_coef: float = 0.2  # how far the ratio of probabilities may go
    clip_vloss: bool = False  # clip the value loss as well
    ent_coef: float = 0.0  # weight of the entropy
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # clip gradients at this norm
    eval_episodes: int = 50  # episodes of the evaluation after each iteration, with greedy actions
    stop_return: float | None = None  # stop once an evaluation reaches this mean return
    resume: str | None = None  # continue from this checkpoint.pt, with its flags; others beside it override them
    evaluate: str | None = None  # evaluate the greedy policy of this agent.pt, with its flags, and stop


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


# ------------------------------------------------------------------------------------------------------ environments


class RealEnvs:
    """B copies of a gymnasium environment. A finished one is reset at once; `step` still gives the true next state.

    Actions are features: one-hot, or in [-1, 1] in units of the bounds.
    """

    def __init__(
        self, env_id: str, num_envs: int, device: torch.device, seed: int, noise: float = 0.0, video: str | None = None
    ) -> None:
        # np.array makes a copy: some environments return the same array again and again
        wrappers: list[Any] = [lambda env: gym.wrappers.TransformObservation(env, np.array, None)]
        reset_at_once = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
        kwargs = {"disable_env_checker": True}
        if video:
            wrappers.append(lambda env: gym.wrappers.RecordVideo(env, video, lambda episode: episode == 0))
            kwargs["render_mode"] = "rgb_array"
        try:
            self.envs = gym.make_vec(env_id, num_envs, "sync", reset_at_once, wrappers, **kwargs)
            s, _ = self.envs.reset(seed=seed)
        except (gym.error.Error, ValueError, TypeError, ImportError) as e:
            reason = str(e).splitlines()[0].rstrip(".")
            sys.exit(f"can't make --env-id {env_id}: {reason}; try CartPole-v1, or your own as my_env:MyEnv-v0")
        self.device, self.noise, self.rng = device, noise, np.random.default_rng(seed)
        states, actions = self.envs.single_observation_space, self.envs.single_action_space
        self.discrete = isinstance(actions, gym.spaces.Discrete)
        bounded = isinstance(actions, gym.spaces.Box) and len(actions.shape) == 1 and actions.is_bounded()
        if not (isinstance(states, gym.spaces.Box) and len(states.shape) == 1) or not (self.discrete or bounded):
            sys.exit(f"{env_id} has states {states}, actions {actions}; needed: vectors, and Discrete or bounded ones")
        self.max_steps = self.envs.envs[0].spec.max_episode_steps
        if not self.max_steps:
            sys.exit(f"{env_id} has no time limit, an episode may never end: register it with max_episode_steps")
        self.state_size = states.shape[0]
        self.action_size = int(actions.n) if self.discrete else actions.shape[0]
        self.bounds = (self._tensor(states.low), self._tensor(states.high))
        self.s = self._tensor(s)  # (B, S), where the next step starts

    def _tensor(self, x: np.ndarray) -> Tensor:
        return torch.tensor(x, dtype=torch.float32, device=self.device)

    def step(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Actions (B, A) -> s' (B, S), r, terminated, truncated (B,)."""
        space = self.envs.single_action_space
        if self.discrete:
            random_actions = self.rng.integers(space.n, size=len(a))
            is_random = self.rng.random(len(a)) < self.noise
            actions = space.start + np.where(is_random, random_actions, a.argmax(-1).cpu().numpy())
        else:
            noisy = np.clip(a.cpu().numpy() + self.noise * self.rng.standard_normal(a.shape), -1, 1)
            actions = (space.low + (noisy + 1) / 2 * (space.high - space.low)).astype(space.dtype)
        s2, r, terminated, truncated, info = self.envs.step(actions)
        self.s = self._tensor(s2)
        for i in np.flatnonzero(terminated | truncated):
            s2[i] = info["final_obs"][i]  # the true next state; s2[i] was the first one of the next episode
        ends = torch.tensor(np.stack([terminated, truncated]), device=self.device)
        return self._tensor(s2), self._tensor(r), ends[0], ends[1]

    def random_action(self, s: Tensor, rng: torch.Generator) -> Tensor:
        """Features (B, A) of random actions, whatever the states (B, S)."""
        a = torch.rand(len(s), self.action_size, generator=rng, device=self.device)
        return F.one_hot(a.argmax(1), self.action_size).float() if self.discrete else 2 * a - 1


class ImaginedEnvs:
    """B environments inside the model. Episodes start in real states; a predicted end or the horizon ends them.

    `imagine` is the model's step: s, a, rng -> s', r, probability of the end.
    """

    def __init__(self, imagine: Any, starts: Tensor, num_envs: int, horizon: int, rng: torch.Generator) -> None:
        self.imagine, self.starts, self.horizon, self.rng = imagine, starts, horizon, rng
        self.s = self._start_states(num_envs)  # (B, S)
        self.t = torch.zeros(num_envs, dtype=torch.long, device=starts.device)

    def _start_states(self, num: int) -> Tensor:
        return self.starts[torch.randint(len(self.starts), (num,), generator=self.rng, device=self.starts.device)]

    def step(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s2, r, end = self.imagine(self.s, a, self.rng)
        terminated = torch.rand(end.shape, generator=self.rng, device=end.device) < end
        truncated = (self.t + 1 >= self.horizon) & ~terminated
        done = terminated | truncated
        self.s = torch.where(done[:, None], self._start_states(len(a)), s2)
        self.t = torch.where(done, 0, self.t + 1)
        return s2, r, terminated, truncated


@torch.no_grad()
def collect(envs: RealEnvs, act: Any, num_steps: int, first_episode: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Rows of `num_steps` real transitions, none across a reset. `end` is terminated, not truncated."""
    rows, episode, first = [], first_episode, True
    for _ in range(num_steps):
        s = envs.s  # (1, S)
        a = act(s, rng)  # (1, A)
        s2, r, terminated, truncated = envs.step(a)
        row = {"s": s, "a": a, "s2": s2, "r": r, "end": terminated.float()}
        rows.append(row | {"episode": torch.tensor([episode]), "first": torch.tensor([first])})
        first = bool(terminated | truncated)
        if first:
            episode += 1
    return {name: torch.cat([row[name] for row in rows]).to(envs.s.device) for name in rows[0]}


def held_out_rows(episode: Tensor, share: float = 0.2) -> Tensor:
    """A mask (N,) of the rows to hold out: every fifth episode, or the last of fewer; of a single one, its last fifth.

    An episode that was once held out is always held out.
    """
    if (episode == episode[0]).all():
        N = len(episode)
        if N < 10:
            sys.exit(f"the data hold {N} steps of one episode, too few: more --initial-steps or --total-timesteps")
        return torch.arange(N, device=episode.device) >= N - max(1, min(int(N * share), N // 2))
    held_out = ((episode + 1) * share).floor() > (episode * share).floor()
    return held_out if held_out.any() and not held_out.all() else episode == episode.max()


# ------------------------------------------------------------------------------------------------------------- model


MIN_LOGVAR, MAX_LOGVAR = -10.0, 0.5  # PETS' bounds of log σ², in units of the data's spread
MODEL_BATCH = 128  # transitions of an update of the networks
MODEL_PATIENCE = 20  # epochs without a better held-out loss before a fit ends


class EnsembleMLP(nn.Module):
    """K multilayer perceptrons with SiLUs, each layer one batched product: (K, B, in) -> (K, B, out)."""

    def __init__(self, num_members: int, sizes: list[int]) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n_in, n_out in itertools.pairwise(sizes):
            bound = n_in**-0.5
            self.weights.append(torch.empty(num_members, n_in, n_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(num_members, 1, n_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if i > 0:
                x = F.silu(x)
            x = torch.baddbmm(bias, x, weight)  # x W + b, of each member
        return x


class EnsembleModel(nn.Module):
    """K networks (s, a) -> (Δs, r), in units of their spread, and K networks s' -> termination.

    With `gaussian`, the former predict a mean and a variance of each number; without, a mean by squared error.
    The latter read s', because the state that a step leads to decides whether the episode ends.
    """

    def __init__(self, K: int, S: int, A: int, hidden: tuple[int, ...], gaussian: bool, bounds: Any) -> None:
        super().__init__()
        self.K, self.S, self.gaussian = K, S, gaussian
        outputs = 2 * (S + 1) if gaussian else S + 1
        self.net = EnsembleMLP(K, [S + A, *hidden, outputs])
        self.end_net = EnsembleMLP(K, [S, *hidden, 1])
        self.register_buffer("x_mean", torch.zeros(S + A))
        self.register_buffer("x_std", torch.ones(S + A))
        self.register_buffer("y_mean", torch.zeros(S + 1))
        self.register_buffer("y_std", torch.ones(S + 1))
        self.bounds = bounds

    def standardize(self, data: dict[str, Tensor]) -> None:
        """Take the scales of states, changes and rewards from the data. One-hot actions stay as they are."""
        std = data["s"].std(0)
        self.x_mean[: self.S] = data["s"].mean(0)
        self.x_std[: self.S] = torch.where(std > 1e-6, std, 1.0)
        y = targets(data)
        self.y_mean.copy_(y.mean(0))
        self.y_std.copy_(y.std(0).clamp_min(1e-6))  # tiny: a constant reward stays constant

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x = (s, a) (K, B, S + A) -> mean and log σ² (K, B, O) of (Δs, r) in units of their spread."""
        y = self.net((x - self.x_mean) / self.x_std)
        if not self.gaussian:
            return y, None
        mean, logvar = y.chunk(2, -1)
        logvar = MAX_LOGVAR - F.softplus(MAX_LOGVAR - logvar)  # soft bounds, above and below
        return mean, MIN_LOGVAR + F.softplus(logvar - MIN_LOGVAR)

    def end_logit(self, s2: Tensor) -> Tensor:
        """s' (K, B, S) -> (K, B)."""
        return self.end_net((s2 - self.x_mean[: self.S]) / self.x_std[: self.S]).squeeze(-1)

    def loss(self, x: Tensor, y: Tensor, s2: Tensor, end: Tensor) -> Tensor:
        """Loss of each member (K,): the mean over batch and numbers of (Δs, r), plus the cross-entropy of the end."""
        end_loss = F.binary_cross_entropy_with_logits(self.end_logit(s2), end, reduction="none").mean(1)
        mean, logvar = self(x)
        error = (mean - (y - self.y_mean) / self.y_std) ** 2
        if logvar is not None:  # -log N(y; μ, σ²) without its constant
            error = (error * (-logvar).exp() + logvar) / 2
        return error.mean((1, 2)) + end_loss

    @torch.no_grad()
    def step(self, s: Tensor, a: Tensor, rng: torch.Generator, fixed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """s (B, S), a (B, A) -> s' (B, S), r (B,), probability of the end (B,), each row by a member drawn at random.

        The batch is shuffled and split into K shares, one for each member. `fixed`: without the shuffle, member k
        always gets the k-th share, and an imagined episode, which stays in its row, keeps its member.
        """
        B = len(s)
        order = torch.randperm(B, generator=rng, device=s.device)
        if fixed:
            order = torch.arange(B, device=s.device)
        share = math.ceil(B / self.K)
        filled = torch.arange(self.K * share, device=s.device) % B  # equal shares: some rows are computed twice
        x = torch.cat([s, a], 1)[order[filled]].unflatten(0, (self.K, share))  # (K, share, S + A)
        y, logvar = self(x)
        if logvar is not None:
            y = y + (logvar / 2).exp() * torch.randn(y.shape, generator=rng, device=y.device)
        y = y * self.y_std + self.y_mean
        far = 50 * self.x_std[: self.S]  # keep imagined states inside the space of states, and near the data
        low = torch.maximum(self.bounds[0], self.x_mean[: self.S] - far)
        high = torch.minimum(self.bounds[1], self.x_mean[: self.S] + far)
        s2 = (x[..., : self.S] + y[..., :-1]).clamp(low, high)  # s' = s + Δs
        end = self.end_logit(s2).sigmoid()
        back = order.argsort()  # undoes the shuffle
        return s2.flatten(0, 1)[back], y[..., -1].flatten()[back], end.flatten()[back]


def targets(data: dict[str, Tensor]) -> Tensor:
    """What models predict: (Δs, r) (N, O)."""
    return torch.cat([data["s2"] - data["s"], data["r"][:, None]], 1)


def fit_networks(
    env_model: EnsembleModel, data: dict[str, Tensor], held_out: Tensor, args: Args, rng: torch.Generator
) -> dict[str, float]:
    """Adam on the K losses until none falls any more on the held-out episodes; each member gets its best weights back.

    Returns the training loss (last epoch) and the best held-out loss, means over the members, and the epochs.
    """
    columns = (torch.cat([data["s"], data["a"]], 1), targets(data), data["s2"], data["end"])
    train = [x[~held_out] for x in columns]
    test = [x[held_out].expand(env_model.K, *x[held_out].shape) for x in columns]
    N = len(train[0])
    batch_size = min(MODEL_BATCH, max(16, N // 8))  # of few data, eight batches an epoch
    parameters = list(env_model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.model_learning_rate, fused=True)
    best_weights = [p.detach().clone() for p in parameters]
    best = torch.full((env_model.K,), math.inf, device=held_out.device)
    since, epoch = 0, 0  # `since`: epochs since some member got better
    while epoch < args.model_epochs and since < MODEL_PATIENCE:
        epoch += 1
        order = torch.rand(env_model.K, N, generator=rng, device=held_out.device).argsort(1)  # an order for each member
        losses = []
        for rows in order.split(batch_size, 1):
            batch_loss = env_model.loss(*(x[rows] for x in train))  # (K,)
            optimizer.zero_grad()
            batch_loss.sum().backward()  # of the sum: members share no weights, so each follows its own loss
            optimizer.step()
            losses.append(batch_loss.detach())
        with torch.no_grad():
            now = env_model.loss(*test)
            better = now < best
            best = torch.where(better, now, best)
            for kept, p in zip(best_weights, parameters, strict=True):
                kept.copy_(torch.where(better[:, None, None], p, kept))
        since = 0 if better.any() else since + 1
    with torch.no_grad():
        for kept, p in zip(best_weights, parameters, strict=True):
            p.copy_(kept)
    loss, validation_loss = torch.stack(losses).mean().item(), best.mean().item()
    return {"losses/model_loss": loss, "losses/validation_loss": validation_loss, "model/epochs": epoch}


# ------------------------------------------------------------------------------------------------------------ policy


def tanh_network(sizes: list[int], std: float) -> nn.Sequential:
    """Linear layers of these sizes with tanh between them; the last one's weights have gain `std`."""
    *hidden, out = itertools.pairwise(sizes)
    layers: list[nn.Module] = []
    for n_in, n_out in hidden:
        layers += [layer_init(nn.Linear(n_in, n_out)), nn.Tanh()]
    return nn.Sequential(*layers, layer_init(nn.Linear(*out), std))


class RolloutActorCritic(nn.Module):
    """Two tanh networks, actor and critic. Continuous actions: a Gaussian around the actor's output."""

    def __init__(self, S: int, A: int, hidden: tuple[int, ...], discrete: bool) -> None:
        super().__init__()
        self.discrete = discrete
        self.actor = tanh_network([S, *hidden, A], 0.01)
        self.critic = tanh_network([S, *hidden, 1], 1.0)
        self.log_std = nn.Parameter(torch.full((A,), -0.5))  # of continuous actions
        self.register_buffer("mean", torch.zeros(S))
        self.register_buffer("std", torch.ones(S))

    @torch.no_grad()
    def standardize(self, mean: Tensor, std: Tensor, keep: bool) -> None:
        """Scale states by new m', σ'. `keep`: change the first layers, so that both functions stay as they were."""
        if keep:
            for layer in (self.actor[0], self.critic[0]):
                layer.bias += layer.weight @ ((mean - self.mean) / self.std)  # b' = b + W (m' - m) / σ
                layer.weight *= std / self.std  # W' = W σ' / σ
        self.mean.copy_(mean)
        self.std.copy_(std)

    def value(self, s: Tensor) -> Tensor:
        return self.critic((s - self.mean) / self.std).squeeze(-1)

    def policy(self, s: Tensor) -> Tensor:
        """Logits, or means in units of the bounds: (..., S) -> (..., A)."""
        return self.actor((s - self.mean) / self.std)

    def sample_action(self, out: Tensor, rng: torch.Generator | None) -> Tensor:
        """The policy's output (B, A) -> an action (B, A): one-hot, or a vector, not clipped. Without rng: greedy."""
        if self.discrete:
            if rng is not None:  # argmax(logits + Gumbel noise) has the probabilities softmax(logits)
                out = out - torch.empty_like(out).exponential_(generator=rng).log_()
            return F.one_hot(out.argmax(-1), out.shape[-1]).float()
        if rng is not None:
            out = out + self.log_std.exp() * torch.randn(out.shape, generator=rng, device=out.device)
        return out

    def act(self, s: Tensor, rng: torch.Generator | None) -> Tensor:
        """An action (B, A) in s (B, S) as environments take it: one-hot, or clipped to its bounds."""
        return self.sample_action(self.policy(s), rng).clamp(-1, 1)

    def log_prob(self, out: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """log π(a | s) and the entropy, (...,) each."""
        if self.discrete:
            log_p = out.log_softmax(-1)
            return (log_p * a).sum(-1), -(log_p.exp() * log_p).sum(-1)
        normal = torch.distributions.Normal(out, self.log_std.exp(), validate_args=False)
        return normal.log_prob(a).sum(-1), normal.entropy().sum(-1)


@torch.no_grad()
def policy_rollout(envs: Any, agent: RolloutActorCritic, num_steps: int, rng: torch.Generator) -> dict[str, Tensor]:
    """T steps of the stochastic policy in B environments, real or imagined; (T, B, ...) each."""
    rows = []
    for _ in range(num_steps):
        s = envs.s
        out = agent.policy(s)
        a = agent.sample_action(out, rng)  # stored as drawn: log π(a | s) is that of the unclipped action
        s2, r, terminated, truncated = envs.step(a.clamp(-1, 1))
        rows.append({"s": s, "out": out, "a": a, "s2": s2, "r": r, "terminated": terminated, "truncated": truncated})
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    batch["log_prob"], _ = agent.log_prob(batch.pop("out"), batch["a"])
    batch["value"] = agent.value(batch["s"])
    # V(s_{t+1}). Where an episode was truncated, the next row is a reset state: take its own last state s2
    batch["next_value"] = torch.cat([batch["value"][1:], agent.value(envs.s)[None]])
    t, b = batch["truncated"].nonzero(as_tuple=True)
    batch["next_value"][t, b] = agent.value(batch["s2"][t, b])
    return batch


def clipped_losses(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, value: Tensor, old_value: Tensor, args: Args
) -> tuple[Tensor, Tensor]:
    """PPO's losses, means over the batch: -min(ρ A, clip(ρ, 1 ± ε) A) with ρ = π / π_old, and ½ (V - R)².

    A is the advantage standardised over the minibatch. R = advantage + V_old takes it as it is.
    """
    ratio = (log_prob - old_log_prob).exp()
    A = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    policy_loss = -torch.min(ratio * A, ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef) * A).mean()
    target = advantage + old_value
    error = (value - target) ** 2
    if args.clip_vloss:
        clipped = old_value + (value - old_value).clamp(-args.clip_coef, args.clip_coef)
        error = torch.max(error, (clipped - target) ** 2)
    return policy_loss, error.mean() / 2


def improve_policy(
    agent: RolloutActorCritic, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], scale: float, args: Args,
    rng: torch.Generator,
) -> Tensor:  # fmt: skip
    """Epochs of PPO on a batch of `policy_rollout`. Returns policy loss, value loss and entropy, means (3,)."""
    done = batch["terminated"] | batch["truncated"]
    batch["advantage"] = generalized_advantages(
        scale * batch["r"], batch["value"], batch["next_value"], batch["terminated"], done, args.gamma, args.gae_lambda
    )
    flat = [batch[name].flatten(0, 1) for name in ("s", "a", "log_prob", "value", "advantage")]
    total = torch.zeros(3, device=done.device)
    for _ in range(args.update_epochs):
        order = torch.randperm(done.numel(), generator=rng, device=done.device)
        for rows in order.tensor_split(args.num_minibatches):
            s, a, old_log_prob, old_value, advantage = (x[rows] for x in flat)
            log_prob, entropy = agent.log_prob(agent.policy(s), a)
            policy_loss, value_loss = clipped_losses(log_prob, old_log_prob, advantage, agent.value(s), old_value, args)
            loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy.mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            total += torch.stack([policy_loss, value_loss, entropy.mean()]).detach()
    return total / (args.update_epochs * args.num_minibatches)


@torch.no_grad()
def imagined_returns(
    imagine: Any, agent: RolloutActorCritic, s: Tensor, horizon: int, rng: torch.Generator, greedy: bool
) -> Tensor:
    """Undiscounted returns (B,) of imagined episodes from s. A step counts by the probability that it is reached."""
    total = torch.zeros(len(s), device=s.device)
    alive = torch.ones(len(s), device=s.device)  # the probability that the episode has not ended
    for _ in range(horizon):
        s, r, end = imagine(s, agent.act(s, None if greedy else rng), rng)
        total += alive * r
        alive *= 1 - end
    return total


@torch.no_grad()
def evaluate_in_reality(envs: RealEnvs, agent: RolloutActorCritic) -> tuple[np.ndarray, dict[str, Tensor]]:
    """A greedy episode in each environment: the returns (B,), and its steps (T, B, ...) with their mask `alive`."""
    rows, alive = [], torch.ones(len(envs.s), dtype=torch.bool, device=envs.s.device)
    while alive.any():
        s = envs.s
        a = agent.act(s, None)
        s2, r, terminated, truncated = envs.step(a)
        rows.append({"s": s, "a": a, "s2": s2, "r": r, "alive": alive})
        alive = alive & ~(terminated | truncated)
    steps = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return (steps["r"] * steps["alive"]).sum(0).cpu().numpy(), steps


@torch.no_grad()
def open_loop_errors(env_model: Any, steps: dict[str, Tensor], rng: torch.Generator) -> dict[str, float]:
    """Errors of s_h, imagined from s_0 under the recorded actions: root mean square, in units of the data's spread."""
    s, errors = steps["s"][0], {}
    for h in range(1, min(500, len(steps["s"])) + 1):
        s, _, _ = env_model.step(s, steps["a"][h - 1], rng)
        alive = steps["alive"][h - 1]
        if h in (1, 5, 10, 20, 50, 100, 200, 500) and alive.any():
            error = (s - steps["s2"][h - 1])[alive] / env_model.x_std[: env_model.S]
            errors[f"model/error_at_{h}"] = (error**2).mean().sqrt().item()
    return errors


# ------------------------------------------------------------------------------------------------------------- loop


def load_parts(parts: dict[str, Any], state: dict[str, Any], path: str) -> None:
    """Load what a file holds of these networks and optimizers; exits if it is of other sizes."""
    try:
        for name in parts.keys() & state.keys():
            parts[name].load_state_dict(state[name])
    except (RuntimeError, ValueError) as e:
        sys.exit(f"{path} was made with another environment, or other sizes: {str(e).splitlines()[-1].strip()}")


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line, over the flags of the checkpoint to resume or evaluate."""
    args = tyro.cli(Args, args=argv)
    if args.resume and args.evaluate:
        sys.exit("--resume goes on with a run, --evaluate plays an agent: give one of them")
    if path := args.resume or args.evaluate:
        args = tyro.cli(Args, args=argv, default=saved_args(path))
    counts = ("total_timesteps", "initial_steps", "steps_per_iteration", "ensemble_size", "model_epochs", "horizon")
    counts += ("policy_updates", "check_frequency", "check_patience", "num_envs", "num_steps", "num_minibatches")
    counts += ("update_epochs", "eval_episodes")
    for name in counts:
        if getattr(args, name) < 1:
            sys.exit(f"--{name.replace('_', '-')} must be at least 1")
    if not (0 <= args.gamma <= 1 and 0 <= args.gae_lambda <= 1 and 0 <= args.improvement_share <= 1):
        sys.exit("--gamma, --gae-lambda and --improvement-share must be from 0 to 1")
    if args.gamma == 1 and args.model != "real" and not args.reward_scale:
        sys.exit("--gamma 1 needs --reward-scale, whose default (1 - gamma) / mean |r| would be 0")
    if args.num_envs * args.num_steps < 2 * args.num_minibatches:
        sys.exit("--num-minibatches needs at least two rows in each, of --num-envs times --num-steps")
    return args


def main(args: Args) -> list[dict[str, float]]:
    """Train, or evaluate; returns the rows of metrics."""
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    path = args.resume or args.evaluate
    state = load_checkpoint(path, device) if path else {}
    seed_everything(args.seed, args.torch_deterministic)
    rng = torch.Generator(device).manual_seed(args.seed)
    model_free, seed = args.model == "real", 100_000 * args.seed
    envs = RealEnvs(args.env_id, args.num_envs if model_free else 1, device, seed, args.action_noise)
    S, A, K = envs.state_size, envs.action_size, args.ensemble_size
    agent = RolloutActorCritic(S, A, args.hidden, envs.discrete).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    env_model = EnsembleModel(K, S, A, args.model_hidden, args.model == "ensemble", envs.bounds).to(device)
    parts = {"agent": agent, "env_model": env_model, "optimizer": optimizer}
    load_parts(parts, state, path)
    alone = partial(env_model.step, fixed=True)  # to judge members one by one: the k-th share of a batch is member k's

    if args.evaluate:  # on other episodes than --stop-return judged
        test_envs = RealEnvs(args.env_id, args.eval_episodes, device, seed + 75_000, args.action_noise)
        returns, _ = evaluate_in_reality(test_envs, agent)
        half = 1.96 * returns.std() / math.sqrt(returns.size)
        print(f"greedy policy, {returns.size} episodes: return {returns.mean():.4g} ± {half:.2g}")
        if args.capture_video:
            folder = str(pathlib.Path(path).parent / "videos")
            evaluate_in_reality(RealEnvs(args.env_id, 1, device, seed + 75_000, args.action_noise, folder), agent)
        return [{"eval/return": float(returns.mean())}]

    # ---- start a new run, or go on with that of the checkpoint
    data: dict[str, Tensor] = state.get("data", {})
    global_step, iteration, minutes = state.get("global_step", 0), state.get("iteration", 0), state.get("minutes", 0.0)
    if state:
        if "rng" not in state:
            sys.exit(f"{path} can't go on: --resume takes a checkpoint.pt")
        rng.set_state(state["rng"].cpu())
        if global_step >= args.total_timesteps:
            sys.exit(f"{path} has had all of its {global_step} steps: --evaluate it, or give more --total-timesteps")
    run_name = state.get("run_name") or new_run(f"{args.env_id}__{args.exp_name}__{args.seed}")
    logger = Logger(args, run_name, state.get("rows", ()))
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" real steps", disable=not sys.stderr.isatty())
    while global_step < args.total_timesteps and iteration < (args.iterations or math.inf):
        iteration += 1
        start, before, metrics = time.perf_counter(), global_step, {}
        if model_free:  # PPO on the real environments
            training_envs = envs
            scale = args.reward_scale or 1.0
        else:
            # 1. Collect real steps D with the current policy, at first a random one; episodes start anew
            num_steps = args.initial_steps if iteration == 1 else args.steps_per_iteration
            num_steps = min(num_steps, args.total_timesteps - global_step)
            envs = RealEnvs(args.env_id, 1, device, seed + iteration, args.action_noise)
            act = agent.act if data else envs.random_action
            new = collect(envs, act, num_steps, int(data["episode"][-1]) + 1 if data else 0, rng)
            data = {name: torch.cat([data[name], x]) for name, x in new.items()} if data else new
            global_step += num_steps
            metrics["charts/episodic_return"] = (new["r"].sum() / new["first"].sum()).item()
            metrics["charts/episodic_length"] = len(new["r"]) / new["first"].sum().item()

            # 2. Fit the model M(s, a) = (s', r, end), some episodes held out
            env_model.standardize(data)
            agent.standardize(env_model.x_mean[:S], env_model.x_std[:S], keep=iteration > 1)
            metrics |= fit_networks(env_model, data, held_out_rows(data["episode"]), args, rng)

            starts = data["s"] if args.start_states == "visited" else data["s"][data["first"]]
            imagine = partial(env_model.step, fixed=args.sample_member == "trajectory")
            training_envs = ImaginedEnvs(imagine, starts, args.num_envs, args.horizon, rng)
            check_starts = starts[torch.randint(len(starts), (40 * K,), generator=rng, device=device)]
            best_returns = torch.full((K,), -math.inf, device=device)
            failures, improved = 0, False
            scale = args.reward_scale or (1 - args.gamma) / max(data["r"].abs().mean().item(), 1e-6)

        # 3. Improve the policy: J(θ) = E_τ[R(τ)] over imagined τ = s_0 →π a_0 →M s_1 → ...
        losses, best = [], {}
        for update in range(args.policy_updates + 1):
            if not model_free and (update % args.check_frequency == 0 or update == args.policy_updates):
                # Stop when too few members see the imagined return grow; then go back to the best actor
                check_rng = torch.Generator(device).manual_seed(args.seed)  # the same luck at each check
                returns = imagined_returns(alone, agent, check_starts, envs.max_steps, check_rng, greedy=False)
                returns = returns.view(K, -1).mean(1)  # (K,)
                if not returns.isfinite().all():
                    sys.exit(f"iteration {iteration} imagines numbers that are not finite: lower --model-learning-rate")
                if (returns > best_returns).float().mean() >= args.improvement_share:
                    failures, improved, best_returns = 0, update > 0, returns
                    # not the critic: it goes on learning, whatever comes of the actor
                    best = {name: x.clone() for name, x in agent.state_dict().items() if "critic" not in name}
                else:
                    failures += 1
                    if failures >= args.check_patience and improved:
                        break
            if update == args.policy_updates or (model_free and global_step >= args.total_timesteps):
                break
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = args.learning_rate * max(0.0, 1 - global_step / args.total_timesteps)
            batch = policy_rollout(training_envs, agent, args.num_steps, rng)
            losses.append(improve_policy(agent, optimizer, batch, scale, args, rng))
            if model_free:
                global_step += args.num_envs * args.num_steps
        agent.load_state_dict(best, strict=False)
        minutes += (time.perf_counter() - start) / 60

        # 4. Measure: the real return, and what the model gets wrong on episodes that it never saw
        test_envs = RealEnvs(args.env_id, args.eval_episodes, device, seed + 50_000, args.action_noise)
        returns, steps = evaluate_in_reality(test_envs, agent)
        metrics |= {"eval/return": float(returns.mean()), "charts/policy_updates": update, "charts/minutes": minutes}
        names = ("losses/policy_loss", "losses/value_loss", "losses/entropy")
        metrics |= dict(zip(names, torch.stack(losses).mean(0).tolist(), strict=True))
        if not model_free:
            firsts = data["s"][data["first"]]
            firsts = firsts[torch.randint(len(firsts), (20 * K,), generator=rng, device=device)]
            imagined = imagined_returns(alone, agent, firsts, envs.max_steps, rng, greedy=True)
            imagined = imagined.view(K, -1).mean(1).mean().item()
            metrics |= {"charts/imagined_return": imagined, "charts/gap": imagined - metrics["eval/return"]}
            metrics |= open_loop_errors(env_model, steps, rng)
        bar.update(global_step - before)
        logger.log(global_step, metrics)
        state = {name: part.state_dict() for name, part in parts.items()} | {"args": asdict(replace(args, resume=None))}
        state |= {"run_name": run_name, "rows": logger.rows, "global_step": global_step, "iteration": iteration}
        state |= {"minutes": minutes, "data": data, "rng": rng.get_state()}
        save_checkpoint(logger.path.with_name("checkpoint.pt"), state)
        if args.stop_return is not None and metrics["eval/return"] >= args.stop_return:
            break
    bar.close()
    logger.close()
    if args.save_model:
        save_checkpoint(logger.path.with_name("agent.pt"), {"args": state["args"], "agent": state["agent"]})
        print(f"to measure it again: python {sys.argv[0]} --evaluate runs/{run_name}/agent.pt")
    return logger.rows


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("stopped; --resume runs/NAME/checkpoint.pt goes on from the last row of metrics, if there is one")
