"""The CUDA layer, host code and kernels, on the emulator: values and gradients against float64."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_layer import (
    BIG,
    CASES_OF,
    CHUNK_BYTES,
    LARGE_CASES,
    NAN,
    call_of,
    device_of,
    emulated,
    emulated_device,
    stepwise_module,
)
from torch import Tensor

from lstm_ext.layer import transforms
from lstm_ext.native import loader

sys.path.append(str(Path(__file__).resolve().parents[1]))

import cases
import internals
from cases import CASES, LOW, OPTIONS, Case, Layer, check
from judge import EPS, relative_error

pytestmark = pytest.mark.tools


def wide(name: str) -> Case:
    return dataclasses.replace(CASES[name], wide_weights=True)


def drawn(case: Case, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    return emulated(cases.layer(case, dtype, seed), dtype)


def fused(
    case: Case, dtype: torch.dtype, seed: int, kernel: str = "step", **device: Any
) -> dict[str, Tensor]:
    """Each step, or all of them, in one kernel."""
    return emulated(
        cases.layer(case, dtype, seed), dtype, tf32=dtype == torch.float32, kernel=kernel, **device
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", EPS, ids=lambda d: str(d).removeprefix("torch."))
def test_values_and_gradients(name, dtype):
    # Few layers say little where chance decides how exact the other side is: in 16 bits, and with layer normalisation,
    # whose draws may be badly conditioned. The options in other dtypes have many in the long tier.
    if name in OPTIONS:
        draws = 20 if dtype == torch.float32 else 6
    else:
        draws = 20 if dtype in LOW else 3
    check(wide(name), dtype, draws, ours=drawn, equations=True)


@pytest.mark.full
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    "dtype", [d for d in EPS if d != torch.float32], ids=lambda d: str(d).removeprefix("torch.")
)
def test_values_and_gradients_of_many_layers(name, dtype):
    check(wide(name), dtype, 20, ours=drawn, equations=True)


# Enough steps for one product of both directions: its operands lie elsewhere.
ONE_PRODUCT = {
    "mask, zoneout, resets": Case(
        steps=9, bidirectional=True, mask=True, zoneout="flags", resets="to a state"
    ),
    "norm, in chunks": Case(steps=9, bidirectional=True, norm="own", hidden_size=16, chunk_bytes=2000),
    "lengths, recompute": Case(steps=8, bidirectional=True, lengths=(8, 1, 5), recompute=True),
}


@pytest.mark.parametrize("name", ONE_PRODUCT)
@pytest.mark.parametrize("dtype", EPS, ids=lambda d: str(d).removeprefix("torch."))
def test_one_product_of_both_directions(name, dtype):
    case = dataclasses.replace(ONE_PRODUCT[name], wide_weights=True)
    check(case, dtype, 20 if dtype in LOW else 6, ours=drawn, equations=True)


AT_ONCE = [
    (kernel, name) for kernel in ("step", "persistent", "turns") for name in CASES_OF[kernel] if name != NAN
]


def at_once(*dtypes: torch.dtype) -> list[Any]:
    return [
        pytest.param(kernel, name, dtype, id=f"{str(dtype).removeprefix('torch.')}-{kernel}-{name}")
        for dtype in dtypes
        for kernel, name in AT_ONCE
    ]


@pytest.mark.parametrize(("kernel", "name", "dtype"), at_once(*LOW))
def test_steps_at_once(kernel, name, dtype):
    case = dataclasses.replace(CASES_OF[kernel][name], wide_weights=True)
    draws = 1 if name in BIG else 3 if kernel != "step" else 6 if name in OPTIONS else 20
    check(case, dtype, draws, ours=functools.partial(fused, **device_of(kernel, name)), equations=True)


@pytest.mark.parametrize(("kernel", "name", "dtype"), at_once(torch.float32))
def test_steps_at_once_in_tf32(kernel, name, dtype):
    """As exact as single products of operands so rounded are."""
    case = dataclasses.replace(CASES_OF[kernel][name], wide_weights=True)
    expected, ours = cases.expected(case, dtype, 0), fused(case, dtype, 0, **device_of(kernel, name))
    stepwise = emulated(cases.layer(case, dtype, 0), dtype, tf32=True)
    for result, e in expected.items():
        bound = max(2 * relative_error(stepwise[result], e), 4 * EPS[dtype])
        assert relative_error(ours[result], e) <= bound, result


@pytest.mark.full
def test_weights_that_have_no_room_in_registers():
    (case,) = LARGE_CASES.values()
    ours = functools.partial(fused, kernel="persistent")
    check(dataclasses.replace(case, wide_weights=True), torch.bfloat16, 1, ours=ours, equations=True)


def test_launches_of_a_step():
    """One forward, one backward, but for those around the loop; a sequence of one step is one launch; a persistent
    kernel does all steps of both directions."""

    def launches(
        steps: int,
        kernel: str,
        backward: bool,
        both: bool = False,
        resets: str = "",
        chunk: int = CHUNK_BYTES,
    ) -> tuple[int, int]:
        case = Case(steps=steps, hidden_size=16, bidirectional=both, resets=resets)
        layer = cases.layer(case, torch.bfloat16, 0)
        call = call_of(layer, torch.bfloat16)
        with emulated_device(chunk_bytes=chunk, kernel=kernel) as module:
            module.launches()
            *results, saved = module.lstm_layer_forward(*call, True)
            forward = module.launches()
            grads = [torch.ones_like(results[0]), None, None, None, None]
            needs_grad = [True] * (3 + len(layer.weights)) + [False] * 2
            module.lstm_layer_backward(*call, *grads, results[0], saved, needs_grad)
            return module.launches() if backward else forward

    for backward in (False, True):
        ten, eleven = (launches(steps, "step", backward) for steps in (10, 11))
        assert (eleven[0] - ten[0], eleven[1] - ten[1]) == (1, 0)
        # Both directions have a launch together, and a product.
        for both in (False, True):
            ten, eleven = (launches(steps, "stepwise", backward, both) for steps in (10, 11))
            assert (eleven[0] - ten[0], eleven[1] - ten[1]) == (1, 1)
            ten, eleven = (launches(steps, "step", backward, both) for steps in (10, 11))
            assert (eleven[0] - ten[0], eleven[1] - ten[1]) == (1, 0)
            ten, eleven = (launches(steps, "persistent", backward, both) for steps in (10, 11))
            assert ten == eleven and ten[0] == 1 + (4 if both else 2) * backward
    for both in (False, True):
        for resets in ("", "to zeros", "to a state"):
            assert launches(1, "step", False, both, resets) == (1, 0)
    # A chunk of a persistent kernel has 256 steps, or what has room in four times its bytes: a row has 16 H of them.
    row = 16 * 16 * Case().batch
    for chunk, steps in ((64 * row, 256), (10 * row, 40)):
        counts = [launches(n, "persistent", False, chunk=chunk)[0] for n in (steps, steps + 1)]
        assert counts == [1, 2]


@pytest.mark.parametrize("kernel", ["step", "persistent"])
def test_a_backward_pass_goes_on_where_the_kernel_cannot(kernel):
    """What the forward pass has saved is the same for all of them."""
    call = call_of(cases.layer(Case(), torch.float64, 0), torch.float64)
    gradients = []
    with emulated_device() as module:
        *results, saved = module.lstm_layer_forward(*call, True)
    grads = [torch.ones_like(results[0]), None, None, None, None]
    for name in ("stepwise", kernel):
        with emulated_device(kernel=name) as module:
            gradients.append(
                module.lstm_layer_backward(*call, *grads, results[0], saved, [True] * 7 + [False] * 2)
            )
    for expected, found in zip(*gradients, strict=True):
        assert (expected is None and found is None) or torch.equal(expected, found)


def test_a_refused_launch_is_replaced():
    """Other programs may have multiprocessors that the plan counts on."""
    case, module = Case(steps=9, hidden_size=40, bidirectional=True), stepwise_module()
    expected = fused(case, torch.bfloat16, 0, "step")
    module.set_cooperative_blocks(5)
    try:
        # Warned of once a process, which perhaps has been done.
        module.launches()
        module.refused()
        found = fused(case, torch.bfloat16, 0, "persistent")
        assert module.launches()[0] > 3 * case.steps and module.refused() > 0
        # Later calls know.
        again = fused(case, torch.bfloat16, 0, "persistent")
        assert module.refused() == 0
        assert all(torch.equal(again[name], expected[name]) for name in expected)
    finally:
        module.set_cooperative_blocks(0)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_has_no_step_at_once():
    for case, dtype, said in (
        (Case(), torch.float64, "there is none for float64"),
        (Case(), torch.float32, "products of float32 may not be rounded to TF32 here"),
        (Case(proj_size=3), torch.bfloat16, "there is none for projections"),
        (Case(norm="own"), torch.bfloat16, "there is none for layer normalisation"),
        (
            Case(coupled_gates=True),
            torch.bfloat16,
            "there is none for another cell than the plain one",
        ),
    ):
        for kernel in ("step", "persistent"):
            with pytest.raises(RuntimeError, match=f"LSTM_EXT_CUDA_KERNEL={kernel} asks .* but {said}"):
                emulated(cases.layer(case, dtype, 0), dtype, kernel=kernel)


def test_tf32_rounds_operands_and_no_more():
    case = CASES["dense"]
    expected, exact = cases.expected(case, torch.float32, 0), drawn(case, torch.float32, 0)
    rounded = emulated(cases.layer(case, torch.float32, 0), torch.float32, tf32=True)
    for name, e in expected.items():
        assert relative_error(exact[name], e) < 1e-6 < relative_error(rounded[name], e) < 4 * 2**-10


def test_the_same_bits_twice():
    case = CASES["packed, both directions, projection, in chunks"]
    first, second = drawn(case, torch.float32, 0), drawn(case, torch.float32, 0)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", LOW, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("bias", "slope"), [(2.0**-13, 1), (0.0, 0), (-(2.0**-13), 0)])
def test_a_preactivation_that_is_rounded_to_an_edge_keeps_its_slope(bias, slope, dtype):
    options = stepwise_module().LayerOptions(activations="sigmoid thresholded_relu(0.5) affine(1,0)")
    weights = [torch.full((4, *n), v, dtype=dtype) for n, v in (((1,), 1), ((1,), 0), ((), bias), ((), 0))]
    call = (torch.full((1, 1, 1), 0.5, dtype=dtype), None, None, weights, None, True, False, options)
    with emulated_device() as module:
        output, *_, saved = module.lstm_layer_forward(*call, True)
        needs_grad = [n == 5 for n in range(9)]  # b_ih
        gradients = module.lstm_layer_backward(
            *call, torch.ones_like(output), None, None, None, None, output, saved, needs_grad
        )
    assert bool(gradients[5][2] != 0) == slope == bool(output.any())


def test_gate_gradients_below_float16_survive():
    """A gradient that has come many steps back is below float16's smallest number until it is summed up."""
    layer = Layer(Case(steps=12, incoming=(False, True, False)), torch.float16, 0)
    layer.grads = [g if g is None else (g * 2**-12).half().double() for g in layer.grads]
    expected = layer.results(cases.torch_layer, torch.float64)
    ours, judged = emulated(layer, torch.float16), 0
    for name, e in expected.items():
        if e.abs().max() > 2**-14:  # float16's normal numbers
            assert relative_error(ours[name], e) < 2e-2, name
            judged += name.startswith("grad")
    assert judged


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


