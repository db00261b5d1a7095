// Kernels that use one function of platform.h each, so that a wrong one shows in the results of its own kernel.
#pragma once

#include "cuda/platform.h"

namespace wrappers {

using namespace lstm_ext::cuda;

// One warp a block. What a kernel makes goes to `out`, 64 words a block, which are zeros at first.
struct Arguments {
  uint32_t* out;
  const uint32_t* in;  // 1024 words, no two alike
};

LSTM_DEVICE uint32_t* out_of_block(const Arguments& s) { return s.out + 64 * blockIdx.x; }
LSTM_DEVICE uint32_t lane() { return threadIdx.x; }

// ---- copies

template <int bytes>
LSTM_KERNEL copy(Arguments s) {
  LSTM_SHARED(uint4, buffer, 32);
  buffer[lane()] = make_uint4(1, 2, 3, 4);
  // All of it in the lower lanes; in the upper ones, the rest are zeros.
  cp_async<bytes>(&buffer[lane()], s.in + 4 * lane(), lane() < 16 ? bytes : bytes / 2);
  cp_async_commit();
  cp_async_wait<0>();
  out_of_block(s)[lane()] = buffer[lane()].x + 3 * buffer[lane()].y + 5 * buffer[lane()].z + 7 * buffer[lane()].w;
}

LSTM_KERNEL copy_groups(Arguments s) {
  LSTM_SHARED(uint32_t, buffer, 64);
  buffer[lane()] = buffer[32 + lane()] = 0;
  cp_async4(&buffer[lane()], s.in + lane());
  cp_async_commit();
  cp_async4(&buffer[32 + lane()], s.in + 32 + lane());
  cp_async_commit();
  cp_async_wait<1>();
  out_of_block(s)[lane()] = buffer[lane()];
  cp_async_wait<0>();
  out_of_block(s)[32 + lane()] = buffer[32 + lane()];
}

// ---- tensor cores

LSTM_DEVICE void fill(uint32_t (&rows)[128], const Arguments& s) {
  for (int i = 0; i < 4; ++i) rows[32 * i + lane()] = s.in[32 * i + lane()];
  __syncwarp();
}

LSTM_KERNEL load_x4(Arguments s) {
  LSTM_SHARED(uint32_t, rows, 128);
  fill(rows, s);
  uint32_t d[4];
  ldmatrix_x4(d, rows + 4 * lane());
  out_of_block(s)[lane()] = d[0] + 3 * d[1] + 5 * d[2] + 7 * d[3];
}
LSTM_KERNEL load_x2(Arguments s) {
  LSTM_SHARED(uint32_t, rows, 128);
  fill(rows, s);
  uint32_t d[2];
  ldmatrix_x2(d, rows + 4 * (lane() % 16));
  out_of_block(s)[lane()] = d[0] + 3 * d[1];
}
LSTM_KERNEL load_x4_trans(Arguments s) {
  LSTM_SHARED(uint32_t, rows, 128);
  fill(rows, s);
  uint32_t d[4];
  ldmatrix_x4_trans(d, rows + 4 * lane());
  out_of_block(s)[lane()] = d[0] + 3 * d[1] + 5 * d[2] + 7 * d[3];
}
LSTM_KERNEL load_x2_trans(Arguments s) {
  LSTM_SHARED(uint32_t, rows, 128);
  fill(rows, s);
  uint32_t d[2];
  ldmatrix_x2_trans(d, rows + 4 * (lane() % 16));
  out_of_block(s)[lane()] = d[0] + 3 * d[1];
}

// Small whole numbers, which every format has, as `one` and `two` of the format.
enum class Format { F16, BF16, TF32 };
template <Format format>
LSTM_DEVICE uint32_t operand(const Arguments& s, int n) {
  constexpr uint32_t kOne = format == Format::F16 ? 0x3c00u : 0x3f80u;
  constexpr uint32_t kTwo = 0x4000u;
  const uint32_t bits = s.in[32 * n + lane()] >> 13;
  if (format == Format::TF32) return __float_as_uint(static_cast<float>(bits % 7));
  return (bits & 1 ? kOne : kTwo) | (bits & 2 ? kOne : kTwo) << 16;
}
template <Format format>
LSTM_KERNEL multiply(Arguments s) {
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) {
    a[i] = operand<format>(s, i);
    d[i] = static_cast<float>(8 * i);
  }
  for (int i = 0; i < 2; ++i) b[i] = operand<format>(s, 4 + i);
  if constexpr (format == Format::F16) mma_f16_16816(d, a, b);
  if constexpr (format == Format::BF16) mma_bf16_16816(d, a, b);
  if constexpr (format == Format::TF32) mma_tf32_1688(d, a, b);
  out_of_block(s)[lane()] = 0;
  for (int i = 0; i < 4; ++i) out_of_block(s)[lane()] += static_cast<uint32_t>((2 * i + 1) * d[i]);
}

