// The pointwise part of a time step. A thread has one hidden unit of one row and all four gates of it, so everything
// from the pre-activations to h_t happens in its registers. A block is some units wide and some rows high; the grid
// covers the units, and takes the rows in strides where there are more than it may be high.
#pragma once

#include <cmath>

#include "cuda/state.cuh"

namespace lstm_ext::cuda {

constexpr int kCellThreads = 256;

// The accurate functions: a step is bound by memory and by the time of a launch, not by them.
LSTM_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
LSTM_DEVICE double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
LSTM_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
LSTM_DEVICE double hyperbolic_tangent(double x) { return tanh(x); }

template <typename A>
struct Gates {
  A i, f, g, o;
};
template <typename A>
LSTM_DEVICE Gates<A> gates_of(const A (&z)[4]) {
  return {sigmoid(z[0]), sigmoid(z[1]), hyperbolic_tangent(z[2]), sigmoid(z[3])};
}
template <typename T>
LSTM_DEVICE Gates<typename Types<T>::Accumulate> saved_gates(const T* pre_activations, int64_t b, int64_t j,
                                                             int64_t size) {
  typename Types<T>::Accumulate z[4];
  for (int gate = 0; gate < 4; ++gate) z[gate] = widen(pre_activations[(b * 4 + gate) * size + j]);
  return gates_of(z);
}

// ---- forward

template <typename T>
LSTM_DEVICE typename Types<T>::Accumulate bias_of(const CellForward<T>& s, int gate, int64_t j) {
  if (!s.bias_ih) return 0;
  return widen(s.bias_ih[gate * s.hidden_size + j]) + widen(s.bias_hh[gate * s.hidden_size + j]);
}

// U h_{t-1} of row b, or null for zeros.
template <bool kExtras, typename T>
LSTM_DEVICE const typename Types<T>::Accumulate* recurrent_row(const CellForward<T>& s, int64_t b) {
  const auto* part = continues<kExtras>(s.of, b) ? s.recurrent_part : s.begin_part;
  if (is_reset<kExtras>(s.of, b)) part = s.reset_part;
  return part ? part + b * 4 * s.hidden_size : nullptr;
}

// From the pre-activations of unit j of row b to c_t, which is written, and c'_t, which is returned.
template <bool kExtras, typename T>
LSTM_DEVICE typename Types<T>::Accumulate update_cell(const CellForward<T>& s, int64_t b, int64_t j,
                                                      const typename Types<T>::Accumulate (&z)[4],
                                                      const Gates<typename Types<T>::Accumulate>& gates) {
  using A = typename Types<T>::Accumulate;
  const int64_t H = s.hidden_size, place = b * H + j;
  const A before = previous_cell<kExtras>(s.of, s.c_previous, b, place);
  const A now = gates.f * before + gates.i * gates.g;
  A c = now;
  if constexpr (kExtras) {
    if (is_active(s.zoneout)) c = mixed(s.zoneout, place, before, now);
  }
  s.c[place] = c;
  if (s.pre_activations) {
    for (int gate = 0; gate < 4; ++gate) s.pre_activations[(b * 4 + gate) * H + j] = narrow<T>(z[gate]);
  }
  if (!goes_on<kExtras>(s.of, b)) s.c_n[place] = narrow<T>(c);
  return now;
}

template <typename T>
LSTM_DEVICE void write_no_cell(const CellForward<T>& s, int64_t b, int64_t j) {
  using A = typename Types<T>::Accumulate;
  const int64_t H = s.hidden_size;
  s.c[b * H + j] = 0;
  if (s.pre_activations) {
    for (int gate = 0; gate < 4; ++gate) {
      s.pre_activations[(b * 4 + gate) * H + j] = narrow<T>(gate == 2 ? A(0) : A(-INFINITY));
    }
  }
  write_no_output(s.output, b, j, H);
}

template <typename T>
LSTM_HOST_DEVICE bool has_extras(const CellForward<T>& s) {
  return s.of.lengths != nullptr || is_active(s.zoneout) || has_extras(s.output);
}

template <typename T, bool kExtras>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kCellThreads) cell_forward_kernel(CellForward<T> s) {
  using A = typename Types<T>::Accumulate;
  const int64_t H = s.hidden_size;
  const int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= H) return;
  A bias[4];
  for (int gate = 0; gate < 4; ++gate) bias[gate] = bias_of(s, gate, j);
  const int64_t stride = int64_t{gridDim.y} * blockDim.y;
  for (int64_t b = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; b < s.of.rows; b += stride) {
    if (!takes_part<kExtras>(s.of, b)) {
      write_no_cell(s, b, j);
      continue;
    }
    A z[4];
    for (int gate = 0; gate < 4; ++gate) z[gate] = s.input_part[b * s.input_stride + gate * H + j] + bias[gate];
    if (const A* recurrent = recurrent_row<kExtras>(s, b)) {
      for (int gate = 0; gate < 4; ++gate) z[gate] += recurrent[gate * H + j];
    }
    const Gates<A> gates = gates_of(z);
    const A c = update_cell<kExtras>(s, b, j, z, gates);
    write_output<kExtras>(s.output, s.of, b, j, H, gates.o * hyperbolic_tangent(c));
  }
}

