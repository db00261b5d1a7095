"""Fake kernels and FLOP counts of the registered operators, which `lstm_ext.ops` explains.

`register` gives them to torch. The loader calls it when it has loaded the operators: importing this loads nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..native import loader
from .layer_call import LayerCall
from .shapes import check_shapes

OPERANDS = (
    "resets",
    "reset_h",
    "reset_c",
    "lengths",
    "recurrent_mask",
    "kept_h",
    "kept_c",
    "zoneout_h",
    "zoneout_c",
    "norm",
)

__all__ = ["register"]

_Layer = tuple[Tensor, Tensor, Tensor]
_LayerAndSaved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

# By the names of the operators.
_fake_kernels: dict[str, Callable[..., Any]] = {}
_flop_formulas: dict[str, Callable[..., int]] = {}


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _fake_kernels[name] = function
        return function

    return add


def _flops(*names: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    def add(function: Callable[..., int]) -> Callable[..., int]:
        _flop_formulas.update(dict.fromkeys(names, function))
        return function

    return add


class _Sizes(NamedTuple):
    directions: int
    input_size: Any  # int or SymInt, as the others
    hidden_size: Any
    output_size: Any
    projected: bool


def _sizes(weights: Sequence[Any], has_bias: bool, bidirectional: bool) -> _Sizes:
    """Of a layer with these weights, or with weights of these shapes."""
    directions = 2 if bidirectional else 1
    plain = 4 if has_bias else 2
    per_direction, rest = divmod(len(weights), directions)
    if rest or per_direction not in (plain, plain + 1):
        raise RuntimeError(
            f"lstm_ext: got {len(weights)} weights, expected {plain * directions}, "
            f"or {(plain + 1) * directions} with a projection"
        )
    shapes = [w.shape if isinstance(w, Tensor) else w for w in weights[:per_direction]]
    projected = per_direction == plain + 1
    output_size = shapes[1][1]
    return _Sizes(
        directions, shapes[0][1], shapes[-1][1] if projected else output_size, output_size, projected
    )


# ---- shapes, strides and dtypes: as csrc/torch/lstm_layer.cpp allocates them, all contiguous


def _batch(input: Tensor, h0: Tensor | None, c0: Tensor | None, batch_sizes: Tensor | None) -> Any:
    if batch_sizes is None:
        return input.shape[1]
    for state in (h0, c0):
        if state is not None:
            return state.shape[1]
    if batch_sizes.device.type == "cpu" and type(batch_sizes) is Tensor:  # with meta tensors
        return int(batch_sizes[0])
    return torch.library.get_ctx().new_dynamic_size(min=1)


@_fake("lstm_layer")
def _(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    has_bias: bool,
    bidirectional: bool,
) -> _Layer:
    return _fake_layer(input, h0, c0, weights, batch_sizes, has_bias, bidirectional)


def _fake_layer(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    has_bias: bool,
    bidirectional: bool,
    batch_of: Tensor | None = None,
) -> _Layer:
    s = _sizes(weights, has_bias, bidirectional)
    expected = 3 if batch_sizes is None else 2
    torch._check(
        input.dim() == expected,
        lambda: f"lstm_ext: input has {input.dim()} dimensions, expected {expected}",
    )
    check_shapes(LayerCall(input, h0, c0, weights, batch_sizes, has_bias, bidirectional))
    batch = _batch(input, h0 if batch_of is None else batch_of, c0, batch_sizes)
    return (
        input.new_empty((*input.shape[:-1], s.directions * s.output_size)),
        input.new_empty((s.directions, batch, s.output_size)),
        input.new_empty((s.directions, batch, s.hidden_size)),
    )


@_fake("lstm_layer_forward")
def _(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    has_bias: bool,
    bidirectional: bool,
) -> _LayerAndSaved:
    results = _fake_layer(input, h0, c0, weights, batch_sizes, has_bias, bidirectional)
    return *results, *_fake_saved(input, _sizes(weights, has_bias, bidirectional))


def _saved_dtypes(input: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Those of gates and of cells."""
    sum_dtype = torch.float32 if input.dtype in (torch.float16, torch.bfloat16) else input.dtype
    return input.dtype if input.device.type == "cuda" else sum_dtype, sum_dtype


