"""The examples on real data run in their short form, draw a picture, and their own checks pass."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_demo import environment

pytestmark = pytest.mark.tools

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TORCHRUN = [
    *("-m", "torch.distributed.run", "--nproc-per-node", "2"),
    # a port that is free, on this machine
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "127.0.0.1"),
]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


@pytest.mark.parametrize("name", ["forecast", "tagger", "streaming", "data_parallel"])
def test_quick_run(name: str, tmp_path: Path) -> None:
    if name == "forecast" and importlib.util.find_spec("statsmodels") is None:
        pytest.skip("statsmodels, of the optional group `demo`, is not installed")
    picture = tmp_path / "picture.png"
    launcher = TORCHRUN if name == "data_parallel" else []
    done = run(*launcher, str(EXAMPLES / f"{name}.py"), "--quick", "--output", str(picture))
    assert done.returncode == 0, done.stdout + done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"the picture is {picture}" in done.stdout


def test_data_parallel_alone_says_how_to_start_it() -> None:
    assert "RANK" not in os.environ
    done = run(str(EXAMPLES / "data_parallel.py"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: start it with torchrun --nproc-per-node 2 ")
    assert len(done.stderr.splitlines()) == 1
