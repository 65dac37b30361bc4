"""Neural Dyna-Q: a double DQN whose extra updates come out of a learned model. Sutton 1990 (Dyna); Mnih et al. 2015
(DQN); van Hasselt et al. 2016 (double DQN, arXiv 1509.06461); van Hasselt, Hessel & Aslanides 2019 (arXiv 1906.05243).

After each real step, Q makes one update on replayed real transitions, then K more. `--planning model` imagines the
transitions of these K: states come from the replay, actions from Q, and a network M(s, a) predicts Δs, r and
termination. `--planning replay` takes them from the replay too: a DQN with as many updates, which is the fair baseline.
`--planning none` makes no further updates: DQN. Different from tabular Dyna-Q: updates are minibatches with a target
network, and the K batches of one real step are imagined at once.

    python dyna_dqn.py --num-seeds 10                               # ten runs of CartPole-v1 in lockstep, see below
    python dyna_dqn.py --planning replay --env-id Acrobot-v1        # the equal-updates baseline
    python dyna_dqn.py --env-id Sokoban-v0 --total-timesteps 20000  # one generated 5x5 level with one box
    python dyna_dqn.py --evaluate runs/NAME/agent.pt

Several runs at once take hardly longer than one, because a small network spends its time on starting operations, not
on arithmetic. So each tensor has an axis for the run.

Shapes: `E` runs, `B` batch, `K` planning steps, `A` actions, `S` features of a state, `N` size of the replay. A row of
the replay is a transition (s, s', a, r, end): `R` = 2S + 3 numbers.
"""

import contextlib
import csv
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

PLANNING_EPSILON = 0.5  # probability of a random action in imagination
MODEL_HIDDEN, MODEL_LEARNING_RATE = (64, 64), 1e-3
MODEL_UPDATES, MODEL_BATCH_SIZE = 2, 128  # after each real step
MOST_STEPS = 10_000  # an evaluation stops here if the environment has no limit: a greedy policy can go on for ever
STANDARDIZE_FREQUENCY = 100  # real steps between two measurements of mean and spread of the states


@dataclass
class Args:
    exp_name: str = "dyna_dqn"  # the name of this experiment
    seed: int = 1  # seed of the experiment
    torch_deterministic: bool = True  # only deterministic algorithms
    cuda: bool = True  # use a GPU if there is one
    track: bool = False  # track the run in Weights and Biases
    wandb_project_name: str = "model-based-rl"  # the Weights and Biases project
    wandb_entity: str | None = None  # the Weights and Biases team
    capture_video: bool = False  # film episodes of the first run into videos/<run_name>
    save_model: bool = True  # write agent.pt (weights only) at the end

    # Algorithm specific arguments
    num_seeds: int = 1  # independent runs E in lockstep, with seeds from --seed on
    env_id: str = "CartPole-v1"  # a gymnasium environment with vector states and discrete actions, or Sokoban-v0
    total_timesteps: int = 4000  # real steps
    planning: Literal["none", "replay", "model"] = "model"  # where the K further updates come from
    planning_steps: int = 7  # further updates K
    learning_rate: float = 5e-4  # learning rate of Q
    buffer_size: int = 100_000  # transitions N of the replay
    gamma: float = 0.99  # discount
    tau: float = 0.05  # share of Q in an update of the target network: target <- (1 - tau) target + tau Q
    target_network_frequency: int = 1  # real steps between updates of the target network
    batch_size: int = 64  # transitions B of an update
    start_e: float = 1.0  # probability of a random action at the start
    end_e: float = 0.05  # probability of a random action at the end
    exploration_steps: int = 1000  # real steps over which that probability falls
    learning_starts: int = 500  # real steps before the first update
    train_frequency: int = 1  # real steps between updates
    double: bool = True  # double DQN; --no-double: DQN
    hidden: tuple[int, ...] = (64, 64)  # units of Q's hidden layers
    standardize: bool = True  # Q reads states in units of their spread in the replay
    size: int = 5  # Sokoban: board size
    num_boxes: int = 1  # Sokoban: boxes of the one generated level
    eval_frequency: int = 500  # real steps between evaluations of the greedy policy: a row of metrics and a checkpoint
    eval_episodes: int = 10  # episodes of an evaluation
    stop_return: float | None = None  # stop once an evaluation of every run reaches this mean return
    resume: str | None = None  # continue from this checkpoint.pt, with its flags and a new episode
    evaluate: str | None = None  # evaluate the greedy policy of this agent.pt, with its flags, and stop


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


