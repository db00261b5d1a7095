"""What one layer is not: argument checks, stacking of layers, dropout between them.

Everything here takes the function that computes one layer as an argument, so that the compiled kernels and
the reference share every line above the layer itself. Tensors are time-major, (T, B, features), or packed,
(N, features).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from ..layer.options import LSTMExtras, StackExtras, collected
from ..layer.route import LayerFunction
from ..layer.tracing import any_autocast
from . import arguments
from . import layout as packed_layout

__all__ = ["EMPTY_SEQUENCE", "LayerFunction", "any_autocast", "lstm", "stack"]

# torch's own text, from aten/src/ATen/native/RNN.cpp
EMPTY_SEQUENCE = "Expected sequence length to be larger than 0 in RNN"


def stack(
    layer: LayerFunction,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Sequence[Tensor]],
    batch_sizes: Tensor | None,
    bias: bool,
    dropout: float,
    training: bool,
    bidirectional: bool,
    extras: StackExtras | None = None,
) -> Any:
    """Run the layers on a time-major or packed ``input``; one entry of ``weights`` per layer. Checks nothing.

    The masks between the layers come from ``torch.nn.functional.dropout`` on the time-major output, which is
    what torch itself does (also with ``batch_first``): the same seed gives the same masks.

    Returns:
        output, h_n, c_n, and, if there are ``extras``, an LSTMExtras.
    """
    if extras is not None:
        return _stack_with_extras(
            layer, input, h0, c0, weights, batch_sizes, bias, dropout, training, bidirectional, extras
        )
    if any_autocast():
        input, h0, c0, weights = _to_autocast_dtype(input, h0, c0, weights)
    if len(weights) == 1:
        return layer(input, h0, c0, weights[0], batch_sizes, bias, bidirectional)

    directions = 2 if bidirectional else 1
    h0_of = [None] * len(weights) if h0 is None else h0.split(directions)
    c0_of = [None] * len(weights) if c0 is None else c0.split(directions)
    h_n, c_n = [], []
    for k, layer_weights in enumerate(weights):
        if k > 0 and dropout != 0 and training:
            input = F.dropout(input, dropout, True)
        input, h, c = layer(input, h0_of[k], c0_of[k], layer_weights, batch_sizes, bias, bidirectional)
        h_n.append(h)
        c_n.append(c)
    return input, torch.cat(h_n), torch.cat(c_n)


def _stack_with_extras(
    layer: LayerFunction,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Sequence[Tensor]],
    batch_sizes: Tensor | None,
    bias: bool,
    dropout: float,
    training: bool,
    bidirectional: bool,
    extras: StackExtras,
) -> tuple[Tensor, Tensor, Tensor, LSTMExtras]:
    if any_autocast():
        reset_h, reset_c = _to_autocast_dtype(input, extras.reset_h, extras.reset_c, [])[1:3]
        input, h0, c0, weights = _to_autocast_dtype(input, h0, c0, weights)
        # The parameters of layer normalisation keep their dtype, as torch.nn.LayerNorm's do. Only the other of the two
        # 16-bit dtypes, which a layer does not take, becomes float32, in which the layer computes: no rounding.
        other = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}.get(input.dtype)
        norm = tuple([tuple([w.float() if w.dtype == other else w for w in of]) for of in extras.norm])
        extras = replace(extras, reset_h=reset_h, reset_c=reset_c, norm=norm)
    directions = 2 if bidirectional else 1
    h0_of = [None] * len(weights) if h0 is None else h0.split(directions)
    c0_of = [None] * len(weights) if c0 is None else c0.split(directions)
    h_n, c_n, more = [], [], []
    for k, layer_weights in enumerate(weights):
        if k > 0 and dropout != 0 and training:
            input = F.dropout(input, dropout, True)
        of_layer = extras.of_layer(k, input, h0, layer_weights, batch_sizes, directions)
        input, h, c, cells, gates = layer(
            input, h0_of[k], c0_of[k], layer_weights, batch_sizes, bias, bidirectional, of_layer
        )
        if len(weights) == 1:
            return input, h, c, LSTMExtras(cells, gates)
        h_n.append(h)
        c_n.append(c)
        more.append((cells, gates))
    return input, torch.cat(h_n), torch.cat(c_n), collected(more)


def _to_autocast_dtype(
    input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, Tensor | None, Tensor | None, Sequence[Sequence[Tensor]]]:
    """What autocast does to the arguments of an operator on its lower-precision list."""
    device_type = input.device.type
    # Dynamo of torch 2.11 cannot look into is_autocast_available; these two have it.
    if device_type not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device_type):
        return input, h0, c0, weights
    if not torch.is_autocast_enabled(device_type):
        return input, h0, c0, weights
    dtype = torch.get_autocast_dtype(device_type)

    def cast(x: Tensor | None) -> Any:
        # Autocast leaves float64 alone.
        if x is None or not x.is_floating_point() or x.dtype == torch.float64:
            return x
        return x.to(dtype)

    return cast(input), cast(h0), cast(c0), [[cast(w) for w in layer] for layer in weights]


def lstm(
    layer: LayerFunction,
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    recurrent_dropout: float = 0.0,
    zoneout: float | tuple[float, float] = 0.0,
    norm_weights: Sequence[Tensor] | None = None,
    recompute: bool = False,
    **asked: Any,
) -> Any:
    """``functional.lstm`` for a given layer function: check, stack, put the layout back.

    ``asked``: the arguments of one call, as `arguments.run` takes them; without any of them, and of those before, this
    is the way of the plain layer.
    """
    packed = input if isinstance(input, PackedSequence) else None
    if packed is not None:
        batch = packed_layout.batch_of(packed, hx)
        input = x = packed.data
    elif not isinstance(input, Tensor):
        raise TypeError(
            f"input: expected a Tensor of shape {_LAYOUT[batch_first]} or a PackedSequence, "
            f"got {type(input).__name__}"
        )
    elif input.dim() != 3:
        raise ValueError(f"input: expected 3 dimensions {_LAYOUT[batch_first]}, got shape {_shape(input)}")
    else:
        x = input.transpose(0, 1) if batch_first else input
        batch = x.size(1)
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout: expected a number in range [0, 1], got {dropout}")
    layers, hidden_size, state_size = _split_weights(weights, input, bias, num_layers, bidirectional)
    sets = len(layers) * (2 if bidirectional else 1)
    h0, c0 = _check_hx(hx, input, sets, batch, hidden_size, state_size)
    if packed is not None and h0 is None and torch.compiler.is_compiling():
        h0, c0 = packed_layout.zero_states(input, sets, batch, state_size, hidden_size)
    if (
        recurrent_dropout != 0
        or zoneout != 0
        or norm_weights is not None
        or recompute is not False
        or any([value is not None and value is not False for value in asked.values()])
    ):
        options = StackExtras(
            recurrent_dropout=arguments.probability("recurrent_dropout", recurrent_dropout),
            zoneout=arguments.zoneout_pair(zoneout),
            training=training,
            norm=_split_norm(norm_weights, input, bias, len(layers), bidirectional, hidden_size),
            recompute=arguments.flag("recompute", recompute),
        )
        if packed is None and x.size(0) == 0:
            raise RuntimeError(EMPTY_SEQUENCE)

        def stacked(x: Tensor, h0: Any, c0: Any, batch_sizes: Tensor | None, extras: Any) -> Any:
            return stack(
                layer, x, h0, c0, layers, batch_sizes, bias, dropout, training, bidirectional, extras
            )

        layout = arguments.Layout(1 if packed else x.size(0), batch, batch_first, packed=packed)
        shapes = (sets, batch, state_size), (sets, batch, hidden_size)
        return arguments.run(stacked, x, h0, c0, layout, shapes, options, **asked)
    if packed is not None:
        if h0 is not None and c0 is not None:
            h0 = packed_layout.permuted(h0, packed.sorted_indices)
            c0 = packed_layout.permuted(c0, packed.sorted_indices)
        output, h_n, c_n = stack(
            layer, x, h0, c0, layers, packed.batch_sizes, bias, dropout, training, bidirectional
        )
        h_n = packed_layout.permuted(h_n, packed.unsorted_indices)
        c_n = packed_layout.permuted(c_n, packed.unsorted_indices)
        return packed_layout.repacked(output, packed), (h_n, c_n)
    if x.size(0) == 0:
        raise RuntimeError(EMPTY_SEQUENCE)
    output, h_n, c_n = stack(layer, x, h0, c0, layers, None, bias, dropout, training, bidirectional)
    return (output.transpose(0, 1) if batch_first else output), (h_n, c_n)


_LAYOUT = {False: "(time, batch, features)", True: "(batch, time, features)"}


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _split_weights(
    weights: Sequence[Tensor], input: Tensor, bias: bool, num_layers: int, bidirectional: bool
) -> tuple[list[Sequence[Tensor]], int, int]:
    """Check the flat sequence of weights and cut it into layers; also give H and the size of h (P or H)."""
    if num_layers < 1:
        raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
    if isinstance(weights, Tensor) or not all(isinstance(w, Tensor) for w in weights):
        raise TypeError(
            "weights: expected a flat sequence of Tensors in the order of torch.nn.LSTM.parameters()"
        )
    directions = 2 if bidirectional else 1
    plain = 4 if bias else 2
    per_set, rest = divmod(len(weights), num_layers * directions)
    if rest or per_set not in (plain, plain + 1):
        raise ValueError(
            f"weights: expected {num_layers * directions * plain} tensors "
            f"({num_layers * directions * (plain + 1)} with a projection) for num_layers={num_layers}, "
            f"bias={bias}, bidirectional={bidirectional}, got {len(weights)}"
        )
    projected = per_set == plain + 1
    names = ["weight_ih", "weight_hh"] + (["bias_ih", "bias_hh"] if bias else [])
    names += ["weight_hr"] if projected else []

    w_hh = weights[1]
    if w_hh.dim() != 2 or w_hh.size(0) % 4:
        raise ValueError(f"weights[1] (weight_hh_l0): expected shape (4 * hidden, state), got {_shape(w_hh)}")
    hidden, state = w_hh.size(0) // 4, w_hh.size(1)
    if not projected and hidden != state:
        raise ValueError(
            f"weights[1] (weight_hh_l0): expected shape {(4 * hidden, hidden)} without weight_hr, "
            f"got {_shape(w_hh)}"
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
            "weight_ih": (4 * hidden, features),
            "weight_hh": (4 * hidden, state),
            "weight_hr": (state, hidden),
        }.get(names[kind], (4 * hidden,))
        if tuple(weight.shape) != expected:
            raise ValueError(f"weights[{i}] ({name}): expected shape {expected}, got {_shape(weight)}")
        _check_like_input(f"weights[{i}] ({name})", weight, input)
    n = per_set * directions
    return [weights[k * n : (k + 1) * n] for k in range(num_layers)], hidden, state


def _split_norm(
    weights: Sequence[Tensor] | None,
    input: Tensor,
    bias: bool,
    num_layers: int,
    bidirectional: bool,
    hidden: int,
) -> tuple[tuple[Tensor, ...], ...]:
    """Check the flat sequence of parameters of layer normalisation and cut it into layers."""
    if weights is None:
        return ()
    if isinstance(weights, Tensor) or not all([isinstance(w, Tensor) for w in weights]):
        raise TypeError("norm_weights: expected None or a flat sequence of Tensors")
    kinds = ["gain_ih", "gain_hh", "gain_c"] + (["bias_c"] if bias else [])
    directions = 2 if bidirectional else 1
    n = len(kinds) * directions
    if len(weights) != num_layers * n:
        raise ValueError(
            f"norm_weights: expected {num_layers * n} tensors ({', '.join(kinds)}, for each layer and direction), "
            f"got {len(weights)}"
        )
    for i, w in enumerate(weights):
        kind = kinds[i % len(kinds)]
        expected = (hidden,) if kind.endswith("_c") else (4 * hidden,)
        if tuple(w.shape) != expected:
            raise ValueError(f"norm_weights[{i}] ({kind}): expected shape {expected}, got {_shape(w)}")
        _check_like_input(f"norm_weights[{i}] ({kind})", w, input)
    return tuple([tuple(weights[k * n : (k + 1) * n]) for k in range(num_layers)])


def _check_like_input(name: str, x: Tensor, input: Tensor) -> None:
    if x.device != input.device:
        raise ValueError(f"{name}: expected device {input.device} as input, got {x.device}")
    if x.dtype != input.dtype and not any_autocast():
        raise ValueError(f"{name}: expected dtype {input.dtype} as input, got {x.dtype}")


def _check_hx(
    hx: Any, input: Tensor, sets: int, batch: int, hidden_size: int, state_size: int
) -> tuple[Tensor | None, Tensor | None]:
    if hx is None:
        return None, None
    if not isinstance(hx, (tuple, list)) or len(hx) != 2 or not all(isinstance(x, Tensor) for x in hx):
        raise TypeError(f"hx: expected None or a tuple of two Tensors (h0, c0), got {describe_hx(hx)}")
    for name, x, size in (("hx[0] (h0)", hx[0], state_size), ("hx[1] (c0)", hx[1], hidden_size)):
        expected = (sets, batch, size)
        if tuple(x.shape) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {_shape(x)}")
        _check_like_input(name, x, input)
    return hx[0], hx[1]


def describe_hx(hx: Any) -> str:
    """The type of a wrong ``hx``, with the types inside if it is a tuple or list."""
    if isinstance(hx, (tuple, list)):
        return f"{type(hx).__name__} of ({', '.join(type(x).__name__ for x in hx)})"
    return type(hx).__name__
