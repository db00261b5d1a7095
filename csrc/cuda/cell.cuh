// The pointwise part of a time step. A thread has one hidden unit of one row and all four gates of it, so everything
// from the pre-activations to h_t happens in its registers. A block is some units wide and some rows high; the grid
// covers the units, and takes the rows in strides where there are more than it may be high.
#pragma once

#include "cuda/numeric.cuh"
#include "cuda/stepwise.h"

namespace lstm_ext::cuda {

constexpr int kCellThreads = 256;

// The accurate functions: a step is bound by memory and by the time of a launch, not by them.
LSTM_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
LSTM_DEVICE double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
LSTM_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
LSTM_DEVICE double hyperbolic_tangent(double x) { return tanh(x); }

// c_{t-1} of unit j of row b.
template <typename T>
LSTM_DEVICE typename Types<T>::Accumulate previous_cell(const PreviousCell<T>& c, int64_t b, int64_t j, int64_t size) {
  if (b < c.continuing) return c.previous[b * size + j];
  return c.c0 ? widen(c.c0[b * size + j]) : 0;
}

// dL/dh of unit j of row b, for what CellBackward and OutputGradient have in common.
template <typename T, typename Step>
LSTM_DEVICE typename Types<T>::Accumulate summed_gradient(const Step& s, int64_t b, int64_t j, int64_t size) {
  typename Types<T>::Accumulate sum = 0;
  if (s.grad_output) sum += widen(s.grad_output[b * s.grad_output_stride + j]);
  if (b < s.recurrent_rows) sum += s.recurrent_part[b * size + j];
  if (s.grad_h_n && b >= s.going_on) sum += widen(s.grad_h_n[b * size + j]);
  return sum;
}

template <typename A>
struct Gates {
  A i, f, g, o;
};
template <typename A>
LSTM_DEVICE Gates<A> gates_of(const A (&z)[4]) {
  return {sigmoid(z[0]), sigmoid(z[1]), hyperbolic_tangent(z[2]), sigmoid(z[3])};
}

template <typename T>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kCellThreads) cell_forward_kernel(CellForward<T> s) {
  using A = typename Types<T>::Accumulate;
  const int64_t H = s.hidden_size;
  const int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= H) return;
  A bias[4] = {};
  for (int gate = 0; gate < 4; ++gate) {
    if (s.bias_ih) bias[gate] = widen(s.bias_ih[gate * H + j]) + widen(s.bias_hh[gate * H + j]);
  }
  const int64_t stride = int64_t{gridDim.y} * blockDim.y;
  for (int64_t b = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; b < s.rows; b += stride) {
    A z[4];
    for (int gate = 0; gate < 4; ++gate) z[gate] = s.input_part[b * s.input_stride + gate * H + j] + bias[gate];
    if (b < s.recurrent_rows) {
      for (int gate = 0; gate < 4; ++gate) z[gate] += s.recurrent_part[(b * 4 + gate) * H + j];
    }
    const Gates<A> gates = gates_of(z);
    const A c = gates.f * previous_cell<T>(s.c_previous, b, j, H) + gates.i * gates.g;
    const T h = narrow<T>(gates.o * hyperbolic_tangent(c));
    s.c[b * H + j] = c;
    s.h[b * s.h_stride + j] = h;
    if (s.pre_activations) {
      for (int gate = 0; gate < 4; ++gate) s.pre_activations[(b * 4 + gate) * H + j] = narrow<T>(z[gate]);
    }
    if (b >= s.going_on) {
      if (s.h_n) s.h_n[b * H + j] = h;
      s.c_n[b * H + j] = narrow<T>(c);
    }
  }
}

template <typename T>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kCellThreads) cell_backward_kernel(CellBackward<T> s) {
  using A = typename Types<T>::Accumulate;
  using D = typename Types<T>::Gradient;
  const int64_t H = s.hidden_size;
  const int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= H) return;
  const int64_t stride = int64_t{gridDim.y} * blockDim.y;
  for (int64_t b = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; b < s.rows; b += stride) {
    A z[4];
    for (int gate = 0; gate < 4; ++gate) z[gate] = widen(s.pre_activations[(b * 4 + gate) * H + j]);
    const auto [i, f, g, o] = gates_of(z);
    const A tanh_c = hyperbolic_tangent(s.cells[b * H + j]);
    const A dh = summed_gradient<T>(s, b, j, H);
    A dc = dh * o * (1 - tanh_c * tanh_c);
    if (b < s.going_on) {
      dc += s.grad_c[b * H + j];
    } else if (s.grad_c_n) {
      dc += widen(s.grad_c_n[b * H + j]);
    }
    s.grad_c[b * H + j] = dc * f;
    D* grad = s.grad_gates + b * 4 * H + j;
    grad[0] = narrow<D>(dc * g * i * (1 - i));
    grad[H] = narrow<D>(dc * previous_cell<T>(s.c_previous, b, j, H) * f * (1 - f));
    grad[2 * H] = narrow<D>(dc * i * (1 - g * g));
    grad[3 * H] = narrow<D>(dh * tanh_c * o * (1 - o));
  }
}

template <typename T>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kCellThreads) output_gradient_kernel(OutputGradient<T> s) {
  const int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= s.output_size) return;
  const int64_t stride = int64_t{gridDim.y} * blockDim.y;
  for (int64_t b = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; b < s.rows; b += stride) {
    s.result[b * s.output_size + j] = narrow<typename Types<T>::Gradient>(summed_gradient<T>(s, b, j, s.output_size));
  }
}

// A slice of the grid in z for each step.
template <typename T>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kCellThreads) previous_outputs_kernel(PreviousOutputs<T> s) {
  using D = typename Types<T>::Gradient;
  const int64_t P = s.output_size;
  const int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= P) return;
  const typename PreviousOutputs<T>::Step& step = s.step[blockIdx.z];
  const int64_t stride = int64_t{gridDim.y} * blockDim.y;
  for (int64_t b = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; b < step.rows; b += stride) {
    typename Types<T>::Accumulate h = 0;
    if (b < step.continuing) {
      h = widen(step.previous[b * s.previous_stride + j]);
    } else if (s.h0) {
      h = widen(s.h0[b * P + j]);
    }
    step.result[b * P + j] = narrow<D>(h);
  }
}

}  // namespace lstm_ext::cuda
