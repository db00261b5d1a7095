// Every rule of the emulator, each broken by a kernel of its own: `rules_driver` runs them all and looks for the
// message. What orders accesses and what does not, with the race detector's verdict: `rules_driver race`, in race
// builds.
//
// Kernels take a Words: some memory to write to, and nothing that matters.
#include <algorithm>
#include <string>
#include <vector>

#include "simt/check.h"

namespace {

using namespace lstm_ext::cuda;
using checks::shape;

constexpr unsigned kAll = 0xffffffffu;

struct Words {
  uint32_t* words;
  uint64_t count;
  uint32_t* flag;
  const uint32_t* constants;
  uint16_t* halves;
};

struct Rule {
  const char* name;
  void (*kernel)(Words);
  LaunchConfig config;
  const char* message;  // a part of it; empty: nothing is wrong
};

// ---- barriers

LSTM_KERNEL divergent_barrier(Words) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
LSTM_KERNEL barrier_after_leaving(Words) {
  if (threadIdx.x < 32) return;
  __syncthreads();
}
LSTM_KERNEL leaving_before_barrier(Words) {
  if (threadIdx.x < 32) __syncthreads();
}
LSTM_KERNEL waiting_for_each_other(Words) {
  if (threadIdx.x == 0) __syncwarp();
  __syncthreads();
}
LSTM_KERNEL nobody_sets_the_flag(Words w) {
  while (load_relaxed(w.words) == 0) {
  }
}
bool comes(const uint32_t* word, int64_t limit) {
  WaitLimit wait(limit);
  while (load_relaxed(word) == 0) {
    if (wait.is_over()) return false;
  }
  return true;
}
LSTM_KERNEL bounded_wait(Words w) {
  checks::expect(!comes(w.words, int64_t{1} << 40), "a bounded wait in a deadlock expires");
}
LSTM_KERNEL piece_misaligned(Words w) { store_relaxed_16(w.words + 1, make_uint4(1, 2, 3, 4)); }
LSTM_KERNEL piece_read_misaligned(Words w) { w.words[0] = load_relaxed_16(w.words + 2).x; }
// A wait of many loads a try, which reads the clock seldom.
LSTM_KERNEL bounded_wait_for_many(Words w) {
  WaitLimit wait(int64_t{1} << 33);
  bool in_time = true;
  while (in_time) {
    uint32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += load_relaxed_16(w.words).x;
    if (sum != 0) break;
    in_time = !wait.is_over();
  }
  checks::expect(!in_time, "a bounded wait for many words expires");
}
LSTM_KERNEL wait_without_limit(Words w) { comes(w.words, 0); }
LSTM_KERNEL waits_for_another_block(Words w) {
  atomicAdd(w.words, 1u);
  while (load_relaxed(w.words) < gridDim.x * blockDim.x) {
  }
}

// ---- warps

LSTM_KERNEL own_lane_not_in_mask(Words) { __syncwarp(0x0000ffffu); }
LSTM_KERNEL mask_with_lane_that_left(Words) {
  if (threadIdx.x == 31) return;
  __shfl_xor_sync(kAll, 1, 1);
}
LSTM_KERNEL mask_beyond_the_block(Words) { __any_sync(kAll, 1); }
LSTM_KERNEL leaving_while_lanes_wait(Words) {
  if (threadIdx.x < 31) __syncwarp();
}
LSTM_KERNEL two_collectives_at_once(Words) {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __any_sync(kAll, 1);
  }
}
LSTM_KERNEL lane_outside_mask(Words) {
  if (threadIdx.x < 16) __shfl_xor_sync(0x0000ffffu, 1, 16);
}
LSTM_KERNEL odd_shuffle_width(Words) { __shfl_xor_sync(kAll, 1, 1, 5); }

// ---- tensor cores and copies

