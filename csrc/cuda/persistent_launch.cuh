// Starts the persistent kernels. Each persistent_*.cu instantiates these functions for one type.
#pragma once

#include "cuda/persistent_backward.cuh"
#include "cuda/persistent_forward.cuh"

namespace lstm_ext::cuda {

template <typename Pass>
cudaError_t start_persistent(const PersistentSides<typename Pass::Arguments>& args, cudaStream_t stream) {
  return args.row_tiles == 1 ? start_persistent<Pass, 1>(args, stream) : start_persistent<Pass, 2>(args, stream);
}

template <template <typename, bool> class Pass, typename T, typename Arguments>
cudaError_t start_persistent(const PersistentSides<Arguments>& args, cudaStream_t stream) {
  const bool options = args.sides[0].cell.rows.options;
  return options ? start_persistent<Pass<T, true>>(args, stream) : start_persistent<Pass<T, false>>(args, stream);
}

template <typename T>
cudaError_t persistent_forward(const PersistentSides<PersistentForward<T>>& args, cudaStream_t stream) {
  return start_persistent<PersistentForwardPass, T>(args, stream);
}

template <typename T>
cudaError_t persistent_backward(const PersistentSides<PersistentBackward<T>>& args, cudaStream_t stream) {
  return start_persistent<PersistentBackwardPass, T>(args, stream);
}

}  // namespace lstm_ext::cuda

#define LSTM_EXT_PERSISTENT(T)                                                                                        \
  namespace lstm_ext::cuda {                                                                                          \
  template cudaError_t persistent_forward<T>(const PersistentSides<PersistentForward<T>>& args, cudaStream_t stream); \
  template cudaError_t persistent_backward<T>(const PersistentSides<PersistentBackward<T>>& args,                     \
                                              cudaStream_t stream);                                                   \
  }
