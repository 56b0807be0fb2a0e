// The order that top-k goes by. Keys are integers, so that the choice is exact to the last bit of
// a denormal; floats are compared only with a floor that is no denormal.
#pragma once

#include <cstdint>

#include "launch.h"

namespace flashmla::sm90::topk {

// region: ordered
// Bits of a float to an integer of the same order, the two zeros being equal. No NaN gets here.
__device__ __forceinline__ int ordered(float x) {
  const int bits = __float_as_int(x);
  const int order = bits ^ ((bits >> 31) & 0x7fffffff);
  return order == -1 ? 0 : order;
}
// endregion: ordered

constexpr float kLowest = -3.402823466e+38f;  // the least float that may be chosen
constexpr float kLeastNormal = 1.175494351e-38f;

// What may still be chosen: everything from a floor to +inf.
struct Window {
  float floor;

  // The comparison may take denormals for zeros, so the floor must be none, nor a zero.
  __device__ __forceinline__ explicit Window(float x) : floor(x) {
    if (fabsf(x) < kLeastNormal) floor = -kLeastNormal;
  }
  __device__ __forceinline__ bool holds(float x) const { return x >= floor; }  // NaN: no

  // How far what the window holds is above its floor.
  __device__ __forceinline__ unsigned rise(float x) const {
    return static_cast<unsigned>(ordered(x)) - static_cast<unsigned>(ordered(floor));
  }
  // The inverse.
  __device__ __forceinline__ float value(unsigned rise) const {
    const int order = static_cast<int>(rise + static_cast<unsigned>(ordered(floor)));
    return __int_as_float(order ^ ((order >> 31) & 0x7fffffff));
  }
};

// A key, unique in its row: value first, then the lower position.
//   bits 32-63: the rise above a floor; 14-31: 2^18 - 1 - position; 0-13: zero
constexpr int kValueBit = 32;
constexpr int kKeyEnd = 14;

__device__ __forceinline__ uint64_t make_key(unsigned rise, int position) {
  const unsigned rank = static_cast<unsigned>(kTopkMaxRow - 1 - position) << kKeyEnd;
  return static_cast<uint64_t>(rise) << kValueBit | rank;
}

__device__ __forceinline__ int position_of(uint64_t key) {
  return kTopkMaxRow - 1 - static_cast<int>(static_cast<unsigned>(key) >> kKeyEnd);
}

}  // namespace flashmla::sm90::topk
