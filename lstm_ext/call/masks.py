"""The random masks of one layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layer.route import UnsupportedLayerError
from ..layer.tracing import is_exporting_to_onnx


def _refuse_export(option: str) -> None:
    # The exporter takes what is drawn from nothing but numbers for a constant.
    if is_exporting_to_onnx():
        raise UnsupportedLayerError(
            f"lstm_ext.onnx: {option} in training mode would be one mask for ever: call eval() before the export"
        )


def _mask(like: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
    """0 or 1 / (1 - p) for each element."""
    # A mask in 16 bits would round 1 / (1 - p).
    dtype = torch.float32 if like.dtype in (torch.bfloat16, torch.float16) else like.dtype
    return F.dropout(like.new_ones(shape, dtype=dtype), p, True)


def dropped_weight(weight: Tensor, p: float) -> Tensor:
    """A weight, of which each element is multiplied by 0 or 1 / (1 - p). Its strides do not change what is drawn."""
    _refuse_export("weight_dropout")
    return (weight * _mask(weight, weight.shape, p)).to(weight.dtype)


def recurrent_mask(
    input: Tensor, h0: Tensor | None, batch_sizes: Tensor | None, directions: int, size: int, p: float
) -> Tensor:
    """The mask of recurrent dropout, constant over time, (D, B, size): h is multiplied by 0 or 1 / (1 - p)."""
    _refuse_export("recurrent_dropout")
    if batch_sizes is None:
        batch = input.size(1)
    else:
        batch = h0.size(1) if h0 is not None else batch_sizes.tolist()[0]
    return _mask(input, (directions, batch, size), p)


def keep_flags(input: Tensor, directions: int, size: int, p: float) -> Tensor:
    """The flags of zoneout: which elements of a state are kept, for all steps, (D, T, B, size) or (D, N, size)."""
    shape = (directions, *input.shape[:-1], size)
    return torch.rand(shape, dtype=torch.float32, device=input.device) < p
