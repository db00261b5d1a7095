// Which kernels compute a layer on a GPU, and why: a pure function of the layer, of the device, and of what is
// requested. Plain C++17 without CUDA's headers, so that every build can answer, for any device.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "contract/visibility.h"

namespace lstm_ext::cuda {

// The fused step: one step in one launch. A block has kStepUnits hidden units. The forward pass updates their cells;
// the backward pass multiplies the gradients of their gates by U. So a backward step leaves a sum of step_parts parts.
constexpr int kStepThreads = 128;
constexpr int kStepStages = 4;  // stages of the ring of tiles in shared memory
constexpr int kStepUnits = 16;
inline int64_t step_parts(int64_t hidden_size) { return (hidden_size + kStepUnits - 1) / kStepUnits; }
// Rows of the batch of a block: the instances that are compiled, and the one that a step of so many rows takes.
constexpr int kStepRowsFew = 16;
constexpr int kStepRowsMany = 64;
inline int step_rows(int64_t rows) { return rows <= kStepRowsFew ? kStepRowsFew : kStepRowsMany; }

// The persistent kernel: all steps of a chunk in one launch, see cuda/persistent.h. A block has eight warps. Their
// weights are in registers, in pieces of 16 bytes that a thread reads at once; pieces that do not fit are in shared
// memory.
constexpr int kPersistentThreads = 256;
constexpr int kPersistentRows = 8;   // batch rows of a tile: the columns of an instruction
constexpr int kPersistentParts = 8;  // parts of the product's depth; a warp has one
constexpr int kPieceBytes = 16;
struct PersistentShape {
  int tiles;            // tiles of 16 rows of weights in a warp
  int pieces;           // pieces of a row of weights in a thread's registers
  int units;            // hidden units of a block
  int64_t extra_bytes;  // shared memory for one more piece of each thread
  int64_t depth(int size) const { return int64_t{kPersistentParts} * 4 * pieces * (kPieceBytes / size); }
};
// By the pass, the size of an operand's number, and the tiles of batch rows that a block has at once: 1, with 128
// registers of weights in a thread, or 2, with 64.
constexpr PersistentShape persistent_shape(bool backward, int size, int row_tiles) {
  const int tiles = backward ? 1 : size == 4 ? 2 : 4;
  // Forward, a unit has four rows of weights, and backward one, which is four times as long.
  const int units = tiles * (backward ? 16 : 4);
  return {tiles, 16 / tiles / row_tiles, units, int64_t{kPersistentThreads} * tiles * 2 * kPieceBytes};
}

// Dynamic shared memory, in bytes: extra pieces of weights, and the partial sums of two turns.
inline int64_t persistent_shared(bool backward, int size, int row_tiles, int extra) {
  const PersistentShape shape = persistent_shape(backward, size, row_tiles);
  const int64_t rows = row_tiles * kPersistentRows;
  const int64_t sums = kPersistentParts * rows * (backward ? shape.units + 4 : 4 * (shape.units + 1)) * 4;
  return extra * shape.extra_bytes + 2 * sums;
}

// The layer splits long sequences into chunks whose intermediate results nearly fit into the second-level cache; those
// of persistent kernels may take so many times the memory.
constexpr int64_t kChunkBytes = int64_t{32} << 20;
constexpr int64_t kPersistentChunkTimes = 4;
// The rows of a chunk of so many bytes. Starting a persistent kernel takes as long as some steps, so that its chunks
// have this number of steps if they then have no more than `most_bytes`; 0: the kernel is another one.
constexpr int64_t kPersistentChunkSteps = 256;
inline int64_t rows_of_chunk(int64_t bytes, int64_t bytes_of_row, int64_t batch, int64_t most_bytes) {
  const int64_t rows = bytes / bytes_of_row, most = most_bytes / bytes_of_row, wanted = kPersistentChunkSteps * batch;
  const int64_t at_least = wanted < most ? wanted : most;
  return rows > at_least ? rows : at_least > 1 ? at_least : 1;
}

enum class Kernel { kStepwise, kStep, kPersistent };
enum class Number { kFloat64, kFloat32, kFloat16, kBFloat16 };

struct LayerFacts {
  int64_t steps, batch, input_size, hidden_size;
  int directions;
  Number number;
  bool tf32;  // products of float32 may round their operands so
  bool projected, normalised;
  bool cell_options;  // the cell is not the plain one
  bool backward;      // the pass; else forward
  bool packed = false;
  bool options = false;  // lengths, zoneout or a recurrent mask
};

struct DeviceFacts {
  std::string name;
  int capability;  // 90: compute capability 9.0
  int multiprocessors;
  int64_t l2_bytes;
  int64_t shared_of_block;  // bytes
  // These are known only from the runtime of a present device. A part of a device (MIG) has its own sizes above.
  bool shared = false;       // with kernels of other programs (MPS)
  int64_t most_blocks = -1;  // that a persistent kernel may have; below 0: not known
};

// Whether a kernel has been right on this device, or on one of its compute capability.
enum class Outcome { kNotTried, kRight, kWrong };

struct Request {
  bool any = true;  // take one that has been right; else `kernel`
  Kernel kernel = Kernel::kStepwise;
  Outcome step = Outcome::kNotTried, persistent = Outcome::kNotTried;
  std::optional<Kernel> measured;  // with `any`: the fastest of those that have been right, by set_measured
  // The most blocks of a persistent kernel that wait for each other; nothing: one for each multiprocessor.
  std::optional<int64_t> most_blocks;
  bool reasons = false;  // say why; a call does not ask
};

struct Plan {
  Kernel kernel = Kernel::kStepwise;
  std::string_view problem;  // why what was requested cannot run; then the rest says nothing
  // Persistent was requested and cannot run: another kernel does.
  bool replaced = false;
  std::vector<std::string> reasons;
  // A time step, of all directions: kernels, and `products` of the library. None if all steps of a chunk are one
  // kernel.
  int launches = 0;
  int products = 0;
  bool one_product = false;  // the products of both directions are one
  // The fused step, even if it is not chosen; 0 if the layer has none.
  std::string_view step_problem;  // why it cannot run
  int rows_of_block = 0;
  int64_t blocks = 0, threads = 0, shared_bytes = 0;
  int64_t parts_bytes = 0;  // backward, of all directions: partial sums of two steps
  // The same for the persistent kernel.
  struct Persistent {
    int groups = 0;                        // groups of blocks that have all units of a direction
    int row_tiles = 1;                     // tiles of rows that a group has at once
    int extra = 0;                         // pieces of weights of a thread in shared memory
    int64_t blocks = 0, shared_bytes = 0;  // blocks of all directions; bytes of one block
    std::string_view problem;              // why it cannot run; then the rest says nothing
  } persistent;
};

// With `any` and without a measurement: of the kernels that can run and have been right, persistent, step, stepwise, in
// this order.
LSTM_EXT_PUBLIC Plan plan(const LayerFacts& layer, const DeviceFacts& device, const Request& request);

// One product of both directions needs U of both side by side: that many steps pay for a copy.
constexpr int64_t kStepsOfOneProduct = 8;

// Why no fused kernel computes a layer, in words that follow "but "; null if one can.
const char* step_problem(const LayerFacts& layer);

// Whether kStep or kPersistent has been right on a device of this process, as somebody has said, in 16 bits or for
// float32 operands that are rounded to TF32; else not.
LSTM_EXT_PUBLIC void set_validated(int device, Kernel kernel, bool tf32, bool validated);
LSTM_EXT_PUBLIC bool is_validated(int device, Kernel kernel, bool tf32);

// The kernel that was fastest when layers of these sizes were measured on a device: lstm_ext/call/cuda_choice.py
// measures, and calls this; without a kernel it is not known any more. Steps and batch count rounded up to powers of
// two, the size of the input does not.
LSTM_EXT_PUBLIC void set_measured(int device, const LayerFacts& layer, std::optional<Kernel> kernel);
LSTM_EXT_PUBLIC std::optional<Kernel> measured(int device, const LayerFacts& layer);

// How long a block of a persistent kernel waits for another one, in nanoseconds; 0: for ever. As
// LSTM_EXT_CUDA_WAIT_LIMIT says in seconds, or in its place for one thread (null takes it back). Nothing if that is no
// such number.
LSTM_EXT_PUBLIC void set_wait_limit_of_thread(const double* seconds);
LSTM_EXT_PUBLIC std::optional<int64_t> wait_limit();

// How many multiprocessors persistent kernels leave to others, as LSTM_EXT_CUDA_FREE_MULTIPROCESSORS says; 0 without
// it. Nothing if that is no such number.
LSTM_EXT_PUBLIC std::optional<int64_t> free_multiprocessors();
// A device refused to start so many blocks at once; nothing: forget it. `device` stands for it as long as the process
// lives.
LSTM_EXT_PUBLIC void note_refused(const DeviceFacts* device, std::optional<int64_t> blocks);
// The most blocks that are asked for, by both.
LSTM_EXT_PUBLIC int64_t most_blocks(const DeviceFacts* device);

// "auto", "stepwise", "step" or "persistent"; "torch", which is about plain layers, is the same as "auto". Nothing for
// another word.
LSTM_EXT_PUBLIC std::optional<Request> request_named(std::string_view name);
LSTM_EXT_PUBLIC const char* name_of(Kernel kernel);

// Sets the request that replaces the environment's, for the whole process, or for one thread, which comes first. Null
// removes it. A thread with a request also gets TF32, whatever torch's settings are: for the check of a first use.
LSTM_EXT_PUBLIC void set_request(const Request* request);
LSTM_EXT_PUBLIC void set_request_of_thread(const Request* request);
LSTM_EXT_PUBLIC bool has_request_of_thread();
// The request of the thread, of the process or of LSTM_EXT_CUDA_KERNEL; `any` if there is none. `known` is false for an
// unknown name.
LSTM_EXT_PUBLIC Request current_request(bool* known);

// From the makers' data sheets.
LSTM_EXT_PUBLIC const std::vector<DeviceFacts>& known_devices();

}  // namespace lstm_ext::cuda
