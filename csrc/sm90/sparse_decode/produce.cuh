// What the producers of both cache formats share: the walk over tiles, Q, and how a group of pieces
// is declared full.
#pragma once

#include <cutlass/arch/memory_sm80.h>

#include "config.cuh"

namespace flashmla::sm90::sparse_decode {

using Barrier = cutlass::arch::ClusterBarrier;  // mbarrier

constexpr uint32_t kNowhere = 0xffffffffu;  // in place of a token's offset

// What a step to the next tile says: the number of an item, where the tile is its first; or
constexpr int kSameItem = -2;
constexpr int kEnd = -1;

// Walks the tiles of this CTA's items, looking up one token of each.
class TileCursor {
 public:
  __device__ __forceinline__ explicit TileCursor(const KernelParams& p)
      : p_(p), number_(static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x)) {}

  // Goes to the next tile. token: which of a tile's 64 this thread looks up.
  __device__ __forceinline__ int advance(int token) {
    if (tiles_ > 0) {
      list_ += kTokens;
      left_ -= kTokens;
      --tiles_;
      return kSameItem;
    }
    do {
      if (number_ >= p_.items - static_cast<int>(gridDim.x)) return kEnd;
      number_ += gridDim.x;
      const WorkItem item = work_item(p_, number_);
      tiles_ = item.tiles;
      const int at = item.first_tile * kTokens + token;
      list_ = p_.indices + item.query * p_.indices_stride + at;
      left_ = item.length - at;
    } while (tiles_ == 0);
    --tiles_;
    return number_;
  }

  // The index of this thread's token; -1 behind the end of the list.
  __device__ __forceinline__ int index() const { return left_ > 0 ? __ldg(list_) : -1; }

 private:
  const KernelParams& p_;
  int number_;
  int tiles_ = 0;  // still to come of this item
  const int* list_ = nullptr;
  int left_ = 0;
};

// A token's offset in the cache in units of 16 bytes; kNowhere for what is not in the cache.
template <int kTokenBytes>
__device__ __forceinline__ uint32_t token_offset(const KernelParams& p, int index) {
  if (static_cast<uint32_t>(index) >= p.tokens) return kNowhere;
  int block, offset;
  p.page(block, offset, index);
  return static_cast<uint32_t>(block) * p.page_stride16 + offset * (kTokenBytes / 16);
}

__device__ __forceinline__ const uint8_t* token_address(const KernelParams& p, uint32_t offset) {
  return p.k_cache + static_cast<uint64_t>(offset) * 16;
}

// By all threads of a producer warp, each after its stores: the group may be read by wgmma.
__device__ __forceinline__ void declare_full(uint64_t* barrier) {
  cutlass::arch::fence_view_async_shared();
  __syncwarp();
  if (threadIdx.x % 32 == 0) Barrier::arrive(barrier);
}

// Q of an item, [64 rows, 576], by all producers; rows beyond h_q become zeros. Left running: the
// tile's wait for its RoPE part covers it.
template <class T>
__device__ __forceinline__ void start_query(const KernelParams& p, SharedStorage<T>& shared,
                                            int number) {
  constexpr int kChunks = kDimQk / 8;  // of 16 bytes, a row
  const WorkItem item = work_item(p, number);
  const T* q = static_cast<const T*>(p.q) + item.query * p.q_stride_query;
  auto* to = reinterpret_cast<uint8_t*>(shared.q);
  CUTE_NO_UNROLL
  for (int n = threadIdx.x; n < kRows * kChunks; n += kProducerThreads) {
    const int row = n / kChunks, c = n % kChunks;
    const int piece = c < 64 ? c / 16 * 2 + c % 2 : kPieces - 1;
    const int chunk = c < 64 ? c % 16 / 2 : c - 64;
    const bool exists = item.first_head + row < p.h_q;
    const T* from = q + (exists ? item.first_head + row : 0) * p.q_stride_head + c * 8;
    cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(
        to + chunk_offset_bytes(piece, row, chunk), from, exists);
  }
}

}  // namespace flashmla::sm90::sparse_decode
