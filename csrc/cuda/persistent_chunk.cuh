// Shared by both passes of the persistent kernels: the loop over the steps of a chunk. A pass (persistent_forward.cuh,
// persistent_backward.cuh) defines the rows of its weights, its cell, and the data that it passes to others.
#pragma once

#include "cuda/persistent.h"
#include "cuda/step_tiles.cuh"

namespace lstm_ext::cuda {

// ---- the steps of a chunk

struct StepPlace {
  int time;
  // Where the step begins, and the one before it in the layer's direction: rows behind the first one of the chunk,
  // which may be negative for the latter.
  int row, row_before;
  int rows, previous_rows, next_rows;
};

// `time` may be one beside the chunk.
LSTM_DEVICE int chunk_begin(const ChunkOfSteps& c) { return c.reverse ? c.count - c.end : c.first; }
LSTM_DEVICE int rows_at(const ChunkOfSteps& c, int time) {
  if (time < 0 || time >= c.count) return 0;
  if (!c.packed) return c.batch;
  const int i = time - chunk_begin(c) + 1;
  return c.rows_before[i + 1] - c.rows_before[i];
}
LSTM_DEVICE int row_at(const ChunkOfSteps& c, int time) {
  const int i = time - chunk_begin(c);
  return c.packed ? c.rows_before[i + 1] : i * c.batch;
}

// The place of step n of the direction. Rows begin and end with the sequences of packed data.
LSTM_DEVICE StepPlace place_of(const ChunkOfSteps& c, int n) {
  StepPlace place;
  place.time = c.reverse ? c.count - 1 - n : n;
  const int before = c.reverse ? place.time + 1 : place.time - 1, after = c.reverse ? place.time - 1 : place.time + 1;
  place.row = row_at(c, place.time);
  place.row_before = row_at(c, before);
  if (c.packed) {
    place.rows = rows_at(c, place.time);
    const int previous = rows_at(c, before), next = rows_at(c, after);
    place.previous_rows = previous < place.rows ? previous : place.rows;
    place.next_rows = next < place.rows ? next : place.rows;
  } else {
    place.rows = c.batch;
    place.previous_rows = n > 0 ? c.batch : 0;
    place.next_rows = n + 1 < c.count ? c.batch : 0;
  }
  return place;
}

// Same as Steps::resets_before.
LSTM_DEVICE ResetFlags resets_at(const ChunkOfSteps& c, const uint8_t* resets, int cut) {
  if (!resets || cut >= c.count) return {nullptr, 0};
  return {resets + row_at(c, cut), rows_at(c, cut)};
}

LSTM_DEVICE StepRows step_rows_of(const StepRows& rows, const ChunkOfSteps& c, const uint8_t* resets,
                                  const StepPlace& place) {
  StepRows result = rows;
  result.count = place.rows;
  result.previous_count = place.previous_rows;
  result.next_count = place.next_rows;
  result.resets = resets_at(c, resets, c.reverse ? place.time + 1 : place.time);
  result.resets_after = {nullptr, 0};
  if (place.next_rows > 0) result.resets_after = resets_at(c, resets, c.reverse ? place.time : place.time + 1);
  result.time = place.time;
  return result;
}

// Whether there is a unit j of a row b in the step.
template <typename Step>
LSTM_DEVICE bool is_cell(const Step& step, int64_t b, int64_t j) {
  return b < step.rows.count && j < step.hidden_size;
}

// ---- pieces: 16 bytes of operands

template <typename D>
constexpr int kPieceNumbers = kPieceBytes / static_cast<int>(sizeof(D));

// Rounded as the instruction takes it: a mailbox is read oftener than it is written.
template <typename D>
LSTM_DEVICE uint32_t operand_bits(D value) {
  if constexpr (std::is_same_v<D, float>) {
    return to_tf32(value);
  } else {
    return reinterpret_cast<const uint16_t&>(value);
  }
}

LSTM_DEVICE bool is_whole(const uint4& piece) {
  return piece.x != kSentinel && piece.y != kSentinel && piece.z != kSentinel && piece.w != kSentinel;
}
// Both halves are a NaN in 16 bits, and all of it is one in 32.
LSTM_DEVICE uint32_t without_sentinel(uint32_t word) { return word == kSentinel ? 0x7fff7fffu : word; }

// Pieces of some rows that this thread waits for, kPieces of each. They begin where rows[r] says (null: zeros, and no
// wait), `stride` bytes apart; `count` of a row are there, and the others are zeros.
template <int kRows, int kPieces>
class AwaitedPieces {
 public:
  LSTM_DEVICE AwaitedPieces(const unsigned char* const (&rows)[kRows], int stride, int count LSTM_SITE_PARAMETERS)
      : stride_(stride) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) rows_[r] = rows[r];
#pragma unroll
    for (int q = 0; q < kRows * kPieces; ++q) {
      const uint32_t word = rows_[q / kPieces] && q % kPieces < count ? kSentinel : 0;
      pieces_[q] = make_uint4(word, word, word, word);
    }
    read_missing<0>(LSTM_SITE_ONLY);
  }
  LSTM_DEVICE const uint4& operator[](int q) const { return pieces_[q]; }

  // Waits until the pieces [kFirst, kEnd) are whole. Each try reads what is missing of those and of the later ones, and
  // nothing twice. The threads of a warp wait for each other: their instructions go together. False: it took too long,
  // or another block has given up.
  template <int kFirst, int kEnd>
  LSTM_DEVICE bool wait(const PersistentControl& control, uint32_t blocks LSTM_SITE_PARAMETERS) {
    constexpr unsigned kAll = 0xffffffffu;
    WaitLimit limit(control.limit);
    bool they_came = true;
    while (true) {
      bool whole = true;
#pragma unroll
      for (int q = kFirst; q < kEnd; ++q) whole = whole && is_whole(pieces_[q]);
      if (__all_sync(kAll, whole)) return true;
      bool gives_up = false;
      if (limit.looks()) {
        // A block that another kernel keeps out is late through nobody's fault: the time begins when it has come. But
        // it may never come, if that kernel waits too.
        const bool all_came = load_relaxed(control.words + kBlocksThatCame LSTM_SITE) + 1 == blocks;
        if (all_came && !they_came) limit.start_again();
        they_came = all_came;
        gives_up = load_relaxed(control.words + kGaveUp LSTM_SITE) == 0 || limit.has_passed(all_came ? 1 : kForBlocks);
      }
      if (__any_sync(kAll, gives_up)) return false;
      read_missing<kFirst>(LSTM_SITE_ONLY);
    }
  }

 private:
  template <int kFirst>
  LSTM_DEVICE void read_missing(LSTM_SITE_ONLY_PARAMETERS) {
#pragma unroll
    for (int q = kFirst; q < kRows * kPieces; ++q) {
      if (!is_whole(pieces_[q])) pieces_[q] = load_relaxed_16(rows_[q / kPieces] + q % kPieces * stride_ LSTM_SITE);
    }
  }

  const unsigned char* rows_[kRows];
  const int stride_;
  uint4 pieces_[kRows * kPieces];
};

