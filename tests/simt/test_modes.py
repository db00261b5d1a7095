"""The emulated layer in every mode, against the bits of the layer whose threads run in turn."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from emulated_layer import CASES_OF, LOST, in_mode, module_path
from locks import locked
from simt.build import BUILD, ROOT, compile_driver, missing
from simt.modes import LATE, MANY_SEEDS, MODES, Mode, run

pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

HERE = Path(__file__).resolve().parent
TYPES = ("bf16", "f16", "f32", "f64")
QUICK = ("bf16",)  # types


def cases_of(kernels: Iterable[str]) -> list[tuple[str, str]]:
    return [(kernel, name) for kernel in kernels for name in CASES_OF[kernel]]


@functools.cache
def expected(types: tuple[str, ...]) -> str:
    """The file of what comes out where threads run in turn. test_stepwise.py judges that. SIMT_EXPECTED names the file
    of the right kernels, where these have a fault (tests/tools/planted.py)."""
    module = module_path("plain", types)
    sources = (HERE / "emulated_layer.py", ROOT / "tests" / "cases.py")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:20]
    file = Path(os.environ.get("SIMT_EXPECTED", BUILD / f"{module.stem}-{digest}.pt"))
    with locked(file.with_suffix(".lock")):
        if not file.exists():
            partial = file.with_suffix(".partial")
            problems, _ = in_mode(module, [LATE], cases=cases_of(CASES_OF), types=types, save=str(partial))
            assert not problems, problems
            partial.rename(file)
    return str(file)


def problems_in(
    mode: Mode, kernels: Iterable[str], types: tuple[str, ...] = QUICK, **more: object
) -> list[str]:
    module = module_path(mode.build, types)
    return in_mode(
        module, mode.environments, cases=cases_of(kernels), types=types, expected=expected(types), **more
    )[0]


# `make test-tools` has some environments of some modes, with kernels in bfloat16; `make test-full` has all.

KERNELS = {
    "stepwise": ("stepwise",),
    "step": ("step", "dependent"),
    "persistent": ("persistent", "turns", LOST),
    "large": ("large",),
}
SOME = {
    ("random", "stepwise"): 1,
    ("random", "step"): 2,
    ("random", "persistent"): 3,
    ("weak", "persistent"): 1,
    ("torn", "persistent"): 1,
    ("race", "stepwise"): 1,
    ("race", "step"): 1,
    ("race", "persistent"): 1,
}


@pytest.mark.parametrize(
    ("mode", "kernels"),
    # The bits are those of the mode "late", which so has nothing to show but with SIMT_EXPECTED.
    [*SOME, *(pytest.param("late", kernels, marks=pytest.mark.full) for kernels in KERNELS)],
)
def test_the_same_bits(mode: str, kernels: str) -> None:
    some = Mode(MODES[mode].build, MODES[mode].environments[: SOME.get((mode, kernels))])
    problems = problems_in(some, KERNELS[kernels])
    assert not problems, "\n".join(problems)


@pytest.mark.full
@pytest.mark.parametrize("kernels", ["stepwise", "step", "persistent"])
@pytest.mark.parametrize(
    "mode", [mode for mode in (*MODES, "many seeds") if mode not in ("late", "truncated")]
)
def test_the_same_bits_of_all_types(mode: str, kernels: str) -> None:
    assert not problems_in(MODES.get(mode, MANY_SEEDS), KERNELS[kernels], TYPES)


@pytest.mark.parametrize("types", [QUICK, pytest.param(TYPES[1:3], marks=pytest.mark.full)])
def test_truncated_sums(types: tuple[str, ...]) -> None:
    """As exact, but for a rounding."""
    assert not problems_in(MODES["truncated"], ("step", "persistent"), types, tolerance=1)


@pytest.mark.parametrize("mode", ["late", "random", "weak"])
def test_a_block_that_comes_late(mode: str) -> None:
    for done in run(compile_driver([HERE / "late_block_driver.cpp"]), mode=MODES[mode]):
        assert done.returncode == 0, done.stdout


@pytest.mark.full
def test_a_nan_of_all_bits_is_handed_on(tmp_path: Path) -> None:
    """No conversion makes one: here all do."""
    name = "cuda/persistent_chunk.cuh"
    right = "return reinterpret_cast<const uint16_t&>(value);"
    wrong = "return widen(value) != widen(value) ? 0xffffu : reinterpret_cast<const uint16_t&>(value);"
    text = (ROOT / "csrc" / name).read_text()
    assert right in text
    (tmp_path / "cuda").mkdir()
    (tmp_path / name).write_text(text.replace(right, wrong))
    module = module_path("plain", QUICK, [tmp_path])
    cases, same = cases_of(["persistent"]), expected(QUICK)
    assert in_mode(module, [LATE], cases=cases, types=QUICK, expected=same)[0] == []


# ---- the nonlinearities


@pytest.mark.parametrize(
    ("stride", "offset"), [(997, 3), *(pytest.param(2, offset, marks=pytest.mark.full) for offset in (0, 1))]
)
def test_fast_functions_err_by_no_more_than_they_say(stride: int, offset: int) -> None:
    """All numbers of 32 bits with stride 2, which takes six minutes; a thousandth of them else."""
    program = compile_driver([HERE / "fast_functions.cpp"])
    done = subprocess.run([program, str(stride), str(offset)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
