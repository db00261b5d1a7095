// How the CUDA kernels compute the cell of contract/cell.h: a thread has one unit of one row.
#pragma once

#include <cmath>

#include "contract/cell.h"
#include "cuda/numeric.cuh"

namespace lstm_ext::cuda {

// The accurate functions: memory and the time of a launch bound a step, they do not.
LSTM_HOST_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
LSTM_HOST_DEVICE double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
LSTM_HOST_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
LSTM_HOST_DEVICE double hyperbolic_tangent(double x) { return tanh(x); }

template <typename A>
struct GateValues {
  A gate[4];
  LSTM_HOST_DEVICE A& operator[](int n) { return gate[n]; }
  LSTM_HOST_DEVICE const A& operator[](int n) const { return gate[n]; }
};

template <typename A>
struct AccurateMath {
  using Value = A;
  using Gates = GateValues<A>;
  static constexpr bool kOutputGateFirst = true;
  LSTM_HOST_DEVICE static A number(A x) { return x; }
  // The compiler's flags say whether it contracts this.
  LSTM_HOST_DEVICE static A fma(A a, A b, A c) { return a * b + c; }
  LSTM_HOST_DEVICE static A sigmoid(A z) { return cuda::sigmoid(z); }
  LSTM_HOST_DEVICE static A hidden(A o, A c) { return o * hyperbolic_tangent(c); }
  LSTM_HOST_DEVICE static void input(A z_i, A z_g, A& i, A& g) {
    i = cuda::sigmoid(z_i);
    g = hyperbolic_tangent(z_g);
  }
  LSTM_HOST_DEVICE static void output(A z_o, A c, A& o, A& h) {
    o = cuda::sigmoid(z_o);
    h = hidden(o, c);
  }
  LSTM_HOST_DEVICE static A clamp(A v, A bound) { return v > bound ? bound : v < -bound ? -bound : v; }
  LSTM_HOST_DEVICE static A below(A v, A bound, A a) { return v < bound && v > -bound ? a : A(0); }
  LSTM_HOST_DEVICE static A within(A v, A bound, A a) { return v <= bound && v >= -bound ? a : A(0); }
  struct Squashed {
    A tanh_c;
    LSTM_HOST_DEVICE A value() const { return tanh_c; }
    LSTM_HOST_DEVICE static A slope(A value) { return 1 - value * value; }
  };
  LSTM_HOST_DEVICE static Squashed squash(A c) { return {hyperbolic_tangent(c)}; }
};

// The options of the cell of a unit.
template <typename A>
struct LoadUnit {
  int64_t unit;
  LSTM_HOST_DEVICE A operator()(const A* parameter) const { return parameter[unit]; }
};
template <typename T>
using CellAt = cell::CellAt<accumulator_t<T>, LoadUnit<accumulator_t<T>>>;

// The Math of the kernels for a tensor type, in the type that they accumulate in.
template <typename T>
using CellMath = AccurateMath<accumulator_t<T>>;

}  // namespace lstm_ext::cuda
