// merge_state: joins two attention results over disjoint sets of keys, row by row.
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include "../common/cuda_check.h"
#include "launch.h"

namespace flashmla::sm90 {
namespace {

constexpr int kWarps = 4;

__device__ __forceinline__ float finite_lse(float lse) {
  return isinf(lse) ? -INFINITY : lse;  // by convention an empty half has lse +inf (or -inf)
}

// out_a, out_b, out [rows, d]; lse_a, lse_b, lse [rows]. A warp takes a row.
template <class T, int kVector>
__global__ void __launch_bounds__(kWarps * 32)
    merge_kernel(const T* __restrict__ out_a, const float* __restrict__ lse_a,
                 const T* __restrict__ out_b, const float* __restrict__ lse_b, T* __restrict__ out,
                 float* __restrict__ lse, int64_t rows, int d) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= rows) return;
  const float a = finite_lse(lse_a[row]);
  const float b = finite_lse(lse_b[row]);
  const bool has_a = a != -INFINITY;
  const bool has_b = b != -INFINITY;
  const float max = isnan(a + b) ? a + b : fmaxf(a, b);
  const float shift = has_a || has_b ? max : 0.f;
  const float sum = expf(a - shift) + expf(b - shift);
  const float weight_a = has_a ? expf(a - shift) / sum : 0.f;
  const float weight_b = has_b ? expf(b - shift) / sum : 0.f;

  struct alignas(sizeof(T) * kVector) Vector {
    T v[kVector];
  };
  const auto* from_a = reinterpret_cast<const Vector*>(out_a + row * d);
  const auto* from_b = reinterpret_cast<const Vector*>(out_b + row * d);
  auto* to = reinterpret_cast<Vector*>(out + row * d);
  for (int i = threadIdx.x % 32; i < d / kVector; i += 32) {
    const Vector x = from_a[i];
    const Vector y = from_b[i];
    Vector z;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      // Selected, not multiplied by zero: an empty half may hold anything.
      const float part_a = has_a ? weight_a * static_cast<float>(x.v[e]) : 0.f;
      const float part_b = has_b ? weight_b * static_cast<float>(y.v[e]) : 0.f;
      z.v[e] = static_cast<T>(part_a + part_b);
    }
    to[i] = z;
  }
  if (threadIdx.x % 32 == 0) lse[row] = has_a || has_b ? shift + logf(sum) : INFINITY;
}

template <class T>
void launch(const void* out_a, const float* lse_a, const void* out_b, const float* lse_b, void* out,
            float* lse, int64_t rows, int d, cudaStream_t stream) {
  if (rows == 0) return;
  constexpr int kVector = 16 / sizeof(T);
  const auto kernel = d % kVector == 0 ? &merge_kernel<T, kVector> : &merge_kernel<T, 1>;
  const auto blocks = static_cast<unsigned>((rows + kWarps - 1) / kWarps);
  kernel<<<blocks, kWarps * 32, 0, stream>>>(static_cast<const T*>(out_a), lse_a,
                                             static_cast<const T*>(out_b), lse_b,
                                             static_cast<T*>(out), lse, rows, d);
  FLASHMLA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void launch_merge_state(const void* out_a, const float* lse_a, const void* out_b,
                        const float* lse_b, void* out, float* lse, int64_t rows, int d,
                        Element element, cudaStream_t stream) {
  switch (element) {
    case Element::kBf16:
      return launch<cutlass::bfloat16_t>(out_a, lse_a, out_b, lse_b, out, lse, rows, d, stream);
    case Element::kFp16:
      return launch<cutlass::half_t>(out_a, lse_a, out_b, lse_b, out, lse, rows, d, stream);
    case Element::kFp32:
      return launch<float>(out_a, lse_a, out_b, lse_b, out, lse, rows, d, stream);
  }
}

}  // namespace flashmla::sm90
