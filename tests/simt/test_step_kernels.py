"""The kernels that do a step at once, in every mode of the emulator; mistakes planted in copies of them are caught."""

from __future__ import annotations

import re
import subprocess

import pytest
from build import ROOT, compile_driver, missing
from test_stepwise_kernels import MODES, is_caught, name_of_mode, run, with_mistake

pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

DRIVER = ROOT / "tests" / "simt" / "step_driver.cpp"


# All that are compiled: those of step_launch.cuh for the types of the files step_*.cu.
CUDA = ROOT / "csrc" / "cuda"
NAMES = {"__nv_bfloat16": "bfloat16", "__half": "half", "float": "float"}
ROWS = dict(re.findall(r"constexpr int (kStepRows\w+) = (\d+);", (CUDA / "gpu_plan.h").read_text()))
INSTANCES = {
    f"{kernel} {NAMES[type]} {'options' if options == 'true' else 'plain'} {ROWS[rows]}"
    for file in CUDA.glob("step_*.cu")
    for type in re.findall(r"LSTM_EXT_STEP\((\w+)\)", file.read_text())
    for kernel, options, rows in re.findall(
        r"step_(\w+)_kernel<T, (\w+), (\w+)>", (CUDA / "step_launch.cuh").read_text()
    )
}

# Its copies are asynchronous.
MODES_OF_COPIES = [
    ("plain", {"SIMT_SCHEDULE": "fifo", "SIMT_COPIES": "now"}),
    ("plain", {"SIMT_SCHEDULE": "random", "SIMT_SEED": "1", "SIMT_COPIES": "mixed"}),
]


@pytest.mark.parametrize(("mode", "variables"), [*MODES, *MODES_OF_COPIES], ids=name_of_mode)
def test_right_numbers(mode, variables):
    returncode, said = run(compile_driver([DRIVER], mode), **variables)
    assert returncode == 0, said
    assert {line.removeprefix("ran: ") for line in said.splitlines()} == INSTANCES


@pytest.mark.full
@pytest.mark.parametrize("seed", range(20))
def test_the_same_bits_in_any_order(seed):
    """They are the stepwise kernels' bits."""
    variables = {"SIMT_SCHEDULE": "random", "SIMT_COPIES": "mixed", "SIMT_SEED": str(seed)}
    returncode, said = run(compile_driver([DRIVER], "plain"), **variables)
    assert returncode == 0, said


