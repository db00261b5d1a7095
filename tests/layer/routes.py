"""What the tests of routes share: the names of the routes, and fixtures that see which one a call takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lstm_ext
from lstm_ext.layer import equations, transforms
from lstm_ext.native import integrations, loader

T, B, I, H = 5, 2, 3, 4
KERNELS = ("lstm_layer_forward", "lstm_layer_backward")
ENTRIES = ("lstm_layer", "lstm_cell")
OPERATORS = ("lstm_layer", *KERNELS)

# The routes, as `events` names them.
DIRECT = ["kernel lstm_layer"]
CELL = ["kernel lstm_cell"]
KERNEL_BACKWARD: list[
    str
] = []  # in C++, and by none of the ways below; see test_backward_is_one_call_of_the_kernels
OPERATOR = ["operator lstm_layer"]
TRANSFORM = ["transforms", "operator lstm_layer_forward"]  # and backward:
OPERATOR_BACKWARD = ["gradients", "operator lstm_layer_backward"]
TRANSFORM_INFERENCE = ["transforms", "operator lstm_layer"]
REFERENCE = ["reference"]


@pytest.fixture
def layer() -> lstm_ext.LSTM:
    return lstm_ext.LSTM(I, H)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(T, B, I)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a call passes through, in order."""
    integrations.install()  # which the first layer does: formulas of FLOPs are registered for the operators themselves
    seen: list[str] = []

    def recorded(event: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args, **kwargs):
            seen.append(event)
            return function(*args, **kwargs)

        return record

    extension = loader.extension()

    class Kernels:
        def __getattr__(self, name):
            value = getattr(extension, name)
            if name == "lstm_module":
                return module_call(value, seen, DIRECT[0])
            if name == "lstm_cell_module":
                return module_call(value, seen, CELL[0])
            return recorded(f"kernel {name}", value) if name in ENTRIES else value

    kernels = Kernels()
    monkeypatch.setattr(loader, "extension", lambda: kernels)
    monkeypatch.setattr(transforms, "lstm_layer", recorded("transforms", transforms.lstm_layer))
    monkeypatch.setattr(transforms, "layer_gradients", recorded("gradients", transforms.layer_gradients))
    monkeypatch.setattr(equations, "lstm_layer", recorded("reference", equations.lstm_layer))

    class Operator:
        """torch looks an operator up again by its name, and then for an overload of it."""

        def __init__(self, name):
            self.name, self.operator = name, getattr(torch.ops.lstm_ext, name)
            self.is_called = False

        def __call__(self, *args, **options):
            if self.is_called:  # looked up again by the mode behind a default device
                return self.operator(*args, **options)
            seen.append(f"operator {self.name}")
            self.is_called = True
            try:
                return self.operator(*args, **options)
            finally:
                self.is_called = False

        def __getattr__(self, attribute):
            return getattr(self.operator, attribute)

    for name in OPERATORS:
        monkeypatch.setattr(torch.ops.lstm_ext, name, Operator(name))
    return seen


@pytest.fixture
def taken(events: list[str]) -> Callable[[Callable[[], Any]], list[str]]:
    """The events of a computation."""

    def taken(compute: Callable[[], Any]) -> list[str]:
        events.clear()
        compute()
        return events.copy()

    return taken


def module_call(function: Callable[..., Any], seen: list[str], event: str) -> Callable[..., Any]:
    """The extension's functions for modules, which compute all layers or decline: an event for each layer."""

    def call(input, hx, weights, *others):
        results = function(input, hx, weights, *others)
        if results is not None:
            seen.extend([event] * (1 if isinstance(weights[0], Tensor) else len(weights)))
        return results

    return call


class Named(Tensor):
    """A subclass with nothing but ``__torch_function__``, which every subclass inherits."""

    @property
    def plain(self):
        return self.as_subclass(Tensor)
