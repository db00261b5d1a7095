"""Every way on which a layer is computed, and which cases it has.

A `Route` calls a module: what it returns is judged as a call of the module itself. A new way for numbers to leave the
library is a row here.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from graphs import Recorder
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jvp, vjp, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import lstm_ext
from lstm_ext import functional, reference
from lstm_ext.native import loader
from lstm_ext.options import OPTIONS

from .cases import OF_GRU, Case
from .judge import Call, by_itself

__all__ = ["ROUTES", "Holder", "NestedLSTM", "Route"]


class Route(NamedTuple):
    """One way to compute a layer.

    Attributes:
        call: see `judge.Call`.
        has: whether it has a case.
        modes: those of a case that it has: "grad", "no_grad", "inference_mode", "twice" for gradients of gradients.
        kind: the class of the module.
        tier: "" for `make test`, "tools" for what takes long.
        share: the number of its cases that are of this tier.
        others: whether the tier "full" has its other cases, which it has not where one takes half a minute.
        dtype: that of its cases, "" for any.
        gru: whether it has the cell "GRU".
    """

    call: Call
    has: Callable[[Case], bool] = lambda case: True
    modes: tuple[str, ...] = ("grad", "no_grad", "inference_mode", "twice")
    kind: type[nn.Module] = lstm_ext.LSTM
    tier: str = ""
    share: int = 24
    others: bool = True
    dtype: str = ""
    gru: bool = True

    def cases(self, cases: dict[str, Case], mode: str) -> dict[str, Case]:
        """Those of a table that it has, in a mode that it has."""
        if mode not in self.modes:
            return {}
        changed = {n: replace(c, mode=mode, dtype=self.dtype or c.dtype) for n, c in cases.items()}
        return {n: c for n, c in changed.items() if self.has(c) and (self.gru or c.cell != "GRU")}


# --- which cases


def draws(case: Case) -> bool:
    """Whether anything is random."""
    drawn = [name for name, option in OPTIONS.items() if option.random and getattr(case.options, name, 0)]
    return case.training and bool(drawn or (case.dropout and case.num_layers > 1))


def called_with(case: Case) -> set[str]:
    """The arguments of the call after ``hx``."""
    if case.options is None:
        return set()
    names = {f"return_{name}" for name in case.options.returned}
    names |= {"lengths"} if case.options.lengths is not None else set()
    names |= {"resets"} if case.options.resets is not None else set()
    return names | ({"reset_state"} if case.options.reset_state else set())


def draws_what_it_reads(case: Case) -> bool:
    """Whether the masks of the steps that count alone are drawn, since the lengths are numbers that the host knows."""
    return draws(case) and "lengths" in called_with(case) and not case.options.unread


def is_plain(case: Case) -> bool:
    return case.options is None


# --- calls


def by_steps(module: Any, x: Tensor, hx: Any, resets: Any = None, reset_state: Any = None) -> Any:
    """One call of ``step`` for each step; the state of a sequence is replaced where it is reset."""
    x, resets = (
        t.transpose(0, 1) if module.batch_first and t is not None and x.dim() == 3 else t for t in (x, resets)
    )
    outputs = []
    for t in range(len(x)):
        if resets is not None and bool(resets[t].any()):
            flags = resets[t].view(1, *resets[t].shape, 1).bool()
            if hx is None:
                batch = x.shape[1:-1]
                sizes = (module.proj_size or module.hidden_size, module.hidden_size)[: 1 if module.gru else 2]
                hx = tuple([x.new_zeros(module.num_layers, *batch, n) for n in sizes])
            others = reset_state or [torch.zeros_like(s) for s in hx]
            hx = tuple([torch.where(flags, new, s) for new, s in zip(others, hx, strict=True)])
        y, hx = module.step(x[t], hx)
        outputs.append(y)
    output = torch.stack(outputs)
    return output.transpose(0, 1) if module.batch_first and output.dim() == 3 else output, hx


def function_arguments(module: Any) -> dict[str, Any]:
    """What a function without a module takes after ``hx``, with the parameters of the module."""
    parameters = dict(module.named_parameters())
    own: dict[str, list[Tensor]] = {}
    for option in OPTIONS.values():
        if (added := option.parameters) is not None:
            names = [n for layer in module._names_of(added) for n in layer if n in parameters]
            if names:
                own[added.keyword] = [parameters.pop(n) for n in names]
    given = {
        name: v
        for name, v in module._given.items()
        if OPTIONS[name].call and (OPTIONS[name].parameters is None or v == "cell")
    }
    names = ("bias", "num_layers", "dropout", "training", "bidirectional", "batch_first")
    plain = {name: getattr(module, name) for name in names}
    return {"weights": list(parameters.values()), **plain, **given, **own}


def by_function(functions: Any, module: Any) -> Any:
    """``lstm`` or ``gru`` of a Python module, with the arguments of a layer."""
    return partial(getattr(functions, module.mode.lower()), **function_arguments(module))


def changed(change: Callable[[Any], Any], module: Any, x: Any, hx: Any, **more: Any) -> Any:
    """A call of what ``change`` makes of the layer: of a GRU itself, and not of the class that is judged."""
    if not module.gru:
        return change(module)(x, hx, **more)
    layer = copy.copy(module)
    layer.__class__ = lstm_ext.GRU
    more |= {"reset_state": more["reset_state"][0]} if more.get("reset_state") else {}
    y, h = change(layer)(x, None if hx is None else hx[0], **more)
    return y, (h,)


def by_cells(module: Any, x: Tensor, hx: Any) -> Any:
    """A cell for each layer, which shares its parameters."""
    kind: Any = lstm_ext.GRUCell if module.gru else lstm_ext.LSTMCell
    x = x.transpose(0, 1) if module.batch_first and x.dim() == 3 else x
    finals = []
    for k in range(module.num_layers):
        with mock.patch.object(kind, "reset_parameters"):  # under vmap nothing may be drawn
            cell = kind(x.size(-1), module.hidden_size, module.bias, device="meta")
        shared = {name: getattr(module, f"{name}_l{k}") for name, _ in cell.named_parameters()}
        state = None if hx is None else tuple([s[k] for s in hx])
        outputs = []
        for x_t in x:
            given = state[0] if state is not None and module.gru else state
            found = functional_call(cell, shared, (x_t, given))
            state = (found,) if module.gru else found
            outputs.append(state[0])
        finals.append(state)
        x = torch.stack(outputs)
    states = tuple([torch.stack(of_layers) for of_layers in zip(*finals, strict=True)])
    return x.transpose(0, 1) if module.batch_first and x.dim() == 3 else x, states


class _Nested:
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

        y, states, *extras = super().forward(
            nested(input.data),
            sorted_states(hx),
            resets=None if resets is None else nested(resets.data),
            reset_state=sorted_states(reset_state),
            **asked,
        )
        y = input._replace(data=y.values().index_select(0, back))
        unsorted = input.unsorted_indices
        states = states if unsorted is None else tuple([s.index_select(1, unsorted) for s in states])
        return y, states, *[e.map(lambda values: values.index_select(1, back)) for e in extras]


class NestedLSTM(_Nested, lstm_ext.LSTM):
    pass


class NestedGRU(_Nested, OF_GRU[lstm_ext.LSTM]):  # type: ignore[misc]
    pass


OF_GRU[NestedLSTM] = NestedGRU


def under_a_mode(module: Any, x: Any, hx: Any, **more: Any) -> Any:
    """Under a dispatch mode the registered operators compute."""
    with Recorder() as recorder:
        results = module(x, hx, **more)
    assert recorder.names, "no operator was called"
    return results


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    nothing = loader._Result(None, loader.Status("torch", reason="a test"))
    with mock.patch.object(loader, "_result", nothing), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # options are slow without kernels
        yield


def by_torch_operator(module: Any, x: Any, hx: Any, **more: Any) -> Any:
    """As on a platform without kernels."""
    with without_kernels():
        return module(x, hx, **more)


def by_vmap(module: Any, x: Any, hx: Any, **more: Any) -> Any:
    """The first of two samples, with the same random masks."""
    packed = isinstance(x, PackedSequence)
    data = x.data if packed else x

    def call(data: Tensor) -> Any:
        y, states, *extras = module(x._replace(data=data) if packed else data, hx, **more)
        return (
            y.data if packed else y,
            states,
            *[{n: e for n, e in extra._asdict().items() if e is not None} for extra in extras],
        )

    y, states, *extras = vmap(call, randomness="same")(torch.stack([data, 0.5 * data]))
    first = [lstm_ext.LSTMExtras(**{n: extra[n][0] if n in extra else None for n in lstm_ext.LSTMExtras._fields})
             for extra in extras]  # fmt: skip
    return x._replace(data=y[0]) if packed else y[0], tuple([s[0] for s in states]), *first


class _ByTransform(torch.autograd.Function):
    """A function whose values and whose gradients two other functions give."""

    @staticmethod
    def forward(ctx: Any, values: Any, gradients: Any, *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.gradients = gradients
        ctx.save_for_backward(*leaves)
        return tuple(values(*leaves))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        return None, None, *ctx.gradients(ctx.saved_tensors, grads)


def differentiated(values: Any, gradients: Any, module: Any, x: Any, hx: Any, **more: Any) -> Any:
    """A call whose gradients are those of a transform: ``gradients`` takes a function, its leaves and what goes in."""
    packed = isinstance(x, PackedSequence)
    given = {"x": x.data if packed else x, "hx": hx, "reset_state": more.pop("reset_state", None)}
    parameters = dict(module.named_parameters())
    leaves, form = tree_flatten(({n: v for n, v in given.items() if v is not None}, parameters))

    def function(*leaves: Tensor) -> list[Tensor]:
        given, parameters = tree_unflatten(leaves, form)
        data, hx = given.pop("x"), given.pop("hx", None)
        input = x._replace(data=data) if packed else data
        y, *rest = functional_call(module, parameters, (input, hx), more | given)
        rest = [tuple(found) for found in rest]  # the states and the extras
        return [t for t in tree_leaves((y.data if packed else y, rest)) if t is not None]

    y, *rest = _ByTransform.apply(partial(values, function), partial(gradients, function), *leaves)
    count = 1 if module.gru else 2
    states, rest = rest[:count], rest[count:]
    names = [name for name in lstm_ext.LSTMExtras._fields if f"return_{name}" in more]
    extras = [lstm_ext.LSTMExtras(**dict(zip(names, rest, strict=True)))] if names else []
    return x._replace(data=y) if packed else y, tuple(states), *extras


def of_samples(function: Any, data: Tensor, *shared: Tensor) -> list[Tensor]:
    """The values of the first of two samples."""
    found = vmap(lambda data: function(data, *shared))(torch.stack([data, 0.5 * data]))
    return [y[0] for y in found]


def per_sample_gradients(function: Any, leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Those of the first of two samples, which share all but the input."""
    data, *shared = leaves

    def of_one(data: Tensor, grads: list[Tensor]) -> tuple[Tensor, ...]:
        return vjp(function, data, *shared)[1](grads)

    found = vmap(of_one)(torch.stack([data, 0.5 * data]), [torch.stack([g, -g]) for g in grads])
    return [g[0] for g in found]


