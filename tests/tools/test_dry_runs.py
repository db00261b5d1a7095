"""The tools that are run by hand, for a moment: what they name is there, and they run."""

from __future__ import annotations

import shutil

import check_comments
import mutants
import planted
import pytest
import sanitize
import soak

pytestmark = pytest.mark.tools


def test_each_kernel_file_has_a_fault_and_each_fault_its_line() -> None:
    assert planted.problems() == []


def test_mutants_have_places(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutants.main(["--list", "--count", "5", "--only", "csrc/cpu/", "lstm_ext/call/"]) == 0
    first, *places = capsys.readouterr().out.splitlines()
    assert first.startswith("5 of ") and len(places) == 5


def test_fragments_are_refused() -> None:
    source = "// Of a unit.\nint rows;  // of a step\n\n// The first row.\n// Of these, a unit has one.\n"
    assert check_comments.problems("a.h", source) == ["a.h:1: Of a unit.", "a.h:2: of a step"]


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
    assert code == 5
    assert "at barrier 2 of its call, which 5 of 6 workers have reached" in said


def test_a_few_calls_of_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    """Their results: the memory and the threads of so few calls are those of the tests before."""
    soak.main(["--calls", "200"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(soak.MODES)
    assert all([" 0 of " in line for line in lines])
