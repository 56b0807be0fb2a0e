// Merges the partial results of lists that were split, weighting each by its share of the softmax
// denominator, and applies the sink.
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include "../../common/cuda_check.h"
#include "epilogue.cuh"
#include "instances.h"

namespace flashmla::sm90::sparse_decode {
namespace {

// A block takes sixteen rows of a row tile (those of one consumer warp) and some of their columns.
// A thread takes one float4 of each partial result: two columns of row `lane / 4` and of the row
// eight below it.
constexpr int kThreads = 128;
constexpr int kRowsABlock = 16;
constexpr int kVectors = kRowsABlock * kHalfV / 4;  // float4 of a half of those rows
constexpr int kBlocksAWarp = kVectors / kThreads;
constexpr int kMostSplits = 256;

// grid: (query, row tile), times [2 halves][4 warps][8 blocks]
template <class T>
__global__ void __launch_bounds__(kThreads) combine_kernel(const Args a) {
  __shared__ float weight[kMostSplits][kRowsABlock];
  __shared__ float factor[kRowsABlock];
  const int tiles = row_tiles(a.h_q);
  const int block = blockIdx.x % kBlocksAWarp;
  int rest = blockIdx.x / kBlocksAWarp;
  const int warp = rest % 4;
  rest /= 4;
  const int half = rest % 2;
  rest /= 2;
  const int query = rest / tiles;
  const int tile = rest % tiles;
  const int first_head = tile * kRows + warp * kRowsABlock;
  if (first_head >= a.h_q) return;
  const int64_t first_item = static_cast<int64_t>(rest) * a.splits;

  // Sixteen rows times eight splits at a time; then each row's maximum and sum over all splits.
  const int row = threadIdx.x % kRowsABlock;
  for (int k = threadIdx.x / kRowsABlock; k < a.splits; k += kThreads / kRowsABlock) {
    weight[k][row] = a.lse_partial[(first_item + k) * kRows + warp * kRowsABlock + row];
  }
  __syncthreads();
  if (threadIdx.x < kRowsABlock) {
    float max = -INFINITY;
    for (int k = 0; k < a.splits; ++k) max = fmaxf(max, weight[k][row]);
    const float shift = max == -INFINITY ? 0.f : max;
    float sum = 0.f;
    for (int k = 0; k < a.splits; ++k) {
      const float w = exp2f(weight[k][row] - shift);
      weight[k][row] = w;
      sum += w;
    }
    const bool empty = sum == 0.f;
    const int head = first_head + row;
    const bool exists = head < a.h_q;
    const float lse2 = max + log2f(sum);
    const float share = exists && !empty ? sink_share(a.attn_sink, head, lse2) : 0.f;
    factor[row] = empty ? 0.f : share / sum;
    if (exists && half == 0 && block == 0) {
      const int b = query / a.s_q, s = query - b * a.s_q;
      a.lse[(static_cast<int64_t>(b) * a.h_q + head) * a.s_q + s] = empty ? INFINITY : lse2 * kLn2;
    }
  }
  __syncthreads();

  const int vector = block * kThreads + threadIdx.x;
  const int lane = threadIdx.x % 32;
  const auto* from = reinterpret_cast<const float4*>(a.out_partial) +
                     ((first_item * 2 + half) * 4 + warp) * kVectors + vector;
  const int64_t step = 8 * kVectors;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
  for (int k = 0; k < a.splits; ++k) {
    const float4 o = from[k * step];
    const float w0 = weight[k][lane / 4], w1 = weight[k][lane / 4 + 8];
    sum.x += w0 * o.x;
    sum.y += w0 * o.y;
    sum.z += w1 * o.z;
    sum.w += w1 * o.w;
  }
  // Columns as shared memory has them (config.cuh), turned back.
  const int n = vector / 32;
  const int piece = n / 8, chunk = n % 8;
  const int column = half * kHalfV + piece / 2 * 128 + chunk * 16 + piece % 2 * 8 + lane % 4 * 2;
  const float value[2][2] = {{sum.x, sum.y}, {sum.z, sum.w}};
  cutlass::NumericArrayConverter<T, float, 2> convert;
  for (int h = 0; h < 2; ++h) {
    const int r = lane / 4 + 8 * h;
    if (first_head + r >= a.h_q) continue;
    const auto pair = convert({value[h][0] * factor[r], value[h][1] * factor[r]});
    T* to = static_cast<T*>(a.out) + (static_cast<int64_t>(query) * a.h_q + first_head + r) * kDimV;
    *reinterpret_cast<uint32_t*>(to + column) = reinterpret_cast<const uint32_t&>(pair);
  }
}

template <class T>
void launch_as(const Args& a, cudaStream_t stream) {
  const int blocks = a.requests * row_tiles(a.h_q) * 2 * 4 * kBlocksAWarp;
  combine_kernel<T><<<blocks, kThreads, 0, stream>>>(a);
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
