"""The kernels that do all steps of a chunk, in every mode of the emulator; mistakes planted in copies are caught."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from simt.build import ROOT, compile_driver, missing
from simt.modes import LATE, MIXED, MODES, Mode, run
from test_stepwise_kernels import with_mistake

pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

DRIVER = ROOT / "tests" / "simt" / "persistent_driver.cpp"
CUDA = ROOT / "csrc" / "cuda"

# All that are compiled: those of persistent_launch.cuh for the types of the files persistent_*.cu.
NAMES = {"__nv_bfloat16": "bfloat16", "__half": "half", "float": "float"}
EXCHANGES = {"kNone": "none", "kMailbox": "mailbox"}
INSTANCES = {
    f"{direction} {NAMES[type]} {'options' if options == 'true' else 'plain'} {EXCHANGES[exchange]}"
    for file in CUDA.glob("persistent_*.cu")
    for type in re.findall(r"LSTM_EXT_PERSISTENT\((\w+)\)", file.read_text())
    for direction in ("forward", "backward")
    for options, exchange in re.findall(
        r"start_persistent<Pass<T, (\w+)>, Exchange::(\w+)>", (CUDA / "persistent_launch.cuh").read_text()
    )
}
PARTS = ["forward", "backward", "faults", "reuse"]


def said(done: subprocess.CompletedProcess) -> str:
    return done.stdout + done.stderr


def build_of(mode: str, types: str) -> Path:
    return compile_driver([DRIVER], MODES[mode].build, ["BFLOAT_ONLY"] if types == "bfloat16" else [])


def instances_of(done: subprocess.CompletedProcess) -> set[str]:
    return set(re.findall(r"^ran: (.*)$", done.stdout, re.MULTILINE))


QUICK = ("late", "random", "weak", "torn", "truncated")


def environments_of(mode: str, types: str) -> Mode:
    of_all = MODES[mode]
    return of_all if types == "all" else Mode(of_all.build, of_all.environments[:3])


@pytest.mark.parametrize(
    ("types", "mode"),
    [
        *(("bfloat16", mode) for mode in QUICK),
        *(pytest.param("all", mode, marks=pytest.mark.full) for mode in MODES),
    ],
)
def test_right_numbers(types: str, mode: str) -> None:
    program = build_of(mode, types)
    ran: set[str] = set()
    for part in PARTS:
        for done in run(program, part, mode=environments_of(mode, types)):
            assert done.returncode == 0, said(done)
            ran |= instances_of(done)
    assert ran == {instance for instance in INSTANCES if types in ("all", instance.split()[1])}


@pytest.mark.full
def test_weights_without_registers() -> None:
    for done in run(build_of("late", "all"), "large", mode=MODES["late"]):
        assert done.returncode == 0, said(done)


@pytest.mark.parametrize(
    ("types", "seed"),
    [
        *(("bfloat16", seed) for seed in range(3)),
        *(pytest.param("all", seed, marks=pytest.mark.full) for seed in range(20)),
    ],
)
def test_the_same_bits_in_any_order(types: str, seed: int) -> None:
    in_turn = Mode("plain", (LATE,))
    schedule = "priority" if seed % 2 else "random"
    in_any_order = Mode("plain", ({**MIXED, "SIMT_SCHEDULE": schedule, "SIMT_SEED": str(seed)},))
    program = build_of("late", types)
    bits = []
    for mode in (in_turn, in_any_order):
        for done in run(program, mode=mode):
            assert done.returncode == 0, said(done)
            bits += re.findall(r"^bits: (\w+)$", done.stdout, re.MULTILINE)
    assert len(bits) == 2 and bits[0] == bits[1]


# A wait that ends by its bound; else what it says does not matter.
EXPIRED = "a wait expired"
CHUNK, FORWARD, BACKWARD = "persistent_chunk.cuh", "persistent_forward.cuh", "persistent_backward.cuh"

# A file, what is there, what is put in its place, the part of the driver and the modes that must see it, and what the
# driver has to say.
PLANTED = {
    "sums of a turn over those of the turn before": (
        CHUNK, "+ turn % 2 * kPartials;", "+ turn * 0;", "forward", ["random", "race"], "",
    ),
    "no barrier before the sums are read": (
        CHUNK, "        __syncthreads();  // the sums", "        // the sums", "forward", ["random", "race"], "",
    ),
    "no barrier before operands are read": (
        CHUNK,
        "      if constexpr (!kMailbox) __syncthreads();  // operands",
        "      // operands",
        "backward",
        ["random", "race"],
        "",
    ),
    "the step before the one that is needed": (
        CHUNK, "    left_at = place.row;", "    left_at = i > 0 ? place.row_before : place.row;", "forward", ["late"],
        "",
    ),
    "no wait": (CHUNK, "whole = whole && is_whole(pieces_[q]);", "", "forward", ["random", "weak"], ""),
    "one word of a piece": (
        CHUNK,
        "return piece.x != kSentinel && piece.y != kSentinel && piece.z != kSentinel && piece.w != kSentinel;",
        "return piece.w != kSentinel;",
        "forward",
        ["torn"],
        "",
    ),
    "a row that the step before does not have": (
        CHUNK, "if (b >= rows) return nullptr;", "if (b > rows || rows == 0) return nullptr;",
        "forward", ["late"], EXPIRED,
    ),
    "a NaN that looks like nothing": (
        CHUNK, "word == kSentinel ? 0x7fff7fffu : word", "word == 0x7fff7fffu ? kSentinel : word", "forward", ["late"],
        EXPIRED,
    ),
    "a lost store": (
        CHUNK, "place.rows || first >= length) return;", "place.rows || n == 1 || first >= length) return;",
        "backward", ["late"], EXPIRED,
    ),
    "a store of a row that is not there": (
        CHUNK, "!writes || b >= place.rows ||", "!writes ||", "forward", ["late"], "",
    ),
    "own slots in place of those of the chunk before": (
        CHUNK, "i == 0 ? box.before : box.slots", "box.slots", "forward", ["late"], EXPIRED,
    ),
    "operands in front of the chunk in the other half": (
        CHUNK, "steps.end : steps.first + 1", "steps.end + 1 : steps.first", "backward", ["late"], "",
    ),
    "k in another order": (
        CHUNK, "first[1] = high.x, first[2] = low.y,", "first[1] = high.y, first[2] = low.y,", "forward", ["late"], "",
    ),
    "gates of a pair swapped": (
        CHUNK, "{{d[tile][column], d[tile][2 + column],", "{{d[tile][2 + column], d[tile][column],", "forward",
        ["late"], "",
    ),
    "gates of a piece swapped": (CHUNK, "second ? b : a", "second ? a : b", "backward", ["late"], ""),
    "pieces of another part": (
        CHUNK, "= weight_piece(piece_of(kPieces + e)", "= weight_piece(piece_of(e)", "large", ["late"], "",
    ),
    "c of another chunk": (
        FORWARD, "int64_t{place.row_before} * H", "int64_t{place.row_before < 0 ? place.row : place.row_before} * H",
        "forward", ["late"], "",
    ),
    "resets of the step itself in reverse": (
        CHUNK, "c.reverse ? place.time + 1 : place.time);\n  result", "place.time);\n  result", "forward", ["late"], "",
    ),
    "resets after of the step itself": (
        CHUNK, "resets_at(c, resets, c.reverse ? place.time : place.time + 1)", "resets_at(c, resets, place.time)",
        "backward", ["late"], "",
    ),
    "times in another order": (
        FORWARD, "args.batch_first ? place.time : place.row", "place.row", "forward", ["late"], "",
    ),
    "results that are not all there": (
        CHUNK, "if (late_[0] == 0) return;", "return;", "faults", ["late"], "not spoiled",
    ),
    "nobody looks at the launch in front": (
        CHUNK, "!all_.control.before ||", "true ||", "faults", ["late"], "the launch behind it waited",
    ),
    "results are spoiled before all have left": (
        CHUNK, "left == blocks() - 1 &&", "left == 0 &&", "faults", ["late"], "not spoiled",
    ),
    "the time of a wait begins at once": (
        CHUNK,
        "limit.has_passed(all_came ? 1 : kForBlocks)",
        "limit.has_passed()",
        "faults",
        ["late"],
        "before all blocks had come",
    ),
    "the time goes on when the last block comes": (
        CHUNK, "if (all_came && !they_came) limit.start_again();", "", "faults", ["late"], "before all blocks had come",
    ),
    "a block that nobody counts": (
        CHUNK, "threadIdx.x == 0) atomicAdd(all_.control.words + kBlocksThatCame, 1u);", "false) return;", "faults",
        ["late"], "",
    ),
    "no fence before the results are spoiled": (
        CHUNK,
        "      __threadfence();  // behind",
        "      // behind",
        "faults",
        ["race"],
        "",
    ),
}  # fmt: skip
QUICK_PLANTED = [
    "one word of a piece",
    "a lost store",
    "sums of a turn over those of the turn before",
    "the time of a wait begins at once",
]


@pytest.mark.parametrize(
    ("planted", "mode"),
    [
        pytest.param(
            name, mode, marks=() if name in QUICK_PLANTED and mode == plant[4][0] else pytest.mark.full
        )
        for name, plant in PLANTED.items()
        for mode in plant[4]
    ],
)
def test_planted_mistakes_are_caught(planted: str, mode: str, tmp_path: Path) -> None:
    file, before, after, part, _, message = PLANTED[planted]
    program = with_mistake(file, before, after, DRIVER, MODES[mode].build, "BFLOAT_ONLY", tmp_path)
    runs = list(run(program, part, mode=MODES[mode]))
    caught = [done.returncode != 0 and message in said(done) for done in runs]
    assert any(caught), "\n".join(map(said, runs))


@pytest.mark.parametrize("mode", ["random", "weak"])
def test_a_mailbox_that_is_not_cleared_is_caught(mode: str) -> None:
    runs = list(run(build_of(mode, "bfloat16"), "no-memset", mode=MODES[mode]))
    assert any(done.returncode != 0 for done in runs), "\n".join(map(said, runs))


@pytest.mark.full
def test_a_nan_of_all_bits_is_handed_on(tmp_path: Path) -> None:
    """No conversion makes one: here all do."""
    program = with_mistake(
        CHUNK,
        "return reinterpret_cast<const uint16_t&>(value);",
        "return widen(value) != widen(value) ? 0xffffu : reinterpret_cast<const uint16_t&>(value);",
        DRIVER,
        "plain",
        "BFLOAT_ONLY",
        tmp_path,
    )
    for done in run(program, mode=MODES["late"]):
        assert done.returncode == 0, said(done)
