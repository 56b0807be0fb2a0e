// Writes tokens as they are into their slots of a paged cache.
#include "../../common/cuda_check.h"
#include "launch.h"

namespace flashmla::sm90 {
namespace {

constexpr int kWarps = 4;
constexpr int kUnroll = 3;  // 576 16-bit values are 72 pieces of 16 bytes: one round of a warp

// A warp takes a token.
__global__ void __launch_bounds__(kWarps * 32) append_kernel(const AppendArgs a) {
  const int lane = threadIdx.x % 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (token >= a.tokens) return;
  const auto* x = reinterpret_cast<const uint4*>(a.x + token * a.x_stride);  // [width / 16]
  const int pieces = a.width / 16;

  // The first round is asked for together with the slot; it is the only one up to 1536 bytes.
  uint4 held[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (lane + i * 32 < pieces) held[i] = __ldg(x + lane + i * 32);
  }
  uint32_t block, offset;
  if (!a.slots.find(token, block, offset)) return;
  auto* row = reinterpret_cast<uint4*>(a.cache + block * a.stride_block + offset * a.stride_token);
  for (int base = lane; base < pieces; base += 32 * kUnroll) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (base + i * 32 < pieces) row[base + i * 32] = held[i];
    }
    const int next = base + 32 * kUnroll;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (next + i * 32 < pieces) held[i] = __ldg(x + next + i * 32);
    }
  }
}

}  // namespace

void launch_append(const AppendArgs& args, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((args.tokens + kWarps - 1) / kWarps);
  append_kernel<<<blocks, kWarps * 32, 0, stream>>>(args);
  FLASHMLA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace flashmla::sm90