def of_dual_numbers(function: Any, *leaves: Tensor) -> list[Tensor]:
    return jvp(function, leaves, leaves)[0]


def forward_gradients(function: Any, leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> Sequence[Tensor]:
    """The slope along each number of each leaf."""

    def weighted(*leaves: Tensor) -> Tensor:
        return torch.stack([(y * g).sum() for y, g in zip(function(*leaves), grads, strict=True)]).sum()

    return jacfwd(weighted, tuple(range(len(leaves))))(*leaves)


def on_device(device: str, module: Any, x: Any, hx: Any, **more: Any) -> Any:
    """On another device, with arguments, gradients and results on the CPU."""

    def moved(found: Any, device: str) -> Any:
        kinds = (Tensor, PackedSequence)  # which keeps its sizes on the CPU
        return tree_map(
            lambda t: t.to(device) if isinstance(t, kinds) else t,
            found,
            is_leaf=lambda t: isinstance(t, kinds),
        )

    given = moved((dict(module.named_parameters()), (x, hx), more), device)
    return moved(functional_call(module, *given), "cpu")


def under_autocast(module: Any, x: Any, hx: Any, **more: Any) -> Any:
    """In float32, with numbers of the lower precision: a layer of that precision has the same results."""
    wide = partial(tree_map, lambda t: t.float() if isinstance(t, Tensor) and t.is_floating_point() else t)
    input = x._replace(data=x.data.float()) if isinstance(x, PackedSequence) else x.float()
    dtype = module.weight_ih_l0.dtype
    with torch.autocast("cpu", dtype):
        results = functional_call(
            module, wide(dict(module.named_parameters())), (input, wide(hx)), wide(more)
        )
    y, states, *extras = results
    # Elsewhere than in oneDNN's layer torch lowers the precision of the products alone.
    y = y._replace(data=y.data.to(dtype)) if isinstance(y, PackedSequence) else y.to(dtype)
    of_extras = [lstm_ext.LSTMExtras(*[e if e is None else e.to(dtype) for e in extra]) for extra in extras]
    return y, tuple([s.to(dtype) for s in states]), *of_extras


def compiled(module: Any, x: Any, hx: Any, **more: Any) -> Any:
    """In one graph, by torch's own code; twice, so that the second call runs what the first one compiled."""
    function = torch.compile(by_itself, backend="aot_eager", fullgraph=True)
    state = torch.get_rng_state()
    function(module, x, hx, **more)
    torch.set_rng_state(state)
    return function(module, x, hx, **more)


class _Called(nn.Module):
    """A module with the arguments of a call by place."""

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, x: Any, hx: Any, *more: Any) -> Any:
        y, states, *extras = self.module(x, hx, **dict(zip(self.names, more, strict=True)))
        y = y.data if isinstance(y, PackedSequence) else y
        return y, states, *[tuple(extra) for extra in extras]


