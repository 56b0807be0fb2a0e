// Where the result of an item goes: to `out` and `lse`, or, of pages only, to its slot of the
// partial results, which sm90/combine.cu merges.
#pragma once

#include <cutlass/numeric_conversion.h>

#include <type_traits>

#include "../../common/accumulator.cuh"
#include "epilogue.cuh"
#include "few_rows_config.cuh"

namespace flashmla::sm90::sparse_decode::few_rows {

// What is known of the query rows of which a thread has scores.
template <int kN>
struct Rows {
  static constexpr int kCount = kN / 4;
  float max[kCount];  // that scores are shifted by; -inf before the first
  float sum[kCount];  // of probabilities

  __device__ __forceinline__ static int number(int i) { return own_column(i); }
};

// Four neighbouring columns of a row of out [rows, 512].
template <class T>
__device__ __forceinline__ void store_four(T* out, int64_t row, int column, const float4& x,
                                           float factor) {
  cutlass::NumericArrayConverter<T, float, 4> convert;
  const auto four = convert({x.x * factor, x.y * factor, x.z * factor, x.w * factor});
  *reinterpret_cast<uint2*>(out + row * kDimV + column) = reinterpret_cast<const uint2&>(four);
}

// Of the thread's query row i, the four neighbouring columns of group g, from columns() on.
template <class Output>
__device__ __forceinline__ float4 four_columns(const Output& o, int i, int g) {
  const int at = i / 2 * 4 + i % 2;
  return make_float4(o(at, 2 * g, 0), o(at + 2, 2 * g, 0), o(at, 2 * g + 1, 0),
                     o(at + 2, 2 * g + 1, 0));
}
__device__ __forceinline__ int columns(int of_thread, int g) {
  return g * kGroupCols + of_thread / 4 * 4;
}

// By the warpgroup that has added up everything. o: its part of Oᵀ, not yet divided by the sums.
// largest: magnitude in the warps' parts of each row of O; of partial results only.
template <int kN, class Item, class Output>
__device__ __forceinline__ void store(const KernelParams& p, const Item& item, const Rows<kN>& rows,
                                      const float (&largest)[kWarps][kN], const Output& o) {
  const int thread = threadIdx.x % 128;
  constexpr bool kPaged = std::is_same_v<Item, PagedItem>;
  if constexpr (kPaged) {
    if (!item.is_whole && (item.slot < 0 || item.slot >= p.pages.partials.slots)) return;
  }
  CUTE_UNROLL
  for (int i = 0; i < Rows<kN>::kCount; ++i) {
    const int r = Rows<kN>::number(i), row = item.row(r);
    if (!item.exists(p, r)) continue;
    const bool empty = rows.sum[i] == 0.f;  // nothing this query may see: out 0, lse +inf
    const float lse2 = rows.max[i] * p.scale_log2 + log2f(rows.sum[i]);
    float factor = empty ? 0.f : 1.f / rows.sum[i];
    const bool writes_lse = thread < 4;
    if (item.whole(p)) {
      const int head = item.head(p, r);
      if (!empty) factor *= sink_share(p.attn_sink, head, lse2);
      if (writes_lse) store_lse(p, item.query_of(p, r), head, empty ? INFINITY : lse2 * kLn2);
      CUTE_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        store_four(static_cast<Element*>(p.out), item.base_row(p) + row, columns(thread, g),
                   four_columns(o, i, g), factor);
      }
    } else if constexpr (kPaged) {
      const int64_t at = static_cast<int64_t>(item.slot) * p.pages.rows + row;
      float of_row = 0.f;
      CUTE_UNROLL
      for (int w = 0; w < kWarps; ++w) of_row = fmaxf(of_row, largest[w][r]);
      const float unit = unit_of(of_row * factor);
      if (writes_lse) {
        p.pages.partials.rows[at] = {empty ? -INFINITY : lse2, {unit, unit}, 0.f};
      }
      factor *= inverse_of_unit(unit);
      CUTE_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        store_four(static_cast<cutlass::half_t*>(p.pages.partials.out), at, columns(thread, g),
                   four_columns(o, i, g), factor);
      }
    }
  }
}

}  // namespace flashmla::sm90::sparse_decode::few_rows
