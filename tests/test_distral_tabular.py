"""distral_tabular.py: identities, the two rooms, what the loop does, files."""

import pathlib

import numpy as np
import pytest

import distral_tabular as tables
from distral_tabular import Args, main, parse_args, read_rooms, soft_values

SMALL = {"total_timesteps": 400, "eval_frequency": 200, "num_tasks": 2, "alpha": 0.8}


def test_soft_values_by_hand():
    q, prior = np.array([1.0, 2.0, 0.0]), np.array([0.5, 0.3, 0.2])
    V, log_pi = soft_values(q, np.log(prior), 0.8, 5.0)
    unnormalised = prior**0.8 * np.exp(5 * q)
    np.testing.assert_allclose(V, np.log(unnormalised.sum()) / 5, rtol=1e-12)
    np.testing.assert_allclose(np.exp(log_pi), unnormalised / unnormalised.sum(), rtol=1e-12)


def test_finite_at_large_beta_q():
    for q in ([1e4, 0.0, -1e4, 5e3], [-1e4] * 4):
        V, log_pi = soft_values(np.array(q), np.log(np.full(4, 0.25)), 0.8, 1.0)
        assert np.exp(log_pi).sum() == pytest.approx(1, rel=1e-12) and abs(V - max(q)) < 2


def test_rooms():
    cells, ahead, corridor = read_rooms()
    assert len(cells) == 53
    assert {tuple(cell) for cell in cells[corridor]} == {(2, 5), (2, 6), (2, 7)}
    number = {tuple(cell): c for c, cell in enumerate(cells)}
    assert ahead[number[2, 4]].tolist() == [number[1, 4], number[3, 4], number[2, 3], number[2, 5]]
    assert ahead[number[0, 0]].tolist() == [0, number[1, 0], 0, number[0, 1]]
    assert ahead[number[1, 4], 3] == number[1, 4]  # the wall between the rooms
    cell, reward, end = tables.rooms_step(
        ahead, np.array([0, 0]), np.array([1, 1]), np.array([0, 3])
    )  # into the wall; there
    assert (cell.tolist(), reward.tolist(), end.tolist()) == ([0, 1], [-0.1, 1.0], [False, True])


def test_goals_are_in_rooms_and_held_out_ones_are_others():
    goals = tables.draw_goals(3, 50)
    assert len(set(goals)) == 50 and not read_rooms()[2][goals].any()
    np.testing.assert_array_equal(tables.draw_goals(3, 8), goals[:8])
    assert (tables.draw_goals(4, 8) != goals[:8]).any()


def test_exact_returns():
    cells, ahead, _ = read_rooms()
    goals = np.array([[0, 30]])
    distance = np.full((53, 2), 99)  # to the goal, by breadth-first search
    for m, goal in enumerate(goals[0]):
        distance[goal, m] = 0
        for d in range(60):
            for c in range(53):
                if distance[c, m] == 99 and (distance[ahead[c], m] == d).any():
                    distance[c, m] = d + 1
    paths = lambda d: -0.1 * (1 - 0.95 ** (d - 1)) / 0.05 + 0.95 ** (d - 1)  # noqa: E731
    expected = [np.mean([paths(d) for c, d in enumerate(distance[:, m]) if c != goals[0, m]]) for m in range(2)]
    for previous in (1, 5):
        np.testing.assert_allclose(
            tables.episode_returns(None, ahead, goals, previous, 0.95, 100), [expected], rtol=1e-9
        )
    # always up: never there within 20 steps but from below in the goal's column; the other task's policy goes left
    policy = np.zeros((1, 2, len(cells) * 5, 4))
    policy[0, 0, :, 0] = policy[0, 1, :, 2] = 1
    policy[0, 0, 4::5] = [0, 1, 0, 0]  # after a step to the right, which it never takes
    value = tables.episode_returns(policy, ahead, np.array([[0, 0]]), 5, 0.95, 20)[0]
    column = [paths(d) for d in range(1, 5)]
    assert value == pytest.approx([(sum(column) + 48 * -0.1 * (1 - 0.95**20) / 0.05) / 52] * 2, rel=1e-9)


