// Launch of the sparse decode kernel for one element type and cache format. A producer that works
// in pairs wants an even number of row tiles, and of lists that they are whole.
#pragma once

#include <algorithm>
#include <atomic>
#include <climits>

#include "../../common/cuda_check.h"
#include "../../common/shared_memory.h"
#include "instances.h"
#include "kernel.cuh"

namespace flashmla::sm90::sparse_decode {

constexpr int kLargestCluster = 16;  // more than 8 have to be allowed

// How many clusters of a size run side by side on the current device. Asking costs microseconds, so
// each kernel remembers the answers of the first devices.
template <auto kKernel>
int most_clusters(const cudaLaunchConfig_t& config, int size) {
  constexpr int kDevices = 16;
  static std::atomic<int> known[kDevices][kLargestCluster + 1];
  int device = 0;
  FLASHMLA_CUDA_CHECK(cudaGetDevice(&device));
  if (device < kDevices) {
    const int most = known[device][size].load(std::memory_order_relaxed);
    if (most > 0) return most;
  }
  FLASHMLA_CUDA_CHECK(
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  int most = 0;
  FLASHMLA_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&most, kKernel, &config));
  if (device < kDevices) known[device][size].store(most, std::memory_order_relaxed);
  return most;
}

inline KernelParams common_params(const Common& a) {
  KernelParams p{};
  p.row_tiles = row_tiles(a.rows);
  p.s_q = a.s_q;
  p.h_q = a.h_q;
  p.scale_log2 = a.softmax_scale * 1.4426950408889634f;
  p.q = a.q;
  p.q_stride_query = a.q_stride_request;
  p.q_stride_head = a.q_stride_row;
  p.k_cache = static_cast<const uint8_t*>(a.k_cache);
  p.page = cutlass::FastDivmod(a.page);
  p.page_stride16 = static_cast<uint32_t>(a.page_stride_bytes / 16);
  p.tokens = static_cast<uint32_t>(std::min<int64_t>(a.blocks * a.page, int64_t{1} << 31));
  p.attn_sink = a.attn_sink;
  p.out = a.out;
  p.lse = a.lse;
  return p;
}

template <class T, template <class, class> class Producer>
void launch_lists(const Args& a, cudaStream_t stream) {
  KernelParams p = common_params(a);
  p.splits = a.splits;
  p.items = a.requests * a.splits * p.row_tiles;
  p.topk = a.topk;
  p.indices = a.indices;
  p.indices_stride = a.indices_stride;
  p.topk_length = a.topk_length;
  p.queries_a_length = a.queries_a_length;
  p.out_partial = a.out_partial;
  p.lse_partial = a.lse_partial;

  constexpr int kShared = sizeof(SharedStorage<T>);
  constexpr auto kKernel = &sparse_decode_kernel<T, ListSource, Producer>;
  allow_shared_memory<kKernel>(kShared);
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
    // Only if all run side by side: then those of one list end together.
    p.merges = p.items / a.splits <= most_clusters<kKernel>(config, a.splits);
  }
  if (!p.merges) {
    config.gridDim = dim3(std::min(p.items, a.sms));
    config.numAttrs = 0;
  }
  if (Producer<T, ListSource>::kIsPair) {
    cluster.val.clusterDim = {2, 1, 1};
    config.gridDim = dim3(std::min(p.items, a.sms / 2 * 2));
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  FLASHMLA_CUDA_CHECK(cudaLaunchKernelEx(&config, kKernel, p));
  if (a.splits > 1 && !p.merges) launch_combine(a, stream);
}

template <class T, template <class, class> class Producer>
void launch_pages(const PagedArgs& a, cudaStream_t stream) {
  KernelParams p = common_params(a);
  Pages& pages = p.pages;
  pages.rows = a.rows;
  pages.batch = a.requests;
  pages.causal = a.causal;
  pages.blocks = static_cast<uint32_t>(a.blocks);
  pages.block_table = a.block_table;
  pages.block_table_stride = a.block_table_stride;
  // Room for the positions of a last tile that is not full.
  pages.max_tokens =
      static_cast<int>(std::min<int64_t>(int64_t{a.max_blocks} * a.page, INT_MAX - 2 * kTokens));
  pages.cache_seqlens = a.cache_seqlens;
  pages.plan = reinterpret_cast<const PlanRow*>(a.plan);
  pages.plan_stride = a.plan_stride;
  pages.num_splits = a.num_splits;
  pages.slots = a.partials.slots;
  pages.pairs = Producer<T, PagedSource>::kIsPair;
  p.out_partial = a.partials.out;
  p.lse_partial = a.partials.lse;

  constexpr int kShared = sizeof(SharedStorage<T>);
  constexpr auto kKernel = &sparse_decode_kernel<T, PagedSource, Producer>;
  allow_shared_memory<kKernel>(kShared);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(p.row_tiles, a.parts);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {2, 1, 1};
  config.attrs = &cluster;
  config.numAttrs = pages.pairs ? 1 : 0;
  FLASHMLA_CUDA_CHECK(cudaLaunchKernelEx(&config, kKernel, p));
}

}  // namespace flashmla::sm90::sparse_decode
