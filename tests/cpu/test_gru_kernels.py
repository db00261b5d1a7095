"""The kernels of a GRU, below the module: sizes at the edges of registers, infinities, frozen weights, refusals."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from judge import Worst, relative_error
from torch import Tensor, nn

from lstm_ext.layer import equations
from lstm_ext.layer.layer_call import PLAIN, LayerCall, LayerOptions
from lstm_ext.native import loader

_C: Any = loader.extension()
# T, B, I, H
SHAPES = [(1, 1, 3, 1), (1, 1, 16, 64), (3, 2, 7, 20), (6, 8, 33, 72), (4, 40, 16, 16), (3, 130, 8, 100)]


def layer(tensors: list[Tensor], bidirectional: bool = False, **options: Any) -> tuple[Any, ...]:
    input, h0, *weights = tensors
    chosen = _C.LayerOptions(gru=True, **options)
    return _C.lstm_layer(input, h0, None, weights, None, True, bidirectional, chosen)


def results_of(compute: Any, tensors: list[Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
    """Output, h_n and the gradients of all tensors, by number."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    results = compute(leaves)[:2]
    grads = [g.to(r.dtype) for g, r in zip(grads, results, strict=True)]
    found = [*[r.detach() for r in results], *torch.autograd.grad(results, leaves, grads)]
    return {str(n): t for n, t in enumerate(found)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_are_exact(capability: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The worst error of the draws is at most twice that of torch's layer."""
    steps, batch, features, hidden = shape
    worst = Worst()
    for seed in range(20 if hidden < 50 else 4):
        torch.manual_seed(seed)
        module = nn.GRU(features, hidden, bidirectional=True).to(dtype)
        tensors = [torch.randn(steps, batch, features), torch.randn(2, batch, hidden)]
        tensors = [t.to(dtype) for t in tensors] + [p.detach() for p in module.parameters()]
        grads = [torch.randn(steps, batch, 2 * hidden), torch.randn(2, batch, hidden)]

        def by_torch(leaves: list[Tensor]) -> Any:
            return torch.gru(leaves[0], leaves[1], leaves[2:], True, 1, 0.0, False, True, False)

        ours = results_of(lambda leaves: layer(leaves, True), tensors, grads)
        worst.add(
            ours,
            results_of(by_torch, tensors, grads),
            results_of(by_torch, [t.double() for t in tensors], grads),
        )
        with torch.no_grad():
            assert relative_error(layer(tensors, True)[0], ours["0"]) <= 4 * torch.finfo(dtype).eps
    assert not worst.problems(), "\n".join(worst.problems())


@pytest.mark.parametrize("hidden", [1, 3, 4, 8, 12, 20, 24, 40, 72])
@pytest.mark.parametrize("batch", [1, 2, 9, 40])
def test_infinite_numbers_spread_no_further_than_in_torch(capability: str, batch: int, hidden: int) -> None:
    """0 times infinity is NaN: no gate may see the zeros that stand for the rows that a weight does not have."""
    torch.manual_seed(hidden)
    module = nn.GRU(5, hidden)
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0"):  # so that no sum has infinities of both signs
            getattr(module, name).abs_()
        for place in range(2):
            x, h = torch.randn(4, batch, 5), torch.randn(1, batch, hidden)
            (x[0, -1, :1] if place == 0 else h[0, -1, :1]).fill_(math.inf)
            expected = module(x, h)[0]
            found = layer([x, h, *module.parameters()])[0]
            assert torch.equal(found.isnan(), expected.isnan())
            torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["own", "bfloat16", "int8"])
@pytest.mark.parametrize("hidden", [20, 72, 130])
def test_frozen_weights(capability: str, hidden: int, kind: str) -> None:
    """The same as the layer with weights that are rounded alike."""
    torch.manual_seed(0)
    module, x = nn.GRU(40, hidden), torch.randn(3, 5, 40)
    h0 = torch.randn(1, 5, hidden)
    weights = [p.detach() for p in module.parameters()]
    rounded = list(weights)
    for i in range(2):
        if kind == "bfloat16":
            rounded[i] = weights[i].bfloat16().float()
        elif kind == "int8":
            factors = weights[i].abs().amax(1, keepdim=True) / 127
            rounded[i] = (weights[i] / factors).round() * factors
    frozen = _C.freeze_weights(weights, True, False, kind, True)
    with torch.no_grad():
        found = layer([x, h0, *weights], frozen=frozen)[0]
        expected = layer([t.double() for t in (x, h0, *rounded)])[0]
        assert relative_error(found, expected) < (4e-3 if kind == "int8" else 4e-6)
        x[0, 0, 0] = math.inf  # no infinity times the zeros of the gate that a weight does not have
        found = layer([x, h0, *weights], frozen=frozen)[0]
        expected = layer([t.double() for t in (x, h0, *rounded)])[0]
        first = 1 if kind == "int8" else 0  # whose rows of the input may be rounded by their largest number
        assert torch.equal(found[:, first:].isnan(), expected[:, first:].isnan())
    with pytest.raises(RuntimeError, match="not what freeze_weights gives for a GRU"):
        layer(
            [x, h0, *weights],
            frozen=_C.freeze_weights([torch.cat([w, w[:hidden]]) for w in weights], True, False, kind),
        )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"cell_clip": 1.0},
            "gru goes with resets, reset_h, lengths, recurrent_mask, frozen and recompute only",
        ),
        ({"coupled_gates": True}, "gru goes with"),
        ({"zoneout_h": 0.5}, "gru goes with"),
        ({"activations": "relu tanh tanh"}, "gru goes with"),
        ({"return_gates": True}, "gru goes with"),
        ({"c0": torch.zeros(1, 2, 4)}, "gru: got c0, and h is the only state of a GRU"),
        ({"rows": 4}, "weight_ih has shape [16, 3], expected (3 * hidden_size, input_size)"),
    ],
)
def test_refusals(change: dict[str, Any], text: str) -> None:
    rows = change.pop("rows", 3)
    c0 = change.pop("c0", None)
    weights = [torch.zeros(rows * 4, 3), torch.zeros(rows * 4, 4)]
    with pytest.raises(RuntimeError, match=re.escape(text)):
        _C.lstm_layer(
            torch.zeros(1, 2, 3), None, c0, weights, None, False, False, _C.LayerOptions(gru=True, **change)
        )


def test_the_equations_refuse_what_a_gru_does_not_have() -> None:
    weights = [torch.zeros(12, 3), torch.zeros(12, 4)]
    call = LayerCall(
        torch.zeros(1, 2, 3), None, None, weights, None, False, False, LayerOptions(gru=True, cell_clip=1.0)
    )
    with pytest.raises(RuntimeError, match="gru: got cell_clip, which a GRU does not have"):
        equations.lstm_layer(call)
    call.options = PLAIN
    with pytest.raises(RuntimeError, match="weight_hh has shape"):
        equations.lstm_layer(call)
