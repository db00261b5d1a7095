"""One call of a stack of layers: checks options, converts data to the layers' layout, and the results back.

`run` serves `lstm_ext.LSTM` and `lstm_ext.GRU`, their steps, and the functions without a module, in every layout.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..layer import route
from ..layer.layer_call import LayerFunction
from ..layer.shapes import weight_counts
from ..layer.tracing import any_autocast, is_zero
from ..options import OPTIONS, CellParameters, FunctionalOptions, checked, requested, unexpected_argument
from . import cuda_choice
from .arguments import CallOptions, Requested, Stack, any_requested, request
from .autocast import autocast_dtype
from .layout import BATCH_FIRST, EMPTY_SEQUENCE, TIME_FIRST, JaggedLayout, Layout, LSTMExtras, PackedLayout
from .stack import run_stack
from .torch_operator import PlainStack
from .torch_operator import gru as gru_by_torch
from .torch_operator import lstm as lstm_by_torch
from .values import check_like_input, described_pair, is_pair


def run(
    stack: Stack,
    layer: LayerFunction,
    weights: Sequence[Sequence[Tensor]],
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    layout: Layout,
    options: Requested | None,
) -> Any:
    """Compute, and give the results in the user's layout.

    Args:
        layer: the function that computes one layer.
        weights: one entry per layer.
        x: the input as the layers take it, checked, as are h0 and c0, with a batch axis in the order of the user.
        options: None if nothing beyond ``torch.nn.LSTM`` is requested.
    """
    batch_sizes = layout.batch_sizes
    if batch_sizes is not None:
        layout.initial = h0, c0
        h0, c0 = layout.states(h0), layout.states(c0)
    if options is None:
        return layout.restored(*_layers(stack, layer, weights, x, h0, c0, batch_sizes, None))
    if batch_sizes is not None:
        options.reset_h, options.reset_c = layout.states(options.reset_h), layout.states(options.reset_c)
    rows = options.rows
    if rows is None:
        output, h_n, c_n, extras = _layers(stack, layer, weights, x, h0, c0, batch_sizes, options)
    else:
        # The rows or steps of padded input that count are put together, and written back to their places.
        states = rows.packed_state(h0), rows.packed_state(c0)
        output, h_n, c_n, extras = _layers(
            stack, layer, weights, rows.packed(x), *states, rows.batch_sizes, options
        )
        output, extras = rows.padded(output, 0, x), extras.map(lambda values: rows.padded(values, 1, x))
        h_n, c_n = rows.padded_state(h_n, h0), rows.padded_state(c_n, c0)
    return layout.restored(output, h_n, c_n, extras if options.returns_extras else None)


def _layers(
    stack: Stack,
    layer: LayerFunction,
    weights: Sequence[Sequence[Tensor]],
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    options: Requested | None,
) -> tuple[Tensor, Tensor, Tensor, LSTMExtras | None]:
    """By torch's own operator, if plain layers run on it here, else layer by layer."""
    autocast = autocast_dtype(x) if any_autocast() else None
    preferred = options is None and (
        cuda_choice.prefers_torch(stack, weights, x, batch_sizes, autocast)
        if x.is_cuda
        else batch_sizes is None and route.prefers_torch(x, weights, stack.bidirectional)
    )
    # Under autocast, torch's results of packed data have other dtypes than those of the dense data that the user gave.
    if (
        layer is route.lstm_layer
        and (preferred or not route.has_operators(x.device))
        and (options is None or (options.only_padded and autocast is None))
    ):
        results = lstm_by_torch(stack, weights, x, h0, c0, batch_sizes, autocast, preferred)
        if results is not None:
            return (*results, None if options is None else LSTMExtras(None, None))
    if stack.gru and layer is route.lstm_layer and options is not None and options.only_gru:
        of_gru = gru_by_torch(stack, weights, x, h0, batch_sizes)
        if of_gru is not None:
            output, h_n = of_gru
            return output, h_n, h_n, LSTMExtras(None, None)
    return run_stack(stack, layer, weights, x, h0, c0, batch_sizes, options, autocast)


