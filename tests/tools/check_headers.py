"""Compiles every header of csrc/ alone, the CPU kernels' for one instruction set: `make lint` runs it.

One line for each header that fails; the exit status is 1 then. A header that needs what is not installed (torch, CUDA's
headers) is left out, and the last line says so.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from simt.build import cuda_include

TESTS = Path(__file__).resolve().parents[1]
CSRC = TESTS.parent / "csrc"
# Inline PTX: nvcc compiles it, in every build with CUDA.
NVCC_ONLY = {"cuda/ptx.h"}
# Parts of other headers, for a processor that this compiler is not for.
PARTS = {"cpu/simd_neon.h"}
# Templates of a type of the kernels' own namespace. They are as internal to an object as that type, so they may be
# compiled for the raised target.
TEMPLATES_OF_A_MATH = {"contract/activation.h", "contract/cell.h", "contract/transition.h"}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)


def includes(header: Path) -> list[tuple[str, str]]:
    """What it includes itself: (the opening delimiter, the name)."""
    return INCLUDE.findall(header.read_text())


def everything_included(header: Path) -> set[str]:
    """The names of all that it includes, directly or through headers of the project."""
    seen: set[str] = set()
    waiting = [header]
    while waiting:
        for _, name in includes(waiting.pop()):
            if name not in seen:
                seen.add(name)
                waiting += [root / name for root in (CSRC, TESTS) if (root / name).is_file()]
    return seen


def is_kernel(header: Path) -> bool:
    """Whether it is compiled for an instruction set: csrc/cpu/isa.h and what includes it."""
    return header == CSRC / "cpu" / "isa.h" or ('"', "cpu/isa.h") in includes(header)


def rule_broken(header: Path) -> str | None:
    """A kernel header includes kernel headers only: what else it includes would be compiled for a newer CPU."""
    if not is_kernel(header) or header.name == "isa.h":
        return None
    for _, name in includes(header):
        if name in TEMPLATES_OF_A_MATH:
            continue
        if not ((CSRC / name).is_file() and is_kernel(CSRC / name)):
            return (
                f"includes {name}, which belongs in cpu/isa.h: there the compiler's target is not raised yet"
            )
    return None


def torch_include_dirs() -> list[str]:
    if importlib.util.find_spec("torch") is None:
        return []
    from torch.utils.cpp_extension import include_paths

    return [
        *include_paths("cpu"),
        sysconfig.get_paths()["include"],
    ]  # its header for Python includes Python.h


def flags(header: Path, torch_dirs: list[str], cuda_dir: Path | None) -> Iterator[list[str]]:
    """The compiler's flags for each way in which a header is compiled; none where something is not installed."""
    if str(header.relative_to(CSRC)) in NVCC_ONLY | PARTS:
        return
    if is_kernel(header):
        if platform.machine() in ("x86_64", "AMD64"):
            yield ["-DLSTM_EXT_ISA_AVX512"]  # what the others lack is seen when the kernels are built
        return
    needs = everything_included(header)
    found: list[str] = []
    if any(re.match(r"(ATen|c10|torch/(csrc|extension|library))", name) for name in needs):
        if not torch_dirs or any(name.startswith(("ATen/cuda/", "c10/cuda/")) for name in needs):
            return
        found += [f"-isystem{folder}" for folder in torch_dirs]
    if any(re.match(r"(cuda_|cublas|mma\.h)", name) for name in needs):
        if cuda_dir is None:
            return
        # A plain C++ compiler reads the kernels as the emulator of the tests does.
        found += ["-DLSTM_EXT_SIMT", f"-I{TESTS}", f"-isystem{cuda_dir}"]
    yield found


def compile_alone(compiler: list[str], header: Path, extra: list[str]) -> str | None:
    """The compiler's first complaint, or None."""
    name = header.relative_to(CSRC)
    # Twice: it is guarded. Clang wants the pragma of isa.h taken back.
    source = f'#include "{name}"\n#include "{name}"\n'
    if any(flag in ("-DLSTM_EXT_ISA_AVX512", "-DLSTM_EXT_ISA_AVX2") for flag in extra):
        source += "#if defined(__clang__)\n#pragma clang attribute pop\n#endif\n"
    command = [*compiler, "-std=c++20" if "isystem" in " ".join(extra) else "-std=c++17", "-fsyntax-only"]
    run = subprocess.run(
        [*command, f"-I{CSRC}", *extra, "-x", "c++", "-"], input=source, capture_output=True, text=True
    )
    if run.returncode == 0:
        return None
    lines = (
        [line for line in run.stderr.splitlines() if "error" in line] or run.stderr.splitlines() or ["failed"]
    )
    return lines[0]


def main() -> int:
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    torch_dirs, cuda_dir = torch_include_dirs(), cuda_include()
    jobs, problems, left_out = [], [], []
    for header in sorted(path for kind in ("h", "cuh") for path in CSRC.rglob(f"*.{kind}")):
        name = str(header.relative_to(CSRC))
        if broken := rule_broken(header):
            problems.append(f"{name}: {broken}")
        ways = list(flags(header, torch_dirs, cuda_dir))
        if not ways:
            left_out.append(name)
        jobs += [(header, way) for way in ways]
    print(f"{len(jobs)} compilations of headers: some minutes", flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        complaints = pool.map(lambda job: compile_alone(compiler, *job), jobs)
        for (header, way), complaint in zip(jobs, complaints, strict=True):
            if complaint:
                which = [flag.removeprefix("-DLSTM_EXT_ISA_").lower() for flag in way if "_ISA_" in flag]
                suffix = f" ({which[0]})" if which else ""
                problems.append(f"{header.relative_to(CSRC)}{suffix}: {complaint}")
    for problem in problems:
        print(problem)
    print(
        f"{len(jobs)} compilations, {len(problems)} problems"
        + "; left out: " * bool(left_out)
        + ", ".join(left_out)
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
