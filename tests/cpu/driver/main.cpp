// The cell and the CPU kernels without torch.
//
//   driver cell         contract/cell.h and contract/transition.h: see cell.h
//   driver kernels      the kernels of each instruction set against a plain loop in float64, and with frozen weights
//   driver set NAME     chooses this instruction set
//   driver [NAME ...]   the cases of these names, or all, on 2 to 8 threads: the results must be those of one worker,
//                       to the bit. sanitize.py compiles this for registers in plain C++.
//   driver wait         a worker that does not come to a barrier
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "driver/cell.h"

#if defined(LSTM_EXT_ISA_SOFTWARE)
#include "cpu/kernel_set.h"

namespace lstm_ext::cpu {
__thread uint64_t unit_directions = 0;
const bool fetches_panels = true, has_avx512_vnni = false, has_avx_vnni = false, has_i8mm = false;
template <>
const Kernels<float>& kernels<float>() {
  static const Kernels<float> found = [] {
    Kernels<float> made = LSTM_EXT_ISA::kKernels<float>;
#if defined(LSTM_EXT_TILE_ENGINE)
    made.engine = LSTM_EXT_ISA::kLimitsOfTiles;
#endif
    return made;
  }();
  return found;
}
}  // namespace lstm_ext::cpu
#else
#include "cpu/frozen.h"
#include "cpu/kernels.h"
#include "cpu/plan.h"
#endif

