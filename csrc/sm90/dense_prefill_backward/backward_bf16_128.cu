#include "instances.h"
#include "launch.cuh"

namespace flashmla::sm90::dense_prefill_backward {

void launch_bf16_128(const DensePrefillBackwardArgs& args, cudaStream_t stream) {
  launch<cutlass::bfloat16_t, 128>(args, stream);
}

}  // namespace flashmla::sm90::dense_prefill_backward
