// What api_sparse.cpp may call of sparse decode: plain pointers and numbers, no CuTe.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace flashmla::sm90::sparse_decode {

enum class Cache { kFp8, kPlain };  // 656 bytes a token, or 576 numbers of q's type

struct Args {
  Cache cache;
  bool is_bf16;  // of q and out, and of a plain cache
  int queries;   // batch * s_q: each has its own list of tokens
  int s_q;
  int h_q;
  int topk;
  int splits;  // of each list; merged by a cluster of them (merge.cuh), else by a second kernel
  float softmax_scale;
  const void* q;  // [queries, h_q, 576]
  int64_t q_stride_query, q_stride_head;
  const void* k_cache;  // [blocks, page, 1, 656 bytes or 576 numbers]
  int64_t page_stride_bytes;
  int page;
  int64_t tokens;      // blocks * page
  const int* indices;  // [queries, topk]
  int64_t indices_stride;
  const int* topk_length;  // [queries / queries_a_length], or null
  int queries_a_length;
  const float* attn_sink;  // [h_q], or null
  void* out;               // [queries, h_q, 512]
  float* lse;              // [batch, h_q, s_q]
  float* out_partial;      // [items, 64, 512] in the order of the accumulators; splits > 1 only
  float* lse_partial;      // [items, 64], base 2
  int sms;
};

// Query rows that one CTA computes, and so how many partial results there are:
// items = queries * row_tiles(h_q) * splits, in this order.
constexpr int kRowsACta = 64;
constexpr int row_tiles(int h_q) {
  return (h_q + kRowsACta - 1) / kRowsACta;
}

void launch(const Args& args, cudaStream_t stream);

}  // namespace flashmla::sm90::sparse_decode
