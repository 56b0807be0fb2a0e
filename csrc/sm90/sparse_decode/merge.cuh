// Merging the partial results of a list that was split, each weighted by its share of the softmax
// denominator: by the CTAs that have computed them, which meet once all have stored theirs, and so
// must run at the same time (a cooperative launch); or by a second kernel (combine.cu). A partial
// result lies in the order of the accumulators that it comes from, two groups of 8 columns at a
// time, as float16 in units of the row and half (partials.cuh):
//   out [units, splits, 2 halves, 4 warps, 16 pairs of groups, 32 lanes][8],
//   rows [units, splits, 2 halves, 4 warps, 8 rows],
// a unit of work being up to 64 heads of one query.
#pragma once

#include <cutlass/arch/memory_sm80.h>

#include "../../common/grid_barrier.cuh"
#include "epilogue.cuh"

namespace flashmla::sm90::sparse_decode {

constexpr int kCounters = 32;  // that grid_counter gives: a line of them
constexpr int kVectorsAnItem = 2 * 4 * kVectorsAWarp;

// Where the 16 bytes of a lane stand: two columns of a row and the same two of the row eight below,
// then both once more, eight columns further.
struct VectorPlace {
  int half, warp, pair, lane;

  // Of those whose rows exist, in this order.
  __device__ __forceinline__ VectorPlace(int vector, int warps) {
    lane = vector % 32;
    pair = vector / 32 % (kVectorsAWarp / 32);
    const int rest = vector / kVectorsAWarp;
    half = rest >= warps;
    warp = rest - half * warps;
  }
  __device__ __forceinline__ int row(int h) const { return warp * 16 + lane / 4 + 8 * h; }
  __device__ __forceinline__ int64_t index(int64_t item) const {
    return item * kVectorsAnItem + (half * 4 + warp) * kVectorsAWarp + pair * 32 + lane;
  }
  // Of the warp's eight pairs of rows.
  __device__ __forceinline__ int64_t first_row(int64_t item) const {
    return item * kRows + (half * 4 + warp) * 8;
  }
  // The first of the columns. In `out` these have their own order again (config.cuh).
  __device__ __forceinline__ int column() const { return half * kHalfV + pair * 16 + lane % 4 * 2; }
};

// Warps of a unit that have rows.
__device__ __forceinline__ int used_warps(int h_q, int first_head) {
  return min(4, (h_q - first_head + 15) / 16);
}

// A row's weighted sum of partial results, as far as they have been seen.
struct MergedRow {
  float max2 = -INFINITY;               // of their LSEs, base 2; -inf for nothing seen
  float weights = 0.f;                  // relative to that
  float sum[4] = {0.f, 0.f, 0.f, 0.f};  // of this thread's columns

  // Makes `max` the maximum that weights are relative to, if it is larger.
  __device__ __forceinline__ void raise(float max) {
    if (max <= max2) return;
    const float by = exp2f(max2 - max);  // 0 for the first
    weights *= by;
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) sum[i] *= by;
    max2 = max;
  }
  __device__ __forceinline__ void add(float lse2, float unit, float a, float b, float c, float d) {
    const float weight = exp2f(lse2 - (max2 == -INFINITY ? 0.f : max2));
    const float by = weight * unit;
    weights += weight;
    sum[0] += by * a;
    sum[1] += by * b;
    sum[2] += by * c;
    sum[3] += by * d;
  }
};

// What 16 bytes of each partial result come to.
struct MergedVector {
  MergedRow rows[2];

  // The larger LSEs of what is added next.
  __device__ __forceinline__ void raise(float max, float max_below) {
    rows[0].raise(max);
    rows[1].raise(max_below);
  }
  // lse_and_unit: of both rows.
  __device__ __forceinline__ void add(const float4& lse_and_unit, const uint4& partial) {
    float x[8];
    unpack(partial, x);
    rows[0].add(lse_and_unit.x, lse_and_unit.y, x[0], x[1], x[4], x[5]);
    rows[1].add(lse_and_unit.z, lse_and_unit.w, x[2], x[3], x[6], x[7]);
  }

  // Adds what the lane has that is `apart` from this one, and the other way round.
  __device__ __forceinline__ void join(int apart) {
    constexpr unsigned kAll = 0xffffffffu;
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      MergedRow& row = rows[h];
      row.raise(__shfl_xor_sync(kAll, row.max2, apart));
      row.weights += __shfl_xor_sync(kAll, row.weights, apart);
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) row.sum[i] += __shfl_xor_sync(kAll, row.sum[i], apart);
    }
  }

  // To `out` and `lse`.
  template <class T>
  __device__ __forceinline__ void store(const KernelParams& p, int unit,
                                        const VectorPlace& at) const {
    int query, row_tile;
    p.row_tiles(query, row_tile, unit);
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int head = row_tile * kRows + at.row(h);
      if (head >= p.h_q) continue;
      const MergedRow& row = rows[h];
      const bool empty = row.weights == 0.f;  // nothing this query may see: out 0, lse +inf
      float total = row.weights;
      if (p.attn_sink != nullptr) total += exp2f(p.attn_sink[head] * kLog2E - row.max2);
      const float factor = empty ? 0.f : __fdividef(1.f, total);
      T* to = static_cast<T*>(p.out) + (static_cast<int64_t>(query) * p.h_q + head) * kDimV;
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        cutlass::NumericArrayConverter<T, float, 2> convert;
        const auto two = convert({row.sum[2 * i] * factor, row.sum[2 * i + 1] * factor});
        *reinterpret_cast<uint32_t*>(to + at.column() + 8 * i) =
            reinterpret_cast<const uint32_t&>(two);
      }
      if (at.half == 0 && at.pair == 0 && at.lane % 4 == 0) {
        store_lse(p, query, head, empty ? INFINITY : (row.max2 + log2f(row.weights)) * kLn2);
      }
    }
  }
};

// All CTAs of a unit meet, each of which works on one item: what one has stored is known to all of
// them afterwards. By all consumers. Each unit has a counter, which further units share if there
// are many.
__device__ __forceinline__ void meet_in_unit(const KernelParams& p, unsigned* meeting) {
  cutlass::arch::NamedBarrier::sync(kThreads, kMeeting);
  if (threadIdx.x == kProducerThreads) {
    const int number = blockIdx.x, splits = p.splits.divisor;
    const int units = p.splits.div(gridDim.x);
    const int place = p.splits.div(number) % kCounters;
    const int sharing = (units - place + kCounters - 1) / kCounters;
    unsigned* const counter = meeting + place;
    wait_in_grid(counter, arrive_in_grid(counter, sharing * splits, number == place * splits));
  }
  cutlass::arch::NamedBarrier::sync(kConsumerThreads, kRowSums);
}

// Partial results on their way. A kernel that merges once runs through the code of it once, and
// that has to be fetched first: so it is short, and what is on its way is in shared memory, where
// it can be numbered, rather than in registers.
constexpr int kMergeWarps = kConsumerThreads / 32;
constexpr int kSlots = 32;  // of a lane
struct MergeStorage {
  uint4 out[kSlots][kMergeWarps][32];
  float4 rows[kSlots][kMergeWarps][8];
};

__device__ __forceinline__ void start_copy(void* to, const void* from) {
  cutlass::arch::cp_async<16, cutlass::arch::CacheOperation::Global>(to, from);
}

// A CTA's share of its unit, once all of its CTAs have stored their partial results. Warps of
// different CTAs take turns, so that of few rows each CTA has some. Where there are more warps than
// they need, the lanes of a warp are groups, each of which adds up some of the splits. Several
// vectors of a lane are on their way at once where splits are few, and several rounds of partial
// results where they are many.
template <class T>
__device__ __forceinline__ void merge_share(const KernelParams& p, MergeStorage& shared, int number,
                                            int thread) {
  const int splits = p.splits.divisor;
  int unit, rank;
  p.splits(unit, rank, number);
  const int warps = used_warps(p.h_q, p.row_tiles.rem(unit) * kRows);
  const int warp = thread / 32, lane = thread % 32;
  const int step = splits * kMergeWarps;  // warps of the unit's CTAs
  const int needed = 2 * warps * (kVectorsAWarp / 32);
  const int log_groups = 4 * needed <= step ? 2 : 2 * needed <= step ? 1 : 0;
  const int groups = 1 << log_groups, log_width = 5 - log_groups, width = 1 << log_width;
  const int group = lane >> log_width;
  const int round = kSlots * groups;
  const int together = max(1, p.splits.div(kSlots));
  const int64_t first_item = static_cast<int64_t>(unit) * splits;
  MergedVector merged;
  CUTE_NO_UNROLL
  for (int v = warp * splits + rank; v < needed * groups; v += together * step) {
    const int end = min(needed * groups, v + together * step);
    CUTE_NO_UNROLL
    for (int first = 0; first < splits; first += round) {
      const int last = min(splits, first + round);
      int slot = 0;
      CUTE_NO_UNROLL
      for (int w = v; w < end; w += step) {
        const VectorPlace at(w * width + (lane & (width - 1)), warps);
        // Other SMs have written them just now, so they are read where all see the same: in L2.
        const uint4* out = p.list_partials.out + at.index(first_item + first + group);
        const float4* rows =
            p.list_partials.rows + at.first_row(first_item + first + group) + at.lane / 4;
        CUTE_NO_UNROLL
        for (int k = first + group; k < last; k += groups, ++slot) {
          start_copy(&shared.out[slot][warp][lane], out);
          if (lane % 4 == 0) start_copy(&shared.rows[slot][warp][lane / 4], rows);
          out += groups * kVectorsAnItem;
          rows += groups * kRows;
        }
      }
      cutlass::arch::cp_async_wait<0>();
      __syncwarp();
      slot = 0;
      CUTE_NO_UNROLL
      for (int w = v; w < end; w += step) {
        if (first == 0) merged = MergedVector{};
        const int n = (last - first - group + groups - 1) >> log_groups;
        float max[2] = {-INFINITY, -INFINITY};
#pragma unroll 4
        for (int k = 0; k < n; ++k) {
          const float4 known = shared.rows[slot + k][warp][lane / 4];
          max[0] = fmaxf(max[0], known.x);
          max[1] = fmaxf(max[1], known.z);
        }
        merged.raise(max[0], max[1]);
#pragma unroll 4
        for (int k = 0; k < n; ++k) {
          merged.add(shared.rows[slot + k][warp][lane / 4], shared.out[slot + k][warp][lane]);
        }
        slot += n;
        if (last < splits) continue;
        CUTE_NO_UNROLL
        for (int apart = width; apart < 32; apart *= 2) merged.join(apart);
        if (group == 0) merged.store<T>(p, unit, VectorPlace(w * width + lane, warps));
      }
      __syncwarp();
    }
  }
}

}  // namespace flashmla::sm90::sparse_decode
