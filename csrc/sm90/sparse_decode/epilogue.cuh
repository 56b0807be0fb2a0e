// Where a finished stretch of tiles goes: to `out` and `lse` when the list or request was not
// split, otherwise to its slot of the partial results. Those of lists lie in the order of the
// accumulators (merge.cuh), those of pages as dense decode has them: sm90/combine.cu merges them.
#pragma once

#include <cutlass/numeric_conversion.h>

#include <type_traits>

#include "../../common/log_base.h"
#include "../partials.cuh"
#include "source.cuh"

namespace flashmla::sm90::sparse_decode {

// A lane's numbers of a pair of groups of 8 columns that are neighbours in `out`: 16 bytes of a
// list's partial result.
constexpr int kVectorsAWarp = kHalfV / 16 * 32;

// What the sink leaves to the keys: exp(lse) / (exp(lse) + exp(sink)).
__device__ __forceinline__ float sink_share(const float* attn_sink, int head, float lse2) {
  return attn_sink == nullptr ? 1.f : 1.f / (1.f + exp2f(attn_sink[head] * kLog2E - lse2));
}

// lse [batch, h_q, s_q]
__device__ __forceinline__ void store_lse(const KernelParams& p, int query, int head, float lse) {
  int b, s;
  p.by_s_q(b, s, query);
  p.lse[(static_cast<int64_t>(b) * p.h_q + head) * p.s_q + s] = lse;
}

// Four threads hold x[0..3] each; afterwards thread i holds element i of all four, in their order.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4]) {
  constexpr unsigned kAll = 0xffffffffu;
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
  CUTE_UNROLL
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(kAll, odd ? x[i] : x[i + 1], 1);
    (odd ? x[i] : x[i + 1]) = got;
  }
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(kAll, upper ? x[i] : x[i + 2], 2);
    (upper ? x[i] : x[i + 2]) = got;
  }
}

// o: this thread's part of O[64 rows, 256 columns of half `mine`], not yet divided by the row sums.
// Element 4 n + 2 h + e is of row + 8 h and, in shared memory's order of columns, of piece n / 8,
// chunk n % 8, element thread % 4 * 2 + e.
template <class T, Parts kParts, class Item, class Output>
__device__ __forceinline__ void store_result(const KernelParams& p, const Item& item, int mine,
                                             int row, Output& o, const RowPair& max,
                                             const RowPair& sum) {
  const int quad = threadIdx.x % 4;
  const bool writes_lse = mine == 0 && quad == 0;
  constexpr bool kPaged = std::is_same_v<Item, PagedItem>;
  if constexpr (kPaged) {
    if (!item.is_whole && (item.slot < 0 || item.slot >= p.pages.partials.slots)) return;
  }
  const bool whole = kParts == Parts::kEither ? item.whole(p) : kParts == Parts::kWhole;
  RowPair factor;  // what is left to multiply O with
  RowPair lse;     // base 2
  RowPair largest{{0.f, 0.f}};
  if (kPaged && !whole) largest = largest_of_rows(o);
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int head = item.head(p, row + 8 * h);
    const bool exists = item.exists(p, row + 8 * h);
    const bool empty = sum.v[h] == 0.f;  // nothing this query may see: out 0, lse +inf
    const float lse2 = max.v[h] * p.scale_log2 + log2f(sum.v[h]);
    lse.v[h] = empty ? -INFINITY : lse2;
    factor.v[h] = empty ? 0.f : 1.f / sum.v[h];
    if (whole) {
      if (exists && !empty) factor.v[h] *= sink_share(p.attn_sink, head, lse2);
      if (exists && writes_lse)
        store_lse(p, item.query_of(p, row + 8 * h), head, empty ? INFINITY : lse2 * kLn2);
    } else if constexpr (kPaged) {
      const float unit = unit_of(largest.v[h] * factor.v[h]);
      factor.v[h] *= inverse_of_unit(unit);
      if (exists && quad == 0) {
        const int64_t slot_row = static_cast<int64_t>(item.slot) * p.pages.rows;
        PartialRow& state = p.pages.partials.rows[slot_row + item.row(row + 8 * h)];
        state.unit[mine] = unit;
        if (mine == 0) state.lse2 = lse.v[h];
      }
    }
  }

  if (kPaged || whole) {
    // region: store_rows
    // As T or, of a partial result, as float16: of one size.
    uint16_t* out = static_cast<uint16_t*>(p.out) + item.base_row(p) * kDimV;
    const bool partial = kPaged && !whole;
    if constexpr (kPaged) {
      if (partial) {
        out = static_cast<uint16_t*>(p.pages.partials.out) +
              static_cast<int64_t>(item.slot) * p.pages.rows * kDimV;
      }
    }
    out += mine * kHalfV + quad * 8;
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int r = item.row(row + 8 * h);
      CUTE_UNROLL
      for (int c = 0; c < kHalfV / 32; ++c) {  // 32 neighbouring columns: two chunks i, both h
        uint32_t x[4];
        CUTE_UNROLL
        for (int k = 0; k < 4; ++k) {
          const int n = (c / 4 * 2 + k % 2) * 8 + c % 4 * 2 + k / 2;
          x[k] = rounded_pair<T>(o(4 * n + 2 * h) * factor.v[h], o(4 * n + 2 * h + 1) * factor.v[h],
                                 partial);
        }
        transpose_quad(x);
        if (item.exists(p, row + 8 * h)) {
          auto* to = reinterpret_cast<uint4*>(out + static_cast<int64_t>(r) * kDimV + c * 32);
          *to = make_uint4(x[0], x[1], x[2], x[3]);
        }
      }
    }
    // endregion: store_rows
  } else if constexpr (!kPaged) {
    if (item.first_head + row / 16 * 16 >= p.h_q) return;  // none of this warp's rows exists
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int64_t at = (static_cast<int64_t>(item.number) * 2 + mine) * 4 + warp;
    const RowPair finite = largest_of_rows<true>(o);
    RowPair unit;
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      unit.v[h] = unit_of(finite.v[h] * factor.v[h]);
      factor.v[h] *= inverse_of_unit(unit.v[h]);
    }
    if (quad == 0) {
      p.list_partials.rows[at * 8 + lane / 4] =
          make_float4(lse.v[0], unit.v[0], lse.v[1], unit.v[1]);
    }
    uint4* to = p.list_partials.out + at * kVectorsAWarp + lane;
    CUTE_UNROLL
    for (int pair = 0; pair < kVectorsAWarp / 32; ++pair) {
      __half2 x[4];
      CUTE_UNROLL
      for (int k = 0; k < 4; ++k) {
        const int n = pair / 8 * 16 + pair % 8 + k / 2 * 8, h = k % 2;
        x[k] =
            __floats2half2_rn(o(4 * n + 2 * h) * factor.v[h], o(4 * n + 2 * h + 1) * factor.v[h]);
      }
      to[pair * 32] = reinterpret_cast<const uint4&>(x);
    }
  }
}

}  // namespace flashmla::sm90::sparse_decode
