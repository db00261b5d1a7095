"""The functions that a cell may have in place of sigmoid and tanh: those of the ``LSTM`` operator of ONNX.

A user names them, ``"hard_sigmoid"`` or ``("hard_sigmoid", 0.2, 0.5)``. A layer has them as one text, which the
compiled kernels read too: three names with their numbers, for i, f and o, for g, and for c_t in h_t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class _Kind(NamedTuple):
    function: Callable[..., Tensor]
    # Those of ONNX's operator of this name, as text: a compiler would take numbers for some that may change.
    defaults: tuple[str, ...] = ()


# csrc/torch/layer_call.cpp has the same names.
ACTIVATIONS = {
    "sigmoid": _Kind(torch.sigmoid),
    "tanh": _Kind(torch.tanh),
    "affine": _Kind(lambda z, alpha, beta: alpha * z + beta, ("1.0", "0.0")),
    "relu": _Kind(torch.relu),
    "leaky_relu": _Kind(lambda z, alpha: F.leaky_relu(z, alpha), ("0.01",)),
    "thresholded_relu": _Kind(lambda z, alpha: torch.where(z <= alpha, z.new_zeros(()), z), ("1.0",)),
    "elu": _Kind(lambda z, alpha: F.elu(z, alpha), ("1.0",)),
    "scaled_tanh": _Kind(lambda z, alpha, beta: alpha * torch.tanh(beta * z), ("1.0", "1.0")),
    # The gradient of hardtanh is 0 on an edge, that of clamp is not.
    "hard_sigmoid": _Kind(lambda z, alpha, beta: F.hardtanh(alpha * z + beta, 0.0, 1.0), ("0.2", "0.5")),
    "softsign": _Kind(F.softsign),
    # Beyond its threshold torch's function is the identity.
    "softplus": _Kind(lambda z: F.softplus(z, threshold=40)),
}

ONNX_NAMES = {name: name.title().replace("_", "") for name in ACTIVATIONS}

# The argument of a user: a name, or a name and its numbers.
Activation = str | tuple[Any, ...]


def _one(name: str, value: Any) -> str:
    """One function as text. Raises: ValueError, naming the argument and what is known."""
    given = (value,) if isinstance(value, str) else value
    if isinstance(given, (tuple, list)) and len(given) == 1 and given[0] == "identity":
        given = ("affine",)
    known = (
        isinstance(given, (tuple, list)) and given and isinstance(given[0], str) and given[0] in ACTIVATIONS
    )
    if not known:
        raise ValueError(f"{name}: expected one of identity, {', '.join(ACTIVATIONS)}, got {value!r}")
    kind, numbers = given[0], tuple(given[1:])
    defaults = ACTIVATIONS[kind].defaults
    good = len(numbers) <= len(defaults) and all(
        isinstance(x, (int, float, Real)) and not isinstance(x, bool) and math.isfinite(x) for x in numbers
    )
    if not good:
        raise ValueError(
            f"{name}: expected {kind} with at most {len(defaults)} finite numbers, got {value!r}"
        )
    # A negative factor would give one value two slopes.
    positive = kind == "scaled_tanh"
    if kind != "affine" and any(x < 0 or (positive and x == 0) for x in numbers[:1]):
        least = "positive" if positive else "at least 0"
        raise ValueError(f"{name}: expected the first number of {kind} to be {least}, got {value!r}")
    texts = [repr(float(x)) for x in numbers] + list(defaults[len(numbers) :])
    return kind + (f"({','.join(texts)})" if texts else "")


def activation_text(gate: Any, cell: Any) -> str:
    """The functions of a layer, from ``gate_activation`` and ``cell_activation``; empty for sigmoid and tanh.

    Raises:
        ValueError: an unknown function or number; the text lists the known.
    """
    if isinstance(gate, str) and gate == "sigmoid" and isinstance(cell, str) and cell == "tanh":
        return ""
    # A pair of functions, or one function with its numbers.
    pair = isinstance(cell, (tuple, list)) and len(cell) == 2 and isinstance(cell[1], (str, tuple, list))
    candidate, output = cell if pair else (cell, cell)
    functions = [
        _one("gate_activation", gate),
        _one("cell_activation[0]" if pair else "cell_activation", candidate),
        _one("cell_activation[1]" if pair else "cell_activation", output),
    ]
    return "" if functions == ["sigmoid", "tanh", "tanh"] else " ".join(functions)


def split_text(text: str) -> list[tuple[str, tuple[float, ...]]]:
    """The three functions of a layer: names and numbers."""
    found = []
    for part in (text or "sigmoid tanh tanh").split(" "):
        kind, _, numbers = part.partition("(")
        found.append((kind, tuple([float(x) for x in numbers.rstrip(")").split(",") if x])))
    return found


def activation_functions(text: str) -> tuple[Callable[[Tensor], Tensor], ...]:
    """The three functions of a layer, in torch's operators."""
    return tuple([_bound(ACTIVATIONS[kind].function, numbers) for kind, numbers in split_text(text)])


def _bound(function: Callable[..., Tensor], numbers: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    return (lambda z: function(z, *numbers)) if numbers else function
