// Keeps the ring of tiles full: chosen tokens, copied 16 bytes at a time to where wgmma reads them.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "../../common/memory.cuh"
#include "../../common/registers.cuh"
#include "config.cuh"

namespace flashmla::sm90::sparse_prefill {

using Barrier = cutlass::arch::ClusterTransactionBarrier;  // mbarrier

constexpr uint32_t kNowhere = 0xffffffffu;  // in place of a token's offset

// Walks the tiles of this CTA's items. A producer has 24 registers: no more is kept than must be.
class TileCursor {
 public:
  __device__ __forceinline__ explicit TileCursor(const KernelParams& p)
      : p_(p), number_(static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x)) {}

  // Goes to the next tile; false where there is none.
  __device__ __forceinline__ bool advance() {
    ++tile;
    while (first_of_tile() >= static_cast<unsigned>(length_)) {
      if (number_ >= p_.items - static_cast<int>(gridDim.x)) return false;
      number_ += gridDim.x;
      tile = 0;
      length_ = WorkItem(p_, number_).length;
    }
    return true;
  }
  // The index at this place of the tile's part of the list; -1 behind the list's end.
  __device__ __forceinline__ int index(int place) const {
    const unsigned at = first_of_tile() + place;
    const int64_t list = WorkItem::query_of(p_, number_) * p_.indices_stride;
    return at < static_cast<unsigned>(length_) ? __ldg(p_.indices + list + at) : -1;
  }
  __device__ __forceinline__ int item() const { return number_; }

  int tile = -1;  // of its item

 private:
  __device__ __forceinline__ unsigned first_of_tile() const { return tile * unsigned{kTokens}; }

  const KernelParams& p_;
  int number_;
  int length_ = 0;
};

// The pieces of Q that are read from shared memory, by one thread.
template <class T>
__device__ __forceinline__ void fetch_queries(const KernelParams& p, SharedStorage<T>& shared,
                                              const CUtensorMap& q_map, int item, int item_count) {
  Barrier::wait(&shared.q_empty, (item_count & 1) ^ 1);
  Barrier::arrive_and_expect_tx(&shared.q_full, sizeof(shared.q));
  for (int i = 0; i < kPieces; ++i) {
    if (in_registers(i)) continue;
    cute::SM90_TMA_LOAD_3D::copy(&q_map, &shared.q_full,
                                 static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST),
                                 shared.q + shared_piece(i) * kPieceElements, i * kPieceCols,
                                 WorkItem::first_head_of(p, item), WorkItem::query_of(p, item));
  }
}

// A warp copies 16 tokens of a tile. In one instruction eight lanes copy 128 bytes of one token,
// and the warp those of four: places 4 i + lane / 8 of its sixteen, in four steps i.
//
// What a copy needs to know is worked out once a tile: the four tokens' addresses, of which pieces
// are at fixed distances. A copy reads its registers only when its turn comes, and whoever wants to
// write them waits for that.
template <class T>
struct Gatherer {
  static constexpr int kSteps = kTokensAWarp / 4;
  const KernelParams& p;
  SharedStorage<T>& shared;
  const CUtensorMap& q_map;
  int at;                        // where this thread's 16 bytes of its first token are in a piece
  int exists;                    // bit i: token i does
  const uint8_t* token[kSteps];  // where this thread's 16 bytes of it begin in global memory

  __device__ __forceinline__ Gatherer(const KernelParams& p, SharedStorage<T>& shared,
                                      const CUtensorMap& q_map)
      : p(p), shared(shared), q_map(q_map) {
    // The 128-byte swizzle: chunk c of row r at c ^ (r % 8), and r % 8 is lane / 8 in even steps, 4
    // more in odd ones.
    at = (warp() * kTokensAWarp + lane() / 8) * 128 + ((lane() % 8) ^ (lane() / 8)) * 16;
    forget(at);
  }
  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ static int warp() { return threadIdx.x / 32; }

  // The index of the warp's token lane % 16.
  __device__ __forceinline__ int listed(const TileCursor& cursor, bool more) const {
    return more ? cursor.index(warp() * kTokensAWarp + lane() % kTokensAWarp) : -1;
  }

