// Launch of a kernel over lists: splits of a list as a cluster where that can be, neighbouring row
// tiles as a cluster where they work in pairs.
#pragma once

#include <algorithm>
#include <atomic>

#include "../../common/cuda_check.h"
#include "../../common/shared_memory.h"
#include "instances.h"
#include "params.cuh"

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

// pairs: there is an even number of row tiles, lists are whole, and row tiles work in pairs.
template <auto kKernel>
void launch_lists(const Args& a, int threads, int shared, bool pairs, cudaStream_t stream) {
  KernelParams p = list_params(a);
  allow_shared_memory<kKernel>(shared);
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
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
  if (pairs) {
    cluster.val.clusterDim = {2, 1, 1};
    config.gridDim = dim3(std::min(p.items, a.sms / 2 * 2));
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  FLASHMLA_CUDA_CHECK(cudaLaunchKernelEx(&config, kKernel, p));
  if (a.splits > 1 && !p.merges) launch_combine(a, stream);
}

}  // namespace flashmla::sm90::sparse_decode
