#include "instances.h"
#include "launch.cuh"

namespace flashmla::sm90::dense_decode {

void launch_bf16(const DenseDecodeArgs& args, cudaStream_t stream) {
  launch<cutlass::bfloat16_t>(args, stream);
}

}  // namespace flashmla::sm90::dense_decode
