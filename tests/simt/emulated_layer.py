"""The stepwise CUDA layer as a Python module: the project's host code and kernels, on the emulator."""

from __future__ import annotations

import functools
from types import ModuleType

from build import ROOT, build_extension_module

SOURCES = [
    "torch/checks.cpp",
    "torch/cuda_stepwise_backward.cpp",
    "torch/cuda_stepwise_forward.cpp",
    "torch/gemm.cpp",
]


@functools.cache
def stepwise_module() -> ModuleType:
    """Its functions take what `_C.lstm_layer_forward` and `_C.lstm_layer_backward` take, and tf32 and chunk_bytes."""
    sources = [ROOT / "tests" / "simt" / "stepwise_module.cpp", *(ROOT / "csrc" / name for name in SOURCES)]
    return build_extension_module("lstm_ext_stepwise_emulated", sources)