// The same number, of which the compiler does not know that.
LSTM_DEVICE int computed_anew(int value) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(value) : : "memory");
#endif
  return value;
}

// ---- the loop

template <typename Pass, int kRowTiles>
class PersistentChunk {
 public:
  using D = typename Pass::Operand;
  static constexpr PersistentShape kShape = persistent_shape(Pass::kBackward, sizeof(D), kRowTiles);
  static constexpr int kParts = kPersistentParts, kTiles = kShape.tiles, kPieces = kShape.pieces;
  static constexpr int kUnits = kShape.units, kRows = kRowTiles * kPersistentRows;
  static constexpr int kNumbers = kPieceNumbers<D>;
  // Cells whose sums a thread has in the fragments of the instruction; then a thread finishes one cell or none.
  static constexpr int kFragmentCells = Pass::kSums == 4 ? kTiles : 4 * kTiles;
  static constexpr int kCellThreads = kUnits * kRows;
  // Partial sums. The pitch keeps rows in different banks.
  struct alignas(4 * Pass::kSums) Sums {
    float of[Pass::kSums];
    LSTM_DEVICE void store(Sums* to) const {
      if constexpr (Pass::kSums == 4) {
        store_shared_16(to->of, make_float4(of[0], of[1], of[2], of[3]));
      } else {
        *to = *this;
      }
    }
  };
  static constexpr int kPitch = kUnits + (Pass::kSums == 4 ? 1 : 4);
  static constexpr int kPartials = kParts * kRows * kPitch;  // partial sums of a turn
  static_assert(kCellThreads <= kPersistentThreads);

