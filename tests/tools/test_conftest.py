"""conftest.py in a project of its own: skips are counted, CUDA's tests are chosen, one test may have the machine.

And what paths.py says about a run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import paths
import pytest

import lstm_ext

pytestmark = pytest.mark.tools

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
# The package that is under test here: it may be an installed one, beside sources built for another torch.
PACKAGE = Path(lstm_ext.__file__).resolve().parents[1]

SKIPS = """
import pytest
def test_passes(): pass
def test_agreed(): pytest.skip("as agreed")
"""
UNEXPECTED = """
import pytest
def test_passes(): pass
def test_surprise(): pytest.skip("a surprise")
"""
ELSEWHERE = """
import pytest
@pytest.mark.skipif(False, reason="on no machine")
def test_surprise(): pass
@pytest.mark.skipif(False, reason="on no machine")
def test_agreed(): pass
"""
WHOLE_FILE = "import pytest\npytest.skip('a surprise', allow_module_level=True)\n"
DEVICES = """
import pytest
@pytest.mark.devices("cpu", "cuda")
def test_both(device): pass
@pytest.mark.devices("cuda")
def test_of_cuda(): assert False
def test_of_the_cpu(): pass
"""
# Each notes what it has seen of the others while it ran.
ALONE = """
import os, time, pytest, torch
from pathlib import Path
RUNNING = Path(__file__).parent / "running"
def note():
    RUNNING.mkdir(exist_ok=True)
    mine = RUNNING / str(os.getpid())
    mine.touch()
    seen = 0
    for _ in range(20):
        time.sleep(0.01)
        seen = max(seen, len(list(RUNNING.iterdir())))
    mine.unlink()
    return seen
@pytest.mark.parametrize("n", range(12))
def test_beside_others(n):
    note()
    assert torch.get_num_threads() == 1
@pytest.mark.alone
@pytest.mark.parametrize("n", range(6))
def test_alone(n):
    assert note() == 1
    assert torch.get_num_threads() == int(os.environ["THREADS"])
"""


def run(folder: Path, test: str, *arguments: str, **environment: str) -> tuple[int, str]:
    shutil.copy(TESTS / "conftest.py", folder)
    shutil.copy(TESTS / "locks.py", folder)
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "expected_skips.txt").write_text("*::test_agreed  # for this test\n")
    (folder / "test_some.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_some.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "CI": "1", **environment}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)
    return done.returncode, done.stdout + done.stderr


# What runs, where; the exit code, and what is said.
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
RUNS: dict[str, tuple[str, tuple[str, ...], dict[str, str], int, str]] = {
    "agreed": (SKIPS, (), {}, 0, "1 passed, 1 skipped"),
    "another": (UNEXPECTED, (), {}, 1, "expected_skips.txt does not list .*a surprise"),
    "another, not in CI": (UNEXPECTED, (), {"CI": ""}, 0, ""),
    "whole file": (WHOLE_FILE, ("test_another.py",), {}, 1, "expected_skips.txt does not list .*a surprise"),
    "elsewhere": (ELSEWHERE, (), {}, 1, "does not list.*test_surprise: marked skipif.*2 passed"),
    "devices": (DEVICES, (), NO_GPU, 0, "tests of CUDA were not collected: torch finds no GPU.*2 passed"),
    "CUDA only": (DEVICES, ("--device", "cuda"), NO_GPU, 1, "--device cuda, but torch finds no GPU"),
    "no extension": (
        SKIPS, (), {"LSTM_EXT_BACKEND": "reference"}, 1, "extension is not loaded, so nothing would be tested",
    ),
}  # fmt: skip


@pytest.mark.parametrize("processes", ["0", "2"])
@pytest.mark.parametrize("name", RUNS)
def test_runs(tmp_path: Path, name: str, processes: str) -> None:
    test, arguments, environment, expected, text = RUNS[name]
    (tmp_path / "test_another.py").write_text("def test_passes(): pass\n")
    code, said = run(tmp_path, test, *arguments, "-n", processes, **environment)
    assert code == expected, said
    assert re.search(text, said, re.DOTALL), said
    assert "test_agreed" not in said.partition("does not list")[2]


def test_alone(tmp_path: Path) -> None:
    code, said = run(tmp_path, ALONE, "-n", "3", THREADS="2", OMP_NUM_THREADS="2")
    assert code == 0, said


# ---- what is written about a run


def test_paths_are_recorded(tmp_path: Path) -> None:
    """By the processes of pytest-xdist too."""
    listed = tmp_path / "paths.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "paths", "-n", "2"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--list-paths", str(listed)]
    chosen = "test_cases and avx2 and (resets or returned) and not (packed or projection)"
    command += [str(TESTS / "cpu" / "test_options_kernels.py"), "-k", chosen]
    environment = os.environ | {"PYTHONPATH": f"{PACKAGE}{os.pathsep}{TESTS}"}
    subprocess.run(command, cwd=tmp_path, check=True, env=environment, capture_output=True)
    found = paths.read(str(listed))
    assert {"training", "backward"} <= {p["pass"] for p in found}
    assert {"bfloat16", "float16", "float32"} <= {p["dtype"] for p in found}
    assert "dense, resets" in {p["data"] for p in found}
    assert {"plain", "returned"} <= {p["step"] for p in found}
