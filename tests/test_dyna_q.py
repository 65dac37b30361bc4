"""dyna_q.py: updates by hand, the model's memory, the loop, the mazes, files."""

import math
import pathlib
import statistics

import gymnasium as gym
import numpy as np
import pytest
from conftest import rows_of

import dyna_q
from dyna_q import Args, evaluate_table, main, parse_args


class LoopEnv(gym.Env):
    """One state, number 5; action 2 + a leads back, and pays rewards[a] in an array with the probability `chance`.

    Every step ends the episode.
    """

    def __init__(self, rewards: tuple[float, ...], ending: str = "terminated", chance: float = 1.0) -> None:
        self.rewards, self.ending, self.chance = rewards, ending, chance
        self.observation_space = gym.spaces.Discrete(1, start=5)
        self.action_space = gym.spaces.Discrete(len(rewards), start=2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.int64(5), {}

    def step(self, action):
        assert action in self.action_space
        reward = np.array([self.rewards[action - 2]]) * (self.np_random.random() < self.chance)
        return np.int64(5), reward, self.ending == "terminated", self.ending == "truncated", {}


class LineEnv(gym.Env):
    """States 0 to 6 in one array that is filled again, one action: to the right; the last step pays 1 and terminates.

    From the second episode on, the first step pays `bonus`.
    """

    def __init__(self, bonus: float = 0.0) -> None:
        self.bonus, self.episode, self.s = bonus, 0, np.zeros(1, dtype=np.int64)
        self.observation_space, self.action_space = gym.spaces.Box(0, 6, (1,), np.int64), gym.spaces.Discrete(1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.s[0] = 0
        self.episode += 1
        return self.s, {}

    def step(self, action):
        self.s += 1
        end = bool(self.s[0] == 6)
        return self.s, float(end) + self.bonus * (self.s[0] == 1 and self.episode > 1), end, False, {}


for name, kwargs in {
    "Loop": {"rewards": (1.0,)},
    "Coin": {"rewards": (1.0,), "chance": 0.25},
    "Worse": {"rewards": (1.0, -1.0)},
    "Truncated": {"rewards": (1.0,), "ending": "truncated"},
    "Costs": {"rewards": (-1.0, -1.0, -1.0), "ending": "truncated"},
    "Pair": {"rewards": (1.0, 1.0), "ending": "truncated"},
}.items():
    gym.register(f"Test{name}-v0", entry_point=LoopEnv, kwargs=kwargs)
for name, bonus in (("Line", 0.0), ("Bonus4", 0.3), ("Bonus0", 0.9)):
    gym.register(f"Test{name}-v0", entry_point=LineEnv, kwargs={"bonus": bonus})


def train(**kwargs) -> dict:
    return main(Args(**{"log_frequency": 0} | kwargs))


def test_learning_and_planning_by_hand():
    # α = 1/2, r = 1: terminal 0 -> .5 -> .75 -> .875; truncated, γ = 1/2: q <- q + (1 + q/2 - q) / 2
    for env_id, q in (("TestLoop-v0", 0.875), ("TestTruncated-v0", 1.15625)):
        hand = {"env_id": env_id, "alpha": 0.5, "gamma": 0.5}
        assert train(planning_steps=0, total_timesteps=3, **hand)["Q"] == [[q]]
        # K = 2: three updates with the same transition for one real step
        result = train(planning_steps=2, total_timesteps=1, **hand)
        assert result["Q"] == [[q]] and result["backups"] == 3
        assert result["M"] == [[{(1.0, 0, env_id == "TestLoop-v0"): 1}]]  # remembers `terminated`, not truncation


@pytest.mark.parametrize("rule", ["q", "visited"])
def test_planning_leaves_untried_actions_alone(rule):
    result = train(env_id="TestCosts-v0", planning_action=rule, planning_steps=200, total_timesteps=1, epsilon=0.5)
    assert sorted(q == 0 for q in result["Q"][0]) == [False, True, True]
    assert sorted(map(len, result["M"][0])) == [0, 0, 1]


def test_the_two_rules_differ_where_an_action_is_worse():
    # by Q with a small ε the worse one is hardly ever planned: 0.01 * (1 - 0.01)^n, n one in a hundred or one in two
    by_q, visited = (
        train(env_id="TestWorse-v0", planning_action=rule, planning_steps=50, alpha=0.01, epsilon=0.02, seed=3,
              total_timesteps=100)["Q"][0][1]
        for rule in ("q", "visited")
    )  # fmt: skip
    assert -0.8 < by_q < 0 and visited < -0.99


def test_dyna_q_plus_bonus_and_untried_actions():
    # γ = 0, ε = 0, α = 1: one action pays 1 and is taken ever after, τ = 0; the other one was never tried, τ = t
    result = train(env_id="TestPair-v0", kappa=0.1, gamma=0.0, alpha=1.0, epsilon=0.0, planning_steps=60,
                   planning_action="visited", total_timesteps=49)  # fmt: skip
    assert sorted(result["Q"][0]) == [pytest.approx(0.1 * math.sqrt(49)), 1.0]
    assert {(0.0, 0, False): 1} in result["M"][0]  # untried: back to s, reward 0
    # once tried, the placeholder is forgotten
    outcomes = train(env_id="TestPair-v0", kappa=1e-6, epsilon=1.0, model="counts", total_timesteps=40)["M"][0]
    assert all(set(counts) == {(1.0, 0, False)} for counts in outcomes)
    assert sum(counts[1.0, 0, False] for counts in outcomes) == 40


def test_exploration_and_ties():
    for epsilon, low, high in ((0.0, 0, 0), (1.0, 420, 580), (0.2, 60, 140)):
        # from the first -1 on, the greedy action is the one that pays 1
        outcomes = train(env_id="TestWorse-v0", epsilon=epsilon, model="counts", planning_steps=0, seed=2,
                         total_timesteps=1000)["M"][0]  # fmt: skip
        assert low <= sum(outcomes[1].values()) <= high + 1
    assert dyna_q.greedy_action([5.0, 1.0, 2.0], [1, 2], lambda: 0.0) == 2
    draws = [dyna_q.greedy_action([1.0, 1.0, 0.0, 1.0], [0, 1, 2, 3], lambda i=i: i / 300) for i in range(300)]
    assert [draws.count(a) for a in range(4)] == [100, 100, 0, 100]


def test_outcomes_by_hand():
    outcomes = {(0.0, 1, False): 1, (1.0, 2, True): 3}
    first, second = outcomes
    for lot, expected in ((0.0, first), (0.2499, first), (0.25, second), (0.9999999, second)):
        assert dyna_q.sample_outcome(outcomes, lambda lot=lot: lot) == expected
    # (1 * (0 + 0.5 * 2) + 3 * 1) / 4: the terminal outcome doesn't look at Q[2]
    assert dyna_q.expected_target(outcomes, [[0.0], [2.0], [9.0]], 0.5) == 1.0


def test_one_sweep_carries_the_reward_back():
    line = {"env_id": "TestLine-v0", "prioritized": True, "alpha": 1.0, "gamma": 0.5, "num_episodes": 1}
    result = train(planning_steps=20, theta=1e-4, **line)
    assert [q[0] for q in result["Q"]] == [0.5**5, 0.5**4, 0.5**3, 0.5**2, 0.5, 1.0, 0.0]
    assert result["backups"] == 6  # each pair once, none before the reward
    # an error of θ or less enters no queue: 0.5^3 > 0.1 >= 0.5^4
    assert [q[0] for q in train(planning_steps=20, theta=0.1, **line)["Q"]] == [0, 0, 0.5**3, 0.5**2, 0.5, 1, 0]
    # and K bounds the work of one real step
    assert [q[0] for q in train(planning_steps=2, theta=1e-4, **line)["Q"]] == [0, 0, 0, 0, 0.5, 1, 0]
    assert train(env_id="TestWorse-v0", prioritized=True, alpha=1.0, epsilon=1.0)["Q"] == [[1.0, -1.0]]
    # α = 1/2: a pair that was backed up enters the queue again; after step 6 it is never empty
    half = train(**line | {"planning_steps": 1, "alpha": 0.5, "num_episodes": 0, "total_timesteps": 40, "theta": 0.01})
    assert half["backups"] == 35 and half["Q"][5][0] > 0.9


@pytest.mark.parametrize(("bonus", "first"), [(0.3, 4), (0.9, 0)])
def test_the_largest_error_comes_first(bonus, first):
    # Episode 1, K = 1, leaves pair 4 in the queue with P = γ * 1 = 0.5. Then the first step pays `bonus`: P = bonus.
    Q = train(env_id=f"TestBonus{first}-v0", prioritized=True, alpha=1.0, gamma=0.5, planning_steps=1, epsilon=0.0,
              total_timesteps=7)["Q"]  # fmt: skip
    assert {s for s, q in enumerate(Q) if q[0]} == {5, first}


def test_mazes_are_the_books():
    def shortest(env, later):
        reached, maze = [{env.reset()[0]}], env.later_maze if later else env.first_maze
        while not any(maze[s] == "G" for s in reached[-1]):
            reached.append({s + move for s in reached[-1] for move in env.moves if maze[s + move] != "#"})
        return len(reached) - 1

    for env_id, lengths, change in (
        ("DynaMaze-v0", (14, 14), math.inf), ("BlockingMaze-v0", (10, 16), 1000), ("ShortcutMaze-v0", (16, 10), 3000)
    ):  # fmt: skip
        env = gym.make(env_id).unwrapped
        assert (shortest(env, 0), shortest(env, 1)) == lengths and env.change_step == change
    env = gym.make("DynaMaze-v0", render_mode="rgb_array").unwrapped
    start, _ = env.reset()
    ways = [env.step(a)[0] - start for a in (3, 0, 2, 2, 1)]
    assert ways == [0, -12, -11, -11, 1]  # the edge, up, right, the wall, down
    env.s = 2 * 12 + 9
    assert env.step(0) == (12 + 9, 1.0, True, False, {})
    assert env.render().shape == (8 * 16, 11 * 16, 3)


def test_walls_move_at_the_change_and_not_with_the_episode():
    env = gym.make("BlockingMaze-v0").unwrapped
    env.reset()
    for step in range(1002):
        env.s = 3 * 12 + 9  # above the gap at the right
        assert env.step(1)[0] == (4 * 12 + 9 if step < 1000 else 3 * 12 + 9)
        env.reset()


def test_episodes_and_metrics():
    watched = []
    args = Args(env_id="TestLine-v0", planning_steps=0, alpha=0.5, gamma=0.5, total_timesteps=15, log_frequency=6)
    result = main(args, lambda *seen: watched.append(seen[:2]))
    assert watched == [(t, t) for t in range(1, 16)]
    assert result["episodes"] == [(6, 1.0, 6), (12, 1.0, 6)]
    assert result["M"][5] == [{(1.0, 6, True): 1}] and result["M"][6] == [{}]  # nobody acts in a terminal state
    rows = rows_of(next(pathlib.Path("runs").iterdir()))
    assert [r["global_step"] for r in rows] == [6, 12, 15]  # the last one, too
    # errors: 1 at the end of episode 1; γ/2 and 1/2 in episode 2; none in the first half of episode 3
    assert [r["losses/td_error"] for r in rows] == pytest.approx([1 / 6, 0.75 / 6, 0])
    assert [r["losses/q_values"] for r in rows] == pytest.approx([0.5 / 7, 0.875 / 7, 0.875 / 7])
    assert [r.get("charts/episodic_return") for r in rows] == [1, 1, None] and rows[1]["charts/backups"] == 12
    assert len(main(args, lambda step, *_: step == 4)["ids"]) == 5  # True ends the run


def test_one_seed_reproduces_the_run():
    for env_id in ("DynaMaze-v0", "FrozenLake-v1", "Blackjack-v1", "Taxi-v4"):  # the last three draw numbers themselves
        first, again, other = (train(env_id=env_id, seed=seed, total_timesteps=1000) for seed in (1, 1, 2))
        assert first["Q"] == again["Q"] and first["episodes"] == again["episodes"]
        assert first["Q"] != other["Q"] and len(first["ids"]) > 5
    env = {"env_id": "TestCoin-v0", "total_timesteps": 99}
    assert train(seed=1, **env)["episodes"] != train(seed=2, **env)["episodes"]  # the environment's own numbers


def test_book_figures_in_small():
    def steps(K, episode):
        runs = [train(planning_steps=K, planning_action="visited", num_episodes=episode, total_timesteps=10**6, seed=s)
                for s in range(1, 13)]  # fmt: skip
        return statistics.mean(run["episodes"][episode - 1][2] for run in runs)

    assert steps(50, 3) <= 23  # 17.6 ± 0.7 over 30 seeds
    assert steps(5, 10) <= 20  # 16.6
    assert steps(0, 10) >= 70  # 146


def test_dyna_q_plus_finds_the_shortcut():
    def late(kappa):
        run = train(env_id="ShortcutMaze-v0", alpha=1.0, planning_steps=20, kappa=kappa, planning_action="visited")
        return 1000 / sum(end > 5000 for end, _, _ in run["episodes"])

    assert late(1e-3) < 14.5 < late(0.0)


def test_sokoban_is_solved_saved_and_evaluated(capsys):
    result = main(Args(env_id="Sokoban-v0", gamma=0.99, planning_steps=50, total_timesteps=3000))
    assert result["episodes"][-1][1] > 5  # 10.9 for the solving push
    (path,) = pathlib.Path("runs").glob("*/agent.pt")
    assert f"wrote {path}" in capsys.readouterr().out
    returns = main(parse_args(["--evaluate", str(path), "--eval-episodes", "3"]))["returns"]
    assert (returns > 5).all() and "return" in capsys.readouterr().out


@pytest.mark.parametrize(("steps", "low", "high"), [(3000, 16, 100), (990, 10, 50)])
def test_a_maze_is_evaluated_as_the_run_left_it(steps, low, high):
    # 990: an evaluation moves no walls, which would move at step 1000
    main(Args(env_id="BlockingMaze-v0", planning_steps=20, planning_action="visited", total_timesteps=steps))
    (path,) = pathlib.Path("runs").glob("*/agent.pt")
    lengths = main(parse_args(["--evaluate", str(path), "--eval-episodes", "20"]))["lengths"]
    assert low <= lengths.min() and lengths.max() <= high


def test_an_evaluation_without_end_is_cut(monkeypatch, capsys):
    main(Args(total_timesteps=1))
    (path,) = pathlib.Path("runs").glob("*/agent.pt")
    monkeypatch.setattr(dyna_q, "EVALUATION_STEPS", 5)
    assert evaluate_table(parse_args(["--evaluate", str(path), "--eval-episodes", "2"]))["lengths"].tolist() == [5, 5]
    assert "2 of 2 episodes were cut after 5 steps" in capsys.readouterr().out
