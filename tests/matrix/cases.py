"""The one description of a layer with its arguments, its tensors, and a table of such layers.

A `Case` holds plain values only, so that its repr is all that is needed to see it again. Its options are those of the
product's table, `lstm_ext.options.OPTIONS`. `tensors_of` draws the numbers, `make_module` and `arguments_of` make of
them what a route is called with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import lstm_ext
from lstm_ext.call import values
from lstm_ext.native import loader
from lstm_ext.nn.recurrent import RecurrentLayer
from lstm_ext.options import OPTIONS

_C = loader.extension()
CAPABILITIES = tuple(_C.cpu_capabilities()) if _C else ()


def differing(description: Any) -> str:
    """The repr of a dataclass's instance, with only what differs from the defaults."""
    values = [(f, getattr(description, f.name)) for f in dataclasses.fields(description)]
    text = ", ".join([f"{f.name}={value!r}" for f, value in values if value != f.default])
    return f"{type(description).__name__}({text})"


@dataclasses.dataclass(frozen=True)
class CallOptions:
    """What a case has beyond ``torch.nn.LSTM``; the numbers themselves come from the seed of the case."""

    lengths: tuple[int, ...] | None = None  # of each sequence; never for packed ones
    lengths_as: str = "list"  # LENGTHS_AS
    unread: bool = False  # nothing is read of lengths, mask and resets: as if they were on a GPU
    nan_padding: bool = False
    resets: float | None = None  # how many of the flags are true
    resets_as: str = "bool"  # RESETS_AS
    reset_state: bool = False
    return_cell_states: bool = False
    return_gates: bool = False

    def __repr__(self) -> str:
        return differing(self)

    @property
    def constructor(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in OPTIONS}

    @property
    def returned(self) -> tuple[str, ...]:
        return tuple([name for name in ("cell_states", "gates") if getattr(self, f"return_{name}")])

    @property
    def zoneout_rates(self) -> tuple[float, float]:
        return self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout, 0.0)

    def parameters(self, bias: bool) -> int:
        """The number of parameters of a layer and direction that the plain layer has not."""
        return (3 + bias if self.layer_norm else 0) + (3 if self.peephole else 0)

    @property
    def has_edges(self) -> bool:
        """Whether the cell has functions with edges, where the gradient depends on rounding."""
        return self != self.without_edges()

    def without_edges(self) -> Any:
        return dataclasses.replace(
            self, cell_clip=None, preactivation_clip=None, gate_activation="sigmoid", cell_activation="tanh"
        )

    def plain_form(self) -> Any:
        """The same, said in the simplest way."""
        form = HOLES if self.lengths_as == HOLES else "list"
        return dataclasses.replace(self, lengths_as=form, resets_as="bool", recompute=False, forget_bias=None)

    def features(self, training: bool) -> Iterator[str]:
        """For the summary."""
        if self.lengths is not None:
            yield f"lengths as {self.lengths_as}"
            if self.unread:
                yield "lengths unread"
            if self.nan_padding:
                yield "NaN in the padding"
        if self.resets is not None:
            yield f"resets as {self.resets_as}"
        names = ("reset_state", "return_cell_states", "return_gates", "layer_norm", "recompute")
        for name in (*names, "peephole", "cell_clip", "coupled_gates", "preactivation_clip"):
            if getattr(self, name):
                yield name
        if self.layer_norm == "cell":
            yield "layer_norm, cell"
        if (self.gate_activation, self.cell_activation) != ("sigmoid", "tanh"):
            yield "activations"
        mode = "training" if training else "evaluation"
        if self.recurrent_dropout:
            yield f"recurrent_dropout, {mode}"
        if self.weight_dropout:
            yield f"weight_dropout, {mode}"
        if any(self.zoneout_rates):
            yield f"zoneout, {mode}"
        if self.forget_bias is not None:
            yield "forget_bias"


