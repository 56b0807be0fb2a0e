#include "launch.h"

#include "instances.h"

namespace flashmla::sm90::sparse_prefill {

void launch(const Args& args, cudaStream_t stream) {
  if (args.h_q <= kFewHeads) {
    (args.is_bf16 ? launch_few_heads_bf16 : launch_few_heads_fp16)(args, stream);
  } else {
    (args.is_bf16 ? launch_bf16 : launch_fp16)(args, stream);
  }
}

}  // namespace flashmla::sm90::sparse_prefill
