// What both kernels do with elements that may be among the k largest.
#pragma once

#include <cstdint>

#include "row.cuh"
#include "select.cuh"

namespace flashmla::sm90::topk {

constexpr int kGroup = 128;  // positions whose bits a thread takes at a time

// What reached the floor, until keys are made of it: bits 0-31 the float, 32-63 the position.
__device__ __forceinline__ uint64_t make_candidate(float x, int position) {
  return static_cast<uint64_t>(static_cast<unsigned>(position)) << 32 |
         static_cast<unsigned>(__float_as_int(x));
}

// Appends what the window holds of a thread's vectors to the candidates, in no certain order, and
// counts it; what is beyond the capacity is only counted. position(j) is that of vector j's first.
template <int kVectors, class PositionOf>
__device__ __forceinline__ void keep(const float4 (&x)[kVectors], PositionOf position,
                                     const Window& window, int capacity, uint64_t* candidates,
                                     int* count) {
  int own = 0;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    own += window.holds(x[j].x);
    own += window.holds(x[j].y);
    own += window.holds(x[j].z);
    own += window.holds(x[j].w);
  }
  const int inclusive = warp_inclusive_sum(own);
  const int together = __shfl_sync(~0u, inclusive, 31);
  if (together == 0) return;
  int base = 0;
  if (threadIdx.x % 32 == 0) base = atomicAdd(count, together);
  base = __shfl_sync(~0u, base, 0);
  if (base + together > capacity) return;
  uint64_t* to = candidates + base + inclusive - own;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int first = position(j);
    if (window.holds(x[j].x)) *to++ = make_candidate(x[j].x, first);
    if (window.holds(x[j].y)) *to++ = make_candidate(x[j].y, first + 1);
    if (window.holds(x[j].z)) *to++ = make_candidate(x[j].z, first + 2);
    if (window.holds(x[j].w)) *to++ = make_candidate(x[j].w, first + 3);
  }
}

__device__ __forceinline__ void mark(unsigned* chosen, int position) {
  atomicOr(&chosen[position / 32], 1u << position % 32);
}

// Marks the k largest of the whole row, which is read for each digit of the keys.
template <int kThreads, class S>
__device__ __forceinline__ void choose_from_row(const Row& row, int k, unsigned* chosen,
                                                S& scratch) {
  const Window all(kLowest);
  const auto each = [&](auto&& use) {
    for (int v = threadIdx.x; v < row.count(); v += kThreads) {
      const float4 x = row.load(v);
      const int position = row.position(v);
      if (all.holds(x.x)) use(make_key(all.rise(x.x), position));
      if (all.holds(x.y)) use(make_key(all.rise(x.y), position + 1));
      if (all.holds(x.z)) use(make_key(all.rise(x.z), position + 2));
      if (all.holds(x.w)) use(make_key(all.rise(x.w), position + 3));
    }
  };
  const uint64_t least = kth_largest<uint64_t, kThreads>(each, k, 64, kKeyEnd, scratch);
  each([&](uint64_t key) {
    if (key >= least) mark(chosen, position_of(key));
  });
}

// Where a position of a row is in the cache; without a block table the position itself.
__device__ __forceinline__ int cache_place(const TopkArgs& a, int64_t row, int position) {
  if (a.block_table == nullptr) return position;
  const int* table = a.block_table + row * a.block_table_stride;
  return table[position / a.page] * a.page + position % a.page;
}

// Writes the positions whose bits are set, ascending, and then -1.
template <int kThreads, class S>
__device__ __forceinline__ void write_row(const TopkArgs& a, int64_t row, const uint4* chosen,
                                          int groups, int* positions, S& scratch) {
  int done = 0;
#pragma unroll 1
  for (int base = 0; base < groups; base += kThreads) {
    const int group = base + static_cast<int>(threadIdx.x);
    const uint4 word = group < groups ? chosen[group] : make_uint4(0, 0, 0, 0);
    const auto* words = reinterpret_cast<const unsigned*>(chosen + group);
    const int own = __popc(word.x) + __popc(word.y) + __popc(word.z) + __popc(word.w);
    int total;
    int at = done + block_exclusive_sum(own, scratch.warp_sums, total);
#pragma unroll 1
    for (int w = 0; w < 4; ++w) {
#pragma unroll 1
      for (unsigned bits = group < groups ? words[w] : 0; bits != 0; bits &= bits - 1) {
        positions[at++] = kGroup * group + 32 * w + __ffs(static_cast<int>(bits)) - 1;
      }
    }
    done += total;
    __syncthreads();
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < a.k; i += kThreads) {
    a.out[row * a.k + i] = i < done ? cache_place(a, row, positions[i]) : -1;
  }
}

}  // namespace flashmla::sm90::topk
