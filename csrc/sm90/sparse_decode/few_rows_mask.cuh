// Which tokens a query row may see, beside those that exist, where scores are [64 tokens, rows].
#pragma once

#include "few_rows_config.cuh"
#include "source.cuh"

namespace flashmla::sm90::sparse_decode::few_rows {

template <class Item>
struct TokenMask {
  __device__ __forceinline__ TokenMask(const KernelParams&, const Item&) {}
  template <class Scores>
  __device__ __forceinline__ void apply(const KernelParams&, int, int, Scores&) const {}
};

template <>
struct TokenMask<PagedItem> {
  int begin;  // the item's first token
  int length;
  int first_row;
  int lowest_limit;  // of the rows: tiles that end below it need no mask

  __device__ __forceinline__ TokenMask(const KernelParams& p, const PagedItem& w)
      : begin(w.first_tile * kTokens),
        length(w.length),
        first_row(w.first_row),
        lowest_limit(key_limit(p, w.length, w.first_row)) {}

  // s: of tile j, of `token` and the one eight further on.
  template <class Scores>
  __device__ __forceinline__ void apply(const KernelParams& p, int j, int token, Scores& s) const {
    const int first = begin + j * kTokens;
    if (first + kTokens <= lowest_limit) return;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(s); ++i) {
      const int row = first_row + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
      if (first + token + i / 2 % 2 * 8 >= key_limit(p, length, row)) s(i) = -INFINITY;
    }
  }
};

}  // namespace flashmla::sm90::sparse_decode::few_rows
