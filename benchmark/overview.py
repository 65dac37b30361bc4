"""Draw how the seven algorithms relate: docs/overview.png, at the head of the reading guide.

python benchmark/overview.py
"""

import matplotlib.pyplot as plt
from common import ROOT
from matplotlib.patches import FancyBboxPatch

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
    figure, axis = plt.subplots(figsize=(10, 9.2))
    width, height, left, step = 2.75, 0.72, 2.7, 1.15
    for column, title in enumerate(COLUMNS):
        axis.text(left + 3 * column + width / 2, 0.72, title, ha="center", fontsize=12, weight="bold")
    for row, (script, cells) in enumerate(ROWS.items()):
        y = -step * row
        axis.text(0, y, script, va="center", family="monospace", fontsize=9.5)
        for column, text in enumerate(cells):
            if text:
                corner = (left + 3 * column, y - height / 2)
                box = FancyBboxPatch(
                    corner, width, height, "round,pad=0.02", facecolor=COLOURS[column], edgecolor="gray"
                )
                axis.add_patch(box)
                axis.text(corner[0] + width / 2, y, text, ha="center", va="center", fontsize=9)
    for (row, column), (to_row, to_column), text in ARROWS:
        start = (left + 3 * column + width / 2, -step * row - height / 2 - 0.03)
        end = (left + 3 * to_column + width / 2, -step * to_row + height / 2 + 0.03)
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "dimgray"})
        axis.text(start[0] + 0.1, (start[1] + end[1]) / 2, text, va="center", fontsize=8, color="dimgray")
    axis.set(xlim=(-0.1, left + 9.1), ylim=(-step * len(ROWS) + 0.45, 1.0))
    axis.axis("off")
    figure.savefig(ROOT / "docs" / "overview.png", dpi=90, bbox_inches="tight")
    print("wrote docs/overview.png")


if __name__ == "__main__":
    main()
