// The CPU kernels without torch, against a plain loop in float64: forward and backward, one and two threads, both
// directions, sizes that fill no register, the plain cell and one with everything that a cell may have; and weights
// that are frozen in each kind of numbers. test_aarch64.py compiles it for AArch64 and runs it under qemu.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cpu/frozen.h"
#include "cpu/kernels.h"
#include "cpu/plan.h"

namespace {

using namespace lstm_ext;
using Numbers = std::vector<double>;

struct Size {
  int64_t T, B, I, H;
};
constexpr Size kSizes[] = {{1, 1, 5, 7},    {3, 2, 13, 19},   {20, 1, 32, 64}, {7, 5, 33, 37},
                           {5, 33, 24, 48}, {12, 40, 40, 64}, {2, 70, 3, 130}, {4, 13, 100, 96}};

struct Case {
  Size size;
  int threads;
  bool reverse, training, other_cell;
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// The other cell: peepholes, a hard sigmoid, softsign and elu, a bound of c_t and of what the gates take.
constexpr double kClip = 0.9, kBound = 1.2, kSlope = 0.2, kOffset = 0.5, kElu = 0.7;
double gate_of(bool other, int gate, double z, double& slope) {
  if (!other) {
    const double y = gate == 2 ? std::tanh(z) : sigmoid(z);
    slope = gate == 2 ? 1 - y * y : y * (1 - y);
    return y;
  }
  const bool inside = std::fabs(z) < kBound;
  z = std::fmax(-kBound, std::fmin(kBound, z));
  if (gate == 2) {
    slope = inside ? 1 / ((1 + std::fabs(z)) * (1 + std::fabs(z))) : 0;
    return z / (1 + std::fabs(z));
  }
  slope = inside ? kSlope : 0;  // within the bound, its line never reaches 0 or 1
  return kSlope * z + kOffset;
}
double squash(bool other, double c, double& slope) {
  if (!other) {
    const double y = std::tanh(c);
    slope = 1 - y * y;
    return y;
  }
  slope = c > 0 ? 1 : kElu * std::exp(c);
  return c > 0 ? c : kElu * std::expm1(c);
}

// What a layer is given, and what it gives, in float64.
struct Layer {
  double nearest = 1;  // of a number to an edge, where rounding decides about its gradient
  Numbers x, w, u, b, peephole, h0, c0, grad_output;
  Numbers output, h_n, c_n, grad_x, grad_w, grad_u, grad_b, grad_h0, grad_c0, grad_peephole;
};

void plain_loop(const Case& c, Layer& l) {
  const auto [T, B, I, H] = c.size;
  const auto time = [&, T = T](int64_t s) { return c.reverse ? T - 1 - s : s; };
  l.output.assign(T * B * H, 0);
  l.nearest = 1;
  const auto edge = [&](double distance) { l.nearest = std::min(l.nearest, std::fabs(distance)); };
  Numbers h = l.h0, cell = l.c0, before_h(T * B * H), before_c(T * B * H), now(T * B * H), open(T * B * H);
  Numbers gates(T * B * 4 * H), slopes(T * B * 4 * H);
  for (int64_t s = 0; s < T; ++s) {
    for (int64_t b = 0; b < B; ++b) {
      const int64_t r = time(s) * B + b;
      const Numbers h_before(h.begin() + b * H, h.begin() + (b + 1) * H);
      std::copy(h_before.begin(), h_before.end(), before_h.begin() + r * H);
      for (int64_t j = 0; j < H; ++j) {
        const double old = cell[b * H + j];
        before_c[r * H + j] = old;
        double* const g = &gates[r * 4 * H + j];
        const auto value = [&](int gate, double seen) {
          const int64_t row = gate * H + j;
          double z = l.b[row];
          for (int64_t i = 0; i < I; ++i) z += l.w[row * I + i] * l.x[r * I + i];
          for (int64_t i = 0; i < H; ++i) z += l.u[row * H + i] * h_before[i];
          if (c.other_cell && gate != 2) z += l.peephole[(gate == 3 ? 2 : gate) * H + j] * seen;
          edge(std::fabs(z) - kBound);
          g[gate * H] = gate_of(c.other_cell, gate, z, slopes[r * 4 * H + row]);
        };
        for (int gate = 0; gate < 3; ++gate) value(gate, old);
        double fresh = g[H] * old + g[0] * g[2 * H];
        edge(std::fabs(fresh) - kClip), edge(fresh);
        open[r * H + j] = !c.other_cell || std::fabs(fresh) <= kClip;
        if (c.other_cell) fresh = std::fmax(-kClip, std::fmin(kClip, fresh));
        value(3, fresh);
        double slope;
        cell[b * H + j] = now[r * H + j] = fresh;
        h[b * H + j] = l.output[r * H + j] = g[3 * H] * squash(c.other_cell, fresh, slope);
      }
    }
  }
  l.h_n = h;
  l.c_n = cell;
  Numbers dh(B * H), dc(B * H), dz(4 * H);
  for (Numbers* grad : {&l.grad_x, &l.grad_w, &l.grad_u, &l.grad_b, &l.grad_peephole}) grad->clear();
  l.grad_x.resize(l.x.size()), l.grad_w.resize(l.w.size()), l.grad_u.resize(l.u.size()), l.grad_b.resize(l.b.size());
  l.grad_peephole.resize(3 * H);
  for (int64_t s = T - 1; s >= 0; --s) {
    for (int64_t b = 0; b < B; ++b) {
      const int64_t r = time(s) * B + b;
      for (int64_t j = 0; j < H; ++j) {
        const double* const g = &gates[r * 4 * H + j];
        const double* const slope = &slopes[r * 4 * H + j];
        double slope_h;
        const double squashed = squash(c.other_cell, now[r * H + j], slope_h);
        const double d = dh[b * H + j] + l.grad_output[r * H + j];
        double state = dc[b * H + j] + d * g[3 * H] * slope_h;
        dz[3 * H + j] = d * squashed * slope[3 * H];
        if (c.other_cell) state += l.peephole[2 * H + j] * dz[3 * H + j];
        state = open[r * H + j] ? state : 0;
        dz[j] = state * g[2 * H] * slope[0];
        dz[H + j] = state * before_c[r * H + j] * slope[H];
        dz[2 * H + j] = state * g[0] * slope[2 * H];
        dc[b * H + j] = state * g[H];
        if (!c.other_cell) continue;
        dc[b * H + j] += l.peephole[j] * dz[j] + l.peephole[H + j] * dz[H + j];
        for (int gate : {0, 1}) l.grad_peephole[gate * H + j] += dz[gate * H + j] * before_c[r * H + j];
        l.grad_peephole[2 * H + j] += dz[3 * H + j] * now[r * H + j];
      }
      Numbers before(H);
      for (int64_t z = 0; z < 4 * H; ++z) {
        l.grad_b[z] += dz[z];
        for (int64_t i = 0; i < I; ++i) {
          l.grad_w[z * I + i] += dz[z] * l.x[r * I + i];
          l.grad_x[r * I + i] += dz[z] * l.w[z * I + i];
        }
        for (int64_t i = 0; i < H; ++i) {
          l.grad_u[z * H + i] += dz[z] * before_h[r * H + i];
          before[i] += dz[z] * l.u[z * H + i];
        }
      }
      std::copy(before.begin(), before.end(), dh.begin() + b * H);
    }
  }
  l.grad_h0 = dh;
  l.grad_c0 = dc;
}

struct alignas(64) Line {
  char bytes[64];
};

template <typename Params, typename Plan>
void run(const Params& params, const Plan& plan, void (*kernel)(const Params&, const Plan&, char*, int)) {
  std::vector<Line> workspace(plan.workspace_bytes / 64 + 1);
  std::memset(workspace.data(), 0, plan.barrier_bytes);
  std::vector<std::thread> others;
  for (int worker = 1; worker < plan.grid.workers(); ++worker) {
    others.emplace_back([&, worker] { kernel(params, plan, workspace[0].bytes, worker); });
  }
  kernel(params, plan, workspace[0].bytes, 0);
  for (std::thread& other : others) other.join();
}

// ‖got - expected‖ / ‖expected‖
template <typename T>
double error_of(const std::vector<T>& got, const Numbers& expected) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += (got[i] - expected[i]) * (got[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference) / std::max(std::sqrt(norm), 1e-30);
}

template <typename T>
bool check(const Case& c) {
  const auto [T_, B, I, H] = c.size;
  const double scale = 1 / std::sqrt(static_cast<double>(H));
  Layer l{};
  for (unsigned seed = 1; seed == 1 || (c.other_cell && l.nearest < 1e-5); ++seed) {
    std::mt19937 random(seed);
    const auto draw = [&](int64_t count, double deviation) {
      std::normal_distribution<double> normal(0, deviation);
      Numbers numbers(count);
      for (double& x : numbers) x = static_cast<T>(normal(random));
      return numbers;
    };
    l.x = draw(T_ * B * I, 1), l.w = draw(4 * H * I, scale), l.u = draw(4 * H * H, scale), l.b = draw(4 * H, 0.2);
    l.peephole = draw(3 * H, 0.5), l.h0 = draw(B * H, 0.5), l.c0 = draw(B * H, 0.5);
    l.grad_output = draw(T_ * B * H, 1);
    plain_loop(c, l);
  }

  const auto in_type = [](const Numbers& numbers) { return std::vector<T>(numbers.begin(), numbers.end()); };
  const auto x = in_type(l.x), w = in_type(l.w), u = in_type(l.u), b = in_type(l.b), peephole = in_type(l.peephole),
             h0 = in_type(l.h0), c0 = in_type(l.c0), grad_output = in_type(l.grad_output);
  const std::vector<T> none(4 * H);
  std::vector<T> output(T_ * B * H), h_n(B * H), c_n(B * H), gates(T_ * B * 4 * H), cells(T_ * B * H);
  ForwardParams<T> p{};
  p.shape = {T_, B, I, H, H, false, c.reverse, nullptr, nullptr};
  p.weights.weight_ih = w.data(), p.weights.weight_hh = u.data();
  p.weights.bias_ih = b.data(), p.weights.bias_hh = none.data();
  p.input = {x.data(), B * I, I};
  p.h0 = h0.data(), p.c0 = c0.data(), p.bf16_parts = 3;
  p.output = {output.data(), B * H, H};
  p.h_n = h_n.data(), p.c_n = c_n.data();
  if (c.other_cell) {
    using cell::Function;
    auto& options = p.options.cell;
    for (int n = 0; n < cell::kParameters; ++n) options.parameters[n] = peephole.data() + n * H;
    options.cell_clip = kClip, options.preactivation_clip = kBound, options.exact_gates = true;
    options.other_activations = true;
    options.gate_activation = {Function::kHardSigmoid, kSlope, kOffset};
    options.candidate_activation = {Function::kSoftsign, 0, 0};
    options.output_activation = {Function::kElu, kElu, 0};
  }
  if (c.training) p.gate_values = gates.data(), p.cells = cells.data();
  const cpu::Kernels<T>& kernels = cpu::kernels<T>();
  const cpu::Machine machine{kernels.lanes, c.threads, kernels.engine};
  const cpu::ForwardPlan plan = kernels.plan_forward(p, machine);
  run(p, plan, kernels.forward);
  double worst = std::max({error_of(output, l.output), error_of(h_n, l.h_n), error_of(c_n, l.c_n)});
  if (c.training) {
    std::vector<T> grad_x(x.size()), grad_w(w.size()), grad_u(u.size()), grad_b(b.size()), grad_h0(B * H),
        grad_c(B * H), grad_peephole(3 * H);
    BackwardParams<T> q{};
    static_cast<LayerParams<T>&>(q) = p;
    q.output = {output.data(), B * H, H};
    q.gate_values = gates.data(), q.cells = cells.data();
    q.grad_output = {grad_output.data(), B * H, H};
    q.grad_c = grad_c.data(), q.grad_input = {grad_x.data(), B * I, I}, q.grad_h0 = grad_h0.data();
    q.grad_weight_ih = grad_w.data(), q.grad_weight_hh = grad_u.data(), q.grad_bias = grad_b.data();
    for (int n = 0; c.other_cell && n < cell::kParameters; ++n) q.grad_cell[n] = grad_peephole.data() + n * H;
    run(q, kernels.plan_backward(q, machine), kernels.backward);
    worst = std::max({worst, error_of(grad_x, l.grad_x), error_of(grad_w, l.grad_w), error_of(grad_u, l.grad_u),
                      error_of(grad_b, l.grad_b), error_of(grad_h0, l.grad_h0), error_of(grad_c, l.grad_c0)});
    if (c.other_cell) worst = std::max(worst, error_of(grad_peephole, l.grad_peephole));
  }
  const double allowed = 32 * static_cast<double>(std::numeric_limits<T>::epsilon());
  if (worst <= allowed) return true;
  std::printf(
      "float%zu T%ld B%ld I%ld H%ld, %d threads, reverse %d, training %d, other cell %d: error %.3g, %.3g allowed\n",
      8 * sizeof(T), T_, B, I, H, c.threads, c.reverse, c.training, c.other_cell, worst, allowed);
  return false;
}

// The same layer, forward, with weights that were rounded and packed before.
bool check_frozen(const Size& size, WeightKind kind) {
  const auto [T, B, I, H] = size;
  Layer l{};
  std::mt19937 random(1);
  const auto draw = [&](int64_t count, double deviation) {
    std::normal_distribution<float> normal(0, static_cast<float>(deviation));
    Numbers numbers(count);
    for (double& x : numbers) x = normal(random);
    return numbers;
  };
  const double scale = 1 / std::sqrt(static_cast<double>(H));
  l.x = draw(T * B * I, 1), l.w = draw(4 * H * I, scale), l.u = draw(4 * H * H, scale), l.b = draw(4 * H, 0.2);
  l.h0 = draw(B * H, 0.5), l.c0 = draw(B * H, 0.5), l.grad_output.resize(T * B * H);

  const LayerShape shape{T, B, I, H, H, false, false, nullptr, nullptr};
  const cpu::Kernels<float>& kernels = cpu::kernels<float>();
  const cpu::Machine machine{kernels.lanes, 1, kernels.engine};
  const cpu::FrozenPlan plan = kernels.plan_frozen(shape, machine, 3, kind, 64);
  std::vector<Line> memory(plan.bytes / 64 + 1);
  char* const data = memory[0].bytes;
  const auto round_rows = [&](Numbers& weight, int64_t count, int64_t factors) {
    for (int64_t row = 0; row < 4 * H; ++row) {
      float most = 0;
      for (int64_t k = 0; k < count; ++k) most = std::max(most, std::fabs(static_cast<float>(weight[row * count + k])));
      const float factor = most / 127;
      if (kind == WeightKind::kInt8) std::memcpy(data + factors + row * sizeof(float), &factor, sizeof(factor));
      for (int64_t k = 0; k < count; ++k) {
        double& number = weight[row * count + k];
        if (kind == WeightKind::kInt8) {
          number = std::nearbyint(static_cast<float>(number) / factor) * factor;
        } else if (kind == WeightKind::kBFloat16) {
          float narrow = static_cast<float>(number);
          uint32_t bits;
          std::memcpy(&bits, &narrow, sizeof(bits));
          bits = (bits + 0x8000) & 0xFFFF0000;
          std::memcpy(&narrow, &bits, sizeof(bits));
          number = narrow;
        }
      }
    }
  };
  round_rows(l.w, I, plan.input.factors);
  round_rows(l.u, H, plan.recurrent.factors);
  plain_loop({size, 1, false, false, false}, l);

  const auto in_type = [](const Numbers& numbers) { return std::vector<float>(numbers.begin(), numbers.end()); };
  const auto x = in_type(l.x), w = in_type(l.w), u = in_type(l.u), b = in_type(l.b), h0 = in_type(l.h0),
             c0 = in_type(l.c0);
  const std::vector<float> none(4 * H);
  kernels.freeze({w.data(), u.data(), b.data(), none.data(), nullptr}, shape, plan, data);
  const FrozenWeights<float> frozen = cpu::frozen_weights<float>(plan, data);
  std::vector<float> output(T * B * H), h_n(B * H), c_n(B * H);
  ForwardParams<float> p{};
  p.shape = shape, p.frozen = &frozen, p.bf16_parts = 3;
  p.input = {x.data(), B * I, I}, p.output = {output.data(), B * H, H};
  p.h0 = h0.data(), p.c0 = c0.data(), p.h_n = h_n.data(), p.c_n = c_n.data();
  run(p, kernels.plan_forward(p, machine), kernels.forward);
  const double worst = std::max({error_of(output, l.output), error_of(h_n, l.h_n), error_of(c_n, l.c_n)});
  const double allowed = 32 * static_cast<double>(std::numeric_limits<float>::epsilon());
  if (worst <= allowed) return true;
  std::printf("frozen, kind %d, T%ld B%ld I%ld H%ld: error %.3g, %.3g allowed\n", static_cast<int>(kind), T, B, I, H,
              worst, allowed);
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    try {
      cpu::set_capability(argv[1]);
    } catch (const std::invalid_argument& error) {
      std::puts(error.what());
    }
    return 0;
  }
  const char* names[cpu::kCapabilities];
  const int count = cpu::library().available_capabilities(names);
  int cases = 0, failed = 0;
  for (int n = 0; n < count; ++n) {
    cpu::set_capability(names[n]);
    for (const Size& size : kSizes) {
      for (const int options : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}) {
        const Case c{size, options & 1 ? 2 : 1, (options & 2) != 0, (options & 4) != 0, (options & 8) != 0};
        cases += 2;
        failed += !check<float>(c) + !check<double>(c);
      }
      for (const WeightKind kind : {WeightKind::kOwn, WeightKind::kBFloat16, WeightKind::kInt8}) {
        ++cases;
        failed += !check_frozen(size, kind);
      }
    }
    std::printf("%s%s: %d cases, %d failed\n", names[n], cpu::kernels<float>().multiplies_int8() ? "+int8" : "", cases,
                failed);
    cases = 0;
  }
  return count == 0 || failed != 0;
}
