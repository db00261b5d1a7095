"""Which route a call takes, for every kind of call: a tensor without memory must never reach a kernel directly."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import internals
import pytest
import torch
from functorch.compile import aot_function
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._vmap_internals import _vmap as legacy_vmap
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, jacfwd, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import lstm_ext
from lstm_ext import functional, reference
from lstm_ext.layer import equations, route, transforms
from lstm_ext.native import cuda as native_cuda
from lstm_ext.native import loader

pytestmark = pytest.mark.devices("cpu", "cuda")

T, B, I, H = 5, 2, 3, 4
KERNELS = ("lstm_layer_forward", "lstm_layer_backward")
ENTRIES = ("lstm_layer", "lstm_cell")
OPERATORS = ("lstm_layer", *KERNELS)

# The routes, as `events` names them.
DIRECT = ["kernel lstm_layer"]
CELL = ["kernel lstm_cell"]
KERNEL_BACKWARD: list[
    str
] = []  # in C++, and by none of the ways below; see test_backward_is_one_call_of_the_kernels
OPERATOR = ["operator lstm_layer"]
TRANSFORM = ["transforms", "operator lstm_layer_forward"]  # and backward:
OPERATOR_BACKWARD = ["gradients", "operator lstm_layer_backward"]
TRANSFORM_INFERENCE = ["transforms", "operator lstm_layer"]
REFERENCE = ["reference"]


@pytest.fixture
def layer() -> lstm_ext.LSTM:
    return lstm_ext.LSTM(I, H)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(T, B, I)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a call passes through, in order."""
    seen: list[str] = []

    def recorded(event: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args, **kwargs):
            seen.append(event)
            return function(*args, **kwargs)

        return record

    extension = loader.extension()

    class Kernels:
        def __getattr__(self, name):
            value = getattr(extension, name)
            if name == "lstm_module":
                return module_call(value, seen, DIRECT[0])
            if name == "lstm_cell_module":
                return module_call(value, seen, CELL[0])
            return recorded(f"kernel {name}", value) if name in ENTRIES else value

    kernels = Kernels()
    monkeypatch.setattr(loader, "extension", lambda: kernels)
    monkeypatch.setattr(transforms, "lstm_layer", recorded("transforms", transforms.lstm_layer))
    monkeypatch.setattr(transforms, "layer_gradients", recorded("gradients", transforms.layer_gradients))
    monkeypatch.setattr(equations, "lstm_layer", recorded("reference", equations.lstm_layer))

    class Operator:
        """torch looks an operator up again by its name, and then for an overload of it."""

        def __init__(self, name):
            self.name, self.operator = name, getattr(torch.ops.lstm_ext, name)
            self.is_called = False

        def __call__(self, *args, **options):
            if self.is_called:  # looked up again by the mode behind a default device
                return self.operator(*args, **options)
            seen.append(f"operator {self.name}")
            self.is_called = True
            try:
                return self.operator(*args, **options)
            finally:
                self.is_called = False

        def __getattr__(self, attribute):
            return getattr(self.operator, attribute)

    for name in OPERATORS:
        monkeypatch.setattr(torch.ops.lstm_ext, name, Operator(name))
    return seen


@pytest.fixture
def taken(events: list[str]) -> Callable[[Callable[[], Any]], list[str]]:
    """The events of a computation."""

    def taken(compute: Callable[[], Any]) -> list[str]:
        events.clear()
        compute()
        return events.copy()

    return taken


def module_call(function: Callable[..., Any], seen: list[str], event: str) -> Callable[..., Any]:
    """The extension's functions for modules, which compute all layers or decline: an event for each layer."""

    def call(input, hx, weights, *others):
        results = function(input, hx, weights, *others)
        if results is not None:
            seen.extend([event] * (len(weights) if others else 1))
        return results

    return call


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


class Named(Tensor):
    """A subclass with nothing but ``__torch_function__``, which every subclass inherits."""

    @property
    def plain(self):
        return self.as_subclass(Tensor)


class NamedParameter(torch.nn.Parameter):
    pass


# ---- plain tensors


def test_plain_tensors(layer, x, taken):
    with torch.no_grad():
        assert taken(lambda: layer(x)) == DIRECT
    with torch.inference_mode():
        assert taken(lambda: layer(x)) == DIRECT
    assert taken(lambda: layer.requires_grad_(False)(x)) == DIRECT
    state = torch.zeros(1, B, H)
    assert taken(lambda: layer(x, (state, state.clone().requires_grad_()))) == DIRECT
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


