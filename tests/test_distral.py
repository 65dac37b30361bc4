"""distral.py: the columns, the regularised reward, who learns from which loss, what the loop hands on, files."""

import pathlib
import types

import numpy as np
import pytest
import torch

import distral
from distral import Args, DistralAgent, cell_planes, main, pad_boards, parse_args, player_view
from sokoban_env import SokobanVectorEnv, generate_levels

SMALL = {
    "tasks": ("5x5-1", "6x5-1"), "held_out": "5x5-2", "num_envs": 4, "num_steps": 4, "total_timesteps": 128,
    "log_frequency": 64, "channels": 4, "dense": 16, "eval_episodes": 6, "max_episode_steps": 5,
}  # fmt: skip


def task_levels(task: str, num: int, height: int = 6, width: int = 5) -> torch.Tensor:
    """The held-out levels of a task, padded."""
    h, w, boxes = int(task[0]), int(task[2]), int(task[4])
    return pad_boards(generate_levels(num, size=(h, w), num_boxes=boxes, seed=10**9)[0], height, width)


def small_agent(**kwargs) -> tuple[DistralAgent, torch.Tensor]:
    """An agent whose policies differ clearly, and boards (n, N, H, W)."""
    torch.manual_seed(1)
    agent = DistralAgent(Args(**SMALL | kwargs), 6, 5)
    for module in agent.modules():
        if isinstance(module, distral.PolicyColumn):
            torch.nn.init.normal_(module.actor.weight, std=0.5)
    return agent, torch.stack([task_levels(task, 8) for task in SMALL["tasks"]])


def saved(name: str = "", file: str = "agent.pt") -> dict:
    """The file of the run whose folder's name holds `name`."""
    (path,) = pathlib.Path().glob(f"runs/*{name}*/{file}")
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("view", ["player", "board"])
@pytest.mark.parametrize(("columns", "alpha"), [(2, 0.4), (2, 1.0), (1, 0.4)])
def test_agent_puts_its_columns_together(columns, alpha, view):
    """In two columns π_i is π_0^α exp(β f_i), normalised; each task's boards go through its own column."""
    agent, boards = small_agent(columns=columns, alpha=alpha, view=view)
    logits, h, values = agent(boards)
    for i in range(2):
        planes = cell_planes(player_view(boards[i]) if view == "player" else boards[i])
        own, value = agent.own[i](planes)
        prior = agent.shared(planes)[0].softmax(-1)
        torch.testing.assert_close(h[i].softmax(-1), prior)
        torch.testing.assert_close(values[i], value)
        pi = prior**alpha * own.exp() if columns == 2 else own.exp()
        torch.testing.assert_close(logits[i].softmax(-1), pi / pi.sum(-1, keepdim=True))
    whole = agent(torch.stack([boards, boards.flip(1)]))  # leading axes
    for alone, both in zip((logits, h, values), whole, strict=True):
        torch.testing.assert_close(both[0], alone)


def test_baselines_have_the_columns_they_should():
    for algorithm, own, shared in (("independent", 2, False), ("multitask", 1, False), ("two-column", 2, True)):
        agent, boards = small_agent(algorithm=algorithm, alpha=0.3, columns=1)
        assert (len(set(agent.own)), agent.shared is not None) == (own, shared)
        logits, prior, _ = agent(boards)
        if shared:  # α = 1, two columns in any case
            planes = cell_planes(player_view(boards[1]))
            torch.testing.assert_close(logits[1], agent.shared(planes)[0] + agent.own[1](planes)[0])
        else:
            assert prior is logits


def test_padding_is_wall_and_leaves_the_players_view_whole():
    levels = task_levels("5x5-1", 3, 5, 5)
    padded = pad_boards(levels, 7, 6)
    assert padded.shape == (3, 7, 6) and torch.equal(padded[:, :5, :5], levels)
    assert (padded[:, 5:] == 0).all() and (padded[:, :, 5:] == 0).all()
    view = player_view(padded)
    assert view.shape == (3, 7, 5) and (view[:, 3, 2] >= 5).all()
    for cell in range(1, 7):  # all but walls
        assert torch.equal((view == cell).sum((1, 2)), (levels == cell).sum((1, 2)))


