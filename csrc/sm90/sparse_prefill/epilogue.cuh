// Where a finished item goes: out, by way of shared memory, and its two numbers a row.
#pragma once

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "../../common/log_base.h"
#include "softmax.cuh"

namespace flashmla::sm90::sparse_prefill {

// What O[64 rows, 512] has to be multiplied by. `sum` and `max` are of this thread's two rows.
__device__ __forceinline__ RowPair output_factor(const KernelParams& p, const WorkItem& item,
                                                 int row, const RowPair& max, const RowPair& sum) {
  RowPair factor;
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int head = item.first_head + row + 8 * h;
    float total = sum.v[h];
    if (p.attn_sink != nullptr && head < p.h_q) {
      total += exp2f(__ldg(p.attn_sink + head) * kLog2E - max.v[h] * p.scale_log2);
    }
    factor.v[h] = sum.v[h] == 0.f ? 0.f : 1.f / total;  // nothing this row may see: out 0
  }
  return factor;
}

// O[64 rows, 256 columns] in T to shared memory, [4 pieces][64 rows][64], in the 128-byte swizzle.
template <class T, class Output>
__device__ __forceinline__ void stage_output(T* to, const Output& o, const RowPair& factor) {
  const int lane = threadIdx.x % 32;
  const int matrix_row = threadIdx.x % 128 / 32 * 16 + lane % 16;
  cutlass::NumericArrayConverter<T, float, 2> convert;
  CUTE_UNROLL
  for (int k = 0; k < kHalfV / 16; ++k) {  // sixteen columns
    uint32_t x[4];
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float f = factor.v[i % 2];
      const auto pair = convert({o(k * 8 + i * 2) * f, o(k * 8 + i * 2 + 1) * f});
      x[i] = reinterpret_cast<const uint32_t&>(pair);
    }
    const int chunk = (k % 4 * 2 + lane / 16) ^ (matrix_row % 8);
    auto* at = reinterpret_cast<cute::uint128_t*>(to + k / 4 * kPieceElements +
                                                  matrix_row * kPieceCols + chunk * 8);
    cute::SM90_U32x4_STSM_N::copy(x[0], x[1], x[2], x[3], *at);
  }
}

// An item that has no tiles: zeros in [64 rows, 256 columns of half kMine], by a warpgroup.
template <class T, int kMine>
__device__ __forceinline__ void store_nothing(const KernelParams& p, const WorkItem& item) {
  constexpr int kChunks = kHalfV / 8;  // of 16 bytes, a row
  const int rows = min(kRows, p.h_q - item.first_head);
  T* out = static_cast<T*>(p.out) +
           (static_cast<int64_t>(item.query) * p.h_q + item.first_head) * kDimV + kMine * kHalfV;
  for (int n = threadIdx.x % 128; n < rows * kChunks; n += 128) {
    *reinterpret_cast<uint4*>(out + n / kChunks * kDimV + n % kChunks * 8) = make_uint4(0, 0, 0, 0);
  }
}

// By one thread of the four that share a row.
__device__ __forceinline__ void store_row_results(const KernelParams& p, const WorkItem& item,
                                                  int row, const RowPair& max, const RowPair& sum,
                                                  const RowPair& top) {
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int head = item.first_head + row + 8 * h;
    if (head >= p.h_q) continue;
    const int64_t at = static_cast<int64_t>(item.query) * p.h_q + head;
    const float lse2 = max.v[h] * p.scale_log2 + log2f(sum.v[h]);
    p.lse[at] = sum.v[h] == 0.f ? INFINITY : lse2 * p.lse_unit;
    p.max_logits[at] = sum.v[h] == 0.f ? -INFINITY : top.v[h] * p.scale;
  }
}

}  // namespace flashmla::sm90::sparse_prefill
