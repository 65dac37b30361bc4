"""Distral with tables: Teh et al. 2017, "Distral: Robust Multitask Reinforcement Learning", arXiv 1707.04175.

Each of n tasks has a policy π_i that is pulled towards one distilled policy π_0, and π_0 is fitted to what all π_i do:
so what the tasks have in common is learned once. The three steps (act, soft Q-learning, distillation: section 2 of the
paper) are the three numbered blocks of the loop in `main`. The world is the paper's: two rooms and a corridor, each
task with a goal of its own; a state holds the last action and reward, so that π_0 can learn to keep going.

Different from the paper, which gives few numbers for this experiment: α, β, the rooms' sizes and rewards are ours or
those that readers of the paper reported (docs/distral.md), and π_0 has a closed form (`counts`) beside the gradient.

    python distral_tabular.py --num-seeds 20                # eight tasks, α = .8
    python distral_tabular.py --num-seeds 20 --alpha 0      # independent soft Q-learning: π_0 drops out
    python distral_tabular.py --num-seeds 20 --freeze       # π_0 stays uniform
    python distral_tabular.py --save-model; python distral_tabular.py --evaluate runs/NAME/agent.pt
    python distral_tabular.py --distilled runs/NAME/agent.pt --freeze --first-goal 8 --num-tasks 1   # a held-out goal

Shapes: `E` runs (seeds), `n` tasks, `S` states, `A` actions, `M` = E * n. All tasks of all runs move in lockstep.
"""

import contextlib
import csv
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
import tyro
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = pathlib.Path(__file__).stem  # the name of this experiment (of this file)
    seed: int = 1  # seed of the experiment
    torch_deterministic: bool = True  # only deterministic algorithms
    cuda: bool = True  # has no effect here: tables live on the CPU
    track: bool = False  # track the run in Weights and Biases
    wandb_project_name: str = "model-based-rl"  # the Weights and Biases project
    wandb_entity: str | None = None  # the Weights and Biases team
    capture_video: bool = False  # film an episode of each task's greedy policy into videos/<run_name>
    save_model: bool = False  # write the tables to runs/<run_name>/agent.pt at the end

    # Algorithm specific arguments
    num_seeds: int = 1  # independent runs E in lockstep; each has its own goals
    num_tasks: int = 8  # tasks n of a run: goals, drawn without repetition
    first_goal: int = 0  # skip so many of a run's goals: held-out ones for an earlier run with the same seed
    total_timesteps: int = 20_000  # steps in each task
    alpha: float = 0.8  # c_KL / (c_KL + c_Ent); 1: KL only; 0: independent soft Q-learning
    beta: float = 5.0  # 1 / (c_KL + c_Ent), the inverse temperature
    learning_rate: float = 0.5  # step size of Q
    gamma: float = 0.95  # discount
    num_steps: int = 10  # steps T of a rollout, after which Q and the distilled policy are updated
    distillation: Literal["counts", "gradient"] = "counts"  # from counts of actions, or by gradient ascent
    counts_decay: float = 0.97  # counts: what each rollout leaves of the older ones, which are outdated
    pseudo_count: float = 0.1  # counts: so many of each action are taken as seen
    distill_learning_rate: float = 10.0  # gradient: step size of the distilled policy's logits
    freeze: bool = False  # never update the distilled policy
    previous_action: bool = True  # states hold the last action and reward
    max_episode_steps: int = 100  # steps after which an episode is truncated
    eval_frequency: int = 200  # steps between evaluations, each a row of metrics
    distilled: str | None = None  # start from the distilled policy of this agent.pt
    evaluate: str | None = None  # evaluate the policies of this agent.pt, and stop


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


# -------------------------------------------------------------------------------------------------------- environment

ROOMS = """
.....   .....
.....   .....
.............
.....   .....
.....   .....
"""
STEP_REWARD, GOAL_REWARD = -0.1, 1.0
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))  # up, down, left, right
NUM_MOVES = len(MOVES)  # A


