"""Extras of one layer on every device: values and gradients against the equations in float64 on the CPU."""

from __future__ import annotations

import internals
import pytest
import torch
from devices import moved
from layer_cases import CASES, EPS, EXTRAS, Case, Layer, error
from torch import Tensor

import lstm_ext
from lstm_ext.layer import equations, route

pytestmark = pytest.mark.devices("cpu", "cuda")


def computed(layer: Layer, case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Results and wanted gradients of the layer that users call."""

    def leaf(t: Tensor | None, wanted: bool) -> Tensor | None:
        return t if t is None else t.detach().to(device, dtype).requires_grad_(wanted)

    leaves = [leaf(t, w) for t, w in zip(layer.tensors(), layer.wanted, strict=True)]
    end = 3 + len(layer.weights)
    extras = layer.extras(case, dtype, leaves[end:])
    if layer.lengths is not None and layer.resets is not None:
        extras = layer.without_flags_past_the_end(extras)
    arguments = *leaves[:3], leaves[3:end], layer.batch_sizes, case.bias, case.bidirectional, extras
    results = route.lstm_layer(internals.layer_call(*arguments).map(lambda t: t.to(device)))
    results = [y for y in results if y is not None]
    grads = [g.to(device, dtype) for g in layer.grads]
    inputs = [t for t, w in zip(leaves, layer.wanted, strict=True) if w]
    return [*results, *torch.autograd.grad(results, inputs, grads, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.parametrize("dtype", EPS, ids=lambda d: str(d).removeprefix("torch."))
def test_values_and_gradients(name: str, dtype: torch.dtype, device: str) -> None:
    case = CASES[name]
    worst: dict[int, tuple[float, float]] = {}
    for seed in range(1 if device == "cpu" else 6):
        with torch.device("cpu"):
            layer = Layer(case, dtype, seed)
            expected, plain = layer.expected(case, torch.float64), layer.expected(case, dtype)
        for n, (y, z, e) in enumerate(
            zip(computed(layer, case, dtype, device), plain, expected, strict=True)
        ):
            assert y.device.type == device and y.dtype == dtype
            ours, theirs = worst.get(n, (0.0, 0.0))
            worst[n] = (max(ours, error(y.cpu(), e)), max(theirs, error(z, e)))
    for n, (ours, theirs) in worst.items():
        limit = 64 * EPS[dtype] if dtype == torch.float64 else 2 * theirs + 4 * EPS[dtype]
        assert ours <= limit, (n, ours, theirs)


@pytest.mark.devices("cuda")
@pytest.mark.parametrize("dtype", EPS, ids=lambda d: str(d).removeprefix("torch."))
def test_the_kernels_are_what_runs(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equations, "lstm_layer", lambda *_: pytest.fail("the equations ran"))
    module = lstm_ext.LSTM(
        3,
        8,
        2,
        bidirectional=True,
        proj_size=5,
        recurrent_dropout=0.3,
        zoneout=0.2,
        layer_norm=True,
        dtype=dtype,
    )
    x = torch.randn(6, 4, 3, dtype=dtype)
    lengths, resets = moved(torch.tensor([6, 2, 0, 5], device="cpu"), device), torch.rand(6, 4) < 0.3
    output, _, extras = module(x, lengths=lengths, resets=resets, return_cell_states=True, return_gates=True)
    (output.sum() + extras.cell_states.sum() + extras.gates.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    with torch.no_grad():
        module.eval()(x, lengths=lengths, return_gates=True)
