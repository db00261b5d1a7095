"""benchmarks/gpu_probes.cu without a GPU: its hand-offs on the emulator, the rest of it under nvcc."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from simt import build, nvcc
from simt.modes import MODES, run

pytestmark = pytest.mark.tools

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
KERNELS = ("there_and_back", "back_off", "watched", "all_to_all")

needs_emulator = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
needs_nvcc = pytest.mark.skipif(nvcc.find_nvcc() is None, reason="nvcc is not installed")


def driver(mode: str) -> Path:
    source = Path(__file__).with_name("handoff_driver.cpp")
    return build.compile_driver([source], MODES[mode].build, include_dirs=[BENCHMARKS])


@needs_emulator
@pytest.mark.parametrize("mode", ["late", "random", "weak", "torn", "race"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_hand_offs(kernel: str, mode: str) -> None:
    for done in run(driver(mode), kernel, mode=MODES[mode]):
        assert done.returncode == 0, done.stdout + done.stderr
        assert "0 wrong pieces" in done.stdout


@needs_emulator
def test_parts_and_wrong_pieces_are_counted() -> None:
    """Where the words of a piece come one by one, some tries find a part; and a look at one word is not enough."""
    for kernel, pattern, code in (("watched", r", [1-9]\d* parts", 0), ("one_word", r"[1-9]\d* wrong", 1)):
        found = list(run(driver("torn"), kernel, mode=MODES["torn"]))
        assert any(done.returncode == code and re.search(pattern, done.stdout) for done in found), found
    for done in run(driver("weak"), "watched", mode=MODES["weak"]):
        assert "0 wrong pieces, 0 parts seen" in done.stdout


@needs_emulator
def test_a_piece_that_does_not_come() -> None:
    for mode in ("late", "random", "weak"):
        for done in run(driver(mode), "silent", mode=MODES[mode]):
            assert done.returncode == 3 and "a wait expired" in done.stdout, done.stdout


@needs_nvcc
@pytest.mark.parametrize("architecture", nvcc.ARCHITECTURES)
def test_it_compiles(architecture: str) -> None:
    unit = nvcc.Unit(BENCHMARKS / "gpu_probes.cu", architecture)
    for name, kernel in nvcc.resources(nvcc.compile_unit(unit).log).items():
        assert (kernel.stack, kernel.spill_stores, kernel.spill_loads) == (0, 0, 0), name


@needs_nvcc
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    program = tmp_path / "gpu_probes"
    command = [nvcc.find_nvcc(), "-std=c++17", "-arch=sm_80", f"-I{ROOT / 'csrc'}", "-o", str(program)]
    built = subprocess.run([*command, str(BENCHMARKS / "gpu_probes.cu")], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and done.stderr.startswith("gpu_probes: cuda"), done
    assert done.stdout == ""
