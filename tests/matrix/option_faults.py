"""The rows of faults.py for the arguments that ``torch.nn.LSTM`` has not, and for those of the constructors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lstm_ext.layer.activations import ACTIVATIONS

from .broken import (
    TORCH,
    Call,
    Error,
    Fault,
    argument,
    at,
    of_rank,
    one_of,
    only_if,
    other_dtype,
    resized,
    runtime_error,
    together,
    type_error,
    value_error,
)

# --- ways to break


def good_lengths(call: Call) -> list[int]:
    T, B = call.input.size(call.time_axis), call.batch[0] if call.batch else 1
    return [(call.which + b) % (T + 1) for b in range(B)]


def lengths(change: Callable[[Call, list[int]], Any]) -> Callable[[Call], Any]:
    def apply(call: Call) -> Any:
        call.arguments.pop("mask", None)
        return argument("lengths", lambda c: change(c, good_lengths(c)))(call)

    return apply


def a_length(value: Callable[[Call, int], Any], as_tensor: bool = False) -> Callable[[Call], Any]:
    """That of the last sequence."""

    def apply(call: Call) -> None:
        n: list[Any] = good_lengths(call)
        n[-1] = value(call, call.input.size(call.time_axis))
        lengths(lambda c, _: torch.tensor(n) if as_tensor else n)(call)
        call.got = n[-1]

    return apply


def mask(change: Callable[[Call, Tensor], Any]) -> Callable[[Call], Any]:
    def apply(call: Call) -> Any:
        call.arguments.pop("lengths", None)
        good = torch.ones(call.data.shape[:-1], dtype=torch.bool)
        return argument("mask", lambda c: change(c, good))(call)

    return apply


def flags(call: Call) -> Tensor:
    generator = torch.Generator().manual_seed(call.which)
    return torch.rand(call.data.shape[:-1], generator=generator) < 0.5


def resets(change: Callable[[Call, Tensor], Any]) -> Callable[[Call], Any]:
    """Changes the rows."""

    def apply(call: Call) -> Any:
        changed = change(call, flags(call))
        call.arguments["resets"] = call.like_input(changed)
        return changed

    return apply


def whole_resets(change: Callable[[Call, Any], Any]) -> Callable[[Call], Any]:
    return argument("resets", lambda call: change(call, call.like_input(flags(call))))


def reset_states(change: Callable[[Call, list[Tensor]], Any]) -> Callable[[Call], Any]:
    def apply(call: Call) -> Any:
        call.arguments["resets"] = call.like_input(flags(call))
        pair = [call.data.new_zeros(shape) for shape in call.state_shapes]
        return argument("reset_state", lambda c: change(c, pair))(call)

    return apply


def reset_state(change: Callable[[Call, Tensor], Any]) -> Callable[[Call], Any]:
    """Changes one of the two."""

    def apply(call: Call) -> Any:
        i = call.pick([0, 1])
        found = reset_states(lambda c, p: [change(c, s) if k == i else s for k, s in enumerate(p)])(call)
        return found[i]

    return apply


# --- arguments of calls: lengths, mask, resets, reset_state, what is returned

LENGTH = value_error("lengths: expected numbers from 0 to {T}, ... got {got} for sequence {last}")
LENGTHS_SHAPE = value_error("lengths: expected shape ({B},), one a sequence, got {shape}")
COUNT_OF = value_error("lengths: expected {B} numbers, one a sequence, got {count}")
MASK_SHAPE = value_error("mask: expected shape {rows} or {rows_1}, that of the input ..., got {shape}")
RESETS_SHAPE = value_error("resets: expected shape {rows} or {rows_1}, that of the input ..., got {shape}")
RESETS_ROWS = value_error("resets: expected data of shape {rows} or {rows_1}, ..., got {shape}")
RESETS_DTYPE = value_error("resets: expected dtype torch.bool, or ... got {its_dtype}")
RESETS_VALUES = value_error("resets: expected the values 0 and 1, got {got}")
RESETS_DEVICE = value_error("resets: expected device {device} as input, got meta")
OF_PACKED = "expected None for a PackedSequence, which has its own lengths, got {kind}"
OF_NESTED = "expected None for a nested tensor, which has its own lengths, got {kind}"
ONE = "reset_state[{i}] ({hc}): expected "
STATE_SHAPE = value_error(ONE + "shape {state}, that of hx, got {shape}")
STATE_DTYPE = value_error(ONE + "dtype {dtype} as input, got {its_dtype}")
NO_FLAGS = [1, 0, "yes", None, 1.0, [True]]


def everywhere(break_: Any, error: Error, of_packed: Error | None = None) -> Fault:
    """Of a call with a tensor or a packed sequence, and of a function."""
    return Fault(break_, error, of_packed or error, function=error)


def dense(break_: Any, error: Error) -> Fault:
    return Fault(break_, error, function=error)


def a_rank(call: Call, x: Any) -> Any:
    """None of the ranks that flags may have."""
    return of_rank(x, call.pick([0, *range(x.dim() + 2, 6)]))


def another_order(call: Call, r: Any) -> Any:
    """For the same sequences in another order."""
    n = int(r.batch_sizes[0])
    only_if(n > 1)
    order = (torch.arange(n) if r.sorted_indices is None else r.sorted_indices).roll(1)
    return r._replace(sorted_indices=order, unsorted_indices=order.argsort())


def one_sequence_more(call: Call, r: Any) -> Any:
    n = int(r.batch_sizes[0]) + 1
    return r._replace(sorted_indices=torch.arange(n), unsorted_indices=torch.arange(n))


def another_size(call: Call, n: Any) -> Any:
    return call.pick([torch.cat([n, n[-1:]]), n[:-1], n + 1, n[None]])


def turned_lengths(call: Call, resets: Any) -> Any:
    """Nested flags of sequences of other lengths."""
    found = [x.detach() for x in resets.unbind()]
    return torch.nested.as_nested_tensor([*found[1:], torch.cat([found[0]] * 2)], layout=torch.jagged)


NO_RESETS = [0.5, 2.0, -1.0, math.nan, math.inf, 1e-30]
FLAGS_OF_LENGTHS = [torch.float32, torch.bool, torch.complex64, torch.float64]
CALLS: dict[str, Fault] = {
    "lengths: a number": dense(a_length(lambda c, T: c.pick([T + 1, T + 7, 2**63, -1, -5])), LENGTH),
    "lengths: a number of a tensor": dense(a_length(lambda c, T: c.pick([T + 1, 2**62, -1, -5]), True), LENGTH),
    "lengths: no integers": dense(
        a_length(lambda c, T: c.pick([1.0, True, "1", None, torch.tensor(1), math.nan])),
        type_error("lengths: expected integers, got {type}"),
    ),
    "lengths: too many": dense(lengths(lambda c, n: n + [1] * c.amount), COUNT_OF),
    "lengths: too few": dense(lengths(lambda c, n: n[:-1]), COUNT_OF),
    "lengths: too many, tensor": dense(lengths(lambda c, n: torch.tensor(n + [1] * c.amount)), LENGTHS_SHAPE),
    "lengths: rank": dense(lengths(lambda c, n: torch.tensor(n)[:, None]), LENGTHS_SHAPE),
    "lengths: dtype": dense(
        lengths(lambda c, n: torch.tensor(n).to(c.pick(FLAGS_OF_LENGTHS))),
        value_error("lengths: expected an integer dtype, got {its_dtype}"),
    ),
    "lengths: type": dense(
        lengths(lambda c, n: c.pick(["3", 3 if c.batch else 3.0, {3}, {"lengths": n}, b"3", math.inf])),
        type_error("lengths: expected a list of integers or a Tensor, got {type}")
    ),
    "lengths: a number for one sequence": Fault(
        argument("lengths", lambda c: [only_if(not c.batch), c.input.size(0) + 1][1]), LENGTH
    ),
    "lengths: meta": dense(
        lengths(lambda c, n: torch.tensor(n).to("meta")),
        value_error("lengths: expected a device with numbers, as input on {device}, got meta"),
    ),
    "mask: steps or rows": dense(mask(lambda c, m: resized(c, m, c.which % m.dim())), MASK_SHAPE),
    "mask: rank": dense(mask(a_rank), MASK_SHAPE),
    "mask: last axis": dense(mask(lambda c, m: torch.stack([m] * (c.amount + 1), -1)), MASK_SHAPE),
    "mask: dtype": dense(
        mask(lambda c, m: m.to(c.pick([torch.float32, torch.uint8, torch.int64, torch.complex64]))),
        value_error("mask: expected dtype torch.bool, got {its_dtype}"),
    ),
    "mask: type": dense(
        mask(lambda c, m: c.pick([m.tolist(), True, "mask", m.numpy()])),
        type_error("mask: expected a Tensor, got {type}"),
    ),
    "mask: meta": dense(
        mask(lambda c, m: m.to("meta")),
        value_error("mask: expected a device with numbers, as input on {device}, got meta"),
    ),
    "mask: and lengths": dense(
        together(mask(lambda c, m: m), lambda c: c.arguments.update(lengths=good_lengths(c))),
        value_error("mask: expected without lengths, got both"),
    ),
    "lengths of packed data": Fault(
        argument("lengths", lambda c: c.pick([torch.tensor([1]), [1], 1, "1"])),
        packed=value_error("lengths: " + OF_PACKED), nested=value_error("lengths: " + OF_NESTED),
    ),
    "mask of packed data": Fault(
        argument("mask", lambda c: c.pick([flags(c), True])),
        packed=value_error("mask: " + OF_PACKED), nested=value_error("mask: " + OF_NESTED),
    ),
    "resets: steps or rows": everywhere(
        resets(lambda c, r: resized(c, r, c.which % r.dim())), RESETS_SHAPE, RESETS_ROWS
    ),
    "resets: rank": everywhere(resets(a_rank), RESETS_SHAPE, RESETS_ROWS),
    "resets: last axis": everywhere(
        resets(lambda c, r: torch.stack([r] * (c.amount + 1), -1)), RESETS_SHAPE, RESETS_ROWS
    ),
    "resets: dtype": everywhere(
        resets(lambda c, r: r.to(c.pick([torch.int64, torch.uint8, torch.int32, torch.complex64]))), RESETS_DTYPE
    ),
    "resets: values": everywhere(
        together(
            resets(lambda c, r: at(c, r.float(), lambda _: c.pick(NO_RESETS))),
            lambda c: torch.tensor(c.pick(NO_RESETS)).item(),
        ),
        RESETS_VALUES,
    ),
    "resets: meta": everywhere(resets(lambda c, r: r.to("meta")), RESETS_DEVICE),
    "resets: type": Fault(
        argument("resets", lambda c: c.pick([flags(c).tolist(), True, "resets", flags(c).numpy(), 1.0])),
        type_error("resets: expected a Tensor, got {type}"),
        type_error("resets: expected a PackedSequence, as the input is one, got {kind}"),
        type_error("resets: expected a jagged nested tensor, as the input is one, got {type}"),
        function=type_error("resets: expected a Tensor, got {type}"),
    ),
    "resets: rows alone": Fault(
        whole_resets(lambda c, r: flags(c)),
        packed=type_error("resets: expected a PackedSequence, as the input is one, got {kind}"),
        nested=type_error("resets: expected a jagged nested tensor, as the input is one, got Tensor"),
    ),
    "resets: packed": dense(
        whole_resets(lambda c, r: PackedSequence(r.flatten(), torch.tensor([1] * r.numel()))),
        type_error("resets: expected a Tensor, as the input is one, got PackedSequence"),
    ),
    "resets: batch_sizes": Fault(
        whole_resets(lambda c, r: r._replace(batch_sizes=another_size(c, r.batch_sizes))),
        packed=value_error("resets: expected the batch_sizes of the input, {batch_sizes}, got"),
    ),
    "resets: order": Fault(
        whole_resets(another_order),
        packed=value_error("resets: expected the sorted_indices of the input, {order}, got {its_order}"),
    ),
    "resets: one sequence more": Fault(
        whole_resets(one_sequence_more),
        packed=value_error("resets: expected the sorted_indices of the input, ... of shape ({B},), got"),
    ),
    "resets: lengths": Fault(
        whole_resets(turned_lengths),
        nested=value_error("resets: expected one flag for each step of the input's sequences, got other lengths"),
    ),
    "reset_state: no resets": everywhere(
        together(reset_states(lambda c, p: p), lambda c: c.arguments.pop("resets")),
        value_error("reset_state: expected together with resets, got resets=None"),
    ),
    "reset_state: no pair": everywhere(
        reset_states(
            lambda c, p: c.pick([p[0], p[:1], [*p, p[0]], (p[0], None), 5, "state", {"h": p[0]}, (), [[0.0], [0.0]]])
        ),
        type_error("reset_state: expected a tuple of two Tensors (h, c), got {kinds}")
    ),
    "reset_state: units": everywhere(reset_state(lambda c, s: resized(c, s, -1)), STATE_SHAPE),
    "reset_state: sets": everywhere(reset_state(lambda c, s: resized(c, s, 0)), STATE_SHAPE),
    "reset_state: rank": everywhere(reset_state(lambda c, s: s[None] if c.which % 4 > 1 else s[0]), STATE_SHAPE),
    "reset_state: of the other rank": everywhere(
        reset_states(lambda c, p: [s[:, 0] if s.dim() == 3 else s[:, None] for s in p]),
        value_error("reset_state[0] (h): expected shape"),
    ),
    "reset_state: dtype": everywhere(reset_state(other_dtype), STATE_DTYPE),
    "reset_state: meta": everywhere(
        reset_state(lambda c, s: s.to("meta")), value_error(ONE + "device {device} as input, got meta")
    ),
    "return_cell_states": everywhere(
        one_of("return_cell_states", NO_FLAGS), type_error("return_cell_states should be a bool, got {repr}")
    ),
    "return_gates": everywhere(
        one_of("return_gates", NO_FLAGS), type_error("return_gates should be a bool, got {repr}")
    ),
}  # fmt: skip

# --- arguments of the constructor, which are attributes of the layer or keywords of the function, too

RATES = [-0.1, 1.5, math.nan, math.inf, True, None, "0.5", 1j]
CLIPS = [0, 0.0, -0.5, math.inf, math.nan, True, "1", [1.0]]
ONE_FUNCTION = f": expected one of identity, {', '.join(ACTIVATIONS)}, got {{repr}}"


def value(name: str, values: list[Any], error: Error) -> Fault:
    return Fault(one_of(name, values), error, function=error, constructor=error)


def of_layers(name: str, values: list[Any], error: Error) -> Fault:
    """Of an option that is no keyword of the function."""
    return value(name, values, error)._replace(function=None)


def functions(title: str, text: str, *values: Any) -> dict[str, Fault]:
    """As function of the gates and of the cell."""
    return {
        f"{name}: {title}": value(name, list(values), value_error(name + text))
        for name in ("gate_activation", "cell_activation")
    }


def exclusive(text: str, **values: Any) -> Fault:
    def apply(call: Call) -> None:
        only_if(call.entry != "layer" or not call.module.layer_norm)
        for name, v in values.items():
            argument(name, lambda c, v=v: v)(call)

    return Fault(apply, value_error(text), constructor=value_error(text))


def late(name: str) -> Fault:
    def apply(call: Call) -> None:
        only_if(not (call.module.layer_norm or call.module.peephole or call.module.coupled_gates))
        setattr(call.module, name, True)

    return Fault(apply, value_error(f"{name}: expected from the beginning, since it adds parameters"))


def unknown(name: str, near: str = "", entry: str = "function") -> Fault:
    """A keyword that is nowhere; the error names the nearest."""
    text = f"unexpected keyword argument '{name}'" + (f"; did you mean '{near}'" if near else "")

    def apply(call: Call) -> None:
        only_if(call.which % 2 == 0)  # Python itself speaks for the reference
        call.arguments[name] = 1

    return Fault(apply, **{entry: type_error(text)})


def in_training(call: Call) -> str:
    """What draws random numbers."""
    name = call.pick(["dropout", "recurrent_dropout", "weight_dropout", "zoneout", "zoneout of c"])
    only_if(name != "dropout" or call.module.num_layers > 1)
    setattr(call.module.train(), name.split()[0], (0, 0.5) if "of c" in name else 0.5)
    return name.split()[0]


VALUES: dict[str, Fault] = {
    **{
        f"{name}: no rate": value(name, RATES, value_error(name + " should be a number in range [0, 1], got {repr}"))
        for name in ("recurrent_dropout", "weight_dropout", "zoneout")
    },
    "zoneout: of h": value("zoneout", [("a", 0), (2, 0), (math.nan, 0), (True, 0.1)],
                           value_error("zoneout[0] (for h) should be a number in range [0, 1], got {first}")),
    "zoneout: of c": value("zoneout", [(0.1, 2), (0.1, -0.1), (0.1, None)],
                           value_error("zoneout[1] (for c) should be a number in range [0, 1], got {second}")),
    "zoneout: no pair": value("zoneout", [(0.1, 0.1, 0.1), (0.1,), ()],
                              value_error("zoneout should be a number, for h, or a pair of numbers, ... got {repr}")),
    **{
        f"{name}: no flag": value(name, NO_FLAGS, type_error(name + " should be a bool, got {repr}"))
        for name in ("recompute", "coupled_gates")
    },
    **{
        f"{name}: no flag": of_layers(name, NO_FLAGS, type_error(name + " should be a bool, got {repr}"))
        for name in ("peephole",)
    },
    "layer_norm: no kind": of_layers("layer_norm", [*NO_FLAGS, "Cell", ["cell"]],
                                     type_error('layer_norm should be a bool or "cell", got {repr}')),
    **{
        f"{name}: no bound": value(
            name, CLIPS, value_error(name + " should be a positive finite number or None, got {repr}")
        )
        for name in ("cell_clip", "preactivation_clip")
    },
    **functions("unknown", ONE_FUNCTION, None, 1, True, "sigmoids", "gelu", "", ()),
    **functions("too many numbers", ": expected relu with at most 0 finite numbers, got {repr}", ("relu", 1.0)),
    **functions("numbers of elu", ": expected elu with at most 1 finite numbers, got {repr}",
                ("elu", 1.0, 2.0), ("elu", math.nan)),
    "gate_activation: text": value("gate_activation", [("elu", "1")], value_error("elu with at most 1 finite numbers")),
    **functions("negative", ": expected the first number of elu to be at least 0, got {repr}", ("elu", -1.0)),
    **functions("zero", ": expected the first number of scaled_tanh to be positive", ("scaled_tanh", 0.0)),
    "cell_activation: of c": value("cell_activation", [("tanh", "gelu")],
                                   value_error("cell_activation[1]: expected one of identity, ... got 'gelu'")),
    "forget_bias: no number": of_layers("forget_bias", ["1", math.inf, math.nan, True, [1.0], 1j],
                                        value_error("forget_bias should be a finite number or None, got {repr}")),
    "forget_bias without biases": Fault(
        lambda c: c.arguments.update(forget_bias=1.0, bias=False),
        constructor=value_error("forget_bias needs a layer with biases, got bias=False"),
    ),
    "forget_bias and coupled_gates": exclusive(
        "forget_bias: has no effect together with coupled_gates=True", coupled_gates=True, forget_bias=1.0
    ),
    "layer_norm and peephole": exclusive(
        "peephole (peephole_weights): not available together with layer_norm", layer_norm=True, peephole=True
    )._replace(layer=None),
    "layer_norm and coupled_gates": exclusive(
        "coupled_gates: not available together with layer_norm", layer_norm=True, coupled_gates=True
    )._replace(layer=None),
    "layer_norm: late": late("layer_norm"),
    "layer_norm without norm_weights": Fault(
        lambda c: c.arguments.update(layer_norm="cell", norm_weights=None),
        function=value_error("layer_norm: expected norm_weights with it, got layer_norm='cell' alone"),
    ),
    "peephole: late": late("peephole"),
    "unknown: zoneot": unknown("zoneot", "zoneout", "constructor"),
    "unknown: hiden_size": unknown("hiden_size", "hidden_size", "constructor"),
    "unknown: mode": unknown("mode", entry="constructor"),
    "unknown: length": unknown("length", "lengths"),
    "unknown: norm_weight": unknown("norm_weight", "norm_weights"),
    "unknown: forget_bias": unknown("forget_bias"),
    "step: two directions": Fault(
        lambda c: None, step=runtime_error("LSTM.step: not available for a bidirectional layer"), needs="bidirectional"
    ),
    "step: in training": Fault(
        in_training, step=runtime_error("LSTM.step: not available in training mode with {got} > 0: call eval()")
    ),
}  # fmt: skip

# What the constructors take and refuse as those of torch.nn do, with the same warnings.
AS_TORCH: dict[str, list[Any]] = {
    "dropout": [-0.1, 1.5, True, "a", 0.5, 1, None, math.nan, np.float64(0.5)],
    "num_layers": [0, -1, 1.5, "a", None, True, np.int64(2)],
    "proj_size": [-1, 4, 5, "a", None, 2.0, True, np.int64(2), 2],
    "batch_first": [1, np.bool_(False), "yes"],
    "bidirectional": [1, 2, None],
}
AS_TORCH_TOO: dict[str, list[Any]] = {
    "input_size": [0, -1, -3, 1.0, 3.0, "a", np.int64(3)],
    "hidden_size": [0, -3, -4, 2.5, True, None, np.int64(3)],
    "bias": [1, None, np.bool_(True)],
    "dtype": [torch.int32, "float", int],
    "device": ["nowhere"],
}
CONSTRUCTORS = {f"constructor: {n}": Fault(one_of(n, v), constructor=TORCH) for n, v in AS_TORCH.items()}
CONSTRUCTORS |= {
    f"constructor: {n}": Fault(one_of(n, v), constructor=TORCH, cell_constructor=TORCH)
    for n, v in AS_TORCH_TOO.items()
}
CONSTRUCTORS["constructor: too few"] = Fault(lambda c: c.arguments.pop("hidden_size"), cell_constructor=TORCH)

OPTIONS: dict[str, Fault] = CALLS | VALUES | CONSTRUCTORS