# ------------------------------------------------------------------------------------------------------ environments


def make_feature_env(args: Args, video: str | None = None) -> gym.Env:
    """The environment of `args`: actions from 0 on, rewards that are numbers, states that are vectors of their own."""
    kwargs: dict[str, Any] = {"render_mode": "rgb_array"} if video else {}
    try:
        if args.env_id == "Sokoban-v0":
            levels, _ = sokoban_env.generate_levels(1, size=args.size, num_boxes=args.num_boxes, seed=1)
            kwargs |= {"size": args.size, "levels": levels}
        env = gym.make(args.env_id, disable_env_checker=True, **kwargs)
        if video:
            env.reset()
            env.render()  # fails here, with a reason, if it can't film
            env = gym.wrappers.RecordVideo(env, video)
    except (gym.error.Error, ValueError, TypeError, ImportError, NotImplementedError) as e:
        reason = (str(e) or "it has no render()").splitlines()[0].rstrip(".")
        verb, own = ("film", "") if video else ("make", ", or your own as my_env:MyEnv-v0")
        sys.exit(f"can't {verb} --env-id {args.env_id}: {reason}; try CartPole-v1{own}")
    actions, states = env.action_space, env.observation_space
    if not isinstance(actions, gym.spaces.Discrete):
        sys.exit(f"{args.env_id} has the action space {actions}, DQN needs a Discrete one: try CartPole-v1")
    if args.env_id == "Sokoban-v0":
        planes, states = np.array(CELL_PLANES, dtype=np.float32), gym.spaces.Box(0, 1, (4 * args.size**2,))
        env = gym.wrappers.TransformObservation(env, lambda cells: planes[cells].transpose(2, 0, 1).ravel(), states)
    elif not isinstance(states, gym.spaces.Box) or len(states.shape) != 1:
        sys.exit(f"{args.env_id} has the states {states}, dyna_dqn.py needs vectors: for discrete ones take dyna_q.py")
    env = gym.wrappers.TransformObservation(env, np.array, states)  # a copy: some environments fill one array again
    env = gym.wrappers.TransformReward(env, lambda r: np.asarray(r, dtype=float).item())
    env = gym.wrappers.TransformAction(env, lambda a: int(actions.start + a), gym.spaces.Discrete(actions.n))
    return gym.wrappers.RecordEpisodeStatistics(env)


