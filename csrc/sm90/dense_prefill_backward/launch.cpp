#include "instances.h"

namespace flashmla::sm90 {

void launch_dense_prefill_backward(const DensePrefillBackwardArgs& args, cudaStream_t stream) {
  using namespace dense_prefill_backward;
  if (args.forward.d_qk == 192) {
    (args.forward.is_bf16 ? launch_bf16_192 : launch_fp16_192)(args, stream);
  } else {
    (args.forward.is_bf16 ? launch_bf16_128 : launch_fp16_128)(args, stream);
  }
}

}  // namespace flashmla::sm90