def test_going_on_reads_the_right_states():
    _, _, corridor = read_rooms()
    prior = np.full((1, 53 * 5, 4), 0.25)
    for c in np.flatnonzero(corridor):
        prior[0, c * 5 + 1 + 2] = [0, 0, 0.9, 0.1]  # came by left
        prior[0, c * 5 + 1 + 3] = [0, 0, 0.4, 0.6]  # came by right
    assert tables.going_on(prior, corridor, 5)[0] == pytest.approx(0.75)
    assert tables.going_on(np.full((1, 53, 4), 0.25), corridor, 1)[0] == 0.25


def test_scores_run_from_random_to_optimal_play(watch):
    """(return - worst) / (best - worst), means over a run's tasks; π_i, its likeliest action, and π_0."""
    played = watch(tables, "episode_returns", lambda *_: np.array([[0.5, 1.5], [0.0, 2.0]]))
    rng = np.random.default_rng(1)
    Q, log_prior = rng.normal(size=(2, 2, 265, 4)), np.log(rng.dirichlet(np.ones(4), (2, 265)))
    worst, best = np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([[1.0, 3.0], [1.0, 3.0]])
    args = Args(alpha=0.8, beta=3.0, gamma=0.9, max_episode_steps=7)
    result = tables.evaluate_tables(args, Q, log_prior, np.zeros((2, 2), int), best, worst)
    for name in ("greedy", "policy", "distilled"):
        np.testing.assert_allclose(result[f"eval/{name}"], [(0.5 + 0.25) / 2, (0 + 0.5) / 2])
    pi = np.exp(log_prior[:, None] * 0.8 + 3 * Q)
    expected = (np.eye(4)[pi.argmax(-1)], pi / pi.sum(-1, keepdims=True), np.exp(log_prior)[:, None] + 0 * Q)
    for ((policy, _, _, *rest), _), wanted in zip(played, expected, strict=True):
        np.testing.assert_allclose(policy, wanted, rtol=1e-12)
        assert rest == [5, 0.9, 7]


