#include "cuda/stepwise_launch.cuh"

LSTM_EXT_STEPWISE(__nv_bfloat16)
