"""Dyna-Q with tables: Sutton 1990; Sutton & Barto, Reinforcement Learning (2nd edition), chapter 8.

An agent learns Q from each real step, keeps what the step did in a table (its model), and then learns from K imagined
steps out of that table. The four steps are the four numbered blocks of the loop in `main`; K = 0 is Q-learning.
Variants: Dyna-Q+ (--kappa), prioritised sweeping (--prioritized), and counts for stochastic environments.

Different from the book: planning picks its actions ε-greedily by Q, among the actions tried in the state. That is the
rule of the lecture that this project follows. `--planning-action visited` is the book's: any tried action.

    python dyna_q.py --planning-steps 50 --planning-action visited         # the book's Dyna maze
    python dyna_q.py --env-id ShortcutMaze-v0 --alpha 1 --planning-steps 50 --kappa 1e-3 --planning-action visited
    python dyna_q.py --env-id FrozenLake-v1 --model counts --planning-steps 20 --gamma 0.99 --total-timesteps 20000
    python dyna_q.py --env-id Sokoban-v0 --gamma 0.99 --planning-steps 50
    python dyna_q.py --evaluate runs/NAME/agent.pt

States `s` and actions `a` are numbers from 0 on. Tables are lists of lists, because reading one cell of a numpy array
takes ten times as long.
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

EVALUATION_STEPS = 1000  # an evaluation cuts episodes after so many steps: a greedy path can be a circle


@dataclass
class Args:
    exp_name: str = "dyna_q"  # the name of this experiment
    seed: int = 1  # seed of the experiment
    torch_deterministic: bool = True  # only deterministic algorithms
    cuda: bool = True  # has no effect here: tables live on the CPU
    track: bool = False  # track the run in Weights and Biases
    wandb_project_name: str = "model-based-rl"  # the Weights and Biases project
    wandb_entity: str | None = None  # the Weights and Biases team
    capture_video: bool = False  # film episodes into videos/<run_name>
    save_model: bool = True  # write the table to runs/<run_name>/agent.pt at the end

    # Algorithm specific arguments
    env_id: str = "DynaMaze-v0"  # a maze (Dyna, Blocking, Shortcut), or any with discrete states, actions
    total_timesteps: int = 6000  # real steps
    num_episodes: int = 0  # stop after so many episodes, if they come sooner (0: never)
    alpha: float = 0.1  # step size alpha
    gamma: float = 0.95  # discount gamma
    epsilon: float = 0.1  # probability of a random action
    planning_steps: int = 5  # imagined updates K after each real step; 0 is Q-learning
    planning_action: Literal["q", "visited"] = "q"  # planning: epsilon-greedy by Q, or any tried action
    model: Literal["last", "counts"] = "last"  # predict the last outcome, or draw by counts
    kappa: float = 0.0  # Dyna-Q+: planning adds kappa * sqrt(real steps since a pair was tried)
    prioritized: bool = False  # prioritised sweeping: the largest errors first, and backwards from them
    theta: float = 1e-4  # prioritised sweeping: the smallest error that enters the queue
    log_frequency: int = 1000  # real steps between rows of metrics (0: write no files at all)
    evaluate: str | None = None  # evaluate the greedy policy of this agent.pt, with its flags, and stop
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


# ------------------------------------------------------------------------------------------------------ environments

# `S` start, `G` goal, `#` wall. Figures 8.2, 8.4 and 8.5 of the book.
DYNA_MAZE = """\
###########
#.......#G#
#..#....#.#
#S.#....#.#
#..#......#
#.....#...#
#.........#
###########"""
CHANGING_MAZE = """\
###########
#........G#
#.........#
#.........#
#{row}#
#.........#
#...S.....#
###########"""


