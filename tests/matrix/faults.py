"""What may be wrong with arguments, and the error that says so: one table.

A `Fault` breaks a good `Call` and has a column for each entry of the library that it is wrong for. The column says
which error is expected there: that of torch's own layer for the same arguments, or ours. A text may name numbers of the
call (`numbers_of`, `numbers_of_got`), and "..." stands for anything. `judge_faults.check_fault` runs a row on an entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lstm_ext.call.layout import EMPTY_SEQUENCE

from .broken import (
    TORCH,
    Call,
    Error,
    Fault,
    at,
    longer,
    of_rank,
    one_of,
    only_if,
    other_dtype,
    resized,
    runtime_error,
    together,
    torchs_or,
    type_error,
    value_error,
)
from .option_faults import OPTIONS

__all__ = ["FAULTS"]

# --- ways to break


def data(change: Callable[[Call, Tensor], Any]) -> Callable[[Call], Any]:
    """Changes the input, or the rows of a packed or nested one."""

    def apply(call: Call) -> Any:
        changed = change(call, call.data)
        call.data = changed
        return changed

    return apply


def state(change: Callable[[Call, Tensor], Any], place: int | None = None) -> Callable[[Call], Any]:
    """Changes one of h0 and c0."""

    def apply(call: Call) -> Any:
        i = call.pick([0, 1]) if place is None else place
        changed = change(call, call.hx[i])
        call.hx = tuple([changed if k == i else s for k, s in enumerate(call.hx)])
        return changed

    return apply


def states(change: Callable[[Call, Any], Any]) -> Callable[[Call], Any]:
    def apply(call: Call) -> Any:
        hx = call.hx = change(call, call.hx)
        pair = isinstance(hx, tuple) and len(hx) == 2 and all([isinstance(s, Tensor) for s in hx])
        return hx[0] if pair else hx

    return apply


def weight(change: Callable[[Call, Tensor], Any], prefix: str = "") -> Callable[[Call], Any]:
    return lambda call: call.weight(lambda w: change(call, w), prefix)


def packed(**changes: Callable[[Call, Tensor], Any]) -> Callable[[Call], Any]:
    """Changes a field of a ``PackedSequence``: "sizes", "order" or, of the same numbers, "both" orders."""

    def apply(call: Call) -> Any:
        (field, change), sizes = next(iter(changes.items())), call.input.batch_sizes
        if field == "sizes":
            changed = change(call, sizes.clone())
            call.input = PackedSequence(call.input.data, changed)
        else:
            changed = change(call, torch.arange(int(sizes[0]), device=call.data.device))
            # Given both, PackedSequence inverts nothing, and so sees nothing of the fault.
            other = changed if field == "both" else torch.arange(int(sizes[0]), device=call.data.device)
            call.input = PackedSequence(call.input.data, sizes, changed, other)
        return changed

    return apply


# --- the input

WRONG = Error((RuntimeError, ValueError))  # where torch's layer may corrupt memory, or computes with a part
FEATURES = runtime_error("input.size(-1) must be equal to input_size. Expected {I}, got {features}")
OF_WEIGHTS = value_error("weights[0] (weight_ih_l0): expected shape ({H4}, {features}), got ({H4}, {I})")
DTYPE = value_error("input dtype ({its_dtype}) does not match weight dtype ({dtype})")
LIKE_INPUT = value_error("weights[0] (weight_ih_l0): expected dtype {its_dtype} as input, got {dtype}")
NO_TENSORS = [lambda x: None, lambda x: x.tolist(), lambda x: x.detach().numpy(), lambda x: "input", lambda x: 5,
              lambda x: (x,), lambda x: [x]]  # fmt: skip


no_steps = data(lambda c, x: x.narrow(c.time_axis, 0, 0))
no_rows = data(lambda c, x: only_if(x.dim() == 3, x).narrow(1 - c.time_axis, 0, 0))
more_features = data(lambda c, x: longer(x, -1, c.amount))
another_dtype = data(other_dtype)
INPUT: dict[str, Fault] = {
    "features": Fault(data(lambda c, x: resized(c, x, -1)), TORCH, FEATURES, FEATURES, FEATURES, OF_WEIGHTS, TORCH),
    "dtype": Fault(another_dtype, TORCH, DTYPE, DTYPE, DTYPE, LIKE_INPUT, TORCH),
    "meta": Fault(
        data(lambda c, x: only_if(c.hx is None, x.to("meta"))), TORCH, WRONG, None,
        runtime_error("found input tensor at meta and parameter tensor at {device}"),
        value_error("weights[0] (weight_ih_l0): expected device meta as input, got {device}"),
        torchs_or(runtime_error("input ... on meta does not fit weight_ih ... on {device}")),
    ),
    "sparse": Fault(data(lambda c, x: x.to_sparse()), runtime_error("input has layout Sparse, expected strided"),
                    Error((ValueError, RuntimeError, TypeError))),
    "no tensor": Fault(
        data(lambda c, x: c.pick(NO_TENSORS)(x)),
        type_error("expected input to be a Tensor or PackedSequence, got {type}"),
        step=type_error("LSTM.step: expected x_t to be a Tensor, got {type}"),
        function=type_error("input: expected a Tensor of shape ... or a PackedSequence, got {type}"),
        cell=type_error("expected input to be a Tensor, got {type}"),
    ),
    "rank": Fault(
        data(lambda c, x: of_rank(x, c.pick([0, 4, 5, 1 if c.entry == "layer" else 3]))), TORCH,
        packed=runtime_error("input must have 2 dimensions, got {rank}"),
        step=value_error("Expected x_t to be 1D or 2D, got {rank}D"),
        cell=TORCH,
    ),
    "rank of a function": Fault(
        data(lambda c, x: of_rank(x, c.pick([2, 1, 0, 4]))),
        function=value_error("input: expected 3 dimensions {time_batch}, features), got shape {shape}"),
    ),
    "batch axis lost": Fault(data(lambda c, x: x[0] if x.dim() == 3 else x[None]), TORCH),
    "no steps": Fault(no_steps, TORCH, function=runtime_error(EMPTY_SEQUENCE)),
    "no steps, no features": Fault(together(no_steps, data(lambda c, x: x[..., :0])), TORCH),
    "no steps, more features": Fault(together(no_steps, more_features), TORCH),
    "no steps, no rows": Fault(together(no_rows, no_steps), TORCH),
    "no steps, dtype": Fault(together(no_steps, another_dtype), TORCH),
    "dtype and features": Fault(together(another_dtype, more_features), TORCH, cell=TORCH),
}  # fmt: skip

# --- the states

HIDDEN = runtime_error("Expected hidden[{i}] size {state_3d}, got")
OF_H = runtime_error("Expected hidden[0] size ..., got {sizes}")
HX = value_error("hx[{i}] ({hc}0): expected shape {state}, got {shape}")
HX_DTYPE = runtime_error("hx[{i}] dtype ({its_dtype}) does not match input dtype ({dtype})")
HX_DEVICE = runtime_error(
    "are not at the same device, found input tensor at {device} and hidden tensor at meta"
)
PAIR = type_error("expected hx to be a tuple of two Tensors (h_0, c_0), got {kinds}")
NO_PAIR = type_error("hx: expected None or a tuple of two Tensors (h0, c0), got {kinds}")
CELL_PAIR = type_error("LSTMCell: expected hx to be a tuple of two Tensors (h, c), got {kinds}")
STEP_RANK = runtime_error("LSTM.step: expected states of shape {of_step}, got (")


def other_rank(call: Call, s: Any) -> Any:
    return of_rank(s, [s.dim() - 1, s.dim() + 1, 1][call.which // 2 % (3 if s.dim() > 1 else 2)])


def no_pair(call: Call, hx: Any) -> Any:
    return call.pick([hx[0], (hx[0], None), 5, "hx", {"h": hx[0], "c": hx[1]}, torch.stack([hx[1], hx[1]])])


def another_number(call: Call, hx: Any) -> Any:
    return call.pick([(hx[0],), [hx[0]] * 3, (), (*hx, hx[0])])


more_rows = state(lambda c, s: longer(s, -2, c.amount))
ranks = states(lambda c, hx: tuple([other_rank(c, s) for s in hx]))
STATES: dict[str, Fault] = {
    "hx: units": Fault(state(lambda c, s: resized(c, s, -1)), TORCH, HIDDEN, HIDDEN, HIDDEN, HX, TORCH),
    "hx: rows": Fault(state(lambda c, s: resized(c, s, -min(2, s.dim()))), TORCH, HIDDEN, HIDDEN, HIDDEN, HX, TORCH),
    "hx: sets": Fault(state(lambda c, s: resized(c, s, 0)), TORCH, HIDDEN, HIDDEN, HIDDEN, HX),
    "hx: rows without a batch": Fault(
        state(lambda c, s: only_if(s.dim() == 1, s).expand(len(s), len(s))),
        cell=torchs_or(runtime_error("hx[{i}] of shape {state}, got {shape}"))
    ),
    "hx: rank of one": Fault(
        state(other_rank), TORCH, HIDDEN, HIDDEN, STEP_RANK, HX,
        torchs_or(runtime_error("hx[{i}] of shape {state}, got {shape}")),
    ),
    "hx: rank of both": Fault(
        ranks, TORCH, OF_H, OF_H, runtime_error("expected states of shape {of_step}, got ({rank}-D"), cell=TORCH
    ),
    "hx: swapped": Fault(
        states(lambda c, hx: only_if(hx[0].shape != hx[1].shape, hx[::-1])), TORCH, OF_H, OF_H,
        function=value_error("hx[0] (h0): expected shape"),
    ),
    "hx: axes swapped": Fault(
        states(lambda c, hx: only_if(len(hx[0]) != hx[0].size(1), tuple([s.transpose(0, 1) for s in hx]))),
        TORCH, OF_H, OF_H,
    ),
    "hx: dtype": Fault(
        state(other_dtype), HX_DTYPE, HX_DTYPE, HX_DTYPE, HX_DTYPE,
        value_error("hx[{i}] ({hc}0): expected dtype {dtype} as input, got {its_dtype}"), torchs_or(HX_DTYPE),
    ),
    "hx: dtype of both": Fault(
        states(lambda c, hx: tuple([other_dtype(c, s) for s in hx])),
        runtime_error("hx[0] dtype ({its_dtype}) does not match ... Convert it: hx[0].to({dtype})"), cell=TORCH,
    ),
    "hx: meta": Fault(
        state(lambda c, s: s.to("meta")), HX_DEVICE, HX_DEVICE, None, HX_DEVICE,
        value_error("hx[{i}] ({hc}0): expected device {device} as input, got meta"), TORCH,
    ),
    "hx: h on meta": Fault(state(lambda c, s: s.to("meta"), 0), TORCH),
    "hx: sparse": Fault(state(lambda c, s: s.to_sparse()), Error((RuntimeError,))),
    "hx: no pair": Fault(states(no_pair), PAIR, PAIR, PAIR, PAIR, NO_PAIR, CELL_PAIR),
    "hx: another number": Fault(
        states(another_number), PAIR, PAIR, PAIR, PAIR, NO_PAIR, torchs_or(CELL_PAIR)
    ),
    "more features, hx: more rows": Fault(together(more_features, more_rows), TORCH),
    "dtype, hx: more rows": Fault(together(another_dtype, more_rows), TORCH),
    "dtype, hx: rank": Fault(together(another_dtype, ranks), TORCH),
    "no steps, hx": Fault(no_steps, TORCH),
    "no steps, hx: more rows": Fault(together(no_steps, more_rows), TORCH),
    "no rows, hx: one row": Fault(
        together(no_rows, states(lambda c, hx: (hx[0][:, :1], hx[1][:, :0]))), TORCH
    ),
}  # fmt: skip
STATES = {name: fault._replace(needs="hx") for name, fault in STATES.items()}

# --- the weights

OF_DTYPES = Error((RuntimeError, ValueError), ("dtype", "Double"))
SHAPE = value_error(
    "weights[{place}] ({name}): expected shape {weight_shape}, got {shape}",
    "weights[1] (weight_hh_l0): expected shape (4 * hidden, state), got {shape}",
    "weights[1] (weight_hh_l0): expected shape {weight_shape} without weight_hr, got {shape}",
)
FLAT = type_error("weights: expected a flat sequence of Tensors")
OF_NORM = Error((ValueError, RuntimeError), ("ln_", "norm", "gain_", "bias_c"))
NORM_WEIGHTS = "norm_weights[{place}] ({name}): expected "


def no_projection(call: Call, w: Any) -> Any:
    """The function takes the size of a projected state from ``weight_hh_l0``."""
    of_layers = call.entry != "function"
    return only_if(of_layers or call.weight_name != "weight_hh_l0" or not call.module.proj_size, w)


def weights_of(change: Any) -> Any:
    """Another call of a function; the text says how many weights are expected."""

    def apply(call: Call) -> int:
        a = call.arguments
        change(a)
        sets = a["num_layers"] * (1 + a["bidirectional"])
        return sets * (4 if a["bias"] else 2)

    return apply


def norm_weights(change: Any) -> Any:
    def apply(call: Call) -> Any:
        given = call.arguments["norm_weights"]
        call.weight_place, call.weight_name = (3, "bias_c") if call.module.bias else (2, "gain_c")
        call.arguments["norm_weights"] = changed = change(list(given), call.weight_place)
        return changed[call.weight_place] if len(changed) == len(given) else changed

    return apply


COUNT = value_error("weights: expected {got} tensors (")
WEIGHTS: dict[str, Fault] = {
    "weight: rows": Fault(weight(lambda c, w: resized(c, w, 0)), WRONG, WRONG, function=SHAPE),
    "weight: columns": Fault(
        weight(lambda c, w: resized(c, no_projection(c, w), -1)), WRONG, WRONG, function=SHAPE
    ),
    "weight: rank": Fault(weight(lambda c, w: w[None]), WRONG, WRONG, function=SHAPE),
    "weight: dtype": Fault(
        weight(other_dtype), OF_DTYPES, OF_DTYPES,
        function=value_error("weights[{place}] ({name}): expected dtype {dtype} as input, got {its_dtype}"),
    ),
    "weight: meta": Fault(
        weight(lambda c, w: w.to("meta")), runtime_error("on meta", "at meta"), WRONG,
        function=value_error("weights[{place}] ({name}): expected device {device} as input, got meta"),
    ),
    "weight: sparse": Fault(weight(lambda c, w: w.to_sparse()), WRONG, WRONG),
    "weight: none": Fault(
        weight(lambda c, w: None, "weight"), type_error(), type_error(), step=type_error(), function=FLAT
    ),
    "bias: none": Fault(weight(lambda c, w: None, "bias"), type_error(), type_error(), function=FLAT),
    "weight: no parameter": Fault(
        lambda c: setattr(c.module, "weight_hh_l0", c.pick([torch.zeros(16, 4), 3, "text", nn.LSTM(3, 4)])), TORCH
    ),
    "weight: rows of the cell": Fault(weight(lambda c, w: w[:-4], "weight_ih"), cell=TORCH),
    "weight: columns of the cell": Fault(weight(lambda c, w: longer(w, -1, 1), "weight"), cell=TORCH),
    "weight: dtype of the cell": Fault(weight(other_dtype, "weight_ih"), cell=TORCH),
    "weight: meta in the cell": Fault(
        weight(lambda c, w: w.to("meta"), "weight_ih"),
        cell=runtime_error("input ... on {device} does not fit weight_ih ... on meta"),
    ),
    "num_layers of another layer": Fault(
        lambda c: setattr(only_if(c.module.num_layers > 1, c.module), "num_layers", 1),
        runtime_error("num_layers is 1, but the module was made with {layers} layers")
    ),
    "function: one weight": Fault(
        weights_of(lambda a: a.update(weights=a["weights"][:1])),
        function=value_error("weights: expected {got} tensors (... with a projection) ..., got 1"),
    ),
    "function: another bias": Fault(weights_of(lambda a: a.update(bias=not a["bias"])), function=COUNT),
    "function: another num_layers": Fault(weights_of(lambda a: a.update(num_layers=4)), function=COUNT),
    "function: another direction": Fault(
        weights_of(lambda a: a.update(bidirectional=not a["bidirectional"])), function=COUNT
    ),
    "function: no weights": Fault(one_of("weights", [[None] * 4, torch.zeros(4, 4)]), function=FLAT),
    "function: dropout": Fault(
        one_of("dropout", [2, -0.1, math.nan]),
        function=value_error("dropout: expected a number in range [0, 1], got {got}"),
    ),
    "function: num_layers": Fault(
        one_of("num_layers", [0, -1]), function=value_error("num_layers: expected at least 1, got {got}")
    ),
}  # fmt: skip
NORM: dict[str, Fault] = {
    "ln: size": Fault(weight(lambda c, w: resized(c, w, 0), "ln_"), OF_NORM, OF_NORM),
    "ln: of one number": Fault(
        weight(lambda c, w: w[:0] if w.numel() == 1 else w[:1], "ln_"), OF_NORM, OF_NORM
    ),
    "ln: rank": Fault(weight(lambda c, w: w[None], "ln_"), OF_NORM, OF_NORM),
    "ln: dtype": Fault(weight(other_dtype, "ln_"), OF_NORM, OF_NORM),
    "ln: meta": Fault(weight(lambda c, w: w.to("meta"), "ln_"), OF_NORM, OF_NORM),
    "ln: none": Fault(
        weight(lambda c, w: None, "ln_"), type_error("{name} is None"), type_error("{name} is None")
    ),
    "ln: another weight is none": Fault(
        weight(lambda c, w: None, ("weight", "bias")), type_error("one of the weights is None", "{name} is None")
    ),
    "norm_weights: too few": Fault(
        norm_weights(lambda w, k: w[:-1]),
        function=value_error("norm_weights: expected ... tensors (gain_ih, ...), got {count}"),
    ),
    "norm_weights: a Tensor": Fault(
        norm_weights(lambda w, k: torch.stack(w[:1])),
        function=type_error("norm_weights: expected None or a flat sequence of Tensors"),
    ),
    "norm_weights: shape": Fault(
        norm_weights(lambda w, k: [*w[:k], longer(w[k], 0, 1), *w[k + 1 :]]),
        function=value_error(NORM_WEIGHTS + "shape ({H},), got {shape}"),
    ),
    "norm_weights: dtype": Fault(
        norm_weights(lambda w, k: [*w[:k], w[k].half(), *w[k + 1 :]]),
        function=value_error(NORM_WEIGHTS + "dtype {dtype} as input, got torch.float16"),
    ),
}  # fmt: skip
NORM = {name: fault._replace(needs="layer_norm") for name, fault in NORM.items()}

# --- tensors of inference mode, which may not be saved for a backward pass


@torch.inference_mode()
def of_inference(call: Call) -> None:
    part = call.pick(["input", "hx", "weights"])
    if part == "input":
        call.data = call.data.clone()
    elif part == "hx":
        call.hx = tuple([s.clone() for s in call.hx])
    else:
        for name, p in list(call.module.named_parameters()):
            setattr(call.module, name, nn.Parameter(p.clone()))


INFERENCE = {"of inference mode": Fault(of_inference, TORCH, needs="hx")}

# --- packed and nested sequences

SIZES = value_error("batch_sizes")
# The first of them is the number of sequences, of which there may be states.
OF_SIZES = Error((ValueError, RuntimeError), ("batch_sizes", "Expected hidden[0] size"))
MORE_ROWS = value_error("sum of batch_sizes is more than the {N} rows")
ROWS_LEFT = value_error("sum of batch_sizes is {N}, expected the number of rows of the input, {count}")
NO_PERMUTATION = value_error("permutations of 0 ... {last} that undo each other")


def sequences(call: Call) -> list[Any]:
    return [x.detach() for x in call.input.unbind()]


def nested_as(change: Any) -> Any:
    return lambda call: setattr(call, "input", change(call))


PACKED: dict[str, Fault] = {
    "data: rows missing": Fault(
        data(lambda c, x: only_if(len(x) > 1, x[:-1])), equations=SIZES,
        packed=value_error("sum of batch_sizes is more than the {count} rows"),
    ),
    "data: rows too many": Fault(
        data(lambda c, x: longer(x, 0, c.amount)), packed=ROWS_LEFT, equations=SIZES
    ),
    "batch_sizes: larger": Fault(packed(sizes=lambda c, n: at(c, n, lambda k: k + c.amount)), packed=OF_SIZES),
    "batch_sizes: smaller": Fault(packed(sizes=lambda c, n: at(c, n, lambda k: k - c.amount)), packed=OF_SIZES),
    "batch_sizes: growing": Fault(
        packed(sizes=lambda c, n: torch.cat([n[:1], n[:1] + 1])), equations=SIZES,
        packed=value_error("batch_sizes[1] is ..., more than the {B} before it"),
    ),
    "batch_sizes: zero": Fault(
        packed(sizes=lambda c, n: torch.cat([n, n[:1] * 0])), equations=SIZES,
        packed=value_error("batch_sizes[{T}] is 0, expected at least 1"),
    ),
    "batch_sizes: zero inside": Fault(packed(sizes=lambda c, n: at(c, n, lambda k: 0)), packed=OF_SIZES),
    "batch_sizes: negative": Fault(packed(sizes=lambda c, n: at(c, n, lambda k: -k)), packed=OF_SIZES),
    "batch_sizes: negative, of the same sum": Fault(
        packed(sizes=lambda c, n: only_if(c.hx is None, torch.tensor([int(n.sum()) + 2, -2]))),
        packed=MORE_ROWS, equations=SIZES,
    ),
    "batch_sizes: huge": Fault(packed(sizes=lambda c, n: at(c, n, lambda k: 2**62)), packed=OF_SIZES),
    "batch_sizes: turned round": Fault(packed(sizes=lambda c, n: only_if(n[0] != n[-1], n.flip(0))), packed=OF_SIZES),
    "batch_sizes: longer": Fault(packed(sizes=lambda c, n: torch.cat([n, n[-1:]])), packed=MORE_ROWS),
    "batch_sizes: shorter": Fault(packed(sizes=lambda c, n: n[:-1]), packed=OF_SIZES),
    "batch_sizes: empty": Fault(
        packed(sizes=lambda c, n: n[:0]), packed=value_error("batch_sizes: expected at least one time step, got none")
    ),
    "batch_sizes: rank": Fault(
        packed(sizes=lambda c, n: c.pick([n[None], n[0]])),
        packed=type_error("batch_sizes: expected one dimension of int64 on the CPU"),
    ),
    "batch_sizes: dtype": Fault(
        packed(sizes=lambda c, n: n.to(c.pick([torch.int32, torch.float32, torch.bool]))),
        packed=type_error("batch_sizes: expected one dimension of int64 on the CPU, got {its_dtype}"),
    ),
    "indices: out of range": Fault(
        packed(both=lambda c, n: at(c, n, lambda k: k + len(n) + c.amount)), packed=NO_PERMUTATION
    ),
    "indices: negative": Fault(packed(both=lambda c, n: at(c, n, lambda k: -1 - k)), packed=NO_PERMUTATION),
    "indices: two of one": Fault(
        packed(order=lambda c, n: only_if(len(n) > 1, torch.cat([n[:-1], n[:1]]))), packed=NO_PERMUTATION
    ),
    "indices: rolled twice": Fault(packed(both=lambda c, n: only_if(len(n) > 2, n.roll(1))), packed=NO_PERMUTATION),
    "indices: dtype": Fault(packed(both=lambda c, n: n.double()), packed=NO_PERMUTATION),
    "indices: too few": Fault(
        packed(order=lambda c, n: n[:-1]), packed=value_error("sorted_indices: expected shape ({B},)")
    ),
    "indices: too many": Fault(
        packed(both=lambda c, n: torch.cat([n, n])), packed=value_error("sorted_indices: expected shape ({B},)")
    ),
}  # fmt: skip
RAGGED = value_error(
    "input: expected a nested tensor (batch, time, features) with ragged time, got shape ({B}, "
)
NESTED: dict[str, Fault] = {
    "nested: strided": Fault(
        nested_as(lambda c: torch.nested.nested_tensor(sequences(c), layout=torch.strided)),
        nested=value_error("input: expected a nested tensor of layout torch.jagged, got torch.strided"),
    ),
    "nested: without features": Fault(nested_as(lambda c: c.like_input(c.data.detach()[:, 0])), nested=RAGGED),
    "nested: ragged features": Fault(nested_as(lambda c: c.input.transpose(1, 2)), nested=RAGGED),
    "nested: no steps": Fault(
        nested_as(lambda c: torch.nested.as_nested_tensor([x[:0] for x in sequences(c)], layout=torch.jagged)),
        nested=runtime_error(EMPTY_SEQUENCE),
    ),
}  # fmt: skip

# ---

FAULTS: dict[str, Fault] = INPUT | STATES | WEIGHTS | NORM | INFERENCE | PACKED | NESTED | OPTIONS
