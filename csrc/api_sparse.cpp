// Sparse attention as Python calls it. Arguments were checked in flashmla/ops; what is checked
// again here guards memory.
#include <algorithm>
#include <climits>

#include "common/ffi.h"
#include "sm90/launch.h"
#include "sm90/schedule.h"
#include "sm90/sparse_decode/launch.h"

namespace flashmla {
namespace {

namespace sparse = sm90::sparse_decode;

// What both calls have in common, q's strides and the checks of its shape included.
// q [requests, rows, 576]; k_cache [blocks, page, 1, 656 bytes or 576 numbers of q's type];
// out [b, s_q, h_q, 512]; lse [b, h_q, s_q]; attn_sink [h_q], or empty for none
void set_common(sparse::Common& a, const TensorView& q, const TensorView& k_cache,
                const TensorView& attn_sink, const TensorView& out, const TensorView& lse,
                double softmax_scale) {
  require(q.ndim() == 3 && q.size(0) * q.size(1) == out.size(0) * out.size(1) * out.size(2) &&
              q.size(2) == 576,
          "q must be [requests, rows, 576]");
  a.requests = size32(q, 0);
  a.rows = size32(q, 1);
  a.s_q = size32(out, 1);
  a.h_q = size32(out, 2);
  a.softmax_scale = static_cast<float>(softmax_scale);
  a.q = data<void>(q);
  a.q_stride_request = q.stride(0);
  a.q_stride_row = q.stride(1);
  a.k_cache = data<void>(k_cache);
  a.page_stride_bytes = k_cache.stride(0) * (k_cache.dtype().bits / 8);
  a.blocks = k_cache.size(0);
  a.page = size32(k_cache, 1);
  a.attn_sink = attn_sink.size(0) == 0 ? nullptr : data<float>(attn_sink);
  a.out = data<void>(out);
  a.lse = data<float>(lse);
}

// q [b * s_q, h_q, 576]; k_cache [blocks, page, 1, 656 bytes or 576 numbers of q's type];
// indices [b * s_q, topk]; out [b, s_q, h_q, 512]; lse [b, h_q, s_q];
// topk_length [b] or [b * s_q], attn_sink [h_q], or empty where there is none;
// out_partial [items, 64, 512] and lse_partial [items, 64], with items = b * s_q * splits * row
// tiles of 64 heads; anything where splits is 1
void sparse_decode(TensorView q, TensorView k_cache, TensorView indices, TensorView topk_length,
                   TensorView attn_sink, TensorView out, TensorView lse, TensorView out_partial,
                   TensorView lse_partial, int64_t splits, double softmax_scale) {
  sparse::Args a;
  set_common(a, q, k_cache, attn_sink, out, lse, softmax_scale);
  require(a.rows == a.h_q, "q must be [b * s_q, h_q, 576]");
  a.topk = size32(indices, 1);
  a.splits = static_cast<int>(splits);
  a.sms = 0;
  require(indices.size(0) == q.size(0), "indices must be [b * s_q, topk]");
  require(k_cache.size(3) == 656 || k_cache.size(3) == 576,
          "k_cache must be [blocks, page, 1, 656 or 576]");
  a.is_bf16 = is_bf16(q);
  a.cache = k_cache.size(3) == 656 ? sparse::Cache::kFp8 : sparse::Cache::kPlain;
  require(a.cache == sparse::Cache::kPlain || (k_cache.dtype().bits == 8 && a.is_bf16),
          "an FP8 cache is bytes, and its queries are bfloat16");
  require(a.cache == sparse::Cache::kFp8 || k_cache.dtype().bits == 16,
          "a plain cache is of q's type");
  const int64_t items = q.size(0) * splits * sparse::row_tiles(a.h_q);
  require(splits >= 1 && splits <= 256 && items < (int64_t{1} << 29), "splits out of range");
  if (splits > 1) {
    require(lse_partial.size(0) >= items * 64 && out_partial.size(0) >= items * 64 * 512,
            "too little room for partial results");
  }
  if (a.requests == 0) return;
  a.indices = data<int>(indices);
  a.indices_stride = indices.stride(0);
  a.topk_length = topk_length.size(0) == 0 ? nullptr : data<int>(topk_length);
  a.queries_a_length = topk_length.size(0) == q.size(0) ? 1 : a.s_q;
  a.out_partial = data<float>(out_partial);
  a.lse_partial = data<float>(lse_partial);

  const DeviceGuard guard(q.device());
  FLASHMLA_CUDA_CHECK(
      cudaDeviceGetAttribute(&a.sms, cudaDevAttrMultiProcessorCount, q.device().device_id));
  sparse::launch(a, guard.stream());
}

// Dense decode over an FP8 cache. q [b, s_q * h_q, 576]; k_cache [blocks, page, 1, 656] bytes;
// block_table [b, max_blocks]; cache_seqlens [b]; plan [parts, 8 or 16]; num_splits [b + 1];
// attn_sink [h_q] or empty; out [b, s_q, h_q, 512]; lse [b, h_q, s_q]. A plan [parts, 16] has
// chunks of chunk_tiles.
void dense_decode_fp8(TensorView q, TensorView k_cache, TensorView block_table,
                      TensorView cache_seqlens, TensorView plan, TensorView num_splits,
                      TensorView attn_sink, TensorView out, TensorView lse, int64_t chunk_tiles,
                      double softmax_scale, bool causal) {
  sparse::PagedArgs a;
  set_common(a, q, k_cache, attn_sink, out, lse, softmax_scale);
  require(q.size(0) == out.size(0) && is_bf16(q), "q must be [b, s_q * h_q, 576] of bfloat16");
  require(k_cache.size(3) == 656 && k_cache.dtype().bits == 8,
          "k_cache must be [blocks, page, 1, 656] bytes");
  const int64_t b = q.size(0);
  a.plan_stride = size32(plan, 1) / sm90::kPlanColumns;
  require(plan.IsContiguous() && plan.size(1) == a.plan_stride * sm90::kPlanColumns &&
              a.plan_stride >= 1 && a.plan_stride <= 2 && num_splits.size(0) == b + 1 &&
              block_table.size(0) == b && cache_seqlens.size(0) == b,
          "a plan or block table of another shape");
  require(b * a.rows < INT_MAX, "too many query rows");
  if (b == 0) return;
  a.causal = causal;
  a.block_table = data<int>(block_table);
  a.block_table_stride = block_table.stride(0);
  a.max_blocks = size32(block_table, 1);
  a.cache_seqlens = data<int>(cache_seqlens);
  a.parts = size32(plan, 0);
  a.plan = data<int>(plan);
  a.num_splits = data<int>(num_splits);

  // As in dense decode: a cut adds one piece at most, and a request has no more chunks than its
  // block table has room for.
  const bool chunked = a.plan_stride == 2;
  a.partials = {};
  Optional<Tensor> workspace;
  if (a.parts > 1 || chunked) {
    const int64_t chunk = std::max<int64_t>(1, chunk_tiles) * sm90::kTileTokens;
    const int64_t tokens = int64_t{a.max_blocks} * a.page;
    const int64_t most_chunks = std::max<int64_t>(1, (tokens + chunk - 1) / chunk);
    const int64_t slots = chunked ? b * most_chunks : b + a.parts;
    require(slots <= INT_MAX, "the block table has room for too many partial results");
    const int64_t rows = slots * a.rows;
    const int64_t shape[2] = {rows, 513};
    workspace = Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, ShapeView(shape, 2),
                                     DLDataType{kDLFloat, 32, 1}, q.device());
    float* const partial_out = static_cast<float*>((*workspace).data_ptr());
    a.partials = {partial_out, partial_out + rows * 512, static_cast<int>(slots)};
  }

  const DeviceGuard guard(q.device());
  sparse::launch(a, guard.stream());
  if (a.parts > 1 || chunked) {
    const sm90::DecodeShape shape{a.requests, a.s_q, a.h_q, 1, a.parts};
    sm90::launch_combine(
        {shape, true, a.partials, a.plan, a.plan_stride, a.num_splits, a.attn_sink, a.out, a.lse},
        guard.stream());
  }
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sparse_decode, sparse_decode);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dense_decode_fp8, dense_decode_fp8);

}  // namespace flashmla
