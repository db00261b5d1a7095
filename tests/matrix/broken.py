"""How the arguments of an entry are broken, and what is expected of it then: what the rows of faults.py are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


class DoesNotApply(Exception):
    """The fault would leave this call as good as it was."""


def only_if(condition: Any, value: Any = None) -> Any:
    if not condition:
        raise DoesNotApply
    return value


@dataclasses.dataclass
class Call:
    """A module and the arguments of an entry, to be broken in place."""

    entry: str  # a column of Fault
    module: Any
    input: Any = None
    hx: Any = None
    # The others, or those of a constructor.
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    which: int = 0  # of the variants of a fault
    variants: int = 1  # so many were seen while the call was broken
    weight_name: str = ""  # of the broken weight, and its place among all
    weight_place: int = 0
    weight_shape: tuple[int, ...] = ()
    got: Any = None  # what the text names instead of what it expects

    def say(self, got: Any) -> None:
        self.got = self.got if got is None else got

    def pick(self, values: Sequence[Any]) -> Any:
        self.variants = max(self.variants, len(values))
        return values[self.which % len(values)]

    @property
    def amount(self) -> int:
        return 1 + self.which // 4 % 3

    @property
    def data(self) -> Any:
        """The rows of the input, or the input."""
        if isinstance(self.input, PackedSequence):
            return self.input.data
        return self.input.values() if self.input.is_nested else self.input

    @data.setter
    def data(self, value: Any) -> None:
        self.input = self.like_input(value)

    def like_input(self, rows: Any) -> Any:
        """In the layout of the input."""
        if isinstance(self.input, PackedSequence):
            return self.input._replace(data=rows)
        return jagged(rows, self.input.offsets()) if self.input.is_nested else rows

    @property
    def batch(self) -> tuple[int, ...]:
        """(B,), or () without a batch."""
        if self.entry in ("packed", "nested", "equations"):
            return (self.input.size(0) if self.entry == "nested" else int(self.input.batch_sizes[0]),)
        if self.entry in ("step", "cell"):
            return tuple(self.input.shape[:-1])
        return () if self.input.dim() == 2 else (self.input.size(0 if self.module.batch_first else 1),)

    @property
    def time_axis(self) -> int:
        return 1 if getattr(self.module, "batch_first", False) and self.input.dim() == 3 else 0

    @property
    def time(self) -> int:
        x = self.input
        return len(x.batch_sizes) if isinstance(x, PackedSequence) else x.size(self.time_axis)

    @property
    def state_shapes(self) -> list[tuple[int, ...]]:
        m = self.module
        if self.entry == "cell":
            return [(*self.batch, m.hidden_size)] * 2
        sets = m.num_layers * (2 if m.bidirectional else 1)
        return [(sets, *self.batch, n) for n in (m.proj_size or m.hidden_size, m.hidden_size)]

    def weight(self, change: Callable[[Tensor], Any], prefix: str = "") -> Any:
        """Changes one of the weights."""
        names = [name for name, _ in self.module.named_parameters()]
        if self.entry == "function":
            names = [n for n in names if n.startswith(("weight_ih", "weight_hh", "weight_hr", "bias_"))]
        self.weight_name = self.pick([n for n in names if n.startswith(prefix)] or names)
        self.weight_place = names.index(self.weight_name)
        weight = getattr(self.module, self.weight_name).detach()
        self.weight_shape = tuple(weight.shape)
        changed = change(weight)
        if self.entry == "function":
            weights = self.arguments["weights"] = list(self.arguments["weights"])
            weights[self.weight_place] = changed
        else:
            value = None if changed is None else nn.Parameter(changed, requires_grad=False)
            setattr(self.module, self.weight_name, value)
        return changed


def numbers_of(call: Call) -> dict[str, Any]:
    """What texts may name, of a call that is good yet."""
    m, i = call.module, call.which % 2
    if m is None:
        return {}
    state = call.state_shapes[i]
    with_batch = state if call.batch or call.entry == "cell" else (state[0], 1, state[1])
    data, packed = call.data, isinstance(call.input, PackedSequence)
    order = call.input.sorted_indices if packed else None
    sequences = call.batch[0] if call.batch else 1
    of_step = (
        "(num_layers, B, size) for x_t of a batch" if call.batch else "(num_layers, size) for x_t of one row"
    )
    return {
        "I": m.input_size, "H": m.hidden_size, "H4": 4 * m.hidden_size, "T": call.time, "B": sequences,
        "N": len(data), "last": sequences - 1, "layers": getattr(m, "num_layers", 1), "dtype": data.dtype,
        "device": data.device, "rows": tuple(data.shape[:-1]), "rows_1": (*data.shape[:-1], 1), "i": i, "hc": "hc"[i],
        "state": state, "state_3d": with_batch, "batch_sizes": call.input.batch_sizes.tolist() if packed else None,
        "order": list(range(sequences)) if order is None else order.tolist(), "of_step": of_step,
        "time_batch": "(batch, time" if getattr(m, "batch_first", False) else "(time, batch",
    }  # fmt: skip


def numbers_of_got(call: Call) -> dict[str, Any]:
    """And of what the call has got instead."""
    got, kind = call.got, type(call.got).__name__
    found: dict[str, Any] = {
        "got": got, "type": kind, "kind": kind, "kinds": kind,
        "name": call.weight_name, "place": call.weight_place, "weight_shape": call.weight_shape,
    }  # fmt: skip
    if isinstance(got, Tensor):
        shape = tuple(got.shape)
        found |= {"shape": shape, "sizes": list(shape), "rank": len(shape), "its_dtype": got.dtype}
        first, last = (shape[0], shape[-1]) if shape else (None, None)
        return found | {"count": first, "features": last, "kind": f"a Tensor of shape {shape}"}
    if isinstance(got, PackedSequence):
        order = got.sorted_indices
        return found | {"its_order": None if order is None else order.tolist()}
    if isinstance(got, (tuple, list)):
        found["kinds"] = f"{kind} of ({', '.join([type(x).__name__ for x in got])})"
        found |= {"count": len(got)} | dict(zip(("first", "second"), map(repr, got), strict=False))
    return found | {"repr": repr(got)}


# --- what is expected


class Error(NamedTuple):
    """One of these types and texts; or torch's error for the same arguments, where it has one.

    With torch's and no types, arguments that torch's layer takes give its results.
    """

    types: tuple[type[Exception], ...] = ()
    texts: tuple[str, ...] = ()
    torchs: bool = False


TORCH = Error(torchs=True)


def value_error(*texts: str) -> Error:
    return Error((ValueError,), texts)


def type_error(*texts: str) -> Error:
    return Error((TypeError,), texts)


def runtime_error(*texts: str) -> Error:
    return Error((RuntimeError,), texts)


def torchs_or(error: Error) -> Error:
    return error._replace(torchs=True)


class Fault(NamedTuple):
    """One row.

    Attributes:
        break_: changes a call. It returns what the text says that was found instead.
        layer, packed, nested: `lstm_ext.LSTM` called with a tensor, a ``PackedSequence``, a nested tensor. The options
            are its attributes.
        step: its ``step()``.
        function: `functional.lstm` and `reference.lstm`, which say the same.
        cell: `lstm_ext.LSTMCell`.
        equations: `reference.lstm` with a ``PackedSequence``.
        constructor, cell_constructor: of the two classes.
        needs: what a case must have: "hx", "layer_norm", "peephole", "bidirectional".
    """

    break_: Callable[[Call], Any]
    layer: Error | None = None
    packed: Error | None = None
    nested: Error | None = None
    step: Error | None = None
    function: Error | None = None
    cell: Error | None = None
    equations: Error | None = None
    constructor: Error | None = None
    cell_constructor: Error | None = None
    needs: str = ""


ENTRIES = Fault._fields[1:-1]


# --- ways to break


def jagged(values: Tensor, offsets: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(values, offsets)


def longer(x: Tensor, axis: int, by: int) -> Tensor:
    more = [by if a == axis % x.dim() else n for a, n in enumerate(x.shape)]
    return torch.cat([x, x.new_zeros(more)], axis)


def resized(call: Call, x: Tensor, axis: int) -> Tensor:
    """Of another size: larger, or smaller."""
    call.variants = max(4, call.variants)
    if call.which // 2 % 2 == 0:
        return longer(x, axis, call.amount)
    return x.narrow(axis, 0, max(0, x.size(axis) - call.amount))


def of_rank(x: Tensor, rank: int) -> Tensor:
    while x.dim() > rank:
        x = x[0]
    return x[(None,) * (rank - x.dim())]


DTYPES = (torch.float64, torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64)


def other_dtype(call: Call, x: Tensor) -> Tensor:
    call.variants = max(10, call.variants)
    return x.to([d for d in DTYPES if d != x.dtype][call.which // 2 % 5])


def argument(name: str, change: Callable[[Call], Any]) -> Callable[[Call], Any]:
    """Gives an argument; that of a layer with this name as an attribute is set, which raises the error at once."""

    def apply(call: Call) -> Any:
        value = call.got = change(call)
        if call.entry == "layer" and name not in OF_CALLS:
            setattr(call.module, name, value)
        call.arguments[name] = value
        return value

    return apply


OF_CALLS = ("lengths", "mask", "resets", "reset_state", "return_cell_states", "return_gates")


def one_of(name: str, values: Sequence[Any]) -> Callable[[Call], Any]:
    return argument(name, lambda call: call.pick(values))


def together(*faults: Callable[[Call], Any]) -> Callable[[Call], Any]:
    return lambda call: [fault(call) for fault in faults][-1]


def at(call: Call, x: Tensor, value: Callable[[Any], Any]) -> Tensor:
    k = call.which % x.numel()
    x.view(-1)[k] = value(x.view(-1)[k])
    return x
