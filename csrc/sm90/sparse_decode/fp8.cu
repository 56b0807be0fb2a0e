#include "instances.h"
#include "launch.cuh"

namespace flashmla::sm90::sparse_decode {

void launch_fp8(const Args& args, cudaStream_t stream) {
  launch_lists<cutlass::bfloat16_t, Fp8Producer>(args, stream);
}

}  // namespace flashmla::sm90::sparse_decode
