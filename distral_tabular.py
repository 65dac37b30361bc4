"""Distral with tables: Teh et al. 2017, "Distral: Robust Multitask Reinforcement Learning", arXiv 1707.04175.

Each of n tasks has a policy π_i that is pulled towards one distilled policy π_0, and π_0 is fitted to what all π_i do.
So what the tasks have in common is learned once. The three steps (act, soft Q-learning, distillation: section 2 of the
paper) are the three numbered blocks of the loop in `main`. The world and α = 1 (KL only) are the paper's: two rooms and
a corridor, each task with a goal of its own. A state holds the last action and reward, so that π_0 can keep going.

The paper gives few numbers for this experiment: β, the rooms' sizes and the rewards are ours, or what readers of the
paper reported (docs/distral.md).

    python distral_tabular.py --num-seeds 20                # eight tasks, KL only
    python distral_tabular.py --num-seeds 20 --alpha 0      # independent soft Q-learning: π_0 drops out
    python distral_tabular.py --evaluate runs/NAME/agent.npz
    python distral_tabular.py --distilled runs/NAME/agent.npz --freeze --first-goal 8 --num-tasks 1  # a held-out goal

Shapes: `E` runs (seeds) of `n` tasks, all in lockstep; `S` states, `A` actions, `C` cells, `M` = E * n.
"""

import contextlib
import csv
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = pathlib.Path(__file__).stem  # the name of this experiment (of this file)
    seed: int = 1  # seed of the experiment
    track: bool = False  # track the run in Weights and Biases
    wandb_project_name: str = "model-based-rl"  # the Weights and Biases project
    wandb_entity: str | None = None  # the Weights and Biases team
    save_model: bool = True  # write the tables to runs/<run_name>/agent.npz at the end

    # Algorithm specific arguments
    num_seeds: int = 1  # independent runs E in lockstep; each has its own goals
    num_tasks: int = 8  # tasks n of a run: goals, drawn without repetition
    first_goal: int = 0  # skip so many of a run's goals: an earlier run with the same seed never saw the others
    total_timesteps: int = 20_000  # steps in each task
    alpha: float = 1.0  # c_KL / (c_KL + c_Ent); 1: KL only; 0: independent soft Q-learning
    beta: float = 5.0  # 1 / (c_KL + c_Ent), the inverse temperature
    learning_rate: float = 0.5  # step size of Q
    gamma: float = 0.95  # discount
    num_steps: int = 10  # steps T of a rollout, after which Q and the distilled policy are updated
    counts_decay: float = 0.97  # each rollout first shrinks the older counts, which are outdated, by this factor
    pseudo_count: float = 0.1  # added to each count, so that no probability is 0
    freeze: bool = False  # never update the distilled policy
    previous_action: bool = True  # states hold the last action and reward
    max_episode_steps: int = 100  # steps after which an episode is truncated
    eval_frequency: int = 200  # steps between evaluations, each a row of metrics
    distilled: str | None = None  # start from the distilled policy of this agent.npz
    evaluate: str | None = None  # evaluate the policies of this agent.npz, under its flags, and stop


# ---------------------------------------------------------------------------------- utilities, the same in every script


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


def save_tables(path: pathlib.Path, args: Args, tables: dict[str, np.ndarray]) -> None:
    """The tables and, as text, the flags."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, args=json.dumps(asdict(args)), **tables)


def load_tables(path: str) -> tuple[Args, dict[str, np.ndarray]]:
    """What `save_tables` wrote. np.load reads no pickles: a foreign file can't run code."""
    try:
        with np.load(path) as file:
            tables = dict(file)
        return Args(**json.loads(str(tables.pop("args")))), tables
    except OSError as e:
        sys.exit(f"can't read the tables {path}: {e.strerror or e}")
    except Exception as e:  # a damaged file can fail anywhere in numpy's reader
        sys.exit(f"can't read the tables {path}: damaged, or not an agent.npz of this script ({type(e).__name__})")


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
    """Floor cells as (row, column) (C, 2); the cell that each action leads to (C, A); whether it's the corridor (C,).

    A move into a wall leads nowhere. A corridor's cell has walls above and below.
    """
    grid = np.array([list(row) for row in text.strip("\n").split("\n")]) == "."
    cells = np.argwhere(grid)
    number = {(int(y), int(x)): c for c, (y, x) in enumerate(cells)}
    ahead = np.array([[number.get((y + dy, x + dx), c) for dy, dx in MOVES] for (y, x), c in number.items()])
    here = np.arange(len(cells))
    return cells, ahead, (ahead[:, 0] == here) & (ahead[:, 1] == here)


def rooms_step(ahead: np.ndarray, cell: Any, goal: Any, action: Any) -> tuple[Any, Any, Any]:
    """The next cell, the reward, and whether that cell is the goal, which ends the episode; for arrays of tasks."""
    cell2 = ahead[cell, action]
    terminated = cell2 == goal
    return cell2, np.where(terminated, GOAL_REWARD, STEP_REWARD), terminated