def test_regularized_rewards_by_hand_and_gathered():
    pi, prior = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]), torch.tensor([[0.2, 0.2, 0.6], [0.3, 0.3, 0.4]])
    actions, rewards = torch.tensor([2, 0]), torch.tensor([1.0, -1.0])
    log_pi, log_prior = pi.log().requires_grad_(), prior.log().requires_grad_()
    result = distral.regularized_rewards(rewards, log_pi, log_prior, actions, 0.5, 4.0)
    expected = [1 + 0.125 * np.log(0.6) - 0.25 * np.log(0.2), -1 + 0.125 * np.log(0.3) - 0.25 * np.log(0.1)]
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    assert not result.requires_grad  # a constant for the losses


def test_distilled_policy_loss_gradient_is_the_difference_of_the_policies():
    torch.manual_seed(1)
    h, own = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = distral.distilled_policy_loss(own.log_softmax(-1), h.log_softmax(-1))
    loss.backward()
    assert loss.item() == pytest.approx(-(own.softmax(-1) * h.log_softmax(-1)).sum().item() / 6)
    torch.testing.assert_close(h.grad, (h.softmax(-1) - own.softmax(-1)).detach() / 6)
    assert own.grad is None  # π_i is the target


def as_leaves(result):
    """The same numbers, whose gradients can be read afterwards."""
    if isinstance(result, torch.Tensor):
        return result.detach().clone().requires_grad_()
    return tuple(map(as_leaves, result))


@pytest.fixture
def watch(monkeypatch):
    """watch(**flags): a run of `main`, and what went through its functions in each iteration."""

    def run(leaves: bool = False, **kwargs) -> types.SimpleNamespace:
        seen = types.SimpleNamespace(agents=[], steps=[], true_values=[], clipped=[])
        build, clip = DistralAgent.__init__, torch.nn.utils.clip_grad_norm_
        losses = as_leaves if leaves else lambda result: result

        def keep_step(result):  # observation, reward, terminated, truncated, and the true next observation
            seen.steps.append([x.clone() for x in (*result[:4], result[4].get("final_obs", result[0]))])
            return result

        def keep_true_values(result):  # what the agent says of the boards that the last T steps led to
            last = torch.stack([pad_boards(step[4], 6, 5) for step in seen.steps[-8:]])
            with torch.no_grad():
                seen.true_values.append(seen.agents[0](last.unflatten(0, (4, 2)))[2])
            return result

        def keep_clip(parameters, norm):
            parameters = list(parameters)
            seen.clipped.append(({id(p) for p in parameters}, norm))
            return clip(parameters, norm)

        monkeypatch.setattr(DistralAgent, "__init__", lambda self, *a: seen.agents.append(self) or build(self, *a))
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", keep_clip)
        seen.resets = record(monkeypatch, SokobanVectorEnv, "reset")
        seen.stepped = record(monkeypatch, SokobanVectorEnv, "step", keep_step)
        seen.acted = record(monkeypatch, distral, "sample")
        seen.advantages = record(monkeypatch, distral, "generalized_advantages", keep_true_values)
        seen.losses = record(monkeypatch, distral, "actor_critic_losses", losses)
        seen.regularized = record(monkeypatch, distral, "regularized_rewards")
        seen.distilled = record(monkeypatch, distral, "distilled_policy_loss", losses)
        main(Args(**SMALL | kwargs))
        return seen

    return run


