"""distral.py: identities of the columns, the regularised reward, who learns from which loss, ends, files and flags."""

import os
import signal

import numpy as np
import pytest
import torch

import distral
from distral import (
    Args,
    DistralAgent,
    distilled_policy_loss,
    effective_alpha,
    generalized_advantages,
    main,
    pad_boards,
    read_task,
    regularized_rewards,
    solve_levels,
    task_levels,
    two_column_logits,
)

SMALL = {
    "tasks": ("5x5-1", "6x5-1"), "held_out": "5x5-2", "num_envs": 4, "num_steps": 4, "total_timesteps": 128,
    "log_frequency": 64, "channels": 4, "dense": 16, "eval_episodes": 6, "max_episode_steps": 10,
}  # fmt: skip


def small_agent(**kwargs) -> tuple[DistralAgent, torch.Tensor]:
    """An agent whose policies differ clearly, and boards (n, rows, H, W)."""
    torch.manual_seed(1)
    agent = DistralAgent(Args(**SMALL | kwargs), 6, 5)
    for column in (*agent.own, *([agent.shared] if agent.shared else [])):
        torch.nn.init.normal_(column.actor.weight, std=0.5)
    return agent, torch.stack([pad_boards(task_levels(task, 8), 6, 5) for task in SMALL["tasks"]])


def has_gradient(module: torch.nn.Module) -> bool:
    return any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


# ----------------------------------------------------------------------------------------------------------- identities


def test_two_columns_are_pi_0_to_the_alpha_times_exp_beta_f():
    torch.manual_seed(1)
    h, beta_f, alpha = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64), 0.3
    pi = two_column_logits(h, beta_f, alpha).softmax(-1)
    expected = h.softmax(-1) ** alpha * beta_f.exp()
    torch.testing.assert_close(pi, expected / expected.sum(-1, keepdim=True))
    torch.testing.assert_close(pi.sum(-1), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize(("columns", "variant"), [(2, "kl+ent"), (2, "kl"), (1, "kl+ent")])
def test_agent_puts_its_columns_together(columns, variant):
    agent, boards = small_agent(columns=columns, variant=variant, alpha=0.4)
    logits, values, h = agent(boards)
    alpha = 0.4 if variant == "kl+ent" else 1.0
    for i in range(2):
        x = distral.cell_planes(boards[i])
        own, value = agent.own[i](x)
        shared, _ = agent.shared(x)
        torch.testing.assert_close(h[i], shared)
        torch.testing.assert_close(values[i], value)
        torch.testing.assert_close(logits[i], alpha * shared + own if columns == 2 else own)
        torch.testing.assert_close(agent.task_policy(i, boards[i]), logits[i])
        torch.testing.assert_close(agent.distilled_policy(boards[i]), shared)


def test_baselines_have_the_columns_they_should():
    for algorithm, own, shared in (("independent", 2, False), ("multitask", 1, False), ("two-column", 2, True)):
        agent, boards = small_agent(algorithm=algorithm)
        assert (len(agent.own), agent.shared is not None) == (own, shared)
        logits, _, h = agent(boards)
        assert (h is not None) == shared
        torch.testing.assert_close(agent.task_policy(1, boards[1]), logits[1])
    agent, boards = small_agent(algorithm="multitask")
    torch.testing.assert_close(agent(boards)[0][1], agent.distilled_policy(boards[1]))


def test_effective_alpha():
    for kwargs, alpha in (({}, 0.5), ({"variant": "kl"}, 1.0), ({"alpha": 0.9}, 0.9), ({"algorithm": "two-column"}, 1)):
        assert effective_alpha(Args(**kwargs)) == alpha


# ------------------------------------------------------------------------------------- the regularised reward, once


def test_regularized_rewards_by_hand_and_gathered():
    pi, prior = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]), torch.tensor([[0.2, 0.2, 0.6], [0.3, 0.3, 0.4]])
    actions, rewards = torch.tensor([2, 0]), torch.tensor([1.0, -1.0])
    log_pi, log_prior = pi.log().requires_grad_(), prior.log().requires_grad_()
    result = regularized_rewards(rewards, log_pi, log_prior, actions, 0.5, 4.0)
    expected = [1 + 0.125 * np.log(0.6) - 0.25 * np.log(0.2), -1 + 0.125 * np.log(0.3) - 0.25 * np.log(0.1)]
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    assert not result.requires_grad  # a constant for the losses


