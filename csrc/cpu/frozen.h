// Frozen weights in the bytes that a FrozenPlan lays out, for those who keep such bytes: the operators and the C
// library.
#pragma once

#include "cpu/plan.h"

namespace lstm_ext::cpu {

// The kind in which a direction keeps weights that were rounded to `rounded_to`. Few weights are in the caches in any
// case, and unrounded numbers need no widening.
inline WeightKind kept_kind(const LayerShape& shape, WeightKind rounded_to) {
  constexpr int64_t kFewWeights = 20'000;
  const bool few = 4 * shape.hidden_size * (shape.input_size + shape.output_size) <= kFewWeights;
  return few ? WeightKind::kOwn : rounded_to;
}

// The weights in the places of the plan, relative to `data`.
template <typename T>
FrozenWeights<T> frozen_weights(const FrozenPlan& plan, const char* data) {
  const auto gates = [&](const FrozenPlan::Gates& place) {
    typename FrozenWeights<T>::Gates weight{};
    if (plan.kind == WeightKind::kOwn) {
      weight.panels = reinterpret_cast<const T*>(data + place.panels);
    } else {
      weight.narrow = {data + place.panels, plan.kind, reinterpret_cast<const T*>(data + place.factors)};
    }
    if (plan.bf16_parts > 0) {
      weight.bf16 = reinterpret_cast<const uint16_t*>(data + place.bf16);
      weight.all_split = reinterpret_cast<const uint8_t*>(data + place.all_split);
    }
    return weight;
  };
  return {gates(plan.input), gates(plan.recurrent), reinterpret_cast<const T*>(data + plan.projection_panels),
          reinterpret_cast<const T*>(data + plan.bias), plan.bf16_parts};
}

}  // namespace lstm_ext::cpu
