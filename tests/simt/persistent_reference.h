// What the persistent kernels are compared with: the stepwise kernels, step by step. The product between two steps is a
// loop in float64 over what the persistent kernel left in its results, rounded as its operands are. So a step is judged
// by itself: errors do not add up, and numbers differ by the order of sums and a rounding at the end.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "cuda/persistent.h"
#include "simt/step_checks.h"

namespace persistent {

using checks::Matrix;
using checks::normal;
using checks::number;
using checks::of;
using checks::random_bits;
using lstm_ext::ResetFlags;
using lstm_ext::cuda::Exchange;
using lstm_ext::cuda::Types;
using simt::DeviceBuffer;

struct Case {
  int64_t steps, batch, hidden;
  std::vector<int64_t> chunks;  // where they end, but for the last one
  bool packed = false;
  bool first_reversed = false;  // the first side; the second one is always the other direction
  int sides = 2;
  enum Resets { kNever, kToZeros, kToState } resets = kNever;
  bool states = true;  // h0 and c0; backward, gradients of h_n and c_n
  bool saves = true;   // cells and preactivations
  bool batch_first = false;
  bool own_parts = false;  // backward: gate gradients beside the mailbox even where that would do
  bool nan = false;        // in some rows' states
  // Options; `options` alone runs the kernels that have them.
  bool options = false, lengths = false, mask = false, returned = false;
  enum Zoneout { kNone, kFlags, kShares } zoneout = kNone;
  int groups = 1;
  int more_extra = 0;  // pieces in shared memory that nobody needs

  bool has_options() const { return options || lengths || mask || returned || zoneout != kNone; }
  int64_t rows_of(int64_t time) const {
    return packed ? std::max<int64_t>(1, batch - time * std::max<int64_t>(1, batch / 3)) : batch;
  }
};

// When the steps of a direction are, and where their rows.
struct Sequence {
  int64_t steps;
  bool reverse, packed;
  std::vector<int64_t> offsets{0};  // rows before each time

  Sequence(const Case& s, bool reversed) : steps(s.steps), reverse(reversed), packed(s.packed) {
    for (int64_t t = 0; t < steps; ++t) offsets.push_back(offsets.back() + s.rows_of(t));
  }
  int64_t rows() const { return offsets.back(); }
  int64_t time(int64_t n) const { return reverse ? steps - 1 - n : n; }
  // Of step n of the direction.
  int64_t offset(int64_t n) const { return offsets[time(n)]; }
  int64_t rows_in(int64_t n) const { return n < 0 || n >= steps ? 0 : offsets[time(n) + 1] - offsets[time(n)]; }
  // That are in another step as well.
  int64_t shared_rows(int64_t n, int64_t other) const { return std::min(rows_in(n), rows_in(other)); }

  lstm_ext::cuda::ChunkOfSteps chunk(int64_t first, int64_t end, int64_t batch) const {
    lstm_ext::cuda::ChunkOfSteps c{};
    c.first = static_cast<int32_t>(first);
    c.end = static_cast<int32_t>(end);
    c.count = static_cast<int32_t>(steps);
    c.batch = static_cast<int32_t>(batch);
    c.reverse = reverse;
    c.packed = packed;
    const int64_t begin = std::min(time(first), time(end - 1));
    const int64_t first_row = offsets[begin];
    if (!packed) return c;
    for (int64_t i = 0; i < end - first + 3; ++i) {
      const int64_t t = std::clamp<int64_t>(begin - 1 + i, 0, steps);
      c.rows_before[i] = static_cast<int32_t>(offsets[t] - first_row);
    }
    return c;
  }
  int64_t chunk_row(int64_t first, int64_t end) const { return std::min(offset(first), offset(end - 1)); }
  int64_t chunk_rows(int64_t first, int64_t end) const {
    int64_t rows = 0;
    for (int64_t n = first; n < end; ++n) rows += rows_in(n);
    return rows;
  }
};

inline DeviceBuffer<uint8_t> flags(int64_t count, const char* name) {
  std::vector<uint8_t> values(count);
  for (uint8_t& flag : values) flag = random_bits() % 3 == 0;
  return DeviceBuffer<uint8_t>(values, name);
}
template <typename V>
void set_all_bits(V* values, int64_t count = 1) {
  std::memset(static_cast<void*>(values), 0xff, count * sizeof(V));
}

// What both passes have of a direction, the same for kernel and reference.
template <typename T>
struct Side {
  using A = typename Types<T>::Accumulate;
  const Case s;
  const Sequence sequence;
  const int64_t B = s.batch, H = s.hidden, N = sequence.rows();
  DeviceBuffer<uint8_t> resets = flags(N, "resets"), keep_h = flags(N * H, "keep h"), keep_c = flags(N * H, "keep c");
  DeviceBuffer<int64_t> lengths{static_cast<size_t>(B), "lengths"};
  DeviceBuffer<T> c0 = normal<T>(B * H, "c0"), h0 = normal<T>(B * H, "h0"), reset_c = normal<T>(B * H, "reset c"),
                  reset_h = normal<T>(B * H, "reset h");
  DeviceBuffer<A> mask = normal<A>(B * H, "mask");

