// Merging the partial results of a list that was split, each weighted by its share of the softmax
// denominator, by the CTAs that have computed them: they meet once all have stored theirs, and so
// must run at the same time (a cooperative launch). A partial result lies in the order of the
// accumulators that it comes from:
//   out_partial [units, splits, 2 halves, 4 warps, 32 groups of 8 columns, 32 lanes][4] float32,
//   lse_partial [units, splits, 64 rows] float32, base 2,
// a unit being up to 64 heads of one query.
#pragma once

#include "../../common/grid_barrier.cuh"
#include "epilogue.cuh"

namespace flashmla::sm90::sparse_decode {

constexpr int kCounters = 32;           // that grid_counter gives: a line of them
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

// A row's weighted sum of partial results, as far as they have been seen.
struct MergedRow {
  float max2 = -INFINITY;              // of their LSEs, base 2; -inf for nothing seen
  float weights = 0.f;                 // relative to that
  float2 sum = make_float2(0.f, 0.f);  // of this thread's two columns

  // Makes `max` the maximum that weights are relative to, if it is larger.
  __device__ __forceinline__ void raise(float max) {
    if (max <= max2) return;
    const float by = exp2f(max2 - max);  // 0 for the first
    weights *= by;
    sum.x *= by;
    sum.y *= by;
    max2 = max;
  }
  __device__ __forceinline__ void add(float lse2, float x, float y) {
    const float weight = lse2 == -INFINITY ? 0.f : exp2f(lse2 - max2);
    weights += weight;
    sum.x += weight * x;
    sum.y += weight * y;
  }
};

// One float4 of a unit, merged over its splits and stored.
template <class T>
__device__ __forceinline__ void merge_vector(const KernelParams& p, int unit,
                                             const VectorPlace& at) {
  constexpr int kAtOnce = 16;  // partial results on their way, before any LSE is looked at
  constexpr int kVectors = 2 * 4 * kVectorsAWarp;
  const int64_t first_item = static_cast<int64_t>(unit) * p.splits;
  // Other SMs have written them just now, so they are read where all see the same: in L2.
  const auto* out = reinterpret_cast<const float4*>(p.out_partial) + at.index(first_item);
  const float* lse = p.lse_partial + first_item * kRows + at.row(0);
  MergedRow rows[2];
  CUTE_NO_UNROLL
  for (int first = 0; first < p.splits; first += kAtOnce) {
    float4 o[kAtOnce];
    float lse2[2][kAtOnce];
    CUTE_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      const bool there = first + k < p.splits;
      o[k] = there ? __ldcg(out + k * kVectors) : make_float4(0.f, 0.f, 0.f, 0.f);
      lse2[0][k] = there ? __ldcg(lse + k * kRows) : -INFINITY;
      lse2[1][k] = there ? __ldcg(lse + k * kRows + 8) : -INFINITY;
    }
    out += kAtOnce * kVectors;
    lse += kAtOnce * kRows;
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      float max = lse2[h][0];
      CUTE_UNROLL
      for (int k = 1; k < kAtOnce; ++k) max = fmaxf(max, lse2[h][k]);
      rows[h].raise(max);
      CUTE_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        rows[h].add(lse2[h][k], h == 0 ? o[k].x : o[k].z, h == 0 ? o[k].y : o[k].w);
      }
    }
  }
  const int query = unit / p.row_tiles;
  const int first_head = (unit - query * p.row_tiles) * kRows;
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int head = first_head + at.row(h);
    if (head >= p.h_q) continue;
    const MergedRow& row = rows[h];
    const bool empty = row.weights == 0.f;  // nothing this query may see: out 0, lse +inf
    const float lse2 = row.max2 + log2f(row.weights);
    const float factor = empty ? 0.f : sink_share(p.attn_sink, head, lse2) / row.weights;
    cutlass::NumericArrayConverter<T, float, 2> convert;
    const auto pair = convert({row.sum.x * factor, row.sum.y * factor});
    T* to = static_cast<T*>(p.out) + (static_cast<int64_t>(query) * p.h_q + head) * kDimV;
    *reinterpret_cast<uint32_t*>(to + at.column()) = reinterpret_cast<const uint32_t&>(pair);
    if (at.half == 0 && at.group == 0 && at.lane % 4 == 0) {
      store_lse(p, query, head, empty ? INFINITY : lse2 * kLn2);
    }
  }
}

// All CTAs of a unit meet, each of which works on one item: what one has stored is known to all of
// them afterwards. By all consumers. Each unit has a counter, which further units share if there
// are many.
__device__ __forceinline__ void meet_in_unit(const KernelParams& p, unsigned* meeting) {
  cutlass::arch::NamedBarrier::sync(kConsumerThreads, kRowSums);
  if (threadIdx.x == kProducerThreads) {
    const int number = blockIdx.x, units = gridDim.x / p.splits;
    const int place = number / p.splits % kCounters;
    const int sharing = (units - place + kCounters - 1) / kCounters;
    unsigned* const counter = meeting + place;
    wait_in_grid(counter, arrive_in_grid(counter, sharing * p.splits, number == place * p.splits));
  }
  cutlass::arch::NamedBarrier::sync(kConsumerThreads, kRowSums);
}

// A CTA's share of its unit, once all of its CTAs have stored their partial results.
template <class T>
__device__ __forceinline__ void merge_share(const KernelParams& p, int number, int thread) {
  const int unit = number / p.splits;
  const int warps = used_warps(p.h_q, unit % p.row_tiles * kRows);
  const int rank = number - unit * p.splits;
  CUTE_NO_UNROLL
  for (int v = rank * kConsumerThreads + thread; v < 2 * warps * kVectorsAWarp;
       v += p.splits * kConsumerThreads) {
    merge_vector<T>(p, unit, VectorPlace(v, warps));
  }
}

}  // namespace flashmla::sm90::sparse_decode
