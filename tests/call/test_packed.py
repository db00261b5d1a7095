"""PackedSequence in and out, against torch's layer and in float64."""

from __future__ import annotations

from collections.abc import Sequence

import cases
import pytest
import torch
from cases import Case, assert_module_as_accurate_as_torch, check
from devices import pack_sequence
from judge import assert_as_accurate_as_torch
from torch import Tensor

import lstm_ext
from lstm_ext.layer import route
from lstm_ext.native import loader

pytestmark = pytest.mark.devices("cpu", "cuda")

_C = loader.extension()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# Sizes at which two workers share the batch, share the units, and what the plan says then.
TEAMS = {"forward_batch_groups": 2, "backward_batch_groups": 2}
MEMBERS = {"forward_hidden_groups": 2, "backward_hidden_groups": 2}
MANY = tuple(sorted((1 + (7 * i) % 29 for i in range(60)), reverse=True))
GRIDS = {
    "two teams": (MANY, 70, 0, TEAMS),
    "two teams, projected": (MANY, 70, 33, TEAMS),
    "two members": ((60, 20, 7, 7), 401, 0, MEMBERS),
    "two members, projected": ((60, 20, 7, 7), 401, 150, MEMBERS),
}


def sized(lengths: Sequence[int], input_size: int, hidden_size: int, proj_size: int) -> Case:
    sizes = {"input_size": input_size, "hidden_size": hidden_size, "proj_size": proj_size}
    return Case(packed=tuple(lengths), **sizes, bidirectional=True)


def plan_of(case: Case, dtype: torch.dtype, threads: int) -> dict[str, int]:
    batch_sizes = [sum(n > t for n in case.packed) for t in range(max(case.packed))]
    return _C.cpu_plan(
        steps=len(batch_sizes), batch=len(case.packed), input_size=case.input_size,
        hidden_size=case.hidden_size, proj_size=case.proj_size, threads=threads, save=True,
        batch_sizes=batch_sizes, float64=dtype == torch.float64,
    )  # fmt: skip


@pytest.mark.alone
@pytest.mark.devices("cpu")
@pytest.mark.parametrize("grid", GRIDS)
def test_instruction_sets_and_workers(capability, two_threads, grid):
    lengths, hidden, proj, expected = GRIDS[grid]
    case = sized(lengths, 200, hidden, proj)
    plan = plan_of(case, torch.float32, 2)
    for name, value in expected.items():
        assert plan[name] == value, plan
    check(case, torch.float32, draws=2)


# Lengths, I, H, P, and the workers of the forward pass for 1 to 4 threads: teams x members.
WORKERS = {
    "teams without rows in most steps": ([200] + [60] * 11, 60, 70, 0, "1x1 2x1 3x1 4x1"),
    "the same, projected": ([200] + [60] * 11, 60, 70, 33, "1x1 2x1 3x1 4x1"),
    "rows join at the edges of chunks": ([90 - 2 * i for i in range(40)], 30, 96, 0, "1x1 2x1 3x1 4x1"),
    "members of teams": ([60, 60, 60, 31, 7], 200, 401, 0, "1x1 1x2 1x3 2x2"),
    "members of teams, projected": ([60, 60, 60, 31, 7], 200, 401, 150, "1x1 2x1 1x3 2x2"),
    "members": ([60, 20, 7, 7], 200, 401, 0, "1x1 1x2 1x3 1x4"),
    "members, row-major": ([30, 2], 200, 401, 0, "1x1 1x2 1x3 1x4"),
}


@pytest.mark.alone
@pytest.mark.devices("cpu")
@pytest.mark.parametrize("name", WORKERS)
def test_no_bit_depends_on_the_workers(name):
    *sizes, grids = WORKERS[name]
    case = sized(*sizes)
    before = torch.get_num_threads()
    alone: dict[str, Tensor] = {}
    try:
        for threads, grid in enumerate(grids.split(), start=1):
            plan = plan_of(case, torch.float64, threads)
            assert f"{plan['forward_batch_groups']}x{plan['forward_hidden_groups']}" == grid
            torch.set_num_threads(threads)
            results = cases.ours(case, torch.float64, 0)
            alone = alone or results
            assert [n for n in alone if not torch.equal(alone[n], results[n])] == [], threads
    finally:
        torch.set_num_threads(before)
    assert_as_accurate_as_torch(
        alone, cases.by_torch(case, torch.float64, 0), cases.expected(case, torch.float64, 0)
    )


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("proj_size", [0, 9])
def test_several_chunks(proj_size):
    case = sized([150 - 3 * i for i in range(45)], 5, 50, proj_size)
    plan = plan_of(case, torch.float32, 1)
    assert 2 * plan["forward_chunk_rows"] < sum(case.packed)
    assert 2 * plan["backward_chunk_rows"] < sum(case.packed)
    check(case, torch.float32, draws=2)


def test_one_kernel_call_a_layer(monkeypatch):
    calls = []

    class Recorder:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(_C, name)

    monkeypatch.setattr(route.loader, "extension", lambda: Recorder())
    module = lstm_ext.LSTM(5, 6, 3, bidirectional=True)
    output, _ = module(pack_sequence([torch.randn(n, 5) for n in (7, 3, 1)]))
    assert calls == ["lstm_layer"] * 3
    with torch.autograd.profiler.profile() as profile:
        output.data.sum().backward()
    names = [event.name for event in profile.function_events]
    assert names.count("lstm_ext::lstm_layer_backward") == 3


def test_long_and_narrow():
    """More steps than a chunk has rows, with one row left for most of them."""
    assert_module_as_accurate_as_torch(lstm_ext.LSTM(3, 16), torch.randn(600, 1, 3))
    check(sized([600, 3, 1], 3, 16, 0), torch.float32, draws=2)
