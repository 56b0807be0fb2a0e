// What the parameters of both kernels of sparse prefill have in common, from a call's arguments.
#pragma once

#include <algorithm>

#include "../../common/log_base.h"
#include "launch.h"

namespace flashmla::sm90::sparse_prefill {

// T: element of q, kv and out. Params: a kernel's own KernelParams.
template <class T, class Params>
void set_common(Params& p, const Args& a) {
  p.h_q = a.h_q;
  p.d_qk = a.d_qk;
  p.topk = a.topk;
  p.scale_log2 = a.softmax_scale * kLog2E;
  p.scale = a.softmax_scale;
  p.lse_unit = a.lse_base_2 ? 1.f : kLn2;
  p.kv = static_cast<const uint8_t*>(a.kv);
  p.kv_stride16 = static_cast<uint32_t>(a.kv_stride * static_cast<int64_t>(sizeof(T)) / 16);
  p.tokens = static_cast<uint32_t>(std::min<int64_t>(a.tokens, int64_t{1} << 31));
  p.indices = a.indices;
  p.indices_stride = a.indices_stride;
  p.topk_length = a.topk_length;
  p.attn_sink = a.attn_sink;
  p.out = a.out;
  p.max_logits = a.max_logits;
  p.lse = a.lse;
}

}  // namespace flashmla::sm90::sparse_prefill
