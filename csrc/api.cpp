// What Python calls: each function unpacks tensors and launches kernels on the caller's stream.
// The plan and dense decode check everything themselves and answer false, so that Python has to
// look only at a call that is not in order; merge_state's arguments were checked in flashmla/ops.
#include <algorithm>
#include <climits>

#include "common/ffi.h"
#include "sm90/launch.h"
#include "sm90/schedule.h"

namespace flashmla {
namespace {

constexpr int kHeadDimV = 512;

// A stride that the copy engine takes: a multiple of 16 bytes, and not 0; of one entry, any.
bool tma_stride(int64_t size, int64_t stride) {
  return size <= 1 || (stride > 0 && stride % 8 == 0);
}

// The split plan, the tensors' checks included: false, and nothing launched, if they are not what
// is written here. cache_seqlens [b], b > 0; plan [parts, 8], with chunk_tiles > 0 [parts, 16];
// num_splits [b + 1]; all int32 and contiguous, on one device
bool get_metadata(TensorView cache_seqlens, TensorView plan, TensorView num_splits,
                  int64_t chunk_tiles) {
  const DLDevice device = cache_seqlens.device();
  const auto is_packed = [&](const TensorView& t, int ndim) {
    return is(t, kInt32, ndim, device) && t.IsContiguous();
  };
  if (device.device_type != kDLCUDA || !is_packed(cache_seqlens, 1) || !is_packed(plan, 2) ||
      !is_packed(num_splits, 1) || cache_seqlens.size(0) == 0 ||
      num_splits.size(0) != cache_seqlens.size(0) + 1 || !aligned(plan) || plan.size(0) < 1 ||
      plan.size(0) > sm90::kMaxParts ||
      plan.size(1) != sm90::kPlanColumns * (chunk_tiles > 0 ? 2 : 1)) {
    return false;
  }
  const DeviceGuard guard(device);
  sm90::launch_plan(data<int>(cache_seqlens), data<int>(plan), data<int>(num_splits),
                    size32(cache_seqlens, 0), size32(plan, 0), static_cast<int>(chunk_tiles),
                    guard.stream());
  return true;
}

// q [b, s_q, h_q, d_qk] seen as [b * h_kv, rows, d_qk], the rows that share a KV head side by side;
// or given as that already. False if its strides do not allow it.
bool pack_rows(const TensorView& q, sm90::DenseDecodeArgs& a) {
  const int64_t b = a.shape.batch, s_q = a.shape.s_q, h_q = a.shape.h_q, h_kv = a.shape.h_kv;
  if (q.ndim() == 3) {
    if (q.size(0) != b * h_kv || q.size(1) != a.shape.rows() || q.size(2) != a.d_qk) return false;
    a.q_stride_batch = q.stride(0);
    a.q_stride_row = q.stride(1);
  } else {
    const bool heads_adjoin = s_q == 1 || h_q == 1 || q.stride(1) == h_q * q.stride(2);
    const bool requests_adjoin = b == 1 || q.stride(0) == h_q * q.stride(2);
    if (h_kv == 1 ? !heads_adjoin : s_q != 1 || !requests_adjoin) return false;
    a.q_stride_row = h_q == 1 ? q.stride(1) : q.stride(2);
    a.q_stride_batch = h_kv == 1 ? q.stride(0) : a.shape.group() * q.stride(2);
  }
  return tma_stride(b * h_kv, a.q_stride_batch) && tma_stride(a.shape.rows(), a.q_stride_row);
}

// Powers of two that a tile of 64 tokens divides or that divide it.
bool takes_page(int64_t page_block_size) {
  return page_block_size >= 16 && page_block_size <= 256 &&
         (page_block_size & (page_block_size - 1)) == 0;
}

// Dense decode, the tensors' checks included: false, and nothing launched, if the kernel cannot
// take them as they are. Python then finds out what is wrong, or packs what is scattered; a call
// with nothing wrong pays for one look at its tensors instead of two.
//
// q [b, s_q, h_q, d_qk], or as pack_rows() has it; k_cache [pages, page_block_size, h_kv, d_qk];
// block_table [b, max_blocks]; cache_seqlens [b]; plan [parts, 8 or 16]; num_splits [b + 1];
// attn_sink [h_q]; out [b, s_q, h_q, 512]; lse [b, h_q, s_q]. A plan [parts, 16] has chunks of
// chunk_tiles.
bool dense_decode(TensorView q, TensorView k_cache, TensorView block_table,
                  TensorView cache_seqlens, TensorView plan, TensorView num_splits,
                  Optional<TensorView> attn_sink, TensorView out, TensorView lse,
                  int64_t chunk_tiles, double softmax_scale, bool causal) {
  const DLDevice device = q.device();
  const auto is_here = [&](const TensorView& t, DLDataType dtype, int ndim) {
    return is(t, dtype, ndim, device);
  };
  const DLDataType half = q.dtype();
  if (device.device_type != kDLCUDA || half.bits != 16 || half.lanes != 1 ||
      (half.code != kDLBfloat && half.code != kDLFloat) || (q.ndim() != 3 && q.ndim() != 4) ||
      !is_here(q, half, q.ndim()) || !is_here(k_cache, half, 4) ||
      !is_here(block_table, kInt32, 2) || !is_here(cache_seqlens, kInt32, 1) ||
      !is_here(plan, kInt32, 2) || !is_here(num_splits, kInt32, 1) || !is_here(out, half, 4) ||
      !is_here(lse, kFloat32, 3) || (attn_sink.has_value() && !is_here(*attn_sink, kFloat32, 1))) {
    return false;
  }

  sm90::DenseDecodeArgs a;
  a.shape.batch = size32(out, 0);
  a.shape.s_q = size32(out, 1);
  a.shape.h_q = size32(out, 2);
  a.shape.h_kv = size32(k_cache, 2);
  a.shape.parts = size32(plan, 0);
  a.d_qk = size32(q, q.ndim() - 1);
  a.pages = size32(k_cache, 0);
  a.page_block_size = size32(k_cache, 1);
  a.plan_stride = size32(plan, 1) / sm90::kPlanColumns;
  const int64_t b = a.shape.batch, page = a.page_block_size, h_kv = a.shape.h_kv;
  const bool chunked = a.plan_stride == 2;
  if (b == 0 || a.shape.s_q == 0 || h_kv == 0 || a.shape.h_q == 0 || a.shape.h_q % h_kv != 0 ||
      (q.ndim() == 4 && (q.size(0) != b || q.size(1) != a.shape.s_q || q.size(2) != a.shape.h_q)) ||
      !pack_rows(q, a) || !aligned(q) || !aligned(out) || out.size(3) != kHeadDimV ||
      !out.IsContiguous() || lse.size(0) != b || lse.size(1) != a.shape.h_q ||
      lse.size(2) != a.shape.s_q || !lse.IsContiguous()) {
    return false;
  }
  // Within a page tokens and heads are packed; the stride between pages is free.
  if (k_cache.size(3) != a.d_qk || a.pages == 0 || page == 0 || !aligned(k_cache) ||
      (page > 1 && k_cache.stride(1) != h_kv * a.d_qk) ||
      (h_kv > 1 && k_cache.stride(2) != a.d_qk) || !tma_stride(a.pages, k_cache.stride(0))) {
    return false;
  }
  if (block_table.size(0) != b || cache_seqlens.size(0) != b || num_splits.size(0) != b + 1 ||
      plan.size(1) != a.plan_stride * sm90::kPlanColumns || a.plan_stride < 1 ||
      a.plan_stride > 2 || a.shape.parts < 1 || a.shape.parts > sm90::kMaxParts || !aligned(plan) ||
      !plan.IsContiguous() || (attn_sink.has_value() && (*attn_sink).size(0) != a.shape.h_q)) {
    return false;
  }

  if (!takes_page(page) || (a.d_qk != 576 && a.d_qk != 512)) return false;

  a.is_bf16 = is_bf16(q);
  a.causal = causal;
  a.softmax_scale = static_cast<float>(softmax_scale);
  a.q = data<void>(q);
  a.k_cache = data<void>(k_cache);
  a.k_stride_page = k_cache.stride(0);
  a.k_stride_token = h_kv * a.d_qk;
  a.k_stride_head = a.d_qk;
  a.block_table = data<int>(block_table);
  a.block_table_stride = block_table.stride(0);
  a.max_blocks = size32(block_table, 1);
  a.cache_seqlens = data<int>(cache_seqlens);
  a.plan = data<int>(plan);
  a.num_splits = data<int>(num_splits);
  a.attn_sink = attn_sink.has_value() ? data<float>(*attn_sink) : nullptr;
  a.out = data<void>(out);
  a.lse = data<float>(lse);

  // A plan of one part splits nothing; else a cut adds one piece at most, and a request has no more
  // chunks than its block table has room for. Memory for partial results comes from the caller's
  // allocator and goes back to it at the end, on the caller's stream: quicker than from Python.
  const bool splits = a.shape.parts > 1 || chunked;
  a.partials = {};
  Optional<Tensor> workspace;
  if (splits) {
    const int64_t chunk = std::max<int64_t>(1, chunk_tiles) * sm90::kTileTokens;
    const int64_t most_chunks = std::max<int64_t>(1, (a.max_blocks * page + chunk - 1) / chunk);
    const int64_t slots = chunked ? b * most_chunks : b + a.shape.parts;
    require(slots <= INT_MAX, "the block table has room for too many partial results");
    const int64_t rows = slots * h_kv * a.shape.rows();
    const int64_t shape[2] = {rows, sm90::kPartialRowFloats};
    workspace = Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, ShapeView(shape, 2), kFloat32, device);
    a.partials = sm90::partials_in(static_cast<float*>((*workspace).data_ptr()), rows,
                                   static_cast<int>(slots));
  }

  const DeviceGuard guard(device);
  a.meeting = splits && !chunked ? sm90::dense_decode_meeting(a.shape, guard.stream()) : nullptr;
  sm90::launch_dense_decode(a, guard.stream());
  if (splits && a.meeting == nullptr) {
    sm90::launch_combine({a.shape, a.is_bf16, a.partials, a.plan, a.plan_stride, a.num_splits,
                          a.attn_sink, a.out, a.lse},
                         guard.stream());
  }
  return true;
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
