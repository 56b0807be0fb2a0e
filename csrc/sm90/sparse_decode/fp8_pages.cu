#include "instances.h"
#include "launch.cuh"

namespace flashmla::sm90::sparse_decode {

void launch_fp8_pages(const PagedArgs& args, cudaStream_t stream) {
  if (row_tiles(args.rows) % 2 == 0) {
    launch_pages<cutlass::bfloat16_t, Fp8PairProducer>(args, stream);
  } else {
    launch_pages<cutlass::bfloat16_t, Fp8Producer>(args, stream);
  }
}

}  // namespace flashmla::sm90::sparse_decode
