// Conversions between the types that tensors are stored in and those that are computed in.
#pragma once

#include "cuda/platform.h"

namespace lstm_ext::cuda {

// The type of sums and cell states.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using accumulator_t = typename Accumulator<T>::type;

LSTM_HOST_DEVICE float to_float(float value) { return value; }
LSTM_HOST_DEVICE float to_float(double value) { return static_cast<float>(value); }
LSTM_HOST_DEVICE float to_float(__half value) { return __half2float(value); }
LSTM_HOST_DEVICE float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// To nearest, ties to even.
template <typename T>
LSTM_HOST_DEVICE T from_float(float value);
template <>
LSTM_HOST_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
LSTM_HOST_DEVICE double from_float<double>(float value) {
  return static_cast<double>(value);
}
template <>
LSTM_HOST_DEVICE __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
LSTM_HOST_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Between storage and accumulation: float64 stays float64.
LSTM_HOST_DEVICE double widen(double value) { return value; }
LSTM_HOST_DEVICE float widen(float value) { return value; }
LSTM_HOST_DEVICE float widen(__half value) { return to_float(value); }
LSTM_HOST_DEVICE float widen(__nv_bfloat16 value) { return to_float(value); }

template <typename T>
LSTM_HOST_DEVICE T narrow(accumulator_t<T> value) {
  return from_float<T>(value);
}
template <>
LSTM_HOST_DEVICE double narrow<double>(double value) {
  return value;
}

}  // namespace lstm_ext::cuda
