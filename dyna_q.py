"""Dyna-Q with tables: Sutton 1990; Sutton & Barto, Reinforcement Learning (2nd edition), chapter 8.

An agent learns Q from each real step, keeps what the step did in a table (its model), and then learns from K imagined
steps out of that table. The four steps are the four numbered blocks of the loop in `main`; K = 0 is Q-learning.
Beside it: Dyna-Q+ (--kappa), prioritised sweeping (--prioritized), and counts for stochastic environments.

Different from the book: planning picks its actions with Q, ε-greedily among the actions tried in the state (--planning-
action q, the rule of the lecture that this project follows). Sutton & Barto's rule, any tried action, is `visited`.

    python dyna_q.py --planning-steps 50 --planning-action visited         # the book's Dyna maze
    python dyna_q.py --env-id ShortcutMaze-v0 --alpha 1 --planning-steps 50 --kappa 1e-3 --planning-action visited
    python dyna_q.py --env-id FrozenLake-v1 --model counts --planning-steps 20 --gamma 0.99 --total-timesteps 20000
    python dyna_q.py --env-id Sokoban-v0 --gamma 0.99 --planning-steps 50 --save-model
    python dyna_q.py --evaluate runs/NAME/agent.pt

`K` planning steps; `s`, `a` are numbers. Tables are lists of lists: reading one cell of an array costs ten times more.
"""

import contextlib
import csv
import heapq
import math
import os
import pathlib
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from tqdm import tqdm

import sokoban_env


@dataclass
class Args:
    exp_name: str = pathlib.Path(__file__).stem  # the name of this experiment (of this file)
    seed: int = 1  # seed of the experiment
    torch_deterministic: bool = True  # only deterministic algorithms
    cuda: bool = True  # has no effect here: tables live on the CPU
    track: bool = False  # track the run in Weights and Biases
    wandb_project_name: str = "model-based-rl"  # the Weights and Biases project
    wandb_entity: str | None = None  # the Weights and Biases team
    capture_video: bool = False  # film episodes into videos/<run_name>
    save_model: bool = False  # write the table to runs/<run_name>/agent.pt at the end

    # Algorithm specific arguments
    env_id: str = "DynaMaze-v0"  # a maze (Dyna, Blocking, Shortcut), or any with discrete states, actions
    total_timesteps: int = 6000  # real steps
    num_episodes: int = 0  # stop after so many episodes, if they come sooner (0: never)
    alpha: float = 0.1  # step size alpha
    gamma: float = 0.95  # discount gamma
    epsilon: float = 0.1  # probability of a random action
    planning_steps: int = 5  # imagined updates K after each real step; 0 is Q-learning
    planning_action: Literal["q", "visited"] = "q"  # planning: epsilon-greedy, or any tried action
    model: Literal["last", "counts"] = "last"  # the last outcome, or each as often as it was seen
    kappa: float = 0.0  # Dyna-Q+: planning adds kappa * sqrt(real steps since a pair was tried)
    prioritized: bool = False  # prioritised sweeping: the largest errors first, and backwards from them
    theta: float = 1e-4  # prioritised sweeping: the smallest error that enters the queue
    maze_scale: int = 1  # mazes: each cell becomes so many cells a side
    size: int = 6  # Sokoban: board size
    num_boxes: int = 1  # Sokoban: boxes
    level_seed: int = 11  # Sokoban: which generated level, the same in every episode
    log_frequency: int = 1000  # real steps between rows of metrics (0: none)
    evaluate: str | None = None  # evaluate the greedy policy of this agent.pt, and stop
    eval_episodes: int = 100  # episodes of an evaluation


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


# ------------------------------------------------------------------------------------------------------ environments

# `S` start, `G` goal, `#` wall. Figures 8.2, 8.4 and 8.5 of the book.
DYNA_MAZE = """
.......#G
..#....#.
S.#....#.
..#......
.....#...
.........
"""
CHANGING_MAZE = """
........G
.........
.........
{row}
.........
...S.....
"""


