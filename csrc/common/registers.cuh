// Advice to the compiler about registers.
#pragma once

#include <cuda_runtime.h>

namespace flashmla {

// What is computed from `x` is computed anew from here on. In a loop it keeps the compiler from
// computing a dozen addresses ahead of it, only to spill them.
__device__ __forceinline__ void forget(int& x) {
  asm volatile("" : "+r"(x));
}

}  // namespace flashmla