LSTM_KERNEL round_to_tf32(Arguments s) {
  // Halfway between two neighbours, or one of them.
  out_of_block(s)[lane()] = to_tf32(__uint_as_float(0x3f800000u + (s.in[lane()] & 0xf000u)));
}

// ---- words that other blocks wait for

LSTM_KERNEL words(Arguments s) {
  if (lane() != 0) return;
  uint32_t* word = out_of_block(s);
  store_release(word, s.in[0]);
  store_relaxed(word + 1, s.in[1]);
  word[2] = s.in[2];
  red_release(word + 2, s.in[3]);
  word[3] = load_acquire(s.in + 4);
  word[4] = load_relaxed(s.in + 5);
}

LSTM_KERNEL load_piece(Arguments s) {
  const uint4 piece = load_relaxed_16(s.in + 4 * lane());
  out_of_block(s)[lane()] = piece.x + 3 * piece.y + 5 * piece.z + 7 * piece.w;
}
LSTM_KERNEL store_piece(Arguments s) {
  const uint32_t* in = s.in + 4 * lane();
  if (lane() < 16) store_relaxed_16(out_of_block(s) + 4 * lane(), make_uint4(in[0], in[1], in[2], in[3]));
}

// What one block hands to another without a flag.
LSTM_KERNEL handover_of_a_piece(Arguments s) {
  if (lane() != 0) return;
  if (blockIdx.x == 0) {
    store_relaxed_16(s.out + 8, make_uint4(s.in[0], s.in[1], s.in[2], s.in[3]));
  } else {
    WaitLimit wait(int64_t{1} << 32);
    uint4 piece = load_relaxed_16(s.out + 8);
    while ((piece.x == 0 || piece.y == 0 || piece.z == 0 || piece.w == 0) && !wait.is_over()) {
      piece = load_relaxed_16(s.out + 8);
    }
    s.out[16] = piece.x + 3 * piece.y + 5 * piece.z + 7 * piece.w;
  }
}
LSTM_KERNEL piece_that_never_comes(Arguments s) {
  if (lane() != 0) return;
  WaitLimit wait(int64_t{1} << 32);
  while (load_relaxed_16(s.out + 8).x == 0) {
    if (!wait.is_over()) continue;
    s.out[0] = 7;
    return;
  }
}

// Two blocks. Data goes from one to the other, by a flag that is released and acquired.
LSTM_KERNEL handover(Arguments s) {
  if (lane() != 0) return;
  if (blockIdx.x == 0) {
    s.out[8] = s.in[0];
    store_release(s.out, 1);
  } else {
    if (wait_at_least(s.out, 1, int64_t{1} << 32)) s.out[9] = s.out[8];
  }
}
LSTM_KERNEL handover_by_counter(Arguments s) {
  if (lane() != 0) return;
  if (blockIdx.x == 0) {
    s.out[8] = s.in[0];
    red_release(s.out, 1);
  } else {
    if (wait_at_least(s.out, 1, int64_t{1} << 32)) s.out[9] = s.out[8];
  }
}

// ---- clusters of four blocks

LSTM_KERNEL identity(Arguments s) { out_of_block(s)[lane()] = 10 * cluster_rank() + cluster_size(); }

LSTM_KERNEL peers(Arguments s) {
  LSTM_SHARED(uint32_t, words, 32);
  words[lane()] = s.in[32 * cluster_rank() + lane()];
  cluster_sync();
  const uint32_t peer = (cluster_rank() + 1) % cluster_size();
  out_of_block(s)[lane()] = map_rank(words, peer)[lane()];
  cluster_sync();
}

