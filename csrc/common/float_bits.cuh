// Float32 arithmetic for which the kernels' flags are too loose, and bits of other formats.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace flashmla {

// a * b rounded once. The library is compiled with -ftz=true, which flushes what is below 2^-126.
__device__ __forceinline__ float multiply_with_denormals(float a, float b) {
  float product;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
  return product;
}

// The bfloat16 nearest to x, ties to even, as bits; every NaN becomes 0x7fc0. In integers, since
// the conversion instruction has a NaN of its own.
__device__ __forceinline__ uint32_t bfloat16_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

}  // namespace flashmla
