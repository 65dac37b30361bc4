"""distral_tabular.py: identities, fixed points against value iteration, distillation, the two rooms, flags, files."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import distral_tabular
from distral_tabular import (
    Args,
    TwoRoomsEnv,
    distillation_gradient,
    distilled_from_counts,
    draw_goals,
    episode_returns,
    going_on,
    main,
    read_rooms,
    rooms_step,
    soft_q_update,
    soft_values,
)

SMALL = {"total_timesteps": 400, "eval_frequency": 200, "num_tasks": 2}


def regularised_value_iteration(goal: int, prior: np.ndarray, alpha: float, beta: float, gamma: float) -> np.ndarray:
    """Q (S, A) by sweeps over dense matrices, written apart from the script: raw exponentials, states (cell, last)."""
    _, ahead, _ = read_rooms()
    C = len(ahead)
    P, R = np.zeros((4, C * 5, C * 5)), np.zeros((4, C * 5))
    for c in range(C):
        for last in range(5):
            for a in range(4):
                c2 = ahead[c, a]
                R[a, c * 5 + last] = 1.0 if c2 == goal else -0.1
                if c2 != goal:
                    P[a, c * 5 + last, c2 * 5 + 1 + a] = 1.0
    V = np.zeros(C * 5)
    for _ in range(2000):
        q = (R + gamma * P @ V).T
        V = np.log((prior**alpha * np.exp(beta * q)).sum(1)) / beta
    return (R + gamma * P @ V).T


# --------------------------------------------------------------------------------------------------- soft values


def test_soft_values_by_hand():
    q, prior = np.array([1.0, 2.0, 0.0]), np.array([0.5, 0.3, 0.2])
    V, log_pi = soft_values(q, np.log(prior), 0.8, 5.0)
    unnormalised = prior**0.8 * np.exp(5 * q)
    np.testing.assert_allclose(V, np.log(unnormalised.sum()) / 5, rtol=1e-12)
    np.testing.assert_allclose(np.exp(log_pi), unnormalised / unnormalised.sum(), rtol=1e-12)


def test_soft_value_is_the_best_regularised_value():
    """V = max_π Σ π (Q + (α/β) log π_0 - (1/β) log π): reached by π_i, and by nothing else."""
    rng = np.random.default_rng(1)
    q, log_prior, alpha, beta = rng.normal(size=4), np.log(rng.dirichlet(np.ones(4))), 0.7, 3.0
    V, log_pi = soft_values(q, log_prior, alpha, beta)
    value = lambda log_p: (np.exp(log_p) * (q + alpha / beta * log_prior - log_p / beta)).sum()  # noqa: E731
    assert value(log_pi) == pytest.approx(V, rel=1e-12)
    assert all(value(np.log(rng.dirichlet(np.ones(4)))) < V for _ in range(200))


def test_alpha_0_is_soft_q_learning_and_large_beta_is_greedy():
    rng = np.random.default_rng(1)
    q, log_prior = rng.normal(size=(6, 4)), np.log(rng.dirichlet(np.ones(4), 6))
    V, log_pi = soft_values(q, log_prior, 0.0, 2.0)
    np.testing.assert_allclose(V, np.log(np.exp(2 * q).sum(-1)) / 2, rtol=1e-12)
    np.testing.assert_allclose(np.exp(log_pi), np.exp(2 * q) / np.exp(2 * q).sum(-1, keepdims=True), rtol=1e-12)
    V, log_pi = soft_values(q, log_prior, 0.8, 1e6)
    np.testing.assert_allclose(V, q.max(-1), atol=1e-5)
    np.testing.assert_array_equal(np.exp(log_pi).round(6), np.eye(4)[q.argmax(-1)])


def test_finite_at_large_beta_q():
    for q in ([1e4, 0.0, -1e4, 5e3], [-1e4] * 4):
        V, log_pi = soft_values(np.array(q), np.log(np.full(4, 0.25)), 0.8, 1.0)
        assert np.isfinite(V) and np.isfinite(log_pi).all()
        assert np.exp(log_pi).sum() == pytest.approx(1, rel=1e-12) and abs(V - max(q)) < 2


# --------------------------------------------------------------------------------------------------- fixed points


@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.0])
def test_fixed_point_is_that_of_regularised_value_iteration(alpha):
    rng = np.random.default_rng(1)
    _, ahead, _ = read_rooms()
    C, goal = len(ahead), 7
    prior = rng.dirichlet(np.ones(4), C * 5)
    Q, log_prior = np.zeros((C * 5, 4)), np.log(prior)
    s, a = (x.ravel() for x in np.meshgrid(np.arange(C * 5), np.arange(4), indexing="ij"))
    cell2, r, terminated = rooms_step(ahead, s // 5, goal, a)
    for _ in range(1200):
        s2 = cell2 * 5 + 1 + a
        V, _ = soft_values(Q[s2], log_prior[s2], alpha, 5.0)
        soft_q_update(Q, (s, a), r + 0.95 * V * ~terminated, 0.5)
    np.testing.assert_allclose(Q, regularised_value_iteration(goal, prior, alpha, 5.0, 0.95), atol=1e-6)


def test_sampled_run_with_frozen_prior_reaches_the_fixed_point(tmp_path, monkeypatch):
    """The loop itself, start to end: rollouts, updates, episode ends."""
    monkeypatch.chdir(tmp_path)
    # a goal in the corner, short episodes so that the first steps (state `previous` 0) are seen often too
    out = main(Args(num_seeds=1, num_tasks=2, total_timesteps=80_000, eval_frequency=40_000, freeze=True, beta=2.0,
                    alpha=0.9, learning_rate=1.0, max_episode_steps=20, gamma=0.8))  # fmt: skip
    for i in range(2):
        exact = regularised_value_iteration(out["goals"][0, i], np.full((265, 4), 0.25), 0.9, 2.0, 0.8)
        visited = out["Q"][0, i] != 0
        assert visited.mean() > 0.8
        close = np.abs(out["Q"][0, i] - exact) < 1e-6
        assert close[visited].mean() > 0.99  # a pair that was tried for the first time at the end may lag


# --------------------------------------------------------------------------------------------------- distillation


def test_counts_maximise_the_likelihood_and_gradient_agrees():
    rng = np.random.default_rng(1)
    s, a, weight = rng.integers(3, size=200), rng.integers(4, size=200), 0.95 ** rng.integers(30, size=200)
    counts = np.zeros((3, 4))
    np.add.at(counts, (s, a), weight)
    log_prior = distilled_from_counts(counts, 1e-9)
    np.testing.assert_allclose(np.exp(log_prior).sum(-1), 1, rtol=1e-12)
    gradient = distillation_gradient(log_prior, (s,), a, weight, 0.16)
    np.testing.assert_allclose(gradient, 0, atol=1e-8)  # the maximum: no way up
    assert np.abs(distillation_gradient(np.full((3, 4), np.log(0.25)), (s,), a, weight, 0.16)).max() > 0.1


def test_distillation_gradient_matches_finite_differences_and_holds_alpha_over_beta():
    rng = np.random.default_rng(1)
    logits, s, a = rng.normal(size=(3, 4)), rng.integers(3, size=20), rng.integers(4, size=20)
    weight, alpha, beta = 0.95 ** np.arange(20), 0.8, 5.0
    log_softmax = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))  # noqa: E731
    objective = lambda x: alpha / beta * (weight * log_softmax(x)[s, a]).sum()  # noqa: E731
    gradient = distillation_gradient(log_softmax(logits), (s,), a, weight, alpha / beta)
    for index in np.ndindex(3, 4):
        step = np.zeros((3, 4))
        step[index] = 1e-6
        difference = (objective(logits + step) - objective(logits - step)) / 2e-6
        assert gradient[index] == pytest.approx(difference, rel=1e-6, abs=1e-9)


def test_prior_holds_all_tasks_of_its_own_run_only(tmp_path, monkeypatch):
    """Discounted counts of a run: every task's actions, γ^t each, t from the episode's start."""
    monkeypatch.chdir(tmp_path)
    out = main(Args(num_seeds=3, num_tasks=2, total_timesteps=90, eval_frequency=30, counts_decay=1.0,
                    max_episode_steps=1000))  # fmt: skip
    total = out["counts"].sum((1, 2))
    # no goal met: exactly two tasks' Σ_{t<90} .95^t
    longest = 2 * (1 - 0.95**90) / 0.05
    assert (total >= longest - 1e-9).all() and (total < 2 * longest).all()
    np.testing.assert_allclose(out["log_prior"], distilled_from_counts(out["counts"], 0.1))
    assert not np.allclose(out["log_prior"][0], out["log_prior"][1])


def test_the_loop_hands_alpha_over_beta_and_discounts_to_the_gradient(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen, gradient = [], distillation_gradient
    monkeypatch.setattr(
        distral_tabular, "distillation_gradient", lambda *rest: seen.append(rest[3:]) or gradient(*rest)
    )
    main(Args(**SMALL | {"distillation": "gradient", "total_timesteps": 10, "alpha": 0.6, "beta": 3.0}))
    assert [scale for _, scale in seen] == pytest.approx([0.2])
    np.testing.assert_allclose(seen[0][0].max((0, 1)), 0.95 ** np.arange(10))  # (E, n, T): no goal in ten steps


@pytest.mark.parametrize("distillation", ["counts", "gradient"])
def test_both_distillations_learn_to_go_on(tmp_path, monkeypatch, distillation):
    monkeypatch.chdir(tmp_path)
    out = main(Args(num_seeds=3, total_timesteps=6000, eval_frequency=3000, learning_rate=0.5, beta=20.0,
                    distillation=distillation, distill_learning_rate=10.0))  # fmt: skip
    assert out["rows"][0]["eval/going_on"] == [0.25] * 3
    assert np.mean(out["rows"][-1]["eval/going_on"]) > 0.6
    np.testing.assert_allclose(np.exp(out["log_prior"]).sum(-1), 1, rtol=1e-9)


# --------------------------------------------------------------------------------------------------- the two rooms


def test_rooms():
    cells, ahead, corridor = read_rooms()
    assert len(cells) == 53 and corridor.sum() == 3
    assert {tuple(cell) for cell in cells[corridor]} == {(2, 5), (2, 6), (2, 7)}
    number = {tuple(cell): c for c, cell in enumerate(cells)}
    assert ahead[number[2, 4]].tolist() == [number[1, 4], number[3, 4], number[2, 3], number[2, 5]]
    assert ahead[number[0, 0]].tolist() == [0, number[1, 0], 0, number[0, 1]]
    assert ahead[number[1, 4], 3] == number[1, 4]  # the wall between the rooms


def test_environment_follows_gymnasium_and_pays():
    check_env(gym.make("TwoRooms-v0", goal=3).unwrapped, skip_render_check=True)
    env = TwoRoomsEnv(goal=1, render_mode="ansi")
    starts = {int(env.reset(seed=1 if k == 0 else None)[0][0]) for k in range(1000)}
    assert starts == set(range(53)) - {1}
    env.reset()
    env.cell = 0
    observation, reward, terminated, truncated, _ = env.step(0)  # into the wall
    assert (observation.tolist(), reward, terminated, truncated) == ([0, 1], -0.1, False, False)
    observation, reward, terminated, truncated, _ = env.step(3)
    assert (observation.tolist(), reward, terminated, truncated) == ([1, 4], 1.0, True, False)
    assert env.render().startswith(".@")
    with pytest.raises(ValueError, match="goal 53"):
        TwoRoomsEnv(goal=53)


def test_goals_are_in_rooms_and_held_out_ones_are_others():
    goals = draw_goals(3, 50)
    assert len(set(goals)) == 50 and not read_rooms()[2][goals].any()
    np.testing.assert_array_equal(draw_goals(3, 8), goals[:8])
    assert (draw_goals(4, 8) != goals[:8]).any()


def test_exact_returns():
    cells, ahead, _ = read_rooms()
    goals = np.array([0, 30])
    S = len(cells) * 5
    # optimal: by distance to the goal, from breadth-first search
    distance = np.full((53, 2), 99)
    for m, goal in enumerate(goals):
        distance[goal, m] = 0
        for d in range(60):
            for c in range(53):
                if distance[c, m] == 99 and (distance[ahead[c], m] == d).any():
                    distance[c, m] = d + 1
    paths = lambda d: -0.1 * (1 - 0.95 ** (d - 1)) / 0.05 + 0.95 ** (d - 1)  # noqa: E731
    expected = [np.mean([paths(d) for c, d in enumerate(distance[:, m]) if c != goals[m]]) for m in range(2)]
    for previous in (1, 5):
        np.testing.assert_allclose(episode_returns(None, ahead, goals, previous, 0.95, 100), expected, rtol=1e-9)
    # always up, never there within 20 steps but from below in the goal's column
    up = np.zeros((S, 4, 2))
    up[:, 0] = 1
    value = episode_returns(up, ahead, np.array([0, 0]), 5, 0.95, 20)[0]
    column = [paths(d) for d in range(1, 5)]
    assert value == pytest.approx((sum(column) + 48 * -0.1 * (1 - 0.95**20) / 0.05) / 52, rel=1e-9)


def test_going_on_reads_the_right_states():
    _, _, corridor = read_rooms()
    prior = np.full((1, 53 * 5, 4), 0.25)
    for c in np.flatnonzero(corridor):
        prior[0, c * 5 + 1 + 2] = [0, 0, 0.9, 0.1]  # came by left
        prior[0, c * 5 + 1 + 3] = [0, 0, 0.4, 0.6]  # came by right
    assert going_on(prior, corridor, 5)[0] == pytest.approx(0.75)
    assert going_on(np.full((1, 53, 4), 0.25), corridor, 1)[0] == 0.25


# --------------------------------------------------------------------------------------------------- the loop


def test_alpha_0_ignores_the_distilled_policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    free, frozen = (main(Args(**SMALL | {"alpha": 0.0, "freeze": freeze})) for freeze in (False, True))
    np.testing.assert_array_equal(free["Q"], frozen["Q"])
    assert (frozen["log_prior"] == -np.log(4)).all() and (free["log_prior"] != -np.log(4)).any()
    other = main(Args(**SMALL | {"alpha": 0.8}))
    assert (other["Q"] != free["Q"]).any()


def test_reproduces_by_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, again, other = (main(Args(**SMALL | {"seed": seed})) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first["Q"], again["Q"])
    np.testing.assert_array_equal(first["log_prior"], again["log_prior"])
    assert (first["Q"] != 0).any() and (first["Q"] != other["Q"]).any()


def test_targets_never_cross_a_reset(tmp_path, monkeypatch):
    """Each target's next state is one move from its state, also where the episode was truncated."""
    monkeypatch.chdir(tmp_path)
    _, ahead, _ = read_rooms()
    seen, update = [], soft_q_update
    monkeypatch.setattr(distral_tabular, "soft_q_update", lambda Q, where, target, rate: seen.append(
        (where, target.copy(), Q.copy())) or update(Q, where, target, rate))  # fmt: skip
    out = main(Args(**SMALL | {"max_episode_steps": 3, "freeze": True, "learning_rate": 1.0}))
    for (_, i, s, a), target, Q in seen:
        c2 = ahead[s // 5, a]
        V, _ = soft_values(Q[0, i, c2 * 5 + 1 + a], np.full(4, -np.log(4)), 0.8, 5.0)
        goal = c2 == out["goals"][0]
        np.testing.assert_allclose(target, np.where(goal, 1.0, -0.1 + 0.95 * V), rtol=1e-12)
    # the last step of a rollout comes first, so that one rollout carries a reward back over all its steps
    follows = [
        (ahead[s // 5, a] * 5 + 1 + a == seen[k][0][2]).mean()
        for k, ((_, _, s, a), _, _) in enumerate(seen[1:])
        if (k + 1) % 10
    ]
    assert np.mean(follows) == pytest.approx(2 / 3, abs=0.05)  # but where an episode of three steps had ended


def test_save_evaluate_and_held_out_goal(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = main(Args(**SMALL | {"save_model": True, "num_seeds": 2}))
    (path,) = tmp_path.glob("runs/*/agent.pt")
    again = main(Args(evaluate=str(path)))
    assert again["eval/policy"] == pytest.approx(out["rows"][-1]["eval/policy"], abs=0.2)  # ten steps later
    new = main(Args(**SMALL | {"distilled": str(path), "num_seeds": 2, "freeze": True, "first_goal": 2}))
    np.testing.assert_array_equal(new["log_prior"], torch.load(path, weights_only=True)["log_prior"])
    assert all(not set(new["goals"][e]) & set(out["goals"][e]) for e in range(2))
    with pytest.raises(SystemExit, match="same flags"):
        main(Args(**SMALL | {"distilled": str(path)}))
    path.write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="can't read the checkpoint"):
        main(Args(evaluate=str(path)))


def test_video(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(Args(**SMALL | {"capture_video": True}))
    assert len(list(tmp_path.glob("videos/*/task*.gif"))) == 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": 1.2}, "--alpha 1.2"),
        ({"beta": 0.0}, "--beta 0.0"),
        ({"beta": float("inf")}, "--beta inf"),
        ({"num_tasks": 0}, "--num-tasks 0"),
        ({"num_tasks": 51}, "ask for 51 goals, the rooms have 50"),
        ({"eval_frequency": 15}, "--eval-frequency 15: must be a multiple"),
        ({"evaluate": "no_such_file.pt"}, "can't read the checkpoint no_such_file.pt"),
    ],
)
def test_bad_flags_are_one_clear_line(tmp_path, monkeypatch, kwargs, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as error:
        main(Args(**kwargs))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
