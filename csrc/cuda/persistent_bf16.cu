#include "cuda/persistent_launch.cuh"

LSTM_EXT_PERSISTENT(__nv_bfloat16)
