"""The checks of python -m lstm_ext.selftest for CUDA, on the emulator: right kernels pass them, at every dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated_layer import emulated_device
from torch import Tensor

from lstm_ext import selftest

pytestmark = pytest.mark.tools

CASES = [case for case in selftest.CASES if case.name != "larger"]  # that takes the emulator a minute


class EmulatedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, device, has_bias, bidirectional, batch_sizes, input, h0, c0, *weights):
        layer = (input, h0, c0, weights, batch_sizes, has_bias, bidirectional, None)
        with emulated_device(**device) as module:
            *results, _, _, saved = module.lstm_layer_forward(*layer, True)
        ctx.layer, ctx.output, ctx.saved, ctx.device = layer, results[0], saved, device
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        needs_grad = [*ctx.needs_input_grad[4:], False, False]
        with emulated_device(**ctx.device) as module:
            computed = module.lstm_layer_backward(
                *ctx.layer, *grads, None, None, ctx.output, ctx.saved, needs_grad
            )
        return None, None, None, None, *computed[:-2]


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """The emulated device; selftest's operator is the layer there."""
    device = request.param

    def operator(
        input: Tensor, h0: Tensor, c0: Tensor, weights: list[Tensor], batch_sizes: Tensor, *flags: bool
    ) -> Any:
        if torch.is_grad_enabled():
            return EmulatedLayer.apply(device, *flags, batch_sizes, input, h0, c0, *weights)
        with emulated_device(**device) as module:
            return module.lstm_layer_forward(input, h0, c0, weights, batch_sizes, *flags, None, False)[:3]

    monkeypatch.setattr(selftest, "_operator", operator)
    return device


def checks() -> list[Any]:
    """Those that selftest.cuda_checks makes of each kernel."""
    found = []
    for kernel in ("stepwise", "step", "persistent"):
        for dtype in selftest.DTYPES:
            if kernel == "stepwise" or dtype in (torch.float16, torch.bfloat16):
                found.append(pytest.param(dtype, {"kernel": kernel}, id=f"{dtype}-{kernel}"))
        found.append(pytest.param(torch.float32, {"tf32": True, "kernel": kernel}, id=f"tf32-{kernel}"))
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("dtype", "device"), checks(), indirect=["device"])
def test_passes(device: dict[str, bool], dtype: torch.dtype, case: selftest.Case) -> None:
    if device["kernel"] != "stepwise" and case.proj_size:
        with pytest.raises(RuntimeError, match="there is none for projections"):
            selftest._plainly(selftest.Problem(case, dtype, torch.device("cpu")))
        return
    results = selftest._plainly(selftest.Problem(case, dtype, torch.device("cpu")))
    tf32 = device.get("tf32", False)
    verdict = selftest.judge(results, case, dtype, selftest.TF32_EPS if tf32 else None)
    assert verdict.passed, str(verdict)
    if tf32:  # and would not be passed without the allowance for it
        assert not selftest.judge(results, case, dtype).passed
