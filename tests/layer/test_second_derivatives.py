"""Second and third derivatives of plain autograd."""

from __future__ import annotations

import pytest
import torch
from derivative_cases import (
    CONFIGS,
    Dense,
    Packed,
    assert_as_on_reference,
    assert_close,
    every_model,
    make_case,
    operator_calls,
)
from torch.func import (
    functional_call,
)
from torch.utils._pytree import tree_leaves, tree_map

from lstm_ext.layer import equations

pytestmark = pytest.mark.devices("cpu", "cuda")


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("config", CONFIGS)
def test_gradgradcheck(config, packed):
    """Through all outputs, for all arguments, against finite differences."""
    module = (Packed if packed else Dense)(2, **CONFIGS[config])
    names, weights = zip(*module.named_parameters(), strict=True)
    arguments = [t.requires_grad_() for t in module.arguments()]

    def call(x, h, c, *weights):
        return functional_call(module, dict(zip(names, weights, strict=True)), (x, h, c))

    assert torch.autograd.gradgradcheck(call, (*arguments, *weights), fast_mode=config != "plain")


@every_model
def test_third_derivatives(model):
    case = make_case(model)

    def compute():
        leaves = tree_leaves(tree_map(lambda t: t.clone().requires_grad_(), case.arguments))
        *_, x, h, c = leaves
        p = dict(zip(case.p, leaves, strict=False))
        (first,) = torch.autograd.grad(case.loss(p, x, h, c), x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [x, h], create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in second), leaves)

    assert_as_on_reference(compute)


@pytest.mark.parametrize("wanted", ["x", "h", "c", "weight_ih_l0", "bias_hh_l0_reverse", "weight_hr_l1"])
def test_double_backward_with_one_argument_that_requires_gradients(wanted):
    case = make_case("two layers, both directions")
    tensors = case.p | {"x": case.x, "h": case.h, "c": case.c}
    wanted = wanted if wanted in tensors else f"lstm.{wanted}"

    def compute():
        t = {name: t.clone().requires_grad_(name == wanted) for name, t in tensors.items()}
        x, h, c = (t.pop(name) if name != wanted else t[name] for name in "xhc")
        loss = case.loss({name: t[name] for name in case.p}, x, h, c)
        (first,) = torch.autograd.grad(loss, t[wanted], create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), t[wanted])
        return first, second

    assert_as_on_reference(compute)


def test_first_gradients_are_the_kernels_also_with_create_graph(monkeypatch):
    """What is not differentiated again costs nothing of the reference."""
    module = Dense(bidirectional=True)
    x, h, c = (t.requires_grad_() for t in module.arguments())
    leaves = [x, h, c, *module.parameters()]
    expected = torch.autograd.grad(module(x, h, c)[0].sin().sum(), leaves)
    monkeypatch.setattr(equations, "lstm_layer", None)
    with operator_calls() as calls:
        grads = torch.autograd.grad(module(x, h, c)[0].sin().sum(), leaves, create_graph=True)
    assert calls == ["lstm_layer_backward"]
    for g, e in zip(grads, expected, strict=True):
        assert g.requires_grad
        assert torch.equal(g, e)


def test_double_backward_under_hooks_of_saved_tensors():
    case = make_case("packed, two layers, both directions")

    def compute():
        x = case.x.clone().requires_grad_()
        (first,) = torch.autograd.grad(case.of(1)(x), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)

    expected = compute()
    with torch.autograd.graph.save_on_cpu():
        assert_close(compute(), expected)
