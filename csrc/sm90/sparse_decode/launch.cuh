// Launch of the sparse decode kernel for one element type and cache format.
#pragma once

#include <algorithm>
#include <climits>

#include "../../common/cuda_check.h"
#include "instances.h"
#include "kernel.cuh"

namespace flashmla::sm90::sparse_decode {

constexpr int kLargestCluster = 16;  // more than 8 have to be allowed

// Whether so many clusters run side by side: then those of one list end together.
template <class Kernel>
bool fits_at_once(Kernel kernel, const cudaLaunchConfig_t& config, int clusters) {
  FLASHMLA_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  int most = 0;
  FLASHMLA_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&most, kernel, &config));
  return clusters <= most;
}

template <class T, template <class> class Producer>
void launch_kernel(const Args& a, cudaStream_t stream) {
  KernelParams p;
  p.row_tiles = row_tiles(a.h_q);
  p.splits = a.splits;
  p.items = a.queries * a.splits * p.row_tiles;
  p.s_q = a.s_q;
  p.h_q = a.h_q;
  p.topk = a.topk;
  p.scale_log2 = a.softmax_scale * 1.4426950408889634f;
  p.q = a.q;
  p.q_stride_query = a.q_stride_query;
  p.q_stride_head = a.q_stride_head;
  p.k_cache = static_cast<const uint8_t*>(a.k_cache);
  p.page = cutlass::FastDivmod(a.page);
  p.page_stride16 = static_cast<uint32_t>(a.page_stride_bytes / 16);
  p.tokens = static_cast<uint32_t>(std::min<int64_t>(a.tokens, int64_t{1} << 31));
  p.indices = a.indices;
  p.indices_stride = a.indices_stride;
  p.topk_length = a.topk_length;
  p.queries_a_length = a.queries_a_length;
  p.attn_sink = a.attn_sink;
  p.out = a.out;
  p.lse = a.lse;
  p.out_partial = a.out_partial;
  p.lse_partial = a.lse_partial;

  constexpr int kShared = sizeof(SharedStorage<T>);
  const auto kernel = &sparse_decode_kernel<T, Producer>;
  FLASHMLA_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(a.splits), 1, 1};
  p.merges = false;
  if (a.splits > 1 && a.splits <= kLargestCluster && (a.splits & (a.splits - 1)) == 0) {
    config.gridDim = dim3(p.items);
    config.attrs = &cluster;
    config.numAttrs = 1;
    p.merges = fits_at_once(kernel, config, p.items / a.splits);
  }
  if (!p.merges) {
    config.gridDim = dim3(std::min(p.items, a.sms));
    config.numAttrs = 0;
  }
  FLASHMLA_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, p));
  if (a.splits > 1 && !p.merges) launch_combine(a, stream);
}

}  // namespace flashmla::sm90::sparse_decode
