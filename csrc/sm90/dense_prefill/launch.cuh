// Tensor maps and launch of the dense prefill kernel for one element type and head size.
#pragma once

#include <algorithm>

#include "../../common/log_base.h"
#include "../../common/shared_memory.h"
#include "kernel.cuh"
#include "row_map.h"

namespace flashmla::sm90::dense_prefill {

template <class T, int kDimQk>
void launch(const DensePrefillArgs& a, cudaStream_t stream) {
  // A head's 384 bytes of a key would be 512 in pieces of 256, and another head's among them.
  constexpr auto kPromotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  const CUtensorMap q_map = row_map(a.q, a.is_bf16, kDimQk, kRows, kPromotion);
  const CUtensorMap k_map = row_map(a.k, a.is_bf16, kDimQk, kTokens, kPromotion);
  const CUtensorMap v_map = row_map(a.v, a.is_bf16, kDimV, kPieceTokensV, kPromotion);

  const int h_q = static_cast<int>(a.q.heads);
  const KernelParams p{
      {a.cu_seqlens_q, a.cu_seqlens_kv, static_cast<int>(a.q.tokens), static_cast<int>(a.k.tokens),
       a.batch},
      {a.work, a.batch},
      h_q,
      h_q / static_cast<int>(a.k.heads),
      a.causal,
      a.softmax_scale * kLog2E,
      a.out,
      a.lse,
  };
  launch_work_plan(p.sequences, kBlockRows, p.plan, stream);

  constexpr int kShared = sizeof(SharedStorage<T, kDimQk>);
  allow_shared_memory<dense_prefill_kernel<T, kDimQk>>(kShared);
  int device, sms;
  FLASHMLA_CUDA_CHECK(cudaGetDevice(&device));
  FLASHMLA_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  const int64_t blocks = most_blocks(p.sequences, kBlockRows) * h_q;
  const int grid = static_cast<int>(std::min<int64_t>(sms, blocks));
  dense_prefill_kernel<T, kDimQk><<<grid, kThreads, kShared, stream>>>(p, q_map, k_map, v_map);
  FLASHMLA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace flashmla::sm90::dense_prefill