def test_regularized_reward_is_kl_and_entropy_in_expectation():
    """E_π[(α/β) log π_0 - (1/β) log π] = -c_KL KL(π‖π_0) + c_Ent H(π), with c_KL = α/β and c_Ent = (1-α)/β."""
    torch.manual_seed(1)
    log_pi, log_prior = (torch.randn(5, dtype=torch.float64).log_softmax(0) for _ in range(2))
    alpha, beta = 0.7, 20.0
    all_actions = torch.arange(5)
    r = regularized_rewards(
        torch.zeros(5).double(), log_pi.expand(5, 5), log_prior.expand(5, 5), all_actions, alpha, beta
    )
    kl, entropy = (log_pi.exp() * (log_pi - log_prior)).sum(), -(log_pi.exp() * log_pi).sum()
    expected = -alpha / beta * kl + (1 - alpha) / beta * entropy
    assert (log_pi.exp() * r).sum().item() == pytest.approx(expected.item(), rel=1e-12)


def watch_losses(monkeypatch, tmp_path, **kwargs):
    """The rewards that reach the advantages and what the losses were made of, in a run of a few updates."""
    monkeypatch.chdir(tmp_path)
    seen = {"rewards": [], "losses": [], "regularized": []}
    advantages, losses, regularized = generalized_advantages, distral.actor_critic_losses, regularized_rewards

    def watch_advantages(rewards, *rest):
        seen["rewards"].append((rewards, rest))
        return advantages(rewards, *rest)

    def watch_actor_critic(*arguments):
        seen["losses"].append((arguments, losses(*arguments)))
        return seen["losses"][-1][1]

    def watch_regularized(*arguments):
        seen["regularized"].append((arguments, regularized(*arguments)))
        return seen["regularized"][-1][1]

    monkeypatch.setattr(distral, "generalized_advantages", watch_advantages)
    monkeypatch.setattr(distral, "actor_critic_losses", watch_actor_critic)
    monkeypatch.setattr(distral, "regularized_rewards", watch_regularized)
    main(Args(**SMALL | kwargs))
    return seen


def test_the_regularised_reward_reaches_the_advantages_once(tmp_path, monkeypatch):
    seen = watch_losses(monkeypatch, tmp_path)
    assert len(seen["regularized"]) == len(seen["rewards"]) == 4
    pieces = zip(seen["regularized"], seen["rewards"], seen["losses"], strict=True)
    for (arguments, result), (rewards, _), (actor_critic, _) in pieces:
        assert rewards is result
        plain, log_pi, log_prior, actions, alpha, beta = arguments
        assert (alpha, beta) == (0.5, 500.0) and plain.abs().max() <= 1.2  # scaled by .1
        torch.testing.assert_close(log_pi, actor_critic[0].log_softmax(-1))
        torch.testing.assert_close(log_prior.exp().sum(-1), torch.ones(4, 2, 4))
        assert torch.equal(actions, actor_critic[2])


def test_baselines_see_the_plain_reward(tmp_path, monkeypatch):
    seen = watch_losses(monkeypatch, tmp_path, algorithm="independent")
    assert not seen["regularized"]
    for rewards, _ in seen["rewards"]:
        assert all(min(abs(10 * x - y) for y in (-1.1, -0.1, 0.9, 10.9)) < 1e-4 for x in rewards.unique().tolist())


def test_the_entropy_is_not_in_distrals_loss_again(tmp_path, monkeypatch):
    """With a huge --ent-coef, Distral's run is the same and a baseline's isn't."""
    monkeypatch.chdir(tmp_path)
    weights = {}
    for algorithm in ("distral", "two-column"):
        for ent_coef in (0.0, 10.0):
            name = f"{algorithm}{ent_coef}"
            main(Args(**SMALL | {"algorithm": algorithm, "ent_coef": ent_coef, "exp_name": name}))
            (path,) = tmp_path.glob(f"runs/*{name}*/checkpoint.pt")
            weights[name] = torch.load(path, weights_only=True)["agent"]["own.0.actor.weight"]
    assert torch.equal(weights["distral0.0"], weights["distral10.0"])
    assert not torch.equal(weights["two-column0.0"], weights["two-column10.0"])


