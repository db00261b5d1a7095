// The equations of contract/cell.h in float64, for every set of features: against a plain loop that shares with them
// only the functions of contract/activation.h, and their gradients against differences of that loop. Then those of
// contract/transition.h. Needs neither torch nor an instruction set. Held to that, the same equations are what layer.h
// computes a layer with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>

#include "contract/cell.h"
#include "contract/transition.h"

namespace {

namespace cell = lstm_ext::cell;
using cell::kF, cell::kG, cell::kI, cell::kO;
using Activation = cell::Activation<double>;
using Options = cell::Options<double>;

double plain_sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

template <bool first>
struct Math {
  using Value = double;
  struct Gates {
    double gate[4];
    double& operator[](int n) { return gate[n]; }
    const double& operator[](int n) const { return gate[n]; }
  };
  static constexpr bool kOutputGateFirst = first;
  static double number(double x) { return x; }
  static double fma(double a, double b, double c) { return a * b + c; }
  static double sigmoid(double z) { return plain_sigmoid(z); }
  static double hidden(double o, double c) { return o * std::tanh(c); }
  static void input(double z_i, double z_g, double& i, double& g) {
    i = sigmoid(z_i);
    g = std::tanh(z_g);
  }
  static void output(double z_o, double c, double& o, double& h) {
    o = sigmoid(z_o);
    h = hidden(o, c);
  }
  struct Squashed {
    double tanh_c;
    double value() const { return tanh_c; }
    double slope(double value) const { return 1 - value * value; }
  };
  static Squashed squash(double c) { return {std::tanh(c)}; }
  static double clamp(double v, double bound) { return v > bound ? bound : v < -bound ? -bound : v; }
  static double below(double v, double bound, double a) { return std::fabs(v) < bound ? a : 0; }
  static double within(double v, double bound, double a) { return std::fabs(v) <= bound ? a : 0; }
  static double unless(double v, double bound, double a) { return v == bound ? 0 : a; }
  static double tanh(double z) { return std::tanh(z); }
  static double activation(const Activation& f, double z) { return cell::activation_value<Math>(f, z); }
  static double slope_of(const Activation& f, double v) { return cell::activation_slope<Math>(f, v); }
  static double where_positive(double v, double a, double b) { return v > 0 ? a : b; }
  static double quotient(double a, double b) { return a / b; }
  static double expm1(double z) { return std::expm1(z); }
  static double softplus(double z) { return std::log1p(std::exp(z)); }
};

// A unit of a cell with options, whose parameters lie from `unit` on.
struct LoadUnit {
  int64_t unit;
  double operator()(const double* numbers) const { return numbers[unit]; }
};
using CellOfUnit = cell::CellAt<double, LoadUnit>;
template <bool plain>
auto cell_of([[maybe_unused]] const Options& options) {
  if constexpr (plain) {
    return cell::Plain{};
  } else {
    return CellOfUnit{options, {0}};
  }
}

// ---- the plain loop

struct PlainStep {
  double i, f, g, o, c, h;
};
// `nearest` is the distance to a bound or to 0, where a function may have an edge: a difference means nothing there.
PlainStep plain_step(const Options& options, const double* z, double before, double& nearest) {
  const auto clamped = [&](double x, double bound) {
    if (bound == 0) return x;
    nearest = std::min(nearest, std::fabs(std::fabs(x) - bound));
    return std::fmax(-bound, std::fmin(bound, x));
  };
  const auto apply = [&](const Activation& function, double x) {
    nearest = std::min(nearest, std::fabs(x));
    return cell::activation_value<Math<false>>(function, x);
  };
  const auto gate = [&](double x) {
    x = clamped(x, options.preactivation_clip);
    return options.other_activations ? apply(options.gate_activation, x) : plain_sigmoid(x);
  };
  const auto peephole = [&](int n, double state) { return options.peepholes() ? *options.parameters[n] * state : 0; };
  PlainStep now;
  now.i = gate(z[0] + peephole(cell::kPeepholeI, before));
  now.f = options.coupled_gates ? 1 - now.i : gate(z[1] + peephole(cell::kPeepholeF, before));
  const double z_g = clamped(z[2], options.preactivation_clip);
  now.g = options.other_activations ? apply(options.candidate_activation, z_g) : std::tanh(z_g);
  now.c = clamped(now.f * before + now.i * now.g, options.cell_clip);
  now.o = gate(z[3] + peephole(cell::kPeepholeO, now.c));
  now.h = now.o * (options.other_activations ? apply(options.output_activation, now.c) : std::tanh(now.c));
  return now;
}

// ---- one unit over some steps

constexpr int kSteps = 6;

// The loss is a weighted sum of all that a cell gives.
struct Problem {
  double z[kSteps][4], c0;
  bool begins;  // there is no c0
  double of_h[kSteps], of_c[kSteps], of_gates[kSteps][4];
  bool gates_given;
};

double loss(const Problem& p, const Options& options, double& nearest) {
  double c = p.begins ? 0 : p.c0, sum = 0;
  for (int t = 0; t < kSteps; ++t) {
    const PlainStep now = plain_step(options, p.z[t], c, nearest);
    c = now.c;
    sum += p.of_h[t] * now.h + p.of_c[t] * c;
    const double values[] = {now.i, now.f, now.g, now.o};
    for (int gate = 0; gate < 4 && p.gates_given; ++gate) sum += p.of_gates[t][gate] * values[gate];
  }
  return sum;
}

int failures = 0, checks = 0;
void expect(bool holds, const char* what, int features) {
  ++checks;
  if (holds) return;
  ++failures;
  std::printf("features %d: %s\n", features, what);
}
void expect_near(double got, double want, double tolerance, const char* what, int features) {
  const bool both_nan = std::isnan(got) && std::isnan(want);
  const bool near = both_nan || std::fabs(got - want) <= tolerance * (1 + std::fabs(want));
  if (!near) std::printf("%.12g, not %.12g: ", got, want);
  expect(near, what, features);
}

struct Before {
  const double* at;  // or null
  bool there() const { return at != nullptr; }
  double load() const { return *at; }
};
struct Given {
  const double* at;
  bool there() const { return at != nullptr; }
  double load(int gate) const { return at[gate]; }
};

constexpr double kClip = 0.7;
enum Feature { kWithPeepholes = 1, kWithClip = 2, kCoupled = 4, kPlain = 8 };

template <bool first, bool plain = false>
void check(std::mt19937& random, int features, bool functions = false, double bound = 0) {
  using M = Math<first>;
  std::normal_distribution<double> normal;
  double weights[cell::kParameters];
  Options options{};
  for (int n = 0; n < cell::kParameters; ++n) options.parameters[n] = features & kWithPeepholes ? &weights[n] : nullptr;
  options.cell_clip = features & kWithClip ? kClip : 0;
  options.coupled_gates = features & kCoupled;
  options.preactivation_clip = bound;
  options.exact_gates = true;
  options.other_activations = functions;
  options.gate_activation = {cell::Function::kScaledTanh, 0.6, 1.3};
  options.candidate_activation = {cell::Function::kSoftsign, 0, 0};
  options.output_activation = {cell::Function::kElu, 0.7, 0};
  const auto here = cell_of<plain>(options);
  int clipped = 0, bounded = 0;
  for (int trial = 0; trial < 50; ++trial) {
    Problem p{};
    for (auto& row : p.z) {
      for (double& z : row) z = 1.5 * normal(random);
    }
    p.c0 = normal(random);
    p.begins = trial % 3 == 0;
    p.gates_given = trial % 2 == 0;
    for (double& w : weights) w = normal(random);
    for (int t = 0; t < kSteps; ++t) {
      p.of_h[t] = normal(random);
      p.of_c[t] = normal(random);
      for (double& w : p.of_gates[t]) w = normal(random);
    }

    cell::Forward<M> made[kSteps];
    double sum = 0;
    for (int t = 0; t < kSteps; ++t) {
      const Before before{t > 0 ? &made[t - 1].c : p.begins ? nullptr : &p.c0};
      double stored = 0;
      typename M::Gates z;
      for (int gate = 0; gate < 4; ++gate) z[gate] = p.z[t][gate];
      made[t] = cell::forward<M>(z, before, here, [&](double c) { stored = c; });
      expect(stored == made[t].c, "c is stored as it is", features);
      const auto again = cell::gate_values<M>(z, here);
      const auto seen = cell::gate_values<M>(z);
      for (int gate = 0; gate < 4; ++gate) {
        expect(again[gate] == made[t].gates[gate], "gate values again", features);
        if (!functions) {
          expect_near(seen[gate], made[t].gates[gate], 1e-15, "z is what the nonlinearities see", features);
        }
        bounded += bound != 0 && std::fabs(z[gate]) == bound;
      }
      expect(cell::state<M>(made[t].gates, before, here) == made[t].c, "c again", features);
      clipped += std::fabs(made[t].c) == kClip;
      sum += p.of_h[t] * made[t].h + p.of_c[t] * made[t].c;
      for (int gate = 0; gate < 4 && p.gates_given; ++gate) sum += p.of_gates[t][gate] * made[t].gates[gate];
    }
    double nearest = 1;
    expect_near(sum, loss(p, options, nearest), 1e-13, "the loss", features);
    if (nearest < 1e-3) continue;  // a difference may reach over the edge

    double dz[kSteps][4], d_weights[cell::kParameters] = {}, carried = 0;
    for (int t = kSteps - 1; t >= 0; --t) {
      const double before = t > 0 ? made[t - 1].c : p.begins ? 0 : p.c0;
      const Given given{p.gates_given ? p.of_gates[t] : nullptr};
      const auto back =
          cell::backward<M>(made[t].gates, before, made[t].c, p.of_h[t], carried + p.of_c[t], given, here);
      for (int gate = 0; gate < 4; ++gate) dz[t][gate] = back.dz[gate];
      for (int n = 0; n < cell::kParameters; ++n) {
        d_weights[n] += cell::parameter_term<M>(n, back.dz, before, made[t].c);
      }
      carried = back.dc_before;
    }
    const auto expect_gradient = [&](double got, double& x, const char* what) {
      const double h = 1e-5, was = x;
      x = was + h;
      const double more = loss(p, options, nearest);
      x = was - h;
      const double less = loss(p, options, nearest);
      x = was;
      expect_near(got, (more - less) / (2 * h), 1e-7, what, features);
    };
    for (int t = 0; t < kSteps; ++t) {
      for (int gate = 0; gate < 4; ++gate) expect_gradient(dz[t][gate], p.z[t][gate], "dz");
    }
    if (!p.begins) expect_gradient(carried, p.c0, "dc0");
    for (int n = 0; n < cell::kParameters && features & kWithPeepholes; ++n) {
      expect_gradient(d_weights[n], weights[n], "a peephole's gradient");
    }
  }
  const bool usual = !functions && bound == 0;
  expect(!(features & kWithClip) || !usual || clipped > 20, "something is clipped", features);
  expect(bound == 0 || bounded > 20, "a preactivation is clipped", features);
  if (!usual) return;

  // A NaN goes where the equations take it, and no further.
  const double nan = std::numeric_limits<double>::quiet_NaN(), c0 = 0.3;
  const bool peephole = features & kWithPeepholes, coupled = features & kCoupled;
  for (int gate = 0; gate < 4; ++gate) {
    typename M::Gates z{{0.1, 0.2, 0.3, 0.4}};
    z[gate] = nan;
    const auto now = cell::forward<M>(z, Before{&c0}, here);
    const bool reaches_c = gate != kO && !(coupled && gate == kF);
    expect(std::isnan(now.c) == reaches_c, "NaN in c", features);
    expect(std::isnan(now.h) == (reaches_c || gate == kO), "NaN in h", features);
    for (int other = 0; other < 4; ++other) {
      const bool is_nan = (other == gate && !(coupled && gate == kF)) || (coupled && gate == kI && other == kF) ||
                          (peephole && other == kO && reaches_c);
      expect(std::isnan(now.gates[other]) == is_nan, "NaN in a gate", features);
    }
  }
  typename M::Gates z{{0.1, 0.2, 0.3, 0.4}};
  const auto now = cell::forward<M>(z, Before{&c0}, here);
  const auto back = cell::backward<M>(now.gates, c0, nan, 1.0, 1.0, cell::Nothing<M>{}, here);
  expect(std::isnan(back.dc_before), "NaN in c has a NaN as its gradient", features);

  // torch.clamp passes the gradient of a c_t that lies on the edge, and not of one beyond it.
  if (features != kWithClip) return;
  typename M::Gates open{{0, 1, 0, 0.5}};
  for (const double c_before : {kClip, -kClip, 0.70001, -0.70001, nan}) {
    const auto edge = cell::state_backward<M>(open, c_before, kClip, 1.0, 0.0, cell::Nothing<M>{}, here);
    expect(edge.dc_before == (std::fabs(c_before) == kClip ? 1 : 0), "the gradient on the edge", features);
  }
  Options inexact = options;
  inexact.exact_gates = false;
  for (const double c : {0.69, -0.69, kClip, -kClip}) {
    const auto edge = cell::state_backward<M>(open, 0.5, c, 1.0, 0.0, cell::Nothing<M>{}, CellOfUnit{inexact, {0}});
    expect(edge.dc_before == (std::fabs(c) == 0.69 ? 1 : 0), "the gradient without exact gates", features);
  }
}

struct Kept {
  const bool* flag;  // or null
  double of_all;
  bool flagged() const { return flag != nullptr; }
  double where_kept(double a, double b) const { return *flag ? a : b; }
  double share() const { return of_all; }
};

void check_transition(std::mt19937& random) {
  using M = Math<true>;
  namespace transition = lstm_ext::transition;
  std::normal_distribution<double> normal;
  for (const double share : {0.0, 0.1, 0.4999, 0.5, 0.9, 1.0}) {
    const double fresh = normal(random), previous = normal(random), grad = normal(random);
    const Kept kept{nullptr, share};
    expect_near(transition::kept_state<M>(kept, fresh, previous), share * previous + (1 - share) * fresh, 1e-15,
                "a mixed state", 0);
    expect_near(transition::kept_state<M>(kept, fresh, fresh), fresh, 0, "a state that does not change", 0);
    const auto split = transition::split_gradient<M>(kept, grad);
    expect_near(split.previous, share * grad, 1e-15, "the gradient of the state before", 0);
    expect_near(split.fresh, (1 - share) * grad, 1e-15, "the gradient of the cell's result", 0);
  }
  const double infinite = std::numeric_limits<double>::infinity();
  for (const bool flag : {false, true}) {
    const Kept kept{&flag, 0.3};  // a flag is all that counts
    expect(transition::kept_state<M>(kept, flag ? infinite : 2, flag ? 1 : infinite) == (flag ? 1 : 2), "a choice", 0);
    const auto split = transition::split_gradient<M>(kept, 5);
    expect(split.fresh == (flag ? 0 : 5) && split.previous == (flag ? 5 : 0), "a gradient that goes one way", 0);
  }
  using transition::Source, transition::source_of;
  expect(source_of(false, true) == Source::kStepBefore && source_of(false, false) == Source::kBeginning, "a source", 0);
  expect(source_of(true, true) == Source::kReset && source_of(true, false) == Source::kReset, "a reset", 0);
}

// The number of failures.
int check_cell() {
  std::mt19937 random(1);
  check<false, true>(random, kPlain);
  check<true, true>(random, kPlain);
  for (int features = 0; features < kPlain; ++features) {
    for (const bool functions : {false, true}) {
      for (const double bound : {0.0, 0.9}) {
        check<false>(random, features, functions, bound);
        check<true>(random, features, functions, bound);
      }
    }
  }
  check_transition(random);
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures;
}

}  // namespace