def _results_of(found: Any, x: Any) -> Any:
    y, states, *extras = found
    return (
        x._replace(data=y) if isinstance(x, PackedSequence) else y,
        states,
        *[lstm_ext.LSTMExtras(*e) for e in extras],
    )


def exported(module: Any, x: Any, hx: Any, **more: Any) -> Any:
    """A program that was saved and loaded."""
    called = _Called(module, list(more))
    state = torch.get_rng_state()
    program = torch.export.export(called, (x, hx, *more.values()), strict=False)
    torch.set_rng_state(state)
    # torch.export cannot save the type of packed data, and tensordict, once imported, makes its own of saved lists.
    if not (isinstance(x, PackedSequence) or any([isinstance(v, list) for v in more.values()])):
        torch.export.save(program, file := io.BytesIO())
        file.seek(0)
        program = torch.export.load(file)
    return _results_of(program.module()(x, hx, *more.values()), x)


def ahead_of_time(module: Any, x: Tensor, hx: Any, **more: Any) -> Any:
    """A library that AOTInductor compiles: it calls the operator from C++, without Python."""
    arguments = (x, hx, *more.values())
    program = torch.export.export(_Called(module, list(more)), arguments, strict=False)
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/model.pt2")
        return _results_of(torch._inductor.aoti_load_package(path)(*arguments), x)


