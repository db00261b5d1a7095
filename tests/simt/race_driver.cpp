// What orders accesses and what does not: small kernels, each with the race detector's verdict. Race builds only.
#include <string>
#include <vector>

#include "simt/check.h"

namespace {

using namespace lstm_ext::cuda;
using checks::shape;

constexpr unsigned kAll = 0xffffffffu;

struct Data {
  uint32_t* words;
  uint32_t* flag;
  const uint32_t* constants;
  uint16_t* halves;
};

unsigned me() { return threadIdx.x; }
unsigned neighbour() { return (threadIdx.x + 1) % blockDim.x; }

// ---- within a block

template <bool ordered>
LSTM_KERNEL block_barrier(Data d) {
  LSTM_SHARED(uint32_t, array, 64);
  array[me()] = me();
  if (ordered) __syncthreads();
  d.words[me()] = array[neighbour()];
}
template <bool ordered>
LSTM_KERNEL warp_barrier(Data d) {
  LSTM_SHARED(uint32_t, array, 64);
  array[me()] = me();
  if (ordered) __syncwarp();
  d.words[me()] = array[me() ^ 1];
}
LSTM_KERNEL warp_barrier_for_a_block(Data d) {
  LSTM_SHARED(uint32_t, array, 64);
  array[me()] = me();
  __syncwarp();
  d.words[me()] = array[me() ^ 32];
}
LSTM_KERNEL half_a_warp(Data d) {
  LSTM_SHARED(uint32_t, array, 64);
  array[me()] = me();
  if (me() % 32 < 16) {
    __syncwarp(0x0000ffffu);
    d.words[me()] = array[me() ^ 1];
  }
}
// The values of a shuffle arrive, other memory does not.
LSTM_KERNEL shuffle_as_barrier(Data d) {
  LSTM_SHARED(uint32_t, array, 64);
  array[me()] = me();
  __shfl_xor_sync(kAll, 1, 1);
  d.words[me()] = array[me() ^ 1];
}
LSTM_KERNEL read_before_overwritten(Data d) {
  LSTM_SHARED(uint32_t, array, 64);
  array[me()] = me();
  __syncthreads();
  d.words[me()] = array[neighbour()];
  array[me()] = 0;
}
LSTM_KERNEL same_value_twice(Data d) { d.words[0] = 1; }
LSTM_KERNEL neighbouring_halves(Data d) { d.halves[me() + blockIdx.x * 64] = 1; }
LSTM_KERNEL neighbouring_bytes(Data d) {
  LSTM_SHARED(uint8_t, bytes, 64);
  bytes[me()] = 1;
  d.words[me() + blockIdx.x * 64] = bytes[me()];
}

// ---- between blocks

LSTM_KERNEL blocks_apart(Data d) { d.words[blockIdx.x * 64 + me()] = 1; }
LSTM_KERNEL blocks_on_each_other(Data d) {
  __syncthreads();
  d.words[me()] = blockIdx.x;
}
LSTM_KERNEL atomics_together(Data d) {
  atomicAdd(d.words, 1u);
  atomicExch(d.words, me());
}
LSTM_KERNEL atomic_beside_plain(Data d) {
  if (blockIdx.x == 0) {
    atomicAdd(d.words, 1u);
  } else if (me() == 0) {
    d.words[0] = 5;
  }
}

enum class Fences { Both, NoneBefore, NoneAfter, FlagFirst };

template <Fences fences>
LSTM_KERNEL message_passing(Data d) {
  if (me() != 0) return;
  if (blockIdx.x == 0) {
    if (fences == Fences::FlagFirst) store_relaxed(d.flag, 1);
    d.words[7] = 1;
    if (fences != Fences::NoneBefore) __threadfence();
    if (fences != Fences::FlagFirst) store_relaxed(d.flag, 1);
    return;
  }
  while (load_relaxed(d.flag) == 0) {
  }
  if (fences != Fences::NoneAfter) __threadfence();
  d.words[8] = d.words[7];
}

// Pieces of a mailbox are strong accesses: no race on them, nor on a word of them. What is around them is not ordered.
enum class Piece { Alone, Word, WithData, WithFences, Plain };

template <Piece piece>
LSTM_KERNEL pieces(Data d) {
  uint32_t* place = d.words + 16;
  if (me() != 0) return;
  if (blockIdx.x == 0) {
    if (piece == Piece::WithData || piece == Piece::WithFences) d.words[7] = 1;
    if (piece == Piece::WithFences) __threadfence();
    store_relaxed_16(place, make_uint4(1, 1, 1, 1));
    return;
  }
  if (piece == Piece::Word) {
    while (load_relaxed(place + 3) == 0) {
    }
  } else if (piece == Piece::Plain) {
    d.words[8] = place[3];
  } else {
    while (load_relaxed_16(place).w == 0) {
    }
  }
  if (piece == Piece::WithFences) __threadfence();
  if (piece == Piece::WithData || piece == Piece::WithFences) d.words[8] = d.words[7];
}

// A counter that all add to, as in a grid barrier.
LSTM_KERNEL counting(Data d) {
  d.words[blockIdx.x] = 1;
  __threadfence();
  atomicAdd(d.flag, 1u);
  while (load_relaxed(d.flag) < gridDim.x) {
  }
  __threadfence();
  uint32_t sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += d.words[block];
  checks::expect(sum == gridDim.x, "all blocks have counted");
}

// As nvcc's PTX has it.
uint32_t read_only(const uint32_t* word) {
  simt::before_read_only_load(word, sizeof *word, __FILE__, __LINE__);
  return *word;
}
LSTM_KERNEL constants_read_only(Data d) { d.words[me() + blockIdx.x * 64] = read_only(d.constants + me()); }
LSTM_KERNEL own_data_read_only(Data d) {
  if (blockIdx.x > 0) return;
  d.words[me()] = 1;
  __syncthreads();
  d.words[me()] = read_only(d.words + me());
}

// ---- asynchronous copies

enum class Copy { Waited, NoBarrier, NoWait, WrongGroup };

template <Copy copy>
LSTM_KERNEL copying(Data d) {
  LSTM_SHARED(uint32_t, array, 256);
  cp_async16(array + 4 * me(), d.constants + me() / 4 * 4, 16);
  cp_async_commit();
  if (copy == Copy::WrongGroup) {
    cp_async_wait<1>();
  } else if (copy != Copy::NoWait) {
    cp_async_wait<0>();
  }
  if (copy != Copy::NoBarrier) __syncthreads();
  d.words[me()] = array[4 * neighbour()];
  cp_async_wait<0>();
}
LSTM_KERNEL own_copy_before_the_wait(Data d) {
  LSTM_SHARED(uint32_t, array, 256);
  cp_async16(array + 4 * me(), d.constants + me() / 4 * 4, 16);
  cp_async_commit();
  d.words[me()] = array[4 * me()];
  cp_async_wait<0>();
}
LSTM_KERNEL copy_over_what_is_read(Data d) {
  LSTM_SHARED(uint32_t, array, 256);
  array[4 * me()] = 1;
  __syncthreads();
  d.words[me()] = array[4 * neighbour()];
  cp_async16(array + 4 * me(), d.constants + me() / 4 * 4, 16);
  cp_async_commit();
  cp_async_wait<0>();
}

struct Case {
  const char* name;
  void (*kernel)(Data);
  LaunchConfig config;
  bool races;
};

const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {"block_barrier", block_barrier<true>, shape(1, 64), false},
      {"no_block_barrier", block_barrier<false>, shape(1, 64), true},
      {"warp_barrier", warp_barrier<true>, shape(1, 64), false},
      {"no_warp_barrier", warp_barrier<false>, shape(1, 64), true},
      {"warp_barrier_for_a_block", warp_barrier_for_a_block, shape(1, 64), true},
      {"half_a_warp", half_a_warp, shape(1, 64), false},
      {"shuffle_as_barrier", shuffle_as_barrier, shape(1, 64), true},
      {"read_before_overwritten", read_before_overwritten, shape(1, 64), true},
      {"same_value_twice", same_value_twice, shape(1, 64), true},
      {"neighbouring_halves", neighbouring_halves, shape(2, 64), false},
      {"neighbouring_bytes", neighbouring_bytes, shape(2, 64), false},
      {"blocks_apart", blocks_apart, shape(2, 64), false},
      {"blocks_on_each_other", blocks_on_each_other, shape(2, 64), true},
      {"atomics_together", atomics_together, shape(2, 64), false},
      {"atomic_beside_plain", atomic_beside_plain, shape(2, 64), true},
      {"fences", message_passing<Fences::Both>, shape(2, 32), false},
      {"no_fence_before", message_passing<Fences::NoneBefore>, shape(2, 32), true},
      {"no_fence_after", message_passing<Fences::NoneAfter>, shape(2, 32), true},
      {"flag_first", message_passing<Fences::FlagFirst>, shape(2, 32), true},
      {"pieces", pieces<Piece::Alone>, shape(2, 32), false},
      {"word_of_a_piece", pieces<Piece::Word>, shape(2, 32), false},
      {"piece_with_data", pieces<Piece::WithData>, shape(2, 32), true},
      {"piece_with_data_and_fences", pieces<Piece::WithFences>, shape(2, 32), false},
      {"piece_read_plainly", pieces<Piece::Plain>, shape(2, 32), true},
      {"counting", counting, shape(8, 1), false},
      {"constants_read_only", constants_read_only, shape(2, 64), false},
      {"own_data_read_only", own_data_read_only, shape(2, 64), true},
      {"copy", copying<Copy::Waited>, shape(1, 64), false},
      {"copy_without_barrier", copying<Copy::NoBarrier>, shape(1, 64), true},
      {"copy_without_wait", copying<Copy::NoWait>, shape(1, 64), true},
      {"copy_of_the_wrong_group", copying<Copy::WrongGroup>, shape(1, 64), true},
      {"own_copy_before_the_wait", own_copy_before_the_wait, shape(1, 64), true},
      {"copy_over_what_is_read", copy_over_what_is_read, shape(1, 64), true},
  };
  return all;
}

void check(const Case& one) {
  simt::DeviceBuffer<uint32_t> words(256, 0u, "words"), flag(1, 0u, "flag"), constants(64, 3u, "constants");
  simt::DeviceBuffer<uint16_t> halves(256, uint16_t{0}, "halves");
  const Data data{words.data(), flag.data(), constants.data(), halves.data()};
  std::string said;
  try {
    // Twice: one launch is ordered after the other.
    launch(one.kernel, one.config, data);
    flag[0] = 0;
    std::fill(words.begin(), words.end(), 0u);
    launch(one.kernel, one.config, data);
  } catch (const simt::Error& error) {
    said = error.what();
  }
  const bool raced = said.find("racy accesses") != std::string::npos;
  checks::expect(raced == one.races && (raced || said.empty()),
                 std::string(one.name) + (said.empty() ? ": no race" : ": " + said));
}

}  // namespace

int main() {
  if (!simt::race::enabled) {
    std::printf("not a race build\n");
    return 64;
  }
  for (const Case& one : cases()) check(one);
  std::printf("%zu cases, %d failures\n", cases().size(), checks::failures);
  return checks::failures == 0 ? 0 : 1;
}
