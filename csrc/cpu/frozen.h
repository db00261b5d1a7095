// Memory in which one thing lies behind the other, and the frozen weights of a direction in such memory: the operators
// and the C library keep it.
#pragma once

#include <cstring>

#include "cpu/cost.h"
#include "cpu/kernels.h"

namespace lstm_ext::cpu {

// Hands out places in memory, each at a multiple of a cache line behind `base`, or only counts their bytes if there is
// no memory. So one walk over all that lies there gives its size, and again its places.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    char* const at = base ? base + used : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), kCacheLine);
    return reinterpret_cast<T*>(at);
  }
};

// The kind in which a direction keeps weights that were rounded to `rounded_to`. Few weights are in the caches in any
// case, and unrounded numbers need no widening.
inline WeightKind kept_kind(const LayerShape& shape, WeightKind rounded_to) {
  constexpr int64_t kFewWeights = 20'000;
  const bool few = 4 * shape.hidden_size * (shape.input_size + shape.output_size) <= kFewWeights;
  return few ? WeightKind::kOwn : rounded_to;
}

// The weights of a plan. `lanes` as in Machine.
template <typename T>
FrozenWeights<T> place_frozen(Arena& arena, const LayerShape& shape, const FrozenPlan& plan, int64_t lanes) {
  const int64_t H = shape.hidden_size, padded = round_up(H, lanes);
  const auto gates = [&](int64_t depth) {
    typename FrozenWeights<T>::Gates weight{};
    const int64_t numbers = 4 * padded * depth;
    weight.narrow.kind = plan.kind;
    switch (plan.kind) {
      case WeightKind::kOwn: weight.panels = arena.take<T>(numbers); break;
      case WeightKind::kBFloat16:
      case WeightKind::kFloat16: weight.narrow.data = arena.take<uint16_t>(numbers); break;
      case WeightKind::kInt8:
        weight.narrow.data = arena.take<int8_t>(4 * padded * round_up(depth, 4));  // see int8_place
        weight.narrow.factors = arena.take<T>(4 * H);
        break;
    }
    if (plan.bf16_parts > 0) {
      weight.all_split = arena.take<uint8_t>(divide_up(H, kEngineTileRows));
      weight.bf16 = arena.take<uint16_t>(bf16_numbers(4 * padded, depth, plan.bf16_parts));
    }
    return weight;
  };
  FrozenWeights<T> weights{gates(shape.input_size), gates(shape.output_size), nullptr,
                           arena.take<T>(4 * H),    plan.bf16_parts,          false};
  if (shape.projected) weights.projection_panels = arena.take<T>(round_up(shape.output_size, lanes) * H);
  return weights;
}

// Packs weights, which are already rounded, into memory of plan.bytes. `factors`: with int8, those of the rows of W and
// of U. Those of a GRU are (4H), as its biases, with gaps; the weights are (3H, n).
template <typename T>
FrozenWeights<T> freeze(const Kernels<T>& kernels, const LayerWeights<T>& weights, const void* const (&factors)[2],
                        const LayerShape& shape, const FrozenPlan& plan, char* memory, bool gru = false) {
  Arena arena{memory};
  FrozenWeights<T> places = place_frozen<T>(arena, shape, plan, kernels.lanes);
  places.gru = gru;
  if (plan.kind == WeightKind::kInt8) {
    const size_t bytes = static_cast<size_t>(4 * shape.hidden_size) * sizeof(T);
    std::memcpy(const_cast<T*>(places.input.narrow.factors), factors[0], bytes);
    std::memcpy(const_cast<T*>(places.recurrent.narrow.factors), factors[1], bytes);
  }
  kernels.freeze(weights, shape, places);
  return places;
}

}  // namespace lstm_ext::cpu
