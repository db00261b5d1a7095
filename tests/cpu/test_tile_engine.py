"""Products on a tile engine: on AMX where the processor has it, and everywhere on an engine in plain C++."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import LOW, Case, check, expected, ours
from judge import relative_error
from test_options_kernels import KINDS
from tile_engine import build
from torch import Tensor

import lstm_ext
from lstm_ext.native import loader

_C = loader.extension()
HAS_AMX = _C is not None and "amx" in _C.cpu_capabilities()
needs_amx = pytest.mark.skipif(not HAS_AMX, reason="this processor has no AMX")
AMX, PAIRS = "amx at small sizes", "software, in pairs"  # see tile_engine/kernels.cpp
HAS_PAIRS = _C is not None and "avx512_bf16" in _C.cpu_capabilities()
needs_pairs = pytest.mark.skipif(not HAS_PAIRS, reason="this processor has no AVX-512-BF16")
ENGINES = ["software", pytest.param(AMX, marks=needs_amx, id="amx")]


@contextlib.contextmanager
def capability(name: str) -> Iterator[None]:
    if name in ("software", PAIRS, AMX):
        build.add_kernels()
    before = _C.cpu_capability()
    _C.set_cpu_capability(name)
    try:
        yield
    finally:
        _C.set_cpu_capability(before)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    with capability(request.param):
        yield request.param


def plan_of(case: Case, threads: int = 1, bf16_parts: int = 3) -> dict[str, int]:
    return _C.cpu_plan(
        steps=case.steps, batch=case.batch, input_size=case.input_size, hidden_size=case.hidden_size,
        proj_size=case.proj_size, threads=threads, save=True, bf16_parts=bf16_parts,
    )  # fmt: skip


# ---- the engine itself


def pointer(t: Tensor) -> ctypes.c_void_p:
    assert t.is_contiguous()
    return ctypes.c_void_p(t.data_ptr())


def multiply_add(
    hardware: bool, sums: Tensor, left: Tensor, right: Tensor, function: str = "multiply_add"
) -> Tensor:
    result = sums.clone()
    getattr(build.engine(hardware), function)(
        pointer(result), pointer(left), pointer(right), ctypes.c_int64(len(sums))
    )
    return result


def operands(kind: str, count: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    sums, left, right = normal(count, 16, 16), normal(count, 16, 32), normal(count, 16, 16, 2)
    if kind == "of all sizes":
        sums, left, right = (
            t * torch.exp2(torch.randint(-140, 60, t.shape, generator=generator).float())
            for t in (sums, left, right)
        )
    elif kind == "denormal":
        sums, left, right = sums * 1e-38, left * 1e-38, right * 3e-1
    elif kind == "not finite":
        for t in (sums, left, right):
            chosen = torch.rand(t.shape, generator=generator)
            t[chosen < 0.01] = float("inf")
            t[(chosen > 0.01) & (chosen < 0.02)] = -float("inf")
            t[chosen > 0.99] = float("nan")
    return sums, left.bfloat16().contiguous(), right.bfloat16().contiguous()


def equal_bits(a: Tensor, b: Tensor) -> bool:
    same = a.view(torch.int32) == b.view(torch.int32)
    return bool((same | (a.isnan() & b.isnan())).all())


@needs_amx
@pytest.mark.parametrize("kind", ["normal", "of all sizes", "denormal", "not finite"])
def test_engine_in_software_has_the_bits_of_amx(kind):
    assert equal_bits(multiply_add(False, *operands(kind)), multiply_add(True, *operands(kind)))


@needs_pairs
@pytest.mark.parametrize("kind", ["normal", "of all sizes", "denormal", "not finite"])
def test_pairs_in_software_have_the_bits_of_avx512_bf16(kind):
    function = "multiply_add_pairs"
    ours, theirs = (multiply_add(hardware, *operands(kind), function) for hardware in (False, True))
    assert equal_bits(ours, theirs)


def test_engine_in_software_multiplies():
    sums, left, right = operands("normal")
    right_rows = right.double().permute(0, 1, 3, 2).reshape(-1, 32, 16)
    product = left.double() @ right_rows
    assert relative_error(multiply_add(False, sums, left, right), sums.double() + product) < 1e-6


@pytest.mark.parametrize("hardware", [False, pytest.param(True, marks=needs_amx)], ids=["software", "amx"])
def test_rounding_to_bfloat16(hardware):
    numbers = torch.cat([operands("of all sizes")[0].flatten(), operands("not finite")[0].flatten()])
    numbers = torch.cat(
        [numbers, torch.tensor([1e-39, -1e-39, 0.0, -0.0, 3.39e38, -3.4e38, 1e-45, 2.0**-126] * 2)]
    )
    halves = torch.zeros(len(numbers), dtype=torch.bfloat16)
    build.engine(hardware).round_to_bfloat16(pointer(numbers), pointer(halves), ctypes.c_int64(len(numbers)))
    expected = torch.where(numbers.abs() < 2.0**-126, numbers * 0, numbers).bfloat16()
    assert equal_bits(halves.float(), expected.float())


# ---- layers


def sized(steps: int, batch: int, input_size: int, hidden_size: int, proj_size: int = 0, **more: Any) -> Case:
    return Case(
        steps=steps, batch=batch, input_size=input_size, hidden_size=hidden_size, proj_size=proj_size,
        weights_first=True, **more,
    )  # fmt: skip


# Around the edges of the tiles: rows in pairs of 16 and a last one, units and features in 16 and 32, groups of columns.
SIZES = {
    "rows": [sized(5, b, 40, 33) for b in (8, 15, 16, 17, 32, 33, 49)],
    "units": [sized(4, 18, 40, h, bidirectional=True) for h in (32, 47, 48, 65, 81)],
    "features": [sized(4, 16, i, 34) for i in (32, 33, 63, 64, 65, 97)],
    "projection": [sized(4, 17, 35, 70, p, bidirectional=True) for p in (32, 33, 49)],
    "no bias": [sized(4, 20, 33, 34, bias=False)],
    "no states": [sized(4, 20, 33, 34, hx=False)],
    "groups of rows": [sized(2, 290, 33, 34)],
    "pieces of k": [sized(2, 130, 40, 430)],
    "pieces of samples": [sized(29, 16, 1100, 33)],
    "one step": [sized(1, 40, 70, 90, bidirectional=True), sized(1, 300, 40, 34)],
    "several chunks": [sized(70, 12, 33, 34, bidirectional=True)],
    "strided": [sized(5, 18, 40, 40, strides="columns apart")],
}
STEPS = sized(6, 11, 35, 40, bidirectional=True)
OPTIONS = {
    "packed": sized(0, 0, 35, 40, packed=(9, 8, 7, 6, 5, 4, 3, 2, 1, 1, 1, 1), bidirectional=True),
    "lengths": sized(7, 0, 35, 40, lengths=(7, 3, 0, 5, 1, 7, 2, 6, 4, 7, 1), bidirectional=True),
    **{
        name: dataclasses.replace(STEPS, **KINDS[name])
        for name in ("resets", "norm", "recompute", "all but norm")
    },
    "resets to zeros": dataclasses.replace(STEPS, resets="to zeros"),
    "recompute, projection": sized(6, 11, 35, 70, 33, recompute=True),
    "all, projection": sized(6, 11, 35, 70, 33, bidirectional=True, **KINDS["all but norm"]),
}
CASES = {**SIZES, **{name: [case] for name, case in OPTIONS.items()}}
IN_PAIRS = [PAIRS, pytest.param("avx512_bf16", marks=needs_pairs)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    # In 16 bits, the sizes in which a tile may be cut off.
    [*itertools.product(CASES, [torch.float32]), *itertools.product(("rows", "projection"), LOW)],
    ids=str,
)
def test_layers(engine, name, dtype):
    for case in CASES[name][:: 1 if dtype == torch.float32 else 2]:
        check(case, dtype, draws=1 if case.hidden_size > 400 else 3, equations=dtype != torch.float32)


@pytest.mark.parametrize("where", IN_PAIRS)
@pytest.mark.parametrize("name", CASES)
def test_pairs_in_vector_registers(name, where):
    with capability(where):
        for case in CASES[name]:
            assert (
                bool(case.packed or case.lengths) or plan_of(case, bf16_parts=1)["recurrent_bf16_parts"] == 1
            )
            check(case, torch.bfloat16, draws=3, equations=True)


@contextlib.contextmanager
def precision_of_float32(name: str) -> Iterator[None]:
    """torch's own switch."""
    rnn = torch.backends.mkldnn.rnn
    before = rnn.fp32_precision
    rnn.fp32_precision = name
    try:
        yield
    finally:
        rnn.fp32_precision = before


