// Litmus tests of relaxed stores that are seen late: small programs with the outcomes that the PTX memory model
// forbids, which no run may have, and those that it allows and a sequential run does not show, which some run has to
// have.
#include <string>
#include <vector>

#include "simt/check.h"

namespace {

using namespace lstm_ext::cuda;
using checks::shape;

// Words far enough apart to be places of their own, zeros at first, and four results, unset at first.
struct Litmus {
  uint32_t* x;
  uint32_t* y;
  uint4* piece;
  uint32_t* results;
};

constexpr uint32_t kUnset = 99;

bool first_thread() { return threadIdx.x == 0; }
bool is(unsigned block) { return blockIdx.x == block && first_thread(); }
void wait_for(const uint32_t* flag) {
  while (load_relaxed(flag) == 0) {
  }
}

// Data and a flag: the message is lost where nothing orders the two.
template <bool fences>
LSTM_KERNEL message(Litmus s) {
  if (is(0)) {
    store_relaxed(s.x, 1);
    if (fences) __threadfence();
    store_relaxed(s.y, 1);
  } else if (is(1)) {
    wait_for(s.y);
    if (fences) __threadfence();
    s.results[0] = load_relaxed(s.x);
  }
}
// Another thread of the block publishes what one has stored.
template <bool barrier>
LSTM_KERNEL message_of_a_block(Litmus s) {
  if (blockIdx.x == 0) {
    if (threadIdx.x == 1) store_relaxed(s.x, 1);
    if (barrier) __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      store_relaxed(s.y, 1);
    }
    if (!barrier) __syncthreads();
  } else if (first_thread()) {
    wait_for(s.y);
    __threadfence();
    s.results[0] = load_relaxed(s.x);
  }
}
LSTM_KERNEL message_of_a_warp(Litmus s) {
  if (blockIdx.x == 0) {
    if (threadIdx.x == 1) store_relaxed(s.x, 1);
    __syncwarp();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(s.y, 1u);
    }
  } else if (first_thread()) {
    wait_for(s.y);
    __threadfence();
    s.results[0] = load_relaxed(s.x);
  }
}
// Within a block: seen after a barrier, and by chance before.
template <bool barrier>
LSTM_KERNEL neighbours(Litmus s) {
  if (is(0)) store_relaxed(s.x, 1);
  if (barrier) __syncthreads();
  if (threadIdx.x == 1) s.results[0] = load_relaxed(s.x);
  if (!barrier) __syncthreads();
}
LSTM_KERNEL own_stores(Litmus s) {
  if (!is(0)) return;
  store_relaxed(s.x, 7);
  s.results[0] = load_relaxed(s.x);
  store_relaxed(s.x, 8);
  s.results[1] = load_relaxed(s.x) + *s.x;
  *s.x = 9;
  s.results[2] = load_relaxed(s.x);
}
// A place never goes back to an older value.
LSTM_KERNEL coherence(Litmus s) {
  if (is(0)) {
    for (uint32_t i = 1; i <= 20; ++i) store_relaxed(s.x, i);
  } else if (first_thread()) {
    uint32_t before = 0;
    bool back = false;
    while (before < 20) {
      const uint32_t now = load_relaxed(s.x);
      back = back || now < before;
      before = now;
    }
    s.results[blockIdx.x - 1] = back;
  }
}
// What somebody has seen and then published, the third sees (causality).
template <bool fences>
LSTM_KERNEL three(Litmus s) {
  if (is(0)) store_relaxed(s.x, 1);
  if (is(1)) {
    wait_for(s.x);
    if (fences) __threadfence();
    store_relaxed(s.y, 1);
  }
  if (is(2)) {
    wait_for(s.y);
    if (fences) __threadfence();
    s.results[0] = load_relaxed(s.x);
  }
}
// Two readers, two writers: in which order were the stores?
template <bool fences>
LSTM_KERNEL two_readers(Litmus s) {
  if (is(0)) store_relaxed(s.x, 1);
  if (is(1)) store_relaxed(s.y, 1);
  if (is(2) || is(3)) {
    const uint32_t* first = blockIdx.x == 2 ? s.x : s.y;
    const uint32_t* second = blockIdx.x == 2 ? s.y : s.x;
    wait_for(first);
    if (fences) __threadfence();
    s.results[blockIdx.x - 2] = load_relaxed(second);
  }
}
// Each stores, then looks at the other's (Dekker).
template <bool fences>
LSTM_KERNEL store_then_load(Litmus s) {
  if (!first_thread()) return;
  store_relaxed(blockIdx.x == 0 ? s.x : s.y, 1);
  if (fences) __threadfence();
  s.results[blockIdx.x] = load_relaxed(blockIdx.x == 0 ? s.y : s.x);
}
// Writes that read what they change count each other, and end the lateness of what they change.
LSTM_KERNEL counting(Litmus s) {
  if (is(0)) store_relaxed(s.x, 100);
  if (is(0) || is(1)) {
    if (is(1)) wait_for(s.x);
    for (int i = 0; i < 10; ++i) atomicAdd(s.x, 1u);
    s.results[blockIdx.x] = load_relaxed(s.x) >= 110;
  }
}
// One that changes nothing has read the newest all the same, and nobody who has goes back behind it.
LSTM_KERNEL reading_by_an_atomic(Litmus s) {
  if (is(0)) store_relaxed(s.x, 1);
  if (is(1)) {
    while (atomicAdd(s.x, 0u) == 0) load_relaxed(s.y);
    s.results[0] = load_relaxed(s.x);
  }
}
// A plain store over one that is late: what is published after it is not what was there before both.
LSTM_KERNEL plain_over_late(Litmus s) {
  uint32_t* const z = s.y + 1;
  if (is(0)) {
    store_relaxed(s.x, 1);
    store_relaxed(s.y, 1);
  } else if (is(1)) {
    wait_for(s.y);
    *s.x = 2;
    __threadfence();
    store_relaxed(z, 1);
  } else if (is(2)) {
    wait_for(z);
    __threadfence();
    s.results[0] = load_relaxed(s.x);
  }
}
// The words of a piece.
LSTM_KERNEL torn_piece(Litmus s) {
  if (is(0)) {
    for (uint32_t i = 1; i <= 20; ++i) store_relaxed_16(s.piece, make_uint4(i, i, i, i));
  } else if (is(1)) {
    bool torn = false, back = false;
    uint4 before = make_uint4(0, 0, 0, 0);
    while (before.x < 20 || before.w < 20) {
      const uint4 now = load_relaxed_16(s.piece);
      torn = torn || now.x != now.y || now.x != now.z || now.x != now.w;
      back = back || now.x < before.x || now.y < before.y || now.z < before.z || now.w < before.w;
      before = now;
    }
    s.results[0] = torn;
    s.results[1] = back;
  }
}

