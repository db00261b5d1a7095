#include "cuda/persistent_launch.cuh"

LSTM_EXT_PERSISTENT(__half)