# --------------------------------------------------------------------------------------------- who learns from what


def test_distilled_policy_loss_gradient_is_alpha_over_beta_times_the_difference():
    torch.manual_seed(1)
    h = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    own = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    alpha, beta = 0.5, 4.0
    loss = distilled_policy_loss(own.log_softmax(-1), h.log_softmax(-1), alpha, beta)
    loss.backward()
    torch.testing.assert_close(h.grad, alpha / beta * (h.softmax(-1) - own.softmax(-1)).detach() / 6)
    assert own.grad is None  # π_i is the target
    index = (2, 3)
    values = []
    for step in (1e-6, -1e-6):
        moved = h.detach().clone()
        moved[index] += step
        values.append(distilled_policy_loss(own.log_softmax(-1), moved.log_softmax(-1), alpha, beta).item())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(h.grad[index].item(), rel=1e-6)


def test_distilled_policy_loss_is_a_mean_and_least_at_the_centroid():
    pi = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]]).double()
    loss = lambda p: distilled_policy_loss(pi.log(), p.log().expand(2, 3), 1.0, 1.0).item()  # noqa: E731
    centroid = pi.mean(0)
    assert loss(centroid) < min(loss(pi[0]), loss(pi[1]), loss(torch.full((3,), 1 / 3).double()))
    twice = distilled_policy_loss(pi.log().repeat(2, 1), centroid.log().expand(4, 3), 1.0, 1.0).item()
    assert twice == pytest.approx(loss(centroid))


@pytest.mark.parametrize("columns", [1, 2])
def test_policy_gradient_reaches_h_in_two_columns_only(columns):
    agent, boards = small_agent(columns=columns)
    logits, values, _ = agent(boards)
    actions, advantages = torch.zeros(2, 8, dtype=torch.int64), torch.ones(2, 8)
    policy_loss, value_loss, _ = distral.actor_critic_losses(logits, values, actions, advantages)
    (policy_loss + value_loss).backward()
    assert all(has_gradient(own) for own in agent.own) and has_gradient(agent.shared) == (columns == 2)


@pytest.mark.parametrize("columns", [1, 2])
def test_rewards_move_pi_i_and_the_prior_moves_it_too(tmp_path, monkeypatch, columns):
    """The one-column version has both gradients as well: of the task's reward, and of the pull to π_0."""
    monkeypatch.chdir(tmp_path)
    weights = []
    for k, kwargs in enumerate(({}, {"reward_scale": 0.5}, {"beta": 5.0})):
        main(Args(**SMALL | {"columns": columns, "exp_name": f"run{k}"} | kwargs))
        (path,) = tmp_path.glob(f"runs/*run{k}*/checkpoint.pt")
        weights.append(torch.load(path, weights_only=True)["agent"])
    for other in weights[1:]:
        assert not torch.equal(weights[0]["own.0.actor.weight"], other["own.0.actor.weight"])


def test_tasks_do_not_touch_each_others_columns():
    agent, boards = small_agent(columns=1)
    logits, values, _ = agent(boards)
    (logits[0].sum() + values[0].sum()).backward()
    assert has_gradient(agent.own[0]) and not has_gradient(agent.own[1])


# ------------------------------------------------------------------------------------------------- the loop's ends


def test_bootstrap_stops_at_termination_and_uses_the_true_last_board(tmp_path, monkeypatch):
    """A truncated episode's next value is that of its own last board, not of the next episode's first."""
    seen = watch_losses(monkeypatch, tmp_path, max_episode_steps=2, total_timesteps=256, algorithm="independent")
    truncations = 0
    for _, (values, next_values, terminated, done, gamma, lam) in seen["rewards"]:
        assert (gamma, lam) == (0.97, 1.0)
        truncated = done & ~terminated
        truncations += int(truncated.sum())
        inner = ~done[:-1]
        torch.testing.assert_close(next_values[:-1][inner], values[1:][inner], rtol=1e-4, atol=1e-5)
        cut = truncated[:-1]
        assert (next_values[:-1][cut] - values[1:][cut]).abs().max() > 1e-4  # the next episode's board is another
    assert truncations > 20


