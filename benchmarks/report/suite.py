"""Tables from a record of bench.py: the means of each group, goals, and one step of frozen layers beside its bound."""

from __future__ import annotations

from collections.abc import Callable

import harness
from records import Result

from .ages import dated
from .text import facts_line, kind_of, plural, table

SIDES = {
    "ours": "lstm_ext",
    "frozen": "lstm_ext, frozen",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
NOTE = (
    "Geometric mean and, in brackets, the worst case of torch's median over the side's: above 1, the side takes less "
    "time, or memory. All sides of a case take turns in one run."
)


def means(record: Result) -> list[str]:
    rows: dict[tuple[str, bool, str, int], dict[str, Result]] = {}
    for line in record["summary"]:
        key = line["group"], line["training"], line["dtype"], line["threads"]
        rows.setdefault(key, {})[line["side"]] = line
    sides = [name for name in SIDES if any([name in found for found in rows.values()])]
    lines = []
    for (group, training, dtype, threads), found in rows.items():
        if not any([name in found for name in sides]):
            continue
        kind = kind_of({"training": training})
        name = group if group == kind or group == "training" else f"{group}, {kind}"
        name += f", {dtype}" if dtype != "float32" else ""
        cases = max(line["cases"] for line in found.values())
        cells = [
            f"{found[side]['geometric_mean']:.2f} ({found[side]['worst']:.2f})" if side in found else ""
            for side in sides
        ]
        lines.append([name, plural(threads), str(cases), *cells])
    return table(["", "", "cases", *[SIDES[name] for name in sides]], lines)


# A call of fewer microseconds a time step in torch.
SMALL = 50


def is_small(result: Result) -> bool:
    return result["sides"]["torch"]["median"] * 1e3 / result["steps"] < SMALL


def is_large(result: Result) -> bool:
    return result["hidden_size"] >= 128 and result["batch"] >= 16


# What the project asks for: cases of a group, and which side stands against torch or the best of all others.
Goal = tuple[str, str, bool, str, Callable[[Result], bool], str, bool]
GOALS: tuple[Goal, ...] = (
    ("float32 inference, H >= 128 and B >= 16", "inference", False, "float32", is_large, "ours", False),
    ("float32 training, the same", "training", True, "float32", is_large, "ours", False),
    ("bfloat16 inference", "dtypes", False, "bfloat16", lambda _: True, "ours", False),
    ("bfloat16 training", "dtypes", True, "bfloat16", lambda _: True, "ours", False),
    (
        f"small: below {SMALL} µs a step in torch; inference",
        "inference",
        False,
        "float32",
        is_small,
        "ours",
        True,
    ),
    ("small, training", "training", True, "float32", is_small, "ours", True),
    ("frozen, of all inference", "inference", False, "float32", lambda _: True, "frozen", True),
)


def results_of(record: Result, goal: Goal, threads: int) -> list[Result]:
    _, group, training, dtype, counts, side, _ = goal
    return [
        result
        for result in record["results"]
        if (result["group"], result["training"]) == (group, training)
        and (result["dtype"], result["threads"]) == (dtype, threads)
        and side in result["sides"]
        and counts(result)
    ]


def ratio_of(goal: Goal, result: Result) -> float:
    """The time of torch, or of the best peer, over that of the side that a goal is for."""
    sides = result["sides"]
    peers = ("torch", "onnxruntime", "openvino")[: None if goal[-1] else 1]
    return min(sides[peer]["median"] for peer in peers if peer in sides) / sides[goal[5]]["median"]


# Of each goal, in this order: the mean and the least ratio asked for, or 0.
TARGETS = {
    "amx": ((1.6, 1.3), (1.8, 1.4), (1.3, 1.0), (1.3, 1.0), (1.5, 0), (1.8, 0), (1.5, 1.0)),
    "avx512": ((1.05, 1.0), (1.25, 1.0), (1.2, 1.0), (1.2, 1.0), (1.5, 0), (1.8, 0), (1.2, 1.0)),
    "avx2": ((1.03, 1.0), (1.2, 1.0), (0, 0), (0, 0), (1.5, 0), (1.8, 0), (1.1, 1.0)),
}


def targets_of(record: Result) -> tuple[tuple[float, float], ...]:
    name = (record["facts"]["lstm_ext_cpu_capability"] or "").removesuffix("_bf16")
    return TARGETS.get(name, ((0.0, 0.0),) * len(GOALS))


def goals(record: Result) -> list[str]:
    """Geometric mean and worst of the shapes that the project has goals for, and the goals."""
    rows = []
    for goal, (mean, least) in zip(GOALS, targets_of(record), strict=True):
        cells: list[str] = []
        for threads in (1, 2):
            ratios = [ratio_of(goal, result) for result in results_of(record, goal, threads)]
            cells.append(f"{harness.geometric_mean(ratios):.2f} ({min(ratios):.2f})" if ratios else "")
        if any(cells):
            asked = f"{mean:g} ({least:.1f})" if least else f"{mean:g}" if mean else ""
            rows.append([goal[0], "the best side" if goal[-1] else "torch", *cells, asked])
    head = ["shapes", "over", "1 thread", "2 threads", "goal"]
    return ["", "The shapes that the project has goals for:", "", *table(head, rows)] if rows else []


def microseconds(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def steps(record: Result) -> list[str]:
    """One step with carried state, in microseconds: for each kind of weights the median, and the bound in brackets."""
    found = [r for r in record["results"] if r["group"] == "step" and "bounds" in r]
    if not found:
        return []
    kinds = list(found[0]["bounds"])
    rows = []
    for result in found:
        cells = []
        for kind in kinds:
            bound = result["bounds"][kind]
            sign = "≤" if bound["met"] else "**>**"
            cells.append(f"{microseconds(bound['alone_us'])} {sign} {microseconds(bound['bound_us'])}")
        torch = microseconds(1e3 * result["sides"]["torch"]["median"])
        rows.append([str(result["hidden_size"]), plural(result["threads"]), torch, *cells])
    head = ["H", "", "torch", *[kind.replace("frozen-", "frozen, ") for kind in kinds]]
    return [
        "",
        "One step with carried state, batch 1, I = H, in µs: torch's median in turn with the others; the frozen layers "
        "alone, and their bound of 8 µs + 1.25 times what it takes to read as many bytes as the weights have.",
        "",
        *table(head, rows),
    ]


def text(record: Result) -> str:
    peers = [
        f"{name} {peer['version']}" if not peer["missing"] else peer["missing"]
        for name, peer in record["facts"]["peers"].items()
    ]
    lines = [
        *means(record),
        "",
        NOTE,
        *goals(record),
        *steps(record),
        "",
        f"Peers: {'; '.join(peers)}.",
        "",
        facts_line(record),
    ]
    return "\n".join(lines)


LIBRARY_SIDES = {
    "library": "library",
    "library-bfloat16": "in bfloat16",
    "library-int8": "in int8",
    "c-loop": "plain loop in C",
    "onnxruntime": "ONNX Runtime",
}


def library(records: dict[str, Result]) -> str:
    """One step of the C library and its peers, by machine, microseconds: the median and the 99.9th percentile."""
    lines = [
        "Microseconds of a step with as many features as units, batch 1, one thread, float32: the median, and in "
        "brackets the 99.9th percentile. `python benchmarks/bench.py --only library` measures it."
    ]
    for name, record in records.items():
        facts = record["facts"]
        rows = [
            [
                str(r["hidden_size"]),
                *(f"{r['sides'][s]['median']:.3g} ({r['high'][s]:.3g})" for s in LIBRARY_SIDES),
            ]
            for r in record["results"]
        ]
        lines += [
            "",
            f"{facts['cpu']}, `{facts['lstm_ext_cpu_capability']}`, {dated(facts)} at {facts['git_commit']} "
            f"([{name.removesuffix('.json')}](../../benchmarks/results/{name})):",
            "",
            *table(["H", *LIBRARY_SIDES.values()], rows),
        ]
    return "\n".join(lines)