# What a case has beyond ``torch.nn.LSTM``; the numbers themselves come from the seed of the case.
Options: Any = dataclasses.make_dataclass(
    "Options",
    [(name, Any, dataclasses.field(default=option.default)) for name, option in OPTIONS.items()],
    bases=(CallOptions,),
    frozen=True,
    repr=False,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer, its arguments and how it is run; the numbers themselves come from ``seed``."""

    layout: str = "batched"  # batched, unbatched, or a way of packing (PACKINGS)
    lengths: tuple[int, ...] = (3, 3)  # one entry a batch row; all the same unless packed
    steps: int = 3  # T, where there is no batch row to tell
    input_size: int = 3
    hidden_size: int = 4
    proj_size: int = 0
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    bidirectional: bool = False
    dropout: float = 0.0
    training: bool = True
    dtype: str = "float32"
    hx: bool = False
    input_strides: str = "dense"  # STRIDES
    hx_strides: str = "dense"
    weight_strides: str = "dense"
    grad_strides: str = "dense"
    mode: str = "grad"  # grad, no_grad, inference_mode
    frozen: frozenset[str] = frozenset()  # of input, h0, c0; weights: their position as a string
    grad_of: tuple[str, ...] = ("output", "h_n", "c_n")
    repeat_backward: bool = False
    threads: int = 1
    cell: str = "LSTM"  # or "GRU", whose only state is h
    capability: str = ""  # "": the one in use
    seed: int = 0
    options: Any = None  # Options

    def __repr__(self) -> str:
        return differing(self)

    @property
    def packed(self) -> bool:
        return self.layout in PACKINGS

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def state_sizes(self) -> tuple[int, ...]:
        return ((self.proj_size or self.hidden_size), self.hidden_size)[: 1 if self.cell == "GRU" else 2]

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape of the output, without its features."""
        B, T = len(self.lengths), max(self.lengths, default=self.steps)
        if self.packed:
            return (sum(self.lengths),)
        if self.layout == "unbatched":
            return (T,)
        return (B, T) if self.batch_first else (T, B)

    @property
    def results(self) -> tuple[str, ...]:
        return ("output", *["h_n", "c_n"][: len(self.state_sizes)]) + (
            self.options.returned if self.options else ()
        )


# --- strides -------------------------------------------------------------------------------------------------------


def _moved(x: Tensor, axis: int, to: int) -> Tensor:
    return x.movedim(axis, to).contiguous().movedim(to, axis)


# Each gives a tensor of the same shape; "expanded" ones repeat numbers.
STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x,
    "first axes swapped": lambda x: _moved(x, 0, 1),
    "last axis first": lambda x: _moved(x, -1, 0),
    "last axis apart": lambda x: torch.stack([x, x.flip(0)], dim=-1)[..., 0],
    "part of the last axis": lambda x: torch.cat([x[..., :1], x, x], dim=-1)[..., 1 : 1 + x.size(-1)],
    "every other of the first axis": lambda x: torch.stack([x, x + 1], dim=1).flatten(0, 1)[::2],
    "part of the second axis": lambda x: torch.cat([x, x], dim=1)[:, x.size(1) :],
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "negated": lambda x: torch._neg_view(-x),
    "expanded, first axis": lambda x: x[:1].expand_as(x),
    "expanded, second axis": lambda x: x[:, :1].expand_as(x),
    "expanded, last axis": lambda x: x[..., :1].expand_as(x),
    "expanded, all": lambda x: x.flatten()[:1].view([1] * x.dim()).expand_as(x),
}
WEIGHT_STRIDES = [
    s for s in STRIDES if not s.startswith("expanded")
]  # equal units would make equal rows: a weak test


def strided(name: str, x: Tensor) -> Tensor:
    """``x``, or numbers from it, in other strides."""
    if x.numel() == 0 or (x.dim() < 2 and name not in ("dense", "offset", "negated")):
        return x
    result = STRIDES[name](x)
    assert result.shape == x.shape
    return result


# --- packing -------------------------------------------------------------------------------------------------------


def _steps_of_rows(lengths: tuple[int, ...]) -> Tensor:
    """batch_sizes: how many of the rows, the longest first, are alive at each step."""
    return torch.tensor([sum(n > t for n in lengths) for t in range(max(lengths))])


# What is packed is a padded (T, B, I) tensor or, in the handmade ones, the (N, I) data themselves.
PACKINGS: dict[str, Callable[[Tensor, tuple[int, ...]], PackedSequence]] = {
    "packed": lambda x, n: pack_padded_sequence(x, torch.tensor(n), enforce_sorted=False),
    "packed, batch first": lambda x, n: pack_padded_sequence(
        x.transpose(0, 1), list(n), batch_first=True, enforce_sorted=False
    ),
    "packed, sorted": lambda x, n: pack_padded_sequence(x, list(n), enforce_sorted=True),
    "packed, sequences": lambda x, n: pack_sequence(
        [x[:k, b] for b, k in enumerate(n)], enforce_sorted=False
    ),
    "handmade": lambda x, n: PackedSequence(x, _steps_of_rows(n)),
    "handmade, indices": lambda x, n: PackedSequence(
        x, _steps_of_rows(n), torch.tensor(n).argsort(descending=True, stable=True)
    ),
}
SORTED_PACKINGS = ("packed, sorted", "handmade")


