// AVX-512 (F, BW, DQ, VL), in float32. With the tile engine.
#define LSTM_EXT_ISA_AVX512
#include "cpu/kernel_set.h"

LSTM_EXT_DEFINE_KERNELS(kernels_avx512_f32, float)