  __device__ __forceinline__ void look_up(int index) {
    const bool mine = static_cast<uint32_t>(index) < p.tokens;
    const uint32_t offset_of_lane = mine ? index * p.kv_stride16 : kNowhere;
    exists = 0;
    CUTE_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      const uint32_t offset = __shfl_sync(0xffffffffu, offset_of_lane, i * 4 + lane() / 8);
      exists |= (offset != kNowhere) << i;
      token[i] = p.kv + (static_cast<uint64_t>(offset) + lane() % 8) * 16;
    }
    forget(exists);
  }

  // Pieces kPiece to kPiece + kCount - 1 of the tile's tokens, [64 tokens, 64] each. Even steps go
  // to `even`, the others to `odd`.
  template <int kPiece, int kCount>
  __device__ __forceinline__ void copy_pieces(uint32_t even, uint32_t odd, int wanted) const {
    CUTE_UNROLL
    for (int n = 0; n < kCount; ++n) {
      CUTE_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        start_copy_16((i % 2 ? odd : even) + n * kPieceBytes + i * 4 * 128,
                      token[i] + (kPiece + n) * 128, wanted >> i & 1);
      }
    }
  }

  // One half of a tile, in the order in which its pieces are read.
  template <int kFirstPiece>
  __device__ __forceinline__ void copy_half(const HalfSlot& slot) const {
    constexpr int kGroup = kPiecesHalf / kGroups;
    const uint32_t even = cute::cast_smem_ptr_to_uint(shared.half[slot.slot]) + at;
    const uint32_t odd = even ^ 64;
    copy_pieces<kFirstPiece, kGroup>(even, odd, exists);
    declare_full(slot.slot, 0);
    copy_pieces<kFirstPiece + kGroup, kGroup>(even + kGroup * kPieceBytes,
                                              odd + kGroup * kPieceBytes, exists);
    declare_full(slot.slot, 1);
  }

  // The consumers of even tiles begin with the first half, the others with the second.
  __device__ __forceinline__ void copy_half(int which, const HalfSlot& slot) {
    forget(exists);  // as one number: a predicate a token would take more registers
    if (which == 0) {
      copy_half<0>(slot);
    } else {
      copy_half<kPiecesHalf>(slot);
    }
  }

  __device__ __forceinline__ void declare_full(int slot, int group) const {
    cutlass::arch::cpasync_barrier_arrive_noinc(&shared.half_full[slot][group]);
  }

  // Which of this warp's tokens count, for the mask.
  __device__ __forceinline__ void leave_valid_bits(int parity) const {
    unsigned mine = 0;
    CUTE_UNROLL
    for (int i = 0; i < kSteps; ++i) mine |= static_cast<unsigned>(exists >> i & 1) << (4 * i);
    const unsigned bits = __reduce_or_sync(0xffffffffu, mine << (lane() / 8));
    if (lane() == 0) {
      shared.valid[parity][warp()] = static_cast<ValidBits>(bits);
      Barrier::arrive(&shared.rope_full[parity]);
    }
  }

  __device__ __forceinline__ void copy_rope(int parity) const {
    // No such columns: zeros, whatever lies behind the token.
    const int wanted = p.d_qk == kDimV ? 0 : exists;
    const uint32_t even = cute::cast_smem_ptr_to_uint(shared.rope) + at;
    copy_pieces<kRopePiece, 1>(even, even ^ 64, wanted);
    cutlass::arch::cpasync_barrier_arrive_noinc(&shared.rope_full[parity]);
  }

  __device__ __forceinline__ void run() {
    TileCursor cursor(p);
    bool more = cursor.advance();
    int index = listed(cursor, more);
    int item_count = 0;
    CUTE_NO_UNROLL
    for (int count = 0; more; ++count) {
      look_up(index);
      // First the half of the consumer that computes the scores.
      CUTE_NO_UNROLL
      for (int k = 0; k < 2; ++k) {
        const HalfSlot at(2 * count + k);
        Barrier::wait(&shared.half_empty[at.slot], at.parity ^ 1);
        copy_half((cursor.tile & 1) ^ k, at);
      }
      // Keys of a new item may be on their way before the scores of the one before are done.
      if (cursor.tile == 0) {
        if (threadIdx.x == 0) fetch_queries(p, shared, q_map, cursor.item(), item_count);
        ++item_count;
      }
      // The next tile's indices are on their way while the place for RoPE is waited for.
      more = cursor.advance();
      index = listed(cursor, more);
      Barrier::wait(&shared.rope_empty, (count & 1) ^ 1);
      copy_rope(count & 1);
      leave_valid_bits(count & 1);
    }
  }
};

}  // namespace flashmla::sm90::sparse_prefill
