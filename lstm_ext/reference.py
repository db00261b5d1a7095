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

What a layer can do beyond that (``extras``), in the order in which step t does it:

.. code-block:: text

    resets                  h_{t-1}, c_{t-1} = reset_h, reset_c, or zeros, in the rows where resets_t is true, before
                            all else; no gradient reaches the state that is replaced. The reverse direction is cut at
                            the same borders: its state is replaced after a step where resets_t is true, except after
                            the first step of the sequence, where its result is the final state.
    recurrent_dropout       W_h* h_{t-1} becomes W_h* (m * h_{t-1}), with one m of 0 or 1 / (1 - p) for all steps
    layer_norm              W_i* x_t + b_i* becomes gain_ih * N(W_i* x_t) + b_i*, and W_h* h_{t-1} + b_h* becomes
                            gain_hh * N(W_h* h_{t-1}) + b_h*, with N over the 4H pre-activations of the gates together,
                            and h_t = o_t * tanh(gain_c * N(c_t) + bias_c), with N over the H units.
                            N(a) = (a - mean(a)) / sqrt(var(a) + 1e-5), with the biased variance.
    zoneout                 of what the equations above give, c'_t and h'_t (with a projection: the projected h'_t),
                            c_t = k_c * c_{t-1} + (1 - k_c) * c'_t, h_t = k_h * h_{t-1} + (1 - k_h) * h'_t,
                            k random, 0 or 1, for each element and step in training, and their mean in evaluation;
                            h'_t is made of c'_t, not of c_t
    lengths                 from step lengths[b] on, row b keeps its h and c, and its output is 0

Recurrent dropout is that of Gal and Ghahramani (2016, https://arxiv.org/abs/1512.05287), with one mask for all gates,
as in Keras 3. Zoneout is that of Krueger et al. (2017, https://arxiv.org/abs/1606.01305). Layer normalisation is that
of Ba, Kiros and Hinton (2016, https://arxiv.org/abs/1607.06450, equations 20 to 22), as in the library Haste: c_t
goes on as it is, and only what h_t sees of it is normalised (the cells of TorchScript's ``fastrnns`` benchmark carry
the normalised c_t on, which is another layer). The paper adds a shift to each of the two products and a bias to their
sum; the two biases of the layer are that already.

Every function is differentiable as often as one likes and takes any device and any dtype. bfloat16 and float16
are computed in float32, the cell state included, and rounded once, at the end of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .call import stack
from .layer.equations import lstm_layer

__all__ = ["lstm", "lstm_layer"]


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
    *,
    lengths: Tensor | Sequence[int] | None = None,
    resets: Tensor | PackedSequence | None = None,
    reset_state: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: float | tuple[float, float] = 0.0,
    norm_weights: Sequence[Tensor] | None = None,
    recompute: bool = False,
    return_cell_states: bool = False,
    return_gates: bool = False,
) -> Any:
    """:func:`lstm_ext.functional.lstm` on the equations above: the same arguments, results and errors."""
    return stack.lstm(
        lstm_layer,
        input,
        hx,
        weights,
        bias,
        num_layers,
        dropout,
        training,
        bidirectional,
        batch_first,
        recurrent_dropout,
        zoneout,
        norm_weights,
        recompute,
        lengths=lengths,
        resets=resets,
        reset_state=reset_state,
        mask=mask,
        return_cell_states=return_cell_states,
        return_gates=return_gates,
    )
