"""The cells of the support table: a feature in a composition and a dtype, tried, compared and named.

Eager compositions count the calls of the equations of `lstm_ext.reference` and of the kernels while they run; compiled
and exported ones look at what the graph holds.
"""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.func import functional_call, grad, jvp, vmap

from lstm_ext.layer import equations
from lstm_ext.native import loader

from .support_features import FEATURES, SAMPLES, SEED, Called, Problem

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Of the norm of a result or gradient. float64 is held against differences in some compositions.
TOLERANCE = {"float64": 1e-7, "float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}

KERNELS, EQUATIONS, ERROR, FAILURE = "kernels", "equations", "error", "failure"


class Outcome(NamedTuple):
    result: str
    message: str = ""


class Refusal(NamedTuple):
    """A combination that the documentation says is an error, and what the message must be."""

    composition: str
    features: tuple[str, ...]
    message: str  # a regular expression


REFUSALS = (
    Refusal(
        "jvp",
        ("recompute", "all_recompute"),
        r"LSTM: recompute=True is not supported with forward-mode AD: there is nothing to keep",
    ),
    Refusal(
        "onnx",
        ("packed", "packed_extras"),
        r"lstm_ext\.onnx: a PackedSequence cannot be exported to ONNX: give the layer padded sequences",
    ),
)


def refusal(feature: str, composition: str) -> Refusal | None:
    for known in REFUSALS:
        if known.composition == composition and feature in known.features:
            return known
    return None


# ---- what ran


class Seen:
    """How often the equations and the kernels were called, or appear in a graph."""

    def __init__(self) -> None:
        self.equations = self.kernels = 0

    def name(self) -> str:
        if self.equations:
            return EQUATIONS
        if self.kernels:
            return KERNELS
        raise AssertionError("neither the kernels nor the equations ran")


_ENTRIES = ("lstm_layer", "lstm_cell")
_OPERATORS = ("lstm_layer", "lstm_layer_forward", "lstm_layer_backward")


@contextlib.contextmanager
def watched() -> Iterator[Seen]:
    """Counts the calls of eager code. A dispatch mode would do so too, but it changes the way that calls take."""
    seen = Seen()
    extension, equations_of_layer = loader.extension(), equations.lstm_layer

    def module_call(name: str, *arguments: Any) -> Any:
        results = getattr(extension, name)(*arguments)
        seen.kernels += results is not None
        return results

    class Kernels:
        def __getattr__(self, name: str) -> Any:
            if name in ("lstm_module", "lstm_cell_module"):  # which may decline
                return functools.partial(module_call, name)
            if name in _ENTRIES:
                seen.kernels += 1
            return getattr(extension, name)

    class Operator:
        def __init__(self, operator: Any) -> None:
            self.operator = operator

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            seen.kernels += 1
            return self.operator(*arguments, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.operator, name)

    def counted(*arguments: Any) -> Any:
        seen.equations += 1
        return equations_of_layer(*arguments)

    kernels = None if extension is None else Kernels()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(loader, "extension", lambda: kernels))
        stack.enter_context(mock.patch.object(equations, "lstm_layer", counted))
        for name in _OPERATORS if extension is not None else ():
            wrapped = Operator(getattr(torch.ops.lstm_ext, name))
            stack.enter_context(mock.patch.object(torch.ops.lstm_ext, name, wrapped))
        yield seen


def looked_at(graph: fx.Graph, seen: Seen) -> None:
    """Counts the operators of a graph; an LSTM without our operator has these two functions."""
    for node in graph.nodes:
        if node.op == "get_attr":
            part = getattr(graph.owning_module, str(node.target), None)
            if isinstance(part, fx.GraphModule):
                looked_at(part.graph, seen)
        elif node.op in ("call_function", "call_method"):
            name = str(node.target)
            seen.kernels += "lstm_ext.lstm_layer" in name
            seen.equations += "sigmoid" in name or "tanh" in name


# ---- the compositions


