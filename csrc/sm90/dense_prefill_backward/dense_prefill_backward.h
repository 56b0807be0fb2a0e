// What api_mha.cpp may call: plain pointers and numbers, no CuTe.
#pragma once

#include "../dense_prefill/dense_prefill.h"

namespace flashmla::sm90 {

// Rows of a tile of queries. What backward keeps for itself a query, it keeps in tiles of these:
// sequence i begins at the tile (cu_seqlens_q[i] + 64 * i) / 64, so that none shares one.
constexpr int kTileQueries = 64;
// Integers a tile and head: whose turn it is to add, for each of the two consumers; and, in the
// first tile of a sequence, how many of its blocks of keys are done.
constexpr int kCounters = 3;

struct DensePrefillBackwardArgs {
  DensePrefillArgs forward;  // its inputs, out and lse
  Rows d_out;                // [total_q, h_q, 128]
  const float* d_lse;        // [total_q, h_q], or null
  bool deterministic;
  void* dq;        // [total_q, h_q, d_qk]
  void* dk;        // [total_kv, h_kv, d_qk]
  void* dv;        // [total_kv, h_kv, 128]
  int tiles;       // of queries, for one head: at least total_q / 64 + batch + 2
  float* lse2;     // [h_q, tiles, 64]: base 2
  float* delta;    // [h_q, tiles, 64]: rowsum(d_out * out) - d_lse
  float* dq_sums;  // [h_q, tiles, 64 * d_qk]: unscaled, in the order of the accumulators
  int* counters;   // [h_q, tiles, kCounters]
};
void launch_dense_prefill_backward(const DensePrefillBackwardArgs& args, cudaStream_t stream);

}  // namespace flashmla::sm90
