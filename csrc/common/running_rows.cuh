// What an online softmax knows so far of the two rows that a thread has of a tile of scores.
#pragma once

#include <cute/config.hpp>

#include <cmath>

namespace flashmla {

struct RowPair {
  float v[2];
};

struct RunningRows {
  // The maximum in use lags behind the true one until that has grown by 2^kSlack: probabilities up
  // to 2^kSlack are harmless in float32 sums, and most tiles then leave the output as it is.
  static constexpr float kSlack = 8.f;

  RowPair max;  // that scores are shifted by; -inf before the first
  RowPair sum;  // of exp2(scaled score - scaled max), this thread's columns only

  __device__ __forceinline__ RunningRows() : max{{-INFINITY, -INFINITY}}, sum{{0.f, 0.f}} {}

  // Whether a score has outgrown the maximum in use; not if both are -inf.
  __device__ __forceinline__ static bool outgrows(float score, float in_use, float scale_log2) {
    return (score - in_use) * scale_log2 > kSlack;
  }

  // Another warpgroup did a step: take over its maximum.
  __device__ __forceinline__ void follow(const RowPair& new_max, const RowPair& alpha) {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      max.v[h] = new_max.v[h];
      sum.v[h] *= alpha.v[h];
    }
  }

  // The row sums over all columns that this warpgroup handled.
  __device__ __forceinline__ RowPair reduced_sum() const {
    RowPair total = sum;
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      total.v[h] += __shfl_xor_sync(0xffffffffu, total.v[h], 1);
      total.v[h] += __shfl_xor_sync(0xffffffffu, total.v[h], 2);
    }
    return total;
  }
};

}  // namespace flashmla
