"""Statistics of generated Sokoban levels, beside those of DeepMind's Boxoban levels.

    python benchmark/level_statistics.py                                          # 5,000 generated levels
    python benchmark/level_statistics.py --boxoban PATH/unfiltered/train PATH/medium/valid
    python benchmark/level_statistics.py --size 7 --num-boxes 1 --num-levels 2000 --output statistics_7x7.csv

The column `reference` holds what 20,000 levels of Boxoban's unfiltered-train gave; for 10x10 levels with 4 boxes
`within` is how far a generator may be from it, and whether the generated levels are.

Shapes: `L` levels, `H, W` board, `K` boxes.
"""

import pathlib
import sys
import time
from dataclasses import dataclass

import numpy as np
import tyro
from common import ROOT, write_rows

sys.path.insert(0, str(ROOT))
from sokoban_env import BOX, BOX_ON_TARGET, PLAYER, PLAYER_ON_TARGET, TARGET, WALL, generate_levels, load_levels

MAX_MATCHED = 10  # boxes up to which they are matched to targets: the work doubles with each
CHUNK = 5000  # levels worked on at once, which bounds the memory
# statistic: value on DeepMind's levels, and how far off a generator may be (None: no band)
REFERENCE: dict[str, tuple[float, float | None]] = {
    "floor_cells_mean": (31.7, 1.5),
    "floor_cells_sd": (6.5, 1.0),
    "floor_cells_min": (12, None),
    "floor_cells_max": (52, None),
    "interior_floor_share": (0.495, None),
    "nearest_target_mean": (1.95, 0.1),
    "nearest_target_sd": (1.06, None),
    "nearest_target_1": (0.42, None),
    "nearest_target_2": (0.34, None),
    "nearest_target_3": (0.16, None),
    "nearest_target_4": (0.06, None),
    "nearest_target_5_or_more": (0.03, None),
    "matching_sum_mean": (10.6, 0.7),
    "matching_sum_sd": (3.5, None),
    "player_to_nearest_box": (1.73, None),
    "reachable_share": (0.65, None),
    "fully_reachable_share": (0.51, 0.05),
    "legal_first_pushes": (7.1, 0.7),
    "levels_with_a_push": (1, 0),
    "dead_floor_share": (0.33, None),
    "boxes_with_0_walls": (0.57, None),
    "boxes_with_1_wall": (0.41, None),
    "boxes_with_2_walls": (0.02, None),
    "boxes_on_target": (0, 0),
    "connected_levels": (1, 0),
    "duplicates": (0, 0),
    "player_rank_mean": (0.5, None),
}


@dataclass
class Args:
    boxoban: tuple[str, ...] = ()  # files or folders of levels (Boxoban or XSB) to print beside the generated ones
    num_levels: int = 5000  # how many levels to generate
    size: int | tuple[int, int] = 10  # board size of generated levels, one number or height and width
    num_boxes: int = 4  # boxes of generated levels
    seed: int = 1  # seed of generated levels
    output: str = "level_statistics.csv"  # the table's name under benchmark/results


def level_statistics(levels: np.ndarray, solutions: list[str] = ()) -> dict[str, float]:
    """What the levels (L, H, W), uint8 cells of `sokoban_env`, look like on average; with their solutions' lengths.

    Floor cells are all that are not wall. Distances are Manhattan's, between a box and a target of its level, or the
    player and a box. `matching_sum` is that of the cheapest assignment of all boxes to targets (nan above 10 boxes).
    `reachable_share` is the share of the cells without wall or box that the player can walk to at the start. A dead
    cell is floor from which a box could not be pushed to any target even if it were alone. `player_rank` says where
    among its reachable cells, in reading order, the player stands: 0 to 1, on average .5 if it is uniform.
    """
    chunks = [_measure(levels[i : i + CHUNK]) for i in range(0, len(levels), CHUNK)]
    values = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    floor, near, matching, walls = (values[name] for name in ("floor", "near", "matching", "walls"))
    interior = (levels.shape[1] - 2) * (levels.shape[2] - 2)
    statistics = {
        "floor_cells_mean": floor.mean(),
        "floor_cells_sd": floor.std(),
        "floor_cells_min": floor.min(),
        "floor_cells_max": floor.max(),
        "interior_floor_share": floor.mean() / interior,
        "nearest_target_mean": near.mean(),
        "nearest_target_sd": near.std(),
        **{f"nearest_target_{i}": (near == i).mean() for i in range(1, 5)},
        "nearest_target_5_or_more": (near >= 5).mean(),
        "matching_sum_mean": matching.mean(),
        "matching_sum_sd": matching.std(),
        "player_to_nearest_box": values["player_to_box"].mean(),
        "reachable_share": values["reachable"].mean(),
        "fully_reachable_share": (values["reachable"] == 1).mean(),
        "legal_first_pushes": values["pushes"].mean(),
        "levels_with_a_push": (values["pushes"] > 0).mean(),
        "dead_floor_share": values["dead"].sum() / floor.sum(),
        "boxes_with_0_walls": (walls == 0).mean(),
        "boxes_with_1_wall": (walls == 1).mean(),
        "boxes_with_2_walls": (walls == 2).mean(),
        "boxes_on_target": values["on_target"].mean(),
        "connected_levels": values["connected"].mean(),
        "duplicates": 1 - len({level.tobytes() for level in levels}) / len(levels),
        "player_rank_mean": values["player_rank"].mean(),
        "player_rank_sd": values["player_rank"].std(),  # uniform: near 1 / sqrt(12), less in small regions
    }
    if solutions:
        lengths = np.array([len(solution) for solution in solutions])
        statistics |= {"solution_length_mean": lengths.mean(), "solution_length_max": lengths.max()}
    return {name: float(value) for name, value in statistics.items()}


