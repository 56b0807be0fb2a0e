// Where a finished stretch of tiles goes: to `out` and `lse` when the request was not split,
// otherwise to its slot of the partial results, which the combine kernel merges.
#pragma once

#include "config.cuh"
#include "softmax.cuh"

namespace flashmla::sm90::dense_decode {

// o: this thread's part of O[64 rows, 256 columns of half kMine], not yet divided by the row sums.
template <class T, int kMine, class Output>
__device__ __forceinline__ void store_result(const KernelParams& p, const WorkItem& item, int row,
                                             Output& o, const RowPair& max, const RowPair& sum) {
  const bool whole = item.splits == 1;
  if (!whole && (item.slot < 0 || item.slot >= p.partials.slots)) return;
  const int column = kMine * kHalfV + (threadIdx.x % 4) * 2;
  const bool writes_lse = kMine == 0 && threadIdx.x % 4 == 0;
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int r = blockIdx.x * kRows + row + 8 * h;
    if (r >= p.shape.rows()) continue;
    const bool empty = sum.v[h] == 0.f;  // nothing this row may see: out 0, lse +inf
    const float max2 = max.v[h] * p.scale_log2;
    const float lse2 = max2 + log2f(sum.v[h]);
    const int head = blockIdx.y * p.shape.group() + r % p.shape.group();
    float total = sum.v[h];  // a sink weighs in where the result is whole, and nowhere else
    if (whole && p.attn_sink != nullptr) {
      total += exp2f(p.attn_sink[head] * 1.4426950408889634f - max2);
    }
    const float inverse = empty ? 0.f : 1.f / total;
    if (whole) {
      const int s = r / p.shape.group();
      const int64_t query = static_cast<int64_t>(item.request) * p.shape.s_q + s;
      T* to = static_cast<T*>(p.out) + (query * p.shape.h_q + head) * kDimV + column;
      CUTE_UNROLL
      for (int i = 0; i < cute::size(o); i += 4) {
        cutlass::NumericArrayConverter<T, float, 2> convert;
        const auto pair = convert({o(i + 2 * h) * inverse, o(i + 2 * h + 1) * inverse});
        *reinterpret_cast<uint32_t*>(to + i * 2) = reinterpret_cast<const uint32_t&>(pair);
      }
      if (writes_lse) {
        const int64_t at = (static_cast<int64_t>(item.request) * p.shape.h_q + head) * p.shape.s_q;
        p.lse[at + s] = empty ? INFINITY : lse2 * 0.6931471805599453f;
      }
    } else {
      const int64_t at =
          (static_cast<int64_t>(item.slot) * p.shape.h_kv + blockIdx.y) * p.shape.rows() + r;
      float* to = p.partials.out + at * kDimV + column;
      CUTE_UNROLL
      for (int i = 0; i < cute::size(o); i += 4) {
        *reinterpret_cast<float2*>(to + i * 2) =
            make_float2(o(i + 2 * h) * inverse, o(i + 2 * h + 1) * inverse);
      }
      if (writes_lse) p.partials.lse[at] = empty ? -INFINITY : lse2;
    }
  }
}

}  // namespace flashmla::sm90::dense_decode
