"""Options of one layer on every device: values and gradients against the equations in float64 on the CPU."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import CASES, OPTIONS, Case
from devices import moved
from judge import EPS
from torch import Tensor

import lstm_ext
from lstm_ext.layer import equations

pytestmark = pytest.mark.devices("cpu", "cuda")


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", EPS, ids=lambda d: str(d).removeprefix("torch."))
def test_values_and_gradients(name: str, dtype: torch.dtype, device: str) -> None:
    def ours(case: Case, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        results = cases.ours(case, dtype, seed, device)
        assert {t.device.type for t in results.values()} == {device}
        return {name: t.cpu() for name, t in results.items()}

    cases.check(CASES[name], dtype, 1 if device == "cpu" else 6, ours=ours)


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
