// The operators' library (_ops), and in a wheel that of the kernels, hide their functions from other libraries.
#pragma once

// Marks the functions of the operators' library that the Python module (_C), a wheel's library of the CUDA kernels, or
// kernels added by tests call. The module calls them directly, because a call through torch's dispatcher costs
// microseconds, which is noticeable for a small layer.
#define LSTM_EXT_PUBLIC __attribute__((visibility("default")))
