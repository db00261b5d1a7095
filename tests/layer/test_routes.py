"""Which route a call takes, for every kind of call: a tensor without memory must never reach a kernel directly."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import internals
import pytest
import torch
from matrix.cases import FORMS, case_of, tensors_of
from matrix.judge import run
from matrix.routes import ROUTES
from routes import (
    CELL,
    DIRECT,
    KERNEL_BACKWARD,
    OPERATOR_BACKWARD,
    REFERENCE,
    B,
    H,
    I,
    Named,
    T,
)
from torch import Tensor
from torch.func import vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import lstm_ext
from lstm_ext import functional, reference
from lstm_ext.layer import cuda_kernels, route
from lstm_ext.native import loader

pytestmark = pytest.mark.devices("cpu", "cuda")


# ---- plain tensors


def test_plain_tensors(layer, x, taken):
    with torch.no_grad():
        assert taken(lambda: layer(x)) == DIRECT
    with torch.inference_mode():
        assert taken(lambda: layer(x)) == DIRECT
    assert taken(lambda: layer.requires_grad_(False)(x)) == DIRECT
    state = torch.zeros(1, B, H)
    for hx in ((state, state.clone().requires_grad_()), [state, state]):
        assert taken(lambda hx=hx: layer(x, hx)) == DIRECT
    assert taken(lambda: layer(x.requires_grad_())) == DIRECT
    layer.bias_hh_l0.requires_grad_()
    assert taken(lambda: layer(x.detach())) == DIRECT
    assert taken(lambda: layer(x)[0].sum().backward()) == DIRECT + KERNEL_BACKWARD


def test_every_way_to_call(layer, x, taken, device):
    cell = lstm_ext.LSTMCell(I, H)
    weights = [p.detach() for p in layer.parameters()]
    packed = PackedSequence(x.flatten(0, 1), torch.tensor([4, 3, 2, 1], device="cpu"))
    half = lstm_ext.LSTM(I, H, dtype=torch.bfloat16)
    with torch.no_grad():
        assert taken(lambda: layer.step(x[0])) == DIRECT
        assert taken(lambda: layer(packed)) == DIRECT
        assert taken(lambda: layer(x[:, 0])) == DIRECT
        assert taken(lambda: half(x.bfloat16())) == DIRECT
        assert taken(lambda: cell(x[0])) == CELL
        assert taken(lambda: functional.lstm(x, None, weights)) == DIRECT
        assert taken(lambda: lstm_ext.LSTM(I, H, 3)(x)) == DIRECT * 3
        assert taken(lambda: reference.lstm(x, None, weights)) == REFERENCE
        with torch.autocast(device, dtype=torch.bfloat16):
            assert taken(lambda: layer(x)) == DIRECT
        # A mode that sees the functions of torch's Python interface, of which a kernel is none.
        with torch.device(device):
            assert taken(lambda: layer(x)) == DIRECT
    assert taken(lambda: layer.step(x[0])[0].sum().backward()) == DIRECT + KERNEL_BACKWARD
    assert taken(lambda: layer(packed)[0].data.sum().backward()) == DIRECT + KERNEL_BACKWARD
    assert taken(lambda: cell(x[0])[0].sum().backward()) == CELL + KERNEL_BACKWARD


# Routes and forms of the matrix.
SHORT = [("eager", form) for form, options in FORMS.items() if not ("dropout" in options or "packed" in form)]
SHORT += [
    (name, form) for name in ("steps", "cells") for form in ("dense", "batch first, two layers", "unbatched")
]
SHORT += [("frozen", "all")]


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("has_hx", [True, False])
@pytest.mark.parametrize(("name", "form"), SHORT, ids=str)
def test_one_call_for_all_layers_of_plain_tensors(name, form, has_hx, dtype, taken, monkeypatch):
    """It gives what the way of one call a layer gives, which takes everything else."""
    case = case_of(form, "plain", "", hx=has_hx, dtype=dtype)
    if name in ("steps", "cells"):
        case = dataclasses.replace(case, bidirectional=False)
    tensors, of_matrix, found = tensors_of(case), ROUTES[name], []
    short = "plain_cell" if name == "cells" else "plain_layers"
    original, answers = getattr(route, short), []

    def results(mode: str) -> dict[str, Tensor]:
        of_mode = dataclasses.replace(case, mode=mode)
        return run(of_matrix.kind, of_mode, tensors, case.torch_dtype, of_matrix.call).values

    def watched(*arguments: Any) -> Any:
        answers.append(original(*arguments))
        return answers[-1]

    for mode in {"grad", "no_grad"} & set(of_matrix.modes):
        with monkeypatch.context() as patch:
            patch.setattr(route, short, watched)
            assert set(taken(lambda mode=mode: found.append(results(mode)))) == set(
                CELL if name == "cells" else DIRECT
            )
        assert answers and None not in answers
        with monkeypatch.context() as patch:
            patch.setattr(route, short, lambda *_: None)
            expected = results(mode)
        for n, value in found.pop().items():
            assert value.stride() == expected[n].stride(), n
            assert torch.equal(value, expected[n]), n


@pytest.mark.devices("cpu")
def test_one_call_for_all_layers_watches_over_its_arguments(layer, x):
    for leaf in (x, layer.weight_ih_l0):
        leaf.requires_grad_()
        for function, input in ((layer, x), (layer.step, x[0])):
            output = function(input)[0]
            with torch.no_grad():
                x.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                output.sum().backward()


@pytest.mark.devices("cpu")
def test_one_call_for_all_layers_declines_what_does_not_fit(layer, x, taken):
    states = torch.zeros(1, B, H), torch.zeros(1, B, H)
    for input, hx in (
        *((x[..., 1:], None), (x[:0], None), (x.double(), None), (x, states[:1]), (x, x)),
        *((x, (states[0], states[1][:, 1:])), (x, (states[0].double(), states[1]))),
        *((x, (states[0], None)), (x, (states[0], states[1][..., 1:]))),
    ):

        def call(input=input, hx=hx):
            with pytest.raises((RuntimeError, ValueError, TypeError)) as error:
                layer(input, hx)
            assert "lstm_ext:" not in str(
                error.value
            )  # not from the kernels, which do not know the user's words

        assert taken(call) == []


@pytest.mark.devices("cpu")
def test_number_of_arguments():
    with pytest.raises(RuntimeError, match="expected 10 arguments, got 1"):
        loader.extension().lstm_module(None)
    with pytest.raises(RuntimeError, match="expected 4 arguments, got 1"):
        loader.extension().lstm_cell_module(None)


def test_backward_is_one_call_of_the_kernels(layer: lstm_ext.LSTM, x: Tensor) -> None:
    """And no operator, whose event would be a second one of this name, within it the kernels'."""
    cell = lstm_ext.LSTMCell(I, H)
    for compute in (lambda: layer(x)[0], lambda: layer.step(x[0])[0], lambda: cell(x[0])[0]):
        output = compute()
        with torch.autograd.profiler.profile() as profile:
            output.sum().backward()
        names = [event.name for event in profile.function_events]
        assert names.count("lstm_ext::lstm_layer_backward") == 1


