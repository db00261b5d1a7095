// For nvcc: what wrappers_driver.cpp launches.
#include "simt/wrappers.cuh"

namespace wrappers {
template LSTM_KERNEL multiply<Format::F16>(Arguments);
template LSTM_KERNEL multiply<Format::BF16>(Arguments);
template LSTM_KERNEL multiply<Format::TF32>(Arguments);
}  // namespace wrappers
