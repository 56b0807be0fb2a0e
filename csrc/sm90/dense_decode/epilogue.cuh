// Where a finished stretch of tiles goes: to `out` and `lse` when the request was not split,
// otherwise to its slot of the partial results, which merge.cuh (or combine.cu) merges.
#pragma once

#include "../../common/log_base.h"
#include "../partials.cuh"
#include "config.cuh"
#include "softmax.cuh"
#include "store.cuh"

namespace flashmla::sm90::dense_decode {

// o: this thread's part of O[64 rows, 256 columns of half `mine`], not yet divided by the row sums.
// staging: 32 KB of this consumer alone, which `release` gives back; null where there was nothing
// to attend to, and O is zero.
template <class T, class Output, class Release>
__device__ __forceinline__ void store_result(const KernelParams& p, const WorkItem& item, int mine,
                                             int thread, const Output& o, const RowPair& max,
                                             const RowPair& sum, void* staging,
                                             const Release& release) {
  const bool whole = item.splits == 1;
  const int group = p.group.divisor;
  const int first = blockIdx.x * kRows;
  const int warp_row = thread / 32 * kWarpRows, row = warp_row + thread % 32 / 4;  // and row + 8
  RowPair factor, lse2, unit;                                                      // LSE to base 2
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int r = first + row + 8 * h;
    const float max2 = max.v[h] * p.scale_log2;
    lse2.v[h] = max2 + log2f(sum.v[h]);
    float total = sum.v[h];  // a sink weighs in where the result is whole, and nowhere else
    if (whole && p.attn_sink != nullptr && r < p.rows.divisor) {
      const int head = blockIdx.y * group + p.group.rem(r);
      total += exp2f(p.attn_sink[head] * kLog2E - max2);
    }
    // Nothing this row may see: out 0, lse +inf.
    factor.v[h] = sum.v[h] == 0.f ? 0.f : 1.f / total;
  }
  if (!whole) {
    const RowPair largest = largest_of_rows(o);
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      unit.v[h] = unit_of(largest.v[h] * factor.v[h]);
      factor.v[h] *= inverse_of_unit(unit.v[h]);
    }
  }

  const int64_t first_partial =  // row of all partial results
      (static_cast<int64_t>(item.slot) * p.shape.h_kv + blockIdx.y) * p.rows.divisor + first;
  const bool fits = whole || (item.slot >= 0 && item.slot < p.partials.slots);
  RowsOut rows;
  if (whole) {
    int s, head;
    p.group(s, head, first + warp_row);
    const int64_t query = static_cast<int64_t>(item.request) * p.shape.s_q + s;
    const int64_t at = (query * p.shape.h_q + blockIdx.y * group + head) * kDimV + mine * kHalfV;
    rows.first = static_cast<char*>(p.out) + at * kResultBytes;
    rows.until_gap = group - head;
    rows.group = group;
    rows.gap = static_cast<int64_t>(p.shape.h_q - group) * kDimV * kResultBytes;
  } else {
    const int64_t at = (first_partial + warp_row) * kDimV + mine * kHalfV;
    rows.first = static_cast<char*>(p.partials.out) + at * kResultBytes;
    rows.until_gap = rows.group = kWarpRows;
    rows.gap = 0;
  }
  rows.count = fits ? p.rows.divisor - first - warp_row : 0;
  if (staging == nullptr) {
    rows.write(thread % 32, [](int) { return make_uint4(0, 0, 0, 0); });
  } else {
    const Chunks chunks = rounded_rows<T>(thread, o, factor, !whole, staging);
    release();
    rows.write(thread % 32, [&](int r) { return chunks.of[r]; });
  }

  const bool writes_rows = thread % 4 == 0 && fits;
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int r = first + row + 8 * h;
    if (!writes_rows || r >= p.rows.divisor) continue;
    const bool empty = sum.v[h] == 0.f;
    if (!whole) {
      PartialRow& state = p.partials.rows[first_partial + row + 8 * h];
      state.unit[mine] = unit.v[h];
      if (mine == 0) state.lse2 = empty ? -INFINITY : lse2.v[h];
    } else if (mine == 0) {
      const int64_t head =
          static_cast<int64_t>(item.request) * p.shape.h_q + blockIdx.y * group + p.group.rem(r);
      p.lse[head * p.shape.s_q + p.group.div(r)] = empty ? INFINITY : lse2.v[h] * kLn2;
    }
  }
}

}  // namespace flashmla::sm90::dense_decode
