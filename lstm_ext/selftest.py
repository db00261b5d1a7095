"""python -m lstm_ext.selftest [--device cpu|cuda]: checks every kernel variant on this machine's devices.

Each line is one check: it compares the values and all gradients of one layer, computed by the registered operators,
with ``lstm_ext.reference`` in float64. The error is ``|out - ref| / |ref|``, in 2-norms. The reference in the layer's
own dtype has an error too: the kernels may have twice that, plus 4 eps. In float64, where the reference is no more
exact than the kernels, they may have 64 eps. The exit code is 1 if a check fails. The result is recorded for this user
and device.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import reference
from .layer import cuda_kernels, trial
from .layer.layer_call import LayerOptions
from .layer.trial import CASES, GRU_CASES, TF32_EPS, TRIED_CASES, Case, Problem, Results, Verdict, errors
from .native import config, loader, selftest_record

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Also on another stream and in a graph: those of the first two that a kernel has.
CAPTURED = ("packed, bidirectional, projection", "bidirectional")


def compute(problem: Problem, layer: Callable[..., Any]) -> Results:
    """The results of inference, the results of training, and the gradients."""
    layer = functools.partial(layer, gru=True) if problem.case.gru else layer
    with torch.no_grad():
        inference = problem.values(layer)
    names = ("output", "h_n", "c_n")
    results = {f"{name} in inference": t for name, t in zip(names, inference, strict=False)}
    return results | problem.compute(layer)


def _operator(*arguments: Any, **options: Any) -> Any:
    return torch.ops.lstm_ext.lstm_layer(*arguments, **options)[:3]  # without options it has no other results


def _reference(*arguments: Any, **options: Any) -> Any:
    layer: Any = reference.lstm_layer
    return layer(*arguments, LayerOptions(**options))[:3]


@functools.cache
def _expected(case: Case, dtype: torch.dtype) -> tuple[Results, dict[str, float]]:
    """The expected results in float64, and the errors of the reference at the dtype."""
    cpu = torch.device("cpu")
    exact, rounded = (Problem(case, dtype, cpu, in_float64=wide).fill() for wide in (True, False))
    threads = torch.get_num_threads()
    # Products are small: on a busy machine, threads that wait for each other are far slower.
    torch.set_num_threads(1)
    try:
        expected = compute(exact, _reference)
        return expected, errors(compute(rounded, _reference), expected)
    finally:
        torch.set_num_threads(threads)


def judge(results: Results, case: Case, dtype: torch.dtype, eps: float | None = None) -> Verdict:
    expected, rounding = _expected(case, dtype)
    return trial.judge(results, expected, dtype, eps, rounding)


# ---- the ways to run a problem


def _plainly(problem: Problem) -> Results:
    problem.fill()
    return compute(problem, _operator)


def _on_a_stream(problem: Problem) -> Results:
    """Fills the arguments on a stream that is busy at first. A kernel on another stream would read the zeros."""
    device = next(iter(problem.numbers.values())).device
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        problem.fill()
        results = compute(problem, _operator)
    stream.synchronize()
    return results


def _in_a_graph(problem: Problem) -> Results:
    """Captures a graph with zeros in the arguments, replays it with them and then with the numbers."""
    device = next(iter(problem.numbers.values())).device
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                compute(problem, _operator)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = compute(problem, _operator)
        graph.replay()
        problem.fill()
        graph.replay()
        torch.cuda.synchronize()
    return results


@contextlib.contextmanager
def _fp32_precision(value: str) -> Iterator[None]:
    places: tuple[Any, ...] = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = value
    try:
        yield
    finally:
        for place, old in zip(places, before, strict=True):
            place.fp32_precision = old


@dataclass(frozen=True)
class Check:
    variant: str
    name: str
    run: Callable[[], Verdict]


def _check(
    variant: str,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    how: Callable[[Problem], Results] = _plainly,
    note: str = "",
    precision: str = "ieee",
    kernel: str = "auto",
) -> Check:
    def run() -> Verdict:
        with contextlib.ExitStack() as settings:
            if device.type == "cuda":
                settings.enter_context(_fp32_precision(precision))
                settings.enter_context(cuda_kernels.forced(kernel))
            results = how(Problem(case, dtype, device))
        return judge(results, case, dtype, TF32_EPS if precision == "tf32" else None)

    name = f"{str(dtype).removeprefix('torch.'):<9}{case.name}{note}"
    return Check(variant, name, run)


def cpu_checks() -> Iterator[Check]:
    """The checks of each instruction set; while one of them runs, its set is in use."""
    module = loader.extension()
    assert module is not None
    before = module.cpu_capability()
    try:
        for capability in module.cpu_capabilities():
            module.set_cpu_capability(capability)
            for dtype, case in itertools.product(DTYPES, (*CASES, *GRU_CASES)):
                yield _check(capability, case, dtype, torch.device("cpu"))
    finally:
        module.set_cpu_capability(before)


def cuda_checks(device: torch.device) -> Iterator[Check]:
    """The checks of each kernel; except for `stepwise`, only of layers that it can compute."""
    for kernel in config.CUDA_KERNELS:
        fused = kernel != "stepwise"
        tried = [case for case in TRIED_CASES if not case.options and case not in CASES]
        all_cases = [*CASES, *(tried if device.type == "cuda" else ())]  # the emulator would take hours
        cases = [case for case in all_cases if not (fused and case.proj_size)]
        dtypes = [t for t in DTYPES if not fused or t in (torch.bfloat16, torch.float16)]
        in_tf32 = cuda_kernels.variant(kernel, torch.float32)
        for dtype, case in itertools.product(dtypes, cases):
            yield _check(kernel, case, dtype, device, kernel=kernel)
        for case in cases:
            yield _check(
                in_tf32,
                case,
                torch.float32,
                device,
                note=", TF32",
                precision="tf32",
                kernel=kernel,
            )
        for dtype in dtypes:
            for how, note in (
                (_on_a_stream, ", on another stream"),
                (_in_a_graph, ", captured and replayed"),
            ):
                for case in cases:
                    if case.name in CAPTURED:
                        yield _check(kernel, case, dtype, device, how, note, kernel=kernel)


def run(device: torch.device, checks: Iterator[Check]) -> bool:
    """Prints a line for each check and records the result. Returns whether all passed."""
    good: dict[str, bool] = {}
    count = failures = 0
    for check in checks:
        try:
            verdict = check.run()
            passed, text = verdict.passed, str(verdict)
        except Exception as error:  # any error becomes a line of the report, and the other checks go on
            passed, text = False, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        good[check.variant] = good.get(check.variant, True) and passed
        count += 1
        failures += not passed
        print(f"{'ok' if passed else 'FAILED':<7}{check.variant:<10}{check.name:<66}{text}", flush=True)
    right = [variant for variant, is_good in good.items() if is_good]
    try:
        selftest_record.write(device, right, [variant for variant in good if variant not in right])
        recorded = f"recorded in {selftest_record.path()}"
    except (OSError, RuntimeError) as error:
        recorded = f"not recorded: {error}"
    print(f"{device}: {count - failures} of {count} checks passed; {recorded}")
    return failures == 0


def cuda_devices() -> tuple[list[torch.device], list[str]]:
    """The CUDA devices with kernels, and for each other one the reason why it has none."""
    status = loader.status()
    if not torch.cuda.is_available():
        return [], ["there is no GPU that this torch can use"]
    if status.cuda is None:
        return [], [f"the extension has no CUDA kernels: {status.cuda_reason}"]
    devices, reasons = [], []
    for i in range(torch.cuda.device_count()):
        reason = cuda_kernels.unsupported(torch.cuda.get_device_capability(i), status.cuda)
        if reason is None:
            devices.append(torch.device("cuda", i))
        else:
            reasons.append(f"{torch.cuda.get_device_name(i)}: {reason}")
    return devices, reasons


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lstm_ext.selftest", description=(__doc__ or "").partition("\n")[2]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only this kind")
    chosen = parser.parse_args().device
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the line below says the same
            module = loader.extension()
    except (ImportError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if module is None:
        print(f"there is no compiled extension: {loader.status().reason}", file=sys.stderr)
        return 1
    passed = True
    if chosen != "cuda":
        passed = run(torch.device("cpu"), cpu_checks())
    if chosen != "cpu":
        devices, reasons = cuda_devices()
        for device in devices:
            passed = run(device, cuda_checks(device)) and passed
        for reason in reasons:
            print(f"cuda: not checked: {reason}")
        if chosen == "cuda" and not devices:
            passed = False
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