def test_the_loop_hands_on_what_happened(monkeypatch):
    """Acting by π_i, each target's next state one move from its state, the last step first, π_0 from all tasks."""
    _, ahead, _ = read_rooms()
    moves, updates, policies, update, step = [], [], [], tables.soft_q_update, tables.rooms_step

    def watch_step(ahead, cell, goals, action):
        moves.append((cell.copy(), action.copy()))
        return step(ahead, cell, goals, action)

    def watch_update(Q, where, target, rate):
        updates.append((where, target.copy(), Q.copy(), rate))
        update(Q, where, target, rate)
        np.testing.assert_allclose(Q[where], 0.1 * updates[-1][2][where] + 0.9 * target, rtol=1e-12)

    def watch_values(q, log_prior, alpha, beta):
        if q.shape == (1, 2, 4):
            policies.append((q.copy(), log_prior.copy(), alpha, beta))
        return soft_values(q, log_prior, alpha, beta)

    monkeypatch.setattr(tables, "rooms_step", watch_step)
    monkeypatch.setattr(tables, "soft_q_update", watch_update)
    monkeypatch.setattr(tables, "soft_values", watch_values)
    counted, fit = [], tables.distilled_from_counts
    monkeypatch.setattr(tables, "distilled_from_counts", lambda *a: counted.append(
        (a[0].copy(), a[1], fit(*a))) or counted[-1][2])  # fmt: skip
    out = main(Args(**SMALL | {"max_episode_steps": 3, "learning_rate": 0.9, "beta": 2.0, "counts_decay": 0.5}))
    goals, age, counts, log_prior = out["goals"], np.zeros((1, 2), int), 0.0, np.full((1, 265, 4), -np.log(4))
    e, i, last = np.zeros((1, 2), int), np.arange(2)[None], np.zeros((1, 2), int)
    assert len(moves) == len(updates) == 400 and len(counted) == 40
    for k in range(40):
        states, weights = [], []
        for t in range(10):
            cell, action = moves[10 * k + t]
            s = cell * 5 + last
            q, prior, alpha, beta = policies[20 * k + t]
            np.testing.assert_array_equal(prior, log_prior[e, s])  # acts by its state, with π_0 as it was
            assert (alpha, beta) == (0.8, 2.0)
            np.testing.assert_array_equal(q, updates[10 * k][2][e, i, s])
            states.append((s, action))
            weights.append(0.95**age)
            age += 1
            over = (ahead[cell, action] == goals) | (age == 3)
            if t < 9 or k < 39:
                moved = moves[10 * k + t + 1][0]
                np.testing.assert_array_equal(moved[~over], ahead[cell, action][~over])
                assert (moved != goals).all()
            last, age = np.where(over, 0, 1 + action), np.where(over, 0, age)
        for t, ((_, _, s, a), target, Q, rate) in zip(range(9, -1, -1), updates[10 * k : 10 * k + 10], strict=True):
            np.testing.assert_array_equal(s, states[t][0])
            np.testing.assert_array_equal(a, states[t][1])
            cell2 = ahead[s // 5, a]
            V, _ = soft_values(Q[e, i, cell2 * 5 + 1 + a], log_prior[e, cell2 * 5 + 1 + a], 0.8, 2.0)
            np.testing.assert_allclose(target, np.where(cell2 == goals, 1.0, -0.1 + 0.95 * V), rtol=1e-12)
            assert rate == 0.9
        new = np.zeros((1, 265, 4))
        for (s, a), weight in zip(states, weights, strict=True):
            np.add.at(new, (e, s, a), weight)
        counts = 0.5 * counts + new
        np.testing.assert_allclose(counted[k][0], counts, rtol=1e-12)
        assert counted[k][1] == 0.1
        log_prior = counted[k][2]


def test_counts_maximise_the_likelihood():
    """Σ_t w_t log π_0(a_t|s_t): its gradient in the logits, Σ_t w_t (1[a] - π_0), is 0."""
    rng = np.random.default_rng(1)
    s, a, weight = rng.integers(3, size=200), rng.integers(4, size=200), 0.95 ** rng.integers(30, size=200)
    counts = np.zeros((3, 4))
    np.add.at(counts, (s, a), weight)
    prior = np.exp(tables.distilled_from_counts(counts, 1e-12))
    np.testing.assert_allclose(counts - counts.sum(-1, keepdims=True) * prior, 0, atol=1e-9)
    np.testing.assert_allclose(
        np.exp(tables.distilled_from_counts(np.array([3.0, 1, 0, 0]), 1.0)), [0.5, 0.25, 0.125, 0.125]
    )


def test_distral_learns_to_go_on():
    out = main(Args(num_seeds=2, total_timesteps=4000, eval_frequency=2000, beta=20.0))
    assert out["rows"][0]["eval/going_on"].tolist() == [0.25] * 2
    assert out["rows"][-1]["eval/going_on"].mean() > 0.5
    assert not np.allclose(out["log_prior"][0], out["log_prior"][1])  # a π_0 for each run


def test_alpha_0_ignores_the_distilled_policy():
    free, frozen = (main(Args(**SMALL | {"alpha": 0.0, "freeze": freeze})) for freeze in (False, True))
    np.testing.assert_array_equal(free["Q"], frozen["Q"])
    assert (frozen["log_prior"] == -np.log(4)).all() and (free["log_prior"] != -np.log(4)).any()
    other = main(Args(**SMALL))
    assert (other["Q"] != free["Q"]).any()


def test_save_evaluate_and_held_out_goal():
    out = main(Args(**SMALL | {"num_seeds": 2}))
    (path,) = map(str, pathlib.Path().glob("runs/*/agent.npz"))
    again = main(parse_args(["--evaluate", path]))
    for name in ("eval/policy", "eval/greedy", "eval/distilled", "eval/going_on"):
        np.testing.assert_array_equal(again[name], out["rows"][-1][name])
    other = main(parse_args(["--evaluate", path, "--first-goal", "2"]))  # beside it, flags count
    assert (other["eval/policy"] != again["eval/policy"]).all()
    flags = SMALL | {"distilled": path, "num_seeds": 2, "first_goal": 2}
    new = main(Args(**flags | {"freeze": True, "save_model": False}))
    np.testing.assert_array_equal(new["log_prior"], out["log_prior"])
    assert all(not set(new["goals"][e]) & set(out["goals"][e]) for e in range(2))
    assert (main(Args(**flags | {"save_model": False}))["counts"].sum() > 0.97**40 * out["counts"].sum()).all()
    with pytest.raises(SystemExit, match="has tables"):
        main(Args(**SMALL | {"distilled": path}))
    with pytest.raises(SystemExit, match="has tables"):
        main(parse_args(["--evaluate", path, "--num-tasks", "3"]))
    pathlib.Path(path).write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="can't read the tables"):
        parse_args(["--evaluate", path])