class MazeEnv(gym.Env):
    """A grid world: up, down, right, left; reward 1 at the goal, which ends the episode, and 0 elsewhere.

    After `change_step` steps, counted over all episodes, the walls become those of `later`. A state is the position of
    a character in the maze's text.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 8}

    def __init__(
        self, maze: str, later: str | None = None, change_step: float = math.inf, render_mode: str | None = None
    ) -> None:
        self.first_maze, self.later_maze, self.change_step = maze, later or maze, change_step
        self.age = 0  # steps so far
        self.render_mode = render_mode
        width = maze.index("\n") + 1
        self.moves = (-width, width, 1, -1)
        self.observation_space, self.action_space = gym.spaces.Discrete(len(maze)), gym.spaces.Discrete(4)

    def maze_now(self) -> str:
        return self.later_maze if self.age >= self.change_step else self.first_maze

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.s = self.first_maze.index("S")
        return self.s, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        maze = self.maze_now()
        ahead = self.s + self.moves[action]
        if maze[ahead] != "#":
            self.s = ahead
        self.age += 1
        goal = maze[self.s] == "G"
        return self.s, float(goal), goal, False, {}

    def render(self) -> np.ndarray:
        maze = self.maze_now()
        rows = (maze[: self.s] + "@" + maze[self.s + 1 :]).split()
        ink = {"#": (0, 0, 0), "G": (254, 126, 125), "@": (160, 212, 56)}
        pixels = np.array([[ink.get(cell, (243, 248, 238)) for cell in row] for row in rows], dtype=np.uint8)
        return pixels.repeat(16, 0).repeat(16, 1)


GAP_LEFT = CHANGING_MAZE.format(row=".########")
GAP_RIGHT = CHANGING_MAZE.format(row="########.")
TWO_GAPS = CHANGING_MAZE.format(row=".#######.")
gym.register("DynaMaze-v0", entry_point=MazeEnv, kwargs={"maze": DYNA_MAZE})
gym.register("BlockingMaze-v0", entry_point=MazeEnv, kwargs={"maze": GAP_RIGHT, "later": GAP_LEFT, "change_step": 1000})
gym.register("ShortcutMaze-v0", entry_point=MazeEnv, kwargs={"maze": GAP_LEFT, "later": TWO_GAPS, "change_step": 3000})


def make_table_env(args: Args, video: str | None = None) -> gym.Env:
    """The environment of `args`, filmed into the folder `video`; refused unless states and actions can be counted."""
    kwargs: dict[str, Any] = {"render_mode": "rgb_array"} if video else {}
    if args.env_id == "Sokoban-v0":  # one level, the same in every episode
        kwargs |= {"size": 6, "levels": sokoban_env.generate_levels(1, size=6, num_boxes=1, seed=11)[0]}
    try:
        env = gym.make(args.env_id, disable_env_checker=True, **kwargs)
        env = gym.wrappers.TransformReward(env, lambda r: np.asarray(r, dtype=float).item())  # some rewards are arrays
        if video:
            env.reset()
            env.render()  # fails here, with a reason, if it can't film
            env = gym.wrappers.RecordVideo(env, video)
    except (gym.error.Error, ValueError, TypeError, ImportError, NotImplementedError) as e:
        reason = (str(e) or "it has no render()").splitlines()[0].rstrip(".")
        verb, own = ("film", "") if video else ("make", ", or your own as my_env:MyEnv-v0")
        sys.exit(f"can't {verb} --env-id {args.env_id}: {reason}; try DynaMaze-v0{own}")
    if not isinstance(env.action_space, gym.spaces.Discrete):
        sys.exit(f"{args.env_id} has the action space {env.action_space}, tables need a Discrete one: try DynaMaze-v0")
    states = env.observation_space
    parts = states.spaces if isinstance(states, gym.spaces.Tuple) else [states]
    integers = isinstance(states, gym.spaces.Box) and states.dtype.kind in "iu"  # an array of them, as in Sokoban
    if not integers and not all(isinstance(part, gym.spaces.Discrete) for part in parts):
        sys.exit(f"{args.env_id} has the states {states}, tables need discrete ones: for vectors take dyna_dqn.py")
    return gym.wrappers.RecordEpisodeStatistics(env)


def state_key(observation: Any) -> int | str | tuple[int, ...]:
    """A key for a state, so that a dictionary can find it: a number, a tuple of them, or an array's bytes as text."""
    if isinstance(observation, np.ndarray):
        return observation.tobytes().hex()
    return tuple(map(int, observation)) if isinstance(observation, tuple) else int(observation)


