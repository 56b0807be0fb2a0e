#include "instances.h"
#include "launch.cuh"

namespace flashmla::sm90::sparse_prefill {

void launch_bf16(const Args& args, cudaStream_t stream) {
  launch_kernel<cutlass::bfloat16_t>(args, stream);
}

}  // namespace flashmla::sm90::sparse_prefill
