"""planted.py: its table fits the tree, it says so where it does not, and, in the long tier, what it finds."""

from __future__ import annotations

import shutil
from pathlib import Path

import planted
import pytest

pytestmark = pytest.mark.tools


def test_each_kernel_file_has_a_fault() -> None:
    assert planted.problems() == []


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(planted.ROOT / "csrc", csrc)
    (csrc / "cpu" / "new.h").touch()
    (csrc / "cuda" / "reduction.cuh").unlink()
    cell = csrc / "cpu" / "cell.h"
    fault = planted.FAULTS["cpu/cell.h"]
    cell.write_text(cell.read_text().replace(fault.right, fault.wrong))
    assert planted.problems(csrc) == [
        "csrc/cpu/new.h has no fault in tests/planted.py",
        f"csrc/cpu/cell.h has {fault.right!r} 0 times, and not once",
        "csrc/cuda/reduction.cuh is not there any more",
    ]


@pytest.mark.full
def test_every_fault_is_found() -> None:
    assert planted.main([]) == 0
