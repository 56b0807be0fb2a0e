// Tensor maps and launch of sparse prefill with few heads, for one element type.
#pragma once

#include <algorithm>

#include "../../../common/shared_memory.h"
#include "../../../common/tensor_map.h"
#include "../instances.h"
#include "kernel.cuh"

namespace flashmla::sm90::sparse_prefill::few_heads {

template <class T, int kHeads>
void launch_kernel(const Args& a, cudaStream_t stream) {
  const auto queries = static_cast<uint64_t>(a.queries), h_q = static_cast<uint64_t>(a.h_q);
  const CUtensorMap q_map = make_tensor_map_16bit<3>(
      a.q, a.is_bf16, {static_cast<uint64_t>(a.d_qk), h_q, queries},
      {static_cast<uint64_t>(a.q_stride_head), static_cast<uint64_t>(a.q_stride_query)},
      {kPieceCols, kHeads, 1});
  const CUtensorMap out_map = make_tensor_map_16bit<3>(
      a.out, a.is_bf16, {kDimV, h_q, queries}, {kDimV, h_q * kDimV}, {kPieceCols, kHeads, 1});
  KernelParams p;
  p.items = a.queries;
  p.h_q = a.h_q;
  p.d_qk = a.d_qk;
  p.topk = a.topk;
  p.scale_log2 = a.softmax_scale * 1.4426950408889634f;
  p.scale = a.softmax_scale;
  p.lse_unit = a.lse_base_2 ? 1.f : 0.6931471805599453f;
  p.kv = static_cast<const uint8_t*>(a.kv);
  p.kv_stride16 = static_cast<uint32_t>(a.kv_stride * static_cast<int64_t>(sizeof(T)) / 16);
  p.tokens = static_cast<uint32_t>(std::min<int64_t>(a.tokens, int64_t{1} << 31));
  p.indices = a.indices;
  p.indices_stride = a.indices_stride;
  p.topk_length = a.topk_length;
  p.attn_sink = a.attn_sink;
  p.out = a.out;
  p.max_logits = a.max_logits;
  p.lse = a.lse;

  constexpr int kShared = sizeof(SharedStorage<T, kHeads>);
  allow_shared_memory<&few_heads_kernel<T, kHeads>>(kShared);
  const int grid = std::min(p.items, a.sms);
  few_heads_kernel<T, kHeads><<<grid, kThreads, kShared, stream>>>(p, q_map, out_map);
  FLASHMLA_CUDA_CHECK(cudaGetLastError());
}

template <class T>
void launch(const Args& a, cudaStream_t stream) {
  (a.h_q <= 8    ? launch_kernel<T, 8>
   : a.h_q <= 16 ? launch_kernel<T, 16>
                 : launch_kernel<T, kFewHeads>)(a, stream);
}

}  // namespace flashmla::sm90::sparse_prefill::few_heads