  Side(const Case& c, bool reversed) : s(c), sequence(c, reversed) {
    for (int64_t b = 0; b < B; ++b) lengths[b] = b % 3 == 1 ? std::max<int64_t>(1, s.steps - 2) : b % 3 == 2 ? 0 : 9999;
  }

  lstm_ext::Zoneout<A> zoneout(bool of_h) const {
    lstm_ext::Zoneout<A> z{};
    // Flags of one state and a share of the other, one way and the other way round.
    if (s.zoneout != Case::kNone && (s.zoneout == Case::kFlags) == of_h) z.keep = (of_h ? keep_h : keep_c).data();
    if (s.zoneout != Case::kNone && (s.zoneout == Case::kFlags) != of_h) z.share = A(0.25);
    return z;
  }
  lstm_ext::cuda::PreviousCell<T> before_first(const A* cells) const {
    return {cells, s.states ? c0.data() : nullptr, s.resets == Case::kToState ? reset_c.data() : nullptr};
  }
  ResetFlags resets_before(int64_t n) const {
    if (s.resets == Case::kNever || n >= s.steps) return {nullptr, 0};
    // A flag lies between two times.
    const int64_t t = sequence.time(n) + (sequence.reverse ? 1 : 0);
    if (t >= s.steps) return {nullptr, 0};
    return {resets.data() + sequence.offsets[t], sequence.offsets[t + 1] - sequence.offsets[t]};
  }
  // What the kernel is told of rows; the reference gets the rest of it too.
  lstm_ext::cuda::StepRows rows() const {
    lstm_ext::cuda::StepRows rows{};
    rows.lengths = s.lengths ? lengths.data() : nullptr;
    rows.reverse = sequence.reverse;
    rows.options = s.has_options();
    return rows;
  }
  lstm_ext::cuda::StepRows rows_of_step(int64_t n) const {
    lstm_ext::cuda::StepRows step = rows();
    step.count = sequence.rows_in(n);
    step.previous_count = sequence.shared_rows(n, n - 1);
    step.next_count = sequence.shared_rows(n, n + 1);
    step.resets = resets_before(n);
    step.resets_after = resets_before(n + 1);
    step.time = sequence.time(n);
    return step;
  }
};

// An operand as the instruction takes it.
template <typename D>
double operand(D x) {
  if constexpr (std::is_same_v<D, float>) {
    const uint32_t bits = simt::to_tf32(x);
    std::memcpy(&x, &bits, sizeof x);
  }
  return number(x);
}
template <typename D>
std::vector<double> operands(const Matrix<D>& U, int64_t rows, int64_t columns) {
  std::vector<double> result(rows * columns);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) result[i * columns + j] = operand(U.data[i * U.stride + j]);
  }
  return result;
}

// What runs, for messages.
inline std::string label;
inline void expect(bool holds, const std::string& what) { checks::expect(holds, label + ": " + what); }

