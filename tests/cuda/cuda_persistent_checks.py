"""The checks of cuda_checks.py that are about the kernels that do all steps at once, and whose blocks wait for each
other."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from cuda_problems import Problem, assert_same_bits, sized
from cuda_runs import NotRun, Run, check, gpu_check, kernel, on_two_streams, plan, replayed
from judge import relative_error
from matrix.cases import Case
from torch import Tensor

import lstm_ext
from lstm_ext.layer import cuda_kernels
from lstm_ext.native import loader

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BOUND = {torch.float32: 5e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
REPEATS, SECONDS = 10_000, 9.0  # of all cases


@contextlib.contextmanager
def wait_limit(seconds: float) -> Iterator[None]:
    """Of forward passes that this thread calls."""
    loader.extension().set_cuda_wait_limit_of_thread(seconds)
    try:
        yield
    finally:
        loader.extension().set_cuda_wait_limit_of_thread(None)


# ---- values


def cases_around_the_edges() -> list[Case]:
    """Of a piece, a tile of rows, and a block."""
    found = [sized(3, b, 5, h) for h in (1, 2, 8, 15, 16, 17, 32, 33, 64, 127, 128, 129, 300) for b in (1, 9)]
    found += [sized(3, b, 5, 40) for b in (2, 7, 8, 16, 17, 65, 200)]
    found += [
        sized(2, 3, 4, 20),
        sized(9, 5, 64, 1024),
        sized(6, 4, 9, 96, num_layers=3),
        sized(5, 3, 7, 300, bidirectional=True),
    ]
    found += [sized(70, 33, 12, 40, packed=True), sized(140, 70, 3, 24, bidirectional=True, packed=True)]
    found += [
        sized(6, 5, 9, 24, per_call=True),
        sized(6, 5, 9, 136, zoneout=(0.2, 0.1), per_call=True),
    ]
    found += [sized(40, 16, 64, 768), sized(20, 64, 64, 512), sized(300, 16, 8, 96), sized(2000, 4, 8, 64)]
    return found


@check
def persistent_kernels_agree_with_stepwise(run: Run) -> dict[str, Any]:
    """Values and gradients. Bounds are rough; the suite has the exact ones."""
    kernels: Counter[str] = Counter()
    worst: dict[str, float] = {}
    cases = cases_around_the_edges()
    for dtype in DTYPES:
        for case in cases if not run.quick else cases[1:-4:6]:
            problem = Problem(case, dtype, run.device)
            with kernel("stepwise"):
                expected = problem.training()
            for backward in (False, True):
                kernels[plan(run, case, dtype, "persistent", backward)["kernel"]] += 1
            with kernel("persistent"):
                results = problem.training()
                inference = problem.inference()
            errors = [relative_error(a, b) for a, b in zip(results, expected, strict=True)]
            errors += [relative_error(a, b) for a, b in zip(inference, expected, strict=False)]
            assert max(errors) < BOUND[dtype], f"{case}, {dtype}: errors {[f'{e:.1e}' for e in errors]}"
            worst[str(dtype)] = max(worst.get(str(dtype), 0.0), *errors)
    assert kernels["persistent"], kernels
    return {"worst_errors": worst, "kernels": dict(kernels)}


@check
def persistent_kernels_give_the_same_bits(run: Run) -> dict[str, Any]:
    """10,000 times, or as often as there is time for."""
    cases = (
        (sized(12, 16, 32, 96), torch.bfloat16),
        (sized(6, 64, 64, 512), torch.float32),
        (sized(12, 40, 16, 32), torch.float16),
    )
    seconds = (0.6 if run.quick else SECONDS) / len(cases)
    repeats = {}
    for case, dtype in cases:
        problem = Problem(case, dtype, run.device)
        with kernel("persistent"):
            first = problem.training()
            assert all(torch.isfinite(t).all() for t in first), f"{case}, {dtype}: not finite"
            same = torch.ones((), dtype=torch.bool, device=run.device)
            done, deadline = 0, time.monotonic() + seconds
            while done < REPEATS and (done < 2 or time.monotonic() < deadline):
                results = problem.training()
                same &= torch.stack([(a == b).all() for a, b in zip(results, first, strict=True)]).all()
                done += 1
                if done % 50 == 0:
                    run.synchronize()  # or the time would be that of the launches
            assert same.item(), f"{case}, {dtype}: not the same bits in {done} repeats"
        repeats[f"{case}, {dtype}"] = done
    return {"repeats": repeats}


# ---- beside others


@gpu_check
def persistent_kernels_on_two_streams(run: Run) -> dict[str, Any]:
    """Which do not find room at the same time; and two that do."""
    for sizes in ((1024, 1024), (768, 96), (32, 64)):
        problems = [
            Problem(sized(40, 16, 64, hidden), torch.bfloat16, run.device, seed)
            for seed, hidden in enumerate(sizes)
        ]
        with kernel("persistent"):
            on_two_streams(run, problems, f"H {sizes}")
    return {"multiprocessors": torch.cuda.get_device_properties(run.device).multi_processor_count}


@gpu_check
def persistent_kernels_beside_large_products(run: Run) -> None:
    """A stream that goes first keeps all multiprocessors busy: blocks find theirs one by one."""
    problem = Problem(sized(100, 16, 64, 768), torch.bfloat16, run.device)
    size = 2048 if run.quick else 8192
    a = torch.ones(size, size, dtype=torch.bfloat16, device=run.device)
    out = torch.empty_like(a)
    busy = torch.cuda.Stream(priority=-1)
    with kernel("persistent"):
        alone = problem.training()
        torch.cuda.synchronize()
        for i in range(run.count(20)):
            with torch.cuda.stream(busy):
                for _ in range(10):
                    torch.mm(a, a, out=out)
            assert_same_bits(problem.training(), alone, f"beside products, repeat {i}")
            torch.cuda.synchronize()


@gpu_check
def persistent_kernels_in_graphs(run: Run) -> None:
    for case in (sized(20, 16, 24, 96), sized(9, 6, 9, 32, bidirectional=True, packed=True)):
        for dtype in (torch.bfloat16, torch.float32):
            problem = Problem(case, dtype, run.device)
            with kernel("persistent"):
                for compute in (problem.inference, problem.training):
                    replayed(run, problem, compute, f"{compute.__name__}, {case}, {dtype}")
                cuda_kernels.check_waits(run.device)  # a replay does not look itself


# ---- blocks that come late


def whole_device(run: Run, multiprocessors: int) -> Case | None:
    """A layer whose blocks need every multiprocessor, if there is one."""
    for groups in (g for g in range(1, 9) if multiprocessors % g == 0):
        case = sized(4, 8 * groups, 8, 16 * (multiprocessors // groups))
        found = plan(run, case, torch.bfloat16, "persistent")
        if found["kernel"] == "persistent" and found["persistent"]["blocks"] == multiprocessors:
            return case
    return None


# With all shared memory that a block may have, so that no other block finds room beside it.
OCCUPIER = """
extern "C" __global__ void occupy(int microseconds) {
  extern __shared__ unsigned char memory[];
  unsigned long long begin, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    memory[threadIdx.x] = 1;
  } while (now - begin < 1000ull * microseconds);
}
"""


def occupy(run: Run, milliseconds: int) -> torch.cuda.Event:
    """Takes a multiprocessor away, on a stream of its own. The event is its end."""
    try:
        kernel = torch.cuda._compile_kernel(OCCUPIER, "occupy")
    except (AttributeError, OSError, RuntimeError) as error:
        raise NotRun(f"this torch compiles no kernel here: {str(error).partition(chr(10))[0]}") from error
    shared = torch.cuda.get_device_properties(run.device).shared_memory_per_block_optin
    kernel.set_shared_memory_config(shared)
    stream, end = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    kernel((1, 1, 1), (32, 1, 1), [1000 * milliseconds], shared, stream)
    end.record(stream)
    return end


def held_up(run: Run, case: Case, seconds: float, milliseconds: int) -> bool:
    """Whether another kernel held up a block of the layer, which waits no longer than so many seconds. Its results have
    to be right: the time of a wait begins when all blocks have come."""
    layer = lstm_ext.LSTM(
        case.input_size, case.hidden_size, dtype=torch.bfloat16, device=run.device
    ).requires_grad_(False)
    x = torch.ones(*case.rows, case.input_size, dtype=torch.bfloat16, device=run.device)

    def compute() -> list[Tensor]:
        output, states = layer(x)
        return [output, *states]

    with kernel("persistent"):
        expected = compute()
        run.synchronize()
        on_gpu = run.device.type == "cuda"
        ends = [occupy(run, milliseconds), torch.cuda.Event(enable_timing=True)] if on_gpu else []
        with wait_limit(seconds):
            results = compute()
        if on_gpu:
            ends[1].record()
        run.synchronize()
        again = compute()  # would raise an error for a wait that had expired
    assert_same_bits(results, expected, "while another kernel has a multiprocessor")
    assert_same_bits(again, expected, "after it")
    return on_gpu and ends[0].elapsed_time(ends[1]) > 0


@gpu_check
def blocks_that_come_late_are_waited_for(run: Run) -> None:
    """The limit is far below the time for which a multiprocessor is taken away."""
    multiprocessors = torch.cuda.get_device_properties(run.device).multi_processor_count
    case = whole_device(run, multiprocessors)
    if case is None:
        raise NotRun("there is no layer whose blocks need every multiprocessor of this card")
    # Sixteen times the limit is the time for blocks to come.
    if not any([held_up(run, case, 0.01, 50) for _ in range(5)]):
        raise NotRun(
            "results were right, but this card ran the layer beside the kernel that takes all shared memory"
        )


# ---- run by compute-sanitizer


def sanitized(run: Run) -> None:
    for case in (
        sized(4, 9, 5, 24),
        sized(3, 5, 5, 72, bidirectional=True),
        sized(6, 5, 9, 24, per_call=True),
    ):
        for dtype in DTYPES:
            with kernel("persistent"):
                Problem(case, dtype, run.device).training()
