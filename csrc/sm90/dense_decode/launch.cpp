#include "instances.h"

namespace flashmla::sm90 {

void launch_dense_decode(const DenseDecodeArgs& args, cudaStream_t stream) {
  (args.is_bf16 ? dense_decode::launch_bf16 : dense_decode::launch_fp16)(args, stream);
}

}  // namespace flashmla::sm90
