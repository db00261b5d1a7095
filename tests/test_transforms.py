"""Second derivatives and the transforms of ``torch.func``, on the kernels and against the reference equations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from accuracy import assert_as_accurate_as_torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    functionalize,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

import lstm_ext
from lstm_ext import autograd, functional, reference

F64 = torch.float64
OPERATORS = ("lstm_layer", "lstm_layer_forward", "lstm_layer_backward")
BATCH_SIZES = torch.tensor([3, 2, 1])


# ---- models: every way to call a layer


class Dense(nn.Module):
    """``forward(x, h, c) -> (output, h_n, c_n)``"""

    x_shape: tuple[int, ...] = (3, 2, 2)
    batch: tuple[int, ...] = (2,)

    def __init__(self, hidden_size: int = 3, dtype: torch.dtype = F64, **config: Any) -> None:
        super().__init__()
        self.lstm = lstm_ext.LSTM(2, hidden_size, **config, dtype=dtype)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, states = self.lstm(x, (h, c))
        return output, *states

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        m = self.lstm
        sets = m.num_layers * (2 if m.bidirectional else 1)
        shapes = (
            self.x_shape,
            (sets, *self.batch, m.proj_size or m.hidden_size),
            (sets, *self.batch, m.hidden_size),
        )
        return tuple([torch.randn(s, dtype=m.weight_ih_l0.dtype) for s in shapes])


class Packed(Dense):
    x_shape, batch = (6, 2), (3,)
    indices = torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, states = self.lstm(PackedSequence(x, BATCH_SIZES, *self.indices), (h, c))
        return output.data, *states


class Unbatched(Dense):
    x_shape, batch = (3, 2), ()


class BatchFirst(Dense):
    x_shape = (2, 3, 2)


class OneStep(Dense):
    x_shape = (1, 2, 2)


class Steps(Dense):
    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs = []
        for x_t in x:
            output, (h, c) = self.lstm.step(x_t, (h, c))
            outputs.append(output)
        return torch.stack(outputs), h, c


class Functional(Dense):
    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m = self.lstm
        weights = list(m.parameters())
        output, states = functional.lstm(
            x, (h, c), weights, m.bias, m.num_layers, bidirectional=m.bidirectional
        )
        return output, *states


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = lstm_ext.LSTMCell(2, 3, dtype=F64)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h1, c1 = self.cell(x, (h, c))
        h2, c2 = self.cell(x.sin(), (h1, c1))
        return h1, h2, c2

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple([torch.randn(2, n, dtype=F64) for n in (2, 3, 3)])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": Dense,
    "no bias": lambda: Dense(bias=False),
    "projection": lambda: Dense(proj_size=2),
    "two layers, both directions": lambda: Dense(num_layers=2, bidirectional=True, proj_size=1),
    "batch first": lambda: BatchFirst(batch_first=True, bidirectional=True, bias=False),
    "unbatched": Unbatched,
    "one step": lambda: OneStep(bidirectional=True),
    "packed": Packed,
    "packed, two layers, both directions": lambda: Packed(num_layers=2, bidirectional=True, proj_size=2),
    "packed, no bias": lambda: Packed(bias=False, bidirectional=True),
    "step()": lambda: Steps(num_layers=2),
    "functional": lambda: Functional(bidirectional=True),
    "cell": Cell,
}
every_model = pytest.mark.parametrize("model", MODELS)


class Case(NamedTuple):
    p: dict[str, Tensor]
    x: Tensor
    h: Tensor
    c: Tensor
    call: Callable[..., tuple[Tensor, Tensor, Tensor]]  # of (p, x, h, c)
    loss: Callable[..., Tensor]  # of (p, x, h, c)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self[:4]

    def of(self, i: int) -> Callable[[Any], Tensor]:
        """The loss as a function of its argument i only."""
        return lambda a: self.loss(*self[:i], a, *self[i + 1 : 4])


def make_case(model: str | nn.Module) -> Case:
    module = MODELS[model]() if isinstance(model, str) else model
    p = {name: t.detach().clone() for name, t in module.named_parameters()}

    def call(p, x, h, c):
        return functional_call(module, p, (x, h, c))

    def loss(p, x, h, c):
        output, h_n, c_n = call(p, x, h, c)
        return output.sin().sum() + h_n.cos().sum() + c_n.square().sum()

    return Case(p, *module.arguments(), call, loss)


def several(tree: Any, n: int = 2) -> Any:
    """n variations of each tensor, stacked."""
    return tree_map(lambda t: torch.stack([t, *[torch.randn_like(t) for _ in range(n - 1)]]), tree)


# ---- on the kernels and on the reference


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that are called, by name."""
    calls: list[str] = []
    for name in OPERATORS:

        def record(*args, name=name, operator=getattr(torch.ops.lstm_ext, name)):
            calls.append(name)
            return operator(*args)

        monkeypatch.setattr(torch.ops.lstm_ext, name, record)
    return calls


