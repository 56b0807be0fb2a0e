#include "launch.cuh"

namespace flashmla::sm90::sparse_prefill {

void launch_few_heads_fp16(const Args& args, cudaStream_t stream) {
  few_heads::launch<cutlass::half_t>(args, stream);
}

}  // namespace flashmla::sm90::sparse_prefill