template <typename T>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kCellThreads) output_forward_kernel(OutputForward<T> s) {
  const int64_t P = s.output_size;
  const int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= P) return;
  const int64_t stride = int64_t{gridDim.y} * blockDim.y;
  for (int64_t b = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; b < s.of.rows; b += stride) {
    if (takes_part<true>(s.of, b)) {
      write_output<true>(s.output, s.of, b, j, P, s.projected[b * P + j]);
    } else {
      write_no_output(s.output, b, j, P);
    }
  }
}

// ---- backward

// c'_t.
template <bool kExtras, typename T>
LSTM_DEVICE typename Types<T>::Accumulate new_cell(const CellBackward<T>& s, int64_t b, int64_t j,
                                                   const Gates<typename Types<T>::Accumulate>& gates) {
  const int64_t place = b * s.hidden_size + j;
  if constexpr (kExtras) {
    if (is_active(s.zoneout)) {
      return gates.f * previous_cell<true>(s.of, s.c_previous, b, place) + gates.i * gates.g;
    }
  }
  return s.cells[place];
}

// dL/d(o * tanh(c_t)).
template <bool kExtras, typename T>
LSTM_DEVICE typename Types<T>::Accumulate hidden_gradient(const CellBackward<T>& s, int64_t b, int64_t j) {
  if (s.grad_hidden) return s.grad_hidden[b * s.hidden_size + j];
  return output_gradient_of<kExtras>(s.output, s.of, b, j, s.hidden_size);
}

// From dL/dc'_t through h_t and dL/do to the gradients of the pre-activations; carries dL/dc_{t-1} on.
template <bool kExtras, typename T>
LSTM_DEVICE void cell_gradients(const CellBackward<T>& s, int64_t b, int64_t j,
                                const Gates<typename Types<T>::Accumulate>& gates, typename Types<T>::Accumulate dc,
                                typename Types<T>::Accumulate d_o, typename Types<T>::Accumulate (&grad)[4]) {
  using A = typename Types<T>::Accumulate;
  const auto [i, f, g, o] = gates;
  const int64_t H = s.hidden_size, place = b * H + j;
  A later = 0, kept = 0;  // dL/dc_t but for h_t's part, and what of it zoneout sends past the step
  if (goes_on<kExtras>(s.of, b)) {
    later = s.grad_c[place];
  } else if (s.grad_c_n) {
    later = widen(s.grad_c_n[place]);
  }
  if constexpr (kExtras) {
    if (s.grad_cells) later += s.grad_cells[place];
    if (is_active(s.zoneout)) {
      kept = kept_part(s.zoneout, place, later);
      later = new_part(s.zoneout, place, later);
    }
  }
  dc += later;
  A d[4] = {dc * g, dc * previous_cell<kExtras>(s.of, s.c_previous, b, place), dc * i, d_o};
  if constexpr (kExtras) {
    if (s.grad_gate_values) {
      for (int gate = 0; gate < 4; ++gate) d[gate] += widen(s.grad_gate_values[(b * 4 + gate) * H + j]);
    }
  }
  grad[0] = d[0] * i * (1 - i);
  grad[1] = d[1] * f * (1 - f);
  grad[2] = d[2] * (1 - g * g);
  grad[3] = d[3] * o * (1 - o);
  A before = dc * f;
  if constexpr (kExtras) before += kept;
  const bool reset = is_reset<kExtras>(s.of, b);
  s.grad_c[place] = reset ? 0 : before;
  if (reset && s.grad_reset_c) s.grad_reset_c[place] += before;
}

