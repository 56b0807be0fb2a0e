// What the producers of both cache formats share: Q, and how a group of pieces is declared full.
#pragma once

#include <cutlass/arch/memory_sm80.h>

#include "source.cuh"

namespace flashmla::sm90::sparse_decode {

using Barrier = cutlass::arch::ClusterTransactionBarrier;  // mbarrier

__device__ __forceinline__ const uint8_t* token_address(const KernelParams& p, uint32_t offset) {
  return p.k_cache + static_cast<uint64_t>(offset) * 16;
}

// By all threads of a producer warp, each after its stores: the group may be read by wgmma. It is
// full when `remote_bytes` more have come from another CTA.
__device__ __forceinline__ void declare_full(uint64_t* barrier, uint32_t remote_bytes = 0) {
  cutlass::arch::fence_view_async_shared();
  __syncwarp();
  if (threadIdx.x % 32 != 0) return;
  if (remote_bytes > 0) {
    Barrier::arrive_and_expect_tx(barrier, remote_bytes);
  } else {
    Barrier::arrive(barrier);
  }
}

// Q of an item, [64 rows, 576], by all producers; rows that do not exist stay as they are, and so
// does what comes of them. Left running: the tile's wait for its RoPE part covers it. step: what
// the cursor said of the item's first tile. CTAs that share a query begin at different rows, so
// that they do not all ask L2 for the same lines at once.
template <class Source, class T>
__device__ __forceinline__ void start_query(const KernelParams& p, SharedStorage<T>& shared,
                                            int step) {
  using cutlass::arch::CacheOperation;
  constexpr int kChunks = kDimV / 8, kRopeChunks = (kDimQk - kDimV) / 8;  // of 16 bytes, a row
  constexpr int kStep = kProducerThreads / kChunks, kRopeStep = kProducerThreads / kRopeChunks;
  const UnitRows rows = Source::rows(p, step);
  const T* q = static_cast<const T*>(p.q) + rows.offset + rows.first * p.q_stride_head;
  auto* to = reinterpret_cast<uint8_t*>(shared.q);
  const int count = min(kRows, rows.count - rows.first);
  const auto copy = [&](int row, int c, int piece, int chunk) {
    if (row >= count) return;
    cutlass::arch::cp_async<16, CacheOperation::Global>(to + chunk_offset_bytes(piece, row, chunk),
                                                        q + row * p.q_stride_head + c * 8);
  };
  const int c = threadIdx.x % kChunks, first = threadIdx.x / kChunks;
  CUTE_NO_UNROLL
  for (int i = 0; i < kRows / kStep; ++i) {
    const int row = (i + blockIdx.x) % (kRows / kStep) * kStep + first;
    copy(row, c, c / 16 * 2 + c % 2, c % 16 / 2);
  }
  CUTE_NO_UNROLL
  for (int row = threadIdx.x / kRopeChunks; row < kRows; row += kRopeStep) {
    copy(row, kChunks + threadIdx.x % kRopeChunks, kPieces - 1, threadIdx.x % kRopeChunks);
  }
}

}  // namespace flashmla::sm90::sparse_decode
