"""The PTX route: nvcc's PTX, translated to C++, on the emulator. Instruction by instruction, and kernels as a whole."""

from __future__ import annotations

import subprocess
from pathlib import Path

import build
import nvcc
import ptx_cases
import pytest
from ptx.emit import translate
from ptx.parse import Parser, PtxError

HERE = Path(__file__).parent
if build.missing():
    pytest.skip(build.missing(), allow_module_level=True)
needs_nvcc = pytest.mark.skipif(nvcc.find_nvcc() is None, reason="nvcc is not installed")


def run(program: Path, *arguments: str) -> str:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- single instructions ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What run_cases.cpp prints for each case."""
    source = tmp_path_factory.mktemp("cases") / "cases.cpp"
    source.write_text(translate(Parser(ptx_cases.module()).module()))
    program = build.compile_ptx_driver(HERE / "ptx" / "run_cases.cpp", [source])
    lines = run(program).splitlines()
    return dict(line.split(" ", 1) for line in lines)


@pytest.mark.parametrize("case", ptx_cases.CASES, ids=lambda case: case.name)
def test_instruction(case: ptx_cases.Case, results: dict[str, str]) -> None:
    result = results[case.name]
    if isinstance(case.expected, str):
        assert result.startswith("! ") and case.expected in result
    else:
        assert not result.startswith("!"), result
        assert [int(word, 16) for word in result.split()] == case.expected


@needs_nvcc
def test_cases_are_ptx(tmp_path: Path) -> None:
    """ptxas knows better than we what PTX is."""
    source = tmp_path / "cases.ptx"
    source.write_text(ptx_cases.module())
    ptxas = Path(nvcc.find_nvcc()).with_name("ptxas")
    command = [ptxas, "-arch=sm_90", source, "-o", tmp_path / "cases.cubin"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
