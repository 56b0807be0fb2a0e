// Dense decode's online softmax, for a list of tokens of which some do not count, and with the
// largest score as a result of its own.
#pragma once

#include "../dense_decode/softmax.cuh"
#include "config.cuh"

namespace flashmla::sm90::sparse_prefill {

using dense_decode::any_rescale;
using dense_decode::rescale;
using dense_decode::row_half;
using dense_decode::RowPair;

struct OnlineSoftmax : dense_decode::RunningRows {
  // Scores of tokens that do not count become -inf: whatever they held is gone. Bit t of `valid`
  // is token t of the tile.
  template <class Scores>
  __device__ __forceinline__ static void mask(Scores& s, uint64_t valid) {
    const uint64_t mine = valid >> (threadIdx.x % 4 * 2);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(s); ++i) {
      const uint32_t bits = static_cast<uint32_t>(i < 16 ? mine : mine >> 32);
      if (!(bits >> (i % 16 / 4 * 8 + i % 2) & 1)) s(i) = -INFINITY;
    }
  }

  // Turns scores into probabilities relative to the new maximum, in place. `tops` takes the largest
  // score of the tile, or one that is below the largest of all; returned is what everything
  // accumulated before must be multiplied by.
  template <class Scores>
  __device__ __forceinline__ RowPair step(Scores& s, float scale_log2, RowPair& tops) {
    RowPair alpha;
    float shift[2];
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      float m = max.v[h];
      CUTE_UNROLL
      for (int i = 0; i < cute::size(s); ++i) {
        if (row_half(i) == h) m = fmaxf(m, s(i));
      }
      m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
      m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
      tops.v[h] = m;
      // The maximum in use lags behind the true one until that has grown by 2^kSlack: probabilities
      // up to 2^kSlack are harmless in float32 sums, and most tiles then leave O as it is.
      const bool grown = (m - max.v[h]) * scale_log2 > kSlack;
      m = grown ? m : max.v[h];
      // A row that has seen nothing keeps max -inf; shifting by 0 then gives exp2(-inf) = 0.
      shift[h] = m == -INFINITY ? 0.f : m * scale_log2;
      alpha.v[h] = grown ? exp2f(max.v[h] * scale_log2 - shift[h]) : 1.f;
      max.v[h] = m;
      sum.v[h] *= alpha.v[h];
    }
    CUTE_UNROLL
    for (int i = 0; i < cute::size(s); ++i) {
      const int h = row_half(i);
      s(i) = exp2f(fmaf(s(i), scale_log2, -shift[h]));
      sum.v[h] += s(i);
    }
    return alpha;
  }
};

}  // namespace flashmla::sm90::sparse_prefill
