// One translation unit an element type, so that they compile side by side.
#pragma once

#include "launch.h"

namespace flashmla::sm90::sparse_prefill {

void launch_bf16(const Args& args, cudaStream_t stream);
void launch_fp16(const Args& args, cudaStream_t stream);

}  // namespace flashmla::sm90::sparse_prefill
