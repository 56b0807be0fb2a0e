// Tensor maps and launch of the dense decode kernel for one element type.
#pragma once

#include <algorithm>
#include <climits>

#include "../../common/log_base.h"
#include "../../common/shared_memory.h"
#include "../../common/tensor_map.h"
#include "kernel.cuh"

namespace flashmla::sm90::dense_decode {

template <class T>
void launch(const DenseDecodeArgs& a, cudaStream_t stream) {
  const DecodeShape& shape = a.shape;
  const uint64_t rows = shape.rows();
  const CUtensorMap q_map = make_tensor_map_16bit<3>(
      a.q, a.is_bf16,
      {static_cast<uint64_t>(a.d_qk), rows, static_cast<uint64_t>(shape.batch) * shape.h_kv},
      {static_cast<uint64_t>(a.q_stride_row), static_cast<uint64_t>(a.q_stride_batch)},
      {kPieceCols, kRows, 1});
  const CUtensorMap k_map = make_tensor_map_16bit<4>(
      a.k_cache, a.is_bf16,
      {static_cast<uint64_t>(a.d_qk), static_cast<uint64_t>(a.page_block_size),
       static_cast<uint64_t>(shape.h_kv), static_cast<uint64_t>(a.pages)},
      {static_cast<uint64_t>(a.k_stride_token), static_cast<uint64_t>(a.k_stride_head),
       static_cast<uint64_t>(a.k_stride_page)},
      {kPieceCols, static_cast<uint32_t>(std::min(a.page_block_size, kTokens)), 1, 1});

  const int row_tiles = (shape.rows() + kRows - 1) / kRows;
  KernelParams p;
  p.shape = shape;
  p.group = cutlass::FastDivmod(shape.group());
  p.rows = cutlass::FastDivmod(shape.rows());
  p.request_rows = cutlass::FastDivmod(shape.h_kv * shape.rows());
  p.causal = a.causal;
  p.scale_log2 = a.softmax_scale * kLog2E;
  p.block_table = a.block_table;
  p.block_table_stride = a.block_table_stride;
  // Row tiles that share a cache fetch it into L2 ahead of time; for one alone that only displaces
  // what is about to be used.
  p.tiles_ahead = row_tiles == 1 ? 0 : row_tiles == 2 ? 2 : 3;
  p.max_tokens =
      static_cast<int>(std::min<int64_t>(int64_t{a.max_blocks} * a.page_block_size, INT_MAX));
  p.page_shift = __builtin_ctz(a.page_block_size);
  p.cache_seqlens = a.cache_seqlens;
  p.plan = reinterpret_cast<const PlanRow*>(a.plan);
  p.plan_stride = a.plan_stride;
  p.num_splits = a.num_splits;
  p.attn_sink = a.attn_sink;
  p.out = a.out;
  p.lse = a.lse;
  p.partials = a.partials;
  p.meeting = a.meeting;

  constexpr int kShared = sizeof(SharedStorage<T>);
  const auto kernel = &dense_decode_kernel<T>;
  allow_shared_memory<&dense_decode_kernel<T>>(kShared);
  const dim3 grid(row_tiles, shape.h_kv, shape.parts);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = p.meeting != nullptr ? 2 : 1;
  FLASHMLA_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, p, q_map, k_map));
}

}  // namespace flashmla::sm90::dense_decode
