"""Shapes that the routes of a layer have in common."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["count_mask", "weights_per_direction"]


def count_mask(lengths: Tensor, time: int) -> Tensor:
    """Which steps count, (T, B), for lengths (B,)."""
    return torch.arange(time, device=lengths.device).unsqueeze(1) < lengths


def weights_per_direction(count: int, bias: bool, bidirectional: bool) -> tuple[int, bool]:
    """How many of ``count`` weights each direction has, and whether one of them is that of a projection.

    Raises:
        RuntimeError: for a number of weights that no layer has.
    """
    directions = 2 if bidirectional else 1
    plain = 4 if bias else 2
    per_direction, rest = divmod(count, directions)
    if rest or per_direction not in (plain, plain + 1):
        raise RuntimeError(
            f"lstm_ext: got {count} weights, expected {plain * directions}, "
            f"or {(plain + 1) * directions} with a projection"
        )
    return per_direction, per_direction > plain
