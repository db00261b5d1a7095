"""What bench_gpu.py measures, the most telling first: a run that is cut short still says most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import shapes
import torch
from shapes import Shape

# tf32: float32 with TF32 allowed, which is torch's default.
DTYPES = ("float16", "bfloat16", "tf32", "float32")


@dataclass(frozen=True)
class Case:
    group: str
    batch: int
    steps: int
    input_size: int
    hidden_size: int
    dtype: str
    layers: int = 1
    packed: bool = False  # lengths from a tenth of the steps to all of them
    graph: bool = False  # from a graph only
    kernel: str = "auto"  # LSTM_EXT_CUDA_KERNEL
    bidirectional: bool = False

    @property
    def shape(self) -> Shape:
        sizes = self.batch, self.steps, self.input_size, self.hidden_size, self.layers
        return Shape(*sizes, 2 if self.bidirectional else 1)

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)

    @property
    def bytes_needed(self) -> int:
        """Of a training step, by estimate: the inputs of both sides, and what one of them saves and returns."""
        of_row = 8 * self.input_size + 12 * self.hidden_size * self.layers * self.shape.directions
        weights = (
            12 * self.hidden_size * (self.input_size + self.hidden_size) * self.layers * self.shape.directions
        )
        return self.torch_dtype.itemsize * (self.steps * self.batch * of_row + 4 * weights)

    @property
    def name(self) -> str:
        parts = [f"B{self.batch}", f"T{self.steps}"]
        parts += [f"I{self.input_size}"] if self.input_size != self.hidden_size else []
        parts += [f"H{self.hidden_size}", *([f"{self.layers}layers"] if self.layers > 1 else [])]
        parts += [name for name in ("bidirectional", "packed") if getattr(self, name)]
        return "-".join(parts) + (f" {self.kernel}" if self.kernel != "auto" else "")

    def head(self, kind: str) -> dict[str, Any]:
        """What a result begins with: what `records.key` takes, and the case; a graph has a name of its own."""
        case = f"{self.name} graph" if kind == "graph" else self.name
        return asdict(self) | {"case": case, "kind": kind, "threads": 1, "training": kind == "training"}


def _each(case: Case, *dtypes: str) -> Iterator[Case]:
    for dtype in dtypes or DTYPES:
        yield replace(case, dtype=dtype)


# The targets of report/gpu.py are about these.
FLASH = Case("flashrnn", 16, 1024, 768, 768, "float16")
PER_STEP = Case("per step", 64, 1024, 512, 512, "bfloat16")
# What torch has no persistent kernel of cuDNN for: one thing changed at a time.
CHANGES: tuple[dict[str, Any], ...] = (
    {"bidirectional": True},
    {"layers": 3},
    {"packed": True},
    {"input_size": 300, "hidden_size": 300},
    {"batch": 1},
)
OUTSIDE = [
    *_each(FLASH, "bfloat16", "tf32"),
    *(
        replace(FLASH, group="outside cuDNN's window", dtype=dtype, **change)
        for dtype in ("float16", "bfloat16")
        for change in CHANGES
    ),
]


def _in_order() -> Iterator[Case]:
    step = Case("step", 1, 1, 128, 128, "")
    yield from _each(FLASH)
    for graph in (False, True):
        yield from _each(replace(step, graph=graph))
    for case in (FLASH, PER_STEP):
        for kernel in ("auto", "persistent", "step", "stepwise"):
            yield replace(case, kernel=kernel)
    for kernel in ("auto", "persistent"):
        for case in OUTSIDE:
            yield replace(case, kernel=kernel)
    # What gpu_plan chooses between, where it matters most.
    for case in (FLASH, step, Case("cpu table", 64, 50, 256, 256, "")):
        for kernel in ("persistent", "step", "stepwise"):
            if case.steps > 1 or kernel != "persistent":  # which has nothing to keep in one step
                yield from _each(replace(case, kernel=kernel), "bfloat16", "float16", "tf32")
    yield from _each(Case("fastrnns", 64, 100, 512, 512, ""))
    yield from _each(Case("torchrl", 256, 128, 32, 512, ""), "float32", "tf32", "bfloat16")
    yield from _each(Case("two layers", 8, 2000, 256, 256, "", layers=2), "tf32", "bfloat16", "float32")
    for steps in (100, 1000, 10, 4000):
        yield from _each(Case("packed", 32, steps, 256, 256, "", packed=True), "tf32", "bfloat16")
    for batch in (64, 2, 256, 32, 128, 8):
        yield from _each(replace(FLASH, batch=batch), "bfloat16", "float16")
    for name, s in shapes.SHAPES.items():
        if name != shapes.STEP:
            yield from _each(Case("cpu table", *s[:4], ""), "tf32", "bfloat16")
    haste = ((64, 512), (1, 1024), (16, 128), (128, 2048), (64, 1024), (16, 512), (1, 128), (128, 128))
    for batch, hidden in haste:
        yield from _each(Case("haste", batch, 50, 128, hidden, ""), "float32", "tf32")
    for steps in (256, 512, 2048):
        yield from _each(replace(FLASH, steps=steps), "bfloat16", "float16", "tf32")
    for batch, hidden in ((1, 512), (32, 256), (64, 1024)):
        for graph in (False, True):
            one = replace(step, batch=batch, input_size=hidden, hidden_size=hidden, graph=graph)
            yield from _each(one, "bfloat16", "tf32")
    for batch in (64, 256, 2):
        yield from _each(replace(FLASH, batch=batch), "tf32", "float32")
    for batch, hidden in ((128, 512), (1, 4096), (32, 4096), (32, 2048)):
        yield from _each(Case("haste", batch, 50, 512, hidden, ""), "float32", "tf32")


CASES = list(dict.fromkeys(_in_order()))

# Of what `auto` chooses: the windows of cuDNN's persistent kernels and of ours, and what lies outside of them.
AUDIT = [
    replace(case, group="audit")
    for case in (
        *_each(FLASH),
        PER_STEP,
        *(replace(FLASH, dtype="bfloat16", batch=batch) for batch in (1, 128)),
        *(replace(FLASH, dtype="bfloat16", **change) for change in CHANGES[:3]),
    )
]

# For a trial without a GPU: one of each kind.
TINY = [
    Case("flashrnn", 2, 4, 8, 8, "bfloat16"),
    Case("step", 1, 1, 8, 8, "float32"),
    Case("step", 1, 1, 8, 8, "float32", graph=True),
    Case("packed", 3, 10, 8, 8, "tf32", packed=True),
    Case("two layers", 2, 4, 8, 8, "float32", layers=2),
    Case("flashrnn", 2, 4, 8, 8, "bfloat16", kernel="stepwise"),
    Case("flashrnn", 2, 4, 8, 8, "bfloat16", kernel="persistent"),
    Case("outside cuDNN's window", 2, 4, 8, 8, "float16", bidirectional=True),
]
TINY_AUDIT = [replace(TINY[0], group="audit")]
