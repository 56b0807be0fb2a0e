// Shapes, shared memory and barriers of the backward kernel.
#pragma once

#include <cutlass/arch/barrier.h>

#include "../../common/mma.cuh"
#include "../dense_prefill/order.cuh"
#include "dense_prefill_backward.h"

namespace flashmla::sm90::dense_prefill_backward {

using Barrier = cutlass::arch::ClusterTransactionBarrier;  // mbarrier
using dense_prefill::Block;
using dense_prefill::HeadSets;
using dense_prefill::Sequences;
using dense_prefill::Span;
using dense_prefill::WorkPlan;

constexpr int kConsumers = 2;                   // warpgroups, each with keys of its own
constexpr int kKeys = 64;                       // keys of a consumer: one wgmma tile
constexpr int kBlockKeys = kConsumers * kKeys;  // keys of a CTA
constexpr int kQueries = kTileQueries;          // queries a tile
constexpr int kDimV = 128;
constexpr int kPieceCols = 64;  // columns of a TMA box: 128 bytes, the widest swizzle
constexpr int kPiecesV = kDimV / kPieceCols;
template <int kDimQk>
constexpr int kPiecesQk = kDimQk / kPieceCols;
constexpr int kStages = 2;
constexpr int kThreads = (1 + kConsumers) * 128;
// What the heads that are worked on at a time may take of L2, queries and sums together: with more,
// the sums that all CTAs of a head add to would come from memory.
constexpr int64_t kSetBytes = int64_t{32} << 20;

// Hardware barriers. The first three are each consumer's own: between its warps, and between them
// and the warp that adds for it.
enum BarrierId : uint32_t { kCleared = 0, kFree = 2, kFilled = 4, kBlockDone = 6 };
constexpr int kAdders = 32 * kConsumers;  // threads: a warp for each consumer
// At d 128 they cost more than they are worth, where nobody has to wait for a turn.
template <int kDimQk, bool kDeterministic>
constexpr bool kHasAdders = kDimQk == 192 || kDeterministic;

template <class T, int kDimQk>
struct SharedStorage {
  alignas(1024) T k[kPiecesQk<kDimQk>][kBlockKeys * kPieceCols];  // [d/64][128 keys][64]
  alignas(1024) T v[kPiecesV][kBlockKeys * kPieceCols];           // [2][128 keys][64]
  // [2 stages][d/64][64 queries][64] and [2 stages][2][64 queries][64]
  alignas(1024) T q[kStages][kPiecesQk<kDimQk> * kQueries * kPieceCols];
  alignas(1024) T d_out[kStages][kPiecesV * kQueries * kPieceCols];
  alignas(1024) T ds[2][kBlockKeys * kQueries];  // [128 keys][64 queries], by parity of the tile
  alignas(128) float dq[kConsumers][kQueries * kPieceCols];  // on its way to the sums in memory
  alignas(16) float lse2[kStages][kQueries];
  alignas(16) float delta[kStages][kQueries];
  uint64_t kv_full;
  uint64_t q_full[kStages], q_empty[kStages];
  uint64_t d_out_full[kStages], d_out_empty[kStages];
  uint64_t ds_full[2], ds_empty[2];
  bool head_done;  // this was the last block of keys to add to its heads' dQ
};
static_assert(sizeof(SharedStorage<cutlass::half_t, 192>) <= 232448, "227 KB a CTA");

struct KernelParams {
  Sequences sequences;  // rows: keys; columns: queries
  WorkPlan plan;
  int h_kv;
  int group;  // query heads to a KV head
  bool causal;
  float scale;
  float scale_log2;  // scale * log2(e)
  int tiles;
  const float* lse2;   // [h_q, tiles, 64]
  const float* delta;  // [h_q, tiles, 64]
  float* dq_sums;      // [h_q, tiles, d_qk / 64, 64 * 64]
  int* counters;       // [h_q, tiles, kCounters]
  void* dq;            // [total_q, h_q, d_qk]
  void* dk;            // [total_kv, h_kv, d_qk]
  void* dv;            // [total_kv, h_kv, 128]
};

// The pieces of dQ, 64 columns each, that a consumer computes in tile m: two pieces are shared
// evenly; of three, who has two of them in this tile has one in the next.
template <int kPieces>
struct Share {
  int first, count;
  __device__ __forceinline__ Share(int m, int consumer)
      : first(kPieces == 2              ? consumer
              : (m + consumer) % 2 == 0 ? 0
                                        : 2),
        count(kPieces == 2 || first == 2 ? 1 : 2) {}
};

// A CTA's share: 128 keys of one KV head, and the queries that see any of them.
struct Work {
  int sequence;
  int head;
  int first_key;  // of the sequence, in the packed tensor
  int keys;
  int first_query;
  int queries;
  int row;          // of the sequence, where the block of keys begins
  int first_tile;   // of queries, that sees any key of the block
  int query_tiles;  // up to here

  __device__ __forceinline__ Work(const KernelParams& p, const Block& block, bool deterministic)
      : sequence(block.sequence), head(block.head) {
    const Span key_span = p.sequences.rows_of(sequence);
    const Span query_span = p.sequences.columns_of(sequence);
    first_key = key_span.first;
    keys = key_span.length;
    first_query = query_span.first;
    queries = query_span.length;
    // The block with the most queries first; deterministic, the one that adds first.
    const int last_rank = (keys - 1) / kBlockKeys;
    row = (p.causal && deterministic ? last_rank - block.rank : block.rank) * kBlockKeys;
    first_tile = p.causal ? max(0, row - (keys - queries)) / kQueries : 0;
    query_tiles = (queries + kQueries - 1) / kQueries;
  }
  // Where the sequence's tiles begin among all.
  __device__ __forceinline__ int tile_base() const {
    return (first_query + kQueries * sequence) / kQueries;
  }
  // How many blocks of keys add to tile m before this one, when they take turns. Full: those with
  // lower keys. Causal: those with higher ones that the tile sees. Every block begins at its
  // diagonal, and so they come by a tile in that order of themselves.
  __device__ __forceinline__ int turn(int m, bool causal) const {
    const int block = row / kBlockKeys;
    if (!causal) return block;
    const int seen = min(keys, keys - queries + (m + 1) * kQueries);
    return (seen - 1) / kBlockKeys - block;
  }
};

}  // namespace flashmla::sm90::dense_prefill_backward