# --- arguments -----------------------------------------------------------------------------------------------------


def _counts(lengths: list[int], shape: tuple[int, ...], batch_first: bool) -> Tensor:
    """mask, in the layout of the input: (T,), (T, B) or (B, T)."""
    if len(shape) == 1:
        return torch.arange(shape[0]) < lengths[0]
    ends = torch.tensor(lengths, dtype=torch.int64)
    steps = torch.arange(shape[1 if batch_first else 0])
    return steps < ends[:, None] if batch_first else steps[:, None] < ends


# Of the lengths, the input's shape without features, and batch_first.
LENGTHS_AS: dict[str, Callable[[list[int], tuple[int, ...], bool], dict[str, Any]]] = {
    "list": lambda n, shape, first: {"lengths": n},
    "tuple": lambda n, shape, first: {"lengths": tuple(n)},
    "int64": lambda n, shape, first: {"lengths": torch.tensor(n, dtype=torch.int64)},
    "int32": lambda n, shape, first: {"lengths": torch.tensor(n, dtype=torch.int32)},
    "uint8, strided": lambda n, shape, first: {
        "lengths": torch.tensor([n, n], dtype=torch.uint8).T.contiguous()[:, 0]
    },
    "numbers of numpy": lambda n, shape, first: {"lengths": list(torch.tensor(n, dtype=torch.int64).numpy())},
    "number": lambda n, shape, first: {"lengths": n[0]},
    "tensor of a number": lambda n, shape, first: {"lengths": torch.tensor(n[0])},
    "mask": lambda n, shape, first: {"mask": _counts(n, shape, first)},
    "mask, an axis more": lambda n, shape, first: {"mask": _counts(n, shape, first).unsqueeze(-1)},
    "mask, strided": lambda n, shape, first: {
        "mask": torch.stack([_counts(n, shape, first)] * 2, -1)[..., 1]
    },
}
HOLES = "mask with holes"


def with_holes(lengths: Sequence[int], time: int) -> Tensor:
    """A mask (T, B) with so many steps that count, anywhere."""
    columns = []
    for b, n in enumerate(lengths):
        places = torch.randperm(time, generator=torch.Generator().manual_seed(97 * b + n))
        columns.append(torch.zeros(time, dtype=torch.bool).index_fill(0, places[:n], True))
    return torch.stack(columns, 1) if columns else torch.zeros(time, 0, dtype=torch.bool)


def _in_layout(mask: Tensor, shape: tuple[int, ...], batch_first: bool) -> Tensor:
    return mask[:, 0] if len(shape) == 1 else mask.T if batch_first else mask


LENGTHS_AS[HOLES] = lambda n, shape, first: {
    "mask": _in_layout(with_holes(n, shape[1 if first and len(shape) > 1 else 0]), shape, first)
}
UNBATCHED_ONLY = ("number", "tensor of a number")

RESETS_AS: dict[str, Callable[[Tensor], Tensor]] = {
    "bool": lambda r: r,
    "bool, an axis more": lambda r: r.unsqueeze(-1),
    "bool, strided": lambda r: torch.stack([r, ~r], -1)[..., 0],
    "float32": lambda r: r.float(),
    "float64, an axis more": lambda r: r.double().unsqueeze(-1),
    "float16": lambda r: r.half(),
}


def call_arguments(
    options: Options,
    shape: tuple[int, ...],
    batch_first: bool,
    resets: Tensor | None,
    reset_state: tuple[Tensor, Tensor] | None,
    pack: Callable[[Tensor], PackedSequence] | None,
) -> dict[str, Any]:
    """What ``forward`` is called with, after ``hx``.

    Args:
        shape: the input's, without its features.
        resets: bool, in that shape, or as ``pack`` takes it.
    """
    arguments: dict[str, Any] = {
        name: True for name in ("return_cell_states", "return_gates") if getattr(options, name)
    }
    if options.lengths is not None:
        arguments |= LENGTHS_AS[options.lengths_as](list(options.lengths), shape, batch_first)
    if resets is not None:
        flags = RESETS_AS[options.resets_as](resets)
        arguments["resets"] = flags if pack is None else pack(flags)
    if reset_state is not None:
        arguments["reset_state"] = reset_state
    return arguments


