"""Fake kernels and FLOP counts of the registered operators, which `lstm_ext.ops` explains.

`register` passes them to torch. The loader calls it after it has loaded the operators: importing this loads nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..native import integrations, loader
from .layer_call import OPTION_NAMES, PLAIN, LayerCall, LayerOptions
from .shapes import check_shapes, weights_per_direction


class _Sizes(NamedTuple):
    directions: int
    input_size: Any  # int or SymInt, like the others
    hidden_size: Any
    output_size: Any
    weights_per_direction: int
    projected: bool
    rows: Any  # 4H, or 3H of a GRU


def _sizes(weights: Sequence[Any], has_bias: bool, bidirectional: bool) -> _Sizes:
    """The sizes of a layer with these weights, or with weights of these shapes."""
    per_direction, projected = weights_per_direction(len(weights), has_bias, bidirectional)
    shapes = [w.shape if isinstance(w, Tensor) else w for w in weights[:per_direction]]
    output_size = shapes[1][1]
    hidden_size = shapes[-1][1] if projected else output_size
    directions = 2 if bidirectional else 1
    return _Sizes(directions, shapes[0][1], hidden_size, output_size, per_direction, projected, shapes[0][0])


# ---- shapes, strides and dtypes: as the kernels in csrc/torch return them, all contiguous


def _batch(input: Tensor, batch_sizes: Tensor | None, states: Sequence[Tensor | None]) -> Any:
    if batch_sizes is None:
        return input.shape[1]
    for state in states:
        if state is not None:
            return state.shape[1]
    if batch_sizes.device.type == "cpu" and type(batch_sizes) is Tensor:  # with meta tensors
        return int(batch_sizes[0])
    return torch.library.get_ctx().new_dynamic_size(min=1)


def _split(layer: Sequence[Any], keywords: dict[str, Any]) -> tuple[LayerCall, dict[str, Any]]:
    """The call that the arguments of an operator describe, and the keywords that are not options."""
    given = {name: value for name, value in keywords.items() if name in OPTION_NAMES and value is not None}
    others = {name: value for name, value in keywords.items() if name not in OPTION_NAMES}
    return LayerCall(*layer, LayerOptions(**given)), others


def _fake_layer(*layer: Any, **options: Any) -> tuple[Tensor, ...]:
    return _results(_split(layer, options)[0])


def _results(call: LayerCall) -> tuple[Tensor, ...]:
    input, batch_sizes, options = call.input, call.batch_sizes, call.options
    s = _sizes(call.weights, call.bias, call.bidirectional)
    expected = 3 if batch_sizes is None else 2
    torch._check(
        input.dim() == expected,
        lambda: f"lstm_ext: input has {input.dim()} dimensions, expected {expected}",
    )
    check_shapes(call)
    if batch_sizes is not None and options.lengths is not None:
        raise RuntimeError("lstm_ext: got lengths and batch_sizes, expected one of them")
    states = (call.h0, call.c0, options.reset_h, options.reset_c, options.recurrent_mask)
    batch = _batch(input, batch_sizes, states)
    rows = (s.directions, *input.shape[:-1])
    return (
        input.new_empty((*input.shape[:-1], s.directions * s.output_size)),
        input.new_empty((s.directions, batch, s.output_size)),
        input.new_empty((s.directions, batch, s.hidden_size)),
        input.new_empty((*rows, s.hidden_size) if options.return_cell_states else (0,)),
        input.new_empty((*rows, s.hidden_size, 4) if options.return_gates else (0,)),
    )


def _fake_forward(*layer: Any, **options: Any) -> tuple[Tensor, ...]:
    call, _ = _split(layer, options)
    input = call.input
    s = _sizes(call.weights, call.bias, call.bidirectional)
    sum_dtype = torch.float32 if input.dtype in (torch.float16, torch.bfloat16) else input.dtype
    gates_dtype = input.dtype if input.device.type == "cuda" else sum_dtype

    def saved(directions: int, features: Any, dtype: torch.dtype, present: bool = True) -> Tensor:
        return input.new_empty((directions, *input.shape[:-1], features) if present else (0,), dtype=dtype)

    normalised = len(call.options.norm) > 0
    return (
        *_results(call),
        saved(s.directions, 4 * s.hidden_size, gates_dtype),
        saved(s.directions, s.hidden_size, sum_dtype),
        saved(s.directions, s.hidden_size, gates_dtype, s.projected),
        saved(2 * s.directions, 4 * s.hidden_size, gates_dtype, normalised),
        saved(s.directions, 2, sum_dtype, normalised),
    )


def _fake_backward(*layer: Any, **keywords: Any) -> list[Tensor]:
    call, others = _split(layer, keywords)
    needs_grad = others["needs_grad"]
    weights_per_direction(len(call.weights), call.bias, call.bidirectional)
    inputs = call.tensors()[: call.signature().differentiable]
    if len(needs_grad) != len(inputs):
        raise RuntimeError(
            f"lstm_ext: needs_grad has {len(needs_grad)} entries, expected {len(inputs)} "
            "(input, h0, c0, each weight, reset_h, reset_c and each parameter of norm and of the cell)"
        )
    if any(needed and t is None for t, needed in zip(inputs, needs_grad, strict=True)):
        raise RuntimeError("lstm_ext: needs_grad asks for the gradient of a state that was not given")
    return [
        t.new_empty(t.shape) if needed and t is not None else call.input.new_empty((0,))
        for t, needed in zip(inputs, needs_grad, strict=True)
    ]


# ---- floating-point operations of the matrix products, as torch counts them: shapes in place of tensors


def _products(input: Any, s: _Sizes) -> tuple[int, int, int]:
    """The operations of one product with W_ih, W_hh and W_hr for all rows of all directions."""
    rows = 2 * s.directions * prod(input[:-1])
    return (
        rows * s.rows * s.input_size,
        rows * s.rows * s.output_size,
        rows * s.output_size * s.hidden_size if s.projected else 0,
    )


def forward_flops(input: Any, weights: Sequence[Any], has_bias: bool, bidirectional: bool) -> int:
    return sum(_products(input, _sizes(weights, has_bias, bidirectional)))


def _forward_flops(*layer: Any, **_: Any) -> int:
    call = LayerCall(*layer, PLAIN)
    return forward_flops(call.input, call.weights, call.bias, call.bidirectional)


def _backward_flops(*layer: Any, needs_grad: Sequence[bool], **_: Any) -> int:
    call = LayerCall(*layer, PLAIN)
    weights = call.weights
    s = _sizes(weights, call.bias, call.bidirectional)
    input_product, recurrent_product, projection_product = _products(call.input, s)
    # The gradients through time are always computed; then those that are requested.
    total = recurrent_product + projection_product
    if needs_grad[0]:
        total += input_product

    def of_weight(i: int, product: int) -> int:
        needed = needs_grad[3 + i : 3 + len(weights) : s.weights_per_direction]
        return product // s.directions * sum(map(bool, needed))

    total += of_weight(0, input_product) + of_weight(1, recurrent_product)
    if s.projected:
        total += of_weight(s.weights_per_direction - 1, projection_product)
    return total


# ---- registration


_FAKE_KERNELS: dict[str, Callable[..., Any]] = {
    "lstm_layer": _fake_layer,
    "lstm_layer_forward": _fake_forward,
    "lstm_layer_backward": _fake_backward,
}
_FLOPS = {
    "lstm_layer": _forward_flops,
    "lstm_layer_forward": _forward_flops,
    "lstm_layer_backward": _backward_flops,
}


def register() -> None:
    """Gives torch the fake kernels and the FLOP counts. The operators' library must be loaded."""
    operators = torch.ops.lstm_ext
    # torch keeps them for the life of the process, even if this module is imported again.
    if "_are_registered" in vars(operators):
        return
    operators._are_registered = True
    for name, function in _FAKE_KERNELS.items():
        torch.library.register_fake(f"lstm_ext::{name}", function)
    register_flops(_FLOPS)


def register_flops(formulas: dict[str, Callable[..., int]]) -> None:
    """Gives torch's FLOP counter the formulas of operators, by name."""

    def add(counter: Any) -> None:
        for name, formula in formulas.items():
            counter.register_flop_formula(getattr(torch.ops.lstm_ext, name))(formula)

    # Importing it here would import triton too, which turns on the GIL of a Python without it, or would warn that there
    # is none.
    integrations.add(" ".join(formulas), "torch.utils.flop_counter", add, "torch 2.11 to 2.15")


loader.on_load(register)