def test_the_loop_hands_on_what_happened(watch):
    seen = watch(algorithm="distral", total_timesteps=256)
    tasks = [(env.height, env.width, env.num_envs, seed) for (env, seed), _ in seen.resets[:2]]
    assert tasks == [(5, 5, 4, 1000), (6, 5, 4, 1001)]  # each task's levels are others
    truncations = 0
    for k, ((rewards, values, next_values, terminated, done, gamma, lam), result) in enumerate(seen.advantages):
        steps = seen.steps[8 * k : 8 * k + 8]  # T = 4 of n = 2 tasks
        paid, ends, cuts = (torch.stack([step[j] for step in steps]).unflatten(0, (4, 2)) for j in (1, 2, 3))
        assert (gamma, lam) == (0.97, 1.0)
        assert torch.equal(terminated, ends) and torch.equal(done, ends | cuts)
        torch.testing.assert_close(next_values, seen.true_values[k])  # of an episode's last board, before its reset
        truncations += int((cuts & ~ends).sum())
        (logits, own_values, actions, advantages), _ = seen.losses[k]
        acted = torch.stack([call[0] for call, _ in seen.acted[4 * k : 4 * k + 4]])
        torch.testing.assert_close(logits, acted)  # of the policy that acts
        taken = torch.stack([call[1] for call, _ in seen.stepped[8 * k : 8 * k + 8]]).unflatten(0, (4, 2))
        assert torch.equal(actions, taken) and torch.equal(own_values, values) and advantages is result
        (plain, log_pi, log_prior, labels, alpha, beta), regularized = seen.regularized[k]
        assert rewards is regularized and (alpha, beta) == (0.5, 500.0) and labels is actions
        torch.testing.assert_close(plain, 0.1 * paid)
        torch.testing.assert_close(log_pi, logits.log_softmax(-1))
        torch.testing.assert_close(log_prior.exp().sum(-1), torch.ones(4, 2, 4))
        (targets, fitted), _ = seen.distilled[k]
        assert targets is log_pi and fitted is log_prior and (log_prior - log_pi).abs().max() > 1e-3
    assert len(seen.advantages) == 8 and truncations > 20
    assert {norm for _, norm in seen.clipped} == {1.0} and len(seen.clipped) == 8 * 3
    agent = seen.agents[0]
    own = [{id(p) for p in module.parameters()} for module in (*agent.own, agent.shared)]
    assert all(parameters in own for parameters, _ in seen.clipped)  # each column by itself


@pytest.mark.parametrize(
    ("flags", "distillation", "entropy"),
    [({}, 0.001, None), ({"columns": 1}, 1.0, None), ({"alpha": 1.0, "beta": 4.0}, 0.25, None),
     ({"algorithm": "two-column"}, None, -0.3), ({"algorithm": "multitask"}, None, -0.3)],
)  # fmt: skip
def test_each_loss_has_its_coefficient(watch, flags, distillation, entropy):
    seen = watch(leaves=True, vf_coef=0.7, ent_coef=0.3, **flags)
    for k, ((_, losses), (_, fitted)) in enumerate(zip(seen.losses, seen.distilled, strict=True)):
        policy, value, bonus, fit = (x.grad for x in (*losses, fitted))
        assert (policy, value) == (1.0, pytest.approx(0.7))
        assert (bonus is None) if entropy is None else bonus == pytest.approx(entropy)
        assert (fit is None) if distillation is None else fit == pytest.approx(distillation)
        if entropy is not None:  # a baseline: it sees the plain reward
            paid = torch.stack([step[1] for step in seen.steps[8 * k : 8 * k + 8]]).unflatten(0, (4, 2))
            torch.testing.assert_close(seen.advantages[k][0][0], 0.1 * paid)


def test_rows_are_means_and_shares_since_the_last_row(watch):
    seen = watch(total_timesteps=256, log_frequency=128, max_episode_steps=20)
    rows = saved(file="checkpoint.pt")["rows"]
    assert [row["global_step"] for row in rows] == [128, 256]
    for k, row in enumerate(rows):
        losses = [result for _, result in seen.losses[4 * k : 4 * k + 4]]
        for name, values in zip(("policy_loss", "value_loss", "entropy"), zip(*losses, strict=True), strict=True):
            assert row[f"losses/{name}"] == pytest.approx(torch.stack(values).mean().item(), rel=1e-5)
        for i, task in enumerate(SMALL["tasks"]):
            steps = seen.steps[32 * k : 32 * k + 32][i::2]
            solved, ended = sum(x[2].sum() for x in steps), sum((x[2] | x[3]).sum() for x in steps)
            if f"charts/solved_{task}" in row:
                assert row[f"charts/solved_{task}"] == pytest.approx((solved / ended).item())
        kls = [(pi.exp() * (pi - prior)).sum(-1).mean().item() for (pi, prior), _ in seen.distilled[4 * k : 4 * k + 4]]
        assert row["losses/kl_to_pi_0"] == pytest.approx(np.mean(kls), rel=1e-4)
    assert any("charts/solved" in row for row in rows)


