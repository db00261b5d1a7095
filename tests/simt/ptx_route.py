"""From CUDA sources to kernels on the emulator by way of nvcc."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import build
import nvcc
from ptx.emit import translate
from ptx.parse import parse

ARCHITECTURE = "sm_90"


def translated(source: Path, include_dirs: Sequence[Path] = (), defines: Sequence[str] = ()) -> Path:
    """The C++ of a source's kernels."""
    # -lineinfo: so that the emulator's messages name lines of the source.
    flags = ("-lineinfo", *(f"-I{path}" for path in include_dirs), *(f"-D{define}" for define in defines))
    compiled = nvcc.compile_unit(nvcc.Unit(source, ARCHITECTURE, kind="ptx", flags=flags))
    output = build.BUILD / "ptx" / f"{compiled.path.stem}.cpp"
    text = translate(parse(compiled.path))
    if not output.exists() or output.read_text() != text:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)
    return output


class TranslatedKernels:
    """The kernels of `sources`, for a module whose own ones are g++'s."""

    def __init__(self, module: ModuleType, sources: Sequence[Path]) -> None:
        self._library = ctypes.CDLL(
            build.compile_ptx_library([translated(source) for source in sources], Path(module.__file__))
        )
        self._use(False)

    def _use(self, use: bool) -> None:
        self._library.ptx_use_translated_kernels(ctypes.c_bool(use))

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        self._use(True)
        try:
            yield
        finally:
            self._use(False)
