// Shapes, shared memory and barriers of the backward kernel.
#pragma once

#include <cutlass/arch/barrier.h>

#include "../../common/mma.cuh"
#include "../dense_prefill/order.cuh"
#include "dense_prefill_backward.h"

namespace flashmla::sm90::dense_prefill_backward {

using Barrier = cutlass::arch::ClusterTransactionBarrier;  // mbarrier
using dense_prefill::Block;
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

// Hardware barriers between the warps of a consumer.
enum BarrierId : uint32_t { kCleared = 0, kOwnTurn = 2 };  // and one more, of consumer 1

template <class T, int kDimQk>
struct SharedStorage {
  alignas(1024) T k[kPiecesQk<kDimQk>][kBlockKeys * kPieceCols];  // [d/64][128 keys][64]
  alignas(1024) T v[kPiecesV][kBlockKeys * kPieceCols];           // [2][128 keys][64]
  // [2 stages][d/64][64 queries][64] and [2 stages][2][64 queries][64]
  alignas(1024) T q[kStages][kPiecesQk<kDimQk> * kQueries * kPieceCols];
  alignas(1024) T d_out[kStages][kPiecesV * kQueries * kPieceCols];
  alignas(1024) T ds[2][kBlockKeys * kQueries];  // [128 keys][64 queries], by parity of the tile
  alignas(16) float lse2[kStages][kQueries];
  alignas(16) float delta[kStages][kQueries];
  uint64_t kv_full;
  uint64_t q_full[kStages], q_empty[kStages];
  uint64_t d_out_full[kStages], d_out_empty[kStages];
  uint64_t ds_full[2];
};
static_assert(sizeof(SharedStorage<cutlass::half_t, 192>) <= 232448, "227 KB a CTA");

struct KernelParams {
  Sequences sequences;  // rows: keys; columns: queries
  WorkPlan plan;
  int h_kv;
  int group;  // query heads to a KV head
  bool causal;
  bool deterministic;
  float scale;
  float scale_log2;  // scale * log2(e)
  int tiles;
  const float* lse2;   // [h_q, tiles, 64]
  const float* delta;  // [h_q, tiles, 64]
  float* dq_sums;      // [h_q, tiles, d_qk / 64, 64 * 64]
  int* turns;          // [h_q, tiles, d_qk / 64]
  void* dk;            // [total_kv, h_kv, d_qk]
  void* dv;            // [total_kv, h_kv, 128]
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

  __device__ __forceinline__ Work(const KernelParams& p, const Block& block)
      : sequence(block.sequence), head(block.head), row(block.rank * kBlockKeys) {
    const Span key_span = p.sequences.rows_of(sequence);
    const Span query_span = p.sequences.columns_of(sequence);
    first_key = key_span.first;
    keys = key_span.length;
    first_query = query_span.first;
    queries = query_span.length;
    first_tile = p.causal ? max(0, row - (keys - queries)) / kQueries : 0;
    query_tiles = (queries + kQueries - 1) / kQueries;
  }
  // Where the sequence's tiles begin among all.
  __device__ __forceinline__ int tile_base() const {
    return (first_query + kQueries * sequence) / kQueries;
  }
};

}  // namespace flashmla::sm90::dense_prefill_backward
