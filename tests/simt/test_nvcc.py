"""The CUDA sources under nvcc, for every architecture: warnings, registers, and what is in the machine code."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence

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


# The most registers of a thread, by the first pattern that the kernel's name is like. Of more than 128 a multiprocessor
# has room for one block of 256 threads, whatever their number.
REGISTERS = {
    "cell_*<double*": 128,
    "cell_*": 96,
    "norm_cell_*<double*": 208,
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


@pytest.mark.parametrize("unit", [*UNITS, *OBJECTS], ids=str)
def test_compiles_without_warnings_and_spills_in_few_registers(
    unit: nvcc.Unit, compilations: nvcc.Compilations
) -> None:
    kernels = nvcc.registers(compilations[unit].log)
    assert kernels
    for name, registers in kernels.items():
        assert registers <= limit_of(name, REGISTERS), name


# Of persistent kernels, with options and without: the most instructions of the loop over the steps, which is the time
# that nothing hides; and of the turn, which is what other blocks wait for.
LOOP = {"*true>*": 1700, "*": 1500}
TURN = {"*true>*": 300, "*": 175}
# The most loads that the first look at the mailbox waits for, in kernels without options. In 16 bits the states of rows
# that begin or end are converted as soon as they are there. From sm_100 on ptxas moves three products of float32 in
# front of the look.
WAITS = {"*Backward*<float, * sm_1?0": 3, "*<float, *": 0, "*Forward*": 1, "*Backward*": 2}
# The most products that follow from each other: half of those of a sum.
CHAIN = {"*Backward*": 17, "*Forward*": 18}


@needs_disassembler
@pytest.mark.parametrize(
    "unit", [unit for unit in UNITS if unit.source.stem.startswith("persistent")], ids=str
)
def test_turns_are_short(unit: nvcc.Unit, compilations: nvcc.Compilations) -> None:
    for name, code in sass.opcodes(compilations[unit].path).items():
        loop = code.longest_loop()
        assert 0 < len(loop) <= limit_of(name, LOOP), name
        assert sum(bool(re.fullmatch(sass.BLOCK_BARRIER[0], opcode)) for opcode in loop) == 1, name
        assert 0 < code.turn() <= limit_of(name, TURN), name
        assert 0 < code.chain() <= limit_of(name, CHAIN), name
        if ", false>" in name:
            waits = code.waits_before_poll()
            assert len(waits) <= limit_of(f"{name} {unit.architecture}", WAITS), (name, waits)


@needs_disassembler
@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_machine_code(unit: nvcc.Unit, compilations: nvcc.Compilations) -> None:
    problems = [
        problem
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


@needs_disassembler
def test_every_expectation_is_about_some_kernel(compilations: nvcc.Compilations) -> None:
    kernels = [(name, u.architecture) for u in UNITS for name in nvcc.registers(compilations[u].log)]
    for expectation in sass.EXPECTATIONS:
        assert any(expectation.concerns(name, arch) for name, arch in kernels), expectation
