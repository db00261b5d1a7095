"""The shapes that the benchmarks run, by name: one layer and one direction where nothing else is said."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    batch: int
    steps: int
    input_size: int
    hidden_size: int
    layers: int = 1
    directions: int = 1
    gates: int = 4  # 3 for a GRU


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

# Policies of TorchRL.
POLICIES = {
    "policy": Shape(64, 128, 64, 128),
    "small": Shape(16, 64, 32, 64),
    "large": Shape(32, 128, 256, 256),
    "one-row": Shape(1, 512, 64, 128),
}

# One step, of which Python takes a large part.
STEPS = {f"H{hidden}": Shape(1, 1, size, hidden) for size, hidden in ((32, 64), (80, 128), (256, 256))}

# What two workers share: the hidden units of one row, the rows of a batch.
SHARED = {"one-row": Shape(1, 48, 160, 160), "batch": Shape(16, 100, 128, 128)}

# A step at a time, where the weights are read and hardly used.
STREAMS = {f"stream-H{hidden}": Shape(1, 1, hidden, hidden) for hidden in (16, 64, 128, 256, 512, 1024)}

# Calls of 0.05 to 20 ms, beside other programs.
BUSY = {
    **SHARED,
    "tagger": TASKS["tagger"],
    "stream-H512": STREAMS["stream-H512"],
    "B32-T120-H256": Shape(32, 120, 256, 256),
}

# Large weights, frozen: one row and several, one step and several.
FREEZE = {
    f"freeze-B{batch}-T{steps}-H{hidden}": Shape(batch, steps, hidden, hidden)
    for hidden in (256, 512, 1024)
    for batch, steps in ((1, 1), (1, 20), (4, 1), (8, 4), (16, 50), (64, 20))
}

# What runs on torch's own operator where there are no kernels: ten calls of 100 us and more, and three short ones.
FALLBACK = {
    **TASKS,
    **{name: SHAPES[name] for name in ("B1-T64-H128", "B10-T30-H10", "B32-T100-H64", "B64-T50-H256")},
    "one-T50-H32": Shape(1, 50, 16, 32),
    "both-B32-T40-H128": Shape(32, 40, 100, 128, directions=2),
    "B1-T1-H128": SHAPES["B1-T1-H128"],
    "stream-H16": STREAMS["stream-H16"],
    "odd-B5-T11-H1": Shape(5, 11, 3, 1),
}

# More of what users have: sizes that no register divides, deep, both directions, long, one row, many rows.
USERS: dict[str, Shape] = {
    "odd-B3-T17-H37": Shape(3, 17, 29, 37),
    "odd-B7-T33-H100": Shape(7, 33, 50, 100),
    "odd-B13-T50-H200": Shape(13, 50, 40, 200),
    "odd-B33-T20-H300": Shape(33, 20, 300, 300),
    "odd-B5-T11-H1": Shape(5, 11, 3, 1),
    "series-B32-T60-H50": Shape(32, 60, 1, 50),
    "wide-B32-T20-H64": Shape(32, 20, 1000, 64),
    "deep2-B20-T35-H200": Shape(20, 35, 200, 200, layers=2),
    "deep2-B20-T35-H650": Shape(20, 35, 650, 650, layers=2),
    "deep4-B32-T50-H128": Shape(32, 50, 128, 128, layers=4),
    "deep8-B8-T50-H64": Shape(8, 50, 64, 64, layers=8),
    "both-B1-T30-H100": Shape(1, 30, 100, 100, directions=2),
    "both-B32-T40-H128": Shape(32, 40, 100, 128, directions=2),
    "both2-B16-T100-H256": Shape(16, 100, 80, 256, layers=2, directions=2),
    "long-B1-T2000-H64": Shape(1, 2000, 32, 64),
    "long-B4-T1000-H128": Shape(4, 1000, 64, 128),
    "long-B8-T500-H256": Shape(8, 500, 128, 256),
    "one-T20-H256": Shape(1, 20, 256, 256),
    "one-T50-H32": Shape(1, 50, 16, 32),
    "one-T30-H1024": Shape(1, 30, 512, 1024),
    "many-B512-T1-H128": Shape(512, 1, 64, 128),
    "many-B512-T20-H64": Shape(512, 20, 32, 64),
    "many-B512-T10-H256": Shape(512, 10, 128, 256),
    "many-B256-T30-H128": Shape(256, 30, 64, 128),
}

# One size changes and the others stay: for pictures over T, B and H. What is above is not repeated: B 1 is B1-T64-H128.
CENTRE = Shape(16, 64, 128, 128)
SWEEPS: dict[str, dict[str, Shape]] = {
    "T": {f"over-T{steps}": CENTRE._replace(steps=steps) for steps in (1, 4, 16, 64, 256, 1024)},
    "B": {f"over-B{batch}": CENTRE._replace(batch=batch) for batch in (2, 4, 8, 32, 64, 128, 256)},
    "H": {
        f"over-H{hidden}": CENTRE._replace(input_size=hidden, hidden_size=hidden)
        for hidden in (16, 32, 64, 256, 512, 1024)
    },
}
