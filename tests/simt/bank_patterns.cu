// For nvcc: what bank_patterns_driver.cpp launches.
#include "simt/bank_patterns.cuh"

template LSTM_KERNEL banks::patterns<0>(banks::Arguments);
