"""Make the GPU table of docs/performance.md and the picture from the JSON of gpu_check.py or bench_gpu.py.

    python benchmarks/report_gpu.py [results/NAME.json] [--all] [--document docs/performance.md]
                                    [--picture docs/bench_gpu.png]

Without a file it takes the newest run of benchmarks/results/gpu_*.json; where there is none, the table is a sentence
that says so. Without --document the table goes to standard output; with it, the table replaces what stands between the
two markers. --all takes every shape, not only the first of each group. Behind the table on standard output it says
which targets are met (report_gpu_targets.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import harness
import report_gpu_targets
from gpu_shapes import DTYPES
from report import replace_block

RESULTS = Path(__file__).resolve().parent / "results"
BLOCK = "gpu"
NOT_YET = (
    "Not run on any GPU yet: there are no figures. `make gpu-check` measures against cuDNN on a machine with a GPU, "
    "and `benchmarks/report_gpu.py` puts the table here."
)
KINDS = {"inference": "inference", "training": "training step"}


def newest() -> Path | None:
    found = [(_benchmark(json.loads(path.read_text())), path) for path in RESULTS.glob("gpu_*.json")]
    dated = [(benchmark["facts"]["date"], path) for benchmark, path in found if benchmark]
    return max(dated)[1] if dated else None


def _benchmark(record: dict[str, Any]) -> dict[str, Any] | None:
    return record["benchmark"] if "phases" in record else record


def measured(record: dict[str, Any], kernel: str | None = "auto") -> list[dict[str, Any]]:
    """With the kernels that a layer takes by itself, or with one of them, or, None, with all."""
    benchmark = _benchmark(record)
    results = [r for r in benchmark["results"] if "ratio" in r] if benchmark else []
    return [r for r in results if kernel in (None, r.get("kernel", "auto"))]


def identity(result: dict[str, Any]) -> tuple[Any, ...]:
    return result["group"], result["shape"], result["graph"]


def chosen(results: list[dict[str, Any]], everything: bool) -> list[tuple[Any, ...]]:
    """Shapes in the order in which they were measured; of each group the first, unless all are wanted."""
    shapes = list(dict.fromkeys(identity(r) for r in results))
    if everything:
        return shapes
    first: dict[tuple[str, bool], tuple[Any, ...]] = {}
    for shape in shapes:
        first.setdefault((shape[0], shape[2]), shape)
    return list(first.values())


def number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def speed(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    theirs, ours = (number(result[side]["us_per_step"]) for side in ("torch", "ours"))
    doubt = "" if result["agree"] else " (!)"
    return f"{theirs} → {ours}, **{result['ratio']:.2f}×**{doubt}"


def parts(result: dict[str, Any] | None) -> str:
    """Forward and backward of a training step, µs a time step, ours."""
    if result is None:
        return ""
    return " + ".join(
        number(1e3 * result["ours"][part] / result["steps"]) for part in ("forward", "backward")
    )


def floor(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    return " → ".join(f"{100 * result[side]['share_of_floor']:.1f} %" for side in ("torch", "ours"))


def memory(result: dict[str, Any] | None) -> str:
    if result is None or not result["ours"].get("peak_bytes") or not result["torch"].get("peak_bytes"):
        return ""
    return f"{result['ours']['peak_bytes'] / result['torch']['peak_bytes']:.2f}"


def title(result: dict[str, Any]) -> str:
    extras = [f"{result['layers']} layers"] if result["layers"] > 1 else []
    extras += ["bidirectional"] if result.get("bidirectional") else []
    extras += ["packed"] if result["packed"] else []
    extras += ["CUDA graph"] if result["graph"] else []
    return ", ".join(extras)


def markdown(record: dict[str, Any], everything: bool = False) -> str:
    results = measured(record)
    header = ["B", "T", "I", "H", "", "dtype", "inference", "training step", "forward + backward",
              "of the floor", "memory"]  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for shape in chosen(results, everything):
        for dtype in DTYPES:
            found = {r["kind"]: r for r in results if identity(r) == shape and r["dtype"] == dtype}
            if not found:
                continue
            any_of = next(iter(found.values()))
            sizes = [any_of[name] for name in ("batch", "steps", "input_size", "hidden_size")]
            inference, training = (found.get(kind) for kind in KINDS)
            cells = [*sizes, title(any_of), dtype, speed(inference), speed(training), parts(training),
                     floor(inference), memory(training)]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "| dtype | " + " | ".join(f"{k}: cases, geometric mean, worst" for k in KINDS.values()) + " |",
    ]
    lines.append("|---|---|---|")
    for dtype in DTYPES:
        cells = []
        for kind in KINDS:
            ratios = [r["ratio"] for r in results if (r["dtype"], r["kind"]) == (dtype, kind)]
            mean = f"{harness.geometric_mean(ratios):.2f}, {min(ratios):.2f}" if ratios else ""
            cells.append(f"{len(ratios)}, {mean}" if ratios else "")
        lines.append(f"| {dtype} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "µs a time step: torch.nn.LSTM (cuDNN) → lstm_ext.LSTM, medians, and the ratio; above 1, lstm_ext is faster. "
        "Forward + backward: the two halves of our training step. Of the floor: which share the least possible time "
        "on this card, by the rate of torch.mm and the bandwidth of a copy, has of the measured one, inference. "
        "Memory: peak of a training step, lstm_ext / torch. tf32: float32 with TF32 allowed on both sides. (!): the "
        "two results differ by more than the dtype explains.",
        "",
        facts_line(record),
    ]
    return "\n".join(lines)


def facts_line(record: dict[str, Any]) -> str:
    benchmark = _benchmark(record)
    assert benchmark is not None
    facts = benchmark["facts"]
    smi = facts.get("nvidia_smi") or {}
    says = [
        facts.get("card") or facts["cpu"],
        f"driver {smi['driver_version']}" if "driver_version" in smi else "",
        f"torch {facts['torch']}",
        f"cuDNN {facts['cudnn']}" if facts.get("cudnn") else "",
        f"lstm_ext {facts['lstm_ext']}" + (f" at {facts['git_commit']}" if facts["git_commit"] else ""),
        facts["date"][:10],
        f"{len(benchmark['left_out'])} of the cases left out, for want of time"
        if benchmark["left_out"]
        else "",
    ]
    line = "; ".join(filter(None, says)) + "."
    if "phases" in record:
        line += (
            " `make gpu-check`: " + ", ".join(f"{p['phase']} {p['result']}" for p in record["phases"]) + "."
        )
    return line


def draw(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    results = measured(record)
    shapes = chosen(results, everything=False)
    dtypes = [d for d in DTYPES if any(r["dtype"] == d for r in results)]
    colors = dict(zip(DTYPES, ("#4477aa", "#88bbdd", "#cc9944", "#eecc88"), strict=True))
    height = 0.8 / max(1, len(dtypes))
    figure, panels = plt.subplots(
        1, 2, figsize=(12, 0.7 * len(shapes) + 1.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, kind in zip(panels[0], KINDS, strict=True):
        for i, dtype in enumerate(dtypes):
            for y, shape in enumerate(shapes):
                found = [
                    r for r in results if identity(r) == shape and (r["dtype"], r["kind"]) == (dtype, kind)
                ]
                for r in found[:1]:
                    place = y + (i - (len(dtypes) - 1) / 2) * height
                    # bars start at 1, the speed of torch: to the right faster, to the left slower
                    axes.barh(place, r["ratio"] - 1, height * 0.92, left=1, color=colors[dtype])
                    axes.annotate(
                        f"{r['ratio']:.2f}", (max(r["ratio"], 1), place), xytext=(3, 0), textcoords="offset points",
                        va="center", fontsize=7,
                    )  # fmt: skip
        axes.axvline(1, color="black", lw=0.8)
        axes.set_xscale("log")
        ratios = [r["ratio"] for r in results if identity(r) in shapes] or [1]
        axes.set_xlim(min(0.7, *ratios) * 0.9, max(2.0, *ratios) * 1.5)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(KINDS[kind])
        axes.set_xlabel("speed relative to torch.nn.LSTM (cuDNN)")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_yticks(range(len(shapes)), [f"{s[1]}{' graph' if s[2] else ''}" for s in shapes])
    panels[0][0].invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=colors[d]) for d in dtypes]
    panels[0][1].legend(handles, dtypes, loc="lower right", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", metavar="results.json")
    parser.add_argument("--all", action="store_true", help="every shape")
    parser.add_argument("--document", type=Path, help="replace what is between the markers of this file")
    parser.add_argument("--picture", type=Path, help="where to write the picture")
    options = parser.parse_args(arguments)
    path = options.results or newest()
    record = json.loads(path.read_text()) if path else None
    table = markdown(record, options.all) if record and measured(record) else NOT_YET
    if options.document:
        replace_block(options.document, BLOCK, table)
    else:
        print(table)
        if record:
            print(f"\n{report_gpu_targets.table(measured(record, kernel=None))}")
    if options.picture and record and measured(record):
        draw(record, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
