#include "cuda/step_launch.cuh"

LSTM_EXT_STEP(__half)
