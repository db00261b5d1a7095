"""The stepwise CUDA layer as a Python module: the project's host code and kernels, on the emulator."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import ModuleType

from build import HERE, build_extension_module

CHUNK_BYTES = 1 << 25


@functools.cache
def stepwise_module() -> ModuleType:
    """It has `LayerOptions`, `lstm_layer_forward` and `lstm_layer_backward` of `_C`."""
    sources = [HERE / "stepwise_module.cpp", HERE / "stepwise_host.cpp"]
    return build_extension_module("lstm_ext_stepwise_emulated", sources)


@contextlib.contextmanager
def emulated_device(
    tf32: bool = False, chunk_bytes: int = CHUNK_BYTES, kernel: str = "stepwise"
) -> Iterator[ModuleType]:
    """The module, on a device whose products may round to TF32, with chunks of so many bytes, and this kernel."""
    module = stepwise_module()
    module.set_device(tf32, chunk_bytes, kernel)
    try:
        yield module
    finally:
        module.set_device(False, CHUNK_BYTES, "stepwise")
