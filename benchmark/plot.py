"""Tables and figures of the I2A study from the files under benchmark/results/i2a/ (benchmark/i2a_study.sh makes them).

    python benchmark/plot.py --task 7x7-1

Prints, for each variant: the share of new training levels solved (each level is new, so none was seen before) over the
last 100,000 frames before --at-frames, and the frames at which that share, in a window of five rows, first reaches 25,
50, 80 and 95 %, with and without the model's pretraining frames; over paired seeds, the ratio of its frames to I2A's:
the geometric mean with its 95 % interval (Student's t). Writes benchmark/results/i2a_frames_TASK.csv,
docs/i2a_curves_TASK.png and, where benchmark/i2a_evaluate.py has tested the agents, docs/i2a_boxes_TASK.png. The runs
of benchmark/i2a_full_size.py (task 10x10-4), which are evaluated as they go, have docs/i2a_full_size.png instead.
"""

import csv
import math
import os
import pathlib
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results"
THRESHOLDS = (0.1, 0.15, 0.25, 0.5, 0.8, 0.95)  # the first three were added when the curves were there
WINDOW = 5
# Two-sided 95 % quantiles of Student's t, by degrees of freedom
STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
PANELS = {
    "I2A and its baselines": ("i2a", "model-free", "wide", "copy"),
    "imagination depth": ("depth-1", "i2a", "depth-5", "depth-10"),
    "what it imagines": ("i2a", "perfect", "width-4", "poor", "no-reward"),
    "n-step returns (λ = 1)": ("i2a-nstep", "model-free-nstep", "copy-nstep"),
}
NAMES = {
    "i2a": "I2A, depth 3",
    "wide": "model-free, twice as wide",
    "copy": "copy model",
    "no-reward": "no rewards",
    "width-4": "middling model",
}


@dataclass
class Args:
    task: str = "7x7-1"
    """HxW-boxes, as in the names of the result files"""
    at_frames: int = 500_000
    """where variants are compared at equal frames"""


