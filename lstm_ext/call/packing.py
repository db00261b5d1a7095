"""Padded sequences whose lengths the host knows: the rows that count, packed, and put back in their places.

The kernels then compute nothing for padding: the time follows the sum of the lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layer.shapes import count_mask

__all__ = ["Packing"]


class Packing:
    """Where each row that counts lies in padded data, in the order of a ``PackedSequence``.

    The order of the sequences is that of ``pack_padded_sequence(enforce_sorted=False)``, so that dropout between the
    layers draws the same masks. Sequences without a step are left out.

    Attributes:
        batch_sizes: (longest,), int64.
    """

    def __init__(self, lengths: Tensor, time: int) -> None:
        """lengths: int64 (B,) on the CPU, each in [0, time], not all of them 0."""
        self._time, self._batch = time, lengths.size(0)
        falling, self._order = torch.sort(lengths, descending=True)
        self._kept = int(torch.count_nonzero(falling))
        counts = count_mask(falling[: self._kept], int(falling[0]))
        self.batch_sizes = counts.sum(1)
        self._step, place = counts.nonzero(as_tuple=True)
        self._sequence = self._order[place]
        self._places = torch.argsort(self._order)

    def packed(self, x: Tensor) -> Tensor:
        """The rows (N, ...) of padded data (T, B, ...)."""
        # The data is read where it lies, also if it is a view of batch-first data.
        if _is_batch_first(x):
            flat, rows = x.transpose(0, 1).flatten(0, 1), self._sequence * self._time + self._step
        else:
            flat, rows = x.flatten(0, 1), self._step * self._batch + self._sequence
        return flat.index_select(0, rows)

    def padded(self, rows: Tensor, dim: int, like: Tensor) -> Tensor:
        """Padded data (..., T, B, ...) of rows (..., N, ...) at ``dim``: 0 elsewhere; in memory as ``like`` is."""
        shape = list(rows.shape)
        shape[dim] = self._time * self._batch
        zeros = rows.new_zeros(shape)
        if _is_batch_first(like):
            flat = zeros.index_copy(dim, self._sequence * self._time + self._step, rows)
            return flat.unflatten(dim, (self._batch, self._time)).transpose(dim, dim + 1)
        flat = zeros.index_copy(dim, self._step * self._batch + self._sequence, rows)
        return flat.unflatten(dim, (self._time, self._batch))

    def packed_state(self, state: Tensor | None) -> Tensor | None:
        """The states (sets, kept, ...) of the sequences that are packed, in their order."""
        return None if state is None else state.index_select(1, self._order[: self._kept])

    def padded_state(self, final: Tensor, initial: Tensor | None) -> Tensor:
        """The final states (sets, B, ...) of all sequences: the initial one where there was no step."""
        if self._kept < self._batch:
            left_out = self._order[self._kept :]
            if initial is None:
                rest = final.new_zeros(final.size(0), left_out.size(0), final.size(2))
            else:
                rest = initial.index_select(1, left_out).to(final.dtype)
            final = torch.cat([final, rest], 1)
        return final.index_select(1, self._places)


def _is_batch_first(x: Tensor) -> bool:
    return x.stride(0) < x.stride(1)
