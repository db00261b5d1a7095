// The operators' library (_ops) hides its functions from other libraries.
#pragma once

// Marks a function that the Python module (_C) calls in the operators' library. It calls them directly, because a call
// through torch's dispatcher costs microseconds that a small layer would notice.
#define LSTM_EXT_PUBLIC __attribute__((visibility("default")))
