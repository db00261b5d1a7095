"""Autocast, decided once for each call: the dtype in which a layer computes, and the dtypes of its results.

Both follow torch. Its operator computes in the lower precision if one function computes a whole layer: cuDNN, or oneDNN
for dense input without a projection. Elsewhere on the CPU only the products have the lower precision. c then keeps its
initial dtype, and h has that of c, or with a projection that of the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..layer.tracing import is_exporting, is_zero
from ..native.integrations import constant_for_dynamo
from .arguments import Requested

_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast for the device of ``x``; None if autocast is off there or leaves ``x`` as it is."""
    device_type = x.device.type
    # Dynamo of torch 2.11 cannot trace is_autocast_available; these two devices always have autocast.
    if device_type not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device_type):
        return None
    if not torch.is_autocast_enabled(device_type) or not _is_cast(x):
        return None
    return torch.get_autocast_dtype(device_type)


def in_autocast(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to ``dtype``; None does nothing, because a device may have no autocast."""
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype)


def _is_cast(x: Tensor) -> bool:
    return x.is_floating_point() and x.dtype != torch.float64


def to_dtype(
    dtype: torch.dtype,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Sequence[Tensor]],
) -> tuple[Tensor, Tensor | None, Tensor | None, Sequence[Sequence[Tensor]]]:
    """Cast the arguments like autocast does for an operator on its lower-precision list."""

    def cast(x: Tensor | None) -> Any:
        return x if x is None or not _is_cast(x) else x.to(dtype)

    return cast(input), cast(h0), cast(c0), [[cast(w) for w in layer] for layer in weights]


def options_in_autocast(options: Requested, dtype: torch.dtype) -> Requested:
    reset_h, reset_c = [
        x if x is None or not _is_cast(x) else x.to(dtype) for x in (options.reset_h, options.reset_c)
    ]
    # These parameters are not rounded to 16 bits, like those of torch.nn.LayerNorm: the layer computes in float32.
    parameters = {
        name: [[w.float() for w in layer] for layer in layers] for name, layers in options.parameters.items()
    }
    return replace(options, reset_h=reset_h, reset_c=reset_c, parameters=parameters)


def result_dtypes(
    dtype: torch.dtype, x: Tensor, c0: Tensor | None, *, fused: bool, projected: bool
) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of h (and the output) and of c that torch's layer or cell gives under autocast.

    Args:
        dtype: that of autocast.
        x, c0: the input and the initial cell state, as the user gave them.
        fused: whether this is a layer on dense input, for which oneDNN has a function.
        projected: whether h is a product.
    """
    if x.device.type != "cpu" or (fused and not projected and _onednn_takes(x)):
        return dtype, dtype
    # The gates have the dtype of autocast, and may be the wider operand.
    c_dtype = torch.promote_types(dtype, x.dtype if c0 is None else c0.dtype)
    return dtype if projected else c_dtype, c_dtype


def _onednn_takes(x: Tensor) -> bool:
    """Whether torch computes a layer of dense input by oneDNN, if it has no projection."""
    return not is_zero(x.numel()) and _onednn_has(x.dtype, torch.is_grad_enabled())


@constant_for_dynamo
def _onednn_has(dtype: torch.dtype, needs_grad: bool) -> bool:
    """The conditions of at::native::use_mkldnn (aten/src/ATen/native/RNN.cpp)."""
    # torch.export turns oneDNN off while it traces; the exported program runs where oneDNN is on.
    if not _HAS_ONEDNN or not (torch._C._get_mkldnn_enabled() or is_exporting()):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return not needs_grad and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32
