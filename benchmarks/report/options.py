"""What options cost in a training step, for docs/performance.md, from the JSON of bench_options.py."""

from __future__ import annotations

from records import Result

from .text import facts_line, sizes, table


def of_shapes(results: list[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(sizes(result), []).append(result)
    return found


def times(record: Result) -> list[str]:
    results = [r for r in record["results"] if r["group"] == "time" and r["training"]]
    shapes, rows = of_shapes(results), []
    for option in dict.fromkeys(r["option"] for r in results):
        costs = [[f"{r['cost']:.2f}" for r in found if r["option"] == option] for found in shapes.values()]
        target = record["targets"].get(option)
        rows.append([f"`{option}`", *map(", ".join, costs), f"{target:g}" if target else ""])
    return table(["a training step costs", *shapes, "target: at most"], rows)


def memory(record: Result) -> list[str]:
    shapes = of_shapes(
        [r for r in record["results"] if r["group"] == "memory" and r["option"] == "recompute"]
    )
    rows = [
        [name, *[", ".join(f"{r[key]:.2f}" for r in found) for found in shapes.values()]]
        for key, name in (("saved", "saved for the backward pass"), ("peak", "peak of a training step"))
    ]
    return table(["memory with `recompute`", *shapes], rows)


def cost(record: Result) -> str:
    tables = "\n\n".join("\n".join(part(record)) for part in (times, memory))
    kept = " The process keeps freed memory." if record["facts"]["freed_memory_kept"] else ""
    return (
        f"{tables}\n\nRelative to the layer without the option (`layer_norm, recompute`: to `layer_norm`), float32, "
        f"on 1 and on 2 threads. Masks are drawn in every step; 3 in 100 steps are reset. Both sides alternate in one "
        f"run; medians.{kept}\n\n{facts_line(record)}"
    )