  // Dynamic shared memory; that of pieces without registers comes first.
  static size_t shared_bytes(int extra) {
    static_assert(kPartials * sizeof(Sums) == kParts * kRows * kPitch * 4 * Pass::kSums);
    return static_cast<size_t>(persistent_shared(Pass::kBackward, sizeof(D), kRowTiles, extra));
  }

  LSTM_DEVICE PersistentChunk(const PersistentSides<typename Pass::Arguments>& all, unsigned char* shared,
                              uint32_t* late)
      : all_(all),
        pass_(all.sides[blockIdx.z]),
        shared_(shared),
        late_(late),
        warp_(threadIdx.x / 32),
        group_(threadIdx.x % 32 / 4),
        member_(threadIdx.x % 4),
        blocks_of_group_(gridDim.x / all.groups),
        group_row_(static_cast<int>(blockIdx.x / blocks_of_group_) * kRows),
        first_unit_(static_cast<int>(blockIdx.x % blocks_of_group_) * kUnits),
        pieces_of_row_(static_cast<int>(pass_.args.mailbox.length / kNumbers)) {}

  LSTM_DEVICE void run() {
    if (threadIdx.x < 2) late_[threadIdx.x] = 0;
    if (threadIdx.x == 0) atomicAdd(all_.control.words + kBlocksThatCame, 1u);
    // If the previous launch gave up, the mail that it did not write never arrives.
    bool goes_on = !all_.control.before || load_relaxed(all_.control.before) != 0;
    if (goes_on) {
      load_weights();
      __syncthreads();
      const ChunkOfSteps& steps = pass_.args.steps;
      int turn = 0;
      const int count = steps.end - steps.first;
      int left_at = 0;  // rows of the chunk in front of what the step before in the pass has left
      for (int i = 0; i < count && goes_on; ++i) goes_on = run_step(i, turn, left_at);
    }
    leave(goes_on);
  }

 private:
  struct Unit {
    int unit, row;  // index in the block, index in the turn
  };
  // The cell whose sums are number i of this thread's fragments.
  LSTM_DEVICE Unit fragment_cell(int i) const {
    if constexpr (Pass::kSums == 4) {
      return {i / 2 * 8 + group_, member_ * 2 + i % 2};
    } else {
      return {i / 4 * 16 + i % 4 / 2 * 8 + group_, member_ * 2 + i % 2};
    }
  }
  LSTM_DEVICE static Sums sums_of_fragment(const float (&d)[kTiles][4], int i) {
    if constexpr (Pass::kSums == 4) {
      const int tile = i / 2 * 2, column = i % 2;
      return {{d[tile][column], d[tile][2 + column], d[tile + 1][column], d[tile + 1][2 + column]}};
    } else {
      return {{d[i / 4][i % 4]}};
    }
  }
  // The cell that this thread finishes. The rows of a warp are so far apart that their sums lie in different banks.
  LSTM_DEVICE static Unit cell() {
    constexpr int kRowsOfWarp = 32 / kUnits, kApart = kPersistentRows / kRowsOfWarp;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    return {lane % kUnits, thread / 32 / kApart * kPersistentRows + thread / 32 % kApart + lane / kUnits * kApart};
  }

