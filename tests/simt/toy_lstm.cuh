// Toy persistent LSTM kernels, to prove the emulator on: correct ones, with bugs that can be planted by name.
//
// Gates have the order i, f, g, o. `projected` holds W x_t + b for all steps as (T, B, 4H), U is (4H, H), h is
// (T + 1, B, H) with h[0] given, c is (B, H). A block owns kUnits hidden units; a thread owns one unit of one batch
// row. The bugs are chosen at run time, so that one build has them all, under nvcc too.
#pragma once

#include "cuda/platform.h"

namespace toy {

namespace cuda = lstm_ext::cuda;

enum Bug : int {
  kNone,
  // Grid barrier, float32.
  kNoSyncAfterLoad,     // shared memory is read before all of it is written
  kSharedWritePastEnd,  // one element past the end of a shared array
  kNoCopyWait,          // cp.async is used before it is waited for
  kNoFence,             // no fence in front of the grid barrier's arrival
  kTargetOffByOne,      // the grid barrier waits for the previous step
  kGlobalReadPastEnd,   // the last step reads one step further
  kGlobalWritePastEnd,  // one element past the end of a buffer
  kDivergentBarrier,    // half the block comes to a barrier
  kReadOnlyLoad,        // h goes through the read-only cache, where the next step finds the old one
  kLeavesEarly,         // threads without a batch row leave before the others' barriers
  kCopyNeverAwaited,    // a prefetch is still under way at the end
  kMisalignedCopy,      // cp.async of 16 bytes to an address that is a multiple of 4
  kNoSyncwarp,          // lanes read what other lanes wrote, without __syncwarp
  kPartialMask,         // a shuffle of lanes of which some never come
  // bfloat16 tensor cores.
  kNoSyncBeforeLdmatrix,  // fragments are loaded before all copies of the block have landed
  kSwappedFragments,      // two registers of A in each other's place
  kMisalignedLdmatrix,    // rows of shared memory that are no multiple of 16 bytes
};

struct Arguments {
  const float* projected;
  const float* u;
  const __nv_bfloat16* u_bf16;
  const float* c0;
  float* h;
  __nv_bfloat16* h_bf16;
  float* c;
  float* norms;        // (blocks, warps): sums of h squared of the last step, by grid_f32
  uint32_t* arrivals;  // of the grid barrier
  uint32_t* status;    // 1: a wait has expired
  int steps;
  int batch;
  int bug;
};

constexpr int64_t kWaitLimit = int64_t{1} << 32;

LSTM_DEVICE float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }

// The new h; c is updated.
LSTM_DEVICE float update(const float (&gates)[4], float& c) {
  c = sigmoid(gates[1]) * c + sigmoid(gates[0]) * tanhf(gates[2]);
  return sigmoid(gates[3]) * tanhf(c);
}

LSTM_DEVICE int64_t gate_at(const Arguments& a, int hidden, int t, int row, int gate, int unit) {
  return ((static_cast<int64_t>(t) * a.batch + row) * 4 + gate) * hidden + unit;
}

LSTM_DEVICE int64_t h_at(const Arguments& a, int hidden, int t, int row, int unit) {
  return (static_cast<int64_t>(t) * a.batch + row) * hidden + unit;
}

// All blocks have come here for the `step`-th time. False: some block did not come in time.
LSTM_DEVICE bool grid_barrier(const Arguments& a, int step) {
  LSTM_SHARED(int, in_time, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    if (a.bug != kNoFence) __threadfence();
    atomicAdd(a.arrivals, 1u);
    const uint32_t rounds = static_cast<uint32_t>(step - (a.bug == kTargetOffByOne ? 1 : 0));
    cuda::WaitLimit wait(kWaitLimit);
    in_time[0] = 1;
    while (in_time[0] != 0 && cuda::load_relaxed(a.arrivals) < gridDim.x * rounds) {
      if (wait.is_over()) in_time[0] = 0;
    }
    __threadfence();
    if (in_time[0] == 0) cuda::store_relaxed(a.status, 1);
  }
  __syncthreads();
  return in_time[0] != 0;
}

