// Hand-offs between blocks through a mailbox in global memory, measured and checked: a piece is taken and handed on as
// the persistent kernels do it (AwaitedPieces and hand_on in cuda/persistent_chunk.cuh). gpu_probes.cu runs them on a
// GPU, tests/simt/handoff_driver.cpp on the emulator.
#pragma once

#include "cuda/persistent_chunk.cuh"

namespace probes {

namespace cuda = lstm_ext::cuda;

enum class Wait {
  kAsTheKernels,  // AwaitedPieces itself
  kBackOff,       // and a sleep after each try that failed
  kWatched,       // tries that found a part of a piece are counted
  kOneWord,       // wrong, for a test: a piece is taken for whole if its last word is there
};

// What is found, added up over all threads.
struct Counts {
  uint32_t wrong;  // pieces that are not what was sent
  uint32_t parts;  // tries that found a part of a piece: PTX allows it. kWatched
};

struct HandOffs {
  uint4* mailbox;                   // as many pieces as are sent, each written once; all bits set before the launch
  cuda::PersistentControl control;  // words and status: 0 once a wait has expired, and 1
  Counts* counts;
  int64_t *clocks, *nanoseconds;  // of a pair, or of a block, for all turns but the first one, or until it gave up
  uint32_t seed;                  // of what is sent: another one in each launch
  int turns;
  int shift;          // which block is whose partner
  int silent;         // a block that sends nothing and leaves, or -1
  unsigned back_off;  // nanoseconds
};

// What is sent as piece `number` of the launch. The emulator's clock is not for this.
LSTM_HOST_DEVICE uint32_t sent_word(uint32_t seed, uint32_t number, uint32_t word) {
  uint32_t x = (4 * number + word + seed) * 2654435761u;
  x = (x ^ x >> 15) * 2246822519u;
  x ^= x >> 13;
  return x == cuda::kSentinel ? 0 : x;
}
LSTM_DEVICE uint4 sent_piece(uint32_t seed, int64_t number) {
  const auto n = static_cast<uint32_t>(number);
  return make_uint4(sent_word(seed, n, 0), sent_word(seed, n, 1), sent_word(seed, n, 2), sent_word(seed, n, 3));
}
LSTM_DEVICE bool is_other(const uint4& a, const uint4& b) {
  return a.x != b.x || a.y != b.y || a.z != b.z || a.w != b.w;
}

// Of the multiprocessor, and of all of them. On the emulator a clock is for waits alone.
LSTM_DEVICE int64_t clocks_now() {
#if defined(LSTM_EXT_SIMT)
  return 0;
#else
  return clock64();
#endif
}
LSTM_DEVICE int64_t nanoseconds_now() {
#if defined(LSTM_EXT_SIMT)
  return 0;
#else
  return cuda::now();
#endif
}
LSTM_DEVICE void sleep_for([[maybe_unused]] unsigned nanoseconds) {
#if defined(__CUDA_ARCH__)
  __nanosleep(nanoseconds);
#endif
}

// Blocks are not counted here: as many of them come as the words say before anybody has counted.
constexpr uint32_t kNotCounted = 0;

// AwaitedPieces of one piece, or another way to wait. False: it took too long, or another block has given up.
template <Wait kWait>
LSTM_DEVICE bool take(uint4& piece, const uint4* place, const HandOffs& a, uint32_t& parts) {
  if constexpr (kWait == Wait::kAsTheKernels) {
    cuda::AwaitedPieces<1> pieces(reinterpret_cast<const unsigned char*>(place), 0, 1);
    const bool came = pieces.wait<0, 1>(a.control, kNotCounted);
    piece = pieces[0];
    return came;
  } else {
    constexpr unsigned kAll = 0xffffffffu;
    cuda::WaitLimit limit(a.control.limit);
    while (true) {
      piece = cuda::load_relaxed_16(place);
      const bool whole = kWait == Wait::kOneWord ? piece.w != cuda::kSentinel : cuda::is_whole(piece);
      if (kWait == Wait::kWatched && !whole) {
        const uint32_t all = piece.x & piece.y & piece.z & piece.w;
        parts += all != cuda::kSentinel ? 1 : 0;
      }
      if (__all_sync(kAll, whole)) return true;
      bool gives_up = false;
      if (limit.looks()) {
        gives_up = limit.has_passed() || cuda::load_relaxed(a.control.words + cuda::kGaveUp) == 0;
      }
      if (__any_sync(kAll, gives_up)) return false;
      if (kWait == Wait::kBackOff) sleep_for(a.back_off);
    }
  }
}

LSTM_DEVICE void give_up(const cuda::PersistentControl& control) {
  cuda::store_relaxed(control.words + cuda::kGaveUp, 0);
  cuda::store_relaxed_system(control.status, 1);
}
LSTM_DEVICE void count(const HandOffs& a, uint32_t wrong, uint32_t parts) {
  if (wrong != 0) atomicAdd(&a.counts->wrong, wrong);
  if (parts != 0) atomicAdd(&a.counts->parts, parts);
}

// ---- there and back: half of the blocks begin, each with a partner in the other half. A block is a warp, and a
// message is a piece of each of its threads.

constexpr int kMessagePieces = 32;
inline int64_t messages_of(int blocks, int turns) { return int64_t{blocks} / 2 * 2 * turns; }

template <Wait kWait>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kMessagePieces) there_and_back(LSTM_GRID_CONSTANT HandOffs a) {
  const int pairs = static_cast<int>(gridDim.x) / 2, block = static_cast<int>(blockIdx.x);
  if (block == a.silent) return;
  const bool begins = block < pairs;
  const int pair = begins ? block : (block - pairs + a.shift) % pairs;
  const auto place = [&](int message) {
    return (int64_t{message} * pairs + pair) * kMessagePieces + static_cast<int>(threadIdx.x);
  };
  const int own = begins ? 0 : 1;
  uint32_t wrong = 0, parts = 0;
  int64_t clocks = clocks_now(), nanoseconds = nanoseconds_now();
  bool goes_on = true;
  // What is sent and what is expected is known before it is needed: only the hand-off takes time.
  uint4 sends = sent_piece(a.seed, place(own)), expects = sent_piece(a.seed, place(1 - own));
  for (int turn = 0; turn < a.turns && goes_on; ++turn) {
    if (turn == 1) {
      clocks = clocks_now();
      nanoseconds = nanoseconds_now();
    }
    if (begins) cuda::store_relaxed_16(a.mailbox + place(2 * turn), sends);
    const uint4 sends_next = sent_piece(a.seed, place(2 * turn + 2 + own));
    const uint4 expects_next = sent_piece(a.seed, place(2 * turn + 3 - own));
    uint4 piece;
    goes_on = take<kWait>(piece, a.mailbox + place(2 * turn + 1 - own), a, parts);
    if (goes_on && !begins) cuda::store_relaxed_16(a.mailbox + place(2 * turn + 1), sends);
    if (goes_on && is_other(piece, expects)) ++wrong;
    sends = sends_next;
    expects = expects_next;
  }
  count(a, wrong, parts);
  if (threadIdx.x != 0) return;
  if (!goes_on) give_up(a.control);
  if (!begins) return;
  a.clocks[pair] = clocks_now() - clocks;
  a.nanoseconds[pair] = nanoseconds_now() - nanoseconds;
}

