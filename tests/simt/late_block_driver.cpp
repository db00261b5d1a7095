// A block that waits for a piece of another one, which comes late or not at all: the time of a wait begins when all
// blocks have come, and that for them to come ends too. How it is emulated: SIMT_... variables. Ends with 0: right, 1:
// wrong, 2: simt::Error.
#include <cstring>

#include "cuda/persistent_chunk.cuh"
#include "simt/check.h"

namespace {

using namespace lstm_ext::cuda;
using simt::DeviceBuffer;

struct LateBlock {
  PersistentControl control;
  unsigned char* slot;
  enum Late { kSends, kSendsNothing, kNeverComes } late;
  uint32_t* came;  // 1: the piece did
};

LSTM_DEVICE void do_something_else(const LateBlock& a, int times) {
  for (int i = 0; i < times; ++i) {
    load_relaxed(a.control.words);
    atomicAdd(a.control.status, 0u);  // nobody takes it for a deadlock
  }
}

LSTM_KERNEL late_block(LateBlock a) {
  if (blockIdx.x == 1) {
    if (threadIdx.x != 0 || a.late == LateBlock::kNeverComes) return;
    do_something_else(a, 8192);
    atomicAdd(a.control.words + kBlocksThatCame, 1u);
    do_something_else(a, 512);  // it reads its weights
    if (a.late == LateBlock::kSends) store_relaxed_16(a.slot, make_uint4(1, 2, 3, 4));
    return;
  }
  if (threadIdx.x == 0) atomicAdd(a.control.words + kBlocksThatCame, 1u);
  const unsigned char* const rows[1] = {a.slot};
  AwaitedPieces<1, 1> piece(rows, 0, 1);
  const bool came = piece.wait<0, 1>(a.control, gridDim.x);
  if (threadIdx.x == 0) *a.came = came ? 1 : 0;
}

void check(LateBlock::Late late) {
  DeviceBuffer<uint32_t> words(kControlWords, 0xffffffffu, "control words"), status(1, 0u, "status"),
      came(1, 7u, "came"), slot(4, 0xffffffffu, "slot");
  LaunchConfig config = checks::shape(2, 32);
  config.cooperative = true;
  // Switches between threads: more than the late block makes between coming and sending, fewer than before.
  constexpr int64_t kShort = 1 << 16;
  launch(late_block, config,
         LateBlock{{words.data(), nullptr, status.data(), kShort},
                   reinterpret_cast<unsigned char*>(slot.data()),
                   late,
                   came.data()});
  const bool sends = late == LateBlock::kSends;
  checks::expect(came[0] == (sends ? 1 : 0),
                 sends ? "a wait expired before all blocks had come" : "a wait did not expire");
}

}  // namespace

int main() {
  try {
    for (const auto late : {LateBlock::kSends, LateBlock::kSendsNothing, LateBlock::kNeverComes}) check(late);
  } catch (const simt::Error& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
  return checks::failures == 0 ? 0 : 1;
}