def test_gradients_that_are_differentiated_again(layer, x, taken):
    x.requires_grad_()
    loss = layer(x)[0].sin().sum()
    first: list[Tensor] = []
    create = taken(lambda: first.extend(torch.autograd.grad(loss, x, create_graph=True)))
    assert create == OPERATOR_BACKWARD
    assert first[0].requires_grad
    assert taken(lambda: first[0].sum().backward()) == [*REFERENCE, *KERNEL_BACKWARD]


def test_gradients_keep_no_graph_unless_asked_to(layer, x):
    x.requires_grad_()
    output, _ = layer(x)
    with Watching():
        assert not torch.autograd.grad(output.sum(), x, retain_graph=True)[0].requires_grad
    grads = torch.ones(3, *output.shape)
    assert not torch.autograd.grad(output, x, grads, is_grads_batched=True)[0].requires_grad
    output, _ = layer(x)
    assert torch.autograd.grad(output.sum(), x, create_graph=True)[0].requires_grad


def test_pending_negation_and_zeros_without_memory(taken, device):
    """Plain tensors that the kernels' glue makes real."""
    layer = lstm_ext.LSTM(1, 4)
    x = torch.randn(5, 2, 1, requires_grad=True)
    for make in (
        lambda *sizes: torch._neg_view(torch.randn(sizes)),
        lambda *sizes: torch._efficientzerotensor(sizes, device=device),
    ):
        input, gradient = make(5, 2, 1), make(5, 2, 4)
        with torch.no_grad():
            assert taken(lambda input=input: layer(input)) == DIRECT
            torch.testing.assert_close(layer(input)[0], layer(input.clone())[0])
        grads = [torch.autograd.grad(layer(x)[0], x, g)[0] for g in (gradient, gradient.clone())]
        torch.testing.assert_close(*grads)


