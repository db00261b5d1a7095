"""What nvcc makes of the CUDA sources: objects for every architecture, and the resources that ptxas reports.

No GPU is needed. Objects are kept in build/nvcc, named by a hash of all that goes into them.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lstm_ext.native import config

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "nvcc"


def _first_of_each_generation(architectures: Sequence[str]) -> tuple[str, ...]:
    first: dict[str, str] = {}
    for architecture in architectures:
        first.setdefault(architecture.partition(".")[0], f"sm_{architecture.replace('.', '')}")
    return tuple(first.values())


ARCHITECTURES = _first_of_each_generation(config.ARCHITECTURES)

# torch compiles extensions with these. Code that passes without them may not pass with them.
TORCH_DEFINES = (
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
)
# A spill, or an array that ended in local memory, is a warning of ptxas and so an error.
WARNINGS = (
    "-Werror=all-warnings",
    "-Xptxas=-v,--warning-as-error,--warn-on-spills,--warn-on-local-memory-usage",
)


class CompileError(RuntimeError):
    """nvcc refused. The message is its command and its output."""


@dataclass(frozen=True)
class Unit:
    """One call of nvcc. `kind` is its output: "cubin", "ptx", or "object" (with the host's part)."""

    source: Path
    architecture: str
    standard: str = "c++17"
    kind: str = "cubin"
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = (self.source.stem, self.architecture, self.standard, self.kind)
        return "-".join(parts)


@dataclass(frozen=True)
class Output:
    path: Path
    log: str


def find_nvcc() -> str | None:
    """nvcc where torch's build would look for it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").is_file():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@functools.cache
def version() -> str:
    """As in "13.0.88"."""
    text = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"\bV(\d+\.\d+\.\d+)", text)[1]


@functools.cache
def architectures() -> list[str]:
    """Those that this nvcc knows."""
    known = subprocess.run(
        [find_nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout
    return [architecture for architecture in ARCHITECTURES if architecture in known.split()]


def sources() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


def _headers(source: Path) -> list[Path]:
    """All that a source may include: the backend's and the contract's headers, and what lies beside it."""
    folders = [CSRC / "contract", CSRC / "cuda", source.parent]
    return sorted(
        {path for folder in folders for suffix in ("*.h", "*.def", "*.cuh") for path in folder.glob(suffix)}
    )


def command(unit: Unit, output: Path) -> list[str]:
    kind = {"cubin": "-cubin", "ptx": "-ptx", "object": "-c"}[unit.kind]
    # PTX is an input of the emulator, not of ptxas: ptxas does not run.
    warnings = WARNINGS[:-1] if unit.kind == "ptx" else WARNINGS
    return [
        *(find_nvcc(), kind, f"-arch={unit.architecture}", f"-std={unit.standard}", *unit.flags, f"-I{CSRC}"),
        *(*config.NVCC_FLAGS, *TORCH_DEFINES, *warnings, "-o", str(output), str(unit.source)),
    ]


def _key(unit: Unit) -> str:
    digest = hashlib.sha256(version().encode())
    for path in (unit.source, *_headers(unit.source)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for text in command(unit, Path("output")):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def compile_unit(unit: Unit) -> Output:
    """The output of an earlier run if nothing has changed since."""
    suffix = {"cubin": "cubin", "ptx": "ptx", "object": "o"}[unit.kind]
    output = BUILD / f"{unit}.{_key(unit)}.{suffix}"
    log = output.with_suffix(output.suffix + ".log")
    if not log.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        for old in BUILD.glob(f"{unit}.*"):
            old.unlink(missing_ok=True)
        call = command(unit, output)
        result = subprocess.run(call, capture_output=True, text=True)
        text = result.stdout + result.stderr
        if result.returncode != 0:
            raise CompileError(f"{' '.join(call)}\n{text}")
        # Last and in one step: a log means that its object is complete.
        partial = log.with_suffix(f".{os.getpid()}")
        partial.write_text(text)
        partial.rename(log)
    return Output(output, log.read_text())


class Compilations:
    """Many units, compiled in the background on all cores."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._pool = ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0)))
        self._futures: dict[Unit, Future[Output]] = {u: self._pool.submit(compile_unit, u) for u in units}

    def __getitem__(self, unit: Unit) -> Output:
        return self._futures[unit].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def demangle(names: Sequence[str]) -> list[str]:
    """Without the return type and the parameters, which say nothing that the template arguments do not."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    return [_without_parameters(line) for line in text.splitlines()]


def _without_parameters(name: str) -> str:
    # The last parenthesis at depth 0 opens the parameters; those in template arguments lie deeper.
    depth, end = 0, len(name)
    for i, character in enumerate(name):
        if character == "(" and depth == 0:
            end = i
        depth += {"<": 1, "(": 1, ">": -1, ")": -1}.get(character, 0)
    return name[:end].removeprefix("void ").replace("lstm_ext::cuda::", "").replace("lstm_ext::", "")


_ENTRY = re.compile(r"Compiling entry function '(\S+)'")
_PROPERTIES = re.compile(
    r"Function properties for (\S+)\n\s*0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    r".*?Used (\d+) registers"
)


def registers(log: str) -> dict[str, int]:
    """The registers of a thread, by kernel, from what `-Xptxas -v` printed. An error for a kernel that spills."""
    found = dict(_PROPERTIES.findall(log))
    if set(_ENTRY.findall(log)) != set(found):
        raise ValueError(f"a kernel spills, or ptxas's report was not understood:\n{log}")
    return dict(zip(demangle(list(found)), map(int, found.values()), strict=True))
