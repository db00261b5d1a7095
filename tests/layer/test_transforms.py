"""The reverse-mode transforms of ``torch.func`` and vmap: on the kernels, against the reference equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import internals
import pytest
import torch
from derivative_cases import (
    F64,
    MODELS,
    Model,
    assert_as_on_reference,
    assert_close,
    every_model,
    make_model,
    on_reference,
    operator_calls,
    several,
    several_of,
)
from torch.func import grad, grad_and_value, jacrev, vjp, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

import lstm_ext

pytestmark = pytest.mark.devices("cpu", "cuda")

# ---- transforms without vmap

DERIVATIVES: dict[str, Callable[[Model], Any]] = {
    "grad of all": lambda k: grad(k.loss, (0, 1, 2, 3))(*k.arguments),
    "grad_and_value, has_aux": lambda k: grad_and_value(
        lambda x: (k.of(1)(x), k.call(k.p, x, k.h, k.c)), has_aux=True
    )(k.x),
    "grad through h_n only": lambda k: grad(lambda *a: k.call(*a)[1].sin().sum(), (0, 1, 2))(*k.arguments),
    "grad through c_n only": lambda k: grad(lambda *a: k.call(*a)[2].sin().sum(), (0, 1, 3))(*k.arguments),
    "vjp": lambda k: (lambda y, pull: pull(tree_map(torch.cos, y)))(*vjp(k.call, *k.arguments)),
    "jacrev of parameters in chunks": lambda k: jacrev(lambda *a: k.call(*a)[1], chunk_size=2)(*k.arguments),
    "grad of grad": lambda k: grad(lambda x: grad(k.of(1))(x).square().sum())(k.x),
    "grad of grad, crossed": lambda k: grad(
        lambda p: grad(lambda c: k.loss(p, k.x, k.h, c))(k.c).square().sum()
    )(k.p),
    "grad of grad of parameters": lambda k: grad(
        lambda p: sum(g.square().sum() for g in grad(k.of(0))(p).values())
    )(k.p),
    "grad of grad of grad": lambda k: grad(
        lambda h: grad(lambda c: grad(lambda x: k.loss(k.p, x, h, c))(k.x).square().sum())(k.c).sin().sum()
    )(k.h),
    "reverse over reverse": lambda k: jacrev(grad(k.of(2)))(k.h),
}


@every_model
@pytest.mark.parametrize("transform", DERIVATIVES)
def test_derivatives(transform, model, device):
    case = make_model(model, device)
    assert_as_on_reference(lambda: DERIVATIVES[transform](case))


# ---- vmap

BATCHES: dict[str, Callable[[Model], Any]] = {
    "input": lambda k: vmap(k.call, (None, 0, None, None))(k.p, several(k.x), k.h, k.c),
    "input, axes": lambda k: vmap(lambda x: k.call(k.p, x, k.h, k.c)[:3], 1, (1, -1, 0))(
        several(k.x).movedim(0, 1)
    ),
    "states": lambda k: vmap(k.call, (None, None, 0, 1))(k.p, k.x, several(k.h), several(k.c).movedim(0, 1)),
    "one state": lambda k: vmap(k.call, (None, None, None, 0))(k.p, k.x, k.h, several(k.c)),
    "chunks": lambda k: vmap(k.call, (None, 0, 0, None), chunk_size=2)(k.p, *several((k.x, k.h), 3), k.c),
    "nested": lambda k: vmap(vmap(k.call, (None, 0, 0, None)), (None, 0, None, 0))(
        k.p, several(several(k.x)), several(k.h), several(k.c)
    ),
    "parameters": lambda k: vmap(k.call, (0, None, None, None))(several(k.p), k.x, k.h, k.c),
    "everything": lambda k: vmap(k.call)(*several(k.arguments)),
    "one weight": lambda k: vmap(lambda w: k.call(k.p | w, k.x, k.h, k.c))(
        several(dict([*k.p.items()][1:2]))
    ),
    "parameters over inputs": lambda k: vmap(
        lambda p: vmap(lambda x: k.call(p, x, k.h, k.c))(several_of(k.x))
    )(several(k.p)),
    "inputs over parameters": lambda k: vmap(
        lambda x: vmap(lambda p: k.call(p, x, k.h, k.c))(several_of(k.p))
    )(several(k.x)),
}

BATCHED_DERIVATIVES: dict[str, Callable[[Model], Any]] = {
    "of parameters": lambda k: vmap(grad(k.loss), (None, 0, 0, None))(k.p, *several((k.x, k.h)), k.c),
    "of all": lambda k: vmap(grad(k.loss, (0, 1, 2, 3)), (None, 0, 0, 0))(k.p, *several((k.x, k.h, k.c))),
    "of one weight": lambda k: vmap(
        lambda x: grad(lambda w: k.loss(k.p | w, x, k.h, k.c))(dict([*k.p.items()][1:2]))
    )(several(k.x)),
    "of stacked parameters": lambda k: vmap(grad(k.loss, (0, 1)), (0, None, None, None))(
        several(k.p), k.x, k.h, k.c
    ),
    "jacobian": lambda k: vmap(jacrev(lambda h: k.call(k.p, k.x, h, k.c)))(several(k.h)),
    "of a sum over samples": lambda k: grad(
        lambda p, x: vmap(k.loss, (None, 0, None, None))(p, x, k.h, k.c).sum(), (0, 1)
    )(k.p, several(k.x)),
    "of a sum over ensembles": lambda k: grad(
        lambda p, x: vmap(k.loss, (0, 0, None, None))(p, x, k.h, k.c).sum(), (0, 1)
    )(several(k.p), several(k.x)),
    "penalty of each": lambda k: vmap(grad(lambda x: grad(k.of(1))(x).square().sum()))(several(k.x)),
    "penalty of all": lambda k: grad(
        lambda p: vmap(grad(k.loss, 1), (None, 0, None, None))(p, several_of(k.x), k.h, k.c).square().sum()
    )(k.p),
    "of per-sample gradients": lambda k: grad(
        lambda p: sum(
            g.square().sum()
            for g in vmap(grad(k.loss), (None, 0, None, None))(p, several_of(k.x), k.h, k.c).values()
        )
    )(k.p),
    "nested, of parameters": lambda k: vmap(vmap(grad(k.loss), (None, 0, None, None)), (None, 0, 0, None))(
        k.p, several(several(k.x)), several(k.h), k.c
    ),
    "hessian of each": lambda k: vmap(jacrev(grad(k.of(3))))(several(k.c)),
}


@every_model
@pytest.mark.parametrize("transform", BATCHES)
def test_vmap(transform, model, device):
    case = make_model(model, device)

    def compute(grad_mode):
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad_mode):
            return BATCHES[transform](case)

    with on_reference():
        expected = compute(False)
    for grad_mode, operator in ((True, "lstm_layer_forward"), (False, "lstm_layer")):
        with operator_calls() as calls:
            assert_close(compute(grad_mode), expected)
        assert set(calls) == {"lstm_layer" if case.recompute else operator}


@pytest.mark.slow
@every_model
@pytest.mark.parametrize("transform", BATCHED_DERIVATIVES)
def test_vmap_of_derivatives(transform, model, device):
    case = make_model(model, device)

    def compute():
        torch.manual_seed(1)
        return BATCHED_DERIVATIVES[transform](case)

    assert_as_on_reference(compute)


@pytest.mark.parametrize("model", [name for name, (route, *_) in MODELS.items() if route == "eager"])
def test_one_call_for_all_samples(model, device):
    """Samples that share their weights are computed as one batch, forwards and backwards."""
    case = make_model(model, device)
    if case.recompute:
        return
    xs = several(several(case.x), 3)
    forward = ["lstm_layer_forward"] * case.layers
    both = forward + ["lstm_layer_backward"] * case.layers
    dims = (None, 0, None, None)

    def calls_of(compute: Callable[[], Any]) -> list[str]:
        with operator_calls() as calls:
            compute()
        return calls

    def summed(p, x, h):
        return vmap(vmap(case.loss, dims), dims)(p, x, h, case.c).sum()

    def output(x):
        return case.call(case.p, x, case.h, case.c)[0]

    assert calls_of(lambda: vmap(vmap(case.call, dims), dims)(case.p, xs, case.h, case.c)) == forward
    assert calls_of(lambda: grad(summed, (0, 1, 2))(case.p, xs, case.h)) == both
    of_each = vmap(vmap(grad(case.loss, (1, 2, 3)), dims), dims)
    assert calls_of(lambda: of_each(case.p, xs, case.h, case.c)) == both
    assert calls_of(lambda: jacrev(output)(case.x)) == both
    xs.requires_grad_()
    assert calls_of(lambda: vmap(vmap(output))(xs).sum().backward()) == both


@every_model
@pytest.mark.parametrize("weights", [False, True], ids=["shared", "own weights"])
def test_no_samples(model, weights, device):
    """As for any other function, e.g. when a data set ends: results without a sample, of the right shapes."""
    case = make_model(model, device)
    some = several(case.arguments)
    none = tree_map(lambda t: t[:0].clone().requires_grad_(), some)
    dims = (0 if weights else None, 0, 0, None)

    def arguments(a):
        return (a[0] if weights else case.p, a[1], a[2], case.c)

    for function in (case.call, grad(case.loss, (0, 1, 2, 3))):
        expected = vmap(function, dims)(*arguments(some))
        result = vmap(function, dims)(*arguments(none))
        assert [t.shape for t in tree_leaves(result)] == [(0, *t.shape[1:]) for t in tree_leaves(expected)]
    loss = sum(t.sum() for t in vmap(case.call, dims)(*arguments(none)))
    (gradient,) = torch.autograd.grad(loss, none[1])
    assert gradient.shape == none[1].shape


def test_empty_batch(device):
    case = make_model("functional", device)
    case = case._replace(x=case.x[:, :0], h=case.h[:, :0], c=case.c[:, :0])
    xs = several(case.x)
    assert vmap(case.call, (None, 0, None, None))(case.p, xs, case.h, case.c)[0].shape == (2, 4, 0, 8)
    first = vmap(grad(case.loss, (0, 1)), (None, 0, None, None))(case.p, xs, case.h, case.c)
    second = grad(lambda p: sum(g.square().sum() for g in grad(case.of(0))(p).values()))(case.p)
    for t in tree_leaves((first, second)):
        assert not t.any()
    assert first[1].shape == xs.shape


def test_batch_sizes_of_each_sample_are_refused():
    module = lstm_ext.LSTM(2, 3)
    weights = [p.detach() for p in module.parameters()]

    def call(x, sizes):
        return module(PackedSequence(x, sizes))[0].data

    def layer(x, sizes):
        return internals.lstm_layer(x, None, None, weights, sizes, True, False)[0]

    sizes = torch.tensor([[3, 2, 1]] * 2)
    for function in (call, layer):
        with pytest.raises(ValueError, match="batch_sizes: expected the same for all samples under vmap"):
            vmap(function)(torch.randn(2, 6, 2), sizes)
        assert vmap(function, (0, None))(torch.randn(2, 6, 2), sizes[0]).shape == (2, 6, 3)


@pytest.mark.devices("cpu")  # on CUDA, vmap draws in another way than no vmap
@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"recurrent_dropout": 0.5, "zoneout": 0.5}], ids=str)
def test_dropout_asks_how_random_it_is(options):
    """As torch's dropout does: an error, masks of their own for each sample, or the same one for all."""
    module = lstm_ext.LSTM(2, 3, 2, **options, dtype=F64)
    x = torch.randn(3, 40, 2, dtype=F64)
    xs = torch.stack([x, x])
    with pytest.raises(RuntimeError, match="called random operation while in randomness error mode"):
        vmap(module)(xs)
    torch.manual_seed(1)
    same = vmap(module, randomness="same")(xs)[0]
    assert torch.equal(same[0], same[1])
    torch.manual_seed(1)
    torch.testing.assert_close(same[0], module(x)[0])
    different = vmap(module, randomness="different")(xs)[0]
    assert not torch.equal(different[0], different[1])
    module.eval()
    torch.testing.assert_close(vmap(module)(xs)[0][1], module(x)[0])


