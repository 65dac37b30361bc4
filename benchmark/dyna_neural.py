"""Replay or a learned model? From benchmark/results/dyna_dqn.csv (benchmark/dyna.sh): a table and docs/dyna_dqn.png.

    python benchmark/dyna_neural.py                                  # dyna_dqn_table.csv and the figure
    python benchmark/dyna_neural.py --agents runs/NAME/agent.pt      # what their models get wrong: dyna_dqn_model.csv

A run reaches a return at its first evaluation whose mean is that or more; one that never does counts with all of its
steps, which is less than the truth. CleanRL's settings are evaluated every 2,500 real steps, the others every 500: for
the ratio to them all count at multiples of 2,500, or the others would have five times the lucky draws. Steps and ratios
are geometric means, with 95 % intervals (Student's t on the logarithms, ratios over paired seeds).
"""

from typing import Any

import numpy as np
import torch
import tyro
from common import columns, geometric, half_interval, read_runs, show, steps_to, write_rows
from curves import draw_mean, plt, save

import dyna_dqn

GOALS = {"cartpole": 475.0, "acrobot": -100.0}
COARSE = 2500  # real steps between the evaluations of CleanRL's settings
Curve = list[tuple[float, float]]  # real steps, mean return of an evaluation


def read_curves() -> dict[str, dict[int, Curve]]:
    """By variant and seed the evaluations. A column eval/return_S of runs in lockstep is that of seed S."""
    curves: dict[str, dict[int, Curve]] = {}
    for variant, runs in read_runs("dyna_dqn").items():
        for seed, rows in runs.items():
            lockstep = [name for name in rows[0] if name.startswith("eval/return_")]
            for name in lockstep or ["eval/return"]:
                own_seed = int(name.split("_")[1]) if lockstep else seed
                curve = [(row["global_step"], row[name]) for row in rows]
                curves.setdefault(variant, {})[own_seed] = curve
    return curves


def ends(runs: dict[int, Curve], goal: float, every: int) -> dict[int, tuple[float, bool]]:
    """Of each seed the steps to the goal, and whether it got there, by its evaluations at multiples of `every`."""
    return {seed: steps_to([point for point in curve if point[0] % every == 0], goal) for seed, curve in runs.items()}


def step_ratio(theirs: dict[int, tuple[float, bool]], own: dict[int, tuple[float, bool]]) -> tuple[float, float, float]:
    """The geometric mean of their steps over ours, seed by seed."""
    return geometric([theirs[seed][0] / steps for seed, (steps, _) in own.items()])


def table(curves: dict[str, dict[int, Curve]]) -> list[dict[str, Any]]:
    rows = []
    for variant, runs in curves.items():
        env, mode = variant.split("-")
        goal = GOALS[env]
        own, coarse = ends(runs, goal, 1), ends(runs, goal, COARSE)
        row = {"variant": variant, "goal": goal, "seeds": len(runs)}
        row["reached"] = sum(there for _, there in own.values())
        row["reached_coarse"] = sum(there for _, there in coarse.values())
        row |= columns("steps", geometric([steps for steps, _ in own.values()]))
        if mode != "cleanrl":
            row |= columns("cleanrl_ratio", step_ratio(ends(curves[f"{env}-cleanrl"], goal, COARSE), coarse))
            last = [np.mean([value for _, value in curve[-4:]]) for curve in runs.values()]
            row |= {"last_return": f"{np.mean(last):.4g}", "last_half_interval": f"{half_interval(last):.3g}"}
        if mode == "model":
            row |= columns("replay_ratio", step_ratio(ends(curves[f"{env}-replay"], goal, 1), own))
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
    """The error of each run's model on its first evaluation episode, which it never learned from.

    A root mean square in units of the spread of Δs, so that a model in which nothing moves has about 1.
    """
    args = dyna_dqn.saved_args(path)
    envs = dyna_dqn.make_feature_envs(args, args.num_seeds)
    S, A = envs.single_observation_space.shape[0], int(envs.single_action_space.n)
    q_net = dyna_dqn.RunsMLP(args.num_seeds, [S, *args.hidden, A])
    env_model = dyna_dqn.DeltaModel(args.num_seeds, S, A)
    dyna_dqn.load_networks(q_net, path, "q_net.")
    dyna_dqn.load_networks(env_model, path, "env_model.")
    observation, _ = envs.reset(seed=[10_000 + args.seed + e * args.eval_episodes for e in range(args.num_seeds)])
    running = np.ones(args.num_seeds, dtype=bool)
    total, count = np.zeros(args.num_seeds), np.zeros(args.num_seeds)
    while running.any():
        s = torch.as_tensor(observation, dtype=torch.float32)[:, None]  # (E, 1, S)
        a = q_net(s).argmax(-1)  # (E, 1)
        delta, _ = env_model(s, a)
        observation, _, terminated, truncated, info = envs.step(a[:, 0].numpy())
        s2 = torch.as_tensor(dyna_dqn.true_next(observation, info), dtype=torch.float32)[:, None]
        squared = ((delta - (s2 - s) / env_model.delta_std) ** 2).mean((1, 2)).numpy()
        total += running * squared
        count += running
        running &= ~(terminated | truncated)
    errors = np.sqrt(total / count)
    print(f"{args.env_id}: delta_error {np.mean(errors):.3g} ± {half_interval(errors):.2g}")
    own = {"env_id": args.env_id, "total_timesteps": args.total_timesteps}
    return [own | {"seed": args.seed + e, "delta_error": f"{error:.6g}"} for e, error in enumerate(errors)]


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