def test_a_truncated_episode_is_valued_by_its_own_task(tmp_path, monkeypatch):
    build = DistralAgent.__init__

    def build_with_known_values(self, *arguments):
        build(self, *arguments)
        for i, own in enumerate(self.own):
            torch.nn.init.zeros_(own.critic.weight)
            torch.nn.init.constant_(own.critic.bias, 1.0 + i)

    monkeypatch.setattr(DistralAgent, "__init__", build_with_known_values)
    seen = watch_losses(monkeypatch, tmp_path, max_episode_steps=1, learning_rate=1e-9)
    for _, (_, next_values, *_) in seen["rewards"]:
        np.testing.assert_allclose(next_values, np.broadcast_to([[[1.0], [2.0]]], (4, 2, 4)), rtol=1e-4)


def test_n_step_return_by_hand():
    T, F = torch.tensor([[True]]), torch.tensor([[False]])
    rewards, values, following = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1), torch.tensor([[0.0], [4.0]])
    go_on = torch.cat([F, F])
    result = generalized_advantages(rewards, values, following, go_on, go_on, 0.5, 1.0)
    np.testing.assert_allclose(result.ravel(), [1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4])
    end = torch.cat([F, T])
    np.testing.assert_allclose(
        generalized_advantages(rewards, values, following, end, end, 0.5, 1.0).ravel(), [1 + 0.5 * 2, 2]
    )


def test_padding_is_wall_and_keeps_the_game():
    levels = task_levels("5x6-1", 3)
    padded = pad_boards(levels, 7, 7)
    assert padded.shape == (3, 7, 7) and torch.equal(padded[:, :5, :6], levels)
    assert (padded[:, 5:] == 0).all() and (padded[:, :, 6:] == 0).all()
    assert read_task("5x6-1") == (5, 6, 1)


def test_solve_levels_counts_solved_ones():
    level = torch.tensor([[[0, 0, 0, 0, 0, 0], [0, 5, 3, 1, 2, 0], [0, 0, 0, 0, 0, 0]]], dtype=torch.uint8)
    args = Args(max_episode_steps=3)
    for action, solved in ((4, True), (3, False)):  # right twice pushes the box onto its target, left does nothing
        policy = lambda boards, action=action: 50.0 * torch.eye(5)[[action]].expand(len(boards), 5)  # noqa: E731
        result, film = solve_levels(policy, level.repeat(4, 1, 1), args, 3, 6, torch.device("cpu"))
        assert result.tolist() == [solved] * 4 and film.shape == (4, 4, 3, 6)
        assert (film[-1] == film[2]).all()  # a game that is over stands still


@pytest.mark.parametrize("algorithm", ["distral", "independent", "multitask", "two-column"])
def test_training_moves_every_column_and_reproduces(tmp_path, monkeypatch, algorithm):
    monkeypatch.chdir(tmp_path)
    states = []
    for k, seed in enumerate((1, 1, 2)):
        metrics = main(Args(**SMALL | {"algorithm": algorithm, "seed": seed, "exp_name": f"run{k}"}))
        (path,) = tmp_path.glob(f"runs/*run{k}*/checkpoint.pt")
        states.append(torch.load(path, weights_only=True)["agent"])
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    torch.manual_seed(1)
    untrained = DistralAgent(Args(**SMALL | {"algorithm": algorithm}), 6, 5).state_dict()
    moved = [name for name in first if name.endswith("actor.weight")]
    assert moved and all((first[name] - untrained[name]).abs().max() > 1e-3 for name in moved)
    assert {"eval/solved", "eval/held_out"} <= set(metrics)
    assert ("eval/distilled" in metrics) == (algorithm != "independent")


def test_one_column_trains_the_distilled_policy_towards_the_tasks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(Args(**SMALL | {"columns": 1, "total_timesteps": 2048, "log_frequency": 512, "beta": 5.0, "variant": "kl"}))
    (path,) = tmp_path.glob("runs/*/checkpoint.pt")
    bias = torch.load(path, weights_only=True)["agent"]["shared.actor.bias"]
    assert bias.abs().max() > 0.01  # it starts at 0, and nothing but the distillation reaches it
    (path,) = tmp_path.glob("runs/*/metrics.csv")
    lines = [line.split(",") for line in path.read_text().splitlines()]
    column = lines[0].index("losses/kl_to_distilled")
    assert 0 <= float(lines[4][column]) < 0.02


