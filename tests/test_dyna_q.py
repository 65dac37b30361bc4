"""dyna_q.py: updates by hand, the model's memory, the mazes, and policies against optima computed apart."""

import math
import statistics

import gymnasium as gym
import numpy as np
import pytest
import torch

import dyna_q
from dyna_q import Args, main


class LoopEnv(gym.Env):
    """One state; action a pays rewards[a] and leads back to it. Every step ends the episode, as `ending` says."""

    def __init__(self, rewards: tuple[float, ...] = (1.0,), ending: str = "terminated") -> None:
        self.rewards, self.ending = rewards, ending
        self.observation_space, self.action_space = gym.spaces.Discrete(1), gym.spaces.Discrete(len(rewards))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return 0, {}

    def step(self, action):
        return 0, self.rewards[action], self.ending == "terminated", self.ending == "truncated", {}


class LineEnv(gym.Env):
    """States 0 to `length`, one action: one to the right; the last step pays 1 and terminates.

    From the second episode on, the first step pays `bonus`.
    """

    def __init__(self, length: int, bonus: float = 0.0) -> None:
        self.length, self.bonus, self.episode = length, bonus, 0
        self.observation_space, self.action_space = gym.spaces.Discrete(length + 1), gym.spaces.Discrete(1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.s = 0
        self.episode += 1
        return 0, {}

    def step(self, action):
        self.s += 1
        end = self.s == self.length
        return self.s, float(end) + self.bonus * (self.s == 1 and self.episode > 1), end, False, {}


class CoinEnv(gym.Env):
    """One action; it pays 1 with probability 1/4 and ends the episode."""

    observation_space, action_space = gym.spaces.Discrete(1), gym.spaces.Discrete(1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return 0, {}

    def step(self, action):
        return 0, float(self.np_random.random() < 0.25), True, False, {}


gym.register("TestLoop-v0", entry_point=LoopEnv)
gym.register("TestTruncated-v0", entry_point=LoopEnv, kwargs={"ending": "truncated"})
gym.register("TestCosts-v0", entry_point=LoopEnv, kwargs={"rewards": (-1.0, -1.0, -1.0), "ending": "truncated"})
gym.register("TestPair-v0", entry_point=LoopEnv, kwargs={"rewards": (1.0, 1.0), "ending": "truncated"})
gym.register("TestLine-v0", entry_point=LineEnv, kwargs={"length": 6})
gym.register("TestBonus4-v0", entry_point=LineEnv, kwargs={"length": 6, "bonus": 0.3})
gym.register("TestBonus0-v0", entry_point=LineEnv, kwargs={"length": 6, "bonus": 0.9})
gym.register("TestCoin-v0", entry_point=CoinEnv)


def train(**kwargs) -> dict:
    return main(Args(**{"log_frequency": 0} | kwargs))


# ----------------------------------------------------------------------------------------------------- updates by hand


def test_q_learning_by_hand():
    # α = 1/2, r = 1: terminal 0 -> .5 -> .75 -> .875; truncated, γ = 1/2: q <- q + (1 + q/2 - q) / 2
    hand = {"alpha": 0.5, "gamma": 0.5, "planning_steps": 0, "total_timesteps": 3}
    assert train(env_id="TestLoop-v0", **hand)["Q"] == [[0.875]]
    assert train(env_id="TestTruncated-v0", **hand)["Q"] == [[1.15625]]


def test_planning_repeats_the_remembered_step():
    # K = 2: three updates with the same transition for one real step, so that step 1 gives what three gave above
    hand = {"alpha": 0.5, "gamma": 0.5, "planning_steps": 2, "total_timesteps": 1}
    for env_id, q in (("TestLoop-v0", 0.875), ("TestTruncated-v0", 1.15625)):
        result = train(env_id=env_id, **hand)
        assert result["Q"] == [[q]] and result["backups"] == 3
        assert result["M"] == [[{(1.0, 0, env_id == "TestLoop-v0"): 1}]]  # `terminated` is remembered, truncation isn't


@pytest.mark.parametrize("rule", ["q", "visited"])
def test_planning_leaves_untried_actions_alone(rule):
    result = train(env_id="TestCosts-v0", planning_action=rule, planning_steps=200, total_timesteps=1, epsilon=0.5)
    assert sorted(q == 0 for q in result["Q"][0]) == [False, True, True]
    assert sorted(map(len, result["M"][0])) == [0, 0, 1]


def test_the_two_rules_differ_where_an_action_is_worse():
    # both actions tried (ε = 1); by Q with a small ε the worse one is hardly ever planned
    gym.register("TestWorse-v0", entry_point=LoopEnv, kwargs={"rewards": (1.0, -1.0)})
    by_q, visited = (
        train(env_id="TestWorse-v0", planning_action=rule, planning_steps=50, alpha=0.01, epsilon=0.02, seed=3,
              total_timesteps=100)["Q"][0][1]
        for rule in ("q", "visited")
    )  # fmt: skip
    # 0.01 * (1 - 0.01)^n: by Q about one planned update in a hundred is of action 1, by `visited` one in two
    assert -0.8 < by_q < 0 and visited < -0.99


def test_dyna_q_plus_bonus_and_untried_actions():
    # γ = 0, ε = 0, α = 1: one action pays 1 and is taken ever after, τ = 0; the other one was never tried, τ = t
    result = train(env_id="TestPair-v0", kappa=0.1, gamma=0.0, alpha=1.0, epsilon=0.0, planning_steps=60,
                   planning_action="visited", total_timesteps=49)  # fmt: skip
    assert sorted(result["Q"][0]) == [pytest.approx(0.1 * math.sqrt(49)), 1.0]
    assert {(0.0, 0, False): 1} in result["M"][0]  # untried: back to s, reward 0


def test_dyna_q_plus_forgets_the_placeholder_once_the_action_is_tried():
    result = train(env_id="TestPair-v0", kappa=1e-6, epsilon=1.0, model="counts", total_timesteps=40)
    counts = [dict(outcomes) for outcomes in result["M"][0]]
    assert all(set(outcomes) == {(1.0, 0, False)} for outcomes in counts)
    assert sum(outcomes[1.0, 0, False] for outcomes in counts) == 40


# --------------------------------------------------------------------------------------------------------- the model


def test_counts_and_last():
    counts = train(env_id="TestCoin-v0", model="counts", total_timesteps=4000, planning_steps=0)["M"][0][0]
    assert sum(counts.values()) == 4000 and abs(counts[1.0, 0, True] / 4000 - 0.25) < 0.03
    last = train(env_id="TestCoin-v0", model="last", total_timesteps=4000, planning_steps=0)["M"][0][0]
    assert len(last) == 1


def test_sampling_is_in_proportion_to_the_counts():
    outcomes = {(0.0, 1, False): 1, (1.0, 2, True): 3}
    first, second = outcomes
    for lot, expected in ((0.0, first), (0.2499, first), (0.25, second), (0.9999999, second)):
        assert dyna_q.sample_outcome(outcomes, lambda lot=lot: lot) == expected


def test_counts_value_a_gamble_right_and_last_does_not():
    # planning dominates: with counts Q tends to 1/4, with the last outcome to whatever came last
    settings = {"env_id": "TestCoin-v0", "planning_steps": 500, "alpha": 0.01, "total_timesteps": 300}
    assert abs(train(model="counts", **settings)["Q"][0][0] - 0.25) < 0.15
    q = train(model="last", **settings)["Q"][0][0]
    assert min(q, 1 - q) < 0.02


def test_expected_target_by_hand():
    outcomes = {(0.0, 1, False): 1, (1.0, 1, True): 3}
    # (1 * (0 + 0.5 * 2) + 3 * 1) / 4: the terminal outcome doesn't look at Q[1]
    assert dyna_q.expected_target(outcomes, [[0.0], [2.0]], 0.5) == 1.0


def test_greedy_action_takes_allowed_ones_and_breaks_ties_evenly():
    assert dyna_q.greedy_action([5.0, 1.0, 2.0], [1, 2], lambda: 0.0) == 2
    draws = [dyna_q.greedy_action([1.0, 1.0, 0.0, 1.0], [0, 1, 2, 3], lambda i=i: i / 300) for i in range(300)]
    assert [draws.count(a) for a in range(4)] == [100, 100, 0, 100]


# ------------------------------------------------------------------------------------------------ prioritised sweeping


def test_one_sweep_carries_the_reward_back():
    line = {"env_id": "TestLine-v0", "prioritized": True, "alpha": 1.0, "gamma": 0.5, "num_episodes": 1}
    result = train(planning_steps=20, theta=1e-4, **line)
    assert [q[0] for q in result["Q"]] == [0.5**5, 0.5**4, 0.5**3, 0.5**2, 0.5, 1.0, 0.0]
    assert result["backups"] == 6  # each pair once, none before the reward
    # an error of θ or less enters no queue: 0.5^3 > 0.1 >= 0.5^4
    assert [q[0] for q in train(planning_steps=20, theta=0.1, **line)["Q"]] == [0, 0, 0.5**3, 0.5**2, 0.5, 1, 0]
    # and K bounds the work of one real step
    assert [q[0] for q in train(planning_steps=2, theta=1e-4, **line)["Q"]] == [0, 0, 0, 0, 0.5, 1, 0]


@pytest.mark.parametrize(("bonus", "first"), [(0.3, 4), (0.9, 0)])
def test_the_largest_error_comes_first(bonus, first):
    # Episode 1, K = 1, leaves pair 4 in the queue with P = γ * 1 = 0.5. Then the first step pays `bonus`: P = bonus.
    Q = train(env_id=f"TestBonus{first}-v0", prioritized=True, alpha=1.0, gamma=0.5, planning_steps=1, epsilon=0.0,
              total_timesteps=7)["Q"]  # fmt: skip
    assert {s for s, q in enumerate(Q) if q[0]} == {5, first}


# ------------------------------------------------------------------------------------------------------------- mazes


def shortest(env: dyna_q.MazeEnv, later: bool) -> int:
    reached, steps = {env.start}, 0
    while not any(env.goal[s] for s in reached):
        reached |= {s2 for s in reached for s2 in env.ahead[later][s]}
        steps += 1
    return steps


def test_mazes_are_the_books():
    env = gym.make("DynaMaze-v0").unwrapped
    walls = {(y, x) for y in range(6) for x in range(9) if env.grids[0][y, x] == "#"}
    assert walls == {(1, 2), (2, 2), (3, 2), (0, 7), (1, 7), (2, 7), (4, 5)}
    assert (env.start, env.goal.index(True)) == (2 * 9 + 0, 8)
    assert shortest(env, False) == 14
    for env_id, before, after, change in (("BlockingMaze-v0", 10, 16, 1000), ("ShortcutMaze-v0", 16, 10, 3000)):
        env = gym.make(env_id).unwrapped
        assert (shortest(env, False), shortest(env, True), env.change_step) == (before, after, change)
        assert env.start == 5 * 9 + 3


def test_maze_steps_and_scales():
    env = gym.make("DynaMaze-v0").unwrapped
    env.reset()
    assert [env.step(a)[0] for a in (3, 0, 2, 2, 1)] == [18, 9, 10, 10, 19]  # the edge, up, right, the wall, down
    env.s = 17
    assert env.step(0) == (8, 1.0, True, False, {})
    large = gym.make("DynaMaze-v0", scale=2).unwrapped
    assert (large.height, large.width, large.start, sum(large.goal)) == (12, 18, 4 * 18, 4)
    assert (large.grids[0][:, 4] == "#").tolist() == [2 <= y < 8 for y in range(12)]


def test_walls_move_at_the_change_and_not_with_the_episode():
    env = gym.make("BlockingMaze-v0").unwrapped
    env.reset()
    for step in range(1002):
        env.s = 2 * 9 + 8  # above the gap at the right
        assert env.step(1)[0] == (3 * 9 + 8 if step < 1000 else 2 * 9 + 8)
        env.reset()


def test_book_figures_in_small():
    def steps(K, episode, seeds=12):
        runs = [train(planning_steps=K, planning_action="visited", num_episodes=episode, total_timesteps=10**6, seed=s)
                for s in range(1, seeds + 1)]  # fmt: skip
        return statistics.mean(run["episodes"][episode - 1][2] for run in runs)

    assert steps(50, 3) <= 23  # 17.6 ± 0.7 over 30 seeds
    assert steps(5, 10) <= 20  # 16.6
    assert steps(0, 10) >= 70  # 146


def test_dyna_q_plus_finds_the_shortcut():
    def late(kappa):
        ends = [episode[0] for episode in train(env_id="ShortcutMaze-v0", alpha=1.0, planning_steps=20, kappa=kappa,
                planning_action="visited", total_timesteps=6000)["episodes"]]  # fmt: skip
        return 1000 / sum(end > 5000 for end in ends)

    assert late(1e-3) < 14.5 < late(0.0)


# ------------------------------------------------------------------------------------------------ a stochastic optimum


def lake() -> tuple[np.ndarray, np.ndarray]:
    P, R = np.zeros((16, 4, 16)), np.zeros((16, 4))
    for s, row in gym.make("FrozenLake-v1").unwrapped.P.items():
        for a, outcomes in row.items():
            for p, s2, r, end in outcomes:
                P[s, a, s2] += p * (not end)
                R[s, a] += p * r
    return P, R


def success(policy, P, R) -> float:
    """V_100(0): V_{n+1}(s) = R(s) + Σ P(s'|s) V_n(s')."""
    rows, V = np.arange(16), np.zeros(16)
    for _ in range(100):
        V = R[rows, policy] + P[rows, policy] @ V
    return float(V[0])


def test_frozen_lake_counts_reach_the_optimal_policy_sooner_than_q_learning():
    P, R = lake()
    V = np.zeros(16)
    for _ in range(5000):
        V = (R + 0.99 * P @ V).max(1)
    best = success((R + 0.99 * P @ V).argmax(1), P, R)
    assert best == pytest.approx(0.74016, abs=1e-4)

    def run(seed, **settings):
        """Exact success rate in the end, and the real steps until five evaluations in a row were within 2 points."""
        rates = []

        def watch(global_step, backups, Q, ids):
            if global_step % 250 == 0:
                rates.append(success([int(np.argmax(Q[ids[s]])) if s in ids else 0 for s in range(16)], P, R))

        main(Args(env_id="FrozenLake-v1", gamma=0.99, seed=seed, log_frequency=0, **settings), watch)
        good = np.array(rates) >= best - 0.02
        steps = next((250 * (i + 1) for i in range(len(good) - 4) if good[i : i + 5].all()), math.inf)
        return statistics.mean(rates[-20:]), steps

    counts = [
        run(s, model="counts", planning_steps=20, alpha=0.02, epsilon=0.2, total_timesteps=15_000) for s in range(4)
    ]
    q_learning = [run(s, planning_steps=0, alpha=0.2, epsilon=0.3, total_timesteps=30_000) for s in range(4)]
    assert statistics.mean(rate for rate, _ in counts) >= best - 0.02
    assert statistics.median(s for _, s in counts) < statistics.median(s for _, s in q_learning)


# ---------------------------------------------------------------------------------------------- runs, files and flags


def test_one_seed_reproduces_the_run():
    first, again, other = (train(seed=seed, total_timesteps=2000) for seed in (1, 1, 2))
    assert first["Q"] == again["Q"] and first["episodes"] == again["episodes"]
    assert first["episodes"] != other["episodes"]


@pytest.mark.parametrize("env_id", ["Blackjack-v1", "CliffWalking-v1", "Taxi-v4"])
def test_toy_text_environments(env_id):
    result = train(env_id=env_id, total_timesteps=1000, planning_steps=2)
    assert len(result["ids"]) > 5 and any(any(q) for q in result["Q"])


def test_sokoban_is_solved_saved_and_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = Args(env_id="Sokoban-v0", gamma=0.99, planning_steps=50, total_timesteps=8000, save_model=True)
    result = main(args)
    assert result["episodes"][-1][1] > 5  # 10.9 for the solving push
    (path,) = tmp_path.glob("runs/*/agent.pt")
    assert (path.parent / "metrics.csv").read_text().count("\n") == 9  # a header, and a row every 1000 steps
    returns = main(Args(evaluate=str(path), eval_episodes=3))["returns"]
    assert (returns > 5).all() and "return" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SystemExit, match="can't read the checkpoint"):
        main(Args(evaluate=str(path)))


def test_a_changed_maze_is_evaluated_as_it_is_now(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(Args(env_id="BlockingMaze-v0", alpha=1.0, kappa=1e-4, planning_steps=20, planning_action="visited",
              total_timesteps=3000, save_model=True, log_frequency=0))  # fmt: skip
    (path,) = tmp_path.glob("runs/*/agent.pt")
    assert main(Args(evaluate=str(path), eval_episodes=1))["lengths"][0] >= 16


def test_an_evaluation_moves_no_walls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(Args(env_id="BlockingMaze-v0", planning_steps=20, total_timesteps=990, save_model=True, log_frequency=0))
    (path,) = tmp_path.glob("runs/*/agent.pt")
    lengths = main(Args(evaluate=str(path), eval_episodes=20))["lengths"]  # the walls would move at step 1000
    assert lengths.max() < 50


def test_a_checkpoint_of_another_script_is_refused(tmp_path):
    path = tmp_path / "agent.pt"
    torch.save({"args": {"not_a_flag": 7}}, path)
    with pytest.raises(SystemExit, match=r"agent\.pt was written by another script"):
        main(Args(evaluate=str(path)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"planning_steps": -1}, "--planning-steps -1"),
        ({"env_id": "no_such_module:Maze-v0"}, "no_such_module"),
        ({"env_id": "NoMaze-v0"}, "NoMaze.*DynaMaze-v0, BlockingMaze-v0, ShortcutMaze-v0"),
        ({"env_id": "Pendulum-v1"}, "action space.*Discrete"),
        ({"env_id": "CartPole-v1"}, "states.*dyna_dqn.py"),
        ({"alpha": 0.0}, "--alpha"),
        ({"epsilon": 1.5}, "--epsilon"),
        ({"gamma": -0.1}, "--gamma"),
        ({"kappa": -1.0}, "--kappa"),
        ({"total_timesteps": 0}, "--total-timesteps"),
        ({"prioritized": True, "planning_steps": 0}, "--prioritized.*--planning-steps"),
        ({"prioritized": True, "kappa": 0.1}, "--prioritized and --kappa"),
        ({"env_id": "Sokoban-v0", "size": 3}, "smallest board"),
        ({"evaluate": "no_such_file.pt"}, "can't read the checkpoint no_such_file.pt"),
    ],
)
def test_bad_flags_are_one_clear_line(kwargs, message):
    with pytest.raises(SystemExit, match=message) as error:
        train(**kwargs)
    assert "\n" not in str(error.value)
