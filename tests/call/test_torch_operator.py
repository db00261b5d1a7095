"""Plain calls where there are no kernels of ours: torch's own operator, with the bits of torch's layer."""

from __future__ import annotations

import copy
import itertools
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import Graphs, operators
from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lstm_ext
from lstm_ext.layer import cuda_kernels, equations, route
from lstm_ext.native import loader

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

T, B, I, H = 5, 3, 4, 6
CONFIGS: list[dict[str, Any]] = [
    {},
    {"num_layers": 3, "bidirectional": True},
    {"proj_size": 2, "bidirectional": True},
    {"batch_first": True, "num_layers": 2, "dropout": 0.4},
    {"bias": False, "batch_first": True, "num_layers": 3, "dropout": 0.4, "bidirectional": True},
]


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(loader, "_result", loader._Result(None, loader.Status("torch", reason="a test")))
    monkeypatch.setattr(cuda_kernels, "_problems", {})  # what was found before
    route._warn_about_slow_options.cache_clear()
    yield
    torch._dynamo.reset()  # which remembers where it broke a graph, for tests with kernels too


@pytest.fixture
def no_equations(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(equations, "_equations", lambda *_: pytest.fail("the equations ran"))


def pair(dtype: torch.dtype = torch.float32, **config: Any) -> tuple[nn.LSTM, lstm_ext.LSTM]:
    theirs = nn.LSTM(I, H, **config, dtype=dtype)
    return theirs, lstm_ext.convert(copy.copy(theirs), as_subclass=False)


def arguments(module: nn.RNNBase, kind: str, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Any, Any]]:
    """Inputs of one kind, each without and with a state."""
    sets = module.num_layers * (2 if module.bidirectional else 1)
    x = torch.randn((T, I) if kind == "unbatched" else (T, B, I), dtype=dtype)
    batch = T if kind == "dense" and module.batch_first else B
    state = (
        torch.randn(sets, batch, module.proj_size or H, dtype=dtype),
        torch.randn(sets, batch, H, dtype=dtype),
    )
    if kind == "unbatched":
        state = state[0][:, 0], state[1][:, 0]
    if kind == "packed":
        x = pack_padded_sequence(x, [2, 5, 3], enforce_sorted=False)
    yield x, None
    yield x, state


