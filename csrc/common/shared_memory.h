// Lets a kernel have more dynamic shared memory than the 48 KB that need no permission.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "cuda_check.h"

namespace flashmla {

// For the current device. Asking costs half a microsecond, so each kernel remembers the devices on
// which it has asked.
template <auto kKernel>
void allow_shared_memory(int bytes) {
  static std::atomic<uint64_t> allowed{0};  // a bit a device
  int device = 0;
  FLASHMLA_CUDA_CHECK(cudaGetDevice(&device));
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (allowed.load(std::memory_order_relaxed) & bit) return;
  FLASHMLA_CUDA_CHECK(
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  allowed.fetch_or(bit, std::memory_order_relaxed);
}

}  // namespace flashmla
