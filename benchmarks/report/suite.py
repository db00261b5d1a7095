"""Tables from a record of bench.py: the means of each group, and one step of frozen layers beside its bound."""

from __future__ import annotations

from records import Result

from .ages import dated
from .text import conditions, facts_line, kind_of, plural, table

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
            f"{facts['cpu']}, `{facts['lstm_ext_cpu_capability']}`, {dated(facts)} at {facts['git_commit']}, "
            f"{conditions(record)} ([{name.removesuffix('.json')}](../../benchmarks/results/{name})):",
            "",
            *table(["H", *LIBRARY_SIDES.values()], rows),
        ]
    return "\n".join(lines)
