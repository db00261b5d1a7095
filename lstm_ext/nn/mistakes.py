"""The arguments of a call of ``lstm_ext.LSTM`` that do not fit, with the errors and texts of ``torch.nn.LSTM``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..call.layout import EMPTY_SEQUENCE
from ..call.values import described_pair, is_pair
from ..layer.tracing import any_autocast, is_zero


def check_arguments(
    layer: nn.RNNBase,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w: Tensor,
    state_shapes: Sequence[tuple[int, int, int]],
) -> None:
    """Raise an error for arguments that do not fit, in the order and with the texts of ``nn.LSTM``.

    Dtypes may differ under autocast.
    """
    dtype, device = x.dtype, x.device
    autocast = any_autocast()
    if dtype != w.dtype and not autocast:
        raise ValueError(
            f"RNN input dtype ({dtype}) does not match weight dtype ({w.dtype}). "
            f"Convert input: input.to({w.dtype}), or convert model: model.to({dtype})"
        )
    if x.size(-1) != layer.input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {layer.input_size}, got {x.size(-1)}"
        )
    states = [] if h0 is None or c0 is None else [h0, c0]
    for i, state in enumerate(states):
        if state.shape != state_shapes[i]:
            layer.check_hidden_size(state, state_shapes[i], f"Expected hidden[{i}] size {{}}, got {{}}")
    if device != w.device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device, "
            f"found input tensor at {device} and parameter tensor at {w.device}"
        )
    for i, state in enumerate(states):
        if state.device != device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, "
                f"found input tensor at {device} and hidden tensor at {state.device}"
            )
        if state.dtype != dtype and not autocast:
            raise RuntimeError(
                f"LSTM: hx[{i}] dtype ({state.dtype}) does not match input dtype ({dtype}). "
                f"Convert it: hx[{i}].to({dtype})"
            )
    if is_zero(x.size(0)):
        raise RuntimeError(EMPTY_SEQUENCE)


def unpack_hx(hx: Any) -> tuple[Tensor, Tensor]:
    if not is_pair(hx):
        raise TypeError(
            f"LSTM: expected hx to be a tuple of two Tensors (h_0, c_0), got {described_pair(hx)}"
        )
    return hx[0], hx[1]


def batched_states(h0: Tensor, c0: Tensor, rank: int, is_step: bool) -> tuple[Tensor, Tensor]:
    """The states as 3-D tensors, or torch's error for a wrong rank; torch has no steps."""
    if h0.dim() != rank or c0.dim() != rank:
        if is_step:
            batch, shape = (
                ("a batch", "(num_layers, B, size)") if rank == 3 else ("one row", "(num_layers, size)")
            )
            raise RuntimeError(
                f"LSTM.step: expected states of shape {shape} for x_t of {batch}, got ({h0.dim()}-D, {c0.dim()}-D)"
            )
        batched = "batched 3-D" if rank == 3 else "unbatched 2-D"
        raise RuntimeError(
            f"For {batched} input, hx and cx should also be {rank}-D "
            f"but got ({h0.dim()}-D, {c0.dim()}-D) tensors"
        )
    return h0.unsqueeze(1), c0.unsqueeze(1)
