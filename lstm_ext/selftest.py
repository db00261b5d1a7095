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
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .layer import cuda_kernels
from .native import config, loader, selftest_record

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TF32_EPS = 2.0**-10
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    steps: int = 9
    batch: int = 5
    input_size: int = 20
    hidden_size: int = 24
    proj_size: int = 0
    bidirectional: bool = False
    lengths: tuple[int, ...] | None = None  # lengths of packed data: falling, one for each sequence
    bias: bool = True
    states: bool = True  # whether h0 and c0 are given
    batch_first: bool = False  # layout in memory; the operators get a transposed view

    @property
    def batch_sizes(self) -> Tensor | None:
        if self.lengths is None:
            return None
        return torch.tensor([sum(length > t for length in self.lengths) for t in range(self.lengths[0])])


PACKED = (9, 9, 6, 4, 1)
CASES = (
    Case("dense"),
    Case("one step", steps=1, batch=1),
    Case("larger", steps=20, batch=33, input_size=70, hidden_size=136),
    Case("wide", steps=4, hidden_size=520),
    Case("rows that begin anywhere", batch=18, hidden_size=67),
    Case("no biases, no initial states", bias=False, states=False),
    Case("batch-first strides", batch_first=True),
    Case("packed", lengths=PACKED),
    Case("bidirectional", bidirectional=True),
    Case("projection", proj_size=10),
    Case("packed, bidirectional, projection", lengths=PACKED, bidirectional=True, proj_size=10),
)
# And of a GPU: every way in which its kernels divide the work.
CUDA_CASES = (
    Case("several tiles of rows", steps=3, batch=70, hidden_size=520),
    Case("weights that registers do not hold", steps=3, batch=4, hidden_size=1040),
    Case("blocks on every multiprocessor", steps=3, batch=512, hidden_size=64, bidirectional=True),
    Case("that wait for each other", steps=3, batch=40, hidden_size=1024),
    Case("several launches", lengths=(300, 270, 260, 2, 1)),
)


# Also on another stream and in a graph: those of the first two that a kernel has.
CAPTURED = ("packed, bidirectional, projection", "bidirectional")


