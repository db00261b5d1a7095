// How the CUDA kernels compute the cell of contract/cell.h: a thread has one unit of one row.
#pragma once

#include <cmath>
#include <type_traits>

#include "contract/cell.h"
#include "cuda/numeric.cuh"

namespace lstm_ext::cuda {

// The nonlinearities of a Math: the accurate ones,
struct AccurateFunctions {
  LSTM_HOST_DEVICE static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
  LSTM_HOST_DEVICE static double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
  LSTM_HOST_DEVICE static float tanh(float x) { return tanhf(x); }
  LSTM_HOST_DEVICE static double tanh(double x) { return ::tanh(x); }
  LSTM_HOST_DEVICE static float expm1(float x) { return expm1f(x); }
  LSTM_HOST_DEVICE static double expm1(double x) { return ::expm1(x); }
  LSTM_HOST_DEVICE static float softplus(float x) { return (x < 0 ? 0 : x) + log1pf(expf(-fabsf(x))); }
  LSTM_HOST_DEVICE static double softplus(double x) { return (x < 0 ? 0 : x) + log1p(exp(-fabs(x))); }
};
// and others, without branches, of two instructions that approximate 2^x and 1/x. Sigmoid errs by at most 2.3e-7, tanh
// by 4.5e-7 and by 8.6e-7 of its value (tests/simt/fast_functions.cpp tries all numbers, with the errors that PTX
// allows the instructions). Operands of products are rounded to TF32 or 16 bits, which is a thousand times coarser.
template <typename Instructions>
struct FastFunctions {
  LSTM_HOST_DEVICE static float sigmoid(float x) { return part(-1.44269504f * x); }
  // Near 0 the difference of two numbers near 1 would have few digits: there it is a polynomial, x + x^3 p(x^2).
  LSTM_HOST_DEVICE static float tanh(float x) {
    const float square = x * x;
    float p = fmaf(square, 0.0164375622f, -0.0526718013f);
    p = fmaf(square, p, 0.133207247f);
    p = fmaf(square, p, -0.333329469f);
    const float small = fmaf(x * square, p, x);
    const float large = fmaf(2.0f, part(-2.88539008f * x), -1.0f);
    return fabsf(x) < 0.55f ? small : large;
  }

 private:
  LSTM_HOST_DEVICE static float part(float x) { return Instructions::reciprocal(1.0f + Instructions::exp2(x)); }
};
struct DeviceInstructions {
  LSTM_DEVICE static float exp2(float x) { return exp2_approximate(x); }
  LSTM_DEVICE static float reciprocal(float x) { return reciprocal_approximate(x); }
};

template <typename A>
struct GateValues {
  A gate[4];
  LSTM_HOST_DEVICE A& operator[](int n) { return gate[n]; }
  LSTM_HOST_DEVICE const A& operator[](int n) const { return gate[n]; }
};

template <typename A, typename Functions>
struct ScalarMath {
  using Value = A;
  using Gates = GateValues<A>;
  static constexpr bool kOutputGateFirst = true;
  LSTM_HOST_DEVICE static A number(A x) { return x; }
  // The compiler's flags say whether it contracts this.
  LSTM_HOST_DEVICE static A fma(A a, A b, A c) { return a * b + c; }
  LSTM_HOST_DEVICE static A sigmoid(A z) { return Functions::sigmoid(z); }
  LSTM_HOST_DEVICE static A tanh(A z) { return Functions::tanh(z); }
  LSTM_HOST_DEVICE static A hidden(A o, A c) { return o * Functions::tanh(c); }
  LSTM_HOST_DEVICE static void input(A z_i, A z_g, A& i, A& g) {
    i = Functions::sigmoid(z_i);
    g = Functions::tanh(z_g);
  }
  LSTM_HOST_DEVICE static void output(A z_o, A c, A& o, A& h) {
    o = Functions::sigmoid(z_o);
    h = hidden(o, c);
  }
  LSTM_HOST_DEVICE static A clamp(A v, A bound) { return v > bound ? bound : v < -bound ? -bound : v; }
  LSTM_HOST_DEVICE static A below(A v, A bound, A a) { return v < bound && v > -bound ? a : A(0); }
  LSTM_HOST_DEVICE static A within(A v, A bound, A a) { return v <= bound && v >= -bound ? a : A(0); }
  LSTM_HOST_DEVICE static A unless(A v, A bound, A a) { return v == bound ? A(0) : a; }
  LSTM_HOST_DEVICE static A activation(const cell::Activation<A>& f, A z) {
    return cell::activation_value<ScalarMath>(f, z);
  }
  LSTM_HOST_DEVICE static A slope_of(const cell::Activation<A>& f, A value) {
    return cell::activation_slope<ScalarMath>(f, value);
  }
  LSTM_HOST_DEVICE static A where_positive(A v, A a, A b) { return v > 0 ? a : b; }
  LSTM_HOST_DEVICE static A quotient(A a, A b) { return a / b; }
  LSTM_HOST_DEVICE static A expm1(A z) { return AccurateFunctions::expm1(z); }
  LSTM_HOST_DEVICE static A softplus(A z) { return AccurateFunctions::softplus(z); }
  struct Squashed {
    A tanh_c;
    LSTM_HOST_DEVICE A value() const { return tanh_c; }
    LSTM_HOST_DEVICE static A slope(A value) { return 1 - value * value; }
  };
  LSTM_HOST_DEVICE static Squashed squash(A c) { return {Functions::tanh(c)}; }
};

// The options of the cell of a unit.
template <typename A>
struct LoadUnit {
  int64_t unit;
  LSTM_HOST_DEVICE A operator()(const A* parameter) const { return parameter[unit]; }
};
template <typename T>
using CellAt = cell::CellAt<accumulator_t<T>, LoadUnit<accumulator_t<T>>>;

template <typename A>
using AccurateMath = ScalarMath<A, AccurateFunctions>;
using FastMath = ScalarMath<float, FastFunctions<DeviceInstructions>>;

// The Math of kernels that take products from elsewhere, by the type of tensors. Those that multiply on tensor cores
// take FastMath for every type.
template <typename T>
struct MathOf {
  using type = std::conditional_t<sizeof(T) == 2, FastMath, AccurateMath<accumulator_t<T>>>;
};
template <typename T>
using CellMath = typename MathOf<T>::type;

}  // namespace lstm_ext::cuda