// The gradients of U h_{t-1} of unit j: for all that is behind this product.
template <bool kExtras, typename T>
LSTM_DEVICE void write_gate_gradients(const CellBackward<T>& s, int64_t b, int64_t j,
                                      const typename Types<T>::Accumulate (&grad)[4]) {
  using D = typename Types<T>::Gradient;
  const int64_t H = s.hidden_size;
  const bool reset = is_reset<kExtras>(s.of, b);
  for (int gate = 0; gate < 4; ++gate) s.grad_gates[(b * 4 + gate) * H + j] = narrow<D>(grad[gate]);
  if (reset && s.reset_gates) {
    for (int gate = 0; gate < 4; ++gate) s.reset_gates[(b * 4 + gate) * H + j] += grad[gate];
  }
  if (s.begin_gates && !continues<kExtras>(s.of, b)) {
    for (int gate = 0; gate < 4; ++gate) {
      s.begin_gates[(b * 4 + gate) * H + j] = narrow<D>(reset ? 0 : grad[gate]);
    }
  }
}

template <typename T>
LSTM_DEVICE void write_no_gradients(const CellBackward<T>& s, int64_t b, int64_t j) {
  using D = typename Types<T>::Gradient;
  const int64_t H = s.hidden_size;
  for (int gate = 0; gate < 4; ++gate) s.grad_gates[(b * 4 + gate) * H + j] = narrow<D>(0);
  if (s.hidden) s.hidden[b * H + j] = narrow<T>(0);
}

template <typename T>
LSTM_HOST_DEVICE bool has_extras(const CellBackward<T>& s) {
  return s.of.lengths != nullptr || is_active(s.zoneout) || has_extras(s.output) || s.grad_gate_values != nullptr ||
         s.grad_cells != nullptr || s.hidden != nullptr;
}

template <typename T, bool kExtras>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kCellThreads) cell_backward_kernel(CellBackward<T> s) {
  using A = typename Types<T>::Accumulate;
  const int64_t H = s.hidden_size;
  const int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= H) return;
  const int64_t stride = int64_t{gridDim.y} * blockDim.y;
  for (int64_t b = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; b < s.of.rows; b += stride) {
    if (!takes_part<kExtras>(s.of, b)) {
      write_no_gradients(s, b, j);
      continue;
    }
    const Gates<A> gates = saved_gates(s.pre_activations, b, j, H);
    const A tanh_c = hyperbolic_tangent(new_cell<kExtras>(s, b, j, gates));
    const A dh = hidden_gradient<kExtras>(s, b, j);
    A grad[4];
    cell_gradients<kExtras>(s, b, j, gates, dh * gates.o * (1 - tanh_c * tanh_c), dh * tanh_c, grad);
    write_gate_gradients<kExtras>(s, b, j, grad);
    if constexpr (kExtras) {
      if (s.hidden) s.hidden[b * H + j] = narrow<T>(gates.o * tanh_c);
    }
  }
}

template <typename T>
LSTM_HOST_DEVICE bool has_extras(const OutputGradient<T>& s) {
  return s.of.lengths != nullptr || has_extras(s.output);
}

template <typename T, bool kExtras>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kCellThreads) output_gradient_kernel(OutputGradient<T> s) {
  using D = typename Types<T>::Gradient;
  const int64_t P = s.output_size;
  const int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= P) return;
  const int64_t stride = int64_t{gridDim.y} * blockDim.y;
  for (int64_t b = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; b < s.of.rows; b += stride) {
    const bool counts = takes_part<kExtras>(s.of, b);
    s.result[b * P + j] = narrow<D>(counts ? output_gradient_of<kExtras>(s.output, s.of, b, j, P) : 0);
  }
}

// A slice of the grid in z for each step.
template <typename T>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kCellThreads) previous_outputs_kernel(PreviousOutputs<T> s) {
  using A = typename Types<T>::Accumulate;
  using D = typename Types<T>::Gradient;
  const int64_t P = s.output_size;
  const int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= P) return;
  const typename PreviousOutputs<T>::Step& step = s.step[blockIdx.z];
  const RowsOfStep rows{step.rows, step.continuing, 0, step.resets, {nullptr, 0}, s.lengths, step.time, s.reverse};
  const int64_t stride = int64_t{gridDim.y} * blockDim.y;
  for (int64_t b = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; b < step.rows; b += stride) {
    A h = 0;
    if (takes_part<true>(rows, b)) {
      if (is_reset<true>(rows, b)) {
        h = s.reset_h ? widen(s.reset_h[b * P + j]) : 0;
      } else if (continues<true>(rows, b)) {
        h = widen(step.previous[b * s.previous_stride + j]);
      } else if (s.h0) {
        h = widen(s.h0[b * P + j]);
      }
      // As write_output made it, of the h_t that is a result.
      if (s.mask) h = widen(narrow<T>(s.mask[b * P + j] * h));
    }
    step.result[b * P + j] = narrow<D>(h);
  }
}

}  // namespace lstm_ext::cuda
