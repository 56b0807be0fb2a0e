// One translation unit an element type, so that they compile side by side.
#pragma once

#include "launch.h"

namespace flashmla::sm90::sparse_prefill {

void launch_bf16(const Args& args, cudaStream_t stream);
void launch_fp16(const Args& args, cudaStream_t stream);

// A kernel of its own for up to this many heads.
constexpr int kFewHeads = 32;
void launch_few_heads_bf16(const Args& args, cudaStream_t stream);
void launch_few_heads_fp16(const Args& args, cudaStream_t stream);

}  // namespace flashmla::sm90::sparse_prefill
