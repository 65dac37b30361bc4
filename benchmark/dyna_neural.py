"""Replay or a learned model? From benchmark/results/dyna_dqn.csv (benchmark/dyna.sh): a table and docs/dyna_dqn.png.

    python benchmark/dyna_neural.py                                  # dyna_dqn_table.csv and the figure
    python benchmark/dyna_neural.py --agents runs/NAME/agent.pt      # what their models get wrong: dyna_dqn_model.csv

A run reaches a return at its first evaluation whose mean is that or more; one that never does counts with all of its
steps, which is less than the truth. CleanRL's settings are evaluated every 2,500 real steps, the others every 500: for
the ratio to them all count at multiples of 2,500, or the others would have five times the lucky draws. Steps and ratios
are geometric means, with 95 % intervals (Student's t on the logarithms, ratios over paired seeds).
"""

import sys
from typing import Any

import numpy as np
import torch
import tyro
from common import RESULTS, ROOT, half_interval, read_rows, show, write_rows
from curves import draw_mean, plt, ratio, save

sys.path.insert(0, str(ROOT))
import dyna_dqn

GOALS = {"cartpole": 475.0, "acrobot": -100.0}
COARSE = 2500  # real steps between the evaluations of CleanRL's settings
ERRORS = ("delta_error", "reward_error", "termination_error")
Curve = list[tuple[int, float]]  # real steps, mean return of an evaluation


def read_curves() -> dict[str, dict[int, Curve]]:
    """By variant and seed the evaluations. A column eval/return_S of runs in lockstep is that of seed S."""
    curves: dict[str, dict[int, Curve]] = {}
    for row in read_rows(RESULTS / "dyna_dqn.csv"):
        lockstep = {k.removeprefix("eval/return_"): v for k, v in row.items() if k.startswith("eval/return_") and v}
        for seed, value in (lockstep or {row["seed"]: row["eval/return"]}).items():
            curve = curves.setdefault(row["variant"], {}).setdefault(int(seed), [])
            curve.append((int(row["global_step"]), float(value)))
    return curves


def steps_to(curve: Curve, goal: float, every: int) -> tuple[int, bool]:
    """Real steps to the first evaluation, of those at multiples of `every`, that meets the goal, and whether one does.

    Without one: all steps of the run.
    """
    for step, value in curve:
        if value >= goal and step % every == 0:
            return step, True
    return curve[-1][0], False


def columns(name: str, own: dict[int, int], others: dict[int, int]) -> dict[str, str]:
    """The geometric mean of own / other over the seeds that both have, with its interval."""
    pairs = [(n, others[seed]) for seed, n in own.items() if seed in others]
    mean, low, high = ratio(*zip(*pairs, strict=True))
    return {name: f"{mean:.5g}", f"{name}_low": f"{low:.5g}", f"{name}_high": f"{high:.5g}"}


def table(curves: dict[str, dict[int, Curve]]) -> list[dict[str, Any]]:
    steps: dict[tuple[str, int], dict[int, int]] = {}  # by variant and `every`, of each seed
    reached: dict[tuple[str, int], int] = {}  # how many seeds get there
    for variant, runs in curves.items():
        for every in (1, COARSE):
            ends = {seed: steps_to(curve, GOALS[variant.split("-")[0]], every) for seed, curve in runs.items()}
            steps[variant, every] = {seed: n for seed, (n, _) in ends.items()}
            reached[variant, every] = sum(there for _, there in ends.values())
    rows = []
    for variant, runs in curves.items():
        env, mode = variant.split("-")
        row = {"variant": variant, "goal": GOALS[env], "seeds": len(runs)}
        row["budget"] = max(curve[-1][0] for curve in runs.values())
        row |= {"reached": reached[variant, 1], "reached_coarse": reached[variant, COARSE]}
        row |= columns("steps", steps[variant, 1], dict.fromkeys(runs, 1))
        if mode != "cleanrl":
            row |= columns("cleanrl_ratio", steps[f"{env}-cleanrl", COARSE], steps[variant, COARSE])
            last = [np.mean([value for _, value in curve[-4:]]) for curve in runs.values()]
            row |= {"last_return": f"{np.mean(last):.4g}", "last_half_interval": f"{half_interval(last):.3g}"}
        if mode == "model":
            row |= columns("replay_ratio", steps[f"{env}-replay", 1], steps[variant, 1])
        rows.append(show(row))
    return rows


