"""Which CUDA devices the kernels run on."""

from __future__ import annotations

import torch

from . import cuda, loader

__all__ = ["is_supported", "problem"]

_problems: dict[int | None, str | None] = {}


def problem(index: int | None) -> str | None:
    """Why there are no kernels for this device, or None."""
    if index not in _problems:
        _problems[index] = _find_problem(index)
    return _problems[index]


def is_supported(index: int | None) -> bool:
    return problem(index) is None


# For dynamo, as `loader.has_kernels`.
is_supported._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _find_problem(index: int | None) -> str | None:
    status = loader.status()
    if status.cuda is None:
        return status.reason or status.cuda_reason or "the extension was built without CUDA"
    if not torch.cuda.is_available():
        return None  # the tensors are fake, and so are the kernels
    capability = torch.cuda.get_device_capability(index)
    reason = cuda.unsupported(capability, status.cuda)
    if reason is None:
        return None
    return f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}: {reason}"
