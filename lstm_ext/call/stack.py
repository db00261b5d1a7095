"""A stack of layers: dropout between them, autocast before them.

The function that computes one layer is an argument, so that the compiled kernels and the equations share every line
above the layer itself. Tensors are time-first, (T, B, features), or packed, (N, features).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layer.layer_call import PLAIN, LayerCall, LayerFunction
from .arguments import Requested, Stack
from .autocast import options_in_autocast, result_dtypes, to_dtype
from .layout import LSTMExtras


def run_stack(
    stack: Stack,
    layer: LayerFunction,
    weights: Sequence[Sequence[Tensor]],
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    options: Requested | None,
    autocast: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, LSTMExtras | None]:
    """Run the layers; one entry of ``weights`` per layer. Checks nothing. ``autocast`` is `autocast_dtype` of the call.

    The masks between the layers come from ``torch.nn.functional.dropout`` on the time-first output, as torch itself
    draws them (also with ``batch_first``): the same seed gives the same masks.

    Returns:
        output, h_n, c_n, and, if there are ``options``, the cell states and gates that they request.
    """
    dtypes = None
    if autocast is not None:
        # Padded data that was packed internally counts as dense, because the user gave it so.
        dense = batch_sizes is None or (options is not None and options.rows is not None)
        if stack.gru:
            dtypes = result_dtypes(autocast, input, h0, fused=False, projected=False)
        else:
            projected = weights[0][1].size(0) != 4 * weights[0][1].size(1)
            dtypes = result_dtypes(autocast, input, c0, fused=dense, projected=projected)
        options = None if options is None else options_in_autocast(options, autocast)
        input, h0, c0, weights = to_dtype(autocast, input, h0, c0, weights)
    bias, bidirectional, frozen = stack.bias, stack.bidirectional, stack._frozen
    if options is None and len(weights) == 1:  # the shortest path: microseconds count here
        own_options = frozen[0] if frozen else PLAIN
        call = LayerCall(input, h0, c0, weights[0], batch_sizes, bias, bidirectional, own_options)
        output, h_n, c_n, _, _ = layer(call)
        return (output, h_n, c_n, None) if dtypes is None else _cast(dtypes, output, h_n, c_n, None)

    directions = 2 if bidirectional else 1
    h0_by_layer = [None] * len(weights) if h0 is None else h0.split(directions)
    c0_by_layer = [None] * len(weights) if c0 is None else c0.split(directions)
    results = []
    for k, layer_weights in enumerate(weights):
        if k > 0 and stack.dropout != 0 and stack.training and not frozen:
            input = F.dropout(input, stack.dropout, True)
        if options is None:
            own_options = frozen[k] if frozen else PLAIN
        else:
            layer_weights = options.weights_of_layer(layer_weights, directions)
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
    extras = None if options is None else LSTMExtras(cells, gates)
    return (input, h_n, c_n, extras) if dtypes is None else _cast(dtypes, input, h_n, c_n, extras)


def _cast(
    dtypes: tuple[torch.dtype, torch.dtype],
    output: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    extras: LSTMExtras | None,
) -> tuple[Tensor, Tensor, Tensor, LSTMExtras | None]:
    """The results in the dtypes of h and of c."""
    h, c = dtypes
    if extras is not None and extras.cell_states is not None:
        extras = extras._replace(cell_states=extras.cell_states.to(c))
    return output.to(h), h_n.to(h), c_n.to(c), extras


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat(parts)
