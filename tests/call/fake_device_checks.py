"""Checks on a device that torch knows and lstm_ext has no kernels for, as MPS, XPU and GPUs without our build.

test_torch_operator.py runs them in a process of their own: the device stays for the life of a process.
"""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_ext
from lstm_ext.layer import equations, route

pytestmark = [
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
]
T, B, I, H = 5, 3, 4, 6
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


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> str:
    from torch.utils import cpp_extension

    module = types.ModuleType("torch.fake")
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
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


def test_second_derivatives(device: str) -> None:
    module = lstm_ext.LSTM(I, H, 2, dtype=torch.float64)
    found = []
    for place in ("cpu", device):
        x = torch.linspace(-1, 1, T * B * I, dtype=torch.float64).view(T, B, I).to(place).requires_grad_()
        module.to(place)
        (first,) = torch.autograd.grad(module(x)[0].sin().sum(), x, create_graph=True)
        found.append([g.cpu() for g in torch.autograd.grad(first.square().sum(), [x, *module.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
