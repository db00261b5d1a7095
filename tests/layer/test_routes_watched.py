"""Which route a call takes that a mode, a compiler, a tracer or a transform looks into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from routes import (
    DIRECT,
    KERNEL_BACKWARD,
    KERNELS,
    OPERATOR,
    OPERATOR_BACKWARD,
    REFERENCE,
    TRANSFORM,
    TRANSFORM_INFERENCE,
    B,
    H,
    I,
    Named,
    T,
)
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._vmap_internals import _vmap as legacy_vmap
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, jacfwd, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lstm_ext
from lstm_ext import functional

pytestmark = pytest.mark.devices("cpu", "cuda")


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


# ---- what looks into the computation


def test_dispatch_modes(layer, x, taken):
    for mode in (Watching(), FlopCounterMode(display=False)):
        with mode:
            assert taken(lambda: layer(x)[0].sum().backward()) == TRANSFORM + OPERATOR_BACKWARD
            with torch.no_grad():
                assert taken(lambda: layer(x)) == OPERATOR
    output = layer(x)[0]
    with Watching():
        assert taken(lambda: output.sum().backward()) == OPERATOR_BACKWARD
    with Watching():
        output = layer(x)[0]
    assert taken(lambda: output.sum().backward()) == OPERATOR_BACKWARD


def test_fake_tensors(layer, x, taken):
    packed_data, sizes = x.flatten(0, 1), torch.tensor([4, 3, 2, 1], device="cpu")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake, fake_data = mode.from_tensor(x), mode.from_tensor(packed_data)
        assert layer(fake)[0].shape == (T, B, H)
        assert taken(lambda: layer(fake)[0].sum().backward()) == TRANSFORM + OPERATOR_BACKWARD
        assert taken(lambda: vmap(layer)(fake[None])) == TRANSFORM
        with torch.no_grad():
            assert taken(lambda: layer(fake)) == OPERATOR
            assert taken(lambda: layer(PackedSequence(fake_data, sizes))) == OPERATOR
            output, (h_n, _) = layer(PackedSequence(fake_data, sizes))
            assert (output.data.shape, h_n.shape) == ((10, H), (1, 4, H))
    layer.zero_grad()
    # A fake tensor outside of its mode.
    fake_layer = lstm_ext.LSTM(I, H)
    fake_layer.load_state_dict({k: mode.from_tensor(v) for k, v in layer.state_dict().items()}, assign=True)
    with torch.no_grad():
        assert taken(lambda: fake_layer(fake)) == OPERATOR


def test_meta_tensors(x, taken):
    layer = lstm_ext.LSTM(I, H, device="meta")
    x = x.to("meta")
    assert taken(lambda: layer(x)[0].sum().backward()) == TRANSFORM + OPERATOR_BACKWARD
    assert layer.weight_ih_l0.grad.is_meta
    with torch.no_grad():
        assert taken(lambda: layer(x)) == OPERATOR
        assert (
            taken(lambda: layer(PackedSequence(x.flatten(0, 1), torch.tensor([4, 3, 2, 1], device="cpu"))))
            == OPERATOR
        )
    assert taken(lambda: vmap(layer)(x[None])) == TRANSFORM


def test_tracing_into_a_graph(layer, x, events):
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def call(p, x):
        return functional_call(layer, p, (x,))[0]

    def targets(function, **options):
        graph = make_fx(function, **options)(parameters, x).graph
        return [n.target._opname for n in graph.nodes if getattr(n.target, "namespace", "") == "lstm_ext"]

    for mode in ("real", "fake", "symbolic"):
        assert targets(call, tracing_mode=mode) == ["lstm_layer"]
        assert targets(call, tracing_mode=mode, pre_dispatch=True) == ["lstm_layer"]
        assert targets(grad(lambda p, x: call(p, x).sum()), tracing_mode=mode) == list(KERNELS)
    assert not [e for e in events if e.startswith("kernel")]


@pytest.mark.skipif(
    torch.__version__.startswith("2.11."),
    reason="compiled autograd of torch 2.11 cannot look into the backward pass of an eager layer",
)
def test_compiled_autograd(layer, x):
    loss = layer(x)[0].sin().sum()
    expected = torch.autograd.grad(loss, layer.weight_hh_l0, retain_graph=True)[0]
    graphs: list[torch.fx.GraphModule] = []

    # Dynamo leaves a function in C++ to what comes after it.
    def collect(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    backend = aot_autograd(fw_compiler=collect)
    with torch._dynamo.compiled_autograd._enable(
        lambda graph: torch.compile(graph, fullgraph=True, backend=backend)
    ):
        loss.backward()
    torch.testing.assert_close(layer.weight_hh_l0.grad, expected)
    names = [str(n.target) for graph in graphs for n in graph.graph.nodes if n.op == "call_function"]
    assert [name for name in names if "lstm_layer" in name] == ["lstm_ext.lstm_layer_backward.default"]


@pytest.mark.filterwarnings("ignore")
def test_jit_trace(layer, x, taken):
    weights = [p.detach() for p in layer.parameters()]
    traced: list[Any] = []

    def trace():
        function = torch.jit.trace(lambda x: functional.lstm(x, None, weights)[0], x, check_trace=False)
        traced.append(function)

    assert taken(trace) == REFERENCE
    other = torch.randn_like(x)
    torch.testing.assert_close(traced[0](other), layer(other)[0])


# ---- transforms


def test_transforms(layer, x, taken):
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(p, x):
        return functional_call(layer, p, (x,))[0].sin().sum()

    xs = x[None]
    assert taken(lambda: vmap(layer)(xs)) == TRANSFORM
    with torch.no_grad():
        assert taken(lambda: vmap(layer)(xs)) == TRANSFORM_INFERENCE
        assert taken(lambda: grad(loss, 1)(parameters, x)) == TRANSFORM + OPERATOR_BACKWARD
    with torch.inference_mode():
        assert taken(lambda: vmap(layer)(xs)) == TRANSFORM_INFERENCE
    assert taken(lambda: vmap(grad(loss, 1), (None, 0))(parameters, xs)) == TRANSFORM + OPERATOR_BACKWARD
    assert taken(lambda: vjp(loss, parameters, x)) == TRANSFORM
    assert taken(lambda: vmap(layer)(xs)[0].sum().backward()) == TRANSFORM + OPERATOR_BACKWARD
    with Watching():
        assert taken(lambda: vmap(layer)(xs)) == TRANSFORM
    # A transform of the backward pass alone.
    output, _ = layer(x)
    grads = torch.ones(3, *output.shape)

    def gradient(g):
        return torch.autograd.grad(output, layer.weight_hh_l0, g, retain_graph=True)[0]

    assert taken(lambda: vmap(gradient)(grads))[:2] == OPERATOR_BACKWARD
    # Tensors that have left their transform are plain again.
    kept: list[Tensor] = []
    grad(lambda x: (kept.append(2 * x), x.sum())[1])(x)
    with torch.no_grad():
        assert taken(lambda: layer(kept[0])) == DIRECT
        torch.testing.assert_close(layer(kept[0])[0], layer(2 * x)[0])
    # Unless they are batches, which have nothing left to stand for.
    vmap(lambda x: (kept.append(x), x)[1])(xs)
    refusal = "doesn't have storage|escaped from inside a function being vmapped"
    for grad_mode in (False, True):
        with torch.set_grad_enabled(grad_mode), pytest.raises(RuntimeError, match=refusal):
            layer(kept[1])


def test_transforms_on_the_reference(layer, x, taken):
    def call(x):
        return layer(x)[0]

    assert set(taken(lambda: jvp(call, (x,), (x,)))) == set(REFERENCE)
    assert set(taken(lambda: jacfwd(call)(x))) == set(REFERENCE)
    assert set(taken(lambda: jvp(vmap(call), (x[None],), (x[None],)))) == set(REFERENCE)
    assert set(taken(lambda: jvp(grad(lambda x: call(x).sum()), (x,), (x,)))) == set(REFERENCE)
    assert set(taken(lambda: functionalize(call)(x))) == set(REFERENCE)
    with forward_ad.dual_level():
        assert taken(lambda: call(x)) == REFERENCE
        dual = forward_ad.make_dual(x, x)
        assert taken(lambda: call(dual)) == REFERENCE
        assert forward_ad.unpack_dual(call(dual)).tangent is not None
    assert taken(lambda: call(x)) == DIRECT


def test_forward_mode_and_batches_of_gradients_in_the_backward_pass(layer, x, taken):
    output = layer(x.requires_grad_())[0]

    def gradient(g, **options):
        return torch.autograd.grad(output, x, g, retain_graph=True, **options)

    ones = torch.ones_like(output)
    with forward_ad.dual_level():
        assert taken(lambda: gradient(forward_ad.make_dual(ones, ones))) == ["gradients", *REFERENCE]
    batch = torch.ones(3, *output.shape)
    assert taken(lambda: gradient(batch, is_grads_batched=True)) == ["gradients", *REFERENCE]
    # Autograd's C++ does not see a subclass that only has functions, nor does torch's layer.
    assert taken(lambda: gradient(ones.as_subclass(Named))) == KERNEL_BACKWARD


def test_legacy_vmap(layer, x, taken):
    """The one behind is_grads_batched=True, also around a whole layer."""
    results: list[Tensor] = []
    assert taken(lambda: results.append(legacy_vmap(lambda x: layer(x)[0])(x[None]))) == REFERENCE
    torch.testing.assert_close(results[0][0], layer(x)[0])
    with torch.no_grad():
        states = torch.randn(3, 1, B, H)
        assert taken(lambda: legacy_vmap(lambda h: layer(x, (h, h))[0])(states)) == REFERENCE
