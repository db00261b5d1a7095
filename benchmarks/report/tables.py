"""Tables of `bench.py --pair`, and of what options cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import harness
from records import Result, title

from .text import SIZES, facts_line, gain, plural, sizes, table


def over(result: Result, side: str, base: str) -> float | None:
    """How many times the median of a side that of the base is. None where the case has not both."""
    found = result["sides"]
    return found[base]["median"] / found[side]["median"] if {side, base} <= set(found) else None


def results_of(record: Result, *groups: str) -> list[Result]:
    return [r for r in record["results"] if r["group"] in groups]


# ---- torch and our layer in pairs: `bench.py --pair`

TITLES = {"inference": "inference", "training": "training step", "step": "one step", "memory": "peak memory"}
# group: (geometric mean, minimum); for memory, the largest allowed share of torch's peak
TARGETS: dict[str, tuple[float | None, float]] = {
    "inference": (1.3, 0.95),
    "training": (1.15, 0.95),
    "step": (None, 5.0),
    "memory": (None, 1.0),
}
STEADY = 1.25  # how many times as large as the other the ratio of one half may be


def halves(result: Result) -> tuple[float, ...]:
    """The ratios of the samples before the middle of the time, and after it; of memory, and without samples, 1."""
    samples = [result["sides"][side].get("samples", []) for side in ("torch", "ours")]
    middle = len(samples[1]) // 2
    if result["group"] == "memory" or not middle:
        return (1.0, 1.0)
    parts = [[statistics.median(s[part]) for s in samples] for part in (slice(middle), slice(middle, None))]
    return tuple([theirs / ours for theirs, ours in parts])


def is_steady(result: Result) -> bool:
    return max(halves(result)) <= STEADY * min(halves(result))


def counted(record: Result) -> list[Result]:
    """The results of a pair that count for a target: one step has a target of its own, and step() has none."""
    return [
        r
        for r in results_of(record, *TARGETS)
        if "ours" in r["sides"] and (r["group"] != "inference" or r["steps"] > 1)
    ]


def unsteady(record: Result) -> list[str]:
    """What to know before a mean of a pair is believed."""
    found = [r for r in counted(record) if record["settings"]["pair"] and not is_steady(r)]
    lines = [f"  {title(r)}: {'×, then '.join(f'{value:.2f}' for value in halves(r))}×" for r in found]
    head = "warning: left out of the means, since the ratio changed between the halves of the time:"
    return [head, *lines] if lines else []


def summary(record: Result) -> list[list[str]]:
    """Geometric mean and worst case of each group, over all its threads, beside the target."""
    rows = []
    for group, (mean, worst) in TARGETS.items():
        found = [r for r in counted(record) if r["group"] == group and is_steady(r)]
        memory = group == "memory"
        ratios = [over(r, *(("torch", "ours") if memory else ("ours", "torch"))) for r in found]
        if ratios:
            target = f" (≥ {mean})" if mean else ""
            extreme, sign = (max(ratios), "≤") if memory else (min(ratios), "≥")
            cells = [f"{harness.geometric_mean(ratios):.2f}{target}", f"{extreme:.2f} ({sign} {worst})"]
            rows.append([TITLES[group], str(len(ratios)), *cells])
    return rows


def quick(record: Result) -> str:
    def cell(group: str, case: str, threads: int) -> str:
        for r in results_of(record, group):
            if (r["case"], r["threads"]) == (case, threads):
                return f"{over(r, 'torch', 'ours'):.2f}" if group == "memory" else gain(r)
        return ""

    columns = [
        (group, threads)
        for group in ("inference", "training", "memory")
        for threads in sorted({r["threads"] for r in results_of(record, group)})
    ]
    rows = []
    for case, *of_shape in dict.fromkeys(
        (r["case"], *[r[name] for name in SIZES.values()]) for r in record["results"]
    ):
        cells = [cell(group, case, threads) for group, threads in columns]
        if any(cells):
            rows.append([*of_shape, *cells])
    lines = table([*SIZES, *[f"{TITLES[group]}, {plural(threads)}" for group, threads in columns]], rows)
    steps = [
        f"{plural(r['threads'])}: {gain(r, side)}" + (" with `step()`" if side == "step" else "")
        for r in results_of(record, "step")
        for side in ("ours", "step")
        if side in r["sides"]
    ]
    if steps:
        lines += [
            "",
            f"One step with carried state, B 1, H 128, from the call of the module on: {'; '.join(steps)}.",
        ]
    lines += ["", *table(["", "cases", "geometric mean (target)", "worst (target)"], summary(record))]
    lines += [
        "",
        "Time: torch.nn.LSTM → lstm_ext.LSTM, medians, and their ratio; above 1, lstm_ext is faster. Memory: peak of "
        "a training step, lstm_ext / torch; below 1, lstm_ext needs less. float32, one layer; both sides alternate "
        "in one run. In the second table, inference leaves out T = 1, which has a line of its own, one step.",
        "",
        facts_line(record),
    ]
    return "\n".join(lines)


# ---- what options cost: docs/performance.md

# At most so many times the time without the option, in a training step, or of the other side of a group.
COSTS = {
    "recurrent_dropout=0.25": 1.2,
    "zoneout=0.1": 1.2,
    "zoneout=(0.1, 0.1)": 1.2,
    "layer_norm": 1.6,
    "recompute": 1.5,
    "layer_norm, recompute": 1.5,
    "resets": 1.05,
    "vmap": 1.2,
    "two callers": 1.3,
    "packed": 1.15,
}


def costs(record: Result) -> list[str]:
    """A line for each option, and for each other side that has a target."""
    found: dict[str, list[float]] = {}
    for r in record["results"]:
        cost = dict(r.get("cost", {})) if r["group"] != "extras" or r["training"] else {}
        if "time_of_a_row_over_padded" in r:
            cost["packed"] = r["time_of_a_row_over_padded"]["ours"]
        for name in set(COSTS) & set(cost):
            found.setdefault(name, []).append(cost[name])
    return [
        f"{name} costs {harness.geometric_mean(found[name]):.2f} in the mean, "
        f"at most {max(found[name]):.2f} (target: at most {COSTS[name]})"
        for name in COSTS
        if name in found
    ]


def cost(record: Result) -> str:
    def part(head: str, group: str, rows: dict[str, Callable[[Result], str]], *more: str) -> list[str]:
        shapes: dict[str, list[Result]] = {}
        for r in results_of(record, group):
            if r["training"]:
                shapes.setdefault(sizes(r), []).append(r)
        cells = [
            [said, *[", ".join(map(cell, found)) for found in shapes.values()]] for said, cell in rows.items()
        ]
        if more:
            cells = [
                [*row, f"{COSTS[name]:g}" if (name := row[0].strip("`")) in COSTS else ""] for row in cells
            ]
        return [*table([head, *shapes, *more], cells), ""]

    options = dict.fromkeys(
        [name for r in results_of(record, "extras") if r["training"] for name in r["cost"]]
    )
    of_cost = {f"`{name}`": lambda r, name=name: f"{r['cost'][name]:.2f}" for name in options}
    of_memory = {
        "saved for the backward pass": lambda r: f"{r['saved']['recompute'] / r['saved']['ours']:.2f}",
        "peak of a training step": lambda r: f"{over(r, 'ours', 'recompute'):.2f}",
    }
    lines = [
        *part("a training step costs", "extras", of_cost, "target: at most"),
        *part("memory with `recompute`", "saved", of_memory),
        "Relative to the layer without the option (`layer_norm, recompute`: to `layer_norm`), float32, on 1 and on 2 "
        "threads. Masks are drawn in every step; 3 in 100 steps are reset. Both sides alternate in one run; "
        "medians.",
        "",
        facts_line(record),
    ]
    return "\n".join(lines)
