// The end of a call in which requests were split: when all CTAs have left their partial results,
// they merge them, each by its share of the softmax denominator. That needs CTAs that wait for one
// another, and so a cooperative launch. The order of the sums follows from the plan, so a call
// repeated gives the same bits.
#pragma once

#include <cutlass/arch/barrier.h>

#include <type_traits>

#include "../../common/grid_barrier.cuh"
#include "../../common/log_base.h"
#include "../partials.cuh"
#include "../split_requests.cuh"
#include "config.cuh"

namespace flashmla::sm90::dense_decode {

constexpr int kMergeWarps = kConsumerThreads / 32;
constexpr int kLoadCols = 8;  // of a partial row in 16 bytes

struct MergeStorage {
  SplitRequests todo;
  int2 slots[kMaxParts];  // of the requests to be merged: the first, and how many
  // Where a CTA takes a row, of up to 256 of its partial results at a time.
  PartialRow row[kConsumerThreads];
  float weight[kConsumerThreads];
  float factor[2][kConsumerThreads];  // the weight times the unit, for either half of the columns
};

// A row to be merged.
struct SplitRow {
  int request;
  int row;    // of all KV heads of the request
  int first;  // of its partial results
  int splits;

  __device__ __forceinline__ SplitRow(const KernelParams& p, const MergeStorage& storage, int nth) {
    const int which = p.request_rows.div(nth);
    request = storage.todo.request[which];
    row = nth - which * p.request_rows.divisor;
    first = storage.slots[which].x;
    splits = storage.slots[which].y;
  }
  // Partial result k of this row among all of them.
  __device__ __forceinline__ int64_t at(const KernelParams& p, int k) const {
    return static_cast<int64_t>(first + k) * p.request_rows.divisor + row;
  }
};

// What has been seen of a row's partial results.
struct Weights {
  float max2 = -INFINITY;  // of their LSEs, base 2; -inf for nothing
  float sum = 0.f;         // relative to that

