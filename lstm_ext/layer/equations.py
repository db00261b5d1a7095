"""One layer in plain PyTorch, differentiable to any order. `lstm_ext.reference` explains the equations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

# Imported by name: profilers replace functions in the module by their own, and would count these beside the layer
# itself.
from torch.nn.functional import linear

from .activations import activation_functions
from .layer_call import LayerCall, LayerOptions, LayerResults
from .shapes import check_shapes, count_mask, direction_of, gates_of
from .tracing import any_autocast


def lstm_layer(call: LayerCall) -> LayerResults:
    """One layer: the five results of `lstm_ext.reference.lstm_layer` with options; ``recompute`` has no effect here."""
    if call.input.dtype in (torch.bfloat16, torch.float16):
        return _in_float32(call)
    check_shapes(call)
    return _equations(call)


def _in_float32(call: LayerCall) -> LayerResults:
    """Same as in the kernels: everything between the arguments and the results is float32."""
    wide = call.map(lambda x: x.float() if x.is_floating_point() else x)
    device = call.input.device.type
    if any_autocast() and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):  # it would round the arguments of every product
            results = lstm_layer(wide)
    else:
        results = lstm_layer(wide)
    return tuple([r if r is None else r.to(call.input.dtype) for r in results])


def _equations(call: LayerCall) -> LayerResults:
    input, lengths = call.input, call.options.lengths
    # The number of rows of each step. In dense data it is always the same.
    sizes = None if call.batch_sizes is None else _check_batch_sizes(call.batch_sizes, input)
    if lengths is not None:
        # Padding may hold any number, and 0 times infinity is not 0 in a gradient.
        input = _zero_unless(count_mask(lengths, input.size(0)).unsqueeze(-1), input)
    found = [_direction(call, d, input, sizes) for d in range(2 if call.bidirectional else 1)]
    outputs, *others = zip(*found, strict=True)
    output = torch.cat(outputs, dim=-1) if call.bidirectional else outputs[0]
    return (output, *[None if parts[0] is None else torch.stack(parts) for parts in others])


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    # torch takes the mean and the deviation for constants in three derivatives of its own function: the third one, that
    # of a tangent, and that of a gradient which was taken under vmap.
    centred = x - x.mean(-1, keepdim=True)
    y = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    return y if bias is None else y + bias


def _cell(
    options: LayerOptions, dtype: torch.dtype, norm: Sequence[Tensor], peephole: Sequence[Tensor]
) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """The cell without projection and zoneout: from preactivations and c_{t-1} to h_t, c_t and i, f, g, o."""
    numbers = torch.finfo(dtype)
    bound, gate_bound = [
        clip and min(max(clip, numbers.tiny), numbers.max)
        for clip in (options.cell_clip, options.preactivation_clip)
    ]
    gate_function, candidate_function, output_function = activation_functions(options.activations)

    def bounded(z: Tensor) -> Tensor:
        if not gate_bound:
            return z
        # On the edge no gradient, unlike torch.clamp: the kernels see only the value of the gate.
        return torch.where(z.abs() < gate_bound, z, torch.clamp(z, -gate_bound, gate_bound).detach())

    def step(z: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        i, f, g, o = z.chunk(4, dim=-1)
        if peephole:
            i, f = i + peephole[0] * c, f + peephole[1] * c
        i, g = gate_function(bounded(i)), candidate_function(bounded(g))
        f = 1 - i if options.coupled_gates else gate_function(bounded(f))
        c = f * c + i * g
        if bound:
            c = torch.clamp(c, -bound, bound)
        o = gate_function(bounded(o + peephole[2] * c if peephole else o))
        seen = layer_norm(c, norm[2], norm[3] if len(norm) == 4 else None) if norm else c
        return o * output_function(seen), seen if options.norm_cell else c, i, f, g, o

    return step


def _gru(from_input: Tensor, from_state: Tensor, h: Tensor) -> Tensor:
    """h_t of a GRU; torch calls the update gate u z."""
    input_r, input_u, input_n = from_input.chunk(3, dim=-1)
    state_r, state_u, state_n = from_state.chunk(3, dim=-1)
    r, u = torch.sigmoid(input_r + state_r), torch.sigmoid(input_u + state_u)
    n = torch.tanh(input_n + r * state_n)
    return n + u * (h - n)


def _direction(call: LayerCall, d: int, input: Tensor, sizes: list[int] | None) -> tuple[Tensor | None, ...]:
    """The output, h_n, c_n, the cell states and the gate values; None where these are not requested."""
    options, h0, c0 = call.options, call.h0, call.c0
    w_ih, w_hh, b_ih, b_hh, w_hr, norm, peephole = direction_of(call, d)
    if peephole:  # with coupled gates, the weight of f gets zeros, and not nothing, as its gradient
        peephole = torch.stack(list(peephole)).unbind()
    cell = _cell(options, input.dtype, norm, peephole)
    if options.gru:  # one state in the place of both
        c0, options = h0, replace(options, reset_c=options.reset_h)

    def by_step(x: Tensor) -> Sequence[Tensor]:
        return x.split(sizes) if sizes else x.unbind(0)

    def join(steps: list[Tensor]) -> Tensor | None:
        steps = steps[::-1] if d == 1 else steps
        return None if not steps else torch.cat(steps) if sizes else torch.stack(steps)

    resets = None if options.resets is None else by_step(options.resets.unsqueeze(-1))
    lengths = None if options.lengths is None else options.lengths.unsqueeze(-1)
    mask = None if options.recurrent_mask is None else options.recurrent_mask[d]
    keep_h, keep_c = [None if keep is None else by_step(keep[d]) for keep in (options.keep_h, options.keep_c)]
    reset_h, reset_c = [None if x is None else x[d] for x in (options.reset_h, options.reset_c)]
    batch = sizes[0] if sizes else input.size(1)
    h_start = h0[d] if h0 is not None else input.new_zeros(batch, w_hh.size(1))
    c_start = c0[d] if c0 is not None else input.new_zeros(batch, w_hh.size(0) // gates_of(options))

    # The input's share of the gates needs no earlier step: one product for all of them.
    from_input = layer_norm(linear(input, w_ih), norm[0], b_ih) if norm else linear(input, w_ih, b_ih)
    gates_of_step = by_step(from_input)
    order = range(len(gates_of_step))
    h, c = h_start, c_start
    if d == 1:
        order = order[::-1]
        h, c = h[: gates_of_step[-1].size(0)], c[: gates_of_step[-1].size(0)]
    steps: list[Tensor] = []
    cells: list[Tensor] = []
    gates: list[Tensor] = []
    ended: list[tuple[Tensor, Tensor]] = []
    for t in order:
        rows = gates_of_step[t].size(0)
        if rows < h.size(0):  # some sequences have ended
            ended.append((h[rows:], c[rows:]))
            h, c = h[:rows], c[:rows]
        if resets is not None and (d == 0 or t + 1 < len(order)):
            # A flag cuts between the times t - 1 and t, so the reverse direction reads those of t + 1.
            cut = resets[t + d]
            h, c = _replaced(h, reset_h, cut), _replaced(c, reset_c, cut)
        if rows > h.size(0):  # in the reverse direction, some begin
            h = torch.cat([h, h_start[h.size(0) : rows]])
            c = torch.cat([c, c_start[c.size(0) : rows]])
        seen = h if mask is None else h * mask[:rows]
        from_state = layer_norm(linear(seen, w_hh), norm[1], b_hh) if norm else linear(seen, w_hh, b_hh)
        values: Sequence[Tensor] = ()
        if options.gru:
            new_h = new_c = _gru(gates_of_step[t], from_state, h)
        else:
            new_h, new_c, *values = cell(gates_of_step[t] + from_state, c)
        if w_hr is not None:
            new_h = linear(new_h, w_hr)
        new_c = _zone_out(new_c, c, None if keep_c is None else keep_c[t], options.zoneout_c)
        new_h = _zone_out(new_h, h, None if keep_h is None else keep_h[t], options.zoneout_h)

        counts = None if lengths is None else lengths > t
        h, c = _where(counts, new_h, h), _where(counts, new_c, c)
        steps.append(_zero_unless(counts, new_h))
        if options.return_cell_states:
            cells.append(_zero_unless(counts, c))
        if options.return_gates:
            of_step = torch.stack(values, dim=-1)
            gates.append(_zero_unless(None if counts is None else counts.unsqueeze(-1), of_step))
    ended.append((h, c))
    h_n, c_n = [torch.cat(parts) for parts in zip(*ended[::-1], strict=True)]
    return join(steps), h_n, c_n, join(cells), join(gates)


def _replaced(state: Tensor, by: Tensor | None, where: Tensor) -> Tensor:
    """The state with the rows in ``where``, (rows, 1), replaced."""
    return torch.where(where, state.new_zeros(()) if by is None else by[: state.size(0)], state)


def _where(counts: Tensor | None, x: Tensor, otherwise: Tensor) -> Tensor:
    """``x`` in the rows that count; None stands for all."""
    return x if counts is None else torch.where(counts, x, otherwise)


def _zero_unless(counts: Tensor | None, x: Tensor) -> Tensor:
    return x if counts is None else torch.where(counts, x, x.new_zeros(()))


def _zone_out(new: Tensor, old: Tensor, keep: Tensor | None, share: float) -> Tensor:
    if keep is not None:
        return torch.where(keep, old, new)
    return torch.lerp(new, old, share) if share else new


def _check_batch_sizes(batch_sizes: Tensor, input: Tensor) -> list[int]:
    sizes = batch_sizes.tolist()
    if not sizes or min(sizes) < 1 or any([b > a for a, b in itertools.pairwise(sizes)]):
        raise ValueError(f"batch_sizes: expected positive numbers that never rise, got {sizes}")
    if sum(sizes) != input.size(0):
        raise ValueError(
            f"batch_sizes: expected a sum of {input.size(0)}, the number of rows of the input, got {sum(sizes)}"
        )
    return sizes