def _measure(levels: np.ndarray) -> dict[str, np.ndarray]:
    """The quantities of each level, (L,), or of each box, (L * K,)."""
    num, height, width = levels.shape
    open_ = levels != WALL
    is_box = (levels == BOX) | (levels == BOX_ON_TARGET)
    is_target = (levels == TARGET) | (levels == BOX_ON_TARGET) | (levels == PLAYER_ON_TARGET)
    is_player = levels >= PLAYER
    free = open_ & ~is_box
    floor, num_boxes = open_.sum((1, 2)), is_box.sum((1, 2))  # (L,)
    box, target, player = _positions(is_box), _positions(is_target), _positions(is_player)  # (L, K), -1 where missing
    real = box >= 0  # levels may have fewer boxes than others
    distance = _distance(box[:, :, None], target[:, None, :], width)  # (L, K, K), box by target
    far = height + width
    distance = np.where(real[:, :, None] == real[:, None, :], distance * real[:, :, None], far * far)
    to_box = np.where(real, _distance(player, box, width), far)  # (L, K)

    reached = _flood(free, is_player)
    whole = _flood(open_, is_player)
    pushes = np.zeros(num, dtype=np.int64)
    walls = np.zeros(levels.shape, dtype=np.int64)
    for axis in (1, 2):
        for sign in (-1, 1):  # the player behind the box, a free cell before it; walls on the border stop the roll
            pushes += (is_box & np.roll(reached, sign, axis) & np.roll(free, -sign, axis)).sum((1, 2))
            walls += np.roll(~open_, sign, axis)

    # Cells from which a lone box gets to a target, by pulling boxes off the targets to wherever they go.
    live = is_target
    while True:
        grown = live.copy()
        for axis in (1, 2):
            for sign in (-1, 1):  # from p to p + sign, while the player steps from there to p + 2 sign
                grown |= np.roll(live, sign, axis) & open_ & np.roll(open_, -sign, axis)
        if (grown == live).all():
            break
        live = grown

    before = reached.reshape(num, -1) & (np.arange(height * width) < player)  # reached cells above the player
    return {
        "floor": floor,
        "near": distance.min(2)[real],
        "matching": _matching(distance),
        "player_to_box": to_box.min(1),
        "reachable": reached.sum((1, 2)) / (floor - num_boxes),
        "pushes": pushes,
        "dead": (open_ & ~live).sum((1, 2)),
        "walls": walls[is_box],
        "on_target": (levels == BOX_ON_TARGET)[is_box],
        "connected": (whole == open_).all((1, 2)),
        "player_rank": (before.sum(1) + 0.5) / reached.sum((1, 2)),
    }


def _positions(mask: np.ndarray) -> np.ndarray:
    """Where a mask (L, H, W) is True, as cell numbers (L, most per level), filled up with -1."""
    flat = mask.reshape(len(mask), -1)
    row, cell = np.nonzero(flat)
    count = flat.sum(1)
    positions = np.full((len(mask), count.max()), -1)
    positions[row, np.arange(len(row)) - np.repeat(count.cumsum() - count, count)] = cell
    return positions


def _distance(a: np.ndarray, b: np.ndarray, width: int) -> np.ndarray:
    return abs(a // width - b // width) + abs(a % width - b % width)


def _flood(free: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The cells of `free` (L, H, W) that can be walked to from `start` (L, H, W); borders are not free."""
    reached = start & free
    while True:
        grown = reached.copy()
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown[:, :, 1:] |= reached[:, :, :-1]
        grown[:, :, :-1] |= reached[:, :, 1:]
        grown &= free
        if (grown == reached).all():
            return reached
        reached = grown


def _matching(distance: np.ndarray) -> np.ndarray:
    """Cost (L,) of the cheapest assignment in distance (L, K, K), over sets of targets taken by the first boxes."""
    num, num_boxes, _ = distance.shape
    if num_boxes > MAX_MATCHED:
        return np.full(num, np.nan)
    cost = np.full((2**num_boxes, num), np.iinfo(np.int64).max // 2)
    cost[0] = 0
    for taken in range(1, 2**num_boxes):
        box = taken.bit_count() - 1
        for target in range(num_boxes):
            if taken >> target & 1:
                cost[taken] = np.minimum(cost[taken], cost[taken ^ 1 << target] + distance[:, box, target])
    return cost[-1]


def main(args: Args) -> None:
    start = time.perf_counter()
    folders = [load_levels(path).numpy() for path in args.boxoban]  # before the slow part, for its errors
    levels, solutions = generate_levels(args.num_levels, size=args.size, num_boxes=args.num_boxes, seed=args.seed)
    height, width = levels.shape[1:]
    generated = level_statistics(levels.numpy(), solutions)
    columns = {f"generated {height}x{width}, {args.num_boxes} boxes": generated}
    for path, boards in zip(args.boxoban, folders, strict=True):
        name = "/".join(pathlib.Path(path).resolve().parts[-2:])
        columns[f"{name} ({len(boards)} levels)"] = level_statistics(boards)
    comparable = (height, width, args.num_boxes) == (10, 10, 4)
    rows = []
    for name in generated:
        value, band = REFERENCE.get(name, ("", None))
        row = {"statistic": name} | {title: f"{column.get(name, np.nan):.4g}" for title, column in columns.items()}
        row |= {"reference": value, "within": ""}
        if comparable and band is not None:
            row["within"] = f"±{band:g}: {'yes' if abs(generated[name] - value) <= band else 'NO'}"
        rows.append(row)
        print("  ".join(str(text).ljust(24) for text in row.values()).rstrip())
    write_rows(rows, args.output)
    print(f"after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Args))
