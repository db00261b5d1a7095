"""The stepwise CUDA layer, host code and kernels, on the emulator: values and gradients against float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from emulated_layer import emulated_device, stepwise_module
from torch import Tensor

from lstm_ext.native import loader

sys.path.append(str(Path(__file__).resolve().parents[1]))

import internals
import layer_cases
from layer_cases import CASES, EPS, EXTRAS, LOW, Case, error, with_strides


class Layer(layer_cases.Layer):
    def emulated(self, case: Case, dtype: torch.dtype, tf32: bool = False) -> list[Tensor]:
        def stored(t: Tensor | None) -> Tensor | None:
            return t if t is None else with_strides(t, "dense").to(dtype)

        input = self.input.to(dtype)  # keeps the strides of dense tensors
        if case.strides != "dense":
            input = with_strides(input.contiguous(), case.strides)
        grads = [stored(g) for g in self.grads] + [None] * (5 - len(self.grads))
        if grads[0] is not None and case.strides != "dense":
            grads[0] = with_strides(grads[0].contiguous(), case.strides)
        learned = [stored(t) for t in self.learned()]
        if case.norm == "float32" and dtype != torch.float64:
            learned[2:] = [t.float() for t in self.norm]
        weights = [w.to(dtype) for w in self.weights]
        options = self.extras(case, dtype, learned)
        if options is not None:
            options = stepwise_module().LayerOptions(**options.as_keywords())
        layer = (input, stored(self.h0), stored(self.c0), weights, self.batch_sizes)
        layer = (*layer, case.bias, case.bidirectional, options)
        needs_grad = self.wanted + [False] * (0 if learned else 2)
        with emulated_device(tf32, case.chunk_bytes) as module:
            *results, saved = module.lstm_layer_forward(*layer, True)
            *inferred, nothing = module.lstm_layer_forward(*layer, False)
            assert nothing is None
            results, inferred = ([t for t in ts if t is not None] for ts in (results, inferred))
            for a, b in zip(results, inferred, strict=True):
                assert torch.equal(a, b), "inference and training differ"
            assert case.recompute or saved[0].dtype == dtype
            before = [t if t is None else t.clone() for t in saved]
            computed = module.lstm_layer_backward(*layer, *grads, results[0], saved, needs_grad)
        assert all(t is None or torch.equal(t, b) for t, b in zip(saved, before, strict=True)), (
            "saved tensors were changed"
        )
        assert [g is not None for g in computed] == needs_grad
        assert {g.dtype for g in computed[: 3 + len(weights)] if g is not None} <= {dtype}
        for t, g in zip(learned[2:], computed[5 + len(weights) :], strict=True):
            assert g is None or g.dtype == t.dtype
        return [*results, *[g.to(dtype) for g in computed if g is not None]]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", EPS, ids=lambda d: str(d).removeprefix("torch."))
def test_values_and_gradients(name, dtype):
    # Few layers say little where chance decides how exact the other side is: in 16 bits, and with layer normalisation,
    # whose draws may be badly conditioned. The extras in other dtypes have many in the long tier.
    if name in EXTRAS:
        seeds = 20 if dtype == torch.float32 else 6
    else:
        seeds = 20 if dtype in LOW else 3
    check_values_and_gradients(name, dtype, seeds)


@pytest.mark.full
@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.parametrize(
    "dtype", [d for d in EPS if d != torch.float32], ids=lambda d: str(d).removeprefix("torch.")
)
def test_values_and_gradients_of_many_layers(name, dtype):
    check_values_and_gradients(name, dtype, 20)


def check_values_and_gradients(name: str, dtype: torch.dtype, seeds: int) -> None:
    case = CASES[name]
    worst: dict[int, tuple[float, float]] = {}
    for seed in range(seeds):
        layer = Layer(case, dtype, seed)
        expected = layer.expected(case, torch.float64)
        plain = layer.expected(case, dtype)
        for n, (y, z, e) in enumerate(zip(layer.emulated(case, dtype), plain, expected, strict=True)):
            assert y.dtype == dtype and y.shape == e.shape
            ours, theirs = worst.get(n, (0.0, 0.0))
            worst[n] = (max(ours, error(y, e)), max(theirs, error(z, e)))
    for n, (ours, theirs) in worst.items():
        limit = 64 * EPS[dtype] if dtype == torch.float64 else 2 * theirs + 4 * EPS[dtype]
        assert ours <= limit, (n, ours, theirs)


def test_tf32_rounds_operands_and_no_more():
    case = CASES["dense"]
    layer = Layer(case, torch.float32, 0)
    expected = layer.expected(case, torch.float64)
    exact = layer.emulated(case, torch.float32)
    rounded = layer.emulated(case, torch.float32, tf32=True)
    for y, z, e in zip(rounded, exact, expected, strict=True):
        assert error(z, e) < 1e-6 < error(y, e) < 4 * 2**-10


def test_the_same_bits_twice():
    case = CASES["packed, both directions, projection, in pieces"]
    layer = Layer(case, torch.float32, 0)
    for a, b in zip(layer.emulated(case, torch.float32), layer.emulated(case, torch.float32), strict=True):
        assert torch.equal(a, b)


def test_gate_gradients_below_float16_survive():
    """A gradient that has come many steps back is below float16's smallest number until it is summed up."""
    case = Case(steps=12, given=(False, True, False), hx=True)
    layer = Layer(case, torch.float16, 0)
    layer.grads = [g if g is None else (g * 2**-12).half().double() for g in layer.grads]
    expected = layer.expected(case, torch.float64)
    for n, (y, e) in enumerate(zip(layer.emulated(case, torch.float16), expected, strict=True)):
        if e.abs().max() > 2**-14:  # float16's normal numbers
            assert error(y, e) < 2e-2, n