@dataclass
class Trial:
    """What a composition works with."""

    problem: Problem
    dtype: torch.dtype
    device: str

    def __post_init__(self) -> None:
        self.module: Called = self.problem.module(self.dtype, self.device)
        self.inputs = self.problem.arguments(self.dtype, self.device)
        self.parameters = dict(self.module.named_parameters())
        self.cotangents = [self.like_input(v) for v in self.problem.cotangents]

    def like_input(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype)

    def leaves(self) -> list[Tensor]:
        """Parameters and floating-point inputs, as `Problem.leaves` has them; they want gradients."""
        for x in self.inputs:
            x.requires_grad_(x.is_floating_point())
        return [*self.parameters.values(), *[x for x in self.inputs if x.is_floating_point()]]

    def by_leaves(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        """The module as a function of `leaves`."""
        parameters = dict(zip(self.parameters, leaves, strict=False))
        left = iter(leaves[len(parameters) :])
        inputs = [next(left) if x.is_floating_point() else x for x in self.inputs]
        return functional_call(self.module, parameters, tuple(inputs))

    def masks(self, known: bool = True) -> Any:
        """As `Problem.masks`; `known`: whether the numbers in lengths and mask are."""
        return self.problem.masks(self.dtype, self.device, self.device == "cpu" and known)

    def gradients(
        self,
        results: Sequence[Tensor],
        leaves: Sequence[Tensor],
        grads: Sequence[Tensor],
        create_graph: bool = False,
    ) -> list[Tensor]:
        return list(
            torch.autograd.grad(
                results, leaves, grads, create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
        )


Compared = tuple[Sequence[Tensor], Sequence[Tensor]]  # what came, what is expected
_compositions: dict[str, Callable[[Trial], tuple[Seen, Compared]]] = {}


def _eager(function: Callable[[Trial], tuple[Sequence[Tensor], Callable[[], Sequence[Tensor]]]]) -> Any:
    """A composition that gives its results and how to compute the expected ones."""

    def tried(trial: Trial) -> tuple[Seen, Compared]:
        torch.manual_seed(SEED)
        with watched() as seen:
            results, expected = function(trial)
        return seen, (results, expected())

    _compositions[function.__name__.removeprefix("_")] = tried
    return function


def _looking(function: Callable[[Trial, Seen], Compared]) -> Any:
    """A composition that looks at a graph itself."""

    def tried(trial: Trial) -> tuple[Seen, Compared]:
        seen = Seen()
        return seen, function(trial, seen)

    _compositions[function.__name__.removeprefix("_")] = tried
    return function


@_eager
def _forward(trial: Trial) -> Any:
    with torch.no_grad():
        results = trial.module(*trial.inputs)
    problem = trial.problem
    return results, lambda: problem.results(problem.leaves(), 0, trial.masks())


@_eager
def _backward(trial: Trial) -> Any:
    leaves = trial.leaves()
    results = trial.module(*trial.inputs)
    gradients = trial.gradients(results, leaves, trial.cotangents)
    return [*results, *gradients], lambda: _values_and_gradients(trial, trial.masks())


def _values_and_gradients(trial: Trial, masks: Any) -> list[Tensor]:
    problem = trial.problem
    arguments = problem.leaves(), 0, masks
    return [*problem.results(*arguments), *problem.gradients(*arguments)]


@_eager
def _double_backward(trial: Trial) -> Any:
    leaves = trial.leaves()
    first = trial.gradients(trial.module(*trial.inputs), leaves, trial.cotangents, create_graph=True)
    directions = [trial.like_input(w) for w in trial.problem.tangents.values()]
    # The second derivatives are symmetric: what flows back along the tangents is the slope along them.
    second = trial.gradients(first, leaves, directions)

    def expected() -> list[Tensor]:
        problem, masks = trial.problem, trial.masks()
        return [*problem.gradients(problem.leaves(), 0, masks), *problem.slope(problem.gradients, masks)]

    return [*first, *second], expected


@_eager
def _jvp(trial: Trial) -> Any:
    leaves = [x.detach() for x in trial.leaves()]
    tangents = [trial.like_input(w) for w in trial.problem.tangents.values()]
    results, slopes = jvp(trial.by_leaves, tuple(leaves), tuple(tangents))

    def expected() -> list[Tensor]:
        problem, masks = trial.problem, trial.masks(known=False)
        return [*problem.results(problem.leaves(), 0, masks), *problem.slope(problem.results, masks)]

    return [*results, *slopes], expected


def _samples(trial: Trial) -> tuple[list[Tensor], tuple[int | None, ...]]:
    """The arguments with all samples, and where: all but what a PackedSequence says of its order."""
    arguments = [trial.problem.arguments(trial.dtype, trial.device, n) for n in range(SAMPLES)]
    shared = ("batch_sizes", "sorted_indices", "unsorted_indices")
    dims = tuple([None if name in shared else 0 for name in trial.problem.names])
    stacked = [
        parts[0] if dim is None else torch.stack(parts)
        for parts, dim in zip(zip(*arguments, strict=True), dims, strict=True)
    ]
    return stacked, dims


def _stacked(function: Callable[..., Sequence[Tensor]], trial: Trial) -> list[Tensor]:
    """What each sample must give; all have the same masks, as with randomness="same"."""
    masks = trial.masks(known=False)
    each = [function(trial.problem.leaves(n), n, masks) for n in range(SAMPLES)]
    return [torch.stack(parts) for parts in zip(*each, strict=True)]


@_eager
def _vmap(trial: Trial) -> Any:
    inputs, dims = _samples(trial)
    results = vmap(trial.module, dims, randomness="same")(*inputs)
    return results, lambda: _stacked(trial.problem.results, trial)


def _loss(trial: Trial) -> Callable[..., Tensor]:
    def loss(parameters: Any, floats: Any, others: Any) -> Tensor:
        given = {**floats, **others}
        results = functional_call(trial.module, parameters, tuple([given[n] for n in trial.problem.names]))
        return sum([(y * v).sum() for y, v in zip(results, trial.cotangents, strict=True)])

    return loss


def _parted(trial: Trial, values: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    given = dict(zip(trial.problem.names, values, strict=True))
    floats = {name: given[name] for name in trial.problem.floats}
    return floats, {name: x for name, x in given.items() if name not in floats}


@_eager
def _grad(trial: Trial) -> Any:
    parameters = {name: p.detach() for name, p in trial.parameters.items()}
    gradients = grad(_loss(trial), (0, 1))(parameters, *_parted(trial, trial.inputs))
    problem = trial.problem
    return (
        [g for group in gradients for g in group.values()],
        lambda: problem.gradients(problem.leaves(), 0, trial.masks(known=False)),
    )


@_eager
def _per_sample(trial: Trial) -> Any:
    parameters = {name: p.detach() for name, p in trial.parameters.items()}
    inputs, dims = _samples(trial)
    of_samples = vmap(grad(_loss(trial), (0, 1)), (None, *_parted(trial, dims)), randomness="same")
    gradients = of_samples(parameters, *_parted(trial, inputs))
    return (
        [g for group in gradients for g in group.values()],
        lambda: _stacked(trial.problem.gradients, trial),
    )


@_eager
def _autocast(trial: Trial) -> Any:
    leaves = trial.leaves()
    with torch.autocast(trial.device, torch.bfloat16):
        results = trial.module(*trial.inputs)
    dtype = torch.float64 if trial.dtype == torch.float64 else torch.bfloat16  # float64 is left alone
    # As in torch, some results keep the dtype of the input, or have the one that both promote to.
    right = (dtype, trial.dtype, torch.promote_types(dtype, trial.dtype))
    wrong = [y.dtype for y in results if y.dtype not in right]
    assert not wrong, f"a result of {wrong[0]} under autocast"
    cotangents = [v.to(y.dtype) for v, y in zip(trial.problem.cotangents, results, strict=True)]
    gradients = trial.gradients(results, leaves, cotangents)

    def expected() -> list[Tensor]:
        masks = trial.problem.masks(dtype, trial.device, trial.device == "cpu")
        return _values_and_gradients(trial, masks)

    return [*results, *gradients], expected


@_looking
def _compile(trial: Trial, seen: Seen) -> Compared:
    def looked_into(graph: fx.GraphModule, *arguments: Any, **options: Any) -> Any:
        looked_at(graph.graph, seen)
        return compile_fx_inner(graph, *arguments, **options)

    def backend(module: fx.GraphModule, inputs: Any) -> Any:
        # The graphs of the forward and of the backward pass go through the inner one.
        return compile_fx(module, inputs, inner_compile=looked_into)

    torch._dynamo.reset()
    leaves = trial.leaves()
    compiled = torch.compile(trial.module, backend=backend, fullgraph=True)
    torch.manual_seed(SEED)
    own_random_numbers = torch._inductor.config.patch(fallback_random=True)
    no_graph_from_a_cache = torch._functorch.config.patch(enable_autograd_cache=False)
    with own_random_numbers, no_graph_from_a_cache:
        results = compiled(*trial.inputs)
        gradients = trial.gradients(results, leaves, trial.cotangents)
    return [*results, *gradients], _values_and_gradients(trial, trial.masks(known=False))


@_looking
def _export(trial: Trial, seen: Seen) -> Compared:
    program = torch.export.export(trial.module, tuple(trial.inputs))
    looked_at(program.graph, seen)
    torch.manual_seed(SEED)
    with torch.no_grad():
        results = program.module()(*trial.inputs)
    problem = trial.problem
    return results, problem.results(problem.leaves(), 0, trial.masks(known=False))


@_looking
def _onnx(trial: Trial, seen: Seen) -> Compared:
    """In evaluation mode, as models are exported."""
    import lstm_ext.onnx

    program = lstm_ext.onnx.export(trial.module.eval(), tuple(trial.inputs), verbose=False)
    for node in program.model.graph.all_nodes():
        seen.kernels += node.op_type == "LSTM"
        seen.equations += node.op_type in ("Sigmoid", "Tanh")
    results = [torch.as_tensor(y) for y in program(*trial.inputs)]
    problem = trial.problem
    return results, problem.results(problem.leaves(), 0, problem.evaluation_masks())


COMPOSITIONS = tuple(_compositions)
GRAPHS = ("compile", "export", "onnx")  # seconds a cell, instead of milliseconds
EAGER = tuple([name for name in COMPOSITIONS if name not in GRAPHS])


def _differences(compared: Compared, tolerance: float) -> str:
    """What is wrong with the results; empty if nothing is."""
    results, expected = compared
    if len(results) != len(expected):
        return f"{len(results)} results, expected {len(expected)}"
    largest = max([e.norm().item() for e in expected])
    for i, (a, b) in enumerate(zip(results, expected, strict=True)):
        if a.shape != b.shape:
            return f"result {i}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        error = (a.detach().double().cpu() - b).norm().item()
        # A gradient that almost cancels is held to the size of the others.
        if not error <= tolerance * max(b.norm().item(), 0.1 * largest):
            return f"result {i}: off by {error:.2g}, of a norm of {b.norm().item():.2g}"
    return ""


@functools.cache
def _problem(feature: str) -> Problem:
    return Problem(FEATURES[feature])


def tried(feature: str, composition: str, dtype: str, device: str = "cpu") -> Outcome:
    """Run one cell."""
    known = refusal(feature, composition)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trial = Trial(_problem(feature), DTYPES[dtype], device)
            seen, compared = _compositions[composition](trial)
            wrong = _differences(compared, _tolerance(composition, dtype))
            name = seen.name()
        except Exception as error:
            found = re.search(known.message, str(error)) if known else None
            if found is not None:
                return Outcome(ERROR, found.group())
            return Outcome(FAILURE, f"{type(error).__name__}: {error}"[:2000])
    if known:
        return Outcome(FAILURE, f"expected an error, {known.message}")
    return Outcome(FAILURE, wrong) if wrong else Outcome(name)


def _tolerance(composition: str, dtype: str) -> float:
    return TOLERANCE["bfloat16" if composition == "autocast" and dtype != "float64" else dtype]
