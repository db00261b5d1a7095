"""The stepwise kernels in every mode of the emulator; mistakes planted in copies of them are caught."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from build import ROOT, compile_driver, missing

pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

DRIVER = ROOT / "tests" / "simt" / "stepwise_driver.cpp"


def run(program: Path, **variables: str) -> tuple[int, str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", **variables}
    done = subprocess.run([str(program)], capture_output=True, text=True, env=environment, timeout=300)
    return done.returncode, done.stdout + done.stderr


MODES = [
    ("plain", {"SIMT_SCHEDULE": "fifo"}),
    ("plain", {"SIMT_SCHEDULE": "random", "SIMT_SEED": "1"}),
    ("plain", {"SIMT_SCHEDULE": "random", "SIMT_SEED": "2"}),
    ("plain", {"SIMT_SCHEDULE": "priority", "SIMT_SEED": "3"}),
    pytest.param("asan", {"SIMT_SCHEDULE": "fifo"}, marks=pytest.mark.full),
    ("race", {"SIMT_SCHEDULE": "random"}),
]


def name_of_mode(x: str | dict[str, str]) -> str:
    return x if isinstance(x, str) else "-".join(x.values())


@pytest.mark.parametrize(("mode", "variables"), MODES, ids=name_of_mode)
def test_right_numbers(mode, variables):
    returncode, said = run(compile_driver([DRIVER], mode), **variables)
    assert returncode == 0, said


def with_mistake(
    file: str, before: str, after: str, driver: Path, mode: str, define: str, folder: Path
) -> Path:
    """The driver over a copy of csrc/cuda in which a file has something else in the place of what is there."""
    shutil.copytree(ROOT / "csrc" / "cuda", folder / "cuda")
    text = (folder / "cuda" / file).read_text()
    assert text.count(before) >= 1
    (folder / "cuda" / file).write_text(text.replace(before, after))
    shutil.copy(driver, folder / driver.name)
    return compile_driver([folder / driver.name], mode, [define], [folder])


def is_caught(program: Path, **variables: str) -> bool:
    return any(run(program, SIMT_SEED=str(seed), **variables)[0] for seed in range(1, 6))


# A file, what is there, what is put in its place, and the modes that must see it.
PLANTED = {
    "no barrier before the tree of sums": (
        "reduction.cuh", "    __syncthreads();\n", "", ["random", "race"],
    ),
    "a unit too many": ("cell.cuh", "if (j >= H) return;", "if (j > H) return;", ["asan", "fifo"]),
    "rows that begin take another state": (
        "state.cuh", "return b < rows.previous_count;", "return b <= rows.previous_count;", ["fifo"],
    ),
    "a part too few": ("stepwise_launch.cuh", "{parts, columns, parts,", "{parts - 1, columns, parts,", ["fifo"]),
    "a final state too early": (
        "state.cuh", "return b < rows.next_count;", "return b < rows.next_count - 1;", ["fifo"],
    ),
    "a flag past the end of a row resets it": (
        "state.cuh", "rows.resets[b] && (!rows.reverse || has_previous<true>(rows, b))", "rows.resets[b]", ["fifo"],
    ),
    "a row goes on past its end": (
        "state.cuh", "!rows.reverse && rows.time + 1 >= rows.l", "!rows.reverse && rows.time >= rows.l", ["fifo"],
    ),
    "no barrier before the sums of a block": (
        "layer_norm.cuh", "  __syncthreads();  // the sums before have been read\n", "", ["race"],
    ),
    "no barrier after the sums of a warp": (
        "layer_norm.cuh", "  __syncthreads();\n  for (int n", "  for (int n", ["random", "race"],
    ),
    "a warp too few": (
        "layer_norm.cuh", "warp < blockDim.x / 32;", "warp < blockDim.x / 32 - 1;", ["fifo"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("planted", "mode"),
    [
        pytest.param(name, mode, marks=pytest.mark.full if mode == "asan" or mode != modes[-1] else ())
        for name, (*_, modes) in PLANTED.items()
        for mode in modes
    ],
)
def test_planted_mistakes_are_caught(planted, mode, tmp_path):
    file, before, after, _ = PLANTED[planted]
    build = mode if mode in ("asan", "race") else "plain"
    program = with_mistake(file, before, after, DRIVER, build, "FLOAT_ONLY", tmp_path)
    assert is_caught(program, SIMT_SCHEDULE=mode if build == "plain" else "fifo"), f"{mode} does not see it"
