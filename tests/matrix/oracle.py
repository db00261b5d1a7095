"""The oracle of tests/oracle.py as a layer with the arguments of ``lstm_ext.LSTM``."""

from __future__ import annotations

from typing import Any

import torch
from oracle import Result, drawn, oracle
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import lstm_ext
from lstm_ext.call import values


def places_of_rows(packed: PackedSequence) -> tuple[Tensor, list[int], Tensor]:
    """Of packed rows: the place of each in padded data (T * B), the lengths of the B sequences, and their order."""
    sizes = packed.batch_sizes.tolist()
    order = torch.arange(sizes[0]) if packed.sorted_indices is None else packed.sorted_indices
    places = torch.cat([t * sizes[0] + order[:n] for t, n in enumerate(sizes)])
    lengths = [0] * sizes[0]
    for n in sizes:
        for b in order[:n].tolist():
            lengths[b] += 1
    return places, lengths, order


def resets_between(resets: Tensor, mask: Tensor) -> Tensor:
    """The resets (T, B) of the steps that count, in front: each has those since the last that counted."""
    found = torch.zeros_like(resets)
    for b in range(mask.size(1)):
        place, waiting = 0, False
        for t in range(mask.size(0)):
            waiting |= bool(resets[t, b])
            if mask[t, b]:
                found[place, b] = waiting
                place, waiting = place + 1, False
    return found


class OracleLSTM(lstm_ext.LSTM):
    """The parameters of ``lstm_ext.LSTM``, and the oracle for the computation. Takes plain forms of arguments only."""

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: list[int] | None = None,
        mask: Tensor | None = None,
        resets: Any = None,
        reset_state: tuple[Tensor, Tensor] | None = None,
        return_cell_states: bool = False,
        return_gates: bool = False,
    ) -> tuple[Any, ...]:
        places = order = known = None
        unbatched = False
        if isinstance(input, PackedSequence):
            places, lengths, order = places_of_rows(input)
            time, batch = len(input.batch_sizes), len(lengths)

            def padded(rows: Tensor) -> Tensor:
                zeros = rows.new_zeros(time * batch, *rows.shape[1:])
                return zeros.index_copy(0, places, rows).unflatten(0, (time, batch))

            x, resets = padded(input.data), None if resets is None else padded(resets.data)
            known = lengths
        elif input.dim() == 2:
            unbatched, x = True, input.unsqueeze(1)
            resets = None if resets is None else resets.unsqueeze(1)
            hx, reset_state = [s and tuple([t.unsqueeze(1) for t in s]) for s in (hx, reset_state)]
        else:
            x = input
            if self.batch_first:
                x, resets = x.transpose(0, 1), None if resets is None else resets.transpose(0, 1)
        time, batch = x.shape[:2]
        steps: list[list[int]] = []  # of each sequence, first those that count
        if mask is not None:
            rows = mask.unsqueeze(1) if unbatched else mask.T if self.batch_first else mask
            lengths = rows.sum(0).tolist()
            steps = [sorted(range(time), key=lambda t, b=b: (not rows[t, b], t)) for b in range(batch)]
            if batch:
                x = torch.stack([x[steps[b], b] for b in range(batch)], 1)
            if resets is not None:
                resets = resets_between(resets, rows)
        # The masks are drawn for packed rows where the lengths are known and some steps do not count.
        if known is None and lengths is not None and values.is_readable(torch.tensor(lengths)):
            known = lengths if 0 < sum(lengths) < time * batch else None

        masks = drawn(self, time, batch, known, order)
        result = (
            self._of_nobody(time) if batch == 0 else oracle(self, x, hx, lengths, resets, reset_state, masks)
        )
        output, h_n, c_n, cells, gates = result
        if mask is not None and batch:
            back = [[column.index(t) for t in range(time)] for column in steps]
            output = torch.stack([output[back[b], b] for b in range(batch)], 1)
            cells, gates = [torch.stack([e[:, back[b], b] for b in range(batch)], 2) for e in (cells, gates)]
        if isinstance(input, PackedSequence):
            y: Any = input._replace(data=output.flatten(0, 1)[places])
            cells, gates = [e.flatten(1, 2)[:, places] for e in (cells, gates)]
        elif unbatched:
            y, h_n, c_n = [t.squeeze(1) for t in (output, h_n, c_n)]
            cells, gates = cells.squeeze(2), gates.squeeze(2)
        else:
            y = output.transpose(0, 1) if self.batch_first else output
            if self.batch_first:
                cells, gates = cells.transpose(1, 2), gates.transpose(1, 2)
        if not (return_cell_states or return_gates):
            return y, (h_n, c_n)
        extras = lstm_ext.LSTMExtras(cells if return_cell_states else None, gates if return_gates else None)
        return y, (h_n, c_n), extras

    def _of_nobody(self, time: int) -> Result:
        directions = 2 if self.bidirectional else 1
        sets, state, hidden = (
            self.num_layers * directions,
            self.proj_size or self.hidden_size,
            self.hidden_size,
        )
        shapes = [
            (time, 0, directions * state), (sets, 0, state), (sets, 0, hidden), (sets, time, 0, hidden),
            (sets, time, 0, hidden, 4),
        ]  # fmt: skip
        return Result(*[torch.zeros(shape, dtype=torch.float64) for shape in shapes])
