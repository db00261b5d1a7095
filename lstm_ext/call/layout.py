"""The layouts of the tensors of one call: the user's layout, and that of the layers.

The layers take time-first data, (T, B, features), or the rows of a ``PackedSequence``, (N, features). A `Layout`
converts the input to that, and the results back. Dense layouts hold no data of the call, so there is one object of
each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree

from ..layer.shapes import count_mask
from ..layer.tracing import is_zero

# This is torch's own text, from aten/src/ATen/native/RNN.cpp.
EMPTY_SEQUENCE = "Expected sequence length to be larger than 0 in RNN"


class LSTMExtras(NamedTuple):
    """The third result of :class:`lstm_ext.LSTM` where ``return_cell_states`` or ``return_gates`` requests one.

    L layers, D = 2 if bidirectional else 1, H hidden units; a layer's directions lie side by side, as in ``h_n``, and
    the values of the reverse direction stand at the step of the input that they belong to, as in the output. Example::

        lstm = lstm_ext.LSTM(10, 20)
        output, (h, c), extras = lstm(torch.randn(5, 3, 10), return_gates=True)
        i, f, g, o = extras.gates.unbind(-1)           # (1, 5, 3, 20) each
        assert extras.cell_states is None

    Attributes:
        cell_states: c_t of every layer and step, (L * D, T, B, H), (L * D, B, T, H) with ``batch_first``, or
            (L * D, T, H) without a batch; for a ``PackedSequence`` or a nested tensor (L * D, N, H), in the order of
            the rows of its ``data`` or ``values()``. None if it was not requested.
        gates: i, f, g, o of every layer and step, after the nonlinearity: as ``cell_states``, with a last axis of 4.
            None if not requested.

    Both are differentiable, and 0 past the end of a sequence that ``lengths`` or ``mask`` ends.
    """

    cell_states: Tensor | None
    gates: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> LSTMExtras:
        return LSTMExtras(*[None if x is None else function(x) for x in self])


# Registered because torch.export.save writes down the type of a model's results.
_pytree._register_namedtuple(LSTMExtras, serialized_type_name="lstm_ext.LSTMExtras")


class Layout:
    """Time-first data with a batch axis, (T, B, ...), and the interface of all layouts."""

    code = 0  # for the extension's lstm_module; -1 for a layout that it does not know
    is_batch_first = is_step = False
    batched = True
    # The rank of the user's states; 0 if torch's error for a wrong one is about their sizes.
    state_rank = 3
    batch_sizes: Tensor | None = None  # for packed data
    # With batch_sizes: h0 and c0 in the user's order.
    initial: tuple[Tensor | None, Tensor | None] = (None, None)

    def rows(self, input: Any) -> Tensor:
        """A tensor with the input's axes of time and batch, in the layers' layout."""
        if self.is_batch_first:
            return input.transpose(0, 1)
        if self.is_step:  # indexing is quicker than unsqueeze and squeeze
            return input[None] if self.batched else input[None, None]
        return input if self.batched else input.unsqueeze(1)

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """The user's shape of the input without features, for an ``x`` in the layers' layout."""
        if self.is_batch_first:
            return x.size(1), x.size(0)
        return tuple(x.shape[:2]) if self.batched else (x.size(0),)

    def batch(self, x: Tensor) -> int:
        return x.size(1)

    def states(self, state: Tensor | None) -> Tensor | None:
        """A state (sets, B, features), converted from the order of the user's batch to that of the layers."""
        return state

    def restored(self, output: Tensor, h_n: Tensor, c_n: Tensor, extras: LSTMExtras | None) -> Any:
        """The results of the call in the user's layout, given those of the layers."""
        if self.is_step:
            output = output[0] if self.batched else output[0, 0]
        elif not self.batched:
            output = output.squeeze(1)
            extras = None if extras is None else extras.map(lambda x: x.squeeze(2))
        elif self.is_batch_first:
            output = output.transpose(0, 1)
            extras = None if extras is None else extras.map(lambda x: x.transpose(1, 2))
        if not self.batched:
            h_n, c_n = h_n.squeeze(1), c_n.squeeze(1)
        return (output, (h_n, c_n)) if extras is None else (output, (h_n, c_n), extras)


class _BatchFirst(Layout):
    code = 1
    is_batch_first = True


class _Unbatched(Layout):
    code = 2
    state_rank = 2
    batched = False


class _Step(Layout):
    """One time step, (B, features)."""

    code = 3
    is_step = True


class _UnbatchedStep(_Unbatched):
    """One time step without a batch, (features,)."""

    code = 4
    is_step = True


TIME_FIRST, BATCH_FIRST, UNBATCHED = Layout(), _BatchFirst(), _Unbatched()
STEP, UNBATCHED_STEP = _Step(), _UnbatchedStep()


