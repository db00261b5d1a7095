"""csrc/cuda/platform.h under both compilers: what it offers compiles for every architecture, without a warning."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from simt import build, nvcc

pytestmark = pytest.mark.tools


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("architecture", nvcc.ARCHITECTURES)
def test_nvcc(architecture: str, tmp_path: Path) -> None:
    command = [
        "nvcc",
        "-std=c++17",
        f"-arch={architecture}",
        "-cubin",
        "-Werror",
        "all-warnings",
        *nvcc.TORCH_DEFINES,
    ]
    command += ["-Xcompiler", "-Wall,-Wextra", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]
    command += [str(HERE / "platform_check.cu"), "-o", str(tmp_path / "out.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
def test_host_compiler(tmp_path: Path) -> None:
    command = [
        build.compiler(),
        *build.COMMON_FLAGS,
        *nvcc.TORCH_DEFINES,
        "-Werror",
        "-isystem",
        str(build.cuda_include()),
    ]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}", "-fsyntax-only", "-x", "c++"]
    done = subprocess.run([*command, str(HERE / "platform_check.cu")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
