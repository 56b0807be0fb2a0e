// Sparse decode of few heads over an FP8 cache, lists that are not split.
#include <algorithm>

#include "../../common/cuda_check.h"
#include "../../common/shared_memory.h"
#include "few_rows.cuh"
#include "instances.h"
#include "params.cuh"

namespace flashmla::sm90::sparse_decode {
namespace {

template <int kN>
void launch_as(const Args& a, cudaStream_t stream) {
  constexpr auto kKernel = &few_rows::few_rows_kernel<ListSource, kN>;
  constexpr int kShared = sizeof(few_rows::SharedStorage<kN>);
  allow_shared_memory<kKernel>(kShared);
  const KernelParams p = list_params(a);
  kKernel<<<std::min(p.items, a.sms), few_rows::Config<kN>::kThreads, kShared, stream>>>(p);
  FLASHMLA_CUDA_CHECK(cudaGetLastError());
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
