// Merges the partial results of the requests that the plan split, weighting each by its share of
// the softmax denominator. Requests computed in one piece were written by the decode kernel, which
// also merges by itself (dense_decode/merge.cuh) unless the plan is batch-invariant or there are
// more blocks than run at the same time.
//
// In a batch-invariant plan the order of the sums follows from the number of partial results alone:
// up to kMostAlone one group adds them in their order, of more the k-th falls to group k % 4.
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>
#include <cutlass/numeric_conversion.h>

#include <algorithm>

#include "../common/cuda_check.h"
#include "../common/log_base.h"
#include "launch.h"
#include "partials.cuh"
#include "schedule.h"
#include "split_requests.cuh"

namespace flashmla::sm90 {
namespace {

constexpr int kDimV = 512;
constexpr int kLanes = kDimV / 4;  // threads a row, four columns each
constexpr int kGroups = 4;         // groups of so many threads in a block
constexpr int kThreads = kLanes * kGroups;
constexpr int kBlocks = 528;   // four a SM of an H100, which fills it
constexpr int kMostAlone = 8;  // partial results with chunks that one group adds up

// A weighted sum of partial rows: this thread's four columns, and the sum of the weights.
struct Weighted {
  float4 sum;
  float weights;

  __device__ __forceinline__ void add(float factor, const float4& o, float weight) {
    sum.x += factor * o.x;
    sum.y += factor * o.y;
    sum.z += factor * o.z;
    sum.w += factor * o.w;
    weights += weight;
  }
};

template <class T>
__device__ __forceinline__ void store_row(const DecodeShape& shape, int request, int at_row,
                                          int lane, const Weighted& w, float max,
                                          const float* __restrict__ attn_sink, T* __restrict__ out,
                                          float* __restrict__ lse) {
  const int row = at_row % shape.rows();
  const int head = at_row / shape.rows() * shape.group() + row % shape.group();
  const int s = row / shape.group();
  const int64_t query = static_cast<int64_t>(request) * shape.s_q + s;
  const bool empty = w.weights == 0.f;  // a row with nothing to attend to gives 0
  const float sink = attn_sink == nullptr ? -INFINITY : attn_sink[head] * kLog2E;
  const float inverse = empty ? 0.f : 1.f / (w.weights + exp2f(sink - max));
  cutlass::NumericArrayConverter<T, float, 4> convert;
  const auto packed =
      convert({w.sum.x * inverse, w.sum.y * inverse, w.sum.z * inverse, w.sum.w * inverse});
  T* to = out + (query * shape.h_q + head) * kDimV + lane * 4;
  *reinterpret_cast<uint2*>(to) = reinterpret_cast<const uint2&>(packed);
  if (lane == 0) {
    const int64_t at = (static_cast<int64_t>(request) * shape.h_q + head) * shape.s_q + s;
    lse[at] = empty ? INFINITY : (max + log2f(w.weights)) * kLn2;
  }
}

// A persistent grid over the rows of the split requests; with chunks, which the plan's rows do not
// tell, over those of all requests. Where there are many rows, each group of 128 threads takes one;
// where there are few, the groups of a block share out the splits of one. With chunks that choice
// may not look at the batch, and so follows from the splits.
template <class T, bool kChunked>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const DecodeShape shape, const PlanRow* __restrict__ plan,
                   const int* __restrict__ num_splits, const float* __restrict__ attn_sink,
                   const Partials partials, T* __restrict__ out, float* __restrict__ lse) {
  __shared__ SplitRequests todo;
  __shared__ Weighted shared[kGroups][kLanes];
  if (!kChunked && threadIdx.x < 32) todo.collect(plan, shape.parts, shape.batch);
  __syncthreads();

  const int group = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int rows = shape.h_kv * shape.rows();
  const int requests = kChunked ? shape.batch : todo.count;
  const bool few = static_cast<int64_t>(requests) * rows <= gridDim.x / 2;
  const int rows_a_unit = few ? 1 : kGroups;
  const int units_a_request = (rows + rows_a_unit - 1) / rows_a_unit;
  const int64_t units = static_cast<int64_t>(requests) * units_a_request;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int nth = static_cast<int>(unit / units_a_request);
    const int request = kChunked ? nth : todo.request[nth];
    const int first = max(0, num_splits[request]);
    const int splits = min(num_splits[request + 1], partials.slots) - first;
    if (kChunked && splits <= 1) continue;
    // The groups of a block take a row each, or all of them one row after the other.
    const bool share = kChunked ? splits > kMostAlone : few;
    const int first_row = static_cast<int>(unit % units_a_request) * rows_a_unit;
    const int last_row = min(rows, first_row + rows_a_unit);
    for (int at_row = first_row + (share ? 0 : group); at_row < last_row;
         at_row += share ? 1 : kGroups) {
      // region: combine
      const int64_t base = static_cast<int64_t>(first) * rows + at_row;
      const PartialRow* part_row = partials.rows + base;  // [splits], strided
      const uint2* part_out =                             // [splits, 512 / 4], strided
          static_cast<const uint2*>(partials.out) + base * kLanes + lane;
      float max = -INFINITY;
      for (int k = threadIdx.x % 32; k < splits; k += 32) {
        max = fmaxf(max, part_row[static_cast<int64_t>(k) * rows].lse2);
      }
      for (int d = 16; d > 0; d /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, d));
      const float shift = max == -INFINITY ? 0.f : max;

      Weighted total{make_float4(0.f, 0.f, 0.f, 0.f), 0.f};
#pragma unroll 8
      for (int k = share ? group : 0; k < splits; k += share ? kGroups : 1) {
        const int64_t at = static_cast<int64_t>(k) * rows;
        const PartialRow state = read(part_row + at);
        float o[4];
        unpack(part_out[at * kLanes], o);
        const float weight = exp2f(state.lse2 - shift);
        const float unit = lane < kLanes / 2 ? state.unit[0] : state.unit[1];
        total.add(weight * unit, make_float4(o[0], o[1], o[2], o[3]), weight);
      }
      if (share) {
        shared[group][lane] = total;
        __syncthreads();
        for (int g = 1; g < kGroups; ++g) {  // group 0 gathers in a fixed order
          total.add(1.f, shared[g][lane].sum, shared[g][lane].weights);
        }
        __syncthreads();
      }
      if (!share || group == 0) {
        store_row(shape, request, at_row, lane, total, max, attn_sink, out, lse);
      }
      // endregion: combine
    }
  }
}

template <class T>
void launch(const CombineArgs& a, cudaStream_t stream) {
  const bool chunked = a.plan_stride > 1;
  const int64_t requests = chunked ? a.shape.batch : a.shape.parts;
  const int64_t most = requests * a.shape.h_kv * a.shape.rows();
  const auto kernel = chunked ? &combine_kernel<T, true> : &combine_kernel<T, false>;
  kernel<<<std::min<int64_t>(most, kBlocks), kThreads, 0, stream>>>(
      a.shape, reinterpret_cast<const PlanRow*>(a.plan), a.num_splits, a.attn_sink, a.partials,
      static_cast<T*>(a.out), a.lse);
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
