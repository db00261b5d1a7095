// The pointwise part of a time step. A thread has one hidden unit of one row and all four gates of it, so everything
// from the preactivations to h_t happens in its registers. A block is some units wide and some rows high. The grid
// covers the units, and takes the rows in strides if there are more than it can be high. It has a slice in z for each
// direction.
#pragma once

#include <cmath>
#include <cstring>

#include "cuda/cell_math.cuh"
#include "cuda/state.cuh"

namespace lstm_ext::cuda {

constexpr int kCellThreads = 256;

// The functions below take the cell as an argument: cell::Plain, or in a kernel with kCell a CellAt.
template <bool kCell, typename T>
LSTM_DEVICE auto cell_at(const cell::Options<accumulator_t<T>>& options, int64_t unit) {
  if constexpr (kCell) {
    return CellAt<T>{options, {unit}};
  } else {
    return cell::Plain{};
  }
}

template <typename Math, typename T, typename Cell = cell::Plain>
LSTM_DEVICE GateValues<typename Types<T>::Accumulate> gate_values_at(const T* preactivations, int64_t b, int64_t j,
                                                                     int64_t size, const Cell& cell = {}) {
  GateValues<typename Types<T>::Accumulate> z;
  for (int gate = 0; gate < 4; ++gate) {
    z[gate] = widen(preactivations[(b * 4 + gate) * size + j]);
    cell::clip_preactivation<Math>(z[gate], cell);  // rounded, one on the bound may lie beyond it
  }
  return cell::gate_values<Math>(z, cell);
}

// ---- forward

template <typename T>
LSTM_DEVICE typename Types<T>::Accumulate bias_at(const CellForward<T>& args, int gate, int64_t j) {
  if (!args.bias_ih) return 0;
  return widen(args.bias_ih[gate * args.hidden_size + j]) + widen(args.bias_hh[gate * args.hidden_size + j]);
}

// U h_{t-1} of row b; null means zeros.
template <typename T>
LSTM_DEVICE const typename Types<T>::Accumulate* recurrent_row(const CellForward<T>& args, RowState row, int64_t b) {
  const auto source = row.source();
  const auto* part = source == transition::Source::kReset        ? args.reset_part
                     : source == transition::Source::kStepBefore ? args.recurrent_part
                                                                 : args.begin_part;
  return part ? part + b * 4 * args.hidden_size : nullptr;
}

// c_t, from that of the equations without zoneout, and from c_{t-1}, as previous_cell gives it.
template <bool kOptions, typename T>
LSTM_DEVICE typename Types<T>::Accumulate cell_state(const CellForward<T>& args, int64_t place,
                                                     typename Types<T>::Accumulate now,
                                                     typename Types<T>::Accumulate before) {
  if constexpr (kOptions) {
    using A = typename Types<T>::Accumulate;
    if (args.zoneout.active()) return kept_state<A>({args.zoneout, place}, now, before);
  }
  return now;
}
// The piece of a function that z lies on: the pieces of some have different slopes where they meet.
template <typename A>
LSTM_DEVICE int piece_of(const cell::Activation<A>& f, A z) {
  using cell::Function;
  switch (f.function) {
    case Function::kRelu:
    case Function::kLeakyRelu:
    case Function::kElu: return z > 0;
    case Function::kThresholdedRelu: return z > f.alpha;
    case Function::kHardSigmoid: return (f.alpha * z + f.beta > 0) + (f.alpha * z + f.beta < 1);
    default: return 0;
  }
}
// A preactivation as it is saved. Rounded to 16 bits, it stays on its side of each edge, or else its gradient would be
// another one.
template <typename T, typename Cell>
LSTM_DEVICE T saved_preactivation(int gate, typename Types<T>::Accumulate z, const Cell& cell) {
  const T rounded = narrow<T>(z);
  if constexpr (Cell::kOptions && sizeof(T) == 2) {
    const float found = widen(rounded);
    bool same = true;
    if (cell.other_activations()) {
      const auto& f = cell.activation(static_cast<cell::Gate>(gate));
      same = piece_of(f, found) == piece_of(f, z);
    }
    if (cell.clips_preactivations()) {
      const float bound = cell.preactivation_clip();
      same = same && (fabsf(found) >= bound) == (fabsf(z) >= bound);
    }
    if (!same) {
      uint16_t bits;
      memcpy(&bits, &rounded, sizeof(bits));
      if (found == 0) {
        bits = z > 0 ? 0x0001 : 0x8001;  // the least number
      } else {
        bits = static_cast<uint16_t>((z > found) == (found > 0) ? bits + 1 : bits - 1);
      }
      T next;
      memcpy(&next, &bits, sizeof(bits));
      return next;
    }
  }
  return rounded;
}
template <typename T, typename Cell>
LSTM_DEVICE void write_preactivations(const CellForward<T>& args, int64_t b, int64_t j,
                                      const typename Types<T>::Accumulate (&z)[4], const Cell& cell) {
  if (!args.preactivations) return;
  for (int gate = 0; gate < 4; ++gate) {
    args.preactivations[(b * 4 + gate) * args.hidden_size + j] = saved_preactivation<T>(gate, z[gate], cell);
  }
}
// Writes c_t of row b, and the preactivations.
template <typename T, typename Cell = cell::Plain>
LSTM_DEVICE void write_state(const CellForward<T>& args, RowState row, int64_t b, int64_t j,
                             const typename Types<T>::Accumulate (&z)[4], typename Types<T>::Accumulate c,
                             const Cell& cell = {}) {
  const int64_t H = args.hidden_size, place = b * H + j;
  args.c[place] = c;
  write_preactivations(args, b, j, z, cell);
  if (!row.has_next()) args.c_n[place] = narrow<T>(c);
}

template <typename T>
LSTM_DEVICE void write_no_cell(const CellForward<T>& args, int64_t b, int64_t j) {
  using A = typename Types<T>::Accumulate;
  const int64_t H = args.hidden_size;
  args.c[b * H + j] = 0;
  if (args.preactivations) {
    for (int gate = 0; gate < 4; ++gate) {
      args.preactivations[(b * 4 + gate) * H + j] = narrow<T>(gate == cell::kG ? A(0) : A(-INFINITY));
    }
  }
  write_no_output(args.output, b, j);
}

// The results of a step for unit j of a row that takes part.
template <typename T>
struct NewCell {
  typename Types<T>::Accumulate z[4];  // preactivations
  typename Types<T>::Accumulate c;
  OutputValues<T> output;
};
// From the preactivations and c_{t-1}.
template <bool kOptions, typename Math, typename T, typename Cell = cell::Plain>
LSTM_DEVICE NewCell<T> new_cell(const CellForward<T>& args, RowState row, int64_t place,
                                const typename Types<T>::Accumulate (&z)[4], typename Types<T>::Accumulate before,
                                const Cell& cell = {}) {
  NewCell<T> result;
  GateValues<typename Types<T>::Accumulate> seen{{z[0], z[1], z[2], z[3]}};
  const auto now = cell::forward<Math>(seen, cell::Here<Math>{before}, cell);
  for (int gate = 0; gate < 4; ++gate) result.z[gate] = seen[gate];
  result.c = cell_state<kOptions>(args, place, now.c, before);
  result.output = output_values<kOptions>(args.output, row, place, now.h);
  return result;
}
// The same in three parts, for kernels that multiply themselves. A cell before its product is there: z is W x, and
// before is c_{t-1}. It takes no part if it is not there. `whole`: the product is W x + U h of every row. begin_cell
// loads, and nothing waits for what it loads.
struct BegunCell {
  RowState row;
  float z[4];
  float before;
};
template <bool kOptions, typename T>
LSTM_DEVICE BegunCell begin_cell(const CellForward<T>& args, int64_t b, int64_t j, bool whole = false) {
  const int64_t H = args.hidden_size;
  BegunCell begun = {};
  if (b >= args.rows.count || j >= H) return begun;
  begun.row = forward_row<kOptions>(args.rows, b);
  if (!begun.row.takes_part()) return begun;
  begun.before = previous_cell(begun.row, args.c_previous, b * H + j);
  if (whole) return begun;
  for (int gate = 0; gate < 4; ++gate) begun.z[gate] = args.input_part[b * args.input_stride + gate * H + j];
  return begun;
}
// Adds the biases, and U h_{t-1} where h_{t-1} is not that of the step before.
template <typename T, typename Bias>
LSTM_DEVICE void complete_cell(const CellForward<T>& args, BegunCell& begun, int64_t b, int64_t j, Bias&& bias,
                               bool whole = false) {
  if (!begun.row.takes_part()) return;
  for (int gate = 0; gate < 4; ++gate) begun.z[gate] += bias(gate);
  if (whole || begun.row.takes_product()) return;
  if (const float* recurrent = recurrent_row(args, begun.row, b)) {
    for (int gate = 0; gate < 4; ++gate) begun.z[gate] += recurrent[gate * args.hidden_size + j];
  }
}
template <bool kOptions, typename Math, typename T>
LSTM_DEVICE NewCell<T> new_cell(const CellForward<T>& args, BegunCell& begun, int64_t place, const float (&product)[4],
                                bool whole = false) {
  const bool counts = whole || begun.row.takes_product();
  for (int gate = 0; gate < 4; ++gate) begun.z[gate] = counts ? begun.z[gate] + product[gate] : begun.z[gate];
  return new_cell<kOptions, Math>(args, begun.row, place, begun.z, begun.before);
}
template <typename T, typename Cell = cell::Plain>
LSTM_DEVICE void write_cell(const CellForward<T>& args, RowState row, int64_t b, int64_t j, const NewCell<T>& made,
                            const Cell& cell = {}) {
  write_state(args, row, b, j, made.z, made.c, cell);
  write_output(args.output, row, b, j, args.hidden_size, made.output);
}

template <typename T, bool kOptions, bool kCell = false>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kCellThreads) cell_forward_kernel(LSTM_GRID_CONSTANT StepSides<CellForward<T>> both) {
  const CellForward<T>& args = both.sides[blockIdx.z];
  using A = typename Types<T>::Accumulate;
  const int64_t H = args.hidden_size;
  const int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= H) return;
  A bias[4];
  for (int gate = 0; gate < 4; ++gate) bias[gate] = bias_at(args, gate, j);
  const int64_t stride = int64_t{gridDim.y} * blockDim.y;
  for (int64_t b = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; b < args.rows.count; b += stride) {
    const RowState row = forward_row<kOptions>(args.rows, b);
    if (!row.takes_part()) {
      write_no_cell(args, b, j);
      continue;
    }
    A z[4];
    for (int gate = 0; gate < 4; ++gate) z[gate] = args.input_part[b * args.input_stride + gate * H + j] + bias[gate];
    if (const A* recurrent = recurrent_row(args, row, b)) {
      for (int gate = 0; gate < 4; ++gate) z[gate] += recurrent[gate * H + j];
    }
    const A before = previous_cell(row, args.c_previous, b * H + j);
    const auto cell = cell_at<kCell, T>(args.options, j);
    write_cell(args, row, b, j, new_cell<kOptions, CellMath<T>>(args, row, b * H + j, z, before, cell), cell);
  }
}

