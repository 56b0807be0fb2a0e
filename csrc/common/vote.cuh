// A barrier that also answers a question.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/arch/barrier.h>

#include <cstdint>

namespace flashmla {

// What to add to a number that CUTLASS's NamedBarrier is given to have the hardware's own.
constexpr auto kBarriersOfCutlass =
    uint32_t(cutlass::arch::ReservedNamedBarriers::FirstUserBarrier);

// Waits for `threads` threads at barrier `id`, the hardware's own number; true if any of them said
// so. Orders memory among them, as every such barrier does.
__device__ __forceinline__ bool sync_or(uint32_t id, uint32_t threads, bool mine) {
  uint32_t any;
  asm volatile(
      "{.reg .pred p, q; setp.ne.u32 p, %3, 0;\n"
      "barrier.cta.red.or.pred q, %1, %2, p;\n"
      "selp.u32 %0, 1, 0, q;}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(static_cast<uint32_t>(mine))
      : "memory");
  return any != 0;
}

}  // namespace flashmla
