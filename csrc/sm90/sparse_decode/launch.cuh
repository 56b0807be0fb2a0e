// Launch of the sparse decode kernel for one element type and cache format. A producer that works
// in pairs wants an even number of row tiles, and of lists that they are whole.
#pragma once

#include "kernel.cuh"
#include "launch_lists.cuh"

namespace flashmla::sm90::sparse_decode {

template <class T, template <class, class> class Producer>
void launch_lists(const Args& a, cudaStream_t stream) {
  constexpr bool kPair = Producer<T, ListSource>::kIsPair;
  constexpr int kShared = sizeof(SharedStorage<T>);
  if (kPair || a.splits == 1) {
    constexpr auto kKernel = &sparse_decode_kernel<T, ListSource, Producer, Parts::kWhole>;
    launch_lists<kKernel>(a, kThreads, kShared, kPair, stream);
  } else if constexpr (!kPair) {
    constexpr auto kKernel = &sparse_decode_kernel<T, ListSource, Producer, Parts::kSplit>;
    launch_lists<kKernel>(a, kThreads, kShared, false, stream);
  }
}

template <class T, template <class, class> class Producer>
void launch_pages(const PagedArgs& a, cudaStream_t stream) {
  KernelParams p = page_params(a);
  p.pages.pairs = Producer<T, PagedSource>::kIsPair;

  constexpr int kShared = sizeof(SharedStorage<T>);
  constexpr auto kKernel = &sparse_decode_kernel<T, PagedSource, Producer, Parts::kEither>;
  allow_shared_memory<kKernel>(kShared);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(row_tiles(a.rows), a.parts);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {2, 1, 1};
  config.attrs = &cluster;
  config.numAttrs = p.pages.pairs ? 1 : 0;
  FLASHMLA_CUDA_CHECK(cudaLaunchKernelEx(&config, kKernel, p, nullptr));
}

}  // namespace flashmla::sm90::sparse_decode
