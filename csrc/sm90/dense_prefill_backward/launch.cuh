// Tensor maps and launches of backward for one element type and head size.
#pragma once

#include "../../common/log_base.h"
#include "../../common/shared_memory.h"
#include "../dense_prefill/row_map.h"
#include "kernel.cuh"
#include "prepare.cuh"

namespace flashmla::sm90::dense_prefill_backward {

template <class T, int kDimQk, bool kDeterministic>
void run(const KernelParams& p, const CUtensorMap& q_map, const CUtensorMap& k_map,
         const CUtensorMap& v_map, const CUtensorMap& d_out_map, unsigned grid,
         cudaStream_t stream) {
  constexpr int kShared = sizeof(SharedStorage<T, kDimQk>);
  allow_shared_memory<backward_kernel<T, kDimQk, kDeterministic>>(kShared);
  backward_kernel<T, kDimQk, kDeterministic>
      <<<grid, kThreads, kShared, stream>>>(p, q_map, k_map, v_map, d_out_map);
  FLASHMLA_CUDA_CHECK(cudaGetLastError());
}

template <class T, int kDimQk>
void launch(const DensePrefillBackwardArgs& a, cudaStream_t stream) {
  using dense_prefill::row_map;
  const DensePrefillArgs& f = a.forward;
  const CUtensorMap q_map = row_map(f.q, f.is_bf16, kDimQk, kQueries);
  const CUtensorMap k_map = row_map(f.k, f.is_bf16, kDimQk, kBlockKeys);
  const CUtensorMap v_map = row_map(f.v, f.is_bf16, kDimV, kBlockKeys);
  const CUtensorMap d_out_map = row_map(a.d_out, f.is_bf16, kDimV, kQueries);

  const int h_q = static_cast<int>(f.q.heads), h_kv = static_cast<int>(f.k.heads);
  const Sequences sequences{f.cu_seqlens_kv, f.cu_seqlens_q, static_cast<int>(f.k.tokens),
                            static_cast<int>(f.q.tokens), f.batch};
  const KernelParams p{sequences,
                       {f.work, f.batch},
                       h_kv,
                       h_q / h_kv,
                       f.causal,
                       f.softmax_scale,
                       f.softmax_scale * kLog2E,
                       a.tiles,
                       a.lse2,
                       a.delta,
                       a.dq_sums,
                       a.counters,
                       a.dq,
                       a.dk,
                       a.dv};
  dense_prefill::launch_work_plan(sequences, kBlockKeys, p.plan, stream);

  const auto prepare_grid = static_cast<unsigned>(a.tiles) * h_q;
  prepare_kernel<T, kDimQk><<<prepare_grid, kPrepareThreads, 0, stream>>>(
      sequences, static_cast<const T*>(a.d_out.data), a.d_out.stride_token, a.d_out.stride_head,
      static_cast<const T*>(f.out), f.lse, a.d_lse, h_q, a.lse2, a.delta, a.dq_sums, a.counters,
      static_cast<T*>(a.dq));
  FLASHMLA_CUDA_CHECK(cudaGetLastError());

  const auto grid = static_cast<unsigned>(dense_prefill::most_blocks(sequences, kBlockKeys) * h_kv);
  const auto run_kernel = a.deterministic ? &run<T, kDimQk, true> : &run<T, kDimQk, false>;
  run_kernel(p, q_map, k_map, v_map, d_out_map, grid, stream);
}

}  // namespace flashmla::sm90::dense_prefill_backward
