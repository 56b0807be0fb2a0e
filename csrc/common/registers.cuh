// Advice to the compiler about registers.
#pragma once

#include <cuda_runtime.h>

namespace flashmla {

// What is computed from `x` is computed anew from here on. In a loop it keeps the compiler from
// computing a dozen addresses ahead of it, only to spill them.
__device__ __forceinline__ void forget(int& x) {
  asm volatile("" : "+r"(x));
}

// `x`, which is the same in all lanes of the warp, so that the compiler knows: what is computed
// from it, addresses of matrix operands above all, then stays in uniform registers.
__device__ __forceinline__ int uniform(int x) {
  return __shfl_sync(0xffffffffu, x, 0);
}

}  // namespace flashmla
