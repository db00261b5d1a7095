// A time step with layer normalisation. A block has a row, since the step needs the mean and variance of the row
// midway. Everything else is that of cell.cuh. A thread has every blockDim.x-th unit, the same ones in each loop, so
// that it alone reads what it has left in memory. The order of sums depends on the shape only. Variances are sums of
// squares of centred values.
#pragma once

#include "cuda/cell.cuh"

namespace lstm_ext::cuda {

constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / 32;
constexpr int kNormSums = 4;  // at most, at once

LSTM_DEVICE float square_root(float x) { return sqrtf(x); }
LSTM_DEVICE double square_root(double x) { return sqrt(x); }

template <typename A>
LSTM_DEVICE A norm_factor(A sum_of_squares, int64_t count) {
  return 1 / square_root(sum_of_squares / static_cast<A>(count) + static_cast<A>(kLayerNormEpsilon));
}

// Sums each value over the block; every thread gets the sums. The block has whole warps.
template <int kCount, typename A>
LSTM_DEVICE void block_sums(A (&values)[kCount], A* shared) {
  static_assert(kCount <= kNormSums);
  for (int n = 0; n < kCount; ++n) {
    for (int distance = 16; distance > 0; distance /= 2) {
      values[n] += __shfl_xor_sync(0xffffffffu, values[n], distance);
    }
  }
  __syncthreads();  // the sums before have been read
  if (threadIdx.x % 32 == 0) {
    for (int n = 0; n < kCount; ++n) shared[threadIdx.x / 32 * kCount + n] = values[n];
  }
  __syncthreads();
  for (int n = 0; n < kCount; ++n) values[n] = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
    for (int n = 0; n < kCount; ++n) values[n] += shared[warp * kCount + n];
  }
}

// Centres numbers, and divides them by their standard deviation.
template <typename A>
struct Normalise {
  A mean, factor;
  LSTM_DEVICE A operator()(A x) const { return (x - mean) * factor; }
};
// For each of kRows rows of `count` numbers: value(row, k).
template <int kRows, typename A, typename Value>
LSTM_DEVICE void find_moments(Normalise<A> (&rows)[kRows], int64_t count, A* shared, const Value& value) {
  A sums[kRows] = {};
  for (int64_t k = threadIdx.x; k < count; k += blockDim.x) {
    for (int row = 0; row < kRows; ++row) sums[row] += value(row, k);
  }
  block_sums(sums, shared);
  for (int row = 0; row < kRows; ++row) {
    rows[row].mean = sums[row] / static_cast<A>(count);
    sums[row] = 0;
  }
  for (int64_t k = threadIdx.x; k < count; k += blockDim.x) {
    for (int row = 0; row < kRows; ++row) {
      const A x = value(row, k) - rows[row].mean;
      sums[row] += x * x;
    }
  }
  block_sums(sums, shared);
  for (int row = 0; row < kRows; ++row) rows[row].factor = norm_factor(sums[row], count);
}

