// The way of a state from one step to the next, forward and backward: where the state before a step comes from, and how
// much of it zoneout keeps. Like contract/cell.h, for both backends and a test in float64; Math is described there.
//
// A Zoneout is an accessor of some elements of a state. It has
//
//   flagged()           whether a flag chooses for each element
//   where_kept(a, b)    a where the flag keeps the previous value, else b; nothing is multiplied, so an infinite value
//                       that is not chosen does no harm
//   share()             without flags: the share of the previous value that is kept
#pragma once

#include "contract/layer.h"

namespace lstm_ext::transition {

// The state that a row has before a step. A reset replaces whatever was there.
enum class Source { kStepBefore, kBeginning, kReset };
LSTM_EXT_CONTRACT_INLINE Source source_of(bool reset, bool continues) {
  return reset ? Source::kReset : continues ? Source::kStepBefore : Source::kBeginning;
}

// The state after a step, from the cell's result and the state before.
template <typename Math, typename Zoneout>
LSTM_EXT_CONTRACT_INLINE typename Math::Value kept_state(const Zoneout& zoneout, typename Math::Value fresh,
                                                         typename Math::Value previous) {
  if (zoneout.flagged()) return zoneout.where_kept(previous, fresh);
  const auto share = zoneout.share();
  // Interpolates from the nearer end, like torch.lerp.
  if (share < 0.5f) return Math::fma(Math::number(share), previous - fresh, fresh);
  return Math::fma(Math::number(1 - share), fresh - previous, previous);
}

template <typename Math>
struct StateGradient {
  typename Math::Value fresh, previous;  // the parts of the cell's result and of the state before
};
// Splits the gradient of the state after a step.
template <typename Math, typename Zoneout>
LSTM_EXT_CONTRACT_INLINE StateGradient<Math> split_gradient(const Zoneout& zoneout, typename Math::Value grad) {
  if (zoneout.flagged()) {
    const auto zero = Math::number(0);
    return {zoneout.where_kept(zero, grad), zoneout.where_kept(grad, zero)};
  }
  const auto previous = grad * Math::number(zoneout.share());
  return {grad - previous, previous};
}

}  // namespace lstm_ext::transition
