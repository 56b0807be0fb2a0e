// The k-th largest of a set of keys by a block: radix selection, some bits a pass.
#pragma once

#include <cstdint>

namespace flashmla::sm90::topk {

// What the block works with; digits of more bits need fewer passes and more room.
template <int DigitBits>
struct Scratch {
  static constexpr int kDigitBits = DigitBits;
  static constexpr int kBins = 1 << kDigitBits;
  union alignas(16) {
    unsigned histogram[kBins];
    uint64_t list[kBins / 2];  // of keys that are left, once no histogram is needed any more
  };
  int warp_sums[32];
  int bin, above, inside;  // where the search goes on
  int candidates;
  int listed;
  unsigned largest;
};

__device__ __forceinline__ int warp_inclusive_sum(int x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, x, step);
    if (lane >= step) x += other;
  }
  return x;
}

// Sum over the threads before this one; `total` over all. A barrier must lie between two calls.
__device__ __forceinline__ int block_exclusive_sum(int x, int* warp_sums, int& total) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int inclusive = warp_inclusive_sum(x);
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  const int sum = lane < static_cast<int>(blockDim.x) / 32 ? warp_sums[lane] : 0;
  total = __reduce_add_sync(~0u, sum);
  return __reduce_add_sync(~0u, lane < warp ? sum : 0) + inclusive - x;
}

// The bin of the histogram that the k-th largest lies in: how many are above it, how many inside.
struct Place {
  int bin, above, inside;
};

// Finds it and clears the histogram; false if there are fewer than k. All of the block calls it,
// behind a barrier.
template <int kThreads, class S>
__device__ __forceinline__ bool find_bin(int k, S& scratch, Place& place) {
  constexpr int kBins = S::kBins;
  constexpr int kOwn = kBins / kThreads;
  // Thread 0 owns the highest bins.
  const int first = kBins - (static_cast<int>(threadIdx.x) + 1) * kOwn;
  int own[kOwn];
  int sum = 0;
  if constexpr (kOwn % 4 == 0) {  // as vectors, whose banks do not conflict
    auto* bins = reinterpret_cast<uint4*>(&scratch.histogram[first]);
#pragma unroll
    for (int i = 0; i < kOwn / 4; ++i) {
      const uint4 four = bins[i];
      own[4 * i] = four.x, own[4 * i + 1] = four.y, own[4 * i + 2] = four.z,
              own[4 * i + 3] = four.w;
      bins[i] = make_uint4(0, 0, 0, 0);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      own[i] = scratch.histogram[first + i];
      scratch.histogram[first + i] = 0;
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) sum += own[i];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int mine = __reduce_add_sync(~0u, sum);
  if (lane == 0) scratch.warp_sums[warp] = mine;
  __syncthreads();
  const int theirs = lane < kThreads / 32 ? scratch.warp_sums[lane] : 0;
  if (__reduce_add_sync(~0u, theirs) < k) return false;
  const int before = __reduce_add_sync(~0u, lane < warp ? theirs : 0);
  if (before < k && before + mine >= k) {  // in this warp's bins
    int above = before + warp_inclusive_sum(sum) - sum;
#pragma unroll
    for (int i = kOwn - 1; i >= 0; --i) {
      if (above < k && above + own[i] >= k) {
        scratch.bin = first + i;
        scratch.above = above;
        scratch.inside = own[i];
      }
      above += own[i];
    }
  }
  __syncthreads();
  place = {scratch.bin, scratch.above, scratch.inside};
  return true;
}

// The largest value that at least k keys reach, found down to bit `stop`: all bits below are zero.
// `each` calls its argument with every key of this thread's share; keys are below 2^top. If fewer
// than k keys exist, 0. All of the block calls it, with a histogram of zeros, and leaves it so; a
// barrier must have passed since anybody used the scratch.
template <class Key, int kThreads, class ForEach, class S>
__device__ __forceinline__ Key kth_largest(ForEach each, int k, int top, int stop, S& scratch) {
  constexpr int kDigitBits = S::kDigitBits;
  Key prefix = 0;
  while (true) {
    const int low = top - kDigitBits > stop ? top - kDigitBits : stop;
    const int width = top - low;
    each([&](Key key) {
      const Key digits = key >> low;
      if (digits >> width == prefix) {
        atomicAdd(&scratch.histogram[digits & ((1u << width) - 1)], 1u);
      }
    });
    __syncthreads();
    Place place;
    if (!find_bin<kThreads>(k, scratch, place)) return 0;
    prefix = prefix << width | static_cast<unsigned>(place.bin);
    k -= place.above;
    top = low;
    if (place.inside == k || top == stop) return prefix << top;
  }
}

}  // namespace flashmla::sm90::topk
