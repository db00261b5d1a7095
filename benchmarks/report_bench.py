"""Make tables from a file of bench.py: the means of each group, and one step of frozen layers beside its bound.

    python benchmarks/report_bench.py RECORD.json [--document PAGE.md] [--block bench-suite]

Without --document the tables go to standard output; with it, they replace what stands between the two markers of the
block.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import harness
import records
from records import Result
from report import facts_line, plural, replace_block, table

SIDES = {
    "ours": "lstm_ext",
    "frozen": "lstm_ext, frozen",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
NOTE = (
    "Geometric mean and, in brackets, the worst case of torch's median over the side's: above 1, the side takes less "
    "time, or memory. All sides of a case take turns in one run."
)


def means(record: Result) -> list[str]:
    rows: dict[tuple[str, bool, str, int], dict[str, Result]] = {}
    for line in record["summary"]:
        key = line["group"], line["training"], line["dtype"], line["threads"]
        rows.setdefault(key, {})[line["side"]] = line
    sides = [name for name in SIDES if any([name in found for found in rows.values()])]
    lines = []
    for (group, training, dtype, threads), found in rows.items():
        if not any([name in found for name in sides]):
            continue
        kind = "training step" if training else "inference"
        name = group if group == kind or group == "training" else f"{group}, {kind}"
        name += f", {dtype}" if dtype != "float32" else ""
        cases = max(line["cases"] for line in found.values())
        cells = [
            f"{found[side]['geometric_mean']:.2f} ({found[side]['worst']:.2f})" if side in found else ""
            for side in sides
        ]
        lines.append([name, plural(threads), str(cases), *cells])
    return table(["", "", "cases", *[SIDES[name] for name in sides]], lines)


# A call of fewer microseconds a time step in torch.
SMALL = 50


def is_small(result: Result) -> bool:
    return result["sides"]["torch"]["median"] * 1e3 / result["steps"] < SMALL


def is_large(result: Result) -> bool:
    return result["hidden_size"] >= 128 and result["batch"] >= 16


# What the project asks for: cases of a group, and which side stands against torch or the best of all others.
Goal = tuple[str, str, bool, str, Callable[[Result], bool], str, bool]
GOALS: tuple[Goal, ...] = (
    ("float32 inference, H >= 128 and B >= 16", "inference", False, "float32", is_large, "ours", False),
    ("float32 training, the same", "training", True, "float32", is_large, "ours", False),
    ("bfloat16 inference", "dtypes", False, "bfloat16", lambda _: True, "ours", False),
    ("bfloat16 training", "dtypes", True, "bfloat16", lambda _: True, "ours", False),
    (
        f"small: below {SMALL} µs a step in torch; inference",
        "inference",
        False,
        "float32",
        is_small,
        "ours",
        True,
    ),
    ("small, training", "training", True, "float32", is_small, "ours", True),
    ("frozen, of all inference", "inference", False, "float32", lambda _: True, "frozen", True),
)


def ratios_of(record: Result, goal: Goal, threads: int) -> list[float]:
    """The times of torch, or of the best peer, over those of the side that a goal is for."""
    _, group, training, dtype, counts, side, over_all = goal
    peers = ("torch", "onnxruntime", "openvino")[: None if over_all else 1]
    return [
        min(sides[peer]["median"] for peer in peers if peer in sides) / sides[side]["median"]
        for sides in (
            r["sides"]
            for r in record["results"]
            if (r["group"], r["training"], r["dtype"], r["threads"]) == (group, training, dtype, threads)
            and side in r["sides"]
            and counts(r)
        )
    ]


def goals(record: Result) -> list[str]:
    """Geometric mean and worst of the shapes that the project has goals for."""
    rows = []
    for goal in GOALS:
        cells: list[str] = []
        for threads in (1, 2):
            ratios = ratios_of(record, goal, threads)
            cells.append(f"{harness.geometric_mean(ratios):.2f} ({min(ratios):.2f})" if ratios else "")
        if any(cells):
            rows.append([goal[0], "the best side" if goal[-1] else "torch", *cells])
    head = ["shapes", "over", "1 thread", "2 threads"]
    return ["", "The shapes that the project has goals for:", "", *table(head, rows)] if rows else []


def microseconds(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def steps(record: Result) -> list[str]:
    """One step with carried state, in microseconds: for each kind of weights the median, and the bound in brackets."""
    found = [r for r in record["results"] if r["group"] == "step" and "bounds" in r]
    if not found:
        return []
    kinds = list(found[0]["bounds"])
    rows = []
    for result in found:
        cells = []
        for kind in kinds:
            bound = result["bounds"][kind]
            sign = "≤" if bound["met"] else "**>**"
            cells.append(f"{microseconds(bound['alone_us'])} {sign} {microseconds(bound['bound_us'])}")
        torch = microseconds(1e3 * result["sides"]["torch"]["median"])
        rows.append([str(result["hidden_size"]), plural(result["threads"]), torch, *cells])
    head = ["H", "", "torch", *[kind.replace("frozen-", "frozen, ") for kind in kinds]]
    return [
        "",
        "One step with carried state, batch 1, I = H, in µs: torch's median in turn with the others; the frozen layers "
        "alone, and their bound of 8 µs + 1.25 times what it takes to read as many bytes as the weights have.",
        "",
        *table(head, rows),
    ]


def markdown(record: Result) -> str:
    peers = [
        f"{name} {peer['version']}" if not peer["missing"] else peer["missing"]
        for name, peer in record["facts"]["peers"].items()
    ]
    lines = [
        *means(record),
        "",
        NOTE,
        *goals(record),
        *steps(record),
        "",
        f"Peers: {'; '.join(peers)}.",
        "",
        facts_line(record),
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path, metavar="RECORD.json")
    parser.add_argument("--document", type=Path, help="replace what is between the markers of this file")
    parser.add_argument("--block", default="bench-suite", help="the name in the markers")
    options = parser.parse_args(arguments)
    text = markdown(records.read(options.record))
    if options.document:
        replace_block(options.document, options.block, text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