def draw(curves: dict[str, dict[int, Curve]]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, (env, goal) in zip(axes, GOALS.items(), strict=True):
        for mode in ("none", "replay", "model"):
            runs = np.array([*curves[f"{env}-{mode}"].values()])  # (seeds, evaluations, 2)
            draw_mean(axis, runs[0, :, 0], runs[:, :, 1], mode)
        axis.axhline(goal, color="black", linestyle=":")
        axis.set(title=env, xlabel="real steps", ylabel="return of the greedy policy")
        axis.legend(loc="lower right")
    save(figure, "dyna_dqn")


@torch.no_grad()
def model_errors(path: str) -> list[dict[str, Any]]:
    """What each run's model gets wrong on its first evaluation episode, which it never learned from.

    delta_error is a root mean square in units of the spread of Δs, so that a model in which nothing moves has about 1;
    termination_error is the share of steps whose end, or none, is wrong.
    """
    args, device = dyna_dqn.saved_args(path), torch.device("cpu")
    envs = dyna_dqn.make_feature_envs(args, args.num_seeds)
    S, A = envs.single_observation_space.shape[0], int(envs.single_action_space.n)
    q_net = dyna_dqn.RunsMLP(args.num_seeds, [S, *args.hidden, A])
    env_model = dyna_dqn.DeltaModel(args.num_seeds, S, A)
    dyna_dqn.load_networks(q_net, path, "q_net.")
    dyna_dqn.load_networks(env_model, path, "env_model.")
    observation, _ = envs.reset(seed=[10_000 + args.seed + e * args.eval_episodes for e in range(args.num_seeds)])
    running, total, count = np.ones(args.num_seeds, dtype=bool), np.zeros((3, args.num_seeds)), np.zeros(args.num_seeds)
    while running.any():
        s = torch.as_tensor(observation, dtype=torch.float32, device=device)[:, None]  # (E, 1, S)
        a = q_net(s).argmax(-1)  # (E, 1)
        delta, reward = env_model(s, a)
        observation, r, terminated, truncated, info = envs.step(a[:, 0].numpy())
        s2 = torch.as_tensor(dyna_dqn.true_next(observation, info), dtype=torch.float32)[:, None]
        end = env_model.end_logit(s + delta * env_model.delta_std)[:, 0].numpy() > 0
        squared = ((delta - (s2 - s) / env_model.delta_std) ** 2).mean((1, 2)).numpy()
        total += running * np.stack([squared, (reward[:, 0].numpy() - r) ** 2, end != terminated])
        count += running
        running &= ~(terminated | truncated)
    errors = total / count
    errors[:2] **= 0.5
    rows = []
    for e, values in enumerate(errors.T):
        row = {"env_id": args.env_id, "seed": args.seed + e, "total_timesteps": args.total_timesteps}
        rows.append(row | {name: f"{x:.6g}" for name, x in zip(ERRORS, values, strict=True)})
    for name, values in zip(ERRORS, errors, strict=True):
        print(f"{args.env_id}: {name} {np.mean(values):.3g} ± {half_interval(values):.2g}")
    return rows


def main(agents: tuple[str, ...] = ()) -> None:
    """The table and the figure of the runs; or, of each of the agent.pt given, the errors of its model."""
    if agents:
        write_rows([row for path in agents for row in model_errors(path)], "dyna_dqn_model.csv")
        return
    curves = read_curves()
    write_rows(table(curves), "dyna_dqn_table.csv")
    draw(curves)


if __name__ == "__main__":
    tyro.cli(main)
