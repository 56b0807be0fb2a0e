// One translation unit an element type and head size, so that they compile side by side.
#pragma once

#include "dense_prefill.h"

namespace flashmla::sm90::dense_prefill {

void launch_bf16_192(const DensePrefillArgs& args, cudaStream_t stream);
void launch_bf16_128(const DensePrefillArgs& args, cudaStream_t stream);
void launch_fp16_192(const DensePrefillArgs& args, cudaStream_t stream);
void launch_fp16_128(const DensePrefillArgs& args, cudaStream_t stream);

}  // namespace flashmla::sm90::dense_prefill
