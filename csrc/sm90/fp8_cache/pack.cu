// Packs tokens into the 656-byte format, each into its slot of a paged cache: one read of x, one
// write of the row, nothing in between.
//
//   bytes 0-511    512 float8_e4m3 codes     16 bytes a lane
//   bytes 512-527  4 float32 scales          lane 0
//   bytes 528-655  64 bfloat16 RoPE values   lanes 1 to 8
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include "../../common/cuda_check.h"
#include "launch.h"
#include "quantise.cuh"

namespace flashmla::sm90 {
namespace {

constexpr int kWarps = 4;
constexpr int kNope = 512;
constexpr int kHalf = kNope / 2;  // what a warp's lanes hold with eight values each
constexpr int kRopeLanes = 64 / kValuesPerLane;

// Each lane has the eight codes of its place in both halves of the row. Neighbours swap, so that
// an even lane gets 16 bytes of the first half and an odd lane 16 of the second.
__device__ __forceinline__ uint4 exchange(const uint2& first, const uint2& second, bool odd) {
  const uint2 sent = odd ? first : second;
  uint2 got;
  got.x = __shfl_xor_sync(kFullWarp, sent.x, 1);
  got.y = __shfl_xor_sync(kFullWarp, sent.y, 1);
  return odd ? make_uint4(got.x, got.y, second.x, second.y)
             : make_uint4(first.x, first.y, got.x, got.y);
}

// A warp takes a token.
template <class T, bool kPowerOfTwo>
__global__ void __launch_bounds__(kWarps * 32) pack_kernel(const PackArgs a) {
  const int lane = threadIdx.x % 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (token >= a.tokens) return;

  // The values are asked for before it is known whether the token has a slot: one wait, not two.
  const T* x = static_cast<const T*>(a.x) + token * a.x_stride;  // [576]
  Eight<T> nope[2], rope{};
  nope[0].load(x + lane * kValuesPerLane);
  nope[1].load(x + kHalf + lane * kValuesPerLane);
  const bool has_rope = lane >= 1 && lane <= kRopeLanes;
  if (has_rope) rope.load(x + kNope + (lane - 1) * kValuesPerLane);
  uint32_t block, offset;
  if (!a.slots.find(token, block, offset)) return;
  uint8_t* row = a.cache + block * a.stride_block + offset * a.stride_token;  // [656]

  const Quantised first = quantise<kPowerOfTwo>(nope[0]);
  const Quantised second = quantise<kPowerOfTwo>(nope[1]);
  const bool odd = lane % 2 != 0;
  const uint4 codes = exchange(first.codes, second.codes, odd);
  const int place = odd ? kHalf + (lane - 1) * kValuesPerLane : lane * kValuesPerLane;
  *reinterpret_cast<uint4*>(row + place) = codes;

  // Tiles 0 and 2 are the lower half warp's, 1 and 3 the upper's.
  const float scale_1 = __shfl_sync(kFullWarp, first.scale, kLanesPerTile);
  const float scale_3 = __shfl_sync(kFullWarp, second.scale, kLanesPerTile);
  uint4 tail = make_uint4(__float_as_uint(first.scale), __float_as_uint(scale_1),
                          __float_as_uint(second.scale), __float_as_uint(scale_3));
  if (has_rope) {
    uint32_t* pairs = &tail.x;
#pragma unroll
    for (int i = 0; i < kValuesPerLane; i += 2) {
      pairs[i / 2] = bfloat16_bits(rope[i]) | bfloat16_bits(rope[i + 1]) << 16;
    }
  }
  if (lane <= kRopeLanes) *reinterpret_cast<uint4*>(row + kNope + lane * 16) = tail;
}

template <class T>
void launch(const PackArgs& args, cudaStream_t stream) {
  const auto kernel = args.power_of_two ? &pack_kernel<T, true> : &pack_kernel<T, false>;
  const auto blocks = static_cast<unsigned>((args.tokens + kWarps - 1) / kWarps);
  kernel<<<blocks, kWarps * 32, 0, stream>>>(args);
  FLASHMLA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void launch_fp8_pack(const PackArgs& args, cudaStream_t stream) {
  switch (args.element) {
    case Element::kBf16:
      return launch<cutlass::bfloat16_t>(args, stream);
    case Element::kFp16:
      return launch<cutlass::half_t>(args, stream);
    case Element::kFp32:
      return launch<float>(args, stream);
  }
}

}  // namespace flashmla::sm90
