"""The PTX route: nvcc's PTX, translated to C++, on the emulator. Instruction by instruction, and kernels as a whole."""

from __future__ import annotations

import subprocess
from pathlib import Path

import build
import nvcc
import ptx_cases
import pytest
import test_stepwise
import torch
from emulated_layer import stepwise_module
from ptx.emit import translate
from ptx.parse import Parser, PtxError
from ptx_route import TranslatedKernels

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


# ---- the stepwise kernels -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def stepwise_kernels() -> TranslatedKernels:
    sources = [nvcc.CSRC / "cuda" / f"stepwise_{name}.cu" for name in ("f32", "f64", "f16", "bf16")]
    return TranslatedKernels(stepwise_module(), sources)


@needs_nvcc
@pytest.mark.parametrize("name", test_stepwise.CASES)
@pytest.mark.parametrize("dtype", test_stepwise.EPS, ids=lambda d: str(d).removeprefix("torch."))
def test_stepwise_layer(name: str, dtype: torch.dtype, stepwise_kernels: TranslatedKernels) -> None:
    """On both routes the same, but for the last bits of exp and tanh."""
    case = test_stepwise.CASES[name]
    layer = test_stepwise.Layer(case, dtype, 0)
    plain = layer.emulated(case, dtype)
    with stepwise_kernels.in_use():
        translated = layer.emulated(case, dtype)
    for n, (x, y) in enumerate(zip(translated, plain, strict=True)):
        assert test_stepwise.error(x, y.double()) <= 16 * test_stepwise.EPS[dtype], n


@needs_nvcc
def test_stepwise_kernels_are_the_translated_ones(stepwise_kernels: TranslatedKernels) -> None:
    """Otherwise the test above compares the C++ route with itself. nvcc's exp is not libm's."""
    case = test_stepwise.Case(steps=3, hidden_size=64)
    layer = test_stepwise.Layer(case, torch.float32, 0)
    plain = layer.emulated(case, torch.float32)
    with stepwise_kernels.in_use():
        translated = layer.emulated(case, torch.float32)
    assert not torch.equal(translated[0], plain[0])
