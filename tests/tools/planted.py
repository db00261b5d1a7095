"""Plants one wrong line in the product, one after the other, and says whether the tests of its part see it.

    python tests/tools/planted.py              # all of them: `make planted`, two hours on two cores
    python tests/tools/planted.py cell.h tile  # the faults of the files whose names contain one of these
    python tests/tools/planted.py --check      # only that each kernel file has a fault and each fault its line

The faults are planted in a copy of the tree, in build/planted, which is built again after each: of a header of the CPU
kernels only for AVX2, since a fault is the same for each instruction set. The exit code is 1 if a fault survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "planted"
FOLDERS = ("cpu", "cuda", "library")  # below csrc/, each file of which has a fault
TIMEOUT = 1200  # seconds for the tests of a fault


class Tests(NamedTuple):
    arguments: tuple[str, ...]  # of pytest
    every_set: bool = False  # needs kernels of all instruction sets


def of(*arguments: str) -> Tests:
    return Tests(arguments)


def emulated(mode: str, kernels: str) -> Tests:
    """The layer on the emulator, which has to give the bits of the right kernels."""
    return of(f"tests/simt/test_modes.py::test_the_same_bits[{mode}-{kernels}]", "-m", "")


CPU = of(
    "tests/cpu/test_kernels.py",
    "tests/cpu/test_options_kernels.py",
    "tests/call/test_packed.py",
    "tests/matrix/test_matrix.py",
)
EVERY_SET = CPU._replace(every_set=True)
MATRIX = of("tests/matrix/test_matrix.py")
FUZZ = of("tests/fuzz/test_fuzz.py")
ENGINE = of("tests/cpu/test_tile_engine.py")
STREAMING = of("tests/nn/test_streaming.py", "-k", "soon")
TEAMS = of("tests/tools/test_dry_runs.py", "-k", "teams")
LIBRARY = of("tests/native_library/test_library.py")
DAMAGE = of("tests/native_library/test_damage.py", "-k", "not sanitized")
ON_AARCH64 = of("tests/cpu/test_driver.py", "-k", "aarch64")
GPU_PLAN = of("tests/cuda/test_gpu_plan.py")
EMULATED = of("tests/simt/test_stepwise.py")
PRIMITIVES = of("tests/simt/test_emulator.py", "-k", "primitives")
LATE_BLOCK = of("tests/simt/test_modes.py::test_a_block_that_comes_late[late]")
BY_PTX = of("tests/simt/test_ptx_route.py", "-k", "wrappers_do_the_same")


# The tests that have to fail; and the faults that each of them has to see: a file below csrc/, or one of lstm_ext/,
# what is there, once, and what is put in its place; then what the tests have to say, where others would fail as well.
TABLE: dict[Tests, list[tuple[str, ...]]] = {
    MATRIX: [
        ("lstm_ext/call/arguments.py", "self.reset_h[sets]", "self.reset_h[sets].detach()"),
        ("lstm_ext/call/arguments.py", "PaddedRows(lengths, time", "PaddedRows((lengths - 1).clamp(min=0), time"),
        ("lstm_ext/call/arguments.py", "zoneout_h, zoneout_c = self.zoneout", "zoneout_c, zoneout_h = self.zoneout"),
        ("lstm_ext/call/arguments.py", "= zoneout_h, zoneout_c", "= 1.0001 * zoneout_h, zoneout_c"),
        ("lstm_ext/call/masks.py", "dtype=dtype), p, True)", "dtype=dtype), p, True) * (1 - p)"),
        ("lstm_ext/call/stack.py", "LSTMExtras(cells, gates)",
         "LSTMExtras(cells if cells is None else cells.roll(1, 0), gates)"),
        ("lstm_ext/call/stack.py", "else LSTMExtras(cells, gates)",
         "else LSTMExtras(cells, gates if gates is None else gates.roll(1, -1))"),
    ],
    FUZZ: [
        ("lstm_ext/call/arguments.py", "values.resets_of(resets, x, layout)",
         "values.resets_of(resets, x, layout).roll(1, 0)"),
    ],
    CPU: [
        ("cpu/backward.h", "load_lanes<T>(pass_.h_rows[n] + k, lanes) * load_lanes<T>(mask + k, lanes)",
         "load_lanes<T>(pass_.h_rows[n] + k, lanes)"),
        ("cpu/backward_state.h", ": grads.dc_before, lanes)", ": grad, lanes)"),
        ("cpu/backward_steps.h", "if (grad_final.data) v = v + load_lanes", "if (grad_final.data) v = v - load_lanes"),
        ("cpu/barrier.h", "__ATOMIC_ACQ_REL) == workers)", "__ATOMIC_ACQ_REL) == 1)"),
        ("cpu/cell.h", "i_terms.value(g_terms.denominator * inverse)", "i_terms.value(i_terms.denominator * inverse)"),
        ("cpu/chunk_gradients.h", "begin + (reverse ? 1 : -1);", "begin + (reverse ? 1 : 0);"),
        ("cpu/column_product.h", "before = load_lanes<T>(partial(row + r) + at, lanes);", "before = S::zero();"),
        ("cpu/layout.cpp", "plan.grad_preactivations = layout.reserve(buffers,",
         "plan.grad_preactivations = layout.reserve(1,"),
        ("cpu/forward.h", "(pass_.steps.rows_before(t) + b) * H, H, params.c_n",
         "pass_.steps.rows_before(t) * H, H, params.c_n"),
        ("cpu/forward_state.h", "accumulate_rows(tile, a, panel, kLanes, shape.hidden_size);",
         "accumulate_rows(tile, a, panel, kLanes, shape.hidden_size - 1);"),
        ("cpu/forward_steps.h", "int64_t h_size = h.data ? P : 0;", "int64_t h_size = h.data ? P - 1 : 0;"),
        ("cpu/forward_steps.h", "if (norm.carries) store_cell(", "if (false) store_cell("),
        ("cpu/backward_steps.h", "norm.carries ? carried_gradient(now, cells, unit, lanes).fresh : S::zero()",
         "S::zero()"),
        ("cpu/backward_steps.h", "options_.norm.carries ? S::zero() : carried.fresh", "carried.fresh"),
        ("cpu/gate_weight.h", "    out += width;", "    out += n;"),
        ("cpu/gate_product.h", ": T(0)) + (weights.bias_hh", ": T(0)) - (weights.bias_hh"),
        ("cpu/gate_product.h", "gate < 3 ? gate : 2", "gate < 2 ? gate : 1"),
        ("cpu/gates.h", "load_lanes<T>(at + i * hidden_size, lanes)",
         "load_lanes<T>(at + (3 - i) * hidden_size, lanes)"),
        ("cpu/kernel_set.h", "Simd<T>::kLanes,   kTileRows,", "Simd<T>::kLanes / 2, kTileRows,"),
        ("cpu/kernels.h", "  int64_t lanes;        // T values in a SIMD register\n"
         "  int64_t tile_rows;    // batch rows of a register tile\n", "  int64_t tile_rows;\n  int64_t lanes;\n"),
        ("cpu/layer_norm.h", "sum_of_lanes<T>(factor[r]) / number;",
         "sum_of_lanes<T>(factor[r]) / (number - S::set1(T(1)));"),
        ("cpu/outer_products.h", "total = total + block;", "total = block;"),
        ("cpu/pack.h", "i < lanes ? load_lanes<T>(source + i * count + k, depth)",
         "i < lanes ? load_lanes<T>(source + i * count, depth)"),
        ("cpu/pass.h", "= smaller(steps.rows_at(t), steps.rows_at(before));", "= steps.rows_at(t);"),
        ("cpu/plan.cpp", "!params.grad_input.data && directions_at_once(", "directions_at_once("),
        ("cpu/plan.h", "return size > 0;", "return false;"),
        ("cpu/range.h", "return (a + b - 1) / b;", "return a / b;"),
        ("cpu/recompute.h", "Range{0, 4 * H}, bias_);", "Range{0, 3 * H}, bias_);"),
        ("cpu/row_major.h", "return load_first<T>(p, rest);", "return load_first<T>(p, rest - 1);"),
        ("cpu/rows.h", "return rows > first ? divide_up(rows - first, stride) : 0;",
         "return rows > first ? (rows - first) / stride : 0;"),
        ("cpu/simd.h", "_mm256_maskload_ps(p, mask(n))", "_mm256_maskload_ps(p, mask(n - 1))"),
        ("cpu/tile.h", "{ return a[r]; }, b, 0);", "{ return a[0]; }, b, 0);"),
        ("cpu/vector_math.h", "1.0 / 720,     1.0 / 5040,", "1.0 / 720,     1.0 / 5050,"),
        ("contract/cell.h", "(gate == kG ? Math::number(1) - value", "(gate == kG ? Math::number(1) + value"),
        ("contract/cell.h", "{ return options.cell_clip; }", "{ return options.cell_clip * T(1.001); }"),
        ("contract/cell.h", "{ return options.preactivation_clip; }",
         "{ return options.preactivation_clip * T(1.001); }"),
        ("contract/cell.h", "Math::fma(r, z[kGruRecurrent], z", "Math::fma(u, z[kGruRecurrent], z"),
        ("contract/cell.h", "dz_n * gates[kGruRecurrent] * sigmoid", "dz_n * gates[kGruInput] * sigmoid"),
        ("cpu/backward_state.h", "Piece{2 * H, H, cell::kGruInput * H}", "Piece{2 * H, H, cell::kGruRecurrent * H}"),
        ("contract/activation.h", "case Function::kTanh: return one - value * value;",
         "case Function::kTanh: return one - value;"),
        ("contract/layer.h", "return keep != nullptr || share != 0;", "return keep != nullptr;"),
        ("contract/params.h", "#define CELL_FLAG(name) || name", "#define CELL_FLAG(name)"),
        ("contract/steps.h", "const int64_t cut = shape_.reverse ? t + 1 : t;", "const int64_t cut = t;"),
        ("contract/transition.h", "(Math::number(share), previous - fresh", "(Math::number(share), previous"),
    ],
    ENGINE: [
        ("cpu/int8_product.h", "128 * row.sums[d]", "127 * row.sums[d]"),
        ("cpu/tile_engine.h", "kHasTileEngine<float> = true;", "kHasTileEngine<float> = false;"),
        ("cpu/bf16_product.h", "kRight[] = {2, 1, 1, 0, 0, 0};", "kRight[] = {2, 0, 1, 0, 0, 0};"),
        ("cpu/bf16_split.h", "a = a - reinterpret_cast<", "a = a + reinterpret_cast<"),
    ],
    EVERY_SET: [
        ("cpu/capability.cpp", 'current().store(require(name, "set_cpu_capability"), std::memory_order_relaxed);',
         'require(name, "set_cpu_capability");'),
        ("cpu/isa.h", "#define LSTM_EXT_ISA avx2", "#define LSTM_EXT_ISA avx"),
        ("cpu/kernels_avx2_f32.cpp", "kernels_avx2_f32, ", "kernels_none, "),
        ("cpu/kernels_avx2_f64.cpp", "kernels_avx2_f64, ", "kernels_none, "),
        ("cpu/kernels_avx512_f32.cpp", "kernels_avx512_f32, ", "kernels_none, "),
        ("cpu/kernels_avx512_f64.cpp", "kernels_avx512_f64, ", "kernels_none, "),
    ],
    STREAMING: [
        ("cpu/cost.h", "{{25'000, 8}, {50'000, 20}", "{{25'000, 9}, {50'000, 20}"),
        ("cpu/cost.cpp", "return first(kRowMajorOfTwo);", "return first(kRowMajorOfOne);"),
    ],
    LIBRARY: [
        ("cpu/frozen.h", "narrow.factors), factors[1]", "narrow.factors), factors[0]"),
        ("library/lstm_ext.h", "  int32_t num_layers;     /* L */\n  int32_t directions;     /* D, 1 or 2 */\n",
         "  int32_t directions;\n  int32_t num_layers;\n"),
        ("library/memory.h", "float64 ? f(double{})", "float64 ? f(float{})"),
        ("library/model.cpp", "file.has(kIsCoupled);", "false;"),
        ("library/model.cpp", "file.has(kCarriesNormalisedCell)}", "false}"),
        ("library/model.h", "[layer * header.directions + d]", "[layer + d]"),
        ("library/stream.cpp", "params.shape.reverse = d == 1;", "params.shape.reverse = false;"),
    ],
    ON_AARCH64: [
        ("cpu/kernels_neon_f32.cpp", "kernels_neon_f32, ", "kernels_none, "),
        ("cpu/kernels_neon_f64.cpp", "kernels_neon_f64, ", "kernels_none, "),
        ("cpu/simd_neon.h", "return vfmaq_f32(c, a, b);", "return vfmaq_f32(a, c, b);"),
    ],
    TEAMS: [
        ("cpu/wait_limit.cpp", "if (wait.seconds < most) return;", "if (wait.seconds > most) return;"),
    ],
    EMULATED: [
        ("cuda/cell.cuh", "result.before += past;", "result.before -= past;"),
        ("cuda/cell_math.cuh", "return 1 - value * value;", "return 1 + value * value;"),
        ("cuda/layer_norm.cuh", "sums[row] / static_cast<A>(count);", "sums[row] / static_cast<A>(count - 1);"),
        ("cuda/layer_norm.cuh", "sum = args.norm.carries ? dc : sum + dc;", "sum += dc;"),
        ("cuda/layer_norm.cuh", "if (args.norm.carries) write_carried(", "if (false) write_carried("),
        ("cuda/numeric.cuh", "float widen(__nv_bfloat16 value) { return to_float(value); }",
         "float widen(__nv_bfloat16 value) { return -to_float(value); }"),
        ("cuda/reduction.cuh", "half > 0; half /= 2", "half > 1; half /= 2"),
        ("cuda/gpu_plan.h", "return (hidden_size + kStepUnits - 1) / kStepUnits;", "return hidden_size / kStepUnits;"),
        ("cuda/persistent.h", "kSentinel = 0xffffffffu", "kSentinel = 0xfffffffeu"),
        ("cuda/persistent_backward.cuh", "tile * 16 + row, first", "tile * 16 + row % 8, first"),
        ("cuda/persistent_bf16.cu", "LSTM_EXT_PERSISTENT(__nv_bfloat16)", "LSTM_EXT_PERSISTENT(float)"),
        ("cuda/persistent_chunk.cuh", "n > 0 ? c.batch : 0", "c.batch"),
        ("cuda/persistent_f16.cu", "LSTM_EXT_PERSISTENT(__half)", "LSTM_EXT_PERSISTENT(float)"),
        ("cuda/persistent_f32.cu", "LSTM_EXT_PERSISTENT(float)", "LSTM_EXT_PERSISTENT(__half)"),
        ("cuda/persistent_forward.cuh", "tile % 2 * 2 + row / 8", "tile % 2 * 2 + 1 - row / 8"),
        ("cuda/persistent_launch.cuh", "args.sides[0].cell.rows.options;", "false;"),
        ("cuda/step.h", "  int64_t row_count;\n  int64_t depth;\n", "  int64_t depth;\n  int64_t row_count;\n"),
        ("cuda/step_backward.cuh", "(row / kStepUnits * H + unit) * args.weight_stride",
         "(row / kStepUnits * H) * args.weight_stride"),
        ("cuda/step_bf16.cu", "LSTM_EXT_STEP(__nv_bfloat16)", "LSTM_EXT_STEP(float)"),
        ("cuda/step_f16.cu", "LSTM_EXT_STEP(__half)", "LSTM_EXT_STEP(float)"),
        ("cuda/step_f32.cu", "LSTM_EXT_STEP(float)", "LSTM_EXT_STEP(__half)"),
        ("cuda/step_forward.cuh", "row % 16 / 8, row / 32 * 8", "row % 16 / 8 ^ 1, row / 32 * 8"),
        ("cuda/step_launch.cuh", "static_cast<unsigned>(args.count)", "1u"),
        ("cuda/stepwise.h", "  const T* c0;                                    // (B, H)\n"
         "  const T* reset_c;                               // (B, H)\n", "  const T* reset_c;\n  const T* c0;\n"),
        ("cuda/stepwise_bf16.cu", "LSTM_EXT_STEPWISE(__nv_bfloat16)", "LSTM_EXT_STEPWISE(float)"),
        ("cuda/stepwise_f16.cu", "LSTM_EXT_STEPWISE(__half)", "LSTM_EXT_STEPWISE(float)"),
        ("cuda/stepwise_f32.cu", "LSTM_EXT_STEPWISE(float)", "LSTM_EXT_STEPWISE(double)"),
        ("cuda/stepwise_f64.cu", "LSTM_EXT_STEPWISE(double)", "LSTM_EXT_STEPWISE(float)"),
    ],
    PRIMITIVES: [
        ("cuda/platform.h", "++tries_ % 256 == 0", "++tries_ % 255 == 0"),
    ],
    GPU_PLAN: [
        ("cuda/gpu_plan.cpp", "outcome == Outcome::kRight) return", "outcome != Outcome::kWrong) return"),
    ],
    DAMAGE: [
        ("library/weights_file.cpp", "if (!is_share(h.name))", "if (false)"),
        ("library/weights_file.h", "kHasPeepholes = 4,\n  kHasLayerNorm = 8,",
         "kHasPeepholes = 8,\n  kHasLayerNorm = 4,"),
    ],
    emulated("race", "stepwise"): [
        ("cuda/reduction.cuh", "    __syncthreads();\n", ""),
        ("cuda/layer_norm.cuh", "  __syncthreads();  // the sums before have been read\n", ""),
        ("cuda/layer_norm.cuh", "  __syncthreads();\n  for (int n", "  for (int n"),
    ],
    emulated("late", "stepwise"): [
        ("cuda/cell.cuh", "if (j >= H) return;\n  A bias[4]", "if (j > H) return;\n  A bias[4]"),
        ("cuda/cell.cuh", "if (j >= H) return;\n  const", "if (j > H) return;\n  const"),
        ("cuda/state.cuh", "return b < rows.previous_count;", "return b <= rows.previous_count;"),
        ("cuda/state.cuh", "return b < rows.next_count;", "return b < rows.next_count - 1;"),
        ("cuda/state.cuh", "rows.resets[b] && (!rows.reverse || has_previous<true>(rows, b))", "rows.resets[b]"),
        ("cuda/state.cuh", "!rows.reverse && rows.time + 1 >= rows.l", "!rows.reverse && rows.time >= rows.l"),
        ("cuda/stepwise_launch.cuh", "{parts, columns, parts,", "{parts - 1, columns, parts,"),
        ("cuda/layer_norm.cuh", "warp < blockDim.x / 32;", "warp < blockDim.x / 32 - 1;"),
    ],
    emulated("late", "step"): [
        ("cuda/step_forward.cuh", "    cp_async_commit();\n    const unsigned char* stage",
         "    const unsigned char* stage"),
        ("cuda/step_forward.cuh", "cp_async_wait<kStepStages - 2>", "cp_async_wait<kStepStages - 1>"),
        ("cuda/step_forward.cuh", "shared_ + n % kStepStages", "shared_ + (n + 1) % kStepStages"),
        ("cuda/step_forward.cuh", "row / 32 * 8 + row % 8}", "row / 32 * 8 + (row + 1) % 8}"),
        ("cuda/step_forward.cuh",
         "  grid_dependency_wait();\n  launch_dependents();\n  ForwardOperand<T, kRows, false> rows",
         "  ForwardOperand<T, kRows, false>(args, shared, first_row).fetch(0);\n"
         "  grid_dependency_wait();\n  launch_dependents();\n  ForwardOperand<T, kRows, false> rows"),
        ("cuda/step_forward.cuh", "Tile::place(Copies::row(), Copies::piece() * kPieceBytes)",
         "Copies::row() * Tile::kRowBytes + Copies::piece() * kPieceBytes"),
        ("cuda/step_forward.cuh", "if (n == tiles_of(args_.products[0])) begin", "if (n < 0) begin"),
        ("cuda/step_forward.cuh", "make_float4(sums[n][m][column], sums[n][m][2 + column],",
         "make_float4(sums[n][m][2 + column], sums[n][m][column],"),
        ("cuda/step_forward.cuh", "part < Tile::kParts; ++part", "part < Tile::kParts - 1; ++part"),
        ("cuda/step_forward.cuh", "if (product.resets[b]) return", "if (false) return"),
        ("cuda/step_tiles.cuh", "left < 0 ? 0 : left < kPieceBytes ? left : kPieceBytes", "kPieceBytes"),
        ("cuda/step_tiles.cuh", "column_ + kPieceNumbers <= length_", "column_ <= length_"),
        ("cuda/step_backward.cuh", "(output.recurrent_parts + kSums - 1) / kSums", "output.recurrent_parts / kSums"),
        ("cuda/step_backward.cuh", "output.recurrent_part + first * output.recurrent_part_stride",
         "output.recurrent_part + (first + 1) * output.recurrent_part_stride"),
        ("cuda/step_backward.cuh", "int64_t{blockIdx.x} * args.row_count * H", "int64_t{blockIdx.x} * H"),
        ("cuda/cell.cuh", "if (b >= args.rows.count || j >=", "if (b > args.rows.count || j >="),
    ],
    emulated("race", "step"): [
        ("cuda/step_forward.cuh", "    __syncthreads();  // tile n has come", "    // tile n has come"),
        ("cuda/step_forward.cuh",
         "  __syncthreads();\n#pragma unroll\n  for (int i = 0; i < kCells; ++i) {\n    float product",
         "#pragma unroll\n  for (int i = 0; i < kCells; ++i) {\n    float product"),
        ("cuda/step_backward.cuh", "  __syncthreads();\n  for (int cell", "  for (int cell"),
        ("cuda/step_backward.cuh", "  grid_dependency_wait();\n  launch_dependents();\n", "  launch_dependents();\n"),
        ("cuda/step_backward.cuh", "    __syncthreads();  // the gradients", "    // the gradients"),
        ("torch/cuda_stepwise_forward.cpp", "dependent_ && !whole_", "dependent_"),
        ("torch/cuda_stepwise_backward.cpp", "dependent_ && n < last", "dependent_"),
    ],
    emulated("race", "persistent"): [
        ("cuda/persistent_chunk.cuh", "+ turn % 2 * kPartials;", "+ turn * 0;"),
        ("cuda/persistent_chunk.cuh", "      __threadfence();  // behind", "      // behind"),
    ],
    emulated("random", "persistent"): [
        ("cuda/persistent_chunk.cuh", "      __syncthreads();  // the sums", "      // the sums"),
        ("cuda/persistent_chunk.cuh", "whole = whole && is_whole(pieces_[q]);", ""),
    ],
    emulated("late", "persistent"): [
        ("cuda/persistent_chunk.cuh", "    left_at = place.row;",
         "    left_at = i > 0 ? place.row_before : place.row;"),
        ("cuda/persistent_chunk.cuh", "if (b >= rows) return nullptr;", "if (b > rows || rows == 0) return nullptr;"),
        ("cuda/persistent_chunk.cuh", "word == kSentinel ? 0x7fff7fffu : word",
         "word == 0x7fff7fffu ? kSentinel : word"),
        ("cuda/persistent_chunk.cuh", "place.rows || first >= length) return;",
         "place.rows || place.time == 1 || first >= length) return;"),
        ("cuda/persistent_chunk.cuh", "!writes || b >= place.rows ||", "!writes ||"),
        ("cuda/persistent_chunk.cuh", "i == 0 ? box.before : box.slots", "box.slots"),
        ("cuda/persistent_chunk.cuh", "first[1] = high.x, first[2] = low.y,", "first[1] = high.y, first[2] = low.y,"),
        ("cuda/persistent_chunk.cuh", "{{d[tile][column], d[tile][2 + column],",
         "{{d[tile][2 + column], d[tile][column],"),
        ("cuda/persistent_chunk.cuh", "second ? b : a", "second ? a : b"),
        ("cuda/persistent_chunk.cuh", "at.row += tile * kPersistentRows;", "at.row += 0;"),
        ("cuda/persistent_chunk.cuh", "stride = all_.groups * kRows", "stride = all_.groups * kPersistentRows"),
        ("cuda/persistent_chunk.cuh", "c.reverse ? place.time + 1 : place.time);\n  result", "place.time);\n  result"),
        ("cuda/persistent_chunk.cuh", "resets_at(c, resets, c.reverse ? place.time : place.time + 1)",
         "resets_at(c, resets, place.time)"),
        ("cuda/persistent_chunk.cuh", "if (late_[0] == 0) return;", "return;", "not spoiled"),
        ("cuda/persistent_chunk.cuh", "!all_.control.before ||", "true ||", "the launch behind it waited"),
        ("cuda/persistent_chunk.cuh", "left == blocks() - 1 &&", "left == 0 &&", "not spoiled"),
        ("cuda/persistent_chunk.cuh", "threadIdx.x == 0) atomicAdd(all_.control.words + kBlocksThatCame, 1u);",
         "false) return;", "was not counted"),
        ("cuda/persistent_forward.cuh", "int64_t{place.row_before} * H",
         "int64_t{place.row_before < 0 ? place.row : place.row_before} * H"),
        ("cuda/persistent_forward.cuh", "args.batch_first ? place.time : place.row", "place.row"),
        ("torch/cuda_persistent.h", ".fill_(0xff);", ";"),
    ],
    emulated("torn", "persistent"): [
        ("cuda/persistent_chunk.cuh",
         "return piece.x != kSentinel && piece.y != kSentinel && piece.z != kSentinel && piece.w != kSentinel;",
         "return piece.w != kSentinel;"),
    ],
    emulated("late", "large"): [
        ("cuda/persistent_chunk.cuh", "= weight_piece(piece_of(kPieces + e)", "= weight_piece(piece_of(e)"),
    ],
    LATE_BLOCK: [
        ("cuda/persistent_chunk.cuh", "limit.has_passed(all_came ? 1 : kForBlocks)", "limit.has_passed()",
         "before all blocks had come"),
        ("cuda/persistent_chunk.cuh", "if (all_came && !they_came) limit.start_again();", "",
         "before all blocks had come"),
    ],
    BY_PTX: [
        ("cuda/ptx.h", "[%0], [%1], 16, %2", "[%2], [%1], 16, %0"),
        ("cuda/ptx.h", "4.shared.b16 {%0, %1, %2,", "4.shared.b16 {%0, %2, %1,"),
        ("cuda/ptx.h", ".trans", ""),
        ("cuda/ptx.h", ".f16.f32 {%0, %1, %2, %3}, {%4, %5, %6,", ".f16.f32 {%0, %1, %2, %3}, {%4, %6, %5,"),
        ("cuda/ptx.h", "bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}",
         "bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%9, %8}"),
        ("cuda/ptx.h", "2.f32 {%0, %1, %2, %3}, {%4", "2.f32 {%0, %2, %1, %3}, {%4"),
        ("cuda/ptx.h", "cvt.rna.", "cvt.rn."),
        ("cuda/ptx.h", "0, [%1]", "0, [%1+4]"),
        ("cuda/ptx.h", "b32 {%0, %1, %2,", "b32 {%0, %2, %1,"),
        ("cuda/ptx.h", "b32 [%0], {%1, %2, %3, %4}", "b32 [%0], {%1, %2, %4, %3}"),
        ("cuda/ptx.h", 't value) {\n  asm volatile("st.relaxed.gpu.', 't value) {\n  asm volatile("st.'),
    ],
}  # fmt: skip

# Tests that need the kernels of all sets.
OF_EVERY_SET = ("tests/cpu/test_kernels.py::test_no_newer_instructions_outside_the_sets",)
# The names of tests of sets that the copy for one instruction set does not have.
NAMES = {"avx512": ("amx", "avx512_bf16", "avx512")}


@dataclass(frozen=True)
class Fault:
    tests: Tests
    file: str
    right: str
    wrong: str
    said: str = ""

    @property
    def path(self) -> str:
        return self.file if self.file.startswith("lstm_ext/") else f"csrc/{self.file}"


FAULTS = [Fault(tests, *row) for tests, rows in TABLE.items() for row in rows]


def problems() -> list[str]:
    """Kernel files without a fault, and faults without their line."""
    csrc, files = ROOT / "csrc", {fault.file for fault in FAULTS}
    found = [
        f"csrc/{path.relative_to(csrc)} has no fault in tests/tools/planted.py"
        for folder in FOLDERS
        for path in sorted((csrc / folder).rglob("*"))
        if path.is_file() and str(path.relative_to(csrc)) not in files
    ]
    for fault in FAULTS:
        if not (ROOT / fault.path).is_file():
            found.append(f"{fault.path} is not there any more")
        elif (times := (ROOT / fault.path).read_text().count(fault.right)) != 1:
            found.append(f"{fault.path} has {fault.right!r} {times} times, and not once")
    return found


def run(
    command: Sequence[str], folder: Path, log: Path, seconds: float | None = None, **variables: str
) -> int:
    """The exit code; 124 after so many seconds. `variables` are of the environment."""
    # pytest-xdist's variables of a test that calls this would make its child one of its workers.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "LSTM_EXT_"))}
    environment |= variables
    with log.open("a") as file:
        print("$", *command, file=file, flush=True)
        try:
            done = subprocess.run(
                command, cwd=folder, stdout=file, stderr=file, env=environment, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            print(f"ended after {seconds} seconds", file=file)
            return 124
    return done.returncode


class Copy:
    """A copy of the tree with a build of its own: of all instruction sets, or of AVX2 and those of `also`."""

    def __init__(self, name: str, every_set: bool, also: Sequence[str] = ()) -> None:
        self.folder, self.log = WORK / name, WORK / f"{name}.log"
        shutil.rmtree(self.folder / "csrc", ignore_errors=True)
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True, text=True,
        ).stdout  # fmt: skip
        for file in filter(None, listed.split("\0")):
            source, target = ROOT / file, self.folder / file
            if source.is_file() and not (target.is_file() and target.read_bytes() == source.read_bytes()):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        self.sets = "" if every_set else ",".join(("avx2", *also))
        if not every_set:
            left_out = [name for set_, names in NAMES.items() if set_ not in also for name in names]
            skips = self.folder / "tests" / "expected_skips.txt"
            lines = [f"*[*{name}*  # not in this build\n*[{name}*  # the same\n" for name in left_out]
            skips.write_text(skips.read_text() + "".join(lines))
        self.log.unlink(missing_ok=True)
        self.without = () if every_set else OF_EVERY_SET
        self.sound: set[Tests] = set()
        # The first run of the emulated layer, without a fault, writes its bits there; see tests/simt/test_modes.py.
        self.expected = self.folder.with_name("expected.pt")
        self.expected.unlink(missing_ok=True)

    def build(self) -> bool:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        return run(command, self.folder, self.log, LSTM_EXT_CPU_SETS=self.sets) == 0

    def test(self, tests: Tests) -> int:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "--dist", "worksteal"]
        command += ["-m", "not full", "-p", "no:cacheprovider", *tests.arguments]
        command += [f"--deselect={test}" for test in self.without]
        return run(command, self.folder, self.log, TIMEOUT, SIMT_EXPECTED=str(self.expected))

    def begin(self, tests: Tests) -> str | None:
        """Without a fault the tests pass. The reason if they do not."""
        if tests not in self.sound:
            if not self.build():
                return f"the copy does not build: {self.log}"
            if self.test(tests) != 0:
                return f"{' '.join(tests.arguments)} fail without a fault: {self.log}"
            self.sound.add(tests)
        return None

    def verdict(self, fault: Fault) -> str:
        """found, survives, or why neither can be said."""
        if reason := self.begin(fault.tests):
            return reason
        path = self.folder / fault.path
        text = path.read_text()
        path.write_text(text.replace(fault.right, fault.wrong))
        try:
            # The emulator builds its own module, within the tests; it takes the operators as they are.
            is_built = fault.path.startswith("csrc/") and not fault.tests.arguments[0].startswith(
                "tests/simt/"
            )
            if is_built and not self.build():
                return f"does not compile: {self.log}"
            before = self.log.stat().st_size
            failed = self.test(fault.tests) != 0
            return "found" if failed and fault.said in self.log.read_text()[before:] else "survives"
        finally:
            path.write_text(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="a part of a file's name")
    parser.add_argument("--check", action="store_true", help="plant nothing")
    options = parser.parse_args(arguments)
    if found := problems():
        print(*found, sep="\n")
        return 1
    if options.check:
        return 0
    chosen = [f for f in FAULTS if not options.files or any(part in f.path for part in options.files)]
    WORK.mkdir(parents=True, exist_ok=True)
    copies: dict[bool, Copy] = {}
    failed = False
    for fault in sorted(chosen, key=lambda fault: fault.tests.every_set):
        start = time.monotonic()
        every_set = fault.tests.every_set
        if every_set not in copies:
            copies[every_set] = Copy("every_set" if every_set else "avx2", every_set)
        verdict = copies[every_set].verdict(fault)
        failed |= verdict != "found"
        seconds = time.monotonic() - start
        print(f"{fault.path}: {fault.right!r} is {fault.wrong!r}: {verdict} ({seconds:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
