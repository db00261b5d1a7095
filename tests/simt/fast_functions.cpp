// The errors of cell_math.cuh's FastFunctions over all numbers of 32 bits, or every STRIDE-th one: fast_functions
// STRIDE OFFSET. The instructions are modelled by what PTX promises: 2^x within a factor of 1 +- 2^-22 (two units in
// the last place), 1/x within 1 +- 2^-23 (one), both rounded to a float, with 0 for what is below the normal numbers.
// Each result is monotonic in the result of either instruction, and so is rounding: the four corners are the worst
// there can be. Prints the largest errors, and ends with 1 if one is beyond what cell_math.cuh says.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda/cell_math.cuh"

namespace {

float rounded(double x) {
  const auto result = static_cast<float>(x);
  return std::fabs(result) < 0x1p-126f ? 0.0f : result;
}

template <int kExponential, int kReciprocal>
struct Corner {
  static float exp2(float x) {
    // All corners ask for the same powers.
    static float last = 0;
    static double power = 1;
    if (std::memcmp(&x, &last, sizeof x) != 0) power = std::exp2(static_cast<double>(last = x));
    return rounded(power * (1 + kExponential * 0x1p-22));
  }
  static float reciprocal(float x) { return rounded(1 / static_cast<double>(x) * (1 + kReciprocal * 0x1p-23)); }
};

struct Errors {
  double sigmoid = 0, tanh = 0, tanh_relative = 0;
  bool special = true;  // whether infinities and NaNs are what they should be
};

template <typename Instructions>
void add(Errors& errors, float x, double sigmoid, double tanh) {
  using Functions = lstm_ext::cuda::FastFunctions<Instructions>;
  const double s = Functions::sigmoid(x), t = Functions::tanh(x);
  if (std::isnan(x)) {
    errors.special = errors.special && std::isnan(s) && std::isnan(t);
    return;
  }
  if (std::isinf(x)) errors.special = errors.special && std::fabs(s - sigmoid) < 1e-6 && std::fabs(t - tanh) < 1e-6;
  // Written so that a NaN is the largest error.
  if (!(std::fabs(s - sigmoid) <= errors.sigmoid)) errors.sigmoid = std::fabs(s - sigmoid);
  if (!(std::fabs(t - tanh) <= errors.tanh)) errors.tanh = std::fabs(t - tanh);
  const double relative = tanh == 0 ? std::fabs(t) : std::fabs(t - tanh) / std::fabs(tanh);
  if (!(relative <= errors.tanh_relative)) errors.tanh_relative = relative;
}

}  // namespace

int main(int count, char** words) {
  const uint64_t stride = count > 1 ? std::strtoull(words[1], nullptr, 10) : 1;
  const uint64_t offset = count > 2 ? std::strtoull(words[2], nullptr, 10) : 0;
  Errors errors;
  uint64_t numbers = 0;
  for (uint64_t bits = offset; bits < uint64_t{1} << 32; bits += stride, ++numbers) {
    const auto word = static_cast<uint32_t>(bits);
    float x;
    std::memcpy(&x, &word, sizeof x);
    // Reductions that keep all digits on either side.
    const double e = std::exp(-std::fabs(static_cast<double>(x))), upper = 1 / (1 + e);
    const double sigmoid = x < 0 ? e / (1 + e) : upper, tanh = std::tanh(static_cast<double>(x));
    add<Corner<-1, -1>>(errors, x, sigmoid, tanh);
    add<Corner<-1, 1>>(errors, x, sigmoid, tanh);
    add<Corner<1, -1>>(errors, x, sigmoid, tanh);
    add<Corner<1, 1>>(errors, x, sigmoid, tanh);
  }
  std::printf("%llu numbers: sigmoid %.3g, tanh %.3g, relative %.3g\n", static_cast<unsigned long long>(numbers),
              errors.sigmoid, errors.tanh, errors.tanh_relative);
  if (!errors.special) std::puts("infinities or NaNs are not what they should be");
  return errors.special && errors.sigmoid <= 2.3e-7 && errors.tanh <= 4.5e-7 && errors.tanh_relative <= 8.6e-7 ? 0 : 1;
}