# ------------------------------------------------------------------------------------------------- files and flags


def test_resume_continues_bit_for_bit_and_evaluate_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = SMALL | {"total_timesteps": 256, "checkpoint_minutes": 0.0}
    whole = main(Args(**args | {"exp_name": "whole"}))
    half, save = [], distral.save_checkpoint

    def save_and_stop(path, state):
        save(path, state)
        if state["global_step"] == 128:
            half.append(path)
            raise KeyboardInterrupt

    monkeypatch.setattr(distral, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        main(Args(**args | {"exp_name": "half"}))
    monkeypatch.setattr(distral, "save_checkpoint", save)
    assert main(Args(resume=str(half[0]))) == whole
    (path,) = tmp_path.glob("runs/*whole*/checkpoint.pt")
    saved, again = (torch.load(p, weights_only=True)["agent"] for p in (path, half[0]))
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    rows = (half[0].parent / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["64", "128", "192", "256"]
    assert main(Args(evaluate=str(path))) == whole
    with pytest.raises(SystemExit, match="finished run"):
        main(Args(resume=str(path)))
    with pytest.raises(SystemExit, match=r"--beta: .* brings its own flags"):
        main(Args(resume=str(path), beta=7.0))
    main(Args(resume=str(path), total_timesteps=320))
    assert torch.load(path, weights_only=True)["global_step"] == 320
    path.write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="can't read the checkpoint"):
        main(Args(evaluate=str(path)))


def test_a_signal_saves_and_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, before = SMALL | {"total_timesteps": 256, "log_frequency": 128}, signal.getsignal(signal.SIGINT)
    whole = main(Args(**args))
    (path,) = tmp_path.glob("runs/*/checkpoint.pt")
    wanted, log, sent = torch.load(path, weights_only=True)["agent"], distral.Logger.log, []

    def log_and_interrupt(self, step, metrics):
        log(self, step, metrics)
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))

    monkeypatch.setattr(distral.Logger, "log", log_and_interrupt)
    with pytest.raises(SystemExit, match=r"stopped after 128 frames; to go on: python distral.py --resume ") as stopped:
        main(Args(**args | {"exp_name": "stopped"}))
    path = str(stopped.value).split()[-1]
    assert main(Args(resume=path)) == whole
    found = torch.load(path, weights_only=True)["agent"]
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert signal.getsignal(signal.SIGINT) is before


def test_video(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(Args(**SMALL | {"capture_video": True}))
    assert {path.name for path in tmp_path.glob("runs/*/*.gif")} == {"5x5-1.gif", "6x5-1.gif"}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tasks": ("5by5",)}, "unknown task '5by5'"),
        ({"tasks": ()}, "--tasks"),
        ({"tasks": ("5x5-9",)}, "num_boxes=9"),
        ({"held_out": "4x4-1"}, "smallest board"),
        ({"alpha": -0.1}, "--alpha -0.1"),
        ({"beta": 0.0}, "--beta 0.0"),
        ({"num_steps": 0}, "--num-steps 0"),
        ({"resume": "no_such_file.pt"}, "can't read the checkpoint no_such_file.pt"),
    ],
)
def test_bad_flags_are_one_clear_line(tmp_path, monkeypatch, kwargs, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as error:
        main(Args(**kwargs))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="lower the learning rate"):
        main(Args(**SMALL | {"learning_rate": 1e30, "total_timesteps": 640}))


@pytest.mark.parametrize(("columns", "factor"), [(1, 0.5 / 500), (2, 1.0)])
def test_adams_eps_is_as_small_as_the_gradients_of_a_prior_alone(tmp_path, monkeypatch, columns, factor):
    monkeypatch.chdir(tmp_path)
    optimizers, adam = [], torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, **kw: optimizers.append(adam(*args, **kw)) or optimizers[-1])
    main(Args(**SMALL | {"columns": columns, "alpha": 0.5, "beta": 500.0}))
    assert [group["eps"] for group in optimizers[0].param_groups] == pytest.approx([1e-5, 1e-5 * factor])