template <typename T>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kCellThreads)
    output_forward_kernel(LSTM_GRID_CONSTANT StepSides<OutputForward<T>> both) {
  const OutputForward<T>& args = both.sides[blockIdx.z];
  const int64_t P = args.output_size;
  const int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= P) return;
  const int64_t stride = int64_t{gridDim.y} * blockDim.y;
  for (int64_t b = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; b < args.rows.count; b += stride) {
    const RowState row = forward_row<true>(args.rows, b);
    if (row.takes_part()) {
      write_output<true>(args.output, row, b, j, P, args.projected[b * P + j]);
    } else {
      write_no_output(args.output, b, j);
    }
  }
}

// ---- backward

// c'_t, from the gates and c_{t-1}.
template <bool kOptions, typename Math, typename T, typename Cell = cell::Plain>
LSTM_DEVICE typename Types<T>::Accumulate state_now(const CellBackward<T>& args, int64_t place,
                                                    const GateValues<typename Types<T>::Accumulate>& gates,
                                                    typename Types<T>::Accumulate before, const Cell& cell = {}) {
  if constexpr (kOptions) {
    if (args.zoneout.active()) return cell::state<Math>(gates, cell::Here<Math>{before}, cell);
  }
  return args.cells[place];
}

// The values that the gradients of one unit need besides dL/dh_t, for a row that takes part.
template <typename Math, typename Cell = cell::Plain>
struct CellValues {
  using A = typename Math::Value;
  GateValues<A> gates;
  A before, now;                                                     // c_{t-1} and c'_t
  decltype(cell::squash<Math>(A{}, std::declval<Cell>())) squashed;  // tanh of c'_t
  A output;                                                          // dL/dh_t as the caller gave it
  A after;                                                           // dL/dc_t but for its part through h_t
};
template <bool kOptions, typename T>
LSTM_DEVICE typename Types<T>::Accumulate gradient_after(const CellBackward<T>& args, RowState row, int64_t place) {
  typename Types<T>::Accumulate after = 0;
  if (row.has_next()) {
    after = args.grad_c[place];
  } else if (args.grad_c_n) {
    after = widen(args.grad_c_n[place]);
  }
  if constexpr (kOptions) {
    if (args.grad_cells) after += args.grad_cells[place];
  }
  return after;
}
// A number as it lies in memory. One of 16 bits has a register for itself: to pack two, ptxas waits for their loads.
template <typename T>
struct Loaded {
  std::conditional_t<sizeof(T) == 2, uint32_t, T> bits;
  LSTM_DEVICE void load(const T* from) {
    if constexpr (sizeof(T) == 2) {
      bits = *reinterpret_cast<const uint16_t*>(from);
    } else {
      bits = *from;
    }
  }
  LSTM_DEVICE typename Types<T>::Accumulate value() const {
    if constexpr (sizeof(T) == 2) {
      const auto half = static_cast<uint16_t>(bits);
      return widen(reinterpret_cast<const T&>(half));
    } else {
      return bits;
    }
  }
};
// A plain cell as it lies in memory, of which its values are made. Nothing waits for the loads.
template <typename T>
struct LoadedCell {
  Loaded<T> z[4], output;
  typename Types<T>::Accumulate before, now, after;
};
template <typename T>
LSTM_DEVICE LoadedCell<T> load_cell(const CellBackward<T>& args, RowState row, int64_t b, int64_t j) {
  const int64_t H = args.hidden_size, place = b * H + j;
  LoadedCell<T> loaded = {};
  loaded.before = previous_cell(row, args.c_previous, place);
  loaded.now = args.cells[place];
  loaded.after = gradient_after<false>(args, row, place);
  if (args.output.grad_output) loaded.output.load(args.output.grad_output + b * args.output.grad_output_stride + j);
  for (int gate = 0; gate < 4; ++gate) loaded.z[gate].load(args.preactivations + (b * 4 + gate) * H + j);
  return loaded;
}
template <bool kOptions, typename Math, typename T, typename Cell = cell::Plain>
LSTM_DEVICE CellValues<Math, Cell> cell_values(const CellBackward<T>& args, RowState row, int64_t b, int64_t j,
                                               const Cell& cell = {}) {
  const int64_t place = b * args.hidden_size + j;
  CellValues<Math, Cell> values;
  values.gates = gate_values_at<Math>(args.preactivations, b, j, args.hidden_size, cell);
  values.before = previous_cell(row, args.c_previous, place);
  values.now = state_now<kOptions, Math>(args, place, values.gates, values.before, cell);
  values.squashed = cell::squash<Math>(values.now, cell);
  values.output = given_gradient(args.output, row, b, j, args.hidden_size);
  values.after = gradient_after<kOptions>(args, row, place);
  return values;
}

