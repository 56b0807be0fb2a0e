// get_mla_metadata on the device: one block computes the whole plan, in closed form, so that it
// can be recomputed inside a CUDA graph when lengths change.
//
// All requests lie on one line: request r covers [C_r, C_{r+1}), C_{r+1} = C_r + overhead + tiles_r.
// The line is cut into equal stretches, one a part. A cut that falls on a request's overhead moves
// to the request's first tile, so a request is never split for less than a tile.
#include <cub/block/block_scan.cuh>

#include "../common/cuda_check.h"
#include "launch.h"
#include "schedule.h"

namespace flashmla::sm90 {
namespace {

constexpr int kThreads = 512;

// Largest p < active whose position floor(p * line / active) is at most y.
__device__ int last_part_at_or_before(int y, int active, int64_t line) {
  const int64_t p = ((static_cast<int64_t>(y) + 1) * active - 1) / line;
  return static_cast<int>(p < active - 1 ? p : active - 1);
}

struct Cut {
  int request;
  int tile;
};

// region: cut
// Where part p begins. starts[r] = C_r for r in [0, batch], starts[batch] = line.
__device__ Cut cut_of(int p, int active, int64_t line, const int* starts, int batch) {
  if (p >= active) return {batch, 0};
  const int position = static_cast<int>(p * line / active);
  int low = 0, high = batch;  // the request with starts[low] <= position < starts[low + 1]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (starts[middle] <= position ? low : high) = middle;
  }
  const int tile = position - starts[low] - kStartOverhead;
  return {low, tile > 0 ? tile : 0};
}
// endregion: cut

// cache_seqlens [batch], plan [parts], num_splits [batch + 1]
__global__ void __launch_bounds__(kThreads)
    plan_kernel(const int* __restrict__ cache_seqlens, PlanRow* __restrict__ plan,
                int* __restrict__ num_splits, int batch, int parts) {
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage scan_storage;

  // Each thread owns a contiguous run of requests. num_splits holds C_r until its last use.
  const int per_thread = (batch + kThreads - 1) / kThreads;
  const int first = min(batch, static_cast<int>(threadIdx.x) * per_thread);
  const int last = min(batch, first + per_thread);

  int sum = 0;
  for (int r = first; r < last; ++r) sum += kStartOverhead + tiles_of(cache_seqlens[r]);
  int start, line;
  Scan(scan_storage).ExclusiveSum(sum, start, line);
  if (threadIdx.x == 0) num_splits[0] = 0;
  const int first_start = start;
  for (int r = first; r < last; ++r) {
    start += kStartOverhead + tiles_of(cache_seqlens[r]);
    num_splits[r + 1] = start;
  }
  __syncthreads();

  const int active = min(parts, line);
  for (int p = threadIdx.x; p < parts; p += kThreads) {
    const Cut begin = cut_of(p, active, line, num_splits, batch);
    const Cut end = cut_of(p + 1, active, line, num_splits, batch);
    int split = 0;
    if (begin.tile > 0) {
      split = p - last_part_at_or_before(num_splits[begin.request] + kStartOverhead, active, line);
    }
    plan[p] = {begin.request, begin.tile, end.request, end.tile, split, {0, 0, 0}};
  }

  // Splits of request r: from the last part that starts at or before its first tile to the last
  // part that starts before its end.
  auto splits_of = [&](int r_start, int r_end) {
    const int from = last_part_at_or_before(r_start + kStartOverhead, active, line);
    const int to = last_part_at_or_before(r_end - 1, active, line);
    return max(1, to - from + 1);
  };
  int splits = 0;
  for (int r = first, s = first_start; r < last; ++r) {
    const int e = num_splits[r + 1];
    splits += splits_of(s, e);
    s = e;
  }
  __syncthreads();  // the scan storage is used again, and everybody has read C for the cuts
  int before;
  Scan(scan_storage).ExclusiveSum(splits, before);
  for (int r = first, s = first_start; r < last; ++r) {
    const int e = num_splits[r + 1];
    before += splits_of(s, e);
    s = e;
    num_splits[r + 1] = before;
  }
}

}  // namespace

void launch_plan(const int* cache_seqlens, int* plan, int* num_splits, int batch, int parts,
                 cudaStream_t stream) {
  plan_kernel<<<1, kThreads, 0, stream>>>(cache_seqlens, reinterpret_cast<PlanRow*>(plan),
                                          num_splits, batch, parts);
  FLASHMLA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace flashmla::sm90
