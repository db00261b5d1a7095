"""The emulator's own tests: what it computes, the rules it enforces, and accesses and stores that it has to see.

A driver is a C++ program (see README.md); how it was run is in the test's name.
"""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import pytest
from simt import build
from simt.modes import MODES, Mode, run

HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))


@functools.cache
def program(name: str, mode: str) -> Path:
    return build.compile_driver([HERE / f"{name}.cpp"], mode)


def report(done: subprocess.CompletedProcess) -> str:
    return f"exit code {done.returncode}\n{done.stdout}{done.stderr}"


def assert_passes(driver: str, *arguments: object, mode: str | Mode) -> None:
    mode = MODES[mode] if isinstance(mode, str) else mode
    for done in run(program(driver, mode.build), *arguments, mode=mode):
        assert done.returncode == 0, report(done)


# The drivers set schedules and times of delivery themselves.
@pytest.mark.parametrize(
    "mode", ["late", *(pytest.param(mode, marks=pytest.mark.tools) for mode in ("asan", "race"))]
)
def test_primitives(mode: str) -> None:
    assert_passes("primitives_driver", mode=mode)


@pytest.mark.tools
@pytest.mark.parametrize("mode", ["late", "now", "random", "asan", "race"])
def test_rules(mode: str) -> None:
    assert_passes("rules_driver", mode=mode)


@pytest.mark.tools
@pytest.mark.parametrize("mode", ["race", "race-random"])
def test_race_detector(mode: str) -> None:
    assert_passes("rules_driver", "race", mode=mode)


def test_stores_that_are_seen_late() -> None:
    """No outcome that the memory model forbids, and those that it allows."""
    assert_passes("weak_driver", mode="late")


WILD_ACCESSES = [
    "past_a_static_array",
    "before_a_static_array",
    "past_dynamic_memory",
    "past_a_buffer",
    "before_a_buffer",
]


@pytest.mark.tools
@pytest.mark.parametrize("rule", WILD_ACCESSES)
def test_wild_access(rule: str) -> None:
    assert_passes("rules_driver", rule, mode="late")
    for done in run(program("rules_driver", "asan"), rule, mode=MODES["asan"]):
        assert done.returncode != 0 and "use-after-poison" in done.stderr, report(done)


@pytest.mark.tools
def test_the_environment_is_checked() -> None:
    for done in run(program("late_block_driver", "plain"), mode=MODES["late"], SIMT_SCHEDULE="frantic"):
        assert done.returncode == 2 and "frantic, and not one of: fifo random priority" in done.stdout, (
            report(done)
        )


@pytest.mark.full
@pytest.mark.parametrize("driver", ["primitives_driver", "rules_driver", "late_block_driver"])
def test_fibers_of_other_processors(driver: str) -> None:
    assert_passes(driver, mode=Mode("ucontext", MODES["random"].environments))
