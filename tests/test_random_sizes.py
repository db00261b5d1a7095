"""Random sizes and options against float64: a few in each run, thousands in `make test-full`."""

from __future__ import annotations

import random

import pytest
import torch
from cases import values_and_gradients
from judge import assert_as_accurate_as_torch, stacked
from test_kernels import _C, CAPABILITIES, module_of

import lstm_ext

DRAWS = 20  # judged together: single tensors of a few numbers are a lottery


def check_one(choose: random.Random) -> None:
    hidden = choose.choice([1, 2, 5, 7, 8, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 128, 130, 257])
    proj = choose.choice([0, 0, 0, 1, 3, 17, 40])
    sizes = (
        choose.choice([1, 2, 3, 7, 17, 40, 90]),
        choose.choice([1, 2, 3, 4, 5, 6, 7, 12, 13, 33]),
        choose.choice([1, 3, 15, 16, 17, 64, 65, 100, 128, 300]),
        hidden,
        proj if proj < hidden else 0,
        choose.random() < 0.4,
        choose.random() < 0.7,
    )
    dtype = choose.choice([torch.float32, torch.float64])
    capability, threads = choose.choice(CAPABILITIES), choose.choice([1, 2])
    grad_of = choose.choice([("output", "h_n", "c_n"), ("output",), ("h_n",), ("c_n",)])
    before = _C.cpu_capability(), torch.get_num_threads()
    try:
        _C.set_cpu_capability(capability)
        torch.set_num_threads(threads)
        results = []
        for _ in range(DRAWS):
            module, input, hx = module_of(sizes, dtype)
            # With far more features than units the gates would saturate, and 1 - f would lose its digits in the
            # reference as well.
            input *= min(1.0, (sizes[3] / sizes[2]) ** 0.5)
            if choose.random() < 0.3:
                hx = None
            if choose.random() < 0.3:
                input = input.transpose(0, 1).contiguous().transpose(0, 1)
            theirs = lstm_ext.to_torch(module)
            results.append(
                [
                    values_and_gradients(module, input, hx, grad_of=grad_of),
                    values_and_gradients(theirs, input, hx, grad_of=grad_of),
                    values_and_gradients(theirs, input, hx, grad_of=grad_of, dtype=torch.float64),
                ]
            )
        names = set.intersection(*(set(r[0]) for r in results))
        kept = [[{n: v for n, v in side.items() if n in names} for side in r] for r in results]
        ours, torchs, ref = (stacked([r[side] for r in kept]) for side in range(3))
        try:
            assert_as_accurate_as_torch(ours, torchs, ref)
        except AssertionError as error:
            raise AssertionError(
                f"{sizes} {dtype} {capability} {threads} threads {grad_of}:\n{error}"
            ) from None
    finally:
        _C.set_cpu_capability(before[0])
        torch.set_num_threads(before[1])


def run(seed: int, cases: int) -> None:
    torch.manual_seed(seed)
    choose = random.Random(seed)
    for _ in range(cases):
        check_one(choose)


def test_a_few():
    run(0, 8)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 41))
def test_many(seed):
    run(seed, 12)
