// Accesses to shared memory whose wavefronts are known. A line says how many one access of a warp has, and how few it
// could have.
#pragma once

#include "cuda/platform.h"

namespace banks {

struct Arguments {
  uint32_t* out;
};

template <int>
LSTM_KERNEL patterns(Arguments a) {
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
  lstm_ext::cuda::ldmatrix_x4(d, bytes + lane * 144);  // 4 of 4
  lstm_ext::cuda::ldmatrix_x4(d, bytes + lane * 128);  // 32 of 4
  a.out[lane] = sum + d[0] + same.y + same.z;
}

}  // namespace banks
