// AVX2 (and FMA, F16C), in float32.
#define LSTM_EXT_ISA_AVX2
#include "cpu/kernel_set.h"

LSTM_EXT_DEFINE_KERNELS(kernels_avx2_f32, float)
