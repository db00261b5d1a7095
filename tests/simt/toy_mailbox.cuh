// A toy of the exchange that a persistent kernel needs: blocks hand on values through a mailbox in global memory.
//
// The mailbox holds (steps, batch, pieces) pieces of 16 bytes; all of it is 0xff before a launch. A piece has one
// owner, who writes it once, by one store; who needs it polls until none of its words is the sentinel. Data are their
// own flag: nothing is released or acquired, and nothing else is asked of the order of memory than that a word is
// whole.
//
// What is handed on are words without a meaning, in exact arithmetic, so that any wrong one shows in all that follow.
#pragma once

#include "cuda/platform.h"

namespace toy {

namespace cuda = lstm_ext::cuda;

enum MailboxBug : int {
  kRight,
  kOneWordTested,     // a piece is taken for whole when its last word is there
  kFlagWithoutFence,  // data, and a flag that says so, both relaxed
  kNoMemset,          // the mailbox of the chunk before is used as it is
  kReusedSlots,       // and the places of the step before the last, within a launch
  kWrongStep,         // the wait is for the piece of one step earlier
  kSentinelAsData,    // a value that looks like none
  kLostStore,         // a piece that is never written
  kRowBeyondBatch,    // a row that nobody owns is waited for
};

struct MailboxArguments {
  uint4* mailbox;
  uint32_t* flags;     // as many as pieces, zeros: for kFlagWithoutFence
  const uint4* state;  // (batch, pieces), before the first step
  uint4* last;         // and after the last one
  uint4* outputs;      // (steps, batch, pieces)
  uint32_t* status;    // 1: a wait has expired
  int steps;
  int batch;
  int bug;
};

constexpr uint32_t kSentinel = 0xffffffffu;
constexpr int64_t kMailboxLimit = int64_t{1} << 32;

// Of a piece at place `p` of its row.
LSTM_HOST_DEVICE uint32_t digest_of(const uint4& piece, int p) {
  const uint32_t first = 8 * static_cast<uint32_t>(p);
  return piece.x * (first + 1) + piece.y * (first + 3) + piece.z * (first + 5) + piece.w * (first + 7);
}
LSTM_HOST_DEVICE uint32_t word_of(uint32_t sum, int p, uint32_t word) {
  uint32_t x = (sum ^ (4 * static_cast<uint32_t>(p) + word) * 2654435761u) * 2246822519u;
  x ^= x >> 15;
  return x == kSentinel ? 0 : x;
}
// What the owner makes of the digests of its whole row.
LSTM_HOST_DEVICE uint4 piece_of(uint32_t sum, int p) {
  return make_uint4(word_of(sum, p, 0), word_of(sum, p, 1), word_of(sum, p, 2), word_of(sum, p, 3));
}

LSTM_DEVICE bool is_whole(const MailboxArguments& a, const uint4& piece) {
  if (a.bug == kOneWordTested) return piece.w != kSentinel;
  return piece.x != kSentinel && piece.y != kSentinel && piece.z != kSentinel && piece.w != kSentinel;
}

// False: it did not come in time.
LSTM_DEVICE bool take(const MailboxArguments& a, int64_t place, int64_t place_before, uint4& piece) {
  cuda::WaitLimit wait(kMailboxLimit);
  while (true) {
    bool whole;
    if (a.bug == kFlagWithoutFence) {
      whole = cuda::load_relaxed(a.flags + place) != 0;
      if (whole) piece = cuda::load_relaxed_16(a.mailbox + place);
    } else if (a.bug == kWrongStep) {
      whole = place_before < 0 || is_whole(a, cuda::load_relaxed_16(a.mailbox + place_before));
      if (whole) piece = cuda::load_relaxed_16(a.mailbox + place);
    } else {
      piece = cuda::load_relaxed_16(a.mailbox + place);
      whole = is_whole(a, piece);
    }
    if (whole) return true;
    if (wait.is_over()) return false;
  }
}

// A block owns kPieces pieces of every row; a thread owns one of them, and takes the pieces at its place of all blocks.
template <int kPieces, int kRows>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kPieces* kRows) mailbox(MailboxArguments a) {
  constexpr int kThreads = kPieces * kRows;
  LSTM_SHARED(uint32_t, sums, 2 * kThreads);
  LSTM_SHARED(uint32_t, late, 2);  // somebody of the block has given up; both doubled: one barrier a step is enough
  const int thread = static_cast<int>(threadIdx.x);
  const int row = thread / kPieces;
  const int pieces = static_cast<int>(gridDim.x) * kPieces;
  const int own = static_cast<int>(blockIdx.x) * kPieces + thread % kPieces;
  const bool active = row < a.batch;
  const bool waits = active || (a.bug == kRowBeyondBatch && row == a.batch);
  const int64_t step_stride = static_cast<int64_t>(a.batch) * pieces;
  const auto place_of = [&](int t, int p) {
    if (a.bug == kReusedSlots) t %= 2;
    return t * step_stride + row * pieces + p;
  };
  if (thread < 2) late[thread] = 0;
  uint4 value = make_uint4(0, 0, 0, 0);
  if (active) value = a.state[row * pieces + own];
  __syncthreads();
  for (int t = 0; t < a.steps; ++t) {
    uint32_t* sums_of_step = sums + t % 2 * kThreads;
    uint32_t sum = 0;
    for (int p = thread % kPieces; p < pieces && waits; p += kPieces) {
      uint4 piece = make_uint4(0, 0, 0, 0);
      if (t == 0) {
        if (active) piece = a.state[row * pieces + p];
      } else if (!take(a, place_of(t - 1, p), t > 1 ? place_of(t - 2, p) : -1, piece)) {
        atomicExch(&late[t % 2], 1u);
        break;
      }
      sum += digest_of(piece, p);
    }
    sums_of_step[thread] = sum;
    __syncthreads();
    if (late[t % 2] != 0) {
      if (thread == 0) cuda::store_relaxed(a.status, 1);
      break;
    }
    if (!active) continue;
    sum = 0;
    for (int i = 0; i < kPieces; ++i) sum += sums_of_step[row * kPieces + i];
    value = piece_of(sum, own);
    if (a.bug == kSentinelAsData && t == 2 && own == kPieces + 1 && row == 1) value.y = kSentinel;
    if (a.bug != kLostStore || t != 1 || own != kPieces || row != 0) {
      cuda::store_relaxed_16(a.mailbox + place_of(t, own), value);
      if (a.bug == kFlagWithoutFence) cuda::store_relaxed(a.flags + place_of(t, own), 1);
    }
    a.outputs[t * step_stride + row * pieces + own] = value;
  }
  if (active) a.last[row * pieces + own] = value;
}

}  // namespace toy
