"""The CUDA sources under nvcc, for every architecture: warnings, registers, and what is in the machine code."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from simt import nvcc, sass

pytestmark = pytest.mark.tools


if nvcc.find_nvcc() is None:
    pytest.skip("nvcc is not installed", allow_module_level=True)

needs_disassembler = pytest.mark.skipif(
    sass.find_nvdisasm() is None, reason="nvdisasm (nvidia-cuda-nvdisasm, of the group `test`) is missing"
)

UNITS = [nvcc.Unit(source, arch) for source in nvcc.sources() for arch in nvcc.architectures()]
# The newest torch compiles as C++20. With the host's part, which g++ compiles.
OBJECTS = [nvcc.Unit(source, "sm_90", "c++20", "object") for source in nvcc.sources()]


@pytest.fixture(scope="module")
def compilations() -> Iterator[nvcc.Compilations]:
    running = nvcc.Compilations([*UNITS, *OBJECTS])
    yield running
    running.close()


def test_there_are_sources() -> None:
    assert UNITS


@pytest.mark.parametrize("unit", [*UNITS, *OBJECTS], ids=str)
def test_compiles_without_warnings_spills_and_stack_frames(
    unit: nvcc.Unit, compilations: nvcc.Compilations
) -> None:
    kernels = nvcc.resources(compilations[unit].log)
    assert kernels
    for name, kernel in kernels.items():
        assert (kernel.stack, kernel.spill_stores, kernel.spill_loads) == (0, 0, 0), name


# The most registers of a thread, by the first pattern that the kernel's name is like.
REGISTERS = {
    "cell_*<double*": 128,
    "cell_*": 96,
    "norm_cell_*<double*": 192,
    "norm_cell_*": 168,
    "output_*": 80,
    "previous_outputs_*": 40,
    "sum_of_rows_*<double*": 96,
    "sum_of_rows_*": 56,
    "step_forward_*": 192,
    "step_backward_*": 255,
    "persistent_kernel<PersistentForward*": 240,
    "persistent_kernel<PersistentBackward*": 248,
}


def limit_of(name: str, limits: dict[str, int]) -> int:
    return next(limit for pattern, limit in limits.items() if fnmatch.fnmatchcase(name, pattern))


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_registers(unit: nvcc.Unit, compilations: nvcc.Compilations) -> None:
    for name, kernel in nvcc.resources(compilations[unit].log).items():
        assert kernel.registers <= limit_of(name, REGISTERS), name


# Of persistent kernels, with options and without: the most instructions of the loop over the steps, which is the time
# that nothing hides; and of the turn, which is what other blocks wait for.
LOOP = {"*true>*": 1700, "*": 1500}
TURN = {"*true>*": 300, "*": 175}
# The most products that follow from each other: half of those of a sum.
CHAIN = {"*Backward*": 17, "*Forward*": 18}


@needs_disassembler
@pytest.mark.parametrize(
    "unit", [unit for unit in UNITS if unit.source.stem.startswith("persistent")], ids=str
)
def test_turns_are_short(unit: nvcc.Unit, compilations: nvcc.Compilations) -> None:
    for name, code in sass.opcodes(compilations[unit].path).items():
        assert 0 < len(code.longest_loop()) <= limit_of(name, LOOP), name
        assert 0 < code.turn() <= limit_of(name, TURN), name
        assert 0 < code.chain() <= limit_of(name, CHAIN), name


@needs_disassembler
@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_machine_code(unit: nvcc.Unit, compilations: nvcc.Compilations) -> None:
    problems = [
        f"{name}: {problem}"
        for name, code in sass.opcodes(compilations[unit].path).items()
        for problem in sass.problems(name, unit.architecture, code)
    ]
    assert not problems, "\n".join(problems)


def opcodes_in_order(code: Sequence[str], *patterns: str) -> bool:
    """Whether there are opcodes like these, one behind the other."""
    rest = iter(code)
    return all(any(re.fullmatch(pattern, opcode) for opcode in rest) for pattern in patterns)


@needs_disassembler
@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit.source.stem == "persistent_bf16"], ids=str)
def test_the_last_block_sees_who_gave_up(unit: nvcc.Unit, compilations: nvcc.Compilations) -> None:
    """The host's word is stored for all of the system. A block that counts itself out then waits for what is in front
    of the count before it looks, or it might have looked before."""
    looks = (r"ATOMG.*|ATOM\..*", r"MEMBAR.*", r"LDG\.E\.STRONG\.GPU")
    for name, code in sass.opcodes(compilations[unit].path).items():
        leaves = list(code)[code.index(next(o for o in code if o.startswith("ST.E.STRONG.SYS"))) :]
        assert opcodes_in_order(leaves, r"MEMBAR\..*SYS.*", *looks), name
        between = leaves[: next(n for n, o in enumerate(leaves) if o.startswith("LDG.E.STRONG.GPU"))]
        assert opcodes_in_order(between, *looks[:2]), name
    assert opcodes_in_order(["A", "B", "C"], "A", "C") and not opcodes_in_order(["A", "B", "C"], "C", "A")


@needs_disassembler
def test_every_expectation_is_about_some_kernel(compilations: nvcc.Compilations) -> None:
    kernels = [(name, u.architecture) for u in UNITS for name in nvcc.resources(compilations[u].log)]
    for expectation in sass.EXPECTATIONS:
        assert expectation.present or expectation.absent or expectation.counts
        # No code has what has to be there.
        probe = dataclasses.replace(expectation, present=("NOTHING",))
        assert any(probe.problems(name, arch, []) for name, arch in kernels), expectation


# The tests above fail where they should.

_KERNEL = 'extern "C" __global__ void kernel(float* p, int n) {{ {body} }}'
_FAULTS = {
    "an unused variable": ("int unused; p[n] = 1;", "unused"),
    "an array in local memory": (
        "float a[64]; for (int i = 0; i < 64; ++i) a[i * n & 63] = p[i]; p[0] = a[n & 63];",
        "[Ll]ocal memory",
    ),
    "an operator that torch removes": (
        "reinterpret_cast<__half*>(p)[n] = reinterpret_cast<__half*>(p)[0] + reinterpret_cast<__half*>(p)[1];",
        "no operator",
    ),
}


def _planted(directory: Path, text: str) -> nvcc.Unit:
    source = directory / "planted.cu"
    source.write_text(f"#include <cuda_fp16.h>\n{text}\n")
    return nvcc.Unit(source, "sm_90")


@pytest.mark.parametrize("fault", _FAULTS)
def test_planted_fault_does_not_compile(fault: str, tmp_path: Path) -> None:
    body, message = _FAULTS[fault]
    with pytest.raises(nvcc.CompileError, match=message):
        nvcc.compile_unit(_planted(tmp_path, _KERNEL.format(body=body)), tmp_path)


def test_planted_spill_is_reported(tmp_path: Path) -> None:
    """80 values at once, in the 32 registers that the launch bounds leave."""
    loads = "float s[80]; for (int i = 0; i < 80; ++i) s[i] = p[i * n]; __syncthreads();"
    stores = "for (int i = 0; i < 80; ++i) p[i] = s[i] - s[(7 * i + 3) % 80];"
    text = _KERNEL.format(body=f"{loads} {stores}").replace("void", "void __launch_bounds__(1024, 2)")
    with pytest.raises(nvcc.CompileError, match=r"[Ss]pill"):
        nvcc.compile_unit(_planted(tmp_path, text), tmp_path)


@needs_disassembler
def test_planted_expectations_are_not_met(tmp_path: Path) -> None:
    text = _KERNEL.format(body="atomicAdd(p + n, 1.0f);")
    code = sass.opcodes(nvcc.compile_unit(_planted(tmp_path, text), tmp_path).path)["kernel"]
    wanted = sass.Expectation("ker*", present=(r"LDGSTS.*",), absent=sass.ATOMICS)
    problems = sass.problems("kernel", "sm_90", code, [wanted])
    assert len(problems) == 2 and problems[0] == "LDGSTS.* is missing", problems
    assert not sass.problems("other", "sm_90", code, [wanted])


@needs_disassembler
def test_planted_expectations_of_a_loop_are_not_met(tmp_path: Path) -> None:
    """What stands in front of the loop is not in it."""
    step = "p[i + threadIdx.x] *= 2; __syncthreads(); if (p[i] > 1) { __threadfence(); } __syncthreads();"
    loop = f"\n#pragma unroll 1\nfor (int i = 0; i < n; ++i) {{ {step} }}"
    text = _KERNEL.format(body=f"atomicAdd(p + n, 1.0f); {loop}")
    code = sass.opcodes(nvcc.compile_unit(_planted(tmp_path, text), tmp_path).path)["kernel"]
    assert 0 < len(code.longest_loop()) < len(code)
    barriers = ((sass.BLOCK_BARRIER[0], 1),)
    wanted = sass.Expectation(
        "ker*", sass.ATOMICS, (r"MEMBAR.*", *sass.ATOMICS), counts=barriers, in_loop=True
    )
    problems = sass.problems("kernel", "sm_90", code, [wanted])
    assert len(problems) == 4 and problems[0] == "ATOM.* is missing in the loop", problems
    assert "MEMBAR" in problems[2] and problems[3].endswith("in the loop 2 times, not 1"), problems


def test_objects_are_used_again_until_something_changes(tmp_path: Path) -> None:
    text = _KERNEL.format(body="p[n] = 1;")
    unit = _planted(tmp_path, text)
    first = nvcc.compile_unit(unit, tmp_path)
    changed = first.path.stat().st_mtime_ns
    assert nvcc.compile_unit(unit, tmp_path).path.stat().st_mtime_ns == changed
    second = nvcc.compile_unit(_planted(tmp_path, text.replace("1;", "2;")), tmp_path)
    assert second.path != first.path and not first.path.exists()
