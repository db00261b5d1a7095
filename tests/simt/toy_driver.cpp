// Runs one toy kernel against float64: toy_driver KERNEL [BUG] [STEPS] [BATCH]. How it is emulated: SIMT_... variables.
// Ends with 0: right, 1: wrong numbers, 2: simt::Error, 3: a wait expired.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "simt/global_memory.h"
#include "simt/toy_lstm.cuh"

namespace {

constexpr int kHidden = 128;
constexpr int kUnits = 16;
constexpr int kBatch = 16;
constexpr int kBlocks = kHidden / kUnits;

float rounded(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

struct Problem {
  int steps;
  int batch;
  std::vector<float> projected, u, c0, h0;
  std::vector<double> h, c;  // what should come out

  Problem(int steps_, int batch_) : steps(steps_), batch(batch_) {
    std::mt19937 random(7);
    std::uniform_real_distribution<float> uniform(-1.f, 1.f);
    const auto fill = [&](std::vector<float>& values, size_t count, float scale) {
      values.resize(count);
      for (float& value : values) value = scale * uniform(random);
    };
    const size_t rows = static_cast<size_t>(batch);
    fill(projected, static_cast<size_t>(steps) * rows * 4 * kHidden, 1.f);
    fill(u, 4 * kHidden * kHidden, 1.f / std::sqrt(static_cast<float>(kHidden)));
    fill(c0, rows * kHidden, 0.5f);
    fill(h0, rows * kHidden, 0.5f);
  }

  void solve(bool bf16) {
    const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
    const size_t state = static_cast<size_t>(batch) * kHidden;
    h.assign((steps + 1) * state, 0);
    for (size_t i = 0; i < state; ++i) h[i] = h0[i];
    c.assign(c0.begin(), c0.end());
    for (int t = 0; t < steps; ++t) {
      for (int row = 0; row < batch; ++row) {
        for (int unit = 0; unit < kHidden; ++unit) {
          double gates[4];
          for (int q = 0; q < 4; ++q) {
            gates[q] = projected[((static_cast<size_t>(t) * batch + row) * 4 + q) * kHidden + unit];
            for (int k = 0; k < kHidden; ++k) {
              float weight = u[(static_cast<size_t>(q) * kHidden + unit) * kHidden + k];
              double before = h[t * state + row * kHidden + k];
              if (bf16) {
                weight = rounded(weight);
                before = rounded(static_cast<float>(before));
              }
              gates[q] += double{weight} * before;
            }
          }
          double& cell = c[row * kHidden + unit];
          cell = sigmoid(gates[1]) * cell + sigmoid(gates[0]) * std::tanh(gates[2]);
          h[(t + 1) * state + row * kHidden + unit] = sigmoid(gates[3]) * std::tanh(cell);
        }
      }
    }
  }
};

double largest_error(const simt::DeviceBuffer<float>& got, const std::vector<double>& wanted) {
  double largest = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double error = std::fabs(got[i] - wanted[i]);
    if (!(error <= largest)) largest = error;  // NaN too
    if (std::isnan(error)) return error;
  }
  return largest;
}

int run(const std::string& kernel, int bug, int steps, int batch) {
  using lstm_ext::cuda::LaunchConfig;
  const bool bf16 = kernel == "grid_bf16";
  Problem problem(steps, batch);
  problem.solve(bf16);
  const size_t state = static_cast<size_t>(batch) * kHidden;
  const unsigned threads = kUnits * kBatch;

  simt::DeviceBuffer<float> projected(problem.projected, "projected");
  simt::DeviceBuffer<float> u(problem.u, "U");
  simt::DeviceBuffer<__nv_bfloat16> u_bf16(problem.u.size(), "U (bf16)");
  simt::DeviceBuffer<float> c0(problem.c0, "c0");
  simt::DeviceBuffer<float> h((steps + 1) * state, "h");
  simt::DeviceBuffer<__nv_bfloat16> h_bf16((steps + 1) * state, "h (bf16)");
  simt::DeviceBuffer<float> c(state, "c");
  simt::DeviceBuffer<float> norms(kBlocks * threads / 32, "norms");
  simt::DeviceBuffer<uint32_t> arrivals(1, 0u, "arrivals");
  simt::DeviceBuffer<uint32_t> status(1, 0u, "status");
  for (size_t i = 0; i < problem.u.size(); ++i) u_bf16[i] = __float2bfloat16_rn(problem.u[i]);
  for (size_t i = 0; i < state; ++i) {
    h[i] = problem.h0[i];
    h_bf16[i] = __float2bfloat16_rn(problem.h0[i]);
  }
  const toy::Arguments arguments{
      projected.data(), u.data(),      u_bf16.data(), c0.data(), h.data(), h_bf16.data(), c.data(), norms.data(),
      arrivals.data(),  status.data(), steps,         batch,     bug};
  LaunchConfig config;
  config.grid = dim3(kBlocks);
  config.block = dim3(threads);
  void (*entry)(toy::Arguments) = nullptr;
  if (kernel == "grid_f32") {
    entry = toy::grid_f32<kHidden, kUnits, kBatch>;
    config.cooperative = true;
    config.dynamic_shared = (4 * kUnits + kBatch) * kHidden * sizeof(float);
  } else if (bf16) {
    entry = toy::grid_bf16<kHidden, kUnits, kBatch>;
    config.cooperative = true;
    config.dynamic_shared =
        4 * kUnits * (kBatch + 4) * sizeof(float) + (4 * kUnits + kBatch) * (kHidden + 8) * sizeof(__nv_bfloat16);
  } else {
    std::fprintf(stderr, "no kernel %s\n", kernel.c_str());
    return 64;
  }

  lstm_ext::cuda::launch(entry, config, arguments);
  if (status[0] != 0) {
    std::printf("a wait expired\n");
    return 3;
  }
  // Where no bits are lost on the way, all that differs is the order of sums in float32.
  const double tolerance = bf16 ? 4e-3 : 2e-5;
  double error = std::fmax(largest_error(h, problem.h), largest_error(c, problem.c));
  if (std::isnan(largest_error(h, problem.h)) || std::isnan(largest_error(c, problem.c))) error = NAN;
  if (!bf16) {
    // Warp w of block r: units 16 r to 16 r + 15 of rows 2 w and 2 w + 1.
    for (unsigned i = 0; i < norms.size(); ++i) {
      double wanted = 0;
      for (int lane = 0; lane < 32; ++lane) {
        const int row = static_cast<int>(i % (threads / 32)) * 2 + lane / kUnits;
        const int unit = static_cast<int>(i / (threads / 32)) * kUnits + lane % kUnits;
        if (row < batch) wanted += std::pow(problem.h[steps * state + row * kHidden + unit], 2);
      }
      const double difference = std::fabs(norms[i] - wanted);
      if (!(difference <= tolerance)) error = difference;
    }
  }
  const simt::Statistics& did = simt::statistics();
  std::printf("largest error %.3g; %llu switches, %llu barriers, %llu polls, %llu mmas, %llu copies\n", error,
              static_cast<unsigned long long>(did.switches), static_cast<unsigned long long>(did.barriers),
              static_cast<unsigned long long>(did.polls), static_cast<unsigned long long>(did.mmas),
              static_cast<unsigned long long>(did.copies));
  if (error <= tolerance) return 0;
  std::printf("wrong numbers\n");
  return 1;
}

}  // namespace

int main(int count, char** words) {
  if (count < 2) return 64;
  const auto number = [&](int index, int otherwise) { return count > index ? std::atoi(words[index]) : otherwise; };
  try {
    return run(words[1], number(2, toy::kNone), number(3, 4), number(4, 14));
  } catch (const simt::Error& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
}