// Sums over the warp, left in shared memory by one lane and read by another: what __syncwarp is for.
LSTM_DEVICE void store_norm(const Arguments& a, float h) {
  LSTM_SHARED(float, warp_sums, 32);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float sum = h * h;
  for (int distance = 16; distance > 0; distance /= 2) {
    if (a.bug == kPartialMask && distance == 1 && lane >= 16) break;
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  if (lane == 0) warp_sums[warp] = sum;
  if (a.bug != kNoSyncwarp) __syncwarp();
  if (lane == 5) a.norms[blockIdx.x * (blockDim.x / 32) + warp] = warp_sums[warp];
}

// float32; the block's rows of U stay in shared memory.
template <int kHidden, int kUnits, int kBatch>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kUnits* kBatch) grid_f32(Arguments a) {
  LSTM_DYNAMIC_SHARED(float, shared);
  float* u_rows = shared;                         // (4 kUnits, kHidden)
  float* h_rows = u_rows + 4 * kUnits * kHidden;  // (kBatch, kHidden)
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int first_unit = static_cast<int>(blockIdx.x) * kUnits;
  for (int i = thread * 4; i < 4 * kUnits * kHidden; i += threads * 4) {
    const int row = i / kHidden;
    const int source_row = row / kUnits * kHidden + first_unit + row % kUnits;
    const int shift = a.bug == kMisalignedCopy ? 1 : 0;
    cuda::cp_async16(u_rows + i + shift, a.u + static_cast<int64_t>(source_row) * kHidden + i % kHidden, 16);
  }
  cuda::cp_async_commit();
  if (a.bug != kNoCopyWait) cuda::cp_async_wait<0>();

  const int local = thread % kUnits;
  const int row = thread / kUnits;
  const int unit = first_unit + local;
  const bool active = row < a.batch;
  if (a.bug == kLeavesEarly && !active) return;
  float c = active ? a.c0[row * kHidden + unit] : 0.f;
  for (int t = 0; t < a.steps; ++t) {
    for (int i = thread; i < a.batch * kHidden; i += threads) {
      const float* source = a.h + h_at(a, kHidden, t, 0, 0) + i;
      h_rows[i] = a.bug == kReadOnlyLoad ? __ldg(source) : __ldcg(source);
    }
    if (a.bug == kSharedWritePastEnd && t == 0 && thread == 7) h_rows[kBatch * kHidden + 3] = 1.f;
    if (a.bug != kNoSyncAfterLoad) __syncthreads();
    float h = 0.f;
    if (active) {
      float gates[4];
      const int step_read = t + (a.bug == kGlobalReadPastEnd ? 1 : 0);
      for (int q = 0; q < 4; ++q) gates[q] = a.projected[gate_at(a, kHidden, step_read, row, q, unit)];
      for (int k = 0; k < kHidden; ++k) {
        for (int q = 0; q < 4; ++q) {
          gates[q] += u_rows[(q * kUnits + local) * kHidden + k] * h_rows[row * kHidden + k];
        }
      }
      h = update(gates, c);
      a.h[h_at(a, kHidden, t + 1, row, unit)] = h;
    }
    if (t + 1 == a.steps) store_norm(a, h);
    if (t + 1 < a.steps && !grid_barrier(a, t + 1)) break;
    if (a.bug == kDivergentBarrier && row < a.batch / 2) __syncthreads();
  }
  if (active) a.c[row * kHidden + unit] = c;
  if (a.bug == kGlobalWritePastEnd && blockIdx.x == 0 && thread == 0) a.c[a.batch * kHidden] = 0.f;
  if (a.bug == kNoCopyWait) cuda::cp_async_wait<0>();
  if (a.bug == kCopyNeverAwaited) {
    cuda::cp_async16(h_rows + thread % kBatch * 4, a.u, 16);
    cuda::cp_async_commit();
  }
}