template <typename T, bool kCell>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kNormThreads)
    norm_cell_forward_kernel(LSTM_GRID_CONSTANT StepSides<NormCellForward<T>> both) {
  const NormCellForward<T>& args = both.sides[blockIdx.z];
  using A = typename Types<T>::Accumulate;
  LSTM_SHARED(A, shared, kNormWarps * kNormSums);
  const CellForward<T>& cell = args.cell;
  const int64_t H = cell.hidden_size, b = blockIdx.x;
  const bool saves = args.norm_factors != nullptr;
  if (b >= cell.rows.count) return;  // the other direction has more
  const RowState row = forward_row<true>(cell.rows, b);
  if (!row.takes_part()) {
    for (int64_t j = threadIdx.x; j < H; j += blockDim.x) {
      write_no_cell(cell, b, j);
      for (int gate = 0; saves && gate < 4; ++gate) {
        args.norm_input[(b * 4 + gate) * H + j] = narrow<T>(0);
        args.norm_recurrent[(b * 4 + gate) * H + j] = narrow<T>(0);
      }
    }
    if (saves && threadIdx.x < 2) args.norm_factors[b * 2 + threadIdx.x] = 0;
    return;
  }
  const A* input = cell.input_part + b * cell.input_stride;
  const A* recurrent = recurrent_row(cell, row, b);
  const auto product = [&](int which, int64_t k) { return which == 0 ? input[k] : recurrent ? recurrent[k] : A(0); };
  Normalise<A> products[2];
  find_moments(products, 4 * H, shared, product);
  if (saves && threadIdx.x == 0) {
    for (int which = 0; which < 2; ++which) args.norm_factors[b * 2 + which] = products[which].factor;
  }

  const auto write_carried = [&](int64_t place, A fresh) {
    const A c = cell_state<true>(cell, place, fresh, previous_cell(row, cell.c_previous, place));
    cell.c[place] = c;
    if (!row.has_next()) cell.c_n[place] = narrow<T>(c);
  };
  A* const new_c = args.workspace + b * 2 * H;
  A* const output_gate = new_c + H;
  for (int64_t j = threadIdx.x; j < H; j += blockDim.x) {
    GateValues<A> z;
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t k = gate * H + j;
      const A x = products[0](product(0, k)), y = products[1](product(1, k));
      z[gate] = args.norm.gain_ih[k] * x + args.norm.gain_hh[k] * y + bias_at(cell, gate, j);
      if (saves) {
        args.norm_input[b * 4 * H + k] = narrow<T>(x);
        args.norm_recurrent[b * 4 * H + k] = narrow<T>(y);
      }
    }
    using Math = CellMath<T>;
    const auto options = cell_at<kCell, T>(cell.options, j);
    for (int gate = 0; gate < 4; ++gate) cell::clip_preactivation<Math>(z[gate], options);
    const GateValues<A> gates = cell::gate_values<Math>(z, options);
    const A before = previous_cell(row, cell.c_previous, b * H + j);
    const A now = cell::state<Math>(gates, cell::Here<Math>{before}, options);
    write_preactivations(cell, b, j, z.gate, options);
    if (!args.norm.carries) write_carried(b * H + j, now);
    new_c[j] = now;
    output_gate[j] = gates[cell::kO];
  }
  Normalise<A> of_cell[1];
  find_moments(of_cell, H, shared, [&](int, int64_t j) { return new_c[j]; });
  for (int64_t j = threadIdx.x; j < H; j += blockDim.x) {
    A tanh_input = args.norm.gain_c[j] * of_cell[0](new_c[j]);
    if (args.norm.bias_c) tanh_input += args.norm.bias_c[j];
    if (args.norm.carries) write_carried(b * H + j, tanh_input);
    const A hidden = cell::hidden<CellMath<T>>(output_gate[j], tanh_input, cell_at<kCell, T>(cell.options, j));
    write_output<true>(cell.output, row, b, j, H, hidden);
  }
}

template <bool kCell, typename T>
LSTM_DEVICE GateValues<typename Types<T>::Accumulate> gates_again(const CellBackward<T>& cell, int64_t b, int64_t j) {
  return gate_values_at<CellMath<T>>(cell.preactivations, b, j, cell.hidden_size, cell_at<kCell, T>(cell.options, j));
}
// c'_t of a row.
template <bool kCell, typename T>
LSTM_DEVICE typename Types<T>::Accumulate state_now_at(const NormCellBackward<T>& args, RowState row, int64_t b,
                                                       int64_t j,
                                                       const GateValues<typename Types<T>::Accumulate>& gates) {
  const CellBackward<T>& cell = args.cell;
  const int64_t place = b * cell.hidden_size + j;
  const auto before = previous_cell(row, cell.c_previous, place);
  const auto options = cell_at<kCell, T>(cell.options, j);
  if (args.norm.carries) return cell::state<CellMath<T>>(gates, cell::Here<CellMath<T>>{before}, options);
  return state_now<true, CellMath<T>>(cell, place, gates, before, options);
}