def results(module: nn.Module, x: Any, hx: Any, grad: bool = True) -> list[Tensor]:
    """Output and states, and the gradients of the parameters; random numbers from the same seed."""
    torch.manual_seed(7)
    module.zero_grad()
    with torch.set_grad_enabled(grad):
        output, (h, c) = module(x, hx)
    tensors = [output.data if isinstance(output, PackedSequence) else output, h, c]
    if grad:
        sum([(t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in tensors]).backward()
        tensors += [p.grad for p in module.parameters()]
    return tensors


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.usefixtures("no_equations")
def test_the_bits_of_torchs_layer(config: dict[str, Any], dtype: torch.dtype) -> None:
    theirs, ours = pair(dtype, **config)
    for kind, training in itertools.product(("dense", "packed", "unbatched"), (True, False)):
        theirs.train(training), ours.train(training)
        for x, hx in arguments(theirs, kind, dtype):
            for grad in (True, False):
                expected, found = results(theirs, x, hx, grad), results(ours, x, hx, grad)
                assert_same_bits(found, expected)
                assert [t.stride() for t in found] == [t.stride() for t in expected]


@pytest.mark.usefixtures("no_equations")
def test_the_whole_stack_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    _, module = pair(num_layers=3, bidirectional=True)
    calls = []
    monkeypatch.setattr(torch, "lstm", lambda *a, of=torch.lstm: (calls.append(a), of(*a))[1])
    module(torch.randn(T, B, I))
    assert [len(weights) for _, _, weights, *_ in calls] == [24]


@pytest.mark.usefixtures("no_equations")
def test_other_calls() -> None:
    theirs, ours = pair(num_layers=2)
    x, lengths = torch.randn(T, B, I), [2, 5, 3]
    output, states = lstm_ext.functional.lstm(x, None, list(ours.parameters()), num_layers=2)
    assert_same_bits([output, *states], results(theirs, x, None)[:3])
    y, states = ours.step(x[0])
    expected, expected_states = theirs(x[:1])
    assert_same_bits([y, *states], [expected[0], *expected_states])
    # Lengths that the host knows are packed.
    output, states = ours(x, lengths=lengths)
    packed, expected_states = theirs(pack_padded_sequence(x, lengths, enforce_sorted=False))
    assert_same_bits([output, *states], [nn.utils.rnn.pad_packed_sequence(packed)[0], *expected_states])


@pytest.mark.usefixtures("no_equations")
def test_cells() -> None:
    for bias, shape in itertools.product((True, False), ((B, I), (I,))):
        theirs = nn.LSTMCell(I, H, bias)
        ours = lstm_ext.convert(copy.copy(theirs), as_subclass=False)
        x, hx = torch.randn(shape), (torch.randn(*shape[:-1], H), torch.randn(*shape[:-1], H))
        for state in (None, hx):
            found = []
            for cell in (theirs, ours):
                h, c = cell(x, state)
                found.append(
                    [h, c, *torch.autograd.grad(h.sin().sum() + c.sin().sum(), list(cell.parameters()))]
                )
            assert_same_bits(*found)


def test_the_output_may_be_changed_in_place() -> None:
    theirs, ours = pair()
    x = torch.randn(T, B, I)
    found = []
    for lstm in (theirs, ours):
        output, (h, _) = lstm(x)
        h += 1
        h.sum().backward()
        output, _ = lstm(x)
        output *= 2
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()  # oneDNN has saved it
        found.append(lstm.weight_hh_l0.grad)
    assert_same_bits(found[:1], found[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.usefixtures("no_equations")
def test_autocast(config: dict[str, Any], dtype: torch.dtype) -> None:
    theirs, ours = pair(**config)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for kind in ("dense", "packed"):
        torch._dynamo.reset()
        for x, hx in arguments(theirs, kind):
            grad = dtype == torch.bfloat16  # oneDNN has no gradients of float16
            with torch.autocast("cpu", dtype=dtype):
                try:
                    expected = results(theirs, x, hx, grad)
                except RuntimeError as error:  # oneDNN has no float16 on processors without such instructions
                    assert dtype == torch.float16
                    with pytest.raises(RuntimeError, match=re.escape(str(error)[:60])):
                        results(ours, x, hx, grad)
                    continue
                assert_same_bits(results(ours, x, hx, grad), expected)
                if dtype == torch.bfloat16:
                    assert_same_bits(results(compiled, x, hx, grad), expected)
    cell = nn.LSTMCell(I, H)
    with torch.autocast("cpu", dtype=dtype):
        assert_same_bits(
            list(lstm_ext.convert(copy.copy(cell), as_subclass=False)(x := torch.randn(B, I))), list(cell(x))
        )


# ---- derivatives that torch's operator does not have


def test_a_graph_is_differentiated_once_unless_it_is_kept() -> None:
    _, ours = pair()
    x = torch.randn(T, B, I, requires_grad=True)
    output, _ = ours(x)
    first, again = [torch.autograd.grad(output.sum(), x, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(first, again)
    output.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.sum().backward()


def test_transforms_and_forward_mode_take_the_equations() -> None:
    theirs, ours = pair()
    x = torch.randn(T, B, I)
    expected = theirs(x)[0]
    torch.testing.assert_close(torch.func.vmap(lambda x: ours(x)[0])(x[None])[0], expected)
    torch.testing.assert_close(torch.func.jvp(lambda x: ours(x)[0], (x,), (x,))[0], expected)
    hessian = torch.func.hessian(lambda x: ours(x)[0].sum())(x[:2, :1])
    assert hessian.shape == (2, 1, I, 2, 1, I)


# ---- one operator for compilers, exporters and dispatch modes


# Each kind with the last of the layers, which has most options, and each layer with dense inputs.
OF_ALL_KINDS = [
    pytest.param(backend, config, kind, marks=() if quick and backend == "aot_eager" else pytest.mark.tools)
    for config, kind in itertools.product(CONFIGS, ("dense", "packed", "unbatched"))
    for quick in (kind == "dense" or config is CONFIGS[-1],)
    for backend in ("aot_eager", "inductor")
]


@pytest.mark.parametrize(("backend", "config", "kind"), OF_ALL_KINDS, ids=str)
@pytest.mark.usefixtures("no_equations")
def test_a_compiler_sees_one_operator(backend: str, config: dict[str, Any], kind: str) -> None:
    theirs, ours = pair(**config)
    graphs = Graphs(backend)
    for x, hx in arguments(theirs, kind):
        torch._dynamo.reset()
        compiled = torch.compile(ours, backend=graphs, fullgraph=True)
        for grad in (True, False):
            assert_same_bits(results(compiled, x, hx, grad), results(theirs, x, hx, grad))
    assert len(graphs.all) == 4
    for graph in graphs.all:
        assert [name for name in operators(graph.graph) if "lstm" in name] == ["lstm_ext.torchs_lstm"]


def test_breaks_are_no_layers_of_a_patch() -> None:
    torch._dynamo.reset()
    handle = lstm_ext.patch().start()
    try:
        module = lstm_ext.LSTM(I, H)
        torch.compile(nn.Sequential(nn.Identity(), module), backend="eager")(torch.randn(T, B, I))
        assert handle.made == 0
    finally:
        handle.stop()


@pytest.mark.parametrize("fullgraph", [True, False])
def test_without_fullgraph_a_compiler_breaks_the_graph_as_at_torchs(fullgraph: bool) -> None:
    theirs, ours = pair()
    torch._dynamo.reset()
    compiled = torch.compile(lstm_ext.convert(ours, as_subclass=not fullgraph), backend=(graphs := Graphs()))
    x = torch.randn(T, B, I)
    assert_same_bits(results(compiled, x, None), results(theirs, x, None))
    assert graphs.all == []


def test_checkpoints_and_gradients_that_have_gradients() -> None:
    theirs, ours = pair()
    x = torch.randn(T, B, I, requires_grad=True)
    found = []
    for lstm in (theirs, ours):
        y = checkpoint(lambda x, lstm=lstm: lstm(x)[0], x, use_reentrant=False)
        found.append(torch.autograd.grad(y.sum(), x, create_graph=True)[0])
    assert_same_bits(found[:1], found[1:])


def test_a_compiled_layer_is_differentiated_twice() -> None:
    theirs, ours = pair()
    torch._dynamo.reset()
    x = torch.randn(T, B, I, requires_grad=True)
    output, _ = torch.compile(ours, backend="aot_eager", fullgraph=True)(x)
    gradients = [torch.autograd.grad(output.sum(), x, retain_graph=True)[0] for _ in range(2)]
    assert_same_bits(gradients, [torch.autograd.grad(theirs(x)[0].sum(), x)[0]] * 2)


def test_copies_of_what_a_compiled_layer_saves() -> None:
    """A hook on saved tensors may copy them: then the forward pass runs once more, or an error says why it cannot."""
    torch._dynamo.reset()
    theirs, ours = pair(num_layers=2)
    x = torch.randn(T, B, I)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        assert_same_bits(results(compiled, x, None), results(theirs, x, None))
        ours.dropout = 0.5
        with pytest.raises(RuntimeError, match="with dropout, do not use save_on_cpu"):
            results(torch.compile(ours, backend="aot_eager", fullgraph=True), x, None)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.usefixtures("no_equations")
def test_export_with_a_dynamic_time(strict: bool) -> None:
    theirs, ours = pair(num_layers=2, bidirectional=True)
    theirs.eval(), ours.eval()
    shapes = ({0: torch.export.Dim("time"), 1: torch.export.Dim("batch")},)
    program = torch.export.export(ours, (torch.randn(T, B, I),), dynamic_shapes=shapes, strict=strict)
    assert [n for n in operators(program.graph) if "lstm" in n] == ["lstm_ext.torchs_lstm"]
    x = torch.randn(9, 2, I)
    assert torch.equal(program.module()(x)[0], theirs(x)[0])
    with torch.inference_mode():  # the program was made with gradients
        assert torch.equal(program.module()(x.clone())[0], theirs(x)[0])
        inference = x.clone()
    with torch.no_grad():
        assert torch.equal(program.module()(inference)[0], theirs(x)[0])


@pytest.mark.usefixtures("no_equations")
def test_dispatch_modes_see_the_operator() -> None:
    theirs, ours = pair(num_layers=2)
    x = torch.randn(T, B, I)
    with FlopCounterMode(display=False) as counter:
        found = results(ours, x, None)
    assert_same_bits(found, results(theirs, x, None))
    products = 2 * T * B * 4 * H * (I + H + H + H)
    assert counter.get_total_flops() == 3 * products


def test_the_operators_pass_torchs_checks() -> None:
    _, ours = pair(num_layers=2)
    for grad in (True, False):
        x = torch.randn(T, B, I, requires_grad=grad)
        state = torch.randn(2, B, H), torch.randn(2, B, H)
        weights = [p.detach().requires_grad_(grad) for p in ours.parameters()]
        call = (x, *state, weights, None, True, 2, 0.0, True, False, None, grad)
        torch.library.opcheck(torch.ops.lstm_ext.torchs_lstm.default, call)


# ---- options, and what is said


def test_options_take_the_equations_and_one_warning_names_them() -> None:
    module = lstm_ext.LSTM(I, H, 2, zoneout=0.1, layer_norm=True)
    x = torch.randn(T, B, I)
    with pytest.warns(RuntimeWarning, match=r"layer_norm.* on cpu.*a test") as caught:
        module(x)
        module(x)
    assert len(caught) == 1
    assert "zoneout" in str(caught[0].message)
    assert caught[0].filename == __file__  # the line that called the layer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lstm_ext.LSTM(I, H)(x)


@pytest.mark.usefixtures("no_equations")
def test_options_of_training_alone_take_torchs_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """recompute has no meaning without a backward pass; in one, and with dropped weights, the layers are plain ones."""
    theirs, x = nn.LSTM(I, H, 2, bidirectional=True), torch.randn(T, B, I)
    ours = lstm_ext.LSTM(I, H, 2, bidirectional=True, recompute=True)
    ours.load_state_dict(theirs.state_dict())
    for grad in (True, False):
        assert_same_bits(results(ours, x, None, grad), results(theirs, x, None, grad))
    calls = []
    monkeypatch.setattr(torch, "lstm", lambda *a, of=torch.lstm: (calls.append(a), of(*a))[1])
    with torch.no_grad():
        ours(x)
    assert [len(weights) for _, _, weights, *_ in calls] == [16]  # one call for the stack
    with pytest.raises(TypeError, match="recompute should be a bool, got 1"):
        ours.recompute = 1

    dropped = lstm_ext.LSTM(I, H, weight_dropout=0.5)
    torch.manual_seed(7)
    output, _ = dropped(x)
    torch.manual_seed(7)
    mask = nn.functional.dropout(torch.ones(4 * H, H), 0.5)
    plain = lstm_ext.revert(lstm_ext.LSTM(I, H))
    plain.load_state_dict(dropped.state_dict())
    with torch.no_grad():
        plain.weight_hh_l0 *= mask
    torch.testing.assert_close(output, plain(x)[0])


@pytest.mark.filterwarnings("ignore:.*zoneout on cpu")
def test_a_compiler_leaves_a_layer_with_options_out() -> None:
    """Its equations would be unrolled. Also after a reset, by which dynamo forgets which functions it passes over."""
    module, x = lstm_ext.LSTM(I, H, zoneout=0.1).eval(), torch.randn(T, B, I)
    for _ in range(2):
        compiled = torch.compile(nn.Sequential(module), backend=(graphs := Graphs()))
        torch.testing.assert_close(compiled(x)[0], module(x)[0])
        assert graphs.all == []
        torch._dynamo.reset()
        for function in (equations.lstm_layer, equations._equations):
            eval_frame.reset_code(function.__code__)


def test_the_equations_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_result", loader._Result(None, loader.Status("reference")))
    monkeypatch.setattr(torch, "lstm", lambda *_: pytest.fail("torch's operator ran"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lstm_ext.LSTM(I, H, zoneout=0.1)(torch.randn(T, B, I))


def test_a_weight_that_is_none() -> None:
    _, module = pair()
    module.bias_hh_l0 = None
    with pytest.raises(TypeError, match="one of the weights is None"):
        module(torch.randn(T, B, I))


class OnAGPU:
    """A weight as `LSTM.flatten_parameters` sees it."""

    is_cuda = True
    device = torch.device("cuda", 0)


def test_weights_are_flattened_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's operator may compute the layer there, with kernels or without."""
    _, module = pair()
    calls = []
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda self: calls.append(self))
    module.flatten_parameters()
    assert calls == []
    module._parameters = {"weight_ih_l0": OnAGPU()}
    module.flatten_parameters()
    assert calls == [module]


# ---- whole processes

PROGRAM = """
import copy
import warnings
import torch
from torch import nn
import lstm_ext
from lstm_ext.native import loader
theirs = nn.LSTM(4, 6, 2, dropout=0.3)
ours = lstm_ext.convert(copy.copy(theirs), as_subclass=False)
x = torch.randn(5, 3, 4)
found = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for lstm in (theirs, ours):
        torch.manual_seed(0)
        lstm.zero_grad()
        output, _ = lstm(x)
        output.sin().sum().backward()
        found.append([output, *[p.grad.clone() for p in lstm.parameters()]])
assert all(torch.equal(a, b) for a, b in zip(*found))
print(loader.status().backend, len(caught), *[w.message for w in caught])
"""


@pytest.mark.slow
def test_importing_the_package_anew() -> None:
    program = """
import sys, torch, lstm_ext
for name in [n for n in sys.modules if n.startswith("lstm_ext")]:
    del sys.modules[name]
import lstm_ext
layer, x = lstm_ext.LSTM(3, 4), torch.randn(2, 1, 3)
assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x)[0], layer(x)[0])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_environment_variable() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=os.environ | {"LSTM_EXT_BACKEND": "torch"},
    )
    assert (run.returncode, run.stdout) == (0, "torch 0\n"), run.stderr


def test_explain_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "extension", lambda: None)
    for layer in (nn.LSTM(3, 4), lstm_ext.LSTM(3, 4), lstm_ext.LSTM(3, 4, forget_bias=1.0)):
        assert "torch's own operator, one call for all layers" in lstm_ext.explain(layer, (5, 2, 3))
    said = lstm_ext.explain(lstm_ext.LSTM(3, 4, forget_bias=1.0, zoneout=0.1), (5, 2, 3))
    assert "the equations in plain PyTorch" in said
    assert "torch's operator has no zoneout\n" in said + "\n"


@pytest.mark.tools
def test_another_device() -> None:
    """The device compiles for half a minute."""
    checks = Path(__file__).parent / "fake_device_checks.py"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(checks)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout
