// Where a finished stretch of tiles goes: to `out` and `lse`, to its slot of the partial results,
// or to shared memory, where the cluster that has the other splits of a list merges them.
#pragma once

#include <cooperative_groups.h>
#include <cute/arch/cluster_sm90.hpp>

#include "few_rows_config.cuh"
#include "merge.cuh"

namespace flashmla::sm90::sparse_decode::few_rows {

// What is known of the query rows of which a thread has scores.
template <int kN>
struct Rows {
  static constexpr int kCount = kN / 4;
  float max[kCount];  // that scores are shifted by; -inf before the first
  float sum[kCount];  // of probabilities

  __device__ __forceinline__ static int number(int i) {
    return i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2;
  }
};

// Four neighbouring columns of a row of `out`.
__device__ __forceinline__ void store_four(const KernelParams& p, int64_t row, int column,
                                           const float4& x, float factor) {
  cutlass::NumericArrayConverter<Element, float, 4> convert;
  const auto four = convert({x.x * factor, x.y * factor, x.z * factor, x.w * factor});
  *reinterpret_cast<uint2*>(static_cast<Element*>(p.out) + row * kDimV + column) =
      reinterpret_cast<const uint2&>(four);
}

// Of the thread's query row i, the four neighbouring columns of group g, from columns() on.
template <class Output>
__device__ __forceinline__ float4 four_columns(const Output& o, int i, int g) {
  const int at = i / 2 * 4 + i % 2;
  return make_float4(o(at, 2 * g, 0), o(at + 2, 2 * g, 0), o(at, 2 * g + 1, 0),
                     o(at + 2, 2 * g + 1, 0));
}
__device__ __forceinline__ int columns(int of_thread, int g) {
  return g * kGroupCols + of_thread / 4 * 4;
}

// By the warpgroup that has added up everything. o: the thread's part of Oᵀ, not yet divided by
// the sums.
template <int kN, class Item, class Output>
__device__ __forceinline__ void store(const KernelParams& p, const Item& item, const Rows<kN>& rows,
                                      const Output& o) {
  const int thread = threadIdx.x % 128;
  constexpr bool kPaged = std::is_same_v<Item, PagedItem>;
  if constexpr (kPaged) {
    if (!item.is_whole && (item.slot < 0 || item.slot >= p.pages.slots)) return;
  }
  CUTE_UNROLL
  for (int i = 0; i < Rows<kN>::kCount; ++i) {
    const int r = Rows<kN>::number(i), row = item.row(r);
    if (!item.exists(p, r)) continue;
    const bool empty = rows.sum[i] == 0.f;  // nothing this query may see: out 0, lse +inf
    const float lse2 = rows.max[i] * p.scale_log2 + log2f(rows.sum[i]);
    float factor = empty ? 0.f : 1.f / rows.sum[i];
    const bool writes_lse = thread < 4;
    if (item.whole(p)) {
      const int head = item.head(p, r);
      if (!empty) factor *= sink_share(p.attn_sink, head, lse2);
      if (writes_lse) store_lse(p, item.query_of(p, r), head, empty ? INFINITY : lse2 * kLn2);
      CUTE_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        store_four(p, item.base_row(p) + row, columns(thread, g), four_columns(o, i, g), factor);
      }
    } else if constexpr (kPaged) {
      const int64_t at = static_cast<int64_t>(item.slot) * p.pages.rows + row;
      if (writes_lse) p.lse_partial[at] = empty ? -INFINITY : lse2;
      CUTE_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        const float4 x = four_columns(o, i, g);
        *reinterpret_cast<float4*>(p.out_partial + at * kDimV + columns(thread, g)) =
            make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor);
      }
    } else {  // in the order of merge.cuh
      if (writes_lse) {
        p.lse_partial[static_cast<int64_t>(item.number) * kRows + r] = empty ? -INFINITY : lse2;
      }
      CUTE_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        const float4 x = four_columns(o, i, g);
        const int column = columns(thread, g);
        const int vector = (column % kHalfV / 128 * 2 + column / 8 % 2) * 8 + column % 128 / 16;
        const int64_t at = (static_cast<int64_t>(item.number) * 2 + column / kHalfV) * 4 + r / 16;
        float* to = p.out_partial +
                    (at * kVectorsAWarp + vector * 32 + r % 8 * 4 + column % 8 / 2) * 4 +
                    r / 8 % 2 * 2;
        *reinterpret_cast<float2*>(to) = make_float2(x.x * factor, x.y * factor);
        *reinterpret_cast<float2*>(to + 4) = make_float2(x.z * factor, x.w * factor);
      }
    }
  }
}

// ---- the splits of a list, which are a cluster ----

// Where the rest of the cluster finds what this CTA has found:
// out [kN / 4 query rows of a thread][4 groups][128 threads] of four columns each, not divided by
// the sums.
template <int kN, class Output>
__device__ __forceinline__ void leave(SharedStorage<kN>& shared, const Rows<kN>& rows,
                                      const Output& o) {
  const int thread = threadIdx.x % 128;
  auto* to = reinterpret_cast<float4*>(shared.output()) + thread;
  CUTE_UNROLL
  for (int i = 0; i < Rows<kN>::kCount; ++i) {
    CUTE_UNROLL
    for (int g = 0; g < kGroups; ++g) to[(i * kGroups + g) * 128] = four_columns(o, i, g);
    if (thread < 4) shared.row[Rows<kN>::number(i)] = make_float2(rows.max[i], rows.sum[i]);
  }
}

// This CTA's share of the query, once all have left theirs.
template <int kN, int kSplits>
__device__ __forceinline__ void merge(const KernelParams& p, SharedStorage<kN>& shared) {
  const auto cluster = cooperative_groups::this_cluster();
  const int rank = blockIdx.x % kSplits, query = blockIdx.x / kSplits;
  constexpr int kShare = kN * 128 / kSplits;  // float4
  CUTE_NO_UNROLL
  for (int v = threadIdx.x; v < kShare; v += Config<kN>::kConsumerThreads) {
    const int at = rank * kShare + v;
    const int i = at / (kGroups * 128), g = at / 128 % kGroups, of_thread = at % 128;
    const int head = i / 2 * 8 + of_thread % 4 * 2 + i % 2;
    float4 part[kSplits];
    float2 row[kSplits];  // maximum and sum
    CUTE_UNROLL
    for (int k = 0; k < kSplits; ++k) {
      part[k] = cluster.map_shared_rank(reinterpret_cast<float4*>(shared.output()), k)[at];
      row[k] = cluster.map_shared_rank(shared.row, k)[head];
    }
    if (head >= p.h_q) continue;
    float most = -INFINITY;
    CUTE_UNROLL
    for (int k = 0; k < kSplits; ++k) most = fmaxf(most, row[k].x);
    const float shift = most == -INFINITY ? 0.f : most;
    float4 all = make_float4(0.f, 0.f, 0.f, 0.f);
    float weights = 0.f;
    CUTE_UNROLL
    for (int k = 0; k < kSplits; ++k) {
      const float weight = exp2f((row[k].x - shift) * p.scale_log2);
      weights += weight * row[k].y;
      all.x += weight * part[k].x;
      all.y += weight * part[k].y;
      all.z += weight * part[k].z;
      all.w += weight * part[k].w;
    }
    const bool empty = weights == 0.f;
    const float lse2 = most * p.scale_log2 + log2f(weights);
    const float factor = empty ? 0.f : sink_share(p.attn_sink, head, lse2) / weights;
    store_four(p, static_cast<int64_t>(query) * p.h_q + head, columns(of_thread, g), all, factor);
    if (g == 0 && of_thread < 4) store_lse(p, query, head, empty ? INFINITY : lse2 * kLn2);
  }
}

template <int kN>
__device__ __forceinline__ void merge_cluster(const KernelParams& p, SharedStorage<kN>& shared) {
  cute::cluster_arrive();
  cute::cluster_wait();
  switch (p.splits) {
    case 2:
      merge<kN, 2>(p, shared);
      break;
    case 4:
      merge<kN, 4>(p, shared);
      break;
    case 8:
      merge<kN, 8>(p, shared);
      break;
    case 16:
      merge<kN, 16>(p, shared);
      break;
  }
  cute::cluster_arrive();  // what others read must not go
  cute::cluster_wait();
}

}  // namespace flashmla::sm90::sparse_decode::few_rows
