"""The PTX route: kernels as nvcc compiles them, on the emulator, against the same kernels as g++ compiles them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import test_stepwise
import torch
from emulated_layer import stepwise_module
from judge import EPS, relative_error
from simt import build, nvcc, resources
from simt.modes import MODES
from simt.ptx_route import TranslatedKernels, translated

pytestmark = pytest.mark.tools

HERE = Path(__file__).parent
if build.missing():
    pytest.skip(build.missing(), allow_module_level=True)
if nvcc.find_nvcc() is None:
    pytest.skip("nvcc is not installed", allow_module_level=True)


def run(program: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=600, env={**os.environ, **environment}
    )
    return done.returncode, done.stdout + done.stderr


# ---- the wrappers of PTX


def wrappers(program: Path) -> dict[str, str]:
    """What each kernel of wrappers.cuh made, by the wrapper it is about."""
    status, text = run(program)
    assert status == 0, text
    return dict(line.split(": ", 1) for line in text.splitlines())


def wrappers_by_ptx(
    mode: str = "plain", csrc: Path = nvcc.CSRC, directory: Path = nvcc.BUILD
) -> dict[str, str]:
    source = translated(HERE / "wrappers.cu", csrc=csrc, directory=directory)
    return wrappers(build.compile_ptx_driver(HERE / "wrappers_driver.cpp", [source], mode))


def wrappers_by_gcc(mode: str = "plain", *include_dirs: Path) -> dict[str, str]:
    return wrappers(build.compile_driver([HERE / "wrappers_driver.cpp"], mode, include_dirs=include_dirs))


@pytest.mark.parametrize("mode", ["plain", "race"])
def test_wrappers_do_the_same_on_both_routes(mode: str) -> None:
    by_ptx, by_gcc = wrappers_by_ptx(mode), wrappers_by_gcc(mode)
    assert len(by_ptx) > 12
    assert by_ptx == by_gcc
    assert not any("simt:" in line for line in by_ptx.values())


# Mistakes in csrc/cuda/ptx.h that compile: the function, what is written there, what should not be. A round has those
# that do not disturb each other; the wrapper whose kernel shows it is the key.
Mistake = tuple[str, str, str]
ROUNDS: dict[str, tuple[str, dict[str, Mistake]]] = {
    "operands": (
        "plain",
        {
            "cp_async16": ("cp_async16(", "[%0], [%1], 16, %2", "[%2], [%1], 16, %0"),
            "ldmatrix_x4": ("ldmatrix_x4(", "%1, %2,", "%2, %1,"),
            "ldmatrix_x4_trans": ("ldmatrix_x4_trans(", ".trans", ""),
            "mma_f16_16816": ("mma_f16_16816(", "%5, %6,", "%6, %5,"),
            "mma_bf16_16816": ("mma_bf16_16816(", "{%8, %9}", "{%9, %8}"),
            "mma_tf32_1688": ("mma_tf32_1688(", "{%0, %1, %2, %3}, {%4", "{%0, %2, %1, %3}, {%4"),
            "to_tf32": ("to_tf32(", "cvt.rna.", "cvt.rn."),
            "words": ("load_relaxed(", "[%1]", "[%1+4]"),
            "load_relaxed_16": ("load_relaxed_16(", "%1, %2,", "%2, %1,"),
            "store_relaxed_16": ("store_relaxed_16(", "%3, %4}", "%4, %3}"),
        },
    ),
    "plain store": ("race", {"handover": ("store_relaxed(", "st.relaxed.gpu.", "st.")}),
}


def with_mistakes(csrc: Path, mistakes: dict[str, Mistake]) -> None:
    """Makes a copy of csrc/ that has them."""
    shutil.copytree(nvcc.CSRC, csrc)
    header = csrc / "cuda" / "ptx.h"
    text = header.read_text()
    for function, right, wrong in mistakes.values():
        at = text.index(right, text.index(f"{function}"))
        text = text[:at] + wrong + text[at + len(right) :]
    header.write_text(text)


@pytest.mark.parametrize("name", ROUNDS)
def test_planted_mistakes_in_wrappers_are_found(name: str, tmp_path: Path) -> None:
    mode, mistakes = ROUNDS[name]
    with_mistakes(tmp_path / "csrc", mistakes)
    right = wrappers_by_ptx(mode)
    wrong = wrappers_by_ptx(mode, tmp_path / "csrc", tmp_path)
    found = {wrapper for wrapper in right if right[wrapper] != wrong[wrapper]}
    assert found >= mistakes.keys()
    if name == "operands":
        # Each by its own kernel and not by another one's, but for kernels that need another wrapper too.
        assert found == mistakes.keys() | {"cp_async_wait", "handover_of_a_piece"}


def test_planted_mistakes_are_not_seen_by_gcc(tmp_path: Path) -> None:
    """Which is why there is a PTX route."""
    mistakes = {f"{name} {wrapper}": m for name, (_, ms) in ROUNDS.items() for wrapper, m in ms.items()}
    with_mistakes(tmp_path / "csrc", mistakes)
    assert wrappers_by_gcc("plain", tmp_path / "csrc") == wrappers_by_gcc("plain")


# ---- the toy kernels

TOYS = ("grid_f32", "grid_bf16")


def toy_driver(mode: str) -> Path:
    return build.compile_ptx_driver(HERE / "toy_driver.cpp", [translated(HERE / "toy.cu")], mode)


@pytest.mark.parametrize("schedule", ["fifo", "random", "priority"])
@pytest.mark.parametrize("kernel", TOYS)
def test_toy(kernel: str, schedule: str) -> None:
    status, text = run(
        toy_driver("plain"), kernel, SIMT_SCHEDULE=schedule, SIMT_COPIES="mixed", SIMT_SEED="3"
    )
    assert status == 0, text


@pytest.mark.parametrize("kernel", TOYS)
def test_toy_has_no_races(kernel: str) -> None:
    status, text = run(toy_driver("race"), kernel, SIMT_SCHEDULE="random")
    assert status == 0, text


def mailbox_driver(mode: str) -> Path:
    return build.compile_ptx_driver(HERE / "mailbox_driver.cpp", [translated(HERE / "toy.cu")], mode)


@pytest.mark.parametrize("mode", ["weak", "torn", "race-random"])
def test_mailbox(mode: str) -> None:
    for settings in MODES[mode].environments:
        status, text = run(mailbox_driver(MODES[mode].build), "mailbox", **settings)
        assert status == 0, text
        assert (", 0 stale loads" in text) == (mode == "race-random"), text


def bug_number(source: str, name: str) -> str:
    body = re.search(r"enum \w*Bug : int \{(.*?)\};", (HERE / source).read_text(), re.S)[1]
    return str(re.findall(r"^ +(k\w+),", body, re.M).index(name))


# With the mode that finds them.
MAILBOX_BUGS = {
    "kOneWordTested": ("torn", "wrong numbers"),
    "kFlagWithoutFence": ("weak", "wrong numbers"),
    "kLostStore": ("now", "a wait expired"),
}


@pytest.mark.parametrize("bug", MAILBOX_BUGS)
def test_planted_bug_in_the_mailbox_is_found(bug: str) -> None:
    mode, message = MAILBOX_BUGS[bug]
    number = bug_number("toy_mailbox.cuh", bug)
    environments = MODES[mode].environments
    runs = [run(mailbox_driver("plain"), "mailbox", number, **settings) for settings in environments]
    assert any(status != 0 and message in text for status, text in runs), runs


# Bugs of toy_lstm.cuh by name: the kernel, the mode that finds them, and what it says.
BUGS = {
    "kNoSyncAfterLoad": ("grid_f32", "race", "unordered with"),
    "kSharedWritePastEnd": ("grid_f32", "plain", "past the end of shared array"),
    "kNoCopyWait": ("grid_f32", "plain", "wrong numbers"),
    "kNoFence": ("grid_f32", "race", "unordered with"),
    "kDivergentBarrier": ("grid_f32", "plain", "divergent __syncthreads"),
    "kReadOnlyLoad": ("grid_f32", "race", "read-only cache"),
    "kLeavesEarly": ("grid_f32", "plain", "leaves while others"),
    "kMisalignedCopy": ("grid_f32", "plain", "not aligned"),
    "kSwappedFragments": ("grid_bf16", "plain", "wrong numbers"),
    "kMisalignedLdmatrix": ("grid_bf16", "plain", "16-byte aligned"),
    "kNoSyncwarp": ("grid_f32", "race", "unordered with"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_in_a_toy_is_found(bug: str) -> None:
    kernel, mode, message = BUGS[bug]
    status, text = run(toy_driver(mode), kernel, bug_number("toy_lstm.cuh", bug))
    assert status != 0 and message in text
    # Where it says a place, it is in the toys' own source, not in a wrapper or in generated code.
    assert " at " not in text or "at toy_" in text


# ---- the stepwise kernels

STEPWISE = [nvcc.CSRC / "cuda" / f"stepwise_{name}.cu" for name in ("f32", "f64", "f16", "bf16")]


@pytest.mark.parametrize(
    ("mode", "schedule", "architecture"),
    [
        ("race", "priority", "sm_90"),
        pytest.param("plain", "random", "sm_90", marks=pytest.mark.full),
        pytest.param("plain", "fifo", "sm_80", marks=pytest.mark.full),
        pytest.param("asan", "random", "sm_90", marks=pytest.mark.full),
    ],
)
def test_stepwise_kernels(mode: str, schedule: str, architecture: str) -> None:
    """Against float64, on fenced memory."""
    sources = [translated(source, architecture) for source in STEPWISE]
    program = build.compile_ptx_driver(HERE / "stepwise_driver.cpp", sources, mode)
    status, text = run(program, SIMT_SCHEDULE=schedule, ASAN_OPTIONS="detect_leaks=0")
    assert status == 0, text


TORN = {"SIMT_STORES": "mixed", "SIMT_PIECES": "torn"}
STEP = [nvcc.CSRC / "cuda" / f"step_{name}.cu" for name in ("f32", "f16", "bf16")]


@pytest.mark.parametrize(
    ("mode", "schedule", "architecture"),
    [
        ("race", "priority", "sm_90"),
        pytest.param("plain", "random", "sm_90", marks=pytest.mark.full),
        pytest.param("plain", "fifo", "sm_100", marks=pytest.mark.full),
    ],
)
def test_step_kernels(mode: str, schedule: str, architecture: str) -> None:
    """Both as nvcc compiles them: what the stepwise kernels give, but for the last bits."""
    sources = [translated(source, architecture) for source in (*STEP, STEPWISE[0], *STEPWISE[2:])]
    program = build.compile_ptx_driver(HERE / "step_driver.cpp", sources, mode)
    status, text = run(program, SIMT_SCHEDULE=schedule)
    assert status == 0, text


@pytest.mark.full
@pytest.mark.parametrize("variables", [{}, {"SIMT_SCHEDULE": "random", **TORN}], ids=["late", "torn"])
def test_persistent_kernels(variables: dict[str, str]) -> None:
    """In bfloat16: each type takes a minute to compile."""
    cuda = nvcc.CSRC / "cuda"
    sources = [translated(cuda / f"{kernels}_bf16.cu") for kernels in ("persistent", "stepwise")]
    driver = HERE / "persistent_driver.cpp"
    program = build.compile_ptx_driver(driver, sources, "plain", defines=["BFLOAT_ONLY"])
    status, text = run(program, **variables)
    assert status == 0, text


@pytest.fixture(scope="module")
def stepwise_kernels() -> TranslatedKernels:
    return TranslatedKernels(stepwise_module(), STEPWISE)


@pytest.mark.full  # translating and compiling takes most of a minute
@pytest.mark.parametrize("name", test_stepwise.CASES)
@pytest.mark.parametrize("dtype", EPS, ids=lambda d: str(d).removeprefix("torch."))
def test_stepwise_layer(name: str, dtype: torch.dtype, stepwise_kernels: TranslatedKernels) -> None:
    """On both routes the same, but for the last bits of exp and tanh."""
    case = test_stepwise.CASES[name]
    plain = test_stepwise.drawn(case, dtype, 0)
    with stepwise_kernels.in_use():
        by_ptx = test_stepwise.drawn(case, dtype, 0)
    for name, value in by_ptx.items():
        assert relative_error(value, plain[name]) <= 16 * EPS[dtype], name


@pytest.mark.full
def test_stepwise_kernels_are_the_translated_ones(stepwise_kernels: TranslatedKernels) -> None:
    """Otherwise the test above compares one route with itself. nvcc's exp is not libm's."""
    case = test_stepwise.Case(steps=3, hidden_size=64)
    plain = test_stepwise.drawn(case, torch.float32, 0)
    with stepwise_kernels.in_use():
        by_ptx = test_stepwise.drawn(case, torch.float32, 0)
    assert not torch.equal(by_ptx["output"], plain["output"])


# ---- wavefronts of shared memory


def test_wavefronts_of_known_patterns() -> None:
    """Each line of the kernel says what its access costs."""
    source = HERE / "bank_patterns.cuh"
    known = {
        number: tuple(map(int, found.groups()))
        for number, line in enumerate(source.read_text().splitlines(), 1)
        if (found := re.search(r"// (\d+) of (\d+)$", line))
    }
    program = build.compile_ptx_driver(
        HERE / "bank_patterns_driver.cpp", [translated(HERE / "bank_patterns.cu")]
    )
    status, text = run(program, SIMT_WAVEFRONTS="yes")
    assert status == 0, text
    counted = {
        line: (wavefronts / accesses, least / accesses)
        for (_, line, _), (accesses, wavefronts, least) in resources.counted(text).items()
    }
    assert counted == known and len(known) > 12
    assert not resources.counted(run(program)[1])


@pytest.mark.parametrize("kernels", ["step", pytest.param("persistent", marks=pytest.mark.full)])
def test_wavefronts_are_as_recorded(kernels: str) -> None:
    """In no loop over the depth or the steps do banks stand in each other's way."""
    if resources.recorded()[0] != nvcc.version():
        pytest.skip(f"recorded with nvcc {resources.recorded()[0]}; this one is {nvcc.version()}")
    found = resources.wavefronts(kernels)
    assert found == resources.recorded_wavefronts()[kernels]
    pieces = {name: numbers for name, numbers in found.items() if name.endswith(" 16")}
    assert pieces and all(number == least for number, least in pieces.values()), pieces
