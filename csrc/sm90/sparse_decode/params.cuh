// The kernels' parameters from a call's arguments.
#pragma once

#include <algorithm>
#include <climits>

#include "../../common/log_base.h"
#include "config.cuh"

namespace flashmla::sm90::sparse_decode {

inline KernelParams common_params(const Common& a) {
  KernelParams p{};
  p.row_tiles = cutlass::FastDivmod(row_tiles(a.rows));
  p.s_q = a.s_q;
  p.by_s_q = cutlass::FastDivmod(a.s_q);
  p.h_q = a.h_q;
  p.scale_log2 = a.softmax_scale * kLog2E;
  p.q = a.q;
  p.q_stride_query = a.q_stride_request;
  p.q_stride_head = a.q_stride_row;
  p.k_cache = static_cast<const uint8_t*>(a.k_cache);
  p.page = cutlass::FastDivmod(a.page);
  p.page_stride16 = static_cast<uint32_t>(a.page_stride_bytes / 16);
  p.tokens = static_cast<uint32_t>(std::min<int64_t>(a.blocks * a.page, int64_t{1} << 31));
  p.attn_sink = a.attn_sink;
  p.out = a.out;
  p.lse = a.lse;
  return p;
}

inline KernelParams list_params(const Args& a) {
  KernelParams p = common_params(a);
  p.splits = cutlass::FastDivmod(a.splits);
  p.items = a.requests * a.splits * row_tiles(a.rows);
  p.topk = a.topk;
  p.indices = a.indices;
  p.indices_stride = a.indices_stride;
  p.topk_length = a.topk_length;
  p.queries_a_length = cutlass::FastDivmod(a.queries_a_length);
  p.list_partials = a.partials;
  return p;
}

inline KernelParams page_params(const PagedArgs& a) {
  KernelParams p = common_params(a);
  Pages& pages = p.pages;
  pages.rows = a.rows;
  pages.batch = a.requests;
  pages.causal = a.causal;
  pages.blocks = static_cast<uint32_t>(a.blocks);
  pages.block_table = a.block_table;
  pages.block_table_stride = a.block_table_stride;
  // Room for the positions of a last tile that is not full.
  pages.max_tokens =
      static_cast<int>(std::min<int64_t>(int64_t{a.max_blocks} * a.page, INT_MAX - 2 * kTokens));
  pages.cache_seqlens = a.cache_seqlens;
  pages.plan = reinterpret_cast<const PlanRow*>(a.plan);
  pages.plan_stride = a.plan_stride;
  pages.num_splits = a.num_splits;
  pages.partials = a.partials;
  return p;
}

}  // namespace flashmla::sm90::sparse_decode