def test_vmap_over_all_that_a_call_takes():
    """Lengths, masks and flags of each sample, with states of their own or shared ones."""
    T, B, I, H = 4, 3, 2, 4
    module = lstm_ext.LSTM(I, H, 2, bidirectional=True, dtype=F64)
    states = torch.randn(2, 2, 4, B, H, dtype=F64)
    given = {
        "lengths": torch.tensor([[3, 0, 4], [1, 4, 2]]),
        "mask": torch.rand(2, T, B) < 0.6,
        "resets": torch.rand(2, T, B) < 0.3,
        "reset_state": (states[0], states[1]),
    }
    xs = torch.randn(2, T, B, I, dtype=F64)

    def gradients(x, given):
        return grad(lambda x: sum(t.sin().sum() for t in tree_leaves(module(x, **given))))(x)

    for names in (("lengths", "resets", "reset_state"), ("mask", "resets"), ("resets", "reset_state")):
        chosen = {name: given[name] for name in names}
        for own in (set(names), {names[0]}, set(names[1:])):
            dims = {name: 0 if name in own else None for name in names}
            shared = {n: v if n in own else tree_map(lambda t: t[0], v) for n, v in chosen.items()}
            for function in (lambda x, given: module(x, **given), gradients):
                found = vmap(function, (0, dims))(xs, shared)
                for k in range(2):
                    one = {n: tree_map(lambda t, k=k: t[k], v) if n in own else v for n, v in shared.items()}
                    assert_close(tree_map(lambda t, k=k: t[k], found), function(xs[k], one))


def test_vmap_over_flags_of_packed_data():
    module = lstm_ext.LSTM(2, 4, bidirectional=True, dtype=F64)
    sizes = torch.tensor([3, 2, 1], device="cpu")
    xs, flags = torch.randn(3, 6, 2, dtype=F64), torch.rand(3, 6) < 0.3

    def call(x, resets):
        resets = PackedSequence(resets, sizes)
        y, states, extras = module(PackedSequence(x, sizes), resets=resets, return_cell_states=True)
        return y.data, *states, extras.cell_states

    found = vmap(call)(xs, flags)
    for k in range(3):
        assert_close([t[k] for t in found], call(xs[k], flags[k]))