class MazeEnv(gym.Env):
    """A grid world: up, down, right, left; reward 1 at the goal, which ends the episode, and 0 elsewhere.

    After `change_step` steps, counted over all episodes, the walls become those of `later`.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 8}

    def __init__(
        self, maze: str, later: str | None = None, change_step: float = math.inf, scale: int = 1,
        render_mode: str | None = None,
    ) -> None:  # fmt: skip
        self.grids = [np.array([list(row) for row in (text or maze).split()]) for text in (maze, later)]
        self.grids = [grid.repeat(scale, 0).repeat(scale, 1) for grid in self.grids]
        self.change_step, self.render_mode, self.age = change_step, render_mode, 0
        self.height, self.width = self.grids[0].shape
        self.start = int((self.grids[0] == "S").argmax())  # the first cell of a scaled start; the goal keeps them all
        self.observation_space = gym.spaces.Discrete(self.height * self.width)
        self.action_space = gym.spaces.Discrete(4)
        self.ahead = [[self._move(grid, s) for s in range(grid.size)] for grid in self.grids]  # [walls][state][action]
        self.goal = [bool(cell == "G") for cell in self.grids[0].ravel()]

    def _move(self, grid: np.ndarray, s: int) -> list[int]:
        """Where each action leads: one cell on, or nowhere if a wall or the edge is there."""
        y, x = divmod(s, self.width)
        cells = [(y - 1, x), (y + 1, x), (y, x + 1), (y, x - 1)]
        inside = [0 <= i < self.height and 0 <= j < self.width and grid[i, j] != "#" for i, j in cells]
        return [i * self.width + j if free else s for (i, j), free in zip(cells, inside, strict=True)]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.s = self.start
        return self.s, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.s = self.ahead[self.age >= self.change_step][self.s][action]
        self.age += 1
        return self.s, float(self.goal[self.s]), self.goal[self.s], False, {}

    def render(self) -> Any:
        grid = self.grids[int(self.age >= self.change_step)].copy()
        grid.flat[self.s] = "@"
        if self.render_mode == "ansi":
            return "\n".join("".join(row) for row in grid)
        ink = {"#": (0, 0, 0), "G": (254, 126, 125), "@": (160, 212, 56)}
        pixels = np.array([[ink.get(cell, (243, 248, 238)) for cell in row] for row in grid], dtype=np.uint8)
        return pixels.repeat(16, 0).repeat(16, 1)


MAZES = {
    "DynaMaze-v0": {"maze": DYNA_MAZE},
    "BlockingMaze-v0": {
        "maze": CHANGING_MAZE.format(row="########."), "later": CHANGING_MAZE.format(row=".########"),
        "change_step": 1000,
    },
    "ShortcutMaze-v0": {
        "maze": CHANGING_MAZE.format(row=".########"), "later": CHANGING_MAZE.format(row=".#######."),
        "change_step": 3000,
    },
}  # fmt: skip
for name, kwargs in MAZES.items():
    gym.register(name, entry_point=MazeEnv, kwargs=kwargs)


def make_table_env(args: Args, video: str | None = None) -> gym.Env:
    """The environment of `args`, refused unless its states and actions can be counted."""
    kwargs: dict[str, Any] = {"scale": args.maze_scale} if args.env_id in MAZES else {}
    kwargs |= {"render_mode": "rgb_array"} if video else {}
    try:
        if args.env_id == "Sokoban-v0":
            levels, _ = sokoban_env.generate_levels(1, size=args.size, num_boxes=args.num_boxes, seed=args.level_seed)
            kwargs |= {"levels": levels, "size": args.size}
        env = gym.make(args.env_id, disable_env_checker=True, **kwargs)
        if video:
            env.reset()
            env.render()  # what is missing for it is said here
            env = gym.wrappers.RecordVideo(env, video)
    except (gym.error.Error, ValueError, TypeError, ImportError) as e:
        sys.exit(f"can't make --env-id {args.env_id}: {str(e).splitlines()[0]}; this file's own are {', '.join(MAZES)}")
    states, actions = env.observation_space, env.action_space
    if not isinstance(actions, gym.spaces.Discrete):
        sys.exit(f"{args.env_id} has the action space {actions}, tables need a Discrete one: take dyna_q's mazes")
    parts = states.spaces if isinstance(states, gym.spaces.Tuple) else [states]
    countable = len(parts) == 1 and isinstance(states, gym.spaces.Box) and states.dtype.kind in "iu"
    if not countable and not all(isinstance(p, gym.spaces.Discrete) for p in parts):
        sys.exit(f"{args.env_id} has the states {states}, tables need discrete ones: for vectors take dyna_dqn.py")
    return env


def state_key(observation: Any) -> Any:
    """What identifies a state: an observation itself, or an array's bytes."""
    return observation.tobytes() if isinstance(observation, np.ndarray) else observation


