#include "instances.h"
#include "launch.cuh"

namespace flashmla::sm90::dense_prefill {

void launch_fp16_128(const DensePrefillArgs& args, cudaStream_t stream) {
  launch<cutlass::half_t, 128>(args, stream);
}

}  // namespace flashmla::sm90::dense_prefill
