// Every rule of the emulator, each broken by a kernel of its own: `rules_driver` runs them all and looks for the
// message.
//
// Kernels take a Words: some memory to write to, and nothing that matters.
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
  write_at(array, static_cast<int64_t>(w.count) / 8 - 1);
}
LSTM_KERNEL before_a_static_array(Words w) {
  LSTM_SHARED(uint32_t, array, 7);
  write_at(array, -static_cast<int64_t>(w.count) / 64);
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

LaunchConfig cooperative(LaunchConfig config) {
  config.cooperative = true;
  return config;
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

void check(const Rule& rule) {
  simt::DeviceBuffer<uint32_t> words(64, 0u, "words");
  std::string said;
  // Enough room for every block is a condition of cooperative launches only.
  simt::options().resident_blocks = std::string(rule.name) == "nothing" ? 0 : 2;
  try {
    launch(rule.kernel, rule.config, Words{words.data(), words.size()});
  } catch (const simt::Error& error) {
    said = error.what();
  }
  const bool right = *rule.message == 0 ? said.empty() : says(said, rule.message);
  checks::expect(right, std::string(rule.name) + ": " + (said.empty() ? "no error" : said));
}

}  // namespace

// rules_driver: all rules that are not about wild accesses. rules_driver wild: those too. rules_driver NAME: one.
int main(int count, char** words) {
  const std::string which = count > 1 ? words[1] : "";
  int checked = 0;
  for (const auto* list : {&rules(), &wild_rules()}) {
    for (const Rule& rule : *list) {
      const bool wanted = which == rule.name || which == "wild" || (which.empty() && list == &rules());
      if (!wanted) continue;
      check(rule);
      ++checked;
    }
  }
  std::printf("%d rules, %d failures\n", checked, checks::failures);
  return checks::failures == 0 && checked > 0 ? 0 : 1;
}
