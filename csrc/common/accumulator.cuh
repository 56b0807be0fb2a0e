// How a float32 accumulator of wgmma, [64, n], is spread over the threads of its warpgroup.
//
// A thread holds two rows, `row` and `row + 8`, and in each group of eight columns two neighbours.
// Element i lies in row half (i >> 1) & 1 and column (i / 4) * 8 + quad_lane * 2 + (i & 1), where
// quad_lane is the thread's place among the four that share its rows.
#pragma once

#include <cute/arch/copy_sm90.hpp>

#include <cstdint>

namespace flashmla {

__host__ __device__ __forceinline__ constexpr int row_half(int i) {
  return (i >> 1) & 1;
}

// The column of the c-th of the numbers that a thread has in one row.
__device__ __forceinline__ int own_column(int c) {
  return c / 2 * 8 + threadIdx.x % 4 * 2 + c % 2;
}

// Stores an accumulator [64, kColumns] to `to`, [kColumns][64] of 16-bit values in the 128-byte
// swizzle. pair(i): elements i and i + 1, converted, i even.
template <int kColumns, class T, class Pair>
__device__ __forceinline__ void store_transposed(T* to, Pair pair) {
  static_assert(sizeof(T) == 2 && (kColumns == 8 || kColumns % 16 == 0));
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x % 128 / 32;
  // Four 8 x 8 matrices at a time: 16 rows of this warp by 16 columns; lane l addresses row l % 8
  // of the stored matrix l / 8.
  const int chunk = (warp * 2 + lane / 8 % 2) ^ (lane % 8);
  T* mine = to + lane % 8 * 64 + chunk * 8;
  if constexpr (kColumns == 8) {
    cute::SM90_U16x4_STSM_T::copy(pair(0), pair(2), *reinterpret_cast<cute::uint128_t*>(mine));
  } else {
    mine += lane / 16 * 8 * 64;
    CUTE_UNROLL
    for (int b = 0; b < kColumns / 16; ++b) {
      cute::SM90_U16x8_STSM_T::copy(pair(b * 8), pair(b * 8 + 2), pair(b * 8 + 4), pair(b * 8 + 6),
                                    *reinterpret_cast<cute::uint128_t*>(mine + b * 16 * 64));
    }
  }
}

}  // namespace flashmla
