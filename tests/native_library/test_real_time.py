"""After a stream is made, nothing is allocated and no system call is made. Before, any allocation may fail."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from c_library import built, linked

import lstm_ext

pytestmark = pytest.mark.tools

SOURCE = Path(__file__).parent / "real_time.c"
LAYERS = {
    "plain": (lambda: lstm_ext.LSTM(40, 64, num_layers=2), None),
    # More weights than the second-level cache holds: their units are taken in groups.
    "large": (lambda: lstm_ext.LSTM(320, 320, num_layers=2), torch.bfloat16),
    "both": (lambda: lstm_ext.LSTM(24, 48, bidirectional=True, dtype=torch.float64), None),
    "options": (lambda: lstm_ext.LSTM(24, 130, proj_size=33, layer_norm=True, zoneout=0.1), torch.int8),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linked(SOURCE, built(), tmp_path_factory.mktemp("real_time") / "real_time", "-pthread")


@pytest.fixture(scope="module", params=LAYERS)
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make, kind = LAYERS[request.param]
    path = tmp_path_factory.mktemp("weights") / "weights"
    lstm_ext.freeze(make(), kind).save_native(path)
    return path


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess:
    # A limit of waits reads the clock.
    environment = {name: value for name, value in os.environ.items() if name != "LSTM_EXT_CPU_WAIT_LIMIT"}
    command = [program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.alone
@pytest.mark.parametrize("threads", [1, 2])
def test_no_allocation_and_no_system_call(program: Path, weights: Path, threads: int) -> None:
    allocations = run(program, weights, threads, "allocations")
    assert (allocations.stdout, allocations.stderr) == ("0 allocations\n", "")
    in_place = run(program, weights, threads, "in_place")
    assert (in_place.stdout, in_place.stderr) == ("0 allocations\n", "")
    calls = run(program, weights, threads, "calls")
    assert (calls.stdout, calls.stderr, calls.returncode) == ("made all calls\n", "", 0)


def test_no_memory(program: Path, weights: Path) -> None:
    """Wherever an allocation fails, the program gets a line and no exception."""
    found = run(program, weights, 1, "no_memory")
    assert (found.returncode, found.stderr) == (0, "")
    assert int(found.stdout.removesuffix(" allocations\n")) > 3


def test_the_program_sees_both(program: Path, weights: Path) -> None:
    assert run(program, weights, 1, "allocate").stdout == "2 allocations\n"
    assert run(program, weights, 1, "call").returncode == -signal.SIGSYS
