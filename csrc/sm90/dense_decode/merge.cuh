// The end of a call in which requests were split: when all CTAs have left their partial results,
// they merge them, each by its share of the softmax denominator. That needs CTAs that wait for one
// another, and so a cooperative launch.
#pragma once

#include <cutlass/arch/barrier.h>

#include "../../common/grid_barrier.cuh"
#include "../split_requests.cuh"
#include "config.cuh"

namespace flashmla::sm90::dense_decode {

// A sum of partial rows of 512 columns, spread over a warp: lane l has columns 4 l + 128 j.
struct MergedRow {
  float4 o[4];
  float max2;  // of the partial rows' LSEs, base 2; -inf for nothing seen
  float sum;   // of their weights, relative to that

  __device__ __forceinline__ void clear() {
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) o[j] = make_float4(0.f, 0.f, 0.f, 0.f);
    max2 = -INFINITY;
    sum = 0.f;
  }
  __device__ __forceinline__ void scale(float by) {
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      o[j].x *= by;
      o[j].y *= by;
      o[j].z *= by;
      o[j].w *= by;
    }
  }
  // Makes `max` the maximum that weights are relative to, if it is larger.
  __device__ __forceinline__ void raise(float max) {
    if (max <= max2) return;
    const float by = exp2f(max2 - max);  // 0 for the first
    scale(by);
    sum *= by;
    max2 = max;
  }
  __device__ __forceinline__ float weight_of(float lse2) const {
    return lse2 == -INFINITY ? 0.f : exp2f(lse2 - max2);
  }
  __device__ __forceinline__ void add(float weight, float weights, const float4 (&x)[4]) {
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      o[j].x += weight * x[j].x;
      o[j].y += weight * x[j].y;
      o[j].z += weight * x[j].z;
      o[j].w += weight * x[j].w;
    }
    sum += weight * weights;
  }

  // To out and lse, divided by the sum, which a sink adds to. row: of all KV heads of the request.
  template <class T>
  __device__ __forceinline__ void store(const KernelParams& p, int request, int row) {
    const int lane = threadIdx.x % 32;
    const int group = p.shape.group();
    const int in_head = row % p.shape.rows();
    const int head = row / p.shape.rows() * group + in_head % group;
    const int s = in_head / group;
    const bool empty = sum == 0.f;  // nothing this row may see: out 0, lse +inf
    float total = sum;
    if (p.attn_sink != nullptr) total += exp2f(p.attn_sink[head] * 1.4426950408889634f - max2);
    scale(empty ? 0.f : 1.f / total);
    const int64_t query = static_cast<int64_t>(request) * p.shape.s_q + s;
    T* to = static_cast<T*>(p.out) + (query * p.shape.h_q + head) * kDimV + lane * 4;
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      cutlass::NumericArrayConverter<T, float, 4> convert;
      const auto packed = convert({o[j].x, o[j].y, o[j].z, o[j].w});
      *reinterpret_cast<uint2*>(to + j * 128) = reinterpret_cast<const uint2&>(packed);
    }
    if (lane == 0) {
      const int64_t at = (static_cast<int64_t>(request) * p.shape.h_q + head) * p.shape.s_q + s;
      p.lse[at] = empty ? INFINITY : (max2 + log2f(sum)) * 0.6931471805599453f;
    }
  }
};

constexpr int kMergeWarps = kConsumerThreads / 32;

struct MergeStorage {
  SplitRequests todo;
  int2 slots[kMaxParts];  // of the requests to be merged: the first, and how many
  float4 o[kMergeWarps][4][32];
  float2 state[kMergeWarps];  // max2, sum
};

