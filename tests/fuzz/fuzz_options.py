"""The options of a random case: their description, their arguments, and the layer of the oracle, for the comparison."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from oracle import Result, drawn, oracle
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import lstm_ext
from lstm_ext.call import values
from lstm_ext.layer import equations


def differing(description: Any) -> str:
    """The repr of a dataclass's instance, with only what differs from the defaults."""
    values = [(f, getattr(description, f.name)) for f in dataclasses.fields(description)]
    text = ", ".join([f"{f.name}={value!r}" for f, value in values if value != f.default])
    return f"{type(description).__name__}({text})"


_PARAMETERS = inspect.signature(lstm_ext.LSTM).parameters.values()
CONSTRUCTOR = tuple([p.name for p in _PARAMETERS if p.kind is p.KEYWORD_ONLY])


@dataclasses.dataclass(frozen=True)
class Options:
    """What a case has beyond ``torch.nn.LSTM``; the numbers themselves come from the seed of the case."""

    # In a call
    lengths: tuple[int, ...] | None = None  # of each sequence; never for packed ones
    lengths_as: str = "list"  # LENGTHS_AS
    unread: bool = False  # nothing is read of lengths, mask and resets: as if they were on a GPU
    nan_padding: bool = False
    resets: float | None = None  # how many of the flags are true
    resets_as: str = "bool"  # RESETS_AS
    reset_state: bool = False
    return_cell_states: bool = False
    return_gates: bool = False
    # In the constructor
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    layer_norm: bool = False
    peephole: bool = False
    cell_clip: float | None = None
    coupled_gates: bool = False
    gate_activation: str | tuple[Any, ...] = "sigmoid"
    cell_activation: str | tuple[Any, ...] = "tanh"
    preactivation_clip: float | None = None
    forget_bias: float | None = None
    recompute: bool = False

    def __repr__(self) -> str:
        return differing(self)

    @property
    def constructor(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in CONSTRUCTOR}

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

    def without_edges(self) -> Options:
        return dataclasses.replace(
            self, cell_clip=None, preactivation_clip=None, gate_activation="sigmoid", cell_activation="tanh"
        )

    def plain_form(self) -> Options:
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


def check_initialisation(options: Options, sizes: tuple[Any, ...], directions: int) -> None:
    """The options change the initial values as documented, and nothing else."""
    torch.manual_seed(0)
    plain = torch.nn.LSTM(*sizes)
    torch.manual_seed(0)
    ours = dict(lstm_ext.LSTM(*sizes, **options.constructor).named_parameters())
    hidden, bias = plain.hidden_size, plain.bias
    for name, p in plain.named_parameters():
        expected = p.detach().clone()
        if name.startswith("bias_") and options.forget_bias is not None:
            expected[hidden : 2 * hidden] = options.forget_bias if name.startswith("bias_ih") else 0.0
        assert torch.equal(ours.pop(name), expected), f"initial {name}"
    assert len(ours) == options.parameters(bias) * plain.num_layers * directions, list(ours)
    for name, p in ours.items():
        assert (p == (1.0 if name.startswith("ln_gain") else 0.0)).all(), f"initial {name}"


# --- rounding in a normalisation -----------------------------------------------------------------------------------


@contextlib.contextmanager
def rounding_normalisation(change: float, generator: torch.Generator) -> Iterator[None]:
    """Within, layer normalisation changes what it is given and each of its means by a relative ``change``.

    How exact a normalised number can be had cannot be seen from changed arguments of the layer alone. Of a single unit,
    c - mean(c) is 0 whatever c is, but not with a mean that was rounded; and the sum of normalised gradients along the
    weights of a single feature is next to 0 for any weights, but not where the product of the two was rounded.
    """

    def changed(x: Tensor) -> Tensor:
        signs = torch.randint(0, 2, x.shape, generator=generator, dtype=x.dtype) * 2 - 1
        return x * (1 + change * signs)

    def mean(x: Tensor) -> Tensor:
        return changed(changed(x).mean(-1, keepdim=True))

    class Normalised(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
            x = changed(x)
            centred = x - mean(x)
            scale = (mean(centred * centred) + eps).rsqrt()
            ctx.save_for_backward(centred * scale, scale)
            return centred * scale

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            normalised, scale = ctx.saved_tensors
            return changed(scale * (grad - mean(grad) - normalised * mean(grad * normalised))), None

    def layer_norm(
        x: Tensor, shape: Any, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        y = Normalised.apply(x, eps) * weight
        return y if bias is None else y + bias

    with mock.patch.object(equations, "layer_norm", layer_norm):
        yield


# --- the oracle, as a layer ----------------------------------------------------------------------------------------


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


class NestedLSTM(lstm_ext.LSTM):
    """Gives a ``PackedSequence`` to the layer as a nested tensor, and takes the results back."""

    def forward(
        self, input: Any, hx: Any = None, *, resets: Any = None, reset_state: Any = None, **asked: Any
    ) -> Any:  # type: ignore[override]
        if not isinstance(input, PackedSequence):
            return super().forward(input, hx, resets=resets, reset_state=reset_state, **asked)
        sizes, order = input.batch_sizes, input.sorted_indices
        # The sequences in the order of the packed ones: of each, the rows of its steps.
        starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)[:-1]])
        rows = [starts[sizes > b] + b for b in range(int(sizes[0]))]
        offsets = torch.tensor([0, *itertools.accumulate(len(r) for r in rows)])
        place = torch.cat(rows)
        back = torch.argsort(place)

        def nested(data: Tensor) -> Tensor:
            return torch.nested.nested_tensor_from_jagged(data.index_select(0, place), offsets)

        def sorted_states(states: Any) -> Any:
            return states and tuple([s if order is None else s.index_select(1, order) for s in states])

        y, (h, c), *extras = super().forward(
            nested(input.data),
            sorted_states(hx),
            resets=None if resets is None else nested(resets.data),
            reset_state=sorted_states(reset_state),
            **asked,
        )
        y = input._replace(data=y.values().index_select(0, back))
        unsorted = input.unsorted_indices
        states = (h, c) if unsorted is None else (h.index_select(1, unsorted), c.index_select(1, unsorted))
        return y, states, *[e.map(lambda values: values.index_select(1, back)) for e in extras]


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
