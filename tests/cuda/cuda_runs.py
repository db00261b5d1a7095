"""What the checks of cuda_checks.py and cuda_persistent_checks.py share: their list, how they are run and on which
kernels, and repeats and graphs of a problem."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from cuda_problems import Problem, assert_same_bits, tf32
from matrix.cases import Case
from torch import Tensor

from lstm_ext.layer import cuda_kernels
from lstm_ext.native import loader
from lstm_ext.native.config import CUDA_KERNELS


class NotRun(Exception):
    """With the reason."""


@dataclasses.dataclass(frozen=True)
class Run:
    device: torch.device
    quick: bool  # few repeats, small sizes

    def count(self, number: int) -> int:
        return max(2, number // 20) if self.quick else number

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


CHECKS: dict[str, Callable[[Run], dict[str, Any] | None]] = {}
ON_GPUS_ONLY: set[str] = set()


def assert_ours(run: Run) -> None:
    """Torch's operator or the equations would pass any check, and show nothing of our kernels."""
    assert cuda_kernels.is_forced(), "none of our kernels is forced"
    if run.device.type == "cuda":
        assert cuda_kernels.may_run(run.device.index), cuda_kernels.why_not(run.device.index)


def check(function: Callable[[Run], dict[str, Any] | None]) -> Callable[[Run], dict[str, Any] | None]:
    @functools.wraps(function)
    def on_ours(run: Run) -> dict[str, Any] | None:
        assert_ours(run)
        return function(run)

    CHECKS[function.__name__] = on_ours
    return on_ours


def gpu_check(function: Callable[[Run], dict[str, Any] | None]) -> Callable[[Run], dict[str, Any] | None]:
    ON_GPUS_ONLY.add(function.__name__)
    return check(function)


def perform(name: str, run: Run) -> dict[str, Any]:
    start = time.perf_counter()
    result: dict[str, Any] = {"check": name}
    if name in ON_GPUS_ONLY and run.device.type != "cuda":
        return result | {"result": "not run", "reason": f"not on {run.device.type}"}
    try:
        with cuda_kernels.forced("auto"):
            result |= CHECKS[name](run) or {}
            run.synchronize()
        result["result"] = "passed"
    except NotRun as reason:
        result |= {"result": "not run", "reason": str(reason)}
    except Exception as caught:
        text = "".join(traceback.format_exception(caught))
        result |= {
            "result": "failed",
            "reason": f"{type(caught).__name__}: {caught}"[:2000],
            "traceback": text[-4000:],
        }
    return result | {"seconds": round(time.perf_counter() - start, 3)}


# ---- which kernel computes


@contextlib.contextmanager
def kernel(name: str) -> Iterator[None]:
    """What computes CUDA layers; float32 may be rounded to TF32, without which these kernels do not take it."""
    with tf32(rnn=True), cuda_kernels.forced(name):
        yield


def plan(run: Run, case: Case, dtype: torch.dtype, name: str, backward: bool = False) -> dict[str, Any]:
    """Of the first layer. Without a GPU: on one that the planner knows."""
    extension = loader.extension()
    on_gpu = run.device.type == "cuda"
    return extension.cuda_plan(
        device=extension.cuda_facts(run.device.index or 0) if on_gpu else extension.cuda_devices()[0],
        steps=max(case.lengths),
        batch=len(case.lengths),
        input_size=case.input_size,
        hidden_size=case.hidden_size,
        directions=case.directions,
        dtype=str(dtype).removeprefix("torch."),
        packed=case.packed,
        projected=case.proj_size > 0,
        normalised=bool(case.options and case.options.layer_norm),
        options=case.options is not None,
        backward=backward,
        kernel=name,
    )


def kernels_for(run: Run, case: Case, dtype: torch.dtype) -> list[str]:
    """Those of our kernels that take a layer."""
    plans = {name: plan(run, case, dtype, name) for name in CUDA_KERNELS}
    return [name for name, found in plans.items() if found["kernel"] == name and not found["problem"]]


# ---- of a problem


def repeated(
    run: Run, number: int, cases: tuple[Case, ...], dtypes: tuple[torch.dtype, ...]
) -> dict[str, Any]:
    kernels: Counter[str] = Counter()
    for case in cases:
        for dtype in dtypes:
            problem = Problem(case, dtype, run.device)
            for name in kernels_for(run, case, dtype):
                what = f"{name}, {case}, {dtype}"
                with kernel(name):
                    first = problem.training()
                    for i in range(run.count(number)):
                        assert_same_bits(problem.training(), first, f"{what}, repeat {i}")
                    assert_same_bits(problem.inference(), problem.inference(), f"{what}, inference")
                kernels[name] += 1
    return {"repeats": run.count(number), "kernels": dict(kernels)}


def on_two_streams(run: Run, problems: Sequence[Problem], what: str) -> None:
    """Each problem on a stream of its own gives what it gives alone."""
    alone = [p.training() for p in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    for i in range(run.count(50)):
        torch.cuda.synchronize()
        results = []
        for problem, stream in zip(problems, streams, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(100_000)
                results.append(problem.training())
        torch.cuda.synchronize()
        for result, expected in zip(results, alone, strict=True):
            assert_same_bits(result, expected, f"{what} on two streams, repeat {i}")


def captured(compute: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = compute()
    return graph, results


def replayed(run: Run, problem: Problem, compute: Callable[[], list[Tensor]], what: str) -> None:
    """Captured with these numbers, replayed with others: each replay gives what an uncaptured call gives."""
    graph, results = captured(compute)
    generator = torch.Generator(problem.x.device).manual_seed(5)
    for i in range(run.count(20)):
        with torch.no_grad():
            for leaf in problem.leaves:
                leaf.copy_(torch.randn(leaf.shape, generator=generator, device=leaf.device) * 0.3)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits([t.clone() for t in results], compute(), f"{what}, replay {i}")
