"""Weights that are computed from other parameters: norms, parametrizations, pruning, dropped weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import (
    parametrizations,
    parametrize,
    prune,
    remove_spectral_norm,
    remove_weight_norm,
    spectral_norm,
    weight_norm,
)

import lstm_ext

CONFIG = {"num_layers": 2, "bidirectional": True, "proj_size": 2, "dtype": torch.float64}
# One of each kind, in the first layer and in the last direction.
NAMES = ("weight_hh_l0", "weight_ih_l1_reverse", "weight_hr_l0", "bias_ih_l1")
MATRICES = NAMES[:3]


class Softplus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x) - 0.5


def on_each(apply: Callable[..., object], names: tuple[str, ...] = MATRICES, **kwargs):
    def change(module: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's deprecation of weight_norm
            for name in names:
                apply(module, name, **kwargs)

    return change


def remove_parametrization(module: nn.Module, name: str) -> None:
    parametrize.remove_parametrizations(module, name, leave_parametrized=True)


# What puts the computation in place, and what makes its present result a plain parameter again.
WAYS = {
    "weight_norm by hook": (on_each(weight_norm), on_each(remove_weight_norm)),
    "spectral_norm by hook": (on_each(spectral_norm), on_each(remove_spectral_norm)),
    "weight_norm": (on_each(parametrizations.weight_norm), on_each(remove_parametrization)),
    "spectral_norm": (on_each(parametrizations.spectral_norm), on_each(remove_parametrization)),
    "orthogonal": (on_each(parametrizations.orthogonal), on_each(remove_parametrization)),
    "softplus": (
        on_each(lambda m, name: parametrize.register_parametrization(m, name, Softplus()), NAMES),
        on_each(remove_parametrization, NAMES),
    ),
    "pruned": (on_each(prune.l1_unstructured, NAMES, amount=0.4), on_each(prune.remove, NAMES)),
    "pruned twice": (
        lambda m: (
            on_each(prune.l1_unstructured, NAMES, amount=0.4)(m),
            on_each(prune.ln_structured, amount=0.3, n=2, dim=0)(m),
        ),
        on_each(prune.remove, NAMES),
    ),
    "pruned at random": (
        on_each(prune.random_unstructured, NAMES, amount=0.4),
        on_each(prune.remove, NAMES),
    ),
}


@pytest.fixture
def module():
    return lstm_ext.LSTM(3, 4, **CONFIG)


@pytest.fixture
def x():
    return torch.randn(5, 2, 3, dtype=torch.float64)


def results(module: nn.Module, call: Callable[[], tuple]) -> dict[str, Tensor]:
    """Outputs, and the gradients of the parameters that there are."""
    output, (h_n, c_n) = call()
    module.zero_grad()
    (output.square().sum() + h_n.sum() + c_n.sum()).backward()
    gradients = {f"grad of {name}": p.grad for name, p in module.named_parameters()}
    return {"output": output, "h_n": h_n, "c_n": c_n} | gradients


def by_equations(module: lstm_ext.LSTM, x: Tensor):
    weights = [getattr(module, name) for name in module._flat_weights_names]
    return lstm_ext.reference.lstm(x, None, weights, num_layers=2, bidirectional=True)


@pytest.mark.parametrize("way", WAYS)
def test_computed_weights(module, x, way):
    plain = [name for name, _ in module.named_parameters()]
    before = copy.deepcopy(module)
    add, remove = WAYS[way]
    add(module)
    if "weight_norm" in way:  # which begins with the weight as it was
        with torch.no_grad():
            for name, p in module.named_parameters():
                if name.endswith(("_g", "original0")):
                    p.mul_(2)
    module.eval()  # spectral_norm then takes the same step for every reader
    # By hook, the tensor lies in the module from the last call on, with a graph that a backward pass uses up.
    ours = results(module, lambda: module(x))
    module(x)
    expected = results(module, lambda: by_equations(module, x))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert len(ours) >= 3 + len(plain)
    assert all(gradient.abs().sum() > 0 for gradient in ours.values())
    assert not torch.allclose(ours["output"], before(x)[0])

    remove(module)
    assert sorted(name for name, _ in module.named_parameters()) == sorted(plain)
    torch.testing.assert_close(module(x)[0], ours["output"], rtol=1e-10, atol=1e-12)
    theirs = nn.LSTM(3, 4, **CONFIG)
    theirs.load_state_dict(module.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that oneDNN knows no projections
        torch.testing.assert_close(theirs(x)[0], ours["output"], rtol=1e-10, atol=1e-12)


def test_training_keeps_an_orthogonal_weight_orthogonal(module, x):
    parametrizations.orthogonal(module, "weight_hh_l0")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = (module(x)[0] - 0.5).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    w = module.weight_hh_l0
    torch.testing.assert_close(w.T @ w, torch.eye(2, dtype=torch.float64))


def test_cached_parametrization(module, x):
    """Within the context every reader, the module among them, gets the same tensor."""
    calls = []

    class Counted(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            calls.append(w)
            return w * 2

    parametrize.register_parametrization(module, "weight_hh_l0", Counted())
    calls.clear()
    expected = module(x)[0]
    assert len(calls) == 1  # one step of a module reads each weight once
    with parametrize.cached():
        first = module(x)[0]
        assert len(calls) == 2
        second = module(x)[0]
        assert len(calls) == 2
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


def test_global_pruning(x):
    model = nn.ModuleList([lstm_ext.LSTM(3, 4, **CONFIG), nn.Linear(4, 2, dtype=torch.float64)])
    prune.global_unstructured(
        [(model[0], "weight_hh_l0"), (model[0], "weight_ih_l1"), (model[1], "weight")],
        pruning_method=prune.L1Unstructured,
        amount=0.5,
    )
    masks = [model[0].weight_hh_l0_mask, model[0].weight_ih_l1_mask, model[1].weight_mask]
    zeros = sum(int((mask == 0).sum()) for mask in masks)
    assert zeros == sum(mask.numel() for mask in masks) // 2
    model[1](model[0](x)[0]).sum().backward()
    gradient = model[0].weight_hh_l0_orig.grad
    assert torch.equal(gradient == 0, model[0].weight_hh_l0_mask == 0)


def test_copies_of_a_parametrized_module(module, x):
    parametrizations.weight_norm(module, "weight_hh_l0")
    clone = copy.deepcopy(module)
    assert torch.equal(clone(x)[0], module(x)[0])
    with torch.no_grad():
        clone.parametrizations.weight_hh_l0.original0.mul_(2)
    assert not torch.equal(clone(x)[0], module(x)[0])
    other = lstm_ext.LSTM(3, 4, **CONFIG)
    parametrizations.weight_norm(other, "weight_hh_l0")
    other.load_state_dict(clone.state_dict())
    assert torch.equal(other(x)[0], clone(x)[0])


class WeightDrop(nn.Module):
    """As AWD-LSTM and its successors do it; ``place`` puts the dropped weight where the module looks for it."""

    def __init__(self, module: lstm_ext.LSTM, place: Callable[[nn.Module, str, Tensor], None]) -> None:
        super().__init__()
        self.module, self.place = module, place
        self.names = ("weight_hh_l0", "weight_hh_l1_reverse")
        for name in self.names:
            weight = getattr(module, name)
            delattr(module, name)
            self.register_parameter(f"{name}_raw", nn.Parameter(weight.detach()))

    def forward(self, x: Tensor):
        for name in self.names:
            raw = getattr(self, f"{name}_raw")
            self.place(self.module, name, F.dropout(raw, 0.5, self.training))
        return self.module(x)


PLACES: dict[str, Callable[[nn.Module, str, Tensor], None]] = {
    "attribute": setattr,
    "_parameters": lambda module, name, weight: module._parameters.__setitem__(name, weight),
    "__dict__": lambda module, name, weight: module.__dict__.__setitem__(name, weight),
}


@pytest.mark.parametrize("place", PLACES)
def test_weight_drop(module, x, place):
    model = WeightDrop(copy.deepcopy(module), PLACES[place])
    for _ in range(2):
        output = model(x)[0]
        torch.testing.assert_close(output, by_equations(model.module, x)[0])
        assert not torch.equal(output, module(x)[0])
        gradients = torch.autograd.grad(output.sum(), [getattr(model, f"{name}_raw") for name in model.names])
        for name, gradient in zip(model.names, gradients, strict=True):
            dropped = getattr(model.module, name) == 0
            assert 0 < dropped.sum() < dropped.numel()
            assert torch.equal(gradient == 0, dropped)
    assert torch.equal(model.eval()(x)[0], module(x)[0])
