"""Threads that compute one stream have no race: under the thread sanitizer, with the bits of one thread."""

from __future__ import annotations

import subprocess
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