template <typename Math, typename T>
LSTM_DEVICE CellValues<Math> values_of(const CellBackward<T>& args, RowState row, const LoadedCell<T>& loaded,
                                       int64_t b, int64_t j) {
  CellValues<Math> values;
  for (int gate = 0; gate < 4; ++gate) values.gates[gate] = loaded.z[gate].value();
  values.gates = cell::gate_values<Math>(values.gates, cell::Plain{});
  values.before = loaded.before;
  values.now = loaded.now;
  values.squashed = cell::squash<Math>(loaded.now, cell::Plain{});
  values.output = loaded.output.value();
  if (args.output.grad_h_n && !row.has_next()) values.output += widen(args.output.grad_h_n[b * args.hidden_size + j]);
  values.after = loaded.after;
  return values;
}

// dL/d(gate values) as the caller gave it, of unit j of row b.
template <bool kOptions, typename T>
struct GivenGradients {
  const CellBackward<T>& args;
  int64_t b, j;
  LSTM_DEVICE bool there() const { return kOptions && args.grad_gate_values; }
  LSTM_DEVICE typename Types<T>::Accumulate load(int gate) const {
    return widen(args.grad_gate_values[(b * 4 + gate) * args.hidden_size + j]);
  }
};

// The gradients of a unit: of its preactivations, and of c_{t-1}.
template <typename A>
struct CellGradients {
  A z[4];
  A before;
};
// The parts of dL/dc_t, as gradient_after gives it, that go to c'_t and, by zoneout, to c_{t-1}.
template <typename T, typename A>
LSTM_DEVICE transition::StateGradient<AccurateMath<A>> split_carried(const CellBackward<T>& args, int64_t place,
                                                                     A after) {
  if (!args.zoneout.active()) return {after, 0};
  return split_gradient<A>({args.zoneout, place}, after);
}
// Makes them from c'_t, dL/dc_t but for its part through h_t, and through_hidden(dL/dc'_t), which adds that part and
// returns dL/do.
template <bool kOptions, typename T, typename ThroughHidden, typename Cell = cell::Plain>
LSTM_DEVICE CellGradients<typename Types<T>::Accumulate> cell_gradients(
    const CellBackward<T>& args, int64_t b, int64_t j, const GateValues<typename Types<T>::Accumulate>& gates,
    typename Types<T>::Accumulate before, typename Types<T>::Accumulate now, typename Types<T>::Accumulate after,
    ThroughHidden&& through_hidden, const Cell& cell = {}) {
  using A = typename Types<T>::Accumulate;
  const int64_t place = b * args.hidden_size + j;
  A past = 0;  // the share that zoneout sends past the step
  if constexpr (kOptions) {
    const auto split = split_carried(args, place, after);
    past = split.previous;
    after = split.fresh;
  }
  const A d_o = through_hidden(after);
  const auto back =
      cell::state_backward<CellMath<T>>(gates, before, now, after, d_o, GivenGradients<kOptions, T>{args, b, j}, cell);
  if constexpr (Cell::kOptions) {
    for (int n = 0; args.cell_terms && n < cell::kParameters; ++n) {
      args.cell_terms[(b * cell::kParameters + n) * args.hidden_size + j] =
          cell::parameter_term<CellMath<T>>(n, back.dz, before, now);
    }
  }
  CellGradients<A> result = {{back.dz[0], back.dz[1], back.dz[2], back.dz[3]}, back.dc_before};
  if constexpr (kOptions) result.before += past;
  return result;
}
// Leaves dL/dc_{t-1} for the step before.
template <typename T>
LSTM_DEVICE void write_state_gradient(const CellBackward<T>& args, RowState row, int64_t place,
                                      typename Types<T>::Accumulate before) {
  args.grad_c[place] = row.is_reset() ? 0 : before;
  if (row.is_reset() && args.grad_reset_c) args.grad_reset_c[place] += before;
}

