"""The registered operators, ``torch.ops.lstm_ext``: one call computes one layer, all time steps, both directions.

They are what a tracer sees (``torch.compile``, ``torch.export``, ``make_fx``, fake and meta tensors) and what a C++
process calls that loads the operators' library. Importing this module loads
the library, and they have shapes without values (fake kernels) and FLOP counts.

T time steps, B batch rows, I input features, H hidden units, P the projection's size, or H without one, D = 2 if
bidirectional, else 1. Packed data has N = sum(batch_sizes) rows in place of (T, B), and B = batch_sizes[0].

``lstm_layer(input, h0, c0, weights, batch_sizes, has_bias, bidirectional) -> (output, h_n, c_n)``
    input (T, B, I), or (N, I) with ``batch_sizes``, the int64 CPU tensor of a PackedSequence; h0 (D, B, P) and
    c0 (D, B, H), None means zeros; weights: one set per direction of weight_ih (4H, I), weight_hh (4H, P), bias_ih
    and bias_hh (4H) if ``has_bias``, weight_hr (P, H) with a projection; all of input's dtype. Gives output
    (T, B, D * P) or (N, D * P), h_n (D, B, P), c_n (D, B, H). Differentiable once.

``lstm_layer_forward(...) -> (output, h_n, c_n, gates, cells, hidden)``
    The same, and what the backward pass needs: gates (D, T, B, 4H) or (D, N, 4H), cells and, with a projection,
    hidden (D, T, B, H) or (D, N, H); hidden is empty without one. Of input's dtype; for the 16-bit dtypes cells are
    float32, and on the CPU gates and hidden too. On CUDA, gates are those before the nonlinearity.

``lstm_layer_backward(grad_output, grad_h_n, grad_c_n, input, h0, c0, weights, batch_sizes, output, gates, cells,
hidden, has_bias, bidirectional, wanted) -> Tensor[]``
    ``wanted`` has an entry for input, h0, c0 and each weight, and so has the result: its gradient, or, where
    ``wanted`` is False, a tensor without elements. A gradient of an output that is None means zeros.

The layer with what goes beyond ``torch.nn.LSTM`` has three operators of its own. EXTRAS stands for ``resets, reset_h,
reset_c, lengths, recurrent_mask, kept_h, kept_c, zoneout_h, zoneout_c, norm``: as the attributes of
:class:`lstm_ext._extras.LayerExtras`, where a tensor may be None, kept_h and kept_c are the bool masks of zoneout,
zoneout_h and zoneout_c the shares that are kept where there is no mask, and norm is a list, empty without layer
normalisation. Which of them the kernels serve: docs/options.md.

``lstm_layer_with_extras(input, h0, c0, weights, batch_sizes, has_bias, bidirectional, EXTRAS, return_cell_states,
return_gates) -> (output, h_n, c_n, cell_states, gate_values)``
    cell_states (D, T, B, H) or (D, N, H), gate_values the same with a last axis of 4: i, f, g, o, after the
    nonlinearity; without elements where they are not asked for. Of input's dtype. Differentiable once.

``lstm_layer_with_extras_forward(...) -> (output, h_n, c_n, cell_states, gate_values, gates, cells, hidden,
normalised_products, norm_factors)``
    The same, and what the backward pass needs: gates, cells and hidden as above, and with layer normalisation the
    normalised products, as gates, but (2 D, ...), those of the input before those of h, and what they were multiplied
    by, (D, T, B, 2) or (D, N, 2), of the dtype of cells; without elements where there are none. With
    ``lengths`` they have the shapes of the padded data.

``lstm_layer_with_extras_backward(input, h0, c0, weights, batch_sizes, has_bias, bidirectional, EXTRAS, grad_output,
grad_h_n, grad_c_n, grad_cell_states, grad_gate_values, output, gates, cells, hidden, normalised_products,
norm_factors, wanted) -> Tensor[]``
    As ``lstm_layer_backward``; after those of the weights, ``wanted`` has entries for reset_h, reset_c and norm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .layer import operators
from .native import loader

__all__ = [
    "lstm_layer",
    "lstm_layer_backward",
    "lstm_layer_forward",
    "lstm_layer_with_extras",
    "lstm_layer_with_extras_backward",
    "lstm_layer_with_extras_forward",
]

# A process may have loaded the operators' library by itself.
if not hasattr(torch.ops.lstm_ext, "lstm_layer") and loader.extension() is None:
    raise ImportError(
        f"lstm_ext.ops needs the compiled extension, which is not there: {loader.status().reason}"
    )
operators.register()

_Layer = tuple[Tensor, Tensor, Tensor]
_LayerAndSaved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

lstm_layer: Callable[..., _Layer] = torch.ops.lstm_ext.lstm_layer.default
lstm_layer_forward: Callable[..., _LayerAndSaved] = torch.ops.lstm_ext.lstm_layer_forward.default
lstm_layer_backward: Callable[..., list[Tensor]] = torch.ops.lstm_ext.lstm_layer_backward.default
lstm_layer_with_extras: Callable[..., tuple[Tensor, ...]] = torch.ops.lstm_ext.lstm_layer_with_extras.default
lstm_layer_with_extras_forward: Callable[..., tuple[Tensor, ...]] = (
    torch.ops.lstm_ext.lstm_layer_with_extras_forward.default
)
lstm_layer_with_extras_backward: Callable[..., list[Tensor]] = (
    torch.ops.lstm_ext.lstm_layer_with_extras_backward.default
)
