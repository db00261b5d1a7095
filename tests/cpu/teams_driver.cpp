// The CPU kernels without torch, on 2 to 8 threads, for the thread sanitizer: see sanitize.py, which compiles this for
// registers in plain C++. The results must be those of one worker, to the bit. Arguments: names of cases, or none for
// all.
#include "cpu/kernel_set.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace lstm_ext::cpu {
__thread uint64_t unit_directions = 0;
const bool fetches_panels = true, has_avx512_vnni = false, has_avx_vnni = false, has_i8mm = false;
}  // namespace lstm_ext::cpu

namespace {

using namespace lstm_ext;
using Numbers = std::vector<float>;

constexpr const cpu::Kernels<float>& kKernels = cpu::LSTM_EXT_ISA::kKernels<float>;
#if defined(LSTM_EXT_TILE_ENGINE)
constexpr const cpu::EngineLimits& kUnit = cpu::LSTM_EXT_ISA::kLimitsOfTiles;
#else
constexpr cpu::EngineLimits kUnit{};
#endif

struct Case {
  const char* name;
  int64_t steps, batch, inputs, hidden, outputs;
  bool two_directions = false, packed = false, resets = false, options = false, norm = false, recompute = false;
  bool training = true;
};

// Many rows make teams, many hidden units make members, and 2 to 8 workers of both make grids.
const Case kCases[] = {
    {"teams", 24, 16, 24, 48, 48},
    {"members", 24, 1, 70, 130, 130},
    {"members that project", 16, 2, 24, 160, 70},
    {"one step", 1, 40, 96, 160, 160},
    {"inference", 24, 12, 24, 64, 64, false, false, false, false, false, false, false},
    {"both directions", 16, 4, 33, 64, 64, true},
    {"ragged", 20, 12, 24, 64, 40, true, true, true},
    {"ragged inference", 20, 8, 24, 96, 96, false, true, true, false, false, false, false},
    {"options", 12, 6, 24, 80, 80, false, false, true, true},
    {"options of members", 16, 1, 96, 256, 128, false, false, false, true},
    {"normalised", 12, 6, 24, 80, 80, false, true, true, true, true},
    {"normalised members", 16, 1, 96, 256, 128, false, false, false, false, true},
    {"recomputed", 24, 6, 24, 64, 64, false, false, true, false, false, true},
    {"recomputed members", 16, 1, 96, 256, 128, false, false, false, true, false, true},
};

uint32_t state = 1;
float draw() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / static_cast<float>(1 << 23) - 1;
}
Numbers random(int64_t count, float scale = 1) {
  Numbers numbers(static_cast<size_t>(count));
  for (float& number : numbers) number = scale * draw();
  return numbers;
}
std::vector<uint8_t> flags(int64_t count) {
  std::vector<uint8_t> result(static_cast<size_t>(count));
  for (uint8_t& flag : result) flag = draw() > 0.6f;
  return result;
}

struct Grids {
  int teams = 0, members = 0, directions = 0, workers = 0;  // the most
};

