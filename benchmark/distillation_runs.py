"""How small can a student be, and by which loss? Table and figure of benchmark/results/distillation.csv.

    python benchmark/distillation_runs.py            # benchmark/results/distillation_summary.csv, docs/distillation.png
    OMP_NUM_THREADS=1 python benchmark/distillation_runs.py --speed        # how much faster a student acts

The runs are those of benchmark/distillation.sh; a row of the file that has a score is a student on a task. The score is
(student - random) / (teacher - random), of mean returns. Intervals are 95 % Student's t intervals over the seeds.
"""

import itertools
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import tyro
from common import half_interval, hardware, read_runs, show, write_rows
from curves import plt, save

import distillation
from distillation import PolicyNet

SCALES = (0.25, 0.07, 0.04, 0.02, 0.01)
TASKS = {"sokoban": "Sokoban-v0", "own": "Sokoban-v0", "cartpole": "CartPole-v1", "acrobot": "Acrobot-v1"}  # by variant
THREE_TASKS = ("CartPole-v1", "Acrobot-v1", "Sokoban-v0")
PAIRS = (("own-reverse-corrected", "own-reverse"), ("own-forward-corrected", "own-forward"))
SERIES = {  # left in the figure: variant, task, label
    ("sokoban", "Sokoban-v0"): "Sokoban, policy",
    ("cartpole", "CartPole-v1"): "CartPole, policy",
    ("acrobot-dqn", "Acrobot-v1"): "Acrobot, Q-values",
}


Student = tuple[str, str, float]  # variant, task, scale
Row = dict[str, Any]


def students() -> dict[Student, dict[int, Row]]:
    """The last row of each student and seed."""
    found: dict[Student, dict[int, Row]] = defaultdict(dict)
    for variant, seeds in read_runs("distillation").items():
        for seed, rows in seeds.items():
            for row in (row for row in rows if "eval/score" in row):
                task = int(row["charts/task"])
                env_id = THREE_TASKS[task] if variant.startswith("three-tasks") else TASKS[variant.split("-")[0]]
                name = variant.removesuffix("-small")  # more students of the same teachers
                found[name, env_id, row["charts/student_scale"]][seed] = row
    return found


def score(student: Student, scores: Sequence[float]) -> Row:
    variant, env_id, scale = student
    line = {"variant": variant, "env_id": env_id, "scale": scale, "seeds": len(scores)}
    return line | {"score": f"{np.mean(scores):.6g}", "half_interval": f"{half_interval(scores):.6g}"}


def summary(found: dict[Student, dict[int, Row]]) -> list[Row]:
    """Means over the seeds; the mean over the tasks; differences of scores between variants of the same seeds."""
    lines, shared = [], defaultdict(lambda: defaultdict(list))
    for student, seeds in found.items():
        line = score(student, [row["eval/score"] for row in seeds.values()])
        line["student_parameters"] = int(next(iter(seeds.values()))["charts/student_parameters"])
        for name in ("random_return", "teacher_return", "teacher_terminated", "student_terminated"):
            line[name] = f"{np.mean([row[f'eval/{name}'] for row in seeds.values()]):.6g}"
        lines.append(line)
        variant, _, scale = student
        if variant.startswith("three-tasks"):
            for seed, row in seeds.items():
                shared[variant, "mean", scale][seed].append(row["eval/score"])
    for student, seeds in shared.items():
        lines.append(score(student, [np.mean(scores) for scores in seeds.values()]))
    for one, other in PAIRS:
        a, b = found[one, "Sokoban-v0", 0.01], found[other, "Sokoban-v0", 0.01]
        gains = [row["eval/score"] - b[seed]["eval/score"] for seed, row in a.items()]
        lines.append(score((f"{one} less {other}", "Sokoban-v0", 0.01), gains))
    return lines


