// Shapes, shared memory, barriers and work of the sparse MLA prefill kernel.
#pragma once

#include <cutlass/arch/barrier.h>

#include "../../common/mma.cuh"
#include "../half_tiles.cuh"
#include "launch.h"

namespace flashmla::sm90::sparse_prefill {

using namespace half_tiles;

constexpr int kRows = 64;  // heads of one query a CTA: one wgmma tile
constexpr int kPieceBytes = kPieceElements * 2;
constexpr int kGroups = 2;  // in which the pieces of a half are declared full
constexpr int kProducerThreads = 128;
constexpr int kWarps = 4;                       // of a warpgroup
constexpr int kTokensAWarp = kTokens / kWarps;  // that a producer warp fetches
// Registers a thread after the warpgroups have traded them: 504 for one thread of each.
constexpr int kRegistersProducer = 24;
constexpr int kRegistersConsumer = 240;
static_assert(kRegistersProducer + 2 * kRegistersConsumer <= 504, "3 x 168 at the start");

// Which pieces of Q stay in registers: the first of each half, and RoPE, where dense decode keeps
// the last. A wgmma with an operand in registers holds its warps until the tensor cores come to it,
// so it should not be what a wait for the next pieces comes behind.
__host__ __device__ constexpr bool in_registers(int piece) {
  return piece % kPiecesHalf == 0;
}
__host__ __device__ constexpr int register_piece(int piece) {
  return piece / kPiecesHalf;
}
__host__ __device__ constexpr int shared_piece(int piece) {
  return piece - 1 - piece / kPiecesHalf;
}

// Barriers between warps of this CTA, as CUTLASS numbers them: behind its own eight, of sixteen.
enum BarrierId : uint32_t {
  kProbabilitiesEven = 1,  // P of an even tile is published: its owner arrives, the other waits
  kProbabilitiesOdd = 2,
  kRowSums = 3,    // both consumers have left their row sums
  kStaged0 = 4,    // consumer 0 has left its part of the output in shared memory; 5 is consumer 1's
  kFollowed0 = 6,  // consumer 0 is through with the other's P; 7 is consumer 1's
};

static_assert(kFollowed0 + 1 + uint32_t(cutlass::arch::ReservedNamedBarriers::FirstUserBarrier) <
              16);

// A warp's share of which tokens of a tile count: bit i for its token i.
using ValidBits = uint16_t;
static_assert(kTokensAWarp == 16 && kWarps * sizeof(ValidBits) == sizeof(uint64_t));

// A ring holds the halves of tiles, in the order in which they are read first: of each tile the
// half of V that its scores' consumer owns, then the other's. A half comes free when its owner has
// multiplied it with P, whichever half that is; that of the last tile when the output that was
// staged in it is on its way. RoPE has a place of its own, which comes free with the scores, and P
// another: who writes P_j there has read P_{j-1}.
template <class T>
struct SharedStorage {
  alignas(1024) T q[(kPieces - kRegisterPieces) * kPieceElements];  // [6 pieces][64 rows][64]
  alignas(1024) T half[kSlots][kPiecesHalf * kPieceElements];  // [4 pieces][64 tokens][64] a slot
  alignas(1024) T rope[kPieceElements];                        // [64 tokens][64]
  alignas(1024) T p[kPieceElements];                           // [64 rows][64 tokens]
  alignas(8) ValidBits valid[2][kWarps];                       // by parity of the tile
  float row_max[2][kRows];                                     // by parity of the tile
  float row_alpha[2][kRows];                                   // what the tile rescales O by
  float row_top[2][kRows];                                     // by consumer: the largest score
  float row_sum[2][2][kRows];                                  // by parity of the item, by consumer
  uint64_t q_full, q_empty;
  uint64_t half_full[kSlots][kGroups];
  uint64_t half_empty[kSlots];
  uint64_t rope_full[2];  // by parity of the tile: its reader has seen the one before the last
  uint64_t rope_empty;
};
static_assert(sizeof(SharedStorage<cutlass::half_t>) <= 232448, "227 KB a CTA");

struct KernelParams {
  int items;      // queries * row_tiles; a CTA takes every gridDim.x-th
  int row_tiles;  // of a query: 1 or 2
  int h_q;
  int d_qk;  // 576, or 512: no RoPE part
  int topk;
  float scale_log2;  // softmax_scale * log2(e): scores go straight to exp2
  float scale;       // softmax_scale
  float lse_unit;    // ln 2, or 1 for an LSE in base 2
  const void* q;     // [queries, h_q, d_qk]
  int64_t q_stride_query, q_stride_head;
  const uint8_t* kv;     // [tokens, d_qk]
  uint32_t kv_stride16;  // in units of 16 bytes
  uint32_t tokens;       // indices from here on point to nothing
  const int* indices;    // [queries, topk]
  int64_t indices_stride;
  const int* topk_length;  // [queries], or null
  const float* attn_sink;  // [h_q], or null
  void* out;               // [queries, h_q, 512]
  float* max_logits;       // [queries, h_q]
  float* lse;              // [queries, h_q]
};

// Up to 64 heads of one query. Its row tiles stand side by side, so that they run at the same time
// and read the same tokens, once from memory and once from L2.
struct WorkItem {
  int query;
  int first_head;
  int length;  // of the list

  __device__ __forceinline__ WorkItem(const KernelParams& p, int number)
      : query(query_of(p, number)), first_head(first_head_of(p, number)), length(p.topk) {
    if (p.topk_length != nullptr) length = min(p.topk, max(0, __ldg(p.topk_length + query)));
  }
  __device__ __forceinline__ static int query_of(const KernelParams& p, int number) {
    return number >> (p.row_tiles - 1);
  }
  __device__ __forceinline__ static int first_head_of(const KernelParams& p, int number) {
    return (number & (p.row_tiles - 1)) * kRows;
  }
  // 0: nothing to attend to, and the result says so.
  __device__ __forceinline__ int tiles() const {  // no overflow at INT_MAX
    return length / kTokens + (length % kTokens > 0);
  }
};

}  // namespace flashmla::sm90::sparse_prefill
