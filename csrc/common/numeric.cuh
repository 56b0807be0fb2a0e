// Single instructions that CUDA C++ has no name for.
#pragma once

namespace flashmla {

// max(x, 0), and NaN for NaN; fmaxf would make that 0.
__device__ __forceinline__ float relu(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace flashmla
