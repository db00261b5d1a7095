"""What hypothesis draws a ``matrix.cases.Case`` from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from matrix.cases import (
    CAPABILITIES,
    LENGTHS_AS,
    PACKINGS,
    RESETS_AS,
    SORTED_PACKINGS,
    STRIDES,
    UNBATCHED_ONLY,
    WEIGHT_STRIDES,
    Case,
    Options,
)
from matrix.faults import FAULTS
from matrix.judge_faults import Faulty

# Lists from which each entry is drawn equally often; integers() prefers the very small.
# Around the widths of registers and tiles, and anything.
EDGES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65]
SIZES = st.sampled_from(3 * EDGES + list(range(1, 71)))
STEPS = st.sampled_from([1] * 8 + [2, 3, 4, 5, 6] * 4 + list(range(7, 25)))
ROWS = st.sampled_from([1] * 8 + [2, 3, 4, 5, 6, 7, 8, 9] * 4 + [12, 13, 19] + [0] * 2)
DTYPES = ["float32"] * 3 + ["float64"] * 3 + ["bfloat16", "float16"]
RATES = st.sampled_from([0.1, 0.3, 0.5, 0.9, 1.0, 1, 1e-6])
# For the oracle, which computes them one after the other: the most steps of all sequences, layers and directions.
CELLS = 200


@st.composite
def lengths(draw: st.DrawFn, layout: str) -> tuple[int, ...]:
    if layout == "unbatched":
        return (draw(STEPS),)
    if layout == "batched":
        return (draw(STEPS),) * draw(ROWS)
    longest = draw(STEPS)
    rows = draw(st.lists(st.integers(1, longest), min_size=1, max_size=12))
    return tuple(sorted(rows, reverse=True) if layout in SORTED_PACKINGS else rows)


@st.composite
def frozen(draw: st.DrawFn, weights: int) -> frozenset[str]:
    arguments = ["input", "h0", "c0", "reset_h", "reset_c"]
    parameters = [str(i) for i in range(weights)]
    everything = frozenset(arguments + parameters)
    how = draw(st.sampled_from(["none", "none", "arguments", "weights", "some", "all but one", "all"]))
    if how == "some":
        return draw(st.frozensets(st.sampled_from(sorted(everything))))
    if how == "all but one":
        return everything - {draw(st.sampled_from(sorted(everything)))}
    return {
        "none": frozenset[str](),
        "arguments": frozenset(arguments),
        "weights": frozenset(parameters),
        "all": everything,
    }[how]


@st.composite
def some(draw: st.DrawFn, names: Sequence[str]) -> tuple[str, ...]:
    """At least one of the names, all of them more often than not."""
    if draw(st.booleans()):
        return tuple(names)
    chosen = draw(st.frozensets(st.sampled_from(names), min_size=1))
    return tuple([name for name in names if name in chosen])


@st.composite
def options_of_calls(draw: st.DrawFn, layout: str, rows: tuple[int, ...]) -> dict[str, Any]:
    """For sequences of these lengths, the arguments of ``Options`` that belong to a call."""
    rarely = st.sampled_from([False, False, True])
    found: dict[str, Any] = {"return_cell_states": draw(rarely), "return_gates": draw(rarely)}
    if layout in ("batched", "unbatched") and draw(rarely):
        T = max(rows, default=0)
        ends = st.sampled_from([0, T, *range(T + 1), *range(T + 1)])
        found["lengths"] = tuple([draw(ends) for _ in rows])
        names = [name for name in LENGTHS_AS if layout == "unbatched" or name not in UNBATCHED_ONLY]
        found["lengths_as"] = draw(st.sampled_from(names))
        found["nan_padding"] = draw(st.booleans())
    if draw(rarely):
        found["resets"] = draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
        found["resets_as"] = draw(st.sampled_from(list(RESETS_AS)))
        found["reset_state"] = draw(st.booleans())
    if "lengths" in found or "resets" in found:
        found["unread"] = draw(rarely)
    return found


# Gates between -1 and 1, so that no cell grows beyond all bounds.
GATE_ACTIVATIONS = [
    "sigmoid",
    "hard_sigmoid",
    ("hard_sigmoid", 0.25, 0.4),
    "softsign",
    ("scaled_tanh", 0.8, 1.5),
]
CELL_ACTIVATIONS = [
    *("tanh", "softsign", "relu", "elu", "identity", "softplus", ("leaky_relu", 0.2)),
    *(("tanh", "identity"), ("relu", "softsign"), (("scaled_tanh", 1.5, 0.7), "hard_sigmoid")),
]


@st.composite
def options(draw: st.DrawFn, layout: str, rows: tuple[int, ...], bias: bool) -> Options | None:
    rarely = st.sampled_from([False, False, True])
    found = draw(options_of_calls(layout, rows))
    if draw(rarely):
        found["recurrent_dropout"] = draw(RATES)
    if draw(rarely):
        found["weight_dropout"] = draw(RATES)
    if draw(rarely):
        rate = st.one_of(st.sampled_from([0, 0.0]), RATES)
        found["zoneout"] = draw(st.one_of(RATES, st.tuples(rate, rate)))
    found |= {"layer_norm": draw(st.sampled_from([False] * 4 + [True, "cell"])), "recompute": draw(rarely)}
    if draw(rarely):
        found["cell_clip"] = draw(st.sampled_from([0.05, 0.3, 1, 50.0]))
    if draw(rarely):
        found["preactivation_clip"] = draw(st.sampled_from([0.05, 0.5, 3, 50.0]))
    if draw(rarely):
        found["gate_activation"] = draw(st.sampled_from(GATE_ACTIVATIONS))
        found["cell_activation"] = draw(st.sampled_from(CELL_ACTIVATIONS))
    if not found["layer_norm"]:
        found |= {"peephole": draw(rarely), "coupled_gates": draw(rarely)}
    if bias and not found.get("coupled_gates") and draw(rarely):
        found["forget_bias"] = draw(st.sampled_from([1.0, -0.5, 0, 2]))
    return Options(**found)


@st.composite
def cases(draw: st.DrawFn, layouts: Sequence[str], with_options: bool = True) -> Case:
    layout = draw(st.sampled_from(layouts))
    rows = draw(lengths(layout))
    input_size, hidden_size = draw(SIZES), draw(SIZES)
    num_layers, bias = draw(st.sampled_from([1, 1, 2, 3])), draw(st.booleans())
    bidirectional = draw(st.sampled_from([False, False, True]))
    dtype = draw(st.sampled_from(DTYPES))
    if dtype in ("float32", "float64") and draw(st.sampled_from([False] * 14 + [True])):
        # Large enough for two threads: they share the rows or, if there are only one or two, the units.
        rows, num_layers = tuple(min(n + 3, 12) for n in rows[: draw(st.sampled_from([1, 2, 20]))]), 1
        input_size, hidden_size = draw(st.integers(60, 300)), draw(st.integers(100, 260))
    proj_size = draw(st.one_of(st.just(0), st.integers(0, hidden_size - 1)))
    sets = num_layers * (2 if bidirectional else 1)
    more = None
    if with_options and draw(st.booleans()):
        rows = rows[: max(1, CELLS // (sets * max(rows, default=1)))]
        more = draw(options(layout, rows, bias))
    if more and more.layer_norm and not bias and num_layers > 1 and hidden_size == 1:
        # c_t normalised over one unit is 0, so the layer above would see nothing but 0: see dropout below.
        hidden_size = 2
    weights = sets * (2 + 2 * bias + (proj_size > 0) + (more.parameters(bias) if more else 0))
    mode = draw(st.sampled_from(["grad", "grad", "grad", "no_grad", "inference_mode"]))
    grad = mode == "grad"
    strides = st.one_of(st.just("dense"), st.sampled_from(list(STRIDES)))
    input_strides = draw(strides)
    if more and input_strides.startswith("expanded"):  # no padding of its own
        more = dataclasses.replace(more, nan_padding=False)
    dropout = draw(st.one_of(st.just(0.0), st.sampled_from([0.1, 0.5, 1.0])))
    if more and more.layer_norm and dropout == 1.0 and (not bias or dtype == "float16"):
        # A layer that sees and says nothing but 0, where a normalisation is as steep as it can be: the gradient
        # grows by up to 1 / 1e-5 a step, in ten steps beyond what float32 holds, and inf times 0 is NaN. With biases
        # it says something, and the gradient of what it sees is beyond float16's 65504 soon.
        dropout = 0.5
    if more and more.layer_norm and dtype == "float16" and not bias:
        dropout = 0.0  # of two units, both may be dropped
    if more and more.coupled_gates and dropout == 1.0:
        # A cell that sees the same in every step comes to rest where c = g, and the gradient of i is their difference.
        dropout = 0.5
    results = ("output", "h_n", "c_n") + (more.returned if more else ())
    return Case(
        layout=layout,
        lengths=rows,
        steps=draw(STEPS) if not rows else Case.steps,
        input_size=input_size,
        hidden_size=hidden_size,
        proj_size=proj_size,
        num_layers=num_layers,
        bias=bias,
        batch_first=draw(st.booleans()),
        bidirectional=bidirectional,
        dropout=dropout,
        training=draw(st.sampled_from([True, True, False])),
        dtype=dtype,
        hx=draw(st.booleans()),
        input_strides=input_strides,
        hx_strides=draw(strides),
        weight_strides=draw(st.one_of(st.just("dense"), st.sampled_from(WEIGHT_STRIDES))),
        grad_strides=draw(strides) if grad else "dense",
        mode=mode,
        frozen=draw(frozen(weights)) if grad else frozenset(),
        grad_of=draw(some(results)) if grad else results,
        repeat_backward=grad and draw(st.booleans()),
        threads=draw(st.sampled_from([1, 2])),
        capability=draw(st.sampled_from(CAPABILITIES)),
        seed=draw(st.integers(0, 2**31)),
        options=more,
    )


BATCHED, UNBATCHED, PACKED = ["batched"], ["unbatched"], list(PACKINGS)


@st.composite
def small(draw: st.DrawFn, layout: str) -> Case:
    """A case for the checks of arguments."""
    rows, steps = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    if layout in PACKINGS:
        ends = draw(st.lists(st.integers(1, steps), min_size=rows, max_size=rows))
        lengths = tuple(sorted(ends, reverse=True) if layout in SORTED_PACKINGS else ends)
    else:
        lengths = (steps,) * (1 if layout == "unbatched" else rows)
    hidden_size, bias = draw(st.integers(1, 9)), draw(st.booleans())
    more = draw(st.one_of(st.none(), options(layout, lengths, bias)))
    return Case(
        layout=layout,
        lengths=lengths,
        input_size=draw(st.integers(1, 9)),
        hidden_size=hidden_size,
        proj_size=draw(st.one_of(st.just(0), st.integers(0, hidden_size - 1))),
        num_layers=draw(st.integers(1, 2)),
        bias=bias,
        batch_first=draw(st.booleans()),
        bidirectional=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "float64"])),
        hx=draw(st.booleans()),
        mode=draw(st.sampled_from(["grad", "no_grad"])),
        capability=draw(st.sampled_from(CAPABILITIES)),
        seed=draw(st.integers(0, 1000)),
        options=more and dataclasses.replace(more, unread=False),
    )


@st.composite
def faulty(draw: st.DrawFn, entries: Sequence[str]) -> Faulty:
    """A row of the table of faults, on one of the entries."""
    entry = draw(st.sampled_from(entries))
    fault = draw(st.sampled_from([name for name, row in FAULTS.items() if getattr(row, entry)]))
    dense = BATCHED if entry == "function" else BATCHED + UNBATCHED
    layout = draw(st.sampled_from(PACKED if entry in ("packed", "nested", "equations") else dense))
    return Faulty(fault, entry, draw(small(layout)), draw(st.integers(0, 59)))
