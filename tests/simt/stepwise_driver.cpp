// Runs every stepwise kernel of every type on fenced memory against a loop in float64. How it is emulated: SIMT_...
// variables. Ends with 0: right, 1: wrong numbers, 2: simt::Error. What is not written stays NaN, and is seen.
// FLOAT_ONLY: of float alone, which compiles in a fraction of the time.
#include <cmath>
#include <random>
#include <vector>

#include "cuda/stepwise_f32.cu"
#if !defined(FLOAT_ONLY)
#include "cuda/stepwise_bf16.cu"
#include "cuda/stepwise_f16.cu"
#include "cuda/stepwise_f64.cu"
#endif
#include "simt/check.h"

namespace {

using lstm_ext::cuda::Types;
using simt::DeviceBuffer;

double to_double(double x) { return x; }
double to_double(float x) { return x; }
double to_double(__half x) { return __half2float(x); }
double to_double(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
double eps();
template <>
double eps<double>() {
  return 0x1p-52;
}
template <>
double eps<float>() {
  return 0x1p-23;
}
template <>
double eps<__half>() {
  return 0x1p-10;
}
template <>
double eps<__nv_bfloat16>() {
  return 0x1p-7;
}

template <typename T>
DeviceBuffer<T> random_values(size_t count, const char* name) {
  static std::mt19937 random(3);
  std::normal_distribution<double> normal;
  std::vector<T> values(count);
  for (T& value : values) {
    if constexpr (std::is_same_v<T, __half>) {
      value = __float2half_rn(static_cast<float>(normal(random)));
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      value = __float2bfloat16_rn(static_cast<float>(normal(random)));
    } else {
      value = static_cast<T>(normal(random));
    }
  }
  return DeviceBuffer<T>(values, name);
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Of a number of type T computed in sums of another type: a few roundings of each.
template <typename T>
void expect_near(T got, double wanted, const std::string& what) {
  const double x = to_double(got);
  checks::expect(std::fabs(x - wanted) <= 8 * eps<T>() * (1 + std::fabs(wanted)),
                 what + ": " + std::to_string(x) + ", expected " + std::to_string(wanted));
}

struct Shape {
  int64_t rows, units;           // of the step
  int64_t continuing, going_on;  // see stepwise.h
  bool states;                   // h0, c0 and gradients of h_n, c_n
};

template <typename T>
void check_cell(const Shape& s) {
  using A = typename Types<T>::Accumulate;
  using D = typename Types<T>::Gradient;
  const int64_t R = s.rows, H = s.units, apart = H + 3;
  const auto input = random_values<A>(R * 5 * H, "input part");  // rows 5H apart
  const auto recurrent = random_values<A>(R * 4 * H, "recurrent part");
  const auto bias_ih = random_values<T>(4 * H, "bias_ih"), bias_hh = random_values<T>(4 * H, "bias_hh");
  const auto previous = random_values<A>(std::max<int64_t>(s.continuing, 1) * H, "previous c");
  const auto c0 = random_values<T>(R * H, "c0");
  DeviceBuffer<A> c(R * H, "c");
  DeviceBuffer<T> h(R * apart, "h"), saved(R * 4 * H, "pre-activations"), h_n(R * H, "h_n"), c_n(R * H, "c_n");

  lstm_ext::cuda::CellForward<T> f{};
  f.rows = R;
  f.hidden_size = H;
  f.input_part = input.data();
  f.input_stride = 5 * H;
  f.recurrent_part = recurrent.data();
  f.recurrent_rows = s.states ? R : s.continuing;
  f.bias_ih = bias_ih.data();
  f.bias_hh = bias_hh.data();
  f.c_previous = {s.continuing, previous.data(), s.states ? c0.data() : nullptr};
  f.c = c.data();
  f.h = h.data();
  f.h_stride = apart;
  f.pre_activations = saved.data();
  f.going_on = s.going_on;
  f.h_n = h_n.data();
  f.c_n = c_n.data();
  lstm_ext::cuda::cell_forward(f, nullptr);

  const auto previous_of = [&](int64_t b, int64_t j) {
    if (b < s.continuing) return to_double(previous[b * H + j]);
    return s.states ? to_double(c0[b * H + j]) : 0.0;
  };
  for (int64_t b = 0; b < R; ++b) {
    for (int64_t j = 0; j < H; ++j) {
      double z[4];
      for (int q = 0; q < 4; ++q) {
        z[q] = to_double(input[b * 5 * H + q * H + j]) + to_double(bias_ih[q * H + j]) + to_double(bias_hh[q * H + j]);
        if (b < f.recurrent_rows) z[q] += to_double(recurrent[(b * 4 + q) * H + j]);
        expect_near(saved[(b * 4 + q) * H + j], z[q], "pre-activation");
      }
      const double state = sigmoid(z[1]) * previous_of(b, j) + sigmoid(z[0]) * std::tanh(z[2]);
      expect_near(c[b * H + j], state, "c");
      expect_near(h[b * apart + j], sigmoid(z[3]) * std::tanh(state), "h");
      if (b >= s.going_on) {
        expect_near(h_n[b * H + j], sigmoid(z[3]) * std::tanh(state), "h_n");
        expect_near(c_n[b * H + j], state, "c_n");
      } else {
        checks::expect(std::isnan(to_double(h_n[b * H + j])) && std::isnan(to_double(c_n[b * H + j])),
                       "the final state of a row that goes on was written");
      }
    }
  }

  const auto grad_output = random_values<T>(R * apart, "grad_output");
  const auto grad_recurrent = random_values<A>(R * H, "recurrent part of dh");
  const auto grad_h_n = random_values<T>(R * H, "grad_h_n"), grad_c_n = random_values<T>(R * H, "grad_c_n");
  const auto grad_c = random_values<A>(R * H, "grad_c");
  const std::vector<A> grad_c_before = grad_c.values();
  DeviceBuffer<D> grad_gates(R * 4 * H, "grad_gates");
  lstm_ext::cuda::CellBackward<T> g{};
  g.rows = R;
  g.hidden_size = H;
  g.pre_activations = saved.data();
  g.cells = c.data();
  g.c_previous = f.c_previous;
  g.grad_output = grad_output.data();
  g.grad_output_stride = apart;
  g.grad_h_n = s.states ? grad_h_n.data() : nullptr;
  g.recurrent_part = grad_recurrent.data();
  g.recurrent_rows = s.going_on;
  g.going_on = s.going_on;
  g.grad_c_n = s.states ? grad_c_n.data() : nullptr;
  g.grad_c = grad_c.data();
  g.grad_gates = grad_gates.data();
  lstm_ext::cuda::cell_backward(g, nullptr);

  for (int64_t b = 0; b < R; ++b) {
    for (int64_t j = 0; j < H; ++j) {
      double z[4];
      for (int q = 0; q < 4; ++q) z[q] = to_double(saved[(b * 4 + q) * H + j]);
      const double i = sigmoid(z[0]), forget = sigmoid(z[1]), cell = std::tanh(z[2]), o = sigmoid(z[3]);
      const double tanh_c = std::tanh(to_double(c[b * H + j]));
      double dh = to_double(grad_output[b * apart + j]), dc = 0;
      if (b < s.going_on) {
        dh += to_double(grad_recurrent[b * H + j]);
        dc += to_double(grad_c_before[b * H + j]);
      } else if (s.states) {
        dh += to_double(grad_h_n[b * H + j]);
        dc += to_double(grad_c_n[b * H + j]);
      }
      dc += dh * o * (1 - tanh_c * tanh_c);
      const double wanted[4] = {dc * cell * i * (1 - i), dc * previous_of(b, j) * forget * (1 - forget),
                                dc * i * (1 - cell * cell), dh * tanh_c * o * (1 - o)};
      for (int q = 0; q < 4; ++q) expect_near(grad_gates[(b * 4 + q) * H + j], wanted[q], "gate gradient");
      expect_near(grad_c[b * H + j], dc * forget, "grad_c");
    }
  }

  DeviceBuffer<D> sum(R * H, "sum");
  lstm_ext::cuda::OutputGradient<T> o{};
  o.rows = R;
  o.output_size = H;
  o.grad_output = s.states ? grad_output.data() : nullptr;
  o.grad_output_stride = apart;
  o.grad_h_n = grad_h_n.data();
  o.recurrent_part = grad_recurrent.data();
  o.recurrent_rows = s.going_on;
  o.going_on = s.going_on;
  o.result = sum.data();
  lstm_ext::cuda::output_gradient(o, nullptr);
  for (int64_t b = 0; b < R; ++b) {
    for (int64_t j = 0; j < H; ++j) {
      double wanted = s.states ? to_double(grad_output[b * apart + j]) : 0;
      wanted += b < s.going_on ? to_double(grad_recurrent[b * H + j]) : to_double(grad_h_n[b * H + j]);
      expect_near(sum[b * H + j], wanted, "gradient of the output");
    }
  }
}

template <typename T>
void check_previous_outputs() {
  using D = typename Types<T>::Gradient;
  constexpr int64_t P = 35, apart = 40;
  const int64_t rows[] = {2, 5, 1}, continuing[] = {0, 2, 1};
  const auto h = random_values<T>(5 * apart, "h"), h0 = random_values<T>(5 * P, "h0");
  DeviceBuffer<D> result(8 * P, "previous outputs");
  for (const bool given : {true, false}) {
    lstm_ext::cuda::PreviousOutputs<T> p{};
    p.output_size = P;
    p.previous_stride = apart;
    p.h0 = given ? h0.data() : nullptr;
    int64_t place = 0;
    for (int n = 0; n < 3; ++n) {
      p.step[p.steps++] = {rows[n], continuing[n], h.data(), result.data() + place * P};
      place += rows[n];
    }
    lstm_ext::cuda::previous_outputs(p, nullptr);
    place = 0;
    for (int n = 0; n < 3; ++n) {
      for (int64_t b = 0; b < rows[n]; ++b, ++place) {
        for (int64_t j = 0; j < P; ++j) {
          const double wanted = b < continuing[n] ? to_double(h[b * apart + j]) : given ? to_double(h0[b * P + j]) : 0;
          checks::expect(to_double(result[place * P + j]) == wanted, "previous output");
        }
      }
    }
  }
}

template <typename T>
void check_column_sums(int64_t rows, int64_t columns) {
  using A = typename Types<T>::Accumulate;
  const auto values = random_values<typename Types<T>::Gradient>(rows * columns, "values");
  const auto sums = random_values<A>(columns, "sums");
  const std::vector<A> before = sums.values();
  DeviceBuffer<A> partial(lstm_ext::cuda::column_sum_parts(rows) * columns, "partial sums");
  lstm_ext::cuda::column_sums<T>({rows, columns, values.data(), partial.data(), sums.data()}, nullptr);
  for (int64_t j = 0; j < columns; ++j) {
    double wanted = to_double(before[j]), size = std::fabs(wanted);
    for (int64_t row = 0; row < rows; ++row) {
      wanted += to_double(values[row * columns + j]);
      size += std::fabs(to_double(values[row * columns + j]));
    }
    checks::expect(std::fabs(to_double(sums[j]) - wanted) <= 8 * eps<A>() * size, "column sum");
  }
}

template <typename T>
void check_all() {
  check_cell<T>({1, 1, 0, 0, false});
  check_cell<T>({5, 37, 3, 2, true});  // some rows begin, some end; one warp and a bit
  check_cell<T>({5, 37, 3, 2, false});
  check_cell<T>({3, 130, 3, 3, true});    // more units than a block is wide
  check_cell<T>({11, 33, 0, 11, false});  // more rows than a block is high
  check_previous_outputs<T>();
  check_column_sums<T>(3, 5);
  check_column_sums<T>(700, 40);  // two parts, a block of columns and a bit
}

}  // namespace

int main() {
  try {
    check_all<float>();
#if !defined(FLOAT_ONLY)
    check_all<double>();
    check_all<__half>();
    check_all<__nv_bfloat16>();
#endif
  } catch (const simt::Error& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
  return checks::failures == 0 ? 0 : 1;
}
