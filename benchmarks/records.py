"""The JSON of bench.py: how a result is written, found and read."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import harness

SUITE = "lstm_ext bench"
FORMAT = 1
Result = dict[str, Any]


def side(samples: Iterable[float], scale: float = 1.0) -> Result:
    """Every sample, their median and quartiles, times `scale`."""
    values = [harness.rounded(scale * value) for value in samples]
    first, median, third = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {
        "median": harness.rounded(median),
        "first_quartile": harness.rounded(first),
        "third_quartile": harness.rounded(third),
        "samples": values,
    }


def write(record: Result, path: Path) -> None:
    """With a line for each result: a file of every sample is long, and yet two of them can be compared by eye."""
    head = {name: value for name, value in record.items() if name != "results"}
    lines = [json.dumps(result, separators=(",", ":")) for result in record["results"]]
    text = json.dumps(head, indent=1).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{text},\n "results": [\n' + ",\n".join(lines) + "\n ]\n}\n")


def read(path: Path) -> Result:
    """Exits with one line where the file is no record of the suite."""
    expected = f"{path}: expected a file that benchmarks/bench.py wrote"
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise SystemExit(f"{expected}, got: {error.strerror}") from None
    except ValueError as error:
        raise SystemExit(f"{expected}, got no JSON: {error}") from None
    if not isinstance(record, dict) or record.get("suite") != SUITE:
        raise SystemExit(f"{expected}, got a record of something else")
    if record["format"] != FORMAT:
        raise SystemExit(f"{expected} in format {FORMAT}, got format {record['format']}")
    return record


def key(result: Result) -> tuple[Any, ...]:
    """What tells the cases of a record apart."""
    return tuple([result[name] for name in ("group", "case", "dtype", "threads", "training")])


def title(result: Result) -> str:
    kind = "training" if result["training"] else "inference"
    return f"{result['group']} {result['case']} {result['dtype']} {result['threads']} thr {kind}"


def base_of(name: str) -> str:
    """The side of torch that stands against a side: that of "ours beside 1" is "torch beside 1"."""
    _, beside, count = name.partition(" beside ")
    return "torch" + beside + count


def ratio(result: Result, name: str) -> float | None:
    """How many times less a side needs than torch: above 1 it is better. None where the case has not both."""
    sides, base = result["sides"], base_of(name)
    if name not in sides or base not in sides:
        return None
    return sides[base]["median"] / sides[name]["median"]


def summary(results: list[Result]) -> list[Result]:
    """Of each group, kind, dtype, number of threads and side: the geometric mean over torch, the worst and the best."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for result in results:
        for name in result["sides"]:
            value = ratio(result, name)
            if name != base_of(name) and value is not None:
                line = result["group"], result["training"], result["dtype"], result["threads"], name
                found.setdefault(line, []).append(value)
    names = ("group", "training", "dtype", "threads", "side")
    return [
        {
            **dict(zip(names, line, strict=True)),
            "cases": len(ratios),
            "geometric_mean": harness.rounded(harness.geometric_mean(ratios)),
            "worst": harness.rounded(min(ratios)),
            "best": harness.rounded(max(ratios)),
        }
        for line, ratios in found.items()
    ]
