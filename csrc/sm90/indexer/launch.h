// What the FFI may call: the scores of the lightning indexer.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace flashmla::sm90 {

constexpr int kIndexDim = 128;
constexpr int kIndexPage = 64;

struct IndexerArgs {
  const void* q;  // [s_q, heads, 128] e4m3; heads is 32 or 64
  int64_t q_stride_token, q_stride_head;
  int s_q, heads;
  const void* k;  // [s_kv, 128] e4m3
  int64_t k_stride;
  int s_kv;
  const float* k_scale;  // [s_kv]
  const float* weights;  // [s_q, heads]
  const int* start;      // [s_q]
  const int* end;        // [s_q]
  float* logits;         // [s_q, s_kv]
};
void launch_indexer(const IndexerArgs& args, cudaStream_t stream);

struct PagedIndexerArgs {
  const void* q;  // [batch, s_q, heads, 128] e4m3; heads is 32 or 64
  int64_t q_stride_batch, q_stride_token, q_stride_head;
  int batch, s_q, heads;
  const void* cache;  // [blocks, 64 * 128 codes and 64 float32 scales]
  int blocks;
  int64_t page_stride;     // bytes
  const float* weights;    // [batch, s_q, heads]
  const int* block_table;  // [batch, max_blocks]
  int64_t block_table_stride;
  int max_blocks;
  const int* lengths;  // [batch]
  float* logits;       // [batch, s_q, max_blocks * 64]
};
void launch_indexer_paged(const PagedIndexerArgs& args, cudaStream_t stream);

}  // namespace flashmla::sm90
