"""Combinations of instruction set, dtype, data and step that no other test of this tier has, as paths.py lists them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import cases
import internals
import paths
import pytest
import torch
from cases import Case, check_quickly
from judge import relative_error

from lstm_ext.native import loader

_C = loader.extension()

# instruction set | dtype | pass | data | step | projection. A forward pass that is saved is tried with its backward.
STEPS = """
avx2 | bfloat16 | backward | dense | plain |
avx2 | bfloat16 | backward | dense | plain | projected
avx2 | bfloat16 | backward | lengths | flags of h |
avx2 | bfloat16 | backward | packed | mask, recompute | projected
avx2 | bfloat16 | backward | packed, resets | norm |
avx2 | float16 | backward | dense, resets | flags of h, norm |
avx2 | float16 | backward | dense, resets | plain |
avx2 | float32 | backward | dense, resets | norm |
avx2 | float32 | backward | dense | flags of h | projected
avx2 | float32 | backward | packed, resets | mask, norm | projected
avx2 | float64 | backward | dense | mask, norm |
avx2 | float64 | inference | dense | norm |
avx2 | float64 | backward | dense | flags of h, flags of c | projected
avx2 | float64 | backward | packed, resets | mask |
avx2 | float64 | backward | packed, resets | norm |
avx512 | bfloat16 | inference | packed | share of h |
avx512 | bfloat16 | inference | packed, resets | mask |
avx512 | float16 | backward | packed, resets | plain |
avx512 | float32 | backward | dense | mask, norm | projected
avx512 | float32 | inference | packed | mask |
avx512 | float32 | backward | dense, resets | share of h, norm |
avx512 | float32 | backward | packed, resets | mask, flags of c, norm | projected
avx512 | float64 | backward | dense | mask, norm | projected
avx512 | float64 | backward | dense | mask, recompute | projected
avx512 | float64 | inference | packed | norm | projected
avx512 | float64 | backward | dense | share of c, norm |
avx512 | float64 | backward | packed | flags of h, norm | projected
avx2 | bfloat16 | backward | dense | flags of h | projected
avx2 | float32 | backward | dense, resets | share of h |
avx2 | float32 | backward | lengths | plain | projected
avx2 | float32 | inference | dense | mask |
avx2 | float32 | inference | dense, resets | norm |
avx2 | float32 | inference | packed, resets | flags of c, norm |
avx2 | float32 | inference | packed, resets | mask, flags of h | projected
avx2 | float32 | backward | packed, resets | flags of h |
avx2 | float64 | backward | dense, resets | mask |
avx2 | float64 | backward | packed | mask, flags of h, recompute |
avx2 | float64 | backward | lengths | mask, norm |
"""

# instruction set | dtype | pass | workers | weights | step | T, B, I, H, P
GRIDS = """
avx2 | bfloat16 | backward | one | panels | plain | 12, 3, 5, 10, 0
avx2 | bfloat16 | backward | teams | panels | plain | 12, 32, 5, 20, 10
avx2 | float32 | training | one | panels | plain | 20, 2, 5, 10, 5
avx512 | bfloat16 | backward | members | as they are | plain | 8, 1, 200, 70, 0
avx512 | bfloat16 | backward | teams | panels | plain | 30, 9, 5, 20, 0
avx512 | bfloat16 | training | members | as they are | plain | 8, 2, 20, 130, 0
avx512 | float16 | backward | members | as they are | plain | 8, 1, 200, 70, 0
avx512 | float16 | backward | teams | panels | plain | 30, 9, 5, 20, 0
avx512 | float16 | training | members | as they are | plain | 8, 2, 20, 130, 0
avx512 | float64 | inference | teams | panels | plain | 60, 24, 5, 10, 0
avx512 | float64 | inference | teams | panels | plain | 20, 32, 5, 20, 10
avx512 | float64 | training | teams | panels | plain | 60, 24, 5, 10, 0
avx2 | bfloat16 | backward | one | panels | plain | 12, 3, 5, 10, 5
avx2 | float32 | backward | members | as they are | norm | 12, 1, 60, 100, 0
avx2 | float32 | backward | one | as they are | mask, flags of h, recompute | 1, 1, 5, 10, 0
avx2 | float32 | backward | one | panels | flags of h | 12, 3, 5, 10, 0
avx2 | float32 | backward | one | panels | mask, recompute | 12, 3, 5, 10, 0
avx2 | float32 | backward | teams | panels | mask, norm | 30, 9, 5, 20, 0
avx2 | float32 | inference | one | as they are | flags of c, norm | 1, 1, 5, 10, 0
avx2 | float32 | inference | one | as they are | mask, flags of h | 1, 1, 5, 10, 0
avx2 | float32 | inference | teams | panels | norm | 60, 24, 5, 10, 0
avx2 | float32 | inference | teams | panels | share of h, share of c | 60, 24, 5, 10, 0
avx2 | float32 | training | members | as they are | mask | 8, 2, 200, 70, 0
avx2 | float32 | training | one | as they are | mask, flags of c, norm | 1, 1, 5, 10, 0
avx2 | float32 | training | one | as they are | mask, flags of h, recompute | 1, 1, 5, 10, 0
avx2 | float32 | training | one | panels | flags of h | 12, 3, 5, 10, 0
avx2 | float32 | training | one | panels | mask, recompute | 12, 3, 5, 10, 0
avx2 | float32 | training | teams | panels | flags of h, flags of c | 60, 24, 5, 10, 0
"""


def rows(table: str) -> list[str]:
    return table.strip().splitlines()


def fields(row: str) -> list[str]:
    return [field.strip() for field in row.split("|")]


def with_step(case: Case, step: str) -> Case:
    parts = step.split(", ")
    zoneouts = [part for part in parts if part.startswith(("flags", "share"))]
    both = {"flags of h": "flags", "share of h": "shares"}
    return dataclasses.replace(
        case,
        mask="mask" in parts,
        zoneout=both[zoneouts[0]] if len(zoneouts) == 2 else "".join(zoneouts),
        norm="own" if "norm" in parts else "",
        recompute="recompute" in parts,
    )


@contextlib.contextmanager
def running(instruction_set: str, threads: int = 1) -> Iterator[None]:
    if instruction_set not in _C.cpu_capabilities():
        pytest.skip(f"this processor does not run {instruction_set}")
    before, threads_before = _C.cpu_capability(), torch.get_num_threads()
    _C.set_cpu_capability(instruction_set)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        _C.set_cpu_capability(before)
        torch.set_num_threads(threads_before)


def check_inference(case: Case, dtype: torch.dtype) -> None:
    """Without gradients there are the same values, to the bit."""
    check_quickly(case, dtype)
    layer = cases.layer(case, dtype, 0)
    trained = layer.results(internals.lstm_layer, dtype)
    with torch.no_grad():
        values = internals.lstm_layer(*layer.arguments(dtype)[1])
    for name, value in zip(("output", "h_n", "c_n"), values, strict=False):
        assert torch.equal(value, trained[name]), relative_error(value, trained[name])


def check_pass(case: Case, dtype: torch.dtype, pass_: str) -> None:
    if pass_ == "inference":
        check_inference(case, dtype)
    else:
        check_quickly(case, dtype)


@pytest.mark.parametrize("row", rows(STEPS))
def test_steps(row: str) -> None:
    instruction_set, dtype, pass_, data, step, projection = fields(row)
    kind = data.removesuffix(", resets")
    case = Case(
        hidden_size=20,
        proj_size=12 if projection else 0,
        packed=(5, 3, 1) if kind == "packed" else (),
        lengths=(5, 0, 2, 4) if kind == "lengths" else (),
        resets="to a state" if data.endswith("resets") else "",
        weights_first=True,
    )
    with running(instruction_set):
        check_pass(with_step(case, step), getattr(torch, dtype), pass_)


def several_workers(row: str) -> bool:
    return fields(row)[3] != "one"


@pytest.mark.parametrize(
    "row", [pytest.param(r, marks=pytest.mark.alone if several_workers(r) else ()) for r in rows(GRIDS)]
)
def test_grids(row: str) -> None:
    instruction_set, dtype, pass_, workers, weights, step, sizes = fields(row)
    T, B, I, H, P = map(int, sizes.split(","))
    case = Case(steps=T, batch=B, input_size=I, hidden_size=H, proj_size=P, weights_first=True)
    threads = 2 if several_workers(row) else 1
    with running(instruction_set, threads):
        plan = _C.cpu_plan(
            steps=T, batch=B, input_size=I, hidden_size=H, proj_size=P, threads=threads,
            save=pass_ == "training", float64=dtype == "float64",
        )  # fmt: skip
        assert paths.planned(plan, T * B, pass_)[:2] == (workers, weights)
        check_pass(with_step(case, step), getattr(torch, dtype), pass_)


@pytest.mark.parametrize(
    ("dtype", "case"),
    [
        (torch.bfloat16, Case(packed=(5, 3, 1), hidden_size=20, proj_size=12, bidirectional=True)),
        (torch.float16, Case(hidden_size=20, proj_size=12, bidirectional=True)),
    ],
    ids=["packed", "dense"],
)
def test_inference_in_both_directions(dtype: torch.dtype, case: Case) -> None:
    check_inference(case, dtype)
