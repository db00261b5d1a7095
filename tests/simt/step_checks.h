// What the drivers of the fused and of the persistent kernels share.
#pragma once

#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/numeric.cuh"
#include "simt/check.h"

namespace checks {

inline std::mt19937 random_bits(5);

template <typename T>
T of(double x) {
  return lstm_ext::cuda::from_float<T>(static_cast<float>(x));
}
template <typename T>
double number(T x) {
  return lstm_ext::cuda::to_float(x);
}

template <typename T>
constexpr double eps() {
  return std::is_same_v<T, float> ? 0x1p-23 : std::is_same_v<T, __half> ? 0x1p-10 : 0x1p-7;
}

template <typename T>
const char* name_of_type() {
  return std::is_same_v<T, float> ? "float" : std::is_same_v<T, __half> ? "half" : "bfloat16";
}

// (rows, length) numbers of three bits times `scale`, in rows that begin at multiples of 16 bytes; what lies between
// stays NaN.
template <typename T>
struct Matrix {
  int64_t stride;
  simt::DeviceBuffer<T> data;
  Matrix(int64_t rows, int64_t length, const char* name, double scale = 1)
      : stride((length * static_cast<int64_t>(sizeof(T)) + 15) / 16 * (16 / static_cast<int64_t>(sizeof(T)))),
        data(static_cast<size_t>(rows * stride), name) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < length; ++j)
        data[i * stride + j] = of<T>((static_cast<int>(random_bits() % 15) - 7) / 8. * scale);
    }
  }
};

template <typename T>
simt::DeviceBuffer<T> normal(size_t count, const char* name) {
  std::normal_distribution<double> draw;
  std::vector<T> values(count);
  for (T& value : values) value = of<T>(draw(random_bits));
  return simt::DeviceBuffer<T>(values, name);
}

// The kernels that ran, by what they are instantiated for.
inline std::set<std::string> instances;

}  // namespace checks