# Float32 operands cut to 16 bits, or to 8: the errors of one product are about 2^-17 and 2^-9 of it.
@pytest.mark.parametrize(("precision", "least", "most"), [("tf32", 5e-7, 3e-5), ("bf16", 5e-4, 2e-2)])
def test_precision_of_float32_is_torchs_own_switch(engine, precision, least, most):
    case = sized(6, 20, 70, 80, bidirectional=True)
    exact, reference = ours(case, torch.float32, 0), expected(case, torch.float32, 0)
    with precision_of_float32(precision):
        rounded = ours(case, torch.float32, 0)
    for name in exact:
        assert least < relative_error(rounded[name], reference[name]) < most, name


def test_ieee_uses_no_engine(engine):
    case, frozen = sized(6, 20, 70, 80, bidirectional=True), lstm_ext.LSTM(70, 80).requires_grad_(False)
    input = torch.randn(6, 20, 70)
    with precision_of_float32("ieee"):
        found, of_frozen = ours(case, torch.float32, 0), lstm_ext.freeze(frozen)(input)[0]
    with capability("avx512" if "avx512" in _C.cpu_capabilities() else "avx2"):
        without, of_frozen_without = ours(case, torch.float32, 0), lstm_ext.freeze(frozen)(input)[0]
    for name, value in {**without, "frozen": of_frozen_without}.items():
        assert torch.equal(value, {**found, "frozen": of_frozen}[name]), name
    assert not torch.equal(ours(case, torch.float32, 0)["output"], without["output"])
    assert not torch.equal(lstm_ext.freeze(frozen)(input)[0], of_frozen_without)


