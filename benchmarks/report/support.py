"""The table of docs/support.md from the record of bench_support.py: how a feature runs in a composition and a dtype."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .support_cells import DTYPES, ERROR, GRAPHS
from .support_features import FEATURES
from .text import RESULTS, row, versions

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

Cells = dict[str, dict[str, dict[str, str]]]  # feature, composition, dtype


def dtypes_of(composition: str) -> tuple[str, ...]:
    """Compilers take seconds a cell, and ONNX Runtime has no LSTM for bfloat16."""
    if composition == "onnx":
        return ("float32",)
    return ("float32", "bfloat16") if composition in GRAPHS else tuple(DTYPES)


def named(cells: Cells) -> dict[str, str]:
    return {
        f"{feature}, {composition}, {dtype}": said
        for feature, row in cells.items()
        for composition, of_dtypes in row.items()
        for dtype, said in of_dtypes.items()
    }


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


def text(record: dict[str, Any], of_cuda: dict[str, Any] | None = None) -> str:
    path = RESULTS / "support_cuda.json"
    if of_cuda is None and path.exists():
        of_cuda = json.loads(path.read_text())
    cells, notes = record["cells"], Notes()
    columns = [c for c in COLUMNS if any(c in of_feature for of_feature in cells.values())]
    lines = [row(["", *[COLUMNS[c] for c in columns]]), "|---|" + ":-:|" * len(columns)]
    for feature, of_feature in cells.items():
        shown = [cell(of_feature[c], notes) if c in of_feature else "" for c in columns]
        lines.append(row([FEATURES[feature].title, *shown]))
    lines += [
        "",
        "✓: runs on the kernels; in the column ONNX, is one standard operator `LSTM` a layer. eq: runs on the "
        "equations in plain PyTorch; in ONNX, is a loop of basic operators. –: raises an error that says so.",
        "",
        *[f"{i}. {note}" for i, note in enumerate(notes.texts, 1)],
        "",
        dtypes_line(columns),
        "All cells are in training mode, except those of ONNX and of the row `zoneout`, evaluation, which are in "
        "evaluation mode. Double backward means second derivatives; the forward pass before them runs on the kernels. "
        "`jvp`, `vmap` and `grad` are those of `torch.func`. Autocast is to bfloat16, forward and backward. "
        "`torch.compile` is inductor with `fullgraph=True`, forward and backward. All together means two layers with "
        "`dropout`, both directions, a projection and every row from `lengths` down except `zoneout`, evaluation, "
        "those of other cells, and `mask`, which excludes `lengths`.",
        "",
        f"CUDA: {cuda_line(record, of_cuda)}",
        "",
        f"`benchmarks/bench_support.py` tried {len(named(cells))} cells; {', '.join(versions(record['facts']))}.",
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