def test_evaluation_plays_the_right_policy_on_the_right_levels(monkeypatch):
    calls = []

    def share(agent, args, levels, distilled):
        calls.append((levels, distilled))
        return torch.tensor([0.25, 0.75]) / len(calls)

    monkeypatch.setattr(distral, "solved_share", share)
    metrics = main(Args(**SMALL))
    own = torch.stack([task_levels(task, 6) for task in SMALL["tasks"]])
    held_out = task_levels("5x5-2", 6).expand(2, 6, 6, 5)
    for (levels, distilled), expected in zip(calls, ((own, False), (own, True), (held_out, True)), strict=True):
        assert torch.equal(levels, expected[0]) and distilled == expected[1]
    assert metrics == pytest.approx({
        "eval/solved_5x5-1": 0.25, "eval/solved_6x5-1": 0.75, "eval/solved": 0.5, "eval/distilled": 0.25,
        "eval/held_out": 0.5 / 3,
    })  # fmt: skip


def test_solved_share_counts_each_level_once():
    level = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 5, 3, 1, 2, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.uint8)
    walled = level.clone()
    walled[1, 3] = 0
    levels = torch.stack([level, level, walled]).expand(2, 3, 3, 6)  # right twice pushes the box onto its target

    def agent(boards):  # π_i goes right in the first task and left in the second, π_0 the other way round
        right, left = 50 * torch.eye(5)[4], 50 * torch.eye(5)[3]
        logits = torch.stack([right, left])[:, None].expand(*boards.shape[:2], 5)
        return logits, logits.flip(0), None

    for distilled, shares in ((False, [2 / 3, 0]), (True, [0, 2 / 3])):
        result = distral.solved_share(agent, Args(max_episode_steps=3), levels, distilled)
        assert result.tolist() == pytest.approx(shares)
    assert distral.solved_share(agent, Args(max_episode_steps=1), levels, False).tolist() == [0, 0]


@pytest.mark.parametrize("algorithm", ["distral", "independent", "multitask", "two-column"])
def test_training_moves_every_column(algorithm):
    main(Args(**SMALL | {"algorithm": algorithm}))
    torch.manual_seed(1)
    untrained = DistralAgent(Args(**SMALL | {"algorithm": algorithm}), 6, 5).state_dict()
    moved = [(x - untrained[name]).abs().max() for name, x in saved()["agent"].items() if "actor.weight" in name]
    assert moved and min(moved) > 1e-3


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_one_column_fits_the_distilled_policy_at_any_alpha(alpha):
    """With α = 0, too, where the factor α/β of its loss is 0: no NaN in it."""
    main(Args(**SMALL | {"columns": 1, "alpha": alpha, "total_timesteps": 1024, "log_frequency": 512}))
    assert saved()["agent"]["shared.actor.bias"].abs().max() > 0.01  # it starts at 0
    assert all(np.isfinite(list(row.values())).all() for row in saved(file="checkpoint.pt")["rows"])


def test_resume_continues_bit_for_bit_and_evaluate_reads(monkeypatch):
    args = SMALL | {"total_timesteps": 256}
    whole = main(Args(**args | {"exp_name": "whole"}))
    save = distral.save_checkpoint

    def save_and_stop(path, state):
        save(path, state)
        if state["global_step"] == 128:
            raise KeyboardInterrupt

    monkeypatch.setattr(distral, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        main(Args(**args | {"exp_name": "half"}))
    monkeypatch.setattr(distral, "save_checkpoint", save)
    (half,) = (str(path) for path in pathlib.Path().glob("runs/*half*/checkpoint.pt"))
    assert main(parse_args(["--resume", half])) == whole
    first, again = saved("whole"), saved("half")
    assert all(torch.equal(first["agent"][name], again["agent"][name]) for name in first["agent"])
    assert [row["global_step"] for row in saved("half", "checkpoint.pt")["rows"]] == [64, 128, 192, 256]
    agent = half.replace("checkpoint", "agent")
    assert main(parse_args(["--evaluate", agent])) == whole
    other = main(parse_args(["--evaluate", agent, "--eval-episodes", "2", "--seed", "5"]))
    assert all(share in (0.0, 0.5, 1.0) for share in (other["eval/solved_5x5-1"], other["eval/solved_6x5-1"]))
    for path in (half, agent):
        with pytest.raises(SystemExit, match="is of a finished run"):
            main(parse_args(["--resume", path]))
    with pytest.raises(SystemExit, match="other parts or sizes"):
        main(parse_args(["--evaluate", agent, "--dense", "8"]))
    main(parse_args(["--resume", half, "--total-timesteps", "320", "--learning-rate", "0.5"]))
    state = saved("half", "checkpoint.pt")
    assert state["global_step"] == 320 and state["optimizer"]["param_groups"][0]["lr"] == 0.5