// Writes the gradients of U h_{t-1} of unit j wherever the products behind it read them.
template <typename T>
LSTM_DEVICE void write_recurrent_gradients(const CellBackward<T>& args, RowState row, int64_t b, int64_t j,
                                           const typename Types<T>::Accumulate (&grad)[4]) {
  using D = typename Types<T>::Gradient;
  const int64_t H = args.hidden_size;
  if (args.grad_recurrent_part) {
    for (int gate = 0; gate < 4; ++gate) args.grad_recurrent_part[(b * 4 + gate) * H + j] = narrow<D>(grad[gate]);
  }
  if (row.is_reset() && args.grad_reset_part) {
    for (int gate = 0; gate < 4; ++gate) args.grad_reset_part[(b * 4 + gate) * H + j] += grad[gate];
  }
  if (args.grad_begin_part && !row.has_previous()) {
    for (int gate = 0; gate < 4; ++gate) {
      args.grad_begin_part[(b * 4 + gate) * H + j] = narrow<D>(row.is_reset() ? 0 : grad[gate]);
    }
  }
}

template <typename T>
LSTM_DEVICE void write_no_gradients(const CellBackward<T>& args, int64_t b, int64_t j) {
  using D = typename Types<T>::Gradient;
  const int64_t H = args.hidden_size;
  if (args.grad_recurrent_part) {
    for (int gate = 0; gate < 4; ++gate) args.grad_recurrent_part[(b * 4 + gate) * H + j] = narrow<D>(0);
  }
  if (args.hidden) args.hidden[b * H + j] = narrow<T>(0);
}

