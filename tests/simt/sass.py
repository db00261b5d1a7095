"""Machine code of the kernels, and what is expected in it: instructions that only show there were meant or feared."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from simt import nvcc


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
_ADDRESS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


_LABEL = re.compile(r"^(\.L_\w+):")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")


_REGISTERS = re.compile(r"\bR(\d+|Z)\b")


class Code(list[str]):
    """Instructions with their modifiers, as in LDG.E.128, in order; and which of them make a loop."""

    def __init__(self, body: str) -> None:
        super().__init__()
        self.registers: list[list[str]] = []  # of each instruction, in the order of its text
        labels: dict[str, int] = {}
        ends: dict[int, int] = {}  # by the loop's beginning
        for line in body.splitlines():
            if label := _LABEL.match(line):
                labels[label[1]] = len(self)
            if instruction := _INSTRUCTION.match(line):
                self.append(instruction[1])
                self.registers.append(_REGISTERS.findall(line))
                branch = _BRANCH.search(line)
                if branch and branch[1] in labels:
                    ends[labels[branch[1]]] = len(self)
        self.loops = tuple(range(begin, end) for begin, end in ends.items())

    def _longest(self) -> range:
        return max(self.loops, key=len, default=range(0))

    def longest_loop(self) -> list[str]:
        """From the target of a branch back to the branch: all that happens in a step, if the loop is that of the steps.
        Loops within it are part of it."""
        return self[self._longest().start : self._longest().stop]

    def turn(self) -> int:
        """Instructions of the longest loop from its barrier to the store that other blocks wait for."""
        loop = self.longest_loop()
        store = next((n for n, opcode in enumerate(loop) if re.fullmatch(STRONG_16[1], opcode)), 0)
        barriers = [n for n, opcode in enumerate(loop[:store]) if re.fullmatch(BLOCK_BARRIER[0], opcode)]
        return store - barriers[-1] if barriers else 0

    def waits_before_poll(self) -> list[str]:
        """Instructions of the longest loop that wait for a load, in front of the first one that looks at a mailbox."""
        loads: dict[str, str] = {}  # by the register that they fill
        waits: list[str] = []
        for n in self._longest():
            opcode, (to, *sources) = self[n], self.registers[n] or [""]
            if re.fullmatch(STRONG_16[0], opcode):
                return waits
            stores = opcode.startswith("ST")
            for register in [to, *sources] if stores else sources:
                if register in loads:
                    waits.append(f"{opcode} waits for {loads.pop(register)}")
            if opcode.startswith("LDG"):
                loads[to] = opcode
            elif not stores:
                loads.pop(to, None)
        raise ValueError("the loop does not look at a mailbox")

    def chain(self) -> int:
        """The most products of the longest loop of which each adds to the sum of another."""
        depths: dict[str, int] = {}
        for n in self._longest():
            if self[n].startswith("HMMA"):
                to, *_, added = self.registers[n]
                depths[to] = (0 if added == "Z" else depths.get(added, 0)) + 1
        return max(depths.values(), default=0)


def opcodes(cubin: Path) -> dict[str, Code]:
    """The code of each kernel."""
    text = subprocess.run([find_nvdisasm(), "-c", cubin], capture_output=True, text=True, check=True).stdout
    _, *parts = _FUNCTION.split(text)
    names, bodies = nvcc.demangle(parts[::2]), parts[1::2]
    code = {name: Code(body) for name, body in zip(names, bodies, strict=True)}
    # A line that is not understood would look like code without faults.
    if not code or [len(found) for found in code.values()] != [
        len(_ADDRESS.findall(body)) for body in bodies
    ]:
        raise ValueError(f"nvdisasm's text was not understood:\n{text[:2000]}")
    return code


class Expectation(NamedTuple):
    """For kernels whose name, without namespaces and parameters, is like `kernels`. The patterns are regular
    expressions of whole opcodes. `in_loop`: of the code, only the longest loop counts."""

    kernels: str
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    architectures: tuple[str, ...] = nvcc.ARCHITECTURES
    in_loop: bool = False

    def concerns(self, name: str, architecture: str) -> bool:
        return architecture in self.architectures and fnmatch.fnmatchcase(name, self.kernels)


# Those with dependent launches, and those without.
FROM_HOPPER = tuple(a for a in nvcc.ARCHITECTURES if int(a.removeprefix("sm_")) >= 90)
BEFORE_HOPPER = tuple(a for a in nvcc.ARCHITECTURES if a not in FROM_HOPPER)
# Opcodes by what they are for.
ATOMICS = (r"ATOM.*", r"REDG?(\..*)?")
GLOBAL_ATOMICS = (r"ATOMG.*", r"REDG?(\..*)?")
# What fences and acquiring loads become: they wait for all stores, or empty the first-level cache.
FENCES = (r"MEMBAR.*", r"(CGA)?ERRBAR.*", r"CCTL.*")
STRONG_16 = (r"LDG\.E\.128\.STRONG\.GPU", r"STG\.E\.128\.STRONG\.GPU")
DOUBLE = (r"D(ADD|MUL|FMA|SETP|MNMX)(\..*)?", r"F2F\.F64.*", r"F2F\.F32\.F64.*", r"MUFU\.\w*64H")
EXPONENTIAL = (r"MUFU\.EX2.*",)
TANH_OF_11_BITS = (r"MUFU\.TANH.*",)
BLOCK_BARRIER = (r"BAR\.SYNC.*",)
GENERIC = (r"LD\.E.*", r"ST\.E.*")  # the hardware has to find out which memory it is
COPY_16 = (r"LDGSTS\.E\.BYPASS\.128.*", r"LDGDEPBAR.*", r"DEPBAR\.LE.*")
MMA_BF16 = (r"HMMA\.16816\.F32\.BF16",)
MMA_TF32 = (r"HMMA\.1688\.F32\.TF32",)
# A wait for the launch in front, and leave for the one behind to begin.
DEPENDENT_LAUNCH = (r"ACQBULK", r"PREEXIT")

FLOATS = ("float", "__half", "__nv_bfloat16")
EXPECTATIONS = (
    # Pointers of kernels are to global memory, shared arrays are used by name: nvcc sees which it is. Not where a
    # pointer is chosen from a table of them, as in previous_outputs_kernel.
    *(
        Expectation(f"{k}_kernel<*>", absent=GENERIC)
        for k in ("cell_*", "norm_cell_*", "output_*", "sum_of_rows")
    ),
    # A sum whose order depends on timing differs from run to run. The blocks of persistent kernels count who has left.
    *(
        Expectation(f"{k}_*<*>", absent=ATOMICS)
        for k in ("cell", "norm", "output", "previous", "step", "sum")
    ),
    Expectation("persistent_kernel<*>", absent=(*GLOBAL_ATOMICS, *FENCES), in_loop=True),
    # An unmarked constant is a double: 1.0 where 1.0f is meant makes a float kernel several times slower.
    *(Expectation(f"*_kernel<{t}*>", absent=DOUBLE) for t in FLOATS),
    *(Expectation(f"*cell_*_kernel<{t}*>", (*EXPONENTIAL, r"MUFU\.RCP.*"), TANH_OF_11_BITS) for t in FLOATS),
    Expectation("*cell_*_kernel<double*>", present=(r"DFMA.*",)),
    Expectation("sum_of_rows_kernel<*>", present=BLOCK_BARRIER),
    # Sums on the tensor cores, weights past the first-level cache; float16's gradients are float32 there.
    Expectation(
        "step_*_kernel<*>", (*COPY_16, *BLOCK_BARRIER, *EXPONENTIAL, r"MUFU\.RCP.*"), TANH_OF_11_BITS
    ),
    Expectation("step_*_kernel<__nv_bfloat16, *>", present=MMA_BF16),
    Expectation("step_forward_kernel<__half, *>", present=(r"HMMA\.16816\.F32",)),
    Expectation("step_backward_kernel<__half, *>", present=MMA_TF32),
    Expectation("step_*_kernel<float, *>", present=MMA_TF32),
    Expectation("step_*_kernel<*>", present=DEPENDENT_LAUNCH, architectures=FROM_HOPPER),
    Expectation("step_*_kernel<*>", absent=DEPENDENT_LAUNCH, architectures=BEFORE_HOPPER),
    Expectation(
        "persistent_kernel<*>", (*EXPONENTIAL, r"MUFU\.RCP.*"), (*DOUBLE, *TANH_OF_11_BITS), in_loop=True
    ),
    Expectation("persistent_kernel<*>", present=STRONG_16, in_loop=True),
    # A warp sums by shuffles, the warps of a block meet in shared memory.
    Expectation("norm_cell_*_kernel<*>", present=(*BLOCK_BARRIER, r"SHFL\.BFLY.*")),
)


def problems(name: str, architecture: str, code: Code) -> list[str]:
    found = []
    for e in EXPECTATIONS:
        if e.concerns(name, architecture):
            kinds = sorted(set(code.longest_loop() if e.in_loop else code))
            where = f"{name}{', in the loop' if e.in_loop else ''}"
            missing = [p for p in e.present if not any(re.fullmatch(p, opcode) for opcode in kinds)]
            unwanted = [o for o in kinds for p in e.absent if re.fullmatch(p, o)]
            found += [f"{where}: {p} is missing" for p in missing]
            found += [f"{where}: {opcode} is there" for opcode in unwanted]
    return found
