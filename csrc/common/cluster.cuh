// Stores into the shared memory of another CTA of the cluster.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace flashmla {

// 16 bytes to an address there, which an mbarrier there counts when they have arrived.
__device__ __forceinline__ void store_remote_16(uint32_t address, const uint4& x,
                                                uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(address),
      "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(barrier)
      : "memory");
}

}  // namespace flashmla
