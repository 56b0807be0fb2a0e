// Shapes, shared memory and barriers of the dense prefill kernel.
#pragma once

#include <cutlass/arch/barrier.h>

#include "../../common/mma.cuh"
#include "dense_prefill.h"
#include "plan.h"

namespace flashmla::sm90::dense_prefill {

using Barrier = cutlass::arch::ClusterTransactionBarrier;  // mbarrier

constexpr int kConsumers = 3;  // warpgroups, each with a row tile of its own
constexpr int kRows = 64;      // query rows of a consumer: one wgmma tile
constexpr int kBlockRows = kConsumers * kRows;
constexpr int kTokens = 128;  // KV tokens a tile
constexpr int kDimV = 128;
constexpr int kPieceCols = 64;  // columns of a TMA box: 128 bytes, the widest swizzle
constexpr int kThreads = (1 + kConsumers) * 128;

// K and V travel in pieces of 16 KB through one ring: a tile is d_qk / 64 pieces of K, each
// [128 tokens, 64], and then two of V, each [64 tokens, 128].
constexpr int kPieceElements = kTokens * kPieceCols;
constexpr int kPiecesV = 2;
constexpr int kPieceTokensV = kTokens / kPiecesV;
template <int kDimQk>
constexpr int kPiecesQk = kDimQk / kPieceCols;

constexpr int kBlocksAhead = 2;  // places for work descriptions
constexpr int kTilesAhead = 3;   // the next block is drawn when so many are left behind a tile

// Hardware barriers between warps of this CTA; 0 to 2 belong to consumer 0, 1 and 2.
enum BarrierId : uint32_t {
  kTurn = 0,  // it is this consumer's turn to issue matrix work
  kTail = 3,  // this consumer has zeroed the tail of V
};

// One block of work: 192 query rows of one head, those that end at `last_row`.
struct Work {
  int first_query;  // of the sequence, in the packed tensor
  int queries;
  int first_key;
  int keys;
  int head;  // -1: there is no more work
  int row;   // of the sequence, where the block begins; negative in a block that is not full

  // Keys that a query row may see: all, or, causal, those up to itself, the last query being
  // aligned with the last key. Zero and less: none.
  __device__ __forceinline__ int key_limit(int query, bool causal) const {
    return causal ? min(keys, keys - queries + query + 1) : keys;
  }
  // KV tiles that the rows up to this one need.
  __device__ __forceinline__ int tiles(int last_row, bool causal) const {
    if (last_row < 0) return 0;
    return (max(0, key_limit(last_row, causal)) + kTokens - 1) / kTokens;
  }
};

// Places for a consumer's rows of Q. One more than there are consumers: a block's first rows arrive
// while the block before is at work, the others as soon as the consumer before has done its scores.
constexpr int kPlacesQ = kConsumers + 1;

template <class T, int kDimQk>
struct SharedStorage {
  // As many pieces as fit beside Q; whatever is left of the 227 KB holds the barriers.
  static constexpr int kSlots =
      (232448 - kPlacesQ * kRows * kDimQk * 2 - 1024) / (kPieceElements * 2);

  alignas(1024) T q[kPlacesQ][kPiecesQk<kDimQk>][kRows * kPieceCols];  // [4][d/64][64 rows][64]
  alignas(1024) T ring[kSlots][kPieceElements];
  uint64_t q_full[kPlacesQ], q_empty[kPlacesQ];
  uint64_t ring_full[kSlots], ring_empty[kSlots];
  uint64_t work_full[kBlocksAhead], work_empty[kBlocksAhead];
  uint64_t work_wanted;  // the next block may be drawn
  Work work[kBlocksAhead];
};
static_assert(sizeof(SharedStorage<cutlass::half_t, 192>) <= 232448, "227 KB a CTA");
static_assert(sizeof(SharedStorage<cutlass::half_t, 128>) <= 232448, "227 KB a CTA");

// A place in a ring, and how often the ring was gone round (its parity).
template <int kPlaces>
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kPlaces) {
      slot = 0;
      parity ^= 1;
    }
  }
};

struct KernelParams {
  Sequences sequences;  // rows: queries; columns: keys
  WorkPlan plan;
  int h_q;
  int group;  // query heads to a KV head
  bool causal;
  float scale_log2;  // softmax_scale * log2(e): scores go straight to exp2
  void* out;         // [total_q, h_q, 128]
  float* lse;        // [total_q, h_q]
};

}  // namespace flashmla::sm90::dense_prefill
