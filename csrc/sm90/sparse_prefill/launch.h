// What api_sparse_prefill.cpp may call of sparse prefill: plain pointers and numbers, no CuTe.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace flashmla::sm90::sparse_prefill {

struct Args {
  bool is_bf16;
  int queries;
  int h_q;
  int d_qk;  // 576, or 512 where there is no RoPE part
  int topk;
  float softmax_scale;
  bool lse_base_2;
  const void* q;  // [queries, h_q, d_qk]
  int64_t q_stride_query, q_stride_head;
  const void* kv;  // [tokens, d_qk]
  int64_t kv_stride;
  int64_t tokens;
  const int* indices;  // [queries, topk]
  int64_t indices_stride;
  const int* topk_length;  // [queries], or null
  const float* attn_sink;  // [h_q], or null
  void* out;               // [queries, h_q, 512]
  float* max_logits;       // [queries, h_q]
  float* lse;              // [queries, h_q]
  int sms;
  int l2_bytes;
};

void launch(const Args& args, cudaStream_t stream);

}  // namespace flashmla::sm90::sparse_prefill
