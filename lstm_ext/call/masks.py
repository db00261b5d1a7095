"""The random masks of one layer, and with them its options."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layer.layer_call import LayerOptions
from ..layer.tracing import is_plain_eager
from ..native import loader
from .arguments import StackOptions

__all__ = ["layer_options"]


def layer_options(
    options: StackOptions,
    k: int,
    input: Tensor,
    h0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    directions: int,
) -> LayerOptions:
    """The options of layer k. Draws its masks: the recurrent one first, then the flags of zoneout for h and for c."""
    sets = slice(k * directions, (k + 1) * directions)
    state, hidden = weights[1].size(1), weights[1].size(0) // 4
    zoneout_h, zoneout_c = options.zoneout
    layer = LayerOptions(
        resets=options.resets,
        reset_h=None if options.reset_h is None else options.reset_h[sets],
        reset_c=None if options.reset_c is None else options.reset_c[sets],
        lengths=options.lengths,
        norm=options.norm[k] if options.norm else (),
        return_cell_states=options.return_cell_states,
        return_gates=options.return_gates,
        recompute=options.recompute,
    )
    if not options.training:
        layer.zoneout_h, layer.zoneout_c = zoneout_h, zoneout_c
        return layer
    if options.recurrent_dropout:
        if batch_sizes is None:
            batch = input.size(1)
        else:
            batch = h0.size(1) if h0 is not None else batch_sizes.tolist()[0]
        # A mask in 16 bits would round 1 / (1 - p).
        dtype = torch.float32 if input.dtype in (torch.bfloat16, torch.float16) else input.dtype
        ones = input.new_ones((directions, batch, state), dtype=dtype)
        layer.recurrent_mask = F.dropout(ones, options.recurrent_dropout, True)
    if zoneout_h:
        layer.keep_h = _keep_flags(input, directions, state, zoneout_h)
    if zoneout_c:
        layer.keep_c = _keep_flags(input, directions, hidden, zoneout_c)
    return layer


def _keep_flags(input: Tensor, directions: int, size: int, p: float) -> Tensor:
    """Which elements of a state zoneout keeps, for all steps: (D, T, B, size) or (D, N, size)."""
    shape = (directions, *input.shape[:-1], size)
    # The extension does it in a fraction of the time, but no tracer knows its function.
    if input.device.type != "cpu" or p < 2**-16 or not is_plain_eager() or not loader.has_kernels():
        return torch.rand(shape, dtype=torch.float32, device=input.device) < p
    seed = torch.empty((), dtype=torch.int64, device="cpu").random_(-(2**63), None)
    return loader.extension().random_flags(shape, p, seed.item())
