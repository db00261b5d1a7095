"""The PTX route: kernels as nvcc compiles them, on the emulator, against the same kernels as g++ compiles them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from emulated_layer import in_mode, module_path
from simt import build, nvcc
from simt.ptx_route import translated
from test_modes import KERNELS, QUICK, TYPES, cases_of, expected

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


@pytest.mark.parametrize("mode", ["plain", "race"])
def test_wrappers_do_the_same_on_both_routes(mode: str) -> None:
    driver, source = HERE / "wrappers_driver.cpp", translated(HERE / "wrappers.cu")
    by_ptx = wrappers(build.compile_ptx_driver(driver, [source], mode))
    by_gcc = wrappers(build.compile_driver([driver], mode))
    assert len(by_ptx) > 12
    assert by_ptx == by_gcc
    assert not any("simt:" in line for line in by_ptx.values())


# ---- the kernels of the layer

# What is compiled: the stepwise kernels serve the others too.
FAMILIES = {"stepwise": ("stepwise",), "step": ("step", "stepwise"), "persistent": ("persistent", "stepwise")}


def by_ptx(
    family: str,
    environment: dict[str, str],
    mode: str = "plain",
    types: tuple[str, ...] = QUICK,
    architecture: str = "sm_90",
    tolerance: float = 16,
) -> tuple[list[str], str]:
    """Where the layer differs from that of g++'s kernels by more than the last bits of exp and tanh; and what the
    process has printed."""
    paths = [nvcc.CSRC / "cuda" / f"{name}_{type}.cu" for name in FAMILIES[family] for type in types]
    sources = [translated(path, architecture) for path in paths if path.exists()]
    module = module_path(mode, types)
    library = str(build.compile_ptx_library(sources, module, mode))
    job = {"cases": cases_of(KERNELS[family]), "types": types, "expected": expected(types)}
    return in_mode(module, [environment], tolerance=tolerance, library=library, **job)


RANDOM = {"SIMT_SCHEDULE": "random", "SIMT_COPIES": "mixed"}
TORN = {"SIMT_SCHEDULE": "random", "SIMT_STORES": "mixed", "SIMT_PIECES": "torn"}


@pytest.mark.parametrize("family", [pytest.param("stepwise", marks=pytest.mark.full), "step"])
def test_kernels_have_no_races(family: str) -> None:
    assert not by_ptx(family, {"SIMT_SCHEDULE": "priority"}, "race")[0]


@pytest.mark.full  # translating and compiling takes most of a minute
@pytest.mark.parametrize(
    ("family", "environment", "types", "architecture"),
    [
        ("stepwise", RANDOM, TYPES, "sm_90"),
        ("stepwise", {}, TYPES, "sm_80"),
        ("step", RANDOM, TYPES[:3], "sm_90"),
        ("step", {}, TYPES[:3], "sm_100"),
        ("persistent", {}, QUICK, "sm_90"),
        ("persistent", TORN, QUICK, "sm_90"),
    ],
)
def test_kernels(family: str, environment: dict[str, str], types: tuple[str, ...], architecture: str) -> None:
    assert not by_ptx(family, environment, types=types, architecture=architecture)[0]


@pytest.mark.full
def test_kernels_are_the_translated_ones() -> None:
    """Otherwise the tests above compare one route with itself. nvcc's exp is not libm's."""
    assert "differ" in by_ptx("stepwise", {}, types=("f32",), tolerance=0)[0][0]


# ---- wavefronts of shared memory


def counted(text: str) -> dict[tuple[str, int, str], tuple[int, int, int]]:
    """By file, line and access: accesses of a warp, their wavefronts, and how few there could be."""
    pattern = r"^wavefronts: (\S+):(\d+) (\w+ \d+): (\d+) accesses, (\d+) wavefronts, (\d+) at least$"
    lines = re.findall(pattern, text, re.MULTILINE)
    return {(file, int(line), access): (int(n), int(w), int(m)) for file, line, access, n, w, m in lines}


def test_wavefronts_of_known_patterns() -> None:
    """Each line of the kernel says what its access costs."""
    source = HERE / "wrappers.cuh"
    known = {
        number: tuple(map(int, found.groups()))
        for number, line in enumerate(source.read_text().splitlines(), 1)
        if (found := re.search(r"// (\d+) of (\d+)$", line))
    }
    program = build.compile_ptx_driver(HERE / "wrappers_driver.cpp", [translated(HERE / "wrappers.cu")])
    status, text = run(program, SIMT_WAVEFRONTS="yes")
    assert status == 0, text
    found = {
        line: (wavefronts / accesses, least / accesses)
        for (file, line, _), (accesses, wavefronts, least) in counted(text).items()
        if file == source.name and line in known
    }
    assert found == known and len(known) > 12
    assert not counted(run(program)[1])


@pytest.mark.full
@pytest.mark.parametrize("family", ["step", "persistent"])
def test_banks_are_not_in_each_others_way(family: str) -> None:
    """In no loop over the depth or the steps: their accesses are those of 16 bytes."""
    problems, text = by_ptx(family, {"SIMT_WAVEFRONTS": "yes"})
    assert not problems
    pieces = {
        where: numbers
        for where, numbers in counted(text).items()
        if where[0].startswith(family) and where[2].endswith(" 16")
    }
    assert len(pieces) > 2 and all(number == least for _, number, least in pieces.values()), pieces
