"""bfloat16 and float16: arguments and results in the dtype, everything between them in float32."""

from __future__ import annotations

import pytest
import torch
from cases import tensors
from devices import pack_sequence
from judge import relative_error, torch_dtypes
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import lstm_ext
from lstm_ext import reference
from lstm_ext.layer import route
from lstm_ext.native import loader

pytestmark = pytest.mark.devices("cpu", "cuda")

_C = loader.extension()
DTYPES = [torch.bfloat16, torch.float16]

CONFIGS = [
    {},
    {"bias": False, "bidirectional": True},
    {"proj_size": 9},
    {"proj_size": 9, "bidirectional": True, "num_layers": 2, "batch_first": True},
]


def layers(config: dict, dtype: torch.dtype, hidden_size: int = 40) -> tuple[lstm_ext.LSTM, lstm_ext.LSTM]:
    """A layer, and one in float32 with the same weights."""
    module = lstm_ext.LSTM(10, hidden_size, **config, dtype=dtype)
    same = lstm_ext.LSTM(10, hidden_size, **config)
    same.load_state_dict(module.state_dict())
    return module, same


def states(module: lstm_ext.LSTM, batch: int) -> tuple[Tensor, Tensor]:
    sets = module.num_layers * (2 if module.bidirectional else 1)
    dtype = module.weight_ih_l0.dtype
    return (
        torch.randn(sets, batch, module.proj_size or module.hidden_size).to(dtype),
        torch.randn(sets, batch, module.hidden_size).to(dtype),
    )


@pytest.mark.devices("cpu")  # on CUDA, h of each step is rounded
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 30])
def test_is_the_float32_layer_rounded_once(capability, dtype, steps):
    """To the bit, so that neither the sums nor the states between the steps are of lower precision.

    With too few units for the tile engine, whose operands are rounded to bfloat16.
    """
    for config in CONFIGS[:3]:
        module, same = layers(config, dtype, hidden_size=15)
        x, hx = torch.randn(steps, 4, 10).to(dtype), states(module, 4)
        packed = pack_sequence([torch.randn(n, 10).to(dtype) for n in (steps, 1, 1)])
        packed32 = PackedSequence(packed.data.float(), packed.batch_sizes)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                for ours, expected in (
                    (module(x, hx), same(x.float(), (hx[0].float(), hx[1].float()))),
                    (module(packed), same(packed32)),
                ):
                    for a, b in zip(tensors(ours), tensors(expected), strict=True):
                        assert a.dtype == dtype
                        assert torch.equal(a, b.to(dtype))


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 5, 40])
def test_gradients_of_one_step_are_those_of_float32_rounded_once(capability, dtype, batch):
    """To the bit, from 16-bit weights and to 16-bit gradients: too small for a normal number, and too large for any."""
    for config in ({}, {"proj_size": 9, "bidirectional": True}):
        module, same = layers(config, dtype, hidden_size=15)
        x, hx = torch.randn(1, batch, 10).to(dtype), states(module, batch)
        for scale in (1.0, 3e-5, torch.finfo(dtype).smallest_normal / 2, 0.9 * torch.finfo(dtype).max):
            grads = []
            for layer, as_type in ((module, lambda t: t), (same, torch.Tensor.float)):
                layer.zero_grad()
                output, _ = layer(as_type(x), tuple(as_type(t) for t in hx))
                output.backward(torch.full(output.shape, scale, dtype=dtype).to(output.dtype))
                grads.append({name: p.grad for name, p in layer.named_parameters()})
            for name, grad in grads[0].items():
                assert grad.dtype == dtype
                torch.testing.assert_close(grad, grads[1][name].to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [3, 20])
