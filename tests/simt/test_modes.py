"""The emulated layer in every mode, and mistakes planted in copies of its kernels, each of which a mode has to see."""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
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
    """The file of what comes out where threads run in turn. test_stepwise.py judges that."""
    module = module_path("plain", types)
    sources = (HERE / "emulated_layer.py", ROOT / "tests" / "cases.py")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:20]
    file = BUILD / f"{module.stem}-{digest}.pt"
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


# ---- right kernels
# `make test-tools` has some environments of some modes, with kernels in bfloat16; `make test-full` has all.

KERNELS = {
    "stepwise": ("stepwise",),
    "step": ("step", "dependent"),
    "persistent": ("persistent", LOST),
}
SOME = [
    ("random", "stepwise", 1),
    ("random", "step", 2),
    ("random", "persistent", 3),
    ("weak", "persistent", 2),
    ("torn", "persistent", 2),
    ("race", "stepwise", 1),
    ("race", "step", 1),
    ("race", "persistent", 1),
]


@pytest.mark.parametrize(("mode", "kernels", "environments"), SOME)
def test_the_same_bits(mode: str, kernels: str, environments: int) -> None:
    some = Mode(MODES[mode].build, MODES[mode].environments[:environments])
    assert not problems_in(some, KERNELS[kernels])


@pytest.mark.full
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("mode", [mode for mode in (*MODES, "many seeds") if mode != "truncated"])
def test_the_same_bits_of_all_types(mode: str, kernels: str) -> None:
    assert not problems_in(MODES.get(mode, MANY_SEEDS), KERNELS[kernels], TYPES)


@pytest.mark.parametrize("types", [QUICK, pytest.param(TYPES[1:3], marks=pytest.mark.full)])
def test_truncated_sums(types: tuple[str, ...]) -> None:
    """As exact, but for a rounding."""
    assert not problems_in(MODES["truncated"], ("step", "persistent"), types, tolerance=1)


def late_block_driver(folder: Path | None = None) -> Path:
    return compile_driver([HERE / "late_block_driver.cpp"], include_dirs=[folder] if folder else [])


@pytest.mark.parametrize("mode", ["late", "random", "weak"])
def test_a_block_that_comes_late(mode: str) -> None:
    for done in run(late_block_driver(), mode=MODES[mode]):
        assert done.returncode == 0, done.stdout


# ---- planted mistakes


@dataclass(frozen=True)
class Fault:
    kernels: str  # that are run
    file: str  # in csrc/cuda, or csrc/
    right: str  # what is there
    wrong: str  # what is put in its place
    mode: str  # that has to see it
    said: str = ""  # what it has to say, where other mistakes would be seen as well