// As csrc/torch/cpu_layer.cpp runs them, each worker on a thread of its own.
template <typename Params, typename Plan>
void run(const std::vector<Params>& params, Plan (*make_plan)(const Params&, const cpu::Machine&),
         void (*kernel)(const Params&, const Plan&, char*, int), int threads, Grids& grids) {
  struct alignas(64) Line {
    char bytes[64];
  };
  const cpu::Machine machine{kKernels.lanes, threads, kUnit};
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
        workers.emplace_back(kernel, std::cref(params[first + i]), std::cref(plan), workspace, worker);
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

struct Results {
  std::vector<Numbers> exact;
  std::vector<Numbers> summed;  // over the workers: gradients of layer normalisation
};

Results compute(const Case& c, int threads, Grids& grids) {
  state = 1;
  const int64_t T = c.steps, B = c.batch, I = c.inputs, H = c.hidden, P = c.outputs, D = c.two_directions ? 2 : 1;
  std::vector<int64_t> offsets{0};
  for (int64_t t = 0; t < T; ++t)
    offsets.push_back(offsets.back() + (c.packed ? std::max<int64_t>(1, B - B * t / T) : B));
  const int64_t N = offsets.back();
  const bool projected = P < H;
  const Numbers x = random(N * I), h0 = random(B * P), c0 = random(B * H), reset_h = random(B * P),
                mask = random(B * P);
  const std::vector<uint8_t> resets = flags(N), keep_h = flags(N * P), keep_c = flags(N * H);
  const float scale = 1 / std::sqrt(static_cast<float>(H));

  struct Direction {
    Numbers w, u, b, r, gain, gain_c, bias_c, dh;
    Numbers h_n, c_n, gates, cells, hidden, norm_x, norm_h, factors;
    Numbers grad_c, grad_h0, grad_reset_h, grad_reset_c, grad_w, grad_u, grad_b, grad_r;
    Numbers grad_gain_ih, grad_gain_hh, grad_gain_c, grad_bias_c;
  };
  std::vector<Direction> all(static_cast<size_t>(D));
  Numbers output(static_cast<size_t>(N * D * P)), grad_input(static_cast<size_t>(N * I));
  const Numbers grad_output = random(N * D * P);
  std::vector<ForwardParams<float>> forward(all.size());
  std::vector<BackwardParams<float>> backward(all.size());
  const auto zeros = [](Numbers& numbers, int64_t count) {
    numbers.resize(static_cast<size_t>(count));
    return numbers.data();
  };
  for (int64_t i = 0; i < D; ++i) {
    Direction& d = all[static_cast<size_t>(i)];
    d.w = random(4 * H * I, scale), d.u = random(4 * H * P, scale), d.b = random(4 * H), d.r = random(P * H, scale);
    d.gain = random(4 * H), d.gain_c = random(H), d.bias_c = random(H), d.dh = random(B * P);
    LayerParams<float> layer{};
    layer.shape = {T,
                   B,
                   I,
                   H,
                   P,
                   projected,
                   i == 1,
                   c.packed ? offsets.data() : nullptr,
                   c.resets ? resets.data() : nullptr,
                   c.two_directions};
    layer.weights = {d.w.data(), d.u.data(), d.b.data(), d.b.data(), projected ? d.r.data() : nullptr, {}};
    layer.input = {x.data(), B * I, I};
    layer.h0 = h0.data(), layer.c0 = c0.data();
    layer.reset_state.h = reset_h.data();
    layer.bf16_parts = 2;
    if (c.options) {
      layer.options.recurrent_mask = mask.data();
      layer.options.zoneout_h = {keep_h.data(), 0.1f};
      layer.options.zoneout_c = {nullptr, 0.2f};
    }
    if (c.norm) layer.options.norm = {d.gain.data(), d.gain.data(), d.gain_c.data(), d.bias_c.data()};

    ForwardParams<float>& f = forward[static_cast<size_t>(i)];
    static_cast<LayerParams<float>&>(f) = layer;
    f.output = {output.data() + i * P, B * D * P, D * P};
    f.h_n = zeros(d.h_n, B * P), f.c_n = zeros(d.c_n, B * H);
    if (!c.training) continue;
    f.cells = zeros(d.cells, N * H);
    f.gate_values = zeros(d.gates, N * 4 * H);
    if (projected) f.hidden = zeros(d.hidden, N * H);
    if (c.norm) {
      f.norm_input = zeros(d.norm_x, N * 4 * H), f.norm_recurrent = zeros(d.norm_h, N * 4 * H);
      f.norm_factors = zeros(d.factors, N * 2);
    }

    BackwardParams<float>& b = backward[static_cast<size_t>(i)];
    static_cast<LayerParams<float>&>(b) = layer;
    b.output = {f.output.data, f.output.stride_t, f.output.stride_b};
    b.cells = f.cells;
    if (!c.recompute) b.gate_values = f.gate_values, b.hidden = f.hidden;
    b.norm_input = f.norm_input, b.norm_recurrent = f.norm_recurrent, b.norm_factors = f.norm_factors;
    b.grad_output = {grad_output.data() + i * P, B * D * P, D * P};
    b.grad_h_n = d.dh.data();
    b.grad_c = zeros(d.grad_c, B * H);
    // A pass that adds to the gradient of the input does not run beside another one.
    if (!c.packed) b.grad_input = {grad_input.data(), B * I, I};
    b.accumulate_grad_input = i > 0;
    b.grad_h0 = zeros(d.grad_h0, B * P);
    if (c.resets) b.grad_reset_h = zeros(d.grad_reset_h, B * P), b.grad_reset_c = zeros(d.grad_reset_c, B * H);
    b.grad_weight_ih = zeros(d.grad_w, 4 * H * I), b.grad_weight_hh = zeros(d.grad_u, 4 * H * P);
    b.grad_bias = zeros(d.grad_b, 4 * H);
    if (projected) b.grad_weight_hr = zeros(d.grad_r, P * H);
    if (c.norm) {
      b.grad_gain_ih = zeros(d.grad_gain_ih, 4 * H), b.grad_gain_hh = zeros(d.grad_gain_hh, 4 * H);
      b.grad_gain_c = zeros(d.grad_gain_c, H), b.grad_bias_c = zeros(d.grad_bias_c, H);
    }
  }
  run(forward, &cpu::plan_forward<float>, kKernels.forward, threads, grids);
  if (c.training) run(backward, &cpu::plan_backward<float>, kKernels.backward, threads, grids);

  Results results{{output, grad_input}, {}};
  for (Direction& d : all) {
    for (Numbers* numbers : {&d.h_n, &d.c_n, &d.cells, &d.grad_c, &d.grad_h0, &d.grad_reset_h, &d.grad_reset_c,
                             &d.grad_w, &d.grad_u, &d.grad_r}) {
      results.exact.push_back(std::move(*numbers));
    }
    for (Numbers* numbers : {&d.grad_gain_ih, &d.grad_gain_hh, &d.grad_gain_c, &d.grad_bias_c}) {
      results.summed.push_back(std::move(*numbers));
    }
    (c.norm ? results.summed : results.exact).push_back(std::move(d.grad_b));
  }
  return results;
}

bool same_bits(const Numbers& a, const Numbers& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}
bool nearly(const Numbers& a, const Numbers& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(std::abs(a[i] - b[i]) <= 1e-4f * (1 + std::abs(b[i])))) return false;
  }
  return a.size() == b.size();
}
bool all_finite(const Numbers& numbers) {
  return std::all_of(numbers.begin(), numbers.end(), [](float number) { return std::isfinite(number); });
}

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

