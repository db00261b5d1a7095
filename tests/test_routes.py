"""Which route a call takes: tensors that are not what they seem must not reach the kernels as they are."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lstm_ext
from lstm_ext import _backend, autograd, functional


@pytest.fixture
def layer() -> lstm_ext.LSTM:
    return lstm_ext.LSTM(3, 4)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are called."""
    calls: list[str] = []
    extension = _backend.extension()

    class Recorder:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(extension, name)

    monkeypatch.setattr(autograd._backend, "extension", lambda: Recorder())
    return calls


def test_kernels_are_called(layer, kernel_calls):
    with torch.no_grad():
        layer(torch.randn(5, 2, 3))
    assert kernel_calls == ["lstm_layer_forward"]
    layer(torch.randn(5, 2, 3))[0].sum().backward()
    assert kernel_calls == ["lstm_layer_forward"] * 2 + ["lstm_layer_backward"]


def test_the_reference_runs_where_something_looks_into_the_computation(layer, kernel_calls):
    x = torch.randn(5, 2, 3)
    expected = lstm_ext.to_torch(layer)(x)[0]
    parameters = dict(layer.named_parameters())

    def call(x):
        return torch.func.functional_call(layer, parameters, (x,))[0]

    torch.testing.assert_close(torch.vmap(call)(x[None]), expected[None])
    torch.testing.assert_close(torch.func.jvp(call, (x,), (x,))[0], expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        assert torch.autograd.forward_ad.unpack_dual(call(dual)).tangent is not None
    with FlopCounterMode(display=False) as counter:
        call(x)
    assert counter.get_total_flops() > 0
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert call(mode.from_tensor(x)).shape == expected.shape
    assert layer.to("meta")(x.to("meta"))[0].shape == expected.shape
    assert not kernel_calls


@pytest.mark.filterwarnings("ignore")
def test_compile_and_trace(layer, kernel_calls):
    x = torch.randn(5, 2, 3)
    expected = lstm_ext.to_torch(layer)(x)[0]
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x)[0], expected)
    weights = [p.detach() for p in layer.parameters()]
    traced = torch.jit.trace(
        lambda x: functional.lstm(x, None, weights)[0], torch.randn(5, 2, 3), check_trace=False
    )
    torch.testing.assert_close(traced(x), expected)
    assert not kernel_calls


def test_batched_gradients(layer):
    x = torch.randn(5, 2, 3, requires_grad=True)
    leaves = [x, *layer.parameters()]
    output, _ = layer(x)
    grads = torch.randn(7, *output.shape)
    together = torch.autograd.grad(output, leaves, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(output, leaves, g, retain_graph=True) for g in grads]
    for i, batch in enumerate(together):
        torch.testing.assert_close(batch, torch.stack([g[i] for g in one_by_one]))
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(
        jacobian(lambda x: layer(x)[0], x, vectorize=True), jacobian(lambda x: layer(x)[0], x)
    )


def test_gradients_keep_no_graph_unless_asked_to(layer):
    x = torch.randn(5, 2, 3, requires_grad=True)
    output, _ = layer(x)
    with FlopCounterMode(display=False):  # gradients through the reference
        assert not torch.autograd.grad(output.sum(), x)[0].requires_grad
    output, _ = layer(x)
    assert torch.autograd.grad(output.sum(), x, create_graph=True)[0].requires_grad


def test_pending_negation_and_zeros_without_memory():
    layer = lstm_ext.LSTM(1, 4)
    theirs = lstm_ext.to_torch(layer)
    negated = torch.randn(5, 2, 1, dtype=torch.cfloat).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(layer(negated)[0], theirs(negated)[0])
    x = torch.randn(5, 2, 1, requires_grad=True)
    gradient = torch._neg_view(torch.randn(5, 2, 4))
    ours, expected = (torch.autograd.grad(m(x)[0], x, gradient)[0] for m in (layer, theirs))
    torch.testing.assert_close(ours, expected)
    nothing = torch._efficientzerotensor((5, 2, 1))
    torch.testing.assert_close(layer(nothing)[0], theirs(torch.zeros(5, 2, 1))[0])
