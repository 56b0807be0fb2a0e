// One translation unit an element type and head size, so that they compile side by side.
#pragma once

#include "dense_prefill_backward.h"

namespace flashmla::sm90::dense_prefill_backward {

void launch_bf16_192(const DensePrefillBackwardArgs& args, cudaStream_t stream);
void launch_bf16_128(const DensePrefillBackwardArgs& args, cudaStream_t stream);
void launch_fp16_192(const DensePrefillBackwardArgs& args, cudaStream_t stream);
void launch_fp16_128(const DensePrefillBackwardArgs& args, cudaStream_t stream);

}  // namespace flashmla::sm90::dense_prefill_backward