  // Makes `max` the maximum that weights are relative to, if it is larger; returns what everything
  // before must be multiplied by.
  __device__ __forceinline__ float raise(float max) {
    if (max <= max2) return 1.f;
    const float by = exp2f(max2 - max);  // 0 for the first
    sum *= by;
    max2 = max;
    return by;
  }
  __device__ __forceinline__ float add(float lse2) {
    const float weight = exp2f(lse2 - max2);
    sum += weight;
    return weight;
  }
};

// To out: a thread's kParts times kCount columns of a row, from `column` on, divided by the
// weights, which a sink adds to; to lse, by the thread that has column 0.
template <class T, int kParts, int kCount>
__device__ __forceinline__ void store_row(const KernelParams& p, const SplitRow& split, int column,
                                          int stride, const Weights& weights,
                                          const float (&o)[kParts][kCount]) {
  int kv_head, in_head, s, head;
  p.rows(kv_head, in_head, split.row);
  p.group(s, head, in_head);
  head += kv_head * p.group.divisor;
  const bool empty = weights.sum == 0.f;  // nothing this row may see: out 0, lse +inf
  float total = weights.sum;
  if (p.attn_sink != nullptr) {
    total += exp2f(p.attn_sink[head] * kLog2E - weights.max2);
  }
  const float factor = empty ? 0.f : 1.f / total;
  const int64_t query = static_cast<int64_t>(split.request) * p.shape.s_q + s;
  T* to = static_cast<T*>(p.out) + (query * p.shape.h_q + head) * kDimV + column;
  CUTE_UNROLL
  for (int j = 0; j < kParts; ++j) {
    cutlass::Array<float, kCount> x;
    CUTE_UNROLL
    for (int i = 0; i < kCount; ++i) x[i] = o[j][i] * factor;
    cutlass::NumericArrayConverter<T, float, kCount> convert;
    const auto packed = convert(x);
    using Word = std::conditional_t<kCount == kLoadCols, uint4, uint32_t>;
    static_assert(sizeof(Word) == sizeof(packed));
    *reinterpret_cast<Word*>(to + j * stride) = reinterpret_cast<const Word&>(packed);
  }
  if (column == 0) {
    const int64_t at = (static_cast<int64_t>(split.request) * p.shape.h_q + head) * p.shape.s_q + s;
    p.lse[at] = empty ? INFINITY : (weights.max2 + log2f(weights.sum)) * kLn2;
  }
}

// Many rows: half a warp takes one or, up to a row a warp, either half every second partial result
// of it. Four are on their way at a time, before any LSE is looked at.
template <class T>
__device__ __forceinline__ void merge_rows_of_warps(const KernelParams& p,
                                                    const MergeStorage& storage, int total,
                                                    int warp, int warps) {
  constexpr int kLanes = 16, kAtOnce = 4;
  constexpr int kLoads = kDimV / kLoadCols / kLanes;
  const int lane = threadIdx.x % kLanes, half_warp = threadIdx.x / kLanes % 2;
  const bool alone = total > warps;
  const int share = alone ? 0 : half_warp, sharing = alone ? 1 : 2;
#pragma unroll 1
  for (int nth = alone ? 2 * warp + half_warp : warp; __any_sync(0xffffffffu, nth < total);
       nth += alone ? 2 * warps : warps) {
    const SplitRow split(p, storage, min(nth, total - 1));
    Weights weights;
    float o[kLoads][kLoadCols] = {};  // columns 8 lane + 128 j
#pragma unroll 1
    for (int k = share; k < split.splits; k += kAtOnce * sharing) {
      uint4 x[kAtOnce][kLoads];
      PartialRow row[kAtOnce];
      CUTE_UNROLL
      for (int u = 0; u < kAtOnce; ++u) {
        row[u].lse2 = -INFINITY;
        if (k + u * sharing < split.splits) {
          const int64_t at = split.at(p, k + u * sharing);
          row[u] = read(p.partials.rows + at);
          const auto* from =
              static_cast<const uint4*>(p.partials.out) + at * (kDimV / kLoadCols) + lane;
          CUTE_UNROLL
          for (int j = 0; j < kLoads; ++j) x[u][j] = __ldcg(from + j * kLanes);
        }
      }
      float max = row[0].lse2;
      CUTE_UNROLL
      for (int u = 1; u < kAtOnce; ++u) max = fmaxf(max, row[u].lse2);
      const float by = weights.raise(max);
      CUTE_UNROLL
      for (int j = 0; j < kLoads; ++j) {
        CUTE_UNROLL
        for (int i = 0; i < kLoadCols; ++i) o[j][i] *= by;
      }
      CUTE_UNROLL
      for (int u = 0; u < kAtOnce; ++u) {
        if (row[u].lse2 == -INFINITY) continue;
        const float weight = weights.add(row[u].lse2);
        CUTE_UNROLL
        for (int j = 0; j < kLoads; ++j) {
          const float factor = weight * row[u].unit[2 * j / kLoads];
          float numbers[kLoadCols];
          unpack(x[u][j], numbers);
          CUTE_UNROLL
          for (int i = 0; i < kLoadCols; ++i) o[j][i] += factor * numbers[i];
        }
      }
    }
    if (!alone) {
      constexpr unsigned kAll = 0xffffffffu;
      const float by = weights.raise(__shfl_xor_sync(kAll, weights.max2, kLanes));
      weights.sum += __shfl_xor_sync(kAll, weights.sum, kLanes);
      CUTE_UNROLL
      for (int j = 0; j < kLoads; ++j) {
        CUTE_UNROLL
        for (int i = 0; i < kLoadCols; ++i) {
          o[j][i] *= by;
          o[j][i] += __shfl_xor_sync(kAll, o[j][i], kLanes);
        }
      }
    }
    if (nth < total && share == 0) {
      store_row<T>(p, split, lane * kLoadCols, kLanes * kLoadCols, weights, o);
    }
  }
}

// Few rows: all of the CTA takes one, a thread two columns of all partial results, of which 16 are
// on their way at a time. What is known of a partial row is fetched once, or all CTAs would ask for
// the same few lines of L2, eight warps each.
template <class T, class Sync>
__device__ __forceinline__ void merge_rows_of_ctas(const KernelParams& p, MergeStorage& storage,
                                                   int total, int thread, int block, int blocks,
                                                   const Sync& sync) {
  constexpr int kAtOnce = 16;
  constexpr int kCols = kDimV / kConsumerThreads;
  const int half = thread / (kConsumerThreads / 2);
#pragma unroll 1
  for (int nth = block; nth < total; nth += blocks) {
    const SplitRow split(p, storage, nth);
    Weights weights;
    float o[1][kCols] = {};
#pragma unroll 1
    for (int first = 0; first < split.splits; first += kConsumerThreads) {
      const int count = min(kConsumerThreads, split.splits - first);
      uint32_t x[kAtOnce];
      const auto fetch = [&](int k) {
        CUTE_UNROLL
        for (int u = 0; u < kAtOnce; ++u) {
          x[u] = 0;
          if (k + u < count) {
            const auto* out = static_cast<const uint32_t*>(p.partials.out);
            x[u] = __ldcg(out + split.at(p, first + k + u) * (kDimV / 2) + thread);
          }
        }
      };
      fetch(0);
      PartialRow row{-INFINITY, {0.f, 0.f}, 0.f};
      if (thread < count) row = read(p.partials.rows + split.at(p, first + thread));
      storage.row[thread] = row;
      sync();
      float max = -INFINITY;
      for (int k = thread % 32; k < count; k += 32) max = fmaxf(max, storage.row[k].lse2);
      CUTE_UNROLL
      for (int d = 16; d > 0; d /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, d));
      const float by = weights.raise(max);
      o[0][0] *= by;
      o[0][1] *= by;
      const float weight = row.lse2 == -INFINITY ? 0.f : exp2f(row.lse2 - weights.max2);
      storage.factor[0][thread] = weight * row.unit[0];
      storage.factor[1][thread] = weight * row.unit[1];
      storage.weight[thread] = weight;
      sync();
      float sum = 0.f;
      for (int k = thread % 32; k < count; k += 32) sum += storage.weight[k];
      CUTE_UNROLL
      for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
      weights.sum += sum;
#pragma unroll 1
      for (int k = 0;;) {
        CUTE_UNROLL
        for (int u = 0; u < kAtOnce; ++u) {
          if (k + u >= count) break;
          const float factor = storage.factor[half][k + u];
          float numbers[kCols];
          unpack(x[u], numbers);
          o[0][0] += factor * numbers[0];
          o[0][1] += factor * numbers[1];
        }
        k += kAtOnce;
        if (k >= count) break;
        fetch(k);
      }
      sync();  // what the next ones are known by goes to the same place
    }
    store_row<T>(p, split, thread * kCols, 0, weights, o);
  }
}