def zero_states(x: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    """The zeros that stand for a missing ``hx``, for a compiler: they tell it the number of sequences."""
    return tuple([x.new_zeros(shape) for shape in shapes])


# ---- without a module


def lstm(
    layer: LayerFunction,
    input: Tensor | PackedSequence,
    hx: Any,
    weights: Sequence[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    gru: bool = False,
    **keywords: Any,
) -> Any:
    """``functional.lstm``, or ``functional.gru``, for a given layer function."""
    defaults = {n: d for n, d in CallOptions._field_defaults.items() if not (gru and n.startswith("return_"))}
    call_options = CallOptions(**{name: keywords.pop(name, default) for name, default in defaults.items()})
    given, cell_weights = _options_of(keywords, bias, gru)
    # A compiler may take an int for a number that changes. This makes it one number.
    num_layers = operator.index(num_layers)
    data: Tensor
    if isinstance(input, PackedSequence):
        layout: Layout = PackedLayout(input, (hx,) if gru else hx)
        data = input.data
    elif isinstance(input, Tensor) and input.is_nested:
        layout = JaggedLayout(input)
        data = input.values()
    elif not isinstance(input, Tensor):
        raise TypeError(
            f"input: expected a Tensor of shape {_LAYOUT[batch_first]} or a PackedSequence, "
            f"got {type(input).__name__}"
        )
    elif input.dim() != 3:
        raise ValueError(f"input: expected 3 dimensions {_LAYOUT[batch_first]}, got shape {_shape(input)}")
    else:
        layout = BATCH_FIRST if batch_first else TIME_FIRST
        data = input
    x = layout.rows(input)
    batch = layout.batch(x)
    packed = layout.batch_sizes is not None
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout: expected a number in range [0, 1], got {dropout}")
    layers, hidden_size, state_size = _split_weights(weights, data, bias, num_layers, bidirectional, gru)
    sets = len(layers) * (2 if bidirectional else 1)
    shapes = ((sets, batch, state_size), (sets, batch, hidden_size))[: 1 if gru else 2]
    h0, c0 = _check_hx(hx, data, shapes)
    if packed and h0 is None and torch.compiler.is_compiling():
        h0, c0 = (*zero_states(x, shapes), None)[:2]
    if not packed and is_zero(x.size(0)):
        raise RuntimeError(EMPTY_SEQUENCE)
    stack = PlainStack(bias, num_layers, dropout, training, bidirectional, gru)
    asked = call_options if call_options.given() else None
    parameters = {
        added.field: _split_parameters(added, tensors, data, bias, num_layers, bidirectional, hidden_size)
        for added, tensors in cell_weights
    }
    options = None
    if gru or any_requested(given, asked):
        options = request(stack, given, parameters, x, layout, shapes, asked)
    results = run(stack, layer, layers, x, h0, c0, layout, options)
    return (results[0], results[1][0]) if gru else results


def _options_of(
    keywords: dict[str, Any], bias: bool, gru: bool
) -> tuple[dict[str, Any] | None, list[tuple[CellParameters, Sequence[Tensor]]]]:
    """The options that these keywords request, checked, and the parameters among them, which are not."""
    given: dict[str, Any] = {}
    cell_weights = []
    known = FunctionalOptions.__annotations__
    for name, option in OPTIONS.items():
        if (added := option.parameters) is not None:
            tensors = keywords.pop(added.keyword, None)
            kind = keywords.pop(name, False) if name in known else False
            if kind is not False and tensors is None and not gru:
                raise ValueError(f"{name}: expected {added.keyword} with it, got {name}={kind!r} alone")
            if tensors is not None or kind is not False:
                given[name] = True if kind is False else kind
                cell_weights.append((added, tensors))
        elif option.call and name in keywords:
            given[name] = keywords.pop(name)
    for name in keywords:
        raise unexpected_argument("gru()" if gru else "lstm()", name, [*known, *CallOptions._fields])
    return requested(checked(given, {}, bias, gru)) if given else None, cell_weights


_LAYOUT = {False: "(time, batch, features)", True: "(batch, time, features)"}


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _split_weights(
    weights: Sequence[Tensor], input: Tensor, bias: bool, num_layers: int, bidirectional: bool, gru: bool
) -> tuple[list[Sequence[Tensor]], int, int]:
    """Check the flat sequence of weights and cut it into layers; also give H and the size of h (P or H)."""
    gates, module = (3, "GRU") if gru else (4, "LSTM")
    if num_layers < 1:
        raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
    if isinstance(weights, Tensor) or not all(isinstance(w, Tensor) for w in weights):
        raise TypeError(
            f"weights: expected a flat sequence of Tensors in the order of torch.nn.{module}.parameters()"
        )
    directions = 2 if bidirectional else 1
    sets = num_layers * directions
    plain_count, projected_count = weight_counts(sets, bias)
    if len(weights) != plain_count and (gru or len(weights) != projected_count):
        or_projected = "" if gru else f" ({projected_count} with a projection)"
        raise ValueError(
            f"weights: expected {plain_count} tensors{or_projected} "
            f"for num_layers={num_layers}, bias={bias}, bidirectional={bidirectional}, got {len(weights)}"
        )
    per_set, projected = len(weights) // sets, len(weights) == projected_count
    names = ["weight_ih", "weight_hh"] + (["bias_ih", "bias_hh"] if bias else [])
    names += ["weight_hr"] if projected else []

    w_hh = weights[1]
    if w_hh.dim() != 2 or w_hh.size(0) % gates:
        raise ValueError(
            f"weights[1] (weight_hh_l0): expected shape ({gates} * hidden, state), got {_shape(w_hh)}"
        )
    hidden, state = w_hh.size(0) // gates, w_hh.size(1)
    if not projected and hidden != state:
        raise ValueError(
            f"weights[1] (weight_hh_l0): expected shape {(gates * hidden, hidden)}"
            f"{'' if gru else ' without weight_hr'}, got {_shape(w_hh)}"
        )
    if projected and state >= hidden:
        raise ValueError(
            f"weights[1] (weight_hh_l0): expected a state (proj_size) smaller than hidden, got shape {_shape(w_hh)}"
        )
    for i, weight in enumerate(weights):
        place, kind = divmod(i, per_set)
        k, reverse = divmod(place, directions)
        name = f"{names[kind]}_l{k}{'_reverse' if reverse else ''}"
        features = input.size(-1) if k == 0 else directions * state
        expected: tuple[int, ...] = {
            "weight_ih": (gates * hidden, features),
            "weight_hh": (gates * hidden, state),
            "weight_hr": (state, hidden),
        }.get(names[kind], (gates * hidden,))
        check_like_input(f"weights[{i}] ({name})", weight, expected, input)
    n = per_set * directions
    return [weights[k * n : (k + 1) * n] for k in range(num_layers)], hidden, state


def _split_parameters(
    parameters: CellParameters,
    weights: Sequence[Tensor],
    input: Tensor,
    bias: bool,
    num_layers: int,
    bidirectional: bool,
    hidden: int,
) -> tuple[tuple[Tensor, ...], ...]:
    """Check a flat sequence of parameters of cells and cut it into layers."""
    keyword, kinds = parameters.keyword, parameters.kinds(bias)
    if isinstance(weights, Tensor) or not all([isinstance(w, Tensor) for w in weights]):
        raise TypeError(f"{keyword}: expected None or a flat sequence of Tensors")
    directions = 2 if bidirectional else 1
    n = len(kinds) * directions
    if len(weights) != num_layers * n:
        raise ValueError(
            f"{keyword}: expected {num_layers * n} tensors ({', '.join(kinds)}, for each layer and direction), "
            f"got {len(weights)}"
        )
    for i, w in enumerate(weights):
        kind = kinds[i % len(kinds)]
        check_like_input(f"{keyword}[{i}] ({kind})", w, (parameters.sizes[kind] * hidden,), input)
    return tuple([tuple(weights[k * n : (k + 1) * n]) for k in range(num_layers)])


def _check_hx(
    hx: Any, input: Tensor, shapes: Sequence[tuple[int, ...]]
) -> tuple[Tensor | None, Tensor | None]:
    if hx is None:
        return None, None
    if len(shapes) == 1:
        if not isinstance(hx, Tensor):
            raise TypeError(f"hx: expected None or a Tensor, got {described_pair(hx)}")
        check_like_input("hx", hx, shapes[0], input)
        return hx, None
    if not is_pair(hx):
        raise TypeError(f"hx: expected None or a tuple of two Tensors (h0, c0), got {described_pair(hx)}")
    check_like_input("hx[0] (h0)", hx[0], shapes[0], input)
    check_like_input("hx[1] (c0)", hx[1], shapes[1], input)
    return hx[0], hx[1]
