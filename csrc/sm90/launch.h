// What api.cpp may call: one function a kernel, plain pointers and numbers, no CuTe.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifdef __CUDACC__
#define FLASHMLA_HOST_DEVICE __host__ __device__
#else
#define FLASHMLA_HOST_DEVICE
#endif

namespace flashmla::sm90 {

// cache_seqlens [batch]; plan [parts, 8], or with chunk_tiles > 0, which makes a batch-invariant
// plan of chunks of so many tiles, [parts, 16]; num_splits [batch + 1].
void launch_plan(const int* cache_seqlens, int* plan, int* num_splits, int batch, int parts,
                 int chunk_tiles, cudaStream_t stream);

// The rows of one request and KV head are packed: row = s * group + h, group = h_q / h_kv.
struct DecodeShape {
  int batch;
  int s_q;
  int h_q;
  int h_kv;
  int parts;
  FLASHMLA_HOST_DEVICE int group() const { return h_q / h_kv; }
  FLASHMLA_HOST_DEVICE int rows() const { return s_q * group(); }
};

// A partial result of split k of request r lies at slot num_splits[r] + k:
//   out [slots, h_kv, rows, 512] float16, in units of the row and half (partials.cuh),
//   rows [slots, h_kv, rows].
struct alignas(16) PartialRow {
  float lse2;     // to base 2
  float unit[2];  // of either half of the columns
  float unused;
};
struct Partials {
  void* out;
  PartialRow* rows;
  int slots;  // a plan that does not fit the batch writes to none beyond
};
constexpr int kPartialRowFloats = 512 / 2 + 4;  // the memory of a row
inline Partials partials_in(float* memory, int64_t rows, int slots) {
  return {memory, reinterpret_cast<PartialRow*>(memory + rows * (512 / 2)), slots};
}

struct DenseDecodeArgs {
  DecodeShape shape;
  bool is_bf16;
  bool causal;
  float softmax_scale;
  int d_qk;       // 576, or 512 where keys have no RoPE part
  const void* q;  // [batch * h_kv, rows, d_qk]
  int64_t q_stride_batch, q_stride_row;
  const void* k_cache;  // [pages, page_block_size, h_kv, d_qk]
  int64_t k_stride_page, k_stride_token, k_stride_head;
  int pages;
  int page_block_size;
  const int* block_table;  // [batch, max_blocks]
  int64_t block_table_stride;
  int max_blocks;
  const int* cache_seqlens;  // [batch]
  const int* plan;           // [parts, plan_stride, 8]
  int plan_stride;           // 2 for a batch-invariant plan, else 1
  const int* num_splits;     // [batch + 1]
  const float* attn_sink;    // [h_q], natural units; null for none. Partial results are without it
  void* out;                 // [batch, s_q, h_q, 512]
  float* lse;                // [batch, h_q, s_q]
  Partials partials;
  unsigned* meeting;  // dense_decode_meeting(): the kernel merges what was split by itself; or null
};
// Where all CTAs of a call on this stream of the current device can meet; null if they cannot,
// because they do not all run at the same time or no place is left.
unsigned* dense_decode_meeting(const DecodeShape& shape, cudaStream_t stream);
void launch_dense_decode(const DenseDecodeArgs& args, cudaStream_t stream);

// A counter at which the blocks of a grid can meet, one grid after the other; null if there is none
// left.
unsigned* grid_counter(cudaStream_t stream);

// Merges the partial results of every request that was split, and touches no other.
struct CombineArgs {
  DecodeShape shape;
  bool is_bf16;
  Partials partials;
  const int* plan;
  int plan_stride;
  const int* num_splits;
  const float* attn_sink;
  void* out;
  float* lse;
};
void launch_combine(const CombineArgs& args, cudaStream_t stream);

enum class Element { kBf16, kFp16, kFp32 };

// out_a, out_b, out [rows, d] of one element type; lse_* [rows] float32, natural log.
void launch_merge_state(const void* out_a, const float* lse_a, const void* out_b,
                        const float* lse_b, void* out, float* lse, int64_t rows, int d,
                        Element element, cudaStream_t stream);

}  // namespace flashmla::sm90
