// Keeps the ring of groups full: chosen tokens, copied 16 bytes at a time to where wgmma reads
// them.
#pragma once

#include "../../../common/memory.cuh"
#include "config.cuh"

namespace flashmla::sm90::sparse_prefill::few_heads {

using Barrier = cutlass::arch::ClusterTransactionBarrier;  // mbarrier

// Walks the tiles of this CTA's items.
class TileCursor {
 public:
  __device__ __forceinline__ explicit TileCursor(const KernelParams& p)
      : p_(p), number_(static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x)) {}

  // Goes to the next tile; false where there is none.
  __device__ __forceinline__ bool advance() {
    ++tile_;
    while (tile_ >= tiles_) {
      if (number_ >= p_.items - static_cast<int>(gridDim.x)) return false;
      number_ += gridDim.x;
      const WorkItem item(p_, number_);
      tile_ = 0;
      tiles_ = item.tiles();
      length_ = item.length;
      list_ = p_.indices + item.query * p_.indices_stride;
    }
    return true;
  }
  // The index at this place of the tile's part of the list; -1 behind the list's end.
  __device__ __forceinline__ int index(int place) const {
    const int at = tile_ * kTokens + place;
    return at < length_ ? __ldg(list_ + at) : -1;
  }

 private:
  const KernelParams& p_;
  int number_;
  int tile_ = -1;  // of its item
  int tiles_ = 0;
  int length_ = 0;
  const int* list_ = nullptr;
};

// A warp copies its share of a tile's tokens. In one instruction eight lanes copy 128 bytes of one
// token, and the warp those of four: places 4 i + lane / 8 of its own, in steps i. What a copy
// needs to know is worked out once a tile.
template <class T, int kHeads>
struct Gatherer {
  static constexpr int kSteps = kTokensAWarp / 4;
  const KernelParams& p;
  SharedStorage<T, kHeads>& shared;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int place = warp * kTokensAWarp + lane / 8;

  const uint8_t* token[kSteps];  // where this thread's 16 bytes of it begin in global memory
  int exists;                    // bit i: token i does

  __device__ __forceinline__ void look_up(const int (&index)[kSteps]) {
    exists = 0;
    CUTE_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      exists |= (static_cast<uint32_t>(index[i]) < p.tokens) << i;
      const uint32_t offset = index[i] * p.kv_stride16;
      token[i] = p.kv + (static_cast<uint64_t>(offset) + lane % 8) * 16;
    }
  }

  // Piece `piece` of the tile's tokens, [64 tokens, 64], in the 128-byte swizzle: chunk c of row r
  // at c ^ (r % 8), and r % 8 is lane / 8 in even steps, 4 more in odd ones. Zeros where a token
  // does not exist, and where there is no such piece.
  template <int kAround>
  __device__ __forceinline__ void copy_piece(int piece, T* to) const {
    const uint32_t even =
        cute::cast_smem_ptr_to_uint(to) + place * 128 + ((lane % 8) ^ (lane / 8)) * 16;
    const uint32_t odd = even ^ 64;
    const int wanted = piece == kRopePiece && p.d_qk == kDimV ? 0 : exists;
    CUTE_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      start_copy_16<kAround>((i % 2 ? odd : even) + i * 4 * 128, token[i] + piece * 128,
                             wanted >> i & 1);
    }
  }

  // Group g of the tile's pieces, to a slot of the ring.
  template <int kAround>
  __device__ __forceinline__ void copy_group(int g, int slot) const {
    CUTE_UNROLL
    for (int i = 0; i < kGroupPieces; ++i) {
      copy_piece<kAround>(piece_at(g * kGroupPieces + i), shared.ring[slot][i]);
    }
  }

  // Which of this warp's tokens count, for the mask.
  __device__ __forceinline__ void leave_valid_bits(ValidBits* to) const {
    unsigned mine = 0;
    CUTE_UNROLL
    for (int i = 0; i < kSteps; ++i) mine |= static_cast<unsigned>(exists >> i & 1) << (4 * i);
    const unsigned bits = __reduce_or_sync(0xffffffffu, mine << (lane / 8));
    if (lane == 0) to[warp] = static_cast<ValidBits>(bits);
  }

  __device__ __forceinline__ void run() {
    TileCursor cursor(p);
    bool more = cursor.advance();
    int index[kSteps];
    CUTE_UNROLL
    for (int i = 0; i < kSteps; ++i) index[i] = more ? cursor.index(place + 4 * i) : -1;

    CUTE_NO_UNROLL
    for (int count = 0; more; ++count) {
      look_up(index);
      more = cursor.advance();
      CUTE_UNROLL
      for (int i = 0; i < kSteps; ++i) index[i] = more ? cursor.index(place + 4 * i) : -1;
      CUTE_UNROLL
      for (int g = 0; g < kTileGroups; ++g) {
        const GroupSlot<kHeads> at(count * kTileGroups + g);
        Barrier::wait(&shared.empty[at.slot], at.parity ^ 1);
        // What an ordinary store leaves takes an arrival of its own, in every group alike, since
        // any slot may be the next tile's first.
        if (g == 0) leave_valid_bits(shared.valid[count % kValidSlots]);
        if (lane == 0) Barrier::arrive(&shared.full[at.slot]);
        // Tokens lie anywhere: of what L2 fetches around them little is read before it is gone.
        if (p.beyond_l2) {
          copy_group<128>(g, at.slot);
        } else {
          copy_group<256>(g, at.slot);
        }
        cutlass::arch::cpasync_barrier_arrive_noinc(&shared.full[at.slot]);
      }
    }
  }
};

}  // namespace flashmla::sm90::sparse_prefill::few_heads
