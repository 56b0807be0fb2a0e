// What Python calls of dense prefill.
// Arguments were checked in flashmla/ops; what is checked again here guards memory.
#include <tvm/ffi/optional.h>

#include <climits>

#include "common/ffi.h"
#include "sm90/dense_prefill/dense_prefill.h"
#include "sm90/dense_prefill_backward/dense_prefill_backward.h"

namespace flashmla {
namespace {

sm90::Rows rows(const TensorView& t) {
  return {data<void>(t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

// q [total_q, h_q, d_qk]; k [total_kv, h_kv, d_qk]; v [total_kv, h_kv, 128];
// cu_seqlens_* [b + 1]; out [total_q, h_q, 128]; lse [total_q, h_q]; work [2 * b + 4] int32
sm90::DensePrefillArgs forward_args(TensorView q, TensorView k, TensorView v,
                                    TensorView cu_seqlens_q, TensorView cu_seqlens_kv,
                                    TensorView out, TensorView lse, TensorView work,
                                    double softmax_scale, bool causal) {
  sm90::DensePrefillArgs a;
  a.is_bf16 = is_bf16(q);
  a.causal = causal;
  a.softmax_scale = static_cast<float>(softmax_scale);
  a.d_qk = size32(q, 2);
  a.batch = size32(cu_seqlens_q, 0) - 1;
  require((a.d_qk == 192 || a.d_qk == 128) && k.size(2) == a.d_qk && v.size(2) == 128,
          "head sizes must be 192/128 or 128/128");
  require(k.size(1) > 0 && q.size(1) % k.size(1) == 0 && v.size(0) == k.size(0) &&
              v.size(1) == k.size(1),
          "h_kv must divide h_q, and k and v have the same tokens and heads");
  require(a.batch >= 0 && cu_seqlens_kv.size(0) == a.batch + 1 &&
              work.size(0) >= int64_t{2} * a.batch + 4,
          "cu_seqlens_kv must be [b + 1] and work [2 * b + 4]");
  require(out.IsContiguous() && lse.IsContiguous(), "out and lse must be contiguous");
  require(q.size(0) <= INT_MAX && k.size(0) <= INT_MAX, "at most 2^31 - 1 tokens");
  require(q.size(0) > 0 && k.size(0) > 0, "there must be queries and keys");
  a.q = rows(q);
  a.k = rows(k);
  a.v = rows(v);
  a.cu_seqlens_q = data<int>(cu_seqlens_q);
  a.cu_seqlens_kv = data<int>(cu_seqlens_kv);
  a.out = data<void>(out);
  a.lse = data<float>(lse);
  a.work = data<int>(work);
  return a;
}

void mha_forward(TensorView q, TensorView k, TensorView v, TensorView cu_seqlens_q,
                 TensorView cu_seqlens_kv, TensorView out, TensorView lse, TensorView work,
                 double softmax_scale, bool causal) {
  const auto args =
      forward_args(q, k, v, cu_seqlens_q, cu_seqlens_kv, out, lse, work, softmax_scale, causal);
  const DeviceGuard guard(q.device());
  sm90::launch_dense_prefill(args, guard.stream());
}

// Beyond forward's: d_out [total_q, h_q, 128]; d_lse [total_q, h_q] or nothing; dq, dk, dv like q,
// k, v, contiguous. Room for what is kept a query, in tiles of 64: lse2, delta [h_q, tiles, 64] and
// dq_sums [h_q, tiles, 64 * d_qk] float32, counters [h_q, tiles, 3] int32.
void mha_backward(TensorView q, TensorView k, TensorView v, TensorView cu_seqlens_q,
                  TensorView cu_seqlens_kv, TensorView out, TensorView lse, TensorView work,
                  TensorView d_out, tvm::ffi::Optional<TensorView> d_lse, TensorView dq,
                  TensorView dk, TensorView dv, TensorView lse2, TensorView delta,
                  TensorView dq_sums, TensorView counters, double softmax_scale, bool causal,
                  bool deterministic) {
  sm90::DensePrefillBackwardArgs a;
  a.forward =
      forward_args(q, k, v, cu_seqlens_q, cu_seqlens_kv, out, lse, work, softmax_scale, causal);
  a.d_out = rows(d_out);
  a.d_lse = d_lse.has_value() ? data<float>(d_lse.value()) : nullptr;
  a.deterministic = deterministic;
  for (const TensorView& t : {dq, dk, dv, lse2, delta, dq_sums, counters}) {
    require(t.IsContiguous(), "gradients and working memory must be contiguous");
  }
  a.dq = data<void>(dq);
  a.dk = data<void>(dk);
  a.dv = data<void>(dv);
  a.tiles = size32(lse2, 1);
  require(a.tiles >= a.forward.q.tokens / sm90::kTileQueries + a.forward.batch + 2 &&
              delta.size(1) == a.tiles && dq_sums.size(1) == a.tiles &&
              counters.size(1) == a.tiles && counters.size(2) == sm90::kCounters,
          "too few tiles for the queries");
  a.lse2 = data<float>(lse2);
  a.delta = data<float>(delta);
  a.dq_sums = data<float>(dq_sums);
  a.counters = data<int>(counters);
  const DeviceGuard guard(q.device());
  sm90::launch_dense_prefill_backward(a, guard.stream());
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(mha_forward, mha_forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(mha_backward, mha_backward);

}  // namespace flashmla
