// Toy persistent LSTM kernels of one cluster, see toy_lstm.cuh: every block needs all of h and makes a part of it.
#pragma once

#include "simt/toy_lstm.cuh"

namespace toy {

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

template <int kHidden, int kUnits>
LSTM_DEVICE float step_from_shared(const Arguments& a, const float* h_rows, int t, int row, int unit, float& c) {
  float gates[4];
  for (int q = 0; q < 4; ++q) gates[q] = a.projected[gate_at(a, kHidden, t, row, q, unit)];
  for (int k = 0; k < kHidden; ++k) {
    for (int q = 0; q < 4; ++q) {
      gates[q] += __ldg(a.u + (static_cast<int64_t>(q) * kHidden + unit) * kHidden + k) * h_rows[row * kHidden + k];
    }
  }
  const float h = update(gates, c);
  a.h[h_at(a, kHidden, t + 1, row, unit)] = h;
  return h;
}

// Plain stores to the peers' shared memory, and a cluster barrier a step.
template <int kHidden, int kUnits, int kBatch>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kUnits* kBatch) cluster_stores(Arguments a) {
  LSTM_SHARED(float, h_rows, 2 * kBatch * kHidden);  // two buffers of (kBatch, kHidden)
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t peers = cuda::cluster_size();
  const int row = thread / kUnits;
  const int unit = static_cast<int>(cuda::cluster_rank()) * kUnits + thread % kUnits;
  const bool active = row < a.batch;
  for (int i = thread; i < a.batch * kHidden; i += static_cast<int>(blockDim.x)) h_rows[i] = a.h[i];
  float c = active ? a.c0[row * kHidden + unit] : 0.f;
  cuda::cluster_sync();
  for (int t = 0; t < a.steps; ++t) {
    const bool two = a.bug != kSingleBuffer;
    const float* now = h_rows + (two ? t % 2 : 0) * kBatch * kHidden;
    float* next = h_rows + (two ? (t + 1) % 2 : 0) * kBatch * kHidden;
    float h = 0.f;
    if (active) {
      h = step_from_shared<kHidden, kUnits>(a, now, t, row, unit, c);
      for (uint32_t peer = 0; peer < peers; ++peer) cuda::map_rank(next, peer)[row * kHidden + unit] = h;
    }
    if (t == a.steps - 1) store_norm(a, h);
    if (a.bug != kExitWithoutBarrier || t + 1 < a.steps) cuda::cluster_sync();
  }
  if (active) a.c[row * kHidden + unit] = c;
}

// st.async: data and arrival in one operation, no barrier per step.
//
// Two buffers are enough without a barrier that says "empty": h_{t+1} goes where h_{t-1} was, and a thread sends it
// only after it has all of h_t. Every thread of every peer has sent its part of h_t after its last read of h_{t-1}.
// Nor can a thread that waits fall two phases behind, where the parity would be the one it began with: phases end only
// with its own messages. So only threads that send may wait.
template <int kHidden, int kUnits, int kBatch>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kUnits* kBatch) cluster_messages(Arguments a) {
  LSTM_SHARED(float, h_rows, 2 * kBatch * kHidden);
  LSTM_SHARED(uint64_t, arrived, 2);  // mbarriers: h_t is complete in buffer t % 2
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t peers = cuda::cluster_size();
  const int row = thread / kUnits;
  const int unit = static_cast<int>(cuda::cluster_rank()) * kUnits + thread % kUnits;
  const bool active = row < a.batch;
  // h_T is not sent: nobody needs it.
  const auto arm = [&](int t) {
    if (thread != 0 || t >= a.steps) return;
    int bytes = a.batch * kHidden * static_cast<int>(sizeof(float));
    if (a.bug == kTooFewBytes) bytes -= static_cast<int>(sizeof(float));
    if (a.bug == kTooManyBytes) bytes += static_cast<int>(sizeof(float));
    if (a.bug == kSecondExpectTx && t == 2) cuda::mbarrier_expect_tx(&arrived[t % 2], 0);
    cuda::mbarrier_arrive_expect_tx(&arrived[t % 2], static_cast<uint32_t>(bytes));
  };
  for (int i = thread; i < a.batch * kHidden; i += static_cast<int>(blockDim.x)) h_rows[i] = a.h[i];
  if (thread == 0) {
    cuda::mbarrier_init(&arrived[0], 1);
    cuda::mbarrier_init(&arrived[1], 1);
    if (a.bug != kNoInitFence) cuda::fence_mbarrier_init();
  }
  arm(1);
  arm(2);
  float c = active ? a.c0[row * kHidden + unit] : 0.f;
  if (a.bug == kNoInitBarrier) {
    __syncthreads();
  } else {
    cuda::cluster_sync();
  }
  for (int t = 0; t < a.steps && (active || a.bug == kIdleThreadsWait); ++t) {
    if (t > 0 && !(a.bug == kNoWait && t == 2)) {
      uint32_t parity = static_cast<uint32_t>((t - 1) / 2 % 2);
      if (a.bug == kWrongParity) parity ^= 1;
      if (a.bug == kUnboundedWait) {
        while (!cuda::mbarrier_try_wait(&arrived[t % 2], parity)) {
        }
      } else if (!cuda::mbarrier_wait(&arrived[t % 2], parity, kWaitLimit)) {
        cuda::store_relaxed(a.status, 1);
        break;
      }
      arm(t + 2);
    }
    const bool two = a.bug != kSingleBuffer;
    const float* now = h_rows + (two ? t % 2 : 0) * kBatch * kHidden;
    float* next = h_rows + (two ? (t + 1) % 2 : 0) * kBatch * kHidden;
    if (!active) continue;
    const float h = step_from_shared<kHidden, kUnits>(a, now, t, row, unit, c);
    if (t + 1 == a.steps) continue;
    for (uint32_t peer = 0; peer < peers; ++peer) {
      auto* place = reinterpret_cast<uint32_t*>(cuda::map_rank(next + row * kHidden + unit, peer));
      cuda::st_async(place, __float_as_uint(h), cuda::map_rank(&arrived[(t + 1) % 2], peer));
    }
  }
  if (active) a.c[row * kHidden + unit] = c;
  // No block ends while a message to it may be under way.
  if (a.bug != kExitWithoutBarrier) cuda::cluster_sync();
}

}  // namespace toy
