"""The table of docs/lab/many-cores.md from the JSON of many_cores.py."""

from __future__ import annotations

from records import Result

from .text import number, table


def text(record: Result) -> str:
    results = record["results"]
    found = {(r["machine"], r["threads"], r["costs"]): r for r in results}
    beliefs = list(dict.fromkeys(r["costs"] for r in results))
    rows = []
    for machine, threads in dict.fromkeys((r["machine"], r["threads"]) for r in results):
        cells = []
        for belief in beliefs:
            r = found[machine, threads, belief]
            worst = f", worst {r['worst']:.2f}" if r["slower_than_one"] else ""
            cells.append(f"{number(r['speed'])} with {number(r['workers'])}{worst}")
        tree = found[machine, threads, "measured"]["tree_from"]
        rows.append([machine, threads, tree or "", *cells])
    worst = {belief: min(r["worst"] for r in results if r["costs"] == belief) for belief in beliefs}
    slower = {
        belief: sum(r["slower_than_one"] for r in results if r["costs"] == belief) for belief in beliefs
    }
    calls = sum(r["calls"] for r in results if r["costs"] == beliefs[0])
    said = [f"{belief} {worst[belief]:.2f} ({slower[belief]} of {calls} are slower)" for belief in beliefs]
    return "\n".join(
        [
            *table(["machine", "threads", "tree from", *beliefs], rows),
            "",
            "**Simulated, not measured.** The speed over one thread, geometric mean of "
            f"{results[0]['calls']} passes of layers in float32, and the median number of workers that run. “Worst” "
            f"is there where a pass is slower than on one thread. The slowest of all: {', '.join(said)}.",
            "",
            f"Instruction set of the planner: {record['capability']}.",
        ]
    )
