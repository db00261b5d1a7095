"""Layers of the matrix as functions of tensors, on the kernels and on the equations, for the tests of derivatives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from devices import moved
from matrix.cases import arguments_of, case_of, make_module, tensors_of
from matrix.routes import ROUTES
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

import lstm_ext
from lstm_ext.layer import equations, route

F64 = torch.float64
OPERATORS = ("lstm_layer", "lstm_layer_forward", "lstm_layer_backward")

# A route of the matrix; a form, a cell and a call of its table.
MODELS: dict[str, tuple[str, str, str, str]] = {
    "plain": ("eager", "dense", "plain", ""),
    "all": ("eager", "all", "plain", ""),
    "no states": ("eager", "two directions", "plain", "resets"),
    "batch first": ("eager", "batch first, two layers", "peephole, clip, coupled", "resets to a state"),
    "unbatched": ("eager", "unbatched", "plain", ""),
    "one step": ("eager", "one step", "plain", ""),
    "packed": ("eager", "packed", "plain", ""),
    "packed, sorted": ("eager", "packed, sorted", "functions", "returned"),
    "lengths": ("eager", "two directions", "zoneout", "all"),
    "norm": ("eager", "dense", "norm", "resets to a state"),
    "recompute": ("eager", "dense", "recompute", "resets to a state"),
    "steps": ("steps", "batch first, two layers", "plain", ""),
    "functional": ("functional", "two directions", "plain", ""),
    "cells": ("cells", "dense", "plain", ""),
}
every_model = pytest.mark.parametrize("model", MODELS)
# For what is slow and more about the transforms than about the layer; forward mode has no recompute.
some_models = pytest.mark.parametrize("model", ["plain", "all", "no states", "packed", "norm", "cells"])


class Model(NamedTuple):
    p: dict[str, Tensor]
    x: Tensor
    h: Tensor
    c: Tensor
    call: Callable[..., tuple[Tensor, ...]]  # of (p, x, h, c)
    layers: int
    recompute: bool

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self[:4]

    def loss(self, p: Any, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        output, h_n, c_n, *extras = self.call(p, x, h, c)
        total = output.sin().sum() + h_n.cos().sum() + c_n.square().sum()
        return sum([e.sin().sum() for e in extras], total)

    def of(self, i: int) -> Callable[[Any], Tensor]:
        """The loss as a function of its argument i only."""
        return lambda a: self.loss(*self[:i], a, *self[i + 1 : 4])


class Called(nn.Module):
    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, *arguments: Any, **more: Any) -> Any:
        return self.call(self.module, *arguments, **more)


def make_model(name: str, device: str = "cpu") -> Model:
    route, *names = MODELS[name]
    with torch.device("cpu"):
        case = case_of(*names, input_size=2, hidden_size=4, frozen=frozenset({"reset_h", "reset_c"}))
        tensors = tensors_of(case)
        module = Called(make_module(lstm_ext.LSTM, case, F64, tensors.weights), ROUTES[route].call)
        _, input, hx, more = arguments_of(case, tensors, F64)
        sets = case.num_layers * case.directions
        own = [torch.randn(sets, len(case.lengths), n, dtype=F64) for n in case.state_sizes]
    more = moved(more, device)
    p = {n: t.detach().to(device) for n, t in module.named_parameters()}
    x, h, c = [t.detach().to(device) for t in (input.data if case.packed else input, *(hx or own))]
    indices = [None if not case.packed or i is None else i.to(device) for i in input[2:4]]

    def call(p: Any, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        data = type(input)(x, input.batch_sizes, *indices) if case.packed else x
        y, (h_n, c_n), *extras = functional_call(module, p, (data, (h, c) if case.hx else None), more)
        if not case.hx:  # they have derivatives all the same
            h_n, c_n = h_n * c.sin(), c_n * h.sin()
        return (
            y.data if case.packed else y,
            h_n,
            c_n,
            *[e for extra in extras for e in extra if e is not None],
        )

    recompute = case.options is not None and case.options.recompute
    return Model(p, x, h, c, call, case.num_layers, recompute)


def several(tree: Any, n: int = 2) -> Any:
    """n variations of each tensor, stacked."""
    return tree_map(lambda t: torch.stack([t, *[torch.randn_like(t) for _ in range(n - 1)]]), tree)


def several_of(tree: Any) -> Any:
    """As `several`, for use where random numbers would be drawn inside of vmap."""
    return tree_map(lambda t: torch.stack([t, 0.5 * t.flip(-1)]), tree)


# ---- on the kernels and on the reference


@contextlib.contextmanager
def operator_calls() -> Iterator[list[str]]:
    """The operators that are called within, by name."""
    calls: list[str] = []

    def recorded(name: str) -> Callable[..., Any]:
        operator = getattr(torch.ops.lstm_ext, name)

        def record(*args, **options):
            calls.append(name)
            return operator(*args, **options)

        return record

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATORS:
            patch.setattr(torch.ops.lstm_ext, name, recorded(name))
        yield calls


@contextlib.contextmanager
def on_reference() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(route, "lstm_layer", equations.lstm_layer)
        patch.setattr(route, "plain_layers", lambda *_: None)
        patch.setattr(route, "plain_cell", lambda *_: None)
        patch.setattr(route, "is_direct", lambda _: False)  # for cells
        yield


def assert_close(result: Any, expected: Any) -> None:
    """Each tensor to 11 digits of its largest element."""
    leaves, expected_leaves = tree_leaves(result), tree_leaves(expected)
    assert [t.shape for t in leaves] == [t.shape for t in expected_leaves]
    for t, e in zip(leaves, expected_leaves, strict=True):
        largest = e.abs().max().item() if e.numel() else 0.0
        torch.testing.assert_close(t, e, rtol=0, atol=1e-11 * largest + 1e-14)


def assert_as_on_reference(compute: Callable[[], Any]) -> None:
    with operator_calls() as calls:
        result = compute()
    assert calls, "no operator was called"
    with on_reference(), operator_calls() as calls:
        expected = compute()
    assert not calls
    assert any(t.abs().max() > 1e-6 for t in tree_leaves(expected))
    assert_close(result, expected)
