// Merges the partial results of lists that were split, where the CTAs that have computed them do
// not meet.
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include "../../common/cuda_check.h"
#include "instances.h"
#include "merge.cuh"
#include "params.cuh"

namespace flashmla::sm90::sparse_decode {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksAUnit = kVectorsAnItem / kThreads;
constexpr int kFewSplits = 4;
constexpr int kAtOnceOfMany = 8;

// grid: [units][2 halves][4 warps][blocks], a unit's blocks behind its last row's doing nothing.
// kAtOnce: how many partial results are on their way before any LSE is looked at.
template <class T, int kAtOnce>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ KernelParams p) {
  const int unit = blockIdx.x / kBlocksAUnit;
  const int splits = p.splits.divisor;
  const int warps = used_warps(p.h_q, p.row_tiles.rem(unit) * kRows);
  const int vector = blockIdx.x % kBlocksAUnit * kThreads + threadIdx.x;
  if (vector >= 2 * warps * kVectorsAWarp) return;
  const VectorPlace at(vector, warps);
  const int64_t first_item = static_cast<int64_t>(unit) * splits;
  const uint4* out = p.list_partials.out + at.index(first_item);
  const float4* rows = p.list_partials.rows + at.first_row(first_item) + at.lane / 4;
  MergedVector merged;
#pragma unroll 1
  for (int first = 0; first < splits; first += kAtOnce) {
    uint4 o[kAtOnce];
    float4 known[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const bool there = first + k < splits;
      o[k] = there ? out[k * kVectorsAnItem] : make_uint4(0, 0, 0, 0);
      known[k] = there ? rows[k * kRows] : make_float4(-INFINITY, 0.f, -INFINITY, 0.f);
    }
    out += kAtOnce * kVectorsAnItem;
    rows += kAtOnce * kRows;
    float max[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      max[0] = fmaxf(max[0], known[k].x);
      max[1] = fmaxf(max[1], known[k].z);
    }
    merged.raise(max[0], max[1]);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) merged.add(known[k], o[k]);
  }
  merged.store<T>(p, unit, at);
}

template <class T>
void launch_as(const Args& a, cudaStream_t stream) {
  const int blocks = a.requests * row_tiles(a.h_q) * kBlocksAUnit;
  const auto kernel =
      a.splits <= kFewSplits ? &combine_kernel<T, kFewSplits> : &combine_kernel<T, kAtOnceOfMany>;
  kernel<<<blocks, kThreads, 0, stream>>>(list_params(a));
  FLASHMLA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void launch_combine(const Args& args, cudaStream_t stream) {
  if (args.is_bf16) {
    launch_as<cutlass::bfloat16_t>(args, stream);
  } else {
    launch_as<cutlass::half_t>(args, stream);
  }
}

}  // namespace flashmla::sm90::sparse_decode