# A file, what is there, what is put in its place, and the modes that must see it.
PLANTED = {
    "no commit": (
        "step_forward.cuh",
        "    cp_async_commit();\n    const unsigned char* stage",
        "    const unsigned char* stage",
        ["fifo"],
    ),
    "a wait too few": (
        "step_forward.cuh", "cp_async_wait<kStepStages - 2>", "cp_async_wait<kStepStages - 1>", ["fifo"],
    ),
    "a stage of the ring is taken too early": (
        "step_forward.cuh",
        "shared_ + n % kStepStages",
        "shared_ + (n + 1) % kStepStages",
        ["now", "fifo"],
    ),
    "no barrier before a tile is read": (
        "step_forward.cuh",
        "    __syncthreads();  // tile n has come",
        "    // tile n has come",
        ["random", "race"],
    ),
    "rows of U in another order": (
        "step_forward.cuh", "row / 32 * 8 + row % 8}", "row / 32 * 8 + (row + 1) % 8}", ["fifo"],
    ),
    "the state is read before the wait": (
        "step_forward.cuh",
        "  grid_dependency_wait();\n  launch_dependents();\n  ForwardOperand<T, kRows, false> rows",
        "  ForwardOperand<T, kRows, false>(args, shared, first_row).fetch(0);\n"
        "  grid_dependency_wait();\n  launch_dependents();\n  ForwardOperand<T, kRows, false> rows",
        ["fifo"],
    ),
    "columns beyond the units": (
        "step_tiles.cuh", "left < 0 ? 0 : left < kPieceBytes ? left : kPieceBytes", "kPieceBytes", ["fifo"],
    ),
    "a whole piece where a row ends": (
        "step_tiles.cuh", "column_ + kPieceNumbers <= length_", "column_ <= length_", ["fifo"],
    ),
    "halves of odd rows in place": (
        "step_forward.cuh", "Tile::place(Copies::row(), Copies::piece() * kPieceBytes)",
        "Copies::row() * Tile::kRowBytes + Copies::piece() * kPieceBytes", ["fifo"],
    ),
    "the tiles of the first product go on": (
        "step_forward.cuh", "if (n == tiles_of(args_.products[0])) begin", "if (n < 0) begin", ["fifo"],
    ),
    "the last parts left out": (
        "step_backward.cuh", "(output.recurrent_parts + kSums - 1) / kSums", "output.recurrent_parts / kSums", ["fifo"],
    ),
    "no barrier before the parts are read": (
        "step_backward.cuh", "  __syncthreads();\n  for (int cell", "  for (int cell", ["random", "race"],
    ),
    "rows beyond the batch": (
        "cell.cuh",
        "if (b >= args.rows.count || j >=",
        "if (b > args.rows.count || j >=",
        ["fifo"],
    ),
    "gates of a pair swapped": (
        "step_forward.cuh",
        "make_float4(sums[n][m][column], sums[n][m][2 + column],",
        "make_float4(sums[n][m][2 + column], sums[n][m][column],",
        ["fifo"],
    ),
    "half of the depth left out": (
        "step_forward.cuh", "part < Tile::kParts; ++part", "part < Tile::kParts - 1; ++part", ["fifo"],
    ),
    "a state that is reset is multiplied": (
        "step_forward.cuh", "if (product.resets[b]) return", "if (false) return", ["fifo"],
    ),
    "no barrier before the sums are read": (
        "step_forward.cuh",
        "  __syncthreads();\n#pragma unroll\n  for (int i = 0; i < kCells; ++i) {\n    float product",
        "#pragma unroll\n  for (int i = 0; i < kCells; ++i) {\n    float product",
        ["random", "race"],
    ),
    "another part than the first": (
        "step_backward.cuh",
        "output.recurrent_part + first * output.recurrent_part_stride",
        "output.recurrent_part + (first + 1) * output.recurrent_part_stride",
        ["fifo"],
    ),
    "gradients are read before the wait": (
        "step_backward.cuh",
        "  grid_dependency_wait();\n  launch_dependents();\n",
        "  launch_dependents();\n",
        ["race"],
    ),
    "gradients are multiplied before all are there": (
        "step_backward.cuh",
        "    __syncthreads();  // the gradients",
        "    // the gradients",
        ["random", "race"],
    ),
    "a part of another block": (
        "step_backward.cuh", "int64_t{blockIdx.x} * args.row_count * H", "int64_t{blockIdx.x} * H", ["fifo"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("planted", "mode"),
    [
        pytest.param(name, mode, marks=pytest.mark.full if mode != modes[-1] else ())
        for name, (*_, modes) in PLANTED.items()
        for mode in modes
    ],
)
def test_planted_mistakes_are_caught(planted, mode, tmp_path):
    file, before, after, _ = PLANTED[planted]
    build = "race" if mode == "race" else "plain"
    schedule = {"random": {"SIMT_SCHEDULE": "random"}, "now": {"SIMT_COPIES": "now"}}.get(mode, {})
    program = with_mistake(file, before, after, DRIVER, build, "BFLOAT_ONLY", tmp_path)
    assert is_caught(program, **schedule), f"{mode} does not see it"


@pytest.mark.parametrize(
    ("stride", "offset"), [(997, 3), *(pytest.param(2, offset, marks=pytest.mark.full) for offset in (0, 1))]
)
def test_fast_functions_err_by_no_more_than_they_say(stride, offset):
    """All numbers of 32 bits with stride 2, which takes six minutes; a thousandth of them else."""
    program = compile_driver([ROOT / "tests" / "simt" / "fast_functions.cpp"], "plain")
    done = subprocess.run([program, str(stride), str(offset)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