// Sums of a few hundred terms of size 1 in float32, as tensor cores make them, and then a rounding to V that may go to
// the other neighbour. NaNs, of rows that have them and of what nobody writes, are where they are.
template <typename V>
void expect_near(const DeviceBuffer<V>& got, const DeviceBuffer<V>& expected, const char* what) {
  for (size_t i = 0; i < got.size(); ++i) {
    const double a = number(got[i]), b = number(expected[i]);
    if (a == b || (std::isnan(a) && std::isnan(b))) continue;
    const double rounding = std::is_same_v<V, float> ? 0 : checks::eps<V>() * std::fabs(b);
    if (std::fabs(a - b) <= rounding + 0x1p-16 * (1 + std::fabs(b))) continue;
    char text[128];
    std::snprintf(text, sizeof text, "%s [%zu]: %.9g, expected %.9g", what, i, a, b);
    return expect(false, text);
  }
}
template <typename V>
bool same_bits(const DeviceBuffer<V>& a, const DeviceBuffer<V>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(V)) == 0;
}
template <typename V>
bool is_nan_between(const DeviceBuffer<V>& values, int64_t begin, int64_t end) {
  return std::all_of(values.begin() + begin, values.begin() + end, [](V x) { return std::isnan(number(x)); });
}

// Of all results of all launches: the same for every order of threads.
inline uint64_t digest = 14695981039346656037u;
template <typename V>
void add_to_digest(const DeviceBuffer<V>& values) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(V); ++i) digest = (digest ^ bytes[i]) * 1099511628211u;
}

// ---- forward

template <typename T>
struct Forward : Side<T> {
  using Base = Side<T>;
  using A = typename Base::A;
  using Operand = T;
  using Arguments = lstm_ext::cuda::PersistentForward<T>;
  static constexpr bool kBackward = false;
  using Base::B, Base::H, Base::N, Base::s, Base::sequence;
  const int64_t h_stride = H + 3;
  Matrix<T> U{4 * H, H, "U", 3 / std::sqrt(static_cast<double>(H))}, biases{2, 4 * H, "biases"};
  DeviceBuffer<A> input = normal<A>(N * 4 * H, "input part"), begin_part = normal<A>(B * 4 * H, "begin part"),
                  reset_part = normal<A>(B * 4 * H, "reset part");

  struct Results {
    DeviceBuffer<A> c, running;
    DeviceBuffer<T> c_n, h_n, y, z;
    template <typename Function>
    static void each(const Results& a, const Results& b, Function&& function) {
      function(a.c, b.c, "c");
      function(a.running, b.running, "running h");
      function(a.c_n, b.c_n, "c_n");
      function(a.h_n, b.h_n, "h_n");
      function(a.y, b.y, "h");
      function(a.z, b.z, "preactivations");
    }
  };

  Forward(const Case& c, bool reversed) : Base(c, reversed) {
    if (!c.nan) return;
    set_all_bits(&this->c0[H], 8);  // NaNs in all words of a piece of row 1: the bits of the sentinel
    if (B > 2) this->c0[2 * H + 3] = of<T>(INFINITY);
    if (B > 3) begin_part[3 * 4 * H + 5] = -INFINITY;
  }

  Results nothing() const {
    return {DeviceBuffer<A>(s.saves ? N * H : B * H, "c"),
            DeviceBuffer<A>(B * H, "running h"),
            DeviceBuffer<T>(B * H, "c_n"),
            DeviceBuffer<T>(B * H, "h_n"),
            DeviceBuffer<T>(N * h_stride, "h"),
            DeviceBuffer<T>(N * 4 * H, "preactivations")};
  }

