// A row of scores, read 16 bytes at a time wherever it begins.
#pragma once

#include "order.cuh"

namespace flashmla::sm90::topk {

struct Row {
  const float4* vectors;  // the row begins `shift` elements behind this aligned address
  int shift;
  int length;

  __device__ Row(const float* row, int length) : length(length) {
    shift = static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(float)) & 3;
    vectors = reinterpret_cast<const float4*>(row - shift);
  }
  __device__ int count() const { return (shift + length + 3) / 4; }
  // [whole_begin, whole_end): the vectors that lie inside the row
  __device__ int whole_begin() const { return shift != 0; }
  __device__ int whole_end() const { return (shift + length) / 4; }
  __device__ int position(int vector) const { return 4 * vector - shift; }

  // The pass over the row: what it has read need not stay in L2.
  __device__ __forceinline__ float4 load_whole(int vector) const {
    return __ldcs(vectors + vector);
  }

  // Ahead of that pass, so that it finds the line in L2.
  __device__ __forceinline__ float4 load_early(int vector) const { return __ldg(vectors + vector); }

  // Any vector. What is outside the row is never read; NaN, which nobody chooses, stands for it.
  __device__ __forceinline__ float4 load(int vector) const {
    const int first = position(vector);
    if (first >= 0 && first + 4 <= length) return load_whole(vector);
    const float* element = reinterpret_cast<const float*>(vectors + vector);
    const auto at = [&](int e) {
      return first + e >= 0 && first + e < length ? __ldcs(element + e) : nothing();
    };
    return make_float4(at(0), at(1), at(2), at(3));
  }
  static __device__ __forceinline__ float nothing() { return __int_as_float(0x7fffffff); }
};

}  // namespace flashmla::sm90::topk
