"""For tests of several devices: what was made on the CPU, at import say, and what has to stay there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import rnn
from torch.utils._pytree import tree_map_only


def moved(tree: Any, device: str | torch.device) -> Any:
    """With the tensors of the CPU on the device; those of other devices, such as meta, stay where they are."""
    return tree_map_only(Tensor, lambda t: t.to(device) if t.is_cpu else t, tree)


def pack_sequence(sequences: Sequence[Tensor], enforce_sorted: bool = True) -> rnn.PackedSequence:
    """torch's own makes the lengths on the default device, and then wants them on the CPU."""
    with torch.device("cpu"):
        return rnn.pack_sequence(list(sequences), enforce_sorted)
