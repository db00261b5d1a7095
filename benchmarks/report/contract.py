"""Tables on 16-bit dtypes, packed data, frozen layers and a busy host from the JSON of bench_contract.py."""

from __future__ import annotations

from collections.abc import Callable

import harness
from records import Result
from shapes import BUSY, FREEZE, TASKS

from .text import facts_line, kind_of, sizes, span, table


def of_group(record: Result, group: str, columns: dict[str, Callable[[Result], str]]) -> str:
    rows = [
        [
            sizes(TASKS[r["shape"]]._asdict()),
            r["threads"],
            kind_of(r),
            *[cell(r) for cell in columns.values()],
        ]
        for r in record["results"]
        if r["group"] == group
    ]
    return "\n".join([*table(["shape", "threads", "", *columns], rows), "", facts_line(record)])


def low_precision(record: Result) -> str:
    titles = {
        "bfloat16, over torch's": "bfloat16_over_torch",
        "float16, over torch's": "float16_over_torch",
        "bfloat16, over our float32": "bfloat16_over_float32",
        "float16, over it": "float16_over_float32",
    }
    columns = {title: lambda r, name=name: f"{r[name]:.2f}×" for title, name in titles.items()}
    return of_group(record, "16-bit", columns)


def packed(record: Result) -> str:
    columns = {
        "share of the padded rows": lambda r: f"{r['share_of_rows']:.0%}",
        "over torch, the same `PackedSequence`": lambda r: f"{r['over_torch']:.2f}×",
        "time a row, over padded data": lambda r: f"{r['cost']:.2f}",
    }
    return of_group(record, "packed", columns)


def frozen(record: Result) -> str:
    """Of large layers, whose weights both sides find where their last call left them."""
    rows = []
    for threads in sorted({r["threads"] for r in record["results"]}):
        found = [r for r in record["results"] if r["shape"] in FREEZE and r["threads"] == threads]
        for name, title in (("as_they_are", "float32"), ("bfloat16", "bfloat16"), ("int8", "int8")):
            ratios = [[r[f"{name}_over_{over}"] for r in found] for over in ("torch", "ours")]
            cells = [f"{harness.geometric_mean(values):.2f}, {span(values)}" for values in ratios]
            rows.append([title, threads, len(found), *cells])
    head = ["weights", "threads", "cases", "over torch", "over our layer before freezing"]
    return "\n".join([*table(head, rows), "", facts_line(record)])


def busy(record: Result) -> str:
    """Beside programs that are busy without end and in bursts: means over the shapes, and the worst."""
    results = [r for r in record["results"] if r["shape"] in BUSY]
    kinds = [name.removeprefix("kept_beside_") for name in results[0] if name.startswith("kept_beside_")]
    rows = []
    for kind in kinds:
        count, _, bursts = kind.partition("_")
        share, _, length = bursts.partition("_in_")
        busy_for = f"{share} % of the time, {length.removesuffix('ms')} ms at once" if bursts else "always"
        cells = []
        for name, worst in (("ours", max), ("torch", max), ("kept", min), ("over_torch", min)):
            values = [r[f"{name}_beside_{kind}"] for r in results]
            cells.append(f"{harness.geometric_mean(values):.2f} ({worst(values):.2f})")
        rows.append([count, busy_for, *cells])
    head = [
        "programs",
        "busy",
        "ours, times idle",
        "torch, times idle",
        "share kept, over torch's",
        "over torch",
    ]
    return "\n".join([*table(head, rows), "", facts_line(record)])