class PackedLayout(Layout):
    """A ``PackedSequence``: the rows of all sequences, step by step, and the order of the sequences."""

    code = -1
    state_rank = 0

    def __init__(self, packed: PackedSequence, hx: Any = None) -> None:
        """Raises ValueError or TypeError, naming the field, for an invalid ``packed``."""
        self.packed = packed
        self.batch_sizes = packed.batch_sizes
        self._batch = _batch_of(packed, hx)

    def rows(self, input: Any) -> Tensor:
        return input.data

    def batch(self, x: Tensor) -> int:
        return self._batch

    def states(self, state: Tensor | None) -> Tensor | None:
        indices = self.packed.sorted_indices
        return state if state is None or indices is None else state.index_select(1, indices)

    def restored(self, output: Tensor, h_n: Tensor, c_n: Tensor, extras: LSTMExtras | None) -> Any:
        packed = self.packed
        y = PackedSequence(output, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        indices = packed.unsorted_indices
        if indices is not None:
            h_n, c_n = h_n.index_select(1, indices), c_n.index_select(1, indices)
        return (y, (h_n, c_n)) if extras is None else (y, (h_n, c_n), extras)


def _batch_of(packed: PackedSequence, hx: Any) -> int:
    """The number of sequences, B, of a valid ``packed``.

    The batch sizes themselves are checked by their reader, the kernel or the equations. A compiler does not know their
    values: then B is the size of another tensor that must have it, and the kernel checks that.
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
    tracing = not compiling and torch._C._len_torch_dispatch_stack() > 0
    unknown = compiling or tracing
    if unknown and sorted_indices is not None:
        return sorted_indices.size(0)
    if unknown and isinstance(hx, (tuple, list)) and hx and isinstance(hx[0], Tensor) and hx[0].dim() == 3:
        return hx[0].size(1)
    if not unknown and torch._C._functorch.is_batchedtensor(batch_sizes):
        raise ValueError(
            "PackedSequence.batch_sizes: expected the same for all samples under vmap (in_dims=None), "
            "got one for each sample"
        )
    if tracing and type(batch_sizes) is Tensor:
        batch = batch_sizes.tolist()[0]  # a tracer would record batch_sizes[0] as a result of its own
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
    # Checked on the host only: on a device the check would have to wait.
    if sorted_indices is not None and not unknown and sorted_indices.device.type == "cpu":
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
    """Whether both are permutations, each the inverse of the other. On a finite set it is enough to check one side."""
    if not {a.dtype, b.dtype} <= {torch.int32, torch.int64}:
        return False
    # Lists are quicker than operators on tensors for the few sequences of a quick call.
    first, second = a.tolist(), b.tolist()
    if min(second, default=0) < 0 or max(second, default=0) >= len(first):
        return False
    return [first[i] for i in second] == list(range(len(first)))


def _packing(lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How sequences of these lengths, int64 (B,) on the CPU, not all of them 0, lie in packed data.

    Returns:
        batch_sizes (T,); the order of the B sequences by falling length, of which those of length 0 are not packed; and
        of each packed row the step, and the place of its sequence in the order.
    """
    falling, order = torch.sort(lengths, descending=True)
    count = int(torch.count_nonzero(falling))
    counts = count_mask(falling[:count], int(falling[0]))
    return counts.sum(1), order, *counts.nonzero(as_tuple=True)


# ---- nested tensors


def _jagged_rows(offsets: Tensor, lengths: Tensor | None, like: list[Tensor]) -> list[Tensor]:
    """How the sequences of a nested tensor are packed: batch_sizes, the order of those with a step, the rows of values.

    ``like``: these results for another tensor, which must have the same lengths; or nothing.
    """
    starts = offsets.cpu()
    numbers = starts.diff() if lengths is None else lengths.cpu()
    if not numbers.any():
        raise RuntimeError(EMPTY_SEQUENCE)
    batch_sizes, order, step, place = _packing(numbers)
    order = order[: int(batch_sizes[0])]
    found = [batch_sizes, order.to(offsets.device), (starts[order[place]] + step).to(offsets.device)]
    if like and not all(torch.equal(a, b) for a, b in zip(found[:2], like[:2], strict=True)):
        raise ValueError(
            "resets: expected one flag for each step of the input's sequences, got other lengths"
        )
    return found


def _fake_jagged_rows(offsets: Tensor, lengths: Tensor | None, like: list[Tensor]) -> list[Tensor]:
    if like:
        return [torch.empty_like(x) for x in like]
    context = torch.library.get_ctx()
    time, count, rows = [context.new_dynamic_size(min=1) for _ in range(3)]
    return [
        torch.empty(time, dtype=torch.int64),
        offsets.new_empty(count, dtype=torch.int64),
        offsets.new_empty(rows, dtype=torch.int64),
    ]


# An operator, so that a compiler does not look into it: its results have sizes that only the data tell. torch keeps it
# for the life of the process, even if this module is imported again.
if not hasattr(torch.ops.lstm_ext_layout, "jagged_rows"):
    _library = torch.library.Library("lstm_ext_layout", "DEF")
    _library.define(
        "jagged_rows(Tensor offsets, Tensor? lengths, Tensor[] like) -> Tensor[]",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    _library.impl("jagged_rows", _jagged_rows, "CompositeExplicitAutograd")
    torch.library.register_fake("lstm_ext_layout::jagged_rows", _fake_jagged_rows, lib=_library)
    torch.ops.lstm_ext_layout.library = _library


class JaggedLayout(Layout):
    """A nested tensor of the jagged layout: the rows of all sequences, one sequence after the other."""

    code = -1
    state_rank = 0

    def __init__(self, nested: Tensor) -> None:
        """Raises ValueError for another layout, and RuntimeError, with torch's text, if no sequence has a step."""
        if nested.layout != torch.jagged:
            raise ValueError(f"input: expected a nested tensor of layout torch.jagged, got {nested.layout}")
        if nested.dim() != 3 or getattr(nested, "_ragged_idx", 1) != 1:
            shape = ", ".join([str(n) for n in nested.shape])
            raise ValueError(
                f"input: expected a nested tensor (batch, time, features) with ragged time, got shape ({shape})"
            )
        self._nested = nested
        self._values: Tensor = nested.values()
        if is_zero(self._values.size(0)):
            raise RuntimeError(EMPTY_SEQUENCE)
        found = torch.ops.lstm_ext_layout.jagged_rows(nested.offsets(), nested.lengths(), [])
        self.batch_sizes, self._order, self._rows = found

    def rows(self, input: Any) -> Tensor:
        return self._values.index_select(0, self._rows)

    def flags_of(self, name: str, value: Any) -> Tensor:
        """Packed flags, (N,), of a nested tensor of the input's lengths. Raises: TypeError, ValueError."""
        if not isinstance(value, Tensor) or not value.is_nested or value.layout != torch.jagged:
            raise TypeError(
                f"{name}: expected a jagged nested tensor, as the input is one, got {type(value).__name__}"
            )
        rows = value.values()
        if rows.dim() == 2 and rows.size(1) == 1:
            rows = rows.squeeze(1)
        if rows.dim() != 1:
            raise ValueError(f"{name}: expected one flag for each step, got {rows.dim() - 1} more dimensions")
        like = [self.batch_sizes, self._order, self._rows]
        *_, places = torch.ops.lstm_ext_layout.jagged_rows(value.offsets(), value.lengths(), like)
        return rows.index_select(0, places)

    def batch(self, x: Tensor) -> int:
        return self._nested.size(0)

    def states(self, state: Tensor | None) -> Tensor | None:
        return None if state is None else state.index_select(1, self._order)

    def _all_states(self, final: Tensor, initial: Tensor | None) -> Tensor:
        """The final states of all sequences: one without a step keeps its initial state."""
        if initial is None:
            initial = final.new_zeros(final.size(0), self.batch(final), final.size(2))
        return initial.to(final.dtype).index_copy(1, self._order, final)

    def restored(self, output: Tensor, h_n: Tensor, c_n: Tensor, extras: LSTMExtras | None) -> Any:
        nested: Any = self._nested
        # Without the length of the longest sequence, to_padded_tensor would pad to the number of all rows.
        y = torch.nested.nested_tensor_from_jagged(
            self._in_place(output, 0),
            nested.offsets(),
            nested.lengths(),
            min_seqlen=nested._maybe_min_seqlen,
            max_seqlen=nested._maybe_max_seqlen,
        )
        states = self._all_states(h_n, self.initial[0]), self._all_states(c_n, self.initial[1])
        return (y, states) if extras is None else (y, states, extras.map(lambda e: self._in_place(e, 1)))

    def _in_place(self, rows: Tensor, dim: int) -> Tensor:
        """Packed rows in the order of the nested tensor's values."""
        shape = list(rows.shape)
        shape[dim] = self._values.size(0)
        return rows.new_zeros(shape).index_copy(dim, self._rows, rows)


class CountingSteps:
    """Padded data (T, B, ...) with the steps that count in front, so that a number for each sequence tells them.

    The host need not know the numbers. A step that does not count keeps the state, so leaving it out is the same.

    Args:
        steps: bool (T, B), on the device of the data.
    """

    batch_sizes = None

    def __init__(self, steps: Tensor) -> None:
        self._steps = steps
        self._time, self._batch = steps.shape
        time = torch.arange(self._time, device=steps.device).unsqueeze(1)
        # (T, B): the times of each sequence, first those that count, in their order.
        self.times = torch.argsort(torch.where(steps, time, time + self._time), 0)
        self._places = (steps.cumsum(0) - 1).clamp(min=0)

    @property
    def lengths(self) -> Tensor:
        return self._steps.sum(0)

    def _moved(self, x: Tensor, dim: int, times: Tensor) -> Tensor:
        sequence = torch.arange(self._batch, device=times.device)
        rows = (times * self._batch + sequence).flatten()
        return x.flatten(dim, dim + 1).index_select(dim, rows).unflatten(dim, (self._time, self._batch))

    def packed(self, x: Tensor) -> Tensor:
        """(T, B, ...) with the steps that count in front."""
        return self._moved(x, 0, self.times)

    def padded(self, x: Tensor, dim: int, like: Tensor | None = None) -> Tensor:
        """(..., T, B, ...) with the steps at their times again, T at ``dim``; 0 where none counts."""
        counts = self._steps.reshape(*self._steps.shape, *[1] * (x.dim() - dim - 2))
        moved = self._moved(x, dim, self._places)
        return counts & moved if x.dtype == torch.bool else torch.where(counts, moved, x.new_zeros(()))

    def packed_state(self, state: Tensor | None) -> Tensor | None:
        return state

    def padded_state(self, final: Tensor, initial: Tensor | None) -> Tensor:
        return final

    def resets_in_front(self, resets: Tensor) -> Tensor:
        """The resets (T, B) before the steps that count: each has those since the last step that did."""
        so_far = self.packed(resets.cumsum(0))
        before = torch.cat([torch.zeros_like(so_far[:1]), so_far[:-1]])
        return self.packed(self._steps) & (so_far > before)


class PaddedRows:
    """The places of the rows that count in padded data, in the order of a ``PackedSequence``.

    The order of the sequences is that of ``pack_padded_sequence(enforce_sorted=False)``, so that dropout between the
    layers draws the same masks. Sequences without a step are left out.

    Attributes:
        batch_sizes: (longest,), int64.
    """

    def __init__(self, lengths: Tensor, time: int, device: torch.device, times: Tensor | None = None) -> None:
        """lengths: int64 (B,) on the CPU, each in [0, time], not all of them 0. The data is on ``device``.

        ``times`` are those of `CountingSteps`, if other steps count than the first of each sequence.
        """
        self._time, self._batch = time, lengths.size(0)
        self.batch_sizes, order, step, place = _packing(lengths)
        self._count = int(self.batch_sizes[0])
        if times is not None:
            step = times.cpu()[step, order[place]]
        indices = order, order[place], step, torch.argsort(order)
        if device.type != "cpu":
            indices = tuple([i.to(device) for i in indices])
        self._order, self._sequence, self._step, self._places = indices

    def packed(self, x: Tensor) -> Tensor:
        """The rows (N, ...) of padded data (T, B, ...)."""
        # The data is read in place, also if it is a view of batch-first data.
        if _is_batch_first(x):
            flat, rows = x.transpose(0, 1).flatten(0, 1), self._sequence * self._time + self._step
        else:
            flat, rows = x.flatten(0, 1), self._step * self._batch + self._sequence
        return flat.index_select(0, rows)

    def padded(self, rows: Tensor, dim: int, like: Tensor) -> Tensor:
        """Padded data (..., T, B, ...) from rows (..., N, ...) at ``dim``: 0 elsewhere; strided like ``like``."""
        shape = list(rows.shape)
        shape[dim] = self._time * self._batch
        zeros = rows.new_zeros(shape)
        if _is_batch_first(like):
            flat = zeros.index_copy(dim, self._sequence * self._time + self._step, rows)
            return flat.unflatten(dim, (self._batch, self._time)).transpose(dim, dim + 1)
        flat = zeros.index_copy(dim, self._step * self._batch + self._sequence, rows)
        return flat.unflatten(dim, (self._time, self._batch))

    def packed_state(self, state: Tensor | None) -> Tensor | None:
        """The states (sets, B, ...) of the packed sequences, in their order."""
        return None if state is None else state.index_select(1, self._order[: self._count])

    def padded_state(self, final: Tensor, initial: Tensor | None) -> Tensor:
        """The final states (sets, B, ...) of all sequences: for one without a step, its initial state."""
        if self._count < self._batch:
            left_out = self._order[self._count :]
            if initial is None:
                rest = final.new_zeros(final.size(0), left_out.size(0), final.size(2))
            else:
                rest = initial.index_select(1, left_out).to(final.dtype)
            final = torch.cat([final, rest], 1)
        return final.index_select(1, self._places)


def _is_batch_first(x: Tensor) -> bool:
    return x.stride(0) < x.stride(1)
