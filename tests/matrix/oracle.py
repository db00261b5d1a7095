"""The layer with all its options, written again: sequence by sequence, segment by segment, step by step, in float64.

It shares no line with `lstm_ext.reference`: a reset is not a replaced state here but the end of a segment, lengths are
slices, and a gate is computed by itself. Random masks are arguments; `drawn` draws them in the documented order.
`OracleLSTM` is the oracle as a layer with the arguments of ``lstm_ext.LSTM``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext
from lstm_ext.call import values

from .cases import OF_GRU


class Masks(NamedTuple):
    """Of one layer. recurrent (D, B, P), zoneout_h (D, T, B, P), zoneout_c (D, T, B, H); None for none.

    between (T, B, D * P): that of dropout on its input, from the second layer on.
    """

    recurrent: Tensor | None
    zoneout_h: Tensor | None
    zoneout_c: Tensor | None
    between: Tensor | None = None
    weights: Tensor | None = None  # (D, 4H, P), of weight_hh


class Result(NamedTuple):
    output: Tensor  # (T, B, D * P)
    h_n: Tensor
    c_n: Tensor
    cell_states: Tensor  # (L * D, T, B, H)
    gates: Tensor  # (L * D, T, B, H, 4)


def rates(module: lstm_ext.LSTM) -> tuple[float, float]:
    return module.zoneout if isinstance(module.zoneout, tuple) else (module.zoneout, 0.0)


def drawn(
    module: lstm_ext.LSTM,
    time: int,
    batch: int,
    packed_as: Sequence[int] | None,
    order: Tensor | None = None,
) -> list[Masks | None]:
    """The masks of each layer in training mode, from torch's generator.

    Time-first, or, where the lengths are known, for the rows of the packed data and the sequences in their order, which
    is ``order``, or without one that of pack_padded_sequence.
    """
    if not module.training:
        return [None] * module.num_layers
    directions = 2 if module.bidirectional else 1
    hidden = module.hidden_size
    state = module.proj_size or hidden
    steps, sequences = torch.meshgrid(torch.arange(time), torch.arange(batch), indexing="ij")
    rows = steps.flatten() * batch + sequences.flatten()
    if packed_as is None:
        order = torch.arange(batch)
    else:
        lengths = torch.tensor(packed_as)
        if order is None:
            order = torch.sort(lengths, descending=True).indices
        order = order[: int((lengths > 0).sum())]
        places = (steps * batch + sequences)[:, order]
        rows = pack_padded_sequence(places, lengths[order]).data

    layers: list[Masks | None] = []
    for k in range(module.num_layers):
        between = None
        if k > 0 and module.dropout:
            width = directions * state
            between = torch.zeros(time * batch, width, dtype=torch.float64)
            shape = (time, batch, width) if packed_as is None else (len(rows), width)
            mask = torch.nn.functional.dropout(torch.ones(shape, dtype=torch.float64), module.dropout)
            between[rows] = mask.view(len(rows), width)
            between = between.view(time, batch, width)
        weights = None
        if module.weight_dropout:
            ones = torch.ones((3 if module.gru else 4) * hidden, state, dtype=torch.float64)
            weights = torch.stack(
                [torch.nn.functional.dropout(ones, module.weight_dropout) for _ in range(directions)]
            )
        recurrent = None
        if module.recurrent_dropout:
            ones = torch.ones(directions, len(order), state, dtype=torch.float64)
            recurrent = torch.ones(directions, batch, state, dtype=torch.float64)
            recurrent[:, order] = torch.nn.functional.dropout(ones, module.recurrent_dropout)
        zoneout = []
        for rate, size in zip(rates(module), (state, hidden), strict=True):
            mask = None
            if rate:
                mask = torch.zeros(directions, time * batch, size, dtype=torch.float64)
                if packed_as is None:
                    mask[:] = (torch.rand(directions, time, batch, size) < rate).double().flatten(1, 2)
                else:
                    mask[:, rows] = (torch.rand(directions, len(rows), size) < rate).double()
                mask = mask.unflatten(1, (time, batch))
            zoneout.append(mask)
        layers.append(Masks(recurrent, *zoneout, between, weights))
    return layers


def normalised(a: Tensor, gain: Tensor, shift: Tensor | float) -> Tensor:
    centred = a - a.mean()
    return gain * centred / torch.sqrt(centred.square().mean() + 1e-5) + shift


class Cell:
    """One layer and direction on one sequence's row; all vectors."""

    # How near a number came to an edge, such as cell_clip: there, the gradient depends on rounding.
    nearest_to_clip = math.inf

    def __init__(self, module: lstm_ext.LSTM, suffix: str) -> None:
        self.module = module
        names = dict(module.named_parameters())
        self.w_ih, self.w_hh = names[f"weight_ih{suffix}"], names[f"weight_hh{suffix}"]
        zero = torch.zeros(len(self.w_hh), dtype=torch.float64)
        self.b_ih, self.b_hh = names.get(f"bias_ih{suffix}", zero), names.get(f"bias_hh{suffix}", zero)
        self.w_hr = names.get(f"weight_hr{suffix}")
        if module.layer_norm:
            self.gain_ih, self.gain_hh = names[f"ln_gain_ih{suffix}"], names[f"ln_gain_hh{suffix}"]
            self.gain_c = names[f"ln_gain_c{suffix}"]
            self.bias_c = names.get(f"ln_bias_c{suffix}", 0.0)
        self.sees = [names.get(f"weight_c{gate}{suffix}", 0.0) for gate in "ifo"]

    @staticmethod
    def edge(distance: Tensor) -> None:
        if distance.numel():
            Cell.nearest_to_clip = min(Cell.nearest_to_clip, distance.detach().abs().min().item())

    def bounded(self, z: Tensor, clip: float | str | None = "of preactivations") -> Tensor:
        clip = self.module.preactivation_clip if clip == "of preactivations" else clip
        if clip is None:
            return z
        bound = torch.full_like(z, clip)
        self.edge(z.abs() - bound)
        return torch.where(z.abs() > bound, bound * z.detach().sign(), z)

    def activated(self, function: Any, z: Tensor) -> Tensor:
        """Some of ONNX's functions, in elementary ones."""
        name, *numbers = (function,) if isinstance(function, str) else function
        zero = torch.zeros_like(z)
        if name == "sigmoid":
            return 1 / (1 + torch.exp(-z))
        if name == "tanh":
            return torch.tanh(z)
        if name == "identity":
            return z
        if name == "softsign":
            return z / (1 + z * z.detach().sign())
        if name == "softplus":
            return torch.log(1 + torch.exp(z))
        if name == "scaled_tanh":
            return numbers[0] * torch.tanh(numbers[1] * z)
        if name == "hard_sigmoid":
            slope, offset = numbers or (0.2, 0.5)
            line = slope * z + offset
            self.edge(line)
            self.edge(line - 1)
            return torch.where(line < 0, zero, torch.where(line > 1, zero + 1, line))
        self.edge(z)
        below = {"relu": zero, "elu": torch.expm1(z), "leaky_relu": (numbers or [0.01])[0] * z}[name]
        return torch.where(z > 0, z, below)

    def __call__(self, x, h, c, dropped, kept_h, kept_c):
        from_x, from_h = self.w_ih @ x, self.w_hh @ (h * dropped)
        if self.module.gru:
            r_x, z_x, n_x = (from_x + self.b_ih).view(3, -1)
            r_h, z_h, n_h = (from_h + self.b_hh).view(3, -1)
            r, z = [1 / (1 + torch.exp(-a)) for a in (r_x + r_h, z_x + z_h)]
            h = (1 - z) * torch.tanh(n_x + r * n_h) + z * h
            return h, h, torch.zeros_like(h).unsqueeze(-1).expand(-1, 4)
        if self.module.layer_norm:
            from_x, from_h = normalised(from_x, self.gain_ih, 0.0), normalised(from_h, self.gain_hh, 0.0)
        i, f, g, o = (from_x + from_h + self.b_ih + self.b_hh).view(4, -1)
        gate = self.module.gate_activation
        candidate = visible = self.module.cell_activation
        if isinstance(candidate, tuple) and not isinstance(candidate[1], float):
            candidate, visible = candidate
        i = self.activated(gate, self.bounded(i + self.sees[0] * c))
        f = self.activated(gate, self.bounded(f + self.sees[1] * c))
        if self.module.coupled_gates:
            f = 1 - i
        g = self.activated(candidate, self.bounded(g))
        new_c = i * g + f * c
        new_c = self.bounded(new_c, self.module.cell_clip)
        o = self.activated(gate, self.bounded(o + self.sees[2] * new_c))
        seen = normalised(new_c, self.gain_c, self.bias_c) if self.module.layer_norm else new_c
        if self.module.layer_norm == "cell":
            new_c = seen
        new_h = self.activated(visible, seen) * o
        if self.w_hr is not None:
            new_h = self.w_hr @ new_h
        h = kept_h * h + (1 - kept_h) * new_h
        c = kept_c * c + (1 - kept_c) * new_c
        return h, c, torch.stack([i, f, g, o], dim=-1)


