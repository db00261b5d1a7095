"""Make the table and the picture of docs/performance.md from the JSON of bench_quick.py.

    python benchmarks/report.py benchmarks/results/NAME.json [--document docs/performance.md]
                                [--block bench-avx2] [--picture docs/bench_cpu.png]

Without --document the table goes to standard output; with it, the table replaces what stands between the two markers of
the block, <!-- bench:begin --> and <!-- bench:end --> unless --block names another.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

MARKERS = "<!-- {}:begin -->", "<!-- {}:end -->"
TITLES = {"inference": "inference", "training": "training step", "step": "one step", "memory": "peak memory"}


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def find(results: list[dict], group: str, shape: str, threads: int) -> dict | None:
    for result in results:
        if (result["group"], result["shape"], result["threads"]) == (group, shape, threads):
            return result  # of the two ways to run a step, the module's call comes first
    return None


def cell(result: dict | None) -> str:
    if result is None:
        return ""
    if result["group"] == "memory":
        return f"{result['ratio']:.2f}"
    theirs, ours = (milliseconds(result[side]["median"]) for side in ("torch", "ours"))
    return f"{theirs} → {ours} ms, **{result['ratio']:.2f}×**"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def plural(threads: int) -> str:
    return f"{threads} thread" + ("s" if threads != 1 else "")


def facts_line(record: dict) -> str:
    facts = record["facts"]
    parts = [
        f"{facts['cpu']}, {facts['cores']} cores",
        f"instruction set in use: {facts['lstm_ext_cpu_capability'] or 'none'}",
        f"torch {facts['torch']}",
        f"lstm_ext {facts['lstm_ext']}" + (f" at {facts['git_commit']}" if facts["git_commit"] else ""),
        facts["date"][:10],
    ]
    return "; ".join(parts) + "."


def markdown(record: dict) -> str:
    results = record["results"]
    shapes = list(dict.fromkeys((r["shape"], r["batch"], r["steps"], r["input_size"], r["hidden_size"])
                                for r in results))  # fmt: skip
    columns = [
        (group, threads)
        for group in ("inference", "training", "memory")
        for threads in sorted({r["threads"] for r in results if r["group"] == group})
    ]
    header = ["B", "T", "I", "H", *(f"{TITLES[group]}, {plural(threads)}" for group, threads in columns)]
    rows = []
    for shape, *sizes in shapes:
        cells = [cell(find(results, group, shape, threads)) for group, threads in columns]
        if any(cells):
            rows.append([*map(str, sizes), *cells])
    lines = table(header, rows)

    steps = [
        f"{plural(r['threads'])}: {cell(r)}" + (" with `step()`" if r["method"] == "step" else "")
        for r in results
        if r["group"] == "step"
    ]
    if steps:
        lines += [
            "",
            f"One step with carried state, B 1, H 128, from the call of the module on: {'; '.join(steps)}.",
        ]

    lines += ["", "| | cases | geometric mean (target) | worst (target) |", "|---|---|---|---|"]
    for line in record["summary"]:
        memory = line["group"] == "memory"
        target = line["target_geometric_mean"]
        mean = f"{line['geometric_mean']:.2f}" + (f" (≥ {target})" if target else "")
        worst = f"{line['worst']:.2f} ({'≤' if memory else '≥'} {line['target_worst']})"
        lines.append(f"| {TITLES[line['group']]} | {line['cases']} | {mean} | {worst} |")
    lines += [
        "",
        "Time: torch.nn.LSTM → lstm_ext.LSTM, medians, and their ratio; above 1, lstm_ext is faster. Memory: peak of "
        "a training step, lstm_ext / torch; below 1, lstm_ext needs less. float32, one layer; both sides alternate "
        "in one run. In the second table, inference leaves out T = 1, which has a line of its own, one step.",
        "",
        facts_line(record),
    ]
    return "\n".join(lines)


def split_at_block(path: Path, block: str) -> tuple[str, str, str]:
    """The text before the block, with its first marker; in it; and after it, with its last marker."""
    begin, end = (marker.format(block) for marker in MARKERS)
    text = path.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"{path}: expected the line {begin}, and below it {end}, once each")
    head, rest = text.split(begin)
    inside, tail = rest.split(end)
    return head + begin, inside.strip("\n"), end + tail


def replace_block(path: Path, block: str, content: str) -> None:
    head, _, tail = split_at_block(path, block)
    path.write_text(f"{head}\n{content}\n{tail}")


def draw(record: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    results = record["results"]
    groups = [g for g in ("inference", "training") if any(r["group"] == g for r in results)]
    shapes = list(dict.fromkeys(r["shape"] for r in results if r["group"] in groups))
    threads = sorted({r["threads"] for r in results if r["group"] in groups})
    colors = ["#4477aa", "#88bbdd", "#cc9944", "#eecc88"]
    height = 0.8 / max(1, len(threads))

    figure, panels = plt.subplots(
        1, len(groups), figsize=(5.2 * len(groups) + 1, 0.5 * len(shapes) + 1.6), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    ratios = [r["ratio"] for r in results if r["group"] in groups]
    for axes, group in zip(panels[0], groups, strict=True):
        for i, number in enumerate(threads):
            found = [find(results, group, shape, number) for shape in shapes]
            places = [y + (i - (len(threads) - 1) / 2) * height for y, r in enumerate(found) if r]
            values = [r["ratio"] for r in found if r]
            # bars start at 1, the speed of torch: to the right faster, to the left slower
            bars = axes.barh(
                places,
                [v - 1 for v in values],
                height * 0.92,
                left=1,
                color=colors[i % 4],
                label=plural(number),
            )
            for bar, value in zip(bars, values, strict=True):
                axes.annotate(
                    f"{value:.2f}", (max(value, 1), bar.get_y() + bar.get_height() / 2), xytext=(3, 0),
                    textcoords="offset points", va="center", fontsize=8,
                )  # fmt: skip
        axes.axvline(1, color="black", lw=0.8)
        axes.set_xscale("log")
        axes.set_xlim(min(0.7, *ratios) * 0.95, max(2.0, *ratios) * 1.35)
        axes.set_xticks(
            [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if axes.get_xlim()[0] < t < axes.get_xlim()[1]]
        )
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(TITLES[group])
        axes.set_xlabel("speed relative to torch.nn.LSTM")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_yticks(range(len(shapes)), shapes)
    panels[0][0].invert_yaxis()
    panels[0][-1].legend(loc="lower right", frameon=False)
    figure.supxlabel(f"float32, one layer, one machine: {facts_line(record)}", fontsize=8, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A table and a picture from the JSON of bench_quick.py.")
    parser.add_argument("results", type=Path, metavar="results.json")
    parser.add_argument("--document", type=Path, help="replace the table between the markers of this file")
    parser.add_argument("--block", default="bench", help="the name in the markers")
    parser.add_argument("--picture", type=Path, help="where to write the picture")
    options = parser.parse_args(arguments)
    record = json.loads(options.results.read_text())
    if options.document:
        replace_block(options.document, options.block, markdown(record))
    else:
        print(markdown(record))
    if options.picture:
        draw(record, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
