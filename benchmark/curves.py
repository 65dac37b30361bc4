"""Curves and a table of a study, from benchmark/results/STUDY.csv: docs/STUDY.png, benchmark/results/STUDY_table.csv.

    python benchmark/curves.py --study i2a_first_edition --reference "7x7-2 i2a" --thresholds 0.1 0.25 0.5

The share of new levels solved in a window of five rows, against frames (the model's included). For each variant and
threshold: the frames at which the window first reaches it, over seeds; and, over paired seeds, how many times as many
the variant needs as the reference: the geometric mean with its 95 % interval (Student's t on the logarithms). With
--sps, frames a second of each variant, measured alone (benchmark/i2a_throughput.py), also how many times the seconds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import tyro
from common import ROOT, columns, geometric, half_interval, read_runs, show, write_rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WINDOW = 5
Curve = tuple[np.ndarray, np.ndarray]  # frames, share solved in the window


@dataclass
class Args:
    study: str  # the file's name
    reference: str = "i2a"  # variant that the others are compared with
    thresholds: tuple[float, ...] = (0.5, 0.8, 0.9)  # shares of new levels solved
    at_frames: tuple[int, ...] = ()  # frames at which shares are compared
    sps: tuple[str, ...] = ()  # "VARIANT=NUMBER": frames a second
    title: str = ""  # over the figure


def read_curves(study: str) -> tuple[dict[str, dict[int, Curve]], dict[str, list[float]]]:
    """By variant and seed the curves; by variant the last held-out evaluation of each seed."""
    curves: dict[str, dict[int, Curve]] = {}
    held_out: dict[str, list[float]] = {}
    for variant, seeds in read_runs(study).items():
        for seed, rows in seeds.items():
            points = [(row["global_step"], row["charts/solved"]) for row in rows if "charts/solved" in row]
            frames, solved = np.array(points).T
            smooth = [solved[max(0, i + 1 - WINDOW) : i + 1].mean() for i in range(len(solved))]
            curves.setdefault(variant, {})[seed] = frames, np.array(smooth)
            evaluations = [row["eval/solved"] for row in rows if "eval/solved" in row]
            held_out.setdefault(variant, []).extend(evaluations[-1:])
    return curves, held_out


def reached(curve: Curve, threshold: float) -> float:
    """The first frame at which the window is at the threshold; infinity if it never is."""
    frames, solved = curve
    above = np.flatnonzero(solved[WINDOW - 1 :] >= threshold)
    return float(frames[WINDOW - 1 + above[0]]) if len(above) else math.inf


def share(name: str, shares: Sequence[float]) -> dict[str, Any]:
    half = f"{half_interval(shares):.4f}"
    return {"seeds": len(shares), name: f"{np.mean(shares):.4f}", f"{name}_half_interval": half}


def table(args: Args, curves: dict[str, dict[int, Curve]], held_out: dict[str, list[float]]) -> list[dict[str, Any]]:
    speeds = {name: float(number) for name, number in (text.split("=") for text in args.sps)}
    reference, rows = curves[args.reference], []
    for variant, seeds in curves.items():
        for threshold in args.thresholds:
            frames = {seed: reached(curve, threshold) for seed, curve in seeds.items()}
            there = sum(map(math.isfinite, frames.values()))
            row = {"variant": variant, "threshold": threshold, "seeds": len(frames), "reached": there}
            row["frames"] = " ".join(f"{n:.0f}" for n in frames.values())
            pairs = [(frames[s], reached(reference[s], threshold)) for s in frames if s in reference]
            ratios = [own / other for own, other in pairs if math.isfinite(own + other)]
            if ratios and variant != args.reference:
                ratio = geometric(ratios)
                row |= columns("ratio", ratio, ".3f") | {"pairs": len(ratios)}
                if variant in speeds:
                    row["ratio_seconds"] = f"{ratio[0] * speeds[args.reference] / speeds[variant]:.3f}"
            rows.append(row)
        for at in args.at_frames:
            shares = [np.interp(at, *curve) for curve in seeds.values() if curve[0][-1] >= at]
            if shares:
                rows.append({"variant": variant, "at_frames": at} | share("solved", shares))
        if held_out[variant]:
            rows.append({"variant": variant} | share("held_out", held_out[variant]))
    return rows


def draw_mean(axis: plt.Axes, x: Sequence[float], values: np.ndarray, label: str, **style: Any) -> None:
    """The mean over the seeds, which are the rows of `values`, and its 95 % interval."""
    mean, half = values.mean(0), np.apply_along_axis(half_interval, 0, values)
    (line,) = axis.plot(x, mean, label=label, **style)
    axis.fill_between(x, mean - half, mean + half, color=line.get_color(), alpha=0.2, linewidth=0)


def save(figure: plt.Figure, name: str) -> None:
    """The figure as docs/`name`.png."""
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / f"{name}.png", dpi=90)
    plt.close(figure)
    print(f"wrote docs/{name}.png")


def draw(args: Args, curves: dict[str, dict[int, Curve]]) -> None:
    """A thin line a seed, and the mean over seeds, as far as all seeds go."""
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for i, (variant, seeds) in enumerate(curves.items()):
        for frames, solved in seeds.values():
            axis.plot(frames / 1e6, solved, color=f"C{i}", alpha=0.25, linewidth=0.8)
        grid = np.linspace(max(f[0] for f, _ in seeds.values()), min(f[-1] for f, _ in seeds.values()), 100)
        shares = np.array([np.interp(grid, *curve) for curve in seeds.values()])  # (seeds, 100)
        draw_mean(axis, grid / 1e6, shares, f"{variant} (seeds: {len(seeds)})", color=f"C{i}")
    axis.set(xlabel="million frames", ylabel="new levels solved", ylim=(0, 1), title=args.title)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    save(figure, args.study)


def main(args: Args) -> None:
    curves, held_out = read_curves(args.study)
    rows = table(args, curves, held_out)
    for row in rows:
        show(row)
    write_rows(rows, f"{args.study}_table.csv")
    draw(args, curves)


if __name__ == "__main__":
    main(tyro.cli(Args))
