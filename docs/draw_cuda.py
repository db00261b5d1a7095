"""Draws the pictures of cuda_design.md: python docs/draw_cuda.py [FOLDER]

cuda_blocks.png    which rows of U and of the batch a block of the fused kernel has
cuda_mailbox.png   which units and rows a block of the persistent kernel has, and how h travels between blocks
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")


def blocks() -> plt.Figure:
    """H 64 and 20 rows: four blocks along the units; sixteen rows and more take tiles of 64."""
    figure, (of_u, of_h) = plt.subplots(1, 2, figsize=(9, 4.2), gridspec_kw={"width_ratios": (3, 2)})
    hidden, units, rows = 64, 16, 20
    for gate, name in enumerate("ifgo"):
        for block in range(hidden // units):
            at = gate * hidden + block * units
            of_u.add_patch(Rectangle((0, at), hidden, units, color=COLOURS[block], ec="white"))
            of_u.text(hidden / 2, at + units / 2, f"block {block}", ha="center", va="center", color="white")
        of_u.text(-3, gate * hidden + hidden / 2, f"gate {name}", ha="right", va="center")
    of_u.set(xlim=(-16, hidden), ylim=(4 * hidden, 0), title="rows of U, (4H, H) as it lies: H = 64")
    for block in range(hidden // units):
        of_h.add_patch(Rectangle((block * units, 0), units, rows, color=COLOURS[block], ec="white"))
        of_h.text(block * units + units / 2, rows / 2, f"block {block}", ha="center", va="center",
                  color="white", rotation=90)  # fmt: skip
    of_h.set(xlim=(0, hidden), ylim=(rows, -1), title=f"cells of h_t, ({rows}, H)")
    of_h.set(xlabel="units", ylabel="rows of the batch")
    of_h.set_yticks(range(0, rows + 1, 4))
    for axes in (of_u, of_h):
        for side in axes.spines.values():
            side.set_visible(False)
    of_u.set_xticks([])
    of_u.set_yticks([])
    figure.tight_layout()
    return figure


def mailbox() -> plt.Figure:
    """In 16 bits, and small: four blocks of 16 units in a group; two groups take tiles of 8 rows by turns, as they do
    with H above 512."""
    figure, (of_cells, of_step) = plt.subplots(1, 2, figsize=(10, 4.2), gridspec_kw={"width_ratios": (2, 3)})
    hidden, units, rows, height = 64, 16, 20, 8
    for tile in range(-(-rows // height)):
        for place in range(hidden // units):
            block = tile % 2 * 4 + place
            deep = min(height, rows - tile * height)
            of_cells.add_patch(
                Rectangle((place * units, tile * height), units, deep, color=COLOURS[block], ec="white")
            )
            of_cells.text(place * units + units / 2, tile * height + deep / 2, f"block {block}", ha="center",
                          va="center", color="white", fontsize=8)  # fmt: skip
    of_cells.set(xlim=(0, hidden), ylim=(rows, -1), title=f"cells of h_t, ({rows}, H), in every step")
    of_cells.set(xlabel="units", ylabel="rows of the batch")
    of_cells.set_xticks(range(0, hidden + 1, units))
    of_cells.set_yticks(range(0, rows + 1, 4))
    for side in of_cells.spines.values():
        side.set_visible(False)
    # Two steps of one group.
    for step in range(2):
        for place in range(4):
            x, y = 4.6 * step, 3 - place
            of_step.add_patch(Rectangle((x, y + 0.15), 1.6, 0.7, color=COLOURS[place], ec="white"))
            of_step.text(x + 0.8, y + 0.5, f"block {place}\nU in registers", ha="center", va="center",
                         color="white", fontsize=8)  # fmt: skip
    slot = 2.7
    for place in range(4):
        y = 3 - place
        of_step.add_patch(Rectangle((slot, y + 0.15), 0.8, 0.7, color=COLOURS[place], alpha=0.5, ec="black"))
        of_step.text(slot + 0.4, y + 0.5, "h_t\n16 units", ha="center", va="center", fontsize=7)
        arrow = {"arrowstyle": "-|>", "mutation_scale": 9, "color": COLOURS[place], "lw": 1.4}
        of_step.add_patch(FancyArrowPatch((1.6, y + 0.5), (slot, y + 0.5), **arrow))
        for reader in range(4):
            of_step.add_patch(
                FancyArrowPatch(
                    (slot + 0.8, y + 0.5), (4.6, 3.5 - reader), arrowstyle="-", color=COLOURS[place], lw=0.8
                )
            )
    of_step.text(0.8, 4.15, "step t", ha="center")
    of_step.text(slot + 0.4, 4.15, "slot t of the\nmailbox", ha="center", fontsize=8)
    of_step.text(5.4, 4.15, "step t + 1", ha="center")
    of_step.text(2.1, -0.35, "written once", ha="center", fontsize=8)
    of_step.text(4.1, -0.35, "polled by all", ha="center", fontsize=8)
    of_step.set(xlim=(-0.2, 6.4), ylim=(-0.6, 4.8))
    of_step.set_axis_off()
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else __file__).resolve()
    for draw in (blocks, mailbox):
        path = (folder if folder.is_dir() else folder.parent) / f"cuda_{draw.__name__}.png"
        draw().savefig(path, dpi=110)
        print(path)
