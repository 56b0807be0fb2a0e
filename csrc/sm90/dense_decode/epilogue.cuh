// Where a finished stretch of tiles goes: to `out` and `lse` when the request was not split,
// otherwise to its slot of the partial results, which merge.cuh (or combine.cu) merges.
#pragma once

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
  const int group = p.shape.group();
  const int first = blockIdx.x * kRows;
  const int warp_row = thread / 32 * kWarpRows, row = warp_row + thread % 32 / 4;  // and row + 8
  RowPair inverse, lse2;                                                           // in base 2
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int r = first + row + 8 * h;
    const float max2 = max.v[h] * p.scale_log2;
    lse2.v[h] = max2 + log2f(sum.v[h]);
    float total = sum.v[h];  // a sink weighs in where the result is whole, and nowhere else
    if (whole && p.attn_sink != nullptr && r < p.shape.rows()) {
      const int head = blockIdx.y * group + r % group;
      total += exp2f(p.attn_sink[head] * 1.4426950408889634f - max2);
    }
    // Nothing this row may see: out 0, lse +inf.
    inverse.v[h] = sum.v[h] == 0.f ? 0.f : 1.f / total;
  }

  const int64_t first_partial =  // row of all partial results
      (static_cast<int64_t>(item.slot) * p.shape.h_kv + blockIdx.y) * p.shape.rows() + first;
  const bool fits = whole || (item.slot >= 0 && item.slot < p.partials.slots);
  if (whole) {
    const int s = (first + warp_row) / group, head = (first + warp_row) % group;
    const int64_t query = static_cast<int64_t>(item.request) * p.shape.s_q + s;
    const int64_t at = (query * p.shape.h_q + blockIdx.y * group + head) * kDimV + mine * kHalfV;
    RowsOut rows;
    rows.first = reinterpret_cast<char*>(static_cast<T*>(p.out) + at);
    rows.row_bytes = kDimV * sizeof(T);
    rows.count = p.shape.rows() - first - warp_row;
    rows.until_gap = group - head;
    rows.group = group;
    rows.gap = static_cast<int64_t>(p.shape.h_q - group) * rows.row_bytes;
    if (staging == nullptr) {
      rows.write(thread % 32, [](int) { return make_uint4(0, 0, 0, 0); });
    } else {
      const Chunks chunks = rounded_rows<T>(thread, o, inverse, staging);
      release();
      rows.write(thread % 32, [&](int r) { return chunks.of[r]; });
    }
  } else {
    // Written where they lie: through shared memory is no quicker, 64 KB there and back.
    if (staging != nullptr) release();
    float* to = p.partials.out + (first_partial + row) * kDimV + mine * kHalfV + thread % 4 * 2;
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      if (fits && first + row + 8 * h < p.shape.rows()) {
        CUTE_UNROLL
        for (int i = 0; i < cute::size(o); i += 4) {
          *reinterpret_cast<float2*>(to + 8 * h * kDimV + i * 2) =
              make_float2(o(i + 2 * h) * inverse.v[h], o(i + 2 * h + 1) * inverse.v[h]);
        }
      }
    }
  }

  const bool writes_lse = mine == 0 && thread % 4 == 0 && fits;
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int r = first + row + 8 * h;
    if (!writes_lse || r >= p.shape.rows()) continue;
    const bool empty = sum.v[h] == 0.f;
    if (whole) {
      const int64_t head =
          static_cast<int64_t>(item.request) * p.shape.h_q + blockIdx.y * group + r % group;
      p.lse[head * p.shape.s_q + r / group] = empty ? INFINITY : lse2.v[h] * 0.6931471805599453f;
    } else {
      p.partials.lse[first_partial + row + 8 * h] = empty ? -INFINITY : lse2.v[h];
    }
  }
}

}  // namespace flashmla::sm90::dense_decode
