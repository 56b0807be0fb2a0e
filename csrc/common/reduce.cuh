// Adding to float32 numbers in global memory without asking what they were.
#pragma once

namespace flashmla {

// *to += value, element by element, 16 bytes at a time. The compiler's atomicAdd(float4*) waits for
// the old values even where nobody looks at them.
__device__ __forceinline__ void add_to_global(float4* to, const float4& value) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(value.x),
               "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
}

}  // namespace flashmla