// From dL/dh_t and dL/dc_t of unit j of a row that takes part. `through_product` gives dL/dh_t through the product with
// U in the step after.
template <bool kOptions, typename Math, typename T, typename Through, typename Cell = cell::Plain>
LSTM_DEVICE CellGradients<typename Types<T>::Accumulate> cell_gradients(const CellBackward<T>& args, RowState row,
                                                                        int64_t b, int64_t j,
                                                                        const CellValues<Math, Cell>& values,
                                                                        Through&& through_product,
                                                                        const Cell& cell = {}) {
  using A = typename Types<T>::Accumulate;
  const int64_t place = b * args.hidden_size + j;
  const A dh = args.grad_hidden ? args.grad_hidden[place]
                                : output_gradient<kOptions>(args.output, row, place, values.output, through_product);
  const auto through_hidden = [&](A& dc) {
    return cell::hidden_backward<Math>(values.gates[cell::kO], values.squashed, dh, dc);
  };
  return cell_gradients<kOptions>(args, b, j, values.gates, values.before, values.now, values.after, through_hidden,
                                  cell);
}
// And everything that is written of them.
template <bool kOptions, typename Math, typename T, typename Cell>
LSTM_DEVICE void write_gradients(const CellBackward<T>& args, RowState row, int64_t b, int64_t j,
                                 const CellValues<Math, Cell>& values,
                                 const CellGradients<typename Types<T>::Accumulate>& grad) {
  write_state_gradient(args, row, b * args.hidden_size + j, grad.before);
  write_recurrent_gradients(args, row, b, j, grad.z);
  if constexpr (kOptions) {
    if (args.hidden)
      args.hidden[b * args.hidden_size + j] = narrow<T>(values.gates[cell::kO] * values.squashed.value());
  }
}
// Both. Returns the gradients of the preactivations.
template <bool kOptions, typename Math, typename T, typename Through, typename Cell = cell::Plain>
LSTM_DEVICE CellGradients<typename Types<T>::Accumulate> backward_cell(const CellBackward<T>& args, RowState row,
                                                                       int64_t b, int64_t j, Through&& through_product,
                                                                       const Cell& cell = {}) {
  const auto values = cell_values<kOptions, Math>(args, row, b, j, cell);
  const auto grad = cell_gradients<kOptions>(args, row, b, j, values, through_product, cell);
  write_gradients<kOptions>(args, row, b, j, values, grad);
  return grad;
}

