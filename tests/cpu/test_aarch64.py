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
    """Both types, both passes, one and two threads, the plain cell and one with all options; and frozen weights."""
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

    def said(processor: str, *arguments: str) -> list[str]:
        command = [EMULATOR, "-cpu", processor, str(program), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()

    with ThreadPoolExecutor(2) as pool:
        with_all, without = pool.map(said, ("max", "cortex-a72"))
    # With the instruction for products of bytes, and without it: there, frozen int8 weights are widened.
    assert with_all == ["neon+int8: 280 cases, 0 failed"]
    assert without == ["neon: 280 cases, 0 failed"]
    # A set that no such processor has.
    assert said("max", "avx2") == ["set_cpu_capability: expected 'neon', got 'avx2'"]
