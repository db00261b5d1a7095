// The forward pass of the persistent kernels: h goes from step to step.
#pragma once

#include "cuda/persistent_chunk.cuh"

namespace lstm_ext::cuda {

template <typename T, bool kOptions>
struct PersistentForwardPass {
  using Arguments = PersistentForward<T>;
  using Operand = T;
  static constexpr bool kBackward = false;
  static constexpr int kSums = 4;

  using Cell = BegunCell;

  const Arguments& args;

  LSTM_DEVICE explicit PersistentForwardPass(const Arguments& arguments) : args(arguments) {}

  // The biases of one hidden unit, constant over time.
  struct Unit {
    float bias[4];
  };
  LSTM_DEVICE Unit unit(int64_t j) const {
    Unit result = {};
    if (j >= args.cell.hidden_size) return result;
    for (int gate = 0; gate < 4; ++gate) result.bias[gate] = bias_at(args.cell, gate, j);
    return result;
  }

  LSTM_DEVICE static int rows_left(const StepPlace& place) { return place.previous_rows; }

  // The row `row` of a tile; two tiles are four gates of eight units, as in step_forward.cuh.
  LSTM_DEVICE uint4 weight_piece(int64_t first_unit, int tile, int row, int64_t piece) const {
    const int64_t H = args.cell.hidden_size, first = piece * kPieceNumbers<T>;
    const int64_t unit = first_unit + tile / 2 * 8 + row % 8;
    const int gate = tile % 2 * 2 + row / 8;
    union {
      uint4 bits;
      T numbers[kPieceNumbers<T>];
    } result = {make_uint4(0, 0, 0, 0)};
    if (unit >= H || first >= H) return result.bits;
    const T* from = args.weight + (gate * H + unit) * args.weight_stride + first;
    if (first + kPieceNumbers<T> <= H) return *reinterpret_cast<const uint4*>(from);
#pragma unroll
    for (int i = 0; i < kPieceNumbers<T>; ++i) {
      if (first + i < H) result.numbers[i] = from[i];
    }
    return result.bits;
  }

  // The step in the form of the stepwise kernels. Sizes have 32 bits, so that their products are one instruction.
  LSTM_DEVICE CellForward<T> step(const StepPlace& place) const {
    CellForward<T> cell = args.cell;
    const int H = static_cast<int>(cell.hidden_size);
    const int64_t row = place.row;
    cell.hidden_size = H;
    cell.input_stride = static_cast<int>(cell.input_stride);
    cell.output.h_stride = static_cast<int>(cell.output.h_stride);
    cell.rows = step_rows_of(args.cell.rows, args.steps, args.resets, place);
    cell.input_part += int64_t{args.batch_first ? place.time : place.row} * (4 * H);
    cell.recurrent_part = nullptr;
    if (args.keeps_cells) {
      cell.c_previous.previous += int64_t{place.row_before} * H;
      cell.c += row * H;
    }
    if (cell.zoneout.keep) cell.zoneout.keep += row * H;
    if (cell.preactivations) cell.preactivations += row * (4 * H);
    cell.output.h += row * cell.output.h_stride;
    if (cell.output.zoneout.keep) cell.output.zoneout.keep += row * H;
    cell.output.recurrent_h = nullptr;
    return cell;
  }

  LSTM_DEVICE Cell begin_cell(const CellForward<T>& cell, int64_t b, int64_t j) const {
    return cuda::begin_cell<kOptions>(cell, b, j);
  }
  LSTM_DEVICE void complete_cell(Cell& begun, const Unit& unit, int64_t b, int64_t j) const {
    cuda::complete_cell(args.cell, begun, b, j, [&](int gate) { return unit.bias[gate]; });
  }

  using Result = NewCell<T>;
  LSTM_DEVICE Result finish_cell(const CellForward<T>& cell, Cell& begun, int64_t b, int64_t j,
                                 const float (&product)[4], T (&left)[1]) const {
    Result result = {};
    if (begun.row.takes_part()) {
      result = new_cell<kOptions, FastMath>(cell, begun, b * cell.hidden_size + j, product);
    } else {
      result.output.operand = narrow<T>(0);
    }
    left[0] = result.output.operand;
    return result;
  }
  LSTM_DEVICE void write(const CellForward<T>& cell, const Cell& begun, const Result& result, int64_t b,
                         int64_t j) const {
    if (begun.row.takes_part()) {
      write_cell(cell, begun.row, b, j, result);
    } else if (is_cell(cell, b, j)) {
      write_no_cell(cell, b, j);
    }
  }

  // NaN for everything that the chunk writes and others read.
  LSTM_DEVICE void spoil() const {
    const CellForward<T>& cell = args.cell;
    const ChunkOfSteps& steps = args.steps;
    const int64_t H = cell.hidden_size;
    const int64_t rows = row_at(steps, chunk_begin(steps) + steps.end - steps.first);
    const T nan = narrow<T>(__int_as_float(0x7fffffff));
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < rows * H; i += kPersistentThreads) {
      const int64_t row = i / H, j = i % H;
      cell.output.h[row * cell.output.h_stride + j] = nan;
      if (!cell.preactivations) continue;
      for (int gate = 0; gate < 4; ++gate) cell.preactivations[(row * 4 + gate) * H + j] = nan;
    }
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < int64_t{steps.batch} * H; i += kPersistentThreads) {
      cell.output.h_n[i] = nan;
      cell.c_n[i] = nan;
    }
  }
};

}  // namespace lstm_ext::cuda
