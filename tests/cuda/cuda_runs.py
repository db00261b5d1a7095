"""What the checks of cuda_checks.py and cuda_persistent_checks.py share: their list, how they are run, and repeats and
graphs of a problem."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cuda_problems import Problem, assert_same_bits
from matrix.cases import Case
from torch import Tensor


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


def check(function: Callable[[Run], dict[str, Any] | None]) -> Callable[[Run], dict[str, Any] | None]:
    CHECKS[function.__name__] = function
    return function


def gpu_check(function: Callable[[Run], dict[str, Any] | None]) -> Callable[[Run], dict[str, Any] | None]:
    ON_GPUS_ONLY.add(function.__name__)
    return check(function)


def perform(name: str, run: Run) -> dict[str, Any]:
    start = time.perf_counter()
    result: dict[str, Any] = {"check": name}
    if name in ON_GPUS_ONLY and run.device.type != "cuda":
        return result | {"result": "not run", "reason": f"not on {run.device.type}"}
    try:
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


# ---- of a problem


def repeated(
    run: Run, number: int, cases: tuple[Case, ...], dtypes: tuple[torch.dtype, ...]
) -> dict[str, Any]:
    for case in cases:
        for dtype in dtypes:
            problem = Problem(case, dtype, run.device)
            first = problem.training()
            for i in range(run.count(number)):
                assert_same_bits(problem.training(), first, f"{case}, {dtype}, repeat {i}")
            assert_same_bits(problem.inference(), problem.inference(), f"{case}, {dtype}, inference")
    return {"repeats": run.count(number), "cases": len(cases) * len(dtypes)}


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