# --------------------------------------------------------------------------------------------------------- algorithm


Outcomes = dict[tuple[float, int, bool], int]  # what was seen after s, a: {(r, s', terminated): count}


def greedy_action(q: list[float], actions: list[int], uniform: Callable[[], float]) -> int:
    """argmax_a q[a] among `actions`, ties broken at random."""
    best = max([q[a] for a in actions])
    ties = [a for a in actions if q[a] == best]
    return ties[0] if len(ties) == 1 else ties[int(uniform() * len(ties))]


def sample_outcome(outcomes: Outcomes, uniform: Callable[[], float]) -> tuple[float, int, bool]:
    """Draw an outcome (r, s', terminated) with a probability in proportion to its count."""
    if len(outcomes) == 1:
        return next(iter(outcomes))
    left = uniform() * sum(outcomes.values())
    for outcome, count in outcomes.items():
        if left < count:
            return outcome
        left -= count
    raise AssertionError("`left` starts below the sum of the counts")


def expected_target(outcomes: Outcomes, Q: list[list[float]], gamma: float) -> float:
    """Σ p(r, s' | s, a) (r + γ max_a Q(s', a)), with p = count / sum of counts."""
    total = sum(count * (r if end else r + gamma * max(Q[s2])) for (r, s2, end), count in outcomes.items())
    return total / sum(outcomes.values())


def evaluate_table(args: Args) -> dict[str, np.ndarray]:
    """Returns and lengths of episodes of a file's greedy policy. It acts at random in states that it never saw."""
    saved = load_checkpoint(args.evaluate, "cpu")
    Q = saved["Q"].tolist()
    ids = {key: s for s, key in enumerate(saved["states"])}
    env = make_table_env(args)
    uniform = random.Random(args.seed).random
    if isinstance(env.unwrapped, MazeEnv):  # the walls stay as the run left them
        changed = saved["global_step"] >= env.unwrapped.change_step
        env.unwrapped.change_step = 0 if changed else math.inf
    actions, first_action = list(range(int(env.action_space.n))), int(env.action_space.start)
    returns, lengths = np.zeros(args.eval_episodes), np.zeros(args.eval_episodes)
    for i in range(args.eval_episodes):
        observation, _ = env.reset(seed=args.seed if i == 0 else None)
        done = False
        while not done and lengths[i] < EVALUATION_STEPS:
            s = ids.get(state_key(observation))
            q = [0.0] * len(actions) if s is None else Q[s]
            observation, r, terminated, truncated, _ = env.step(first_action + greedy_action(q, actions, uniform))
            returns[i] += r
            lengths[i] += 1
            done = terminated or truncated
    margin = 1.96 * returns.std() / math.sqrt(len(returns))  # of the 95 % interval
    print(f"greedy policy: return {returns.mean():.4g} ± {margin:.2g}, {lengths.mean():.1f} steps an episode")
    if cut := int((lengths == EVALUATION_STEPS).sum()):
        print(f"{cut} of {len(returns)} episodes were cut after {EVALUATION_STEPS:,} steps")
    return {"returns": returns, "lengths": lengths}