RESULTS = ("output", "h_n", "c_n", "cell_states", "gate_values")
SAVED = ("gates", "cells", "hidden", "norm_products", "norm_factors")


class Step(torch.autograd.Function):
    """As the extension's own step of autograd, over emulated kernels."""

    @staticmethod
    def forward(ctx, kernels, call, *_):
        *results, saved = kernels.lstm_layer_forward(*call, True)
        ctx.kernels, ctx.call, ctx.saved = kernels, call, (results[0], saved)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        kernels, (*layer, options), (output, saved) = ctx.kernels, ctx.call, ctx.saved
        needs_grad = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            keywords = kernels.keywords
            gradients = transforms.differentiable_backward(*layer, keywords, grads, output, saved, needs_grad)
        else:
            gradients = kernels.lstm_layer_backward(*layer, options, *grads, output, saved, needs_grad)
        return None, None, *gradients


class AsExtension:
    """The emulated layer in place of `_C`."""

    def __init__(self) -> None:
        self.module = stepwise_module()
        self.lstm_layer_forward = self.module.lstm_layer_forward
        self.backward_calls = 0

    def LayerOptions(self, **keywords):
        self.keywords = keywords
        return self.module.LayerOptions(**keywords)

    def lstm_layer(self, input, h0, c0, weights, *others):
        keywords = self.keywords
        learned = [keywords.get("reset_h"), keywords.get("reset_c")]
        learned += [*keywords.get("norm", ()), *keywords.get("peephole", ())]
        call = (input, h0, c0, weights, *others)
        if not torch.is_grad_enabled():
            return self.lstm_layer_forward(*call, False)[:5]
        return Step.apply(self, call, input, h0, c0, *weights, *learned)

    def lstm_layer_backward(self, *arguments):
        self.backward_calls += 1
        return self.module.lstm_layer_backward(*arguments)

    def operator_backward(self, *layer, needs_grad, **options):
        """The registered operator of the gradients, for CUDA tensors."""
        grads = [options.pop(f"grad_{name}") for name in RESULTS]
        output, *saved = (options.pop(name) for name in ("output", *SAVED))
        saved = [t if t is not None and t.numel() > 0 else None for t in saved]
        return self.lstm_layer_backward(
            *layer, self.LayerOptions(**options), *grads, output, saved, needs_grad
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("name", ["all", "recompute, all", "returned"])
def test_autograd_around_it(name, dtype, monkeypatch):
    """The way from a layer's options to the kernels and back; with create_graph=True, that of the operators."""
    kernels, case = AsExtension(), CASES[name]
    loader.extension()  # registers the operators
    monkeypatch.setattr(torch.ops.lstm_ext, "lstm_layer_backward", kernels.operator_backward)
    monkeypatch.setattr(loader, "extension", lambda: kernels)
    layer = cases.layer(case, dtype, 0)
    expected = cases.expected(case, dtype, 0)

    def results() -> tuple[list[Tensor], list[Tensor]]:
        leaves, call = layer.arguments(dtype)
        values = [y for y in internals.lstm_layer(*call) if y is not None]
        return values, [t for t in leaves if t is not None and t.requires_grad]

    grads = [g.to(dtype) for g in layer.grads]
    for create_graph in (False, True):
        ys, leaves = results()
        computed = torch.autograd.grad(ys, leaves, grads, create_graph=create_graph)
        # With recompute and create_graph, equations compute the layer again.
        assert kernels.backward_calls == (2 if create_graph and not case.recompute else 1)
        assert computed[0].requires_grad == create_graph
        for y, e in zip([*ys, *computed], expected.values(), strict=True):
            assert y.dtype == dtype
            assert relative_error(y, e) <= (1e-12 if dtype == torch.float64 else 16 * EPS[dtype])
    with torch.no_grad():
        assert [y.shape for y in results()[0]] == [y.shape for y in ys]
