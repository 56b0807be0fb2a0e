// A meeting of all blocks of a grid. They must all run at the same time: a cooperative launch.
#pragma once

#include <cuda_runtime.h>

namespace flashmla {

// The counter may hold anything before: every meeting turns its highest bit over.
struct GridArrival {
  unsigned before;
  bool last;  // of all blocks: there is nobody to wait for
};

__device__ __forceinline__ bool has_turned(unsigned before, unsigned now) {
  return ((before ^ now) & 0x80000000u) != 0;
}

// One thread a block arrives, once what its block has written is known to it, and waits.
__device__ __forceinline__ GridArrival arrive_in_grid(unsigned* counter, unsigned blocks,
                                                      bool first) {
  __threadfence();
  const unsigned add = first ? 0x80000000u - (blocks - 1) : 1u;
  const unsigned before = atomicAdd(counter, add);
  return {before, has_turned(before, before + add)};
}

__device__ __forceinline__ void wait_in_grid(unsigned* counter, const GridArrival& arrival) {
  if (!arrival.last) {
    while (!has_turned(arrival.before, *const_cast<volatile unsigned*>(counter))) {
    }
  }
  __threadfence();
}

}  // namespace flashmla