  // Of row 0 of the sequence.
  lstm_ext::cuda::CellForward<T> cell(const Results& r) const {
    lstm_ext::cuda::CellForward<T> cell{};
    cell.rows = this->rows();
    cell.hidden_size = H;
    cell.input_part = input.data();
    cell.input_stride = (s.batch_first ? s.steps : 1) * 4 * H;
    cell.begin_part = s.states ? begin_part.data() : nullptr;
    cell.reset_part = s.resets == Case::kToState ? reset_part.data() : nullptr;
    cell.bias_ih = s.states ? biases.data.data() : nullptr;
    cell.bias_hh = biases.data.data() + biases.stride;
    cell.c_previous = this->before_first(r.c.data());
    cell.zoneout = this->zoneout(false);
    cell.c = r.c.data();
    cell.c_n = r.c_n.data();
    cell.preactivations = s.saves ? r.z.data() : nullptr;
    cell.output.h = r.y.data();
    cell.output.h_stride = h_stride;
    cell.output.h_n = r.h_n.data();
    cell.output.zoneout = this->zoneout(true);
    if (s.zoneout != Case::kNone) {
      cell.output.running_h = r.running.data();
      cell.output.h0 = s.states ? this->h0.data() : nullptr;
      cell.output.reset_h = s.resets == Case::kToState ? this->reset_h.data() : nullptr;
    }
    cell.output.recurrent_mask = s.mask ? this->mask.data() : nullptr;
    return cell;
  }
  Arguments arguments(const Results& r, int64_t first, int64_t end) const {
    Arguments args{};
    const int64_t row = sequence.chunk_row(first, end);
    args.cell = cell(r);
    if (!s.batch_first) args.cell.input_part += row * 4 * H;
    if (s.saves) {
      args.cell.c_previous.previous += row * H;
      args.cell.c += row * H;
      args.cell.preactivations += row * 4 * H;
    }
    if (args.cell.zoneout.keep) args.cell.zoneout.keep += row * H;
    if (args.cell.output.zoneout.keep) args.cell.output.zoneout.keep += row * H;
    args.cell.output.h += row * h_stride;
    args.keeps_cells = s.saves;
    args.batch_first = s.batch_first;
    return args;
  }

  // Unit j of row b of step n as the product of the next step has to read it.
  double left(const Results& r, int64_t n, int64_t b, int64_t j) const {
    T h = r.y[(sequence.offset(n) + b) * h_stride + j];
    if (s.mask) h = of<T>(this->mask[b * H + j] * static_cast<float>(number(h)));
    return operand(h);
  }
  int64_t width() const { return H; }

  void reference(const Results& of_kernel, const Results& r) const {
    const std::vector<double> weight = operands(U, 4 * H, H);
    std::vector<double> h(H);
    for (int64_t n = 0; n < s.steps; ++n) {
      DeviceBuffer<A> product(B * 4 * H, "product");
      for (int64_t b = 0; b < sequence.shared_rows(n, n - 1); ++b) {
        for (int64_t j = 0; j < H; ++j) h[j] = left(of_kernel, n - 1, b, j);
        for (int64_t k = 0; k < 4 * H; ++k) {
          double sum = 0;
          for (int64_t j = 0; j < H; ++j) sum += weight[k * H + j] * h[j];
          product[b * 4 * H + k] = static_cast<A>(sum);
        }
      }
      const int64_t row = sequence.offset(n);
      lstm_ext::cuda::CellForward<T> step = cell(r);
      step.rows = this->rows_of_step(n);
      step.input_part += (s.batch_first ? sequence.time(n) : row) * 4 * H;
      step.recurrent_part = product.data();
      if (s.saves) {
        if (n > 0) step.c_previous.previous += sequence.offset(n - 1) * H;
        step.c += row * H;
        step.preactivations += row * 4 * H;
      }
      if (step.zoneout.keep) step.zoneout.keep += row * H;
      if (step.output.zoneout.keep) step.output.zoneout.keep += row * H;
      step.output.h += row * h_stride;
      lstm_ext::cuda::cell_forward<T>({{step}, 1}, nullptr);
    }
  }

  bool is_spoiled(const Results& r, int64_t first, int64_t end) const {
    const int64_t begin = sequence.chunk_row(first, end), rows = sequence.chunk_rows(first, end);
    for (int64_t row = begin; row < begin + rows; ++row) {
      if (!is_nan_between(r.y, row * h_stride, row * h_stride + H)) return false;
    }
    return is_nan_between(r.h_n, 0, B * H) && is_nan_between(r.c_n, 0, B * H) &&
           is_nan_between(r.z, begin * 4 * H, (begin + rows) * 4 * H);
  }
};

