"""The translator from PTX to C++: single instructions with known results, and what it must not accept."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from simt import build, nvcc, ptx_cases
from simt.ptx.emit import HANDLERS
from simt.ptx.parse import Parser, PtxError
from simt.ptx.translate import translate

pytestmark = pytest.mark.tools


HERE = Path(__file__).parent
if build.missing():
    pytest.skip(build.missing(), allow_module_level=True)


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """What run_cases.cpp prints for each case."""
    source = build.BUILD / "ptx_cases.cpp"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(translate(Parser(ptx_cases.module(ptx_cases.CASES)).module()))
    program = build.compile_ptx_driver(HERE / "ptx" / "run_cases.cpp", [source])
    done = subprocess.run([program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("case", ptx_cases.CASES, ids=lambda case: case.name)
def test_instruction(case: ptx_cases.Case, results: dict[str, str]) -> None:
    result = results[case.name]
    if isinstance(case.expected, str):
        assert result.startswith("! ") and case.expected in result
    else:
        assert not result.startswith("!"), result
        assert [int(word, 16) for word in result.split()] == case.expected


@pytest.mark.skipif(nvcc.find_nvcc() is None, reason="nvcc is not installed")
def test_cases_are_ptx(tmp_path: Path) -> None:
    """ptxas knows better than we what PTX is."""
    source = tmp_path / "cases.ptx"
    source.write_text(ptx_cases.module(ptx_cases.CASES))
    ptxas = Path(nvcc.find_nvcc()).with_name("ptxas")
    command = [ptxas, "-arch=sm_90", source, "-o", tmp_path / "cases.cubin"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_instruction_has_a_case() -> None:
    text = ptx_cases.module(ptx_cases.CASES)
    assert {word.split(".")[0].rstrip(";") for word in text.split()} >= HANDLERS.keys()


# ---- what stops


def _kernel(body: str, before: str = "") -> str:
    declarations = ".reg .pred %p<4>; .reg .b16 %h<4>; .reg .b32 %r<8>; .reg .b64 %d<4>;"
    return f"{ptx_cases.module([])}{before}\n.visible .entry k(.param .u64 out)\n{{ {declarations}\n{body}\nret;\n}}"


REFUSED = {
    "an unknown instruction": ("dp4a.s32.s32 %r1, %r2, %r3, %r4;", "not supported"),
    "an unknown modifier": ("add.unknown.s32 %r1, %r2, %r3;", "not supported with .unknown"),
    "saturation of integers": ("add.sat.s32 %r1, %r2, %r3;", "not supported with .sat"),
    "directed rounding of f64": ("add.rz.f64 %d1, %d2, %d3;", "directed rounding"),
    "a named barrier": ("bar.sync 1;", "other than that of the whole block"),
    "a call": ("call.uni other, (%r1);", "expected ','"),
    "an mma of another shape": (
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r1, %r2, %r3, %r4}, {%r1, %r2}, {%r3}, "
        "{%r1, %r2, %r3, %r4};",
        "an mma that the emulator has not",
    ),
    "a predicated copy": ("cp.async.cg.shared.global [%r1], [%d1], 16, %p1;", "cp.async with a predicate"),
    "an unknown name": ("mov.u32 %r1, nothing;", "nothing is not declared"),
    "an order without a scope": (
        "ld.relaxed.global.u32 %r1, [%d1];",
        "one of cta, gpu, sys is missing",
    ),
    "a store that releases": ("st.release.gpu.global.u32 [%d1], %r1;", "not supported with .release"),
    "a vector of the wrong length": ("ld.global.v4.u32 {%r1, %r2}, [%d1];", "as many registers"),
    "an integer as a float": ("add.f32 %r1, %r2, 1;", "an integer literal as a floating-point operand"),
    "too few operands": ("fma.rn.f32 %r1, %r2, %r3;", "4 operands"),
    "a missing semicolon": ("add.s32 %r1, %r2, %r3", "expected ','"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    """With the line, and as it stands there."""
    body, message = REFUSED[what]
    text = _kernel(body)
    line = 1 + text[: text.index(body)].count("\n")
    with pytest.raises(PtxError) as caught:
        translate(Parser(text).module())
    assert message in str(caught.value)
    assert what == "a missing semicolon" or str(caught.value).startswith(f"PTX line {line}: ")


@pytest.mark.parametrize(
    "before", [".func (.param .b32 r) f (.param .b32 a) { ret; }", ".extern .func vprintf (.param .b64 a);"]
)
def test_functions_are_refused(before: str) -> None:
    with pytest.raises(PtxError):
        translate(Parser(_kernel("", before)).module())


def test_scopes_keep_names_apart() -> None:
    """A variable of an inner scope hides one of the same name, and is not seen outside."""
    with pytest.raises(PtxError, match="inner is not declared"):
        translate(Parser(_kernel("{ .reg .b32 inner; mov.u32 inner, 1; } mov.u32 %r1, inner;")).module())


def test_parameters_are_aligned() -> None:
    text = (
        ".visible .entry k(.param .u32 a, .param .u64 b, .param .align 16 .b8 c[20], .param .u8 d) { ret; }"
    )
    (function,) = Parser(ptx_cases.module([]) + text).module().functions
    assert function.parameters == {"a": 0, "b": 8, "c": 16, "d": 36} and function.parameter_size == 37
