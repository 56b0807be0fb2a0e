// Merges the partial results of the requests that the plan split, weighting each by its share of
// the softmax denominator. Requests computed in one piece were written by the decode kernel.
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>
#include <cutlass/numeric_conversion.h>

#include "../common/cuda_check.h"
#include "launch.h"
#include "schedule.h"

namespace flashmla::sm90 {
namespace {

constexpr int kDimV = 512;
constexpr int kThreads = 128;  // four columns each
static_assert(kThreads * 4 == kDimV, "a block writes one row of the output");

// region: combine
// One block a row of a split request: block (row, part) works if the part's first request begins
// here for the second time, which names every split request exactly once.
template <class T>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const DecodeShape shape, const PlanRow* __restrict__ plan,
                   const int* __restrict__ num_splits, const Partials partials, T* __restrict__ out,
                   float* __restrict__ lse) {
  if (plan[blockIdx.y].begin_split != 1) return;
  const int request = plan[blockIdx.y].begin_request;
  const int first = num_splits[request];
  const int splits = num_splits[request + 1] - first;
  const int rows = shape.h_kv * shape.rows();
  const int64_t base = static_cast<int64_t>(first) * rows + blockIdx.x;

  const float* part_lse = partials.lse + base;  // [splits], a stride of `rows`; base 2
  float max = -INFINITY;
  for (int k = threadIdx.x % 32; k < splits; k += 32) {
    max = fmaxf(max, part_lse[static_cast<int64_t>(k) * rows]);
  }
  for (int d = 16; d > 0; d /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, d));
  const float shift = max == -INFINITY ? 0.f : max;

  const float* part_out = partials.out + base * kDimV + threadIdx.x * 4;  // [splits, 512]
  float sum = 0.f;
  float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
  for (int k = 0; k < splits; ++k) {
    const int64_t at = static_cast<int64_t>(k) * rows;
    const float weight = exp2f(part_lse[at] - shift);
    const float4 o = *reinterpret_cast<const float4*>(part_out + at * kDimV);
    sum += weight;
    total.x += weight * o.x;
    total.y += weight * o.y;
    total.z += weight * o.z;
    total.w += weight * o.w;
  }

  const int hk = blockIdx.x / shape.rows();
  const int row = blockIdx.x % shape.rows();
  const int s = row / shape.group();
  const int head = hk * shape.group() + row % shape.group();
  const int64_t query = static_cast<int64_t>(request) * shape.s_q + s;
  const float inverse = sum == 0.f ? 0.f : 1.f / sum;  // a row with nothing to attend to gives 0
  cutlass::NumericArrayConverter<T, float, 4> convert;
  const auto packed =
      convert({total.x * inverse, total.y * inverse, total.z * inverse, total.w * inverse});
  T* to = out + (query * shape.h_q + head) * kDimV + threadIdx.x * 4;
  *reinterpret_cast<uint2*>(to) = reinterpret_cast<const uint2&>(packed);
  if (threadIdx.x == 0) {
    const int64_t at = (static_cast<int64_t>(request) * shape.h_q + head) * shape.s_q + s;
    lse[at] = sum == 0.f ? INFINITY : (max + log2f(sum)) * 0.6931471805599453f;
  }
}
// endregion: combine

template <class T>
void launch(const CombineArgs& a, cudaStream_t stream) {
  const dim3 grid(a.shape.h_kv * a.shape.rows(), a.shape.parts);
  combine_kernel<T>
      <<<grid, kThreads, 0, stream>>>(a.shape, reinterpret_cast<const PlanRow*>(a.plan),
                                      a.num_splits, a.partials, static_cast<T*>(a.out), a.lse);
  FLASHMLA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void launch_combine(const CombineArgs& args, cudaStream_t stream) {
  if (args.is_bf16) {
    launch<cutlass::bfloat16_t>(args, stream);
  } else {
    launch<cutlass::half_t>(args, stream);
  }
}

}  // namespace flashmla::sm90
