"""How small can a student be? Students of distillation.py by size, loss, KL direction, states, and number of tasks.

    OMP_NUM_THREADS=1 python benchmark/distillation_runs.py                 # run what is missing, then report
    OMP_NUM_THREADS=1 python benchmark/distillation_runs.py --report-only   # tables and figures of what there is
    OMP_NUM_THREADS=1 python benchmark/distillation_runs.py --speed         # how much faster a student acts

A finished run leaves its own CSV file in benchmark/results/distillation, a row for each student and task, and isn't
repeated. Runs go part by part and seed by seed, so that an interrupted grid is balanced. A seed's teachers are trained
once and kept in runs/distillation_teachers; one that is missing there is trained again, which gives the same one.
The score is (student - random) / (teacher - random), of mean returns; intervals are 95 % t-intervals of the mean over
the seeds.
"""

import contextlib
import csv
import io
import os
import pathlib
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import distillation
from distillation import PolicyNet

SCALES = (0.25, 0.07, 0.04)
SHORT: dict[str, Any] = {"eval_episodes": 100, "distill_steps": 2000}
TEACHERS: dict[str, dict[str, Any]] = {  # each trains its teachers and distils the headline students: forward KL
    "sokoban": {"env_ids": ("Sokoban-v0",), "eval_episodes": 1000, "teacher_timesteps": 800_000},
    "cartpole": {"env_ids": ("CartPole-v1",)} | SHORT,
    # not SHORT: Q-values at γ = .99 are large, and squared errors take 4,000 updates to get near them
    "cartpole-dqn": {"env_ids": ("CartPole-v1",), "teacher": "dqn", "eval_episodes": 100},
    "acrobot-dqn": {"env_ids": ("Acrobot-v1",), "teacher": "dqn", "eval_episodes": 100},
}
THREE_TASKS = ("CartPole-v1", "Acrobot-v1", "Sokoban-v0")
STUDENT = {"states": "student"}
# name: (what is different, whose teachers); the Sokoban ones for one size only
VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "three-tasks": (
        {"env_ids": THREE_TASKS, "eval_episodes": 500, "distill_steps": 6000, "student_scale": (0.25, 0.07)},
        ("cartpole", "acrobot-dqn", "sokoban"),
    ),
    **{
        f"{task}-{name}": (settings, (task,))
        for name, settings in (
            ("nll", {"loss": "nll"}), ("mse", {"loss": "mse"}), ("reverse", {"kl_direction": "reverse"}),
        )
        for task in ("cartpole-dqn", "acrobot-dqn")
    },
    "sokoban-reverse": ({"kl_direction": "reverse", "student_scale": (0.07,)}, ("sokoban",)),
    "sokoban-nll": ({"loss": "nll", "student_scale": (0.07,)}, ("sokoban",)),
    "sokoban-own-states": (STUDENT | {"student_scale": (0.07,)}, ("sokoban",)),
    "sokoban-own-states-reverse": (STUDENT | {"kl_direction": "reverse", "student_scale": (0.07,)}, ("sokoban",)),
    "sokoban-own-states-corrected": (
        STUDENT | {"kl_direction": "reverse", "correction": True, "student_scale": (0.07,)}, ("sokoban",)
    ),
}  # fmt: skip
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # quantiles of Student's t, 1 to 9 degrees
COLOURS = ("#c03a2b", "#1f6fb4", "#2c8a4b", "#b07aa1", "#888888")


@dataclass
class Args:
    parts: tuple[str, ...] = (*TEACHERS, *VARIANTS)
    """which of the runs above"""
    seeds: int = 5
    """seeds 1 to N"""
    output_dir: str = "benchmark/results"
    """where the tables go"""
    figure_dir: str = "docs"
    """where the figures go"""
    report_only: bool = False
    """run nothing"""
    speed: bool = False
    """measure only what acting costs"""


def write(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    os.replace(temporary, path)


def hardware() -> str:
    cpu = platform.processor() or "unknown"
    if pathlib.Path("/proc/cpuinfo").exists():
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return f"{cpu}, one thread, Python {platform.python_version()}, torch {torch.__version__}"


# --------------------------------------------------------------------------------------------------------------- runs


def run(name: str, seed: int, folder: pathlib.Path, kept: pathlib.Path) -> None:
    """One run of the grid, its teachers first; writes its CSV file."""
    start, home = time.process_time(), os.getcwd()
    settings, needs = VARIANTS.get(name, (TEACHERS.get(name), ()))
    for other in needs:
        if not (kept / f"{other}__{seed}.pt").exists():
            run(other, seed, folder, kept)
    paths = tuple(str(kept / f"{other}__{seed}.pt") for other in needs)
    common = {"seed": seed, "student_scale": SCALES, "teacher_path": paths}
    for other in needs[:1]:
        common |= TEACHERS[other]
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(scratch)  # the script's own files go there, and away
        try:
            rows = distillation.main(distillation.Args(**common | settings))
            if not needs:
                (path,) = pathlib.Path().glob("runs/*/agent.pt")
                kept.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, kept / f"{name}__{seed}.tmp")
                os.replace(kept / f"{name}__{seed}.tmp", kept / f"{name}__{seed}.pt")
        finally:
            os.chdir(home)
    seconds = time.process_time() - start
    write(folder / f"{name}__{seed}.csv", [{"name": name, "seed": seed} | row for row in rows])
    scores = " ".join(f"{row['env_id']} {row['scale']:g}: {row['score']:.3f}" for row in rows)
    print(f"  {name}, seed {seed}: {scores}; {seconds:.0f} CPU seconds", file=sys.stderr, flush=True)


