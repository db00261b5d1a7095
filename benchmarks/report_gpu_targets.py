"""Say which of the targets a GPU's figures meet, from the JSON of gpu_check.py or bench_gpu.py.

    python benchmarks/report_gpu_targets.py [results/NAME.json]

A target is for the kernels that a layer takes by itself (auto); the others stand beside it, to show what auto could
have taken. Without a file it takes the newest run of benchmarks/results/gpu_*.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_shapes
import harness
from gpu_shapes import Case

KERNELS = ("auto", "persistent", "step", "stepwise")
Results = Sequence[dict[str, Any]]
KINDS = ("inference", "training")


@dataclass(frozen=True)
class Target:
    name: str
    limit: float
    unit: str
    value: Callable[
        [Results, str], float | None
    ]  # with this kernel; None if something of it was not measured
    at_most: bool = False

    def wanted(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.limit:g} {self.unit}"

    def is_met(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


def found(results: Results, case: Case, kernel: str, kind: str) -> dict[str, Any] | None:
    """What was measured of a case. Not if the two sides computed different things."""
    names = (
        "batch",
        "steps",
        "input_size",
        "hidden_size",
        "dtype",
        "layers",
        "packed",
        "bidirectional",
        "graph",
    )
    for r in results:
        same = all(r.get(name, False) == getattr(case, name) for name in names)
        if same and (r.get("kernel", "auto"), r["kind"]) == (kernel, kind) and r.get("agree"):
            return r
    return None


def forward(results: Results, kernel: str) -> float | None:
    r = found(results, gpu_shapes.FLASH, kernel, "inference")
    return r and r["ratio"]


def backward(results: Results, kernel: str) -> float | None:
    r = found(results, gpu_shapes.FLASH, kernel, "training")
    return r and r["torch"]["backward"] / r["ours"]["backward"]


def step_time(results: Results, kernel: str) -> float | None:
    r = found(results, gpu_shapes.PER_STEP, kernel, "inference")
    return r and r["ours"]["us_per_step"]


def ratios_outside(results: Results, kernel: str) -> list[float] | None:
    of_cases = [found(results, case, kernel, kind) for case in gpu_shapes.OUTSIDE for kind in KINDS]
    return None if None in of_cases else [r["ratio"] for r in of_cases if r is not None]


def mean_outside(results: Results, kernel: str) -> float | None:
    ratios = ratios_outside(results, kernel)
    return ratios and harness.geometric_mean(ratios)


def worst_outside(results: Results, kernel: str) -> float | None:
    ratios = ratios_outside(results, kernel)
    return ratios and min(ratios)


OUTSIDE = "outside cuDNN's window"
TARGETS = (
    Target("float16, B 16, T 1024, H 768, inference", 1.5, "x cuDNN", forward),
    Target("the same, backward", 1.1, "x cuDNN", backward),
    Target(f"{OUTSIDE}, geometric mean", 3.0, "x cuDNN", mean_outside),
    Target(f"{OUTSIDE}, nowhere below", 1.0, "x cuDNN", worst_outside),
    Target("bfloat16, B 64, H 512, a step of inference", 1.5, "µs", step_time, at_most=True),
)


def verdicts(results: Results, kernel: str = "auto") -> dict[str, bool | None]:
    """Whether each target is met; None: not measured."""
    values = {target: target.value(results, kernel) for target in TARGETS}
    return {t.name: None if value is None else t.is_met(value) for t, value in values.items()}


def table(results: Results) -> str:
    lines = ["| target | wanted | " + " | ".join(KERNELS) + " |", "|---|---|" + "---|" * len(KERNELS)]
    for target in TARGETS:
        cells = []
        for kernel in KERNELS:
            value = target.value(results, kernel)
            verdict = "" if value is None else "met" if target.is_met(value) else "not met"
            cells.append("not measured" if value is None else f"{value:.2f}: {verdict}")
        lines.append(f"| {target.name} | {target.wanted()} | " + " | ".join(cells) + " |")
    of_auto = list(verdicts(results).values())
    lines += ["", f"auto meets {of_auto.count(True)} of {len(TARGETS)} targets, misses {of_auto.count(False)}; "
                  f"{of_auto.count(None)} not measured."]  # fmt: skip
    lines += [
        f"{OUTSIDE}: " + "; ".join(f"{case.shape} {case.dtype}" for case in gpu_shapes.OUTSIDE) + "; "
        "inference and training steps."
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    import report_gpu

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", metavar="results.json")
    path = parser.parse_args(arguments).results or report_gpu.newest()
    if path is None:
        print(report_gpu.NOT_YET)
        return 0
    print(table(report_gpu.measured(json.loads(path.read_text()), kernel=None)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
