"""Random cases of a layer: their description, their tensors, how they are run and how the results are judged.

A ``Case`` holds plain values only, so that its repr is all one needs to see it again:

    PYTHONPATH=tests:tests/fuzz python -c "from fuzz_cases import *; check(Case(...))"

The judgement. A rule that compares the error of single tensors with torch's error in the same tensor is a lottery
for tensors of a few numbers: torch's error may happen to be next to nothing. Instead each case says itself how
exact its tensors can be had. In float64, torch's layer runs a few times more with every input, state, weight
and incoming gradient changed by a relative error of random sign, as large as rounding them to the dtype could be. How
far a result then moves (the largest 2-norm over the draws) is the error that no computation at this dtype could
avoid; allowed is ``SLACK`` times that, plus a few eps of the result itself for what is rounded inside. That
also holds where a sum cancels, without a look at torch's own error, and in float64 as well as in float32,
since at this size the movement is proportional to the change.

It is not meant to see a rounding error twice as large as necessary; test_random_sizes.py and test_kernels.py do. It is
meant to see what is wrong: in float32 the bound is typically 1e-5 of a tensor's norm, in float64 1e-14, and one
wrong row, one missing term of a sum or a mask of another seed are orders of magnitude above it
(test_fuzz.py, test_one_wrong_row_is_seen).

A case with options has the oracle of oracle.py in the place of torch's layer, and the equations of
``lstm_ext.reference`` for the runs with changed numbers, as these are many times faster. The equations themselves are
held to the bound of float64 too. With layer normalisation, what it is given and its means are changed as well
(fuzz_options.py, rounding_normalisation); and where few numbers are normalised, as those of a state that is projected
to one or two, the bound may be a thousand times wider: so far do the results move with the smallest change of the
arguments. A row that is 1% too large may then not be seen in a gradient in float32; a layer that computes
something else is (test_fuzz.py, test_a_mistake_with_options_is_seen).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from fuzz_options import (
    HOLES,
    Options,
    OracleLSTM,
    call_arguments,
    check_initialisation,
    differing,
    rounding_normalisation,
    with_holes,
)
from judge import absolute_error
from oracle import Cell
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import lstm_ext
from lstm_ext.call import values
from lstm_ext.layer import equations, route
from lstm_ext.native import loader

_C = loader.extension()
CAPABILITIES = tuple(_C.cpu_capabilities()) if _C else ()

# Runs with changed inputs: so many are cheap, and a case that fails with them is judged by as many as judge.py's rule
# takes. Of a tensor of one number the movements of three draws may all be small.
DRAWS = 3
DRAWS_OF_A_FAILURE = 20
CHANGE = 1e-7  # of every number, in float64, in those runs
# Of the largest movement seen: rounding inside adds up, and three draws for a tensor of one number may all be small. In
# 5,000 random cases torch's own layer needed 2.6 at most, and 4.4 for one such number.
SLACK = 16.0
# Rounding inside, in eps of the result: that of judge.py.
INSIDE = {torch.float64: 64.0}
INSIDE_OTHERWISE = 4.0


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
    capability: str = ""  # "": the one in use
    seed: int = 0
    options: Options | None = None

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
    def state_sizes(self) -> tuple[int, int]:
        return self.proj_size or self.hidden_size, self.hidden_size

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
        return ("output", "h_n", "c_n") + (self.options.returned if self.options else ())


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


# --- tensors -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Tensors:
    """Everything a run is given, before strides. Frozen or not is for the run to say."""

    input: Tensor
    hx: tuple[Tensor, Tensor] | None
    weights: list[Tensor]
    grads: dict[str, Tensor]  # of the results
    reset_state: tuple[Tensor, Tensor] | None = None
    resets: Tensor | None = None  # bool

    def map(self, f: Callable[[Tensor], Tensor]) -> Tensors:
        return Tensors(
            f(self.input),
            None if self.hx is None else (f(self.hx[0]), f(self.hx[1])),
            [f(w) for w in self.weights],
            {name: f(g) for name, g in self.grads.items()},
            None if self.reset_state is None else (f(self.reset_state[0]), f(self.reset_state[1])),
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
    grads |= {name: normal(*s.shape) for name, s in zip(("h_n", "c_n"), states, strict=True)}

    resets, reset_state = None, None
    if case.options is not None:
        for name in case.options.returned:
            last = (case.hidden_size,) if name == "cell_states" else (case.hidden_size, 4)
            grads[name] = normal(sets, *case.rows, *last)
        if case.options.resets is not None:
            resets = torch.rand(rows, generator=generator) < case.options.resets
        if case.options.reset_state:
            h, c = [strided(case.hx_strides, normal(*s.shape)) for s in states]
            reset_state = h, c
    tensors = Tensors(
        strided(case.input_strides, input),
        (strided(case.hx_strides, states[0]), strided(case.hx_strides, states[1])) if case.hx else None,
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
    return (
        case.input_size, case.hidden_size, case.num_layers, case.bias, case.batch_first, case.dropout,
        case.bidirectional, case.proj_size,
    )  # fmt: skip


def make_module(
    kind: type[nn.Module], case: Case, dtype: torch.dtype, weights: list[Tensor] | None
) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dropout with one layer
        module = kind(
            *sizes_of(case),
            dtype=dtype,
            device="meta",
            **(
                case.options.constructor
                if case.options is not None and issubclass(kind, lstm_ext.LSTM)
                else {}
            ),
        ).train(case.training)
    if weights is not None:
        names = [name for name, _ in module.named_parameters()]
        for i, (name, w) in enumerate(zip(names, weights, strict=True)):
            value = strided(case.weight_strides, w.to(dtype, copy=True))
            setattr(module, name, nn.Parameter(value, requires_grad=str(i) not in case.frozen))
    return module


# --- a run ---------------------------------------------------------------------------------------------------------


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

    def states(pair: tuple[Tensor, Tensor] | None, *names: str) -> tuple[Tensor, ...] | None:
        if pair is None:
            return None
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


def named(result: Any) -> dict[str, Tensor]:
    output, (h_n, c_n), *rest = result
    values = {
        "output": output.data if isinstance(output, PackedSequence) else output,
        "h_n": h_n,
        "c_n": c_n,
    }
    for extras in rest:
        assert type(extras) is lstm_ext.LSTMExtras
        values |= {name: x for name, x in extras._asdict().items() if x is not None}
    return values


@dataclasses.dataclass
class Run:
    values: dict[str, Tensor]  # and gradients, by "grad of ..."
    output: Any  # as returned
    random_state: Tensor  # afterwards
    requires_grad: bool


def run(kind: type[nn.Module], case: Case, tensors: Tensors, dtype: torch.dtype) -> Run:
    """One forward and, in mode grad, one backward pass; also sees to it that nothing given was changed."""
    module = make_module(kind, case, dtype, tensors.weights)
    modes = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    leaves, input, hx, more = arguments_of(case, tensors, dtype)
    leaves |= dict(module.named_parameters())
    before = {name: t.detach().clone() for name, t in leaves.items()}
    torch.manual_seed(case.seed)
    with modes[case.mode]():
        result = module(input, hx, **more)
    state = torch.get_rng_state()
    values = named(result)
    requires_grad = any(v.requires_grad for v in values.values())
    if case.mode == "inference_mode":
        assert all(v.is_inference() for v in values.values())

    gradients: dict[str, Tensor] = {}
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    if case.mode == "grad" and wanted:
        grads = {name: strided(case.grad_strides, g.to(dtype)) for name, g in tensors.grads.items()}
        # Without a path to any wanted leaf (T = 1: c_n and the last projection) torch's result needs no gradient.
        chosen = [name for name in case.grad_of if values[name].requires_grad]

        def backward(retain_graph: bool) -> list[Tensor]:
            if not chosen:
                return [torch.zeros_like(t) for t in wanted.values()]
            return list(
                torch.autograd.grad(
                    [values[name] for name in chosen],
                    list(wanted.values()),
                    [grads[name] for name in chosen],
                    allow_unused=True,
                    materialize_grads=True,
                    retain_graph=retain_graph,
                )
            )

        first = backward(case.repeat_backward)
        if case.repeat_backward:
            for name, a, b in zip(wanted, first, backward(False), strict=True):
                assert torch.equal(a, b), f"grad of {name}: another one in the second backward pass"
        gradients = {f"grad of {name}": g for name, g in zip(wanted, first, strict=True)}
    for name, t in leaves.items():
        assert torch.equal(t.nan_to_num(5.0), before[name].nan_to_num(5.0)), f"{name} was changed"
    values = {name: v.detach() for name, v in values.items()}
    return Run(values | gradients, result[0], state, requires_grad)


# --- the judgement -------------------------------------------------------------------------------------------------


def fast_run(case: Case, tensors: Tensors) -> Run:
    """In float64, by torch's layer or, with options, by the equations."""
    if case.options is None:
        return run(nn.LSTM, case, tensors, torch.float64)
    with mock.patch.object(route, "lstm_layer", equations.lstm_layer):
        return run(lstm_ext.LSTM, case, tensors, torch.float64)


