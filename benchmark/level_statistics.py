"""Statistics of generated Sokoban levels, beside those of DeepMind's Boxoban levels: 10x10 with four boxes.

    python benchmark/level_statistics.py                                   # 5,000 generated levels
    python benchmark/level_statistics.py --boxoban PATH/unfiltered/train   # beside them those of a file or folder

Shapes: `L` levels, `H, W` board, `K` boxes.
"""

import itertools
import pathlib

import numpy as np
import tyro
from common import show, write_rows

from sokoban_env import BOX, BOX_ON_TARGET, PLAYER, PLAYER_ON_TARGET, TARGET, WALL, generate_levels, load_levels


def level_statistics(levels: np.ndarray) -> dict[str, float]:
    """What levels (L, H, W), uint8 cells of `sokoban_env` with K boxes each, look like on average.

    Floor is all that isn't wall. Distances are Manhattan's, between a box and a target of its level; `matching_sum` is
    that of the cheapest assignment of all boxes to targets. In a fully reachable level the player can walk to every
    cell without wall or box at the start.
    """
    width = levels.shape[2]
    floor = levels != WALL
    is_box = (levels == BOX) | (levels == BOX_ON_TARGET)
    is_target = (levels == TARGET) | (levels == BOX_ON_TARGET) | (levels == PLAYER_ON_TARGET)
    free = floor & ~is_box
    box, target = (np.nonzero(x.reshape(len(x), -1))[1].reshape(len(x), -1) for x in (is_box, is_target))  # (L, K)
    rows = abs(box[:, :, None] // width - target[:, None] // width)
    distance = rows + abs(box[:, :, None] % width - target[:, None] % width)  # (L, K, K), box by target
    K = box.shape[1]
    assignments = [distance[:, range(K), order].sum(1) for order in itertools.permutations(range(K))]
    reached = flood(free, levels >= PLAYER)
    pushes = np.zeros(len(levels))
    for axis in (1, 2):
        for sign in (-1, 1):  # the player behind the box, a free cell before it; walls on the border stop the roll
            pushes += (is_box & np.roll(reached, sign, axis) & np.roll(free, -sign, axis)).sum((1, 2))
    return {
        "floor_cells_mean": floor.sum((1, 2)).mean(),
        "floor_cells_sd": floor.sum((1, 2)).std(),
        "nearest_target_mean": distance.min(2).mean(),
        "matching_sum_mean": np.min(assignments, 0).mean(),
        "fully_reachable_share": (reached == free).all((1, 2)).mean(),
        "legal_first_pushes": pushes.mean(),
        "levels_with_a_push": (pushes > 0).mean(),
        "boxes_on_target": (levels[is_box] == BOX_ON_TARGET).mean(),
        "connected_levels": (flood(floor, levels >= PLAYER) == floor).all((1, 2)).mean(),
        "duplicates": 1 - len(np.unique(levels, axis=0)) / len(levels),
    }


def flood(free: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The cells of `free` (L, H, W) that can be walked to from `start` (L, H, W); borders are not free."""
    reached = start & free
    while True:
        grown = reached.copy()
        for axis in (1, 2):
            grown |= np.roll(reached, 1, axis) | np.roll(reached, -1, axis)
        grown &= free
        if (grown == reached).all():
            return reached
        reached = grown


def main(boxoban: tuple[str, ...] = (), num_levels: int = 5000) -> None:
    levels, solutions = generate_levels(num_levels, size=10, num_boxes=4, seed=1)
    columns = {"generated 10x10, 4 boxes": level_statistics(levels.numpy())}
    for path in map(pathlib.Path, boxoban):
        boards = load_levels(str(path)).numpy()
        columns[f"{path.parent.name}-{path.name} ({len(boards)} levels)"] = level_statistics(boards)
    rows = []
    for name in columns["generated 10x10, 4 boxes"]:
        row = {"statistic": name} | {title: f"{column[name]:.4g}" for title, column in columns.items()}
        rows.append(show(row))
    print(f"moves of a solution, mean: {np.mean([len(solution) for solution in solutions]):.4g}")
    write_rows(rows, "level_statistics.csv")


if __name__ == "__main__":
    tyro.cli(main)