// ---- backward

template <typename T>
struct Backward : Side<T> {
  using Base = Side<T>;
  using A = typename Base::A;
  using Operand = typename Types<T>::Gradient;
  using Arguments = lstm_ext::cuda::PersistentBackward<T>;
  static constexpr bool kBackward = true;
  using Base::B, Base::H, Base::N, Base::s, Base::sequence;
  Matrix<Operand> U{4 * H, H, "U", 3 / std::sqrt(static_cast<double>(H))};
  DeviceBuffer<T> z = normal<T>(N * 4 * H, "preactivations"), grad_y = normal<T>(N * H, "grad of h"),
                  grad_h_n = normal<T>(B * H, "grad of h_n"), grad_c_n = normal<T>(B * H, "grad of c_n"),
                  grad_gates = normal<T>(N * 4 * H, "grad of gates");
  DeviceBuffer<A> cells = normal<A>(N * H, "c"), grad_cells = normal<A>(N * H, "grad of cells");

  struct Results {
    DeviceBuffer<A> grad_c, grad_h, reset_part, reset_c, reset_h;
    DeviceBuffer<Operand> dz, begin;
    DeviceBuffer<T> hidden;
    template <typename Function>
    static void each(const Results& a, const Results& b, Function&& function) {
      function(a.grad_c, b.grad_c, "grad of c");
      function(a.grad_h, b.grad_h, "grad of h through zoneout");
      function(a.reset_part, b.reset_part, "grad of reset part");
      function(a.reset_c, b.reset_c, "grad of reset c");
      function(a.reset_h, b.reset_h, "grad of reset h");
      function(a.dz, b.dz, "gate gradients");
      function(a.begin, b.begin, "grad of begin part");
      function(a.hidden, b.hidden, "hidden");
    }
  };

  Backward(const Case& c, bool reversed) : Base(c, reversed) {
    if (!c.nan) return;
    set_all_bits(&grad_y[H], 8);
    set_all_bits(&grad_h_n[H], 8);
    if (B > 2) grad_c_n[2 * H + 3] = of<T>(INFINITY);
  }

  Results nothing() const {
    return {DeviceBuffer<A>(B * H, "grad of c"),
            DeviceBuffer<A>(B * H, "grad of h through zoneout"),
            DeviceBuffer<A>(B * 4 * H, A(0), "grad of reset part"),
            DeviceBuffer<A>(B * H, A(0), "grad of reset c"),
            DeviceBuffer<A>(B * H, A(0), "grad of reset h"),
            DeviceBuffer<Operand>(N * 4 * H, "gate gradients"),
            DeviceBuffer<Operand>(B * 4 * H, "grad of begin part"),
            DeviceBuffer<T>(N * H, "hidden")};
  }

  // Whether the kernel's gate gradients are in the mailbox alone.
  bool in_mailbox(Exchange exchange) const {
    return exchange == Exchange::kMailbox && !s.own_parts && sizeof(Operand) == 2 && H % 8 == 0;
  }

