"""The registered operators, ``torch.ops.lstm_ext``: one call computes one layer, all time steps, both directions.

Tracers see these operators (``torch.compile``, ``torch.export``, ``make_fx``, fake and meta tensors), and a C++ process
that loads the operators' library calls them. Importing this module loads the library and registers fake kernels (shapes
without values) and FLOP counts.

T time steps, B batch rows, I input features, H hidden units, P the projection's size, or H without one, D = 2 if
bidirectional, else 1. Packed data has N = sum(batch_sizes) rows in place of (T, B), and B = batch_sizes[0].

``lstm_layer`` computes a layer::

    lstm_layer(input, h0, c0, weights, batch_sizes, has_bias, bidirectional, *, OPTIONS)
        -> (output, h_n, c_n, cell_states, gate_values)

Arguments and results are those of :func:`lstm_ext.reference.lstm_layer`, which has their shapes; the weights have the
dtype of the input. A result that is not requested has no elements. The operator is differentiable once.

OPTIONS are keyword arguments for everything that a layer does beyond ``torch.nn.LSTM``: the fields of
`lstm_ext.layer.layer_call.LayerOptions`, whose docstring has their shapes and meanings. One that is not given is off;
with none, it is the plain layer. docs/options.md says which of them run on the kernels.

``lstm_layer_forward`` takes the same arguments. It also returns what the backward pass needs::

    lstm_layer_forward(...) -> (output, h_n, c_n, cell_states, gate_values,
                                gates, cells, hidden, norm_products, norm_factors)

- gates (D, T, B, 4H): the gate values on the CPU, and on CUDA the preactivations, as the nonlinearities see them.
- cells (D, T, B, H); with a projection hidden (D, T, B, H).
- With layer normalisation norm_products (2 D, T, B, 4H), the normalised products, those of the input before those of h;
  and norm_factors (D, T, B, 2), which they were multiplied by.

Packed data has N in place of T, B. A tensor that the layer does not need has no elements. cells and norm_factors have
the dtype of the input, or float32 for the 16-bit dtypes. On the CPU the others have the same dtype as these; on CUDA
they have that of the input. The operator is not differentiable.

``lstm_layer_backward`` computes the gradients::

    lstm_layer_backward(input, h0, c0, weights, batch_sizes, has_bias, bidirectional, *, OPTIONS,
                        grad_output, grad_h_n, grad_c_n, grad_cell_states, grad_gate_values,
                        output, gates, cells, hidden, norm_products, norm_factors, needs_grad) -> Tensor[]

``needs_grad`` has an entry for input, h0, c0, each weight, reset_h, reset_c and each parameter of norm and peephole.
The result has the same entries: a gradient, or a tensor without elements where ``needs_grad`` is False. A gradient of
a result that is None means zeros. hidden, norm_products and norm_factors may be None where they have no elements. The
operator is not differentiable.

All raise RuntimeError or ValueError for arguments that do not fit, and name the argument.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .layer import operators
from .native import loader

__all__ = ["lstm_layer", "lstm_layer_backward", "lstm_layer_forward"]


def __dir__() -> list[str]:
    return __all__


# A process may have loaded the operators' library by itself.
if not hasattr(torch.ops.lstm_ext, "lstm_layer") and loader.extension() is None:
    raise ImportError(
        f"lstm_ext.ops needs the compiled extension, which is not there: {loader.status().reason}"
    )
operators.register()

lstm_layer: Callable[..., tuple[Tensor, ...]] = torch.ops.lstm_ext.lstm_layer.default
lstm_layer_forward: Callable[..., tuple[Tensor, ...]] = torch.ops.lstm_ext.lstm_layer_forward.default
lstm_layer_backward: Callable[..., list[Tensor]] = torch.ops.lstm_ext.lstm_layer_backward.default
