"""Pictures of one file of bench.py, as PNG.

    python benchmarks/plots.py RECORD.json [--folder build/plots] [--only NAME ...]

speed       our layer against torch's, by shape
peers       a call without gradients, by shape: our layer, frozen, ONNX Runtime, OpenVINO
dtypes      our layer against torch's in each dtype
threads     what more threads give
over_t      speed where only the number of steps changes; over_b, over_h: the batch, the hidden units
step        one step of a frozen layer, and the bound that bandwidth sets
roofline    arithmetic a second, by how often a byte is used
memory      peak of a training step

A picture whose cases the file does not have is left out, and said so.
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import records
from machine import MEMORY
from records import Result
from report import facts_line, plural
from shapes import CENTRE, SWEEPS, Shape

WIDTH = 9.0  # inches, at 110 points each: as wide as a README is shown
DPI = 110
SWEPT = {name for sweep in SWEEPS.values() for name in sweep}
COLORS = {
    "torch": "#555555",
    "ours": "#4477aa",
    "step": "#4477aa",
    "frozen": "#22aadd",
    "frozen-bfloat16": "#aa3377",
    "frozen-int8": "#228833",
    "onnxruntime": "#cc9922",
    "openvino": "#ee6677",
    "torch-int8": "#999999",
    "recompute": "#22aadd",
    "float32": "#4477aa",
    "bfloat16": "#aa3377",
    "float16": "#228833",
    "float64": "#cc9922",
}
MARKERS = {"torch": "x", "ours": "o", "frozen": "s", "onnxruntime": "^", "openvino": "v"}
TITLES = {
    "torch": "torch",
    "ours": "lstm_ext",
    "step": "lstm_ext, step()",
    "frozen": "lstm_ext, frozen",
    "frozen-bfloat16": "frozen, bfloat16",
    "frozen-int8": "frozen, int8",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "torch-int8": "torch.ao, int8",
    "recompute": "lstm_ext, recompute",
}
KINDS = {False: "inference", True: "training step"}
RELATIVE = "speed relative to torch"


class NothingToDraw(Exception):
    """What the file would need."""


# ---- what is in the file


def chosen(record: Result, *groups: str, swept: bool = False) -> list[Result]:
    found = [r for r in record["results"] if r["group"] in groups and (swept or r["case"] not in SWEPT)]
    if not found:
        raise NothingToDraw(f"no case of {' or '.join(groups)}")
    return found


def values_of(results: list[Result], field: str) -> list[Any]:
    """In the order in which they were measured."""
    return list(dict.fromkeys(r[field] for r in results))


def rivals(results: list[Result]) -> list[str]:
    """The sides that stand against torch."""
    names = dict.fromkeys(name for r in results for name in r["sides"])
    return [name for name in names if name != "torch"]


def shape_of(result: Result) -> Shape:
    return Shape(*(result[name] for name in Shape._fields))


def work_of(shape: Shape) -> tuple[float, float]:
    """Floating-point operations of the products, and bytes that the steps read and write: the weights in each step.

    The first step begins with a state of zeros, and has no product with the recurrent weights.
    """
    flops = moved = 0.0
    features, hidden = shape.input_size, shape.hidden_size
    for _ in range(shape.layers):
        weights = 4 * hidden * (shape.steps * features + (shape.steps - 1) * hidden)  # each time it is read
        flops += 2.0 * shape.directions * shape.batch * weights
        moved += 4.0 * shape.directions * (weights + shape.steps * shape.batch * (features + 2 * hidden))
        features = hidden * shape.directions
    return flops, moved


# ---- parts of pictures


def canvas(rows: int, columns: int, height: float, **options: Any) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    return plt.subplots(
        rows, columns, figsize=(WIDTH, height), squeeze=False, layout="constrained", **options
    )


def finish(figure: Any, record: Result, axes: Any = None) -> Any:
    """One legend above all panels, and below them what machine it was."""
    handles: dict[str, Any] = {}
    for panel in figure.axes if axes is None else axes:
        panel.spines[["top", "right"]].set_visible(False)
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    rows = math.ceil(len(handles) / 5)
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=math.ceil(len(handles) / rows),
        frameon=False, fontsize=9,
    )  # fmt: skip
    text = "\n".join(textwrap.wrap(facts_line(record), 140))
    figure.supxlabel(text, fontsize=7.5, color="#555555")
    return figure


def times_axis(axis: Any, limits: tuple[float, float]) -> None:
    """Of ratios: logarithmic, with ticks at powers of two where they are few, at powers of four or more where not."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    low, high = math.floor(math.log2(limits[0])), math.ceil(math.log2(limits[1]))
    stride = max(1, math.ceil((high - low) / 8))
    ticks = [2.0**power for power in range(low, high + 1) if power % stride == 0]
    axis.set_major_locator(FixedLocator([t for t in ticks if limits[0] <= t <= limits[1]]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axis.set_minor_formatter(NullFormatter())


def around(values: list[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis that show all values, and 1."""
    return min(0.9, *values) / 1.12, max(1.5, *values) * 1.12


def log_of_two(axis: Any, ticks: list[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def dots(axes: Any, rows: list[str], points: list[tuple[str, float]], **style: Any) -> None:
    axes.scatter(
        [value for _, value in points], [rows.index(name) for name, _ in points], zorder=3, s=26, **style
    )


def rows_of_shapes(panels: list[Any], rows: list[str], values: list[float]) -> None:
    for panel in panels:
        panel.axvline(1, color="black", lw=0.9)
        panel.set_xscale("log")
        panel.set_xlim(*around(values))
        times_axis(panel.xaxis, around(values))
        panel.grid(axis="both", color="#e4e4e4", lw=0.6)
        panel.set_axisbelow(True)
        panel.set_xlabel(RELATIVE)
        panel.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)


# ---- the pictures


def speed(record: Result) -> Any:
    results = [r for r in chosen(record, "inference", "training") if "ours" in r["sides"]]
    rows, kinds = values_of(results, "case"), values_of(results, "training")
    figure, panels = canvas(1, len(kinds), 1.6 + 0.21 * len(rows), sharey=True)
    colors = ["#4477aa", "#ee6677", "#228833", "#cc9922"]
    for panel, training in zip(panels[0], kinds, strict=True):
        for place, threads in enumerate(sorted(values_of(results, "threads"))):
            points = [
                (r["case"], records.ratio(r, "ours"))
                for r in results
                if (r["training"], r["threads"]) == (training, threads)
            ]
            marker = "osD^"[place % 4]
            dots(panel, rows, points, color=colors[place % 4], marker=marker, label=plural(threads))
        panel.set_title(KINDS[training], fontsize=10)
    rows_of_shapes(list(panels[0]), rows, [records.ratio(r, "ours") for r in results])
    return finish(figure, record)


def peers(record: Result) -> Any:
    results = chosen(record, "inference")
    rows, threads = values_of(results, "case"), sorted(values_of(results, "threads"))
    figure, panels = canvas(1, len(threads), 1.6 + 0.21 * len(rows), sharey=True)
    ratios = []
    for panel, number in zip(panels[0], threads, strict=True):
        for name in rivals(results):
            points = [
                (r["case"], records.ratio(r, name))
                for r in results
                if r["threads"] == number and name in r["sides"]
            ]
            dots(
                panel, rows, points, color=COLORS[name], marker=MARKERS[name], label=TITLES[name], alpha=0.85
            )
            ratios += [value for _, value in points]
        panel.set_title(f"inference, {plural(number)}", fontsize=10)
    rows_of_shapes(list(panels[0]), rows, ratios)
    return finish(figure, record)


def dtypes(record: Result) -> Any:
    low = chosen(record, "dtypes")
    cases = values_of(low, "case")
    plain = [r for r in record["results"] if r["group"] in ("inference", "training") and r["case"] in cases]
    results = plain + low
    names, threads = values_of(results, "dtype"), sorted(values_of(results, "threads"))
    kinds = values_of(low, "training")
    figure, panels = canvas(len(kinds), 1, 1.5 + 2.5 * len(kinds), sharex=True)
    columns = [(case, number) for case in cases for number in threads]
    width = 0.84 / len(names)
    every = [records.ratio(r, "ours") for r in results]
    for panel, training in zip(panels[:, 0], kinds, strict=True):
        for place, dtype in enumerate(names):
            found = {
                (r["case"], r["threads"]): records.ratio(r, "ours")
                for r in results
                if (r["dtype"], r["training"]) == (dtype, training)
            }
            at = [i + (place - (len(names) - 1) / 2) * width for i, c in enumerate(columns) if c in found]
            values = [found[column] for column in columns if column in found]
            panel.bar(
                at,
                [v - 1 for v in values],
                width * 0.94,
                bottom=1,
                color=COLORS[dtype],
                label=dtype,
                zorder=2,
            )
        panel.axhline(1, color="black", lw=0.9)
        panel.set_yscale("log")
        panel.set_ylim(*around(every))
        times_axis(panel.yaxis, around(every))
        panel.grid(axis="y", color="#e4e4e4", lw=0.6)
        panel.set_axisbelow(True)
        panel.set_ylabel(RELATIVE, fontsize=9)
        panel.set_title(KINDS[training], fontsize=10)
    labels = [f"{case.replace('-', ' ')}\n{plural(number)}" for case, number in columns]
    panels[-1, 0].set_xticks(
        range(len(columns)), labels, fontsize=7.5, rotation=50, ha="right", rotation_mode="anchor"
    )
    return finish(figure, record)


def threads(record: Result) -> Any:
    """Time with one thread over that with more: every shape lightly, and the geometric mean of each side."""
    results = chosen(record, "inference", "training", swept=True)
    numbers, kinds = sorted(values_of(results, "threads")), values_of(results, "training")
    if len(numbers) < 2 or numbers[0] != 1:
        raise NothingToDraw("cases with one thread and with more")
    figure, panels = canvas(1, len(kinds), 4.2, sharey=True)
    for panel, training in zip(panels[0], kinds, strict=True):
        of_kind = [r for r in results if r["training"] == training]
        times = {
            (r["case"], name, r["threads"]): side["median"]
            for r in of_kind
            for name, side in r["sides"].items()
        }
        names = ["torch", *rivals(of_kind)]
        for place, name in enumerate(names):
            lines = [
                [times[case, name, 1] / times[case, name, n] for n in numbers]
                for case in values_of(of_kind, "case")
                if all((case, name, n) in times for n in numbers)
            ]
            if not lines:
                continue
            means = [harness.geometric_mean(column) for column in zip(*lines, strict=True)]
            panel.plot(
                numbers, means, color=COLORS[name], marker=MARKERS[name], lw=2, label=TITLES[name], zorder=3
            )
            for n, column in list(zip(numbers, zip(*lines, strict=True), strict=True))[1:]:
                at = n + (place - (len(names) - 1) / 2) * 0.035 * numbers[-1] + 0.12 * numbers[-1]
                panel.scatter([at] * len(column), column, color=COLORS[name], s=7, alpha=0.45, lw=0)
        panel.axhline(1, color="black", lw=0.9)
        panel.set_xticks(numbers)
        panel.set_yscale("log")
        panel.grid(axis="y", color="#e4e4e4", lw=0.6)
        panel.set_xlabel("threads; beside the lines, each shape")
        panel.set_title(KINDS[training], fontsize=10)
    low, high = panels[0, 0].get_ylim()
    limits = max(low, 1 / 8), min(high, 2.0 * numbers[-1])
    panels[0, 0].set_ylim(*limits)
    times_axis(panels[0, 0].yaxis, limits)
    panels[0, 0].set_ylabel("time with one thread / with these")
    return finish(figure, record)


def over(field: str, title: str) -> Callable[[Result], Any]:
    def draw(record: Result) -> Any:
        def on_the_line(result: Result) -> bool:
            shape = shape_of(result)
            changed = {field: result[field]}
            if field == "hidden_size":
                changed["input_size"] = result[field]
            return shape == CENTRE._replace(**changed)

        every = chosen(record, "inference", "training", swept=True)
        results = sorted((r for r in every if on_the_line(r)), key=lambda r: r[field])
        if len(values_of(results, field)) < 2:
            raise NothingToDraw(f"two cases or more that differ in {title} only")
        kinds, numbers = values_of(results, "training"), sorted(values_of(results, "threads"))
        figure, panels = canvas(len(kinds), len(numbers), 1.3 + 2.5 * len(kinds), sharex=True, sharey="row")
        for row, training in zip(panels, sorted(kinds), strict=True):
            ratios = []
            for panel, number in zip(row, numbers, strict=True):
                here = [r for r in results if (r["training"], r["threads"]) == (training, number)]
                for name in rivals(here):
                    points = [(r[field], records.ratio(r, name)) for r in here if name in r["sides"]]
                    panel.plot(
                        *zip(*points, strict=True),
                        color=COLORS[name],
                        marker=MARKERS[name],
                        ms=5,
                        label=TITLES[name],
                    )
                    ratios += [value for _, value in points]
                panel.axhline(1, color="black", lw=0.9)
                panel.set_xscale("log")
                panel.grid(color="#e4e4e4", lw=0.6)
                panel.set_title(f"{KINDS[training]}, {plural(number)}", fontsize=10)
                log_of_two(panel.xaxis, values_of(results, field))
            row[0].set_yscale("log")
            row[0].set_ylim(*around(ratios))
            times_axis(row[0].yaxis, around(ratios))
            row[0].set_ylabel(RELATIVE, fontsize=9)
        fixed = [
            f"{letter} {getattr(CENTRE, name)}"
            for letter, name in (("B", "batch"), ("T", "steps"), ("H", "hidden_size"))
            if name != field
        ]
        for panel in panels[-1]:
            panel.set_xlabel(f"{title}; {', '.join(fixed)}")
        return finish(figure, record)

    return draw


def step(record: Result) -> Any:
    results = [r for r in chosen(record, "step") if "bounds" in r]
    if not results:
        raise NothingToDraw("one step of frozen layers")
    numbers = sorted(values_of(results, "threads"))
    figure, panels = canvas(1, len(numbers), 4.6, sharey=True)
    for panel, number in zip(panels[0], numbers, strict=True):
        here = sorted((r for r in results if r["threads"] == number), key=lambda r: r["hidden_size"])
        for name in ("torch", "onnxruntime", "openvino", "step", "frozen", "frozen-bfloat16", "frozen-int8"):
            points = [
                (r["hidden_size"], 1e3 * r["sides"][name]["median"]) for r in here if name in r["sides"]
            ]
            if points:
                panel.plot(
                    *zip(*points, strict=True),
                    color=COLORS[name],
                    marker=MARKERS.get(name, "o"),
                    ms=4,
                    label=TITLES[name],
                )
            bound = [(r["hidden_size"], r["bounds"][name]["bound_us"]) for r in here if name in r["bounds"]]
            if bound:
                panel.plot(
                    *zip(*bound, strict=True),
                    color=COLORS[name],
                    ls=":",
                    lw=1.6,
                    label=f"bound, {TITLES[name].removeprefix('lstm_ext, ')}",
                )
        panel.set_xscale("log")
        panel.set_yscale("log")
        log_of_two(panel.xaxis, values_of(here, "hidden_size"))
        panel.grid(color="#e4e4e4", lw=0.6)
        panel.set_xlabel("hidden units and features; batch 1")
        panel.set_title(f"one step with carried state, {plural(number)}", fontsize=10)
    panels[0, 0].set_ylabel("µs a step")
    plain_numbers(panels[0, 0].yaxis)
    return finish(figure, record)


def plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def roofline(record: Result) -> Any:
    results = chosen(record, "inference", swept=True)
    numbers = sorted(values_of(results, "threads"))
    figure, panels = canvas(1, len(numbers), 4.8, sharey=True)
    for panel, number in zip(panels[0], numbers, strict=True):
        here = [r for r in results if r["threads"] == number]
        work = [work_of(shape_of(r)) for r in here]
        used = [flops / moved for flops, moved in work]
        for name in ("torch", "ours", "frozen"):
            points = [
                (use, 1e-6 * flops / r["sides"][name]["median"])
                for r, (flops, _), use in zip(here, work, used, strict=True)
                if name in r["sides"]
            ]
            panel.scatter(
                *zip(*points, strict=True),
                s=18,
                color=COLORS[name],
                marker=MARKERS[name],
                label=TITLES[name],
                alpha=0.8,
                zorder=3,
            )
        draw_roofs(panel, record, number, (min(used) / 1.5, max(used) * 2))
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.grid(color="#e4e4e4", lw=0.6)
        panel.set_xlabel("operations for each byte that the steps read or write")
        panel.set_title(f"inference, float32, {plural(number)}", fontsize=10)
        plain_numbers(panel.xaxis)
    panels[0, 0].set_ylabel("GFLOP/s of the products")
    plain_numbers(panels[0, 0].yaxis)
    return finish(figure, record)


def draw_roofs(panel: Any, record: Result, threads: int, span: tuple[float, float]) -> None:
    machine = record["machine"]
    peaks = [p["gflops"] for p in machine["peak"] if (p["dtype"], p["threads"]) == ("float32", threads)]
    speeds = {b["bytes"]: b["gigabytes_per_second"] for b in machine["bandwidth"] if b["threads"] == threads}
    top = peaks[0] if peaks else float("inf")
    if peaks:
        panel.plot(span, [top, top], color="black", lw=1.2, label="peak of a product")
    for size, style, name in ((512 * 1024, "--", "512 KiB"), (MEMORY, ":", "128 MiB")):
        if size in speeds and top / speeds[size] > span[0]:
            ends = [span[0], min(span[1], top / speeds[size])]
            panel.plot(
                ends,
                [x * speeds[size] for x in ends],
                color="black",
                ls=style,
                lw=1.2,
                label=f"reading {name}",
            )


def memory(record: Result) -> Any:
    results = chosen(record, "memory")
    cases, numbers = values_of(results, "case"), sorted(values_of(results, "threads"))
    figure, panels = canvas(1, len(numbers), 3.6, sharey=True)
    names = ["torch", *rivals(results)]
    width = 0.84 / len(names)
    for panel, number in zip(panels[0], numbers, strict=True):
        found = {r["case"]: r for r in results if r["threads"] == number}
        for place, name in enumerate(names):
            at = [i + (place - (len(names) - 1) / 2) * width for i, case in enumerate(cases) if case in found]
            heights = [
                found[case]["sides"][name]["median"] / harness.MEBIBYTE for case in cases if case in found
            ]
            bars = panel.bar(at, heights, width * 0.94, color=COLORS[name], label=TITLES[name], zorder=2)
            panel.bar_label(bars, [f"{height:.0f}" for height in heights], fontsize=7, padding=1)
        panel.set_yscale("log")
        panel.grid(axis="y", color="#e4e4e4", lw=0.6)
        panel.set_axisbelow(True)
        panel.set_xticks(range(len(cases)), [case.replace("-", "\n") for case in cases], fontsize=8)
        panel.set_title(f"peak of a training step, {plural(number)}", fontsize=10)
    panels[0, 0].set_ylabel("MiB beyond weights and data")
    plain_numbers(panels[0, 0].yaxis)
    low, high = panels[0, 0].get_ylim()
    panels[0, 0].set_ylim(low, high * 1.3)
    return finish(figure, record)


PICTURES: dict[str, Callable[[Result], Any]] = {
    "speed": speed,
    "peers": peers,
    "dtypes": dtypes,
    "threads": threads,
    "over_t": over("steps", "steps T"),
    "over_b": over("batch", "batch B"),
    "over_h": over("hidden_size", "hidden units H and features"),
    "step": step,
    "roofline": roofline,
    "memory": memory,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path, metavar="RECORD.json")
    parser.add_argument("--folder", type=Path, default=Path("build") / "plots")
    parser.add_argument("--only", nargs="+", choices=list(PICTURES), default=list(PICTURES), metavar="NAME",
                        help=", ".join(PICTURES))  # fmt: skip
    options = parser.parse_args(arguments)
    record = records.read(options.record)
    try:
        import matplotlib
    except ImportError:
        print("error: plots.py needs matplotlib: pip install 'lstm_ext[bench]'", file=sys.stderr)
        return 1
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        path = options.folder / f"{name}.png"
        try:
            figure = PICTURES[name](record)
        except NothingToDraw as missing:
            print(f"{name}: not drawn: the file lacks {missing}")
            continue
        figure.savefig(path, dpi=DPI)
        plt.close(figure)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
