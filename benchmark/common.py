"""What the benchmarks share: CSV files in and out, intervals, and the machine."""

import csv
import math
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results"
sys.path.insert(0, str(ROOT))  # whoever imports this module can import the scripts
# Two-sided 95 % quantiles of Student's t, by degrees of freedom
STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
STUDENT |= dict(enumerate((2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093), 10))


def read_rows(path: pathlib.Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_runs(study: str) -> dict[str, dict[int, list[dict[str, float]]]]:
    """By variant and seed: the rows of benchmark/results/STUDY.csv, without what is empty in them."""
    runs: dict[str, dict[int, list[dict[str, float]]]] = {}
    for row in read_rows(RESULTS / f"{study}.csv"):
        numbers = {name: float(x) for name, x in row.items() if x and name not in ("study", "variant")}
        runs.setdefault(row["variant"], {}).setdefault(int(row["seed"]), []).append(numbers)
    return runs


def write_rows(rows: Iterable[dict[str, Any]], name: str) -> None:
    """The rows as benchmark/results/`name`, with every column that one of them has; never leaves half a file."""
    rows, target = list(rows), RESULTS / name
    temporary = target.with_name(target.name + ".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, target)
    print(f"wrote benchmark/results/{name}")


def show(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row, and hand it back."""
    print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    return row


def hardware() -> str:
    return f"{platform.processor() or platform.machine()}, one thread, torch {version('torch')}"


def rates(work: Callable[[], int], seconds: float, repeats: int) -> dict[str, float]:
    """How much `work` does in a second of the processor, after a warm-up: the best and the median of some measurements.

    Each takes `seconds` or one call; a call returns how much it did.
    """
    work()
    found = []
    for _ in range(repeats):
        done, start = 0, time.process_time()
        while (elapsed := time.process_time() - start) < seconds or not done:
            done += work()
        found.append(done / elapsed)
    return {"best": max(found), "median": statistics.median(found)}


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean (Student's t); nan for a single value."""
    if len(values) < 2:
        return math.nan
    n, z = len(values) - 1, 1.959964
    # beyond the table: Cornish and Fisher's expansion about the normal quantile
    t = STUDENT.get(n) or z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    return t * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and the ends of its 95 % interval."""
    mean, half = float(np.mean(values)), half_interval(values)
    return mean, mean - half, mean + half


def geometric(values: Sequence[float]) -> tuple[float, float, float]:
    """The geometric mean, and the ends of its 95 % interval (Student's t on the logarithms)."""
    mean, low, high = np.exp(interval(np.log(values)))
    return mean, low, high


def columns(name: str, numbers: tuple[float, float, float], digits: str = ".5g") -> dict[str, str]:
    """A mean and the ends of its interval as columns `name`, `name`_low and `name`_high."""
    mean, low, high = (f"{x:{digits}}" for x in numbers)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def steps_to(points: Sequence[tuple[float, float]], goal: float) -> tuple[float, bool]:
    """Of (steps, return): the steps to the first return at the goal, or all steps; and whether there is one."""
    for steps, value in points:
        if value >= goal:
            return steps, True
    return points[-1][0], False


def wilson(share: float, number: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of `number` trials."""
    centre = share + z * z / (2 * number)
    half = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number**2))
    return max(0.0, (centre - half) / (1 + z * z / number)), min(1.0, (centre + half) / (1 + z * z / number))
