"""The CUDA sources under nvcc, for every architecture: warnings, registers, and what is in the machine code."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from simt import nvcc, resources, sass

pytestmark = pytest.mark.tools


if nvcc.find_nvcc() is None:
    pytest.skip("nvcc is not installed", allow_module_level=True)

needs_disassembler = pytest.mark.skipif(
    sass.find_nvdisasm() is None, reason="nvdisasm (nvidia-cuda-nvdisasm, of the group `test`) is missing"
)

HERE = Path(__file__).parent
UNITS = resources.units()
# The newest torch compiles as C++20. With the host's part, which g++ compiles.
OBJECTS = [nvcc.Unit(source, "sm_90", "c++20", "object") for source in nvcc.sources()]

# The kernels of the emulator's tests, for what the project's own ones have not yet.
TOYS = [
    nvcc.Unit(HERE / f"{name}.cu", arch, flags=(f"-I{HERE.parent}",))
    for name in ("toy", "wrappers")
    for arch in nvcc.architectures()
]


@pytest.fixture(scope="module")
def compilations() -> Iterator[nvcc.Compilations]:
    running = nvcc.Compilations([*UNITS, *OBJECTS, *TOYS])
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


def test_resources_are_as_recorded(compilations: nvcc.Compilations) -> None:
    version, before = resources.recorded()
    if version != nvcc.version():
        pytest.skip(f"recorded with nvcc {version}; this one is {nvcc.version()}")
    changed = resources.differences(before, resources.measure(compilations))
    assert not changed, "\n".join(
        ["if this is meant: cd tests && python -m simt.resources --write, and commit the table", *changed]
    )


@needs_disassembler
def test_loops_are_as_long_as_recorded(compilations: nvcc.Compilations) -> None:
    """Of persistent kernels: their instructions are the time that nothing hides."""
    if resources.recorded()[0] != nvcc.version():
        pytest.skip(f"recorded with nvcc {resources.recorded()[0]}; this one is {nvcc.version()}")
    changed = resources.longer_loops(resources.recorded_loops(), resources.loops(compilations))
    assert not changed, "\n".join(
        ["if this is meant: cd tests && python -m simt.resources --write, and commit the table", *changed]
    )


def test_a_longer_loop_is_seen() -> None:
    recorded = {"kernel": {"sm_90": {"loop": 100, "turn": 50, "chain": 16}}}
    longer = {"loop": 109, "turn": 50, "chain": 16}
    assert not resources.longer_loops(recorded, {"kernel": {"sm_90": longer}})
    for change in ({"loop": 111}, {"turn": 56}, {"chain": 32}):
        assert resources.longer_loops(recorded, {"kernel": {"sm_90": longer | change}})
    assert resources.longer_loops(recorded, {}) and resources.longer_loops({}, recorded)


def test_turns_are_short() -> None:
    """Of the kernels whose blocks wait for each other: what others wait for, and the chain of a backward product, which
    was 34 products long when it was one sum."""
    for name, of_architectures in resources.recorded_loops().items():
        for architecture, numbers in of_architectures.items():
            if "(Exchange)1" in name:
                limit = 320 if "true>" in name else 270 if "Forward" in name else 200
                assert 0 < numbers["turn"] <= limit, (name, architecture, numbers)
            assert 0 < numbers["chain"] <= 17 if "Backward" in name else True, (name, architecture, numbers)
    for kernels in resources.recorded()[1].values():
        for name, of_architectures in kernels.items():
            if name.startswith("persistent_kernel<PersistentForward") and "(Exchange)1" in name:
                assert all(found["registers"] <= 240 for found in of_architectures.values()), name


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
        if "(Exchange)1" in name:
            leaves = list(code)[code.index(next(o for o in code if o.startswith("ST.E.STRONG.SYS"))) :]
            assert opcodes_in_order(leaves, r"MEMBAR\..*SYS.*", *looks), name
            between = leaves[: next(n for n, o in enumerate(leaves) if o.startswith("LDG.E.STRONG.GPU"))]
            assert opcodes_in_order(between, *looks[:2]), name
    assert opcodes_in_order(["A", "B", "C"], "A", "C") and not opcodes_in_order(["A", "B", "C"], "C", "A")


@needs_disassembler
@pytest.mark.parametrize("expectations", ["EXPECTATIONS", "TOY_EXPECTATIONS"])
def test_every_expectation_is_about_some_kernel(expectations: str, compilations: nvcc.Compilations) -> None:
    units = UNITS if expectations == "EXPECTATIONS" else TOYS
    kernels = [(name, u.architecture) for u in units for name in nvcc.resources(compilations[u].log)]
    for expectation in getattr(sass, expectations):
        assert expectation.present or expectation.absent or expectation.counts
        # No code has what has to be there.
        probe = dataclasses.replace(expectation, present=("NOTHING",))
        assert any(probe.problems(name, arch, []) for name, arch in kernels), expectation


@needs_disassembler
@pytest.mark.parametrize("unit", TOYS, ids=str)
def test_machine_code_of_toys(unit: nvcc.Unit, compilations: nvcc.Compilations) -> None:
    problems = [
        f"{name}: {problem}"
        for name, code in sass.opcodes(compilations[unit].path).items()
        for problem in sass.problems(name, unit.architecture, code, sass.TOY_EXPECTATIONS)
    ]
    assert not problems, "\n".join(problems)


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