def test_without_an_engine_the_switch_changes_nothing():
    others = [name for name in _C.cpu_capabilities() if name not in ("amx", "avx512_bf16")]
    case = sized(6, 20, 70, 80)
    with capability(others[0]):
        exact = ours(case, torch.float32, 0)
        with precision_of_float32("bf16"):
            for name, value in ours(case, torch.float32, 0).items():
                assert torch.equal(value, exact[name])


def test_which_products_run_on_the_engine(engine):
    def bf16_parts(*sizes: int, **options: Any) -> tuple[int, ...]:
        plan = plan_of(sized(*sizes), **options)
        names = ("input", "recurrent", "backward_recurrent", "backward_input", "outer")
        return tuple(plan[f"{name}_bf16_parts"] for name in names)

    assert bf16_parts(20, 32, 64, 64) == (3, 3, 3, 3, 3)
    assert bf16_parts(20, 32, 64, 64, bf16_parts=1) == (1, 1, 1, 1, 1)
    # Few rows a step: the products over all steps only.
    assert bf16_parts(100, 1, 64, 64) == (3, 0, 0, 3, 3)
    # Few samples are computed as one step after the other.
    assert bf16_parts(4, 8, 64, 64) == (0, 0, 0, 0, 0)
    # A backward pass takes some more for few, of small weights.
    assert bf16_parts(4, 16, 64, 128) == (3, 3, 0, 0, 0)
    assert bf16_parts(4, 16, 64, 512) == (3, 3, 3, 3, 3)
    # Few features, few units.
    assert bf16_parts(20, 32, 8, 64) == (0, 3, 3, 0, 3)
    assert bf16_parts(20, 32, 64, 8) == (0, 0, 0, 3, 3)
    # The weights share a factor: what counts are the columns of both.
    assert bf16_parts(20, 32, 15, 16)[-1] == 0
    assert bf16_parts(20, 32, 16, 16)[-1] == 3
    # Not a matter of how the work is shared.
    assert bf16_parts(20, 16, 64, 256) == bf16_parts(20, 16, 64, 256, threads=2)
    assert bf16_parts(20, 16, 64, 256) == bf16_parts(20, 16, 64, 256, threads=4)


