// The ways out of an accumulator: as the operand of the next product, and to global memory.
#pragma once

#include <cutlass/numeric_conversion.h>

#include "../../common/accumulator.cuh"
#include "../../common/mma.cuh"

namespace flashmla::sm90::dense_prefill {

// An accumulator's elements from kFirst on as the register operand of the next product, which holds
// the same elements in the same order.
template <int kFirst, class Accumulator, class Operand>
__device__ __forceinline__ void to_operand(const Accumulator& from, Operand& to) {
  using T = typename Operand::value_type;
  cutlass::NumericArrayConverter<T, float, 2> convert;
  CUTE_UNROLL
  for (int i = 0; i < cute::size(to); i += 2) {
    const auto pair = convert({from(kFirst + i), from(kFirst + i + 1)});
    to(i) = pair[0];
    to(i + 1) = pair[1];
  }
}

// On entry word t is this lane's part of group t; on return the words are the parts of the quad's
// four lanes, in order, of the group whose number is the lane's: 16 bytes that lie side by side.
__device__ __forceinline__ uint4 transpose_in_quad(const uint32_t (&word)[4], int quad_lane) {
  const bool odd = quad_lane & 1, upper = quad_lane & 2;
  const uint32_t a = __shfl_xor_sync(0xffffffffu, odd ? word[0] : word[1], 1);
  const uint32_t b = __shfl_xor_sync(0xffffffffu, odd ? word[2] : word[3], 1);
  const uint32_t low0 = odd ? a : word[0], low1 = odd ? word[1] : a;    // group 0 or 1
  const uint32_t high0 = odd ? b : word[2], high1 = odd ? word[3] : b;  // group 2 or 3
  const uint32_t c = __shfl_xor_sync(0xffffffffu, upper ? low0 : high0, 2);
  const uint32_t d = __shfl_xor_sync(0xffffffffu, upper ? low1 : high1, 2);
  return upper ? make_uint4(c, d, high0, high1) : make_uint4(low0, low1, c, d);
}

// Writes the two rows, kCols columns each and times their factors, to `to` and `to + next`, where
// they exist.
template <int kCols, class T, class Accumulator>
__device__ __forceinline__ void store_rows(T* to, int64_t next, const Accumulator& from,
                                           const float (&factor)[2], const bool (&exists)[2]) {
  const int quad_lane = threadIdx.x % 4;
  cutlass::NumericArrayConverter<T, float, 2> convert;
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    CUTE_UNROLL
    for (int groups = 0; groups < kCols / 8; groups += 4) {
      uint32_t word[4];
      CUTE_UNROLL
      for (int t = 0; t < 4; ++t) {
        const int i = (groups + t) * 4 + 2 * h;
        const auto pair = convert({from(i) * factor[h], from(i + 1) * factor[h]});
        word[t] = reinterpret_cast<const uint32_t&>(pair);
      }
      const uint4 line = transpose_in_quad(word, quad_lane);
      if (exists[h]) reinterpret_cast<uint4*>(to + h * next)[groups + quad_lane] = line;
    }
  }
}

}  // namespace flashmla::sm90::dense_prefill