@torch.no_grad()
def acting_speed(args: Args) -> None:
    """CPU microseconds to act once, by the network's share of the teacher and the batch.

    Medians of 100 calls; the least of 20 rounds, in which every network has its turn: others may use the machine.
    """
    rows, cases = [], []
    for env_id, shape, num_actions, base in (
        ("Sokoban-v0", (7, 7), 5, distillation.BOARD_WIDTHS), ("CartPole-v1", (4,), 2, distillation.VECTOR_WIDTHS),
    ):  # fmt: skip
        total = distillation.acting_parameters(PolicyNet([shape], [num_actions], base, critic=False))
        for scale in (1.0, *SCALES):
            widths = distillation.student_widths([shape], [num_actions], int(scale * total)) if scale < 1 else base
            net = PolicyNet([shape], [num_actions], widths, critic=False)
            rows.append({"env_id": env_id, "scale": scale, "parameters": distillation.acting_parameters(net)})
            for batch in (1, 64):
                boards = torch.randint(0, 7, (batch, *shape), dtype=torch.uint8)
                x = boards if len(shape) == 2 else torch.randn(batch, *shape)
                rows[-1][f"microseconds_batch_{batch}"] = float("inf")
                cases.append((rows[-1], f"microseconds_batch_{batch}", net, x))
    for _ in range(20):
        for row, name, net, x in cases:
            seconds = []
            for _ in range(100):
                start = time.perf_counter()
                net(x).argmax(-1)
                seconds.append(time.perf_counter() - start)
            row[name] = min(row[name], 1e6 * float(np.median(seconds)))
    for row in rows:
        (teacher,) = (other for other in rows if other["env_id"] == row["env_id"] and other["scale"] == 1)
        for batch in (1, 64):
            row[f"speedup_batch_{batch}"] = teacher[f"microseconds_batch_{batch}"] / row[f"microseconds_batch_{batch}"]
        row["hardware"] = hardware()
        print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items() if k != "hardware"})
    write(pathlib.Path(args.output_dir) / "distillation_speed.csv", rows)


# ------------------------------------------------------------------------------------------------------------- report


