// Sparse decode of few heads over an FP8 cache, lists that are not split.
#include "few_rows.cuh"
#include "instances.h"
#include "launch_lists.cuh"

namespace flashmla::sm90::sparse_decode {
namespace {

template <int kN>
void launch_as(const Args& a, cudaStream_t stream) {
  launch_lists<&few_rows::few_rows_kernel<ListSource, kN>>(
      a, few_rows::Config<kN>::kThreads, sizeof(few_rows::SharedStorage<kN>), false, stream);
}

}  // namespace

void launch_few_rows(const Args& args, cudaStream_t stream) {
  if (args.rows <= 16) {
    launch_as<16>(args, stream);
  } else {
    launch_as<32>(args, stream);
  }
}

}  // namespace flashmla::sm90::sparse_decode
