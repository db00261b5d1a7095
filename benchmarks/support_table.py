"""Try every feature in every composition and dtype, and make the table of docs/support.md from what came out.

    python benchmarks/support_table.py [--json benchmarks/results/support_cpu.json] [--document docs/support.md]
    python benchmarks/support_table.py --as-recorded --document docs/support.md     # from the record, runs nothing
    python benchmarks/support_table.py --check [--fast] [--only FEATURE ...]

Each cell is run on small sizes and its values are compared with the equations in float64 (support_features.py). It says
which code ran: the kernels or the equations in plain PyTorch; or it is an error that support_cells.py lists, with its
message. Anything else, wrong values and other errors, is a failure: the script names the cell and its exit code is 1.

--check compares with the record and fails at any difference; --fast leaves out what takes seconds a cell. A whole run
takes two to three minutes. With --device cuda the record is support_cuda.json; that has not been run on any GPU yet.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from report import replace_block
from support_cells import DTYPES, EAGER, ERROR, FAILURE, GRAPHS, Outcome, tried
from support_features import FEATURES

RESULTS = Path(__file__).resolve().parent / "results"
BLOCK = "support"
COLUMNS = {
    "forward": "forward",
    "backward": "backward",
    "double_backward": "double backward",
    "jvp": "`jvp`",
    "vmap": "`vmap`",
    "grad": "`grad`",
    "per_sample": "`vmap(grad)`",
    "autocast": "autocast",
    "compile": "`torch.compile`",
    "export": "`torch.export`",
    "onnx": "ONNX",
}
SYMBOLS = {"kernels": "✓", "equations": "eq"}
FACTS = (
    "date",
    "cpu",
    "python",
    "torch",
    "lstm_ext",
    "lstm_ext_backend",
    "lstm_ext_cpu_capability",
    "git_commit",
)

Cells = dict[str, dict[str, dict[str, str]]]  # feature, composition, dtype


def dtypes_of(composition: str) -> tuple[str, ...]:
    """Compilers take seconds a cell, and ONNX Runtime has no LSTM for bfloat16."""
    if composition == "onnx":
        return ("float32",)
    return ("float32", "bfloat16") if composition in GRAPHS else tuple(DTYPES)


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


def named(cells: Cells) -> dict[str, str]:
    return {
        f"{feature}, {composition}, {dtype}": said
        for feature, row in cells.items()
        for composition, of_dtypes in row.items()
        for dtype, said in of_dtypes.items()
    }


def differences(found: Cells, recorded: Cells, whole: bool) -> list[str]:
    """Where a run and the record differ; in a whole run also what only the record has."""
    ours, theirs = named(found), named(recorded)
    names = list(ours) + ([name for name in theirs if name not in ours] if whole else [])
    return [
        f"{name}: {ours.get(name, 'not tried')}, in the record: {theirs.get(name, 'nothing')}"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


# ---- the table


class Notes:
    """Footnotes, each text once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"<sup>{self.texts.index(text) + 1}</sup>"


def cell(of_dtypes: dict[str, str], notes: Notes) -> str:
    def symbol(said: str) -> str:
        if said.startswith(ERROR):
            return "–" + notes.mark(f"error: `{said.removeprefix(ERROR + ': ')}`")
        return SYMBOLS[said]

    symbols: dict[str, list[str]] = {}
    for dtype, said in of_dtypes.items():
        symbols.setdefault(symbol(said), []).append(dtype)
    if len(symbols) == 1:
        return next(iter(symbols))
    return ", ".join(f"{s} ({', '.join(dtypes)})" for s, dtypes in symbols.items())


def markdown(record: dict[str, Any], of_cuda: dict[str, Any] | None = None) -> str:
    cells, notes = record["cells"], Notes()
    columns = [c for c in COLUMNS if any(c in row for row in cells.values())]
    lines = [
        "| | " + " | ".join(COLUMNS[c] for c in columns) + " |",
        "|---|" + ":-:|" * len(columns),
    ]
    for feature, row in cells.items():
        shown = [cell(row[c], notes) if c in row else "" for c in columns]
        lines.append(f"| {FEATURES[feature].title} | " + " | ".join(shown) + " |")
    lines += [
        "",
        "✓: runs on the kernels; in the column ONNX, is one standard operator `LSTM` a layer. eq: runs on the "
        "equations in plain PyTorch; in ONNX, is made of basic operators. –: raises an error that says so.",
        "",
        *[f"{i}. {note}" for i, note in enumerate(notes.texts, 1)],
        "",
        dtypes_line(columns),
        "All cells are in training mode, except those of ONNX and of the row `zoneout`, evaluation, which are in "
        "evaluation mode. Double backward means second derivatives; the forward pass before them runs on the kernels. "
        "`jvp`, `vmap` and `grad` are those of `torch.func`. Autocast is to bfloat16, forward and backward. "
        "`torch.compile` is inductor with `fullgraph=True`, forward and backward. All together means two layers with "
        "`dropout`, both directions, a projection and every row from `lengths` down except `zoneout`, evaluation, and "
        "`mask`, which says the same as `lengths`.",
        "",
        f"CUDA: {cuda_line(record, of_cuda)}",
        "",
        facts_line(record),
    ]
    return "\n".join(lines)


