// Online softmax over the accumulator of one 64 x 128 score tile, spread over a warpgroup: 64
// scores a thread.
#pragma once

#include <cmath>

#include "../../common/running_rows.cuh"
#include "rows.cuh"

namespace flashmla::sm90::dense_prefill {

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

  // Looks at a tile of scores, raises the maximum where it must, and with it what was accumulated
  // before: O and the sums.
  //
  // The maximum in use lags behind the true one, and most tiles leave it as it is. Such a tile
  // needs no row's maximum, only that no score is too large, which a vote tells sooner than
  // shuffles.
  template <class Scores, class Output>
  __device__ __forceinline__ void raise_max(const Scores& s, Output& o, float scale_log2) {
    // Two chains a row: a maximum depends on the one before.
    float m[2][2] = {{s(0), s(1)}, {s(2), s(3)}};
    CUTE_UNROLL
    for (int i = 4; i < cute::size(s); ++i) {
      m[row_half(i)][i & 1] = fmaxf(m[row_half(i)][i & 1], s(i));
    }
    RowPair top;  // of this thread's columns
    bool grown = false;
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      top.v[h] = fmaxf(m[h][0], m[h][1]);
      grown |= outgrows(top.v[h], max.v[h], scale_log2);
    }
    if (!__any_sync(0xffffffffu, grown)) return;
    RowPair alpha;
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      top.v[h] = fmaxf(top.v[h], __shfl_xor_sync(0xffffffffu, top.v[h], 1));
      top.v[h] = fmaxf(top.v[h], __shfl_xor_sync(0xffffffffu, top.v[h], 2));
      const bool row_grown = outgrows(top.v[h], max.v[h], scale_log2);
      alpha.v[h] = row_grown ? exp2f((max.v[h] - top.v[h]) * scale_log2) : 1.f;
      if (row_grown) max.v[h] = top.v[h];
      sum.v[h] *= alpha.v[h];
    }
    CUTE_UNROLL
    for (int i = 0; i < cute::size(o); ++i) o(i) *= alpha.v[row_half(i)];
  }

  // What scaled scores are to be reduced by. A row that has seen nothing keeps max -inf; reducing
  // by 0 then gives exp2(-inf) = 0.
  __device__ __forceinline__ RowPair shift(float scale_log2) const {
    RowPair result;
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) result.v[h] = max.v[h] == -INFINITY ? 0.f : max.v[h] * scale_log2;
    return result;
  }

  // Turns elements kFirst to kLast - 1 into probabilities, in place.
  template <int kFirst, int kLast, class Scores>
  __device__ __forceinline__ void exponentiate(Scores& s, float scale_log2, const RowPair& shift) {
    float partial[2][2] = {};  // two chains a row here too
    CUTE_UNROLL
    for (int i = kFirst; i < kLast; ++i) {
      const int h = row_half(i);
      s(i) = exp2f(fmaf(s(i), scale_log2, -shift.v[h]));
      partial[h][i & 1] += s(i);
    }
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) sum.v[h] += partial[h][0] + partial[h][1];
  }
};
// endregion: online_softmax

}  // namespace flashmla::sm90::dense_prefill
