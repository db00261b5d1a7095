"""Draw the pictures of docs/cuda.md from the planner of CUDA kernels. No GPU is needed, and none is asked.

    python benchmarks/report_gpu_plan.py [--folder docs]

cuda_blocks.png    which rows of U and of the batch a block of the fused kernel has
cuda_timeline.png  a time step on a line of time, by the model of csrc/cuda/gpu_plan.cpp
cuda_choice.png    for three cards, which kernel the model finds faster, by H and B
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

from lstm_ext.native import loader

DOCS = Path(__file__).resolve().parents[1] / "docs"
CARDS = ("A100", "L4", "H100")
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")
# Of the model, in microseconds: see gpu_plan.cpp.
LAUNCH, DEPENDENT, RAMP, EPILOGUE, CELL, PRODUCT = 0.8, 0.5, 0.7, 0.3, 2.1, 2.0


def plan(card: str, batch: int, hidden: int) -> dict[str, Any]:
    extension = loader.extension()
    devices = {device["name"]: device for device in extension.cuda_devices()}
    return extension.cuda_plan(
        device=devices[card], steps=100, batch=batch, input_size=hidden, hidden_size=hidden, dtype="bfloat16",
        outcome=True,
    )  # fmt: skip


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


def timeline() -> plt.Figure:
    """Two steps, B 16 and H 768 in bfloat16 on an H100."""
    found = plan("H100", 16, 768)
    weights = found["step_us"] - DEPENDENT - RAMP - EPILOGUE
    product = found["stepwise_us"] - 2 * LAUNCH - CELL
    ways = {
        "stepwise": [("launch", LAUNCH), ("product (cuBLAS)", product), ("launch", LAUNCH), ("cell", CELL)],
        "step": [("launch", LAUNCH), ("tiles", RAMP), ("product", weights), ("cells", EPILOGUE)],
        "step, dependent launches": [
            ("launch", DEPENDENT), ("tiles", RAMP), ("product", weights),
            ("cells", EPILOGUE),
        ],
    }  # fmt: skip
    colours = {"launch": "#c8c8c8", "tiles": "#dd8452", "cell": "#55a868", "cells": "#55a868"}
    figure, axes = plt.subplots(figsize=(9, 2.6))
    for line, parts in enumerate(ways.values()):
        at = 0.0
        for _ in range(2):
            for name, us in parts:
                colour = colours["launch"] if name.startswith("launch") else colours.get(name, "#4c72b0")
                axes.barh(line, us, left=at, color=colour, edgecolor="white", height=0.6)
                if us > 0.6:
                    axes.text(at + us / 2, line, name, ha="center", va="center", fontsize=7)
                at += us
        axes.text(at + 0.1, line, f"{at / 2:.1f} µs a step", va="center", fontsize=8)
    axes.set_yticks(range(len(ways)), list(ways))
    axes.invert_yaxis()
    axes.set(xlabel="µs, by a model that has not been compared with a GPU", xlim=(0, 15))
    axes.set_title("two steps, B 16, H 768, bfloat16, H100", fontsize=10)
    figure.tight_layout()
    return figure


def choice() -> plt.Figure:
    sizes = np.unique(np.round(2 ** np.linspace(6, 12, 37)).astype(int))
    batches = np.unique(np.round(2 ** np.linspace(0, 12, 37)).astype(int))
    figure, every = plt.subplots(1, len(CARDS), figsize=(11, 3.6), sharey=True, layout="constrained")
    for axes, card in zip(every, CARDS, strict=True):
        ratio = np.empty((len(batches), len(sizes)))
        for b, batch in enumerate(batches):
            for h, hidden in enumerate(sizes):
                found = plan(card, int(batch), int(hidden))
                ratio[b, h] = found["stepwise_us"] / found["step_us"]
        picture = axes.pcolormesh(sizes, batches, ratio, cmap="RdYlGn", vmin=0, vmax=2, shading="nearest")
        axes.contour(sizes, batches, ratio, levels=[1.0], colors="black", linewidths=1)
        axes.set(xscale="log", yscale="log", xlabel="H", title=card)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
    every[0].set_ylabel("B")
    figure.colorbar(picture, ax=every, label="stepwise / step: above 1, `step` is faster")
    figure.suptitle("bfloat16, a step of a sequence; a model, not measured", fontsize=10)
    return figure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=DOCS)
    folder = parser.parse_args(arguments).folder
    if loader.extension() is None:
        print(f"there is no compiled extension: {loader.status().reason}", file=sys.stderr)
        return 1
    for name, draw in (("cuda_blocks", blocks), ("cuda_timeline", timeline), ("cuda_choice", choice)):
        figure = draw()
        figure.savefig(folder / f"{name}.png", dpi=110)
        plt.close(figure)
        print(f"wrote {folder / name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
