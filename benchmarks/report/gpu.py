"""The table of the figures on a GPU, and which of the targets they meet, from the JSON of gpu_check.py or bench_gpu.py.

A target is for the kernels that a layer takes by itself (auto); the others stand beside it, to show what auto could
have taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gpu_shapes
import harness
from gpu_shapes import DTYPES, Case
from records import Result

from .text import SIZES, number, table, versions

NOT_YET = (
    "Not run on any GPU yet: there are no figures. `make gpu-bench` measures against cuDNN on a machine with a GPU, "
    "and `python benchmarks/report gpu` puts the table here."
)
NOTE = (
    "µs a time step: torch.nn.LSTM (cuDNN) → lstm_ext.LSTM, medians, and the ratio; above 1, lstm_ext is faster. "
    "Forward + backward: the two halves of our training step. Of the floor: which share the least possible time "
    "on this card, by the rate of torch.mm and the bandwidth of a copy, has of the measured one, inference. "
    "Memory: peak of a training step, lstm_ext / torch. tf32: float32 with TF32 allowed on both sides. (!): the "
    "two results differ by more than the dtype explains."
)
KINDS = {"inference": "inference", "training": "training step"}


def benchmark_of(record: Result) -> Result | None:
    return record["benchmark"] if "phases" in record else record


def measured(record: Result, kernel: str | None = "auto") -> list[Result]:
    """With the kernels that a layer takes by itself, or with one of them, or, None, with all."""
    benchmark = benchmark_of(record)
    results = [r for r in benchmark["results"] if "ratio" in r] if benchmark else []
    return [r for r in results if kernel in (None, r.get("kernel", "auto"))]


def identity(result: Result) -> tuple[Any, ...]:
    return result["group"], result["shape"], result["graph"]


def chosen(results: list[Result]) -> list[tuple[Any, ...]]:
    """The first shape of each group, in the order in which they were measured."""
    first: dict[tuple[str, bool], tuple[Any, ...]] = {}
    for shape in map(identity, results):
        first.setdefault((shape[0], shape[2]), shape)
    return list(first.values())


def speed(result: Result | None) -> str:
    if result is None:
        return ""
    theirs, ours = (number(result[side]["us_per_step"]) for side in ("torch", "ours"))
    doubt = "" if result["agree"] else " (!)"
    return f"{theirs} → {ours}, **{result['ratio']:.2f}×**{doubt}"


def parts(result: Result | None) -> str:
    """Forward and backward of a training step, µs a time step, ours."""
    if result is None:
        return ""
    halves = (1e3 * result["ours"][part] / result["steps"] for part in ("forward", "backward"))
    return " + ".join(map(number, halves))


def floor(result: Result | None) -> str:
    if result is None:
        return ""
    return " → ".join(f"{100 * result[side]['share_of_floor']:.1f} %" for side in ("torch", "ours"))


def memory(result: Result | None) -> str:
    if result is None or not result["ours"].get("peak_bytes") or not result["torch"].get("peak_bytes"):
        return ""
    return f"{result['ours']['peak_bytes'] / result['torch']['peak_bytes']:.2f}"


def title(result: Result) -> str:
    extras = [f"{result['layers']} layers"] if result["layers"] > 1 else []
    extras += ["bidirectional"] if result.get("bidirectional") else []
    extras += ["packed"] if result["packed"] else []
    extras += ["CUDA graph"] if result["graph"] else []
    return ", ".join(extras)


def table_of(record: Result) -> str:
    results = measured(record)
    rows = []
    for shape in chosen(results):
        for dtype in DTYPES:
            found = {r["kind"]: r for r in results if identity(r) == shape and r["dtype"] == dtype}
            if not found:
                continue
            any_of = next(iter(found.values()))
            sizes = [any_of[name] for name in SIZES.values()]
            inference, training = (found.get(kind) for kind in KINDS)
            rows.append([*sizes, title(any_of), dtype, speed(inference), speed(training), parts(training),
                         floor(inference), memory(training)])  # fmt: skip
    head = ["", "dtype", *KINDS.values(), "forward + backward", "of the floor", "memory"]
    means = []
    for dtype in DTYPES:
        cells = []
        for kind in KINDS:
            ratios = [r["ratio"] for r in results if (r["dtype"], r["kind"]) == (dtype, kind)]
            mean = f"{len(ratios)}, {harness.geometric_mean(ratios):.2f}, {min(ratios):.2f}" if ratios else ""
            cells.append(mean)
        means.append([dtype, *cells])
    of_kinds = [f"{kind}: cases, geometric mean, worst" for kind in KINDS.values()]
    return "\n".join(
        [
            *table([*SIZES, *head], rows),
            "",
            *table(["dtype", *of_kinds], means),
            "",
            NOTE,
            "",
            *targets(measured(record, kernel=None)),
            "",
            facts_line(record),
        ]
    )


def text(record: Result | None) -> str:
    return table_of(record) if record and measured(record) else NOT_YET


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
    ]
    if left_out := benchmark["left_out"]:
        says.append(f"{len(left_out)} of the cases left out, for want of time")
    phases = ", ".join(f"{p['phase']} {p['result']}" for p in record.get("phases", ()))
    return "; ".join(filter(None, says)) + "." + (f" Phases: {phases}." if phases else "")


# ---- the targets

KERNELS = ("auto", "persistent", "step", "stepwise")
Results = Sequence[Result]
Value = Callable[[Results, str], "float | None"]


@dataclass(frozen=True)
class Target:
    name: str
    limit: float
    unit: str
    # With this kernel; None if something of it was not measured.
    value: Value
    at_most: bool = False

    def wanted(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.limit:g} {self.unit}"

    def is_met(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


def found(results: Results, case: Case, kernel: str, kind: str) -> Result | None:
    """What was measured of a case. Not if the two sides computed different things."""
    names = (*SIZES.values(), "dtype", "layers", "packed", "bidirectional", "graph")
    for r in results:
        same = all(r.get(name, False) == getattr(case, name) for name in names)
        if same and (r.get("kernel", "auto"), r["kind"]) == (kernel, kind) and r.get("agree"):
            return r
    return None


def of_case(case: Case, kind: str, value: Callable[[Result], float]) -> Value:
    def measured_of(results: Results, kernel: str) -> float | None:
        result = found(results, case, kernel, kind)
        return None if result is None else value(result)

    return measured_of


def outside(value: Callable[[list[float]], float]) -> Value:
    """Of the ratios of all cases."""

    def measured_of(results: Results, kernel: str) -> float | None:
        every = [found(results, case, kernel, kind) for case in gpu_shapes.OUTSIDE for kind in KINDS]
        return None if None in every else value([result["ratio"] for result in every if result])

    return measured_of


FORWARD = of_case(gpu_shapes.FLASH, "inference", lambda r: r["ratio"])
BACKWARD = of_case(gpu_shapes.FLASH, "training", lambda r: r["torch"]["backward"] / r["ours"]["backward"])
STEP_TIME = of_case(gpu_shapes.PER_STEP, "inference", lambda r: r["ours"]["us_per_step"])
OUTSIDE = "outside cuDNN's window"
TARGETS = (
    Target("float16, B 16, T 1024, H 768, inference", 1.5, "x cuDNN", FORWARD),
    Target("the same, backward", 1.1, "x cuDNN", BACKWARD),
    Target(f"{OUTSIDE}, geometric mean", 3.0, "x cuDNN", outside(harness.geometric_mean)),
    Target(f"{OUTSIDE}, nowhere below", 1.0, "x cuDNN", outside(min)),
    Target("bfloat16, B 64, H 512, a step of inference", 1.5, "µs", STEP_TIME, at_most=True),
)


def verdicts(results: Results, kernel: str = "auto") -> dict[str, bool | None]:
    """Whether each target is met; None: not measured."""
    values = {target: target.value(results, kernel) for target in TARGETS}
    return {t.name: None if value is None else t.is_met(value) for t, value in values.items()}


def targets(results: Results) -> list[str]:
    rows = []
    for target in TARGETS:
        values = [target.value(results, kernel) for kernel in KERNELS]
        cells = [
            "not measured" if v is None else f"{v:.2f}: {'met' if target.is_met(v) else 'not met'}"
            for v in values
        ]
        rows.append([target.name, target.wanted(), *cells])
    of_auto = list(verdicts(results).values())
    shapes = "; ".join(f"{case.shape} {case.dtype}" for case in gpu_shapes.OUTSIDE)
    return [
        *table(["target", "wanted", *KERNELS], rows),
        "",
        f"auto meets {of_auto.count(True)} of {len(TARGETS)} targets, misses {of_auto.count(False)}; "
        f"{of_auto.count(None)} not measured. {OUTSIDE}: {shapes}; inference and training steps.",
    ]
