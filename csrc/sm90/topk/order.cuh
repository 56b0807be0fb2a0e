// The order that top-k goes by. Keys are integers, so that the choice is exact to the last bit of
// a denormal; floats are compared only with a floor that is no denormal.
#pragma once

#include <cstdint>

#include "launch.h"

namespace flashmla::sm90::topk {

// Bits of a float to an integer of the same order, the two zeros being equal. No NaN gets here.
__device__ __forceinline__ int ordered(float x) {
  const int bits = __float_as_int(x);
  const int order = bits ^ ((bits >> 31) & 0x7fffffff);
  return order == -1 ? 0 : order;
}

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

  // A key of what the window holds, unique in its row: value first, then the lower position.
  //   bits 32-63: how far the value is above the floor; 14-31: 2^18 - 1 - position; 0-13: zero
  __device__ __forceinline__ uint64_t key(float x, int position) const {
    const unsigned value =
        static_cast<unsigned>(ordered(x)) - static_cast<unsigned>(ordered(floor));
    const unsigned rank = static_cast<unsigned>(kTopkMaxRow - 1 - position) << 14;
    return static_cast<uint64_t>(value) << 32 | rank;
  }
};

constexpr int kKeyEnd = 14;    // the lowest bit of a key that says anything
constexpr int kValueBit = 32;  // the lowest bit that belongs to the value

// The inverse of a key's value part.
__device__ __forceinline__ float value_of(uint64_t key, const Window& window) {
  const int order = static_cast<int>(static_cast<unsigned>(key >> kValueBit) +
                                     static_cast<unsigned>(ordered(window.floor)));
  return __int_as_float(order ^ ((order >> 31) & 0x7fffffff));
}

}  // namespace flashmla::sm90::topk