def parse_args(argv: list[str] | None = None) -> Args:
    """The flags of the command line; the others are those of the file to evaluate, or the defaults."""
    path = tyro.cli(Args, args=argv).evaluate
    args = tyro.cli(Args, args=argv, default=saved_args(path) if path else Args())
    least = {"seed": 0, "planning_steps": 0, "kappa": 0, "theta": 0, "total_timesteps": 1, "eval_episodes": 1}
    for name, value in least.items():
        if getattr(args, name) < value:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {value} or more")
    for name in ("alpha", "gamma", "epsilon"):
        if not 0 <= getattr(args, name) <= 1:
            sys.exit(f"--{name} {getattr(args, name)}: must be from 0 to 1")
    if args.prioritized and (args.planning_steps == 0 or args.kappa):
        sys.exit("--prioritized needs --planning-steps of 1 or more, and no --kappa: its bonus would outdate the queue")
    return args


def main(args: Args, watch: Callable[[int, int, list[list[float]], dict[Any, int]], Any] | None = None) -> dict:
    """Train, or evaluate. `watch(global_step, backups, Q, ids)` is called after each real step; True ends the run."""
    if args.evaluate:
        return evaluate_table(args)
    seed_everything(args.seed, args.torch_deterministic)
    env = make_table_env(args)
    run_name = new_run(f"{args.env_id}__{args.exp_name}__{args.seed}") if args.log_frequency else ""
    if args.capture_video:
        env = make_table_env(args, f"videos/{run_name}")
    logger = Logger(args, run_name) if args.log_frequency else None
    actions, first_action = list(range(int(env.action_space.n))), int(env.action_space.start)
    alpha, gamma, epsilon, kappa, K = args.alpha, args.gamma, args.epsilon, args.kappa, args.planning_steps
    uniform = random.Random(args.seed).random  # int(uniform() * n) is the fastest way to an integer

    ids: dict[Any, int] = {}  # the number s of each state, in the order of appearance
    Q: list[list[float]] = []  # Q[s][a]
    M: list[list[Outcomes]] = []  # M[s][a], the model
    last_tried: list[list[int]] = []  # the real step at which a was last tried in s, 0: never
    visited: list[int] = []  # states acted in: planning starts from them
    choices: list[list[int]] = []  # actions that planning may take in s: the tried ones (Dyna-Q+: all)
    predecessors: list[set[tuple[int, int]]] = []  # prioritised sweeping: pairs (s, a) that led to a state
    queue: list[tuple[float, int, int]] = []  # prioritised sweeping: (-priority, s, a)
    priorities: dict[tuple[int, int], float] = {}  # of queued pairs; queue entries with another priority are outdated

    def state_number(observation: Any) -> int:
        """The number s of a state; a new one gets its rows in the tables."""
        key = state_key(observation)
        if key not in ids:
            s = ids[key] = len(ids)
            Q.append([0.0] * len(actions))
            last_tried.append([0] * len(actions))
            predecessors.append(set())
            # Dyna-Q+ plans with untried actions too: they lead back to s and pay nothing.
            M.append([{(0.0, s, False): 1} if kappa else {} for _ in actions])
            choices.append(list(actions) if kappa else [])
        return ids[key]

    def prioritize(s: int, a: int) -> None:
        """Queue a pair with the priority |r + γ max_a Q(s',a) - Q(s,a)|, if that is above θ and what it has there."""
        priority = abs(expected_target(M[s][a], Q, gamma) - Q[s][a])
        if priority > args.theta and priority > priorities.get((s, a), 0.0):
            priorities[s, a] = priority
            heapq.heappush(queue, (-priority, s, a))

    episodes: list[tuple[int, float, int]] = []  # (global_step, return, length) of each
    backups, error_sum = 0, 0.0
    row_step, row_episodes = 0, 0  # steps and episodes up to the last row of metrics
    observation, _ = env.reset(seed=args.seed)
    s = state_number(observation)
    start = time.perf_counter()
    for global_step in tqdm(range(1, args.total_timesteps + 1), disable=not sys.stderr.isatty()):
        # 1. Act: a_t by Q, ε-greedily.
        explore = uniform() < epsilon
        a = int(uniform() * len(actions)) if explore else greedy_action(Q[s], actions, uniform)
        observation, r, terminated, truncated, info = env.step(first_action + a)
        s2, terminated = state_number(observation), bool(terminated)

        # 2. Learn: ΔQ(s_t,a_t) = α (r_{t+1} + γ max_a Q(s_{t+1},a) - Q(s_t,a_t)). Only `terminated` ends the bootstrap.
        error = (r if terminated else r + gamma * max(Q[s2])) - Q[s][a]
        error_sum += abs(error)
        if not args.prioritized:  # prioritised sweeping makes this backup out of its queue, in step 4
            Q[s][a] += alpha * error
            backups += 1

        # 3. Model: M(s_t,a_t) <- (s_{t+1}, r_{t+1}).
        if not any(last_tried[s]):
            visited.append(s)
        if last_tried[s][a] == 0:
            M[s][a] = {}  # Dyna-Q+ forgets that it took the action to lead back
            if not kappa:
                choices[s].append(a)
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
            planned = 0
            while queue and planned < K:
                negative, sk, ak = heapq.heappop(queue)
                if priorities.get((sk, ak)) != -negative:
                    continue  # outdated: the pair was queued again with a higher priority
                del priorities[sk, ak]
                Q[sk][ak] += alpha * (expected_target(M[sk][ak], Q, gamma) - Q[sk][ak])
                planned += 1
                for pair in predecessors[sk]:
                    prioritize(*pair)
            backups += planned
        else:
            for _ in range(K):
                sk = visited[int(uniform() * len(visited))]
                if args.planning_action == "visited" or uniform() < epsilon:
                    ak = choices[sk][int(uniform() * len(choices[sk]))]
                else:
                    ak = greedy_action(Q[sk], choices[sk], uniform)
                rk, sk2, end = sample_outcome(M[sk][ak], uniform)  # s_{k+1}, r_{k+1} = M(s_k, a_k)
                if kappa:
                    rk += kappa * math.sqrt(global_step - last_tried[sk][ak])  # r + κ √τ
                error = (rk if end else rk + gamma * max(Q[sk2])) - Q[sk][ak]
                Q[sk][ak] += alpha * error
            backups += K

        s = s2
        if terminated or truncated:
            episodes.append((global_step, info["episode"]["r"], info["episode"]["l"]))
            observation, _ = env.reset()
            s = state_number(observation)
        stopped = watch is not None and watch(global_step, backups, Q, ids)
        enough = args.num_episodes > 0 and len(episodes) == args.num_episodes
        last = stopped or enough or global_step == args.total_timesteps
        if logger and (last or global_step % args.log_frequency == 0):
            ended = episodes[row_episodes:]
            metrics = {
                "charts/SPS": global_step / (time.perf_counter() - start), "charts/backups": backups,
                "losses/td_error": error_sum / (global_step - row_step), "losses/q_values": sum(map(max, Q)) / len(Q),
            }  # fmt: skip
            if ended:
                _, returns, lengths = zip(*ended, strict=True)
                metrics["charts/episodic_return"] = sum(returns) / len(ended)
                metrics["charts/episodic_length"] = sum(lengths) / len(ended)
            logger.log(global_step, metrics)
            row_step, row_episodes, error_sum = global_step, len(episodes), 0.0
        if last:
            break

    if logger:
        path = logger.path.with_name("agent.pt")
        if args.save_model:
            agent = {"Q": torch.tensor(Q, dtype=torch.float64), "states": list(ids)}
            save_checkpoint(path, {"args": asdict(args), "global_step": global_step, **agent})
        print(f"wrote {path if args.save_model else logger.path}")
        logger.close()
    env.close()
    return {"Q": Q, "ids": ids, "M": M, "episodes": episodes, "backups": backups}


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("stopped; the rows of metrics are kept under runs/, the table is not: run it again, it takes seconds")
