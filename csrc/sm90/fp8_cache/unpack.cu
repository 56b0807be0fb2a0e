// Reads 656-byte tokens back: code * scale rounded once to float32, then the RoPE values.
#include <cuda_fp8.h>

#include "../../common/cuda_check.h"
#include "../../common/float_bits.cuh"
#include "launch.h"

namespace flashmla::sm90 {
namespace {

constexpr int kWarps = 4;
constexpr int kTiles = 4;
constexpr int kTile = 128;
constexpr int kScales = kTiles * kTile;  // byte offsets
constexpr int kRope = kScales + 4 * kTiles;

__device__ __forceinline__ float2 values_of(uint32_t two_codes) {
  const auto halves =
      __half2(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two_codes), __NV_E4M3));
  return __half22float2(halves);  // every code is a normal number in float16
}

// A warp takes a token, a tile at a time: four codes a lane in, four floats out.
__global__ void __launch_bounds__(kWarps * 32) unpack_kernel(const UnpackArgs a) {
  const int lane = threadIdx.x % 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (token >= a.tokens) return;
  const uint32_t outer = static_cast<uint32_t>(token) / a.inner;
  const uint32_t inner = static_cast<uint32_t>(token) % a.inner;
  const uint8_t* row = a.cache + outer * a.stride_outer + inner * a.stride_inner;  // [656]
  float4* out = reinterpret_cast<float4*>(a.out + token * (kTiles * kTile + 64));  // [576 / 4]

  uint32_t codes[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    codes[t] = __ldg(reinterpret_cast<const uint32_t*>(row) + t * 32 + lane);
  }
  const float4 scale4 = __ldg(reinterpret_cast<const float4*>(row + kScales));
  const float scales[kTiles] = {scale4.x, scale4.y, scale4.z, scale4.w};
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const float2 low = values_of(codes[t] & 0xffffu);
    const float2 high = values_of(codes[t] >> 16);
    out[t * 32 + lane] = make_float4(
        multiply_with_denormals(low.x, scales[t]), multiply_with_denormals(low.y, scales[t]),
        multiply_with_denormals(high.x, scales[t]), multiply_with_denormals(high.y, scales[t]));
  }
  if (lane < 16) {
    const uint2 rope = __ldg(reinterpret_cast<const uint2*>(row + kRope) + lane);
    out[kTiles * 32 + lane] =
        make_float4(__uint_as_float(rope.x << 16), __uint_as_float(rope.x & 0xffff0000u),
                    __uint_as_float(rope.y << 16), __uint_as_float(rope.y & 0xffff0000u));
  }
}

}  // namespace

void launch_fp8_unpack(const UnpackArgs& args, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((args.tokens + kWarps - 1) / kWarps);
  unpack_kernel<<<blocks, kWarps * 32, 0, stream>>>(args);
  FLASHMLA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace flashmla::sm90