CHUNK, FORWARD, STEP = "persistent_chunk.cuh", "persistent_forward.cuh", "step_forward.cuh"
PLANTED = {
    "no barrier before the tree of sums": Fault("stepwise", "reduction.cuh", "    __syncthreads();\n", "", "race"),
    "a unit too many": Fault("stepwise", "cell.cuh", "if (j >= H) return;", "if (j > H) return;", "late"),
    "rows that begin take another state": Fault(
        "stepwise", "state.cuh", "return b < rows.previous_count;", "return b <= rows.previous_count;", "late",
    ),
    "a part too few": Fault(
        "stepwise", "stepwise_launch.cuh", "{parts, columns, parts,", "{parts - 1, columns, parts,", "late",
    ),
    "a final state too early": Fault(
        "stepwise", "state.cuh", "return b < rows.next_count;", "return b < rows.next_count - 1;", "late",
    ),
    "a flag past the end of a row resets it": Fault(
        "stepwise", "state.cuh",
        "rows.resets[b] && (!rows.reverse || has_previous<true>(rows, b))", "rows.resets[b]", "late",
    ),
    "a row goes on past its end": Fault(
        "stepwise", "state.cuh",
        "!rows.reverse && rows.time + 1 >= rows.l", "!rows.reverse && rows.time >= rows.l", "late",
    ),
    "no barrier before the sums of a block": Fault(
        "stepwise", "layer_norm.cuh", "  __syncthreads();  // the sums before have been read\n", "", "race",
    ),
    "no barrier after the sums of a warp": Fault(
        "stepwise", "layer_norm.cuh", "  __syncthreads();\n  for (int n", "  for (int n", "race",
    ),
    "a warp too few": Fault(
        "stepwise", "layer_norm.cuh", "warp < blockDim.x / 32;", "warp < blockDim.x / 32 - 1;", "late",
    ),
    "no commit": Fault(
        "step", STEP,
        "    cp_async_commit();\n    const unsigned char* stage", "    const unsigned char* stage", "late",
    ),
    "a wait too few": Fault(
        "step", STEP, "cp_async_wait<kStepStages - 2>", "cp_async_wait<kStepStages - 1>", "late",
    ),
    "a stage of the ring is taken too early": Fault(
        "step", STEP, "shared_ + n % kStepStages", "shared_ + (n + 1) % kStepStages", "late",
    ),
    "no barrier before a tile is read": Fault(
        "step", STEP, "    __syncthreads();  // tile n has come", "    // tile n has come", "race",
    ),
    "rows of U in another order": Fault(
        "step", STEP, "row / 32 * 8 + row % 8}", "row / 32 * 8 + (row + 1) % 8}", "late",
    ),
    "the state is read before the wait": Fault(
        "dependent", STEP,
        "  grid_dependency_wait();\n  launch_dependents();\n  ForwardOperand<T, kRows, false> rows",
        "  ForwardOperand<T, kRows, false>(args, shared, first_row).fetch(0);\n"
        "  grid_dependency_wait();\n  launch_dependents();\n  ForwardOperand<T, kRows, false> rows",
        "late",
    ),
    "columns beyond the units": Fault(
        "step", "step_tiles.cuh", "left < 0 ? 0 : left < kPieceBytes ? left : kPieceBytes", "kPieceBytes", "late",
    ),
    "a whole piece where a row ends": Fault(
        "step", "step_tiles.cuh", "column_ + kPieceNumbers <= length_", "column_ <= length_", "late",
    ),
    "halves of odd rows in place": Fault(
        "step", STEP,
        "Tile::place(Copies::row(), Copies::piece() * kPieceBytes)",
        "Copies::row() * Tile::kRowBytes + Copies::piece() * kPieceBytes", "late",
    ),
    "the tiles of the first product go on": Fault(
        "step", STEP, "if (n == tiles_of(args_.products[0])) begin", "if (n < 0) begin", "late",
    ),
    "the last parts left out": Fault(
        "step", "step_backward.cuh",
        "(output.recurrent_parts + kSums - 1) / kSums", "output.recurrent_parts / kSums", "late",
    ),
    "no barrier before the parts are read": Fault(
        "step", "step_backward.cuh", "  __syncthreads();\n  for (int cell", "  for (int cell", "race",
    ),
    "rows beyond the batch": Fault(
        "step", "cell.cuh", "if (b >= args.rows.count || j >=", "if (b > args.rows.count || j >=", "late",
    ),
    "gates of a pair swapped of a step": Fault(
        "step", STEP,
        "make_float4(sums[n][m][column], sums[n][m][2 + column],",
        "make_float4(sums[n][m][2 + column], sums[n][m][column],", "late",
    ),
    "half of the depth left out": Fault(
        "step", STEP, "part < Tile::kParts; ++part", "part < Tile::kParts - 1; ++part", "late",
    ),
    "a state that is reset is multiplied": Fault(
        "step", STEP, "if (product.resets[b]) return", "if (false) return", "late",
    ),
    "no barrier before the sums are read of a step": Fault(
        "step", STEP,
        "  __syncthreads();\n#pragma unroll\n  for (int i = 0; i < kCells; ++i) {\n    float product",
        "#pragma unroll\n  for (int i = 0; i < kCells; ++i) {\n    float product", "race",
    ),
    "another part than the first": Fault(
        "step", "step_backward.cuh",
        "output.recurrent_part + first * output.recurrent_part_stride",
        "output.recurrent_part + (first + 1) * output.recurrent_part_stride", "late",
    ),
    "gradients are read before the wait": Fault(
        "dependent", "step_backward.cuh",
        "  grid_dependency_wait();\n  launch_dependents();\n", "  launch_dependents();\n", "race",
    ),
    "gradients are multiplied before all are there": Fault(
        "step", "step_backward.cuh", "    __syncthreads();  // the gradients", "    // the gradients", "race",
    ),
    "a part of another block": Fault(
        "step", "step_backward.cuh", "int64_t{blockIdx.x} * args.row_count * H", "int64_t{blockIdx.x} * H", "late",
    ),
    "sums of a turn over those of the turn before": Fault(
        "persistent", CHUNK, "+ turn % 2 * kPartials;", "+ turn * 0;", "race",
    ),
    "no barrier before the sums are read": Fault(
        "persistent", CHUNK,
        "      __syncthreads();  // the sums", "      // the sums", "random",
    ),
    "the step before the one that is needed": Fault(
        "persistent", CHUNK,
        "    left_at = place.row;", "    left_at = i > 0 ? place.row_before : place.row;", "late",
    ),
    "no wait": Fault("persistent", CHUNK, "whole = whole && is_whole(pieces_[q]);", "", "random"),
    "one word of a piece": Fault(
        "persistent", CHUNK,
        "return piece.x != kSentinel && piece.y != kSentinel && piece.z != kSentinel && piece.w != kSentinel;",
        "return piece.w != kSentinel;", "torn",
    ),
    "a row that the step before does not have": Fault(
        "persistent", CHUNK,
        "if (b >= rows) return nullptr;", "if (b > rows || rows == 0) return nullptr;", "late",
    ),
    "a NaN that looks like nothing": Fault(
        "persistent", CHUNK,
        "word == kSentinel ? 0x7fff7fffu : word", "word == 0x7fff7fffu ? kSentinel : word", "late",
    ),
    "a lost store": Fault(
        "persistent", CHUNK,
        "place.rows || first >= length) return;", "place.rows || place.time == 1 || first >= length) return;", "late",
    ),
    "a store of a row that is not there": Fault(
        "persistent", CHUNK, "!writes || b >= place.rows ||", "!writes ||", "late",
    ),
    "own slots in place of those of the chunk before": Fault(
        "persistent", CHUNK, "i == 0 ? box.before : box.slots", "box.slots", "late",
    ),
    "k in another order": Fault(
        "persistent", CHUNK,
        "first[1] = high.x, first[2] = low.y,", "first[1] = high.y, first[2] = low.y,", "late",
    ),
    "gates of a pair swapped": Fault(
        "persistent", CHUNK,
        "{{d[tile][column], d[tile][2 + column],", "{{d[tile][2 + column], d[tile][column],", "late",
    ),
    "gates of a piece swapped": Fault(
        "persistent", CHUNK, "second ? b : a", "second ? a : b", "late",
    ),
    "pieces of another part": Fault(
        "large", CHUNK, "= weight_piece(piece_of(kPieces + e)", "= weight_piece(piece_of(e)", "late",
    ),
    "c of another chunk": Fault(
        "persistent", FORWARD,
        "int64_t{place.row_before} * H", "int64_t{place.row_before < 0 ? place.row : place.row_before} * H", "late",
    ),
    "resets of the step itself in reverse": Fault(
        "persistent", CHUNK,
        "c.reverse ? place.time + 1 : place.time);\n  result", "place.time);\n  result", "late",
    ),
    "resets after of the step itself": Fault(
        "persistent", CHUNK,
        "resets_at(c, resets, c.reverse ? place.time : place.time + 1)", "resets_at(c, resets, place.time)", "late",
    ),
    "times in another order": Fault(
        "persistent", FORWARD, "args.batch_first ? place.time : place.row", "place.row", "late",
    ),
    "results that are not all there": Fault(
        "lost", CHUNK, "if (late_[0] == 0) return;", "return;", "late", "not spoiled",
    ),
    "nobody looks at the launch in front": Fault(
        "lost", CHUNK, "!all_.control.before ||", "true ||", "late", "the launch behind it waited",
    ),
    "results are spoiled before all have left": Fault(
        "lost", CHUNK, "left == blocks() - 1 &&", "left == 0 &&", "late", "not spoiled",
    ),
    "the time of a wait begins at once": Fault(
        "late block", CHUNK,
        "limit.has_passed(all_came ? 1 : kForBlocks)", "limit.has_passed()", "late", "before all blocks had come",
    ),
    "the time goes on when the last block comes": Fault(
        "late block", CHUNK,
        "if (all_came && !they_came) limit.start_again();", "", "late", "before all blocks had come",
    ),
    "a block that nobody counts": Fault(
        "lost", CHUNK,
        "threadIdx.x == 0) atomicAdd(all_.control.words + kBlocksThatCame, 1u);",
        "false) return;", "late", "was not counted",
    ),
    "no fence before the results are spoiled": Fault(
        "lost", CHUNK, "      __threadfence();  // behind", "      // behind", "race",
    ),
    "a mailbox that is not cleared": Fault("host", "torch/cuda_persistent.h", "memory_.fill_(0xff);", "", "late"),
}  # fmt: skip
# The family of kernels that is compiled with the fault, and what is run, where the names are others.
OTHERS = {
    "dependent": ("step", ["dependent"]),
    "large": ("persistent", ["large"]),
    "lost": ("persistent", [LOST]),
    "host": ("host", ["persistent"]),
}


