"""What a package computes with torch's layers and with ours, held against each other."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from judge import assert_as_accurate_as_torch
from torch import Tensor, nn

import lstm_ext

Results = Mapping[str, Tensor]
_Model = TypeVar("_Model", bound=nn.Module)

# For parameters after some steps of Adam, which divides by what may be small.
TRAINED = {"rtol": 1e-4, "atol": 1e-6}


def converted(model: _Model, count: int = 1) -> _Model:
    """A copy of the model with our layers; there have to be ``count`` of them, and no others."""
    ours = lstm_ext.convert(copy.deepcopy(model))
    entries = lstm_ext.report(ours)
    assert [entry.ours for entry in entries] == [True] * count, entries
    return ours


def check_accuracy(model: nn.Module, run: Callable[[nn.Module], Results], count: int = 1) -> None:
    """``run`` has to compute in the dtype of the model that it is given."""
    reference = run(copy.deepcopy(model).double())
    theirs, ours = run(copy.deepcopy(model)), run(converted(model, count))
    assert {result.dtype for result in reference.values()} == {torch.float64}
    assert_as_accurate_as_torch(ours, theirs, reference)


def with_gradients(model: nn.Module, results: Results) -> dict[str, Tensor]:
    """The results, and the gradients of all parameters that they depend on, from the same random cotangents."""
    generator = torch.Generator().manual_seed(1)
    found = {name: result for name, result in results.items() if result.requires_grad}
    weights = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in found.values()]
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(list(found.values()), parameters, weights, allow_unused=True)
    there = {f"gradient of {n}": g for n, g in zip(names, gradients, strict=True) if g is not None}
    assert any(["weight_hh" in name for name in there]), "no gradient of an LSTM"
    return dict(results) | there


def check_state_dicts(model: nn.Module, count: int = 1) -> None:
    """Each side takes the other's, by way of a file."""
    ours = converted(model, count)
    for source, target in ((model, ours), (ours, copy.deepcopy(model))):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        with torch.no_grad():
            for parameter in target.parameters():
                parameter.zero_()
        target.load_state_dict(torch.load(file, weights_only=True))
        assert_same(target, source, rtol=0, atol=0)


def assert_same(one: nn.Module, other: nn.Module, rtol: float, atol: float) -> None:
    found, expected = one.state_dict(), other.state_dict()
    assert list(found) == list(expected)
    torch.testing.assert_close(dict(found), dict(expected), rtol=rtol, atol=atol)


@contextlib.contextmanager
def either(ours: bool):
    """Our layers for what is built inside, or torch's."""
    with lstm_ext.patch() if ours else contextlib.nullcontext():
        yield
