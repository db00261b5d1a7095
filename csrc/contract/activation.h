// The values of an Activation (see contract/params.h), and its derivative as a function of the value, which is what the
// backward pass has. A Math (see contract/cell.h) gives the parts.
#pragma once

#include "contract/params.h"

namespace lstm_ext::cell {

// A NaN stays one, so no function chooses a constant for it.
template <typename Math, typename T>
LSTM_EXT_CONTRACT_INLINE typename Math::Value activation_value(const Activation<T>& a, typename Math::Value z) {
  using Value = typename Math::Value;
  const Value zero = Math::number(0), one = Math::number(1), alpha = Math::number(a.alpha), beta = Math::number(a.beta);
  const Value minus_z = zero - z;
  switch (a.function) {
    case Function::kSigmoid: return Math::sigmoid(z);
    case Function::kTanh: return Math::tanh(z);
    case Function::kAffine: return Math::fma(alpha, z, beta);
    case Function::kRelu: return Math::where_positive(minus_z, zero, z);
    case Function::kLeakyRelu: return Math::where_positive(minus_z, alpha * z, z);
    case Function::kThresholdedRelu: return Math::unless(z, alpha, Math::where_positive(alpha - z, zero, z));
    case Function::kElu: return Math::where_positive(minus_z, alpha * Math::expm1(z), z);
    case Function::kScaledTanh: return alpha * Math::tanh(beta * z);
    case Function::kHardSigmoid: {
      const Value line = Math::fma(alpha, z, beta);
      return Math::where_positive(zero - line, zero, Math::where_positive(line - one, one, line));
    }
    case Function::kSoftsign: return Math::quotient(z, one + Math::where_positive(z, z, minus_z));
    case Function::kSoftplus: return Math::softplus(z);
  }
  return z;
}

template <typename Math, typename T>
LSTM_EXT_CONTRACT_INLINE typename Math::Value activation_slope(const Activation<T>& a, typename Math::Value value) {
  using Value = typename Math::Value;
  const Value zero = Math::number(0), one = Math::number(1), alpha = Math::number(a.alpha), beta = Math::number(a.beta);
  switch (a.function) {
    case Function::kSigmoid: return value * (one - value);
    case Function::kTanh: return one - value * value;
    case Function::kAffine: return alpha;
    case Function::kRelu:
    case Function::kThresholdedRelu: return Math::where_positive(value, one, zero);
    case Function::kLeakyRelu: return Math::where_positive(value, one, alpha);
    case Function::kElu: return Math::where_positive(value, one, value + alpha);
    case Function::kScaledTanh: return beta * (alpha - value * Math::quotient(value, alpha));
    case Function::kHardSigmoid:
      return Math::where_positive(value, Math::where_positive(one - value, alpha, zero), zero);
    case Function::kSoftsign: {
      const Value rest = one - Math::where_positive(value, value, zero - value);
      return rest * rest;
    }
    case Function::kSoftplus: return zero - Math::expm1(zero - value);
  }
  return one;
}

}  // namespace lstm_ext::cell
