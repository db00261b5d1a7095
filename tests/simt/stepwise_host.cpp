// The host's part of the stepwise layer as one unit: reading torch's headers takes longer than compiling these.
#include "cuda/gpu_plan.cpp"
#include "torch/checks.cpp"
#include "torch/cuda_stepwise_backward.cpp"
#include "torch/cuda_stepwise_forward.cpp"
#include "torch/gemm.cpp"
#include "torch/layer_call.cpp"