def with_mistake(fault: Fault, folder: Path) -> Path:
    """A copy of csrc/ in which a file has something else in the place of what is there."""
    copy = folder / "csrc"
    shutil.copytree(ROOT / "csrc", copy)
    path = copy / (fault.file if "/" in fault.file else f"cuda/{fault.file}")
    text = path.read_text()
    assert fault.right in text
    path.write_text(text.replace(fault.right, fault.wrong))
    return copy


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_seen(name: str, tmp_path: Path) -> None:
    fault = PLANTED[name]
    copy, mode = with_mistake(fault, tmp_path), MODES[fault.mode]
    if fault.kernels == "late block":
        problems = [d.stdout for d in run(late_block_driver(copy), mode=mode) if d.returncode != 0]
    else:
        family, kernels = OTHERS.get(fault.kernels, (fault.kernels, KERNELS.get(fault.kernels, ())))
        module = module_path(mode.build, QUICK, {family: copy})
        cases, same = cases_of(kernels), expected(QUICK)
        problems, _ = in_mode(module, mode.environments, cases=cases, types=QUICK, expected=same)
    assert any(fault.said in problem for problem in problems), problems


@pytest.mark.full
def test_a_nan_of_all_bits_is_handed_on(tmp_path: Path) -> None:
    """No conversion makes one: here all do."""
    right = "return reinterpret_cast<const uint16_t&>(value);"
    wrong = "return widen(value) != widen(value) ? 0xffffu : reinterpret_cast<const uint16_t&>(value);"
    copy = with_mistake(Fault("persistent", CHUNK, right, wrong, "late"), tmp_path)
    module = module_path("plain", QUICK, {"persistent": copy})
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
