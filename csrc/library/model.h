// A model: what its streams compute with.
#pragma once

#include "cpu/kernels.h"
#include "library/lstm_ext.h"
#include "library/weights_file.h"

namespace lstm_ext::library {

// The weights of a direction of a layer, and its options.
template <typename T>
struct Direction {
  FrozenWeights<T> weights;
  StepOptions<T> options;
};

}  // namespace lstm_ext::library

struct lstm_ext_model {
  lstm_ext::library::FileHeader header;
  const lstm_ext::cpu::Capability* capability;
  void* directions;  // a Direction for each direction of each layer
  bool allocated;

  bool float64() const { return header.float64 != 0; }
  template <typename T>
  const lstm_ext::library::Direction<T>& direction(int64_t layer, int64_t d) const {
    return static_cast<const lstm_ext::library::Direction<T>*>(directions)[layer * header.directions + d];
  }
};
