"""The equations of contract/cell.h and contract/transition.h in float64, without torch and without kernels."""

import os
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"


def test_every_set_of_features(tmp_path: Path) -> None:
    program = tmp_path / "cell_test"
    command = [
        os.environ.get("CXX", "g++"),
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-I",
        str(CSRC),
    ]
    subprocess.run([*command, str(HERE / "cell_test.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith(" checks, 0 failed\n")