def state_after(cell: Any, action: Any, num_last: int) -> Any:
    """The state in the cell that an action led to. A state is a cell and the last action: s = cell * num_last + last.

    `last` is 0 at the start of an episode and 1 + a after action a, so `num_last` is 1 + A (1 without the action).
    The last reward adds nothing: it is 0 at the start and STEP_REWARD after every step that didn't end the episode.
    """
    return cell * num_last + (1 + action if num_last > 1 else 0)


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


def soft_q_update(Q: np.ndarray, where: tuple[np.ndarray, ...], target: np.ndarray, learning_rate: float) -> None:
    """Q_i(s,a) <- Q_i(s,a) + η (r + γ V_i(s') - Q_i(s,a)) at the pairs `where`, in place."""
    Q[where] += learning_rate * (target - Q[where])


def distilled_from_counts(counts: np.ndarray, pseudo_count: float) -> np.ndarray:
    """log π_0 (..., A) that maximises Σ_i Σ_t γ^t log π_0(a_t|s_t): π_0 is in proportion to the discounted counts.

    The objective's factor α/β doesn't change where the maximum is.
    """
    seen = counts + pseudo_count
    return np.log(seen / seen.sum(-1, keepdims=True))


def episode_returns(
    policy: np.ndarray | None, ahead: np.ndarray, goals: np.ndarray, num_last: int, gamma: float, steps: int
) -> np.ndarray:
    """Exact discounted returns (E, n), means over all starts, of policies (E, n, S, A) in tasks with `goals` (E, n).

    With `policy` None, the returns of optimal play. Episodes end after `steps`.
    """
    C, M, flat = len(ahead), goals.size, goals.ravel()
    if policy is not None:
        policy = np.moveaxis(policy.reshape(M, -1, NUM_MOVES), 0, 2).copy()  # (S, A, M): the fastest for numpy
    arrival = state_after(ahead, np.arange(NUM_MOVES), num_last)  # (C, A)
    following = arrival.repeat(num_last, 0)  # (S, A): where a leads doesn't depend on the last action
    end = ahead.repeat(num_last, 0)[..., None] == flat  # (S, A, M)
    reward, discount = np.where(end, GOAL_REWARD, STEP_REWARD), gamma * ~end
    value = np.zeros((C * num_last, M))
    for _ in range(steps):
        q = reward + discount * value[following]  # (S, A, M)
        value = q.max(1) if policy is None else (policy * q).sum(1)
    starts = np.arange(C)[:, None] != flat  # (C, M)
    return ((value[::num_last] * starts).sum(0) / starts.sum(0)).reshape(goals.shape)


def going_on(prior: np.ndarray, corridor: np.ndarray, num_last: int) -> np.ndarray:
    """Mean probability (E,) that π_0 (E, S, A) repeats a step left or right that led to a cell of the corridor."""
    cells = np.flatnonzero(corridor)
    again = [prior[:, state_after(cells, a, num_last), a] for a in (2, 3)]  # left, right
    return np.mean(again, axis=(0, 2))


def evaluate_tables(
    args: Args, Q: np.ndarray, log_prior: np.ndarray, goals: np.ndarray, best: np.ndarray, worst: np.ndarray
) -> dict[str, np.ndarray]:
    """Scores of each run (E,), means over its tasks: 0 is the return of random play (`worst`), 1 of optimal (`best`).

    Tables Q (E, n, S, A) and log π_0 (E, S, A); goals, best and worst returns (E, n).
    """
    _, ahead, corridor = read_rooms()
    num_last = 1 + NUM_MOVES if args.previous_action else 1
    _, log_pi = soft_values(Q, log_prior[:, None], args.alpha, args.beta)  # (E, n, S, A)
    ties = np.random.default_rng(args.seed).random(Q.shape)  # greedy ties break at random, always alike
    policies = {
        "greedy": np.eye(NUM_MOVES)[(log_pi + 1e-9 * ties).argmax(-1)],
        "policy": np.exp(log_pi),
        "distilled": np.broadcast_to(np.exp(log_prior)[:, None], Q.shape),
    }
    scores = {}
    for name, policy in policies.items():
        returns = episode_returns(policy, ahead, goals, num_last, args.gamma, args.max_episode_steps)  # (E, n)
        scores[f"eval/{name}"] = ((returns - worst) / (best - worst)).mean(1)
    scores["eval/going_on"] = going_on(np.exp(log_prior), corridor, num_last)
    return scores


def parse_args(argv: list[str] | None = None) -> Args:
    """The flags of the command line; the others are those of the file to evaluate, or the defaults."""
    args = tyro.cli(Args, args=argv)
    if args.evaluate:
        args = tyro.cli(Args, args=argv, default=load_tables(args.evaluate)[0])
    if not 0 <= args.alpha <= 1 or not 0 < args.beta < math.inf:
        sys.exit(f"--alpha {args.alpha} must be from 0 to 1, --beta {args.beta} above 0 and finite")
    if args.pseudo_count <= 0:
        sys.exit(f"--pseudo-count {args.pseudo_count} must be above 0: π_0 of a state never seen would be 0 / 0")
    return args


