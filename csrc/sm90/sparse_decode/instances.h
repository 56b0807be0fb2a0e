// One translation unit an instance, so that they compile side by side.
#pragma once

#include "launch.h"

namespace flashmla::sm90::sparse_decode {

void launch_fp8(const Args& args, cudaStream_t stream);
void launch_fp8_pages(const PagedArgs& args, cudaStream_t stream);
void launch_few_rows(const Args& args, cudaStream_t stream);
void launch_few_rows_pages(const PagedArgs& args, cudaStream_t stream);
void launch_bf16(const Args& args, cudaStream_t stream);
void launch_fp16(const Args& args, cudaStream_t stream);
void launch_combine(const Args& args, cudaStream_t stream);

}  // namespace flashmla::sm90::sparse_decode