def movement(case: Case, tensors: Tensors, ref: Run, draws: int) -> dict[str, float]:
    """How far each result moves, per relative change of everything that goes in: the largest of so many draws."""
    generator = torch.Generator().manual_seed(case.seed + 1)

    def changed(x: Tensor) -> Tensor:
        signs = torch.randint(0, 2, x.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return x + CHANGE * x * signs

    largest = dict.fromkeys(ref.values, 0.0)
    for _ in range(draws):
        if case.options is not None and case.options.layer_norm:
            with rounding_normalisation(CHANGE, generator):
                other = fast_run(case, tensors.map(changed))
        else:
            other = fast_run(case, tensors.map(changed))
        for name, value in other.values.items():
            distance = torch.linalg.vector_norm(value - ref.values[name]).item() / CHANGE
            largest[name] = max(largest[name], distance)
    return largest


def reference_case(case: Case) -> Case:
    """The same numbers, plain in all that does not change them."""
    return dataclasses.replace(
        case,
        input_strides="dense",
        hx_strides="dense",
        weight_strides="dense",
        grad_strides="dense",
        repeat_backward=False,
        threads=1,
        capability="",
        options=case.options and case.options.plain_form(),
    )


@dataclasses.dataclass
class Trial:
    """A case that has been run, by the layer in question and by torch's, or the oracle, in float64."""

    case: Case
    result: Run
    ref: Run
    moves: dict[str, float]

    def excess(self) -> dict[str, float]:
        """The error of every value and gradient as a multiple of what is allowed."""
        dtype = next(iter(self.result.values.values())).dtype
        eps, inside = torch.finfo(dtype).eps, INSIDE.get(dtype, INSIDE_OTHERWISE)
        ratios = {}
        for name, value in self.result.values.items():
            expected = self.ref.values[name]
            norm = torch.linalg.vector_norm(expected).item()
            error = absolute_error(value, expected)
            if norm == 0 and self.moves[name] == 0:  # nothing reaches it
                ratios[name] = 0.0 if error == 0 else math.inf
                continue
            # Below the normal numbers, where float16 soon is, the spacing of numbers is an absolute one.
            spacing = torch.finfo(dtype).smallest_normal * eps * value.numel() ** 0.5
            ratios[name] = error / (eps * (SLACK * self.moves[name] + inside * norm) + SLACK * spacing)
        return ratios


def try_out(case: Case, kind: type[nn.Module], draws: int = DRAWS) -> Trial:
    """Runs a case, and checks all that has to be exact."""
    plain = reference_case(case)
    with environment(plain):
        tensors = tensors_of(case)
        Cell.nearest_to_clip = math.inf
        ref = run(nn.LSTM if case.options is None else OracleLSTM, plain, tensors, torch.float64)
        # With its strides: numbers that are one in memory are changed as one, as their rounding errors are one.
        unrepeated = dataclasses.replace(case, repeat_backward=False)
        if case.options is None:
            moves = movement(unrepeated, tensors, ref, draws)
        else:
            without_bound = dataclasses.replace(case, options=case.options.without_edges())
            # Rounding decides what is clipped; with 16 bits that of what a layer gives to the next.
            if Cell.nearest_to_clip < (1e-5 if case.torch_dtype.itemsize > 2 else 2e-3):
                return try_out(without_bound, kind, draws)
            if case.options.forget_bias is not None or case.options.parameters(case.bias):
                check_initialisation(case.options, sizes_of(case), case.directions)
            equations = fast_run(unrepeated, tensors)
            moves = movement(unrepeated, tensors, equations, draws)
            norms = {n: torch.linalg.vector_norm(v).item() for n, v in equations.values.items()}
            if case.options.has_edges and any([CHANGE * moves[n] > 0.01 * norms[n] for n in norms]):
                # A change of 1e-7 has changed everything: bounded, the cells with layer normalisation may be chaotic.
                return try_out(without_bound, kind, draws)
            wrong = {n: r for n, r in Trial(case, equations, ref, moves).excess().items() if not r <= 1}
            assert not wrong, f"the equations and the oracle differ: {wrong}"
    with environment(case):
        result = run(kind, case, tensors, case.torch_dtype)
    assert result.values.keys() == ref.values.keys(), (list(result.values), list(ref.values))
    assert all(v.dtype == case.torch_dtype for v in result.values.values())
    assert torch.equal(result.random_state, ref.random_state), "another use of random numbers than torch's"
    assert result.requires_grad or not ref.requires_grad, "the outputs do not require gradients"
    assert case.mode == "grad" or not result.requires_grad
    check_form(result.output, ref.output)
    return Trial(case, result, ref, moves)


def check_form(output: Any, expected: Any) -> None:
    """A PackedSequence has the batch_sizes and indices of torch's."""
    assert type(output) is type(expected), type(output)
    if isinstance(expected, PackedSequence):
        for a, b in zip(output[1:], expected[1:], strict=True):
            assert (a is None) == (b is None), (output[1:], expected[1:])
            assert a is None or torch.equal(a, b), (output[1:], expected[1:])


def check(case: Case, kind: type[nn.Module] = lstm_ext.LSTM) -> None:
    try:
        _judge(case, kind, DRAWS)
    except AssertionError:
        try:
            _judge(case, kind, DRAWS_OF_A_FAILURE)
        except AssertionError as error:
            raise AssertionError(f"check({case}):\n{error}") from error


def _judge(case: Case, kind: type[nn.Module], draws: int) -> None:
    ratios = try_out(case, kind, draws).excess()
    wrong = [f"{name}: error {r:.3g} times as large as allowed" for name, r in ratios.items() if not r <= 1]
    assert not wrong, "\n".join(wrong)
