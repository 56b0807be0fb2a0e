// What api_mha.cpp may call: plain pointers and numbers, no CuTe.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace flashmla::sm90 {

// A tensor [tokens, heads, d] of 16-bit elements; strides in elements, 1 in the last dimension.
struct Rows {
  const void* data;
  int64_t tokens, heads;
  int64_t stride_token, stride_head;
};

struct DensePrefillArgs {
  bool is_bf16;
  bool causal;
  float softmax_scale;
  int d_qk;  // 192 or 128
  int batch;
  Rows q;                    // [total_q, h_q, d_qk]
  Rows k;                    // [total_kv, h_kv, d_qk]
  Rows v;                    // [total_kv, h_kv, 128]
  const int* cu_seqlens_q;   // [batch + 1]
  const int* cu_seqlens_kv;  // [batch + 1]
  void* out;                 // [total_q, h_q, 128]
  float* lse;                // [total_q, h_q]
  int* work;                 // [2 * batch + 4]: room for the work plan
};
void launch_dense_prefill(const DensePrefillArgs& args, cudaStream_t stream);

}  // namespace flashmla::sm90
