"""distral.py: the columns, the regularised reward, who learns from which loss, what the loop hands on, files."""

import pathlib

import numpy as np
import pytest
import torch
from conftest import assert_same, n_step_returns

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


@pytest.mark.parametrize(
    ("flags", "distillation", "entropy"),
    [({}, 0.125, 0), ({"columns": 1, "max_grad_norm": 1e9}, 1.0, 0), ({"alpha": 1.0, "beta": 500.0}, 0.002, 0),
     ({"algorithm": "two-column"}, 0, 0.3), ({"algorithm": "multitask"}, 0, 0.3)],
)  # fmt: skip
def test_an_update_follows_the_gradient_of_the_losses(watch, monkeypatch, flags, distillation, entropy):
    """Of the whole loop, column by column, against losses that are written out here."""
    flags = {"vf_coef": 0.7, "ent_coef": 0.3, "beta": 4.0, "gamma": 0.9, "max_grad_norm": 0.05} | flags
    args, (agent, _), ends, gradients = Args(**SMALL | flags), small_agent(**flags), [], []
    resets, steps = watch(SokobanVectorEnv, "reset"), watch(SokobanVectorEnv, "step")
    acted = watch(distral, "sample")

    def tasks(columns: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(columns[:8]).unflatten(0, (4, 2))  # T = 4 steps of n = 2 tasks

    def expected() -> torch.Tensor:
        calls, results = zip(*steps[-8:], strict=True)
        following, rewards, terminated, truncated, info = zip(*results, strict=True)
        frames = [result[0] for _, result in (*resets[:2], *steps)][-10:]
        last = [pad_boards(i.get("final_obs", x), 6, 5) for i, x in zip(info, following, strict=True)]
        terminated, truncated, actions = tasks(terminated), tasks(truncated), tasks([call[1] for call in calls])
        ends.append((terminated.sum(), truncated.sum()))
        logits, prior, values = agent(tasks([pad_boards(x, 6, 5) for x in frames]))
        torch.testing.assert_close(torch.stack([call[0] for call, _ in acted[-4:]]), logits.detach())
        log_pi, log_prior = logits.log_softmax(-1), prior.log_softmax(-1)
        taken, prior_taken = (x.gather(-1, actions[..., None])[..., 0] for x in (log_pi, log_prior))
        rewards = 0.1 * tasks(rewards)
        if args.algorithm == "distral":
            rewards = rewards + (args.alpha * prior_taken - taken).detach() / args.beta
        returns = n_step_returns(rewards, terminated, truncated, agent(tasks(last))[2].detach(), 0.9)
        loss = (0.7 * (returns - values) ** 2 - taken * (returns - values.detach())).mean()
        loss = loss - distillation * (log_pi.exp().detach() * log_prior).sum(-1).mean()
        loss = loss + entropy * (log_pi.exp() * log_pi).sum(-1).mean()
        return loss

    class Recorder(torch.optim.SGD):
        def step(self) -> None:
            loss = expected()
            for part in {module for module in agent.modules() if isinstance(module, distral.PolicyColumn)}:
                wanted = torch.autograd.grad(loss, list(part.parameters()), retain_graph=True, allow_unused=True)
                norm = torch.cat([x.flatten() for x in wanted if x is not None]).norm()
                gradients.append(norm.item())
                for p, x in zip(part.parameters(), wanted, strict=True):
                    if x is not None:
                        torch.testing.assert_close(p.grad, x * min(1, args.max_grad_norm / norm), rtol=1e-4, atol=1e-7)
            super().step()

    monkeypatch.setattr(distral, "DistralAgent", lambda *_: agent)
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, *_, **__: Recorder(parameters, 0.1))
    monkeypatch.setattr(distral, "evaluate_tasks", lambda *_: {})
    main(args)
    assert len(ends) == 4 and sum(truncated for _, truncated in ends) > 10 and max(gradients) > 0.05


def test_rows_are_means_and_shares_since_the_last_row(watch):
    steps, losses = watch(SokobanVectorEnv, "step"), watch(distral, "actor_critic_losses")
    distilled = watch(distral, "distilled_policy_loss")
    main(Args(**SMALL | {"total_timesteps": 256, "log_frequency": 128, "max_episode_steps": 20}))
    rows = saved(file="checkpoint.pt")["rows"]
    assert [row["global_step"] for row in rows] == [128, 256]
    for k, row in enumerate(rows):
        results = [result for _, result in losses[4 * k : 4 * k + 4]]
        for name, values in zip(("policy_loss", "value_loss", "entropy"), zip(*results, strict=True), strict=True):
            assert row[f"losses/{name}"] == pytest.approx(torch.stack(values).mean().item(), rel=1e-5)
        for i, task in enumerate(SMALL["tasks"]):
            mine = [result for _, result in steps[32 * k : 32 * k + 32][i::2]]
            solved, ended = sum(x[2].sum() for x in mine), sum((x[2] | x[3]).sum() for x in mine)
            if f"charts/solved_{task}" in row:
                assert row[f"charts/solved_{task}"] == pytest.approx((solved / ended).item())
        kls = [(pi.exp() * (pi - prior)).sum(-1).mean().item() for (pi, prior), _ in distilled[4 * k : 4 * k + 4]]
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
    assert_same(saved("whole")["agent"], saved("half")["agent"])
    assert [row["global_step"] for row in saved("half", "checkpoint.pt")["rows"]] == [64, 128, 192, 256]
    agent = half.replace("checkpoint", "agent")
    assert main(parse_args(["--evaluate", agent])) == whole
    assert main(parse_args(["--evaluate", agent, "--eval-episodes", "1"]))["eval/solved_5x5-1"] in (0.0, 1.0)
    for path in (half, agent):
        with pytest.raises(SystemExit, match="is of a finished run"):
            main(parse_args(["--resume", path]))
    with pytest.raises(SystemExit, match="other parts or sizes"):
        main(parse_args(["--evaluate", agent, "--dense", "8"]))
    main(parse_args(["--resume", half, "--total-timesteps", "320", "--learning-rate", "0.5"]))
    state = saved("half", "checkpoint.pt")
    assert state["global_step"] == 320 and state["optimizer"]["param_groups"][0]["lr"] == 0.5