def segments(length: int, resets: Sequence[bool]) -> list[tuple[int, int]]:
    borders = [0] + [t for t in range(1, length) if resets[t]] + [length]
    return list(itertools.pairwise(borders)) if length else []


def oracle(
    module: lstm_ext.LSTM,
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None = None,
    lengths: Sequence[int] | None = None,
    resets: Tensor | None = None,
    reset_state: tuple[Tensor, Tensor] | None = None,
    masks: Sequence[Masks | None] | None = None,
) -> Result:
    """x (T, B, I); resets (T, B), bool."""
    time, batch, _ = x.shape
    hidden, directions = module.hidden_size, 2 if module.bidirectional else 1
    state = module.proj_size or hidden
    sets = module.num_layers * directions
    zeros = (x.new_zeros(sets, batch, state), x.new_zeros(sets, batch, hidden))
    hx, reset_state = hx or zeros, reset_state or zeros
    lengths = [time] * batch if lengths is None else lengths
    h_n, c_n, all_cells, all_gates = [], [], [], []
    for k in range(module.num_layers):
        if masks is not None and masks[k] is not None and masks[k].between is not None:
            x = x * masks[k].between
        outputs = []
        for d in range(directions):
            s = k * directions + d
            cell = Cell(module, f"_l{k}" + ("_reverse" if d else ""))
            if masks is not None and masks[k] is not None and masks[k].weights is not None:
                cell.w_hh = cell.w_hh * masks[k].weights[d]
            rows = []
            for b in range(batch):
                h_steps = [x.new_zeros(state)] * time
                c_steps = [x.new_zeros(hidden)] * time
                gate_steps = [x.new_zeros(hidden, 4)] * time
                flags = [False] * time if resets is None else resets[:, b].tolist()
                h, c = hx[0][s, b], hx[1][s, b]
                parts = segments(lengths[b], flags)
                for number, (start, stop) in enumerate(parts[::-1] if d else parts):
                    if number > 0 or (d == 0 and flags[0]):
                        h, c = reset_state[0][s, b], reset_state[1][s, b]
                    for t in range(start, stop)[:: -1 if d else 1]:
                        dropped, kept_h, kept_c = 1.0, *rates(module)
                        if masks is not None and masks[k] is not None:
                            if masks[k].recurrent is not None:
                                dropped = masks[k].recurrent[d, b]
                            if masks[k].zoneout_h is not None:
                                kept_h = masks[k].zoneout_h[d, t, b]
                            if masks[k].zoneout_c is not None:
                                kept_c = masks[k].zoneout_c[d, t, b]
                        h, c, gates = cell(x[t, b], h, c, dropped, kept_h, kept_c)
                        h_steps[t], c_steps[t], gate_steps[t] = h, c, gates
                rows.append((torch.stack(h_steps), h, c, torch.stack(c_steps), torch.stack(gate_steps)))
            ys, hs, cs, cells, gates = zip(*rows, strict=True)
            outputs.append(torch.stack(ys, dim=1))
            h_n.append(torch.stack(hs))
            c_n.append(torch.stack(cs))
            all_cells.append(torch.stack(cells, dim=1))
            all_gates.append(torch.stack(gates, dim=1))
        x = torch.cat(outputs, dim=-1)
    return Result(x, *[torch.stack(v) for v in (h_n, c_n, all_cells, all_gates)])


# ---- as a layer


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


class _Oracle:
    """The ``forward`` of a layer that the oracle computes. It takes plain forms of arguments only."""

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
        if self.gru:  # both states are h
            hx, reset_state = [s and (s[0], s[0]) for s in (hx, reset_state)]
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
        if self.gru:
            return y, (h_n,)
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


class OracleLSTM(_Oracle, lstm_ext.LSTM):
    """The parameters of ``lstm_ext.LSTM``, and the oracle for the computation."""


class OracleGRU(_Oracle, lstm_ext.GRU):
    """The same for ``lstm_ext.GRU``."""


OF_GRU[OracleLSTM] = OracleGRU
