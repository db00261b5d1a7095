// Runs the fused kernels of every type on fenced memory, as dependent launches, beside the stepwise kernels. What is
// multiplied are small multiples of 1/8, so sums are exact in any order: results have to have the same bits, or, as
// nvcc compiles them, nearly so. SIMT_... variables say how to emulate it. Ends with 0: right, 1: wrong numbers, 2:
// simt::Error. BFLOAT_ONLY: bfloat16 alone, which compiles in a fraction of the time.
#include <cmath>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/cell_math.cuh"
// The stepwise kernels with the nonlinearities of the others: what is left to differ is the product.
template <>
struct lstm_ext::cuda::MathOf<float> {
  using type = FastMath;
};

#include "cuda/step_bf16.cu"
#include "cuda/stepwise_bf16.cu"
#if !defined(BFLOAT_ONLY)
#include "cuda/step_f16.cu"
#include "cuda/step_f32.cu"
#include "cuda/stepwise_f16.cu"
#include "cuda/stepwise_f32.cu"
#endif
#include "simt/step_checks.h"

namespace {

using checks::eps;
using checks::instances;
using checks::Matrix;
using checks::name_of_type;
using checks::normal;
using checks::number;
using checks::of;
using checks::random_bits;
using lstm_ext::cuda::Types;
using simt::DeviceBuffer;

template <typename T>
void expect_same_bits(const DeviceBuffer<T>& fused, const DeviceBuffer<T>& stepwise, const char* what) {
  for (size_t i = 0; i < fused.size(); ++i) {
    const double a = number(fused[i]), b = number(stepwise[i]);
    if (std::isnan(a) && std::isnan(b)) continue;
    // nvcc fuses multiplications and additions in one kernel that it leaves apart in another. And its stepwise kernels
    // have the accurate functions for float: of a step, FastMath errs by up to 2e-6 of numbers like these.
    const double apart = std::is_same_v<T, float> ? 2e-6 : 1e-7;
    if (simt::translated_kernel != nullptr && std::fabs(a - b) <= 4 * eps<T>() * std::fabs(b) + apart) continue;
    if (std::memcmp(&fused[i], &stepwise[i], sizeof(T)) != 0) {
      char text[128];
      std::snprintf(text, sizeof text, "%s [%zu]: %.9g, stepwise %.9g", what, i, a, b);
      return checks::expect(false, text);
    }
  }
}

struct Shape {
  int64_t rows, previous_rows, next_rows, H;
  bool options, resets, copies;
};

template <typename T>
void note_instance(const char* pass, const Shape& s) {
  instances.insert(std::string(pass) + " " + name_of_type<T>() + (s.options ? " options " : " plain ") +
                   std::to_string(lstm_ext::cuda::step_rows(s.rows)));
}

template <typename T>
void check_forward(const Shape& s, int64_t I) {
  using A = typename Types<T>::Accumulate;
  const bool whole = I > 0;
  const int64_t B = s.rows, H = s.H;
  const Matrix<T> U(4 * H, H, "U"), h(B, H, "h"), W(4 * H, std::max<int64_t>(I, 1), "W"),
      x(B, std::max<int64_t>(I, 1), "x");
  const simt::ConstantMemory constant_u(U.data.data(), U.data.size() * sizeof(T));
  const simt::ConstantMemory constant_w(W.data.data(), W.data.size() * sizeof(T));
  const int64_t multiplied = whole ? B : s.previous_rows;
  if (multiplied > 1) h.data[h.stride] = of<T>(NAN);  // stays in its row
  const auto input_part = normal<A>(B * 4 * H, "input part"), begin_part = normal<A>(B * 4 * H, "begin part"),
             reset_part = normal<A>(B * 4 * H, "reset part"), before = normal<A>(B * H, "c before");
  const Matrix<T> biases(2, 4 * H, "biases");
  const auto c0 = normal<T>(B * H, "c0"), reset_c = normal<T>(B * H, "reset c"), reset_h = normal<T>(B * H, "reset h"),
             h0 = normal<T>(B * H, "h0");
  const auto mask = normal<A>(B * H, "mask");
  const auto running = normal<A>(B * H, "running h");
  DeviceBuffer<uint8_t> resets(B, "resets"), keep(B * H, "keep");
  DeviceBuffer<int64_t> lengths(B, "lengths");
  for (int64_t b = 0; b < B; ++b) {
    resets[b] = b % 3 == 0;
    lengths[b] = b % 4 == 1 ? 2 : 9;
  }
  for (uint8_t& flag : keep) flag = random_bits() % 2;
  // U h as the product of the stepwise layer leaves it, or W x and U h.
  const auto product = [&](const Matrix<T>& weight, const Matrix<T>& rows, int64_t depth, int64_t count) {
    DeviceBuffer<A> result(B * 4 * H, "product");
    for (int64_t b = 0; b < count; ++b) {
      for (int64_t r = 0; r < 4 * H; ++r) {
        double sum = 0;
        for (int64_t k = 0; k < depth; ++k)
          sum += number(weight.data[r * weight.stride + k]) * number(rows.data[b * rows.stride + k]);
        result[b * 4 * H + r] = static_cast<A>(sum);
      }
    }
    return result.values();
  };
  const DeviceBuffer<A> recurrent(product(U, h, H, multiplied), "recurrent part");
  const Matrix<T> reset_rows(B, H, "rows in place of h");
  const DeviceBuffer<A> of_reset(whole ? product(U, reset_rows, H, B) : reset_part.values(), "U h of a reset");
  const DeviceBuffer<A> of_input(whole ? product(W, x, I, B) : input_part.values(), "W x");

  struct Results {
    DeviceBuffer<A> c, running;
    DeviceBuffer<T> c_n, h_n, y, z, copies;
  };
  const int64_t stride = H + 3, copy_stride = h.stride;
  const auto nothing = [&] {
    return Results{DeviceBuffer<A>(B * H, "c"),
                   DeviceBuffer<A>(running.values(), "running h"),
                   DeviceBuffer<T>(B * H, "c_n"),
                   DeviceBuffer<T>(B * H, "h_n"),
                   DeviceBuffer<T>(B * stride, "y"),
                   DeviceBuffer<T>(B * 4 * H, "preactivations"),
                   DeviceBuffer<T>(B * copy_stride, "recurrent h")};
  };
  const auto cell_of = [&](bool fused, const Results& r) {
    lstm_ext::cuda::CellForward<T> cell{};
    cell.rows = {B, s.previous_rows, s.next_rows, {}, {}, s.options ? lengths.data() : nullptr, 5, false, s.options};
    if (s.resets) cell.rows.resets = {resets.data(), B};
    cell.hidden_size = H;
    if (!whole || !fused) cell.input_part = of_input.data();
    cell.input_stride = 4 * H;
    cell.begin_part = whole && !fused ? recurrent.data() : begin_part.data();
    if (!fused) cell.recurrent_part = recurrent.data();
    if (!whole || !fused) cell.reset_part = of_reset.data();
    cell.bias_ih = biases.data.data();
    cell.bias_hh = biases.data.data() + biases.stride;
    cell.c_previous = {before.data(), c0.data(), reset_c.data()};
    cell.c = r.c.data();
    cell.c_n = r.c_n.data();
    cell.preactivations = r.z.data();
    cell.output.h = r.y.data();
    cell.output.h_stride = stride;
    cell.output.h_n = r.h_n.data();
    if (s.copies) {
      cell.output.recurrent_h = r.copies.data();
      cell.output.recurrent_stride = copy_stride;
    }
    if (s.options) {
      cell.zoneout.keep = keep.data();
      cell.output.zoneout.share = A(0.25);
      cell.output.running_h = r.running.data();
      cell.output.h0 = h0.data();
      cell.output.reset_h = reset_h.data();
      if (s.copies) cell.output.recurrent_mask = mask.data();
    }
    return cell;
  };
  const auto side = [&](const Results& r) {
    lstm_ext::cuda::StepProduct<T> of_h{U.data.data(), U.stride, h.data.data(), h.stride, multiplied, H, {},
                                        nullptr,       0};
    lstm_ext::cuda::StepForward<T> args{cell_of(true, r), {of_h, {}}, whole};
    if (whole) {
      args.products[0] = {W.data.data(), W.stride, x.data.data(), x.stride, B, I, {}, nullptr, 0};
      of_h.resets = args.cell.rows.resets;
      of_h.reset_rows = reset_rows.data.data();
      of_h.reset_stride = reset_rows.stride;
      args.products[1] = of_h;
    }
    return args;
  };
  const Results a = nothing(), other = nothing(), b = nothing();
  note_instance<T>("forward", s);
  lstm_ext::cuda::step_forward<T>({{side(a), side(other)}, 2}, /*dependent=*/true, nullptr);
  lstm_ext::cuda::cell_forward<T>({{cell_of(false, b)}, 1}, nullptr);
  for (const Results* one : {&a, &other}) {
    expect_same_bits(one->c, b.c, "c");
    expect_same_bits(one->c_n, b.c_n, "c_n");
    expect_same_bits(one->h_n, b.h_n, "h_n");
    expect_same_bits(one->y, b.y, "h");
    expect_same_bits(one->z, b.z, "preactivations");
    expect_same_bits(one->copies, b.copies, "recurrent h");
    expect_same_bits(one->running, b.running, "running h");
  }
}

template <typename T>
void check_backward(const Shape& s) {
  using A = typename Types<T>::Accumulate;
  using D = typename Types<T>::Gradient;
  const int64_t B = s.rows, H = s.H, parts = lstm_ext::cuda::step_parts(H);
  const Matrix<D> U(4 * H, H, "U");
  const simt::ConstantMemory constant(U.data.data(), U.data.size() * sizeof(D));
  const auto z = normal<T>(B * 4 * H, "preactivations"), grad_y = normal<T>(B * H, "grad of h"),
             grad_h_n = normal<T>(B * H, "grad of h_n"), grad_c_n = normal<T>(B * H, "grad of c_n"),
             c0 = normal<T>(B * H, "c0");
  const auto cells = normal<A>(B * H, "c"), before = normal<A>(B * H, "c before"), mask = normal<A>(B * H, "mask"),
             grad_c = normal<A>(B * H, "grad of c"), grad_h = normal<A>(B * H, "grad of h through zoneout");
  const Matrix<A> incoming(parts * std::max<int64_t>(s.next_rows, 1), H, "parts of the step after");
  DeviceBuffer<A> packed(parts * std::max<int64_t>(s.next_rows, 1) * H, "parts of the step after");
  for (int64_t i = 0; i < parts * s.next_rows; ++i) {
    for (int64_t j = 0; j < H; ++j) packed[i * H + j] = incoming.data[i * incoming.stride + j];
  }
  DeviceBuffer<uint8_t> resets(B, "resets"), resets_after(std::max<int64_t>(s.next_rows, 1), "resets after"),
      keep(B * H, "keep");
  DeviceBuffer<int64_t> lengths(B, "lengths");
  for (int64_t b = 0; b < B; ++b) {
    resets[b] = b % 3 == 0;
    lengths[b] = b % 4 == 1 ? 2 : 9;
  }
  for (uint8_t& flag : resets_after) flag = random_bits() % 3 == 0;
  for (uint8_t& flag : keep) flag = random_bits() % 2;

  struct Results {
    DeviceBuffer<A> grad_c, grad_h, reset_part, reset_c, parts;
    DeviceBuffer<D> dz, begin;
  };
  const auto nothing = [&] {
    return Results{DeviceBuffer<A>(grad_c.values(), "grad of c"),
                   DeviceBuffer<A>(grad_h.values(), "grad of h through zoneout"),
                   DeviceBuffer<A>(B * 4 * H, A(0), "grad of reset part"),
                   DeviceBuffer<A>(B * H, A(0), "grad of reset c"),
                   DeviceBuffer<A>(std::max<int64_t>(parts * s.previous_rows * H, 1), "parts"),
                   DeviceBuffer<D>(B * 4 * H, "gate gradients"),
                   DeviceBuffer<D>(B * 4 * H, "grad of begin part")};
  };
  const auto cell_of = [&](const Results& r) {
    lstm_ext::cuda::CellBackward<T> cell{};
    cell.rows = {B, s.previous_rows, s.next_rows, {}, {}, s.options ? lengths.data() : nullptr, 5, false, s.options};
    if (s.resets) {
      cell.rows.resets = {resets.data(), B};
      cell.rows.resets_after = {resets_after.data(), s.next_rows};
    }
    cell.hidden_size = H;
    cell.preactivations = z.data();
    cell.cells = cells.data();
    cell.c_previous = {before.data(), c0.data(), nullptr};
    cell.grad_c_n = grad_c_n.data();
    cell.grad_c = r.grad_c.data();
    cell.grad_recurrent_part = r.dz.data();
    cell.grad_begin_part = r.begin.data();
    if (s.resets) {
      cell.grad_reset_part = r.reset_part.data();
      cell.grad_reset_c = r.reset_c.data();
    }
    cell.output.grad_output = grad_y.data();
    cell.output.grad_output_stride = H;
    cell.output.grad_h_n = grad_h_n.data();
    cell.output.recurrent_part = packed.data();
    cell.output.recurrent_parts = parts;
    cell.output.recurrent_part_stride = s.next_rows * H;
    if (s.options) {
      cell.zoneout.keep = keep.data();
      cell.output.zoneout.share = A(0.25);
      cell.output.recurrent_mask = mask.data();
      cell.output.grad_h = r.grad_h.data();
    }
    return cell;
  };
  const auto side = [&](const Results& r) {
    return lstm_ext::cuda::StepBackward<T>{cell_of(r), U.data.data(), U.stride, s.previous_rows, r.parts.data()};
  };
  const Results a = nothing(), other = nothing(), b = nothing();
  note_instance<T>("backward", s);
  lstm_ext::cuda::step_backward<T>({{side(a), side(other)}, 2}, /*dependent=*/true, nullptr);
  lstm_ext::cuda::cell_backward<T>({{cell_of(b)}, 1}, nullptr);
  expect_same_bits(other.parts, a.parts, "parts of the other side");
  expect_same_bits(other.dz, a.dz, "gate gradients of the other side");
  expect_same_bits(a.grad_c, b.grad_c, "grad of c");
  expect_same_bits(a.grad_h, b.grad_h, "grad of h through zoneout");
  expect_same_bits(a.reset_part, b.reset_part, "grad of reset part");
  expect_same_bits(a.reset_c, b.reset_c, "grad of reset c");
  expect_same_bits(a.dz, b.dz, "gate gradients");
  expect_same_bits(a.begin, b.begin, "grad of begin part");
  // Each part is the product of a block's units; operands are rounded as the tensor cores read them.
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t row = 0; row < s.previous_rows; ++row) {
      for (int64_t n = 0; n < H; ++n) {
        double sum = 0, size = 0;
        for (int64_t j = part * lstm_ext::cuda::kStepUnits;
             j < std::min<int64_t>(H, (part + 1) * lstm_ext::cuda::kStepUnits); ++j) {
          for (int gate = 0; gate < 4; ++gate) {
            double dz = number(a.dz[(row * 4 + gate) * H + j]);
            if constexpr (std::is_same_v<D, float>) {
              const uint32_t bits = simt::to_tf32(static_cast<float>(dz));
              float rounded;
              std::memcpy(&rounded, &bits, sizeof rounded);
              dz = rounded;
            }
            const double term = dz * number(U.data[(gate * H + j) * U.stride + n]);
            sum += term;
            size += std::fabs(term);
          }
        }
        const double got = a.parts[(part * s.previous_rows + row) * H + n];
        if (!(std::fabs(got - sum) <= 8 * size * 0x1p-22)) {
          char text[128];
          std::snprintf(text, sizeof text, "part %d, row %d, unit %d: %.9g, expected %.9g", static_cast<int>(part),
                        static_cast<int>(row), static_cast<int>(n), got, sum);
          return checks::expect(false, text);
        }
      }
    }
  }
}

template <typename T>
void check_all() {
  const Shape shapes[] = {
      {3, 3, 3, 16, false, false, false},  {5, 4, 3, 37, true, true, true},     {16, 16, 16, 72, false, true, true},
      {17, 17, 9, 33, false, false, true}, {65, 65, 65, 20, true, false, true}, {1, 1, 1, 200, false, false, false},
      {2, 2, 0, 19, true, true, false},
  };
  for (const Shape& s : shapes) {
    check_forward<T>(s, 0);
    check_backward<T>(s);
  }
  for (const Shape& s : {Shape{4, 0, 0, 24, false, false, false}, Shape{18, 0, 0, 35, true, true, true}}) {
    check_forward<T>(s, 13);
    check_forward<T>(s, 160);
  }
}

}  // namespace

int main() {
  try {
    check_all<__nv_bfloat16>();
#if !defined(BFLOAT_ONLY)
    check_all<__half>();
    check_all<float>();
#endif
  } catch (const simt::Error& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
  for (const std::string& instance : instances) std::printf("ran: %s\n", instance.c_str());
  return checks::failures == 0 ? 0 : 1;
}
