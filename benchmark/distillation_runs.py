"""How small can a student be, and by which loss? Table and figure of benchmark/results/distillation.csv.

    python benchmark/distillation_runs.py            # benchmark/results/distillation_summary.csv, docs/distillation.png
    OMP_NUM_THREADS=1 python benchmark/distillation_runs.py --speed        # how much faster a student acts

The runs are those of benchmark/distillation.sh; a row of the file that has a score is a student on a task. The score is
(student - random) / (teacher - random), of mean returns. Intervals are 95 % Student's t intervals over the seeds.
"""

import sys
import time
from collections import defaultdict

import numpy as np
import torch
import tyro
from common import RESULTS, ROOT, half_interval, hardware, read_rows, show, write_rows
from curves import plt, save

sys.path.insert(0, str(ROOT))

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


def students() -> dict[tuple[str, str, float], dict[str, dict[str, str]]]:
    """By variant, task and scale: the row of each seed."""
    found: dict[tuple[str, str, float], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in read_rows(RESULTS / "distillation.csv"):
        if row.get("eval/score"):
            variant, task = row["variant"], int(float(row["charts/task"]))
            env_id = THREE_TASKS[task] if variant.startswith("three-tasks") else TASKS[variant.split("-")[0]]
            variant = variant.removesuffix("-small")  # more students of the same teachers
            found[variant, env_id, float(row["charts/student_scale"])][row["seed"]] = row
    return found


def summary(found: dict[tuple[str, str, float], dict[str, dict[str, str]]]) -> list[dict]:
    """Means over the seeds; the mean over the tasks; differences of scores between variants of the same seeds."""
    lines, shared = [], defaultdict(lambda: defaultdict(list))
    for (variant, env_id, scale), seeds in found.items():
        scores = [float(row["eval/score"]) for row in seeds.values()]
        line = {"variant": variant, "env_id": env_id, "scale": scale, "seeds": len(seeds)}
        line |= {"score": np.mean(scores), "half_interval": half_interval(scores)}
        names = ["charts/student_parameters", "charts/teacher_parameters"]
        names += [f"eval/{who}_return" for who in ("random", "teacher", "student")]
        names += ["eval/teacher_terminated", "eval/student_terminated"]
        for name in names:
            line[name.split("/")[1]] = np.mean([float(row[name]) for row in seeds.values()])
        lines.append(line)
        if variant.startswith("three-tasks"):
            for seed, row in seeds.items():
                shared[variant, scale][seed].append(float(row["eval/score"]))
    for (variant, scale), seeds in shared.items():
        means = [np.mean(scores) for scores in seeds.values()]
        line = {"variant": variant, "env_id": "mean", "scale": scale, "seeds": len(means)}
        lines.append(line | {"score": np.mean(means), "half_interval": half_interval(means)})
    for one, other in PAIRS:
        a, b = found[one, "Sokoban-v0", 0.01], found[other, "Sokoban-v0", 0.01]
        gains = [float(a[seed]["eval/score"]) - float(b[seed]["eval/score"]) for seed in a if seed in b]
        if gains:
            line = {"variant": f"{one} less {other}", "env_id": "Sokoban-v0", "scale": 0.01, "seeds": len(gains)}
            lines.append(line | {"score": np.mean(gains), "half_interval": half_interval(gains)})
    return [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()} for line in lines]


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
def acting_speed() -> list[dict]:
    """CPU microseconds to act once, by the network's share of the teacher and the batch.

    Medians of 100 calls; the least of 20 rounds, in which every network has its turn: others may use the machine.
    """
    rows, cases = [], []
    tasks = (("Sokoban-v0", (7, 7), 5, distillation.BOARD_WIDTHS), ("CartPole-v1", (4,), 2, distillation.VECTOR_WIDTHS))
    for env_id, shape, actions, widths in tasks:
        teacher = PolicyNet([shape], [actions], widths, "player")
        total = distillation.acting_parameters(teacher)
        for scale in (1.0, *SCALES):
            small = distillation.student_widths([shape], [actions], int(scale * total), "player")
            net = teacher if scale == 1 else PolicyNet([shape], [actions], small, "player")
            rows.append({"env_id": env_id, "scale": scale, "parameters": distillation.acting_parameters(net)})
            for batch in (1, 64):
                x = torch.randint(0, 7, (batch, *shape)).to(torch.uint8 if len(shape) == 2 else torch.float32)
                cases.append((rows[-1], f"microseconds_batch_{batch}", net, x))
    for _ in range(20):
        for row, name, net, x in cases:
            seconds = []
            for _ in range(100):
                start = time.perf_counter()
                net(x).argmax(-1)
                seconds.append(time.perf_counter() - start)
            row[name] = round(min(row.get(name, np.inf), 1e6 * float(np.median(seconds))), 3)
    for row in rows:
        teacher = next(other for other in rows if other["env_id"] == row["env_id"])
        for batch in (1, 64):
            name = f"microseconds_batch_{batch}"
            row[f"speedup_batch_{batch}"] = round(teacher[name] / row[name], 3)
        row["hardware"] = hardware()
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