// ---- from all to all: the exchange of h between the blocks of a group, with its rows, threads and pieces of 16-bit
// numbers, and nothing else of a step.

constexpr cuda::PersistentShape kShape = cuda::persistent_shape(false, cuda::Exchange::kMailbox, 2);
constexpr int kPiecesOfBlock = kShape.units * 2 / cuda::kPieceBytes;  // of a row
inline int64_t pieces_of_turn(int blocks) { return int64_t{blocks} * kPiecesOfBlock * cuda::kPersistentRows; }
// That a thread can take.
inline int most_blocks() { return kShape.parts * 4 * kShape.pieces / kPiecesOfBlock; }

LSTM_KERNEL LSTM_LAUNCH_BOUNDS(cuda::kPersistentThreads) all_to_all(LSTM_GRID_CONSTANT HandOffs a) {
  LSTM_SHARED(uint32_t, late, 2);  // of a turn, by turns: somebody of the block has given up
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int row_pieces = static_cast<int>(gridDim.x) * kPiecesOfBlock;
  const auto place = [&](int turn, int row, int piece) {
    return (int64_t{turn} * cuda::kPersistentRows + row) * row_pieces + piece;
  };
  // A thread takes every 32nd piece of a row, as in PersistentChunk, and one of eight threads writes a piece.
  const int row = lane / 4, first = warp * 4 + lane % 4;
  const int count_of_thread = (row_pieces - first + kShape.parts * 4 - 1) / (kShape.parts * 4);
  const int unit = thread % kShape.units, unit_row = thread / kShape.units;
  const bool writes = unit_row < cuda::kPersistentRows && lane % 8 == 0;
  const int own = static_cast<int>(blockIdx.x) * kPiecesOfBlock + unit / 8;
  if (thread < 2) late[thread] = 0;
  __syncthreads();
  uint32_t wrong = 0;
  int64_t clocks = 0, nanoseconds = 0;
  bool goes_on = true;
  uint4 sends = sent_piece(a.seed, place(0, unit_row, own));
  const auto send = [&](int turn) {
    if (writes && turn < a.turns) cuda::store_relaxed_16(a.mailbox + place(turn, unit_row, own), sends);
    sends = sent_piece(a.seed, place(turn + 1, unit_row, own));
  };
  send(0);
  for (int turn = 0; turn < a.turns; ++turn) {
    if (turn == 1) {
      clocks = clocks_now();
      nanoseconds = nanoseconds_now();
    }
    const auto* from = reinterpret_cast<const unsigned char*>(a.mailbox + place(turn, row, first));
    cuda::AwaitedPieces<kShape.pieces> pieces(from, kShape.parts * 4 * cuda::kPieceBytes, count_of_thread);
    const bool came = pieces.wait<0, kShape.pieces>(a.control, kNotCounted);
    if (!came) atomicExch(&late[turn % 2], 1u);
    __syncthreads();
    if (late[turn % 2] != 0) {
      goes_on = false;
      break;
    }
    send(turn + 1);
    // While that travels.
#pragma unroll
    for (int q = 0; q < kShape.pieces; ++q) {
      const uint4 expects = sent_piece(a.seed, place(turn, row, first + q * kShape.parts * 4));
      if (q < count_of_thread && is_other(pieces[q], expects)) ++wrong;
    }
  }
  count(a, wrong, 0);
  if (thread != 0) return;
  if (!goes_on) give_up(a.control);
  a.clocks[blockIdx.x] = clocks_now() - clocks;
  a.nanoseconds[blockIdx.x] = nanoseconds_now() - nanoseconds;
}

}  // namespace probes
