#include "launch.h"

#include "instances.h"

namespace flashmla::sm90::sparse_decode {

void launch(const Args& args, cudaStream_t stream) {
  if (args.cache == Cache::kFp8) {
    const bool few_rows = args.rows <= kFewRows && args.splits == 1;
    (few_rows ? launch_few_rows : launch_fp8)(args, stream);
  } else {
    (args.is_bf16 ? launch_bf16 : launch_fp16)(args, stream);
  }
}

void launch(const PagedArgs& args, cudaStream_t stream) {
  (args.rows <= kFewRows ? launch_few_rows_pages : launch_fp8_pages)(args, stream);
}

}  // namespace flashmla::sm90::sparse_decode
