r"""The textbook equations of LSTM and GRU in plain PyTorch: the oracle of the tests, and the fallback.

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

These are the equations of ``torch.nn.LSTM``: those of Gers, Schmidhuber and Cummins (2000) without peepholes, and for
the projection those of Sak et al. (2014, https://arxiv.org/abs/1402.1128). The weights hold the four gates' rows one
after the other: ``W_ih = (W_ii|W_if|W_ig|W_io)``. The reverse direction runs from the last step to the first.

A GRU (Cho et al., 2014, https://arxiv.org/abs/1406.1078), with the reset gate after the product, as in torch and cuDNN:

.. code-block:: text

    r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)        reset gate
    z_t = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)        update gate
    n_t =    tanh(W_in x_t + b_in + r_t * (W_hn h_{t-1} + b_hn))
    h_t = (1 - z_t) * n_t + z_t * h_{t-1}

The options of a layer, which torch does not have, in the order in which step t applies them:

.. code-block:: text

    resets                  h_{t-1}, c_{t-1} = reset_h, reset_c, or zeros, in the rows where resets_t is true, before
                            all else; no gradient reaches the state that is replaced. A flag cuts a row between the
                            times t - 1 and t in both directions: the reverse direction replaces its state before the
                            step at time t where resets_{t+1} is true.
    recurrent_dropout       W_h* h_{t-1} becomes W_h* (m * h_{t-1}), with one m of 0 or 1 / (1 - p) for all steps
    weight_dropout          W_h* becomes m * W_h*, with one m of 0 or 1 / (1 - p) for a call
    layer_norm              W_i* x_t + b_i* becomes gain_ih * N(W_i* x_t) + b_i*, and W_h* h_{t-1} + b_h* becomes
                            gain_hh * N(W_h* h_{t-1}) + b_h*, with N over the 4H preactivations of the gates together,
                            and h_t = o_t * tanh(gain_c * N(c_t) + bias_c), with N over the H units.
                            N(a) = (a - mean(a)) / sqrt(var(a) + 1e-5), with the biased variance. With "cell" it is
                            c_t = gain_c * N(f_t * c_{t-1} + i_t * g_t) + bias_c, and h_t = o_t * tanh(c_t).
    peephole                z_i and z_f, what the sigmoids of i and f take, get w_ci * c_{t-1} and w_cf * c_{t-1} added;
                            z_o gets w_co * c'_t, the c of this step before zoneout
    coupled_gates           f_t = 1 - i_t; the rows of f in the weights, and w_cf, are not used
    cell_clip               c_t = min(max(f_t * c_{t-1} + i_t * g_t, -clip), clip), before anything else sees it; the
                            gradient is that of torch.clamp
    gate_activation         another function in place of sigmoid
    cell_activation         another function in place of tanh: of g, and of c_t in h_t
    preactivation_clip      what the functions of i, f, g and o take is min(max(z, -clip), clip), after the peepholes;
                            a preactivation on the edge passes no gradient on
    zoneout                 c_t = k_c * c_{t-1} + (1 - k_c) * c'_t and h_t = k_h * h_{t-1} + (1 - k_h) * h'_t, where
                            c'_t and h'_t are the results of the equations above (with a projection, the projected
                            h'_t); h'_t is made of c'_t, not of c_t. In training k is random, 0 or 1, for each element
                            and step; in evaluation it is the mean of that.
    lengths, mask           from step lengths[b] on, and where the mask is False, row b keeps its h and c, and its
                            output is 0

Recurrent dropout follows Gal and Ghahramani (2016, https://arxiv.org/abs/1512.05287), with one mask for all gates, and
the dropout of weights Merity, Keskar and Socher (2017, https://arxiv.org/abs/1708.02182). Zoneout follows Krueger et
al. (2017, https://arxiv.org/abs/1606.01305). Layer normalisation follows Ba, Kiros and Hinton (2016,
https://arxiv.org/abs/1607.06450, equations 20 to 22), and the library Haste: c_t is carried on as it is, and only h_t
sees it normalised. With "cell", the normalised c_t is carried on, as in NVIDIA NeMo and in the cells of TorchScript's
``fastrnns`` benchmark. The paper adds a shift to each of the two products and a bias to their sum; the two biases of
the layer serve as both.

Peepholes follow Gers, Schraudolph and Schmidhuber (2002, https://www.jmlr.org/papers/v3/gers02a.html) and the diagonal
W_ci, W_cf, W_co of Graves (2013, https://arxiv.org/abs/1308.0850, equations 7 to 11). Coupled gates are variant CIFG of
Greff et al. (2017, https://arxiv.org/abs/1503.04069). Other functions than sigmoid and tanh, and the bound of what they
take, are those of the operator ``LSTM`` of ONNX. The bound of c_t is ``cell_clip`` of TensorFlow's ``LSTMCell``.

Every function is differentiable any number of times and takes any device and any dtype. bfloat16 and float16 are
computed in float32, the cell state included, and rounded once, at the end of a layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import functional
from .call import run
from .layer import equations
from .layer.layer_call import PLAIN, LayerCall, LayerOptions

__all__ = ["gru", "lstm", "lstm_layer"]


def __dir__() -> list[str]:
    return __all__


def lstm_layer(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bias: bool,
    bidirectional: bool,
    options: LayerOptions | None = None,
) -> tuple[Any, ...]:
    """Compute one layer: all time steps, and both directions if ``bidirectional``.

    T steps, B sequences, I features, H hidden units, D = 2 if bidirectional else 1, P the projection's size, or H
    without one.

    Args:
        input: (T, B, I), T >= 1, any strides; with ``batch_sizes`` (N, I), N their sum.
        h0: (D, B, P), or None for zeros.
        c0: (D, B, H), or None for zeros.
        weights: D sets of ``w_ih (4H, I), w_hh (4H, P)[, b_ih (4H), b_hh (4H)][, w_hr (P, H)]``.
        batch_sizes: (T,), int64 on the CPU, of a ``torch.nn.utils.rnn.PackedSequence``; None for dense input.
        bias: whether the sets hold the two biases.
        bidirectional: whether there are two sets, the second for the reverse direction.
        options: what the layer does beyond ``torch.nn.LSTM``; `LayerOptions` has the shapes. ``recompute`` changes
            nothing here.

    Returns:
        output (T, B, D * P), or (N, D * P) with ``batch_sizes``, h_n (D, B, P), c_n (D, B, H); none of them
        shares memory with another. With ``options`` also the cell states, (D, T, B, H) or (D, N, H), and the gate
        values i, f, g, o, the same with a last axis of 4; None where they are not requested.

    Raises:
        RuntimeError, ValueError: a shape or the number of weights is wrong, or batch sizes make no sense.
    """
    call = LayerCall(input, h0, c0, weights, batch_sizes, bias, bidirectional, options or PLAIN)
    results = equations.lstm_layer(call)
    return results[:3] if options is None else results


def lstm(*args: Any, **kwargs: Any) -> Any:
    """:func:`lstm_ext.functional.lstm` on the equations above: the same arguments, results and errors."""
    return _computed(_SIGNATURE.bind(*args, **kwargs), False)


def gru(*args: Any, **kwargs: Any) -> Any:
    """:func:`lstm_ext.functional.gru` on the equations above: the same arguments, results and errors."""
    return _computed(_GRU_SIGNATURE.bind(*args, **kwargs), True)


def _computed(arguments: inspect.BoundArguments, gru: bool) -> Any:
    arguments.apply_defaults()
    return run.lstm(equations.lstm_layer, **arguments.arguments, gru=gru)


_SIGNATURE = lstm.__signature__ = inspect.signature(functional.lstm)  # type: ignore[attr-defined]
_GRU_SIGNATURE = gru.__signature__ = inspect.signature(functional.gru)  # type: ignore[attr-defined]
