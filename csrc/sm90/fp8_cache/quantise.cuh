// Quantisation of tiles of 128 values to float8_e4m3 with a float32 scale each, eight values a
// lane.
//
//   scale = max(max|x|, 1e-4) / 448 in float32, rounded up to a power of two if asked
//   code  = x / scale, clamped to +-448 and rounded to the nearest, ties to even
//
// A tile that holds NaN or an infinity gets scale NaN and codes 0x7f, which are NaN.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

#include "../../common/float_bits.cuh"

namespace flashmla::sm90 {

constexpr int kTile = 128;
constexpr int kValuesPerLane = 8;
constexpr int kLanesPerTile = kTile / kValuesPerLane;  // 16: half a warp
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr uint32_t kFloatNaN = 0x7fc00000u;
constexpr uint32_t kFloatInfinity = 0x7f800000u;
constexpr uint32_t kFourNaNCodes = 0x7f7f7f7fu;

// Eight neighbouring values as they lie in memory: 16 bytes of a 16-bit type, 32 of float32.
template <class T>
struct alignas(16) Eight {
  static constexpr int kVectors = sizeof(T) * kValuesPerLane / 16;
  uint4 raw[kVectors];

  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) raw[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
  }
  __device__ __forceinline__ float operator[](int i) const {
    return static_cast<float>(reinterpret_cast<const T*>(raw)[i]);
  }
};

struct Quantised {
  uint2 codes;  // of this lane's eight values, the first in the lowest byte
  float scale;  // of the tile, the same in its 16 lanes
};

// The scale of a tile from its largest absolute value, which is finite.
template <bool kPowerOfTwo>
__device__ __forceinline__ float scale_of(float largest) {
  const float scale = __fdiv_rn(fmaxf(largest, 1e-4f), 448.f);
  if constexpr (!kPowerOfTwo) return scale;
  // Carry the mantissa into the exponent, then drop it: exact for positive normal numbers.
  return __uint_as_float((__float_as_uint(scale) + 0x007fffffu) & 0x7f800000u);
}

// region: quantise
// All 16 lanes of a tile call this together, and the other tile of their warp with them.
template <bool kPowerOfTwo, class T>
__device__ __forceinline__ Quantised quantise(const Eight<T>& x) {
  float v[kValuesPerLane];
  uint32_t largest = 0;  // absolute values compare like their bits, NaN above all
#pragma unroll
  for (int i = 0; i < kValuesPerLane; ++i) {
    v[i] = x[i];
    largest = max(largest, __float_as_uint(v[i]) & 0x7fffffffu);
  }
#pragma unroll
  for (int step = kLanesPerTile / 2; step > 0; step /= 2) {
    largest = max(largest, __shfl_xor_sync(kFullWarp, largest, step));
  }
  if (largest >= kFloatInfinity) {
    return {make_uint2(kFourNaNCodes, kFourNaNCodes), __uint_as_float(kFloatNaN)};
  }
  const float scale = scale_of<kPowerOfTwo>(__uint_as_float(largest));
  // The reciprocal of a power of two is exact, and so is the product with it: scales reach from
  // 2^-22 to 2^120, and a quotient too small for float32 is 0 as a code either way.
  const float inverse = __uint_as_float((254u << 23) - __float_as_uint(scale));
  uint32_t pairs[kValuesPerLane / 2];
#pragma unroll
  for (int i = 0; i < kValuesPerLane; i += 2) {
    const float a = kPowerOfTwo ? v[i] * inverse : __fdiv_rn(v[i], scale);
    const float b = kPowerOfTwo ? v[i + 1] * inverse : __fdiv_rn(v[i + 1], scale);
    pairs[i / 2] = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  }
  return {make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16), scale};
}
// endregion: quantise

}  // namespace flashmla::sm90
