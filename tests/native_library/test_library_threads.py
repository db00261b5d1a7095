"""Threads that compute one stream have no race: under the thread sanitizer, with the bits of one thread."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from c_library import built, linked

import lstm_ext

pytestmark = pytest.mark.tools

SOURCE = Path(__file__).parent / "teams.c"
SANITIZED = "-fsanitize=thread"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix, folder = built(f"-O1 {SANITIZED}", "avx2"), tmp_path_factory.mktemp("teams")
    return linked(SOURCE, prefix, folder / "teams", "-pthread", SANITIZED)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("sizes", "options", "weights", "batch"),
    [
        ((64, 128), {"num_layers": 3}, None, 8),
        ((32, 64), {"num_layers": 2, "bidirectional": True}, None, 1),  # both directions at once
        ((96, 160), {"proj_size": 40}, torch.int8, 2),
        ((96, 256), {"layer_norm": True, "zoneout": (0.1, 0.2), "proj_size": 100}, None, 2),
    ],
    ids=["rows", "directions", "units", "options"],
)
def test_no_race(
    program: Path,
    sizes: tuple[int, int],
    options: dict[str, Any],
    weights: torch.dtype | None,
    batch: int,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    lstm_ext.freeze(lstm_ext.LSTM(*sizes, **options), weights).save_native(tmp_path / "weights")
    run = subprocess.run(
        [program, tmp_path / "weights", str(batch)], capture_output=True, text=True, timeout=300
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == "".join([f"{threads} threads: same\n" for threads in range(1, 5)])


# Of two threads that a stream needs, one comes.
ALONE = """
import ctypes, sys
from pathlib import Path
sys.path[:0] = sys.argv[2].split(":")
from c_library import LibraryError, Model, Stream, call
stream, x, y = Stream(Model(Path(sys.argv[1])), threads=2), (ctypes.c_float * 64)(), (ctypes.c_float * 64)()
for _ in range(2):
    try:
        call("step_part", stream.pointer, x, y, ctypes.c_int64(0))
    except LibraryError as error:
        print(error)
"""


def test_a_wait_that_is_too_long_is_an_error(tmp_path: Path) -> None:
    built()  # before the program has a limit
    lstm_ext.freeze(lstm_ext.LSTM(64, 64)).save_native(tmp_path / "weights")
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "weights", f"{here}:{here.parent}"],
        env={**os.environ, "LSTM_EXT_CPU_WAIT_LIMIT": "0.2"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    first, second = run.stdout.splitlines()
    assert (
        "longer than LSTM_EXT_CPU_WAIT_LIMIT allows, at barrier 1 of its call, which 1 of 2 workers" in first
    )
    assert (
        second
        == "stream: a worker waited longer than LSTM_EXT_CPU_WAIT_LIMIT allows: expected another stream"
    )
