"""A stack of layers: dropout between them, autocast before them.

The function that computes one layer is an argument, so that the compiled kernels and the equations share every line
above the layer itself. Tensors are time-first, (T, B, features), or packed, (N, features).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layer.layer_call import PLAIN, LayerCall, LayerFunction
from ..layer.tracing import any_autocast
from .arguments import Stack, StackOptions
from .layout import LSTMExtras

__all__ = ["run_stack", "to_autocast_dtype"]


def run_stack(
    stack: Stack,
    layer: LayerFunction,
    weights: Sequence[Sequence[Tensor]],
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    options: StackOptions | None,
) -> tuple[Tensor, Tensor, Tensor, LSTMExtras | None]:
    """Run the layers; one entry of ``weights`` per layer. Checks nothing.

    The masks between the layers come from ``torch.nn.functional.dropout`` on the time-first output, as torch itself
    draws them (also with ``batch_first``): the same seed gives the same masks.

    Returns:
        output, h_n, c_n, and, if there are ``options``, the cell states and gates that they request.
    """
    if any_autocast():
        input, h0, c0, weights = to_autocast_dtype(input, h0, c0, weights)
        if options is not None:
            options = _options_in_autocast(options, input)
    bias, bidirectional, frozen = stack.bias, stack.bidirectional, stack.frozen
    if options is None and len(weights) == 1:  # the shortest way: microseconds count here
        own_options = frozen[0] if frozen else PLAIN
        call = LayerCall(input, h0, c0, weights[0], batch_sizes, bias, bidirectional, own_options)
        output, h_n, c_n, _, _ = layer(call)
        return output, h_n, c_n, None

    directions = 2 if bidirectional else 1
    h0_by_layer = [None] * len(weights) if h0 is None else h0.split(directions)
    c0_by_layer = [None] * len(weights) if c0 is None else c0.split(directions)
    results = []
    for k, layer_weights in enumerate(weights):
        if k > 0 and stack.dropout != 0 and stack.training:
            input = F.dropout(input, stack.dropout, True)
        if options is None:
            own_options = frozen[k] if frozen else PLAIN
        else:
            own_options = options.of_layer(k, input, h0, layer_weights, batch_sizes, directions)
            if frozen:
                own_options.frozen = frozen[k].frozen
        call = LayerCall(
            input,
            h0_by_layer[k],
            c0_by_layer[k],
            layer_weights,
            batch_sizes,
            bias,
            bidirectional,
            own_options,
        )
        input, *others = layer(call)
        results.append(others)
    h_n, c_n, cells, gates = results[0] if len(results) == 1 else map(_cat, zip(*results, strict=True))
    return input, h_n, c_n, None if options is None else LSTMExtras(cells, gates)


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat(parts)


def _options_in_autocast(options: StackOptions, input: Tensor) -> StackOptions:
    """``input`` has the dtype of autocast already."""
    reset_h, reset_c = to_autocast_dtype(input, options.reset_h, options.reset_c, [])[1:3]
    # The parameters of layer normalisation keep their dtype, as torch.nn.LayerNorm's do. Only the other of the two
    # 16-bit dtypes, which a layer does not take, becomes float32, in which the layer computes: no rounding.
    other = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}.get(input.dtype)
    norm = tuple([tuple([w.float() if w.dtype == other else w for w in layer]) for layer in options.norm])
    return replace(options, reset_h=reset_h, reset_c=reset_c, norm=norm)


def to_autocast_dtype(
    input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, Tensor | None, Tensor | None, Sequence[Sequence[Tensor]]]:
    """Cast as autocast casts the arguments of an operator on its lower-precision list."""
    device_type = input.device.type
    # Dynamo of torch 2.11 cannot look into is_autocast_available; these two have it.
    if device_type not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device_type):
        return input, h0, c0, weights
    if not torch.is_autocast_enabled(device_type):
        return input, h0, c0, weights
    dtype = torch.get_autocast_dtype(device_type)

    def cast(x: Tensor | None) -> Any:
        # Autocast leaves float64 alone.
        if x is None or not x.is_floating_point() or x.dtype == torch.float64:
            return x
        return x.to(dtype)

    return cast(input), cast(h0), cast(c0), [[cast(w) for w in layer] for layer in weights]
