"""Checks on a device that torch knows and lstm_ext has no kernels for, as MPS, XPU and GPUs without our build.

test_torch_operator.py runs them in a process of their own: the device stays for the life of a process.
"""

from __future__ import annotations

import copy
import functools
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import lstm_ext
from lstm_ext.call import torch_operator
from lstm_ext.layer import equations, route

pytestmark = [
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
]
T, B, I, H = 5, 3, 4, 6
GRU = torch.gru  # which a test replaces
CONFIGS: list[dict[str, Any]] = [
    {},
    {"num_layers": 3, "bidirectional": True, "batch_first": True, "dropout": 0.4},
    {"proj_size": 2, "bidirectional": True},
]


def fused_cell(
    from_input: Tensor, from_h: Tensor, c: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten::_thnn_fused_lstm_cell``, which torch's layer calls on every device but the CPU."""
    gates = from_input + from_h
    for bias in (b_ih, b_hh):
        gates = gates if bias is None else gates + bias
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    return o * c.tanh(), c, torch.cat([i, f, g, o], 1)


def fused_cell_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    c_before: Tensor,
    c: Tensor,
    workspace: Tensor,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    i, f, g, o = workspace.chunk(4, 1)
    u = c.tanh()
    grad_c = torch.zeros_like(c) if grad_c is None else grad_c
    grad_h = torch.zeros_like(c) if grad_h is None else grad_h
    grad_c = grad_c + grad_h * o * (1 - u * u)
    of_i, of_f = grad_c * g * i * (1 - i), grad_c * c_before * f * (1 - f)
    of_g, of_o = grad_c * i * (1 - g * g), grad_h * u * o * (1 - o)
    grad_gates = torch.cat([of_i, of_f, of_g, of_o], 1)
    return grad_gates, grad_c * f, grad_gates.sum(0) if has_bias else grad_gates.new_empty(0)


def on_cpu(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().cpu() for t in tensors]


def by_cpu(
    leaves: Sequence[Tensor | None], batch_sizes: Sequence[int], settings: Sequence[Any]
) -> tuple[Tensor, ...]:
    """Of input, h0, c0 and weights, as cuDNN has them. A GRU has no c0."""
    x, h0, c0, *weights = leaves
    layers, _, dropout, train, both = settings
    operator, hx = (GRU, h0) if c0 is None else (torch.lstm, (h0, c0))
    options = (len(weights) // layers // (2 if both else 1) in (4, 5), layers, dropout, train, both)
    if batch_sizes:
        return operator(x, torch.tensor(batch_sizes), hx, weights, *options)
    return operator(x, hx, weights, *options, False)


def cudnn(x, weights, stride, buffer, h0, c0, mode, hidden, size, *settings_and_sizes):
    """``aten::_cudnn_rnn``; with the one below, which has no derivatives either, as for a CUDA tensor."""
    *settings, sizes, _ = settings_and_sizes
    results = [y.to(x.device) for y in by_cpu(on_cpu([x, h0, c0, *weights]), sizes, settings)]
    return (*results, *[x.new_empty(1) for _ in range(5 - len(results))])


def cudnn_backward(x, weights, stride, buffer, h0, c0, output, gy, gh, gc, mode, hidden, size, *rest):
    *settings, sizes, _, _, _ = rest
    if gy is gh is gc is None:
        zeros = torch.zeros_like
        return zeros(x), zeros(h0), x.new_empty(0) if c0 is None else zeros(c0), [zeros(w) for w in weights]
    with torch_operator._with_autograd(), torch.enable_grad():
        leaves = [t if t is None else t.requires_grad_() for t in on_cpu([x, h0, c0, *weights])]
        pairs = zip(by_cpu(leaves, sizes, settings), (gy, gh, gc), strict=False)
        results, grads = zip(*[(y, g.cpu()) for y, g in pairs if g is not None], strict=True)
        inputs = [t for t in leaves if t is not None]
        found = torch.autograd.grad(results, inputs, grads, materialize_grads=True)
    gx, gh0, *others = [g.to(x.device) for g in found]
    gc0 = x.new_empty(0) if c0 is None else others.pop(0)
    return gx, gh0, gc0, others


def by_cudnn(x, h0, c0, weights, batch_sizes, layers, dropout, train, both) -> tuple[Tensor, ...]:
    """What ``torch.lstm`` and ``torch.gru`` call for CUDA tensors."""
    hidden = weights[1].size(0) // (3 if c0 is None else 4)
    projected = h0.size(2) if h0.size(2) != hidden else 0
    n, sizes = len(weights) // layers // (2 if both else 1), batch_sizes
    sizes = [] if sizes is None else sizes.tolist()
    kind = 3 if c0 is None else 2
    settings = (kind, hidden, projected, layers, False, dropout, train, both, sizes, None)
    return torch.ops.aten._cudnn_rnn(x, weights, n, x.new_empty(0), h0, c0, *settings)[
        : 2 if c0 is None else 3
    ]


def lstm_of_cudnn(x, h0, c0, weights, batch_sizes, bias, *settings) -> tuple[Tensor, ...]:
    return by_cudnn(x, h0, c0, weights, batch_sizes, *settings)


def gru_of_cudnn(x, *arguments) -> tuple[Tensor, ...]:
    batch_sizes, (h0, weights, _, *settings) = None, arguments
    if isinstance(weights, Tensor):
        batch_sizes, h0, weights, _, *settings = arguments
    return by_cudnn(x, h0, None, weights, batch_sizes, *settings[:4])


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> str:
    from torch.utils import cpp_extension

    module = types.ModuleType("torch.fake")
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch.utils.rename_privateuse1_backend("fake")
    torch._register_device_module("fake", module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cpp_extension.load(
            "lstm_ext_fake_device",
            [str(Path(__file__).parent / "fake_device.cpp")],
            build_directory=str(tmp_path_factory.mktemp("fake_device")),
        )
    library = torch.library.Library("aten", "IMPL")
    library.impl("_thnn_fused_lstm_cell", fused_cell, "PrivateUse1")
    library.impl("_thnn_fused_lstm_cell_backward_impl", fused_cell_backward, "PrivateUse1")
    library.impl("_cudnn_rnn", cudnn, "PrivateUse1")
    library.impl("_cudnn_rnn_backward", cudnn_backward, "PrivateUse1")
    device._library = library  # or torch forgets them
    return "fake:0"


@pytest.fixture
def no_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equations, "_equations", lambda *_: pytest.fail("the equations ran"))


def results(module: nn.Module, *arguments: Any) -> list[Tensor]:
    torch.manual_seed(5)
    module.zero_grad()
    output, (h, c) = module(*arguments)
    output = output if isinstance(output, Tensor) else output.data
    (output.sin().sum() + h.sum() + c.sum()).backward()
    return [t.cpu() for t in (output, h, c, *[p.grad for p in module.parameters()])]


def assert_same_bits(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    assert all([torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.filterwarnings("error:lstm_ext")
@pytest.mark.usefixtures("no_equations")
def test_plain_calls(config: dict[str, Any], device: str) -> None:
    theirs = nn.LSTM(I, H, **config).to(device)
    ours = lstm_ext.convert(copy.deepcopy(theirs))
    x = torch.randn(T, B, I, device=device)
    for argument in (x, x[0], pack_padded_sequence(x, [2, 5, 3], enforce_sorted=False)):
        assert_same_bits(results(ours, argument), results(theirs, argument))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_same_bits(results(compiled, x), results(theirs, x))
    cell = nn.LSTMCell(I, H).to(device)
    assert_same_bits(
        [s.detach().cpu() for s in lstm_ext.convert(copy.copy(cell), as_subclass=False)(x[0])],
        [s.detach().cpu() for s in cell(x[0])],
    )


def test_options_warn_once_and_lengths_of_the_host_do_not(device: str) -> None:
    route._warn_about_slow_options.cache_clear()
    x = torch.randn(T, B, I)
    module = lstm_ext.LSTM(I, H, zoneout=0.1).eval()
    expected = module(x)[0]
    with pytest.warns(RuntimeWarning, match=r"zoneout on fake:0: .* slow") as caught:
        for _ in range(2):
            found = module.to(device)(x.to(device))[0]
    assert len([w for w in caught if "lstm_ext" in str(w.message)]) == 1
    torch.testing.assert_close(found.cpu(), expected)
    plain = lstm_ext.LSTM(I, H, 2)
    expected = plain(x, lengths=[2, 5, 0])[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = plain.to(device)(x.to(device), lengths=[2, 5, 0])[0]
    torch.testing.assert_close(found.cpu(), expected)


SECOND: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True, "bias": False},
    {"proj_size": 2},
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("kind", "config", "cudnn"),
    [
        *(("LSTM", config, cudnn) for config in SECOND for cudnn in (False, True)),
        *(("GRU", config, True) for config in SECOND[:2]),
    ],
    ids=str,
)
def test_second_derivatives(
    kind: str, config: dict[str, Any], cudnn: bool, packed: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of the node of cuDNN, whose own has none, and which keeps the wrapper out of a training step."""
    if cudnn:
        monkeypatch.setattr(torch_operator._TwiceDifferentiable, "apply", None)
    module = getattr(lstm_ext, kind)(I, H, dtype=torch.float64, **config)
    sets, found = module.num_layers * (1 + module.bidirectional), []
    generator = torch.Generator().manual_seed(3)
    draw = functools.partial(torch.randn, dtype=torch.float64, generator=generator)
    given = [draw(T, B, I), draw(sets, B, module.proj_size or H), draw(sets, B, H)]
    for place in ("cpu", device):
        x, *states = [t.detach().to(place).requires_grad_() for t in given[: 2 if kind == "GRU" else 3]]
        module.to(place)
        if cudnn and place == device:
            monkeypatch.setattr(route, "torch_lstm", lstm_of_cudnn)
            monkeypatch.setattr(torch, "gru", gru_of_cudnn)
        argument = pack_padded_sequence(x, [2, 5, 3], enforce_sorted=False) if packed else x
        y, last = module(argument, states[0] if kind == "GRU" else states)
        last = [last] if kind == "GRU" else last
        value = (y.data if packed else y).sin().sum() + last[0].square().sum() + (last[-1] * states[-1]).sum()
        leaves = [x, *states, *module.parameters()]
        plain = torch.autograd.grad(value, leaves, retain_graph=True)
        first = torch.autograd.grad(value, leaves, create_graph=True)
        second = torch.autograd.grad(sum([g.square().sum() for g in first]), leaves, retain_graph=True)
        some = torch.autograd.grad(value, x, create_graph=True)[0].square().sum()
        third = torch.autograd.grad(some, [states[-1], module.weight_hh_l0])
        found.append([g.cpu() for g in (*plain, *first, *second, *third)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_cudnn_with_a_graph_in_a_checkpoint(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint gives each saved tensor once, and the backward pass of cuDNN takes it."""
    module = lstm_ext.LSTM(I, H, dtype=torch.float64).to(device)
    monkeypatch.setattr(route, "torch_lstm", lstm_of_cudnn)
    x = torch.ones(T, B, I, dtype=torch.float64, device=device, requires_grad=True)
    found = []
    for call in (module, functools.partial(checkpoint, module, use_reentrant=False)):
        (first,) = torch.autograd.grad(call(x)[0].sin().sum(), x, create_graph=True)
        found.append(first.detach().cpu())  # the second derivatives need results of cuDNN that are undefined
    torch.testing.assert_close(*found)
