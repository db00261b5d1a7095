"""Draws tile.svg, the picture of design.md: python docs/draw_tile.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

GATES = ["i", "f", "g", "o"]
COLORS = ["#4477aa", "#66aa77", "#cc9944", "#aa5566"]
ROWS, LANES = 6, 4  # lanes drawn; on AVX-512 there are 16 floats in a register
CELL, GAP = 0.34, 0.16
WIDTH = LANES * CELL + GAP  # of one gate's registers
INK = "#222222"
plt.rcParams.update({"font.family": "DejaVu Sans", "svg.fonttype": "path", "svg.hashsalt": "lstm_ext"})


def registers(axes, x, y, rows, alpha, strong_row=None):
    """`rows` rows of four registers, one per gate, LANES units each."""
    for row in range(rows):
        for gate in range(4):
            for lane in range(LANES):
                axes.add_patch(
                    Rectangle(
                        (x + gate * WIDTH + lane * CELL, y - (row + 1) * CELL * 1.25), CELL, CELL,
                        facecolor=COLORS[gate], alpha=0.8 if row == strong_row else alpha,
                        edgecolor="white", linewidth=0.8,
                    )
                )  # fmt: skip


def arrow(axes, start, end, **style):
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.3, **style})


def main() -> None:
    figure, axes = plt.subplots(figsize=(13, 6))
    axes.set_xlim(0, 17.8)
    axes.set_ylim(-0.2, 7.6)
    axes.set_aspect("equal")
    axes.axis("off")
    text = {"color": INK, "fontsize": 10, "va": "center"}
    small = {**text, "fontsize": 8.8}
    step = CELL * 1.25

    # weights: a panel, one line per k
    px, py, depth = 4.1, 6.75, 4
    axes.text(px, py + 0.62, "panel of U, packed: for each k the four gates of the same W units", **text)
    registers(axes, px, py, depth, 0.4, strong_row=2)
    for k in range(depth):
        label = ["k = 0", "1", "2", "…"][k]
        axes.text(px - 0.18, py - (k + 0.6) * step, label, ha="right", **small)
    for gate in range(4):
        axes.text(px + gate * WIDTH + LANES * CELL / 2, py + 0.2, GATES[gate], ha="center",
                  color=COLORS[gate], fontsize=12, weight="bold", va="center")  # fmt: skip

    # activations: R rows, k along
    tx, ty = px, 3.75
    axes.text(0.15, ty + 0.42, "R rows of the batch", **text)
    for row in range(ROWS):
        for k in range(6):
            axes.add_patch(
                Rectangle((0.15 + k * CELL * 1.1, ty - (row + 1) * step), CELL, CELL, facecolor="#888888",
                          alpha=0.75 if k == 2 else 0.3, edgecolor="white", linewidth=0.8)
            )  # fmt: skip
    axes.text(0.15, ty - ROWS * step - 0.32, "$h_{t-1}$ , k from left to right", **small)
    arrow(axes, (2.5, ty - ROWS * step / 2), (tx - 0.2, ty - ROWS * step / 2))
    axes.text(
        (2.5 + tx - 0.2) / 2, ty - ROWS * step / 2 + 0.42, "one number,\nbroadcast", ha="center", **small
    )

    # the tile
    registers(axes, tx, ty, ROWS, 0.95)
    axes.add_patch(
        FancyBboxPatch((tx - 0.08, ty - ROWS * step - 0.06), 4 * WIDTH - GAP + 0.16, ROWS * step + 0.08,
                       boxstyle="round,pad=0.04", fill=False, edgecolor=INK, linewidth=1.3)
    )  # fmt: skip
    middle = tx + (4 * WIDTH - GAP) / 2
    arrow(axes, (middle, py - depth * step - 0.05), (middle, ty + 0.16))
    axes.text(middle + 0.15, (py - depth * step + ty + 0.1) / 2, "for each k: multiply and add", **small)
    axes.text(tx, ty - ROWS * step - 0.34, "the tile: R × 4 registers; at its end, + $W x_t + b$", **text)

    # one lane of one row, followed into the cell update
    row = 2
    y = ty - (row + 1) * step
    for gate in range(4):
        axes.add_patch(
            Rectangle((tx + gate * WIDTH + CELL, y), CELL, CELL, fill=False, edgecolor="black", linewidth=2.0)
        )
    ex, ey = 12.1, ty - ROWS * step / 2
    arrow(axes, (tx + 4 * WIDTH - GAP + 0.15, ey), (ex - 0.2, ey))
    axes.text(
        (tx + 4 * WIDTH + ex - 0.2) / 2, ey + 0.42, "same registers,\nsame thread", ha="center", **small
    )
    axes.add_patch(
        FancyBboxPatch((ex, ey - 1.3), 5.4, 2.6, boxstyle="round,pad=0.05", facecolor="#f4f4f0",
                       edgecolor=INK, linewidth=1.0)
    )  # fmt: skip
    lines = [
        "cell update, W units at once",
        r"$i, f, o = \sigma(\cdot)$      $g = \tanh(\cdot)$",
        r"$c_t = f \odot c_{t-1} + i \odot g$",
        r"$h_t = o \odot \tanh(c_t)$",
    ]
    for n, line in enumerate(lines):
        axes.text(ex + 0.2, ey + 0.93 - n * 0.62, line, **(text if n == 0 else {**text, "fontsize": 11.5}))
    axes.text(ex, ey - 1.72, "written: $c_t$, $h_t$; in training also i, f, g, o", **small)

    axes.text(
        0.15, 0.2,
        "AVX-512: R = 6, W = 16 (float32), 24 of 32 registers.    AVX2: R = 3, W = 8, 12 of 16.    "
        "Drawn: R = 6, W = 4.",
        **small,
    )  # fmt: skip
    path = Path(__file__).with_name("tile.svg")
    figure.savefig(path, bbox_inches="tight", pad_inches=0.08, metadata={"Date": None})


if __name__ == "__main__":
    main()
