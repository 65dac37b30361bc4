"""The table of Distral on Sokoban, from benchmark/results/STUDY.csv: benchmark/results/STUDY_summary.csv.

    python benchmark/distral_sokoban.py                                    # distral
    python benchmark/distral_sokoban.py --study distral_first_edition      # 400,000 frames, networks see the board

A row a variant: shares of levels solved, with 95 % intervals (Student's t over seeds), and the differences to the other
variants in the share that the π_i solve, seed by seed.
"""

from typing import Any

import numpy as np
import tyro
from common import RESULTS, half_interval, read_rows, write_rows

COLUMNS = {"solved": "eval/solved", "distilled": "eval/distilled", "held_out": "eval/held_out"}
OTHERS = ("two-column", "multitask", "independent")


def interval(values: list[float]) -> tuple[str, str]:
    return f"{np.mean(values):.4f}", f"{half_interval(values):.4f}"


def read_runs(study: str) -> dict[str, dict[str, dict[str, float]]]:
    """By variant and seed: the last evaluation, and means over all rows of the training."""
    rows: dict[str, dict[str, list[dict[str, float]]]] = {}
    for row in read_rows(RESULTS / f"{study}.csv"):
        numbers = {k: float(v) for k, v in row.items() if v and k not in ("study", "variant")}
        rows.setdefault(row["variant"], {}).setdefault(row["seed"], []).append(numbers)
    runs: dict[str, dict[str, dict[str, float]]] = {}
    for variant, seeds in rows.items():
        for seed, run in seeds.items():
            if "eval/solved" in run[-1]:  # finished
                last = {name: run[-1][column] for name, column in COLUMNS.items() if column in run[-1]}
                last["training"] = float(np.mean([r["charts/solved"] for r in run if "charts/solved" in r]))
                last["kl_to_pi_0"] = run[-2]["losses/kl_to_pi_0"]
                last["frames"] = run[-1]["global_step"]
                runs.setdefault(variant, {})[seed] = last
    return runs


def main(study: str = "distral") -> None:
    runs, table = read_runs(study), []
    for variant, seeds in runs.items():
        row: dict[str, Any] = {"variant": variant, "seeds": len(seeds)}
        row["frames"] = int(next(iter(seeds.values()))["frames"])
        for name in ("training", *COLUMNS):
            if all(name in run for run in seeds.values()):
                row[name], row[f"{name}_half"] = interval([run[name] for run in seeds.values()])
        row["kl_to_pi_0"] = f"{np.mean([run['kl_to_pi_0'] for run in seeds.values()]):.4f}"
        for other in OTHERS:
            pairs = [run["solved"] - runs[other][s]["solved"] for s, run in seeds.items() if s in runs.get(other, {})]
            if pairs and other != variant:
                row[f"minus_{other}"], row[f"minus_{other}_half"] = interval(pairs)
        table.append(row)
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    write_rows(table, f"{study}_summary.csv")


if __name__ == "__main__":
    tyro.cli(main)
