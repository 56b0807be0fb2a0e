// Adding to float32 numbers in global memory without asking what they were.
#pragma once

#include <cute/arch/util.hpp>

namespace flashmla {

// *to += value, element by element, 16 bytes at a time. The compiler's atomicAdd(float4*) waits for
// the old values even where nobody looks at them.
__device__ __forceinline__ void add_to_global(float4* to, const float4& value) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(value.x),
               "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
}

// to[i] += from[i] for `bytes` of float32, both 16-byte aligned, from shared memory and by the copy
// engine: it goes with the thread's next commit, cute::tma_store_arrive().
__device__ __forceinline__ void add_to_global_async(float* to, const float* from, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
      "r"(cute::cast_smem_ptr_to_uint(from)), "r"(bytes)
      : "memory");
}
// Waits until all that this thread committed is in global memory; cute::tma_store_wait waits only
// until it has been read from shared memory.
__device__ __forceinline__ void wait_until_added() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace flashmla
