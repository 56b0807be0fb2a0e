// Packs the indexer's keys, each into its slot of the indexer's cache: 128 float8_e4m3 codes and a
// float32 scale a token.
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include "../../common/cuda_check.h"
#include "launch.h"
#include "quantise.cuh"

namespace flashmla::sm90 {
namespace {

constexpr int kWarps = 4;
constexpr int kTokensPerBlock = kWarps * 32 / kLanesPerTile;

// Half a warp takes a token. Both halves stay until the end, since they shuffle together.
template <class T, bool kPowerOfTwo>
__global__ void __launch_bounds__(kWarps * 32) index_pack_kernel(const IndexPackArgs a) {
  const int lane = threadIdx.x % kLanesPerTile;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock +
                        static_cast<int64_t>(threadIdx.x / kLanesPerTile);
  const int64_t token = min(place, a.tokens - 1);
  Eight<T> x;  // of a token's [128]
  x.load(static_cast<const T*>(a.x) + token * a.x_stride + lane * kValuesPerLane);
  uint32_t block, offset;
  const bool kept = a.slots.find(token, block, offset) && place < a.tokens;
  const Quantised quantised = quantise<kPowerOfTwo>(x);
  if (!kept) return;
  const int64_t page = block * a.stride_block;                             // bytes
  uint8_t* codes = a.codes + page + static_cast<int64_t>(offset) * kTile;  // [128]
  *reinterpret_cast<uint2*>(codes + lane * kValuesPerLane) = quantised.codes;
  if (lane == 0) {
    auto* scales = reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(a.scales) + page);
    scales[offset] = quantised.scale;
  }
}

template <class T>
void launch(const IndexPackArgs& args, cudaStream_t stream) {
  const auto kernel =
      args.power_of_two ? &index_pack_kernel<T, true> : &index_pack_kernel<T, false>;
  const auto blocks = static_cast<unsigned>((args.tokens + kTokensPerBlock - 1) / kTokensPerBlock);
  kernel<<<blocks, kWarps * 32, 0, stream>>>(args);
  FLASHMLA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void launch_index_pack(const IndexPackArgs& args, cudaStream_t stream) {
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