namespace {

using namespace lstm_ext;

template <typename T>
using Numbers = std::vector<T>;

// What a case has.
constexpr int kTwo = 1, kReverse = 2, kPacked = 4, kResets = 8, kMasks = 16, kNorm = 32, kOtherCell = 64,
              kRecompute = 128, kInference = 256;

struct Case {
  const char* name;
  int64_t steps, batch, inputs, hidden, outputs;
  int features;
  bool has(int feature) const { return features & feature; }
};

// Many rows make teams, many hidden units make members, and 2 to 8 workers of both make grids.
const Case kCases[] = {
    {"teams", 24, 16, 24, 48, 48, 0},
    {"members", 24, 1, 70, 130, 130, 0},
    {"members that project", 16, 2, 24, 160, 70, 0},
    {"one step", 1, 40, 96, 160, 160, 0},
    {"inference", 24, 12, 24, 64, 64, kInference},
    {"both directions", 16, 4, 33, 64, 64, kTwo},
    {"ragged", 20, 12, 24, 64, 40, kTwo | kPacked | kResets},
    {"ragged inference", 20, 8, 24, 96, 96, kPacked | kResets | kInference},
    {"options", 12, 6, 24, 80, 80, kResets | kMasks},
    {"options of members", 16, 1, 96, 256, 128, kMasks},
    {"normalised", 12, 6, 24, 80, 80, kPacked | kResets | kMasks | kNorm},
    {"normalised members", 16, 1, 96, 256, 128, kNorm},
    {"recomputed", 24, 6, 24, 64, 64, kResets | kRecompute},
    {"recomputed members", 16, 1, 96, 256, 128, kMasks | kRecompute},
};

uint32_t state = 1;
template <typename T>
Numbers<T> random(int64_t count, double scale = 1) {
  Numbers<T> numbers(static_cast<size_t>(count));
  for (T& number : numbers) {
    state = state * 1664525u + 1013904223u;
    number = static_cast<T>(scale * (static_cast<double>(state >> 8) / (1 << 23) - 1));
  }
  return numbers;
}
std::vector<uint8_t> flags(int64_t count) {
  std::vector<uint8_t> result;
  for (const float number : random<float>(count)) result.push_back(number > 0.6f);
  return result;
}

struct Grids {
  int teams = 0, members = 0, directions = 0, workers = 0;  // the most
};

struct alignas(64) Line {
  char bytes[64];
};

// As csrc/torch/cpu_layer.cpp runs them, each worker on a thread of its own.
template <typename Params, typename Plan, typename Machine>
void run(const std::vector<Params>& params, Plan (*make_plan)(const Params&, const Machine&),
         const char* (*kernel)(const Params&, const Plan&, char*, int), const Machine& machine, Grids& grids) {
  for (size_t first = 0; first < params.size();) {
    std::vector<Plan> plans{make_plan(params[first], machine)};
    if (plans[0].directions_at_once && first + 1 < params.size())
      plans.push_back(make_plan(params[first + 1], machine));
    std::vector<std::vector<Line>> workspaces(plans.size());
    std::vector<std::thread> workers;
    for (size_t i = 0; i < plans.size(); ++i) {
      const Plan& plan = plans[i];
      workspaces[i].resize(static_cast<size_t>(plan.workspace_bytes / 64 + 1));
      char* const workspace = workspaces[i].data()->bytes;
      // NaN, where a kernel reads what none has written.
      std::memset(workspace, 0xFF, static_cast<size_t>(plan.workspace_bytes));
      std::memset(workspace, 0, static_cast<size_t>(plan.barrier_bytes));
      for (int worker = 0; worker < plan.grid.workers(); ++worker) {
        workers.emplace_back([&, workspace, i, worker] {
          if (const char* const problem = kernel(params[first + i], plans[i], workspace, worker)) {
            std::puts(problem);
            std::abort();
          }
        });
      }
      grids.teams = std::max(grids.teams, plan.grid.batch_groups);
      grids.members = std::max(grids.members, plan.grid.hidden_groups);
    }
    grids.workers = std::max(grids.workers, static_cast<int>(workers.size()));
    grids.directions = std::max(grids.directions, static_cast<int>(plans.size()));
    for (std::thread& worker : workers) worker.join();
    first += plans.size();
  }
}

// The other cell: peepholes, a hard sigmoid, softsign and elu, a bound of c_t and of what the gates take.
template <typename T>
void set_other_cell(cell::Options<T>& options, const T* peepholes, int64_t hidden) {
  using cell::Function;
  for (int n = 0; n < cell::kParameters; ++n) options.parameters[n] = peepholes + n * hidden;
  options.cell_clip = T(0.9), options.preactivation_clip = T(1.2), options.exact_gates = true;
  options.other_activations = true;
  options.gate_activation = {Function::kHardSigmoid, T(0.2), T(0.5)};
  options.candidate_activation = {Function::kSoftsign, 0, 0};
  options.output_activation = {Function::kElu, T(0.7), 0};
}

// A layer with all its tensors.
template <typename T>
struct Layer {
  struct Direction {
    Numbers<T> w, u, b, b_hh, r, gain, gain_c, bias_c, peephole, grad_h_n;
    Numbers<T> h_n, c_n, gates, cells, hidden, norm_x, norm_h, factors;
    Numbers<T> grad_c, grad_h0, grad_reset_h, grad_reset_c, grad_w, grad_u, grad_b, grad_r;
    Numbers<T> grad_gain_ih, grad_gain_hh, grad_gain_c, grad_bias_c, grad_peephole;
  };
  Case is;
  std::vector<int64_t> offsets{0};
  Numbers<T> x, h0, c0, reset_h, mask, output, grad_output, grad_input;
  std::vector<uint8_t> resets, keep_h;
  std::vector<Direction> directions;
  std::vector<ForwardParams<T>> forward;
  std::vector<BackwardParams<T>> backward;

  explicit Layer(const Case& c, uint32_t seed = 1) : is(c) {
    state = seed;
    const int64_t T_ = c.steps, B = c.batch, I = c.inputs, H = c.hidden, P = c.outputs, D = c.has(kTwo) ? 2 : 1;
    for (int64_t t = 0; t < T_; ++t) {
      offsets.push_back(offsets.back() + (c.has(kPacked) ? std::max<int64_t>(1, B - B * t / T_) : B));
    }
    const int64_t N = offsets.back();
    x = random<T>(N * I, 1.5), h0 = random<T>(B * P), c0 = random<T>(B * H), reset_h = random<T>(B * P);
    mask = random<T>(B * P), resets = flags(N), keep_h = flags(N * P);
    output.resize(static_cast<size_t>(N * D * P)), grad_input.resize(x.size());
    grad_output = random<T>(N * D * P, 1.5);
    directions.resize(static_cast<size_t>(D)), forward.resize(directions.size()), backward.resize(directions.size());
    for (int64_t i = 0; i < D; ++i) arrange(i);
  }

