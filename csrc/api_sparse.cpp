// Sparse decode and FP8 decode as Python calls them. The first checks everything itself, as dense
// decode does (api.cpp); the second's arguments were checked in flashmla/ops, and what is checked
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

constexpr int64_t kMostCacheBytes = int64_t{16} << 32;  // offsets of 32 bits in units of 16
constexpr int64_t kMostItems = int64_t{1} << 29;
constexpr int kMostSplits = 256;
constexpr int kFp8Bytes = 656, kHeadDim = 576, kHeadDimV = 512;

// What both calls have in common. q's strides are the caller's business.
// k_cache [blocks, page, 1, 656 bytes or 576 numbers of q's type]; out [b, s_q, h_q, 512];
// lse [b, h_q, s_q]
void set_common(sparse::Common& a, const TensorView& q, const TensorView& k_cache,
                const TensorView& out, const TensorView& lse, double softmax_scale) {
  a.s_q = size32(out, 1);
  a.h_q = size32(out, 2);
  a.softmax_scale = static_cast<float>(softmax_scale);
  a.q = data<void>(q);
  a.k_cache = data<void>(k_cache);
  a.page_stride_bytes = k_cache.stride(0) * (k_cache.dtype().bits / 8);
  a.blocks = k_cache.size(0);
  a.page = size32(k_cache, 1);
  a.out = data<void>(out);
  a.lse = data<float>(lse);
}

// Whether the first two dimensions of a tensor can be walked as one, and with which stride.
bool joined(const TensorView& t, int64_t& stride) {
  stride = t.size(1) == 1 ? t.stride(0) : t.stride(1);
  return t.size(0) == 1 || t.size(1) == 1 || t.stride(0) == t.size(1) * t.stride(1);
}

// A cache of 656 bytes a token, or of 576 numbers of q's type, packed within its pages and within
// reach of the kernel's offsets.
bool takes_cache(const TensorView& k_cache, const TensorView& q, bool is_fp8) {
  const DLDataType dtype = k_cache.dtype();
  const bool is_byte =
      dtype.bits == 8 && dtype.lanes == 1 &&
      (dtype.code == kDLInt || dtype.code == kDLUInt || dtype.code == kDLFloat8_e4m3fn);
  if (is_fp8 ? !is_byte : !same(dtype, q.dtype())) return false;
  const int64_t width = is_fp8 ? kFp8Bytes : kHeadDim;
  if (!is(k_cache, dtype, 4, q.device()) || k_cache.size(2) != 1 || k_cache.size(3) != width ||
      k_cache.size(0) * k_cache.size(1) == 0 || k_cache.size(1) > INT_MAX || !aligned(k_cache) ||
      (k_cache.size(1) > 1 && k_cache.stride(1) != width)) {
    return false;
  }
  const int64_t bytes = dtype.bits / 8, page_bytes = k_cache.stride(0) * bytes;
  return page_bytes >= 0 && k_cache.size(1) * width * bytes <= kMostCacheBytes &&
         k_cache.size(0) * page_bytes <= kMostCacheBytes &&
         (k_cache.size(0) == 1 || page_bytes % 16 == 0);
}

// What a sparse call is given and does not read has to be of its batch all the same.
bool companions_agree(int64_t b, DLDevice device, const Optional<TensorView>& block_table,
                      const Optional<TensorView>& cache_seqlens, const Optional<TensorView>& plan,
                      const Optional<TensorView>& num_splits) {
  const auto is_int = [&](const Optional<TensorView>& t, int ndim) {
    return is(*t, kInt32, ndim, device);
  };
  if (block_table.has_value() && (!is_int(block_table, 2) || (*block_table).size(0) != b)) {
    return false;
  }
  if (cache_seqlens.has_value() && (!is_int(cache_seqlens, 1) || (*cache_seqlens).size(0) != b)) {
    return false;
  }
  if (plan.has_value() != num_splits.has_value()) return false;
  if (!plan.has_value()) return true;
  const int64_t columns = is_int(plan, 2) ? (*plan).size(1) : 0;
  return (columns == sm90::kPlanColumns || columns == 2 * sm90::kPlanColumns) &&
         is_int(num_splits, 1) && (*num_splits).size(0) == b + 1 && (*plan).IsContiguous() &&
         aligned(*plan) && (*plan).size(0) >= 1 && (*plan).size(0) <= sm90::kMaxParts;
}

