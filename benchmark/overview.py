"""Draw how the seven algorithms relate: docs/overview.png, at the head of the reading guide.

python benchmark/overview.py
"""

import tyro
from curves import plt, save

COLUMNS = ("what is learned", "what is imagined", "what is distilled")
COLOURS = ("#d6e6f4", "#fde3c4", "#dcefd5")
# script: what stands in each column
ROWS = {
    "dyna_q.py": ("a table $Q(s, a)$\nand a table $M(s, a)$", "one step, from a state\nwhere it has been", ""),
    "dyna_dqn.py": ("networks for $Q$ and $M$", "one or a few steps,\nfrom the replay buffer", ""),
    "world_model_rollouts.py": (
        "an ensemble of networks,\nor a Gaussian process",
        "whole trajectories: all\nthat the policy trains on",
        "",
    ),
    "i2a.py": (
        "a model of the board,\nand what to make of it",
        "one rollout for each action,\nas an input of the policy",
        r"the agent $\pi$ into a small $\hat\pi$" + "\nthat acts in imagination",
    ),
    "distillation.py": ("a teacher", "", "the teacher into students\nof any size"),
    "distral_tabular.py": (
        "$Q_i$ of each task, tables",
        "",
        r"all $\pi_i$ into one $\pi_0$," + "\nwhich pulls them back",
    ),
    "distral.py": (
        "$\\pi_i$ and $V_i$ of each task,\nnetworks",
        "",
        r"all $\pi_i$ into one $\pi_0$," + "\nwhich pulls them back",
    ),
}
# (row, column) to (row, column): what the second takes over from the first
ARROWS = [
    ((0, 0), (1, 0), "tables become networks"),
    ((1, 1), (2, 1), "steps become trajectories"),
    ((2, 1), (3, 1), "trust becomes learned"),
    ((3, 2), (4, 2), r"where $\hat\pi$ comes from"),
    ((4, 2), (5, 2), "the student teaches"),
    ((5, 0), (6, 0), "tables become networks"),
]


def main() -> None:
    figure, axis = plt.subplots(figsize=(9.5, 8))
    left, step = 4.1, 1.15  # the middle of the first column; from row to row
    for column, title in enumerate(COLUMNS):
        axis.text(left + 3 * column, 0.72, title, ha="center", fontsize=12, weight="bold")
    for row, (script, cells) in enumerate(ROWS.items()):
        axis.text(0, -step * row, script, va="center", family="monospace", fontsize=9.5)
        for column, text in enumerate(cells):
            if text:
                box = {"boxstyle": "round,pad=0.6", "facecolor": COLOURS[column], "edgecolor": "gray"}
                axis.text(left + 3 * column, -step * row, text, ha="center", va="center", fontsize=9, bbox=box)
    for (row, column), (to_row, to_column), text in ARROWS:
        start = (left + 3 * column, -step * row - 0.32)
        end = (left + 3 * to_column, -step * to_row + 0.32)
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "dimgray"})
        axis.text(start[0] + 0.1, (start[1] + end[1]) / 2, text, va="center", fontsize=8, color="dimgray")
    axis.set(xlim=(-0.1, left + 7.6), ylim=(-step * len(ROWS) + 0.45, 1.0))
    axis.axis("off")
    save(figure, "overview")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
