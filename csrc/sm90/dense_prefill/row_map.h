// The tensor maps of dense prefill, forward and backward.
#pragma once

#include "../../common/tensor_map.h"
#include "dense_prefill.h"

namespace flashmla::sm90::dense_prefill {

// Boxes of [tokens, 1 head, 64 columns] out of a tensor [total, heads, d].
inline CUtensorMap row_map(const Rows& x, bool is_bf16, int d, int tokens,
                           CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  return make_tensor_map_16bit<3>(
      x.data, is_bf16,
      {static_cast<uint64_t>(d), static_cast<uint64_t>(x.heads), static_cast<uint64_t>(x.tokens)},
      {static_cast<uint64_t>(x.stride_head), static_cast<uint64_t>(x.stride_token)},
      {64, 1, static_cast<uint32_t>(tokens)}, promotion);
}

}  // namespace flashmla::sm90::dense_prefill
