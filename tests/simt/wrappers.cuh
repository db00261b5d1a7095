// Kernels that use one function of platform.h each, so that a wrong one shows in the results of its own kernel; and one
// whose accesses to shared memory are counted.
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

LSTM_KERNEL copy(Arguments s) {
  LSTM_SHARED(uint4, buffer, 32);
  buffer[lane()] = make_uint4(1, 2, 3, 4);
  // All of it in the lower lanes; in the upper ones, the rest are zeros.
  cp_async16(&buffer[lane()], s.in + 4 * lane(), lane() < 16 ? 16 : 8);
  cp_async_commit();
  cp_async_wait<0>();
  out_of_block(s)[lane()] = buffer[lane()].x + 3 * buffer[lane()].y + 5 * buffer[lane()].z + 7 * buffer[lane()].w;
}

LSTM_KERNEL copy_groups(Arguments s) {
  LSTM_SHARED(uint4, buffer, 64);
  buffer[lane()] = buffer[32 + lane()] = make_uint4(0, 0, 0, 0);
  cp_async16(&buffer[lane()], s.in + 4 * lane(), 16);
  cp_async_commit();
  cp_async16(&buffer[32 + lane()], s.in + 128 + 4 * lane(), 16);
  cp_async_commit();
  cp_async_wait<1>();
  out_of_block(s)[lane()] = buffer[lane()].x;
  cp_async_wait<0>();
  out_of_block(s)[32 + lane()] = buffer[32 + lane()].w;
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
LSTM_KERNEL load_x4_trans(Arguments s) {
  LSTM_SHARED(uint32_t, rows, 128);
  fill(rows, s);
  uint32_t d[4];
  ldmatrix_x4_trans(d, rows + 4 * lane());
  out_of_block(s)[lane()] = d[0] + 3 * d[1] + 5 * d[2] + 7 * d[3];
}

// Small whole numbers, which every format has, as `one` and `two` of the format.
enum class Format { F16, BF16, TF32 };
template <Format format>
LSTM_DEVICE uint32_t operand(const Arguments& s, int n) {
  constexpr uint32_t kOne = format == Format::F16 ? 0x3c00u : 0x3f80u;
  constexpr uint32_t kTwo = 0x4000u;
  const uint32_t bits = s.in[32 * n + lane()] >> 13;
  if (format == Format::TF32) {
    const auto number = static_cast<float>(bits % 7);
    return reinterpret_cast<const uint32_t&>(number);
  }
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
  store_relaxed(word, s.in[0]);
  word[1] = load_relaxed(s.in + 1);
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

// Two blocks. Data goes from one to the other, by a flag between fences.
LSTM_KERNEL handover(Arguments s) {
  if (lane() != 0) return;
  if (blockIdx.x == 0) {
    s.out[8] = s.in[0];
    __threadfence();
    store_relaxed(s.out, 1);
  } else {
    WaitLimit wait(int64_t{1} << 32);
    while (load_relaxed(s.out) == 0 && !wait.is_over()) {
    }
    __threadfence();
    s.out[9] = s.out[8];
  }
}

// ---- wavefronts

// A line says how many wavefronts one access of a warp to shared memory has, and how few it could have.
LSTM_KERNEL patterns(Arguments s) {
  LSTM_DYNAMIC_SHARED(unsigned char, bytes);
  const unsigned lane = threadIdx.x;
  auto* words = reinterpret_cast<uint32_t*>(bytes);
  auto* pairs = reinterpret_cast<uint2*>(bytes);
  auto* pieces = reinterpret_cast<uint4*>(bytes);
  for (unsigned i = lane; i < 2048; i += 32) words[i] = i;  // 1 of 1
  __syncthreads();
  uint32_t sum = 0;
  sum += words[lane + 1];                                       // 1 of 1
  sum += words[2 * lane + 2];                                   // 2 of 1
  sum += words[32 * lane + 3];                                  // 32 of 1
  sum += words[33 * lane + 4];                                  // 1 of 1
  sum += words[lane / 8 * 32 + 5];                              // 4 of 1
  sum += words[lane / 32 + 6];                                  // 1 of 1
  sum += pairs[lane + 7].x + pairs[lane + 7].y;                 // 2 of 2
  sum += pairs[16 * lane + 8].y;                                // 32 of 1
  const uint4 next = pieces[lane + 9];                          // 4 of 4
  const uint4 two_rows = pieces[lane / 4 * 9 + lane % 4 + 10];  // 8 of 4
  const uint4 apart = pieces[lane / 4 * 12 + lane % 4 + 11];    // 4 of 4
  const uint4 same = pieces[lane / 8 + 12];                     // 4 of 4
  __syncthreads();
  pieces[8 * lane + 13] = make_uint4(next.x, two_rows.y, apart.z, same.w);  // 32 of 4
  __syncthreads();
  sum += next.y + next.z + next.w + two_rows.x + two_rows.z + two_rows.w + apart.x + apart.y + apart.w + same.x;
  uint32_t d[4];
  ldmatrix_x4(d, bytes + lane * 144);  // 4 of 4
  ldmatrix_x4(d, bytes + lane * 128);  // 32 of 4
  s.out[lane] = sum + d[0] + same.y + same.z;
}

}  // namespace wrappers
