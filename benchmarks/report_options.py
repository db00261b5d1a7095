"""Make the tables of docs/options.md from the JSON of bench_options.py and of bench_torchrl.py.

    python benchmarks/report_options.py results/OPTIONS.json results/TORCHRL.json [--document docs/options.md]

Without --document the tables go to standard output; with it, each replaces what stands between its two markers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from report import facts_line, milliseconds, replace_block, table


def shape_of(result: dict) -> str:
    return " ".join(f"{name}{result[key]}" for name, key in
                    [("B", "batch"), ("T", "steps"), ("I", "input_size"), ("H", "hidden_size")])  # fmt: skip


def times(record: dict) -> list[str]:
    results = [r for r in record["results"] if r["group"] == "time" and r["training"]]
    shapes = list(dict.fromkeys(shape_of(r) for r in results))
    rows = []
    for option in dict.fromkeys(r["option"] for r in results):
        row = [f"`{option}`"]
        for shape in shapes:
            found = [r for r in results if r["option"] == option and shape_of(r) == shape]
            row.append(", ".join(f"{r['cost']:.2f}" for r in found))
        target = record["targets"].get(option)
        rows.append([*row, f"{target:g}" if target else ""])
    return table(["a training step costs", *shapes, "target: at most"], rows)


def memory(record: dict) -> list[str]:
    results = [r for r in record["results"] if r["group"] == "memory" and r["option"] == "recompute"]
    shapes = list(dict.fromkeys(shape_of(r) for r in results))
    rows = []
    for key, name in (("saved", "saved for the backward pass"), ("peak", "peak of a training step")):
        values = [", ".join(f"{r[key]:.2f}" for r in results if shape_of(r) == shape) for shape in shapes]
        rows.append([name, *values])
    return table(["memory with `recompute`", *shapes], rows)


def steps(record: dict) -> list[str]:
    results = [r for r in record["results"] if r["group"] == "step"]
    shapes = list(dict.fromkeys(shape_of(r) for r in results))
    rows = []
    for call in dict.fromkeys(r["call"] for r in results):
        own = {shape_of(r): r for r in results if r["call"] == call}
        rows.append([f"`{call}`", *[f"{own[s]['microseconds']:.1f} μs" for s in shapes]])
    kernel = {s: min(r["kernel_microseconds"] for r in results if shape_of(r) == s) for s in shapes}
    rows.append(["the kernel's function by itself", *[f"{kernel[s]:.1f} μs" for s in shapes]])
    return table(["one step, inference, 1 thread", *shapes], rows)


def options_table(record: dict) -> str:
    parts = [times(record), memory(record), steps(record)]
    tables = "\n\n".join("\n".join(part) for part in parts if len(part) > 2)
    kept = " The process keeps freed memory." if record["facts"]["freed_memory_kept"] else ""
    return (
        f"{tables}\n\nRelative to the layer without the option (`layer_norm, recompute`: to `layer_norm`), float32, "
        f"on 1 and on 2 threads. Masks are drawn in every step; 3 in 100 steps are reset. Both sides alternate in one "
        f"run; medians.{kept}\n\n{facts_line(record)}"
    )


def torchrl_table(record: dict) -> str:
    def compared(figures: dict) -> str:
        before, after = [milliseconds(figures[side]["median"]) for side in ("torch", "ours")]
        return f"{before} → {after} ms, **{figures['ratio']:.1f}×**"

    rows = []
    for r in record["results"]:
        cells = [compared(r[key]) for key in ("over_torch", "over_pad")]
        kind = "training step" if r["training"] else "inference"
        rows.append([shape_of(r), str(r["threads"]), kind, *cells])
    head = [
        "shape",
        "threads",
        "",
        "over `LSTMModule` with `torch.nn.LSTM`",
        "over `LSTMModule` with `lstm_ext.LSTM`",
    ]
    share = record["results"][0]["resets"]
    versions = f"torchrl {record['facts']['torchrl']}, {share:.1%} of the steps begin an episode"
    return "\n".join(table(head, rows)) + f"\n\n{versions}; {facts_line(record)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("torchrl", type=Path)
    parser.add_argument("--document", type=Path, help="replace what is between the markers of this file")
    options = parser.parse_args(arguments)
    for name, path, table_of in (
        ("cost", options.results, options_table),
        ("torchrl", options.torchrl, torchrl_table),
    ):
        text = table_of(json.loads(path.read_text()))
        if options.document:
            replace_block(options.document, name, text)
        else:
            print(text, end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
