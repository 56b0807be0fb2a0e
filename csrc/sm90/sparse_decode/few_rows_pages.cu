// Dense decode of few query rows over the pages of an FP8 cache.
#include "../../common/shared_memory.h"
#include "few_rows.cuh"
#include "instances.h"
#include "params.cuh"

namespace flashmla::sm90::sparse_decode {
namespace {

template <int kN>
void launch_as(const PagedArgs& a, cudaStream_t stream) {
  constexpr auto kKernel = &few_rows::few_rows_kernel<PagedSource, kN>;
  constexpr int kShared = sizeof(few_rows::SharedStorage<kN>);
  allow_shared_memory<kKernel>(kShared);
  kKernel<<<dim3(1, a.parts), few_rows::Config<kN>::kThreads, kShared, stream>>>(page_params(a));
  FLASHMLA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void launch_few_rows_pages(const PagedArgs& args, cudaStream_t stream) {
  if (args.rows <= 16) {
    launch_as<16>(args, stream);
  } else {
    launch_as<32>(args, stream);
  }
}

}  // namespace flashmla::sm90::sparse_decode
