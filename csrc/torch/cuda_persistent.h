// Shared by both passes to start a persistent kernel: the table of a chunk's steps, and the memory through which blocks
// and launches communicate.
#pragma once

#include <exception>
#include <list>

#include "cuda/persistent.h"
#include "torch/cuda_stepwise_common.h"

namespace lstm_ext {

inline cuda::ChunkOfSteps chunk_of_steps(const Steps& steps, const Chunk& chunk, bool reverse, int64_t batch) {
  cuda::ChunkOfSteps result{};
  result.first = static_cast<int32_t>(chunk.first);
  result.end = static_cast<int32_t>(chunk.end);
  result.count = static_cast<int32_t>(steps.count());
  result.batch = static_cast<int32_t>(batch);
  result.reverse = reverse;
  result.packed = steps.packed();
  if (!steps.packed()) return result;
  int64_t rows = chunk.begin > 0 ? -steps.rows_at(chunk.begin - 1) : 0;
  int32_t* next = result.rows_before;
  for (int64_t time = chunk.begin - 1; time <= chunk.finish; ++time) {
    *next++ = static_cast<int32_t>(rows);
    if (time >= 0 && time < steps.count()) rows += steps.rows_at(time);
  }
  *next = static_cast<int32_t>(rows);
  return result;
}

// The device refused a launch for which the plan found room, because others use the device too. Another kernel then
// computes the layer, and later calls do not ask for so many blocks again.
struct LaunchRefused : std::exception {
  const char* what() const noexcept override { return "lstm_ext: a persistent kernel was refused"; }
};
inline void raise_if_refused(cudaError_t error, const StepwiseDevice& device, const cuda::Plan::Persistent& plan) {
  if (error != cudaErrorCooperativeLaunchTooLarge && error != cudaErrorLaunchOutOfResources) return;
  TORCH_WARN_ONCE("lstm_ext: the GPU refused to start ", plan.blocks, " blocks of a persistent kernel at once (",
                  cudaGetErrorString(error), "), so that another kernel computes the layer. ",
                  "LSTM_EXT_CUDA_KERNEL=step asks for one that does not need that");
  cuda::note_refused(device.facts, plan.blocks);
  throw LaunchRefused();
}

// Runs `compute` on the device; if it refuses a launch, again without persistent kernels.
template <typename Compute>
auto without_refused(const StepwiseDevice& device, Compute&& compute) {
  try {
    return compute(device);
  } catch (const LaunchRefused&) {
    StepwiseDevice other = device;
    other.request = {};
    other.request.step = cuda::Outcome::kRight;
    return compute(other);
  }
}

// The launches of a layer: how they divide the work, and the memory that one passes to the next.
class PersistentLaunches {
 public:
  PersistentLaunches(const cuda::Plan::Persistent& plan, const StepwiseDevice& device, const at::TensorOptions& options)
      : plan_(plan), device_(device), options_(options.dtype(at::kByte)) {}

  // Runs all steps of the chunk of each side in one launch: args_of(side, offset) gives the arguments without their
  // mailbox, which lies at `offset`. A row passes `gates` rows of H numbers on, each rounded up to whole pieces.
  template <typename D, typename Pass, typename Side, typename ArgsOf>
  void run(cudaError_t (*kernel)(const cuda::PersistentSides<Pass>&, cudaStream_t), const char* name,
           std::list<Side>& sides, int64_t gates, int64_t hidden_size, const ArgsOf& args_of) {
    const int64_t length = gates * aligned_length(hidden_size, sizeof(D));
    int64_t bytes = kControlBytes;
    for (const Side& side : sides) bytes += rows_of(side) * length * static_cast<int64_t>(sizeof(D));
    before_ = memory_;                                   // the launch still reads the earlier memory
    memory_ = at::empty({bytes}, options_).fill_(0xff);  // which marks empty mailboxes
    cuda::PersistentSides<Pass> launch{};
    launch.groups = plan_.groups;
    launch.row_tiles = plan_.row_tiles;
    launch.extra = plan_.extra;
    launch.control = {row_pointer<uint32_t>(memory_), row_pointer<const uint32_t>(before_), device_.status,
                      device_.wait_limit};
    int64_t offset = kControlBytes;
    for (Side& side : sides) {
      Pass& args = launch.sides[launch.count++];
      args = args_of(side, offset);
      args.mailbox = {reinterpret_cast<D*>(row_pointer<char>(memory_, offset)), static_cast<const D*>(side.left),
                      length};
      side.left = args.mailbox.slots + side.row_left() * length;
      offset += rows_of(side) * length * static_cast<int64_t>(sizeof(D));
    }
    const cudaError_t error = kernel(launch, device_.stream);
    raise_if_refused(error, device_, plan_);
    check(error, name);
  }
  // A part of the launch's memory as a matrix.
  at::Tensor matrix(int64_t offset, int64_t rows, int64_t length, at::ScalarType type) const {
    const int64_t bytes = rows * length * static_cast<int64_t>(c10::elementSize(type));
    return memory_.narrow(0, offset, bytes).view(type).view({rows, length});
  }

  template <typename Side>
  static int64_t rows_of(const Side& side) {
    return side.steps.rows_before(side.running().finish) - side.steps.rows_before(side.running().begin);
  }

 private:
  static constexpr int64_t kControlBytes = 64;

  const cuda::Plan::Persistent plan_;
  const StepwiseDevice& device_;
  const at::TensorOptions options_;
  at::Tensor memory_, before_;  // memory of this launch, and of the previous one
};

}  // namespace lstm_ext
