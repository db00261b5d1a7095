// The backward pass of the persistent kernels: the gradients of the gates go from step to step, against the direction
// of the layer. A block gathers those of all units, and multiplies them by its units' columns of U.
#pragma once

#include "cuda/persistent_chunk.cuh"

namespace lstm_ext::cuda {

template <typename T, bool kOptions>
struct PersistentBackwardPass {
  using Arguments = PersistentBackward<T>;
  using Operand = typename Types<T>::Gradient;
  static constexpr bool kBackward = true;
  static constexpr int kSums = 1;
  struct Cell {
    RowState row;  // takes no part if it is not there
    LoadedCell<T> loaded;
    CellValues<FastMath> values;
  };

  const Arguments& args;

  LSTM_DEVICE explicit PersistentBackwardPass(const Arguments& arguments) : args(arguments) {}

  struct Unit {};
  LSTM_DEVICE Unit unit(int64_t) const { return {}; }

  LSTM_DEVICE static int rows_left(const StepPlace& place) { return place.next_rows; }

  // Row `row` of a tile is a unit; along it run all gates' rows of U, gate by gate.
  LSTM_DEVICE uint4 weight_piece(int64_t first_unit, int tile, int row, int64_t piece) const {
    const int64_t unit = first_unit + tile * 16 + row, first = piece * kPieceNumbers<Operand>;
    if (unit >= args.cell.hidden_size || first >= args.mailbox.length) return make_uint4(0, 0, 0, 0);
    return *reinterpret_cast<const uint4*>(args.weight + unit * args.mailbox.length + first);
  }

  // The step in the form of the stepwise kernels. Sizes have 32 bits, so that their products are one instruction.
  LSTM_DEVICE CellBackward<T> step(const StepPlace& place) const {
    CellBackward<T> cell = args.cell;
    const int H = static_cast<int>(cell.hidden_size);
    const int64_t row = place.row;
    cell.hidden_size = H;
    cell.rows = step_rows_of(args.cell.rows, args.steps, args.resets, place);
    cell.preactivations += row * (4 * H);
    cell.cells += row * H;
    cell.c_previous.previous += int64_t{place.row_before} * H;
    if (cell.zoneout.keep) cell.zoneout.keep += row * H;
    if (cell.grad_gate_values) cell.grad_gate_values += row * (4 * H);
    if (cell.grad_cells) cell.grad_cells += row * H;
    if (cell.grad_recurrent_part) cell.grad_recurrent_part += row * (4 * H);
    if (cell.hidden) cell.hidden += row * H;
    GradOutput<T>& output = cell.output;
    if (output.grad_output) {
      output.grad_output +=
          args.grad_output_by_time ? place.time * args.grad_output_time_stride : row * output.grad_output_stride;
    }
    if (output.zoneout.keep) output.zoneout.keep += row * H;
    return cell;
  }

  LSTM_DEVICE Cell begin_cell(const CellBackward<T>& cell, int64_t b, int64_t j) const {
    Cell result = {};
    if (!is_cell(cell, b, j)) return result;
    result.row = backward_row<kOptions>(cell.rows, b);
    if (!result.row.takes_part()) return result;
    if constexpr (kOptions) {
      result.values = cell_values<kOptions, FastMath>(cell, result.row, b, j);
    } else {
      result.loaded = load_cell(cell, result.row, b, j);
    }
    return result;
  }
  LSTM_DEVICE void complete_cell(Cell& begun, const Unit&, int64_t b, int64_t j) const {
    if constexpr (!kOptions) {
      if (begun.row.takes_part()) begun.values = values_of<FastMath>(args.cell, begun.row, begun.loaded, b, j);
    }
  }

  using Result = CellGradients<float>;
  LSTM_DEVICE Result finish_cell(const CellBackward<T>& cell, const Cell& begun, int64_t b, int64_t j,
                                 const float (&product)[1], Operand (&left)[4]) const {
    Result result = {};
    if (begun.row.takes_part()) {
      result = cell_gradients<kOptions>(cell, begun.row, b, j, begun.values, [&] { return product[0]; });
    }
    for (int gate = 0; gate < 4; ++gate) left[gate] = narrow<Operand>(result.z[gate]);
    return result;
  }
  LSTM_DEVICE void write(const CellBackward<T>& cell, const Cell& begun, const Result& result, int64_t b,
                         int64_t j) const {
    if (begun.row.takes_part()) {
      write_gradients<kOptions>(cell, begun.row, b, j, begun.values, result);
    } else if (is_cell(cell, b, j)) {
      write_no_gradients(cell, b, j);
    }
  }

  // NaN for everything that the chunk writes and others read.
  LSTM_DEVICE void spoil() const {
    const CellBackward<T>& cell = args.cell;
    const ChunkOfSteps& steps = args.steps;
    const int64_t H = cell.hidden_size;
    const int64_t rows = row_at(steps, chunk_begin(steps) + steps.end - steps.first);
    const float nan = __int_as_float(0x7fffffff);
    Operand* const parts = cell.grad_recurrent_part ? cell.grad_recurrent_part : args.mailbox.slots;
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < rows * 4 * H; i += kPersistentThreads) parts[i] = narrow<Operand>(nan);
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < int64_t{steps.batch} * H; i += kPersistentThreads) {
      cell.grad_c[i] = nan;
      if (cell.output.grad_h) cell.output.grad_h[i] = nan;
      if (cell.output.grad_reset_h) cell.output.grad_reset_h[i] = nan;
      if (cell.grad_reset_c) cell.grad_reset_c[i] = nan;
      for (int gate = 0; gate < 4; ++gate) {
        const int64_t place = (i / H * 4 + gate) * H + i % H;
        if (cell.grad_begin_part) cell.grad_begin_part[place] = narrow<Operand>(nan);
        if (cell.grad_reset_part) cell.grad_reset_part[place] = nan;
      }
    }
  }
};

}  // namespace lstm_ext::cuda
