// Tensor maps and launch of the sparse prefill kernel for one element type.
#pragma once

#include <algorithm>

#include "../../common/shared_memory.h"
#include "../../common/tensor_map.h"
#include "instances.h"
#include "kernel.cuh"
#include "params.cuh"

namespace flashmla::sm90::sparse_prefill {

template <class T>
void launch_kernel(const Args& a, cudaStream_t stream) {
  const auto queries = static_cast<uint64_t>(a.queries), h_q = static_cast<uint64_t>(a.h_q);
  const CUtensorMap q_map = make_tensor_map_16bit<3>(
      a.q, a.is_bf16, {static_cast<uint64_t>(a.d_qk), h_q, queries},
      {static_cast<uint64_t>(a.q_stride_head), static_cast<uint64_t>(a.q_stride_query)},
      {kPieceCols, kRows, 1});
  const CUtensorMap out_map = make_tensor_map_16bit<3>(
      a.out, a.is_bf16, {kDimV, h_q, queries}, {kDimV, h_q * kDimV}, {kPieceCols, kRows, 1});
  KernelParams p;
  p.row_tiles = (a.h_q + kRows - 1) / kRows;
  p.items = a.queries * p.row_tiles;
  set_common<T>(p, a);
  p.q = a.q;
  p.q_stride_query = a.q_stride_query;
  p.q_stride_head = a.q_stride_head;

  constexpr int kShared = sizeof(SharedStorage<T>);
  const auto kernel = &sparse_prefill_kernel<T>;
  allow_shared_memory<&sparse_prefill_kernel<T>>(kShared);
  // As many whole queries at a time as there are SMs for.
  const int grid = std::min(p.items, std::max(1, a.sms / p.row_tiles) * p.row_tiles);
  kernel<<<grid, kThreads, kShared, stream>>>(p, q_map, out_map);
  FLASHMLA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace flashmla::sm90::sparse_prefill
