// The arguments of the persistent CUDA kernels: one launch does all time steps of a chunk of the sequence, with the
// weights of a block in its registers. Plain data, no torch. They take what the stepwise kernels take (cuda/stepwise.h)
// for the first row of the chunk, and find the rest of a step by its place.
//
// The units of some rows are spread over a group of blocks. What a step leaves for the next one, h forward and the
// gates' gradients backward, goes through a mailbox in global memory: a block writes its part, and the others poll it.
// Each piece of 16 bytes is written once; before the launch all bits of the mailbox are set, and a piece has come when
// none of its words is kSentinel. Data are their own flag.
#pragma once

#include "cuda/gpu_plan.h"
#include "cuda/stepwise.h"

namespace lstm_ext::cuda {

constexpr int kPersistentPackedSteps = 256;  // most steps in a chunk of packed data

// A word that no piece has: half of it is a NaN in 16 bits, all of it one in 32, and kernels write another NaN.
constexpr uint32_t kSentinel = 0xffffffffu;

// The steps [first, end) of a direction, in its order.
struct ChunkOfSteps {
  int32_t first, end;
  int32_t count;  // steps of the sequence
  int32_t batch;
  bool reverse;
  bool packed;
  // Packed: rows before each time, without those that lie before the chunk: from the time before the chunk's first one
  // in memory to the time after its last one, and the end of that. A time that there is not has no rows.
  int32_t rows_before[kPersistentPackedSteps + 3];
};

// The data that a step passes to the next one in the pass: (rows, length), in the layout that the next product reads.
template <typename D>
struct Mailbox {
  D* slots;         // rows of the chunk
  const D* before;  // (B, length): the step before the chunk in the pass; null if there is none
  int64_t length;   // H, or 4 H gate by gate, H rounded up to whole pieces
};

// Control words between the blocks of a launch: 0 if one has given up; how many have left, and how many have come, less
// one.
enum ControlWord { kGaveUp, kBlocksThatLeft, kBlocksThatCame, kControlWords };
constexpr int kForBlocks = 16;  // a block may take so many times the limit of a wait to come
// All bits of the words are set before the launch, except those of `before`.
struct PersistentControl {
  uint32_t* words;
  const uint32_t* before;  // those of the launch in front of this one, or null
  uint32_t* status;        // status word of the host: 1 if somebody gave up
  int64_t limit;           // longest wait once all blocks have come, in nanoseconds; 0: no limit
};

// T is what is stored; the product's operands are T forward, and Types<T>::Gradient backward.
template <typename T>
struct PersistentForward {
  // Arguments from the chunk's first row in memory on; c_previous.previous and c are the same array, which holds one
  // step only if cells are not kept. Not read: cell.recurrent_part, output.recurrent_h, and cell.rows except lengths,
  // reverse and options.
  CellForward<T> cell;
  ChunkOfSteps steps;
  const uint8_t* resets;  // as the caller gave them, from the chunk's first row on, or null
  bool keeps_cells;
  bool batch_first;  // input_part has all steps: row t, and not row t * B, is the first one of time t
  const T* weight;   // U (4H, H)
  int64_t weight_stride;
  Mailbox<T> mailbox;
};

template <typename T>
struct PersistentBackward {
  using Gradient = typename Types<T>::Gradient;
  // The same, except that c_previous.previous is `cells`, and output.grad_output begins at time 0 if it is by time.
  // grad_recurrent_part is null if it is the mailbox itself; output.recurrent_part is not read.
  CellBackward<T> cell;
  ChunkOfSteps steps;
  const uint8_t* resets;
  bool grad_output_by_time;  // its times are grad_output_time_stride apart; else its rows lie as those of the sequence
  int64_t grad_output_time_stride;
  const Gradient* weight;  // U transposed, (H, mailbox.length): a row is a unit's four gates, each padded with zeros
  Mailbox<Gradient> mailbox;
};

// One or two directions, and how the launch is divided.
template <typename Pass>
struct PersistentSides {
  Pass sides[2];
  int count;
  int groups;     // groups of blocks that have all units; they take tiles of rows by turns
  int row_tiles;  // tiles that a group takes at once: 1 or 2
  int extra;      // pieces of a thread's weights that lie in shared memory; none with two tiles
  PersistentControl control;
};

// Each starts one kernel on the stream, waits for nothing, and returns the launch's own error. For float (whose
// operands are rounded to TF32), __half and __nv_bfloat16; without projection and layer normalisation. The grid
// follows from the sizes.
template <typename T>
cudaError_t persistent_forward(const PersistentSides<PersistentForward<T>>& args, cudaStream_t stream);
template <typename T>
cudaError_t persistent_backward(const PersistentSides<PersistentBackward<T>>& args, cudaStream_t stream);

}  // namespace lstm_ext::cuda
