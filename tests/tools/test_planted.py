"""planted.py: its table fits the tree, it says so where it does not, and, in the long tier, what it finds.

And sanitize.py and soak.py, which are run by hand: what they need is there, and they see what is wrong.
"""

from __future__ import annotations

import ctypes
import shutil
import signal
from pathlib import Path

import planted
import pytest
import sanitize
import soak
import torch

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
        "csrc/cpu/new.h has no fault in tests/tools/planted.py",
        f"csrc/cpu/cell.h has {fault.right!r} 0 times, and not once",
        "csrc/cuda/reduction.cuh is not there any more",
    ]


@pytest.mark.full
def test_every_fault_is_found() -> None:
    assert planted.main([]) == 0


def test_what_is_run_under_sanitizers_is_there() -> None:
    for test in sanitize.TESTS:
        assert (planted.ROOT / test).is_file(), test
    for test in sanitize.LEFT_OUT:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (planted.ROOT / file).read_text(), test
    assert sanitize.SCRATCH[0] in (planted.ROOT / "csrc" / "torch" / "scratch.cpp").read_text()
    barrier = (planted.ROOT / "csrc" / "cpu" / "barrier.h").read_text()
    assert [barrier.count(order) for order in sanitize.ORDERS] == [1, 1, 1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_teams_without_torch() -> None:
    program = sanitize.driver("registers", ["-O0"])
    code, said = sanitize.run_driver(program, "teams", "members")
    assert code == 0, said
    assert said.count("same;") == 2
    code, said = sanitize.run_driver(program, "wait")
    assert code == -signal.SIGABRT
    assert "at barrier 2 of its call, which 5 of 6 workers have reached" in said


def test_a_few_calls_of_each_kind(capsys) -> None:
    """Their results: the memory and the threads of so few calls are those of the tests before."""
    soak.main(["--calls", "200"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(soak.MODES)
    assert all([" 0 of " in line for line in lines])


def test_a_soak_that_fails(monkeypatch, capsys) -> None:
    kept: list[torch.Tensor] = []

    def growing() -> list[torch.Tensor]:
        kept.append(torch.ones(1 << 14))
        return [torch.ones(1)]

    monkeypatch.setitem(soak.MODES, "growing", lambda rng: growing)
    monkeypatch.setitem(soak.MODES, "changing", lambda rng: lambda: [torch.rand(1)])
    # Else what grows may lie in memory that earlier tests have left to the process.
    ctypes.CDLL(None).malloc_trim(0)
    assert soak.main(["growing", "changing", "--calls", "1000"]) == 1
    grown, changed = capsys.readouterr().out.splitlines()
    assert grown.startswith("growing: FAILED") and " 0 of 100 results differ" in grown
    assert changed.startswith("changing: FAILED") and " 100 of 100 results differ" in changed