template <typename T, bool kOptions, bool kCell = false>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kCellThreads) cell_backward_kernel(LSTM_GRID_CONSTANT StepSides<CellBackward<T>> both) {
  const CellBackward<T>& args = both.sides[blockIdx.z];
  const int64_t H = args.hidden_size;
  const int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= H) return;
  const int64_t stride = int64_t{gridDim.y} * blockDim.y;
  for (int64_t b = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; b < args.rows.count; b += stride) {
    const RowState row = backward_row<kOptions>(args.rows, b);
    if (!row.takes_part()) {
      write_no_gradients(args, b, j);
      for (int n = 0; kCell && args.cell_terms && n < cell::kParameters; ++n) {
        args.cell_terms[(b * cell::kParameters + n) * H + j] = 0;
      }
      continue;
    }
    const auto through_product = [&] { return sum_of_parts(args.output, b * H + j); };
    backward_cell<kOptions, CellMath<T>>(args, row, b, j, through_product, cell_at<kCell, T>(args.options, j));
  }
}

template <typename T, bool kOptions>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kCellThreads)
    output_gradient_kernel(LSTM_GRID_CONSTANT StepSides<OutputGradient<T>> both) {
  const OutputGradient<T>& args = both.sides[blockIdx.z];
  using D = typename Types<T>::Gradient;
  const int64_t P = args.output_size;
  const int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= P) return;
  const int64_t stride = int64_t{gridDim.y} * blockDim.y;
  for (int64_t b = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; b < args.rows.count; b += stride) {
    const RowState row = backward_row<kOptions>(args.rows, b);
    args.result[b * P + j] = narrow<D>(row.takes_part() ? output_gradient_at<kOptions>(args.output, row, b, j, P) : 0);
  }
}