@needs_amx
def test_where_amx_pays():
    """With three bf16_parts larger products only; with one, which splits nothing, small ones too."""
    with capability("amx"):
        for bf16_parts, expected in ((3, (3, 3, 0, 0, 3)), (2, (2, 2, 2, 2, 2)), (1, (1, 1, 1, 1, 1))):
            plan = plan_of(sized(20, 32, 64, 64), bf16_parts=bf16_parts)
            names = ("input", "recurrent", "backward_recurrent", "backward_input", "outer")
            assert tuple(plan[f"{name}_bf16_parts"] for name in names) == expected
        assert plan_of(sized(20, 32, 39, 40))["outer_bf16_parts"] == 0
        assert plan_of(sized(20, 32, 40, 40))["outer_bf16_parts"] == 3
        assert plan_of(sized(20, 7, 128, 128))["recurrent_bf16_parts"] == 0
        assert plan_of(sized(20, 8, 128, 128))["recurrent_bf16_parts"] == 3
        # Of a weight that the second-level cache does not hold, more rows have to share the reading.
        assert plan_of(sized(20, 11, 512, 512))["recurrent_bf16_parts"] == 0
        assert plan_of(sized(20, 12, 512, 512))["recurrent_bf16_parts"] == 3
        assert plan_of(sized(40, 1, 128, 128), bf16_parts=1)["recurrent_bf16_parts"] == 1


def test_where_the_input_is_summed_in_the_steps(engine):
    """Enough rows, weights that stay in the cache, and more than one step."""

    def in_steps(*sizes: int, **options: Any) -> bool:
        return plan_of(sized(*sizes), **options)["input_in_steps"]

    assert in_steps(20, 16, 128, 128)
    assert in_steps(20, 16, 128, 128, threads=2)
    assert in_steps(4, 20, 40, 40)  # test_infinities_nan_and_huge_numbers
    assert not in_steps(20, 15, 128, 128)
    assert not in_steps(1, 64, 128, 128)
    assert not in_steps(20, 16, 256, 256)
    assert in_steps(20, 8, 256, 256, bf16_parts=1)
    assert not in_steps(20, 7, 256, 256, bf16_parts=1)
    # Weights that do not stay there, but W has fewer bytes than writing and reading W x costs.
    assert in_steps(20, 64, 256, 256)
    assert in_steps(20, 16, 96, 512)
    assert not in_steps(20, 16, 112, 512)


def test_how_two_workers_share_a_forward_pass(engine):
    """The rows; or the units, where a cache holds half of the bf16_parts of a weight only, and rows are not many."""

    def groups(*sizes: int) -> tuple[int, int]:
        plan = plan_of(sized(*sizes), threads=2)
        return plan["forward_batch_groups"], plan["forward_hidden_groups"]

    assert groups(20, 64, 128, 128) == (2, 1)
    assert groups(20, 64, 256, 256) == (1, 2)
    assert groups(20, 512, 256, 256) == (2, 1)
    assert groups(20, 16, 128, 128) == (1, 2)  # half a row tile each would take as long as a whole one


def test_how_much_of_the_input_is_multiplied_at_once(engine):
    """In short bursts, where the steps do without the engine and a burst is good for many of them."""

    def rows(*sizes: int, **options: Any) -> int:
        return plan_of(sized(*sizes), **options)["forward_chunk_rows"]

    assert rows(200, 1, 128, 128) == 16  # 768 products of tiles
    assert rows(200, 1, 64, 128) == 32
    assert rows(200, 3, 64, 64) == 63  # 21 steps
    assert rows(200, 4, 64, 128) == 128  # 8 steps would be too few
    assert rows(200, 1, 256, 256) >= 128


@pytest.mark.alone
@pytest.mark.parametrize("shape", [(6, 32, 64, 128), (4, 16, 64, 256)], ids=["teams", "members"])
def test_workers(engine, shape):
    case = sized(*shape, bidirectional=True)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(ours(case, torch.float32, 0))
    grids = plan_of(case, threads=2)
    assert grids["forward_batch_groups"] * grids["forward_hidden_groups"] == 2
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@needs_amx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_amx_has_the_bits_of_the_engine_in_software(name, dtype):
    for case in CASES[name][:2]:
        results = []
        for engine in ("software", AMX):
            with capability(engine):
                results.append(ours(case, dtype, 1))
        for key, value in results[0].items():
            assert torch.equal(value, results[1][key]), (case, key)


