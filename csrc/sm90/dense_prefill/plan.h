// The order in which the blocks of a call are computed: written by the plan kernel, read by every
// CTA. Forward, a block is some queries of one head, and what it runs over are keys; backward it is
// the other way round. Here the one are rows and the other columns.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace flashmla::sm90::dense_prefill {

struct Span {
  int first;
  int length;
};

// Sequences laid end to end. Prefix sums that lie lead to wrong results, and to nothing outside the
// tensors.
struct Sequences {
  const int* row_sums;     // [batch + 1]
  const int* column_sums;  // [batch + 1]
  int rows, columns;       // in all
  int batch;

  // What the sums leave over are rows too, of one more sequence that has no columns.
  __host__ __device__ int count() const { return batch + 1; }
  __device__ __forceinline__ Span rows_of(int i) const {
    return i < batch ? span(row_sums, i, rows) : rest(row_sums, rows);
  }
  __device__ __forceinline__ Span columns_of(int i) const {
    return i < batch ? span(column_sums, i, columns) : Span{0, 0};
  }

 private:
  __device__ __forceinline__ static Span span(const int* sums, int i, int total) {
    const int first = min(max(sums[i], 0), total);
    return {first, min(max(sums[i + 1], first), total) - first};
  }
  __device__ __forceinline__ Span rest(const int* sums, int total) const {
    const int first = min(max(sums[batch], 0), total);
    return {first, total - first};
  }
};

struct WorkPlan {
  int* next;    // [1]: blocks handed out beyond the first one of each CTA
  int* order;   // [batch + 1]: sequences, those with the most columns first
  int* blocks;  // [batch + 2]: prefix sums of their blocks for one head, in that order

  static constexpr int ints(int batch) { return 2 * batch + 4; }
  WorkPlan(int* work, int batch) : next(work), order(work + 1), blocks(work + 2 + batch) {}
};

// The blocks of a call are at most these, for one head.
inline int64_t most_blocks(const Sequences& s, int block_rows) {
  return s.rows / block_rows + s.count();
}

void launch_work_plan(const Sequences& sequences, int block_rows, const WorkPlan& plan,
                      cudaStream_t stream);

}  // namespace flashmla::sm90::dense_prefill
