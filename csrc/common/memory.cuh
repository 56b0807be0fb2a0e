// Loads and stores of 16 bytes that C++ has no words for.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace flashmla {

// Shared memory by its 32-bit address, where pointer arithmetic would cost registers. `address` is
// a multiple of 16.
__device__ __forceinline__ void store_shared_16(uint32_t address, const uint4& x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

// Global memory that nobody writes meanwhile and this SM reads once, so that L1 does not keep it;
// zeros where the condition is false.
__device__ __forceinline__ uint4 load_16_once(const void* from, bool condition) {
  uint4 x = make_uint4(0, 0, 0, 0);
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %5, 0;\n"
      "@p ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];}"
      : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
      : "l"(from), "r"(static_cast<int>(condition)));
  return x;
}

// The same for one float.
__device__ __forceinline__ float load_float_once(const void* from, bool condition) {
  float x = 0.f;
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %2, 0;\n"
      "@p ld.global.nc.L1::no_allocate.f32 %0, [%1];}"
      : "+f"(x)
      : "l"(from), "r"(static_cast<int>(condition)));
  return x;
}

// Starts a copy of 16 bytes to shared memory by its 32-bit address, past L1, for which L2 may fetch
// the kAround bytes around them, 128 or 256; zeros, and no access to global memory, where the
// condition is false.
template <int kAround = 256>
__device__ __forceinline__ void start_copy_16(uint32_t to, const void* from, bool condition) {
  static_assert(kAround == 128 || kAround == 256);
  const int bytes = condition ? 16 : 0;
  if constexpr (kAround == 128) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(bytes)
                 : "memory");
  }
}

}  // namespace flashmla