# --------------------------------------------------------------------------------------------------------- algorithm


def greedy_action(q: list[float], actions: list[int], uniform: Callable[[], float]) -> int:
    """argmax_a q[a] among `actions`, ties broken at random."""
    best = max([q[a] for a in actions])
    ties = [a for a in actions if q[a] == best]
    return ties[0] if len(ties) == 1 else ties[int(uniform() * len(ties))]


def sample_outcome(
    outcomes: dict[tuple[float, int, bool], int], uniform: Callable[[], float]
) -> tuple[float, int, bool]:
    """An outcome (r, s', terminated), in proportion to its count."""
    if len(outcomes) == 1:
        for outcome in outcomes:
            return outcome
    lot = uniform() * sum(outcomes.values())
    for outcome, n in outcomes.items():
        lot -= n
        if lot < 0:
            return outcome
    raise AssertionError("counts add up to more than any lot")


def expected_target(outcomes: dict[tuple[float, int, bool], int], Q: list[list[float]], gamma: float) -> float:
    """Σ p(r, s' | s, a) (r + γ max_a Q(s', a)), with p from the counts."""
    total = sum(n * (r if end else r + gamma * max(Q[s2])) for (r, s2, end), n in outcomes.items())
    return total / sum(outcomes.values())


def greedy_episodes(
    env: gym.Env, Q: list[list[float]], ids: dict[Any, int], num: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns and lengths of `num` episodes by the greedy policy, which acts at random in states it never saw."""
    rng, limit = random.Random(seed), 1000  # a greedy path can be a circle
    actions, first = list(range(int(env.action_space.n))), int(env.action_space.start)
    returns, lengths = np.zeros(num), np.zeros(num, dtype=int)
    for i in range(num):
        observation, _ = env.reset(seed=seed if i == 0 else None)
        done = False
        while not done and lengths[i] < limit:
            s = ids.get(state_key(observation))
            q = Q[s] if s is not None else [0.0] * len(actions)
            observation, r, terminated, truncated, _ = env.step(first + greedy_action(q, actions, rng.random))
            returns[i] += r
            lengths[i] += 1
            done = terminated or truncated
    return returns, lengths


def check_dyna_q(args: Args) -> None:
    if args.planning_steps < 0:
        sys.exit(f"--planning-steps {args.planning_steps}: K is 0 (Q-learning) or more")
    for name in ("epsilon", "gamma"):
        if not 0 <= getattr(args, name) <= 1:
            sys.exit(f"--{name} {getattr(args, name)}: must be from 0 to 1")
    if not 0 < args.alpha <= 1:
        sys.exit(f"--alpha {args.alpha}: must be above 0 and at most 1")
    for name in ("seed", "kappa", "theta", "num_episodes", "log_frequency"):
        if getattr(args, name) < 0:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 0 or more")
    for name in ("total_timesteps", "maze_scale", "eval_episodes"):
        if getattr(args, name) < 1:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    if args.prioritized and args.planning_steps == 0:
        sys.exit("--prioritized learns by planning alone: give it --planning-steps of 1 or more")
    if args.prioritized and args.kappa:
        sys.exit("--prioritized and --kappa don't go together: a bonus that grows with time would outdate the queue")


def main(args: Args, watch: Callable[[int, int, list[list[float]], dict[Any, int]], Any] | None = None) -> dict:
    """Train, or evaluate. `watch(global_step, backups, Q, ids)` sees each real step; True ends the run."""
    check_dyna_q(args)
    if args.evaluate:
        state = load_checkpoint(args.evaluate, "cpu")
        env = make_table_env(saved_args(args.evaluate))
        if isinstance(env.unwrapped, MazeEnv):
            changed = state["global_step"] >= env.unwrapped.change_step
            env.unwrapped.change_step = 0 if changed else math.inf  # the walls stay as the run left them
        ids = {bytes.fromhex(k) if isinstance(k, str) else k: i for i, k in enumerate(state["states"])}
        returns, lengths = greedy_episodes(env, state["Q"].tolist(), ids, args.eval_episodes, args.seed)
        half = 1.96 * returns.std() / math.sqrt(len(returns))
        print(f"greedy policy: return {returns.mean():.4g} ± {half:.2g}, {lengths.mean():.1f} steps an episode")
        return {"returns": returns, "lengths": lengths}

    keeps = args.log_frequency or args.save_model or args.capture_video
    run_name = new_run(f"{args.env_id}__{args.exp_name}__{args.seed}") if keeps else ""
    seed_everything(args.seed, args.torch_deterministic)
    rng = random.Random(args.seed)
    uniform = rng.random  # int(uniform() * n) is the fastest way to an integer
    env = make_table_env(args, f"videos/{run_name}" if args.capture_video else None)
    logger = Logger(args, run_name) if args.log_frequency or args.save_model else None
    actions, first = list(range(int(env.action_space.n))), int(env.action_space.start)
    alpha, gamma, epsilon, kappa, K = args.alpha, args.gamma, args.epsilon, args.kappa, args.planning_steps

    ids: dict[Any, int] = {}  # the number s of each state, in the order of appearance
    Q: list[list[float]] = []  # Q[s][a]
    M: list[list[dict[tuple[float, int, bool], int]]] = []  # M[s][a]: {(r, s', terminated): count}
    last_tried: list[list[int]] = []  # the real step at which a was last tried in s, 0: never
    known: list[list[int]] = []  # actions for which the model of s has an answer
    visited: list[int] = []  # states acted in
    predecessors: list[set[tuple[int, int]]] = []  # pairs (s, a) that led to a state
    queue: list[tuple[float, int, int]] = []  # prioritised sweeping: (-P, s, a)
    priority: dict[tuple[int, int], float] = {}  # the P with which a pair is in the queue; others of it are outdated

    def number(observation: Any) -> int:
        key = state_key(observation)
        if key not in ids:
            ids[key] = len(ids)
            Q.append([0.0] * len(actions))
            M.append([{} for _ in actions])
            last_tried.append([0] * len(actions))
            known.append([])
            predecessors.append(set())
        return ids[key]

    def prioritize(s: int, a: int) -> None:
        P = abs(expected_target(M[s][a], Q, gamma) - Q[s][a])  # P = |r + γ max_a Q(s',a) - Q(s,a)|
        if max(args.theta, priority.get((s, a), 0.0)) < P:
            priority[s, a] = P
            heapq.heappush(queue, (-P, s, a))

    episodes: list[tuple[int, float, int]] = []  # (global_step, return, length) of each
    episodic_return, episodic_length, backups, logged, errors = 0.0, 0, 0, 0, 0.0
    observation, _ = env.reset(seed=args.seed)
    s = number(observation)
    start = time.perf_counter()
    for global_step in tqdm(range(1, args.total_timesteps + 1), disable=not sys.stderr.isatty()):
        # 1. Act: a_t by Q, ε-greedily.
        a = actions[int(uniform() * len(actions))] if uniform() < epsilon else greedy_action(Q[s], actions, uniform)
        observation, r, terminated, truncated, _ = env.step(first + a)
        r, s2, terminated = float(r), number(observation), bool(terminated)
        episodic_return += r
        episodic_length += 1

        # 2. Learn: ΔQ(s_t,a_t) = α (r_{t+1} + γ max_a Q(s_{t+1},a) - Q(s_t,a_t)). Only `terminated` ends the bootstrap.
        error = (r if terminated else r + gamma * max(Q[s2])) - Q[s][a]
        errors += abs(error)
        if not args.prioritized:  # there, this backup goes through the queue like all others
            Q[s][a] += alpha * error
            backups += 1

        # 3. Model: M(s_t,a_t) <- (s_{t+1}, r_{t+1}).
        if not known[s]:
            visited.append(s)
            if kappa:  # Dyna-Q+ plans with untried actions too: they lead back to s and pay nothing
                known[s] = actions
                M[s] = [{(0.0, s, False): 1} for _ in actions]
        if last_tried[s][a] == 0:
            M[s][a] = {}
            if not kappa:
                known[s].append(a)
        outcome = (r, s2, terminated)
        if args.model == "counts":
            M[s][a][outcome] = M[s][a].get(outcome, 0) + 1
        else:
            M[s][a] = {outcome: 1}
        last_tried[s][a] = global_step

        # 4. Plan, K times.
        if args.prioritized:
            predecessors[s2].add((s, a))
            prioritize(s, a)
            for _ in range(K):
                while queue and -queue[0][0] != priority.get(queue[0][1:]):
                    heapq.heappop(queue)  # outdated
                if not queue:
                    break
                _, sk, ak = heapq.heappop(queue)
                del priority[sk, ak]
                Q[sk][ak] += alpha * (expected_target(M[sk][ak], Q, gamma) - Q[sk][ak])
                backups += 1
                for pair in predecessors[sk]:
                    prioritize(*pair)
        else:
            for _ in range(K):
                sk = visited[int(uniform() * len(visited))]
                tried = known[sk]
                if args.planning_action == "visited" or uniform() < epsilon:
                    ak = tried[int(uniform() * len(tried))]
                else:
                    ak = greedy_action(Q[sk], tried, uniform)
                rk, sk2, end = sample_outcome(M[sk][ak], uniform)  # s_{k+1}, r_{k+1} = M(s_k, a_k)
                if kappa:
                    rk += kappa * math.sqrt(global_step - last_tried[sk][ak])  # r + κ √τ
                Q[sk][ak] += alpha * ((rk if end else rk + gamma * max(Q[sk2])) - Q[sk][ak])
            backups += K

        s = s2
        if terminated or truncated:
            episodes.append((global_step, episodic_return, episodic_length))
            episodic_return, episodic_length = 0.0, 0
            observation, _ = env.reset()
            s = number(observation)
        if watch is not None and watch(global_step, backups, Q, ids):
            break
        if args.log_frequency and global_step % args.log_frequency == 0:
            seconds, ended = time.perf_counter() - start, episodes[logged:]
            metrics = {
                "charts/SPS": global_step / seconds, "charts/backups_per_second": backups / seconds,
                "charts/backups": backups, "charts/states": len(visited),
                "losses/td_error": errors / args.log_frequency, "losses/q_values": sum(map(max, Q)) / len(Q),
            }  # fmt: skip
            if ended:
                metrics["charts/episodic_return"] = sum(episode[1] for episode in ended) / len(ended)
                metrics["charts/episodic_length"] = sum(episode[2] for episode in ended) / len(ended)
            logger.log(global_step, metrics)
            logged, errors = len(episodes), 0.0
        if len(episodes) == args.num_episodes > 0:
            break
    seconds = time.perf_counter() - start

    if args.save_model:
        keys = [key.hex() if isinstance(key, bytes) else key for key in ids]
        state = {
            "args": asdict(args),
            "Q": torch.tensor(Q, dtype=torch.float64),
            "states": keys,
            "global_step": global_step,
        }
        save_checkpoint(logger.path.with_name("agent.pt"), state)
        print(f"wrote {logger.path.with_name('agent.pt')}")
    if logger is not None:
        logger.close()
    env.close()
    return {"Q": Q, "ids": ids, "M": M, "episodes": episodes, "backups": backups, "seconds": seconds}


if __name__ == "__main__":
    main(tyro.cli(Args))
