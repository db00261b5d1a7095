"""Shapes that the routes of a layer have in common."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["count_mask"]


def count_mask(lengths: Tensor, time: int) -> Tensor:
    """Which steps count, (T, B), for lengths (B,)."""
    return torch.arange(time, device=lengths.device).unsqueeze(1) < lengths