@pytest.mark.filterwarnings("ignore:lstm_ext has no kernels for CUDA tensors")
def test_without_the_extension(layer, x, events, taken, monkeypatch):
    monkeypatch.setattr(loader, "extension", lambda: None)
    monkeypatch.setattr(loader, "status", lambda: loader.Status("reference"))
    monkeypatch.setattr(cuda_kernels, "_problems", {})  # what was found before
    assert taken(lambda: layer(x)[0].sum().backward()) == REFERENCE
    assert taken(lambda: vmap(layer)(x[None])) == REFERENCE


def test_dtypes_without_a_kernel(events):
    module = lstm_ext.LSTM(I, H, dtype=torch.complex64)
    module(torch.randn(T, B, I, dtype=torch.complex64))
    assert events == REFERENCE


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Wrapper(Tensor):
    """A subclass with ``__torch_dispatch__``, around another tensor."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.plain = inner.detach()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda t: t.plain if isinstance(t, cls) else t, (args, kwargs or {}))
        return tree_map(lambda t: cls(t) if isinstance(t, Tensor) else t, func(*args, **kwargs))


class NamedParameter(torch.nn.Parameter):
    pass


# ---- subclasses


@pytest.mark.parametrize("place", ["input", "h0", "c0", "weight_hh", "bias_ih", "all"])
@pytest.mark.parametrize("wrap", [Wrapper, lambda t: t.as_subclass(Named)], ids=["dispatch", "function"])
def test_subclasses(layer, x, taken, wrap, place):
    tensors = {"input": x, "h0": torch.randn(1, B, H), "c0": torch.randn(1, B, H)}
    tensors |= dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), layer.parameters(), strict=True))
    tensors = {name: t.detach() for name, t in tensors.items()}

    def call(tensors):
        input, h0, c0, *weights = tensors.values()
        return internals.lstm_layer(input, h0, c0, weights, None, True, False)[0]

    expected = call(tensors)
    wrapped = {name: wrap(t) if place in (name, "all") else t for name, t in tensors.items()}
    assert taken(lambda: call(wrapped)) == REFERENCE
    result = call(wrapped)
    assert type(result) is not Tensor
    torch.testing.assert_close(result.plain, expected)


def test_subclass_of_a_parameter(layer, x, taken):
    layer.weight_hh_l0 = NamedParameter(layer.weight_hh_l0.detach())
    assert taken(lambda: layer(x)[0].sum().backward()) == REFERENCE
    assert layer.weight_hh_l0.grad is not None


@pytest.mark.devices("cpu")
def test_distributed_tensors(layer, x, taken):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed import tensor as distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        weights = [distributed.distribute_tensor(p.detach(), mesh) for p in layer.parameters()]
        with torch.no_grad():
            expected = layer(x)[0]
            result = functional.lstm(distributed.distribute_tensor(x, mesh), None, weights)[0]
            torch.testing.assert_close(result.full_tensor(), expected)
            sharded = distributed.distribute_tensor(x, mesh)
            assert taken(lambda: functional.lstm(sharded, None, weights)) == REFERENCE
            with pytest.raises(RuntimeError, match="the weights are DTensors and the input is not"):
                functional.lstm(x, None, weights)
    finally:
        destroy_process_group()
