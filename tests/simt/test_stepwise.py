"""The stepwise CUDA layer, host code and kernels, on the emulator: values and gradients against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from emulated_layer import stepwise_module
from torch import Tensor

from lstm_ext import reference
from lstm_ext._extras import LayerExtras

EPS = {torch.float64: 2**-52, torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@dataclasses.dataclass(frozen=True)
class Case:
    steps: int = 5
    batch: int = 3
    input_size: int = 4
    hidden_size: int = 6
    proj_size: int = 0
    bias: bool = True
    bidirectional: bool = False
    hx: bool = True
    batch_first: bool = False
    lengths: tuple[int, ...] = ()  # packed, if there are any
    chunk_bytes: int = 1 << 25
    strides: str = "dense"  # of the input and of the gradient of the output
    unwanted: tuple[int, ...] = ()  # places among input, h0, c0, weights
    given: tuple[bool, bool, bool] = (True, True, True)  # gradients of output, h_n, c_n
    resets: str = ""  # "to zeros" or "to a state"


CASES = {
    "dense": Case(),
    "one step": Case(steps=1),
    "one row": Case(batch=1),
    "no features": Case(input_size=0, bidirectional=True),
    "one of everything": Case(steps=1, batch=1, input_size=1, hidden_size=1),
    "no bias, no hx": Case(bias=False, hx=False),
    "more units than a block": Case(steps=2, hidden_size=150),
    "more rows than a block": Case(steps=2, batch=20, hidden_size=33),
    "batch first": Case(batch_first=True),
    "batch first, in pieces": Case(batch_first=True, chunk_bytes=600),
    "in pieces": Case(steps=9, chunk_bytes=700),
    "in pieces, both directions": Case(steps=9, chunk_bytes=700, bidirectional=True),
    "both directions": Case(bidirectional=True),
    "projection": Case(proj_size=2),
    "projection, both directions, no hx": Case(proj_size=3, bidirectional=True, hx=False, bias=False),
    "packed": Case(lengths=(5, 5, 3, 1)),
    "packed, no hx": Case(lengths=(4, 2, 1), hx=False),
    "packed, both directions": Case(lengths=(6, 4, 4, 2), bidirectional=True),
    "packed, both directions, projection, in pieces": Case(
        lengths=(6, 4, 4, 2), bidirectional=True, proj_size=2, chunk_bytes=400
    ),
    "packed, more steps than a launch": Case(lengths=(70, 66, 1), hidden_size=2, input_size=1),
    "expanded": Case(strides="expanded"),
    "columns apart": Case(strides="columns apart"),
    "frozen input and weights": Case(unwanted=(0, 3, 6), bidirectional=True),
    "frozen biases and states": Case(unwanted=(1, 2, 5), proj_size=2),
    "gradient of output only": Case(given=(True, False, False), bidirectional=True),
    "gradient of h_n only": Case(given=(False, True, False), lengths=(4, 3, 1)),
    "gradient of c_n only": Case(given=(False, False, True), lengths=(4, 3, 1), bidirectional=True),
    "resets": Case(resets="to a state"),
    "resets, no hx": Case(resets="to zeros", hx=False, bias=False),
    "resets, both directions, in pieces": Case(
        steps=9, chunk_bytes=700, bidirectional=True, resets="to a state"
    ),
    "resets, projection": Case(resets="to a state", proj_size=2, bidirectional=True),
    "resets, packed": Case(resets="to a state", lengths=(6, 4, 4, 2), bidirectional=True),
    "resets, packed, projection": Case(resets="to zeros", lengths=(5, 3, 1), proj_size=2),
    "gradient of h_n only, projection": Case(given=(False, True, False), proj_size=2, lengths=(3, 1)),
}


def with_strides(x: Tensor, strides: str) -> Tensor:
    if strides == "expanded":  # all rows of a step are one in memory
        return x[:, :1].expand(x.shape)
    if strides == "columns apart":
        return torch.stack([x, x], dim=-1)[..., 0]
    return x


class Layer:
    """The arguments of a layer and the gradients of its results, in float64, with values that `dtype` holds."""

    def __init__(self, case: Case, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            x = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
            return x.to(dtype).double()

        D = 2 if case.bidirectional else 1
        H, P = case.hidden_size, case.proj_size or case.hidden_size
        B = len(case.lengths) or case.batch
        scale = H**-0.5
        self.batch_sizes = None
        if case.lengths:
            steps = range(max(case.lengths))
            self.batch_sizes = torch.tensor([sum(n > t for n in case.lengths) for t in steps])
            self.input = draw(sum(case.lengths), case.input_size)
            grad_output = draw(sum(case.lengths), D * P)
        else:
            first, second = (B, case.steps) if case.batch_first else (case.steps, B)
            self.input = draw(first, second, case.input_size)
            grad_output = draw(first, second, D * P)
            if case.batch_first:
                self.input, grad_output = self.input.transpose(0, 1), grad_output.transpose(0, 1)
            self.input = with_strides(self.input, case.strides)
            grad_output = with_strides(grad_output, case.strides)
        self.h0 = draw(D, B, P) if case.hx else None
        self.c0 = draw(D, B, H) if case.hx else None
        self.weights = []
        for _ in range(D):
            self.weights += [draw(4 * H, case.input_size, scale=scale), draw(4 * H, P, scale=scale)]
            if case.bias:
                self.weights += [draw(4 * H, scale=scale), draw(4 * H, scale=scale)]
            if case.proj_size:
                self.weights.append(draw(P, H, scale=scale))
        self.resets = None
        self.reset_h, self.reset_c = (
            (draw(D, B, P), draw(D, B, H)) if case.resets == "to a state" else (None, None)
        )
        if case.resets:
            self.resets = torch.rand(self.input.shape[:-1], generator=generator) < 0.4
        grads = (grad_output, draw(D, B, P), draw(D, B, H))
        self.grads = [g if given else None for g, given in zip(grads, case.given, strict=True)]
        self.wanted = [
            t is not None and n not in case.unwanted
            for n, t in enumerate([self.input, self.h0, self.c0, *self.weights])
        ]
        if case.resets:
            self.wanted += [self.reset_h is not None, self.reset_c is not None]

    def tensors(self) -> list[Tensor | None]:
        reset = [] if self.resets is None else [self.reset_h, self.reset_c]
        return [self.input, self.h0, self.c0, *self.weights, *reset]

    def expected(self, case: Case, dtype: torch.dtype) -> list[Tensor]:
        """Results and wanted gradients of the equations, computed in ``dtype``."""
        leaves = [
            t if t is None else t.detach().to(dtype).requires_grad_(w)
            for t, w in zip(self.tensors(), self.wanted, strict=True)
        ]
        end = 3 + len(self.weights)
        extras = LayerExtras(self.resets, *leaves[end:]) if case.resets else None
        results = reference.lstm_layer(
            *leaves[:3], leaves[3:end], self.batch_sizes, case.bias, case.bidirectional, extras
        )[:3]
        outputs = [y for y, g in zip(results, self.grads, strict=True) if g is not None]
        grads = [g.to(dtype) for g in self.grads if g is not None]
        inputs = [t for t, w in zip(leaves, self.wanted, strict=True) if w]
        return [
            *results,
            *torch.autograd.grad(outputs, inputs, grads, allow_unused=True, materialize_grads=True),
        ]

    def emulated(self, case: Case, dtype: torch.dtype, tf32: bool = False) -> list[Tensor]:
        layer = stepwise_module()

        def stored(t: Tensor | None) -> Tensor | None:
            return t if t is None else with_strides(t, "dense").to(dtype)

        input = self.input.to(dtype)  # keeps the strides of dense tensors
        if case.strides != "dense":
            input = with_strides(input.contiguous(), case.strides)
        grads = [stored(g) for g in self.grads]
        if grads[0] is not None and case.strides != "dense":
            grads[0] = with_strides(grads[0].contiguous(), case.strides)
        h0, c0, weights = stored(self.h0), stored(self.c0), [w.to(dtype) for w in self.weights]
        flags = (case.bias, case.bidirectional)
        device = (tf32, case.chunk_bytes, self.resets, stored(self.reset_h), stored(self.reset_c))
        *results, saved = layer.forward(input, h0, c0, weights, self.batch_sizes, *flags, True, *device)
        *inferred, nothing = layer.forward(input, h0, c0, weights, self.batch_sizes, *flags, False, *device)
        assert nothing == []
        for a, b in zip(results, inferred, strict=True):
            assert torch.equal(a, b), "inference and training differ"
        computed = layer.backward(
            *grads, input, h0, c0, weights, self.batch_sizes, results[0], saved, *flags, self.wanted, *device
        )
        assert [g is not None for g in computed] == self.wanted
        return [*results, *[g for g in computed if g is not None]]


def error(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", EPS, ids=lambda d: str(d).removeprefix("torch."))
def test_values_and_gradients(name, dtype):
    case = CASES[name]
    seeds = range(20) if dtype in (torch.float16, torch.bfloat16) else range(3)
    worst: dict[int, tuple[float, float]] = {}
    for seed in seeds:
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