LSTM_KERNEL ldmatrix_misaligned(Words) {
  LSTM_SHARED(uint16_t, rows, 256);
  for (unsigned i = threadIdx.x; i < 256; i += 32) rows[i] = 0;
  __syncwarp();
  uint32_t fragment[4];
  ldmatrix_x4(fragment, rows + threadIdx.x % 16 * 4);
}
LSTM_KERNEL ldmatrix_from_global(Words w) {
  uint32_t fragment[4];
  ldmatrix_x4(fragment, w.words + 4 * (threadIdx.x % 8));
}
LSTM_KERNEL copy_misaligned(Words w) {
  LSTM_SHARED(uint32_t, array, 16);
  cp_async16(array + 1, w.words, 16);
}
LSTM_KERNEL copy_from_misaligned(Words w) {
  LSTM_SHARED(uint32_t, array, 16);
  cp_async16(array, w.words + 1, 16);
}
LSTM_KERNEL copy_to_global(Words w) { cp_async16(w.words, w.words + 8, 16); }
LSTM_KERNEL copy_from_shared(Words) {
  LSTM_SHARED(uint32_t, array, 16);
  cp_async16(array, array + 8, 16);
}
LSTM_KERNEL copy_of_too_much(Words w) {
  LSTM_SHARED(uint32_t, array, 16);
  cp_async16(array, w.words, 20);
}
LSTM_KERNEL copy_not_committed(Words w) {
  LSTM_SHARED(uint32_t, array, 128);
  cp_async16(array + 4 * threadIdx.x, w.words, 16);
}
LSTM_KERNEL copy_not_awaited(Words w) {
  LSTM_SHARED(uint32_t, array, 256);
  cp_async16(array + 4 * threadIdx.x, w.words, 16);
  cp_async_commit();
  cp_async16(array + 128 + 4 * threadIdx.x, w.words, 16);
  cp_async_commit();
  cp_async_wait<1>();
}

// ---- memory

// ----------------------------------------------------------------------------------------------------------- The
// compiler shall not see where it goes.
void write_at(uint32_t* array, int64_t index) {
  asm volatile("" : "+r"(array));
  array[index] = 1;
}
LSTM_KERNEL past_a_static_array(Words w) {
  LSTM_SHARED(uint32_t, array, 7);
  write_at(array, static_cast<int64_t>(w.count) / 32 - 1);
}
LSTM_KERNEL before_a_static_array(Words w) {
  LSTM_SHARED(uint32_t, array, 7);
  write_at(array, -static_cast<int64_t>(w.count) / 256);
}
LSTM_KERNEL past_dynamic_memory(Words) {
  LSTM_DYNAMIC_SHARED(uint32_t, array);
  write_at(array, 9);
}
LSTM_KERNEL past_a_buffer(Words w) { write_at(w.words, static_cast<int64_t>(w.count) + 5); }
LSTM_KERNEL before_a_buffer(Words w) { write_at(w.words, -3); }
LSTM_KERNEL too_much_static_memory(Words) {
  LSTM_SHARED(uint32_t, first, 8 * 1024);
  LSTM_SHARED(uint32_t, second, 5 * 1024);
  first[0] = second[0] = 1;
}
LSTM_KERNEL too_much_memory(Words) {
  LSTM_SHARED(uint32_t, first, 8 * 1024);
  first[0] = 1;
}

// ---- launches

LSTM_KERNEL nothing(Words) {}
LSTM_KERNEL launching(Words w) { launch(nothing, shape(1, 1), w); }
LSTM_KERNEL throwing(Words) { throw std::runtime_error("out of cheese"); }

unsigned me() { return threadIdx.x; }
unsigned neighbour() { return (threadIdx.x + 1) % blockDim.x; }

// ---- accesses within a block, for the race detector

template <bool ordered>
LSTM_KERNEL block_barrier(Words d) {
  LSTM_SHARED(uint32_t, array, 64);
  array[me()] = me();
  if (ordered) __syncthreads();
  d.words[me()] = array[neighbour()];
}
template <bool ordered>
LSTM_KERNEL warp_barrier(Words d) {
  LSTM_SHARED(uint32_t, array, 64);
  array[me()] = me();
  if (ordered) __syncwarp();
  d.words[me()] = array[me() ^ 1];
}
LSTM_KERNEL warp_barrier_for_a_block(Words d) {
  LSTM_SHARED(uint32_t, array, 64);
  array[me()] = me();
  __syncwarp();
  d.words[me()] = array[me() ^ 32];
}
LSTM_KERNEL half_a_warp(Words d) {
  LSTM_SHARED(uint32_t, array, 64);
  array[me()] = me();
  if (me() % 32 < 16) {
    __syncwarp(0x0000ffffu);
    d.words[me()] = array[me() ^ 1];
  }
}
// The values of a shuffle arrive, other memory does not.
LSTM_KERNEL shuffle_as_barrier(Words d) {
  LSTM_SHARED(uint32_t, array, 64);
  array[me()] = me();
  __shfl_xor_sync(kAll, 1, 1);
  d.words[me()] = array[me() ^ 1];
}
LSTM_KERNEL read_before_overwritten(Words d) {
  LSTM_SHARED(uint32_t, array, 64);
  array[me()] = me();
  __syncthreads();
  d.words[me()] = array[neighbour()];
  array[me()] = 0;
}
LSTM_KERNEL same_value_twice(Words d) { d.words[0] = 1; }
LSTM_KERNEL neighbouring_halves(Words d) { d.halves[me() + blockIdx.x * 64] = 1; }
LSTM_KERNEL neighbouring_bytes(Words d) {
  LSTM_SHARED(uint8_t, bytes, 64);
  bytes[me()] = 1;
  d.words[me() + blockIdx.x * 64] = bytes[me()];
}

