"""Which kernel computes a layer of CUDA tensors, and on which GPUs."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from .config import OLDEST_CAPABILITY

# One GEMM and one small kernel a step; thread-block clusters that keep the recurrent weights for all steps; the whole
# grid doing so.
KERNELS = ("stepwise", "cluster", "grid")
IN_THIS_RELEASE = ("stepwise",)


@dataclass(frozen=True)
class Choice:
    kernel: str
    reason: str


def requested() -> str:
    """LSTM_EXT_CUDA_KERNEL: the name of a kernel, or "auto".

    Raises:
        ValueError: there is no such kernel.
    """
    value = os.environ.get("LSTM_EXT_CUDA_KERNEL") or "auto"
    if value not in ("auto", *KERNELS):
        raise ValueError(
            f"LSTM_EXT_CUDA_KERNEL is {value!r}: set it to one of auto, {', '.join(KERNELS)}, or unset it."
        )
    if value not in ("auto", *IN_THIS_RELEASE):
        raise ValueError(
            f"LSTM_EXT_CUDA_KERNEL={value}: the persistent kernels, cluster and grid, are not part of this release; "
            "set it to stepwise or auto, or unset it."
        )
    return value


def choice() -> Choice:
    """The kernel that runs, and why."""
    if requested() == "auto":
        return Choice("stepwise", "the only one in this release")
    return Choice(requested(), f"LSTM_EXT_CUDA_KERNEL={requested()}")


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
    # Machine code runs on the later ones of the same generation, PTX on all later ones.
    return built <= capability and (capability[0] == built[0] or parts[4] is not None)