  // A piece of this thread's rows of tile m; `half` 1: of the row eight further down.
  LSTM_DEVICE uint4 weight_piece(int64_t piece, int m, int half) const {
    uint4 bits = pass_.weight_piece(first_unit_, m, half * 8 + group_, piece);
    bits.x = operand_register<D>(bits.x);
    bits.y = operand_register<D>(bits.y);
    bits.z = operand_register<D>(bits.z);
    bits.w = operand_register<D>(bits.w);
    return bits;
  }
  // Each warp has a part of the pieces: warp 0 the first four of each 4 * kParts.
  LSTM_DEVICE int piece_of(int q) const { return (q * kParts + warp_) * 4 + member_; }
  LSTM_DEVICE bool is_there(int q) const { return (q * kParts + warp_) * 4 < pieces_of_row_; }
  LSTM_DEVICE uint4* extra_weights(int e, int m, int half) const {
    return reinterpret_cast<uint4*>(shared_) + (((e * 8 + warp_) * kTiles + m) * 2 + half) * 32 + threadIdx.x % 32;
  }

  LSTM_DEVICE static void in_fragments(uint32_t (&first)[4], uint32_t (&second)[4], const uint4& low,
                                       const uint4& high) {
    first[0] = low.x, first[1] = high.x, first[2] = low.y, first[3] = high.y;
    second[0] = low.z, second[1] = high.z, second[2] = low.w, second[3] = high.w;
  }

