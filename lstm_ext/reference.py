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

Every function is differentiable as often as one likes and takes any device and any dtype. bfloat16 and float16
are computed in float32, the cell state included, and rounded once, at the end of a layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from . import _stack

__all__ = ["lstm", "lstm_layer"]


def lstm_layer(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bias: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, all time steps, both directions if ``bidirectional``.

    Shapes, with D = 2 if bidirectional else 1 and P the projection's size, or H without a projection:

    Args:
        input: (T, B, I), T >= 1, any strides; with ``batch_sizes`` (N, I), N their sum.
        h0: (D, B, P), or None for zeros.
        c0: (D, B, H), or None for zeros.
        weights: D sets of ``w_ih (4H, I), w_hh (4H, P)[, b_ih (4H), b_hh (4H)][, w_hr (P, H)]``.
        batch_sizes: (T,), int64 on the CPU, of a ``torch.nn.utils.rnn.PackedSequence``: how many of the B
            sequences, sorted by falling length, have a step t. A sequence begins from its row of ``h0`` and
            ``c0``, in the reverse direction at its own last step. None for dense input.
        bias: whether the sets hold the two biases.
        bidirectional: whether there are two sets, the second for the reverse direction.

    Returns:
        output (T, B, D * P), or (N, D * P) with ``batch_sizes``, h_n (D, B, P), c_n (D, B, H); none of them
        shares memory with another.
    """
    if input.dtype in (torch.bfloat16, torch.float16):
        # As in the kernels: between the arguments and the results all is float32.
        arguments = [t if t is None else t.float() for t in (input, h0, c0, *weights)]
        results = lstm_layer(*arguments[:3], arguments[3:], batch_sizes, bias, bidirectional)
        return tuple([r.to(input.dtype) for r in results])
    check_shapes(input, h0, c0, weights, bias, bidirectional)
    per_set = len(weights) // 2 if bidirectional else len(weights)
    # How many rows each step has. Dense data are the case of always the same number.
    sizes = _check_batch_sizes(batch_sizes, input) if batch_sizes is not None else None
    batch = sizes[0] if sizes else input.size(1)
    outputs, h_n, c_n = [], [], []
    for d in range(2 if bidirectional else 1):
        w_ih, w_hh, *rest = weights[d * per_set : (d + 1) * per_set]
        b_ih, b_hh = rest[:2] if bias else (None, None)
        w_hr = rest[-1] if len(rest) == (3 if bias else 1) else None
        h_start = h0[d] if h0 is not None else input.new_zeros(batch, w_hh.size(1))
        c_start = c0[d] if c0 is not None else input.new_zeros(batch, w_hh.size(0) // 4)

        # The input's share of the gates needs no earlier step: one product for all of them.
        from_input = F.linear(input, w_ih, b_ih)
        gates_of_step = from_input.split(sizes) if sizes else from_input.unbind(0)
        if d == 1:
            gates_of_step = gates_of_step[::-1]
        first = gates_of_step[0].size(0)
        h, c = h_start[:first], c_start[:first]
        steps: list[Tensor] = []
        ended: list[tuple[Tensor, Tensor]] = []
        for gates_x in gates_of_step:
            rows = gates_x.size(0)
            if sizes and rows < h.size(0):  # some sequences have ended
                ended.append((h[rows:], c[rows:]))
                h, c = h[:rows], c[:rows]
            elif sizes and rows > h.size(0):  # in the reverse direction, some begin
                h = torch.cat([h, h_start[h.size(0) : rows]])
                c = torch.cat([c, c_start[c.size(0) : rows]])
            i, f, g, o = (gates_x + F.linear(h, w_hh, b_hh)).chunk(4, dim=-1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            if w_hr is not None:
                h = F.linear(h, w_hr)
            steps.append(h)
        ended.append((h, c))
        if d == 1:
            steps.reverse()
        outputs.append(torch.cat(steps) if sizes else torch.stack(steps))
        h_n.append(torch.cat([h for h, _ in ended[::-1]]))
        c_n.append(torch.cat([c for _, c in ended[::-1]]))
    output = torch.cat(outputs, dim=-1) if bidirectional else outputs[0]
    return output, torch.stack(h_n), torch.stack(c_n)


def check_shapes(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    bias: bool,
    bidirectional: bool,
) -> None:
    """What the kernels check, for where they do not run: a bias of shape (1,), say, would be spread out in silence.

    Raises:
        RuntimeError: naming the argument.
    """
    directions = 2 if bidirectional else 1
    plain = 4 if bias else 2
    per_set, rest = divmod(len(weights), directions)
    if rest or per_set not in (plain, plain + 1):
        raise RuntimeError(
            f"lstm_ext: got {len(weights)} weights, expected {plain * directions}, "
            f"or {(plain + 1) * directions} with a projection"
        )
    projected = per_set == plain + 1
    hidden = weights[0].size(0) // 4
    state = weights[per_set - 1].size(0) if projected else hidden
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = []
    for d in range(directions):
        w_ih, w_hh, *others = weights[d * per_set : (d + 1) * per_set]
        expected += [
            ("weight_ih", w_ih, (4 * hidden, input.size(-1))),
            ("weight_hh", w_hh, (4 * hidden, state)),
        ]
        expected += [("bias", b, (4 * hidden,)) for b in others[: plain - 2]]
        expected += [("weight_hr", w, (state, hidden)) for w in others[plain - 2 :]]
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape:
            raise RuntimeError(f"lstm_ext: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    for name, initial, size in (("h0", h0, state), ("c0", c0, hidden)):
        if initial is not None and (
            initial.dim() != 3 or initial.size(0) != directions or initial.size(2) != size
        ):
            raise RuntimeError(
                f"lstm_ext: {name} has shape {tuple(initial.shape)}, expected ({directions}, batch, {size})"
            )


def _check_batch_sizes(batch_sizes: Tensor, input: Tensor) -> list[int]:
    sizes = batch_sizes.tolist()
    if not sizes or min(sizes) < 1 or any([b > a for a, b in itertools.pairwise(sizes)]):
        raise ValueError(f"batch_sizes: expected positive numbers that never rise, got {sizes}")
    if sum(sizes) != input.size(0):
        raise ValueError(
            f"batch_sizes: expected a sum of {input.size(0)}, the number of rows of the input, got {sum(sizes)}"
        )
    return sizes


def lstm(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> tuple[Any, tuple[Tensor, Tensor]]:
    """:func:`lstm_ext.functional.lstm` on the equations above: the same arguments, results and errors."""
    return _stack.lstm(
        lstm_layer, input, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first
    )