# ---- weights in int8, whose products are sums of bytes where the processor has the instruction for them


def int8_results(engine: str | None) -> list[Tensor]:
    """Of rows of several pieces, one of them with numbers that no piece can hold. None: of float32 products with the
    same weights."""
    torch.manual_seed(5)
    layer = lstm_ext.LSTM(600, 21)
    x = torch.randn(3, 2, 600)
    x[1, 0, 3], x[2, 1, 550] = 1e30, 1e-35
    with torch.no_grad():
        if engine is None:
            for weight in (layer.weight_ih_l0, layer.weight_hh_l0):
                factors = weight.abs().amax(1, keepdim=True) / 127
                weight.copy_((weight / factors).round() * factors)
            output, (h, c) = layer(x)
        else:
            with capability(engine):
                output, (h, c) = lstm_ext.freeze(layer, torch.int8)(x)
    return [output, h, c]


def test_int8_on_bytes_in_software():
    for y, e in zip(int8_results("software"), int8_results(None), strict=True):
        torch.testing.assert_close(y, e, rtol=1e-5, atol=1e-6)


@needs_amx
def test_amx_has_the_bits_of_the_byte_engine_in_software():
    for y, e in zip(int8_results(AMX), int8_results("software"), strict=True):
        assert torch.equal(y, e)


# ---- numbers that three bfloat16 cannot hold


def test_more_rows_than_one_left_operand_has(engine):
    """A pass that recomputes multiplies those of a whole chunk, here without the engine."""
    results = []
    for name in (_C.cpu_capabilities()[-1], engine):
        with capability(name):
            torch.manual_seed(1)
            layer = lstm_ext.LSTM(32, 176, recompute=True)
            x = torch.randn(2, 256, 32)
            x[0, 3, 7] = float("inf")
            layer(x)[0][:, 4:].sum().backward()
            results.append(layer.bias_ih_l0.grad)
    assert relative_error(results[1], results[0]) < 1e-6


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3.4e38, -3.395e38])
@pytest.mark.parametrize("where", ["input", "input without h0", "h0", "weight_ih", "weight_hh", "gradient"])
def test_infinities_nan_and_huge_numbers(engine, where, value):
    """They reach as far as without the engine, and the rest is what it was."""
    other = next(name for name in _C.cpu_capabilities() if name != "amx")
    results = []
    for name in (other, engine):
        with capability(name):
            torch.manual_seed(1)
            layer = lstm_ext.LSTM(40, 40)
            x, h0, w = torch.randn(4, 20, 40), torch.randn(1, 20, 40), torch.randn(4, 20, 40)
            with torch.no_grad():
                if where.startswith("input"):
                    x[0 if "without" in where else 1, 3, 7] = value
                elif where == "h0":
                    h0[0, 3, 7] = value
                elif where == "gradient":
                    w[2, 3, 7] = value
                else:
                    getattr(layer, f"{where}_l0")[50, 7] = value
            x.requires_grad_()
            output, _ = layer(x, None if "without" in where else (h0, torch.zeros_like(h0)))
            grads = torch.autograd.grad(output, [x, *layer.parameters()], w)
            results.append([output, *grads])
    assert torch.equal(results[0][0].isnan(), results[1][0].isnan())
    if math.isfinite(value) and where != "gradient":
        # Gradients are this number times those of saturated gates, which are nothing but rounding.
        results = [side[:1] for side in results]
    for reference, found in zip(*results, strict=True):
        # Not NaN by NaN: a gradient of 1e-45 may become 0, of which infinity makes NaN.
        ordinary = reference.isfinite()
        assert torch.equal(ordinary, found.isfinite())
        assert relative_error(found[ordinary], reference[ordinary].double()) < 1e-5


def test_tiny_numbers_keep_the_precision_that_is_left(engine):
    """A number below about 2^-102 loses its lower bf16_parts, since a denormal counts as zero: 8 bits are left."""
    case = sized(5, 20, 40, 40, input_scale=1e-33)
    found, reference = ours(case, torch.float32, 0), expected(case, torch.float32, 0)
    assert relative_error(found["output"], reference["output"]) < 1e-6
    weight = next(
        name for name, value in found.items() if name.startswith("grad") and value.shape == (160, 40)
    )
    assert relative_error(found[weight], reference[weight]) < 2**-8