// ---- accesses between blocks

LSTM_KERNEL blocks_apart(Words d) { d.words[blockIdx.x * 64 + me()] = 1; }
LSTM_KERNEL blocks_on_each_other(Words d) {
  __syncthreads();
  d.words[me()] = blockIdx.x;
}
LSTM_KERNEL atomics_together(Words d) {
  atomicAdd(d.words, 1u);
  atomicExch(d.words, me());
}
LSTM_KERNEL atomic_beside_plain(Words d) {
  if (blockIdx.x == 0) {
    atomicAdd(d.words, 1u);
  } else if (me() == 0) {
    d.words[0] = 5;
  }
}

enum class Fences { Both, NoneBefore, NoneAfter, FlagFirst };

template <Fences fences>
LSTM_KERNEL message_passing(Words d) {
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
LSTM_KERNEL pieces(Words d) {
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
LSTM_KERNEL counting(Words d) {
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
LSTM_KERNEL constants_read_only(Words d) { d.words[me() + blockIdx.x * 64] = read_only(d.constants + me()); }
LSTM_KERNEL own_data_read_only(Words d) {
  if (blockIdx.x > 0) return;
  d.words[me()] = 1;
  __syncthreads();
  d.words[me()] = read_only(d.words + me());
}

// ---- accesses of asynchronous copies

enum class Copy { Waited, NoBarrier, NoWait, WrongGroup };

template <Copy copy>
LSTM_KERNEL copying(Words d) {
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
LSTM_KERNEL own_copy_before_the_wait(Words d) {
  LSTM_SHARED(uint32_t, array, 256);
  cp_async16(array + 4 * me(), d.constants + me() / 4 * 4, 16);
  cp_async_commit();
  d.words[me()] = array[4 * me()];
  cp_async_wait<0>();
}
LSTM_KERNEL copy_over_what_is_read(Words d) {
  LSTM_SHARED(uint32_t, array, 256);
  array[4 * me()] = 1;
  __syncthreads();
  d.words[me()] = array[4 * neighbour()];
  cp_async16(array + 4 * me(), d.constants + me() / 4 * 4, 16);
  cp_async_commit();
  cp_async_wait<0>();
}

LaunchConfig cooperative(LaunchConfig config) {
  config.cooperative = true;
  return config;
}

constexpr const char* kRace = "racy accesses";

const std::vector<Rule>& races() {
  static const std::vector<Rule> all = {
      {"block_barrier", block_barrier<true>, shape(1, 64), ""},
      {"no_block_barrier", block_barrier<false>, shape(1, 64), kRace},
      {"warp_barrier", warp_barrier<true>, shape(1, 64), ""},
      {"no_warp_barrier", warp_barrier<false>, shape(1, 64), kRace},
      {"warp_barrier_for_a_block", warp_barrier_for_a_block, shape(1, 64), kRace},
      {"half_a_warp", half_a_warp, shape(1, 64), ""},
      {"shuffle_as_barrier", shuffle_as_barrier, shape(1, 64), kRace},
      {"read_before_overwritten", read_before_overwritten, shape(1, 64), kRace},
      {"same_value_twice", same_value_twice, shape(1, 64), kRace},
      {"neighbouring_halves", neighbouring_halves, shape(2, 64), ""},
      {"neighbouring_bytes", neighbouring_bytes, shape(2, 64), ""},
      {"blocks_apart", blocks_apart, shape(2, 64), ""},
      {"blocks_on_each_other", blocks_on_each_other, shape(2, 64), kRace},
      {"atomics_together", atomics_together, shape(2, 64), ""},
      {"atomic_beside_plain", atomic_beside_plain, shape(2, 64), kRace},
      {"fences", message_passing<Fences::Both>, shape(2, 32), ""},
      {"no_fence_before", message_passing<Fences::NoneBefore>, shape(2, 32), kRace},
      {"no_fence_after", message_passing<Fences::NoneAfter>, shape(2, 32), kRace},
      {"flag_first", message_passing<Fences::FlagFirst>, shape(2, 32), kRace},
      {"pieces", pieces<Piece::Alone>, shape(2, 32), ""},
      {"word_of_a_piece", pieces<Piece::Word>, shape(2, 32), ""},
      {"piece_with_data", pieces<Piece::WithData>, shape(2, 32), kRace},
      {"piece_with_data_and_fences", pieces<Piece::WithFences>, shape(2, 32), ""},
      {"piece_read_plainly", pieces<Piece::Plain>, shape(2, 32), kRace},
      {"counting", counting, shape(8, 1), ""},
      {"constants_read_only", constants_read_only, shape(2, 64), ""},
      {"own_data_read_only", own_data_read_only, shape(2, 64), kRace},
      {"copy", copying<Copy::Waited>, shape(1, 64), ""},
      {"copy_without_barrier", copying<Copy::NoBarrier>, shape(1, 64), kRace},
      {"copy_without_wait", copying<Copy::NoWait>, shape(1, 64), kRace},
      {"copy_of_the_wrong_group", copying<Copy::WrongGroup>, shape(1, 64), kRace},
      {"own_copy_before_the_wait", own_copy_before_the_wait, shape(1, 64), kRace},
      {"copy_over_what_is_read", copy_over_what_is_read, shape(1, 64), kRace},
  };
  return all;
}

// Where a broken rule is a wild access, ASan ends the program, as it should: see wild_rules.
const std::vector<Rule>& rules() {
  static const std::vector<Rule> all = {
      {"divergent_barrier", divergent_barrier, shape(1, 64), "divergent __syncthreads"},
      {"barrier_after_leaving", barrier_after_leaving, shape(1, 64),
       "leaves while others of its block wait|after a thread of the block has left"},
      {"leaving_before_barrier", leaving_before_barrier, shape(1, 64),
       "leaves while others of its block wait|after a thread of the block has left"},
      {"waiting_for_each_other", waiting_for_each_other, shape(1, 64), "deadlock: 64 threads wait for each other"},
      {"nobody_sets_the_flag", nobody_sets_the_flag, shape(2, 64), "livelock"},
      {"bounded_wait", bounded_wait, shape(2, 64), ""},
      {"bounded_wait_for_many", bounded_wait_for_many, shape(2, 64), ""},
      {"wait_without_limit", wait_without_limit, shape(2, 64), "livelock"},
      {"piece_misaligned", piece_misaligned, shape(1, 1), "16 bytes that is not aligned"},
      {"piece_read_misaligned", piece_read_misaligned, shape(1, 1), "16 bytes that is not aligned"},
      {"waits_for_another_block", waits_for_another_block, cooperative(shape(4, 32)), ""},
      {"waits_for_absent_blocks", waits_for_another_block, shape(4, 32), "livelock"},
      {"own_lane_not_in_mask", own_lane_not_in_mask, shape(1, 32), "the mask lacks the lane itself"},
      {"mask_with_lane_that_left", mask_with_lane_that_left, shape(1, 32),
       "other lanes wait for it|a lane that has left"},
      {"mask_beyond_the_block", mask_beyond_the_block, shape(1, 24), "a lane that has left or does not exist"},
      {"leaving_while_lanes_wait", leaving_while_lanes_wait, shape(1, 32),
       "other lanes wait for it|a lane that has left"},
      {"two_collectives_at_once", two_collectives_at_once, shape(1, 32), "other lanes are in"},
      {"lane_outside_mask", lane_outside_mask, shape(1, 32), "reads a lane outside the mask"},
      {"odd_shuffle_width", odd_shuffle_width, shape(1, 32), "not a power of two"},
      {"ldmatrix_misaligned", ldmatrix_misaligned, shape(1, 32), "not 16-byte aligned"},
      {"ldmatrix_from_global", ldmatrix_from_global, shape(1, 32), "not in shared memory"},
      {"copy_misaligned", copy_misaligned, shape(1, 32), "not aligned to the bytes copied"},
      {"copy_from_misaligned", copy_from_misaligned, shape(1, 32), "not aligned to the bytes copied"},
      {"copy_to_global", copy_to_global, shape(1, 32), "not in this block's shared memory"},
      {"copy_from_shared", copy_from_shared, shape(1, 32), "the source is in shared memory"},
      {"copy_of_too_much", copy_of_too_much, shape(1, 32), "more bytes to read than to write"},
      {"copy_not_committed", copy_not_committed, shape(1, 32), "has not committed"},
      {"copy_not_awaited", copy_not_awaited, shape(1, 32), "has not waited for"},
      {"too_much_static_memory", too_much_static_memory, shape(1, 1), "more than 48 KiB of static"},
      {"too_much_memory", too_much_memory, shape(1, 1, 200 * 1024), "more than 227 KiB of shared"},
      {"too_much_dynamic_memory", nothing, shape(1, 32, 228 * 1024), "more than 227 KiB of dynamic"},
      {"too_large_a_block", nothing, shape(1, 1025), "more than 1024 threads"},
      {"an_empty_grid", nothing, shape(0, 32), "an empty grid"},
      {"launching", launching, shape(1, 1), "cannot launch a kernel"},
      {"throwing", throwing, shape(1, 1), "out of cheese"},
      {"nothing", nothing, shape(20000, 1), ""},
  };
  return all;
}

const std::vector<Rule>& wild_rules() {
  static const std::vector<Rule> all = {
      {"past_a_static_array", past_a_static_array, shape(2, 1), "past the end of shared array array in block"},
      {"before_a_static_array", before_a_static_array, shape(2, 1), "before the start of shared array array in block"},
      {"past_dynamic_memory", past_dynamic_memory, shape(1, 1, 32), "past the end of shared array (dynamic)"},
      {"past_a_buffer", past_a_buffer, shape(1, 1), "past the end of buffer words"},
      {"before_a_buffer", before_a_buffer, shape(1, 1), "before the start of buffer words"},
  };
  return all;
}

// `message` is one text, or several with | between.
bool says(const std::string& text, const std::string& message) {
  size_t start = 0;
  while (true) {
    const size_t end = message.find('|', start);
    if (text.find(message.substr(start, end - start)) != std::string::npos) return true;
    if (end == std::string::npos) return false;
    start = end + 1;
  }
}

void check(const Rule& rule, unsigned resident_blocks) {
  simt::DeviceBuffer<uint32_t> words(256, 0u, "words"), flag(1, 0u, "flag"), constants(64, 3u, "constants");
  simt::DeviceBuffer<uint16_t> halves(256, uint16_t{0}, "halves");
  std::string said;
  simt::options().resident_blocks = resident_blocks;
  try {
    // Twice: one launch is ordered after the other.
    for (int n = 0; n < 2; ++n) {
      launch(rule.kernel, rule.config, Words{words.data(), words.size(), flag.data(), constants.data(), halves.data()});
      flag[0] = 0;
      std::fill(words.begin(), words.end(), 0u);
    }
  } catch (const simt::Error& error) {
    said = error.what();
  }
  const bool right = *rule.message == 0 ? said.empty() : says(said, rule.message);
  checks::expect(right, std::string(rule.name) + ": " + (said.empty() ? "no error" : said));
}

}  // namespace

// rules_driver: all rules that are not about wild accesses. rules_driver wild: those too. rules_driver NAME: one.
// rules_driver race: those of the race detector.
int main(int count, char** words) {
  const std::string which = count > 1 ? words[1] : "";
  if (which == "race" && !simt::race::enabled) {
    std::printf("not a race build\n");
    return 64;
  }
  int checked = 0;
  for (const auto* list : {&rules(), &wild_rules(), &races()}) {
    for (const Rule& rule : *list) {
      const bool of_races = list == &races();
      const bool wanted =
          of_races ? which == "race" : which == rule.name || which == "wild" || (which.empty() && list == &rules());
      if (!wanted) continue;
      // Enough room for every block is a condition of cooperative launches only.
      check(rule, of_races || std::string(rule.name) == "nothing" ? 0 : 2);
      ++checked;
    }
  }
  std::printf("%d rules, %d failures\n", checked, checks::failures);
  return checks::failures == 0 && checked > 0 ? 0 : 1;
}