struct Case {
  const char* name;
  void (*kernel)(Litmus);
  LaunchConfig config;
  bool (*forbidden)(const uint32_t*);
  bool (*weak)(const uint32_t*);  // allowed, and only late stores show it; null: there is none
};

bool first_is_zero(const uint32_t* r) { return r[0] == 0; }
bool both_are_zero(const uint32_t* r) { return r[0] == 0 && r[1] == 0; }
bool never(const uint32_t*) { return false; }

const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {"message", message<false>, shape(2, 32), never, first_is_zero},
      {"message_with_fences", message<true>, shape(2, 32), first_is_zero, nullptr},
      {"message_of_a_block", message_of_a_block<true>, shape(2, 64), first_is_zero, nullptr},
      {"message_of_a_block_without_barrier", message_of_a_block<false>, shape(2, 64), never, first_is_zero},
      {"message_of_a_warp", message_of_a_warp, shape(2, 32), first_is_zero, nullptr},
      {"neighbours", neighbours<true>, shape(1, 64), first_is_zero, nullptr},
      {"neighbours_without_barrier", neighbours<false>, shape(1, 64), never, first_is_zero},
      {"own_stores", own_stores, shape(2, 32), [](const uint32_t* r) { return r[0] != 7 || r[1] != 16 || r[2] != 9; },
       nullptr},
      {"coherence", coherence, shape(3, 32), [](const uint32_t* r) { return r[0] != 0 || r[1] != 0; }, nullptr},
      {"three", three<false>, shape(3, 32), never, first_is_zero},
      {"three_with_fences", three<true>, shape(3, 32), first_is_zero, nullptr},
      {"two_readers", two_readers<false>, shape(4, 32), never, both_are_zero},
      {"two_readers_with_fences", two_readers<true>, shape(4, 32), both_are_zero, nullptr},
      {"store_then_load", store_then_load<false>, shape(2, 32), never, both_are_zero},
      {"store_then_load_with_fences", store_then_load<true>, shape(2, 32), both_are_zero, nullptr},
      {"counting", counting, shape(2, 32), [](const uint32_t* r) { return r[0] != 1 || r[1] != 1; }, nullptr},
      {"reading_by_an_atomic", reading_by_an_atomic, shape(2, 32), first_is_zero, nullptr},
      {"plain_over_late", plain_over_late, shape(3, 32), first_is_zero, nullptr},
      {"torn_piece", torn_piece, shape(2, 32),
       [](const uint32_t* r) { return r[1] != 0 || (r[0] != 0 && !simt::options().torn); }, nullptr},
  };
  return all;
}

