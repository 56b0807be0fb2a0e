// Shapes, shared memory, barriers and parameters of the sparse MLA decode kernel, which serves
// dense decode over an FP8 cache as well.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/fast_math.h>

#include "../../common/mma.cuh"
#include "../schedule.h"
#include "launch.h"

namespace flashmla::sm90::sparse_decode {

constexpr int kRows = kRowsACta;   // heads of one query a CTA: one wgmma tile
constexpr int kTokens = 64;        // chosen tokens a tile
constexpr int kDimQk = 576;        // 512 latent (NoPE) + 64 RoPE
constexpr int kDimV = 512;         // the latent is also the value
constexpr int kHalfV = kDimV / 2;  // output columns a consumer warpgroup owns
constexpr int kPieceCols = 64;     // 128 bytes a row, the widest swizzle
constexpr int kPieces = kDimQk / kPieceCols;
constexpr int kPiecesHalf = kHalfV / kPieceCols;
constexpr int kPieceElements = kTokens * kPieceCols;
constexpr int kPieceBytes = kPieceElements * 2;
constexpr int kStages = 2;             // places for the NoPE part of a tile
constexpr int kRopeStages = 3;         // places for its RoPE part, and then for its probabilities
constexpr int kProducerThreads = 256;  // two warpgroups that fetch and convert
constexpr int kConsumerThreads = 256;  // two warpgroups that multiply
constexpr int kThreads = kProducerThreads + kConsumerThreads;
constexpr int kWarps = 4;                       // of a warpgroup
constexpr int kTokensAWarp = kTokens / kWarps;  // each producer warpgroup fetches half of V
// Registers a thread after the warpgroups have traded them: 512 for one thread of each.
constexpr int kRegistersProducer = 64;
constexpr int kRegistersConsumer = 192;
static_assert(2 * (kRegistersProducer + kRegistersConsumer) <= 512, "the CTA's registers");

// The NoPE part of a tile is filled and comes free by halves: the columns of V that consumer 0 owns
// and those that consumer 1 owns.
constexpr int kHalves = 2;

// Where column c of Q and K lies in shared memory. 16 FP8 codes are what one load of a thread
// brings, and they become two 16-byte chunks: the first goes to an even piece, the second to the
// odd piece behind it, so that neighbouring threads store to neighbouring chunks, free of bank
// conflicts. Scores don't mind in which order columns are summed as long as Q has the same; the
// epilogue puts the columns of O right again.
//   NoPE column 128 g + 16 i + 8 h + e -> piece 2 g + h, chunk i, element e
//   RoPE column 8 i + e                -> piece 8,       chunk i, element e
// In a piece [64 rows, 8 chunks] chunk i of row r stands at i ^ (r % 8).
__device__ __forceinline__ int chunk_offset_bytes(int piece, int row, int chunk) {
  return piece * kPieceBytes + row * 128 + ((chunk ^ (row % 8)) * 16);
}

// Barriers between warps of this CTA, as CUTLASS numbers them: behind its own eight, of sixteen.
enum BarrierId : uint32_t {
  kProbabilitiesEven = 1,  // P of an even tile is published: its owner arrives, the other waits
  kProbabilitiesOdd = 2,
  kRowSums = 3,  // both consumers have left their row sums
  kOwn = 4,      // all of consumer 0 have come this far; 5 is consumer 1's
  kMeeting = 6   // nobody needs the tiles any more: producers arrive, consumers wait
};

// A warp's share of which tokens of a tile count: bit i for its token i.
using ValidBits = uint16_t;
static_assert(kTokensAWarp == 16, "as many bits as a warp has tokens");

template <class T>
struct SharedStorage {
  alignas(1024) T q[kPieces * kPieceElements];                          // [9 pieces][64 rows][64]
  alignas(1024) T kv[kStages][kHalves * kPiecesHalf * kPieceElements];  // [8][64 tokens][64] each
  // The RoPE part, [64 tokens][64], until the scores are done; then P, [64 rows][64 tokens].
  alignas(1024) T rope[kRopeStages][kPieceElements];
  alignas(8) ValidBits valid[kRopeStages][kWarps];
  float row_max[2][kRows];     // by parity of the tile
  float row_alpha[2][kRows];   // what the tile rescales O by
  float row_sum[2][2][kRows];  // by parity of the item, by consumer
  uint64_t q_empty;
  uint64_t kv_full[kStages][kHalves];
  uint64_t kv_empty[kStages][kHalves];
  uint64_t rope_full[kRopeStages];
  uint64_t rope_empty[kRopeStages];
};
static_assert(sizeof(SharedStorage<cutlass::half_t>) <= 232448, "227 KB a CTA");

// What dense decode has in place of lists: all tokens of a request up to its length.
struct Pages {
  int rows;  // query rows of a request: the heads of all its queries
  int batch;
  bool causal;
  uint32_t blocks;         // in the cache
  const int* block_table;  // [batch, max_blocks]
  int64_t block_table_stride;
  int max_tokens;  // that the block table has room for
  const int* cache_seqlens;
  const PlanRow* plan;
  int plan_stride;  // rows from one part to the next
  const int* num_splits;
  Partials partials;
  bool pairs;  // neighbouring CTAs share their tiles, and so walk the same ones
};

// Whether results are of a whole list, or of a part. A kernel for either has code that is never run
// and stands in the way of the rest.
enum class Parts { kWhole, kSplit, kEither };

struct KernelParams {
  int items;  // queries * splits * row_tiles; a CTA takes every gridDim.x-th
  cutlass::FastDivmod row_tiles;
  cutlass::FastDivmod splits;
  int s_q;
  cutlass::FastDivmod by_s_q;
  int h_q;
  int topk;
  float scale_log2;  // softmax_scale * log2(e): scores go straight to exp2
  const void* q;     // [queries, h_q, 576]; of pages [batch, rows, 576]
  int64_t q_stride_query, q_stride_head;
  const uint8_t* k_cache;
  cutlass::FastDivmod page;
  uint32_t page_stride16;  // in units of 16 bytes
  uint32_t tokens;         // indices from here on point to nothing
  const int* indices;      // [queries, topk]
  int64_t indices_stride;
  const int* topk_length;
  cutlass::FastDivmod queries_a_length;
  const float* attn_sink;  // [h_q]
  void* out;
  float* lse;
  ListPartials list_partials;
  Pages pages;
};

}  // namespace flashmla::sm90::sparse_decode
