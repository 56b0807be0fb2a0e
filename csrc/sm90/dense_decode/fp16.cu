#include "instances.h"
#include "launch.cuh"

namespace flashmla::sm90::dense_decode {

void launch_fp16(const DenseDecodeArgs& args, cudaStream_t stream) {
  launch<cutlass::half_t>(args, stream);
}

}  // namespace flashmla::sm90::dense_decode
