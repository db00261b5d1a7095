"""The CUDA kernels: which one is requested, whether a device runs them, and whether they have been right there.

A kernel computes for users only after it was correct once on their device. `may_run` finds that out in the first eager
call. A record of ``python -m lstm_ext.selftest``, or of an earlier first use, for this device, driver and build
decides. Without one `choose` compares ``stepwise`` with the equations in float64, then ``step`` and ``persistent`` with
``stepwise``, on small random layers, and records the outcomes. The choice holds for the life of the process. Until
``stepwise`` has been right, torch's operator and the equations compute.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..native import config, loader, selftest_record
from ..native.integrations import constant_for_dynamo
from . import equations
from .layer_call import LayerCall, LayerOptions
from .tracing import in_a_thread
from .trial import TF32_EPS, TRIED_CASES, Case, Problem, Results, judge

# ---- requests


def requested() -> str:
    """The kernel that computes, and why.

    Raises:
        ValueError: LSTM_EXT_CUDA_KERNEL names no kernel of this release.
    """
    kernel = config.requested_cuda_kernel()
    if kernel == "auto":
        return "auto: of those that have been right here, the one measured fastest, else persistent, step, stepwise"
    others = "; options that torch lacks as with auto" if kernel == "torch" else ""
    return f"{kernel}: LSTM_EXT_CUDA_KERNEL={kernel}{others}"


_forced: Counter[str] = Counter()  # contexts of `forced`, in all threads, by kernel
deciding_anew = 0  # contexts of `decide_anew`, in all threads
_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def forced(kernel: str) -> Iterator[None]:
    """The kernel that runs CUDA tensors, in all threads, whatever the environment says. "auto": any of ours.

    Torch's operator, which may be faster, does not take its place.
    """
    extension = loader.extension()
    with decide_anew():
        with _one_at_a_time:
            _forced[kernel] += 1
        try:
            if extension is not None and kernel != "auto":
                extension.set_cuda_kernel(kernel)
            yield
        finally:
            if extension is not None and kernel != "auto":
                extension.set_cuda_kernel("")
            with _one_at_a_time:
                _forced[kernel] -= 1


@contextlib.contextmanager
def decide_anew() -> Iterator[None]:
    """In this context no thread takes what an earlier call has decided."""
    global deciding_anew
    with _one_at_a_time:
        deciding_anew += 1
    try:
        yield
    finally:
        with _one_at_a_time:
            deciding_anew -= 1


def is_requested() -> bool:
    """Whether one kernel has to run: by `forced`, or by LSTM_EXT_CUDA_KERNEL."""
    forced = list(_forced.items())  # other threads add to it
    asked = config.requested_cuda_kernel() not in ("auto", "torch")
    return asked or any([n > 0 for name, n in forced if name != "auto"])


@constant_for_dynamo
def is_forced() -> bool:
    """Whether one kernel has to run, or any of ours."""
    return is_requested() or _forced["auto"] > 0


def check_waits(device: int | str | torch.device | None = None) -> None:
    """Raises if a wait within a persistent CUDA kernel has expired. Call it after the replay of a CUDA graph.

    The results of that launch are NaN then. A call of a layer checks this itself; a replay makes no calls. This
    function does not synchronise, so synchronise first.

    Args:
        device: a CUDA device; None is the current one.

    Raises:
        RuntimeError: a wait has expired since the last call or check on this device.
    """
    extension = loader.extension()
    if extension is None or not torch.cuda.is_available():
        return
    found = torch.device("cuda" if device is None else device)
    index = torch.cuda.current_device() if found.index is None else found.index
    if extension.cuda_wait_expired(index):
        raise RuntimeError(
            f"lstm_ext: on cuda:{index} a block of a kernel that does all steps at once waited for another one longer "
            "than LSTM_EXT_CUDA_WAIT_LIMIT allows, and all results of that launch are NaN"
        )


# ---- devices


@functools.cache
def has_gpu() -> bool:
    """Whether torch finds a GPU. Each call of a layer asks; torch's own query takes longer."""
    return torch.cuda.is_available()


_problems: dict[int | None, str | None] = {}


def problem(index: int | None) -> str | None:
    """Why there are no kernels for this device, or None."""
    if index not in _problems:
        _problems[index] = _find_problem(index)
    return _problems[index]


def _find_problem(index: int | None) -> str | None:
    status = loader.status()
    if status.cuda is None:
        return status.reason or status.cuda_reason or "the extension was built without CUDA"
    if not has_gpu():
        return None  # the tensors are fake, and so are the kernels
    capability = torch.cuda.get_device_capability(index)
    reason = unsupported(capability, status.cuda)
    if reason is None:
        return None
    return f"{torch.cuda.get_device_name(index)} has compute capability {_text(capability)}: {reason}"


