"""The cell and the CPU kernels without torch, in the program of driver/; those of AArch64 under an emulator.

apt-get install --no-install-recommends g++-aarch64-linux-gnu qemu-user
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lstm_ext.native import config

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def compiled(command: list[str], sources: list[Path], folder: Path) -> Path:
    def object_of(source: Path) -> Path:
        found = folder / f"{source.stem}.o"
        subprocess.run([*command, f"-I{CSRC}", f"-I{HERE}", "-c", str(source), "-o", str(found)], check=True)
        return found

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(object_of, [HERE / "driver" / "main.cpp", *sources]))
    subprocess.run(
        [command[0], "-static", "-pthread", *map(str, objects), "-o", folder / "driver"], check=True
    )
    return folder / "driver"


def test_cell(tmp_path: Path) -> None:
    """The equations of contract/cell.h and contract/transition.h in float64, for every set of features."""
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
    program = compiled(
        command, [CSRC / "cpu" / f"{name}.cpp" for name in ("capability", "wait_limit")], tmp_path
    )
    done = subprocess.run([program, "cell"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith(" checks, 0 failed\n")


@pytest.mark.tools  # three minutes
@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason="there is no cross compiler or no emulator for AArch64",
)
def test_kernels_of_aarch64(tmp_path: Path) -> None:
    """Numbers, and nothing about speed: both types, both passes, one and two threads, the plain cell and one with all
    options; and frozen weights."""
    flags = [f for f in config.COMPILE_FLAGS if not f.startswith("-fvisibility")]
    sources = [
        path
        for path in sorted((CSRC / "cpu").glob("*.cpp"))
        if not path.stem.startswith("kernels_") or path.stem.startswith("kernels_neon")
    ]
    program = compiled([COMPILER, "-std=c++20", *flags, "-Werror"], sources, tmp_path)

    def said(processor: str, *arguments: str) -> list[str]:
        command = [EMULATOR, "-cpu", processor, program, *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()

    with ThreadPoolExecutor(2) as pool:
        with_all, without = pool.map(lambda processor: said(processor, "kernels"), ("max", "cortex-a72"))
    # With the instruction for products of bytes, and without it: there, frozen int8 weights are widened.
    assert with_all == ["neon+int8: 280 cases, 0 failed"]
    assert without == ["neon: 280 cases, 0 failed"]
    # A set that no such processor has.
    assert said("max", "set", "avx2") == ["set_cpu_capability: expected 'neon', got 'avx2'"]
