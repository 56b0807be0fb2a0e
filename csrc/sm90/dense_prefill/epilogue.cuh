// Where a finished block of rows goes: normalised to `out`, its logarithms to `lse`.
#pragma once

#include "../../common/log_base.h"
#include "config.cuh"
#include "rows.cuh"
#include "softmax.cuh"

namespace flashmla::sm90::dense_prefill {

// o: this thread's part of O[64 rows, 128], not yet divided by the row sums; `row` is the first of
// its two rows in the sequence. Rows before the sequence's first are somebody else's.
template <class T, class Output>
__device__ __forceinline__ void store_result(const KernelParams& p, const Work& work, int row,
                                             const Output& o, const RowPair& max,
                                             const RowPair& sum) {
  const int64_t at = (static_cast<int64_t>(work.first_query) + row) * p.h_q + work.head;
  const bool exists[2] = {row >= 0, row + 8 >= 0};
  float inverse[2];
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const bool empty = sum.v[h] == 0.f;  // nothing this row may see: out 0, lse +inf
    inverse[h] = empty ? 0.f : 1.f / sum.v[h];
    if (exists[h] && threadIdx.x % 4 == 0) {
      const float lse2 = max.v[h] * p.scale_log2 + log2f(sum.v[h]);
      p.lse[at + int64_t{8} * h * p.h_q] = empty ? INFINITY : lse2 * kLn2;
    }
  }
  store_rows<kDimV>(static_cast<T*>(p.out) + at * kDimV, int64_t{8} * p.h_q * kDimV, o, inverse,
                    exists);
}

}  // namespace flashmla::sm90::dense_prefill