# Of the input and its states, and how the module is called.
LAYOUTS: dict[str, Any] = {
    "time first": ((T, B, I), (B,), lambda m: m),
    "batch first": ((B, T, I), (B,), lambda m: m),
    "unbatched": ((T, I), (), lambda m: m),
    "step": ((B, I), (B,), lambda m: m.step),
    "unbatched step": ((I,), (), lambda m: m.step),
}


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "layout,kind",
    [
        (layout, kind)
        for layout in LAYOUTS
        for kind in ("one layer", "three layers", "projection", "both directions", "frozen")
        if not (kind == "both directions" and "step" in layout)
    ],
)
def test_one_call_for_all_layers_of_plain_tensors(layout, kind, dtype, taken, monkeypatch):
    """It gives what the way of one call a layer gives, which takes everything else."""
    shape, batch, function = LAYOUTS[layout]
    layers = 3 if kind in ("three layers", "both directions") else 1
    sets = 2 * layers if kind == "both directions" else layers
    P = 2 if kind == "projection" else 0
    module = lstm_ext.LSTM(
        *(I, H, layers),
        batch_first=layout == "batch first",
        bidirectional=kind == "both directions",
        proj_size=P,
        dtype=dtype,
    )
    if kind == "frozen":
        module = lstm_ext.freeze(module)
    x = torch.randn(shape, dtype=dtype)
    states = torch.randn(sets, *batch, P or H, dtype=dtype), torch.randn(sets, *batch, H, dtype=dtype)

    def results(hx) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(kind != "frozen"), *module.parameters()]
        output, (h, c) = function(module)(leaves[0], hx)
        if kind == "frozen":
            return [output, h, c]
        gradients = torch.autograd.grad((output.sum() + h.sum() + c.sum()).square(), leaves)
        with torch.no_grad():
            plain = function(module)(x, hx)
        return [output, h, c, *gradients, plain[0], *plain[1]]

    answers: list[Any] = []
    short = route.plain_layers

    def watched(*arguments: Any) -> Any:
        answers.append(short(*arguments))
        return answers[-1]

    monkeypatch.setattr(route, "plain_layers", watched)
    for hx in (None, states, list(states)):
        found: list[Tensor] = []
        assert taken(lambda hx=hx, found=found: found.extend(results(hx))) == DIRECT * layers * (
            1 if kind == "frozen" else 2
        )
        assert None not in answers
        with monkeypatch.context() as patch:
            patch.setattr(route, "plain_layers", lambda *_: None)
            expected = results(hx)
        for y, e in zip(found, expected, strict=True):
            assert y.shape == e.shape
            assert y.stride() == e.stride()
            assert torch.equal(y, e)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [(B,), ()], ids=["batched", "unbatched"])
@pytest.mark.parametrize("bias", [True, False])
def test_short_call_of_a_cell(bias, batch, dtype, taken, monkeypatch):
    """It gives what the other way gives."""
    cell = lstm_ext.LSTMCell(I, H, bias=bias, dtype=dtype)
    x, states = torch.randn(*batch, I, dtype=dtype), [torch.randn(*batch, H, dtype=dtype) for _ in range(2)]

    def results(hx) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), *cell.parameters()]
        h, c = cell(leaves[0], hx)
        with torch.no_grad():
            plain = cell(x, hx)
        return [h, c, *torch.autograd.grad((h.sum() + c.sum()).square(), leaves), *plain]

    for hx in (None, states, tuple(states)):
        found: list[Tensor] = []
        assert taken(lambda hx=hx, found=found: found.extend(results(hx))) == CELL * 2
        with monkeypatch.context() as patch:
            patch.setattr(route, "plain_cell", lambda *_: None)
            expected = results(hx)
        assert [y.shape for y in found] == [e.shape for e in expected]
        assert all(map(torch.equal, found, expected))


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
    with pytest.raises(RuntimeError, match="expected 3 arguments, got 1"):
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
    theirs = lstm_ext.to_torch(layer)
    negated = torch.randn(5, 2, 1, dtype=torch.cfloat).conj().imag
    nothing = torch._efficientzerotensor((5, 2, 1), device=device)
    assert negated.is_neg()
    with torch.no_grad():
        assert taken(lambda: layer(negated)) == taken(lambda: layer(nothing)) == DIRECT
        torch.testing.assert_close(layer(negated)[0], theirs(negated)[0])
        torch.testing.assert_close(layer(nothing)[0], theirs(torch.zeros(5, 2, 1))[0])
    x = torch.randn(5, 2, 1, requires_grad=True)
    for gradient in (
        torch._neg_view(torch.randn(5, 2, 4)),
        torch._efficientzerotensor((5, 2, 4), device=device),
    ):
        plain = gradient.clone()
        ours, expected = (
            torch.autograd.grad(m(x)[0], x, g)[0] for m, g in ((layer, gradient), (theirs, plain))
        )
        torch.testing.assert_close(ours, expected)


