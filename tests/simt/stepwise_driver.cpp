// Runs every stepwise kernel of every type on fenced memory against a loop in float64. SIMT_... variables say how to
// emulate it. Ends with 0: right, 1: wrong numbers, 2: simt::Error. Memory that is not written stays NaN, and is seen.
// FLOAT_ONLY: float alone, which compiles in a fraction of the time.
#include <cmath>
#include <tuple>
#include <vector>

#include "cuda/stepwise_f32.cu"
#if !defined(FLOAT_ONLY)
#include "cuda/stepwise_bf16.cu"
#include "cuda/stepwise_f16.cu"
#include "cuda/stepwise_f64.cu"
#endif
#include "simt/numbers.h"

namespace {

using lstm_ext::cuda::Types;
using simt::DeviceBuffer;

struct Shape {
  int64_t rows, units;               // of the step
  int64_t previous_rows, next_rows;  // see StepRows
  bool states;                       // h0, c0 and gradients of h_n, c_n
  enum { kNever, kToZeros, kToState } resets = kNever;
  enum { kAll, kForward, kReverse } lengths = kAll;
  enum { kNone, kFlags, kShares } zoneout = kNone;
  bool mask = false;
  bool returned = false;  // gradients of gates and cells, and the hidden state once more
  bool norm = false;
  bool projected = false;
  bool options = false;  // the kernels with kOptions, whether they are needed or not

  bool needs_options() const { return options || lengths != kAll || zoneout != kNone || mask || returned; }
};

DeviceBuffer<uint8_t> flags_of_every_third(int64_t count, const char* name) {
  std::vector<uint8_t> flags(count, 0);
  for (int64_t b = 1; b < count; b += 3) flags[b] = 1;
  return DeviceBuffer<uint8_t>(flags, name);
}

// The step is at this time: of the lengths, one is past it, one ends with it, one has yet to go on, one is 0.
constexpr int64_t kTime = 3;
DeviceBuffer<int64_t> lengths_of(int64_t rows) {
  std::vector<int64_t> lengths(rows);
  for (int64_t b = 0; b < rows; ++b) lengths[b] = std::vector<int64_t>{9, 4, 3, 5, 0}[b % 5];
  return DeviceBuffer<int64_t>(lengths, "lengths");
}

// Mean and factor of layer normalisation.
std::pair<double, double> moments(const std::vector<double>& values) {
  double mean = 0, variance = 0;
  for (const double x : values) mean += x / values.size();
  for (const double x : values) variance += (x - mean) * (x - mean) / values.size();
  return {mean, 1 / std::sqrt(variance + 1e-5)};
}

// The rows of a step, written again.
template <typename T>
struct Rows {
  Shape s;
  DeviceBuffer<int64_t> lengths;
  // As many flags as there are rows, and for the step after as many as take part in it: beyond them is a fence.
  DeviceBuffer<uint8_t> flags, flags_after;

  explicit Rows(const Shape& shape)
      : s(shape),
        lengths(lengths_of(s.rows)),
        flags(flags_of_every_third(s.rows, "resets")),
        flags_after(flags_of_every_third(std::max<int64_t>(s.next_rows, 1), "resets after")) {}

