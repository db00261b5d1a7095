"""The checks of python -m lstm_ext.selftest for CUDA, on the emulator: right kernels pass them, at every dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated_layer import stepwise_module
from torch import Tensor

from lstm_ext import selftest

CHUNK_BYTES = 1 << 25
CASES = [case for case in selftest.CASES if case.name != "larger"]  # that takes the emulator a minute


class StepwiseLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tf32, has_bias, bidirectional, batch_sizes, input, h0, c0, *weights):
        flags = (has_bias, bidirectional)
        *results, saved = stepwise_module().forward(
            input, h0, c0, weights, batch_sizes, *flags, True, tf32, CHUNK_BYTES
        )
        ctx.arguments = (input, h0, c0, weights, batch_sizes, results[0], saved, *flags)
        ctx.tf32 = tf32
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        wanted = ctx.needs_input_grad[4:]
        computed = stepwise_module().backward(*grads, *ctx.arguments, wanted, ctx.tf32, CHUNK_BYTES)
        return None, None, None, None, *computed


@pytest.fixture
def tf32(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether products are rounded so; selftest's operator is the emulated layer."""
    tf32 = request.param

    def operator(
        input: Tensor, h0: Tensor, c0: Tensor, weights: list[Tensor], batch_sizes: Tensor, *flags: bool
    ) -> Any:
        if torch.is_grad_enabled():
            return StepwiseLayer.apply(tf32, *flags, batch_sizes, input, h0, c0, *weights)
        return stepwise_module().forward(
            input, h0, c0, weights, batch_sizes, *flags, False, tf32, CHUNK_BYTES
        )[:3]

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
