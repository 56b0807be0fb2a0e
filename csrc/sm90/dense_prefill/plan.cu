// Sorts the sequences of a call by their columns and counts their blocks: one block of threads, a
// counting sort. The order of sequences with about as many columns is left to chance; no result
// depends on it.
#include <cub/block/block_scan.cuh>

#include "../../common/cuda_check.h"
#include "plan.h"

namespace flashmla::sm90::dense_prefill {
namespace {

constexpr int kThreads = 1024;  // and buckets
constexpr int kBucketColumns = 128;

__global__ void __launch_bounds__(kThreads)
    work_plan_kernel(const Sequences sequences, int block_rows, const WorkPlan plan) {
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage scratch;
  __shared__ int place[kThreads];  // of the next sequence of a bucket

  const int thread = static_cast<int>(threadIdx.x);
  const int count = sequences.count();
  const auto bucket_of = [&](int i) {
    return kThreads - 1 - min(sequences.columns_of(i).length / kBucketColumns, kThreads - 1);
  };
  place[thread] = 0;
  if (thread == 0) *plan.next = 0;
  __syncthreads();
  for (int i = thread; i < count; i += kThreads) atomicAdd(&place[bucket_of(i)], 1);
  __syncthreads();
  int before;
  Scan(scratch).ExclusiveSum(place[thread], before);
  __syncthreads();
  place[thread] = before;
  __syncthreads();
  for (int i = thread; i < count; i += kThreads) plan.order[atomicAdd(&place[bucket_of(i)], 1)] = i;
  __syncthreads();

  int so_far = 0;
  if (thread == 0) plan.blocks[0] = 0;
  for (int first = 0; first < count; first += kThreads) {
    const int at = first + thread;
    int blocks = 0, sum, total;
    if (at < count) {
      blocks = (sequences.rows_of(plan.order[at]).length + block_rows - 1) / block_rows;
    }
    Scan(scratch).InclusiveSum(blocks, sum, total);
    __syncthreads();
    if (at < count) plan.blocks[at + 1] = so_far + sum;
    so_far += total;
  }
}

}  // namespace

void launch_work_plan(const Sequences& sequences, int block_rows, const WorkPlan& plan,
                      cudaStream_t stream) {
  work_plan_kernel<<<1, kThreads, 0, stream>>>(sequences, block_rows, plan);
  FLASHMLA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace flashmla::sm90::dense_prefill
