"""One layer in plain PyTorch, differentiable to any order. `lstm_ext.reference` explains the equations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .options import LayerExtras
from .shapes import count_mask
from .tracing import any_autocast

__all__ = ["check_shapes", "lstm_layer"]


def lstm_layer(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bias: bool,
    bidirectional: bool,
    extras: LayerExtras | None = None,
) -> Any:
    """One layer, all time steps, both directions if ``bidirectional``.

    Shapes, with D = 2 if bidirectional else 1 and P the projection's size, or H without a projection:

    Args:
        input: (T, B, I), T >= 1, any strides; with ``batch_sizes`` (N, I), N their sum.
        h0: (D, B, P), or None for zeros.
        c0: (D, B, H), or None for zeros.
        weights: D sets of ``w_ih (4H, I), w_hh (4H, P)[, b_ih (4H), b_hh (4H)][, w_hr (P, H)]``.
        batch_sizes: (T,), int64 on the CPU, of a ``torch.nn.utils.rnn.PackedSequence``: how many of the B
            sequences, sorted by falling length, have a step t. A sequence begins from its row of ``h0`` and
            ``c0``, in the reverse direction at its own last step. None for dense input.
        bias: whether the sets hold the two biases.
        bidirectional: whether there are two sets, the second for the reverse direction.
        extras: what the layer does beyond ``torch.nn.LSTM``, with their shapes; ``recompute`` means nothing here.

    Returns:
        output (T, B, D * P), or (N, D * P) with ``batch_sizes``, h_n (D, B, P), c_n (D, B, H); none of them
        shares memory with another. With ``extras`` also the cell states, (D, T, B, H) or (D, N, H), and the gates
        i, f, g, o, the same with a last axis of 4; None where they are not wanted.
    """
    if input.dtype in (torch.bfloat16, torch.float16):
        return _in_float32(input, h0, c0, weights, batch_sizes, bias, bidirectional, extras)
    check_shapes(input, h0, c0, weights, bias, bidirectional)
    results = _equations(input, h0, c0, weights, batch_sizes, bias, bidirectional, extras or LayerExtras())
    return results[:3] if extras is None else results


def _in_float32(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bias: bool,
    bidirectional: bool,
    extras: LayerExtras | None,
) -> Any:
    """As in the kernels: between the arguments and the results all is float32."""

    def wide(x: Tensor | None) -> Any:
        return x.float() if x is not None and x.is_floating_point() else x

    arguments = [wide(t) for t in (input, h0, c0, *weights)]
    if extras is not None:
        extras = extras.map(wide)
    device = input.device.type
    if any_autocast() and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):  # it would round the arguments of every product
            results = lstm_layer(*arguments[:3], arguments[3:], batch_sizes, bias, bidirectional, extras)
    else:
        results = lstm_layer(*arguments[:3], arguments[3:], batch_sizes, bias, bidirectional, extras)
    return tuple([r if r is None else r.to(input.dtype) for r in results])


_LAYER_NORM_EPS = 1e-5


def _equations(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bias: bool,
    bidirectional: bool,
    extras: LayerExtras,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    directions = 2 if bidirectional else 1
    per_set = len(weights) // directions
    # How many rows each step has. Dense data are the case of always the same number.
    sizes = _check_batch_sizes(batch_sizes, input) if batch_sizes is not None else None
    batch = sizes[0] if sizes else input.size(1)

    def by_step(x: Tensor) -> Sequence[Tensor]:
        return x.split(sizes) if sizes else x.unbind(0)

    def joined(steps: list[Tensor]) -> Tensor:
        return torch.cat(steps) if sizes else torch.stack(steps)

    resets = None if extras.resets is None else by_step(extras.resets.unsqueeze(-1))
    lengths = None if extras.lengths is None else extras.lengths.unsqueeze(-1)
    if extras.lengths is not None:
        # Padding may hold anything, and 0 times infinity is not 0 in a gradient.
        input = _zero_unless(count_mask(extras.lengths, input.size(0)).unsqueeze(-1), input)
    outputs, h_n, c_n, all_cells, all_gates = [], [], [], [], []
    for d in range(directions):
        w_ih, w_hh, *rest = weights[d * per_set : (d + 1) * per_set]
        b_ih, b_hh = rest[:2] if bias else (None, None)
        w_hr = rest[-1] if len(rest) == (3 if bias else 1) else None
        hidden = w_hh.size(0) // 4
        norm = extras.norm[d * len(extras.norm) // directions : (d + 1) * len(extras.norm) // directions]
        mask = None if extras.recurrent_mask is None else extras.recurrent_mask[d]
        kept_h, kept_c = [
            by_step(kept[d]) if isinstance(kept, Tensor) else kept
            for kept in (extras.zoneout_h, extras.zoneout_c)
        ]
        reset_h, reset_c = [None if x is None else x[d] for x in (extras.reset_h, extras.reset_c)]
        h_start = h0[d] if h0 is not None else input.new_zeros(batch, w_hh.size(1))
        c_start = c0[d] if c0 is not None else input.new_zeros(batch, hidden)

        # The input's share of the gates needs no earlier step: one product for all of them.
        if norm:
            from_input = F.layer_norm(
                F.linear(input, w_ih), (4 * hidden,), norm[0], b_ih, eps=_LAYER_NORM_EPS
            )
        else:
            from_input = F.linear(input, w_ih, b_ih)
        gates_of_step = by_step(from_input)
        order = range(len(gates_of_step))
        h, c = h_start, c_start
        if d == 1:
            order = order[::-1]
            h, c = h[: gates_of_step[-1].size(0)], c[: gates_of_step[-1].size(0)]
        steps, cells, gates = [], [], []
        ended: list[tuple[Tensor, Tensor]] = []
        for t in order:
            rows = gates_of_step[t].size(0)
            if rows < h.size(0):  # some sequences have ended
                ended.append((h[rows:], c[rows:]))
                h, c = h[:rows], c[:rows]
            elif rows > h.size(0):  # in the reverse direction, some begin
                h = torch.cat([h, h_start[h.size(0) : rows]])
                c = torch.cat([c, c_start[c.size(0) : rows]])
            if resets is not None and d == 0:
                h, c = _replaced(h, reset_h, resets[t]), _replaced(c, reset_c, resets[t])

            seen = h if mask is None else h * mask[:rows]
            if norm:
                from_state = F.layer_norm(
                    F.linear(seen, w_hh), (4 * hidden,), norm[1], b_hh, eps=_LAYER_NORM_EPS
                )
            else:
                from_state = F.linear(seen, w_hh, b_hh)
            i, f, g, o = (gates_of_step[t] + from_state).chunk(4, dim=-1)
            i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
            new_c = f * c + i * g
            visible = new_c
            if norm:
                shift = norm[3] if len(norm) == 4 else None
                visible = F.layer_norm(new_c, (hidden,), norm[2], shift, eps=_LAYER_NORM_EPS)
            new_h = o * torch.tanh(visible)
            if w_hr is not None:
                new_h = F.linear(new_h, w_hr)
            new_c = _zoned(new_c, c, kept_c if isinstance(kept_c, float) else kept_c[t])
            new_h = _zoned(new_h, h, kept_h if isinstance(kept_h, float) else kept_h[t])

            if lengths is None:
                h, c = new_h, new_c
                steps.append(h)
            else:
                counts = lengths > t
                h, c = torch.where(counts, new_h, h), torch.where(counts, new_c, c)
                steps.append(_zero_unless(counts, new_h))
            if extras.return_cell_states:
                cells.append(c if lengths is None else _zero_unless(counts, c))
            if extras.return_gates:
                of_step = torch.stack([i, f, g, o], dim=-1)
                gates.append(of_step if lengths is None else _zero_unless(counts.unsqueeze(-1), of_step))
            if resets is not None and d == 1 and t > 0:
                h, c = _replaced(h, reset_h, resets[t]), _replaced(c, reset_c, resets[t])
        ended.append((h, c))
        if d == 1:
            for values in (steps, cells, gates):
                values.reverse()
        outputs.append(joined(steps))
        h_n.append(torch.cat([h for h, _ in ended[::-1]]))
        c_n.append(torch.cat([c for _, c in ended[::-1]]))
        if extras.return_cell_states:
            all_cells.append(joined(cells))
        if extras.return_gates:
            all_gates.append(joined(gates))
    return (
        torch.cat(outputs, dim=-1) if bidirectional else outputs[0],
        torch.stack(h_n),
        torch.stack(c_n),
        torch.stack(all_cells) if all_cells else None,
        torch.stack(all_gates) if all_gates else None,
    )


def _replaced(state: Tensor, by: Tensor | None, where: Tensor) -> Tensor:
    """where (rows, 1)"""
    return torch.where(where, state.new_zeros(()) if by is None else by[: state.size(0)], state)


def _zero_unless(counts: Tensor, x: Tensor) -> Tensor:
    return torch.where(counts, x, x.new_zeros(()))


def _zoned(new: Tensor, old: Tensor, kept: Tensor | float) -> Tensor:
    if isinstance(kept, Tensor):
        return torch.where(kept, old, new)
    return torch.lerp(new, old, kept) if kept else new


def check_shapes(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    bias: bool,
    bidirectional: bool,
) -> None:
    """What the kernels check, for where they do not run: a bias of shape (1,), say, would be spread out in silence.

    Raises:
        RuntimeError: naming the argument.
    """
    directions = 2 if bidirectional else 1
    plain = 4 if bias else 2
    per_set, rest = divmod(len(weights), directions)
    if rest or per_set not in (plain, plain + 1):
        raise RuntimeError(
            f"lstm_ext: got {len(weights)} weights, expected {plain * directions}, "
            f"or {(plain + 1) * directions} with a projection"
        )
    projected = per_set == plain + 1
    hidden = weights[0].size(0) // 4
    state = weights[per_set - 1].size(0) if projected else hidden
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = []
    for d in range(directions):
        w_ih, w_hh, *others = weights[d * per_set : (d + 1) * per_set]
        expected += [
            ("weight_ih", w_ih, (4 * hidden, input.size(-1))),
            ("weight_hh", w_hh, (4 * hidden, state)),
        ]
        expected += [("bias", b, (4 * hidden,)) for b in others[: plain - 2]]
        expected += [("weight_hr", w, (state, hidden)) for w in others[plain - 2 :]]
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape:
            raise RuntimeError(f"lstm_ext: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    for name, initial, size in (("h0", h0, state), ("c0", c0, hidden)):
        if initial is not None and (
            initial.dim() != 3 or initial.size(0) != directions or initial.size(2) != size
        ):
            raise RuntimeError(
                f"lstm_ext: {name} has shape {tuple(initial.shape)}, expected ({directions}, batch, {size})"
            )


def _check_batch_sizes(batch_sizes: Tensor, input: Tensor) -> list[int]:
    sizes = batch_sizes.tolist()
    if not sizes or min(sizes) < 1 or any([b > a for a, b in itertools.pairwise(sizes)]):
        raise ValueError(f"batch_sizes: expected positive numbers that never rise, got {sizes}")
    if sum(sizes) != input.size(0):
        raise ValueError(
            f"batch_sizes: expected a sum of {input.size(0)}, the number of rows of the input, got {sum(sizes)}"
        )
    return sizes