def read_rooms(text: str = ROOMS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Floor cells as (row, column) (C, 2); where each action leads (C, A), on the spot at a wall; corridor (C,) bool.

    A corridor's cell has floor left and right of it, and none above and below.
    """
    grid = np.array([list(row) for row in text.strip("\n").split("\n")]) == "."
    cells = np.argwhere(grid)
    number = {(int(y), int(x)): c for c, (y, x) in enumerate(cells)}
    ahead = np.array([[number.get((y + dy, x + dx), c) for dy, dx in MOVES] for (y, x), c in number.items()])
    here = np.arange(len(cells))
    return cells, ahead, (ahead[:, 0] == here) & (ahead[:, 1] == here)


def rooms_step(ahead: np.ndarray, cell: Any, goal: Any, action: Any) -> tuple[Any, Any, Any]:
    """The rules, for one task or arrays of them: the next cell, its reward, and whether the goal ends the episode."""
    cell2 = ahead[cell, action]
    terminated = cell2 == goal
    return cell2, np.where(terminated, GOAL_REWARD, STEP_REWARD), terminated


class TwoRoomsEnv(gym.Env):
    """Two rooms and a corridor; starts anywhere but at its goal; an observation is the (cell, previous) of `state`.

    `previous` is 0 at the start, then 1 + the last action. With it goes the last reward, which is no coordinate of its
    own: 0 at the start and -.1 after every step that didn't end the episode.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 8}

    def __init__(self, goal: int = 0, render_mode: str | None = None) -> None:
        self.cells, self.ahead, _ = read_rooms()
        if not 0 <= goal < len(self.cells):
            raise ValueError(f"goal {goal}: there are cells 0 to {len(self.cells) - 1}")
        self.goal, self.render_mode = goal, render_mode
        self.observation_space = gym.spaces.MultiDiscrete([len(self.cells), 1 + NUM_MOVES])
        self.action_space = gym.spaces.Discrete(NUM_MOVES)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.cell = int((self.goal + self.np_random.integers(1, len(self.cells))) % len(self.cells))
        return np.array([self.cell, 0]), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        cell, reward, terminated = rooms_step(self.ahead, self.cell, self.goal, action)
        self.cell = int(cell)
        return np.array([self.cell, 1 + int(action)]), float(reward), bool(terminated), False, {}

    def render(self) -> Any:
        grid = np.full(self.cells.max(0) + 1, " ")
        grid[tuple(self.cells.T)] = "."
        grid[tuple(self.cells[self.goal])] = "G"
        grid[tuple(self.cells[self.cell])] = "@"
        if self.render_mode == "ansi":
            return "\n".join("".join(row) for row in grid)
        ink = {" ": (0, 0, 0), "G": (254, 126, 125), "@": (160, 212, 56)}
        pixels = np.array([[ink.get(cell, (243, 248, 238)) for cell in row] for row in grid], dtype=np.uint8)
        return pixels.repeat(16, 0).repeat(16, 1)


gym.register("TwoRooms-v0", entry_point=TwoRoomsEnv, max_episode_steps=100)


def draw_goals(seed: int, num: int) -> np.ndarray:
    """The first `num` goals of a run: cells of the rooms (not of the corridor) in the run's own order."""
    rooms = np.flatnonzero(~read_rooms()[2])
    if num > len(rooms):
        sys.exit(f"--first-goal and --num-tasks ask for {num} goals, the rooms have {len(rooms)} cells")
    return np.random.default_rng(seed).permutation(rooms)[:num]


# ---------------------------------------------------------------------------------------------------------- algorithm


def soft_values(q: np.ndarray, log_prior: np.ndarray, alpha: float, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """V_i = (1/β) log Σ_a π_0(a)^α exp(β Q_i(a)) (...), and log π_i = α log π_0 + β (Q_i - V_i) (..., A)."""
    logits = alpha * log_prior + beta * q  # (..., A)
    top = logits.max(-1, keepdims=True)  # exp(βQ) itself overflows from βQ = 710 on
    log_sum = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return log_sum[..., 0] / beta, logits - log_sum


def soft_q_update(Q: np.ndarray, where: tuple[np.ndarray, ...], target: np.ndarray, learning_rate: float) -> np.ndarray:
    """Q_i(s,a) <- Q_i(s,a) + η (r + γ V_i(s') - Q_i(s,a)) at the pairs `where`, in place; returns the errors."""
    error = target - Q[where]
    Q[where] += learning_rate * error
    return error


def distilled_from_counts(counts: np.ndarray, pseudo_count: float) -> np.ndarray:
    """log π_0 (..., A) that maximises Σ_i Σ_t γ^t log π_0(a_t|s_t): in proportion to the discounted counts.

    The factor α/β of the objective scales all of it, and moves no maximum.
    """
    seen = counts + pseudo_count
    return np.log(seen / seen.sum(-1, keepdims=True))


def distillation_gradient(
    log_prior: np.ndarray, where: tuple[np.ndarray, ...], action: np.ndarray, weight: np.ndarray, scale: float
) -> np.ndarray:
    """∇ of (α/β) Σ_i Σ_t γ^t log π_0(a_t|s_t) in π_0's logits, those of `log_prior`; `scale` is α/β, `weight` γ^t.

    Of one step: (α/β) γ^t (1[a = a_t] - π_0(a|s_t)).
    """
    gradient = np.zeros_like(log_prior)
    np.add.at(gradient, where, scale * weight[..., None] * (np.eye(NUM_MOVES)[action] - np.exp(log_prior[where])))
    return gradient


def episode_returns(
    policy: np.ndarray | None, ahead: np.ndarray, goals: np.ndarray, previous: int, gamma: float, steps: int
) -> np.ndarray:
    """Exact discounted returns (M,), means over all starts, of policies (S, A, M) in tasks with `goals` (M,).

    `policy` None: the best there is. `previous` is 1 + A, or 1 if states don't hold the last action.
    """
    C, M = len(ahead), len(goals)
    arrival = ahead if previous == 1 else ahead * previous + 1 + np.arange(NUM_MOVES)  # (C, A): the state after a
    following = arrival.repeat(previous, 0)  # (S, A)
    end = ahead.repeat(previous, 0)[..., None] == goals  # (S, A, M)
    reward, discount = np.where(end, GOAL_REWARD, STEP_REWARD), gamma * ~end
    value = np.zeros((C * previous, M))
    for _ in range(steps):
        q = reward + discount * value[following]  # (S, A, M)
        value = q.max(1) if policy is None else (policy * q).sum(1)
    starts = np.arange(C)[:, None] != goals  # (C, M)
    return (value[::previous] * starts).sum(0) / starts.sum(0)


def going_on(prior: np.ndarray, corridor: np.ndarray, previous: int) -> np.ndarray:
    """Mean probability (E,) under π_0 (E, S, A) that who came into the corridor's cells by left or right goes on so."""
    cells = np.flatnonzero(corridor)
    states = [cells * previous + (1 + a if previous > 1 else 0) for a in (2, 3)]
    return np.mean([prior[:, s, a] for s, a in zip(states, (2, 3), strict=True)], axis=(0, 2))


def film_tasks(args: Args, q: np.ndarray, log_prior: np.ndarray, goals: np.ndarray, folder: str) -> None:
    """One episode of each task's greedy policy (tables (n, S, A) and (S, A)), as GIFs in `folder`."""
    from PIL import Image  # comes with matplotlib

    os.makedirs(folder, exist_ok=True)
    for i, goal in enumerate(goals):
        env = gym.make("TwoRooms-v0", goal=int(goal), render_mode="rgb_array")
        (cell, last), _ = env.reset(seed=args.seed)
        film, done = [Image.fromarray(env.render())], False
        while not done:
            s = cell * (1 + NUM_MOVES) + last if args.previous_action else cell
            (cell, last), _, terminated, truncated, _ = env.step(
                int((args.alpha * log_prior[s] + args.beta * q[i, s]).argmax())
            )
            film.append(Image.fromarray(env.render()))
            done = terminated or truncated
        film[0].save(f"{folder}/task{i}.gif", save_all=True, append_images=film[1:], duration=150, loop=0)


def check_distral_tabular(args: Args) -> None:
    for name in ("num_seeds", "num_tasks", "total_timesteps", "num_steps", "max_episode_steps", "eval_frequency"):
        if getattr(args, name) < 1:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    for name in ("alpha", "gamma", "counts_decay"):
        if not 0 <= getattr(args, name) <= 1:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be from 0 to 1")
    for name in ("beta", "learning_rate", "pseudo_count", "distill_learning_rate"):
        if not 0 < getattr(args, name) < math.inf:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0, and finite")
    for name in ("seed", "first_goal"):
        if getattr(args, name) < 0:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 0 or more")
    if args.num_steps > args.eval_frequency or args.eval_frequency % args.num_steps:
        sys.exit(f"--eval-frequency {args.eval_frequency}: must be a multiple of --num-steps {args.num_steps}")


def main(args: Args) -> dict[str, Any]:
    """Train, or evaluate; returns the tables and the rows of metrics, evaluations with a number for each run."""
    check_distral_tabular(args)
    path = args.evaluate or args.distilled
    state = load_checkpoint(path, "cpu") if path else None
    if state is not None and not {"log_prior", "Q", "counts", "goals"} <= set(state):
        sys.exit(f"{path} holds no tables of distral_tabular.py")
    if args.evaluate:
        args = replace(saved_args(path), evaluate=args.evaluate)
    seed_everything(args.seed, args.torch_deterministic)
    rng = np.random.default_rng(args.seed)
    cells, ahead, corridor = read_rooms()
    E, n, T, C, A = args.num_seeds, args.num_tasks, args.num_steps, len(cells), NUM_MOVES
    alpha, beta, gamma = args.alpha, args.beta, args.gamma
    previous = 1 + A if args.previous_action else 1
    goals = np.stack([draw_goals(args.seed + e, args.first_goal + n)[args.first_goal :] for e in range(E)])  # (E, n)
    e, i = np.arange(E)[:, None], np.arange(n)
    S = C * previous
    Q = np.zeros((E, n, S, A))
    counts = np.zeros((E, S, A))  # discounted counts of all tasks' actions
    log_prior = np.full((E, S, A), -math.log(A))  # log π_0
    if state is not None:
        if state["log_prior"].shape != log_prior.shape:
            sys.exit(f"{path} has tables {tuple(state['log_prior'].shape)}, these flags {log_prior.shape}: same flags?")
        counts, log_prior = state["counts"].numpy().copy(), state["log_prior"].numpy().copy()
        if args.distilled and (goals[:, :, None] == state["goals"].numpy()[:, None]).any():
            print(f"the π_0 of {path} has seen some of these goals: --first-goal skips them", file=sys.stderr)

    def returns(policy: np.ndarray | None) -> np.ndarray:
        """Exact returns (E, n) of policies (E, n, S, A)."""
        flat = None if policy is None else np.moveaxis(policy.reshape(E * n, S, A), 0, 2).copy()  # (S, A, M)
        return episode_returns(flat, ahead, goals.ravel(), previous, gamma, args.max_episode_steps).reshape(E, n)

    best, worst = returns(None), returns(np.full((E, n, S, A), 1 / A))

    def evaluations() -> dict[str, list[float]]:
        """Of each run: returns as shares of the way from random to optimal play, means over its tasks."""
        _, log_pi = soft_values(Q, log_prior[:, None], alpha, beta)  # (E, n, S, A)
        greedy = np.eye(A)[(log_pi + 1e-9 * rng_ties).argmax(-1)]
        prior = np.broadcast_to(np.exp(log_prior)[:, None], Q.shape)
        policies = {"greedy": greedy, "policy": np.exp(log_pi), "distilled": prior}
        shares = {f"eval/{k}": ((returns(v) - worst) / (best - worst)).mean(1) for k, v in policies.items()}
        shares["eval/going_on"] = going_on(np.exp(log_prior), corridor, previous)
        return {name: share.tolist() for name, share in shares.items()}

    rng_ties = np.random.default_rng(args.seed).random((E, n, S, A))  # ties of the greedy policy fall the same way
    if args.evaluate:
        Q = state["Q"].numpy()
        result = evaluations()
        print(" ".join(f"{name}={np.mean(share):.4g}" for name, share in result.items()))
        return result
    run_name = new_run(f"TwoRooms-v0__{args.exp_name}__{args.seed}")
    logger = Logger(args, run_name)

    def start_cells() -> np.ndarray:
        return (goals + rng.integers(1, C, (E, n))) % C  # anywhere but at the goal

    def state_number(cell: np.ndarray, action: np.ndarray | None) -> np.ndarray:
        return cell * previous + (0 if action is None or previous == 1 else 1 + action)

    cell, age, episodic_return = start_cells(), np.zeros((E, n), dtype=int), np.zeros((E, n))
    s = state_number(cell, None)
    results: list[dict[str, Any]] = []
    errors: list[float] = []
    finished: list[np.ndarray] = []
    start = time.perf_counter()
    for global_step in tqdm(range(0, args.total_timesteps + 1, T), disable=not sys.stderr.isatty()):
        over = global_step + T > args.total_timesteps
        if global_step % args.eval_frequency == 0 or over:
            result = evaluations()
            metrics = {name: sum(share) / E for name, share in result.items()}
            metrics["charts/SPS"] = global_step * E * n / (time.perf_counter() - start)
            if errors:
                metrics["losses/soft_q_error"] = sum(errors) / len(errors)
            if ended := sum(len(x) for x in finished):
                metrics["charts/episodic_return"] = float(sum(x.sum() for x in finished)) / ended
            logger.log(global_step, metrics)
            results.append({"global_step": global_step, **metrics, **result})
            errors, finished = [], []
        if over:
            break

        # 1. Act: T steps in each task, a_t ~ π_i(a|s) = π_0(a|s)^α exp(β (Q_i(s,a) - V_i(s)))
        rollout = []
        for _ in range(T):
            _, log_pi = soft_values(Q[e, i, s], log_prior[e, s], alpha, beta)  # (E, n, A)
            a = (log_pi - np.log(rng.standard_exponential(log_pi.shape))).argmax(-1)  # the Gumbel trick
            cell, r, terminated = rooms_step(ahead, cell, goals, a)
            s2 = state_number(cell, a)  # the true next state, also where the episode ends
            rollout.append((s, a, r, s2, terminated, gamma**age))
            age += 1
            episodic_return += r
            done = terminated | (age >= args.max_episode_steps)
            finished.append(episodic_return[done])
            cell = np.where(done, start_cells(), cell)
            s = np.where(done, state_number(cell, None), s2)
            age[done], episodic_return[done] = 0, 0.0

        # 2. Soft Q-learning, π_0 as it is: Q_i(s,a) <- Q_i + η (r + γ V_i(s') - Q_i), the rollout's last step first.
        # The regularisation is in V_i, so r stays the task's reward: both would count it twice.
        for st, at, r, s2, terminated, _ in reversed(rollout):
            V, _ = soft_values(Q[e, i, s2], log_prior[e, s2], alpha, beta)  # (E, n)
            error = soft_q_update(Q, (e, i, st, at), r + gamma * V * ~terminated, args.learning_rate)
            errors.append(float(np.abs(error).mean()))

        # 3. Distillation, π_i as they are: π_0 = argmax Σ_i E_{π_i}[Σ_t γ^t (α/β) log π_0(a_t|s_t)]
        if not args.freeze:
            st, at, weight = (np.stack([step[k] for step in rollout], -1) for k in (0, 1, 5))  # (E, n, T)
            runs = e[..., None]
            if args.distillation == "counts":
                counts *= args.counts_decay
                np.add.at(counts, (runs, st, at), weight)
                log_prior = distilled_from_counts(counts, args.pseudo_count)
            else:
                gradient = distillation_gradient(log_prior, (runs, st), at, weight, alpha / beta)
                logits = log_prior + args.distill_learning_rate * gradient
                log_prior = soft_values(logits, 0.0, 0.0, 1.0)[1]  # normalised

    if args.save_model:
        tables = {"Q": Q, "counts": counts, "log_prior": log_prior, "goals": goals}
        tensors = {name: torch.from_numpy(table) for name, table in tables.items()}
        save_checkpoint(logger.path.with_name("agent.pt"), {"args": asdict(args), **tensors})
        print(f"wrote {logger.path.with_name('agent.pt')}")
    if args.capture_video:
        film_tasks(args, Q[0], log_prior[0], goals[0], f"videos/{run_name}")
    logger.close()
    return {"Q": Q, "log_prior": log_prior, "counts": counts, "goals": goals, "rows": results}


if __name__ == "__main__":
    main(tyro.cli(Args))