# --- tensors -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Tensors:
    """Everything a run is given, before strides. Frozen or not is for the run to say."""

    input: Tensor
    hx: tuple[Tensor, ...] | None
    weights: list[Tensor]
    grads: dict[str, Tensor]  # of the results
    reset_state: tuple[Tensor, ...] | None = None
    resets: Tensor | None = None  # bool

    def map(self, f: Callable[[Tensor], Tensor]) -> Tensors:
        return Tensors(
            f(self.input),
            None if self.hx is None else tuple([f(s) for s in self.hx]),
            [f(w) for w in self.weights],
            {name: f(g) for name, g in self.grads.items()},
            None if self.reset_state is None else tuple([f(s) for s in self.reset_state]),
            self.resets,
        )


def tensors_of(case: Case) -> Tensors:
    """The numbers of a case, rounded to its dtype, as dense float64 tensors.

    Strides that repeat numbers are applied already, so that all runs see the same numbers.
    """
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    plain = dataclasses.replace(case, weight_strides="dense")
    module = make_module(lstm_ext.LSTM, plain, torch.float64, None)
    weights = [
        (torch.rand(p.shape, generator=generator, dtype=torch.float64) * 2 - 1) / case.hidden_size**0.5
        for name, p in module.named_parameters()
    ]
    for w, (name, _) in zip(weights, module.named_parameters(), strict=True):
        if name.startswith("ln_gain"):
            w += 1

    B, T = len(case.lengths), max(case.lengths, default=case.steps)
    I, width = case.input_size, case.directions * case.state_sizes[0]
    # With far more features than units the gates would saturate, and 1 - f would lose its digits.
    scale = min(1.0, (case.hidden_size / I) ** 0.5)
    rows = (T, B) if case.packed and not case.layout.startswith("handmade") else case.rows
    input = normal(*rows, I) * scale
    sets = case.num_layers * case.directions
    batch = () if case.layout == "unbatched" else (B,)
    states = tuple(normal(sets, *batch, n) for n in case.state_sizes)
    grads = {"output": normal(*case.rows, width)}
    grads |= {name: normal(*s.shape) for name, s in zip(("h_n", "c_n"), states, strict=False)}

    resets, reset_state = None, None
    if case.options is not None:
        for name in case.options.returned:
            last = (case.hidden_size,) if name == "cell_states" else (case.hidden_size, 4)
            grads[name] = normal(sets, *case.rows, *last)
        if case.options.resets is not None:
            resets = torch.rand(rows, generator=generator) < case.options.resets
        if case.options.reset_state:
            reset_state = tuple([strided(case.hx_strides, normal(*s.shape)) for s in states])
    tensors = Tensors(
        strided(case.input_strides, input),
        tuple([strided(case.hx_strides, s) for s in states]) if case.hx else None,
        weights,
        {name: strided(case.grad_strides, g) for name, g in grads.items()},
        reset_state,
        resets,
    )
    tensors = tensors.map(lambda t: t.to(case.torch_dtype).double().resolve_neg().contiguous())
    if case.options is not None and case.options.nan_padding and case.options.lengths is not None:
        for b, n in enumerate(case.options.lengths):
            of_row = (
                tensors.input
                if case.layout == "unbatched"
                else tensors.input.select(0 if case.batch_first else 1, b)
            )
            if case.options.lengths_as == HOLES:
                of_row[~with_holes(case.options.lengths, len(of_row))[:, b]] = math.nan
            else:
                of_row[n:] = math.nan
    return tensors


def sizes_of(case: Case) -> tuple[Any, ...]:
    """The arguments of the constructor that torch's layer has too."""
    sizes = (
        case.input_size, case.hidden_size, case.num_layers, case.bias, case.batch_first, case.dropout,
        case.bidirectional,
    )  # fmt: skip
    return sizes if case.cell == "GRU" else (*sizes, case.proj_size)


class OneState:
    """A GRU with the states of an LSTM: a tuple, here of one."""

    def forward(self, input: Any, hx: Any = None, *, reset_state: Any = None, **more: Any) -> Any:
        if reset_state is not None:
            more["reset_state"] = reset_state[0]
        y, h = super().forward(input, None if hx is None else hx[0], **more)  # type: ignore[misc]
        return y, (h,)

    def step(self, x: Tensor, hx: Any = None) -> Any:
        y, h = super().step(x, None if hx is None else hx[0])  # type: ignore[misc]
        return y, (h,)


