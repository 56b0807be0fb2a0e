// From products to scores: score[s, t] = k_scale[s] * sum over heads of w[t, h] * relu(k[s] . q[t,
// h]). Keys are the rows of the product and (t, h) its columns, so that a thread meets a quarter of
// the heads of a query in its own registers, and its three neighbours hold the rest.
#pragma once

#include "../../common/mma.cuh"
#include "../../common/numeric.cuh"
#include "launch.h"

namespace flashmla::sm90::indexer {

using Element = cutlass::float_e4m3_t;

constexpr int kTokens = 64;  // keys a tile: the rows of one wgmma, and a page of the cache
constexpr int kDim = kIndexDim;
static_assert(kTokens == kIndexPage, "a tile is a page");

// A tile of keys or queries as TMA delivers it: 128 bytes a row, 128-byte swizzle.
template <int Rows>
using Tile = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Element>{},
                                          cute::Shape<cute::Int<Rows>, cute::Int<kDim>>{}));

// One warpgroup's product of 64 keys with all heads of `kQueries` queries, and what follows it.
template <int kHeads, int kQueries>
struct Scorer {
  static constexpr int kColumns = kHeads * kQueries;
  static constexpr int kOwnHeads = kHeads / 4;  // of each query, in each of the thread's two rows
  // A thread ends with kValues scores: of one query and one or both of its rows, or of two queries.
  static constexpr int kSums = 2 * kQueries;  // index: 2 * query + row
  static constexpr int kValues = kSums >= 4 ? kSums / 4 : 1;

  using Mma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<cute::_64, cute::Int<kColumns>, cute::_32>>()));

  int lane;
  // Of column 8 j + 2 (lane % 4) + e at [2 j + e]; halved for e = 0, see sum_heads.
  float weights[kQueries * kOwnHeads];

  // from: the weights of query 0, [queries, kHeads]; those of queries that do not exist are 0
  __device__ __forceinline__ void load_weights(const float* from, int queries) {
    CUTE_UNROLL
    for (int j = 0; j < kColumns / 8; ++j) {
      const int column = 8 * j + 2 * (lane % 4);
      const bool exists = 8 * j / kHeads < queries;
      weights[2 * j] = exists ? 0.5f * from[column] : 0.f;
      weights[2 * j + 1] = exists ? from[column + 1] : 0.f;
    }
  }

  // The index of this thread's first score among the kSums of its rows; the others follow.
  __device__ __forceinline__ int first_sum() const {
    return kSums >= 4 ? lane % 4 * kValues : lane / 2 % 2;
  }

  // With a single query two threads end with the same score; one of them owns it.
  __device__ __forceinline__ bool owns_sums() const { return kSums >= 4 || lane % 2 == 0; }

  // region: sum_heads
  // products [64 keys, kColumns] -> values[i]: the sum over heads of index first_sum() + i.
  template <class Products>
  __device__ __forceinline__ void sum_heads(const Products& products,
                                            float (&values)[kValues]) const {
    float sums[kSums];
    CUTE_UNROLL
    for (int i = 0; i < kSums; ++i) sums[i] = 0.f;
    CUTE_UNROLL
    for (int i = 0; i < kColumns / 2; ++i) {  // [column / 8][row][column % 2]
      const int column = i / 4 * 8 + i % 2;
      const float x = products(i);
      // Maxima run in another unit than sums, at half the rate: each takes its share.
      const float positive = i % 2 == 0 ? x + fabsf(x) : relu(x);  // the first is twice as much
      float& sum = sums[column / kHeads * 2 + i / 2 % 2];
      sum = fmaf(weights[i / 4 * 2 + i % 2], positive, sum);
    }
    exchange<kSums, 2>(sums);
    CUTE_UNROLL
    for (int i = 0; i < kValues; ++i) values[i] = sums[i];
  }
  // endregion: sum_heads

 private:
  // Adds up over the four lanes that share a row. While there are sums to share out, each lane of a
  // pair keeps one half of them and gets the other's part of those; that takes half the shuffles.
  template <int kCount, int kDistance>
  __device__ __forceinline__ void exchange(float* sums) const {
    if constexpr (kDistance > 0 && kCount >= 2) {
      const bool upper = lane & kDistance;
      CUTE_UNROLL
      for (int i = 0; i < kCount / 2; ++i) {
        const float give = upper ? sums[i] : sums[i + kCount / 2];
        const float keep = upper ? sums[i + kCount / 2] : sums[i];
        sums[i] = keep + __shfl_xor_sync(~0u, give, kDistance);
      }
      exchange<kCount / 2, kDistance / 2>(sums);
    } else if constexpr (kDistance > 0) {
      sums[0] += __shfl_xor_sync(~0u, sums[0], kDistance);
      exchange<1, kDistance / 2>(sums);
    }
  }
};

}  // namespace flashmla::sm90::indexer
