"""The emulator's own tests: what it computes, the rules it enforces, and bugs that it has to find.

A driver is a C++ program (see README.md); how it was run is in the test's name.
"""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import pytest
from simt import build
from simt.modes import MANY_SEEDS, MODES, Mode, run

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
    assert_passes("race_driver", mode=mode)


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
    for done in run(program("toy_driver", "plain"), "grid_f32", mode=MODES["late"], SIMT_SCHEDULE="frantic"):
        assert done.returncode == 2 and "frantic, and not one of: fifo random priority" in done.stdout, (
            report(done)
        )


KERNELS = ["grid_f32", "grid_bf16", "mailbox"]


def driver_of(kernel: str) -> str:
    return "mailbox_driver" if kernel == "mailbox" else "toy_driver"


@pytest.mark.tools
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("kernel", KERNELS)
def test_toy_kernels(kernel: str, mode: str) -> None:
    assert_passes(driver_of(kernel), kernel, mode=mode)


@pytest.mark.tools
@pytest.mark.parametrize("mode", ["now", "weak", "torn", "race-random"])
@pytest.mark.parametrize("blocks", [2, 4])
def test_mailbox_of_some_blocks(blocks: int, mode: str) -> None:
    """7 steps and a full block of rows; 1 step and a single row."""
    for steps, batch in ((7, 16), (1, 1)):
        assert_passes("mailbox_driver", "mailbox", 0, steps, batch, blocks, mode=mode)


@pytest.mark.tools
def test_stores_are_late_where_they_should_be() -> None:
    for mode in ("now", "weak", "torn"):
        for done in run(program("mailbox_driver", "plain"), "mailbox", mode=MODES[mode]):
            stale = int(re.search(r"(\d+) stale loads", done.stdout)[1])
            assert (stale > 0) == (mode != "now"), report(done)


@pytest.mark.full
def test_fibers_of_other_processors() -> None:
    mode = Mode("ucontext", MODES["random"].environments)
    for kernel in KERNELS:
        assert_passes(driver_of(kernel), kernel, mode=mode)
    assert_passes("rules_driver", mode=mode)


@pytest.mark.full
@pytest.mark.parametrize("batch", [1, 8, 16])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("kernel", KERNELS)
def test_toy_kernels_with_many_orders(kernel: str, steps: int, batch: int) -> None:
    assert_passes(driver_of(kernel), kernel, 0, steps, batch, mode=MANY_SEEDS)
    for mode in ("asan", "race", "race-random", "weak", "torn"):
        assert_passes(driver_of(kernel), kernel, 0, steps, batch, mode=mode)


@functools.cache
def bugs_of(kernel: str) -> list[str]:
    """By number; the first stands for none."""
    source = "toy_mailbox.cuh" if kernel == "mailbox" else "toy_lstm.cuh"
    declared = re.search(r"enum \w*Bug : int \{(.*?)\};", (HERE / source).read_text(), re.S)
    return re.findall(r"^ +(k\w+),", declared[1], re.M)


WRONG = "wrong numbers"
EXPIRED = "a wait expired"
RACE = "racy accesses"
POISON = "use-after-poison"


def everywhere(message: str) -> dict[str, str]:
    return dict.fromkeys(MODES, message)