  LSTM_DEVICE void load_weights() {
    unit_ = pass_.unit(first_unit_ + cell().unit);
#pragma unroll
    for (int q = 0; q < kPieces; ++q) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        in_fragments(weights_[q][m][0], weights_[q][m][1], weight_piece(piece_of(q), m, 0),
                     weight_piece(piece_of(q), m, 1));
      }
    }
    for (int e = 0; e < all_.extra; ++e) {
      for (int m = 0; m < kTiles; ++m) {
        for (int half = 0; half < 2; ++half) {
          *extra_weights(e, m, half) = weight_piece(piece_of(kPieces + e), m, half);
        }
      }
    }
  }

  // Row b of what the step before in the pass has left, from where this thread's pieces begin.
  LSTM_DEVICE const unsigned char* row_left(int i, int left_at, int b, int rows) const {
    if (b >= rows) return nullptr;
    const Mailbox<D>& box = pass_.args.mailbox;
    return reinterpret_cast<const unsigned char*>(i == 0 ? box.before : box.slots) +
           int64_t{left_at + b} * static_cast<int>(box.length * sizeof(D)) + piece_of(0) * kPieceBytes;
  }

  // One look at the mailbox brings all pieces of the turn's rows, tile after tile; this many are multiplied as soon as
  // they are there.
  static constexpr int kTurnPieces = kRowTiles * kPieces, kGroup = kTurnPieces < 8 ? kTurnPieces : 8;
  static_assert(kRowTiles == 1 || kGroup == kTurnPieces || kGroup == kPieces);
  // Sums of a tile. One chain of instructions that depend on each other is twice as long as two.
  static constexpr int kChains = kTiles == 1 ? 2 : 1;
  using Chains = float[kChains][kTiles][4];
  using Rows = const unsigned char* [kRowTiles];
  using Pieces = AwaitedPieces<kRowTiles, kPieces>;

  // The products of the turn, of this thread's row in each tile. False: their operand did not come. Calls `meanwhile`
  // when the mailbox was looked at first.
  template <typename Meanwhile>
  LSTM_DEVICE bool multiply(float (&sums)[kRowTiles][kTiles][4], const Rows& rows, Meanwhile&& meanwhile) const {
    constexpr int kStride = kParts * 4 * kPieceBytes;
    const int count = (pieces_of_row_ - piece_of(0) + 4 * kParts - 1) / (4 * kParts);  // pieces of this thread
    Chains chains[kRowTiles] = {};
    Pieces pieces(rows, kStride, count);
    meanwhile();
    if (!multiply_groups<0>(chains, pieces)) return false;
    if constexpr (kRowTiles == 1) {
#pragma unroll 1
      for (int e = 0; e < all_.extra; ++e) {
        const int q = kPieces + e;
        if (!is_there(q)) break;
        const unsigned char* const row[1] = {rows[0] ? rows[0] + q * kStride : nullptr};
        AwaitedPieces<1, 1> piece(row, kStride, count - q);
        if (!piece.template wait<0, 1>(all_.control, blocks())) return false;
        uint32_t weights[kTiles][2][4];
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          in_fragments(weights[m][0], weights[m][1], *extra_weights(e, m, 0), *extra_weights(e, m, 1));
        }
        multiply_piece(chains[0], piece[0], weights);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sums[r][m][i] = kChains == 2 ? chains[r][0][m][i] + chains[r][kChains - 1][m][i] : chains[r][0][m][i];
      }
    }
    return true;
  }
  // From piece kFirst on, group by group.
  template <int kFirst>
  LSTM_DEVICE bool multiply_groups(Chains (&chains)[kRowTiles], Pieces& pieces) const {
    if constexpr (kFirst < kTurnPieces) {
      if (kGroup > kPieces || is_there(kFirst % kPieces)) {
        if (!pieces.template wait<kFirst, kFirst + kGroup>(all_.control, blocks())) return false;
#pragma unroll
        for (int q = kFirst; q < kFirst + kGroup; ++q) {
          if (is_there(q % kPieces)) multiply_piece(chains[q / kPieces], pieces[q], weights_[q % kPieces]);
        }
      }
      return multiply_groups<kFirst + kGroup>(chains, pieces);
    }
    return true;
  }
  LSTM_DEVICE static uint32_t blocks() { return gridDim.x * gridDim.z; }

  LSTM_DEVICE static void multiply_piece(Chains& chains, const uint4& piece, const uint32_t (&weights)[kTiles][2][4]) {
    const uint32_t first[2] = {piece.x, piece.y}, second[2] = {piece.z, piece.w};
    auto& of_first = chains[0];
    auto& of_second = chains[kChains - 1];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) multiply_tile<D>(of_first[m], weights[m][0], first);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) multiply_tile<D>(of_second[m], weights[m][1], second);
  }

  LSTM_DEVICE Sums* partial(int turn, int part, const Unit& at) const {
    Sums* of_turn = reinterpret_cast<Sums*>(shared_ + all_.extra * kShape.extra_bytes) + turn % 2 * kPartials;
    return of_turn + (part * kRows + at.row) * kPitch + at.unit;
  }

  // Number i of the chunk's steps in the order of the pass.
  LSTM_DEVICE int step_of(int i) const {
    const ChunkOfSteps& steps = pass_.args.steps;
    return Pass::kBackward ? steps.end - 1 - i : steps.first + i;
  }

  // All tiles of this block. False: somebody gave up.
  LSTM_DEVICE bool run_step(int i, int& turn, int& left_at) {
    StepPlace place = place_of(pass_.args.steps, step_of(i));
    const int stride = all_.groups * kRows;
    const bool has_cell = static_cast<int>(threadIdx.x) < kCellThreads;
    for (int first_row = group_row_; first_row < place.rows; first_row += stride, ++turn) {
      // Reads that happen before the operand arrives cost no time, if the first look at the mailbox does not wait for
      // them.
      typename Pass::Cell begun = {};
      if (has_cell) begun = pass_.begin_cell(pass_.step(place), first_row + cell().row, first_unit_ + cell().unit);
      const auto meanwhile = [&] {
        if (has_cell) pass_.complete_cell(begun, unit_, first_row + cell().row, first_unit_ + cell().unit);
      };
      float sums[kRowTiles][kTiles][4] = {};
      Rows rows;
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        rows[r] = row_left(i, left_at, first_row + r * kPersistentRows + group_, Pass::rows_left(place));
      }
      if (!multiply(sums, rows, meanwhile)) atomicExch(&late_[turn % 2], 1u);
#pragma unroll
      for (int k = 0; k < kRowTiles * kFragmentCells; ++k) {
        const int tile = k / kFragmentCells;
        Unit at = fragment_cell(k % kFragmentCells);
        at.row += tile * kPersistentRows;
        sums_of_fragment(sums[tile], k % kFragmentCells).store(partial(turn, warp_, at));
      }
      __syncthreads();  // the sums are there, and nobody reads those of the turn before
      if (late_[turn % 2] != 0) return false;
      if (!has_cell) continue;
      // Addresses are computed anew: beside the weights there are no registers for them.
      place.row = computed_anew(place.row);
      const Unit at = cell();
      Sums sum = *partial(turn, 0, at);
#pragma unroll
      for (int part = 1; part < kParts; ++part) {
        const Sums more = *partial(turn, part, at);
#pragma unroll
        for (int gate = 0; gate < Pass::kSums; ++gate) sum.of[gate] += more.of[gate];
      }
      D left[Pass::kSums == 4 ? 1 : 4];  // for the next step
      const int64_t b = first_row + at.row, unit = first_unit_ + at.unit;
      const auto result = pass_.finish_cell(pass_.step(place), begun, b, unit, sum.of, left);
      hand_on(place, static_cast<int>(b), static_cast<int>(unit), left);  // others wait for it
      place.row = computed_anew(place.row);
      pass_.write(pass_.step(place), begun, result, b, unit);
    }
    left_at = place.row;
    return true;
  }

  template <int kCount>
  LSTM_DEVICE void hand_on(const StepPlace& place, int b, int unit, const D (&left)[kCount]) const {
    const Mailbox<D>& box = pass_.args.mailbox;
    const int length = static_cast<int>(box.length) / kCount;
    uint4 piece;
    int gate = 0;
    const bool writes = gather_piece(piece, gate, left);
    const int first = unit / kNumbers * kNumbers;
    if (!writes || b >= place.rows || first >= length) return;
    piece.x = without_sentinel(piece.x);
    piece.y = without_sentinel(piece.y);
    piece.z = without_sentinel(piece.z);
    piece.w = without_sentinel(piece.w);
    store_relaxed_16(box.slots + int64_t{place.row + b} * (kCount * length) + (gate * length + first), piece);
  }

  // Makes pieces of the numbers of neighbouring threads, which have neighbouring units. Returns whether this thread has
  // a piece to write: of one number, or of gate `gate` of four.
  template <int kCount>
  LSTM_DEVICE static bool gather_piece(uint4& piece, int& gate, const D (&left)[kCount]) {
    constexpr unsigned kAll = 0xffffffffu;
    const int lane = static_cast<int>(threadIdx.x % 32);
    if constexpr (kCount == 1) {
      uint32_t word = operand_bits(left[0]);
      int distance = 1;
      if constexpr (sizeof(D) == 2) {
        word |= __shfl_down_sync(kAll, word, 1) << 16;
        distance = 2;
      }
      piece.x = word;
      piece.y = __shfl_down_sync(kAll, word, distance);
      piece.z = __shfl_down_sync(kAll, word, 2 * distance);
      piece.w = __shfl_down_sync(kAll, word, 3 * distance);
      return lane % kNumbers == 0;
    } else {
      // A transposition: at each exchange with a neighbour, a thread keeps half of the gates.
      uint32_t words[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) words[k] = operand_bits(left[k]);
      if constexpr (sizeof(D) == 2) {
        const bool odd = lane % 2 != 0, second = lane / 2 % 2 != 0, upper = lane / 4 % 2 != 0;
        const uint32_t low = words[0] | words[1] << 16, high = words[2] | words[3] << 16;
        const uint32_t kept = odd ? high : low, got = __shfl_xor_sync(kAll, odd ? low : high, 1);
        const uint32_t first = odd ? got : kept, other = odd ? kept : got;  // the even and the odd unit
        // The first and second one of the gates that are kept, each of two units.
        const uint32_t a = (first & 0xffffu) | other << 16, b = first >> 16 | (other & 0xffff0000u);
        const uint32_t of_gate = second ? b : a, of_peer = __shfl_xor_sync(kAll, second ? a : b, 2);
        const uint32_t w0 = second ? of_peer : of_gate, w1 = second ? of_gate : of_peer;
        const uint32_t v0 = __shfl_xor_sync(kAll, w0, 4), v1 = __shfl_xor_sync(kAll, w1, 4);
        piece = upper ? make_uint4(v0, v1, w0, w1) : make_uint4(w0, w1, v0, v1);
        gate = (odd ? 2 : 0) + (second ? 1 : 0);
        return !upper;
      } else {
        const bool odd = lane % 2 != 0, second = lane / 2 % 2 != 0;
        // Gates 0 and 1, or 2 and 3, of this unit and of its neighbour.
        const uint32_t a = __shfl_xor_sync(kAll, odd ? words[0] : words[2], 1);
        const uint32_t b = __shfl_xor_sync(kAll, odd ? words[1] : words[3], 1);
        const uint32_t a0 = odd ? a : words[0], a1 = odd ? words[2] : a;
        const uint32_t b0 = odd ? b : words[1], b1 = odd ? words[3] : b;
        const uint32_t c = __shfl_xor_sync(kAll, second ? a0 : b0, 2), d = __shfl_xor_sync(kAll, second ? a1 : b1, 2);
        piece = second ? make_uint4(c, d, b0, b1) : make_uint4(a0, a1, c, d);
        gate = (odd ? 2 : 0) + (second ? 1 : 0);
        return true;
      }
    }
  }

  // The last block to leave makes NaN of all results if any has given up: nobody takes a part of them for the whole.
  LSTM_DEVICE void leave(bool goes_on) const {
    __syncthreads();  // nobody of the block writes results any more, nor reads late_
    if (threadIdx.x == 0) {
      if (!goes_on) {
        store_relaxed(all_.control.words + kGaveUp, 0);
        store_relaxed_system(all_.control.status, 1);  // in memory of the host
        __threadfence_system();
      }
      __threadfence();
      const uint32_t left = atomicAdd(all_.control.words + kBlocksThatLeft, 1u) + 1;  // counts from all bits set
      __threadfence();  // behind what the blocks that left before have stored
      late_[0] = left == blocks() - 1 && load_relaxed(all_.control.words + kGaveUp) == 0;
    }
    __syncthreads();
    if (late_[0] == 0) return;
    for (int side = 0; side < all_.count; ++side) Pass(all_.sides[side]).spoil();
  }

  const PersistentSides<typename Pass::Arguments>& all_;
  const Pass pass_;
  unsigned char* const shared_;
  uint32_t* const late_;  // whether somebody in the block has given up, for two turns in alternation
  const int warp_, group_, member_;
  const unsigned blocks_of_group_;
  const int group_row_;  // the first row of the group's first tile
  const int first_unit_;
  const int pieces_of_row_;
  uint32_t weights_[kPieces][kTiles][2][4];
  typename Pass::Unit unit_;
};

// The kernel of a pass, and its launch.
template <typename Pass, int kRowTiles>
LSTM_KERNEL LSTM_MAX_REGISTERS(Pass::kBackward ? 248 : 240)
    persistent_kernel(LSTM_GRID_CONSTANT PersistentSides<typename Pass::Arguments> all) {
  LSTM_DYNAMIC_SHARED(unsigned char, shared);
  LSTM_SHARED(uint32_t, late, 2);
  PersistentChunk<Pass, kRowTiles>(all, shared, late).run();
}

template <typename Pass, int kRowTiles>
cudaError_t start_persistent(const PersistentSides<typename Pass::Arguments>& all, cudaStream_t stream) {
  using Chunk = PersistentChunk<Pass, kRowTiles>;
  const auto& first = all.sides[0];
  const int64_t H = first.cell.hidden_size;
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>((H + Chunk::kUnits - 1) / Chunk::kUnits * all.groups));
  config.grid.z = static_cast<unsigned>(all.count);
  config.block = dim3(kPersistentThreads);
  config.dynamic_shared = Chunk::shared_bytes(all.extra);
  config.stream = stream;
  config.cooperative = true;
  return launch(persistent_kernel<Pass, kRowTiles>, config, all);
}

}  // namespace lstm_ext::cuda
