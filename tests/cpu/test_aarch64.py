"""The CPU kernels of AArch64, compiled here and run under an emulator. It shows numbers, and nothing about speed.

apt-get install --no-install-recommends g++-aarch64-linux-gnu qemu-user
"""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lstm_ext.native import config

ROOT = Path(__file__).resolve().parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = [
    pytest.mark.tools,  # three minutes
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
        reason="there is no cross compiler or no emulator for AArch64",
    ),
]


def compiled(source: Path, folder: Path) -> Path:
    found = folder / f"{source.stem}.o"
    flags = [f for f in config.COMPILE_FLAGS if not f.startswith("-fvisibility")]
    command = [
        COMPILER,
        "-std=c++20",
        *flags,
        "-Werror",
        "-I",
        str(ROOT / "csrc"),
        "-c",
        str(source),
        "-o",
        str(found),
    ]
    subprocess.run(command, check=True)
    return found


def test_the_kernels_against_a_plain_loop(tmp_path: Path) -> None:
    """256 cases: float32 and float64, both passes, one and two threads, the plain cell and one with all options."""
    sources = [
        path
        for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
        if not path.stem.startswith("kernels_") or path.stem.startswith("kernels_neon")
    ]
    sources.append(Path(__file__).parent / "aarch64" / "harness.cpp")
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: compiled(source, tmp_path), sources))
    program = tmp_path / "harness"
    subprocess.run([COMPILER, "-static", "-pthread", *map(str, objects), "-o", str(program)], check=True)
    done = subprocess.run([EMULATOR, "-cpu", "max", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout == "neon: 256 cases, 0 failed\n"
    # A set that the processor cannot have is an error that names those that it may have.
    wrong = subprocess.run([EMULATOR, str(program), "avx2"], capture_output=True, text=True)
    assert wrong.stdout == "set_cpu_capability: expected 'neon', got 'avx2'\n"