// The grid has a slice in z for each step.
template <typename T>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kCellThreads) previous_outputs_kernel(PreviousOutputs<T> args) {
  using A = typename Types<T>::Accumulate;
  using D = typename Types<T>::Gradient;
  const int64_t P = args.output_size;
  const int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= P) return;
  const typename PreviousOutputs<T>::Step& step = args.steps[blockIdx.z];
  const StepRows rows{step.count, step.previous_count, 0,   step.resets, {nullptr, 0}, args.lengths,
                      step.time,  args.reverse,        true};
  const int64_t stride = int64_t{gridDim.y} * blockDim.y;
  for (int64_t b = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; b < step.count; b += stride) {
    A h = 0;
    const RowState row = forward_row<true>(rows, b);
    if (row.takes_part()) {
      if (row.is_reset()) {
        h = args.reset_h ? widen(args.reset_h[b * P + j]) : 0;
      } else if (row.has_previous()) {
        h = widen(step.previous[b * args.previous_stride + j]);
      } else if (args.h0) {
        h = widen(args.h0[b * P + j]);
      }
      // From the h_t that is a result, as in write_output.
      if (args.recurrent_mask) h = widen(narrow<T>(args.recurrent_mask[b * P + j] * h));
    }
    step.result[b * P + j] = narrow<D>(h);
  }
}

}  // namespace lstm_ext::cuda
