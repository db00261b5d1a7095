"""Shapes that the routes of a layer share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layer_call import NUMBERS, LayerCall, LayerOptions

# The options of a layer that go with a GRU.
_OF_GRU = {"gru", "resets", "reset_h", "lengths", "recurrent_mask", "frozen", "recompute"}


def count_mask(lengths: Tensor, time: int) -> Tensor:
    """The steps that count, (T, B), for lengths (B,)."""
    return torch.arange(time, device=lengths.device).unsqueeze(1) < lengths


def gates_of(options: LayerOptions) -> int:
    """The gates that the rows of weights belong to."""
    return 3 if options.gru else 4


def weight_counts(sets: int, bias: bool) -> tuple[int, int]:
    """The number of weights in ``sets`` sets, one for each layer and direction: without and with a projection."""
    plain = 4 if bias else 2
    return sets * plain, sets * (plain + 1)


def weights_per_direction(count: int, bias: bool, bidirectional: bool) -> tuple[int, bool]:
    """The number of weights of a direction, and whether one is a projection, for ``count`` weights of a layer.

    Raises:
        RuntimeError: no layer has ``count`` weights.
    """
    directions = 2 if bidirectional else 1
    plain, projected = weight_counts(directions, bias)
    if count not in (plain, projected):
        raise RuntimeError(
            f"lstm_ext: got {count} weights, expected {plain}, or {projected} with a projection"
        )
    return count // directions, count == projected


def direction_of(call: LayerCall, d: int) -> tuple[Any, ...]:
    """w_ih, w_hh, b_ih, b_hh and w_hr of a direction, None for those that it lacks; then its norm and its peepholes."""
    per_set, projected = weights_per_direction(len(call.weights), call.bias, call.bidirectional)
    w_ih, w_hh, *rest = call.weights[d * per_set : (d + 1) * per_set]
    biases = rest[:2] if call.bias else (None, None)
    options, directions = call.options, 2 if call.bidirectional else 1
    norm, peephole = [
        x[d * len(x) // directions : (d + 1) * len(x) // directions] for x in (options.norm, options.peephole)
    ]
    return w_ih, w_hh, *biases, rest[-1] if projected else None, norm, peephole


def check_shapes(call: LayerCall) -> None:
    """The checks of the kernels, for other routes: a bias of shape (1,) would be broadcast silently.

    Raises:
        RuntimeError: naming the argument.
    """
    input, weights = call.input, call.weights
    directions = 2 if call.bidirectional else 1
    per_direction, projected = weights_per_direction(len(weights), call.bias, call.bidirectional)
    gates = gates_of(call.options)
    hidden = weights[0].size(0) // gates
    state = weights[per_direction - 1].size(0) if projected else hidden
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = []
    for d in range(directions):
        w_ih, w_hh, *others = weights[d * per_direction : (d + 1) * per_direction]
        projections = others[-1:] if projected else []
        expected += [
            ("weight_ih", w_ih, (gates * hidden, input.size(-1))),
            ("weight_hh", w_hh, (gates * hidden, state)),
        ]
        expected += [("bias", b, (gates * hidden,)) for b in others[: len(others) - len(projections)]]
        expected += [("weight_hr", w, (state, hidden)) for w in projections]
    options = call.options
    if len(options.peephole) not in (0, 3 * directions):
        raise RuntimeError(
            f"lstm_ext: got {len(options.peephole)} parameters of peepholes, expected {3 * directions}"
        )
    for name in NUMBERS:
        if getattr(options, name) < 0:
            raise ValueError(f"lstm_ext: {name} is {getattr(options, name)}, expected a number of at least 0")
    if options.norm and (options.peephole or options.coupled_gates):
        raise RuntimeError("lstm_ext: layer normalisation goes with neither peepholes nor coupled gates")
    if options.norm_cell and not options.norm:
        raise RuntimeError("lstm_ext: norm_cell: got no parameters of layer normalisation")
    if options.gru:
        others = [name for name in options.as_keywords() if name not in _OF_GRU]
        others += ["c0"] * (call.c0 is not None) + ["weight_hr"] * projected
        if others:
            raise RuntimeError(f"lstm_ext: gru: got {', '.join(others)}, which a GRU does not have")
    names = ("weight_ci", "weight_cf", "weight_co")
    expected += [(names[i % 3], w, (hidden,)) for i, w in enumerate(options.peephole)]
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape:
            raise RuntimeError(f"lstm_ext: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    for name, initial, size in (("h0", call.h0, state), ("c0", call.c0, hidden)):
        if initial is not None and (
            initial.dim() != 3 or initial.size(0) != directions or initial.size(2) != size
        ):
            raise RuntimeError(
                f"lstm_ext: {name} has shape {tuple(initial.shape)}, expected ({directions}, batch, {size})"
            )
