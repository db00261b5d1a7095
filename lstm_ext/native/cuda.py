"""Which kernel computes a layer of CUDA tensors, and on which devices."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import loader, selftest_record
from .config import OLDEST_CAPABILITY, requested_cuda_kernel

__all__ = [
    "Choice",
    "check_waits",
    "choice",
    "forced",
    "has_gpu",
    "is_forced",
    "is_requested",
    "is_supported",
    "outcome",
    "problem",
    "unsupported",
    "variant",
]


@dataclass(frozen=True)
class Choice:
    kernel: str
    reason: str


def choice() -> Choice:
    """The kernel that runs, and why.

    Raises:
        ValueError: LSTM_EXT_CUDA_KERNEL names no kernel of this release.
    """
    requested = requested_cuda_kernel()
    if requested == "auto":
        return Choice(
            "auto", "stepwise; on a device where `step` or `persistent` have been right, the fastest"
        )
    return Choice(requested, f"LSTM_EXT_CUDA_KERNEL={requested}")


_forced: Counter[str] = Counter()  # contexts of `forced`, in all threads, by kernel
_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def forced(kernel: str) -> Iterator[None]:
    """The kernel that runs CUDA tensors, in all threads, whatever the environment says. "auto": any of ours.

    Torch's operator, which may be faster, does not take its place.
    """
    extension = loader.extension()
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


def is_requested() -> bool:
    """Whether one kernel has to run: by `forced`, or by LSTM_EXT_CUDA_KERNEL."""
    forced = list(_forced.items())  # other threads add to it
    return requested_cuda_kernel() != "auto" or any([n > 0 for name, n in forced if name != "auto"])


def is_forced() -> bool:
    """Whether one kernel has to run, or any of ours."""
    return is_requested() or _forced["auto"] > 0


def variant(kernel: str, dtype: torch.dtype) -> str:
    """The name of the kernel ``step`` or ``persistent`` in records, for tensors of this dtype."""
    return f"{kernel}-tf32" if dtype == torch.float32 else kernel


def outcome(device: torch.device, kernel: str, dtype: torch.dtype) -> bool | None:
    """Whether that kernel was correct, by the user's record of this device and build, else by a result of this release
    for its compute capability. None if there is neither."""
    for entry in (selftest_record.find(device), selftest_record.find_committed(device)):
        for found, name in ((True, "passed"), (False, "failed")):
            if entry and variant(kernel, dtype) in (entry.get(name) or []):
                return found
    return None


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


def is_supported(index: int | None) -> bool:
    return problem(index) is None


# Called by dynamo, not traced, like `loader.has_kernels`.
is_supported._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
    if capability < OLDEST_CAPABILITY:
        return f"the kernels need compute capability {_text(OLDEST_CAPABILITY)} or later"
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
