// Sparse attention as Python calls it. Arguments were checked in flashmla/ops; what is checked
// again here guards memory.
#include "common/ffi.h"
#include "sm90/sparse_decode/launch.h"

namespace flashmla {
namespace {

namespace sparse = sm90::sparse_decode;

// q [b * s_q, h_q, 576]; k_cache [blocks, page, 1, 656 bytes or 576 numbers of q's type];
// indices [b * s_q, topk]; out [b, s_q, h_q, 512]; lse [b, h_q, s_q];
// topk_length [b] or [b * s_q], attn_sink [h_q], or empty where there is none;
// out_partial [items, 64, 512] and lse_partial [items, 64], with items = b * s_q * splits * row
// tiles of 64 heads; anything where splits is 1
void sparse_decode(TensorView q, TensorView k_cache, TensorView indices, TensorView topk_length,
                   TensorView attn_sink, TensorView out, TensorView lse, TensorView out_partial,
                   TensorView lse_partial, int64_t splits, double softmax_scale) {
  sparse::Args a;
  a.s_q = size32(out, 1);
  a.h_q = size32(out, 2);
  a.queries = size32(q, 0);
  a.topk = size32(indices, 1);
  a.splits = static_cast<int>(splits);
  a.sms = 0;
  require(q.ndim() == 3 && q.size(0) == out.size(0) * out.size(1) && q.size(1) == a.h_q &&
              q.size(2) == 576,
          "q must be [b * s_q, h_q, 576]");
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
  if (a.queries == 0) return;
  const int64_t bytes = k_cache.dtype().bits / 8;
  a.softmax_scale = static_cast<float>(softmax_scale);
  a.q = data<void>(q);
  a.q_stride_query = q.stride(0);
  a.q_stride_head = q.stride(1);
  a.k_cache = data<void>(k_cache);
  a.page_stride_bytes = k_cache.stride(0) * bytes;
  a.page = size32(k_cache, 1);
  a.tokens = k_cache.size(0) * k_cache.size(1);
  a.indices = data<int>(indices);
  a.indices_stride = indices.stride(0);
  a.topk_length = topk_length.size(0) == 0 ? nullptr : data<int>(topk_length);
  a.queries_a_length = topk_length.size(0) == q.size(0) ? 1 : a.s_q;
  a.attn_sink = attn_sink.size(0) == 0 ? nullptr : data<float>(attn_sink);
  a.out = data<void>(out);
  a.lse = data<float>(lse);
  a.out_partial = data<float>(out_partial);
  a.lse_partial = data<float>(lse_partial);

  const DeviceGuard guard(q.device());
  FLASHMLA_CUDA_CHECK(
      cudaDeviceGetAttribute(&a.sms, cudaDevAttrMultiProcessorCount, q.device().device_id));
  sparse::launch(a, guard.stream());
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sparse_decode, sparse_decode);

}  // namespace flashmla