template <typename T, bool kCell>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kNormThreads)
    norm_cell_backward_kernel(LSTM_GRID_CONSTANT StepSides<NormCellBackward<T>> both) {
  const NormCellBackward<T>& args = both.sides[blockIdx.z];
  using A = typename Types<T>::Accumulate;
  using D = typename Types<T>::Gradient;
  LSTM_SHARED(A, shared, kNormWarps * kNormSums);
  const CellBackward<T>& cell = args.cell;
  const int64_t H = cell.hidden_size, b = blockIdx.x;
  if (b >= cell.rows.count) return;  // the other direction has more
  const RowState row = backward_row<true>(cell.rows, b);
  if (!row.takes_part()) {
    for (int64_t j = threadIdx.x; j < H; j += blockDim.x) {
      write_no_gradients(cell, b, j);
      for (int gate = 0; gate < 4; ++gate) {
        args.grad_input_part[(b * 4 + gate) * H + j] = narrow<D>(0);
        args.grad_preactivations[(b * 4 + gate) * H + j] = 0;
      }
      args.grad_tanh_input[b * H + j] = 0;
      args.norm_cell[b * H + j] = narrow<T>(0);
    }
    return;
  }
  const A units = static_cast<A>(H);

  // The mean and factor of N(c'_t) again: they are not saved.
  Normalise<A> of_cell[1];
  find_moments(of_cell, H, shared,
               [&](int, int64_t j) { return state_now_at<kCell>(args, row, b, j, gates_again<kCell>(cell, b, j)); });

  // Through tanh: dL/do, which waits in the place of the gradient of its preactivation, and the sums for dL/dc'_t.
  A sums_c[2] = {};
  A* const grad_tanh_input = args.grad_tanh_input + b * H;
  A* const grad_z = args.grad_preactivations + b * 4 * H;
  for (int64_t j = threadIdx.x; j < H; j += blockDim.x) {
    const GateValues<A> gates = gates_again<kCell>(cell, b, j);
    const A hat = of_cell[0](state_now_at<kCell>(args, row, b, j, gates));
    A tanh_input = args.norm.gain_c[j] * hat;
    if (args.norm.bias_c) tanh_input += args.norm.bias_c[j];
    const A dh = cell.grad_hidden ? cell.grad_hidden[b * H + j] : output_gradient_at<true>(cell.output, row, b, j, H);
    A grad = args.norm.carries ? split_carried(cell, b * H + j, gradient_after<true>(cell, row, b * H + j)).fresh : 0;
    const auto squashed = cell::squash<CellMath<T>>(tanh_input, cell_at<kCell, T>(cell.options, j));
    const A d_o = cell::hidden_backward<CellMath<T>>(gates[cell::kO], squashed, dh, grad);
    grad_tanh_input[j] = grad;
    args.norm_cell[b * H + j] = narrow<T>(hat);
    grad_z[cell::kO * H + j] = d_o;
    sums_c[0] += grad * args.norm.gain_c[j];
    sums_c[1] += grad * args.norm.gain_c[j] * hat;
  }
  block_sums(sums_c, shared);

  // The gates, and the sums for the gradients of the two products.
  A sums[4] = {};
  for (int64_t j = threadIdx.x; j < H; j += blockDim.x) {
    const GateValues<A> gates = gates_again<kCell>(cell, b, j);
    const A now = state_now_at<kCell>(args, row, b, j, gates), hat = of_cell[0](now);
    const A dc =
        of_cell[0].factor * (grad_tanh_input[j] * args.norm.gain_c[j] - sums_c[0] / units - hat * (sums_c[1] / units));
    const auto grad = cell_gradients<true>(
        cell, b, j, gates, previous_cell(row, cell.c_previous, b * H + j), now,
        gradient_after<true>(cell, row, b * H + j),
        [&](A& sum) {
          sum = args.norm.carries ? dc : sum + dc;
          return grad_z[cell::kO * H + j];
        },
        cell_at<kCell, T>(cell.options, j));
    write_state_gradient(cell, row, b * H + j, grad.before);
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t k = gate * H + j;
      grad_z[k] = grad.z[gate];
      sums[0] += grad.z[gate] * args.norm.gain_ih[k];
      sums[1] += grad.z[gate] * args.norm.gain_ih[k] * widen(args.norm_input[b * 4 * H + k]);
      sums[2] += grad.z[gate] * args.norm.gain_hh[k];
      sums[3] += grad.z[gate] * args.norm.gain_hh[k] * widen(args.norm_recurrent[b * 4 * H + k]);
    }
  }
  block_sums(sums, shared);
  for (int which = 0; which < 4; ++which) sums[which] /= static_cast<A>(4 * H);

  const A factor_x = args.norm_factors[b * 2], factor_h = args.norm_factors[b * 2 + 1];
  for (int64_t j = threadIdx.x; j < H; j += blockDim.x) {
    A grad[4];
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t k = gate * H + j;
      const A x = widen(args.norm_input[b * 4 * H + k]), y = widen(args.norm_recurrent[b * 4 * H + k]);
      args.grad_input_part[b * 4 * H + k] =
          narrow<D>(factor_x * (grad_z[k] * args.norm.gain_ih[k] - sums[0] - x * sums[1]));
      grad[gate] = factor_h * (grad_z[k] * args.norm.gain_hh[k] - sums[2] - y * sums[3]);
    }
    write_recurrent_gradients(cell, row, b, j, grad);
  }
}

}  // namespace lstm_ext::cuda