@contextlib.contextmanager
def on_reference() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autograd, "lstm_layer", reference.lstm_layer)
        yield


def assert_close(result: Any, expected: Any) -> None:
    leaves, expected_leaves = tree_leaves(result), tree_leaves(expected)
    assert [t.shape for t in leaves] == [t.shape for t in expected_leaves]
    torch.testing.assert_close(leaves, expected_leaves, rtol=1e-9, atol=1e-12)


def assert_as_on_reference(compute: Callable[[], Any], operators: list[str]) -> None:
    operators.clear()
    result = compute()
    assert operators, "no operator was called"
    operators.clear()
    with on_reference():
        expected = compute()
    assert not operators
    assert any(t.abs().max() > 1e-6 for t in tree_leaves(expected))
    assert_close(result, expected)


# ---- eager second derivatives

CONFIGS = {
    "plain": {},
    "no bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True},
    "projection": {"proj_size": 1},
    "all": {"num_layers": 2, "bidirectional": True, "proj_size": 1, "bias": False},
}


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
@pytest.mark.parametrize("of", ["output", "h_n", "c_n"])
def test_double_backward_through_one_output(model, of, operators):
    case = make_case(model)
    index = ["output", "h_n", "c_n"].index(of)

    def compute():
        leaves = tree_map(lambda t: t.clone().requires_grad_(), case.arguments)
        result = case.call(*leaves)[index]
        grads = torch.autograd.grad(
            result.sin().sum(), tree_leaves(leaves), create_graph=True, materialize_grads=True
        )
        return torch.autograd.grad(
            sum(g.square().sum() for g in grads), tree_leaves(leaves), materialize_grads=True
        )

    assert_as_on_reference(compute, operators)


@every_model
def test_third_derivatives(model, operators):
    case = make_case(model)

    def compute():
        leaves = tree_leaves(tree_map(lambda t: t.clone().requires_grad_(), case.arguments))
        *_, x, h, c = leaves
        p = dict(zip(case.p, leaves, strict=False))
        (first,) = torch.autograd.grad(case.loss(p, x, h, c), x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [x, h], create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in second), leaves)

    assert_as_on_reference(compute, operators)


@pytest.mark.parametrize("wanted", ["x", "h", "c", "weight_ih_l0", "bias_hh_l0_reverse", "weight_hr_l1"])
def test_double_backward_with_one_argument_that_requires_gradients(wanted, operators):
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

    assert_as_on_reference(compute, operators)


def test_first_gradients_are_the_kernels_also_with_create_graph(operators, monkeypatch):
    """What is not differentiated again costs nothing of the reference."""
    module = Dense(bidirectional=True)
    x, h, c = (t.requires_grad_() for t in module.arguments())
    leaves = [x, h, c, *module.parameters()]
    expected = torch.autograd.grad(module(x, h, c)[0].sin().sum(), leaves)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "lstm_layer", None)
        grads = torch.autograd.grad(module(x, h, c)[0].sin().sum(), leaves, create_graph=True)
    assert operators == ["lstm_layer_backward"]
    for g, e in zip(grads, expected, strict=True):
        assert g.requires_grad
        assert torch.equal(g, e)


def test_double_backward_under_hooks_of_saved_tensors(operators):
    case = make_case("packed, two layers, both directions")

    def compute():
        x = case.x.clone().requires_grad_()
        (first,) = torch.autograd.grad(case.of(1)(x), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)

    expected = compute()
    with torch.autograd.graph.save_on_cpu():
        assert_close(compute(), expected)


# ---- transforms without vmap