// Every `step`-th partial result of a row from `first` on. Four are on their way at a time, with no
// look at their LSEs before; they may have been written by this very kernel, so they are read where
// all SMs see the same: in L2.
__device__ __forceinline__ void merge_partials(const KernelParams& p, int64_t row, int rows,
                                               int first, int step, int splits, MergedRow& sum) {
  constexpr int kAtOnce = 4;
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int k = first; k < splits; k += kAtOnce * step) {
    float4 x[kAtOnce][4];
    float lse2[kAtOnce];
    CUTE_UNROLL
    for (int u = 0; u < kAtOnce; ++u) {
      const bool there = k + u * step < splits;
      const int64_t at = row + static_cast<int64_t>(there ? k + u * step : k) * rows;
      const auto* from = reinterpret_cast<const float4*>(p.partials.out + at * kDimV) + lane;
      lse2[u] = there ? __ldcg(p.partials.lse + at) : -INFINITY;
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) {
        x[u][j] = there ? __ldcg(from + j * 32) : make_float4(0.f, 0.f, 0.f, 0.f);
      }
    }
    float max = lse2[0];
    CUTE_UNROLL
    for (int u = 1; u < kAtOnce; ++u) max = fmaxf(max, lse2[u]);
    sum.raise(max);
    CUTE_UNROLL
    for (int u = 0; u < kAtOnce; ++u) sum.add(sum.weight_of(lse2[u]), 1.f, x[u]);
  }
}

// A warp takes a row, or, where there are few rows, two to eight warps share out its partial
// results. The order of the sums follows from the plan, so a call repeated gives the same bits.
template <class T, class Sync>
__device__ __forceinline__ void merge_rows(const KernelParams& p, MergeStorage& storage, int block,
                                           int blocks, int warp, const Sync& sync) {
  const int lane = threadIdx.x % 32;
  const int rows = p.shape.h_kv * p.shape.rows();
  const int total = storage.todo.count * rows;  // the grid runs at once, so this is small
  int sharing = kMergeWarps;                    // warps a row
  while (sharing > 1 && total * sharing > blocks * kMergeWarps) sharing /= 2;
  const int at_once = kMergeWarps / sharing;
  const int share = warp % sharing;
#pragma unroll 1
  for (int first = block * at_once; first < total; first += blocks * at_once) {
    const int nth = first + warp / sharing;
    const int request = nth < total ? storage.todo.request[nth / rows] : 0;
    const int row = nth % rows;
    MergedRow sum;
    sum.clear();
    if (nth < total) {
      const int2 slots = storage.slots[nth / rows];
      merge_partials(p, static_cast<int64_t>(slots.x) * rows + row, rows, share, sharing, slots.y,
                     sum);
    }
    if (sharing > 1) {
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) storage.o[warp][j][lane] = sum.o[j];
      if (lane == 0) storage.state[warp] = make_float2(sum.max2, sum.sum);
      sync();
      if (share == 0) {
#pragma unroll 1
        for (int other = warp + 1; other < warp + sharing; ++other) {
          float4 x[4];
          CUTE_UNROLL
          for (int j = 0; j < 4; ++j) x[j] = storage.o[other][j][lane];
          const float2 state = storage.state[other];
          sum.raise(state.x);
          sum.add(sum.weight_of(state.x), state.y, x);
        }
      }
      sync();
    }
    if (nth < total && share == 0) sum.template store<T>(p, request, row);
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
  unsigned arrived = 0;
  if (thread == 0) arrived = arrive_in_grid(p.meeting, blocks, block == 0);
  if (thread / 32 == 1) {  // while others are still at work
    storage.todo.collect(p.plan, p.shape.parts, p.shape.batch);
    __syncwarp();
    for (int i = thread % 32; i < storage.todo.count; i += 32) {
      const int* first = p.num_splits + storage.todo.request[i];
      const int slot = max(0, first[0]);
      storage.slots[i] = make_int2(slot, min(first[1], p.partials.slots) - slot);
    }
  }
  if (thread == 0) wait_in_grid(p.meeting, arrived);
  sync();
  merge_rows<T>(p, storage, block, blocks, thread / 32, sync);
}

}  // namespace flashmla::sm90::dense_decode
