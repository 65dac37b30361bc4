"""The table of Distral on Sokoban, from benchmark/results/STUDY.csv: benchmark/results/STUDY_summary.csv.

    python benchmark/distral_sokoban.py                                    # distral
    python benchmark/distral_sokoban.py --study distral_first_edition      # 400,000 frames, networks see the board

A row a variant: shares of levels solved, with 95 % intervals (Student's t over seeds), and the differences to the other
variants in the share that the π_i solve, seed by seed.
"""

from typing import Any

import numpy as np
import tyro
from common import half_interval, read_runs, show, write_rows

METRICS = ("solved", "distilled", "held_out")
OTHERS = ("two-column", "multitask", "independent")


def share(name: str, values: list[float]) -> dict[str, str]:
    return {name: f"{np.mean(values):.4f}", f"{name}_half": f"{half_interval(values):.4f}"}


def main(study: str = "distral") -> None:
    runs = read_runs(study)
    last = {variant: {seed: rows[-1] for seed, rows in seeds.items()} for variant, seeds in runs.items()}
    table = []
    for variant, seeds in last.items():
        row: dict[str, Any] = {"variant": variant, "seeds": len(seeds)}
        for name in METRICS:
            values = [run[f"eval/{name}"] for run in seeds.values() if f"eval/{name}" in run]
            if values:  # independent learners have no π_0
                row |= share(name, values)
        for other in OTHERS:
            if other in last and other != variant:
                pairs = [run["eval/solved"] - last[other][seed]["eval/solved"] for seed, run in seeds.items()]
                row |= share(f"minus_{other}", pairs)
        table.append(show(row))
    write_rows(table, f"{study}_summary.csv")


if __name__ == "__main__":
    tyro.cli(main)