// Runs with a forbidden outcome, and runs with a weak one.
void count_outcomes(const Case& one, int& forbidden, int& weak, int& torn) {
  simt::DeviceBuffer<uint32_t> words(64, 0u, "words"), results(4, kUnset, "results");
  simt::DeviceBuffer<uint4> piece(1, make_uint4(0, 0, 0, 0), "piece");
  LaunchConfig config = one.config;
  config.cooperative = true;
  launch(one.kernel, config, Litmus{words.data(), words.data() + 32, piece.data(), results.data()});
  forbidden += one.forbidden(results.data()) ? 1 : 0;
  weak += one.weak != nullptr && one.weak(results.data()) ? 1 : 0;
  torn += results[0] == 1 ? 1 : 0;
}

void check(const Case& one) {
  int forbidden = 0, weak = 0, torn = 0;
  const auto& delivery = simt::options().stores;
  for (const auto schedule : {simt::Schedule::Fifo, simt::Schedule::Random, simt::Schedule::Priority}) {
    simt::options().schedule = schedule;
    for (uint64_t seed = 1; seed <= 60; ++seed) {
      simt::options().seed = seed;
      count_outcomes(one, forbidden, weak, torn);
    }
  }
  const std::string name = one.name;
  checks::expect(forbidden == 0, name + ": an outcome that PTX forbids, " + std::to_string(forbidden) + " times");
  if (one.weak != nullptr && delivery != simt::Delivery::Now) {
    checks::expect(weak > 0, name + ": no outcome that late stores alone show");
  }
  if (name == "torn_piece" && delivery != simt::Delivery::Now) {
    checks::expect((torn > 0) == simt::options().torn, name + ": torn " + std::to_string(torn) + " times");
  }
}

}  // namespace

int main() {
  try {
    for (const auto delivery : {simt::Delivery::Now, simt::Delivery::Late, simt::Delivery::Mixed}) {
      for (const bool torn : {false, true}) {
        simt::options().stores = delivery;
        simt::options().torn = torn;
        for (const Case& one : cases()) check(one);
      }
    }
  } catch (const simt::Error& error) {
    checks::expect(false, error.what());
  }
  std::printf("%zu cases, %d failures\n", cases().size(), checks::failures);
  return checks::failures == 0 ? 0 : 1;
}
