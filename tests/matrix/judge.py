"""How a case is run on a route, and how its results are judged.

A rule that compares the error of single tensors with torch's error in the same tensor is a lottery
for tensors of a few numbers: torch's error may happen to be next to nothing. Instead each case says itself how
exact its tensors can be had. In float64, torch's layer runs a few times more with every input, state, weight
and incoming gradient changed by a relative error of random sign, as large as rounding them to the dtype could be. How
far a result then moves (the largest 2-norm over the draws) is the error that no computation at this dtype could
avoid; allowed is ``SLACK`` times that, plus a few eps of the result itself for what is rounded inside. That
also holds where a sum cancels, without a look at torch's own error, and in float64 as well as in float32,
since at this size the movement is proportional to the change.

It is not meant to see a rounding error twice as large as necessary; test_kernels.py does. It is
meant to see what is wrong: in float32 the bound is typically 1e-5 of a tensor's norm, in float64 1e-14, and one
wrong row, one missing term of a sum or a mask of another seed are orders of magnitude above it
(test_fuzz.py, test_one_wrong_row_is_seen).

A case with options has the oracle of oracle.py in the place of torch's layer, and the equations of
``lstm_ext.reference`` for the runs with changed numbers, as these are many times faster. The equations themselves are
held to the bound of float64 too. With layer normalisation, what it is given and its means are changed as well
(rounding_normalisation); and where few numbers are normalised, as those of a state that is projected
to one or two, the bound may be a thousand times wider: so far do the results move with the smallest change of the
arguments. A row that is 1% too large may then not be seen in a gradient in float32; a layer that computes
something else is (test_fuzz.py, test_a_mistake_with_options_is_seen).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from judge import absolute_error
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import lstm_ext
from lstm_ext.layer import equations, route

from .cases import (
    Case,
    Options,
    Tensors,
    arguments_of,
    environment,
    make_module,
    sizes_of,
    strided,
    tensors_of,
)
from .oracle import Cell, OracleLSTM

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


def named(result: Any) -> dict[str, Tensor]:
    output, states, *rest = result
    values = {"output": output.data if isinstance(output, PackedSequence) else output}
    values |= dict(zip(("h_n", "c_n"), states, strict=False))
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


# How a route calls a module: with what `arguments_of` gives; it returns what the module returns.
Call = Callable[..., Any]


def by_itself(module: nn.Module, input: Any, hx: Any, **more: Any) -> Any:
    return module(input, hx, **more)


def run(
    kind: type[nn.Module], case: Case, tensors: Tensors, dtype: torch.dtype, call: Call = by_itself
) -> Run:
    """One forward pass and, in the modes grad and twice, one or two backward passes; nothing given may change."""
    module = make_module(kind, case, dtype, tensors.weights)
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    leaves, input, hx, more = arguments_of(case, tensors, dtype)
    leaves |= dict(module.named_parameters())
    before = {name: t.detach().clone() for name, t in leaves.items()}
    torch.manual_seed(case.seed)
    with modes.get(case.mode, torch.enable_grad)():
        result = call(module, input, hx, **more)
    state = torch.get_rng_state()
    values = named(result)
    requires_grad = any(v.requires_grad for v in values.values())
    if case.mode == "inference_mode":
        assert all(v.is_inference() for v in values.values())

    gradients: dict[str, Tensor] = {}
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    if case.mode in ("grad", "twice") and wanted:
        grads = {name: strided(case.grad_strides, g.to(dtype)) for name, g in tensors.grads.items()}
        # Without a path to any wanted leaf (T = 1: c_n and the last projection) torch's result needs no gradient.
        chosen = [name for name in case.grad_of if name in values and values[name].requires_grad]

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
                    retain_graph=retain_graph or case.mode == "twice",
                    create_graph=case.mode == "twice",
                )
            )

        first = backward(case.repeat_backward)
        if case.repeat_backward:
            for name, a, b in zip(wanted, first, backward(False), strict=True):
                assert torch.equal(a, b), f"grad of {name}: another one in the second backward pass"
        gradients = {f"grad of {name}": g.detach() for name, g in zip(wanted, first, strict=True)}
        if case.mode == "twice":
            gradients |= second_gradients(case, wanted, first)
    for name, t in leaves.items():
        assert torch.equal(t.nan_to_num(5.0), before[name].nan_to_num(5.0)), f"{name} was changed"
    values = {name: v.detach() for name, v in values.items()}
    return Run(values | gradients, result[0], state, requires_grad)


def second_gradients(case: Case, wanted: dict[str, Tensor], first: list[Tensor]) -> dict[str, Tensor]:
    """The gradients of a sum of gradients, with random weights."""
    generator = torch.Generator().manual_seed(case.seed + 2)
    drawn = [torch.randn(g.shape, generator=generator, dtype=torch.float64).to(g.dtype) for g in first]
    found = torch.autograd.grad(
        [g for g in first if g.requires_grad],
        list(wanted.values()),
        [w for g, w in zip(first, drawn, strict=True) if g.requires_grad],
        allow_unused=True,
        materialize_grads=True,
    )
    return {f"second grad of {name}": g for name, g in zip(wanted, found, strict=True)}


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


def try_out(case: Case, kind: type[nn.Module], draws: int = DRAWS, call: Call = by_itself) -> Trial:
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
                return try_out(without_bound, kind, draws, call)
            if case.options.forget_bias is not None or case.options.parameters(case.bias):
                check_initialisation(case.options, sizes_of(case), case.directions)
            equations = fast_run(unrepeated, tensors)
            moves = movement(unrepeated, tensors, equations, draws)
            norms = {n: torch.linalg.vector_norm(v).item() for n, v in equations.values.items()}
            if case.options.has_edges and any([CHANGE * moves[n] > 0.01 * norms[n] for n in norms]):
                # A change of 1e-7 has changed everything: bounded, the cells with layer normalisation may be chaotic.
                return try_out(without_bound, kind, draws, call)
            wrong = {n: r for n, r in Trial(case, equations, ref, moves).excess().items() if not r <= 1}
            assert not wrong, f"the equations and the oracle differ: {wrong}"
    with environment(case):
        result = run(kind, case, tensors, case.torch_dtype, call)
    assert result.values.keys() == ref.values.keys(), (list(result.values), list(ref.values))
    assert all(v.dtype == case.torch_dtype for v in result.values.values())
    assert torch.equal(result.random_state, ref.random_state), "another use of random numbers than torch's"
    assert result.requires_grad or not ref.requires_grad, "the outputs do not require gradients"
    assert case.mode in ("grad", "twice") or not result.requires_grad
    check_form(result.output, ref.output)
    return Trial(case, result, ref, moves)


def check_form(output: Any, expected: Any) -> None:
    """A PackedSequence has the batch_sizes and indices of torch's."""
    assert type(output) is type(expected), type(output)
    if isinstance(expected, PackedSequence):
        for a, b in zip(output[1:], expected[1:], strict=True):
            assert (a is None) == (b is None), (output[1:], expected[1:])
            assert a is None or torch.equal(a, b), (output[1:], expected[1:])


def check(case: Case, kind: type[nn.Module] = lstm_ext.LSTM, call: Call = by_itself) -> None:
    try:
        _judge(case, kind, DRAWS, call)
    except AssertionError:
        try:
            _judge(case, kind, DRAWS_OF_A_FAILURE, call)
        except AssertionError as error:
            raise AssertionError(f"check({case}):\n{error}") from error


def _judge(case: Case, kind: type[nn.Module], draws: int, call: Call) -> None:
    ratios = try_out(case, kind, draws, call).excess()
    wrong = [f"{name}: error {r:.3g} times as large as allowed" for name, r in ratios.items() if not r <= 1]
    assert not wrong, "\n".join(wrong)


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

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
        y = Normalised.apply(x, eps) * weight
        return y if bias is None else y + bias

    with mock.patch.object(equations, "layer_norm", layer_norm):
        yield
