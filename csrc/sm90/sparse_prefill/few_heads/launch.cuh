// Tensor maps and launch of sparse prefill with few heads, for one element type.
#pragma once

#include <algorithm>

#include "../../../common/shared_memory.h"
#include "../../../common/tensor_map.h"
#include "../instances.h"
#include "../params.cuh"
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
  set_common<T>(p, a);
  p.beyond_l2 = a.tokens * a.kv_stride * static_cast<int64_t>(sizeof(T)) > a.l2_bytes;

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
