// Sparse prefill as Python calls it. Arguments were checked in flashmla/ops; what is checked again
// here guards memory.
#include "common/ffi.h"
#include "sm90/sparse_prefill/launch.h"

namespace flashmla {
namespace {

namespace prefill = sm90::sparse_prefill;

// q [s_q, h_q, 576 or 512]; kv [s_kv, d_qk] of q's type; indices [s_q, topk];
// topk_length [s_q], attn_sink [h_q], or empty where there is none;
// out [s_q, h_q, 512], contiguous; max_logits and lse [s_q, h_q]
void sparse_prefill(TensorView q, TensorView kv, TensorView indices, TensorView topk_length,
                    TensorView attn_sink, TensorView out, TensorView max_logits, TensorView lse,
                    double softmax_scale, bool lse_base_2) {
  prefill::Args a;
  require(q.ndim() == 3 && (q.size(2) == 576 || q.size(2) == 512),
          "q must be [s_q, h_q, 576 or 512]");
  require(kv.ndim() == 2 && kv.size(1) == q.size(2), "kv must be [s_kv, d_qk]");
  require(indices.ndim() == 2 && indices.size(0) == q.size(0), "indices must be [s_q, topk]");
  require(out.size(0) == q.size(0) && out.size(1) == q.size(1) && out.size(2) == 512,
          "out must be [s_q, h_q, 512]");
  require(q.size(1) >= 1 && q.size(1) <= 128, "q must have 1 to 128 heads");
  require(q.size(0) * q.size(1) < (int64_t{1} << 30), "too many queries");
  require(kv.stride(0) >= 0 && kv.size(0) * kv.stride(0) < (int64_t{1} << 35),
          "kv must span less than 64 GiB");
  a.is_bf16 = is_bf16(q);
  a.queries = size32(q, 0);
  a.h_q = size32(q, 1);
  a.d_qk = size32(q, 2);
  a.topk = size32(indices, 1);
  if (a.queries == 0) return;
  a.softmax_scale = static_cast<float>(softmax_scale);
  a.lse_base_2 = lse_base_2;
  a.q = data<void>(q);
  a.q_stride_query = q.stride(0);
  a.q_stride_head = q.stride(1);
  a.kv = data<void>(kv);
  a.kv_stride = kv.stride(0);
  a.tokens = kv.size(0);
  a.indices = data<int>(indices);
  a.indices_stride = indices.stride(0);
  a.topk_length = topk_length.size(0) == 0 ? nullptr : data<int>(topk_length);
  a.attn_sink = attn_sink.size(0) == 0 ? nullptr : data<float>(attn_sink);
  a.out = data<void>(out);
  a.max_logits = data<float>(max_logits);
  a.lse = data<float>(lse);

  const DeviceGuard guard(q.device());
  FLASHMLA_CUDA_CHECK(
      cudaDeviceGetAttribute(&a.sms, cudaDevAttrMultiProcessorCount, q.device().device_id));
  FLASHMLA_CUDA_CHECK(
      cudaDeviceGetAttribute(&a.l2_bytes, cudaDevAttrL2CacheSize, q.device().device_id));
  prefill::launch(a, guard.stream());
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sparse_prefill, sparse_prefill);

}  // namespace flashmla