@pytest.mark.parametrize("dtype", EPS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("layout_a", ["rows", "columns", "apart", "one"])
@pytest.mark.parametrize("layout_b", ["rows", "columns", "apart", "one"])
def test_products_are_described_as_blas_wants_them(dtype, layout_a, layout_b):
    m, n, k = 3, 5, 1 if "one" in (layout_a, layout_b) else 4

    def matrix(rows: int, columns: int, layout: str) -> Tensor:
        if layout == "columns":
            return torch.randn(columns, rows).to(dtype).t()
        if layout == "apart":
            return torch.randn(rows, columns + 3).to(dtype)[:, 1 : columns + 1]
        return torch.randn(rows, columns).to(dtype)

    a, b = matrix(m, k, layout_a), matrix(k, n, layout_b)
    start = torch.randn(m, n + 2).to(dtype)
    for accumulate in (False, True):
        c = start.clone()[:, :n]
        stepwise_module().gemm(c, a, b, accumulate, False)
        expected = a.double() @ b.double() + (start[:, :n].double() if accumulate else 0)
        torch.testing.assert_close(
            c.double(), expected.to(dtype).double(), rtol=4 * EPS[dtype], atol=4 * EPS[dtype]
        )


class AsExtension:
    """The emulated layer in place of `_C`."""

    def __init__(self) -> None:
        self.module = stepwise_module()
        self.LayerOptions = self.module.LayerOptions
        self.lstm_layer_forward = self.module.lstm_layer_forward
        self.backward_calls = 0

    def lstm_layer_backward(self, *arguments):
        self.backward_calls += 1
        return self.module.lstm_layer_backward(*arguments)

    def operator_backward(self, *arguments, **options):
        """The registered operator of the gradients, for CUDA tensors."""
        layer, grads, (output, *saved), needs_grad = (
            arguments[:7],
            arguments[7:12],
            arguments[12:18],
            arguments[18],
        )
        saved = [t if t.numel() > 0 else None for t in saved]
        return self.lstm_layer_backward(
            *layer, self.LayerOptions(**options), *grads, output, saved, needs_grad
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("name", ["all", "recompute, all", "returned"])
def test_autograd_around_it(name, dtype, monkeypatch):
    """The way from a layer's options to the kernels and back; with create_graph=True, that of the operators."""
    kernels, case = AsExtension(), CASES[name]
    monkeypatch.setattr(torch.ops.lstm_ext, "lstm_layer_backward", kernels.operator_backward)
    monkeypatch.setattr(loader, "extension", lambda: kernels)
    layer = Layer(case, dtype, 0)
    expected = layer.expected(case, torch.float64)

    def results() -> tuple[list[Tensor], list[Tensor]]:
        leaves = [
            t if t is None else t.detach().to(dtype).requires_grad_(w)
            for t, w in zip(layer.tensors(), layer.wanted, strict=True)
        ]
        end = 3 + len(layer.weights)
        options = layer.extras(case, dtype, leaves[end:])
        if layer.lengths is not None:
            options = layer.without_flags_past_the_end(options)
        ys = internals.lstm_layer(
            *leaves[:3], leaves[3:end], layer.batch_sizes, case.bias, case.bidirectional, options
        )
        return [y for y in ys if y is not None], [t for t in leaves if t is not None and t.requires_grad]

    grads = [g.to(dtype) for g in layer.grads]
    for create_graph in (False, True):
        ys, leaves = results()
        computed = torch.autograd.grad(ys, leaves, grads, create_graph=create_graph)
        # With recompute and create_graph, equations compute the layer again.
        assert kernels.backward_calls == (2 if create_graph and not case.recompute else 1)
        assert computed[0].requires_grad == create_graph
        for y, e in zip([*ys, *computed], expected, strict=True):
            assert y.dtype == dtype and y.shape == e.shape
            assert error(y, e) <= (1e-12 if dtype == torch.float64 else 16 * EPS[dtype])
    with torch.no_grad():
        assert [y.shape for y in results()[0]] == [y.shape for y in ys]