DERIVATIVES: dict[str, Callable[[Case], Any]] = {
    "grad of parameters": lambda k: grad(k.loss)(*k.arguments),
    "grad of all": lambda k: grad(k.loss, (0, 1, 2, 3))(*k.arguments),
    "grad of c": lambda k: grad(k.loss, 3)(*k.arguments),
    "grad_and_value, has_aux": lambda k: grad_and_value(
        lambda x: (k.of(1)(x), k.call(k.p, x, k.h, k.c)), has_aux=True
    )(k.x),
    "grad through h_n only": lambda k: grad(lambda *a: k.call(*a)[1].sin().sum(), (0, 1, 2))(*k.arguments),
    "grad through c_n only": lambda k: grad(lambda *a: k.call(*a)[2].sin().sum(), (0, 1, 3))(*k.arguments),
    "vjp": lambda k: (lambda y, pull: pull(tree_map(torch.cos, y)))(*vjp(k.call, *k.arguments)),
    "jacrev": lambda k: jacrev(k.call, (1, 3))(*k.arguments),
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
def test_derivatives(transform, model, operators):
    case = make_case(model)
    assert_as_on_reference(lambda: DERIVATIVES[transform](case), operators)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c not in ("projection", "all")])
def test_derivatives_as_of_torch(config):
    """torch's layer has derivatives of first order under torch.func, and no rule for vmap."""
    ours = lstm_ext.LSTM(2, 3, **CONFIGS[config], dtype=F64)
    results = []
    for module in (ours, lstm_ext.to_torch(ours)):
        torch.manual_seed(1)
        x = torch.randn(3, 2, 2, dtype=F64)
        p = {name: t.detach() for name, t in module.named_parameters()}

        def loss(p, x, module=module):
            output, (h_n, c_n) = functional_call(module, p, (x,))
            return output.sin().sum() + h_n.cos().sum() + c_n.sum()

        results.append((grad(loss, (0, 1))(p, x), jacrev(lambda x: module(x)[0])(x)))  # noqa: B023
    assert_close(*results)


# ---- vmap

