// How a float32 accumulator of wgmma, [64, n], is spread over the threads of its warpgroup.
//
// A thread holds two rows, `row` and `row + 8`, and in each group of eight columns two neighbours.
// Element i lies in row half (i >> 1) & 1 and column (i / 4) * 8 + quad_lane * 2 + (i & 1), where
// quad_lane is the thread's place among the four that share its rows.
#pragma once

#include <cuda_runtime.h>

namespace flashmla {

__host__ __device__ __forceinline__ constexpr int row_half(int i) {
  return (i >> 1) & 1;
}

// The column of the c-th of the numbers that a thread has in one row.
__device__ __forceinline__ int own_column(int c) {
  return c / 2 * 8 + threadIdx.x % 4 * 2 + c % 2;
}

}  // namespace flashmla
