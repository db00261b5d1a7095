"""Pieces of text that several pages have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
from records import Result

from .ages import dated

RESULTS = Path(__file__).resolve().parents[1] / "results"


def row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    return [row(head), f"|{'---|' * len(head)}", *map(row, rows)]


def number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def plural(threads: int) -> str:
    return f"{threads} thread" + ("s" if threads != 1 else "")


def kind_of(result: Result) -> str:
    return "training step" if result["training"] else "inference"


def sizes(result: Any) -> str:
    return " ".join(f"{letter}{result[name]}" for letter, name in SIZES.items())


SIZES = {"B": "batch", "T": "steps", "I": "input_size", "H": "hidden_size"}


def gain(result: Result, side: str = "ours") -> str:
    """Of both sides the median, and their ratio."""
    theirs, ours = (result["sides"][name]["median"] for name in ("torch", side))
    return f"{number(theirs)} → {number(ours)} ms, **{theirs / ours:.2f}×**"


def conditions(record: Result) -> str:
    """Threads, the load of the machine before, and what malloc does with freed memory."""
    facts = record["facts"]
    threads = " and ".join(map(str, sorted({r["threads"] for r in record["results"]})))
    settings = [
        f"{name}={value}"
        for name, value in (facts.get("set_by_environment") or {}).items()
        if name in harness.ALLOCATOR
    ]
    kept = "freed memory kept by `mallopt`" if facts["freed_memory_kept"] else "malloc as it is"
    parts = [
        f"{threads} thread{'' if threads == '1' else 's'}",
        f"load {facts['load_at_start']:.1f} at the start",
        kept,
    ]
    return ", ".join(parts + settings)


def versions(facts: Result) -> list[str]:
    commit = f" at {facts['git_commit']}" if facts["git_commit"] else ""
    return [f"torch {facts['torch']}", f"lstm_ext {facts['lstm_ext']}{commit}", dated(facts)]


def facts_line(record: Result) -> str:
    facts = record["facts"]
    parts = [
        f"{facts['cpu']}, {facts['cores']} cores",
        f"instruction set in use: {facts['lstm_ext_cpu_capability'] or 'none'}",
        *versions(facts),
        conditions(record),
    ]
    return "; ".join(parts) + "."