def main(args: Args) -> dict[str, Any]:
    """Train, or evaluate; returns the tables, and the rows of metrics with one number a run."""
    rng = np.random.default_rng(args.seed)
    _, ahead, _ = read_rooms()
    E, n, T, C, A = args.num_seeds, args.num_tasks, args.num_steps, len(ahead), NUM_MOVES
    alpha, beta, gamma = args.alpha, args.beta, args.gamma
    num_last = 1 + A if args.previous_action else 1
    seeds = range(args.seed, args.seed + E)
    goals = np.stack([draw_goals(seed, args.first_goal + n)[args.first_goal :] for seed in seeds])  # (E, n)
    e, i = np.arange(E)[:, None], np.arange(n)  # Q[e, i, s] with s (E, n): the row of each run's and task's state
    Q = np.zeros((E, n, C * num_last, A))
    counts = np.zeros_like(Q[:, 0])  # (E, S, A), discounted counts of all tasks' actions
    log_prior = np.full_like(counts, -math.log(A))  # log π_0
    if path := args.evaluate or args.distilled:
        _, tables = load_tables(path)
        if tables["log_prior"].shape != log_prior.shape or (args.evaluate and tables["Q"].shape != Q.shape):
            sys.exit(f"{path} has tables {tables['Q'].shape} (runs, tasks, states, actions), these flags {Q.shape}")
        counts, log_prior = tables["counts"], tables["log_prior"]
    best = episode_returns(None, ahead, goals, num_last, gamma, args.max_episode_steps)
    worst = episode_returns(np.full(Q.shape, 1 / A), ahead, goals, num_last, gamma, args.max_episode_steps)
    if args.evaluate:
        result = evaluate_tables(args, tables["Q"], log_prior, goals, best, worst)
        print(" ".join(f"{name}={np.mean(score):.4g}" for name, score in result.items()))
        return result
    run_name = new_run(f"TwoRooms__{args.exp_name}__{args.seed}")
    logger = Logger(args, run_name)

    def start_cells() -> np.ndarray:
        return (goals + rng.integers(1, C, (E, n))) % C  # anywhere but at the goal

    cell, age = start_cells(), np.zeros((E, n), dtype=int)
    s = cell * num_last
    rows: list[dict[str, Any]] = []
    for global_step in tqdm(range(0, args.total_timesteps + 1, T), disable=not sys.stderr.isatty()):
        over = global_step + T > args.total_timesteps  # no time for another rollout
        if global_step % args.eval_frequency < T or over:  # at the first rollout from each multiple on
            result = evaluate_tables(args, Q, log_prior, goals, best, worst)
            logger.log(global_step, {name: float(score.mean()) for name, score in result.items()})
            rows.append({"global_step": global_step, **result})
        if over:
            break

        # 1. Act: T steps in each task, a_t ~ π_i(a|s) = π_0(a|s)^α exp(β (Q_i(s,a) - V_i(s)))
        rollout = []
        for _ in range(T):
            _, log_pi = soft_values(Q[e, i, s], log_prior[e, s], alpha, beta)  # (E, n, A)
            a = (log_pi - np.log(rng.standard_exponential(log_pi.shape))).argmax(-1)  # the Gumbel trick
            cell, r, terminated = rooms_step(ahead, cell, goals, a)
            s2 = state_after(cell, a, num_last)  # the true next state, before any reset
            rollout.append((s, a, r, s2, terminated, gamma**age))
            age += 1
            done = terminated | (age >= args.max_episode_steps)
            cell = np.where(done, start_cells(), cell)
            s = np.where(done, cell * num_last, s2)
            age[done] = 0

        # 2. Soft Q-learning, π_0 as it is: Q_i(s,a) <- Q_i + η (r + γ V_i(s') - Q_i), the rollout's last step first.
        # V_i holds the regularisation. So r stays the task's reward: with it in r too, it would count twice.
        for st, at, r, s2, terminated, _ in reversed(rollout):
            V, _ = soft_values(Q[e, i, s2], log_prior[e, s2], alpha, beta)  # (E, n)
            soft_q_update(Q, (e, i, st, at), r + gamma * V * ~terminated, args.learning_rate)

        # 3. Distillation, π_i as they are: π_0 = argmax Σ_i E_{π_i}[Σ_t γ^t (α/β) log π_0(a_t|s_t)]
        if not args.freeze:
            states, actions, *_, weights = (np.stack(x, -1) for x in zip(*rollout, strict=True))  # (E, n, T)
            counts *= args.counts_decay
            np.add.at(counts, (e[..., None], states, actions), weights)
            log_prior = distilled_from_counts(counts, args.pseudo_count)

    tables = {"Q": Q, "counts": counts, "log_prior": log_prior, "goals": goals}
    if args.save_model:
        save_tables(logger.path.with_name("agent.npz"), args, tables)
        print(f"to measure it again: python {sys.argv[0]} --evaluate runs/{run_name}/agent.npz")
    logger.close()
    return {**tables, "rows": rows}


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("stopped: metrics.csv has the rows so far, the tables are lost")
