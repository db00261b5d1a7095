"""The README's figures and its picture, and the summary of docs/performance.md: by use and processor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import harness
from records import Result, ratio

from . import ages, uses
from .tables import over

TORCHRL = "torchrl_cpu.json"
MEANING = (
    "The geometric mean of torch's time over ours, in brackets the worst case: above 1, ours is faster. Empty: not "
    "measured. "
)
SEVERAL = "Of several machines, all means and the worst of all."
COSTS = "float32 unless a line says otherwise. Of memory and other costs, less is better."


def torchrl(records: dict[str, Result], folder: str) -> list[str]:
    """No lines without its record."""
    if TORCHRL not in records:
        return []
    facts, results = records[TORCHRL]["facts"], records[TORCHRL]["results"]
    figures = []
    for base in ("torch", "pad"):
        ratios = [value for r in results if (value := over(r, "ours", base)) is not None]
        figures.append(f"{harness.geometric_mean(ratios):.2f} ({min(ratios):.2f})")
    return [
        "",
        f"Resets inside a sequence, in TorchRL's `LSTMModule`, {len(ratios)} cases: one call with `resets` is "
        f"{figures[0]} times as fast as torch's layer, which needs the rows cut at each reset, and {figures[1]} times "
        f"as fast as this layer on cut rows ({facts['cpu']}, `{facts['lstm_ext_cpu_capability']}`: "
        f"{uses.named(TORCHRL, records[TORCHRL], folder)}).",
    ]


def machines(records: dict[str, Result]) -> list[uses.Machine]:
    return uses.machines({file: record for file, record in records.items() if file != TORCHRL})


def slowest(records: dict[str, Result]) -> str:
    """What has to stand beside the word "faster"."""
    below = uses.means_below_one(machines(records))
    said = f": {'; '.join(below)}" if below else " in no use and on no processor that was measured"
    return f"Slower than torch in the mean{said}."


def span(values: list[Any]) -> str:
    return " to ".join(map(str, dict.fromkeys([min(values), max(values)])))


def faster(records: dict[str, Result]) -> str:
    """The table of the README, what it means, where it is below 1, and how it was measured."""
    found = machines(records)
    made = [record for machine in found for record in machine.files.values()]
    kept = {m.place: all([record["facts"]["freed_memory_kept"] for record in m.plain()]) for m in found}
    others = ", ".join(place for place, is_kept in kept.items() if not is_kept)
    dates = [record["facts"]["date"][:10] for record in made]
    loads = [round(record["facts"]["load_at_start"], 1) for record in made]
    threads = sorted({result["threads"] for record in made for result in record["results"]})
    old = sum(machine.is_old for machine in found)
    is_beside = len(made) > sum(len(machine.plain()) for machine in found)
    beside = " After the slash: with malloc as it is." if is_beside else ""
    memory = f"freed memory kept by `mallopt`{f' ({others}: malloc as it is)' if others else ''}"
    missing = "" if is_beside else "; torch with malloc as it is beside it: not measured yet"
    source = f"[The records](docs/performance.md#by-use-and-processor) of {len(found)} machines"
    return "\n".join(
        [
            *uses.of_uses(found, True),
            "",
            f"{MEANING}{SEVERAL}{beside}",
            "",
            slowest(records),
            "",
            f"{ages.marked(source, f'{old} old' if old else '')}: {span(dates)}, "
            f"{' and '.join(map(str, threads))} threads, load {span(loads)} at the start, {memory}{missing}.",
        ]
    )


def by_processor(records: dict[str, Result]) -> str:
    folder = "../benchmarks/results"
    lines = [
        *uses.of_uses(machines(records), False),
        "",
        MEANING + COSTS,
        *torchrl(records, folder),
        "",
        "The newest record of each machine:",
        "",
        *uses.sources(machines(records), folder),
    ]
    return "\n".join(lines)


def without_kernels(record: Result) -> str:
    """The layer on torch's own operator, over torch's layer."""

    def said(way: str) -> str:
        ratios = [ratio(r, "ours") for r in record["results"] if r["group"] == f"fallback-{way}"]
        return f"**{harness.geometric_mean(ratios):.2f}×** in the geometric mean, {min(ratios):.2f}× in the worst case"

    cases = sum(r["group"] == "fallback-eager" for r in record["results"])
    file = "contract_fallback_xeon_avx512_2_cores.json"
    return (
        f"- **Speed over torch's layer**, {cases} cases with 1 thread on a Xeon, where the kernels were switched off: "
        f"{said('eager')} by a plain call; {said('packed')} with a `PackedSequence`. "
        f"{uses.named(file, record, '../../benchmarks/results')}"
    )


def not_faster(records: dict[str, Result]) -> str:
    head = (
        "Cases in which torch, or the layer before freezing, is better, of all cases of a machine, by the figures of "
        "the table. A row or a machine that is not named has none:"
    )
    return "\n".join([head, "", *uses.slower(uses.machines(records))])


# ---- the picture

COLORS = {"AMX": "#aa3377", "AVX-512": "#4477aa", "AVX2": "#cc9922", "NEON": "#228833"}
ROWS = {
    "ragged": "ragged batches",
    "ragged-padded": "ragged, over padded torch",
    "policy": "policies: a loop over the steps",
    "policy-resets": "policies: one call with resets",
    "step": "one step",
    "frozen-step": "one step, frozen",
    "cell": "LSTMCell",
    "bfloat16": "bfloat16 inference",
    "bfloat16-training": "bfloat16 training",
    "inference": "inference, T > 1",
    "training": "training, T > 1",
    "large": f"inference, H ≥ {uses.LARGE}, B > 1",
    "large-training": f"training, H ≥ {uses.LARGE}, B > 1",
}


def times_axis(axes: Any, least: float, most: float) -> None:
    """Of ratios: logarithmic, with ticks at powers of two where they are few, at powers of four or more where not."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    low, high = math.floor(math.log2(least)), math.ceil(math.log2(most))
    stride = max(1, math.ceil((high - low) / 8))
    ticks = [2.0**power for power in range(low, high + 1) if power % stride == 0]
    axes.set_xscale("log")
    axes.set_xlim(least, most)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if least <= tick <= most]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def dots(axes: Any, points: list[tuple[str, float]], **style: Any) -> None:
    rows = list(ROWS.values())
    places = [rows.index(name) for name, _ in points]
    axes.scatter([value for _, value in points], places, zorder=3, s=26, **style)