// The same with tensor cores: rows of U times h transposed, 16 x 8 at a time.
template <int kHidden, int kUnits, int kBatch>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kUnits* kBatch) grid_bf16(Arguments a) {
  constexpr int kRows = 4 * kUnits;
  constexpr int kSums = kBatch + 1;
  const int stride = kHidden + (a.bug == kMisalignedLdmatrix ? 4 : 8);  // 16 bytes more: rows start in other banks
  LSTM_DYNAMIC_SHARED(unsigned char, shared);
  float* sums = reinterpret_cast<float*>(shared);                                        // (kRows, kSums)
  __nv_bfloat16* u_rows = reinterpret_cast<__nv_bfloat16*>(sums + kRows * (kSums + 3));  // (kRows, stride)
  __nv_bfloat16* h_rows = u_rows + kRows * stride;                                       // (kBatch, stride)
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32;
  const int first_unit = static_cast<int>(blockIdx.x) * kUnits;
  // Rows of 8 bytes more are no place for copies of 16.
  const auto copy_row_part = [&](__nv_bfloat16* to, const __nv_bfloat16* from) {
    if (a.bug != kMisalignedLdmatrix) {
      cuda::cp_async16(to, from, 16);
    } else {
      for (int i = 0; i < 8; ++i) to[i] = from[i];
    }
  };
  for (int i = thread * 8; i < kRows * kHidden; i += threads * 8) {
    const int row = i / kHidden;
    const int source_row = row / kUnits * kHidden + first_unit + row % kUnits;
    copy_row_part(u_rows + row * stride + i % kHidden,
                  a.u_bf16 + static_cast<int64_t>(source_row) * kHidden + i % kHidden);
  }
  cuda::cp_async_commit();

  const int local = thread % kUnits;
  const int row = thread / kUnits;
  const int unit = first_unit + local;
  const bool active = row < a.batch;
  float c = active ? a.c0[row * kHidden + unit] : 0.f;
  for (int t = 0; t < a.steps; ++t) {
    for (int i = thread * 8; i < kBatch * kHidden; i += threads * 8) {
      const int r = i / kHidden;
      const int k = i % kHidden;
      if (r < a.batch) {
        copy_row_part(h_rows + r * stride + k, a.h_bf16 + h_at(a, kHidden, t, r, k));
      } else {
        for (int j = 0; j < 8; ++j) h_rows[r * stride + k + j] = __float2bfloat16_rn(0.f);
      }
    }
    cuda::cp_async_commit();
    cuda::cp_async_wait<0>();
    if (a.bug != kNoSyncBeforeLdmatrix) __syncthreads();
    for (int tile = thread / 32; tile < kRows / 16 * (kBatch / 8); tile += threads / 32) {
      const int m = tile / (kBatch / 8) * 16;
      const int n = tile % (kBatch / 8) * 8;
      float d[4] = {0.f, 0.f, 0.f, 0.f};
      for (int k = 0; k < kHidden; k += 16) {
        uint32_t fragment_a[4];
        uint32_t twice_b[4];
        cuda::ldmatrix_x4(fragment_a, u_rows + (m + lane % 16) * stride + k + lane / 16 * 8);
        cuda::ldmatrix_x4(twice_b, h_rows + (n + lane % 8) * stride + k + lane / 8 % 2 * 8);
        const uint32_t fragment_b[2] = {twice_b[0], twice_b[1]};
        if (a.bug == kSwappedFragments) {
          const uint32_t second = fragment_a[1];
          fragment_a[1] = fragment_a[2];
          fragment_a[2] = second;
        }
        cuda::mma_bf16_16816(d, fragment_a, fragment_b);
      }
      for (int i = 0; i < 4; ++i) sums[(m + lane / 4 + i / 2 * 8) * kSums + n + lane % 4 * 2 + i % 2] = d[i];
    }
    __syncthreads();
    if (active) {
      float gates[4];
      for (int q = 0; q < 4; ++q) {
        gates[q] = a.projected[gate_at(a, kHidden, t, row, q, unit)] + sums[(q * kUnits + local) * kSums + row];
      }
      const float h = update(gates, c);
      a.h[h_at(a, kHidden, t + 1, row, unit)] = h;
      a.h_bf16[h_at(a, kHidden, t + 1, row, unit)] = __float2bfloat16_rn(h);
    }
    if (t + 1 < a.steps && !grid_barrier(a, t + 1)) break;
  }
  if (active) a.c[row * kHidden + unit] = c;
}

}  // namespace toy
