// Online softmax over the accumulator of one 64 x 64 score tile, spread over a warpgroup: 32 scores
// a thread.
#pragma once

#include <cute/tensor.hpp>

#include <cmath>

#include "../../common/accumulator.cuh"
#include "../../common/running_rows.cuh"

namespace flashmla::sm90::dense_decode {

// region: online_softmax
struct OnlineSoftmax : RunningRows {
  // Scores of positions a row may not see become -inf: whatever they held, NaN too, is gone.
  template <class Scores>
  __device__ __forceinline__ static void mask(Scores& s, int first_token, const int (&limit)[2]) {
    const int column = first_token + (threadIdx.x % 4) * 2;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(s); ++i) {
      const int token = column + (i / 4) * 8 + (i & 1);
      if (token >= limit[row_half(i)]) s(i) = -INFINITY;
    }
  }

  // region: softmax_step
  // Turns scores into probabilities relative to the maximum in use, in place, and returns what
  // everything accumulated before must be multiplied by.
  //
  // That lags behind the true one, and most tiles leave it as it is. Such a tile needs no row's
  // maximum, only that no score is too large, which a vote tells sooner than shuffles.
  template <class Scores>
  __device__ __forceinline__ RowPair step(Scores& s, float scale_log2) {
    RowPair alpha{{1.f, 1.f}}, largest;  // of this thread's columns
    bool grown = false;
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      float m[2] = {-INFINITY, -INFINITY};
      CUTE_UNROLL
      for (int i = 0; i < cute::size(s); ++i) {
        if (row_half(i) == h) m[i & 1] = fmaxf(m[i & 1], s(i));
      }
      largest.v[h] = fmaxf(m[0], m[1]);
      grown |= outgrows(largest.v[h], max.v[h], scale_log2);
    }
    if (__any_sync(0xffffffffu, grown)) {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        float m = largest.v[h];
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
        if (!outgrows(m, max.v[h], scale_log2)) continue;
        alpha.v[h] = exp2f((max.v[h] - m) * scale_log2);
        max.v[h] = m;
        sum.v[h] *= alpha.v[h];
      }
    }
    float shift[2];
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      // A row that has seen nothing keeps max -inf; shifting by 0 then gives exp2(-inf) = 0.
      shift[h] = max.v[h] == -INFINITY ? 0.f : max.v[h] * scale_log2;
    }
    CUTE_UNROLL
    for (int i = 0; i < cute::size(s); ++i) {
      const int h = row_half(i);
      s(i) = exp2f(fmaf(s(i), scale_log2, -shift[h]));
      sum.v[h] += s(i);
    }
    return alpha;
  }
  // endregion: softmax_step
};
// endregion: online_softmax

__device__ __forceinline__ bool any_rescale(const RowPair& factor) {
  return __any_sync(0xffffffffu, factor.v[0] != 1.f || factor.v[1] != 1.f);
}

template <class Accumulator>
__device__ __forceinline__ void rescale(Accumulator& o, const RowPair& factor) {
  CUTE_UNROLL
  for (int i = 0; i < cute::size(o); ++i) o(i) *= factor.v[row_half(i)];
}

}  // namespace flashmla::sm90::dense_decode
