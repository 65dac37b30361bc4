"""Replay or a learned model? From benchmark/results/dyna_dqn.csv (benchmark/dyna.sh): a table and docs/dyna_dqn.png.

    python benchmark/dyna_neural.py                                  # dyna_dqn_table.csv and the figure
    python benchmark/dyna_neural.py --agents runs/NAME/agent.pt      # what their models get wrong: dyna_dqn_model.csv

A run reaches a return at its first evaluation whose mean is that or more; one that never does counts with all of its
steps, which is less than the truth. CleanRL's settings are evaluated every 2,500 real steps, the others every 500: for
the ratio to them all count at multiples of 2,500, or the others would have five times the lucky draws. Steps and ratios
are geometric means, with 95 % intervals (Student's t on the logarithms, ratios over paired seeds).
"""

import sys
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
import tyro
from common import RESULTS, ROOT, half_interval, read_rows, write_rows
from curves import ratio

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(ROOT))

import dyna_dqn

GOALS = {"cartpole": 475.0, "acrobot": -100.0}
COLOURS = {"none": "#888888", "replay": "#1f6fb4", "model": "#c03a2b"}
COARSE = 2500  # real steps between the evaluations of CleanRL's settings
Curve = list[tuple[int, float]]  # real steps, mean return of an evaluation


@dataclass
class Args:
    agents: tuple[str, ...] = ()  # measure the models of these agent.pt instead


def read_curves() -> dict[str, dict[int, Curve]]:
    """By variant and seed the evaluations. A column eval/return_S of runs in lockstep is that of seed S."""
    curves: dict[str, dict[int, Curve]] = {}
    for row in read_rows(RESULTS / "dyna_dqn.csv"):
        lockstep = {k.removeprefix("eval/return_"): v for k, v in row.items() if k.startswith("eval/return_") and v}
        for seed, value in (lockstep or {row["seed"]: row["eval/return"]}).items():
            curve = curves.setdefault(row["variant"], {}).setdefault(int(seed), [])
            curve.append((int(row["global_step"]), float(value)))
    return curves


def steps_to(curve: Curve, goal: float, every: int = 1) -> tuple[int, bool]:
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
    rows, fine, coarse = [], {}, {}
    for variant, runs in curves.items():
        goal = GOALS[variant.split("-")[0]]
        fine[variant] = {seed: steps_to(curve, goal) for seed, curve in runs.items()}
        coarse[variant] = {seed: steps_to(curve, goal, COARSE) for seed, curve in runs.items()}
    steps, coarse_steps = ({v: {s: n for s, (n, _) in r.items()} for v, r in x.items()} for x in (fine, coarse))
    for variant, runs in curves.items():
        env, mode = variant.split("-")
        row = {"variant": variant, "goal": GOALS[env], "seeds": len(runs)}
        row["budget"] = max(curve[-1][0] for curve in runs.values())
        row["reached"] = sum(ok for _, ok in fine[variant].values())
        row["reached_coarse"] = sum(ok for _, ok in coarse[variant].values())
        row |= columns("steps", steps[variant], dict.fromkeys(runs, 1))
        if mode != "cleanrl":
            row |= columns("cleanrl_ratio", coarse_steps[f"{env}-cleanrl"], coarse_steps[variant])
            last = [np.mean([value for _, value in curve[-4:]]) for curve in runs.values()]
            row |= {"last_return": f"{np.mean(last):.4g}", "last_half_interval": f"{half_interval(last):.3g}"}
        if mode == "model":
            row |= columns("replay_ratio", steps[f"{env}-replay"], steps[variant])
        rows.append(row)
    return rows


def draw(curves: dict[str, dict[int, Curve]]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, (env, goal), title in zip(axes, GOALS.items(), ("CartPole-v1", "Acrobot-v1"), strict=True):
        for mode, colour in COLOURS.items():
            runs = curves[f"{env}-{mode}"]
            steps = [step for step, _ in next(iter(runs.values()))]
            values = np.array([[value for _, value in curve] for curve in runs.values()])  # (seeds, evaluations)
            mean, half = values.mean(0), np.array([half_interval(column) for column in values.T])
            axis.plot(steps, mean, color=colour, label=mode)
            axis.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.2, lw=0)
        axis.axhline(goal, color="black", lw=0.8, ls=":")
        axis.set(title=title, xlabel="real steps", ylabel="return of the greedy policy")
        axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "dyna_dqn.png", dpi=110)
    print("wrote docs/dyna_dqn.png")


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
    columns = total / count
    columns[:2] **= 0.5
    names = ("delta_error", "reward_error", "termination_error")
    return [
        {"env_id": args.env_id, "seed": args.seed + e, "total_timesteps": args.total_timesteps}
        | {name: f"{column[e]:.6g}" for name, column in zip(names, columns, strict=True)}
        for e in range(args.num_seeds)
    ]


def main(args: Args) -> None:
    if args.agents:
        rows = [row for path in args.agents for row in model_errors(path)]
        for name in {row["env_id"]: 0 for row in rows}:
            for column in ("delta_error", "reward_error", "termination_error"):
                values = [float(row[column]) for row in rows if row["env_id"] == name]
                print(f"{name}: {column} {np.mean(values):.3g} ± {half_interval(values):.2g}")
        write_rows(rows, "dyna_dqn_model.csv")
        return
    curves = read_curves()
    rows = table(curves)
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    write_rows(rows, "dyna_dqn_table.csv")
    draw(curves)


if __name__ == "__main__":
    main(tyro.cli(Args))