def draw(lines: list[dict]) -> None:
    """Left: the score by size. Right: what each direction makes of a teacher with two modes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for shift, (series, label) in enumerate(SERIES.items()):
        chosen = [line for line in lines if (line["variant"], line["env_id"]) == series]
        columns = ("scale", "score", "half_interval")
        x, y, error = (np.array([float(line[name]) for line in chosen]) for name in columns)
        left.errorbar(x * 1.03**shift, y, error, marker="o", label=f"{label} (seeds: {chosen[0]['seeds']})")
    left.set(xscale="log", xlabel="student's share of the teacher's parameters", ylabel="score")
    left.legend(loc="lower right", fontsize=8)

    actions = torch.linspace(-15, 15, 121)
    modes = torch.stack([np.log(0.4) - (actions + 4) ** 2 / 2, np.log(0.6) - (actions - 4) ** 2 / 2])
    teacher = modes.logsumexp(0)[None]  # (1, A) logits
    right.fill_between(actions, teacher[0].softmax(-1), color="#cccccc", label="teacher")
    for direction in ("forward", "reverse"):
        fits = [fitted(actions, teacher, direction, first) for first in (-3.0, 0.0, 3.0)]
        divergence, policy = min(fits, key=lambda fit: fit[0])  # of several minima the lowest
        right.plot(actions, policy, label=f"{direction} KL: {divergence:.2f}")
    right.set(xlabel="action", ylabel="probability")
    right.legend(fontsize=8)
    save(figure, "distillation")


def fitted(actions: torch.Tensor, teacher: torch.Tensor, direction: str, first: float) -> tuple[float, torch.Tensor]:
    """The divergence and the policy of a normal distribution that starts at `first`, after 800 steps of Adam."""
    mean, log_std = torch.tensor(first, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_std], 0.03)
    for _ in range(800):
        student = -((actions - mean) ** 2)[None] / (2 * log_std.exp() ** 2)
        loss = distillation.distillation_losses(student, teacher, "kl", direction, 1.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), student.detach()[0].softmax(-1)


@torch.no_grad()
def acting_speed() -> list[Row]:
    """CPU microseconds to act once on Sokoban, by the network's share of the teacher and the batch.

    Medians of 100 calls; the least of 20 rounds, in which every network has its turn: others may use the machine.
    """
    distillation.keep_freed_memory()
    sizes = [(7, 7)], [5]  # shapes of observations, numbers of actions
    teacher = PolicyNet(*sizes, distillation.BOARD_WIDTHS, "player")
    total, networks = distillation.acting_parameters(teacher), {1.0: teacher}
    for scale in SCALES:
        widths = distillation.student_widths(*sizes, int(scale * total), "player")
        networks[scale] = PolicyNet(*sizes, widths, "player")
    boards, least = torch.randint(0, 7, (64, 7, 7), dtype=torch.uint8), defaultdict(lambda: np.inf)
    for _ in range(20):
        for (scale, net), batch in itertools.product(networks.items(), (1, 64)):
            seconds = []
            for _ in range(100):
                start = time.perf_counter()
                net(boards[:batch]).argmax(-1)
                seconds.append(time.perf_counter() - start)
            least[scale, batch] = min(least[scale, batch], 1e6 * float(np.median(seconds)))
    rows = []
    for scale, net in networks.items():
        row = {"env_id": "Sokoban-v0", "scale": scale, "parameters": distillation.acting_parameters(net)}
        for batch in (1, 64):
            row[f"microseconds_batch_{batch}"] = round(least[scale, batch], 3)
            row[f"speedup_batch_{batch}"] = round(least[1.0, batch] / least[scale, batch], 3)
        rows.append(row | {"hardware": hardware()})
    return rows


def main(speed: bool = False) -> None:
    """The table and the figure; with --speed only what acting costs."""
    torch.set_num_threads(1)
    lines = acting_speed() if speed else summary(students())
    for line in lines:
        show(line)
    write_rows(lines, "distillation_speed.csv" if speed else "distillation_summary.csv")
    if not speed:
        draw(lines)


if __name__ == "__main__":
    tyro.cli(main)
