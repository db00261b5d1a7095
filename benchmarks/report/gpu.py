"""The table of the figures on a GPU, and which of the targets they meet, from the JSON of gpu_check.py or bench_gpu.py.

A target is for the kernels that a layer takes by itself (auto); the others stand beside it, to show what auto could
have taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import gpu_shapes
import harness
from gpu_shapes import DTYPES, Case
from records import Result, ratio

from .text import SIZES, number, table, versions

NOT_YET = (
    "Not run on any GPU yet: there are no figures. `make gpu-bench` measures against cuDNN on a machine with a GPU, "
    "and `python benchmarks/report gpu` puts the table here."
)
NOTE = (
    "µs a time step: torch.nn.LSTM (cuDNN) → lstm_ext.LSTM, medians, and the ratio; above 1, lstm_ext is faster. "
    "Forward + backward: the two halves of our training step. Memory: peak of a training step, lstm_ext / torch. tf32: "
    "float32 with TF32 allowed on both sides. (!): the two results differ by more than the dtype explains."
)
KINDS = {"inference": "inference", "graph": "inference, CUDA graph", "training": "training step"}


def benchmark_of(record: Result) -> Result | None:
    return record["benchmark"] if "phases" in record else record


def measured(record: Result) -> list[Result]:
    benchmark = benchmark_of(record)
    return [r for r in benchmark["results"] if "error" not in r] if benchmark else []


def us_a_step(result: Result, side: str) -> float:
    return 1e3 * result["sides"][side]["median"] / result["steps"]


def backward(result: Result, side: str) -> float:
    """µs a time step of the half of a training step that is not its forward pass."""
    return us_a_step(result, side) - us_a_step(result, f"{side} forward")


def speed(result: Result | None) -> str:
    if result is None:
        return ""
    theirs, ours = (number(us_a_step(result, side)) for side in ("torch", "ours"))
    return f"{theirs} → {ours}, **{ratio(result, 'ours'):.2f}×**{'' if result['agree'] else ' (!)'}"


def halves(result: Result | None) -> str:
    if result is None:
        return ""
    return " + ".join(map(number, (us_a_step(result, "ours forward"), backward(result, "ours"))))


def memory(result: Result | None) -> str:
    peaks = result["peak_bytes"] if result else {"torch": None}
    return f"{peaks['ours'] / peaks['torch']:.2f}" if peaks["torch"] else ""


def title(result: Result) -> str:
    extras = [f"{result['layers']} layers"] if result["layers"] > 1 else []
    return ", ".join(extras + [name for name in ("bidirectional", "packed") if result[name]])


def text(record: Result | None) -> str:
    """Of each group the first shape, with the kernels that a layer takes by itself; means; targets."""
    results = [r for r in measured(record) if r["kernel"] == "auto"] if record else []
    if not record or not results:
        return NOT_YET
    first: dict[str, list[int]] = {}
    found: dict[tuple[object, ...], dict[str, Result]] = {}
    for r in results:
        sizes = [r[name] for name in SIZES.values()]
        if first.setdefault(r["group"], sizes) == sizes:
            found.setdefault((*sizes, title(r), r["dtype"]), {})[r["kind"]] = r
    rows = [
        [
            *head,
            *[speed(kinds.get(kind)) for kind in KINDS],
            halves(kinds.get("training")),
            memory(kinds.get("training")),
        ]
        for head, kinds in found.items()
    ]
    means = []
    for dtype in DTYPES:
        ratios = [
            [ratio(r, "ours") for r in results if (r["dtype"], r["kind"]) == (dtype, kind)] for kind in KINDS
        ]
        means.append(
            [
                dtype,
                *[f"{len(r)}, {harness.geometric_mean(r):.2f}, {min(r):.2f}" if r else "" for r in ratios],
            ]
        )
    of_kinds = [f"{kind}: cases, geometric mean, worst" for kind in KINDS.values()]
    parts = [
        table([*SIZES, "", "dtype", *KINDS.values(), "forward + backward", "memory"], rows),
        table(["dtype", *of_kinds], means),
        [NOTE],
        targets(measured(record)),
        [facts_line(record)],
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def facts_line(record: Result) -> str:
    benchmark = benchmark_of(record)
    assert benchmark is not None
    facts = benchmark["facts"]
    smi = facts.get("nvidia_smi") or {}
    says = [
        facts.get("card") or facts["cpu"],
        f"driver {smi['driver_version']}" if "driver_version" in smi else "",
        f"cuDNN {facts['cudnn']}" if facts.get("cudnn") else "",
        *versions(facts),
        f"load {facts['load_at_start']:.1f} at the start",
    ]
    if left_out := benchmark["left_out"]:
        says.append(f"{len(left_out)} of the cases left out, for want of time")
    if too_large := benchmark.get("too_large"):
        says.append(f"{len(too_large)} of the cases left out, for want of memory")
    phases = ", ".join(f"{p['phase']} {p['result']}" for p in record.get("phases", ()))
    return "; ".join(filter(None, says)) + "." + (f" Phases: {phases}." if phases else "")


# ---- the targets

KERNELS = ("auto", "persistent", "step", "stepwise")


class Target(NamedTuple):
    """A figure of some cases: the value of each result, and what is made of all of them."""

    name: str
    limit: float
    unit: str
    cases: Sequence[Case]
    kinds: tuple[str, ...]
    value: Callable[[Result], float]
    of_all: Callable[[list[float]], float] = min
    at_most: bool = False

    def found(self, results: Sequence[Result], kernel: str) -> float | None:
        """None where something was not measured, or the two sides computed different things."""
        values = []
        for case in self.cases:
            for kind in self.kinds:
                head = case.head(kind) | {"kernel": kernel}
                wanted = {name: v for name, v in head.items() if name not in ("case", "group")}
                same = [r for r in results if r["agree"] and all(r[name] == v for name, v in wanted.items())]
                if not same:
                    return None
                values.append(self.value(same[0]))
        return self.of_all(values)

    def is_met(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


def gain(result: Result) -> float:
    return us_a_step(result, "torch") / us_a_step(result, "ours")


OUTSIDE, BOTH = "outside cuDNN's window", ("inference", "training")
TARGETS = (
    Target("float16, B 16, T 1024, H 768, inference", 1.5, "x cuDNN", [gpu_shapes.FLASH], BOTH[:1], gain),
    Target("the same, backward", 1.1, "x cuDNN", [gpu_shapes.FLASH], BOTH[1:],
           lambda r: backward(r, "torch") / backward(r, "ours")),
    Target(f"{OUTSIDE}, geometric mean", 3.0, "x cuDNN", gpu_shapes.OUTSIDE, BOTH, gain, harness.geometric_mean),
    Target(f"{OUTSIDE}, nowhere below", 1.0, "x cuDNN", gpu_shapes.OUTSIDE, BOTH, gain),
    Target("bfloat16, B 64, H 512, a step of inference", 1.5, "µs", [gpu_shapes.PER_STEP], BOTH[:1],
           lambda r: us_a_step(r, "ours"), at_most=True),
)  # fmt: skip


def targets(results: Sequence[Result]) -> list[str]:
    rows, of_auto = [], []
    for target in TARGETS:
        values = [target.found(results, kernel) for kernel in KERNELS]
        cells = [
            "not measured" if v is None else f"{v:.2f}: {'met' if target.is_met(v) else 'not met'}"
            for v in values
        ]
        of_auto.append(None if values[0] is None else target.is_met(values[0]))
        rows.append([target.name, f"{'≤' if target.at_most else '≥'} {target.limit:g} {target.unit}", *cells])
    shapes = "; ".join(f"{case.name} {case.dtype}" for case in gpu_shapes.OUTSIDE)
    return [
        *table(["target", "wanted", *KERNELS], rows),
        "",
        f"auto meets {of_auto.count(True)} of {len(TARGETS)} targets, misses {of_auto.count(False)}; "
        f"{of_auto.count(None)} not measured. {OUTSIDE}: {shapes}; inference and training steps.",
    ]