@pytest.mark.filterwarnings("ignore:lstm_ext has no kernels for CUDA tensors")
def test_without_the_extension(layer, x, events, taken, monkeypatch):
    monkeypatch.setattr(loader, "extension", lambda: None)
    monkeypatch.setattr(loader, "status", lambda: loader.Status("reference"))
    monkeypatch.setattr(native_cuda, "_problems", {})  # what was found before
    assert taken(lambda: layer(x)[0].sum().backward()) == REFERENCE
    assert taken(lambda: vmap(layer)(x[None])) == REFERENCE


def test_dtypes_without_a_kernel(events):
    module = lstm_ext.LSTM(I, H, dtype=torch.complex64)
    module(torch.randn(T, B, I, dtype=torch.complex64))
    assert events == REFERENCE


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


@pytest.mark.parametrize("name", ["input", "h0", "c0", "weight_ih", "bias_hh"])
def test_one_meta_tensor_among_others_is_refused(layer, x, name, device):
    tensors = {"input": x, "h0": torch.zeros(1, B, H), "c0": torch.zeros(1, B, H)}
    tensors |= dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), layer.parameters(), strict=True))
    tensors[name] = tensors[name].detach().to("meta")
    input, h0, c0, *weights = tensors.values()
    with pytest.raises(ValueError, match=r"expected device .* as input, got"):
        functional.lstm(input, (h0, c0), weights)
    if name != "input":  # of a module, whose way is short, the kernel checks the rest
        with pytest.raises(RuntimeError, match=f"is on meta, the input on {device}"):
            internals.lstm_layer(input, h0, c0, weights, None, True, False)


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


def test_aot_function(layer, x):
    seen: list[str] = []
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def compiler(graph, _):
        seen.extend(
            n.target._opname for n in graph.graph.nodes if getattr(n.target, "namespace", "") == "lstm_ext"
        )
        return graph

    def function():  # a new one: it keeps to what it traced first
        return aot_function(lambda p, x: functional_call(layer, p, (x,))[0], compiler)

    torch.testing.assert_close(function()(parameters, x), layer(x)[0])
    assert seen == ["lstm_layer"]
    seen.clear()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(function()(parameters, x).sin().sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(layer(x)[0].sin().sum(), x)[0])
    assert seen == list(KERNELS)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are called; unlike `events`, something that compilers can look at."""
    calls: list[str] = []
    extension = loader.extension()

    class Recorder:
        def __getattr__(self, name):
            if name in ("lstm_module", "lstm_cell_module"):
                return module_call(getattr(extension, name), calls, name)
            calls.append(name)
            return getattr(extension, name)

    monkeypatch.setattr(loader, "extension", lambda: Recorder())
    return calls


def targets_of(graphs: list[torch.fx.GraphModule]) -> list[str]:
    calls = [n for g in graphs for n in g.graph.nodes if n.op == "call_function"]
    return [name for n in calls if "lstm_layer" in (name := getattr(n.target, "__name__", str(n.target)))]


def compiled(function: Callable[..., Any], graphs: list[torch.fx.GraphModule]) -> Callable[..., Any]:
    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


def test_compile(layer, x, kernel_calls):
    graphs: list[torch.fx.GraphModule] = []
    expected = lstm_ext.to_torch(layer)(x)[0]
    torch.testing.assert_close(compiled(layer, graphs)(x)[0], expected)
    assert [name.split(".")[0] for name in targets_of(graphs)] == ["lstm_layer"]
    # torch.compile takes a transform apart, and leaves what is in `transforms` to what comes after it.
    for transform in (vmap(lambda x: layer(x)[0]), grad(lambda xs: layer(xs[0])[0].sum())):
        graphs.clear()
        expected = transform(x[None])
        torch.testing.assert_close(compiled(transform, graphs)(x[None]), expected)
        assert len(graphs) == 1
        assert targets_of(graphs) == [transforms.flat_lstm_layer.__name__]
    assert not kernel_calls


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
    assert [name.split(".")[0] for name in targets_of(graphs)] == ["lstm_layer_backward"]


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
