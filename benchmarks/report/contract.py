"""Tables on 16-bit dtypes and packed data from the JSON of bench_contract.py."""

from __future__ import annotations

from collections.abc import Callable

from records import Result
from shapes import TASKS

from .text import facts_line, kind_of, sizes, table


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
