#include "instances.h"
#include "launch.cuh"

namespace flashmla::sm90::sparse_prefill {

void launch_fp16(const Args& args, cudaStream_t stream) {
  launch_kernel<cutlass::half_t>(args, stream);
}

}  // namespace flashmla::sm90::sparse_prefill