// By both consumers, when they have done all their items. `scratch`: where tiles were. Not inlined:
// nothing of it should take up registers before.
template <class T>
__device__ __noinline__ void merge_splits(const KernelParams& p, void* scratch) {
  auto& storage = *static_cast<MergeStorage*>(scratch);
  const int thread = threadIdx.x - 128;
  const auto sync = [] { cutlass::arch::NamedBarrier::sync(kConsumerThreads, kBothConsumers); };
  // Each request counts at least once. Every CTA sees the same, so all meet, or none.
  if (p.num_splits[p.shape.batch] <= p.shape.batch) return;
  const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  sync();
  GridArrival arrival;
  if (thread == 0) arrival = arrive_in_grid(p.meeting, blocks, block == 0);
  if (thread / 32 == 1) {  // while others are still at work
    storage.todo.collect(p.plan, p.shape.parts, p.shape.batch);
    __syncwarp();
    for (int i = thread % 32; i < storage.todo.count; i += 32) {
      const int* first = p.num_splits + storage.todo.request[i];
      const int slot = max(0, first[0]);
      storage.slots[i] = make_int2(slot, min(first[1], p.partials.slots) - slot);
    }
  }
  if (thread == 0) wait_in_grid(p.meeting, arrival);
  sync();
  // All blocks run at once, so these are not many.
  const int total = storage.todo.count * p.request_rows.divisor;
  if (total <= 2 * static_cast<int>(blocks)) {
    merge_rows_of_ctas<T>(p, storage, total, thread, block, blocks, sync);
  } else {
    merge_rows_of_warps<T>(p, storage, total, block * kMergeWarps + thread / 32,
                           blocks * kMergeWarps);
  }
}

}  // namespace flashmla::sm90::dense_decode