class GRU(OneState, lstm_ext.GRU):
    pass


class TorchGRU(OneState, nn.GRU):
    pass


# The class of a case of the cell "GRU", for that of an LSTM.
OF_GRU: dict[type[nn.Module], type[nn.Module]] = {lstm_ext.LSTM: GRU, nn.LSTM: TorchGRU}


def make_module(
    kind: type[nn.Module], case: Case, dtype: torch.dtype, weights: list[Tensor] | None
) -> nn.Module:
    kind = OF_GRU[kind] if case.cell == "GRU" else kind
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dropout with one layer
        module = kind(
            *sizes_of(case),
            dtype=dtype,
            device="meta",
            **(
                {n: v for n, v in case.options.constructor.items() if OPTIONS[n].gru or case.cell != "GRU"}
                if case.options is not None and issubclass(kind, RecurrentLayer)
                else {}
            ),
        ).train(case.training)
    if weights is not None:
        names = [name for name, _ in module.named_parameters()]
        for i, (name, w) in enumerate(zip(names, weights, strict=True)):
            value = strided(case.weight_strides, w.to(dtype, copy=True))
            setattr(module, name, nn.Parameter(value, requires_grad=str(i) not in case.frozen))
    return module


@contextlib.contextmanager
def environment(case: Case) -> Iterator[None]:
    before = _C.cpu_capability(), torch.get_num_threads()
    unread = case.options is not None and case.options.unread
    reading = (
        mock.patch.object(values, "is_readable", lambda x: False) if unread else contextlib.nullcontext()
    )
    try:
        if case.capability:
            _C.set_cpu_capability(case.capability)
        torch.set_num_threads(case.threads)
        with reading, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # oneDNN and projections; parts of one chunk of memory
            yield
    finally:
        _C.set_cpu_capability(before[0])
        torch.set_num_threads(before[1])


def leaf(x: Tensor, requires_grad: bool) -> Tensor:
    """A leaf with the strides of ``x``."""
    return x.detach().requires_grad_(requires_grad)


def arguments_of(
    case: Case, tensors: Tensors, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Any, Any, dict[str, Any]]:
    """The leaves by name, and from them ``input``, ``hx`` and the options as the layer is called with them."""
    leaves = {"input": leaf(strided(case.input_strides, tensors.input.to(dtype)), "input" not in case.frozen)}

    def pack(x: Tensor) -> PackedSequence:
        return PACKINGS[case.layout](x, case.lengths)

    def states(pair: tuple[Tensor, ...] | None, *names: str) -> tuple[Tensor, ...] | None:
        if pair is None:
            return None
        names = names[: len(pair)]
        for name, s in zip(names, pair, strict=True):
            leaves[name] = leaf(strided(case.hx_strides, s.to(dtype)), name not in case.frozen)
        return tuple([leaves[name] for name in names])

    input = pack(leaves["input"]) if case.packed else leaves["input"]
    hx = states(tensors.hx, "h0", "c0")
    if case.options is None:
        return leaves, input, hx, {}
    reset_state: Any = states(tensors.reset_state, "reset_h", "reset_c")
    packing = pack if case.packed else None
    more = call_arguments(case.options, case.rows, case.batch_first, tensors.resets, reset_state, packing)
    return leaves, input, hx, more


# --- the table -----------------------------------------------------------------------------------------------------

