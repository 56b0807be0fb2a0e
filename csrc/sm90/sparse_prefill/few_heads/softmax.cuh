// The online softmax of Sᵀ[64 tokens, heads], by one consumer warpgroup. A thread has two tokens
// (rows) of each of its heads (columns), and no two threads agree on a maximum unless they must.
#pragma once

#include <cutlass/numeric_conversion.h>

#include "../../../common/accumulator.cuh"
#include "../../../common/running_rows.cuh"
#include "config.cuh"

namespace flashmla::sm90::sparse_prefill::few_heads {

// A number for each of a thread's heads, two neighbours of each block of eight.
template <int kHeads>
struct Columns {
  static constexpr int kCount = kHeads / 4;
  float v[kCount];

  __device__ __forceinline__ void fill(float x) {
    CUTE_UNROLL
    for (int c = 0; c < kCount; ++c) v[c] = x;
  }
  // The head of column c.
  __device__ __forceinline__ static int head(int c) { return own_column(c); }
  // The column of element i of an accumulator [64, heads], and which of the thread's two rows.
  __host__ __device__ static constexpr int column(int i) { return i / 4 * 2 + i % 2; }
  __host__ __device__ static constexpr int row(int i) { return i / 2 % 2; }
};

// Over the eight lanes that share a thread's heads.
template <class Operator>
__device__ __forceinline__ float reduce_rows(float x, Operator op) {
  CUTE_UNROLL
  for (int lanes = 4; lanes < 32; lanes *= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

// An accumulator [64, heads] to `to`, [heads][64] in the 128-byte swizzle.
template <class T, int kHeads, class Accumulator>
__device__ __forceinline__ void store_transposed(T* to, const Accumulator& x) {
  cutlass::NumericArrayConverter<T, float, 2> convert;
  flashmla::store_transposed<kHeads>(to, [&](int i) {
    const auto both = convert({x(i), x(i + 1)});
    return reinterpret_cast<const uint32_t&>(both);
  });
}

template <int kHeads>
struct OnlineSoftmax {
  using Cols = Columns<kHeads>;
  static constexpr int kCount = Cols::kCount;
  static constexpr float kSlack = RunningRows::kSlack;  // how far the maximum in use lags behind
  // The maximum of nothing: any score outgrows it, where -inf would make NaN of it.
  static constexpr float kNothing = -3.402823466e38f;

  Cols shift;  // the maximum in use, times scale_log2
  Cols sum;    // of this thread's rows
  Cols top;    // the largest score of this thread's rows

  __device__ __forceinline__ void clear() {
    shift.fill(kNothing);
    sum.fill(0.f);
    top.fill(-INFINITY);
  }

  // Scores of tokens that do not count become -inf: whatever they held is gone. Bit t of `valid` is
  // token t of the tile.
  template <class Scores>
  __device__ __forceinline__ static void mask(Scores& s, uint64_t valid) {
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    const auto mine = static_cast<uint32_t>(valid >> row);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(s); ++i) {
      if (!(mine >> (8 * Cols::row(i)) & 1)) s(i) = -INFINITY;
    }
  }

  // Probabilities relative to the maximum in use. True if a score outgrows it.
  template <class Scores>
  __device__ __forceinline__ bool exponentiate(const Scores& s, float scale_log2, Scores& pr) {
    bool grown = false;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(s); ++i) {
      const float x = fmaf(s(i), scale_log2, -shift.v[Cols::column(i)]);
      grown |= x > kSlack;
      pr(i) = exp2f(x);
    }
    return grown;
  }

  // The largest of this warp's rows, left for the other warps.
  template <class Scores>
  __device__ __forceinline__ static void leave_tops(const Scores& s, float* to) {
    CUTE_UNROLL
    for (int c = 0; c < kCount; ++c) {
      const int i = c / 2 * 4 + c % 2;
      const float x =
          reduce_rows(fmaxf(s(i), s(i + 2)), [](float a, float b) { return fmaxf(a, b); });
      if (threadIdx.x % 32 < 4) to[Cols::head(c)] = x;
    }
  }

  // Takes over the true maximum from what all warps left, [4][heads]; returned is what everything
  // accumulated before must be multiplied by.
  __device__ __forceinline__ Cols raise(const float (&tops)[kWarps][kHeads], float scale_log2) {
    Cols alpha;
    CUTE_UNROLL
    for (int c = 0; c < kCount; ++c) {
      float x = tops[0][Cols::head(c)];
      CUTE_UNROLL
      for (int w = 1; w < kWarps; ++w) x = fmaxf(x, tops[w][Cols::head(c)]);
      const float raised = fmaxf(shift.v[c], x * scale_log2);
      alpha.v[c] = exp2f(shift.v[c] - raised);
      shift.v[c] = raised;
      sum.v[c] *= alpha.v[c];
    }
    return alpha;
  }

  template <class Scores>
  __device__ __forceinline__ void add(const Scores& s, const Scores& pr) {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(s); ++i) {
      const int c = Cols::column(i);
      sum.v[c] += pr(i);
      top.v[c] = fmaxf(top.v[c], s(i));
    }
  }
};

}  // namespace flashmla::sm90::sparse_prefill::few_heads