def converted(module: Any) -> Any:
    """torch's layer with these weights, after `convert`."""
    return lstm_ext.convert(lstm_ext.revert(copy.copy(module)))


class Holder(nn.Module):
    """A model that holds the layer, as ``torch.jit`` takes it."""

    def __init__(self, lstm: nn.Module) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(
        self, x: torch.Tensor, hx: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        return self.lstm(x, hx)


class GRUHolder(nn.Module):
    """The same for a GRU."""

    def __init__(self, gru: nn.Module) -> None:
        super().__init__()
        self.gru = gru

    def forward(self, x: torch.Tensor, hx: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gru(x, hx)


def scripted(module: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it
        return torch.jit.script((GRUHolder if module.gru else Holder)(module))


def traced(module: Any, x: Tensor, hx: Any) -> Any:
    arguments = (x,) if hx is None else (x, hx)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(Holder(module), arguments, check_trace=False)(*arguments)


def by_onnx_runtime(module: Any, x: Tensor, hx: Any, **more: Any) -> Any:
    asked = {name: value for name, value in more.items() if value is True}
    given = {"input": x, "hx": hx, **{name: v for name, v in more.items() if name not in asked}}
    if isinstance(given.get("lengths"), list):
        given["lengths"] = torch.tensor(given["lengths"], dtype=torch.int64)
    leaves, form = tree_flatten(given)
    tensors = [leaf for leaf in leaves if leaf is not None]

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = module

        def forward(self, *tensors: Tensor) -> Any:
            left = iter(tensors)
            y, states, *extras = self.lstm(
                **tree_unflatten([None if leaf is None else next(left) for leaf in leaves], form), **asked
            )
            return y, *states, *[e for extra in extras for e in extra if e is not None]

    program = lstm_ext.onnx.export(Called(), tuple(tensors), verbose=False)
    y, *rest = [torch.as_tensor(found) for found in program(*tensors)]
    count = 1 if module.gru else 2
    states, rest = tuple(rest[:count]), rest[count:]
    return y, states, *([lstm_ext.LSTMExtras(*rest)] if rest else ())


def by_the_c_library(module: Any, x: Tensor, hx: Any) -> Any:
    from c_library import Model, Stream

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        lstm_ext.freeze(module).save_native(path)
        model = Model(path)
    rows = x.transpose(0, 1) if module.batch_first else x
    stream = Stream(model, rows.size(1), rows.size(0))
    for name, state in zip("hc", hx or (), strict=False):
        stream.state(name).copy_(state)
    y = stream.run(rows)
    states = stream.state("h").clone(), stream.state("c").clone()
    return y.transpose(0, 1) if module.batch_first else y, states


# --- the table

NO_GRADIENTS = ("no_grad",)
ONCE = ("grad", "no_grad")

ROUTES: dict[str, Route] = {
    "eager": Route(by_itself),
    "steps": Route(
        by_steps,
        lambda c: (
            not (c.bidirectional or c.packed or draws(c)) and called_with(c) <= {"resets", "reset_state"}
        ),
    ),
    "functional": Route(
        partial(changed, partial(by_function, functional)), lambda c: c.layout != "unbatched"
    ),
    "reference": Route(partial(changed, partial(by_function, reference)), lambda c: c.layout != "unbatched"),
    "cells": Route(
        by_cells,
        lambda c: is_plain(c) and not (c.bidirectional or c.packed or c.proj_size or draws(c)),
        ("grad", "no_grad", "twice"),
    ),
    # torch has no second derivatives of nested tensors.
    "nested tensor": Route(
        by_itself, lambda c: c.packed, ("grad", "no_grad", "inference_mode"), kind=NestedLSTM
    ),
    # Nothing is read under a mode or by a compiler.
    "dispatch mode": Route(under_a_mode, lambda c: not draws_what_it_reads(c), ONCE),
    "torch's operator": Route(by_torch_operator, modes=("grad", "no_grad", "twice")),
    "vmap": Route(by_vmap, lambda c: not draws_what_it_reads(c), ("grad", "no_grad", "twice")),
    "per-sample gradients": Route(
        partial(differentiated, of_samples, per_sample_gradients),
        lambda c: not draws(c),
        ("grad", "twice"),
        share=16,
    ),
    "forward mode": Route(
        partial(differentiated, of_dual_numbers, forward_gradients),
        lambda c: not (draws(c) or (c.options and c.options.recompute)),
        ("grad", "twice"),
        share=16,
    ),
    "autocast": Route(under_autocast, modes=ONCE, share=16, dtype="bfloat16"),
    "compile": Route(compiled, lambda c: not draws_what_it_reads(c), ONCE, tier="tools"),
    "export": Route(exported, lambda c: not draws_what_it_reads(c), NO_GRADIENTS, tier="tools"),
    # Lists without a tensor and numbers are among the arguments of the operator.
    "AOTInductor": Route(
        ahead_of_time,
        lambda c: not (c.packed or draws(c)) and len(called_with(c)) > 1,
        NO_GRADIENTS,
        tier="tools",
        share=2,
        others=False,
    ),
    "frozen": Route(partial(changed, lstm_ext.freeze), lambda c: not draws(c), NO_GRADIENTS),
    "convert": Route(partial(changed, converted), is_plain),
    "TorchScript": Route(partial(changed, scripted), lambda c: is_plain(c) and not c.packed, ("no_grad",)),
    "trace": Route(traced, lambda c: is_plain(c) and not (c.packed or draws(c)), NO_GRADIENTS),
    "ONNX Runtime": Route(
        by_onnx_runtime,
        lambda c: not (c.packed or draws(c)),
        NO_GRADIENTS,
        tier="tools",
        dtype="float32",
    ),
    "C library": Route(
        by_the_c_library,
        lambda c: (
            c.layout == "batched"
            and len(c.lengths) > 0
            and c.dtype in ("float32", "float64")
            and not (called_with(c) or draws(c))
        ),
        NO_GRADIENTS,
        tier="tools",
        gru=False,
    ),
}
