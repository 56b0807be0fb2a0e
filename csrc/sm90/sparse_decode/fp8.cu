#include "instances.h"
#include "launch.cuh"

namespace flashmla::sm90::sparse_decode {

void launch_fp8(const Args& args, cudaStream_t stream) {
  if (args.splits == 1 && row_tiles(args.rows) % 2 == 0) {
    launch_lists<cutlass::bfloat16_t, Fp8PairProducer>(args, stream);
  } else {
    launch_lists<cutlass::bfloat16_t, Fp8Producer>(args, stream);
  }
}

}  // namespace flashmla::sm90::sparse_decode
