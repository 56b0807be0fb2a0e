// Merging the partial results of a list that was split, each weighted by its share of the softmax
// denominator. A partial result lies in the order of the accumulators that it comes from:
//   out_partial [units, splits, 2 halves, 4 warps, 32 groups of 8 columns, 32 lanes][4] float32,
//   lse_partial [units, splits, 64 rows] float32, base 2,
// a unit being up to 64 heads of one query.
#pragma once

#include "epilogue.cuh"

namespace flashmla::sm90::sparse_decode {

constexpr int kVectorsAWarp = 32 * 32;  // float4 of a warp's sixteen rows and a half of the columns

// Where one float4 of a unit stands: two columns of a row, and the same two of the row eight below.
struct VectorPlace {
  int half, warp, group, lane;

  // Of those whose rows exist, in this order.
  __device__ __forceinline__ VectorPlace(int vector, int warps) {
    lane = vector % 32;
    group = vector / 32 % 32;
    const int rest = vector / kVectorsAWarp;
    half = rest / warps;
    warp = rest - half * warps;
  }
  __device__ __forceinline__ int row(int h) const { return warp * 16 + lane / 4 + 8 * h; }
  __device__ __forceinline__ int64_t index(int64_t item) const {
    return ((item * 2 + half) * 4 + warp) * kVectorsAWarp + group * 32 + lane;
  }
  // Columns as shared memory has them (config.cuh), turned back.
  __device__ __forceinline__ int column() const {
    const int piece = group / 8, chunk = group % 8;
    return half * kHalfV + piece / 2 * 128 + chunk * 16 + piece % 2 * 8 + lane % 4 * 2;
  }
};

// Warps of a unit that have rows.
__device__ __forceinline__ int used_warps(int h_q, int first_head) {
  return min(4, (h_q - first_head + 15) / 16);
}

// What a row's partial results are multiplied with, up to a common factor, and that factor.
template <int kSplits>
struct RowWeights {
  float weight[kSplits];
  float factor;
  float lse2;
  bool empty;

  __device__ __forceinline__ RowWeights(const float* lse, const float* attn_sink, int head) {
    float max = -INFINITY, sum = 0.f;
    CUTE_UNROLL
    for (int k = 0; k < kSplits; ++k) {
      weight[k] = __ldcg(lse + k * kRows);
      max = fmaxf(max, weight[k]);
    }
    const float shift = max == -INFINITY ? 0.f : max;
    CUTE_UNROLL
    for (int k = 0; k < kSplits; ++k) {
      weight[k] = exp2f(weight[k] - shift);
      sum += weight[k];
    }
    empty = sum == 0.f;  // nothing this query may see: out 0, lse +inf
    lse2 = max + log2f(sum);
    factor = empty ? 0.f : sink_share(attn_sink, head, lse2) / sum;
  }
};

// One float4 of a unit, merged over its splits and stored.
template <class T, int kSplits>
__device__ __forceinline__ void merge_vector(const KernelParams& p, int unit,
                                             const VectorPlace& at) {
  const int query = unit / p.row_tiles;
  const int first_head = (unit - query * p.row_tiles) * kRows;
  const int64_t first_item = static_cast<int64_t>(unit) * kSplits;
  const auto* partial = reinterpret_cast<const float4*>(p.out_partial);
  float4 o[kSplits];
  CUTE_UNROLL
  for (int k = 0; k < kSplits; ++k) o[k] = __ldcg(partial + at.index(first_item + k));
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int head = first_head + at.row(h);
    const RowWeights<kSplits> row(p.lse_partial + first_item * kRows + at.row(h),
                                  head < p.h_q ? p.attn_sink : nullptr, head);
    float2 sum = make_float2(0.f, 0.f);
    CUTE_UNROLL
    for (int k = 0; k < kSplits; ++k) {
      sum.x += row.weight[k] * (h == 0 ? o[k].x : o[k].z);
      sum.y += row.weight[k] * (h == 0 ? o[k].y : o[k].w);
    }
    if (head >= p.h_q) continue;
    cutlass::NumericArrayConverter<T, float, 2> convert;
    const auto pair = convert({sum.x * row.factor, sum.y * row.factor});
    T* to = static_cast<T*>(p.out) + (static_cast<int64_t>(query) * p.h_q + head) * kDimV;
    *reinterpret_cast<uint32_t*>(to + at.column()) = reinterpret_cast<const uint32_t&>(pair);
    if (at.half == 0 && at.group == 0 && at.lane % 4 == 0) {
      store_lse(p, query, head, row.empty ? INFINITY : row.lse2 * kLn2);
    }
  }
}

// A CTA's share of its unit, once all CTAs of the cluster have stored their partial results.
template <class T, int kSplits>
__device__ __forceinline__ void merge_share(const KernelParams& p, int number, int thread) {
  const int unit = number / kSplits;
  const int warps = used_warps(p.h_q, unit % p.row_tiles * kRows);
  const int rank = number - unit * kSplits;
  CUTE_NO_UNROLL
  for (int v = rank * kConsumerThreads + thread; v < 2 * warps * kVectorsAWarp;
       v += kSplits * kConsumerThreads) {
    merge_vector<T, kSplits>(p, unit, VectorPlace(v, warps));
  }
}

}  // namespace flashmla::sm90::sparse_decode
