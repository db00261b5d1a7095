"""Machine code of the kernels, and what is expected in it: instructions that only show there were meant or feared."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nvcc


def find_nvdisasm() -> str | None:
    """NVIDIA's disassembler: from its wheel, or from a toolkit."""
    try:
        files = importlib.metadata.distribution("nvidia-cuda-nvdisasm").files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "nvdisasm":
            return str(file.locate())
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvdisasm") or shutil.which("nvdisasm", path=f"{home}/bin")


_FUNCTION = re.compile(r"^\.text\.(\S+):$", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def opcodes(cubin: Path) -> dict[str, list[str]]:
    """The instructions of each kernel with their modifiers, as in LDG.E.128, in order."""
    text = subprocess.run([find_nvdisasm(), "-c", cubin], capture_output=True, text=True, check=True).stdout
    _, *parts = _FUNCTION.split(text)
    names, bodies = parts[::2], parts[1::2]
    return {
        name: _INSTRUCTION.findall(body) for name, body in zip(nvcc.demangle(names), bodies, strict=True)
    }


@dataclass(frozen=True)
class Expectation:
    """For kernels whose name, without namespaces and parameters, is like `kernels`. The patterns are regular
    expressions of whole opcodes."""

    kernels: str
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    architectures: tuple[str, ...] = nvcc.ARCHITECTURES

    def problems(self, name: str, architecture: str, code: Iterable[str]) -> list[str]:
        if architecture not in self.architectures or not fnmatch.fnmatchcase(name, self.kernels):
            return []
        code = sorted(set(code))
        missing = [p for p in self.present if not any(re.fullmatch(p, opcode) for opcode in code)]
        unwanted = [o for o in code for p in self.absent if re.fullmatch(p, o)]
        return [f"{p} is missing" for p in missing] + [f"{opcode} is there" for opcode in unwanted]


HOPPER_AND_LATER = ("sm_90", "sm_100", "sm_120")
# Opcodes by what they are for.
LOCAL_MEMORY = (r"LDL.*", r"STL.*")
ATOMICS = (r"ATOM.*", r"REDG?(\..*)?")
DOUBLE = (r"D(ADD|MUL|FMA|SETP|MNMX)(\..*)?", r"F2F\.F64.*", r"F2F\.F32\.F64.*", r"MUFU\.\w*64H")
EXPONENTIAL = (r"MUFU\.EX2.*",)

EXPECTATIONS = (
    Expectation("*", absent=LOCAL_MEMORY),
    # A sum whose order depends on timing differs from run to run.
    Expectation("*_kernel<*>", absent=ATOMICS),
    # An unmarked constant is a double: 1.0 where 1.0f is meant makes a float kernel several times slower.
    *(
        Expectation(f"*_kernel<{types}>", absent=DOUBLE)
        for types in ("float", "__half", "__nv_bfloat16", "float, float", "__nv_bfloat16, float")
    ),
    *(
        Expectation(f"cell_forward_kernel<{t}>", present=(*EXPONENTIAL, r"MUFU\.RCP.*"))
        for t in ("float", "__half", "__nv_bfloat16")
    ),
    Expectation("cell_forward_kernel<double>", present=(r"DFMA.*",)),
    Expectation("sum_of_rows_kernel<*>", present=(r"BAR\.SYNC.*",)),
)


def problems(
    name: str, architecture: str, code: list[str], expectations: Iterable[Expectation] = EXPECTATIONS
) -> list[str]:
    return [problem for e in expectations for problem in e.problems(name, architecture, code)]
