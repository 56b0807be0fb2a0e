// Shapes, shared memory and barriers of the dense MLA decode kernel.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/fast_math.h>

#include "../../common/mma.cuh"
#include "../half_tiles.cuh"
#include "../launch.h"
#include "../schedule.h"
#include "instances.h"

namespace flashmla::sm90::dense_decode {

using namespace half_tiles;

constexpr int kRows = kRowsACta;  // query rows (s, h) a CTA: one wgmma tile
static_assert(kTokens == kTileTokens, "the plan's tile is the kernel's tile");

// Which pieces of Q stay in registers: the last of each half, and RoPE.
__host__ __device__ constexpr bool in_registers(int piece) {
  return piece == 3 || piece >= 7;
}
__host__ __device__ constexpr int register_piece(int piece) {
  return piece == 3 ? 0 : piece - 6;
}
__host__ __device__ constexpr int shared_piece(int piece) {
  return piece < 3 ? piece : piece - 1;
}

// Barriers between warps of this CTA, as CUTLASS numbers them: behind its own eight, of sixteen.
enum BarrierId : uint32_t {
  kProbabilitiesEven = 1,  // P of an even tile is published: its owner arrives, the other waits
  kProbabilitiesOdd = 2,
  kBothConsumers = 3,  // have taken Q into registers, or left their row sums
  kTailZero0 = 4,      // consumer 0 has zeroed the tail of its half of V; 5 is consumer 1's
  kScored0 = 6,        // consumer 0 has read all of its tile's RoPE piece; 7 is consumer 1's
};

static_assert(kScored0 + 1 + uint32_t(cutlass::arch::ReservedNamedBarriers::FirstUserBarrier) < 16);

// Every stretch of tiles of one request that this CTA computes: the plan's row, walked.
struct WorkItem {
  int request;  // none, and no more items, below zero
  int first_tile;
  int tiles;  // 0: nothing to attend to, and the result says so
  int seqlen;
  int splits;  // of the request, over all parts
  int slot;    // of the partial result, when splits > 1
};

// A ring holds the halves of tiles, in the order in which they are read first: of each tile the
// half of V that its scores' consumer owns, then the other's. A half comes free when its owner has
// multiplied it with P, whichever half that is. RoPE, which only the scores need, has places of its
// own by the parity of the tile, and when the scores are done their P takes its place. Before an
// item's tiles the pieces of Q that are bound for registers pass through the ring, as one half; and
// the half that a consumer reads last is where it puts O in order, before that comes free.
template <class T>
struct SharedStorage {
  alignas(1024) T q[(kPieces - kRegisterPieces) * kPieceElements];  // [6 pieces][64 rows][64]
  alignas(1024) T half[kSlots][kPiecesHalf * kPieceElements];  // [4 pieces][64 tokens][64] a slot
  alignas(1024) T rope[2][kPieceElements];                     // [64 tokens][64], P [64 rows][64]
  float row_max[2][kRows];                                     // by parity of the tile
  float row_alpha[2][kRows];                                   // what the tile rescales O by
  float row_sum[2][2][kRows];                                  // by parity of the item, by consumer
  WorkItem items[2];                                           // by parity of the item
  uint64_t q_full, q_empty;  // of Q, and of the item that it belongs to
  uint64_t half_full[kSlots][kPiecesHalf];
  uint64_t half_empty[kSlots];
  uint64_t rope_full[2];
  uint64_t rope_empty[2];
};
static_assert(sizeof(SharedStorage<cutlass::half_t>) <= 232448, "227 KB a CTA");

struct KernelParams {
  DecodeShape shape;
  cutlass::FastDivmod group;         // heads of one KV head
  cutlass::FastDivmod rows;          // of one KV head
  cutlass::FastDivmod request_rows;  // of all of them
  bool causal;
  float scale_log2;        // softmax_scale * log2(e): scores go straight to exp2
  const int* block_table;  // [batch, block_table_stride]
  int64_t block_table_stride;
  int tiles_ahead;  // to be prefetched into L2 (of pages below 64 tokens the first of the tile)
  int max_tokens;   // that the block table has room for
  int page_shift;   // log2 of the tokens in a page: 4 to 8
  const int* cache_seqlens;  // [batch]
  const PlanRow* plan;       // [parts, plan_stride]
  int plan_stride;           // rows from one part to the next
  const int* num_splits;     // [batch + 1]
  const float* attn_sink;    // [h_q] or null
  void* out;                 // [batch, s_q, h_q, 512]
  float* lse;                // [batch, h_q, s_q]
  Partials partials;
  unsigned* meeting;  // of all CTAs, to merge what was split; null: another kernel does
};

// Keys that a query row s of this request may see: all of them, or, causal, those up to itself,
// the last query being aligned with the last key.
__device__ __forceinline__ int key_limit(const KernelParams& p, int seqlen, int s) {
  return p.causal ? seqlen - (p.shape.s_q - 1 - s) : seqlen;
}

// Walks the items of this CTA: its share of each request, or each chunk of it. A plan that was made
// for another batch gives wrong results, but nothing outside the tensors is read or written.
class WorkList {
 public:
  __device__ __forceinline__ explicit WorkList(const KernelParams& p)
      : p_(p),
        plan_(p.plan[blockIdx.z * p.plan_stride]),
        request_(max(0, plan_.begin_request)),
        tile_(max(0, plan_.begin_tile)) {
    const int last_row = min(static_cast<int>(blockIdx.x) * kRows + kRows, p.rows.divisor) - 1;
    last_s_ = p.group.div(last_row);
  }

  __device__ __forceinline__ bool next(WorkItem& item) {
    const int r = request_;
    if (r >= p_.shape.batch || r > plan_.end_request) return false;
    if (r == plan_.end_request && (plan_.end_tile == 0 || tile_ >= plan_.end_tile)) return false;
    item.request = r;
    item.seqlen = min(p_.cache_seqlens[r], p_.max_tokens);
    item.first_tile = tile_;
    // This part's share of the request, and the item's of that.
    int end = r == plan_.end_request ? plan_.end_tile : tiles_of(item.seqlen);
    const int chunk = plan_.chunk_tiles;
    const bool more = chunk > 0 && chunk < end - tile_;
    if (more) end = tile_ + chunk;
    // No row of this CTA sees past its last row's limit.
    const int seen = min(end, tiles_of(key_limit(p_, item.seqlen, last_s_)));
    item.tiles = max(0, seen - item.first_tile);
    const int first_slot = p_.num_splits[r];
    item.splits = p_.num_splits[r + 1] - first_slot;
    const int split = r == plan_.begin_request ? plan_.begin_split : 0;
    item.slot = first_slot + (chunk > 0 ? item.first_tile / chunk : split);
    request_ = more ? r : r + 1;
    tile_ = more ? end : 0;
    return true;
  }

 private:
  const KernelParams& p_;
  const PlanRow plan_;
  int request_;
  int tile_;
  int last_s_;
};

}  // namespace flashmla::sm90::dense_decode
