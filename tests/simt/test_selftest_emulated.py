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


class StepwiseLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tf32, has_bias, bidirectional, batch_sizes, input, h0, c0, *weights):
        layer = (input, h0, c0, weights, batch_sizes, has_bias, bidirectional, None)
        with emulated_device(tf32) as module:
            *results, _, _, saved = module.lstm_layer_forward(*layer, True)
        ctx.layer, ctx.output, ctx.saved, ctx.tf32 = layer, results[0], saved, tf32
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        needs_grad = [*ctx.needs_input_grad[4:], False, False]
        with emulated_device(ctx.tf32) as module:
            computed = module.lstm_layer_backward(
                *ctx.layer, *grads, None, None, ctx.output, ctx.saved, needs_grad
            )
        return None, None, None, None, *computed[:-2]


@pytest.fixture
def tf32(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether products are rounded so; selftest's operator is the emulated layer."""
    tf32 = request.param

    def operator(
        input: Tensor, h0: Tensor, c0: Tensor, weights: list[Tensor], batch_sizes: Tensor, *flags: bool
    ) -> Any:
        if torch.is_grad_enabled():
            return StepwiseLayer.apply(tf32, *flags, batch_sizes, input, h0, c0, *weights)
        with emulated_device(tf32) as module:
            return module.lstm_layer_forward(input, h0, c0, weights, batch_sizes, *flags, None, False)[:3]

    monkeypatch.setattr(selftest, "_operator", operator)
    return tf32


def dtypes_and_tf32() -> list[Any]:
    plain = [pytest.param(dtype, False, id=str(dtype)) for dtype in selftest.DTYPES]
    return [*plain, pytest.param(torch.float32, True, id="tf32")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("dtype", "tf32"), dtypes_and_tf32(), indirect=["tf32"])
def test_stepwise_passes(tf32: bool, dtype: torch.dtype, case: selftest.Case) -> None:
    results = selftest._plainly(selftest.Problem(case, dtype, torch.device("cpu")))
    verdict = selftest.judge(results, case, dtype, selftest.TF32_EPS if tf32 else None)
    assert verdict.passed, verdict.text
    if tf32:  # and would not be passed without the allowance for it
        assert not selftest.judge(results, case, dtype).passed