def make_feature_envs(args: Args, num: int, video: str | None = None) -> gym.vector.SyncVectorEnv:
    """`num` environments; the first is filmed. One that ends an episode starts the next one in the same step."""
    makes = [lambda i=i: make_feature_env(args, None if i else video) for i in range(num)]
    return gym.vector.SyncVectorEnv(makes, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


def true_next(observation: np.ndarray, info: dict[str, Any]) -> np.ndarray:
    """The state that a step led to. Where the step ended an episode, `observation` is the first of the next one."""
    following = observation.copy()
    if "final_obs" in info:
        following[info["_final_obs"]] = np.stack(info["final_obs"][info["_final_obs"]])
    return following


@torch.no_grad()
def greedy_returns(envs: gym.vector.SyncVectorEnv, q_net: nn.Module, device: torch.device, seed: int) -> np.ndarray:
    """Returns (E, episodes) of one greedy episode in each environment; each of the E runs has as many environments."""
    observation, _ = envs.reset(seed=seed)
    num_runs = len(q_net.weights[0])
    limit = envs.envs[0].unwrapped.spec.max_episode_steps or MOST_STEPS
    returns = np.zeros(envs.num_envs)
    running = np.ones(envs.num_envs, dtype=bool)  # environments in their first episode
    step = 0
    while running.any() and step < limit:
        s = torch.as_tensor(observation, dtype=torch.float32, device=device).unflatten(0, (num_runs, -1))
        actions = q_net(s).argmax(-1).flatten()  # (E * episodes,)
        observation, rewards, terminated, truncated, _ = envs.step(actions.cpu().numpy())
        returns += rewards * running
        running &= ~(terminated | truncated)
        step += 1
    if running.any():
        print(f"{running.sum()} evaluated episodes were cut after {step:,} steps: wrap the environment in a TimeLimit")
    return returns.reshape(num_runs, -1)


# ---------------------------------------------------------------------------------------------------------- networks


class RunsMLP(nn.Module):
    """E multilayer perceptrons with ReLUs, one for each run: (E, B, in) -> (E, B, out). Initialised like nn.Linear.

    Inputs are standardised by `mean` and `std`. These are 0 and 1 until `standardize` sets them; for actions, always.
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
        """Set `mean` and `std` of the first S inputs to those of the states (E, B, S)."""
        self.mean[..., : s.shape[-1]] = s.mean(1, keepdim=True)
        self.std[..., : s.shape[-1]] = spread(s)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if i > 0:
                x = x.relu()
            x = torch.baddbmm(bias, x, weight)  # bias + x @ weight, for each run
        return x


def spread(x: Tensor) -> Tensor:
    """Standard deviations (E, 1, S) of x (E, B, S); 1 for a feature that doesn't vary."""
    std = x.std(1, keepdim=True)
    return torch.where(std > 1e-6, std, 1.0)


class DeltaModel(nn.Module):
    """M(s, a): one network predicts Δs (in units of its spread) and r, another one the logit of termination.

    The second one reads s', because where a step leads decides whether it ends the episode. Ends are too rare to be
    learned from (s, a).
    """

    def __init__(self, num_runs: int, num_features: int, num_actions: int) -> None:
        super().__init__()
        self.net = RunsMLP(num_runs, [num_features + num_actions, *MODEL_HIDDEN, num_features + 1])
        self.end_net = RunsMLP(num_runs, [num_features, *MODEL_HIDDEN, 1])
        self.num_actions = num_actions
        self.register_buffer("delta_std", torch.ones(num_runs, 1, num_features))

    def standardize(self, s: Tensor, s2: Tensor) -> None:
        """Measure the scales of states and of changes Δs on transitions s, s' (E, B, S)."""
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


def load_networks(networks: nn.Module, path: str, prefix: str = "") -> None:
    """Load a file's weights whose names start with `prefix`; exits if they are of other parts or sizes."""
    saved = load_checkpoint(path, "cpu").get("networks", {})
    weights = {name.removeprefix(prefix): x for name, x in saved.items() if name.startswith(prefix)}
    try:
        networks.load_state_dict(weights)
    except RuntimeError as e:
        sys.exit(f"{path} was made with other parts or sizes than these flags: {str(e).splitlines()[1].strip()}")


# --------------------------------------------------------------------------------------------------------- algorithm


def split_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows (E, B, R) -> s (E, B, S), a (E, B) int64, r (E, B), s' (E, B, S), end (E, B)."""
    S = (rows.shape[-1] - 3) // 2
    return rows[..., :S], rows[..., -3].long(), rows[..., -2], rows[..., S : 2 * S], rows[..., -1]


def sample_rows(replay: Tensor, filled: int, num: int, rng: torch.Generator) -> Tensor:
    """Rows (E, num, R), drawn for each run out of the first `filled` of its replay (E, N, R)."""
    runs = torch.arange(len(replay), device=replay.device)[:, None]
    return replay[runs, torch.randint(filled, (len(replay), num), generator=rng, device=replay.device)]


def dqn_loss(
    q_net: nn.Module, target_net: nn.Module, rows: Tensor, gamma: float, double: bool
) -> tuple[Tensor, Tensor]:
    """Means (E,) over the batch of the loss (r + γ (1 - end) Q'(s', a*) - Q(s, a))², and of Q(s, a).

    Q' is the target network. Double DQN has a* = argmax_a Q(s', a), DQN a* = argmax_a Q'(s', a). `end` may be a
    probability. It is 0 at a truncation, which doesn't stop the bootstrap.
    """
    s, a, r, s2, end = split_rows(rows)
    with torch.no_grad():
        next_q = target_net(s2)  # (E, B, A)
        best = (q_net(s2) if double else next_q).argmax(-1, keepdim=True)
        target = r + gamma * (1 - end) * next_q.gather(-1, best).squeeze(-1)
    q = q_net(s).gather(-1, a[..., None]).squeeze(-1)
    return ((q - target) ** 2).mean(1), q.detach().mean(1)


def delta_model_loss(env_model: DeltaModel, rows: Tensor) -> Tensor:
    """Loss (E,): squared errors of Δs (in units of its spread) and of r, plus the cross-entropy of termination."""
    s, a, r, s2, end = split_rows(rows)
    delta, reward = env_model(s, a)
    delta_loss = ((delta - (s2 - s) / env_model.delta_std) ** 2).mean((1, 2))
    end_loss = F.binary_cross_entropy_with_logits(env_model.end_logit(s2), end, reduction="none").mean(1)
    return delta_loss + ((reward - r) ** 2).mean(1) + end_loss


@torch.no_grad()
def imagine_rows(q_net: nn.Module, env_model: DeltaModel, s: Tensor, epsilon: float, rng: torch.Generator) -> Tensor:
    """Rows (E, B, R) of imagined steps from states (E, B, S), with actions ε-greedy by Q; `end` is a probability."""
    q = q_net(s)  # (E, B, A)
    explore = torch.rand(s.shape[:2], generator=rng, device=s.device) < epsilon
    random_action = torch.randint(q.shape[-1], s.shape[:2], generator=rng, device=s.device)
    a = torch.where(explore, random_action, q.argmax(-1))
    delta, r = env_model(s, a)
    s2 = s + delta * env_model.delta_std
    end = env_model.end_logit(s2).sigmoid()
    return torch.cat([s, s2, torch.stack([a.float(), r, end], -1)], -1)


def parse_args(argv: list[str] | None = None) -> Args:
    """The flags of the command line; the others are those of the checkpoint to resume or evaluate, or the defaults."""
    given = tyro.cli(Args, args=argv)
    if given.resume and given.evaluate:
        sys.exit("--resume goes on with a run, --evaluate plays an agent: give one of them")
    path = given.resume or given.evaluate
    args = tyro.cli(Args, args=argv, default=saved_args(path)) if path else given
    least = {
        "seed": 0, "num_seeds": 1, "planning_steps": 0, "total_timesteps": 1, "buffer_size": 1, "batch_size": 1,
        "train_frequency": 1, "target_network_frequency": 1, "eval_frequency": 1, "eval_episodes": 1,
    }  # fmt: skip
    for name, value in least.items():
        if getattr(args, name) < value:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {value} or more")
    for name in ("gamma", "tau", "start_e", "end_e"):
        if not 0 <= getattr(args, name) <= 1:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be from 0 to 1")
    return args


def main(args: Args) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    path = args.evaluate or args.resume
    saved = load_checkpoint(path, device) if path else None
    seed_everything(args.seed, args.torch_deterministic)
    E, K, B = args.num_seeds, args.planning_steps, args.batch_size
    eval_envs = make_feature_envs(args, E * args.eval_episodes)
    A, S = int(eval_envs.single_action_space.n), eval_envs.single_observation_space.shape[0]
    networks = nn.ModuleDict({
        "q_net": RunsMLP(E, [S, *args.hidden, A]),
        "target_net": RunsMLP(E, [S, *args.hidden, A]),
        "env_model": DeltaModel(E, S, A),
    }).to(device)  # fmt: skip
    q_net, target_net, env_model = networks["q_net"], networks["target_net"], networks["env_model"]
    target_net.load_state_dict(q_net.state_dict())
    if saved:
        load_networks(networks, path)
    if args.evaluate:
        returns = greedy_returns(eval_envs, q_net, device, seed=10_000 + args.seed)
        margin = 1.96 * returns.std() / math.sqrt(returns.size)  # of the 95 % interval
        print(f"greedy policy, {returns.size} episodes: return {returns.mean():.4g} ± {margin:.2g}")
        return

    optimizer = torch.optim.Adam(q_net.parameters(), lr=args.learning_rate, fused=True)
    model_optimizer = torch.optim.Adam(env_model.parameters(), lr=MODEL_LEARNING_RATE, fused=True)
    replay = torch.zeros(E, args.buffer_size, 2 * S + 3, device=device)  # (E, N, R)
    rng = torch.Generator(device).manual_seed(args.seed)  # batches, imagined actions
    coin = random.Random(args.seed)  # real actions
    first_step, updates, metric_rows = 0, 0, []
    if saved:
        if "replay" not in saved or args.buffer_size != saved["args"]["buffer_size"]:
            sys.exit(f"{path} can't go on: --resume takes a checkpoint.pt, and the --buffer-size of its run")
        first_step, updates, metric_rows = saved["global_step"], saved["updates"], saved["rows"]
        run_name = saved["run_name"]
        if first_step >= args.total_timesteps:
            sys.exit(f"{path} has had all of its {first_step} steps: --evaluate it, or give more --total-timesteps")
        optimizer.load_state_dict(saved["optimizer"])
        model_optimizer.load_state_dict(saved["model_optimizer"])
        replay[:, : saved["replay"].shape[1]] = saved["replay"]
        rng.set_state(saved["rng"].cpu())
        coin.seed(f"{args.seed} {first_step}")  # other numbers than the run began with
    else:
        run_name = new_run(f"{args.env_id}__{args.exp_name}__{args.seed}")
    envs = make_feature_envs(args, E, f"videos/{run_name}" if args.capture_video else None)
    logger = Logger(args, run_name, metric_rows)

    episodes: list[tuple[float, int]] = []  # (return, length) of those since the last row of metrics
    losses: dict[str, list[Tensor]] = {"td_loss": [], "q_values": [], "model_loss": []}  # since then, too
    observation, _ = envs.reset(seed=args.seed)
    s = torch.as_tensor(observation, dtype=torch.float32, device=device)  # (E, S)
    start, seconds = time.perf_counter(), 0.0  # `seconds` leaves evaluations out
    for global_step in tqdm(range(first_step + 1, args.total_timesteps + 1), disable=not sys.stderr.isatty()):
        # 1. Act: a_t by Q, ε-greedily.
        fall = (args.start_e - args.end_e) * global_step / max(1, args.exploration_steps)
        epsilon = max(args.end_e, args.start_e - fall)
        with torch.no_grad():
            greedy = q_net(s[:, None]).argmax(-1).flatten().tolist()  # (E,)
        actions = np.array([coin.randrange(A) if coin.random() < epsilon else a for a in greedy])
        observation, rewards, terminated, _, info = envs.step(actions)
        if "final_obs" in info:
            ended, statistics = info["_final_obs"], info["final_info"]["episode"]
            episodes += zip(statistics["r"][ended], statistics["l"][ended], strict=True)
        s2 = torch.as_tensor(true_next(observation, info), dtype=torch.float32, device=device)
        outcomes = s.new_tensor(np.stack([actions, rewards, terminated], 1))  # (E, 3)
        replay[:, (global_step - 1) % args.buffer_size] = torch.cat([s, s2, outcomes], 1)
        filled = min(global_step, args.buffer_size)
        s = torch.as_tensor(observation, dtype=torch.float32, device=device)

        if global_step > args.learning_starts and global_step % args.train_frequency == 0:
            if updates == 0 or global_step % STANDARDIZE_FREQUENCY == 0:
                states, next_states = replay[:, :filled, :S], replay[:, :filled, S : 2 * S]
                env_model.standardize(states, next_states)
                if args.standardize:
                    q_net.standardize(states)
                    target_net.standardize(states)
            # 2. Model: M(s, a) <- (Δs, r, end), on replayed real transitions.
            if args.planning == "model":
                for _ in range(MODEL_UPDATES):
                    model_loss = delta_model_loss(env_model, sample_rows(replay, filled, MODEL_BATCH_SIZE, rng))  # (E,)
                    model_optimizer.zero_grad()
                    model_loss.sum().backward()  # the sum: each run has its own gradient
                    model_optimizer.step()
                losses["model_loss"].append(model_loss.detach())
            # 3. Learn from a real batch, and 4. plan: learn from K more batches, replayed or imagined.
            batches = [sample_rows(replay, filled, B, rng)]
            if args.planning != "none" and K:
                rows = sample_rows(replay, filled, K * B, rng)
                if args.planning == "model":
                    rows = imagine_rows(q_net, env_model, rows[..., :S], PLANNING_EPSILON, rng)
                batches += rows.split(B, 1)
            for batch in batches:
                loss, q_values = dqn_loss(q_net, target_net, batch, args.gamma, args.double)  # (E,)
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

        # A row of metrics and a checkpoint.
        if global_step % args.eval_frequency != 0 and global_step != args.total_timesteps:
            continue
        seconds += time.perf_counter() - start
        returns = greedy_returns(eval_envs, q_net, device, seed=10_000 + args.seed).mean(1)  # (E,)
        metrics = {"eval/return": float(returns.mean())}
        if E > 1:
            metrics |= {f"eval/return_{args.seed + e}": float(returns[e]) for e in range(E)}
        metrics |= {f"losses/{name}": torch.stack(x).mean().item() for name, x in losses.items() if x}
        metrics |= {"charts/SPS": (global_step - first_step) * E / seconds, "charts/epsilon": epsilon}
        metrics["charts/updates"] = updates
        if episodes:
            metrics["charts/episodic_return"], metrics["charts/episodic_length"] = np.mean(episodes, 0).tolist()
        logger.log(global_step, metrics)
        episodes, losses = [], {name: [] for name in losses}
        saved_flags = asdict(replace(args, resume=None))
        agent = {"args": saved_flags, "networks": networks.state_dict(), "global_step": global_step}
        save_checkpoint(logger.path.with_name("checkpoint.pt"), agent | {
            "optimizer": optimizer.state_dict(), "model_optimizer": model_optimizer.state_dict(),
            "replay": replay[:, :filled].clone(), "rng": rng.get_state(),
            "run_name": run_name, "rows": logger.rows, "updates": updates,
        })  # fmt: skip
        if args.stop_return is not None and returns.min() >= args.stop_return:
            break
        start = time.perf_counter()

    if args.save_model:
        save_checkpoint(logger.path.with_name("agent.pt"), agent)
    print(f"wrote {logger.path}; to go on: --resume runs/{run_name}/checkpoint.pt and more --total-timesteps")
    logger.close()
    envs.close()


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("stopped; --resume runs/NAME/checkpoint.pt goes on from the last row of metrics, if there is one")
