"""Random sizes and options against float64: a few in each run, hundreds in `make test-full`."""

from __future__ import annotations

import random

import cases
import pytest
import torch
from cases import Case
from test_kernels import _C, CAPABILITIES


def drawn(choose: random.Random) -> Case:
    hidden = choose.choice([1, 2, 5, 7, 8, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 128, 130, 257])
    proj = choose.choice([0, 0, 0, 1, 3, 17, 40])
    incoming = choose.choice(
        [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
    )
    features = choose.choice([1, 3, 15, 16, 17, 64, 65, 100, 128, 300])
    return Case(
        steps=choose.choice([1, 2, 3, 7, 17, 40, 90]),
        batch=choose.choice([1, 2, 3, 4, 5, 6, 7, 12, 13, 33]),
        input_size=features,
        # With far more features than units the gates would saturate, and 1 - f would lose its digits in the reference
        # as well.
        input_scale=min(1.0, (hidden / features) ** 0.5),
        hidden_size=hidden,
        proj_size=proj if proj < hidden else 0,
        bidirectional=choose.random() < 0.4,
        bias=choose.random() < 0.7,
        hx=choose.random() < 0.7,
        batch_first=choose.random() < 0.3,
        incoming=incoming,
    )


def check_one(choose: random.Random) -> None:
    case, dtype = drawn(choose), choose.choice([torch.float32, torch.float64])
    capability, threads = choose.choice(CAPABILITIES), choose.choice([1, 2])
    before = _C.cpu_capability(), torch.get_num_threads()
    try:
        _C.set_cpu_capability(capability)
        torch.set_num_threads(threads)
        # The rule is the worst of twenty draws. Among hundreds of cases many have tensors of one number, whose single
        # errors may be anything: all draws as one tell more there, unless one draw's numbers are far larger than all
        # others', as gradients through many steps are.
        found = cases.problems(case, dtype, together=True) and cases.problems(case, dtype)
        assert not found, "\n".join([f"{dtype} {capability} {threads} threads:", *found])
    finally:
        _C.set_cpu_capability(before[0])
        torch.set_num_threads(before[1])


def run(seed: int, count: int) -> None:
    choose = random.Random(seed)
    for _ in range(count):
        check_one(choose)


@pytest.mark.alone
def test_a_few():
    run(0, 8)


@pytest.mark.alone
@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 41))
def test_many(seed):
    run(seed, 12)
