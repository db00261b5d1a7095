"""One layer in plain PyTorch, differentiable to any order. `lstm_ext.reference` explains the equations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

# Imported by name: profilers replace functions in the module by their own, and would count these beside the layer
# itself.
from torch.nn.functional import layer_norm, linear

from .activations import activation_functions
from .layer_call import LayerCall, LayerResults
from .shapes import check_shapes, count_mask, weights_per_direction
from .tracing import any_autocast


def lstm_layer(call: LayerCall) -> LayerResults:
    """One layer, all time steps, both directions if ``call.bidirectional``; ``recompute`` has no effect here.

    D = 2 if bidirectional else 1; P is the projection's size, or H without a projection.

    Returns:
        output (T, B, D * P), or (N, D * P) for packed input, h_n (D, B, P), c_n (D, B, H); none of them shares memory
        with another. Then the cell states, (D, T, B, H) or (D, N, H), and the gate values i, f, g, o, the same with a
        last axis of 4; None where they are not requested.
    """
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


_LAYER_NORM_EPS = 1e-5


def _equations(call: LayerCall) -> LayerResults:
    input, h0, c0, weights, batch_sizes = call.input, call.h0, call.c0, call.weights, call.batch_sizes
    bias, bidirectional, options = call.bias, call.bidirectional, call.options
    directions = 2 if bidirectional else 1
    numbers = torch.finfo(input.dtype)
    bound = options.cell_clip and min(max(options.cell_clip, numbers.tiny), numbers.max)
    gate_bound = options.preactivation_clip and min(
        max(options.preactivation_clip, numbers.tiny), numbers.max
    )
    gate_function, candidate_function, output_function = activation_functions(options.activations)
    per_set, projected = weights_per_direction(len(weights), bias, bidirectional)
    # The number of rows of each step. In dense data it is always the same.
    sizes = _check_batch_sizes(batch_sizes, input) if batch_sizes is not None else None
    batch = sizes[0] if sizes else input.size(1)

    def bounded(z: Tensor) -> Tensor:
        if not gate_bound:
            return z
        # On the edge no gradient, unlike torch.clamp: the kernels see only the value of the gate.
        return torch.where(z.abs() < gate_bound, z, torch.clamp(z, -gate_bound, gate_bound).detach())

    def by_step(x: Tensor) -> Sequence[Tensor]:
        return x.split(sizes) if sizes else x.unbind(0)

    def join(steps: list[Tensor]) -> Tensor:
        return torch.cat(steps) if sizes else torch.stack(steps)

    resets = None if options.resets is None else by_step(options.resets.unsqueeze(-1))
    lengths = None if options.lengths is None else options.lengths.unsqueeze(-1)
    if options.lengths is not None:
        # Padding may hold any number, and 0 times infinity is not 0 in a gradient.
        input = _zero_unless(count_mask(options.lengths, input.size(0)).unsqueeze(-1), input)
    outputs, h_n, c_n, all_cells, all_gates = [], [], [], [], []
    for d in range(directions):
        w_ih, w_hh, *rest = weights[d * per_set : (d + 1) * per_set]
        b_ih, b_hh = rest[:2] if bias else (None, None)
        w_hr = rest[-1] if projected else None
        hidden = w_hh.size(0) // 4
        norm = options.norm[d * len(options.norm) // directions : (d + 1) * len(options.norm) // directions]
        peephole = options.peephole[3 * d : 3 * (d + 1)]
        if peephole:  # with coupled gates, the weight of f gets zeros, and not nothing, as its gradient
            peephole = torch.stack(list(peephole)).unbind()
        mask = None if options.recurrent_mask is None else options.recurrent_mask[d]
        keep_h, keep_c = [
            None if keep is None else by_step(keep[d]) for keep in (options.keep_h, options.keep_c)
        ]
        reset_h, reset_c = [None if x is None else x[d] for x in (options.reset_h, options.reset_c)]
        h_start = h0[d] if h0 is not None else input.new_zeros(batch, w_hh.size(1))
        c_start = c0[d] if c0 is not None else input.new_zeros(batch, hidden)

        # The input's share of the gates needs no earlier step: one product for all of them.
        if norm:
            from_input = layer_norm(linear(input, w_ih), (4 * hidden,), norm[0], b_ih, eps=_LAYER_NORM_EPS)
        else:
            from_input = linear(input, w_ih, b_ih)
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
            if resets is not None and (d == 0 or t + 1 < len(order)):
                # A flag cuts between the times t - 1 and t, so the reverse direction reads those of t + 1.
                cut = resets[t + d]
                h, c = _replaced(h, reset_h, cut), _replaced(c, reset_c, cut)
            if rows > h.size(0):  # in the reverse direction, some begin
                h = torch.cat([h, h_start[h.size(0) : rows]])
                c = torch.cat([c, c_start[c.size(0) : rows]])
            seen = h if mask is None else h * mask[:rows]
            if norm:
                from_state = layer_norm(linear(seen, w_hh), (4 * hidden,), norm[1], b_hh, eps=_LAYER_NORM_EPS)
            else:
                from_state = linear(seen, w_hh, b_hh)
            i, f, g, o = (gates_of_step[t] + from_state).chunk(4, dim=-1)
            if peephole:
                i, f = i + peephole[0] * c, f + peephole[1] * c
            i, g = gate_function(bounded(i)), candidate_function(bounded(g))
            f = 1 - i if options.coupled_gates else gate_function(bounded(f))
            new_c = f * c + i * g
            if bound:
                new_c = torch.clamp(new_c, -bound, bound)
            o = gate_function(bounded(o + peephole[2] * new_c if peephole else o))
            visible = new_c
            if norm:
                shift = norm[3] if len(norm) == 4 else None
                visible = layer_norm(new_c, (hidden,), norm[2], shift, eps=_LAYER_NORM_EPS)
            new_h = o * output_function(visible)
            if w_hr is not None:
                new_h = linear(new_h, w_hr)
            new_c = _zone_out(new_c, c, None if keep_c is None else keep_c[t], options.zoneout_c)
            new_h = _zone_out(new_h, h, None if keep_h is None else keep_h[t], options.zoneout_h)

            if lengths is None:
                h, c = new_h, new_c
                steps.append(h)
            else:
                counts = lengths > t
                h, c = torch.where(counts, new_h, h), torch.where(counts, new_c, c)
                steps.append(_zero_unless(counts, new_h))
            if options.return_cell_states:
                cells.append(c if lengths is None else _zero_unless(counts, c))
            if options.return_gates:
                of_step = torch.stack([i, f, g, o], dim=-1)
                gates.append(of_step if lengths is None else _zero_unless(counts.unsqueeze(-1), of_step))
        ended.append((h, c))
        if d == 1:
            for values in (steps, cells, gates):
                values.reverse()
        outputs.append(join(steps))
        h_n.append(torch.cat([h for h, _ in ended[::-1]]))
        c_n.append(torch.cat([c for _, c in ended[::-1]]))
        if options.return_cell_states:
            all_cells.append(join(cells))
        if options.return_gates:
            all_gates.append(join(gates))
    return (
        torch.cat(outputs, dim=-1) if bidirectional else outputs[0],
        torch.stack(h_n),
        torch.stack(c_n),
        torch.stack(all_cells) if all_cells else None,
        torch.stack(all_gates) if all_gates else None,
    )


def _replaced(state: Tensor, by: Tensor | None, where: Tensor) -> Tensor:
    """The state with the rows in ``where``, (rows, 1), replaced."""
    return torch.where(where, state.new_zeros(()) if by is None else by[: state.size(0)], state)


def _zero_unless(counts: Tensor, x: Tensor) -> Tensor:
    return torch.where(counts, x, x.new_zeros(()))


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
