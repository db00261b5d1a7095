// NEON with the tile engine for bfloat16, in float32.
#define LSTM_EXT_ISA_NEON_BF16
#include "cpu/kernel_set.h"

LSTM_EXT_DEFINE_KERNELS(kernels_neon_bf16_f32, float)
