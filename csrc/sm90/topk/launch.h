// What the FFI may call: exact top-k of rows of scores.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace flashmla::sm90 {

constexpr int kTopkMaxK = 2048;
constexpr int kTopkMaxRow = 1 << 18;  // a position takes 18 bits of a key

struct TopkArgs {
  const float* logits;  // [rows, n], the stride between rows is free
  int64_t logits_stride;
  int64_t rows;
  int n;                   // at most kTopkMaxRow
  int k;                   // at most kTopkMaxK
  const int* lengths;      // [rows], or null: n
  const int* block_table;  // [rows, max_blocks], or null: positions are given as they are
  int64_t block_table_stride;
  int page;
  int* out;  // [rows, k]
};
void launch_topk(const TopkArgs& args, cudaStream_t stream);

}  // namespace flashmla::sm90