def _fake_saved(input: Tensor, s: _Sizes) -> _Layer:
    """gates, cells and hidden."""
    gates_dtype, sum_dtype = _saved_dtypes(input)
    rows = (s.directions, *input.shape[:-1])
    return (
        input.new_empty((*rows, 4 * s.hidden_size), dtype=gates_dtype),
        input.new_empty((*rows, s.hidden_size), dtype=sum_dtype),
        input.new_empty((*rows, s.hidden_size) if s.projected else (0,), dtype=gates_dtype),
    )


@_fake("lstm_layer_backward")
def _(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    hidden: Tensor,
    has_bias: bool,
    bidirectional: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    _sizes(weights, has_bias, bidirectional)
    return _fake_gradients(
        (input, h0, c0, *weights), wanted, "input, h0, c0 and each weight", "an initial state"
    )


def _fake_gradients(
    inputs: Sequence[Tensor | None], wanted: Sequence[bool], names: str, state: str
) -> list[Tensor]:
    if len(wanted) != len(inputs):
        raise RuntimeError(f"lstm_ext: wanted has {len(wanted)} entries, expected {len(inputs)} ({names})")
    if any(w and t is None for t, w in zip(inputs, wanted, strict=True)):
        raise RuntimeError(f"lstm_ext: wanted asks for the gradient of {state} that was not given")
    nothing = cast(Tensor, inputs[0]).new_empty
    return [
        t.new_empty(t.shape) if w and t is not None else nothing((0,))
        for t, w in zip(inputs, wanted, strict=True)
    ]


@_fake("lstm_layer_with_extras")
def _fake_layer_with_extras(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    has_bias: bool,
    bidirectional: bool,
    resets: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    lengths: Tensor | None,
    recurrent_mask: Tensor | None,
    kept_h: Tensor | None,
    kept_c: Tensor | None,
    zoneout_h: float,
    zoneout_c: float,
    norm: Sequence[Tensor],
    return_cell_states: bool,
    return_gates: bool,
) -> tuple[Tensor, ...]:
    if batch_sizes is not None and lengths is not None:
        raise RuntimeError("lstm_ext: got lengths and batch_sizes, expected one of them")
    # Any of these knows the batch of packed data.
    batch_of = next((t for t in (h0, reset_h, recurrent_mask) if t is not None), None)
    output, h_n, c_n = _fake_layer(
        input, h0, c0, weights, batch_sizes, has_bias, bidirectional, batch_of=batch_of
    )
    hidden_size = _sizes(weights, has_bias, bidirectional).hidden_size
    rows = (2 if bidirectional else 1, *input.shape[:-1])
    return (
        output,
        h_n,
        c_n,
        input.new_empty((*rows, hidden_size) if return_cell_states else (0,)),
        input.new_empty((*rows, hidden_size, 4) if return_gates else (0,)),
    )


@_fake("lstm_layer_with_extras_forward")
def _(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    has_bias: bool,
    bidirectional: bool,
    *extras: Any,
) -> tuple[Tensor, ...]:
    results = _fake_layer_with_extras(input, h0, c0, weights, batch_sizes, has_bias, bidirectional, *extras)
    s = _sizes(weights, has_bias, bidirectional)
    gates_dtype, sum_dtype = _saved_dtypes(input)
    norm = extras[OPERANDS.index("norm")]

    def of_norm(first: int, features: Any, dtype: torch.dtype) -> Tensor:
        sizes = (first, *input.shape[:-1], features) if len(norm) else (0,)
        return input.new_empty(sizes, dtype=dtype)

    products = of_norm(2 * s.directions, 4 * s.hidden_size, gates_dtype)
    return *results, *_fake_saved(input, s), products, of_norm(s.directions, 2, sum_dtype)


@_fake("lstm_layer_with_extras_backward")
def _(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    has_bias: bool,
    bidirectional: bool,
    *others: Any,
) -> list[Tensor]:
    _sizes(weights, has_bias, bidirectional)
    extras = dict(zip(OPERANDS, others[: len(OPERANDS)], strict=True))
    inputs = (input, h0, c0, *weights, extras["reset_h"], extras["reset_c"], *extras["norm"])
    names = "input, h0, c0, each weight, reset_h, reset_c and each parameter of norm"
    return _fake_gradients(inputs, others[-1], names, "a state")


# ---- floating-point operations of the matrix products, as torch counts them: shapes in place of tensors


def _products(input: Sequence[int], s: _Sizes) -> tuple[int, int, int]:
    """Those of one product with W_ih, W_hh and W_hr for all rows of all directions."""
    rows = 2 * s.directions * prod(input[:-1])
    gates = 4 * s.hidden_size
    return (
        rows * gates * s.input_size,
        rows * gates * s.output_size,
        rows * s.output_size * s.hidden_size if s.projected else 0,
    )


@_flops(
    "lstm_layer",
    "lstm_layer_forward",
    "lstm_layer_with_extras",
    "lstm_layer_with_extras_forward",
)
def _forward_flops(
    input: Sequence[int],
    h0: Any,
    c0: Any,
    weights: Sequence[Sequence[int]],
    batch_sizes: Any,
    has_bias: bool,
    bidirectional: bool,
    *_extras: Any,
    **_: Any,
) -> int:
    return sum(_products(input, _sizes(weights, has_bias, bidirectional)))


@_flops("lstm_layer_backward")
def _backward_flops(
    grad_output: Any,
    grad_h_n: Any,
    grad_c_n: Any,
    input: Sequence[int],
    h0: Any,
    c0: Any,
    weights: Sequence[Sequence[int]],
    batch_sizes: Any,
    output: Any,
    gates: Any,
    cells: Any,
    hidden: Any,
    has_bias: bool,
    bidirectional: bool,
    wanted: Sequence[bool],
    **_: Any,
) -> int:
    return _gradient_flops(input, weights, has_bias, bidirectional, wanted)


@_flops("lstm_layer_with_extras_backward")
def _backward_with_extras_flops(
    input: Sequence[int],
    h0: Any,
    c0: Any,
    weights: Sequence[Sequence[int]],
    batch_sizes: Any,
    has_bias: bool,
    bidirectional: bool,
    *others: Any,
    **_: Any,
) -> int:
    return _gradient_flops(input, weights, has_bias, bidirectional, others[-1])


def _gradient_flops(
    input: Sequence[int],
    weights: Sequence[Sequence[int]],
    has_bias: bool,
    bidirectional: bool,
    wanted: Sequence[bool],
) -> int:
    s = _sizes(weights, has_bias, bidirectional)
    input_product, recurrent_product, projection_product = _products(input, s)
    # Through time, always; then the gradients that are wanted.
    total = recurrent_product + projection_product
    if wanted[0]:
        total += input_product
    per_direction = len(weights) // s.directions

    def of_weight(i: int, product: int) -> int:
        return product // s.directions * _count(wanted[3 + i : 3 + len(weights) : per_direction])

    total += of_weight(0, input_product) + of_weight(1, recurrent_product)
    if s.projected:
        total += of_weight(per_direction - 1, projection_product)
    return total


def _count(flags: Iterable[bool]) -> int:
    return sum(map(bool, flags))


# ---- registration


@functools.cache
def register() -> None:
    """Gives torch the fake kernels and the FLOP counts. The operators' library must be loaded."""
    from torch.utils.flop_counter import register_flop_formula

    for name, function in _fake_kernels.items():
        torch.library.register_fake(f"lstm_ext::{name}", function)
    for name, formula in _flop_formulas.items():
        register_flop_formula(getattr(torch.ops.lstm_ext, name))(formula)


loader.on_load(register)
