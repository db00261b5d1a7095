"""The table of docs/support.md: what each route has, of the forms, options and arguments of the cases.

python -m tests.matrix --support            # writes it into the page
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from lstm_ext.options import OPTIONS

from .cases import CASES, Case
from .routes import ROUTES, Route, called_with

PAGE = Path(__file__).resolve().parents[2] / "docs" / "support.md"
HEAD = "| way | gradients | second derivatives | does not have |\n"
DTYPES = ("float64", "float32", "bfloat16")  # a route may have one of them only
Feature = Callable[[Case], bool]


def of_option(name: str) -> Feature:
    return lambda case: case.options is not None and getattr(case.options, name) != OPTIONS[name].default


def of_call(name: str) -> Feature:
    return lambda case: name in called_with(case)


def is_given_as(kind: str) -> Feature:
    return lambda case: (
        "lengths" in called_with(case) and ("mask" in case.options.lengths_as) == (kind == "mask")
    )


def draws(name: str) -> Feature:
    """Whether an option draws random masks in training."""
    return lambda case: case.training and of_option(name)(case)


FEATURES: dict[str, dict[str, Feature]] = {
    "forms": {
        "unbatched input": lambda case: case.layout == "unbatched",
        "an empty batch": lambda case: case.rows[1:] == (0,),
        "`batch_first`": lambda case: case.batch_first,
        "several layers": lambda case: case.num_layers > 1,
        "`bidirectional`": lambda case: case.bidirectional,
        "`proj_size`": lambda case: case.proj_size > 0,
        "`PackedSequence`": lambda case: case.packed,
    },
    "arguments of the call": {
        "`lengths`": is_given_as("lengths"),
        "`mask`": is_given_as("mask"),
        **{f"`{name}`": of_call(name) for name in ("resets", "reset_state")},
        **{f"`return_{name}`": of_call(f"return_{name}") for name in ("cell_states", "gates")},
    },
    "options": {f"`{name}`": of_option(name) for name in OPTIONS if not OPTIONS[name].random}
    | {"`zoneout` in evaluation": lambda case: not case.training and of_option("zoneout")(case)},
    "random masks": {
        "`dropout`": lambda case: case.training and case.dropout > 0,
        **{f"`{name}`": draws(name) for name in OPTIONS if OPTIONS[name].random},
    },
}


def missing(route: Route) -> list[str]:
    """What no case of a route has; a group of which it has nothing by the name of the group."""
    taken = [c for c in CASES.values() if any(route.has(dataclasses.replace(c, dtype=d)) for d in DTYPES)]
    found = [] if route.gru else ["a GRU"]
    for group, features in FEATURES.items():
        absent = [name for name, feature in features.items() if not any(map(feature, taken))]
        found += [f"all {group}"] if len(absent) == len(features) else absent
    return found


def table() -> str:
    lines = ["|---|:-:|:-:|---|"]
    for name, route in ROUTES.items():
        derivatives = ["✓" if mode in route.modes else "–" for mode in ("grad", "twice")]
        lines.append(f"| {' | '.join([name, *derivatives, ', '.join(missing(route))])} |")
    return HEAD + "\n".join(lines)


def shown() -> str:
    """The table in the page: from its head to the next empty line."""
    _, head, rest = PAGE.read_text().partition(HEAD)
    return head + rest.partition("\n\n")[0]


def write() -> None:
    PAGE.write_text(PAGE.read_text().replace(shown(), table()))
