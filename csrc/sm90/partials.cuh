// How the numbers of a partial result are stored: as float16, each half of a row, 256 columns, in a
// unit of its own, a power of two. That is half the bytes of float32, and bytes are what merging
// costs; rounding adds 2^-11, an eighth of what bfloat16 probabilities and results are rounded by.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cutlass/numeric_conversion.h>
#include <cute/tensor.hpp>

#include <cstdint>

#include "../common/accumulator.cuh"
#include "../common/running_rows.cuh"
#include "launch.h"

namespace flashmla::sm90 {

// The largest magnitudes in the two rows of O that a thread has a part of, over the columns of its
// warpgroup. NaN counts for nothing, nor, with kFinite, do infinities: what stands beside them in
// the row then keeps a unit that fits it.
template <bool kFinite = false, class Output>
__device__ __forceinline__ RowPair largest_of_rows(const Output& o) {
  constexpr int kChains = 4;  // a row: one would be waited for at each of its 64 links
  float chain[2][kChains] = {};
  CUTE_UNROLL
  for (int i = 0; i < cute::size(o); ++i) {
    float& link = chain[row_half(i)][(i / 4 * 2 + i % 2) % kChains];
    link = fmaxf(link, fabsf(kFinite ? fmaf(o(i), 0.f, o(i)) : o(i)));
  }
  RowPair largest;
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    largest.v[h] = fmaxf(fmaxf(chain[h][0], chain[h][1]), fmaxf(chain[h][2], chain[h][3]));
    largest.v[h] = fmaxf(largest.v[h], __shfl_xor_sync(0xffffffffu, largest.v[h], 1));
    largest.v[h] = fmaxf(largest.v[h], __shfl_xor_sync(0xffffffffu, largest.v[h], 2));
  }
  return largest;
}

// The unit of numbers whose largest magnitude this is: it comes to 2^14 at least and below 2^15,
// and a number 2^28 times smaller keeps all its bits. 1 where there is an infinity, or nothing but
// zeros. Exact, and so is its inverse. Times a weight it may come to 0, and all of its numbers with
// it, if they are below 2^-100.
__device__ __forceinline__ float unit_of(float largest) {
  const int exponent = __float_as_int(largest) >> 23;  // biased; there is no sign
  return __int_as_float((exponent == 255 || exponent == 0 ? 127 : max(exponent - 14, 1)) << 23);
}
__device__ __forceinline__ float inverse_of_unit(float unit) {
  return __int_as_float((254 << 23) - __float_as_int(unit));
}

// May have been written by this very kernel, so it is read where all SMs see the same: in L2.
__device__ __forceinline__ PartialRow read(const PartialRow* row) {
  const float4 r = __ldcg(reinterpret_cast<const float4*>(row));
  return {r.x, {r.y, r.z}, r.w};
}

// Two numbers as T or, of a partial result, as float16.
template <class T>
__device__ __forceinline__ uint32_t rounded_pair(float x, float y, bool partial) {
  cutlass::NumericArrayConverter<T, float, 2> convert;
  cutlass::NumericArrayConverter<cutlass::half_t, float, 2> convert_partial;
  const auto pair = convert({x, y});
  const auto partial_pair = convert_partial({x, y});
  return partial ? reinterpret_cast<const uint32_t&>(partial_pair)
                 : reinterpret_cast<const uint32_t&>(pair);
}

// A partial result's numbers as they lie in memory, two in each 32 bits of Vector.
template <class Vector>
__device__ __forceinline__ void unpack(const Vector& packed, float (&x)[sizeof(Vector) / 2]) {
  const auto* pairs = reinterpret_cast<const __half2*>(&packed);
#pragma unroll
  for (int i = 0; i < sizeof(Vector) / 4; ++i) {
    const float2 two = __half22float2(pairs[i]);
    x[2 * i] = two.x;
    x[2 * i + 1] = two.y;
  }
}

}  // namespace flashmla::sm90
