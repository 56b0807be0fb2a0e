#include "launch.cuh"

namespace flashmla::sm90::sparse_prefill {

void launch_few_heads_bf16(const Args& args, cudaStream_t stream) {
  few_heads::launch<cutlass::bfloat16_t>(args, stream);
}

}  // namespace flashmla::sm90::sparse_prefill