BATCHES: dict[str, Callable[[Case], Any]] = {
    "input": lambda k: vmap(k.call, (None, 0, None, None))(k.p, several(k.x), k.h, k.c),
    "input, axes": lambda k: vmap(k.call, (None, 1, None, None), (1, -1, 0))(
        k.p, several(k.x).movedim(0, 1), k.h, k.c
    ),
    "input, last axis": lambda k: vmap(k.call, (None, -1, None, None))(
        k.p, several(k.x).movedim(0, -1), k.h, k.c
    ),
    "states": lambda k: vmap(k.call, (None, None, 0, 1))(k.p, k.x, several(k.h), several(k.c).movedim(0, 1)),
    "one state": lambda k: vmap(k.call, (None, None, None, 0))(k.p, k.x, k.h, several(k.c)),
    "input and states": lambda k: vmap(k.call, (None, 0, 0, 0))(k.p, *several((k.x, k.h, k.c))),
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

BATCHED_DERIVATIVES: dict[str, Callable[[Case], Any]] = {
    "of parameters": lambda k: vmap(grad(k.loss), (None, 0, 0, None))(k.p, *several((k.x, k.h)), k.c),
    "of all": lambda k: vmap(grad(k.loss, (0, 1, 2, 3)), (None, 0, 0, 0))(k.p, *several((k.x, k.h, k.c))),
    "of input": lambda k: vmap(grad(k.loss, 1), (None, 0, None, None))(k.p, several(k.x), k.h, k.c),
    "of states": lambda k: vmap(grad(k.loss, (2, 3)), (None, 0, None, 0))(
        k.p, several(k.x), k.h, several(k.c)
    ),
    "of one weight": lambda k: vmap(
        lambda x: grad(lambda w: k.loss(k.p | w, x, k.h, k.c))(dict([*k.p.items()][1:2]))
    )(several(k.x)),
    "of stacked parameters": lambda k: vmap(grad(k.loss, (0, 1)), (0, None, None, None))(
        several(k.p), k.x, k.h, k.c
    ),
    "jacobian": lambda k: vmap(jacrev(lambda h: k.call(k.p, k.x, h, k.c)[2]))(several(k.h)),
    "of a sum over samples": lambda k: grad(
        lambda p, x: vmap(k.loss, (None, 0, None, None))(p, x, k.h, k.c).sum(), (0, 1)
    )(k.p, several(k.x)),
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


def several_of(tree: Any) -> Any:
    """As `several`, for use where random numbers would be drawn inside of vmap."""
    return tree_map(lambda t: torch.stack([t, 0.5 * t.flip(-1)]), tree)


@every_model
@pytest.mark.parametrize("transform", BATCHES)
@pytest.mark.parametrize("inference", [False, True], ids=["grad mode", "no_grad"])
def test_vmap(transform, model, inference, operators):
    case = make_case(model)

    def compute():
        torch.manual_seed(1)
        with torch.set_grad_enabled(not inference):
            return BATCHES[transform](case)

    assert_as_on_reference(compute, operators)
    compute()
    assert set(operators) == {"lstm_layer" if inference else "lstm_layer_forward"}


@every_model
@pytest.mark.parametrize("transform", BATCHED_DERIVATIVES)
def test_vmap_of_derivatives(transform, model, operators):
    case = make_case(model)

    def compute():
        torch.manual_seed(1)
        return BATCHED_DERIVATIVES[transform](case)

    assert_as_on_reference(compute, operators)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", [Dense, Packed, OneStep], ids=lambda k: k.__name__)
def test_one_call_for_all_samples(kind, config, operators):
    """Samples that share their weights are computed as one batch, forwards and backwards."""
    module = kind(**CONFIGS[config])
    case = make_case(module)
    layers = module.lstm.num_layers
    xs = several(several(case.x), 3)
    vmap(vmap(case.call, (None, 0, None, None)), (None, 0, None, None))(case.p, xs, case.h, case.c)
    assert operators == ["lstm_layer_forward"] * layers
    both = ["lstm_layer_forward"] * layers + ["lstm_layer_backward"] * layers

    def summed(p, x, h):
        return vmap(vmap(case.loss, (None, 0, None, None)), (None, 0, None, None))(p, x, h, case.c).sum()

    operators.clear()
    grad(summed, (0, 1, 2))(case.p, xs, case.h)
    assert operators == both
    operators.clear()
    vmap(vmap(grad(case.loss, (1, 2, 3)), (None, 0, None, None)), (None, 0, None, None))(
        case.p, xs, case.h, case.c
    )
    assert operators == both
    operators.clear()
    xs.requires_grad_()
    vmap(vmap(lambda x: module(x, case.h, case.c)[0]))(xs).sum().backward()
    assert operators == both
    operators.clear()
    jacrev(lambda x: module(x, case.h, case.c)[0])(case.x)
    assert operators == both


@every_model
@pytest.mark.parametrize("weights", [False, True], ids=["shared", "own weights"])
def test_no_samples(model, weights):
    """As for any other function, e.g. when a data set ends: results without a sample, of the right shapes."""
    case = make_case(model)
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


def test_empty_batch():
    case = make_case(Dense(num_layers=2, bidirectional=True))
    case = case._replace(x=case.x[:, :0], h=case.h[:, :0], c=case.c[:, :0])
    xs = several(case.x)
    assert vmap(case.call, (None, 0, None, None))(case.p, xs, case.h, case.c)[0].shape == (2, 3, 0, 6)
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
        return autograd.lstm_layer(x, None, None, weights, sizes, True, False)[0]

    sizes = torch.stack([BATCH_SIZES] * 2)
    for function in (call, layer):
        with pytest.raises(ValueError, match="batch_sizes: expected the same for all samples under vmap"):
            vmap(function)(torch.randn(2, 6, 2), sizes)
        assert vmap(function, (0, None))(torch.randn(2, 6, 2), sizes[0]).shape == (2, 6, 3)


def test_dropout_asks_how_random_it_is():
    """As torch's dropout does: an error, masks of their own for each sample, or the same one for all."""
    module = lstm_ext.LSTM(2, 3, 2, dropout=0.5, dtype=F64)
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


def test_ensemble():
    modules = [lstm_ext.LSTM(2, 3, 2, bidirectional=True, dtype=F64) for _ in range(3)]
    parameters, buffers = stack_module_state(modules)
    base = modules[0]
    x = torch.randn(3, 2, 2, dtype=F64)

    def call(p, b, x):
        return functional_call(base, (p, b), (x,))

    assert_close(vmap(call, (0, 0, None))(parameters, buffers, x), several_results(modules, [x] * 3))
    xs = several(x, 3)
    result = vmap(call)(parameters, buffers, xs)
    assert_close(result, several_results(modules, xs))
    grads = torch.autograd.grad(result[0].sin().sum(), [*parameters.values()])
    for module, x in zip(modules, xs, strict=True):
        module(x)[0].sin().sum().backward()
    expected = [
        torch.stack(ts) for ts in zip(*[[p.grad for p in m.parameters()] for m in modules], strict=True)
    ]
    assert_close(grads, expected)


def several_results(modules, inputs):
    results = [tree_leaves(module(x)) for module, x in zip(modules, inputs, strict=True)]
    return [torch.stack(ts) for ts in zip(*results, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [c for c in CONFIGS if c not in ("projection", "all")])
def test_per_sample_gradients_are_as_accurate_as_torch(config, dtype):
    """torch's layer has no rule for vmap: its gradients one sample after the other."""
    module = lstm_ext.LSTM(5, 7, **CONFIGS[config], dtype=dtype)
    xs = torch.randn(4, 6, 3, 5, dtype=dtype)
    weights = torch.randn(6, 3, 7 * (2 if module.bidirectional else 1), dtype=dtype)

    def results(module, one_by_one):
        p = {name: t.detach() for name, t in module.named_parameters()}
        dtype = module.weight_ih_l0.dtype

        def loss(p, x):
            output, (_, c_n) = functional_call(module, p, (x,))
            return (output * weights.to(dtype)).sum() + c_n.sum()

        if one_by_one:
            all_grads = [grad(loss, (0, 1))(p, x.to(dtype)) for x in xs]
            p_grads, x_grad = tree_map(lambda *ts: torch.stack(ts), *all_grads)
        else:
            p_grads, x_grad = vmap(grad(loss, (0, 1)), (None, 0))(p, xs)
        return p_grads | {"x": x_grad}

    theirs = lstm_ext.to_torch(module)
    ours, torchs = results(module, False), results(theirs, True)
    assert_as_accurate_as_torch(ours, torchs, results(theirs.double(), True))


# ---- forward mode: the equations of the reference, against reverse mode on the kernels


@every_model
def test_forward_mode(model):
    case = make_case(model)
    tangents = tree_map(torch.randn_like, case.arguments)
    jacobian = jacrev(case.call, (0, 1, 2, 3))(*case.arguments)

    def product(of_output):
        parts = zip(tree_leaves(of_output), tree_leaves(tangents), strict=True)
        return sum(torch.tensordot(j, t, t.dim()) for j, t in parts)

    expected = [product(j) for j in jacobian]
    values, derivative = jvp(case.call, case.arguments, tangents)
    assert_close(values, case.call(*case.arguments))
    assert_close(derivative, expected)
    values, linear = linearize(case.call, *case.arguments)
    assert_close(values, case.call(*case.arguments))
    assert_close(linear(*tangents), expected)
    with forward_ad.dual_level():
        duals = tree_map(forward_ad.make_dual, case.arguments, tangents)
        results = [forward_ad.unpack_dual(t) for t in case.call(*duals)]
    assert_close([r.primal for r in results], values)
    assert_close([r.tangent for r in results], expected)
    assert_close(jacfwd(case.call, (1, 2))(*case.arguments), jacrev(case.call, (1, 2))(*case.arguments))


@every_model
def test_forward_over_reverse_and_reverse_over_forward(model):
    case = make_case(model)
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


@every_model
def test_tangents_of_the_gradients_that_go_in(model):
    """Forward mode through a backward pass whose forward pass is over: that is linear."""
    case = make_case(model)
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


@every_model
def test_autograd_over_transforms(model, operators):
    case = make_case(model)
    xs = several(case.x)

    def leaves_of(*trees):
        return tree_map(lambda t: t.clone().requires_grad_(), trees)

    def over_vmap():
        p, x = leaves_of(case.p, xs)
        y = vmap(case.call, (None, 0, None, None))(p, x, case.h, case.c)
        first = torch.autograd.grad(sum(t.sin().sum() for t in y), [*p.values(), x], create_graph=True)
        return first, torch.autograd.grad(sum(t.square().sum() for t in first), [*p.values(), x])

    def over_grad():
        p, x = leaves_of(case.p, case.x)
        first = tree_leaves(grad(case.loss, (0, 1))(p, x, case.h, case.c))
        second = torch.autograd.grad(
            sum(t.square().sum() for t in first), [*p.values(), x], create_graph=True
        )
        return first, second, torch.autograd.grad(sum(t.sin().sum() for t in second), x)

    def over_per_sample_gradients():
        p, x = leaves_of(case.p, xs)
        first = tree_leaves(vmap(grad(case.loss, (0, 1)), (None, 0, None, None))(p, x, case.h, case.c))
        return first, torch.autograd.grad(sum(t.square().sum() for t in first), [*p.values(), x])

    def under_no_grad():
        with torch.no_grad():
            return grad(case.loss, (0, 1))(*case.arguments)

    for compute in (over_vmap, over_grad, over_per_sample_gradients, under_no_grad):
        assert_as_on_reference(lambda compute=compute: tree_map(Tensor.detach, compute()), operators)
    with on_reference():
        expected = grad(case.loss, 1)(*case.arguments)

    def no_grad_within(x):
        with torch.no_grad():
            constant = case.of(1)(x)
        return constant * case.of(1)(x)

    assert_close(grad(no_grad_within)(case.x), case.of(1)(case.x) * expected)


@every_model
@pytest.mark.parametrize("transformed", [False, True], ids=["eager", "vmap"])
def test_batches_of_gradients(model, transformed):
    case = make_case(model)
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


def test_gradients_of_gradients_in_a_batch(operators):
    """is_grads_batched=True for the second backward pass."""
    case = make_case("packed, two layers, both directions")
    p, x = tree_map(lambda t: t.clone().requires_grad_(), (case.p, case.x))
    leaves = [*p.values(), x]
    first = torch.autograd.grad(case.loss(p, x, case.h, case.c), leaves, create_graph=True)
    assert "lstm_layer_backward" in operators
    grads = several(tree_map(torch.randn_like, first), 3)

    def one(*grads, **options):
        return torch.autograd.grad(first, leaves, grads, retain_graph=True, **options)

    expected = [torch.stack(gs) for gs in zip(*[one(*[g[i] for g in grads]) for i in range(3)], strict=True)]
    assert_close(one(*grads, is_grads_batched=True), expected)
    assert_close(vmap(one)(*grads), expected)


@every_model
def test_torch_autograd_functional(model):
    case = make_case(model)
    module = torch.autograd.functional

    def f(x, c):
        return case.call(case.p, x, case.h, c)

    def loss(x, c):
        return case.loss(case.p, x, case.h, c)

    inputs = (case.x, case.c)
    jacobian = jacrev(f, (0, 1))(*inputs)
    second = jacrev(grad(loss, (0, 1)), (0, 1))(*inputs)
    for options in ({}, {"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"}):
        assert_close(module.jacobian(f, inputs, **options), jacobian)
    assert_close(module.jacobian(lambda x: loss(x, case.c), case.x, create_graph=True), grad(loss)(*inputs))
    for options in (
        {},
        {"vectorize": True},
        {"vectorize": True, "outer_jacobian_strategy": "forward-mode"},
    ):
        assert_close(module.hessian(loss, inputs, **options), second)
    v = tree_map(torch.randn_like, inputs)
    product = [sum(torch.tensordot(m, t, t.dim()) for m, t in zip(row, v, strict=True)) for row in second]
    assert_close(module.vhp(loss, inputs, v)[1], product)
    assert_close(module.hvp(loss, inputs, v)[1], product)
    y, tangent = jvp(f, inputs, v)
    assert_close(module.jvp(f, inputs, v), (y, tangent))
    assert_close(module.vjp(f, inputs, y)[1], vjp(f, *inputs)[1](y))


@every_model
def test_functionalize(model):
    case = make_case(model)
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


def test_autocast_within_vmap():
    module = lstm_ext.LSTM(2, 3)
    xs = torch.randn(3, 4, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = vmap(module)(xs)
        expected = [module(x) for x in xs]
    for r, e in zip(tree_leaves(result), zip(*map(tree_leaves, expected), strict=True), strict=True):
        assert r.dtype == torch.bfloat16
        torch.testing.assert_close(r, torch.stack(e))
