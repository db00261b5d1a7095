"""Tries every feature in every composition and dtype, and writes what came out: the record of docs/support.md.

    python benchmarks/bench_support.py [--device cuda]                     # two to three minutes
    python benchmarks/bench_support.py --check [--fast] [FEATURE ...]

Each cell is run on small sizes and its values are compared with the equations in float64 (support_features.py). It says
which code ran: the kernels or the equations in plain PyTorch; or it is an error that support_cells.py lists, with its
message. Anything else, wrong values and other errors, is a failure: the script names the cell and its exit code is 1.

The record is benchmarks/results/support_cpu.json, or support_cuda.json; that has not been run on any GPU yet. --check
compares with it instead, and fails at any difference; --fast leaves out what takes seconds a cell.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from report.support import COLUMNS, Cells, dtypes_of, named
from report.support_cells import EAGER, FAILURE, GRAPHS, Outcome, tried
from report.support_features import FEATURES
from report.text import RESULTS

FACTS = [
    "date",
    "cpu",
    "python",
    "torch",
    "lstm_ext",
    "lstm_ext_backend",
    "lstm_ext_cpu_capability",
    "git_commit",
]


def text(outcome: Outcome) -> str:
    return f"{outcome.result}: {outcome.message}" if outcome.message else outcome.result


def run_features(
    features: Sequence[str],
    compositions: Sequence[str],
    device: str = "cpu",
    dtypes: Sequence[str] | None = None,
) -> Iterator[tuple[str, dict[str, dict[str, str]]]]:
    """Each feature with its row of cells; ``dtypes`` None means all that a composition is tried in."""
    for feature in features:
        row = {}
        for composition in compositions:
            chosen = [d for d in dtypes_of(composition) if dtypes is None or d in dtypes]
            row[composition] = {d: text(tried(feature, composition, d, device)) for d in chosen}
        yield feature, row


def failures(cells: Cells) -> list[str]:
    return [f"{name}: {said}" for name, said in named(cells).items() if said.startswith(FAILURE)]


def differences(found: Cells, recorded: Cells, whole: bool) -> list[str]:
    """Where a run and the record differ; in a whole run also what only the record has."""
    ours, theirs = named(found), named(recorded)
    names = list(ours) + ([name for name in theirs if name not in ours] if whole else [])
    return [
        f"{name}: {ours.get(name, 'not tried')}, in the record: {theirs.get(name, 'nothing')}"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def facts(device: str) -> dict[str, Any]:
    of_machine = harness.facts()
    card = {"card": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {name: of_machine[name] for name in FACTS} | card


def written(record: dict[str, Any]) -> str:
    """JSON with a line for each feature and composition."""
    rows = []
    for feature, row in record["cells"].items():
        parts = [f"   {json.dumps(c)}: {json.dumps(d, ensure_ascii=False)}" for c, d in row.items()]
        rows.append(f"  {json.dumps(feature)}: {{\n" + ",\n".join(parts) + "\n  }")
    head = json.dumps(record["facts"], indent=2).replace("\n", "\n ")
    return f'{{\n "facts": {head},\n "cells": {{\n' + ",\n".join(rows) + "\n }\n}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser_of(__doc__)
    parser.add_argument("features", nargs="*", metavar="FEATURE", help=", ".join(FEATURES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--fast", action="store_true", help=f"with --check: without {', '.join(GRAPHS)}")
    parser.add_argument("--check", action="store_true", help="compare with the record; nothing is written")
    parser.add_argument("--output", type=Path, help="where to write the record (its place in results/)")
    options = parser.parse_args(arguments)
    if unknown := set(options.features) - set(FEATURES):
        parser.error(f"expected features among {', '.join(FEATURES)}, got {', '.join(sorted(unknown))}")
    whole = not options.features and not options.fast
    if not whole and not options.check:
        parser.error("FEATURE and --fast: expected --check, since a record has all cells")
    path = RESULTS / f"support_{options.device}.json"
    compositions = [c for c in COLUMNS if c in EAGER or not options.fast]
    if options.device == "cuda" and "onnx" in compositions:
        compositions.remove("onnx")
    record: dict[str, Any] = {"facts": facts(options.device), "cells": {}}
    for feature, row in run_features(options.features or list(FEATURES), compositions, options.device):
        record["cells"][feature] = row
        outcomes = [said.partition(":")[0] for of_dtypes in row.values() for said in of_dtypes.values()]
        counts = [f"{outcomes.count(name)} {name}" for name in dict.fromkeys(outcomes)]
        print(f"{feature}: {', '.join(counts)}", flush=True)
    wrong = failures(record["cells"])
    if options.check:
        wrong += differences(record["cells"], json.loads(path.read_text())["cells"], whole)
    if wrong:
        print("\n".join(["", f"{len(wrong)} cells are wrong:", *wrong]), file=sys.stderr)
    elif not options.check:
        (options.output or path).write_text(written(record))
    return int(bool(wrong))


if __name__ == "__main__":
    torch.set_num_threads(1)  # all sizes are small
    sys.exit(main())