def read(path: pathlib.Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def curve(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Frames, share solved in a window of rows, and the last row's evaluation with the run's pretraining frames."""
    rows = read(path)
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


def interval(values: Any) -> float:
    """Half of the 95 % interval of the mean."""
    if len(values) < 2:
        return math.nan
    return STUDENT[len(values) - 1] * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def thresholds(runs: dict[str, dict[int, tuple]], at_frames: int) -> list[dict[str, Any]]:
    """A row for each variant, threshold, and way of counting."""
    rows = []
    for variant, by_seed in runs.items():
        at = [np.interp(at_frames, frames, solved) for frames, solved, _ in by_seed.values()]
        ends = {seed: round(frames[-1] / 1e5) * 100_000 for seed, (frames, _, _) in by_seed.items()}
        last = min(ends.values())  # a run that was left to go on longer is not compared at its end
        held_out = [facts["eval"] for seed, (_, _, facts) in by_seed.items() if ends[seed] == last]
        print(
            f"\n{variant}: {len(by_seed)} seeds; new levels solved at {at_frames:,} frames {np.mean(at):.3f} ± "
            f"{interval(at):.3f}; held-out levels at {last:,} frames ({len(held_out)} seeds) "
            f"{np.mean(held_out):.3f} ± {interval(held_out):.3f}"
        )
        against = "i2a-nstep" if "nstep" in variant else "i2a"
        for threshold in THRESHOLDS:
            counts = {seed: reached(frames, solved, threshold) for seed, (frames, solved, _) in by_seed.items()}
            for counted in ("with", "without"):
                own = {s: n - (by_seed[s][2]["pretraining"] if counted == "without" else 0) for s, n in counts.items()}
                row = {
                    "variant": variant, "threshold": threshold, "pretraining_frames": counted, "seeds": len(by_seed),
                    "reached": sum(map(math.isfinite, own.values())),
                    "median_frames": float(np.median([*own.values()])),
                    "frames": " ".join(f"{n:.0f}" for n in own.values()), "ratio": "", "ratio_low": "",
                    "ratio_high": "", "pairs": "", "at_frames": at_frames, "solved": round(float(np.mean(at)), 4),
                    "solved_interval": round(interval(at), 4), "ends": " ".join(map(str, ends.values())),
                    "last_frame": last, "held_out_seeds": len(held_out),
                    "held_out_solved": round(float(np.mean(held_out)), 4),
                    "held_out_interval": round(interval(held_out), 4),
                }  # fmt: skip
                if variant != against:
                    pairs = [
                        (own[s], reached(*runs[against][s][:2], threshold) - (
                            runs[against][s][2]["pretraining"] if counted == "without" else 0))
                        for s in own if s in runs.get(against, {})
                    ]  # fmt: skip
                    row["pairs"] = len(pairs)
                    if len(pairs) > 1 and np.isfinite(pairs).all():
                        logs = [math.log(theirs / ours) for theirs, ours in pairs]
                        log, spread = float(np.mean(logs)), interval(logs)
                        for name, value in (("ratio", log), ("ratio_low", log - spread), ("ratio_high", log + spread)):
                            row[name] = round(math.exp(value), 3)
                rows.append(row)
                shown = ("threshold", "pretraining_frames", "reached", "frames", "ratio", "ratio_low", "ratio_high")
                print("  " + ", ".join(f"{name} {row[name]}" for name in shown if row[name] != ""))
    return rows


def draw(axis: Any, runs: dict[str, dict[int, tuple]], variants: tuple[str, ...], go_on: bool) -> None:
    """Mean and 95 % interval over seeds, as far as all of them go; with `go_on`, then the longer ones one by one."""
    for variant in (v for v in variants if v in runs):
        by_seed = runs[variant]
        last = min(frames[-1] for frames, _, _ in by_seed.values())
        grid = np.linspace(max(frames[0] for frames, _, _ in by_seed.values()), last, 200)
        curves = np.array([np.interp(grid, frames, solved) for frames, solved, _ in by_seed.values()])
        label = f"{NAMES.get(variant, variant.replace('-', ' '))} ({len(curves)} seeds)"
        (line,) = axis.plot(grid, curves.mean(0), label=label)
        if len(curves) > 1:
            half = STUDENT[len(curves) - 1] * curves.std(0, ddof=1) / math.sqrt(len(curves))
            axis.fill_between(grid, curves.mean(0) - half, curves.mean(0) + half, alpha=0.2, color=line.get_color())
        for frames, solved, _ in by_seed.values() if go_on else ():
            axis.plot(frames[frames > last], solved[frames > last], color=line.get_color(), alpha=0.5, linewidth=0.8)


def tests(task: str) -> None:
    """Agents on other numbers of boxes and in Monte-Carlo search: means over seeds; the boxes also as a figure."""
    for name, key in (("boxes", "boxes"), ("search", "search_model")):
        path = RESULTS / f"i2a_{name}.csv"
        rows = [row for row in read(path) if row["task"] == task] if path.exists() else []
        for row in rows:  # agents after as many frames
            row["variant"] += f", {float(row['frames']) / 1e6:.1f} M frames" if row.get("frames") else ""
        figure, axis = plt.subplots(figsize=(5.5, 4), constrained_layout=True)
        for variant in dict.fromkeys(row["variant"] for row in rows):
            points = []
            for value in dict.fromkeys(row[key] for row in rows if row["variant"] == variant):
                own = [row for row in rows if (row["variant"], row[key]) == (variant, value)]
                solved = [float(row["eval/solved"]) for row in own]
                steps = [float(row[c]) for row in own for c in ("imagined_steps_per_solved",) if row.get(c)]
                print(
                    f"{variant}, {key} {value}: {np.mean(solved):.3f} ± {interval(solved):.3f} ({len(own)} seeds)"
                    + (f", {np.mean(steps):,.0f} imagined steps a solved level" if steps else "")
                )
                points.append((value, float(np.mean(solved)), interval(solved)))
            axis.errorbar(*zip(*points, strict=True), marker="o", capsize=3, label=variant)
        if name == "boxes" and rows:
            axis.set(xlabel="boxes", ylabel="held-out levels solved", ylim=(0, 1), title=f"trained on {task}")
            axis.legend()
            figure.savefig(ROOT / "docs" / f"i2a_boxes_{task}.png", dpi=90)
        plt.close(figure)


def full_size(paths: list[pathlib.Path]) -> None:
    """Runs that are evaluated as they go: new levels of each stage, and the evaluations with their 95 % intervals."""
    figure, (training, axis) = plt.subplots(1, 2, figsize=(9.5, 3.6), constrained_layout=True)
    for path in paths:
        rows = [row for row in read(path) if row.get("eval/solved")]
        frames, solved, low, high = (
            np.array([float(row[name]) for row in rows])
            for name in ("global_step", "eval/solved", "eval/solved_low", "eval/solved_high")
        )
        print(f"\n{path.stem}:")
        for row in zip(frames, solved, low, high, strict=True):
            print("  {:,.0f} frames: {:.3f} ({:.3f} to {:.3f})".format(*row))
        variant = path.stem.split("_")[1]
        (line,) = axis.plot(frames, solved, marker=".", label=NAMES.get(variant, variant))
        axis.fill_between(frames, low, high, alpha=0.2, color=line.get_color())
        training.plot(*curve(path)[:2], color=line.get_color())
    training.set(xlabel="environment frames, the model's included", ylabel="new levels solved, as many boxes as then")
    axis.set(xlabel="environment frames", ylabel="Boxoban levels solved (four boxes)", ylim=(0, None))
    axis.legend()
    figure.savefig(ROOT / "docs" / "i2a_full_size.png", dpi=90)


def main(args: Args) -> None:
    if args.task == "10x10-4":
        full_size(sorted((RESULTS / "i2a").glob(f"{args.task}_*.csv")))
        return
    runs: dict[str, dict[int, tuple]] = {}
    for path in sorted((RESULTS / "i2a").glob(f"{args.task}_*.csv")):
        _, variant, seed = path.stem.split("_")
        runs.setdefault(variant, {})[int(seed)] = curve(path)
    if not runs:
        raise SystemExit(f"there is no file {RESULTS / 'i2a' / args.task}_*.csv: benchmark/i2a_runs.py makes them")
    rows = thresholds(runs, args.at_frames)
    target = RESULTS / f"i2a_frames_{args.task}.csv"
    with target.with_suffix(".tmp").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(target.with_suffix(".tmp"), target)
    tests(args.task)

    panels = {title: variants for title, variants in PANELS.items() if len(set(variants) & set(runs)) > 1}
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4), constrained_layout=True, sharey=True)
    top = min(1.0, 1.25 * max(solved.max() for by_seed in runs.values() for _, solved, _ in by_seed.values()))
    for axis, (title, variants) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        draw(axis, runs, variants, go_on="model-free" in variants)
        axis.set(xlabel="environment frames, the model's included", ylim=(0, top), title=title)
        axis.ticklabel_format(axis="x", style="sci", scilimits=(6, 6))
        axis.legend(fontsize=8)
    np.atleast_1d(axes)[0].set_ylabel(f"new levels solved, {args.task}")
    figure.savefig(ROOT / "docs" / f"i2a_curves_{args.task}.png", dpi=80)


if __name__ == "__main__":
    main(tyro.cli(Args))
