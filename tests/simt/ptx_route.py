"""From CUDA sources to kernels on the emulator by way of nvcc."""

from __future__ import annotations

from pathlib import Path

from simt import build, nvcc
from simt.ptx.parse import parse
from simt.ptx.translate import translate


def translated(source: Path, architecture: str = "sm_90") -> Path:
    """The C++ of a source's kernels."""
    # -lineinfo: so that the emulator's messages name lines of the source.
    flags = ("-lineinfo", f"-I{build.ROOT / 'tests'}")
    compiled = nvcc.compile_unit(nvcc.Unit(source, architecture, kind="ptx", flags=flags))
    output = compiled.path.with_suffix(".cpp")
    text = translate(parse(compiled.path))
    if not output.exists() or output.read_text() != text:
        output.write_text(text)
    return output
