"""Curves and frames-to-threshold of the runs under benchmark/results/i2a/ (benchmark/i2a_runs.py makes them).

    python benchmark/i2a_report.py --task 7x7-1

Prints, for each variant, the frames at which the share of solved training levels (each is new, so none was seen before)
first reaches 25, 50, 80 and 95 % in a window of five rows, with and without the model's pretraining frames; and, over
paired seeds, the ratio of model-free's frames to I2A's: the geometric mean with its 95 % interval. Writes
benchmark/results/i2a_frames_TASK.csv and docs/i2a_curves_TASK.png.
"""

import csv
import math
import os
import pathlib
from dataclasses import dataclass

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results"
THRESHOLDS = (0.25, 0.5, 0.8, 0.95)  # the first was added when the curves were there
WINDOW = 5
# Two-sided 95 % quantiles of Student's t, by degrees of freedom
STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass
class Args:
    task: str = "7x7-1"
    """HxW-boxes, as in the names of the result files"""


def curve(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Frames, share solved in a window of rows, and the last row's evaluation with the run's pretraining frames."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    training = [row for row in rows if row.get("charts/solved")]
    frames = np.array([float(row["global_step"]) for row in training])
    solved = np.array([float(row["charts/solved"]) for row in training])
    smooth = np.array([solved[max(0, i - WINDOW + 1) : i + 1].mean() for i in range(len(solved))])
    pretraining = [float(row["global_step"]) for row in rows if row.get("model/step")]
    facts = {"pretraining": pretraining[0] if pretraining else 0.0, "eval": float(rows[-1].get("eval/solved") or "nan")}
    return frames, smooth, facts | {"minutes": float(training[-1]["charts/minutes"])}


def reached(frames: np.ndarray, solved: np.ndarray, threshold: float) -> float:
    """The first frame at which the smoothed share is at the threshold; infinity if it never is."""
    above = np.flatnonzero(solved[WINDOW - 1 :] >= threshold)
    return float(frames[WINDOW - 1 + above[0]]) if len(above) else math.inf


def interval(values: list[float]) -> float:
    """Half of the 95 % interval of the mean."""
    return (
        STUDENT[len(values) - 1] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
        if len(values) > 1
        else math.nan
    )


def main(args: Args) -> None:
    runs: dict[str, dict[int, tuple]] = {}
    for path in sorted((RESULTS / "i2a").glob(f"{args.task}_*.csv")):
        _, variant, seed = path.stem.split("_")
        runs.setdefault(variant, {})[int(seed)] = curve(path)
    rows = []
    for variant, by_seed in runs.items():
        evaluated = [facts["eval"] for _, _, facts in by_seed.values()]
        mean, half = np.mean(evaluated), interval(evaluated)
        print(f"{variant}: {len(by_seed)} seeds, held-out levels solved {mean:.3f} ± {half:.3f}")
        for threshold in THRESHOLDS:
            counts = {seed: reached(frames, solved, threshold) for seed, (frames, solved, _) in by_seed.items()}
            for counted in ("with", "without"):
                frames = [n - (by_seed[s][2]["pretraining"] if counted == "without" else 0) for s, n in counts.items()]
                row = {
                    "variant": variant, "threshold": threshold, "pretraining_frames": counted, "seeds": len(by_seed),
                    "reached": sum(map(math.isfinite, frames)), "median_frames": float(np.median(frames)),
                    "frames": " ".join(f"{n:.0f}" for n in frames), "held_out_solved": round(float(mean), 4),
                    "held_out_interval": round(half, 4), "ratio": "", "ratio_low": "", "ratio_high": "",
                }  # fmt: skip
                pairs = [(n, reached(*runs["i2a"][s][:2], threshold)) for s, n in counts.items() if s in runs["i2a"]]
                finite = bool(np.isfinite(pairs).all())
                if variant != "i2a" and counted == "with" and len(pairs) > 1 and finite:
                    logs = [math.log(theirs / ours) for theirs, ours in pairs]
                    log, spread = float(np.mean(logs)), interval(logs)
                    bounds = zip(("ratio", "ratio_low", "ratio_high"), (log, log - spread, log + spread), strict=True)
                    row |= {name: round(math.exp(value), 3) for name, value in bounds}
                rows.append(row)
                print("  " + ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("variant", "seeds") and v != ""))
    target = RESULTS / f"i2a_frames_{args.task}.csv"
    with target.with_suffix(".tmp").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(target.with_suffix(".tmp"), target)

    figure, axis = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for variant, by_seed in runs.items():
        last = min(frames[-1] for frames, _, _ in by_seed.values())
        grid = np.linspace(max(frames[0] for frames, _, _ in by_seed.values()), last, 200)
        curves = np.array([np.interp(grid, frames, solved) for frames, solved, _ in by_seed.values()])
        (line,) = axis.plot(grid, curves.mean(0), label=f"{variant} ({len(curves)} seeds)")
        if len(curves) > 1:
            half = STUDENT[len(curves) - 1] * curves.std(0, ddof=1) / math.sqrt(len(curves))
            axis.fill_between(grid, curves.mean(0) - half, curves.mean(0) + half, alpha=0.2, color=line.get_color())
    axis.set(xlabel="environment frames, the model's included", ylabel="new levels solved", ylim=(0, 1))
    axis.set_title(f"Sokoban {args.task.replace('-', ', ')} box(es): mean and 95 % interval over seeds")
    axis.legend(loc="upper left")
    figure.savefig(ROOT / "docs" / f"i2a_curves_{args.task}.png", dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Args))
