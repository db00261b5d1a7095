"""The shapes that the benchmarks run, by name: one layer, one direction, float32."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    batch: int
    steps: int
    input_size: int
    hidden_size: int


# From one streaming step to a batch that fills every core; the sizes that other LSTM benchmarks publish lie
# between.
SHAPES: dict[str, Shape] = {
    "B1-T1-H128": Shape(1, 1, 128, 128),
    "B1-T64-H128": Shape(1, 64, 128, 128),
    "B10-T30-H10": Shape(10, 30, 20, 10),
    "B32-T100-H64": Shape(32, 100, 64, 64),
    "B32-T100-H128": Shape(32, 100, 128, 128),
    "B64-T50-H256": Shape(64, 50, 256, 256),
    "B16-T128-H512": Shape(16, 128, 512, 512),
    "B1-T100-H512": Shape(1, 100, 512, 512),
    "B64-T25-H1024": Shape(64, 25, 1024, 1024),
}

STEP = "B1-T1-H128"
# Below a few MiB, pages and the allocator's own blocks are what a process's peak memory shows.
MEMORY = ["B32-T100-H64", "B32-T100-H128", "B64-T50-H256", "B16-T128-H512", "B64-T25-H1024"]

# Of small models in use: what the layer can do beyond torch's is measured on these.
TASKS: dict[str, Shape] = {
    "tagger": Shape(32, 40, 100, 128),
    "speech": Shape(16, 200, 80, 256),
    "characters": Shape(64, 100, 64, 128),
    "small": Shape(64, 50, 16, 32),
}

# A cell's one step.
CELLS = {
    f"cell-B{batch}-H{hidden}": Shape(batch, 1, hidden, hidden)
    for batch in (1, 2, 16, 64)
    for hidden in (64, 128, 256, 512, 1024)
}

# Environments that run side by side, and the observations that a policy sees of each before it learns.
ROLLOUTS = {
    f"rollout-B{environments}-H{hidden}": Shape(environments, 128, 32, hidden)
    for environments in (1, 8, 32)
    for hidden in (64, 256)
}

# What two workers share: the hidden units of one row, the rows of a batch.
SHARED = {"one-row": Shape(1, 48, 160, 160), "batch": Shape(16, 100, 128, 128)}

# A step at a time, where the weights are read and hardly used.
STREAMS = {f"stream-H{hidden}": Shape(1, 1, hidden, hidden) for hidden in (16, 64, 128, 256, 512, 1024)}
