// A meeting of all blocks of a grid. They must all run at the same time: a cooperative launch.
#pragma once

#include <cuda_runtime.h>

namespace flashmla {

// One thread a block arrives, once what its block has written is known to it, and waits. The
// counter may hold anything before: every meeting turns its highest bit over.
__device__ __forceinline__ unsigned arrive_in_grid(unsigned* counter, unsigned blocks, bool first) {
  __threadfence();
  return atomicAdd(counter, first ? 0x80000000u - (blocks - 1) : 1u);
}

__device__ __forceinline__ void wait_in_grid(unsigned* counter, unsigned arrived) {
  while (((arrived ^ *const_cast<volatile unsigned*>(counter)) & 0x80000000u) == 0) {
  }
  __threadfence();
}

}  // namespace flashmla