def interval(values: Any) -> tuple[float, float]:
    """Mean, and half of its 95 % interval."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(T_95[len(values) - 2] * values.std(ddof=1) / len(values) ** 0.5)


def report(args: Args, folder: pathlib.Path) -> None:
    runs: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for name in (*TEACHERS, *VARIANTS):
        for seed in range(1, args.seeds + 1):
            path = folder / f"{name}__{seed}.csv"
            if path.exists():
                means: dict[float, list[float]] = {}
                for row in csv.DictReader(path.open(newline="", encoding="utf-8")):
                    runs.setdefault((name, row["env_id"], float(row["scale"])), []).append(row)
                    means.setdefault(float(row["scale"]), []).append(float(row["score"]))
                for scale, scores in means.items() if name == "three-tasks" else ():
                    mean_row = {"score": sum(scores) / len(scores)}
                    runs.setdefault((name, "mean", scale), []).append(mean_row)
    table = []
    for (name, env_id, scale), rows in runs.items():
        line: dict[str, Any] = {"name": name, "env_id": env_id, "scale": scale, "seeds": len(rows)}
        line["score"], line["half_interval"] = interval([row["score"] for row in rows])
        for column in rows[0] if env_id != "mean" else ():
            if column not in ("name", "seed", "env_id", "scale", "score"):
                line[column] = float(np.mean([float(row[column]) for row in rows]))
        table.append(line | {"hardware": hardware()})
    write(pathlib.Path(args.output_dir) / "distillation_summary.csv", table)
    print("| run | task | size | seeds | score | random | teacher | student | solved: teacher | student |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for line in table:
        cells = [line["name"], line["env_id"], f"{100 * line['scale']:g} %", str(line["seeds"])]
        cells.append(f"{line['score']:.3f} ± {line['half_interval']:.3f}")
        cells += [f"{line[k]:.4g}" if k in line else "" for k in ("random", "teacher", "student")]
        solved = [f"{100 * line[f'{who}_terminated']:.1f} %" for who in ("teacher", "student") if "student" in line]
        print("| " + " | ".join(cells + (solved if line["env_id"] == "Sokoban-v0" else ["", ""])) + " |")
    figures = pathlib.Path(args.figure_dir)
    draw_sizes(table, figures / "distillation_size.png")
    draw_losses(table, figures / "distillation_losses.png")
    draw_bimodal(figures / "distillation_bimodal.png")


def draw_sizes(table: list[dict[str, Any]], path: pathlib.Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 3.8))
    series = [("sokoban", "Sokoban-v0", "Sokoban, policy"), ("cartpole-dqn", "CartPole-v1", "CartPole, Q-values")]
    series += [
        ("cartpole", "CartPole-v1", "CartPole, policy"),
        ("acrobot-dqn", "Acrobot-v1", "Acrobot, Q-values"),
        ("three-tasks", "mean", "three tasks in one, mean"),
    ]
    for shift, ((name, env_id, label), colour) in enumerate(zip(series, COLOURS, strict=False)):
        lines = [line for line in table if (line["name"], line["env_id"]) == (name, env_id)]
        if lines:
            lines.sort(key=lambda line: line["scale"])
            x = np.array([line["scale"] for line in lines]) * 1.03**shift  # apart, to be seen
            y, error = [line["score"] for line in lines], [line["half_interval"] for line in lines]
            axis.errorbar(
                x, y, error, marker="o", capsize=3, color=colour, label=f"{label} ({lines[0]['seeds']} seeds)"
            )
    axis.axhline(1, color="black", lw=0.8, ls=":")
    axis.set(xscale="log", xlabel="student's share of the teacher's parameters", ylabel="score")
    axis.set_xticks(SCALES, [f"{100 * scale:g} %" for scale in SCALES])
    axis.minorticks_off()
    axis.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_losses(table: list[dict[str, Any]], path: pathlib.Path) -> None:
    """The score of each loss, direction and kind of states, by task; students of 7 %."""
    groups = {
        "Sokoban-v0": ["sokoban", "sokoban-reverse", "sokoban-nll", *[name for name in VARIANTS if "own" in name]],
        "CartPole-v1": ["cartpole-dqn", *[f"cartpole-dqn-{loss}" for loss in ("reverse", "nll", "mse")]],
        "Acrobot-v1": ["acrobot-dqn", *[f"acrobot-dqn-{loss}" for loss in ("reverse", "nll", "mse")]],
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), width_ratios=(6, 4, 4))
    for axis, (env_id, names) in zip(axes, groups.items(), strict=True):
        labels = []
        for name in names:
            for line in table:
                if line["name"] == name and line["scale"] == 0.07:
                    axis.bar(len(labels), line["score"], yerr=line["half_interval"], capsize=3, color=COLOURS[1])
                    label = name.removeprefix(names[0]).strip("-") or "forward"
                    labels.append(label.replace("own-states", "own states").replace("-", ",\n").replace(" ", "\n"))
        axis.axhline(1, color="black", lw=0.8, ls=":")
        axis.set_xticks(range(len(labels)), labels, fontsize=8)
        axis.set(title=f"{env_id}, students of 7 %", ylabel="score")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_bimodal(path: pathlib.Path) -> None:
    """A teacher of two modes over 121 actions, and the nearest normal distribution in each direction."""
    actions = torch.linspace(-15, 15, 121)
    modes = torch.stack([np.log(0.4) - (actions + 4) ** 2 / 2, np.log(0.6) - (actions - 4) ** 2 / 2])
    teacher = modes.logsumexp(0)[None]  # (1, A) logits
    figure, axis = plt.subplots(figsize=(6, 3.2))
    axis.fill_between(actions, teacher[0].softmax(-1), color="#cccccc", label="teacher")
    for direction, colour in (("forward", COLOURS[1]), ("reverse", COLOURS[0])):
        fits = []
        for first in (-3.0, 0.0, 3.0):  # the reverse divergence has several minima: take the lowest
            mean, log_std = torch.tensor(first, requires_grad=True), torch.tensor(0.5, requires_grad=True)
            optimizer = torch.optim.Adam([mean, log_std], 0.03)
            for _ in range(800):
                student = -((actions - mean) ** 2)[None] / (2 * log_std.exp() ** 2)
                loss = distillation.distillation_losses(student, teacher, "kl", direction, 1.0).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            fits.append((loss.item(), student.detach()[0].softmax(-1)))
        divergence, policy = min(fits, key=lambda fit: fit[0])
        label = {"forward": "forward: D_KL(teacher‖student)", "reverse": "reverse: D_KL(student‖teacher)"}[direction]
        axis.plot(actions, policy, color=colour, label=f"{label} = {divergence:.2f}")
    axis.set(xlabel="action", ylabel="probability")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(args: Args) -> None:
    unknown = {*args.parts} - {*TEACHERS} - {*VARIANTS}
    if unknown or not 1 <= args.seeds <= len(T_95) + 1:
        sys.exit(f"unknown {', '.join(sorted(unknown))}" if unknown else f"--seeds must be 1 to {len(T_95) + 1}")
    torch.set_num_threads(1)
    if args.speed:
        acting_speed(args)
        return
    folder = pathlib.Path(args.output_dir).resolve() / "distillation"
    kept = pathlib.Path("runs/distillation_teachers").resolve()
    for name in () if args.report_only else args.parts:
        for seed in range(1, args.seeds + 1):
            if not (folder / f"{name}__{seed}.csv").exists():
                run(name, seed, folder, kept)
    report(args, folder)


if __name__ == "__main__":
    main(tyro.cli(Args))