// One of six workers does not come: the others wait for it until the limit ends the process.
void wait_for_one() {
  constexpr int kWorkers = 6;
  cpu::LSTM_EXT_ISA::Barrier barrier{};
  cpu::change_wait_limit(0.2, 1);
  std::vector<std::thread> threads;
  for (int worker = 0; worker < kWorkers; ++worker) {
    threads.emplace_back([&, worker] {
      barrier.wait(kWorkers);
      if (worker != 2) barrier.wait(kWorkers);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main(int count, char** names) {
  if (count == 2 && std::string(names[1]) == "wait") wait_for_one();
  Grids most;
  bool right = true;
  for (const Case& c : kCases) {
    if (count > 1 && std::none_of(names + 1, names + count, [&](const char* n) { return std::string(n) == c.name; })) {
      continue;
    }
    Grids one, grids;
    const Results expected = compute(c, 1, one);
    bool well = std::all_of(expected.exact.begin(), expected.exact.end(), all_finite);
    for (int threads = 2; threads <= 8; ++threads) {
      const Results found = compute(c, threads, grids);
      well = well && std::equal(found.exact.begin(), found.exact.end(), expected.exact.begin(), same_bits) &&
             std::equal(found.summed.begin(), found.summed.end(), expected.summed.begin(), nearly);
    }
    std::printf("%s: %s; up to %d workers, %d teams, %d members, %d directions\n", c.name, well ? "same" : "WRONG",
                grids.workers, grids.teams, grids.members, grids.directions);
    std::fflush(stdout);
    right = right && well && grids.workers > 1;
    most = {std::max(most.teams, grids.teams), std::max(most.members, grids.members),
            std::max(most.directions, grids.directions), std::max(most.workers, grids.workers)};
  }
  for (const int workers : {2, 3, 4, 5, 16, 17, 21}) {
    const bool well = meets(workers);
    if (!well) std::printf("%d workers pass a barrier too soon\n", workers);
    right = right && well;
  }
  if (count > 1) return right ? 0 : 1;
  const bool all_kinds = most.teams > 1 && most.members > 1 && most.directions > 1 && most.workers == 8;
  return right && all_kinds ? 0 : 1;
}
