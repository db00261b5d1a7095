"""The arguments of a call of a layer that do not fit, with the errors and texts of torch's layer.

The layer of a GRU has no c: its ``c0`` is None, and there is one shape of states.
"""

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
    """Raise an error for arguments that do not fit, in the order and with the texts of torch's layer.

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
    states = [state for state in (h0, c0) if state is not None]
    for i, state in enumerate(states):
        if state.shape != state_shapes[i]:
            which = "hidden" if len(state_shapes) == 1 else f"hidden[{i}]"
            layer.check_hidden_size(state, state_shapes[i], f"Expected {which} size {{}}, got {{}}")
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
                f"{layer.mode}: {_hx(layer, i)} dtype ({state.dtype}) does not match input dtype ({dtype}). "
                f"Convert it: {_hx(layer, i)}.to({dtype})"
            )
    if is_zero(x.size(0)):
        raise RuntimeError(EMPTY_SEQUENCE)


def _hx(layer: nn.RNNBase, i: int) -> str:
    return "hx" if layer.mode == "GRU" else f"hx[{i}]"


def unpack_hx(layer: nn.RNNBase, hx: Any) -> tuple[Tensor, Tensor | None]:
    if layer.mode == "GRU":
        if not isinstance(hx, Tensor):
            raise TypeError(f"GRU: expected hx to be a Tensor, h_0, got {described_pair(hx)}")
        return hx, None
    if not is_pair(hx):
        raise TypeError(
            f"LSTM: expected hx to be a tuple of two Tensors (h_0, c_0), got {described_pair(hx)}"
        )
    return hx[0], hx[1]


def batched_states(
    layer: nn.RNNBase, h0: Tensor, c0: Tensor | None, rank: int, is_step: bool
) -> tuple[Tensor, Tensor | None]:
    """The states as 3-D tensors, or torch's error for a wrong rank; torch has no steps."""
    if h0.dim() != rank or (c0 is not None and c0.dim() != rank):
        got = f"{h0.dim()}-D" if c0 is None else f"({h0.dim()}-D, {c0.dim()}-D)"
        if is_step:
            batch, shape = (
                ("a batch", "(num_layers, B, size)") if rank == 3 else ("one row", "(num_layers, size)")
            )
            raise RuntimeError(
                f"{layer.mode}.step: expected states of shape {shape} for x_t of {batch}, got {got}"
            )
        batched = "batched 3-D" if rank == 3 else "unbatched 2-D"
        if c0 is None:
            raise RuntimeError(f"For {batched} input, hx should also be {rank}-D but got {got} tensor")
        raise RuntimeError(f"For {batched} input, hx and cx should also be {rank}-D but got {got} tensors")
    return h0.unsqueeze(1), None if c0 is None else c0.unsqueeze(1)