  lstm_ext::cuda::CellBackward<T> cell(const Results& r) const {
    lstm_ext::cuda::CellBackward<T> cell{};
    cell.rows = this->rows();
    cell.hidden_size = H;
    cell.preactivations = z.data();
    cell.cells = cells.data();
    cell.c_previous = this->before_first(cells.data());
    cell.zoneout = this->zoneout(false);
    cell.grad_c_n = s.states ? grad_c_n.data() : nullptr;
    if (s.returned) {
      cell.grad_gate_values = grad_gates.data();
      cell.grad_cells = grad_cells.data();
      cell.hidden = r.hidden.data();
    }
    cell.grad_c = r.grad_c.data();
    cell.grad_recurrent_part = r.dz.data();
    if (s.states) cell.grad_begin_part = r.begin.data();
    if (s.resets == Case::kToState) {
      cell.grad_reset_part = r.reset_part.data();
      cell.grad_reset_c = r.reset_c.data();
    }
    cell.output.grad_output = grad_y.data();
    cell.output.grad_output_stride = s.batch_first ? s.steps * H : H;
    cell.output.grad_h_n = s.states ? grad_h_n.data() : nullptr;
    cell.output.recurrent_mask = s.mask ? this->mask.data() : nullptr;
    cell.output.zoneout = this->zoneout(true);
    if (s.zoneout != Case::kNone) {
      cell.output.grad_h = r.grad_h.data();
      if (s.resets == Case::kToState) cell.output.grad_reset_h = r.reset_h.data();
    }
    return cell;
  }
  Arguments arguments(const Results& r, int64_t first, int64_t end) const {
    const int64_t row = sequence.chunk_row(first, end);
    Arguments args{};
    args.cell = cell(r);
    lstm_ext::cuda::CellBackward<T>& of_row = args.cell;
    of_row.preactivations += row * 4 * H;
    of_row.cells += row * H;
    of_row.c_previous.previous += row * H;
    if (of_row.zoneout.keep) of_row.zoneout.keep += row * H;
    if (of_row.output.zoneout.keep) of_row.output.zoneout.keep += row * H;
    if (of_row.grad_gate_values) of_row.grad_gate_values += row * 4 * H;
    if (of_row.grad_cells) of_row.grad_cells += row * H;
    of_row.grad_recurrent_part += row * 4 * H;
    if (of_row.hidden) of_row.hidden += row * H;
    args.grad_output_by_time = s.batch_first;
    args.grad_output_time_stride = H;
    if (!s.batch_first) of_row.output.grad_output += row * H;
    return args;
  }

  double left(const Results& r, int64_t n, int64_t b, int64_t k) const {
    return operand(r.dz[(sequence.offset(n) + b) * 4 * H + k]);
  }
  int64_t width() const { return 4 * H; }

  void reference(const Results& of_kernel, const Results& r) const {
    const std::vector<double> weight = operands(U, 4 * H, H);
    for (int64_t n = s.steps; n-- > 0;) {
      DeviceBuffer<A> product(B * H, "product");
      for (int64_t b = 0; b < sequence.shared_rows(n, n + 1); ++b) {
        std::vector<double> sums(H, 0.);
        for (int64_t k = 0; k < 4 * H; ++k) {
          const double dz = left(of_kernel, n + 1, b, k);
          for (int64_t j = 0; j < H; ++j) sums[j] += dz * weight[k * H + j];
        }
        for (int64_t j = 0; j < H; ++j) product[b * H + j] = static_cast<A>(sums[j]);
      }
      const int64_t row = sequence.offset(n);
      lstm_ext::cuda::CellBackward<T> step = cell(r);
      step.rows = this->rows_of_step(n);
      step.preactivations += row * 4 * H;
      step.cells += row * H;
      if (n > 0) step.c_previous.previous += sequence.offset(n - 1) * H;
      if (step.zoneout.keep) step.zoneout.keep += row * H;
      if (step.output.zoneout.keep) step.output.zoneout.keep += row * H;
      if (step.grad_gate_values) step.grad_gate_values += row * 4 * H;
      if (step.grad_cells) step.grad_cells += row * H;
      if (step.hidden) step.hidden += row * H;
      step.grad_recurrent_part += row * 4 * H;
      step.output.grad_output += (s.batch_first ? sequence.time(n) : row) * H;
      step.output.recurrent_part = product.data();
      step.output.recurrent_parts = 1;
      lstm_ext::cuda::cell_backward<T>({{step}, 1}, nullptr);
    }
  }

  bool is_spoiled(const Results& r, int64_t first, int64_t end) const {
    const int64_t begin = sequence.chunk_row(first, end), rows = sequence.chunk_rows(first, end);
    return is_nan_between(r.dz, begin * 4 * H, (begin + rows) * 4 * H) && is_nan_between(r.grad_c, 0, B * H) &&
           is_nan_between(r.begin, 0, B * 4 * H) && (s.zoneout == Case::kNone || is_nan_between(r.grad_h, 0, B * H));
  }
};

}  // namespace persistent
