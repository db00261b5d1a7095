"""Make the tables of docs/performance.md on 16-bit dtypes and packed data from the JSON of bench_contract.py.

    python benchmarks/report_contract.py benchmarks/results/NAME.json [--document docs/performance.md] [--block SUFFIX]

The tables of the groups that the file has. Without --document they go to standard output; with it, each replaces what
stands between its two markers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from report import facts_line, replace_block, table
from shapes import TASKS


def name_of(result: dict) -> list[str]:
    shape = TASKS[result["shape"]]
    sizes = f"B{shape.batch} T{shape.steps} I{shape.input_size} H{shape.hidden_size}"
    return [sizes, str(result["threads"]), "training step" if result["training"] else "inference"]


def times(value: float) -> str:
    return f"{value:.2f}×"


def low_precision(results: list[dict]) -> list[str]:
    columns = ["bfloat16_over_torch", "float16_over_torch", "bfloat16_over_float32", "float16_over_float32"]
    head = [
        "bfloat16, over torch's",
        "float16, over torch's",
        "bfloat16, over our float32",
        "float16, over it",
    ]
    return table(
        ["shape", "threads", "", *head],
        [[*name_of(r), *[times(r[column]) for column in columns]] for r in results],
    )


def packed(results: list[dict]) -> list[str]:
    head = [
        "share of the padded rows",
        "over torch, the same `PackedSequence`",
        "time a row, over padded data",
    ]
    return table(
        ["shape", "threads", "", *head],
        [
            [*name_of(r), f"{r['share_of_rows']:.0%}", times(r["over_torch"]), f"{r['cost']:.2f}"]
            for r in results
        ],
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, metavar="results.json")
    parser.add_argument("--document", type=Path, help="replace what is between the markers of this file")
    parser.add_argument(
        "--block", default="", metavar="SUFFIX", help="of the markers' names: another machine's"
    )
    options = parser.parse_args(arguments)
    record = json.loads(options.results.read_text())
    for group, lines_of in (("16-bit", low_precision), ("packed", packed)):
        results = [r for r in record["results"] if r["group"] == group]
        if not results:
            continue
        lines = [*lines_of(results), "", facts_line(record)]
        if options.document:
            replace_block(options.document, group + options.block, "\n".join(lines))
        else:
            print(*lines, sep="\n", end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
