// What Python calls: each function unpacks tensors and launches kernels on the caller's stream.
// Arguments were checked in flashmla/ops; what is checked again here guards memory.
#include "common/ffi.h"
#include "sm90/launch.h"
#include "sm90/schedule.h"

namespace flashmla {
namespace {

// cache_seqlens [b]; plan [parts, 8]; num_splits [b + 1]; all int32
void get_metadata(TensorView cache_seqlens, TensorView plan, TensorView num_splits) {
  require(plan.ndim() == 2 && plan.size(1) == sm90::kPlanColumns, "plan must be [parts, 8]");
  require(num_splits.size(0) == cache_seqlens.size(0) + 1, "num_splits must be [b + 1]");
  const DeviceGuard guard(cache_seqlens.device());
  sm90::launch_plan(data<int>(cache_seqlens), data<int>(plan), data<int>(num_splits),
                    size32(cache_seqlens, 0), size32(plan, 0), guard.stream());
}

// q [b * h_kv, rows, 576]; k_cache [pages, 64, h_kv, 576]; out [b, s_q, h_q, 512];
// lse [b, h_q, s_q]; out_partial [slots, h_kv, rows, 512]; lse_partial [slots, h_kv, rows]
void dense_decode(TensorView q, TensorView k_cache, TensorView block_table,
                  TensorView cache_seqlens, TensorView plan, TensorView num_splits, TensorView out,
                  TensorView lse, TensorView out_partial, TensorView lse_partial,
                  double softmax_scale, bool causal) {
  sm90::DenseDecodeArgs a;
  a.shape.batch = size32(out, 0);
  a.shape.s_q = size32(out, 1);
  a.shape.h_q = size32(out, 2);
  a.shape.h_kv = size32(k_cache, 2);
  a.shape.parts = size32(plan, 0);
  require(q.ndim() == 3 && q.size(0) == static_cast<int64_t>(a.shape.batch) * a.shape.h_kv &&
              q.size(1) == a.shape.rows() && q.size(2) == 576,
          "q must be [b * h_kv, s_q * h_q / h_kv, 576]");
  require(k_cache.size(1) == 64 && k_cache.size(3) == 576,
          "k_cache must be [pages, 64, h_kv, 576]");
  require(num_splits.size(0) == a.shape.batch + 1 && plan.size(1) == sm90::kPlanColumns,
          "the plan is of another batch size");
  require(out_partial.size(0) >= a.shape.batch + a.shape.parts,
          "too few slots for partial results");
  require(a.shape.parts <= sm90::kMaxParts, "a plan may have at most 1024 parts");
  if (a.shape.batch == 0 || a.shape.rows() == 0) return;
  a.is_bf16 = is_bf16(q);
  a.causal = causal;
  a.softmax_scale = static_cast<float>(softmax_scale);
  a.q = data<void>(q);
  a.q_stride_batch = q.stride(0);
  a.q_stride_row = q.stride(1);
  a.k_cache = data<void>(k_cache);
  a.pages = size32(k_cache, 0);
  a.k_stride_page = k_cache.stride(0);
  a.k_stride_token = k_cache.stride(1);
  a.k_stride_head = k_cache.stride(2);
  a.block_table = data<int>(block_table);
  a.block_table_stride = block_table.stride(0);
  a.max_blocks = size32(block_table, 1);
  a.cache_seqlens = data<int>(cache_seqlens);
  a.plan = data<int>(plan);
  a.num_splits = data<int>(num_splits);
  a.out = data<void>(out);
  a.lse = data<float>(lse);
  a.partials = {data<float>(out_partial), data<float>(lse_partial), size32(out_partial, 0)};

  const DeviceGuard guard(q.device());
  sm90::launch_dense_decode(a, guard.stream());
  if (a.shape.parts > 1) {
    const sm90::CombineArgs c{a.shape, a.is_bf16, a.partials, a.plan, a.num_splits, a.out, a.lse};
    sm90::launch_combine(c, guard.stream());
  }
}

// out_* [rows, d]; lse_* [rows] float32
void merge_state(TensorView out_a, TensorView lse_a, TensorView out_b, TensorView lse_b,
                 TensorView out, TensorView lse) {
  for (const TensorView& t : {out_a, lse_a, out_b, lse_b, out, lse}) {
    require(t.IsContiguous() && reinterpret_cast<uintptr_t>(data<char>(t)) % 4 == 0,
            "merge_state takes contiguous tensors");
  }
  const auto element = out.dtype().bits == 32 ? sm90::Element::kFp32
                       : is_bf16(out)         ? sm90::Element::kBf16
                                              : sm90::Element::kFp16;
  const DeviceGuard guard(out.device());
  sm90::launch_merge_state(data<void>(out_a), data<float>(lse_a), data<void>(out_b),
                           data<float>(lse_b), data<void>(out), data<float>(lse), out.size(0),
                           size32(out, 1), element, guard.stream());
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(get_metadata, get_metadata);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dense_decode, dense_decode);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(merge_state, merge_state);

}  // namespace flashmla
