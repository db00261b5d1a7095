// SSE2, which every x86-64 CPU has, in float32.
#define LSTM_EXT_ISA_BASELINE
#include "cpu/kernel_set.h"

LSTM_EXT_DEFINE_KERNELS(kernels_baseline_f32, float)
