// The operators' library (_ops) hides its functions from other libraries.
#pragma once

// Marks what the Python module (_C), or kernels that tests bring along, use of the operators' library. The module calls
// its functions directly, because a call through torch's dispatcher costs microseconds that a small layer would notice.
#define LSTM_EXT_PUBLIC __attribute__((visibility("default")))
