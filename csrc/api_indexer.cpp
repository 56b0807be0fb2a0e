// What Python calls of the indexer: its scores and the choice of the best.
#include "common/ffi.h"
#include "sm90/indexer/launch.h"
#include "sm90/topk/launch.h"

namespace flashmla {
namespace {

using tvm::ffi::Optional;

void require_packed(const TensorView& t, const char* what) {
  require(t.IsContiguous() && reinterpret_cast<uintptr_t>(data<char>(t)) % 16 == 0, what);
}

// q [s_q, heads, 128] and k [s_kv, 128] e4m3; k_scale [s_kv]; weights [s_q, heads];
// start, end [s_q] int32; logits [s_q, s_kv]
void indexer_logits(TensorView q, TensorView k, TensorView k_scale, TensorView weights,
                    TensorView start, TensorView end, TensorView logits) {
  sm90::IndexerArgs a{};
  require(q.ndim() == 3 && q.size(2) == sm90::kIndexDim && q.stride(2) == 1 &&
              (q.size(1) == 32 || q.size(1) == 64),
          "q must be [s_q, heads, 128] with 32 or 64 heads");
  require(k.ndim() == 2 && k.size(1) == sm90::kIndexDim && k.stride(1) == 1,
          "k must be [s_kv, 128]");
  a.s_q = size32(q, 0);
  a.heads = size32(q, 1);
  a.s_kv = size32(k, 0);
  require(logits.size(0) == a.s_q && logits.size(1) == a.s_kv, "logits must be [s_q, s_kv]");
  require(k_scale.size(0) == a.s_kv, "k_scale must be [s_kv]");
  require(weights.size(0) == a.s_q && weights.size(1) == a.heads, "weights must be [s_q, heads]");
  require(start.size(0) == a.s_q && end.size(0) == a.s_q, "start and end must be [s_q]");
  for (const TensorView& t : {k_scale, weights, start, end, logits}) {
    require_packed(t, "k_scale, weights, start, end and logits must be contiguous and aligned");
  }
  if (a.s_q == 0 || a.s_kv == 0) return;
  a.q = data<void>(q);
  a.q_stride_token = q.stride(0);
  a.q_stride_head = q.stride(1);
  a.k = data<void>(k);
  a.k_stride = k.stride(0);
  a.k_scale = data<float>(k_scale);
  a.weights = data<float>(weights);
  a.start = data<int>(start);
  a.end = data<int>(end);
  a.logits = data<float>(logits);
  const DeviceGuard guard(q.device());
  sm90::launch_indexer(a, guard.stream());
}

// q [batch, s_q, heads, 128] e4m3; cache [blocks, 64, 1, 132] of bytes; weights [batch, s_q,
// heads]; block_table [batch, max_blocks], lengths [batch] int32; logits [batch, s_q, max_blocks *
// 64]
void indexer_logits_paged(TensorView q, TensorView cache, TensorView weights,
                          TensorView block_table, TensorView lengths, TensorView logits) {
  sm90::PagedIndexerArgs a{};
  require(q.ndim() == 4 && q.size(3) == sm90::kIndexDim && q.stride(3) == 1 &&
              (q.size(2) == 32 || q.size(2) == 64),
          "q must be [batch, s_q, heads, 128] with 32 or 64 heads");
  require(cache.ndim() == 4 && cache.size(1) == sm90::kIndexPage && cache.size(2) == 1 &&
              cache.size(3) == sm90::kIndexDim + 4 && cache.dtype().bits == 8 &&
              cache.stride(1) == cache.size(3) && cache.stride(3) == 1,
          "cache must be [blocks, 64, 1, 132] bytes with no gaps in a page");
  a.batch = size32(q, 0);
  a.s_q = size32(q, 1);
  a.heads = size32(q, 2);
  require(
      block_table.size(0) == a.batch && (block_table.size(1) <= 1 || block_table.stride(1) == 1),
      "block_table must be [batch, max_blocks]");
  a.max_blocks = size32(block_table, 1);
  require(weights.size(0) == a.batch && weights.size(1) == a.s_q && weights.size(2) == a.heads,
          "weights must be [batch, s_q, heads]");
  require(lengths.size(0) == a.batch, "lengths must be [batch]");
  require(logits.size(0) == a.batch && logits.size(1) == a.s_q &&
              logits.size(2) == int64_t{a.max_blocks} * sm90::kIndexPage,
          "logits must be [batch, s_q, max_blocks * 64]");
  for (const TensorView& t : {weights, lengths, logits}) {
    require_packed(t, "weights, lengths and logits must be contiguous and aligned");
  }
  if (a.batch == 0 || a.s_q == 0 || a.max_blocks == 0) return;
  a.q = data<void>(q);
  a.q_stride_batch = q.stride(0);
  a.q_stride_token = q.stride(1);
  a.q_stride_head = q.stride(2);
  a.cache = data<void>(cache);
  a.blocks = size32(cache, 0);
  a.page_stride = cache.stride(0);
  a.weights = data<float>(weights);
  a.block_table = data<int>(block_table);
  a.block_table_stride = block_table.stride(0);
  a.lengths = data<int>(lengths);
  a.logits = data<float>(logits);
  const DeviceGuard guard(q.device());
  sm90::launch_indexer_paged(a, guard.stream());
}

// logits [rows, n] float32; lengths [rows]; block_table [rows, max_blocks]; out [rows, k] int32
void topk(TensorView logits, Optional<TensorView> lengths, Optional<TensorView> block_table,
          int64_t page, TensorView out) {
  sm90::TopkArgs a{};
  a.rows = logits.size(0);
  require(logits.ndim() == 2 && logits.size(1) <= sm90::kTopkMaxRow &&
              (logits.size(1) <= 1 || logits.stride(1) == 1),
          "logits must be [rows, n] with n up to 262144 and no gaps in a row");
  require(out.ndim() == 2 && out.size(0) == a.rows && out.size(1) <= sm90::kTopkMaxK &&
              out.IsContiguous(),
          "out must be [rows, k] with k up to 2048");
  a.n = size32(logits, 1);
  a.k = size32(out, 1);
  a.logits = data<float>(logits);
  a.logits_stride = logits.stride(0);
  if (lengths.has_value()) {
    require(lengths.value().size(0) == a.rows && lengths.value().IsContiguous(),
            "lengths must be [rows]");
    a.lengths = data<int>(lengths.value());
  }
  if (block_table.has_value()) {
    const TensorView table = block_table.value();
    require(table.size(0) == a.rows && page >= 1 && table.size(1) * page >= a.n &&
                (table.size(1) <= 1 || table.stride(1) == 1),
            "block_table must be [rows, max_blocks] and cover n positions");
    a.block_table = data<int>(table);
    a.block_table_stride = table.stride(0);
  }
  a.page = static_cast<int>(page);
  a.out = data<int>(out);
  if (a.rows == 0 || a.k == 0) return;
  const DeviceGuard guard(logits.device());
  sm90::launch_topk(a, guard.stream());
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(indexer_logits, indexer_logits);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(indexer_logits_paged, indexer_logits_paged);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(topk, topk);

}  // namespace flashmla
