"""How small can a student be, and by which loss? Table and figure of benchmark/results/distillation.csv.

    python benchmark/distillation_runs.py            # benchmark/results/distillation_summary.csv, docs/distillation.png
    OMP_NUM_THREADS=1 python benchmark/distillation_runs.py --speed        # how much faster a student acts

The runs are those of benchmark/distillation.sh; a row of the file that has a score is a student on a task. The score is
(student - random) / (teacher - random), of mean returns. Intervals are 95 % Student's t intervals over the seeds.
"""

import platform
import sys
import time
from collections import defaultdict
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
import tyro
from common import RESULTS, ROOT, half_interval, read_rows, write_rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(ROOT))

import distillation
from distillation import PolicyNet

SCALES = (0.25, 0.07, 0.04, 0.02, 0.01)
TASKS = {"sokoban": "Sokoban-v0", "own": "Sokoban-v0", "cartpole": "CartPole-v1", "acrobot": "Acrobot-v1"}  # by variant
THREE_TASKS = ("CartPole-v1", "Acrobot-v1", "Sokoban-v0")
PAIRS = (("own-reverse-corrected", "own-reverse"), ("own-forward-corrected", "own-forward"))


@dataclass
class Args:
    speed: bool = False  # measure only what acting costs


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
    series = {
        "sokoban": ("Sokoban-v0", "Sokoban, policy"), "cartpole": ("CartPole-v1", "CartPole, policy"),
        "acrobot-dqn": ("Acrobot-v1", "Acrobot, Q-values"), "three-tasks": ("mean", "three tasks in one, mean"),
    }  # fmt: skip
    for shift, (variant, (env_id, label)) in enumerate(series.items()):
        chosen = [line for line in lines if (line["variant"], line["env_id"]) == (variant, env_id)]
        if chosen:
            x = np.array([line["scale"] for line in chosen], dtype=float) * 1.03**shift  # apart, to be seen
            y, error = ([float(line[name]) for line in chosen] for name in ("score", "half_interval"))
            left.errorbar(x, y, error, marker="o", capsize=3, label=f"{label} ({chosen[0]['seeds']} seeds)")
    left.axhline(1, color="black", lw=0.8, ls=":")
    left.set(xscale="log", xlabel="student's share of the teacher's parameters", ylabel="score")
    left.set_xticks(SCALES, [f"{100 * scale:g} %" for scale in SCALES])
    left.minorticks_off()
    left.legend(loc="lower right", fontsize=8)

    actions = torch.linspace(-15, 15, 121)
    modes = torch.stack([np.log(0.4) - (actions + 4) ** 2 / 2, np.log(0.6) - (actions - 4) ** 2 / 2])
    teacher = modes.logsumexp(0)[None]  # (1, A) logits
    right.fill_between(actions, teacher[0].softmax(-1), color="#cccccc", label="teacher")
    for direction, label in (("forward", "D_KL(teacher‖student)"), ("reverse", "D_KL(student‖teacher)")):
        fits = [fitted(actions, teacher, direction, first) for first in (-3.0, 0.0, 3.0)]  # several minima: the lowest
        divergence, policy = min(fits, key=lambda fit: fit[0])
        right.plot(actions, policy, label=f"{direction}: {label} = {divergence:.2f}")
    right.set(xlabel="action", ylabel="probability")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "distillation.png", dpi=90)
    print("wrote docs/distillation.png")


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
    for env_id, shape, actions, base in (
        ("Sokoban-v0", (7, 7), 5, distillation.BOARD_WIDTHS), ("CartPole-v1", (4,), 2, distillation.VECTOR_WIDTHS),
    ):  # fmt: skip
        total = distillation.acting_parameters(PolicyNet([shape], [actions], base, "player"))
        for scale in (1.0, *SCALES):
            widths = distillation.student_widths([shape], [actions], int(scale * total), "player")
            net = PolicyNet([shape], [actions], base if scale == 1 else widths, "player")
            rows.append({"env_id": env_id, "scale": scale, "parameters": distillation.acting_parameters(net)})
            for batch in (1, 64):
                boards = torch.randint(0, 7, (batch, *shape), dtype=torch.uint8)
                cases.append((rows[-1], batch, net, boards if len(shape) == 2 else torch.randn(batch, *shape)))
    for _ in range(20):
        for row, batch, net, x in cases:
            seconds = []
            for _ in range(100):
                start = time.perf_counter()
                net(x).argmax(-1)
                seconds.append(time.perf_counter() - start)
            name = f"microseconds_batch_{batch}"
            row[name] = round(min(row.get(name, np.inf), 1e6 * float(np.median(seconds))), 3)
    for row in rows:
        teacher = next(other for other in rows if other["env_id"] == row["env_id"])
        for batch in (1, 64):
            name = f"microseconds_batch_{batch}"
            row[f"speedup_batch_{batch}"] = round(teacher[name] / row[name], 3)
        row["hardware"] = f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}"
    return rows


def main(args: Args) -> None:
    torch.set_num_threads(1)
    lines = acting_speed() if args.speed else summary(students())
    for line in lines:
        print(", ".join(f"{name} {value}" for name, value in line.items()))
    write_rows(lines, "distillation_speed.csv" if args.speed else "distillation_summary.csv")
    if not args.speed:
        draw(lines)


if __name__ == "__main__":
    main(tyro.cli(Args))
