"""The stepwise CUDA layer, host code and kernels, on the emulator: values and gradients against float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from emulated_layer import stepwise_module
from torch import Tensor

from lstm_ext.layer import route
from lstm_ext.layer.options import OPERANDS, LayerExtras

sys.path.append(str(Path(__file__).resolve().parents[1]))

import layer_cases
from layer_cases import CASES, EPS, EXTRAS, LOW, Case, error, with_strides


class Layer(layer_cases.Layer):
    def emulated(self, case: Case, dtype: torch.dtype, tf32: bool = False) -> list[Tensor]:
        layer = stepwise_module()

        def stored(t: Tensor | None) -> Tensor | None:
            return t if t is None else with_strides(t, "dense").to(dtype)

        input = self.input.to(dtype)  # keeps the strides of dense tensors
        if case.strides != "dense":
            input = with_strides(input.contiguous(), case.strides)
        grads = [stored(g) for g in self.grads[:3]]
        if grads[0] is not None and case.strides != "dense":
            grads[0] = with_strides(grads[0].contiguous(), case.strides)
        h0, c0, weights = stored(self.h0), stored(self.c0), [w.to(dtype) for w in self.weights]
        flags = (case.bias, case.bidirectional)
        device = (tf32, case.chunk_bytes)
        learned = [stored(t) for t in self.learned()]
        if case.norm == "float32" and dtype != torch.float64:
            learned[2:] = [t.float() for t in self.norm]
        extras = self.extras(case, dtype, learned) or LayerExtras()
        extras = route._of_kernels(layer, extras.operands(), extras.recompute)
        *results, saved = layer.forward(
            input, h0, c0, weights, self.batch_sizes, *flags, True, *device, extras
        )
        *inferred, nothing = layer.forward(
            input, h0, c0, weights, self.batch_sizes, *flags, False, *device, extras
        )
        assert nothing == []
        for a, b in zip(results, inferred, strict=True):
            assert torch.equal(a, b), "inference and training differ"
        before = [t.clone() for t in saved]
        returned = {}
        if case.returned:
            # As autograd.py hands them out, and takes their gradients.
            assert saved[0].dtype == dtype
            cells = saved[0 if case.recompute else 1]
            results.append(cells.to(dtype))
            returned["grad_cells"] = self.grads[3].to(cells.dtype)
            if not case.recompute:
                results.append(route._with_gates_last(route._nonlinearities(saved[0])))
                returned["grad_gates"] = self.grads[4].to(dtype).transpose(-1, -2).flatten(-2)
        computed = layer.backward(
            *grads,
            input,
            h0,
            c0,
            weights,
            self.batch_sizes,
            results[0],
            saved,
            *flags,
            self.wanted,
            *device,
            extras,
            **returned,
        )
        assert all(torch.equal(a, b) for a, b in zip(saved, before, strict=True)), (
            "saved tensors were changed"
        )
        assert [g is not None for g in computed] == self.wanted
        assert {g.dtype for g in computed[: 3 + len(weights)] if g is not None} <= {dtype}
        for t, g in zip(learned[2:], computed[len(computed) - len(learned) + 2 :], strict=True):
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
    """The emulated layer with the functions of `_C`."""

    def __init__(self) -> None:
        self.layer = stepwise_module()
        self.Extras = self.layer.Extras
        self.backward_calls = 0

    def lstm_layer_forward(self, *arguments):
        *layer, save, extras = arguments
        output, h_n, c_n, saved = self.layer.forward(*layer, save, False, 1 << 25, extras)
        return output, h_n, c_n, saved

    def lstm_layer_backward(self, *arguments):
        *layer, extras, grad_gates, grad_cells = arguments
        self.backward_calls += 1
        return self.layer.backward(*layer, False, 1 << 25, extras, grad_gates, grad_cells)

    def operator_backward(self, *arguments):
        """The registered operator of the gradients, for CUDA tensors."""
        (input, h0, c0, weights, batch_sizes, bias, bidirectional), extras = arguments[:7], arguments[7:17]
        *grads, grad_cells, grad_gates = arguments[17:22]
        output, *saved = arguments[22:28]
        if grad_gates is not None:
            grad_gates = grad_gates.transpose(-1, -2).flatten(-2).to(saved[0].dtype)
        if grad_cells is not None:
            grad_cells = grad_cells.to(saved[1].dtype)
        return self.lstm_layer_backward(
            *grads,
            *(input, h0, c0, weights, batch_sizes, output, [t for t in saved if t.numel() > 0]),
            *(bias, bidirectional, arguments[28]),
            self.Extras(**dict(zip(OPERANDS, extras, strict=True)), recompute=False),
            grad_gates,
            grad_cells,
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("name", ["all", "recompute, all", "returned"])
def test_autograd_around_it(name, dtype, monkeypatch):
    """The way from a layer's extras to the kernels and back; with create_graph=True, that of the operators."""
    kernels, case = AsExtension(), CASES[name]
    monkeypatch.setattr(torch.ops.lstm_ext, "lstm_layer_with_extras_backward", kernels.operator_backward)
    monkeypatch.setattr(route.loader, "extension", lambda: kernels)
    monkeypatch.setattr(route, "_gate_values", route._nonlinearities)
    layer = Layer(case, dtype, 0)
    expected = layer.expected(case, torch.float64)

    def results() -> tuple[list[Tensor], list[Tensor]]:
        leaves = [
            t if t is None else t.detach().to(dtype).requires_grad_(w)
            for t, w in zip(layer.tensors(), layer.wanted, strict=True)
        ]
        end = 3 + len(layer.weights)
        extras = layer.extras(case, dtype, leaves[end:])
        if layer.lengths is not None:
            extras = layer.without_flags_past_the_end(extras)
        ys = route._fused_layer_with_extras(
            *leaves[:3], leaves[3:end], layer.batch_sizes, case.bias, case.bidirectional, extras
        )
        return [y for y in ys if y is not None], [t for t in leaves if t is not None and t.requires_grad]

    grads = [g.to(dtype) for g in layer.grads]
    for create_graph in (False, True):
        ys, leaves = results()
        computed = torch.autograd.grad(ys, leaves, grads, create_graph=create_graph)
        # With recompute and create_graph, the layer is computed again, by operators; here those of the CPU.
        assert kernels.backward_calls == (2 if create_graph and not case.recompute else 1)
        assert computed[0].requires_grad == create_graph
        for y, e in zip([*ys, *computed], expected, strict=True):
            assert y.dtype == dtype and y.shape == e.shape
            assert error(y, e) <= (1e-12 if dtype == torch.float64 else 16 * EPS[dtype])
    with torch.no_grad():
        assert [y.shape for y in results()[0]] == [y.shape for y in ys]
