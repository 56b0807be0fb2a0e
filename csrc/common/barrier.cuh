// A barrier among some of a CTA's warps that also takes a vote.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace flashmla {

// Waits for `threads` threads at barrier `id` (of sixteen): whether any of them says so.
__device__ __forceinline__ bool any_at_barrier(uint32_t id, uint32_t threads, bool says_so) {
  uint32_t any;
  asm volatile(
      "{.reg .pred p, q; setp.ne.b32 p, %3, 0;\n"
      "barrier.cta.red.or.pred q, %1, %2, p;\n"
      "selp.b32 %0, 1, 0, q;}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(static_cast<uint32_t>(says_so))
      : "memory");
  return any != 0;
}

}  // namespace flashmla