@functools.cache
def _numbers(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The arguments by name, rounded to the dtype and held in float64, and a gradient for each result."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).double()

    directions = 2 if case.bidirectional else 1
    hidden, state = case.hidden_size, case.proj_size or case.hidden_size
    if case.lengths is not None:
        rows: tuple[int, ...] = (sum(case.lengths),)
    else:
        rows = (case.batch, case.steps) if case.batch_first else (case.steps, case.batch)
    arguments = {"input": draw(*rows, case.input_size)}
    if case.states:
        arguments |= {"h0": draw(directions, case.batch, state), "c0": draw(directions, case.batch, hidden)}
    for suffix in ("", "_reverse")[:directions]:
        scale = hidden**-0.5
        arguments["weight_ih" + suffix] = draw(4 * hidden, case.input_size, scale=scale)
        arguments["weight_hh" + suffix] = draw(4 * hidden, state, scale=scale)
        if case.bias:
            arguments["bias_ih" + suffix] = draw(4 * hidden, scale=scale)
            arguments["bias_hh" + suffix] = draw(4 * hidden, scale=scale)
        if case.proj_size:
            arguments["weight_hr" + suffix] = draw(state, hidden, scale=scale)
    grads = [
        draw(*rows, directions * state),
        draw(directions, case.batch, state),
        draw(directions, case.batch, hidden),
    ]
    return arguments, grads


class Problem:
    """One layer to compute. The arguments hold zeros until `fill`, which exposes a kernel that reads them too early."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        arguments, grads = _numbers(case, dtype)
        self.case = case
        self.numbers = {name: value.to(device, dtype) for name, value in arguments.items()}
        self.arguments = {
            name: torch.zeros_like(value).requires_grad_() for name, value in self.numbers.items()
        }
        self.grads = [grad.to(device, dtype) for grad in grads]

    def fill(self) -> None:
        with torch.no_grad():
            for name, argument in self.arguments.items():
                argument.copy_(self.numbers[name])

    def compute(self, layer: Callable[..., Any]) -> Results:
        """The results of inference, the results of training, and the gradients."""
        case = self.case

        def run() -> list[Tensor]:
            named = dict(self.arguments)
            input, h0, c0 = named.pop("input"), named.pop("h0", None), named.pop("c0", None)
            if case.batch_first:
                input = input.transpose(0, 1)
            weights = list(named.values())
            output, *states = layer(input, h0, c0, weights, case.batch_sizes, case.bias, case.bidirectional)
            return [output.transpose(0, 1) if case.batch_first else output, *states]

        with torch.no_grad():
            inference = run()
        training = run()
        gradients = torch.autograd.grad(training, list(self.arguments.values()), self.grads)
        names = ("output", "h_n", "c_n")
        results = {f"{name} in inference": t for name, t in zip(names, inference, strict=True)}
        results |= {name: t.detach() for name, t in zip(names, training, strict=True)}
        return results | {f"grad of {n}": g for n, g in zip(self.arguments, gradients, strict=True)}


def _operator(*arguments: Any) -> Any:
    return torch.ops.lstm_ext.lstm_layer(*arguments)[:3]  # without options it has no other results


@functools.cache
def _expected(case: Case, dtype: torch.dtype) -> tuple[Results, dict[str, float]]:
    """The expected results in float64, and the errors of the reference at the dtype."""
    cpu = torch.device("cpu")
    exact, rounded = Problem(case, dtype, cpu), Problem(case, dtype, cpu)
    exact.numbers = _numbers(case, dtype)[0]
    exact.arguments = {name: value.clone().requires_grad_() for name, value in exact.numbers.items()}
    exact.grads = _numbers(case, dtype)[1]
    rounded.fill()
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # small products: on a busy machine, threads that wait for each other are far slower
    try:
        ref, at_dtype = exact.compute(reference.lstm_layer), rounded.compute(reference.lstm_layer)
    finally:
        torch.set_num_threads(threads)
    return ref, {name: _error(at_dtype[name], ref[name]) for name in ref}


def _error(out: Tensor, ref: Tensor) -> float:
    out = out.detach().cpu().double()
    if out.shape != ref.shape:
        return math.inf
    error = torch.linalg.vector_norm(out - ref).item() / max(torch.linalg.vector_norm(ref).item(), 1e-30)
    return error if math.isfinite(error) else math.inf


@dataclass(frozen=True)
class Verdict:
    passed: bool
    text: str


def judge(results: Results, case: Case, dtype: torch.dtype, eps: float | None = None) -> Verdict:
    """The verdict by the tensor whose error is the largest share of what is allowed."""
    ref, errors_of_reference = _expected(case, dtype)
    eps = torch.finfo(dtype).eps if eps is None else eps
    worst, text = 0.0, ""
    for name, expected in ref.items():
        allowed = 64 * eps if dtype == torch.float64 else 2 * errors_of_reference[name] + 4 * eps
        if results[name].dtype != dtype:
            return Verdict(False, f"{name} has dtype {results[name].dtype}")
        error = _error(results[name], expected)
        if not text or error / allowed > worst:
            worst, text = error / allowed, f"error {error:.1e}, allowed {allowed:.1e} ({name})"
    return Verdict(worst <= 1, text)


# ---- the ways to run a problem


def _plainly(problem: Problem) -> Results:
    problem.fill()
    return problem.compute(_operator)


def _on_a_stream(problem: Problem) -> Results:
    """Fills the arguments on a stream that is busy at first. A kernel on another stream would read the zeros."""
    device = next(iter(problem.numbers.values())).device
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        problem.fill()
        results = problem.compute(_operator)
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
                problem.compute(_operator)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = problem.compute(_operator)
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
            for dtype, case in itertools.product(DTYPES, CASES):
                yield _check(capability, case, dtype, torch.device("cpu"))
    finally:
        module.set_cpu_capability(before)


def cuda_checks(device: torch.device) -> Iterator[Check]:
    """The checks of each kernel; except for `stepwise`, only of layers that it can compute."""
    requests = [("stepwise", "stepwise")]
    requests += [(kernel, name) for kernel, names in config.TRIED_CUDA_KERNELS.items() for name in names]
    for kernel, request in requests:
        fused = kernel != "stepwise"
        all_cases = CASES + (CUDA_CASES if device.type == "cuda" else ())  # the emulator would take hours
        cases = [case for case in all_cases if not (fused and case.proj_size)]
        dtypes = [t for t in DTYPES if not fused or t in (torch.bfloat16, torch.float16)]
        note_of = "" if request == kernel else f", {request}"
        in_tf32 = cuda_kernels.variant(kernel, torch.float32)
        for dtype, case in itertools.product(dtypes, cases):
            yield _check(kernel, case, dtype, device, kernel=request, note=note_of)
        for case in cases:
            yield _check(
                in_tf32,
                case,
                torch.float32,
                device,
                note=f"{note_of}, TF32",
                precision="tf32",
                kernel=request,
            )
        for dtype in dtypes:
            for how, note in (
                (_on_a_stream, ", on another stream"),
                (_in_a_graph, ", captured and replayed"),
            ):
                for case in cases:
                    if case.name in CAPTURED:
                        yield _check(kernel, case, dtype, device, how, note_of + note, kernel=request)


def run(device: torch.device, checks: Iterator[Check]) -> bool:
    """Prints a line for each check and records the result. Returns whether all passed."""
    good: dict[str, bool] = {}
    count = failures = 0
    for check in checks:
        try:
            verdict = check.run()
        except Exception as error:  # any error becomes a line of the report, and the other checks go on
            verdict = Verdict(False, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        good[check.variant] = good.get(check.variant, True) and verdict.passed
        count += 1
        failures += not verdict.passed
        print(
            f"{'ok' if verdict.passed else 'FAILED':<7}{check.variant:<10}{check.name:<66}{verdict.text}",
            flush=True,
        )
    passed = [variant for variant, is_good in good.items() if is_good]
    try:
        selftest_record.write(device, passed, [variant for variant in good if variant not in passed])
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