def pictures(records: dict[str, Result]) -> Iterator[tuple[str, Any]]:
    """A row for each use: all cases of all machines, and the geometric mean of each machine."""
    import matplotlib.pyplot as plt

    found = machines(records)
    rows, label, ratios, labelled = list(ROWS.values()), [], [], set()
    # In inches, at 110 points each: as wide as a README is shown.
    figure, axes = plt.subplots(figsize=(9.0, 0.42 * len(rows) + 1.5), layout="constrained")
    for machine in found:
        name = uses.SETS[machine.set_name]
        points = [(ROWS[use], value) for use in ROWS for value in machine.uses.get(use, [])]
        means = [
            (ROWS[use], harness.geometric_mean(machine.uses[use])) for use in ROWS if use in machine.uses
        ]
        ratios += [value for _, value in points]
        dots(axes, points, color=COLORS[name], alpha=0.15, linewidths=0)
        style = {} if name in labelled else {"label": name}
        labelled.add(name)
        dots(axes, means, color=COLORS[name], marker="D", edgecolors="white", linewidths=0.6, **style)
        label += [f"{machine.name}: {row} {mean:.4g}" for row, mean in means]
    axes.axvline(1, color="black", lw=0.9)
    times_axis(axes, min(0.9, *ratios) / 1.12, max(1.5, *ratios) * 1.12)
    axes.grid(axis="both", color="#e4e4e4", lw=0.6)
    axes.set_axisbelow(True)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(labelsize=12)
    axes.set_xlabel("speed over torch: each case, and the geometric mean of each machine", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(labelled), frameon=False, fontsize=12)
    figure.set_label(", ".join(label))
    yield "gains", figure
