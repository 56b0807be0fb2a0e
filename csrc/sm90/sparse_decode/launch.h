// What api_sparse.cpp may call of sparse decode: plain pointers and numbers, no CuTe.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../launch.h"

namespace flashmla::sm90::sparse_decode {

enum class Cache { kFp8, kPlain };  // 656 bytes a token, or 576 numbers of q's type

// Of both ways to name tokens: a list for each query, or pages for each request.
struct Common {
  int requests;  // b * s_q queries with a list each, or b
  int rows;      // of a request: h_q, or s_q * h_q
  int s_q;
  int h_q;
  float softmax_scale;
  const void* q;  // [requests, rows, 576]
  int64_t q_stride_request, q_stride_row;
  const void* k_cache;  // [blocks, page, 1, 656 bytes or 576 numbers]
  int64_t page_stride_bytes;
  int64_t blocks;
  int page;
  const float* attn_sink;  // [h_q], or null
  void* out;               // [b, s_q, h_q, 512]
  float* lse;              // [b, h_q, s_q]
};

// Partial results of lists that were split, in the order of the accumulators (merge.cuh).
struct ListPartials {
  uint4* out;  // [items, 2 halves, 4 warps, 16 pairs of groups, 32 lanes], 8 float16 each
  // [items, 2 halves, 4 warps, 8 rows]: LSE (base 2) and unit of a row and of the one eight below
  float4* rows;
};
constexpr int kListPartialRowFloats = 512 / 2 + 2 * 2;  // the memory of a row

struct Args : Common {
  Cache cache;
  bool is_bf16;  // of q and out, and of a plain cache
  int topk;
  int splits;  // of each list; merged by CTAs that meet (merge.cuh), else by a second kernel
  const int* indices;  // [requests, topk]
  int64_t indices_stride;
  const int* topk_length;  // [requests / queries_a_length], or null
  int queries_a_length;
  ListPartials partials;  // splits > 1 only
  int sms;
};

// Over an FP8 cache, q and out in bfloat16.
struct PagedArgs : Common {
  bool causal;
  const int* block_table;  // [requests, max_blocks]
  int64_t block_table_stride;
  int max_blocks;
  const int* cache_seqlens;  // [requests]
  int parts;
  const int* plan;  // [parts, plan_stride, 8]
  int plan_stride;
  const int* num_splits;  // [requests + 1]
  Partials partials;      // merged by sm90/combine.cu
};

// Query rows that one CTA computes, and so how many partial results of lists there are:
// items = requests * row_tiles(rows) * splits, in this order.
constexpr int kRowsACta = 64;
constexpr int row_tiles(int rows) {
  return (rows + kRowsACta - 1) / kRowsACta;
}

// Up to so many query rows, pages and lists that are not split have a kernel of their own
// (few_rows.cuh).
constexpr int kFewRows = 32;

void launch(const Args& args, cudaStream_t stream);
void launch(const PagedArgs& args, cudaStream_t stream);

}  // namespace flashmla::sm90::sparse_decode