  bool counts(int64_t b) const { return s.lengths == Shape::kAll || lengths[b] > kTime; }
  bool has_previous(int64_t b) const {
    return b < s.previous_rows && !(s.lengths == Shape::kReverse && lengths[b] <= kTime + 1);
  }
  bool has_next(int64_t b) const {
    return b < s.next_rows && !(s.lengths == Shape::kForward && lengths[b] <= kTime + 1);
  }
  bool is_reset(int64_t b) const {
    return s.resets != Shape::kNever && flags[b] != 0 && (s.lengths != Shape::kReverse || has_previous(b));
  }
  bool is_reset_after(int64_t b) const { return s.resets != Shape::kNever && b < s.next_rows && flags_after[b] != 0; }
  lstm_ext::cuda::StepRows args() const {
    lstm_ext::cuda::StepRows args{};
    args.count = s.rows;
    args.previous_count = s.previous_rows;
    args.next_count = s.next_rows;
    if (s.resets != Shape::kNever) args.resets = {flags.data(), s.rows};
    if (s.resets != Shape::kNever) args.resets_after = {flags_after.data(), s.next_rows};
    if (s.lengths != Shape::kAll) args.lengths = lengths.data();
    args.time = kTime;
    args.reverse = s.lengths == Shape::kReverse;
    args.options = s.needs_options();
    return args;
  }
};

template <typename T>
void check_cell(const Shape& s) {
  using A = typename Types<T>::Accumulate;
  using D = typename Types<T>::Gradient;
  const Rows<T> rows(s);
  const int64_t R = s.rows, H = s.units, apart = H + 3;
  const bool to_state = s.resets == Shape::kToState, zoned = s.zoneout != Shape::kNone;
  const auto input = random_values<A>(R * 5 * H, "input part");  // rows 5H apart
  const auto recurrent = random_values<A>(R * 4 * H, "recurrent part");
  const auto begin_part = random_values<A>(R * 4 * H, "begin part");
  const auto reset_part = random_values<A>(R * 4 * H, "reset part");
  const auto bias_ih = random_values<T>(4 * H, "bias_ih"), bias_hh = random_values<T>(4 * H, "bias_hh");
  const auto previous = random_values<A>(std::max<int64_t>(s.previous_rows, 1) * H, "previous c");
  const auto c0 = random_values<T>(R * H, "c0"), h0 = random_values<T>(R * H, "h0");
  const auto reset_c = random_values<T>(R * H, "reset_c"), reset_h = random_values<T>(R * H, "reset_h");
  const auto keep_h = flags_of_every_third(R * H, "keep h"), keep_c = flags_of_every_third(R * H + 1, "keep c");
  const auto mask = random_values<A>(R * H, "mask");
  const auto running = random_values<A>(R * H, "running h");
  const std::vector<A> running_before = running.values();
  const auto gain_ih = random_values<A>(4 * H, "gain_ih"), gain_hh = random_values<A>(4 * H, "gain_hh");
  const auto gain_c = random_values<A>(H, "gain_c"), bias_c = random_values<A>(H, "bias_c");
  DeviceBuffer<A> c(R * H, "c"), factors(R * 2, "factors"), workspace(R * 2 * H, "workspace");
  DeviceBuffer<T> h(R * apart, "h"), saved(R * 4 * H, "preactivations"), h_n(R * H, "h_n"), c_n(R * H, "c_n");
  DeviceBuffer<T> recurrent_h(R * H, "masked h"), norm_x(R * 4 * H, "norm input"), norm_h(R * 4 * H, "norm recurrent");

  const auto share = [&](const DeviceBuffer<uint8_t>& keep, double share, int64_t place) {
    return !zoned ? 0.0 : s.zoneout == Shape::kShares ? share : keep[place] ? 1.0 : 0.0;
  };
  const auto zoneout = [&](const DeviceBuffer<uint8_t>& keep, double share) {
    lstm_ext::Zoneout<A> z{};
    if (s.zoneout == Shape::kFlags) z.keep = keep.data();
    if (s.zoneout == Shape::kShares) z.share = static_cast<A>(share);
    return z;
  };
  constexpr double kShareH = 0.25, kShareC = 0.375;

  lstm_ext::cuda::CellForward<T> f{};
  f.rows = rows.args();
  f.hidden_size = H;
  f.input_part = input.data();
  f.input_stride = 5 * H;
  f.recurrent_part = recurrent.data();
  f.begin_part = s.states ? begin_part.data() : nullptr;
  f.reset_part = to_state ? reset_part.data() : nullptr;
  f.bias_ih = bias_ih.data();
  f.bias_hh = bias_hh.data();
  f.c_previous = {previous.data(), s.states ? c0.data() : nullptr, to_state ? reset_c.data() : nullptr};
  f.zoneout = zoneout(keep_c, kShareC);
  f.c = c.data();
  f.c_n = c_n.data();
  f.preactivations = saved.data();
  lstm_ext::cuda::NewOutput<T> y{};
  y.h = h.data();
  y.h_stride = apart;
  y.h_n = h_n.data();
  y.zoneout = zoneout(keep_h, kShareH);
  y.running_h = zoned ? running.data() : nullptr;
  y.h0 = s.states ? h0.data() : nullptr;
  y.reset_h = to_state ? reset_h.data() : nullptr;
  y.recurrent_mask = s.mask ? mask.data() : nullptr;
  y.recurrent_h = s.mask ? recurrent_h.data() : nullptr;
  y.recurrent_stride = H;
  DeviceBuffer<T> hidden(R * H, "hidden");
  if (s.projected) {
    f.output.h = hidden.data();
    f.output.h_stride = H;
  } else {
    f.output = y;
  }
  if (s.norm) {
    lstm_ext::cuda::norm_cell_forward<T>(
        {{{f,
           {gain_ih.data(), gain_hh.data(), gain_c.data(), s.states ? bias_c.data() : nullptr},
           norm_x.data(),
           norm_h.data(),
           factors.data(),
           workspace.data()}},
         1},
        nullptr);
  } else {
    lstm_ext::cuda::cell_forward<T>({{f}, 1}, nullptr);
  }
  const auto projected = random_values<A>(R * H, "projected");
  if (s.projected) lstm_ext::cuda::output_forward<T>({{{rows.args(), H, projected.data(), y}}, 1}, nullptr);

  const auto previous_of = [&](int64_t b, int64_t place) {
    if (rows.is_reset(b)) return to_state ? to_double(reset_c[place]) : 0.0;
    if (rows.has_previous(b)) return to_double(previous[place]);
    return s.states ? to_double(c0[place]) : 0.0;
  };
  const auto previous_h_of = [&](int64_t b, int64_t place) {
    if (rows.is_reset(b)) return to_state ? to_double(reset_h[place]) : 0.0;
    if (rows.has_previous(b)) return to_double(running_before[place]);
    return s.states ? to_double(h0[place]) : 0.0;
  };
  const auto unwritten = [](auto x) { return std::isnan(to_double(x)); };
  for (int64_t b = 0; b < R; ++b) {
    if (!rows.counts(b)) {
      for (int64_t j = 0; j < H; ++j) {
        expect_equal(c[b * H + j], 0, "c of a row that takes no part");
        expect_equal(h[b * apart + j], 0, "h of a row that takes no part");
        if (s.projected) expect_equal(hidden[b * H + j], 0, "hidden of a row that takes no part");
        if (s.mask) expect_equal(recurrent_h[b * H + j], 0, "masked h of a row that takes no part");
        for (int q = 0; q < 4; ++q) {
          expect_equal(saved[(b * 4 + q) * H + j], q == 2 ? 0 : -INFINITY, "preactivation past the end");
          if (s.norm) expect_equal(norm_x[(b * 4 + q) * H + j], 0, "normalised product past the end");
          if (s.norm) expect_equal(norm_h[(b * 4 + q) * H + j], 0, "normalised product past the end");
        }
        checks::expect(unwritten(h_n[b * H + j]) && unwritten(c_n[b * H + j]), "a final state was written");
      }
      continue;
    }
    std::vector<double> from_x(4 * H), from_h(4 * H, 0.0);
    for (int64_t k = 0; k < 4 * H; ++k) {
      from_x[k] = to_double(input[b * 5 * H + k]);
      const int64_t place = b * 4 * H + k;
      if (rows.is_reset(b)) {
        if (to_state) from_h[k] = to_double(reset_part[place]);
      } else if (rows.has_previous(b)) {
        from_h[k] = to_double(recurrent[place]);
      } else if (s.states) {
        from_h[k] = to_double(begin_part[place]);
      }
    }
    if (s.norm) {
      int which = 0;
      for (std::vector<double>* product : {&from_x, &from_h}) {
        const auto [mean, factor] = moments(*product);
        expect_near(factors[b * 2 + which], factor, "factor", factor);
        const DeviceBuffer<T>& hat = which == 0 ? norm_x : norm_h;
        for (int64_t k = 0; k < 4 * H; ++k) {
          const double normalised = ((*product)[k] - mean) * factor;
          expect_near(hat[b * 4 * H + k], normalised, "normalised product");
          (*product)[k] = normalised * to_double((which == 0 ? gain_ih : gain_hh)[k]);
        }
        ++which;
      }
    }
    std::vector<double> z(4 * H), new_c(H);
    for (int64_t k = 0; k < 4 * H; ++k) {
      z[k] = from_x[k] + from_h[k] + to_double(bias_ih[k]) + to_double(bias_hh[k]);
      expect_near(saved[b * 4 * H + k], z[k], "preactivation", 4);
    }
    for (int64_t j = 0; j < H; ++j) {
      const int64_t place = b * H + j;
      new_c[j] = sigmoid(z[H + j]) * previous_of(b, place) + sigmoid(z[j]) * std::tanh(z[2 * H + j]);
      const double k = share(keep_c, kShareC, place);
      const double state = k * previous_of(b, place) + (1 - k) * new_c[j];
      expect_near(c[place], state, "c", 1);
      if (rows.has_next(b)) {
        checks::expect(unwritten(c_n[place]), "the final state of a row that goes on was written");
      } else {
        expect_near(c_n[place], state, "c_n", 1);
      }
    }
    const auto [mean, factor] = moments(new_c);
    for (int64_t j = 0; j < H; ++j) {
      const int64_t place = b * H + j;
      double visible = new_c[j];
      if (s.norm) visible = to_double(gain_c[j]) * (visible - mean) * factor + (s.states ? to_double(bias_c[j]) : 0);
      double now = sigmoid(z[3 * H + j]) * std::tanh(visible);
      const double terms = s.norm ? 4 : 0;
      if (s.projected) expect_near(hidden[place], now, "hidden", terms);
      if (s.projected) now = to_double(projected[place]);
      const double k = share(keep_h, kShareH, place);
      const double output = k * previous_h_of(b, place) + (1 - k) * now;
      expect_near(h[b * apart + j], output, "h", terms);
      if (zoned) expect_near(running[place], output, "running h", terms);
      if (s.mask) expect_near(recurrent_h[place], output * to_double(mask[place]), "masked h", terms);
      if (rows.has_next(b)) {
        checks::expect(unwritten(h_n[place]), "the final state of a row that goes on was written");
      } else {
        expect_near(h_n[place], output, "h_n", terms);
      }
    }
  }

  // ---- backward
  const auto grad_output = random_values<T>(R * apart, "grad_output");
  const auto grad_recurrent = random_values<A>(R * H, "recurrent part of dh");
  const auto grad_hidden = random_values<A>(R * H, "grad_hidden");
  const auto grad_h_n = random_values<T>(R * H, "grad_h_n"), grad_c_n = random_values<T>(R * H, "grad_c_n");
  const auto grad_values = random_values<T>(R * 4 * H, "gradients of gates");
  const auto grad_cells = random_values<A>(R * H, "gradients of cells");
  const auto grad_c = random_values<A>(R * H, "grad_c"), grad_h = random_values<A>(R * H, "grad_h");
  const auto grad_reset_part = random_values<A>(R * 4 * H, "grad_reset_part");
  const auto grad_reset_c = random_values<A>(R * H, "grad_reset_c");
  const auto grad_reset_h = random_values<A>(R * H, "grad_reset_h");
  const auto grad_c_before = grad_c.values(), grad_h_before = grad_h.values(),
             reset_part_before = grad_reset_part.values(), grad_reset_c_before = grad_reset_c.values(),
             grad_reset_h_before = grad_reset_h.values();
  DeviceBuffer<D> grad_part(R * 4 * H, "grad_part"), grad_begin_part(R * 4 * H, "grad_begin_part");
  DeviceBuffer<D> grad_input(R * 4 * H, "gradients of the input's part"), sum(R * H, "sum");
  DeviceBuffer<A> grad_z(R * 4 * H, "gradients of preactivations"), grad_tanh_input(R * H, "grad_tanh_input");
  DeviceBuffer<T> norm_c(R * H, "norm cell"), recomputed_hidden(R * H, "recomputed hidden");

  lstm_ext::cuda::GradOutput<T> o{};
  o.grad_output = grad_output.data();
  o.grad_output_stride = apart;
  o.grad_h_n = s.states ? grad_h_n.data() : nullptr;
  o.recurrent_part = grad_recurrent.data();
  o.recurrent_mask = y.recurrent_mask;
  o.zoneout = y.zoneout;
  o.grad_h = zoned ? grad_h.data() : nullptr;
  o.grad_reset_h = zoned && to_state ? grad_reset_h.data() : nullptr;
  lstm_ext::cuda::CellBackward<T> g{};
  g.rows = f.rows;
  g.hidden_size = H;
  g.preactivations = saved.data();
  g.cells = c.data();
  g.c_previous = f.c_previous;
  g.zoneout = f.zoneout;
  if (s.projected) {
    g.grad_hidden = grad_hidden.data();
    lstm_ext::cuda::output_gradient<T>({{{f.rows, H, o, sum.data()}}, 1}, nullptr);
  } else {
    g.output = o;
  }
  g.grad_c_n = s.states ? grad_c_n.data() : nullptr;
  g.grad_gate_values = s.returned ? grad_values.data() : nullptr;
  g.grad_cells = s.returned ? grad_cells.data() : nullptr;
  g.grad_c = grad_c.data();
  g.grad_recurrent_part = grad_part.data();
  g.grad_begin_part = grad_begin_part.data();
  g.grad_reset_part = to_state ? grad_reset_part.data() : nullptr;
  g.grad_reset_c = to_state ? grad_reset_c.data() : nullptr;
  g.hidden = s.returned && !s.norm ? recomputed_hidden.data() : nullptr;
  if (s.norm) {
    lstm_ext::cuda::norm_cell_backward<T>(
        {{{g,
           {gain_ih.data(), gain_hh.data(), gain_c.data(), s.states ? bias_c.data() : nullptr},
           norm_x.data(),
           norm_h.data(),
           factors.data(),
           grad_input.data(),
           grad_z.data(),
           grad_tanh_input.data(),
           norm_c.data()}},
         1},
        nullptr);
  } else {
    lstm_ext::cuda::cell_backward<T>({{g}, 1}, nullptr);
  }

  for (int64_t b = 0; b < R; ++b) {
    const bool reset = rows.is_reset(b), summed = to_state && reset;
    std::vector<double> new_c(H), visible_grad(H), hat(H), output_gate_grad(H), grad(4 * H);
    std::vector<std::vector<double>> gates(H);
    for (int64_t j = 0; j < H; ++j) {
      const int64_t place = b * H + j;
      for (int q = 0; q < 4; ++q) {
        const double z = to_double(saved[(b * 4 + q) * H + j]);
        gates[j].push_back(q == 2 ? std::tanh(z) : sigmoid(z));
      }
      new_c[j] = zoned ? gates[j][1] * previous_of(b, place) + gates[j][0] * gates[j][2] : to_double(c[place]);
    }
    const auto [mean, factor] = moments(new_c);
    double sum_grad = 0, sum_hat = 0;
    for (int64_t j = 0; j < H; ++j) {
      const int64_t place = b * H + j;
      double dh = to_double(grad_output[b * apart + j]);
      if (rows.has_next(b)) {
        if (!rows.is_reset_after(b)) {
          dh += to_double(grad_recurrent[place]) * (s.mask ? to_double(mask[place]) : 1);
        }
        if (zoned) dh += to_double(grad_h_before[place]);
      } else if (s.states) {
        dh += to_double(grad_h_n[place]);
      }
      const double k = share(keep_h, kShareH, place);
      if (!rows.counts(b)) {
        if (zoned) expect_equal(grad_h[place], to_double(grad_h_before[place]), "what zoneout keeps, past the end");
        dh = 0;
      } else if (zoned) {
        expect_near(grad_h[place], reset ? 0 : k * dh, "what zoneout keeps of dh", 4);
        expect_near(grad_reset_h[place], to_double(grad_reset_h_before[place]) + (summed ? k * dh : 0), "grad_reset_h",
                    4);
      }
      dh *= 1 - k;
      if (s.projected) {
        expect_near(sum[place], dh, "gradient of the output", 4);
        dh = to_double(grad_hidden[place]);
      }
      hat[j] = (new_c[j] - mean) * factor;
      const double visible = s.norm ? to_double(gain_c[j]) * hat[j] + (s.states ? to_double(bias_c[j]) : 0) : new_c[j];
      const double tanh_c = std::tanh(visible);
      visible_grad[j] = dh * gates[j][3] * (1 - tanh_c * tanh_c);
      output_gate_grad[j] = dh * tanh_c;
      sum_grad += visible_grad[j] * to_double(gain_c[j]) / H;
      sum_hat += visible_grad[j] * to_double(gain_c[j]) * hat[j] / H;
      if (!rows.counts(b)) continue;
      if (g.hidden) expect_near(recomputed_hidden[place], gates[j][3] * tanh_c, "recomputed hidden");
      if (s.norm) expect_near(grad_tanh_input[place], visible_grad[j], "grad_tanh_input", 16);
      if (s.norm) expect_near(norm_c[place], hat[j], "norm cell", 4);
    }
    if (!rows.counts(b)) {
      for (int64_t j = 0; j < H; ++j) {
        expect_equal(grad_c[b * H + j], to_double(grad_c_before[b * H + j]), "grad_c past the end");
        if (g.hidden) expect_equal(recomputed_hidden[b * H + j], 0, "recomputed hidden, past the end");
        for (int64_t at = (b * 4) * H + j; at < (b + 1) * 4 * H; at += H) {
          expect_equal(grad_part[at], 0, "gradient past the end");
          checks::expect(unwritten(grad_begin_part[at]), "a row began past its end");
          if (s.norm) expect_equal(grad_input[at], 0, "gradient past the end");
          if (s.norm) expect_equal(grad_z[at], 0, "gradient past the end");
        }
        if (s.norm) expect_equal(grad_tanh_input[b * H + j], 0, "grad_tanh_input past the end");
        if (s.norm) expect_equal(norm_c[b * H + j], 0, "norm cell past the end");
      }
      continue;
    }
    const double terms = s.norm ? 16 * factor : 4;  // of a sum, the largest
    for (int64_t j = 0; j < H; ++j) {
      const int64_t place = b * H + j;
      const auto [i, forget, cell, out] = std::tuple(gates[j][0], gates[j][1], gates[j][2], gates[j][3]);
      double after = s.returned ? to_double(grad_cells[place]) : 0;
      if (rows.has_next(b)) {
        after += to_double(grad_c_before[place]);
      } else if (s.states) {
        after += to_double(grad_c_n[place]);
      }
      const double k = share(keep_c, kShareC, place);
      double dc = visible_grad[j];
      if (s.norm) dc = factor * (dc * to_double(gain_c[j]) - sum_grad - hat[j] * sum_hat);
      dc += (1 - k) * after;
      double d[4] = {dc * cell, dc * previous_of(b, place), dc * i, output_gate_grad[j]};
      for (int q = 0; q < 4; ++q) {
        if (s.returned) d[q] += to_double(grad_values[(b * 4 + q) * H + j]);
        const double value = gates[j][q];
        grad[q * H + j] = d[q] * (q == 2 ? 1 - value * value : value * (1 - value));
      }
      const double before = dc * forget + k * after;
      expect_near(grad_c[place], reset ? 0 : before, "grad_c", terms);
      expect_near(grad_reset_c[place], to_double(grad_reset_c_before[place]) + (summed ? before : 0), "grad_reset_c",
                  terms);
    }
    double sums[4] = {};
    for (int64_t k = 0; s.norm && k < 4 * H; ++k) {
      expect_near(grad_z[b * 4 * H + k], grad[k], "gradient of a preactivation", terms);
      const double to_x = grad[k] * to_double(gain_ih[k]), to_h = grad[k] * to_double(gain_hh[k]);
      sums[0] += to_x / (4 * H);
      sums[1] += to_x * to_double(norm_x[b * 4 * H + k]) / (4 * H);
      sums[2] += to_h / (4 * H);
      sums[3] += to_h * to_double(norm_h[b * 4 * H + k]) / (4 * H);
    }
    for (int64_t k = 0; k < 4 * H; ++k) {
      const int64_t at = b * 4 * H + k;
      double expected = grad[k], size = terms;
      if (s.norm) {
        const double factor_x = to_double(factors[b * 2]), factor_h = to_double(factors[b * 2 + 1]);
        size = terms * std::max(1.0, std::max(factor_x, factor_h));
        expect_near(grad_input[at],
                    factor_x * (grad[k] * to_double(gain_ih[k]) - sums[0] - to_double(norm_x[at]) * sums[1]),
                    "gradient of the input's part", size);
        expected = factor_h * (grad[k] * to_double(gain_hh[k]) - sums[2] - to_double(norm_h[at]) * sums[3]);
      }
      expect_near(grad_part[at], expected, "gradient of U h", size);
      expect_near(grad_reset_part[at], to_double(reset_part_before[at]) + (summed ? expected : 0), "grad_reset_part",
                  size);
      if (rows.has_previous(b)) {
        checks::expect(unwritten(grad_begin_part[at]), "a row began that goes on");
      } else {
        expect_near(grad_begin_part[at], reset ? 0 : expected, "grad_begin_part", size);
      }
    }
  }
}

template <typename T>
void check_previous_outputs() {
  using D = typename Types<T>::Gradient;
  constexpr int64_t P = 35, apart = 40;
  const int64_t rows[] = {2, 5, 1}, previous[] = {0, 2, 1};
  const auto h = random_values<T>(5 * apart, "h"), h0 = random_values<T>(5 * P, "h0");
  const auto reset_h = random_values<T>(5 * P, "reset_h");
  const auto flags = flags_of_every_third(5, "resets");
  const DeviceBuffer<int64_t> lengths(std::vector<int64_t>{9, 4, 3, 5, 9}, "lengths");
  const auto mask = random_values<typename Types<T>::Accumulate>(5 * P, "mask");
  DeviceBuffer<D> result(8 * P, "previous outputs");
  for (const int variant : {0, 1, 2, 3}) {
    const bool given = variant != 0, options = variant > 1, reverse = variant == 3;
    lstm_ext::cuda::PreviousOutputs<T> args{};
    if (options) args.lengths = lengths.data();
    if (options) args.recurrent_mask = mask.data();
    args.reverse = reverse;
    args.output_size = P;
    args.previous_stride = apart;
    args.h0 = given ? h0.data() : nullptr;
    args.reset_h = given ? reset_h.data() : nullptr;
    int64_t place = 0;
    for (int n = 0; n < 3; ++n) {
      // Only the second step has flags.
      const lstm_ext::ResetFlags resets{n == 1 ? flags.data() : nullptr, n == 1 ? rows[n] : 0};
      args.steps[args.count++] = {rows[n], previous[n], h.data(), result.data() + place * P, resets, kTime};
      place += rows[n];
    }
    lstm_ext::cuda::previous_outputs(args, nullptr);
    place = 0;
    for (int n = 0; n < 3; ++n) {
      for (int64_t b = 0; b < rows[n]; ++b, ++place) {
        for (int64_t j = 0; j < P; ++j) {
          double expected = given ? to_double(h0[b * P + j]) : 0;
          const bool has_previous = b < previous[n] && !(reverse && lengths[b] <= kTime + 1);
          if (has_previous) expected = to_double(h[b * apart + j]);
          if (n == 1 && flags[b] && (!reverse || has_previous)) expected = given ? to_double(reset_h[b * P + j]) : 0;
          if (options && lengths[b] <= kTime) expected = 0;
          if (options) {
            expect_near(result[place * P + j], expected * to_double(mask[b * P + j]), "masked previous output",
                        eps<T>() / eps<D>());
          } else {
            expect_equal(result[place * P + j], expected, "previous output");
          }
        }
      }
    }
  }
}

template <typename T>
void check_sums(int64_t rows, int64_t columns) {
  using A = typename Types<T>::Accumulate;
  using D = typename Types<T>::Gradient;
  const auto values = random_values<D>(rows * columns, "values");
  const auto wide = random_values<A>(rows * columns, "wide values");
  const auto factors = random_values<T>(rows * columns, "factors");
  const std::vector<A> before = random_values<A>(columns, "sums").values();
  DeviceBuffer<A> partial(lstm_ext::cuda::column_sum_parts(rows) * columns, "partial sums");
  enum { kColumns, kWide, kProducts };
  for (const int kind : {kColumns, kWide, kProducts}) {
    const DeviceBuffer<A> sums(before, "sums");
    if (kind == kColumns) {
      lstm_ext::cuda::column_sums<T>({rows, columns, values.data(), partial.data(), sums.data()}, nullptr);
    } else {
      lstm_ext::cuda::product_sums<T>(
          {rows, columns, wide.data(), kind == kProducts ? factors.data() : nullptr, partial.data(), sums.data()},
          nullptr);
    }
    for (int64_t j = 0; j < columns; ++j) {
      double expected = to_double(before[j]), size = std::fabs(expected);
      for (int64_t at = j; at < rows * columns; at += columns) {
        double term = kind == kColumns ? to_double(values[at]) : to_double(wide[at]);
        if (kind == kProducts) term *= to_double(factors[at]);
        expected += term;
        size += std::fabs(term);
      }
      checks::expect(std::fabs(to_double(sums[j]) - expected) <= 8 * eps<A>() * size, "column sum");
    }
  }
}

template <typename T>
void check_all() {
  check_cell<T>({1, 1, 0, 0, false});
  check_cell<T>({5, 37, 3, 2, true});  // some rows begin, some end; one warp and a bit
  check_cell<T>({5, 37, 3, 2, false});
  check_cell<T>({3, 130, 3, 3, true});    // more units than a block is wide
  check_cell<T>({11, 33, 0, 11, false});  // more rows than a block is high
  check_cell<T>({8, 37, 6, 4, true, Shape::kToState});
  check_cell<T>({8, 37, 6, 4, false, Shape::kToZeros});
  Shape s{8, 37, 6, 4, true, Shape::kToState};
  s.options = true;  // with nothing set it is the plain layer
  check_cell<T>(s);
  s.zoneout = Shape::kFlags;
  s.mask = true;
  check_cell<T>(s);
  s.lengths = Shape::kForward;
  s.zoneout = Shape::kShares;
  s.returned = true;
  s.next_rows = 8;
  check_cell<T>(s);
  s.lengths = Shape::kReverse;
  s.previous_rows = 8;
  s.projected = true;
  check_cell<T>(s);
  // With layer normalisation: alone, a warp and a bit; with all else; more units than threads.
  s.norm = true;
  check_cell<T>(s);
  s.lengths = Shape::kForward;
  s.projected = false;
  check_cell<T>(s);
  s = {3, 37, 2, 1, false};
  s.norm = true;
  check_cell<T>(s);
  s = {2, 300, 1, 1, true};
  s.norm = true;
  check_cell<T>(s);
  check_previous_outputs<T>();
  check_sums<T>(3, 5);
  check_sums<T>(700, 40);  // two parts, a block of columns and a bit
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