  void arrange(int64_t i) {
    const int64_t B = is.batch, I = is.inputs, H = is.hidden, P = is.outputs, N = offsets.back();
    const int64_t D = static_cast<int64_t>(directions.size());
    const bool projected = P < H;
    const double scale = 1.7 / std::sqrt(static_cast<double>(H));
    const auto zeros = [](Numbers<T>& numbers, int64_t count) {
      numbers.resize(static_cast<size_t>(count));
      return numbers.data();
    };
    Direction& d = directions[static_cast<size_t>(i)];
    d.w = random<T>(4 * H * I, scale), d.u = random<T>(4 * H * P, scale), d.b = random<T>(4 * H, 0.3);
    d.b_hh = random<T>(4 * H, 0.3), d.r = random<T>(P * H, scale), d.gain = random<T>(4 * H);
    d.gain_c = random<T>(H), d.bias_c = random<T>(H), d.peephole = random<T>(3 * H), d.grad_h_n = random<T>(B * P);
    LayerParams<T> layer{};
    layer.shape = {is.steps,
                   B,
                   I,
                   H,
                   P,
                   projected,
                   is.has(kReverse) || i == 1,
                   is.has(kPacked) ? offsets.data() : nullptr,
                   is.has(kResets) ? resets.data() : nullptr,
                   D == 2};
    layer.weights = {d.w.data(), d.u.data(), d.b.data(), d.b_hh.data(), projected ? d.r.data() : nullptr, {}};
    layer.input = {x.data(), B * I, I};
    layer.h0 = h0.data(), layer.c0 = c0.data();
    layer.reset_state.h = reset_h.data();
    layer.bf16_parts = 3;
    if (is.has(kMasks)) {
      layer.options.recurrent_mask = mask.data();
      layer.options.zoneout_h = {keep_h.data(), T(0.1)};
      layer.options.zoneout_c = {nullptr, T(0.2)};
    }
    if (is.has(kNorm)) layer.options.norm = {d.gain.data(), d.gain.data(), d.gain_c.data(), d.bias_c.data(), false};
    if (is.has(kOtherCell)) set_other_cell<T>(layer.options.cell, d.peephole.data(), H);

    ForwardParams<T>& f = forward[static_cast<size_t>(i)];
    static_cast<LayerParams<T>&>(f) = layer;
    f.output = {output.data() + i * P, B * D * P, D * P};
    f.h_n = zeros(d.h_n, B * P), f.c_n = zeros(d.c_n, B * H);
    if (is.has(kInference)) return;
    f.cells = zeros(d.cells, N * H);
    f.gate_values = zeros(d.gates, N * 4 * H);
    if (projected) f.hidden = zeros(d.hidden, N * H);
    if (is.has(kNorm)) {
      f.norm_input = zeros(d.norm_x, N * 4 * H), f.norm_recurrent = zeros(d.norm_h, N * 4 * H);
      f.norm_factors = zeros(d.factors, N * 2);
    }

    BackwardParams<T>& b = backward[static_cast<size_t>(i)];
    static_cast<LayerParams<T>&>(b) = layer;
    b.output = {f.output.data, f.output.stride_t, f.output.stride_b};
    b.cells = f.cells;
    if (!is.has(kRecompute)) b.gate_values = f.gate_values, b.hidden = f.hidden;
    b.norm_input = f.norm_input, b.norm_recurrent = f.norm_recurrent, b.norm_factors = f.norm_factors;
    b.grad_output = {grad_output.data() + i * P, B * D * P, D * P};
    b.grad_h_n = d.grad_h_n.data();
    b.grad_c = zeros(d.grad_c, B * H);
    // A pass that adds to the gradient of the input does not run beside another one.
    if (!is.has(kPacked)) b.grad_input = {grad_input.data(), B * I, I};
    b.accumulate_grad_input = i > 0;
    b.grad_h0 = zeros(d.grad_h0, B * P);
    if (is.has(kResets)) b.grad_reset_h = zeros(d.grad_reset_h, B * P), b.grad_reset_c = zeros(d.grad_reset_c, B * H);
    b.grad_weight_ih = zeros(d.grad_w, 4 * H * I), b.grad_weight_hh = zeros(d.grad_u, 4 * H * P);
    b.grad_bias = zeros(d.grad_b, 4 * H);
    if (projected) b.grad_weight_hr = zeros(d.grad_r, P * H);
    if (is.has(kNorm)) {
      b.grad_gain_ih = zeros(d.grad_gain_ih, 4 * H), b.grad_gain_hh = zeros(d.grad_gain_hh, 4 * H);
      b.grad_gain_c = zeros(d.grad_gain_c, H), b.grad_bias_c = zeros(d.grad_bias_c, H);
    }
    if (is.has(kOtherCell)) {
      T* const grads = zeros(d.grad_peephole, cell::kParameters * H);
      for (int n = 0; n < cell::kParameters; ++n) b.grad_cell[n] = grads + n * H;
    }
  }

