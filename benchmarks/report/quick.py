"""Tables from the JSON of bench_quick.py."""

from __future__ import annotations

from records import Result

from .text import SIZES, facts_line, gain, plural, table

TITLES = {"inference": "inference", "training": "training step", "step": "one step", "memory": "peak memory"}


def find(results: list[Result], group: str, shape: str, threads: int) -> Result | None:
    for result in results:
        if (result["group"], result["shape"], result["threads"]) == (group, shape, threads):
            return result  # of the two ways to run a step, the module's call comes first
    return None


def cell(result: Result | None) -> str:
    if result is None:
        return ""
    return f"{result['ratio']:.2f}" if result["group"] == "memory" else gain(result)


def text(record: Result) -> str:
    results = record["results"]
    columns = [
        (group, threads)
        for group in ("inference", "training", "memory")
        for threads in sorted({r["threads"] for r in results if r["group"] == group})
    ]
    rows = []
    for shape, *sizes in dict.fromkeys((r["shape"], *[r[name] for name in SIZES.values()]) for r in results):
        cells = [cell(find(results, group, shape, threads)) for group, threads in columns]
        if any(cells):
            rows.append([*sizes, *cells])
    lines = table([*SIZES, *[f"{TITLES[group]}, {plural(threads)}" for group, threads in columns]], rows)
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
    rows = []
    for line in record["summary"]:
        target = line["target_geometric_mean"]
        mean = f"{line['geometric_mean']:.2f}" + (f" (≥ {target})" if target else "")
        sign = "≤" if line["group"] == "memory" else "≥"
        worst = f"{line['worst']:.2f} ({sign} {line['target_worst']})"
        rows.append([TITLES[line["group"]], line["cases"], mean, worst])
    lines += ["", *table(["", "cases", "geometric mean (target)", "worst (target)"], rows)]
    lines += [
        "",
        "Time: torch.nn.LSTM → lstm_ext.LSTM, medians, and their ratio; above 1, lstm_ext is faster. Memory: peak of "
        "a training step, lstm_ext / torch; below 1, lstm_ext needs less. float32, one layer; both sides alternate "
        "in one run. In the second table, inference leaves out T = 1, which has a line of its own, one step.",
        "",
        facts_line(record),
    ]
    return "\n".join(lines)
