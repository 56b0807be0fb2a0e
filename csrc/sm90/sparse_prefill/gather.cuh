// Keeps the ring of tiles full: chosen tokens, copied 16 bytes at a time to where wgmma reads them.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "../../common/memory.cuh"
#include "config.cuh"

namespace flashmla::sm90::sparse_prefill {

using Barrier = cutlass::arch::ClusterTransactionBarrier;  // mbarrier

constexpr uint32_t kNowhere = 0xffffffffu;  // in place of a token's offset

// Walks the tiles of this CTA's items.
class TileCursor {
 public:
  __device__ __forceinline__ explicit TileCursor(const KernelParams& p)
      : p_(p), number_(static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x)) {}

  // Goes to the next tile; false where there is none.
  __device__ __forceinline__ bool advance() {
    ++tile;
    while (tile >= tiles_) {
      if (number_ >= p_.items - static_cast<int>(gridDim.x)) return false;
      number_ += gridDim.x;
      const WorkItem item(p_, number_);
      tile = 0;
      tiles_ = item.tiles();
      length_ = item.length;
      query = item.query;
      first_head = item.first_head;
    }
    return true;
  }
  // The index at this place of the tile's part of the list; -1 behind the list's end.
  __device__ __forceinline__ int index(int place) const {
    const int at = tile * kTokens + place;
    return at < length_ ? __ldg(p_.indices + query * p_.indices_stride + at) : -1;
  }

  int tile = -1;  // of its item
  int query = 0;
  int first_head = 0;

 private:
  const KernelParams& p_;
  int number_;
  int tiles_ = 0;
  int length_ = 0;
};

// A warp copies 16 tokens of a tile. In one instruction eight lanes copy 128 bytes of one token,
// and the warp those of four: places 4 i + lane / 8 of its sixteen, in four steps i.
template <class T>
struct Gatherer {
  static constexpr int kSteps = kTokensAWarp / 4;
  const KernelParams& p;
  SharedStorage<T>& shared;
  const CUtensorMap& q_map;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int place = warp * kTokensAWarp + lane / 8;

  // This thread's four tokens: where their first 16 bytes for it are, in units of 16 bytes, or
  // kNowhere.
  uint32_t token[kSteps];

  __device__ __forceinline__ void look_up(const int (&index)[kSteps]) {
    CUTE_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      const bool exists = static_cast<uint32_t>(index[i]) < p.tokens;
      token[i] = exists ? index[i] * p.kv_stride16 + lane % 8 : kNowhere;
    }
  }

  // Piece `piece` of the tile's tokens, [64 tokens, 64], in the 128-byte swizzle: chunk c of row r
  // at c ^ (r % 8), and r % 8 is lane / 8 in even steps, 4 more in odd ones.
  __device__ __forceinline__ void copy_piece(int piece, T* to) const {
    const uint32_t row = cute::cast_smem_ptr_to_uint(to) + place * 128;
    const uint32_t even = row + ((lane % 8) ^ (lane / 8)) * 16;
    const uint32_t odd = row + ((lane % 8) ^ (lane / 8 + 4)) * 16;
    CUTE_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      start_copy_16((i % 2 ? odd : even) + i * 4 * 128,
                    p.kv + static_cast<uint64_t>(token[i]) * 16 + piece * 128,
                    token[i] != kNowhere);
    }
  }

  // One half of a tile, in the order in which its pieces are read.
  __device__ __forceinline__ void copy_half(int first_piece, const HalfSlot& at) const {
    CUTE_UNROLL
    for (int i = 0; i < kPiecesHalf; ++i) {
      copy_piece(first_piece + i, shared.half[at.slot] + i * kPieceElements);
      if (i % (kPiecesHalf / kGroups) == kPiecesHalf / kGroups - 1) {
        cutlass::arch::cpasync_barrier_arrive_noinc(
            &shared.half_full[at.slot][i / (kPiecesHalf / kGroups)]);
      }
    }
  }

  // Which of this warp's tokens count, for the mask.
  __device__ __forceinline__ void leave_valid_bits(int slot) const {
    unsigned mine = 0;
    CUTE_UNROLL
    for (int i = 0; i < kSteps; ++i) mine |= static_cast<unsigned>(token[i] != kNowhere) << (4 * i);
    const unsigned bits = __reduce_or_sync(0xffffffffu, mine << (lane / 8));
    if (lane == 0) {
      shared.valid[slot][warp] = static_cast<ValidBits>(bits);
      Barrier::arrive(&shared.rope_full[slot]);
    }
  }

  __device__ __forceinline__ void copy_rope(int slot) {
    if (p.d_qk == kDimV) {  // no such columns: zeros, whatever lies behind the token
      CUTE_UNROLL
      for (int i = 0; i < kSteps; ++i) token[i] = kNowhere;
    }
    copy_piece(kRopePiece, shared.rope[slot]);
    cutlass::arch::cpasync_barrier_arrive_noinc(&shared.rope_full[slot]);
  }

  // The pieces of Q that are read from shared memory, by one thread.
  __device__ __forceinline__ void fetch_queries(int query, int first_head, int item_count) const {
    Barrier::wait(&shared.q_empty, (item_count & 1) ^ 1);
    Barrier::arrive_and_expect_tx(&shared.q_full, sizeof(shared.q));
    for (int i = 0; i < kPieces; ++i) {
      if (in_registers(i)) continue;
      cute::SM90_TMA_LOAD_3D::copy(
          &q_map, &shared.q_full, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST),
          shared.q + shared_piece(i) * kPieceElements, i * kPieceCols, first_head, query);
    }
  }

  __device__ __forceinline__ void run() {
    TileCursor cursor(p);
    bool more = cursor.advance();
    int index[kSteps];
    CUTE_UNROLL
    for (int i = 0; i < kSteps; ++i) index[i] = more ? cursor.index(place + 4 * i) : -1;

    int item_count = 0;
    CUTE_NO_UNROLL
    for (int count = 0; more; ++count) {
      const int tile = cursor.tile, query = cursor.query, first_head = cursor.first_head;
      look_up(index);
      more = cursor.advance();
      CUTE_UNROLL
      for (int i = 0; i < kSteps; ++i) index[i] = more ? cursor.index(place + 4 * i) : -1;

      // First the half of the consumer that computes the scores.
      CUTE_NO_UNROLL
      for (int k = 0; k < 2; ++k) {
        const HalfSlot at(2 * count + k);
        Barrier::wait(&shared.half_empty[at.slot], at.parity ^ 1);
        copy_half(((tile & 1) ^ k) * kPiecesHalf, at);
      }
      // Keys of a new item may be on their way before the scores of the one before are done.
      if (tile == 0 && threadIdx.x == 0) fetch_queries(query, first_head, item_count);
      item_count += tile == 0;
      const int slot = count & 1;
      Barrier::wait(&shared.rope_empty[slot], (count >> 1 & 1) ^ 1);
      leave_valid_bits(slot);
      copy_rope(slot);
    }
  }
};

}  // namespace flashmla::sm90::sparse_prefill