// A barrier of so many arrivals in every block, ready for its peers.
LSTM_DEVICE void prepare(uint64_t* barrier, uint32_t arrivals) {
  if (lane() == 0) {
    mbarrier_init(barrier, arrivals);
    fence_mbarrier_init();
  }
  cluster_sync();
}

LSTM_KERNEL own_arrivals(Arguments s) {
  LSTM_SHARED(uint64_t, barrier, 1);
  LSTM_SHARED(uint32_t, words, 32);
  prepare(barrier, 32);
  for (uint32_t round = 0; round < 3; ++round) {
    words[lane()] = s.in[32 * round + lane()];
    mbarrier_arrive(barrier);
    const bool in_time = mbarrier_wait(barrier, round % 2, int64_t{1} << 32);
    out_of_block(s)[lane()] += in_time ? words[lane() ^ 5] : 0;
    __syncwarp();
  }
}

LSTM_KERNEL peers_arrivals(Arguments s) {
  LSTM_SHARED(uint64_t, barrier, 1);
  LSTM_SHARED(uint32_t, words, 1);
  prepare(barrier, 2);
  const uint32_t next = (cluster_rank() + 1) % cluster_size();
  if (lane() == 0) {
    words[0] = s.in[cluster_rank()];
    // The peer before reads it; that it may, it learns from two arrivals.
    mbarrier_arrive_remote(map_rank(barrier, (cluster_rank() + cluster_size() - 1) % cluster_size()));
    mbarrier_arrive(barrier);
  }
  if (mbarrier_wait(barrier, 0, int64_t{1} << 32)) out_of_block(s)[lane()] = map_rank(words, next)[0];
  cluster_sync();
}

// Value is what one st_async sends.
template <typename Value>
LSTM_DEVICE Value value_of(const Arguments& s, uint32_t sender);
template <>
LSTM_DEVICE uint32_t value_of<uint32_t>(const Arguments& s, uint32_t sender) {
  return s.in[sender];
}
template <>
LSTM_DEVICE uint64_t value_of<uint64_t>(const Arguments& s, uint32_t sender) {
  return uint64_t{s.in[sender]} << 32 | s.in[sender + 4];
}
template <>
LSTM_DEVICE uint4 value_of<uint4>(const Arguments& s, uint32_t sender) {
  return make_uint4(s.in[sender], s.in[sender + 4], s.in[sender + 8], s.in[sender + 12]);
}
LSTM_DEVICE uint32_t digest(uint32_t x) { return x; }
LSTM_DEVICE uint32_t digest(uint64_t x) { return static_cast<uint32_t>(x) + 3 * static_cast<uint32_t>(x >> 32); }
LSTM_DEVICE uint32_t digest(const uint4& x) { return x.x + 3 * x.y + 5 * x.z + 7 * x.w; }

template <typename Value>
LSTM_KERNEL messages(Arguments s) {
  LSTM_SHARED(uint64_t, barrier, 1);
  LSTM_SHARED(Value, inbox, 4);  // from each peer
  prepare(barrier, 1);
  if (lane() == 0) mbarrier_arrive_expect_tx(barrier, 4 * sizeof(Value));
  if (lane() < 4) {
    st_async(map_rank(inbox + cluster_rank(), lane()), value_of<Value>(s, cluster_rank()), map_rank(barrier, lane()));
  }
  if (mbarrier_wait(barrier, 0, int64_t{1} << 32)) {
    if (lane() < 4) out_of_block(s)[lane()] = digest(inbox[lane()]);
  }
  cluster_sync();
}

LSTM_KERNEL expected_apart(Arguments s) {
  LSTM_SHARED(uint64_t, barrier, 1);
  LSTM_SHARED(uint32_t, inbox, 4);
  prepare(barrier, 1);
  if (lane() == 0) {
    mbarrier_expect_tx(barrier, 16);
    mbarrier_arrive(barrier);
  }
  if (lane() < 4) st_async(map_rank(inbox + cluster_rank(), lane()), s.in[cluster_rank()], map_rank(barrier, lane()));
  if (mbarrier_wait(barrier, 0, int64_t{1} << 32) && lane() < 4) out_of_block(s)[lane()] = inbox[lane()];
  cluster_sync();
}

}  // namespace wrappers
