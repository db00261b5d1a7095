// NEON, which every AArch64 CPU has, in float64.
#define LSTM_EXT_ISA_NEON
#include "cpu/kernel_set.h"

LSTM_EXT_DEFINE_KERNELS(kernels_neon_f64, double)
