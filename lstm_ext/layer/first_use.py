"""The first use of a CUDA kernel on a device: a kernel computes for users only after it was correct there once.

`choose` runs in the first eager call on a device. A record of ``python -m lstm_ext.selftest``, or of an earlier first
use, for this device, driver and build decides. Without one it compares the kernels ``step`` and ``persistent`` with
``stepwise`` on small random layers, and records the outcomes. The choice holds for the life of the process.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..native import config, cuda, loader, selftest_record

__all__ = ["LIMIT", "REPEATS", "check", "choose", "outcome"]

LIMIT = 0.2  # seconds for the repeats of a variant
REPEATS = 200  # repeats of one layer, with the same bits each time; fewer if LIMIT is over,
FEWEST_REPEATS = 20  # but at least so many
WAIT_LIMIT = 0.05  # seconds that a block waits for another one
# The dtypes that are tried, recorded and chosen together, for each kernel.
_DTYPES = ((torch.bfloat16, torch.float16), (torch.float32,))
_chosen: set[int | None] = set()
_found: dict[tuple[int | None, str], bool | None] = {}  # in this process, by device and variant


@dataclass(frozen=True)
class _Problem:
    batch: int
    hidden_size: int
    steps: int = 4
    bidirectional: bool = False
    packed: bool = False
    options: bool = False


PROBLEMS = (
    _Problem(5, 520),  # more tiles than stages, in both passes; blocks that wait for each other
    _Problem(33, 67, bidirectional=True, packed=True),  # rows that begin at any step, and many of them
    _Problem(18, 40, options=True),
    _Problem(3, 40, steps=1),
    _Problem(2, 24, steps=260, packed=True),  # more packed steps than one launch takes
)


def choose(device: torch.device) -> None:
    """Lets `auto` use ``step`` and ``persistent`` on a CUDA device if they were correct there.

    Not while a graph is captured: then a later call does it.

    Raises:
        ValueError: an environment variable has an invalid value.
    """
    index = device.index
    if index in _chosen:
        return
    cuda.use_measured_constants()
    wanted, is_free = config.cuda_check_wanted(), config.requested_cuda_kernel() == "auto"
    if is_free and torch.cuda.is_current_stream_capturing():
        return
    _chosen.add(index)
    if not is_free:
        return
    for kernel, dtypes in itertools.product(config.TRIED_CUDA_KERNELS, _DTYPES):
        passed = cuda.outcome(device, kernel, dtypes[0])
        if passed is None and wanted:
            passed = _found[index, cuda.variant(kernel, dtypes[0])] = _tried(device, kernel, dtypes)
        if passed:
            loader.extension().set_cuda_validated(index, kernel, dtypes[0] == torch.float32, True)


def outcome(device: torch.device, kernel: str, dtype: torch.dtype) -> bool | None:
    """Whether a kernel was correct for tensors of this dtype, by a record or by this process. None if it was not tried.

    This process may have been unable to record its own result.
    """
    recorded = cuda.outcome(device, kernel, dtype)
    return _found.get((device.index, cuda.variant(kernel, dtype))) if recorded is None else recorded


def _tried(device: torch.device, kernel: str, dtypes: Sequence[torch.dtype]) -> bool | None:
    """Tries a kernel and records the outcome. None if it could not be tried."""
    variant = cuda.variant(kernel, dtypes[0])
    try:
        with torch.cuda.device(device):
            passed, reason = check(device, kernel, dtypes)
    except Exception as error:
        # For example no memory. It must not make a layer's first call fail.
        passed, reason = None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if passed is not None:
        try:
            selftest_record.add(device, variant, passed)
        except (OSError, RuntimeError):
            pass  # the next process tries it again
    if passed is False:
        said = f"it was wrong: {reason}. Please report it with what `python -m lstm_ext.selftest --device cuda` prints."
    elif passed is None and reason:
        said = f"it could not be tried: {reason}"
    else:
        return passed
    warnings.warn(
        f"lstm_ext: the CUDA kernel {variant!r} is not used on {device}: {said}", RuntimeWarning, stacklevel=2
    )
    return passed


def check(device: torch.device, kernel: str, dtypes: Sequence[torch.dtype]) -> tuple[bool | None, str]:
    """Whether a kernel computes the same as ``stepwise``, values and gradients, with the same bits in each repeat.

    None if there was no time to find out. The text gives the reason for False.
    """
    kernels = loader.extension()
    kernels.set_cuda_wait_limit_of_thread(WAIT_LIMIT)
    try:
        for dtype in dtypes:
            calls = [_call(problem, dtype, device) for problem in PROBLEMS]
            for call in calls:
                kernels.set_cuda_kernel_of_thread("stepwise")
                expected = _results(kernels, call)
                for request in config.TRIED_CUDA_KERNELS[kernel]:
                    kernels.set_cuda_kernel_of_thread(request)
                    wrong = _differences(_results(kernels, call), expected, dtype)
                    if kernels.cuda_wait_expired(device.index):
                        return False, f"{dtype}: a block waited for another one in vain"
                    if wrong:
                        return False, f"{dtype}: {wrong}"
            expected = _results(kernels, calls[0])
            same = torch.ones((), dtype=torch.bool, device=device)
            begin = time.monotonic()
            for done in range(REPEATS):
                if time.monotonic() - begin > LIMIT:
                    if done < FEWEST_REPEATS:
                        return None, ""
                    break
                found = _results(kernels, calls[0])
                same &= torch.stack([(found[name] == expected[name]).all() for name in found]).all()
            if not same.item():
                return False, f"{dtype}: it did not give the same bits each time"
    finally:
        kernels.set_cuda_kernel_of_thread("")
        kernels.set_cuda_wait_limit_of_thread(None)
        kernels.cuda_wait_expired(device.index)  # clears it, so that nobody else reports it
    return True, ""


def _call(problem: _Problem, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """The arguments of the layer. They come from a generator of their own: torch's random state stays as it is."""
    generator = torch.Generator().manual_seed(7)
    T, H, B, D = problem.steps, problem.hidden_size, problem.batch, 2 if problem.bidirectional else 1

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device="cpu") * scale).to(device, dtype)

    sizes = torch.tensor([B] * (T - 2) + [B // 2, 1], device="cpu") if problem.packed else None
    rows = (int(sizes.sum()),) if sizes is not None else (T, B)
    weights = []
    for _ in range(D):
        weights += [draw(4 * H, 12, scale=H**-0.5), draw(4 * H, H, scale=H**-0.5)]
        weights += [draw(4 * H, scale=H**-0.5), draw(4 * H, scale=H**-0.5)]
    states = draw(D, B, H), draw(D, B, H)
    options = None
    if problem.options:
        mask = (torch.rand(D, B, H, generator=generator, device="cpu") < 0.7).float() / 0.7
        lengths = torch.arange(B, device="cpu") % (T + 1)
        options = loader.extension().LayerOptions(
            recurrent_mask=mask.to(device), lengths=lengths.to(device), zoneout_c=0.1
        )
    return (draw(*rows, 12), *states, weights, sizes, True, problem.bidirectional, options)


def _results(kernels: Any, call: tuple[Any, ...]) -> dict[str, Tensor]:
    output, h_n, c_n, _, _, saved = kernels.lstm_layer_forward(*call, True)
    grads = (
        torch.sin(output.float()).to(output.dtype),
        torch.ones_like(h_n),
        torch.ones_like(c_n),
        None,
        None,
    )
    needs_grad = [True] * (3 + len(call[3])) + [False, False]
    gradients = kernels.lstm_layer_backward(*call, *grads, output, saved, needs_grad)
    named = {f"gradient {i}": g for i, g in enumerate(gradients) if g is not None}
    return {"output": output, "h_n": h_n, "c_n": c_n, **named}


def _differences(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> str:
    """The first result that differs by more than the rounding of another summation order, or an empty text."""
    eps = 2.0**-10 if dtype == torch.float32 else torch.finfo(dtype).eps
    names = list(expected)
    distances = torch.stack(
        [
            torch.linalg.vector_norm(found[n].double() - expected[n].double())
            / torch.linalg.vector_norm(expected[n].double()).clamp_min(1e-30)
            for n in names
        ]
    )
    for name, distance in zip(names, distances.tolist(), strict=True):
        if not distance <= 4 * eps:  # also true for NaN
            return f"{name} is {distance:.1e} off"
    return ""