# A case is a form, a cell and what a call is given: each cell with each form, and with each call in turn.
FORMS: dict[str, dict[str, Any]] = {
    "dense": {"lengths": (4,) * 3},
    "two directions": {"lengths": (4,) * 3, "bidirectional": True, "bias": False},
    "batch first, two layers": {"lengths": (4,) * 3, "batch_first": True, "num_layers": 2},
    "all": {"lengths": (4,) * 3, "num_layers": 2, "bidirectional": True, "proj_size": 2, "batch_first": True},
    "dropout": {"lengths": (3,) * 2, "num_layers": 3, "dropout": 0.4, "batch_first": True, "training": True},
    "no rows": {"lengths": (), "steps": 4, "num_layers": 2, "bidirectional": True, "proj_size": 2},
    "one step": {"lengths": (1,) * 3, "num_layers": 2, "proj_size": 3},
    "unbatched": {"layout": "unbatched", "lengths": (5,), "bidirectional": True},
    "packed": {"layout": "packed", "lengths": (3, 1, 4), "bidirectional": True, "proj_size": 2},
    "packed, sorted": {"layout": "handmade", "lengths": (4, 2, 2), "num_layers": 2},
}
CELLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm": {"layer_norm": True},
    "norm, cell": {"layer_norm": "cell", "zoneout": (0.1, 0.2)},
    "zoneout": {"zoneout": (0.3, 0.2)},
    "peephole": {"peephole": True},
    "clip": {"cell_clip": 0.25},
    "coupled": {"coupled_gates": True, "zoneout": 0.3, "recompute": True},
    "peephole, clip, coupled": {"peephole": True, "cell_clip": 0.4, "coupled_gates": True},
    "functions": {
        "gate_activation": "hard_sigmoid",
        "cell_activation": (("scaled_tanh", 0.9, 1.1), "softsign"),
        "preactivation_clip": 0.6,
        "peephole": True,
    },
    "one function": {"cell_activation": "softsign", "forget_bias": 1.0},
    "bound": {"preactivation_clip": 0.4},
    "random": {"zoneout": (0.3, 0.2), "recurrent_dropout": 0.4, "weight_dropout": 0.3},
    "random, norm": {"zoneout": 0.3, "recurrent_dropout": 0.4, "layer_norm": True, "recompute": True},
    "recompute": {"recompute": True},
    "GRU": {},
    "GRU, random": {"recurrent_dropout": 0.4, "weight_dropout": 0.3},
    "GRU, recompute": {"recompute": True},
}
CALLS: dict[str, dict[str, Any]] = {
    "": {},
    "resets": {"resets": 0.4},
    "resets to a state": {"resets": 0.4, "reset_state": True},
    "lengths": {"lengths": (3, 0, 4), "nan_padding": True},
    "unread lengths, resets": {"lengths": (2, 4, 0), "unread": True, "resets": 0.3, "lengths_as": "int64"},
    "mask": {"lengths": (3, 0, 2), "lengths_as": HOLES, "resets": 0.4},
    "unread mask": {"lengths": (3, 1, 2), "lengths_as": HOLES, "unread": True, "resets": 0.4},
    "returned": {"return_cell_states": True, "return_gates": True},
    "all": {
        "lengths": (1, 4, 3), "lengths_as": "mask", "resets": 0.3, "reset_state": True, "return_cell_states": True,
        "return_gates": True,
    },
}  # fmt: skip


def case_of(form: str, cell: str, call: str, **more: Any) -> Case | None:
    """None where the form cannot have this call."""
    of_call = dict(CALLS[call])
    if "lengths" in of_call and FORMS[form].get("layout", "batched") != "batched":
        return None
    if "lengths" in of_call:
        rows = FORMS[form]["lengths"]
        of_call["lengths"] = tuple([min(n, rows[0]) for n in of_call["lengths"][: len(rows)]])
    options = {**CELLS[cell], **of_call}
    if not FORMS[form].get("bias", True):
        options.pop("forget_bias", None)
    gru = cell.startswith("GRU")
    if gru and any(name.startswith("return") for name in of_call):
        return None
    of_form = {n: v for n, v in FORMS[form].items() if not (gru and n == "proj_size")}
    returned = tuple([n for n in ("cell_states", "gates") if of_call.get(f"return_{n}")])
    described = {
        "input_size": 3, "hidden_size": 8 if "norm" in cell else 5, "hx": call != "resets", "dtype": "float64",
        "training": "random" in cell, "cell": "GRU" if gru else "LSTM", "grad_of": ("output", "h_n", "c_n", *returned),
        "options": Options(**options) if options else None,
    }  # fmt: skip
    return Case(**{**described, **of_form, **more})


def table() -> Iterator[tuple[str, Case, bool]]:
    """The name of each case, the case, and whether it is of the slice that runs first."""
    calls = list(CALLS)
    for i, form in enumerate(FORMS):
        for k, cell in enumerate(CELLS):
            chosen = {calls[(i + k) % len(calls)], calls[(3 * i + k + 4) % len(calls)]}
            for call in calls:
                case = case_of(form, cell, call)
                if case is not None:
                    yield ", ".join([form, cell, *([call] if call else [])]), case, call in chosen


CASES = {name: case for name, case, _ in table()}
SLICE = [name for name, _, first in table() if first]