  void compute(int threads, Grids& grids) {
    const cpu::Kernels<T>& kernels = cpu::kernels<T>();
    const cpu::Machine machine{kernels.lanes, threads, kernels.engine};
    run(forward, kernels.plan_forward, kernels.forward, machine, grids);
    if (!is.has(kInference)) run(backward, kernels.plan_backward, kernels.backward, machine, grids);
  }
  // Of the first direction what the plain loop has, too, in its order.
  std::vector<const Numbers<T>*> results() const {
    const Direction& d = directions[0];
    if (is.has(kInference)) return {&output, &d.h_n, &d.c_n};
    return {&output,   &d.h_n,    &d.c_n,     &grad_input, &d.grad_w,
            &d.grad_u, &d.grad_b, &d.grad_h0, &d.grad_c,   &d.grad_peephole};
  }
};

// ---- on several threads

bool same_bits(const Numbers<float>& a, const Numbers<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}
bool nearly(const Numbers<float>& a, const Numbers<float>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(std::abs(a[i] - b[i]) <= 1e-4f * (1 + std::abs(b[i])))) return false;
  }
  return a.size() == b.size();
}

// Whether the results are the same; sums over the workers, gradients of layer normalisation, only nearly.
bool same(const Layer<float>& found, const Layer<float>& expected) {
  bool same = same_bits(found.output, expected.output) && same_bits(found.grad_input, expected.grad_input);
  using D = Layer<float>::Direction;
  for (size_t i = 0; i < found.directions.size(); ++i) {
    const D &a = found.directions[i], &b = expected.directions[i];
    for (const auto part : {&D::h_n, &D::c_n, &D::cells, &D::grad_c, &D::grad_h0, &D::grad_reset_h, &D::grad_reset_c,
                            &D::grad_w, &D::grad_u, &D::grad_r}) {
      same = same && same_bits(a.*part, b.*part);
    }
    for (const auto part : {&D::grad_gain_ih, &D::grad_gain_hh, &D::grad_gain_c, &D::grad_bias_c}) {
      same = same && nearly(a.*part, b.*part);
    }
    same = same && (found.is.has(kNorm) ? nearly : same_bits)(a.grad_b, b.grad_b);
  }
  return same;
}

bool check_teams(char** names, int count) {
  Grids most;
  bool right = true;
  for (const Case& c : kCases) {
    if (count > 0 && std::none_of(names, names + count, [&](const char* n) { return std::string(n) == c.name; })) {
      continue;
    }
    Grids one, grids;
    Layer<float> expected(c);
    expected.compute(1, one);
    bool well = true;
    for (const Numbers<float>* numbers : expected.results()) {
      well = well && std::all_of(numbers->begin(), numbers->end(), [](float number) { return std::isfinite(number); });
    }
    for (int threads = 2; threads <= 8; ++threads) {
      Layer<float> found(c);
      found.compute(threads, grids);
      well = well && same(found, expected);
    }
    std::printf("%s: %s; up to %d workers, %d teams, %d members, %d directions\n", c.name, well ? "same" : "WRONG",
                grids.workers, grids.teams, grids.members, grids.directions);
    std::fflush(stdout);
    right = right && well && grids.workers > 1;
    most = {std::max(most.teams, grids.teams), std::max(most.members, grids.members),
            std::max(most.directions, grids.directions), std::max(most.workers, grids.workers)};
  }
  const bool all_kinds = most.teams > 1 && most.members > 1 && most.directions > 1 && most.workers == 8;
  return right && (count > 0 || all_kinds);
}

