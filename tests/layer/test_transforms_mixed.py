"""Forward mode, higher derivatives, and what mixes transforms with one another and with autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from derivative_cases import (
    F64,
    assert_as_on_reference,
    assert_close,
    make_model,
    on_reference,
    operator_calls,
    several,
    some_models,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import (
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import lstm_ext
from lstm_ext.layer import equations

pytestmark = pytest.mark.devices("cpu", "cuda")

# ---- forward mode: the equations of the reference, against reverse mode on the kernels


@pytest.mark.slow
@some_models
def test_forward_mode(model, device):
    case = make_model(model, device)
    tangents = tree_map(torch.randn_like, case.arguments)
    values, expected = jvp(case.call, case.arguments, tangents)
    assert_close(values, case.call(*case.arguments))
    values, linear = linearize(case.call, *case.arguments)
    assert_close(values, case.call(*case.arguments))
    assert_close(linear(*tangents), expected)
    with forward_ad.dual_level():
        duals = tree_map(forward_ad.make_dual, case.arguments, tangents)
        results = [forward_ad.unpack_dual(t) for t in case.call(*duals)]
    assert_close([r.primal for r in results], values)
    assert_close([r.tangent for r in results], expected)
    assert_close(jacfwd(case.call, (1, 2))(*case.arguments), jacrev(case.call, (1, 2))(*case.arguments))


@some_models
def test_forward_over_reverse_and_reverse_over_forward(model, device):
    case = make_model(model, device)
    for i in (1, 3):
        f, a = case.of(i), case[i]
        expected = jacrev(grad(f))(a)
        assert_close(hessian(f)(a), expected)
        assert_close(jacrev(jacfwd(f))(a), expected)
        direction = torch.randn_like(a)
        product = torch.tensordot(expected, direction, a.dim())
        assert_close(jvp(grad(f), (a,), (direction,))[1], product)
        assert_close(grad(lambda a: jvp(f, (a,), (direction,))[1])(a), product)  # noqa: B023
    xs = several(case.x)
    batched = vmap(hessian(case.of(1)))(xs)
    assert_close(batched, torch.stack([jacrev(grad(case.of(1)))(x) for x in xs]))
    batched = vmap(lambda x: jvp(case.of(1), (x,), (x,)))(xs)
    assert_close(batched, vmap(lambda x: (case.of(1)(x), (grad(case.of(1))(x) * x).sum()))(xs))


@some_models
def test_tangents_of_the_gradients_that_go_in(model, device):
    """Forward mode through a backward pass whose forward pass is over: that is linear."""
    case = make_model(model, device)
    xs = several(case.x)

    def call(p, x):
        return vmap(case.call, (None, 0, None, None))(p, x, case.h, case.c)

    y, pull = vjp(call, case.p, xs)
    a, b = (tree_map(torch.randn_like, y) for _ in range(2))
    expected = pull(b)
    assert_close(vmap(pull)(tree_map(lambda *ts: torch.stack(ts), a, b))[1][1], expected[1])
    value, tangent = jvp(pull, (a,), (b,))
    assert_close(value, pull(a))
    assert_close(tangent, expected)

    p, x = tree_map(lambda t: t.clone().requires_grad_(), (case.p, xs))
    leaves = [*p.values(), x]
    for y in (call(p, x), vmap_by_hand(lambda x: case.call(p, x, case.h, case.c), x)):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(s, t) for s, t in zip(a, b, strict=True)]
            grads = torch.autograd.grad(y, leaves, duals, retain_graph=True)
            assert_close([forward_ad.unpack_dual(g).tangent for g in grads], expected)


def vmap_by_hand(function: Callable[[Tensor], tuple[Tensor, ...]], xs: Tensor) -> list[Tensor]:
    return [torch.stack(ts) for ts in zip(*[function(x) for x in xs], strict=True)]


# ---- autograd and torch.func in one another


@some_models
def test_autograd_over_transforms(model, device):
    case = make_model(model, device)

    def leaves_of(*trees):
        return tree_map(lambda t: t.clone().requires_grad_(), trees)

    def over_grad():
        p, x = leaves_of(case.p, case.x)
        first = tree_leaves(grad(case.loss, (0, 1))(p, x, case.h, case.c))
        second = torch.autograd.grad(
            sum(t.square().sum() for t in first), [*p.values(), x], create_graph=True
        )
        return first, second, torch.autograd.grad(sum(t.sin().sum() for t in second), x)

    def under_no_grad():
        with torch.no_grad():
            return grad(case.loss, (0, 1))(*case.arguments)

    for compute in (over_grad, under_no_grad):
        assert_as_on_reference(lambda compute=compute: tree_map(Tensor.detach, compute()))
    with on_reference():
        expected = grad(case.loss, 1)(*case.arguments)

    def no_grad_within(x):
        with torch.no_grad():
            constant = case.of(1)(x)
        return constant * case.of(1)(x)

    assert_close(grad(no_grad_within)(case.x), case.of(1)(case.x) * expected)


@some_models
def test_no_grad_within_a_transform_is_no_grad_outside_too(model, device):
    case = make_model(model, device)

    def product(x):
        with torch.no_grad():
            constant = case.call(case.p, x, case.h, case.c)[0].sum()
        return constant * x.sin().sum()

    x = case.x.clone().requires_grad_()
    expected = case.call(case.p, case.x, case.h, case.c)[0].sum()
    gradient = grad(product)(x)
    assert_close(gradient, expected * x.cos())
    assert_close(torch.autograd.grad(gradient.sum(), x)[0], -expected * x.sin())


@some_models
def test_double_backward_of_a_checkpoint(model, device):
    case = make_model(model, device)

    def gradients(run):
        p, x = tree_map(lambda t: t.clone().requires_grad_(), (case.p, case.x))
        (first,) = torch.autograd.grad(
            run(lambda x: case.loss(p, x, case.h, case.c), x), x, create_graph=True
        )
        return first, torch.autograd.grad(first.square().sum(), [x, *p.values()], materialize_grads=True)

    expected = gradients(lambda f, x: f(x))
    assert_close(gradients(lambda f, x: checkpoint(f, x, use_reentrant=False)), expected)


@some_models
def test_third_derivatives(model, device):
    """Of plain autograd."""
    case = make_model(model, device)

    def compute():
        leaves = tree_leaves(tree_map(lambda t: t.clone().requires_grad_(), case.arguments))
        *_, x, h, c = leaves
        p = dict(zip(case.p, leaves, strict=False))
        (first,) = torch.autograd.grad(case.loss(p, x, h, c), x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [x, h], create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in second), leaves, materialize_grads=True)

    assert_as_on_reference(compute)


def test_first_gradients_are_the_kernels_also_with_create_graph(monkeypatch, device):
    """What is not differentiated again costs nothing of the reference."""
    case = make_model("functional", device)
    leaves = tree_leaves(tree_map(lambda t: t.clone().requires_grad_(), case.arguments))
    p = dict(zip(case.p, leaves, strict=False))
    expected = torch.autograd.grad(case.loss(p, *leaves[-3:]), leaves)
    monkeypatch.setattr(equations, "lstm_layer", None)
    with operator_calls() as calls:
        grads = torch.autograd.grad(case.loss(p, *leaves[-3:]), leaves, create_graph=True)
    assert calls == ["lstm_layer_backward"]
    for g, e in zip(grads, expected, strict=True):
        assert g.requires_grad
        assert torch.equal(g, e)


def test_double_backward_under_hooks_of_saved_tensors(device):
    case = make_model("packed", device)

    def compute():
        x = case.x.clone().requires_grad_()
        (first,) = torch.autograd.grad(case.of(1)(x), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)

    expected = compute()
    with torch.autograd.graph.save_on_cpu():
        assert_close(compute(), expected)


@some_models
@pytest.mark.parametrize("transformed", [False, True], ids=["eager", "vmap"])
def test_batches_of_gradients(model, transformed, device):
    case = make_model(model, device)
    p, x = tree_map(
        lambda t: t.clone().requires_grad_(), (case.p, several(case.x) if transformed else case.x)
    )
    call = vmap(case.call, (None, 0, None, None)) if transformed else case.call
    y = call(p, x, case.h, case.c)
    leaves = [*p.values(), x]
    grads = several(tree_map(torch.randn_like, y), 3)

    def one(*grads, **options):
        return torch.autograd.grad(y, leaves, grads, retain_graph=True, **options)

    expected = [torch.stack(gs) for gs in zip(*[one(*[g[i] for g in grads]) for i in range(3)], strict=True)]
    assert_close(one(*grads, is_grads_batched=True), expected)
    assert_close(vmap(one)(*grads), expected)
    again = one(*grads, is_grads_batched=True, create_graph=True)
    assert_close(again, expected)
    loss = sum(g.square().sum() for g in again)
    loss_one_by_one = sum(
        g.square().sum() for i in range(3) for g in one(*[g[i] for g in grads], create_graph=True)
    )
    second = [torch.autograd.grad(t, leaves, retain_graph=True) for t in (loss, loss_one_by_one)]
    assert_close(*second)


def test_gradients_of_gradients_in_a_batch(device):
    """is_grads_batched=True for the second backward pass."""
    case = make_model("packed", device)
    p, x = tree_map(lambda t: t.clone().requires_grad_(), (case.p, case.x))
    leaves = [*p.values(), x]
    with operator_calls() as calls:
        first = torch.autograd.grad(case.loss(p, x, case.h, case.c), leaves, create_graph=True)
    assert calls == ["lstm_layer_backward"]
    grads = several(tree_map(torch.randn_like, first), 3)

    def one(*grads, **options):
        return torch.autograd.grad(first, leaves, grads, retain_graph=True, **options)

    expected = [torch.stack(gs) for gs in zip(*[one(*[g[i] for g in grads]) for i in range(3)], strict=True)]
    assert_close(one(*grads, is_grads_batched=True), expected)
    assert_close(vmap(one)(*grads), expected)


@some_models
def test_functionalize(model, device):
    case = make_model(model, device)
    assert_close(functionalize(case.call)(*case.arguments), case.call(*case.arguments))
    assert_close(functionalize(grad(case.loss))(*case.arguments), grad(case.loss)(*case.arguments))
    xs = several(case.x)
    assert_close(functionalize(vmap(case.of(1)))(xs), vmap(case.of(1))(xs))
    _, pull = vjp(case.of(1), case.x)
    one = torch.ones((), dtype=F64)
    assert_close(functionalize(pull)(one), pull(one))


@pytest.mark.parametrize("inference", [False, True])
def test_tensors_that_have_left_their_transform(inference):
    """E.g. a state that a loss function keeps for the next call: a wrapper around a plain tensor."""
    module = lstm_ext.LSTM(2, 3, dtype=F64)
    x = torch.randn(3, 2, 2, dtype=F64)
    kept = []

    def loss(x):
        output, state = module(x)
        kept.append((2 * x, state))
        return output.sin().sum()

    grad(loss)(x)
    (wrapped, state) = kept[0]
    assert torch._C._functorch.is_gradtrackingtensor(wrapped)
    with torch.set_grad_enabled(not inference):
        _, plain_state = module(x)
        expected = module(2 * x, plain_state)
        result = module(wrapped, state)
        assert_close(result, expected)
        if not inference:
            leaves = list(module.parameters())
            grads = [torch.autograd.grad(r[0].sum() + r[1][1].sum(), leaves) for r in (result, expected)]
            assert_close(*grads)


def test_autocast_within_vmap(device):
    module = lstm_ext.LSTM(2, 3)
    xs = torch.randn(3, 4, 2, 2)
    with torch.autocast(device, dtype=torch.bfloat16):
        result = vmap(module)(xs)
        expected = [module(x) for x in xs]
    for r, e in zip(tree_leaves(result), zip(*map(tree_leaves, expected), strict=True), strict=True):
        assert r.dtype == torch.bfloat16
        torch.testing.assert_close(r, torch.stack(e))
