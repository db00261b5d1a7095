"""The first use of a CUDA kernel on a device: it computes for nobody before it has been right there.

`choose` runs in the first eager call on a device. A record of ``python -m lstm_ext.selftest``, or of an earlier first
use, for this device, driver and build decides. Without one it tries the kernel ``step`` beside ``stepwise`` on small
random layers, for a fifth of a second at most, and records the outcome. What is chosen holds for the life of the
process.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..native import config, loader, selftest_record

__all__ = ["LIMIT", "REPEATS", "check", "choose"]

LIMIT = 0.2  # seconds for everything
REPEATS = 200  # of one layer, which has to have the same bits each time
_VARIANT = "step"
_chosen: set[int | None] = set()


@dataclass(frozen=True)
class _Problem:
    dtype: torch.dtype
    batch: int
    hidden_size: int
    bidirectional: bool = False
    packed: bool = False


def _problems(tf32: bool) -> Iterator[_Problem]:
    for dtype in (torch.bfloat16, torch.float16, *([torch.float32] if tf32 else [])):
        yield _Problem(dtype, 5, 40)
        yield _Problem(dtype, 33, 24, bidirectional=True, packed=True)


def choose(device: torch.device) -> None:
    """Lets `auto` take ``step`` on a CUDA device where it has been right. Not while a graph is captured: then a later
    call does."""
    index = device.index
    if index in _chosen:
        return
    if config.requested_cuda_kernel() != "auto":
        _chosen.add(index)
        return
    if torch.cuda.is_current_stream_capturing():
        return
    _chosen.add(index)
    entry = selftest_record.find(device) or {}
    if _VARIANT in (entry.get("failed") or []):
        return
    passed: bool | None = _VARIANT in (entry.get("passed") or [])
    if not passed:
        if not config.cuda_check_wanted():
            return
        passed = _tried(device)
    if passed:
        loader.extension().set_cuda_step_validated(index, True)


def _tried(device: torch.device) -> bool | None:
    try:
        with torch.cuda.device(device):
            passed, reason = check(device, tf32=torch.backends.cudnn.rnn.fp32_precision == "tf32")
    except (
        Exception
    ) as error:  # whatever it is, a layer that is called for the first time must not fail by it
        passed, reason = False, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if passed is None:
        return None
    try:
        selftest_record.add(device, _VARIANT, passed)
    except (OSError, RuntimeError):
        pass  # it is tried again in the next process
    if not passed:
        warnings.warn(
            f"lstm_ext: the CUDA kernel {_VARIANT!r} is not used on {device}, where it was tried: {reason}. Please "
            "report it with what `python -m lstm_ext.selftest --device cuda` prints.",
            RuntimeWarning,
            stacklevel=2,
        )
    return passed


def check(device: torch.device, tf32: bool) -> tuple[bool | None, str]:
    """Whether ``step`` computes what ``stepwise`` does, values and gradients, and the same bits again and again.

    None if there was no time to find out. The text says why it is not True.
    """
    begin = time.monotonic()
    kernels = loader.extension()
    for problem in _problems(tf32):
        call = _call(problem, device)
        try:
            kernels.set_cuda_kernel_of_thread("stepwise")
            expected = _results(kernels, call)
            kernels.set_cuda_kernel_of_thread(_VARIANT)
            found = _results(kernels, call)
            wrong = _differences(found, expected, problem.dtype)
            if wrong:
                return False, f"{problem.dtype}: {wrong}"
            if problem.packed:
                continue
            same = torch.ones((), dtype=torch.bool, device=device)
            for _ in range(REPEATS):
                if time.monotonic() - begin > LIMIT:
                    return None, "there was no time"
                output = kernels.lstm_layer_forward(*call, None, False)[0]
                same &= (output == found["output"]).all()
            if not same.item():
                return False, f"{problem.dtype}: it did not give the same bits each time"
        finally:
            kernels.set_cuda_kernel_of_thread("")
    return True, ""


def _call(problem: _Problem, device: torch.device) -> tuple[Any, ...]:
    """The arguments of the layer. They come from a generator of their own: torch's random state stays as it is."""
    generator = torch.Generator().manual_seed(7)
    H, B, D = problem.hidden_size, problem.batch, 2 if problem.bidirectional else 1

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, problem.dtype)

    sizes = torch.tensor([B, B, B // 2, 1]) if problem.packed else None
    rows = (int(sizes.sum()),) if sizes is not None else (4, B)
    weights = []
    for _ in range(D):
        weights += [draw(4 * H, 12, scale=H**-0.5), draw(4 * H, H, scale=H**-0.5)]
        weights += [draw(4 * H, scale=H**-0.5), draw(4 * H, scale=H**-0.5)]
    states = draw(D, B, H), draw(D, B, H)
    return (draw(*rows, 12), *states, weights, sizes, True, problem.bidirectional)


def _results(kernels: Any, call: tuple[Any, ...]) -> dict[str, Tensor]:
    output, h_n, c_n, _, _, saved = kernels.lstm_layer_forward(*call, None, True)
    grads = (
        torch.sin(output.float()).to(output.dtype),
        torch.ones_like(h_n),
        torch.ones_like(c_n),
        None,
        None,
    )
    needs_grad = [True] * (3 + len(call[3])) + [False, False]
    gradients = kernels.lstm_layer_backward(*call, None, *grads, output, saved, needs_grad)
    named = {f"gradient {i}": g for i, g in enumerate(gradients) if g is not None}
    return {"output": output, "h_n": h_n, "c_n": c_n, **named}


def _differences(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> str:
    """The first result that differs by more than rounding in another order explains, or nothing."""
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
        if not distance <= 4 * eps:  # NaN neither
            return f"{name} is {distance:.1e} off"
    return ""
