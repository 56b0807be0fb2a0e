// What happens before the main kernel, a block of threads for each tile of queries and head: delta
// and the LSE in base 2, laid out as the main kernel reads them, sums and counters set to zero; and
// dQ where there are no keys, so that no block of them will ever come by.
#pragma once

#include <cutlass/numeric_conversion.h>

#include "../../common/log_base.h"
#include "config.cuh"

namespace flashmla::sm90::dense_prefill_backward {

constexpr int kPrepareThreads = 256;

// The queries that tile number `tile` of all holds.
struct Tile {
  int first_query;  // in the packed tensor
  int queries;      // 0 to 64
  bool keyless;     // their sequence has no keys

  __device__ __forceinline__ Tile(const Sequences& sequences, int tile) {
    // Sequences begin at ever later tiles: the last one that begins here or before.
    const auto base = [&](int i) {
      return (query_span(sequences, i).first + kQueries * i) / kQueries;
    };
    int low = 0, high = sequences.count();
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (base(middle) <= tile ? low : high) = middle;
    }
    const Span span = query_span(sequences, low);
    const int before = (tile - base(low)) * kQueries;
    first_query = span.first + before;
    queries = max(0, min(kQueries, span.length - before));
    keyless = low == sequences.batch || sequences.rows_of(low).length == 0;
  }

  // Queries are columns of the main kernel's plan; those that the prefix sums leave over count
  // here as one more sequence, whose gradient is zero.
  __device__ __forceinline__ static Span query_span(const Sequences& s, int i) {
    if (i < s.batch) return s.columns_of(i);
    const int first = min(max(s.column_sums[s.batch], 0), s.columns);
    return {first, s.columns - first};
  }
};

// d_out [total_q, h_q, 128] by strides; out [total_q, h_q, 128]; lse, d_lse [total_q, h_q]
template <class T, int kDimQk>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const Sequences sequences, const T* d_out, int64_t stride_token,
                   int64_t stride_head, const T* out, const float* lse, const float* d_lse, int h_q,
                   float* lse2, float* delta, float* dq_sums, int* counters, T* dq) {
  const int head = blockIdx.x % h_q, tile_number = blockIdx.x / h_q;
  const int tiles = gridDim.x / h_q;
  const Tile tile(sequences, tile_number);
  const int64_t at = static_cast<int64_t>(head) * tiles + tile_number;

  if (tile.keyless) {
    constexpr int kLines = kDimQk / 8;  // of 16 bytes, a row
    for (int i = threadIdx.x; i < tile.queries * kLines; i += kPrepareThreads) {
      const int64_t query = tile.first_query + i / kLines;
      auto* to = reinterpret_cast<uint4*>(dq + (query * h_q + head) * kDimQk);
      to[i % kLines] = make_uint4(0, 0, 0, 0);
    }
    return;
  }
  auto* sums = reinterpret_cast<float4*>(dq_sums + at * kQueries * kDimQk);
  for (int i = threadIdx.x; i < kQueries * kDimQk / 4; i += kPrepareThreads) {
    sums[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  }
  if (threadIdx.x < kCounters) counters[at * kCounters + threadIdx.x] = 0;

  // Half a warp a row, eight columns a thread.
  constexpr int kLanes = kDimV / 8;
  using Eight = cutlass::Array<T, 8>;
  cutlass::NumericArrayConverter<float, T, 8> widen;
  const int lane = threadIdx.x % kLanes;
  for (int r = threadIdx.x / kLanes; r < kQueries; r += kPrepareThreads / kLanes) {
    const bool exists = r < tile.queries;
    const int64_t query = tile.first_query + r;
    float sum = 0.f;
    if (exists) {
      const auto a = widen(*reinterpret_cast<const Eight*>(d_out + query * stride_token +
                                                           head * stride_head + lane * 8));
      const auto b =
          widen(*reinterpret_cast<const Eight*>(out + (query * h_q + head) * kDimV + lane * 8));
      CUTE_UNROLL
      for (int i = 0; i < 8; ++i) sum = fmaf(a[i], b[i], sum);
    }
    CUTE_UNROLL
    for (int step = kLanes / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, step);
    }
    if (lane == 0) {
      const int64_t from = query * h_q + head;
      if (exists && d_lse != nullptr) sum -= d_lse[from];
      // A query with nothing to attend to has LSE +inf, and so probabilities 0.
      lse2[at * kQueries + r] = exists ? lse[from] * kLog2E : INFINITY;
      delta[at * kQueries + r] = exists ? sum : 0.f;
    }
  }
}

}  // namespace flashmla::sm90::dense_prefill_backward
