// Random numbers of every type of the kernels, and what is expected of results.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "simt/check.h"
#include "simt/global_memory.h"

namespace {

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

// A number of type T that is computed in sums of another type may be off by a few roundings of each, and of terms of
// the size `terms`.
template <typename T>
void expect_near(T got, double expected, const std::string& what, double terms = 0) {
  const double x = to_double(got);
  checks::expect(std::fabs(x - expected) <= 8 * eps<T>() * (1 + std::fabs(expected) + terms),
                 what + ": " + std::to_string(x) + ", expected " + std::to_string(expected));
}
template <typename T>
void expect_equal(T got, double expected, const std::string& what) {
  checks::expect(to_double(got) == expected, what + ": " + std::to_string(to_double(got)));
}

}  // namespace
