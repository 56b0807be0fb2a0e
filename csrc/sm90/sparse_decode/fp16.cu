#include "instances.h"
#include "launch.cuh"

namespace flashmla::sm90::sparse_decode {

void launch_fp16(const Args& args, cudaStream_t stream) {
  launch_lists<cutlass::half_t, GatherProducer>(args, stream);
}

}  // namespace flashmla::sm90::sparse_decode