def unsupported(capability: tuple[int, int], built: str) -> str | None:
    """Why a GPU does not run the kernels that ``built`` describes ("13.0 for 8.0 9.0+PTX"), or None."""
    if capability < config.OLDEST_CAPABILITY:
        return f"the kernels need compute capability {_text(config.OLDEST_CAPABILITY)} or later"
    architectures = built.partition(" for ")[2].split()
    if architectures and not any([_runs(capability, architecture) for architecture in architectures]):
        return (
            f"the extension was built for {' '.join(architectures)}: "
            f"rebuild it with TORCH_CUDA_ARCH_LIST={_text(capability)}"
        )
    return None


def _text(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _runs(capability: tuple[int, int], architecture: str) -> bool:
    parts = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", architecture)
    if parts is None:
        return True  # a name, e.g. Hopper, for a list that only torch has
    built = (int(parts[1]), int(parts[2]))
    if parts[3]:
        return capability == built
    # Machine code runs on later GPUs of the same generation, PTX on all later ones.
    return built <= capability and (capability[0] == built[0] or parts[4] is not None)


# ---- right on a device

NOT_RIGHT = "the kernels have not been right on this device; the first call of a layer checks them"
_chosen: dict[int | None, bool] = {}  # whether the kernels may run at all
_found: dict[tuple[int | None, str], bool | None] = {}  # in this process, by device and variant


@constant_for_dynamo
def may_run(index: int | None) -> bool:
    """Whether our kernels may compute on a CUDA device: it runs them, and they have been right there.

    The first call tries them; see `choose`. True without a GPU, where tensors are fake, and so are the kernels.
    """
    known = _chosen.get(index)
    if known is None:
        known = problem(index) is None and (
            index is None or not has_gpu() or choose(torch.device("cuda", index))
        )
    return known


def why_not(index: int | None) -> str | None:
    """Why our kernels may not compute on a CUDA device, or None. It tries nothing."""
    device = torch.device("cuda" if index is None else f"cuda:{index}")
    return problem(index) or (None if _is_known_right(device) else NOT_RIGHT)


def choose(device: torch.device) -> bool:
    """Whether kernels may run on a CUDA device. Lets `auto` use those that were correct there.

    While a graph is captured, and within a backward pass, it tries nothing: then a later call does it. What could not
    be tried, for example for want of memory, the next process tries.

    Raises:
        ValueError: an environment variable has an invalid value.
    """
    index = device.index
    known = _chosen.get(index)
    if known is not None:
        return known
    wanted = config.checks_cuda_kernels()
    if is_requested():
        return True
    if not may_try():
        return _is_known_right(device)
    with _one_at_a_time:
        if index not in _chosen:
            _chosen[index] = in_a_thread(device, lambda: _choose(device, wanted))
        return _chosen[index]


def may_try() -> bool:
    """Whether this thread may run kernels of its own: it captures no graph, and autograd, whose thread for the device a
    check needs too, does not wait for it."""
    return not torch.cuda.is_current_stream_capturing() and torch._C._current_graph_task_id() == -1


def _choose(device: torch.device, wanted: bool) -> bool:
    stepwise = _right(device, "stepwise", _ALL_DTYPES, wanted)
    if not stepwise:
        if wanted:
            return False
        loader.warn(
            f"lstm_ext: no kernel has been checked on {device}, and LSTM_EXT_CUDA_CHECK=0: torch's own operator "
            "computes there. `python -m lstm_ext.selftest --device cuda` checks them."
        )
        return False
    for kernel, dtypes in itertools.product(config.TRIED_CUDA_KERNELS, _DTYPES):
        if _right(device, kernel, dtypes, wanted):
            loader.extension().set_cuda_validated(device.index, kernel, dtypes[0] == torch.float32, True)
    return True


def _right(device: torch.device, kernel: str, dtypes: Sequence[torch.dtype], wanted: bool) -> bool | None:
    """Whether a kernel is right, by an earlier outcome, or by a check if one is wanted. None if that is unknown."""
    passed = outcome(device, kernel, dtypes[0])
    if passed is None and wanted:
        passed = _found[device.index, variant(kernel, dtypes[0])] = _tried(device, kernel, dtypes)
    return passed


def _is_known_right(device: torch.device) -> bool:
    """The same as `choose`, without a check."""
    known = _chosen.get(device.index)
    return is_requested() or bool(outcome(device, "stepwise", torch.float64) if known is None else known)


def variant(kernel: str, dtype: torch.dtype) -> str:
    """The name of a kernel in records, for tensors of this dtype."""
    return f"{kernel}-tf32" if dtype == torch.float32 and kernel != "stepwise" else kernel


def outcome(device: torch.device, kernel: str, dtype: torch.dtype) -> bool | None:
    """Whether a kernel was correct for tensors of this dtype. None if it was not tried.

    The user's record of this device and build decides, then a result of this release for its compute capability, then
    what this process has found and may have been unable to record.
    """
    name = variant(kernel, dtype)
    for entry in (selftest_record.find(device), selftest_record.find_committed(device)):
        for found, outcomes in ((True, "passed"), (False, "failed")):
            if entry and name in (entry.get(outcomes) or []):
                return found
    return _found.get((device.index, name))


def _tried(device: torch.device, kernel: str, dtypes: Sequence[torch.dtype]) -> bool | None:
    """Tries a kernel and records the outcome. None if it could not be tried."""
    name = variant(kernel, dtypes[0])
    passed, reason = None, ""
    try:
        with torch.cuda.device(device):
            for limit in WAIT_LIMITS:
                passed, reason = check(device, kernel, dtypes, limit)
                if passed is not None or not reason:
                    break
    except Exception as error:
        # For example no memory. It must not make a layer's first call fail.
        passed, reason = None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if passed is not None:
        try:
            selftest_record.add(device, name, passed)
        except (OSError, RuntimeError):
            pass  # the next process tries it again
    if passed is False:
        said = f"it was wrong: {reason}. Please report it with what `python -m lstm_ext.selftest --device cuda` prints."
    elif passed is None and reason:
        said = f"it could not be tried: {reason}"
    else:
        return passed
    loader.warn(f"lstm_ext: the CUDA kernel {name!r} is not used on {device}: {said}")
    return passed


# ---- a check

CASES = TRIED_CASES
LIMIT = 0.2  # seconds for the repeats of a variant
REPEATS = 200  # repeats of one layer, with the same bits each time; fewer if LIMIT is over,
FEWEST_REPEATS = 20  # but at least so many
# Seconds that a block waits for another one. A wait that expires is no verdict, since the GPU may be busy with
# something else: the check begins anew with the next limit.
WAIT_LIMITS = (0.05, 2.0)
# The dtypes that are tried, recorded and chosen together, for each kernel.
_ALL_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_DTYPES = ((torch.bfloat16, torch.float16), (torch.float32,))


def check(
    device: torch.device, kernel: str, dtypes: Sequence[torch.dtype], limit: float
) -> tuple[bool | None, str]:
    """Whether a kernel computes the same as ``stepwise``, values and gradients, with the same bits in each repeat.

    ``stepwise`` itself is compared with the equations in float64. None if that could not be found out. The text gives
    the reason for False and None. ``limit`` is that of a wait, in seconds.
    """
    kernels = loader.extension()
    kernels.set_cuda_wait_limit_of_thread(limit)
    try:
        for dtype in dtypes:
            problems = [Problem(case, dtype, device) for case in CASES]
            for problem in problems:
                if kernel == "stepwise":
                    expected = _by_equations(problem.case, dtype, device)
                else:
                    kernels.set_cuda_kernel_of_thread("stepwise")
                    expected = _by_kernels(kernels, problem)
                kernels.set_cuda_kernel_of_thread(kernel)
                found = _by_kernels(kernels, problem)
                verdict = judge(found, expected, dtype, TF32_EPS if dtype == torch.float32 else None)
                if kernels.cuda_wait_expired(device.index):
                    return None, f"{dtype}: a block waited for another one in vain for {limit} s"
                if not verdict.passed:
                    return False, f"{dtype}: {verdict.name} is {verdict.error:.1e} off"
            expected = _by_kernels(kernels, problems[0])
            same = torch.ones((), dtype=torch.bool, device=device)
            begin = time.monotonic()
            for done in range(REPEATS):
                if time.monotonic() - begin > LIMIT:
                    if done < FEWEST_REPEATS:
                        return None, ""
                    break
                found = _by_kernels(kernels, problems[0])
                same &= torch.stack([(found[name] == expected[name]).all() for name in found]).all()
            if not same.item():
                return False, f"{dtype}: it did not give the same bits each time"
    finally:
        kernels.set_cuda_kernel_of_thread("")
        kernels.set_cuda_wait_limit_of_thread(None)
        kernels.cuda_wait_expired(device.index)  # clears it, so that nobody else reports it
    return True, ""


def _by_kernels(kernels: Any, problem: Problem) -> Results:
    """Without autograd, whose threads do not have this thread's request."""
    options = kernels.LayerOptions(**problem.options) if problem.options else None
    call, count = (*problem.call(problem.numbers), options), len(problem.numbers)
    *results, _, _, saved = kernels.lstm_layer_forward(*call, True)
    needs_grad = [True] * count + [False, False]
    grads = (*problem.grads, None, None)
    gradients = kernels.lstm_layer_backward(*call, *grads, results[0], saved, needs_grad)
    return problem.named(results, gradients[:count])


def _by_equations(case: Case, dtype: torch.dtype, device: torch.device) -> Results:
    """In float64."""
    problem = Problem(case, dtype, device, in_float64=True).fill()
    options = LayerOptions(**problem.options)
    return problem.compute(lambda *call: equations.lstm_layer(LayerCall(*call, options))[:3])
