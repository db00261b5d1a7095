r"""The textbook equations of the LSTM in plain PyTorch: the oracle of the tests, and the fallback.

With :math:`\sigma` the logistic function and :math:`\odot` the element-wise product, step t of one layer and
direction computes

.. code-block:: text

    i_t = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)        input gate
    f_t = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)        forget gate
    g_t =    tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)        cell candidate
    o_t = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)        output gate
    c_t = f_t * c_{t-1} + i_t * g_t
    h_t = o_t * tanh(c_t)                                       without a projection
    h_t = W_hr (o_t * tanh(c_t))                                with one (proj_size > 0)

as Gers, Schmidhuber and Cummins (2000) give them, without peepholes, and Sak et al. (2014,
https://arxiv.org/abs/1402.1128) for the projection; these are the equations of ``torch.nn.LSTM``. The four
gates' rows lie one after the other in the weights: ``W_ih = (W_ii|W_if|W_ig|W_io)``. The reverse direction
runs from the last step to the first.

Every function is differentiable as often as one likes and takes any device and any dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _stack

__all__ = ["lstm", "lstm_layer"]


def lstm_layer(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    bias: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, all time steps, both directions if ``bidirectional``.

    Shapes, with D = 2 if bidirectional else 1 and P the projection's size, or H without a projection:

    Args:
        input: (T, B, I), T >= 1, any strides.
        h0: (D, B, P), or None for zeros.
        c0: (D, B, H), or None for zeros.
        weights: D sets of ``w_ih (4H, I), w_hh (4H, P)[, b_ih (4H), b_hh (4H)][, w_hr (P, H)]``.
        bias: whether the sets hold the two biases.
        bidirectional: whether there are two sets, the second for the reverse direction.

    Returns:
        output (T, B, D * P), h_n (D, B, P), c_n (D, B, H); none of them shares memory with another.
    """
    per_set = len(weights) // 2 if bidirectional else len(weights)
    outputs, h_n, c_n = [], [], []
    for d in range(2 if bidirectional else 1):
        w_ih, w_hh, *rest = weights[d * per_set : (d + 1) * per_set]
        b_ih, b_hh = rest[:2] if bias else (None, None)
        w_hr = rest[-1] if len(rest) == (3 if bias else 1) else None
        h = h0[d] if h0 is not None else input.new_zeros(input.size(1), w_hh.size(1))
        c = c0[d] if c0 is not None else input.new_zeros(input.size(1), w_hh.size(0) // 4)

        # The input's share of the gates needs no earlier step: one product for all of them.
        from_input = F.linear(input, w_ih, b_ih).unbind(0)
        steps: list[Tensor] = []
        for gates_x in from_input if d == 0 else from_input[::-1]:
            i, f, g, o = (gates_x + F.linear(h, w_hh, b_hh)).chunk(4, dim=-1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            if w_hr is not None:
                h = F.linear(h, w_hr)
            steps.append(h)
        outputs.append(torch.stack(steps if d == 0 else steps[::-1]))
        h_n.append(h)
        c_n.append(c)
    output = torch.cat(outputs, dim=-1) if bidirectional else outputs[0]
    return output, torch.stack(h_n), torch.stack(c_n)


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """:func:`lstm_ext.functional.lstm` on the equations above: the same arguments, results and errors."""
    return _stack.lstm(
        lstm_layer, input, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first
    )