def test_all_numbers_of_16_bits_are_read(capability, dtype, batch):
    """As weights, a few at a time: the smallest, infinities and NaN too."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    chosen = torch.cat([numbers[::97], numbers[:40], numbers[-40:], torch.tensor([0.0, -0.0]).to(dtype)])
    module, same = layers({"bias": False}, dtype, hidden_size=15)
    x = torch.zeros(1, batch, 10, dtype=dtype)
    x[0, :, 0] = 1
    with torch.no_grad():
        for first in range(0, len(chosen) - 60, 60):
            module.weight_ih_l0[:, 0] = chosen[first : first + 60]
            same.load_state_dict(module.state_dict())
            for a, b in zip(tensors(module(x)), tensors(same(x.float())), strict=True):
                torch.testing.assert_close(a, b.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [lstm_ext.LSTM, reference.lstm], ids=["kernels", "reference"])
def test_the_cell_state_is_not_rounded_at_each_step(dtype, layer):
    """A sum of many small numbers, which would stand still once they are below half a rounding step of it."""
    module = lstm_ext.LSTM(1, 1, dtype=dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        # i and f are 1 (sigmoid(30)), g is tanh(0.004), so c grows by 0.004 a step.
        module.bias_ih_l0.copy_(torch.tensor([30.0, 30.0, 0.004, 0.0]))
        x = torch.zeros(2000, 1, 1, dtype=dtype)
        if layer is reference.lstm:
            _, (_, c) = reference.lstm(x, None, list(module.parameters()))
        else:
            _, (_, c) = module(x)
        step = torch.tanh(module.bias_ih_l0[2].double()).item()
    assert c.dtype == dtype
    assert abs(c.item() / (2000 * step) - 1) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_are_called_and_save_float32(monkeypatch, dtype, device):
    calls = []

    class Recorder:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(_C, name)

    monkeypatch.setattr(route.loader, "extension", lambda: Recorder())
    module = lstm_ext.LSTM(3, 5, dtype=dtype)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output, _ = module(torch.randn(7, 2, 3).to(dtype))
    in_float32 = sorted(t.shape[-1] for t in saved if t.dtype == torch.float32)
    assert in_float32 == ([5, 20] if device == "cpu" else [5])  # cells, gates
    output.sum().backward()
    # The first declines what is not on the CPU.
    assert calls == (["lstm_module"] if device == "cpu" else ["lstm_module", "lstm_layer"])
    assert module.weight_hh_l0.grad.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_autocast(dtype, config, device):
    """The values of the layer in autocast's dtype, in torch's dtypes: dense, packed, projected, whatever comes in."""
    module = lstm_ext.LSTM(10, 40, **config)
    rounded = lstm_ext.LSTM(10, 40, **config, dtype=dtype)
    rounded.load_state_dict(module.state_dict())
    dense = torch.randn(4, 4, 10)
    packed = pack_sequence([torch.randn(n, 10) for n in (2, 9, 4, 1)], enforce_sorted=False)
    for x in (dense, packed):
        for hx in (None, states(module, 4)):
            expected = tensors(
                rounded(x.to(dtype), None if hx is None else (hx[0].to(dtype), hx[1].to(dtype)))
            )
            for argument in (x, x.to(dtype)):
                with torch.autocast(device, dtype=dtype):
                    result = tensors(module(argument, hx))
                assert [t.dtype for t in result] == torch_dtypes(module, dtype, argument, hx)
                for a, b in zip(result, expected, strict=True):
                    assert torch.equal(a, b.to(a.dtype))
            with torch.autocast(device, dtype=dtype, enabled=False):
                assert {t.dtype for t in tensors(module(x, hx))} == {torch.float32}
        with torch.autocast(device, dtype=dtype):
            double = lstm_ext.LSTM(10, 40, **config, dtype=torch.float64)
            assert {t.dtype for t in tensors(double(x.to(torch.float64)))} == {torch.float64}
    with torch.autocast(device, dtype=dtype):
        output, _ = module(dense)
    output.float().sum().backward()
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_an_empty_batch_under_autocast(dtype, device):
    module, x = lstm_ext.LSTM(10, 40), torch.randn(4, 0, 10)
    expected = torch_dtypes(module, dtype, x)
    for lstm in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        with torch.autocast(device, dtype=dtype):
            assert [t.dtype for t in tensors(lstm(x))] == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_double_backward_and_reference_agree_with_float32(dtype):
    module, same = layers({"bidirectional": True}, dtype)
    x = torch.randn(6, 2, 10).to(dtype)
    results = []
    for lstm, argument in ((module, x), (same, x.float())):
        argument = argument.clone().requires_grad_()
        (grad,) = torch.autograd.grad(lstm(argument)[0].square().sum(), argument, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), [argument, *lstm.parameters()]))
    for a, b in zip(*results, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) < 4 * torch.finfo(dtype).eps
