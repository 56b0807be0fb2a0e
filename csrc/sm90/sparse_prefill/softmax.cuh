// Dense decode's online softmax, for a list of tokens of which some do not count, with the largest
// score as a result of its own, and in two halves.
#pragma once

#include "../dense_decode/softmax.cuh"
#include "config.cuh"

namespace flashmla::sm90::sparse_prefill {

using dense_decode::any_rescale;
using dense_decode::rescale;

struct OnlineSoftmax : RunningRows {
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

  // The largest score of each of this thread's rows, in its columns only.
  template <class Scores>
  __device__ __forceinline__ static RowPair largest(const Scores& s) {
    RowPair top;
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      float m[2] = {-INFINITY, -INFINITY};
      CUTE_UNROLL
      for (int i = 0; i < cute::size(s); ++i) {
        if (row_half(i) == h) m[i & 1] = fmaxf(m[i & 1], s(i));
      }
      top.v[h] = fmaxf(m[0], m[1]);
    }
    return top;
  }
  // The same in all columns of the tile.
  __device__ __forceinline__ static RowPair of_quad(RowPair top) {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      top.v[h] = fmaxf(top.v[h], __shfl_xor_sync(0xffffffffu, top.v[h], 1));
      top.v[h] = fmaxf(top.v[h], __shfl_xor_sync(0xffffffffu, top.v[h], 2));
    }
    return top;
  }

  // The first half of a step, given the largest scores of the tile, in this thread's columns: what
  // everything accumulated before must be multiplied by. As in dense decode the maximum in use lags
  // behind the true one, and whether any score has outgrown it is voted on.
  __device__ __forceinline__ RowPair raise_max(const RowPair& top, float scale_log2) {
    RowPair alpha{{1.f, 1.f}};
    bool grown = false;
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) grown |= outgrows(top.v[h], max.v[h], scale_log2);
    if (__any_sync(0xffffffffu, grown)) {
      const RowPair m = of_quad(top);
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        if (!outgrows(m.v[h], max.v[h], scale_log2)) continue;
        alpha.v[h] = exp2f((max.v[h] - m.v[h]) * scale_log2);
        max.v[h] = m.v[h];
        sum.v[h] *= alpha.v[h];
      }
    }
    return alpha;
  }

  // The second half: turns scores into probabilities relative to the maximum in use, in place.
  template <class Scores>
  __device__ __forceinline__ void exponentiate(Scores& s, float scale_log2) {
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
  }
};

}  // namespace flashmla::sm90::sparse_prefill