def dtypes_line(columns: Sequence[str]) -> str:
    """In which dtypes the cells were tried; they are as one where a cell does not say otherwise."""
    by_dtypes: dict[tuple[str, ...], list[str]] = {}
    for composition in columns:
        by_dtypes.setdefault(dtypes_of(composition), []).append(COLUMNS[composition])
    parts = [
        f"{'all of ' if len(d) == len(DTYPES) else ''}{', '.join(d)}: {', '.join(c)}"
        for d, c in by_dtypes.items()
    ]
    return "Dtypes tried, with the same outcome unless a cell names them: " + "; ".join(parts) + "."


def cuda_line(record: dict[str, Any], of_cuda: dict[str, Any] | None) -> str:
    if of_cuda is None:
        return (
            "the kernels compile, but they have not run on any GPU; there is no record ([cuda.md](cuda.md))."
        )
    ours, theirs = named(of_cuda["cells"]), named(record["cells"])
    other = [f"{name}: {said}" for name, said in ours.items() if said != theirs.get(name)]
    card = of_cuda["facts"]["card"]
    return f"{len(ours)} cells tried on {card}, " + (
        f"different from the CPU: {'; '.join(other)}." if other else "all as on the CPU."
    )


def facts_line(record: dict[str, Any]) -> str:
    facts = record["facts"]
    count = len(named(record["cells"]))
    return (
        f"`benchmarks/support_table.py` tried {count} cells and made this table; torch {facts['torch']}, "
        f"lstm_ext {facts['lstm_ext']}"
        + (f" at {facts['git_commit']}" if facts["git_commit"] else "")
        + f", {facts['date'][:10]}."
    )


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


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Try every feature in every composition, and make a table.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=FEATURES, metavar="FEATURE", help=", ".join(FEATURES))
    parser.add_argument("--fast", action="store_true", help=f"without {', '.join(GRAPHS)}")
    parser.add_argument("--json", type=Path, help="where to write the record")
    parser.add_argument("--check", action="store_true", help="compare with the record; nothing is written")
    parser.add_argument("--as-recorded", action="store_true", help="run nothing, take the record")
    parser.add_argument("--document", type=Path, help="replace the table between the markers of this file")
    options = parser.parse_args(arguments)
    recorded = read(RESULTS / f"support_{options.device}.json")
    if recorded is None and (options.check or options.as_recorded):
        raise SystemExit(f"there is no benchmarks/results/support_{options.device}.json")

    if options.as_recorded:
        record = recorded
    else:
        compositions = [c for c in COLUMNS if c in EAGER or not options.fast]
        if options.device == "cuda" and "onnx" in compositions:
            compositions.remove("onnx")
        record = {"facts": facts(options.device), "cells": {}}
        for feature, row in run_features(options.only or list(FEATURES), compositions, options.device):
            record["cells"][feature] = row
            outcomes = [said.partition(":")[0] for of_dtypes in row.values() for said in of_dtypes.values()]
            counts = [f"{outcomes.count(name)} {name}" for name in dict.fromkeys(outcomes)]
            print(f"{feature}: {', '.join(counts)}", flush=True)
        wrong = failures(record["cells"])
        if options.check:
            whole = not options.only and not options.fast
            wrong += differences(record["cells"], recorded["cells"], whole)
        if wrong:
            print("\n".join(["", f"{len(wrong)} cells are wrong:", *wrong]), file=sys.stderr)
            return 1
        if options.check:
            return 0
        if options.json:
            options.json.write_text(written(record))

    table = markdown(record, read(RESULTS / "support_cuda.json") if options.device == "cpu" else None)
    if options.document:
        replace_block(options.document, BLOCK, table)
    else:
        print(table)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # all sizes are small
    sys.exit(main())
