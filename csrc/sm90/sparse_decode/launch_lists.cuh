// Launch of a kernel over lists: where these are split and each CTA has an SM, the CTAs merge what
// they found by themselves; neighbouring row tiles are a cluster where they work in pairs.
#pragma once

#include <algorithm>

#include "../../common/cuda_check.h"
#include "../../common/shared_memory.h"
#include "instances.h"
#include "params.cuh"

namespace flashmla::sm90::sparse_decode {

// pairs: there is an even number of row tiles, lists are whole, and row tiles work in pairs.
template <auto kKernel>
void launch_lists(const Args& a, int threads, int shared, bool pairs, cudaStream_t stream) {
  const KernelParams p = list_params(a);
  allow_shared_memory<kKernel>(shared);
  // Of few splits each CTA would merge too much by itself.
  const int warps_of_rows = std::min(4, (a.h_q + 15) / 16);
  const bool meets = a.splits > 1 && a.splits >= 2 * warps_of_rows && p.items <= a.sms;
  unsigned* const meeting = meets ? grid_counter(stream) : nullptr;

  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  if (pairs) {
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {2, 1, 1};
  } else {
    attributes[1].id = cudaLaunchAttributeCooperative;
    attributes[1].val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(std::min(p.items, pairs ? a.sms / 2 * 2 : a.sms));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = pairs || meeting != nullptr ? 2 : 1;
  FLASHMLA_CUDA_CHECK(cudaLaunchKernelEx(&config, kKernel, p, meeting));
  if (a.splits > 1 && meeting == nullptr) launch_combine(a, stream);
}

}  // namespace flashmla::sm90::sparse_decode
