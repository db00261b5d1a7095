"""Pictures of a record of bench.py, and of one of bench_quick.py: speed by shape, and what explains it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib.pyplot as plt
import records
from machine import MEMORY
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from records import Result
from shapes import SWEEPS

from .suite import SIDES, shape_of, work_of
from .text import facts_line, kind_of, plural

WIDTH = 9.0  # inches, at 110 points each: as wide as a README is shown
SWEPT = {name for sweep in SWEEPS.values() for name in sweep}
COLORS = {
    "torch": "#555555",
    "ours": "#4477aa",
    "frozen": "#22aadd",
    "onnxruntime": "#cc9922",
    "openvino": "#ee6677",
}
MARKERS = {"torch": "x", "ours": "o", "frozen": "s", "onnxruntime": "^", "openvino": "v"}
TITLES = {"torch": "torch", **SIDES}
RELATIVE = "speed relative to torch"


class NothingToDraw(Exception):
    """Says what the file would need."""


def chosen(record: Result, *groups: str, swept: bool = False) -> list[Result]:
    found = [r for r in record["results"] if r["group"] in groups and (swept or r["case"] not in SWEPT)]
    if not found:
        raise NothingToDraw(f"a case of {' or '.join(groups)}")
    return found


def values_of(results: list[Result], field: str) -> list[Any]:
    """In the order in which they were measured."""
    return list(dict.fromkeys(r[field] for r in results))


def rivals(results: list[Result]) -> list[str]:
    """The sides that stand against torch."""
    names = dict.fromkeys(name for r in results for name in r["sides"])
    return [name for name in names if name != "torch"]


# ---- parts of pictures


def canvas(rows: int, columns: int, height: float, **options: Any) -> tuple[Any, Any]:
    return plt.subplots(
        rows, columns, figsize=(WIDTH, height), squeeze=False, layout="constrained", **options
    )


def finish(figure: Any, record: Result) -> Any:
    """One legend above all panels, and below them what machine it was."""
    handles: dict[str, Any] = {}
    for panel in figure.axes:
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


def plain_numbers(axis: Any, unit: str = "") -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))


def times_axis(axis: Any, limits: tuple[float, float]) -> None:
    """Of ratios: logarithmic, with ticks at powers of two where they are few, at powers of four or more where not."""
    low, high = math.floor(math.log2(limits[0])), math.ceil(math.log2(limits[1]))
    stride = max(1, math.ceil((high - low) / 8))
    ticks = [2.0**power for power in range(low, high + 1) if power % stride == 0]
    axis.set_major_locator(FixedLocator([t for t in ticks if limits[0] <= t <= limits[1]]))
    axis.set_minor_locator(NullLocator())
    plain_numbers(axis, "×")
    axis.set_minor_formatter(NullFormatter())


def around(values: list[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis that show all values, and 1."""
    return min(0.9, *values) / 1.12, max(1.5, *values) * 1.12


def style_of(side: str) -> dict[str, str]:
    return {"color": COLORS[side], "marker": MARKERS[side], "label": TITLES[side]}


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
        panel.set_title(kind_of({"training": training}), fontsize=10)
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
            dots(panel, rows, points, alpha=0.85, **style_of(name))
            ratios += [value for _, value in points]
        panel.set_title(f"inference, {plural(number)}", fontsize=10)
    rows_of_shapes(list(panels[0]), rows, ratios)
    return finish(figure, record)


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
            panel.scatter(*zip(*points, strict=True), s=18, alpha=0.8, zorder=3, **style_of(name))
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
            heights = [x * speeds[size] for x in ends]
            panel.plot(ends, heights, color="black", ls=style, lw=1.2, label=f"reading {name}")


PICTURES: dict[str, Callable[[Result], Any]] = {
    "speed": speed,
    "peers": peers,
    "roofline": roofline,
}


def as_suite(record: Result) -> Result:
    """A record of bench_quick.py, whose cases have other names, and sides of their own."""
    results = [
        {
            **r,
            "case": r["shape"],
            "training": r["group"] == "training",
            "sides": {"torch": r["torch"], "ours": r["ours"]},
        }
        for r in record["results"]
        if r["group"] in ("inference", "training")
    ]
    return {**record, "results": results}


def pictures(record: Result) -> Iterator[tuple[str, Any]]:
    if record.get("suite") != records.SUITE:
        yield "bench_cpu", speed(as_suite(record))
        return
    for name, draw in PICTURES.items():
        try:
            yield f"suite_{name}", draw(record)
        except NothingToDraw as missing:
            print(f"suite_{name}: not drawn: the record lacks {missing}")