# Planted bugs: the kernel, the name in its source, what each mode that must catch it says, and the modes that are
# known to miss it: the reason why there are several. Random modes have to catch it in one of their orders.
PLANTED: list[tuple[str, str, dict[str, str], list[str]]] = [
    ("grid_f32", "kNoSyncAfterLoad", {"late": WRONG, "random": WRONG, "race": RACE}, []),
    ("grid_f32", "kSharedWritePastEnd", {"late": "past the end of shared array", "asan": POISON}, []),
    ("grid_f32", "kNoCopyWait", {"late": WRONG, "random": WRONG, "race": RACE}, ["now"]),
    ("grid_f32", "kNoFence", {"race": RACE}, ["late", "now", "random", "asan"]),
    ("grid_f32", "kTargetOffByOne", {"random": WRONG, "race-random": RACE}, ["late", "now", "asan", "race"]),
    ("grid_f32", "kGlobalReadPastEnd", {"late": WRONG, "asan": POISON}, []),
    ("grid_f32", "kGlobalWritePastEnd", {"late": "past the end of buffer c", "asan": POISON}, []),
    ("grid_f32", "kDivergentBarrier", everywhere("divergent __syncthreads"), []),
    ("grid_f32", "kReadOnlyLoad", {"race": "read-only cache"}, ["late", "now", "random", "asan"]),
    ("grid_f32", "kLeavesEarly", everywhere("leaves while others|after a thread of the block has left"), []),
    ("grid_f32", "kCopyNeverAwaited", everywhere("a cp.async that it has not waited for"), []),
    ("grid_f32", "kMisalignedCopy", everywhere("not aligned to the bytes copied"), []),
    ("grid_f32", "kNoSyncwarp", {"random": WRONG, "race": RACE}, ["late", "now", "asan"]),
    ("grid_f32", "kPartialMask", everywhere("other lanes are in"), []),
    ("grid_bf16", "kNoSyncBeforeLdmatrix", {"late": WRONG, "random": WRONG, "race": RACE}, []),
    ("grid_bf16", "kSwappedFragments", {"late": WRONG}, []),
    ("grid_bf16", "kMisalignedLdmatrix", everywhere("ldmatrix: a row is not 16-byte aligned"), []),
    (
        "mailbox",
        "kOneWordTested",
        {"torn": WRONG},
        ["late", "now", "random", "asan", "race", "race-random", "weak"],
    ),
    (
        "mailbox",
        "kFlagWithoutFence",
        {"weak": WRONG},
        ["late", "now", "random", "asan", "race", "race-random"],
    ),
    # Threads in turn make steps together, and nobody is ever a step behind.
    ("mailbox", "kNoMemset", {"random": WRONG, "weak": WRONG}, ["late", "now", "asan", "race"]),
    ("mailbox", "kReusedSlots", {"random": WRONG, "weak": WRONG}, ["late", "now", "asan", "race"]),
    ("mailbox", "kWrongStep", {"random": WRONG, "weak": WRONG}, ["late", "now", "asan", "race"]),
    ("mailbox", "kSentinelAsData", everywhere(EXPIRED), []),
    ("mailbox", "kLostStore", everywhere(EXPIRED), []),
    ("mailbox", "kRowBeyondBatch", everywhere(EXPIRED), []),
]

# "everywhere" is checked in these; in all of MODES by the full tests.
QUICK = {"late", "race"}


def planted_cases() -> list:
    cases = []
    for kernel, bug, caught, _ in PLANTED:
        for mode, message in caught.items():
            full = len(caught) == len(MODES) and mode not in QUICK
            marks = [pytest.mark.full] if full else []
            cases.append(pytest.param(kernel, bug, mode, message, id=f"{kernel}-{bug}-{mode}", marks=marks))
    return cases


def outcomes(kernel: str, bug: str, mode: str) -> list[subprocess.CompletedProcess]:
    driver = program(driver_of(kernel), MODES[mode].build)
    return list(run(driver, kernel, bugs_of(kernel).index(bug), mode=MODES[mode]))


@pytest.mark.tools
@pytest.mark.parametrize(("kernel", "bug", "mode", "message"), planted_cases())
def test_planted_bug_is_caught(kernel: str, bug: str, mode: str, message: str) -> None:
    runs = outcomes(kernel, bug, mode)
    caught = [
        done.returncode != 0 and any(part in done.stdout + done.stderr for part in message.split("|"))
        for done in runs
    ]
    assert any(caught), "\n".join(map(report, runs))


@pytest.mark.tools
@pytest.mark.parametrize(
    ("kernel", "bug", "mode"),
    [pytest.param(k, bug, mode, id=f"{k}-{bug}-{mode}") for k, bug, _, missed in PLANTED for mode in missed],
)
def test_planted_bug_that_a_mode_misses(kernel: str, bug: str, mode: str) -> None:
    """Should one of these fail, the emulator has become better, and the table above can say so."""
    for done in outcomes(kernel, bug, mode):
        assert done.returncode == 0, report(done)


@pytest.mark.tools
def test_every_bug_is_planted() -> None:
    for kernel, of_its_source in (("grid_f32", KERNELS[:-1]), ("mailbox", KERNELS[-1:])):
        assert set(bugs_of(kernel)[1:]) == {bug for k, bug, _, _ in PLANTED if k in of_its_source}
