"""lstm_ext.LSTM against torch.nn.LSTM on the CPU, float32: `make bench-quick`.

    python benchmarks/bench_quick.py [--only GROUP ...] [--shapes NAME ...] [--threads N ...]
                                     [--budget SECONDS] [--output results/NAME.json]

Prints a table, and writes the figures as JSON. The process keeps freed memory: see `harness.keep_freed_memory`. Figures
stand beside the project's targets, and nothing fails here: what a busy machine measures is no verdict. A case counts
for no mean if its ratio changed between the halves of its time.
"""

from __future__ import annotations

import statistics
import sys
from contextlib import nullcontext

import harness
import torch
from report import quick
from report.text import RESULTS
from shapes import MEMORY, SHAPES, STEP, Shape

GROUPS = ["inference", "training", "step", "memory"]

# group: (geometric mean, minimum); for memory, the largest allowed share of torch's peak
TARGETS: dict[str, tuple[float | None, float | None]] = {
    "inference": (1.3, 0.95),
    "training": (1.15, 0.95),
    "step": (None, 5.0),
    "memory": (None, 1.0),
}
STEADY = 1.25  # how many times as large as the other the ratio of one half may be


def time_case(group: str, name: str, threads: int, budget: float) -> list[dict]:
    shape = SHAPES[name]
    torch.set_num_threads(threads)
    theirs, ours = harness.make_layers(shape)
    if group != "step":
        make = {"inference": harness.inference_call, "training": harness.training_call}[group]
        pairs = [("call", make(theirs, shape), make(ours, shape))]
    else:  # torch.nn.LSTM has no step(): both ways to run a step stand against its call
        pairs = [
            (method, harness.step_call(theirs, shape, "call"), harness.step_call(ours, shape, method))
            for method in ("call", "step")
        ]
    results = []
    for method, a, b in pairs:
        with torch.inference_mode() if group == "step" else nullcontext():
            difference = harness.largest_difference(a, b)
            comparison = harness.compare(a, b, budget / len(pairs))
        case = {**row(group, name, shape, threads), "method": method, "largest_difference": difference}
        results.append(case | harness.as_dict(comparison))
    return results


def measure_memory(name: str, threads: int, repeats: int) -> dict:
    shape = SHAPES[name]
    peaks: dict[str, list[int]] = {"torch": [], "ours": []}
    for _ in range(repeats):
        for kind, values in peaks.items():
            values.append(harness.peak_memory(kind, shape, threads))
    theirs, ours = (statistics.median(peaks[kind]) for kind in ("torch", "ours"))
    return {
        **row("memory", name, shape, threads),
        "torch_bytes": theirs,
        "ours_bytes": ours,
        "all_bytes": peaks,
        "ratio": ours / theirs,  # below 1, lstm_ext needs less
    }


def row(group: str, name: str, shape: Shape, threads: int) -> dict:
    return {"group": group, "shape": name, **shape._asdict(), "threads": threads}


def counted(result: dict) -> bool:
    """Whether a result counts for its group's target."""
    if result["group"] == "inference":
        return result["steps"] > 1  # a single step has a target of its own
    return result.get("method", "call") == "call"


def is_steady(result: dict) -> bool:
    """Whether both halves of the time gave about the same ratio. Memory has no halves."""
    first, second = result.get("halves", (1.0, 1.0))
    return max(first, second) <= STEADY * min(first, second)


def summarise(results: list[dict]) -> list[dict]:
    """Geometric mean and worst case of each group, over all its threads, beside the target."""
    lines = []
    for group in GROUPS:
        ratios = [r["ratio"] for r in results if r["group"] == group and counted(r) and is_steady(r)]
        if not ratios:
            continue
        mean, worst = harness.geometric_mean(ratios), max(ratios) if group == "memory" else min(ratios)
        mean_target, worst_target = TARGETS[group]
        met = worst <= worst_target if group == "memory" else worst >= worst_target
        lines.append(
            {
                "group": group,
                "cases": len(ratios),
                "geometric_mean": mean,
                "worst": worst,
                "target_geometric_mean": mean_target,
                "target_worst": worst_target,
                "met": met and (mean_target is None or mean >= mean_target),
            }
        )
    return lines


def name_of(result: dict) -> str:
    return f"{result['group']:<10} {result['shape']:<14} {result['threads']} thr"


def warnings_of(facts: dict, results: list[dict]) -> list[str]:
    """What to know before a figure is believed."""
    lines = []
    if facts["load_at_start"] > 0.3:
        lines.append(
            "warning: other programs are running; with more than one thread, they are what is measured"
        )
    if facts["lstm_ext_cpu_capability"] is None:
        lines.append(
            "warning: the compiled extension is not loaded; these are figures of torch's own operator"
        )
    unsteady = [r for r in results if counted(r) and not is_steady(r)]
    if unsteady:
        lines.append(
            "warning: left out of the means, since the ratio changed between the halves of the time:"
        )
        lines += [f"  {name_of(r)}  {r['halves'][0]:.2f}×, then {r['halves'][1]:.2f}×" for r in unsteady]
    return lines


def print_result(result: dict) -> None:
    note = "  step()" if result.get("method") == "step" else ""
    print(f"{name_of(result)}  {quick.cell(result).replace('*', '')}{note}", flush=True)
    if not result.get("largest_difference", 0.0) < 1e-3:
        print(f"  warning: the two results differ by {result['largest_difference']:.1e} of the largest value")


def main(arguments: list[str] | None = None) -> int:
    parser = harness.options_of(__doc__, SHAPES, budget=240.0, of="run")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, metavar="GROUP")
    parser.add_argument("--memory-repeats", type=int, default=3, help="child processes for each figure (3)")
    parser.set_defaults(output=RESULTS / "local.json")
    options = parser.parse_args(arguments)
    threads_before = torch.get_num_threads()
    facts = {**harness.facts(), "freed_memory_kept": harness.keep_freed_memory()}
    for name, value in facts.items():
        print(f"{name}: {value}")
    print(*warnings_of(facts, []), sep="\n")
    print("\ntorch.nn.LSTM → lstm_ext.LSTM, medians; memory: lstm_ext / torch")

    timed = [
        (group, name, threads)
        for group in ("inference", "training", "step")
        if group in options.only
        for name in options.shapes
        if group != "step" or name == STEP
        for threads in options.threads
    ]
    results = []
    for group, name, threads in timed:
        for result in time_case(group, name, threads, options.budget / len(timed)):
            results.append(result)
            print_result(result)
    if "memory" in options.only:
        for name in (n for n in options.shapes if n in MEMORY):
            for threads in options.threads:
                results.append(measure_memory(name, threads, options.memory_repeats))
                print_result(results[-1])
    torch.set_num_threads(threads_before)

    facts["load_at_end"] = harness.load()
    settings = {"budget": options.budget, "dtype": "float32", "memory_repeats": options.memory_repeats}
    record = {"format": 1, "facts": facts, "settings": settings, "results": results}
    record["summary"] = summarise(results)
    harness.write(options.output, record)
    print(
        "\n".join(
            ["", quick.text(record), "", *warnings_of(facts, results), "", f"written to {options.output}"]
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