// Attention over chosen tokens, the tensors' checks included: false, and nothing launched, if the
// kernel cannot take them as they are. Python then finds out what is wrong, or packs what is
// scattered.
//
// q [b, s_q, h_q, 576]; k_cache [blocks, page, 1, 656 bytes or 576 numbers of q's type];
// indices [b, s_q, topk]; topk_length [b] or [b, s_q]; attn_sink [h_q]; block_table
// [b, max_blocks], cache_seqlens [b], plan [parts, 8 or 16] and num_splits [b + 1] are looked at
// and not read; out [b, s_q, h_q, 512]; lse [b, h_q, s_q]
bool sparse_decode(TensorView q, TensorView k_cache, TensorView indices,
                   Optional<TensorView> topk_length, Optional<TensorView> attn_sink,
                   Optional<TensorView> block_table, Optional<TensorView> cache_seqlens,
                   Optional<TensorView> plan, Optional<TensorView> num_splits, TensorView out,
                   TensorView lse, bool is_fp8, int64_t splits, double softmax_scale) {
  const DLDevice device = q.device();
  const DLDataType half = q.dtype();
  if (device.device_type != kDLCUDA || half.bits != 16 || half.lanes != 1 ||
      (half.code != kDLBfloat && (half.code != kDLFloat || is_fp8)) || !is(q, half, 4, device) ||
      !is(indices, kInt32, 3, device) || !is(out, half, 4, device) ||
      !is(lse, kFloat32, 3, device) || !takes_cache(k_cache, q, is_fp8)) {
    return false;
  }
  const int64_t b = q.size(0), s_q = q.size(1), h_q = q.size(2);
  if (b == 0 || s_q == 0 || h_q == 0 || q.size(3) != kHeadDim || indices.size(0) != b ||
      indices.size(1) != s_q || indices.size(2) > INT_MAX ||
      !companions_agree(b, device, block_table, cache_seqlens, plan, num_splits)) {
    return false;
  }
  require(out.IsContiguous() && aligned(out) && out.size(0) == b && out.size(1) == s_q &&
              out.size(2) == h_q && out.size(3) == kHeadDimV && lse.IsContiguous() &&
              lse.size(0) == b && lse.size(1) == h_q && lse.size(2) == s_q,
          "out must be [b, s_q, h_q, 512] and lse [b, h_q, s_q]");
  const int64_t lists = b * s_q * sparse::row_tiles(static_cast<int>(h_q));
  if (h_q > INT_MAX / 2 || lists >= kMostItems / kMostSplits) return false;
  require(splits >= 1 && splits <= kMostSplits, "splits out of range");

  sparse::Args a;
  set_common(a, q, k_cache, out, lse, softmax_scale);
  // The kernel reads 16 bytes of q at once.
  if (!joined(q, a.q_stride_request) || !joined(indices, a.indices_stride) || !aligned(q) ||
      (b * s_q > 1 && a.q_stride_request % 8) || (h_q > 1 && q.stride(2) % 8)) {
    return false;
  }
  if (attn_sink.has_value() &&
      (!is(*attn_sink, kFloat32, 1, device) || (*attn_sink).size(0) != h_q)) {
    return false;
  }
  if (topk_length.has_value()) {
    const TensorView& t = *topk_length;
    if ((t.ndim() != 1 && t.ndim() != 2) || !is(t, kInt32, t.ndim(), device) || !t.IsContiguous() ||
        t.size(0) != b || (t.ndim() == 2 && t.size(1) != s_q)) {
      return false;
    }
  }
  a.requests = static_cast<int>(b * s_q);
  a.rows = a.h_q;
  a.q_stride_row = q.stride(2);
  a.attn_sink = attn_sink.has_value() ? data<float>(*attn_sink) : nullptr;
  a.cache = is_fp8 ? sparse::Cache::kFp8 : sparse::Cache::kPlain;
  a.is_bf16 = is_bf16(q);
  a.topk = size32(indices, 2);
  a.splits = static_cast<int>(splits);
  a.indices = data<int>(indices);
  a.topk_length = topk_length.has_value() ? data<int>(*topk_length) : nullptr;
  a.queries_a_length = topk_length.has_value() && (*topk_length).ndim() == 2 ? 1 : a.s_q;

  // Memory for partial results comes from the caller's allocator and goes back to it at the end,
  // on the caller's stream.
  a.partials = {};
  Optional<Tensor> workspace;
  if (splits > 1) {
    const int64_t rows = lists * splits * sparse::kRowsACta;
    const int64_t shape[2] = {rows, sparse::kListPartialRowFloats};
    workspace = Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, ShapeView(shape, 2), kFloat32, device);
    auto* const memory = static_cast<float*>((*workspace).data_ptr());
    a.partials = {reinterpret_cast<uint4*>(memory),
                  reinterpret_cast<float4*>(memory + rows * (kHeadDimV / 2))};
  }

  const DeviceGuard guard(device);
  FLASHMLA_CUDA_CHECK(
      cudaDeviceGetAttribute(&a.sms, cudaDevAttrMultiProcessorCount, device.device_id));
  sparse::launch(a, guard.stream());
  return true;
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
  set_common(a, q, k_cache, out, lse, softmax_scale);
  require(q.ndim() == 3 && q.size(0) == out.size(0) && is_bf16(q) && q.size(2) == kHeadDim &&
              q.size(1) == out.size(1) * out.size(2),
          "q must be [b, s_q * h_q, 576] of bfloat16");
  a.requests = size32(q, 0);
  a.rows = size32(q, 1);
  a.q_stride_request = q.stride(0);
  a.q_stride_row = q.stride(1);
  a.attn_sink = attn_sink.size(0) == 0 ? nullptr : data<float>(attn_sink);
  require(k_cache.size(3) == kFp8Bytes && k_cache.dtype().bits == 8,
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
    const int64_t shape[2] = {rows, sm90::kPartialRowFloats};
    workspace = Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, ShapeView(shape, 2),
                                     DLDataType{kDLFloat, 32, 1}, q.device());
    a.partials = sm90::partials_in(static_cast<float*>((*workspace).data_ptr()), rows,
                                   static_cast<int>(slots));
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
