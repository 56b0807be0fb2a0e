// Shapes, shared memory, barriers and work of sparse prefill with at most 32 heads.
#pragma once

#include <cutlass/arch/barrier.h>

#include "../../../common/mma.cuh"
#include "../../half_tiles.cuh"
#include "../launch.h"

namespace flashmla::sm90::sparse_prefill::few_heads {

using half_tiles::kDimV;
using half_tiles::kPieceCols;
using half_tiles::kPieceElements;
using half_tiles::kPieces;
using half_tiles::kRopePiece;
using half_tiles::kTokens;

constexpr int kGroupPieces = 3;  // a tile comes and goes in groups of three pieces of 64 columns
constexpr int kTileGroups = kPieces / kGroupPieces;
constexpr int kGroupBytes = kGroupPieces * kPieceElements * 2;
constexpr int kBlocks = kDimV / kPieceCols;     // of 64 output columns: M of a wgmma
constexpr int kWarps = 4;                       // of a warpgroup
constexpr int kTokensAWarp = kTokens / kWarps;  // that a producer warp fetches
constexpr int kProducerThreads = 128;
constexpr int kConsumerThreads = 256;
constexpr int kThreads = kProducerThreads + kConsumerThreads;
// Registers a thread after the warpgroups have traded them: 504 for one thread of each.
constexpr int kRegistersProducer = 72;
constexpr int kRegistersConsumer = 216;
static_assert(kRegistersProducer + 2 * kRegistersConsumer <= 504, "3 x 168 at the start");

// The pieces of a tile in the order in which they arrive: RoPE, which only the scores need, first.
// Place 3 g + i is piece i of group g.
__host__ __device__ constexpr int piece_at(int place) {
  return place == 0 ? kRopePiece : place - 1;
}
static_assert(kTileGroups * kGroupPieces == kPieces);

// Barriers between warps of this CTA, as CUTLASS numbers them: behind its own eight, of sixteen.
enum BarrierId : uint32_t {
  kConsumer0 = 1,  // all warps of consumer 0; 2 is consumer 1's
  kConsumers = 3,  // both
};

// A producer warp's share of which tokens of a tile count: bit i for its token i.
using ValidBits = uint16_t;
static_assert(kTokensAWarp == 16 && kWarps * sizeof(ValidBits) == sizeof(uint64_t));
constexpr int kValidSlots = 4;  // tiles that the ring may hold a part of

// The ring gets what Q and P leave.
template <int kHeads>
constexpr int kRing = kHeads <= 16 ? 8 : 7;

// What a consumer knows of the heads at the end of an item.
template <int kHeads>
struct HeadState {
  float sum[kWarps][kHeads];  // of this warp's tokens
  float top[kWarps][kHeads];  // the largest score
  float shift[kHeads];
};

template <class T, int kHeads>
struct SharedStorage {
  static constexpr int kQueryElements = kHeads * kPieceCols;
  alignas(1024) T ring[kRing<kHeads>][kGroupPieces][kPieceElements];  // [64 tokens][64] a piece
  alignas(1024) T q[kPieces][kQueryElements];                         // [heads][64] a piece
  alignas(1024) T p[2][2][kHeads * kTokens];  // [heads][64 tokens], by consumer and its turn
  alignas(8) ValidBits valid[kValidSlots][kWarps];
  float tile_top[2][kWarps][kHeads];  // by consumer: the largest score of a tile
  HeadState<kHeads> state[2][2];      // by parity of the item, by consumer
  uint64_t q_full;
  uint64_t full[kRing<kHeads>];
  uint64_t empty[kRing<kHeads>];
};
static_assert(sizeof(SharedStorage<cutlass::half_t, 8>) <= 232448, "227 KB a CTA");
static_assert(sizeof(SharedStorage<cutlass::half_t, 16>) <= 232448, "227 KB a CTA");
static_assert(sizeof(SharedStorage<cutlass::half_t, 32>) <= 232448, "227 KB a CTA");

// Where the n-th group of all groups lies, and the parity of that round of the ring.
template <int kHeads>
struct GroupSlot {
  int slot;
  uint32_t parity;
  __device__ __forceinline__ explicit GroupSlot(int n)
      : slot(static_cast<unsigned>(n) % kRing<kHeads>),
        parity(static_cast<unsigned>(n) / kRing<kHeads> & 1) {}
};

// The operands are exchanged: heads are wgmma's N, which may be 8, tokens and output columns its M.
template <class T, int kHeads>
struct Tiles {
  using N = cute::Int<kHeads>;
  using Keys = SwizzledTile<T, kTokens>;                  // [64 tokens, 64]
  using Values = TransposedTile<T, kTokens, kPieceCols>;  // [64 columns, 64 tokens]
  using Heads = SwizzledTile<T, kHeads>;                  // [heads, 64 columns or tokens]
  using Scores = decltype(cute::make_tiled_mma(           // Sᵀ = K Qᵀ
      cute::GMMA::ss_op_selector<T, T, float, cute::Shape<cute::_64, N, cute::_64>>()));
  using Output = decltype(cute::make_tiled_mma(  // Oᵀ = Vᵀ Pᵀ
      cute::GMMA::ss_op_selector<T, T, float, cute::Shape<cute::_64, N, cute::_64>, Major::MN,
                                 Major::K>()));
};

struct KernelParams {
  int items;  // queries; a CTA takes every gridDim.x-th
  int h_q;
  int d_qk;  // 576, or 512: no RoPE part
  int topk;
  float scale_log2;      // softmax_scale * log2(e): scores go straight to exp2
  float scale;           // softmax_scale
  float lse_unit;        // ln 2, or 1 for an LSE in base 2
  const uint8_t* kv;     // [tokens, d_qk]
  uint32_t kv_stride16;  // in units of 16 bytes
  uint32_t tokens;       // indices from here on point to nothing
  bool beyond_l2;        // kv is more than L2 holds
  const int* indices;    // [queries, topk]
  int64_t indices_stride;
  const int* topk_length;  // [queries], or null
  const float* attn_sink;  // [h_q], or null
  void* out;               // [queries, h_q, 512]
  float* max_logits;       // [queries, h_q]
  float* lse;              // [queries, h_q]
};

// All heads of one query.
struct WorkItem {
  int query;
  int length;  // of the list

  __device__ __forceinline__ WorkItem(const KernelParams& p, int number)
      : query(number), length(p.topk) {
    if (p.topk_length != nullptr) length = min(p.topk, max(0, __ldg(p.topk_length + query)));
  }
  // 0: nothing to attend to, and the result says so.
  __device__ __forceinline__ int tiles() const {  // no overflow at INT_MAX
    return length / kTokens + (length % kTokens > 0);
  }
};

}  // namespace flashmla::sm90::sparse_prefill::few_heads
