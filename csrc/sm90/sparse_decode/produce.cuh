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

// Q of an item, [64 rows, 576], by all producers; rows that do not exist become zeros. Left
// running: the tile's wait for its RoPE part covers it. step: what the cursor said of the item's
// first tile.
template <class Source, class T>
__device__ __forceinline__ void start_query(const KernelParams& p, SharedStorage<T>& shared,
                                            int step) {
  constexpr int kChunks = kDimQk / 8;  // of 16 bytes, a row
  const UnitRows rows = Source::rows(p, step);
  const T* q = static_cast<const T*>(p.q) + rows.offset;
  auto* to = reinterpret_cast<uint8_t*>(shared.q);
  CUTE_NO_UNROLL
  for (int n = threadIdx.x; n < kRows * kChunks; n += kProducerThreads) {
    const int row = n / kChunks, c = n % kChunks;
    const int piece = c < 64 ? c / 16 * 2 + c % 2 : kPieces - 1;
    const int chunk = c < 64 ? c % 16 / 2 : c - 64;
    const bool exists = rows.first + row < rows.count;
    const T* from = q + (exists ? rows.first + row : 0) * p.q_stride_head + c * 8;
    cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(
        to + chunk_offset_bytes(piece, row, chunk), from, exists);
  }
}

}  // namespace flashmla::sm90::sparse_decode
