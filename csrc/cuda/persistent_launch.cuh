// Starts the persistent kernels. Each persistent_*.cu instantiates these functions for one type.
#pragma once

#include "cuda/persistent_backward.cuh"
#include "cuda/persistent_forward.cuh"

namespace lstm_ext::cuda {

template <template <typename, bool> class Pass, typename T, typename Arguments>
cudaError_t start_persistent(const PersistentSides<Arguments>& args, Exchange exchange, cudaStream_t stream) {
  const bool options = args.sides[0].cell.rows.options;
  if (exchange == Exchange::kMailbox) {
    return options ? start_persistent<Pass<T, true>, Exchange::kMailbox>(args, stream)
                   : start_persistent<Pass<T, false>, Exchange::kMailbox>(args, stream);
  }
  return options ? start_persistent<Pass<T, true>, Exchange::kNone>(args, stream)
                 : start_persistent<Pass<T, false>, Exchange::kNone>(args, stream);
}

template <typename T>
cudaError_t persistent_forward(const PersistentSides<PersistentForward<T>>& args, Exchange exchange,
                               cudaStream_t stream) {
  return start_persistent<PersistentForwardPass, T>(args, exchange, stream);
}

template <typename T>
cudaError_t persistent_backward(const PersistentSides<PersistentBackward<T>>& args, Exchange exchange,
                                cudaStream_t stream) {
  return start_persistent<PersistentBackwardPass, T>(args, exchange, stream);
}

}  // namespace lstm_ext::cuda

#define LSTM_EXT_PERSISTENT(T)                                                                                       \
  namespace lstm_ext::cuda {                                                                                         \
  template cudaError_t persistent_forward<T>(const PersistentSides<PersistentForward<T>>& args, Exchange exchange,   \
                                             cudaStream_t stream);                                                   \
  template cudaError_t persistent_backward<T>(const PersistentSides<PersistentBackward<T>>& args, Exchange exchange, \
                                              cudaStream_t stream);                                                  \
  }