#if defined(LSTM_EXT_ISA_SOFTWARE)  // in which the barrier is

// Whether nobody passes a barrier before all have come. The numbers that the workers write and read are no atomics.
bool meets(int workers) {
  constexpr int kRounds = 20;
  cpu::LSTM_EXT_ISA::Barrier barrier{};
  std::vector<int> rounds(static_cast<size_t>(workers));
  std::vector<char> right(rounds.size(), 1);
  std::vector<std::thread> threads;
  for (int worker = 0; worker < workers; ++worker) {
    threads.emplace_back([&, worker] {
      for (int round = 1; round <= kRounds; ++round) {
        rounds[static_cast<size_t>(worker)] = round;
        barrier.wait(static_cast<uint32_t>(workers));
        const bool all = std::all_of(rounds.begin(), rounds.end(), [&](int of_other) { return of_other == round; });
        if (!all) right[static_cast<size_t>(worker)] = 0;
        barrier.wait(static_cast<uint32_t>(workers));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return std::all_of(right.begin(), right.end(), [](char one) { return one != 0; });
}
bool check_barriers() {
  bool right = true;
  for (const int workers : {2, 3, 4, 5, 16, 17, 21}) {
    const bool well = meets(workers);
    if (!well) std::printf("%d workers pass a barrier too soon\n", workers);
    right = right && well;
  }
  return right;
}

// One of six workers does not come: the others wait for it until the limit, and say so. Returns how many have said it.
int wait_for_one() {
  constexpr int kWorkers = 6;
  cpu::LSTM_EXT_ISA::Barrier barrier{};
  cpu::change_wait_limit(0.2);
  std::atomic<int> late{0};
  std::vector<std::thread> threads;
  for (int worker = 0; worker < kWorkers; ++worker) {
    threads.emplace_back([&, worker] {
      barrier.wait(kWorkers);
      if (worker == 2) return;
      if (const char* const problem = cpu::error_of([&] { barrier.wait(kWorkers); })) {
        if (++late == 1) std::puts(problem);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return late;
}
int kernels_part() { return 2; }
int set_part(const char*) { return 2; }

#else

bool check_barriers() { return true; }
int wait_for_one() { return 0; }

// ---- against a plain loop

// The results of a dense layer of one direction in float64, in the order of Layer::results, and how near a number came
// to an edge, where rounding decides about its gradient.
template <typename T>
std::vector<Numbers<double>> plain_loop(const Layer<T>& l, double& nearest) {
  using M = Math<false>;
  const int64_t T_ = l.is.steps, B = l.is.batch, I = l.is.inputs, H = l.is.hidden;
  const auto& d = l.directions[0];
  const Numbers<double> peepholes(d.peephole.begin(), d.peephole.end());
  Options options{};
  if (l.is.has(kOtherCell)) set_other_cell<double>(options, peepholes.data(), H);
  Numbers<double> h(l.h0.begin(), l.h0.end()), c(l.c0.begin(), l.c0.end()), output(l.output.size()),
      before_h = output, before_c = output, now_c = output;
  std::vector<M::Gates> gates(output.size());
  for (int64_t s = 0; s < T_; ++s) {
    const int64_t t = l.is.has(kReverse) ? T_ - 1 - s : s;
    std::copy(h.begin(), h.end(), before_h.begin() + t * B * H);
    std::copy(c.begin(), c.end(), before_c.begin() + t * B * H);
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t j = 0; j < H; ++j) {
        double z[4];
        for (int64_t gate = 0; gate < 4; ++gate) {
          const int64_t row = gate * H + j;
          z[gate] = static_cast<double>(d.b[row]) + d.b_hh[row];
          for (int64_t i = 0; i < I; ++i) z[gate] += static_cast<double>(d.w[row * I + i]) * l.x[(t * B + b) * I + i];
          for (int64_t i = 0; i < H; ++i) z[gate] += d.u[row * H + i] * before_h[(t * B + b) * H + i];
        }
        Options of_unit = options;
        for (const double*& parameter : of_unit.parameters) parameter = parameter ? parameter + j : nullptr;
        const PlainStep now = plain_step(of_unit, z, c[b * H + j], nearest);
        const int64_t at = (t * B + b) * H + j;
        gates[at] = {{now.i, now.f, now.g, now.o}};
        now_c[at] = c[b * H + j] = now.c;
        output[at] = h[b * H + j] = now.h;
      }
    }
  }
  if (l.is.has(kInference)) return {output, h, c};
  Numbers<double> dh(d.grad_h_n.begin(), d.grad_h_n.end()), dc(c.size()), grad_x(l.x.size()), grad_w(d.w.size()),
      grad_u(d.u.size()), grad_b(d.b.size()), grad_peephole(l.is.has(kOtherCell) ? d.peephole.size() : 0);
  for (int64_t s = T_ - 1; s >= 0; --s) {
    const int64_t t = l.is.has(kReverse) ? T_ - 1 - s : s;
    for (int64_t b = 0; b < B; ++b) {
      const int64_t row = t * B + b;
      Numbers<double> before(static_cast<size_t>(H)), dz(static_cast<size_t>(4 * H));
      for (int64_t j = 0; j < H; ++j) {
        const int64_t at = row * H + j;
        const double grad = dh[b * H + j] + l.grad_output[at];
        const auto back = cell::backward<M>(gates[at], before_c[at], now_c[at], grad, dc[b * H + j], cell::Nothing<M>{},
                                            CellOfUnit{options, {j}});
        for (int64_t gate = 0; gate < 4; ++gate) dz[gate * H + j] = back.dz[gate];
        dc[b * H + j] = back.dc_before;
        for (int n = 0; n < cell::kParameters && l.is.has(kOtherCell); ++n) {
          grad_peephole[n * H + j] += cell::parameter_term<M>(n, back.dz, before_c[at], now_c[at]);
        }
      }
      for (int64_t z = 0; z < 4 * H; ++z) {
        grad_b[z] += dz[z];
        for (int64_t i = 0; i < I; ++i) {
          grad_w[z * I + i] += dz[z] * l.x[row * I + i];
          grad_x[row * I + i] += dz[z] * d.w[z * I + i];
        }
        for (int64_t i = 0; i < H; ++i) {
          grad_u[z * H + i] += dz[z] * before_h[row * H + i];
          before[i] += dz[z] * d.u[z * H + i];
        }
      }
      std::copy(before.begin(), before.end(), dh.begin() + b * H);
    }
  }
  return {output, h, c, grad_x, grad_w, grad_u, grad_b, dh, dc, grad_peephole};
}

// Whether each of the results is within 32 eps, by ‖got - expected‖ / ‖expected‖.
template <typename T>
bool right(const Layer<T>& layer, const std::vector<Numbers<double>>& expected, int threads, int kind = 0) {
  double worst = 0;
  const auto results = layer.results();
  for (size_t n = 0; n < results.size(); ++n) {
    double difference = 0, norm = 1e-60;
    for (size_t i = 0; i < expected[n].size(); ++i) {
      difference += std::pow((*results[n])[i] - expected[n][i], 2);
      norm += std::pow(expected[n][i], 2);
    }
    worst = std::max(worst, std::isnan(difference) ? 1e30 : std::sqrt(difference / norm));
  }
  const double allowed = 32 * static_cast<double>(std::numeric_limits<T>::epsilon());
  if (worst <= allowed) return true;
  std::printf("float%zu T%ld B%ld I%ld H%ld, %d threads, features %d, weights %d: error %.3g, %.3g allowed\n",
              8 * sizeof(T), layer.is.steps, layer.is.batch, layer.is.inputs, layer.is.hidden, threads,
              layer.is.features, kind, worst, allowed);
  return false;
}

template <typename T>
bool check(const Case& c, int threads) {
  for (uint32_t seed = 1;; ++seed) {
    Layer<T> layer(c, seed);
    double nearest = 1;
    const auto expected = plain_loop(layer, nearest);
    if (nearest < 1e-5 && c.has(kOtherCell)) continue;
    Grids grids;
    layer.compute(threads, grids);
    return right(layer, expected, threads);
  }
}

// The layer with weights that were rounded and packed before.
bool check_frozen(const Case& c, WeightKind kind) {
  Layer<float> layer(c);
  auto& d = layer.directions[0];
  ForwardParams<float>& params = layer.forward[0];
  const cpu::Kernels<float>& kernels = cpu::kernels<float>();
  const cpu::Machine machine{kernels.lanes, 1, kernels.engine};
  const cpu::FrozenPlan plan = kernels.plan_frozen(params.shape, machine, 3, kind);
  std::vector<Line> memory(plan.bytes / 64 + 1);
  std::vector<float> factors_w(4 * c.hidden), factors_u(4 * c.hidden);
  const auto round_rows = [&](Numbers<float>& weight, int64_t count, std::vector<float>& factors) {
    for (int64_t row = 0; row < 4 * c.hidden && kind != WeightKind::kOwn; ++row) {
      float most = 0;
      for (int64_t k = 0; k < count; ++k) most = std::max(most, std::fabs(weight[row * count + k]));
      const float factor = factors[row] = most / 127;
      for (int64_t k = 0; k < count; ++k) {
        float& number = weight[row * count + k];
        uint32_t bits;
        std::memcpy(&bits, &number, sizeof(bits));
        bits = (bits + 0x8000) & 0xFFFF0000;
        if (kind == WeightKind::kBFloat16) std::memcpy(&number, &bits, sizeof(number));
        if (kind == WeightKind::kInt8) number = std::nearbyint(number / factor) * factor;
      }
    }
  };
  round_rows(d.w, c.inputs, factors_w);
  round_rows(d.u, c.hidden, factors_u);
  double nearest = 1;
  const auto expected = plain_loop(layer, nearest);
  const FrozenWeights<float> frozen =
      cpu::freeze(kernels, params.weights, {factors_w.data(), factors_u.data()}, params.shape, plan, memory[0].bytes);
  params.frozen = &frozen, params.weights = {};
  Grids grids;
  layer.compute(1, grids);
  return right(layer, expected, 1, static_cast<int>(kind) + 1);
}

// Sizes that fill no register too: steps, rows, features, units.
constexpr int64_t kSizes[][4] = {{1, 1, 5, 7},    {3, 2, 13, 19},   {20, 1, 32, 64}, {7, 5, 33, 37},
                                 {5, 33, 24, 48}, {12, 40, 40, 64}, {2, 70, 3, 130}, {4, 13, 100, 96}};

int kernels_part() {
  const char* names[cpu::kCapabilities];
  const int count = cpu::library().available_capabilities(names);
  bool well = count > 0;
  for (int n = 0; n < count; ++n) {
    cpu::set_capability(names[n]);
    int cases = 0, failed = 0;
    for (const auto& [T, B, I, H] : kSizes) {
      for (const int threads : {1, 2}) {
        for (const int direction : {0, +kReverse}) {
          for (const int other : {0, +kOtherCell}) {
            for (const int pass : {0, +kInference}) {
              const Case c{"", T, B, I, H, H, direction | other | pass};
              cases += 2;
              failed += !check<float>(c, threads) + !check<double>(c, threads);
            }
          }
        }
      }
      for (const WeightKind kind : {WeightKind::kOwn, WeightKind::kBFloat16, WeightKind::kInt8}) {
        ++cases;
        failed += !check_frozen({"", T, B, I, H, H, kInference}, kind);
      }
    }
    std::printf("%s%s: %d cases, %d failed\n", names[n], cpu::kernels<float>().multiplies_int8() ? "+int8" : "", cases,
                failed);
    well = well && failed == 0;
  }
  return well ? 0 : 1;
}
int set_part(const char* name) {
  try {
    cpu::set_capability(name);
  } catch (const std::invalid_argument& error) {
    std::puts(error.what());
  }
  return 0;
}

#endif

}  // namespace

int main(int count, char** arguments) {
  const std::string part = count > 1 ? arguments[1] : "";
  if (part == "cell") return check_cell() != 0;
  if (part == "kernels") return kernels_part();
  if (part == "set" && count == 3) return set_part(arguments[2]);
  if (part == "wait") return wait_for_one();
  const bool well = check_teams(arguments + 1, count - 1);
  return check_barriers() && well ? 0 : 1;
}
