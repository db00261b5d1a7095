"""``PackedSequence`` in and out: what is checked, and how the states follow the order of the sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["batch_of", "permuted", "repacked", "zero_states"]


def batch_of(packed: PackedSequence, hx: Any = None) -> int:
    """The number of sequences, B, of a sound ``packed``.

    The batch sizes themselves are checked where they are read, in the kernel or in `reference`. A compiler does not
    know their values: while it looks, B is the size of another tensor that must have it, and the kernel checks that.

    Raises:
        ValueError, TypeError: naming the field.
    """
    data, batch_sizes, sorted_indices, unsorted_indices = packed
    if data.dim() != 2:
        raise ValueError(f"PackedSequence.data: expected 2 dimensions (rows, features), got {data.dim()}")
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or batch_sizes.device.type != "cpu":
        raise TypeError(
            "PackedSequence.batch_sizes: expected one dimension of int64 on the CPU, "
            f"got {batch_sizes.dtype} of shape {tuple(batch_sizes.shape)} on {batch_sizes.device}"
        )
    if batch_sizes.numel() == 0:
        raise ValueError("PackedSequence.batch_sizes: expected at least one time step, got none")
    compiling = torch.compiler.is_compiling()
    traced = not compiling and torch._C._len_torch_dispatch_stack() > 0
    looking = compiling or traced
    if looking and sorted_indices is not None:
        return sorted_indices.size(0)
    if looking and isinstance(hx, (tuple, list)) and hx and isinstance(hx[0], Tensor) and hx[0].dim() == 3:
        return hx[0].size(1)
    if not looking and torch._C._functorch.is_batchedtensor(batch_sizes):
        raise ValueError(
            "PackedSequence.batch_sizes: expected the same for all samples under vmap (in_dims=None), "
            "got one for each sample"
        )
    if traced and type(batch_sizes) is Tensor:
        batch = batch_sizes.tolist()[0]  # a tracer would take batch_sizes[0] for a result of its own
    else:
        batch = batch_sizes[0].item()
    for name, indices in (("sorted_indices", sorted_indices), ("unsorted_indices", unsorted_indices)):
        if indices is not None and indices.shape != (batch,):
            raise ValueError(
                f"PackedSequence.{name}: expected shape {(batch,)}, the number of sequences, "
                f"got {tuple(indices.shape)}"
            )
        if indices is not None and indices.device != data.device:
            raise ValueError(
                f"PackedSequence.{name}: expected on {data.device}, as the data, got on {indices.device}"
            )
    # Read on the host only: on a device it would have to wait.
    if sorted_indices is not None and not looking and sorted_indices.device.type == "cpu":
        if unsorted_indices is None:
            raise ValueError(
                "PackedSequence.unsorted_indices: expected a Tensor, as sorted_indices is one, got None"
            )
        if not _undo_each_other(sorted_indices, unsorted_indices):
            raise ValueError(
                f"PackedSequence.sorted_indices and unsorted_indices: expected permutations of 0 ... {batch - 1} "
                f"that undo each other, got {sorted_indices.tolist()} and {unsorted_indices.tolist()}"
            )
    return batch


def _undo_each_other(a: Tensor, b: Tensor) -> bool:
    """Whether both are permutations, and each the inverse of the other: of two maps of a finite set, one says all."""
    try:
        return torch.equal(a.index_select(0, b), torch.arange(a.size(0), dtype=a.dtype, device=a.device))
    except (IndexError, RuntimeError):  # a number out of range, or no numbers that can be indices
        return False


def zero_states(data: Tensor, sets: int, batch: int, *sizes: int) -> tuple[Tensor, ...]:
    """The zeros that no ``hx`` means, for a compiler: they tell it how many sequences there are."""
    return tuple([data.new_zeros(sets, batch, size) for size in sizes])


def permuted(state: Tensor, indices: Tensor | None) -> Tensor:
    """A state (sets, B, features) with its batch axis in the order of ``indices``."""
    return state if indices is None else state.index_select(1, indices)


def repacked(data: Tensor, like: PackedSequence) -> PackedSequence:
    """``data`` with the batch sizes and the order of ``like``."""
    return PackedSequence(data, like.batch_sizes, like.sorted_indices, like.unsorted_indices)
