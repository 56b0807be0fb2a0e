// How a consumer's half of O leaves the registers, as T or as a partial result has it: through
// shared memory, so that a warp writes one row after another, 16 neighbouring bytes a lane. Written
// straight from where the accumulators lie, every store of a warp touches eight rows, 16 bytes of
// each.
//
// The staging, 32 KB, is the place in the ring that the consumer read last; each warp has a quarter
// of it for its 16 rows. O is back in registers before anything is written to global memory: the
// place comes free, and a fence would wait for those writes.
#pragma once

#include <cutlass/numeric_conversion.h>
#include <cute/arch/copy_sm90.hpp>

#include "../partials.cuh"
#include "config.cuh"
#include "softmax.cuh"

namespace flashmla::sm90::dense_decode {

constexpr int kWarpRows = 16;
constexpr int kLineChunks = 32;  // of 16 bytes: one a lane
constexpr int kResultBytes = 2;  // a number, of `out` and of a partial result

// The rows of a warp in global memory: `count` or all 16 from `first`, a row behind the other, but
// with a gap wherever one of s_q groups of heads ends.
struct RowsOut {
  char* first;
  int count;
  int until_gap;  // rows
  int group;
  int64_t gap;

  // One chunk of each row, from what `chunk_of(row)` gives.
  template <class ChunkOf>
  __device__ __forceinline__ void write(int lane, const ChunkOf& chunk_of) const {
    char* to = first + lane * 16;
    int left = until_gap;
    CUTE_UNROLL
    for (int r = 0; r < kWarpRows; ++r) {
      if (r < count) *reinterpret_cast<uint4*>(to) = chunk_of(r);
      to += kDimV * kResultBytes;
      if (--left == 0) {
        to += gap;
        left = group;
      }
    }
  }
};

// A lane's chunk of each of the warp's rows.
struct Chunks {
  uint4 of[kWarpRows];
};

// o[64 rows, 256 columns] times `factor`, as T or, if `partial`, float16, with a row's 512 bytes in
// the lanes of a warp. thread: of the consumer's 128.
template <class T, class Output>
__device__ __forceinline__ Chunks rounded_rows(int thread, const Output& o, const RowPair& factor,
                                               bool partial, void* staging) {
  // The chunks of a row are permuted by its number, against bank conflicts.
  const auto place = [](int row, int chunk) { return chunk ^ row % 8; };
  uint4* staged = static_cast<uint4*>(staging) + thread / 32 * kWarpRows * kLineChunks;
  const int lane = thread % 32;
  CUTE_UNROLL
  for (int k = 0; k < kHalfV / 16; ++k) {  // 16 columns: four matrices of 8 x 8
    uint32_t quarter[4];
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float f = factor.v[i & 1];
      quarter[i] = rounded_pair<T>(o(k * 8 + i * 2) * f, o(k * 8 + i * 2 + 1) * f, partial);
    }
    uint4* to = staged + lane % 16 * kLineChunks + k / 4 * 8 + place(lane, k % 4 * 2 + lane / 16);
    cute::SM90_U32x4_STSM_N::copy(quarter[0], quarter[1], quarter[2], quarter[3],
                                  *reinterpret_cast<cute::uint128_t*>(to));
  }
  __syncwarp();
  Chunks chunks;
  CUTE_UNROLL
  for (int r = 0; r < kWarpRows; ++r) chunks.of[r] = staged[r * kLineChunks + place(r, lane)];
  return chunks;
}

}  // namespace flashmla::sm90::dense_decode
