"""Type checkers accept a user's program, tests/nn/typing_program.py, and see the mistakes in another one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import lstm_ext

pytestmark = pytest.mark.tools

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "nn" / "typing_program.py"
PACKAGE = Path(lstm_ext.__file__).resolve().parents[1]

RIGHT = """import torch, lstm_ext
lstm, x = lstm_ext.LSTM(3, 4), torch.randn(5, 2, 3)
"""
# Each line is a mistake.
MISTAKES = """lstm([1.0, 2.0])
lstm(x, x)
lstm(x, lengths="5")
lstm(x, no_such_argument=1)
a, b, c = lstm(x)
d, e = lstm(x, return_gates=True)
lstm_ext.functional.lstm(x, None, [], cellclip=1.0)
lstm_ext.convert(3)
lstm_ext.freeze(lstm, weights="int8")
lstm_ext.LSTMCell(3, 4)(x)[2]
lstm_ext.revert(lstm).step(x[0]).no_such_attribute
"""


def check_by_mypy(folder: Path) -> str:
    # As for an installed package, only the user's own lines are reported.
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "."]
    return output_of(command, folder, MYPYPATH=str(PACKAGE), MYPY_CACHE_DIR=str(folder / "cache"))


def check_by_pyright(folder: Path) -> str:
    settings = {"extraPaths": [str(PACKAGE)], "typeCheckingMode": "strict"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    return output_of([sys.executable, "-m", "pyright", "--pythonpath", sys.executable], folder)


def output_of(command: list[str], folder: Path, **variables: str) -> str:
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


CHECKERS = {"mypy": check_by_mypy, "pyright": check_by_pyright}


@pytest.mark.parametrize(
    "checker",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                importlib.util.find_spec(name) is None, reason=f"{name} is not installed"
            ),
        )
        for name in CHECKERS
    ],
)
def test_mistakes_are_seen_and_nothing_else(checker: str, tmp_path: Path) -> None:
    (tmp_path / PROGRAM.name).write_text(PROGRAM.read_text())
    (tmp_path / "wrong.py").write_text(RIGHT + MISTAKES)
    found = CHECKERS[checker](tmp_path)
    places = set(re.findall(r"(\w+\.py):(\d+)(?::\d+)?:? (?:- )?error", found))
    first = RIGHT.count("\n") + 1
    wanted = {("wrong.py", str(first + k)) for k in range(MISTAKES.count("\n"))}
    assert places == wanted, found


def test_the_program_runs() -> None:
    """So its types are those of real calls."""
    runpy.run_path(str(PROGRAM), run_name="__main__")
