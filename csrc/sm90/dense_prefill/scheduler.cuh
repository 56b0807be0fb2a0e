// Who computes which block: one thread of each CTA draws numbers from a common counter, turns them
// into blocks and leaves those in shared memory for the CTA's other warps. It draws late, when keys
// and values of the block before have been asked for but for a few tiles: what is drawn early waits
// behind a long block, and is computed when its head's keys have left L2.
#pragma once

#include "config.cuh"
#include "order.cuh"

namespace flashmla::sm90::dense_prefill {

// Keys and values that are worked on at a time: less than half of L2, each half of which keeps its
// own copy of what its SMs read.
constexpr int64_t kSetBytes = int64_t{20} << 20;

// The blocks of a head are counted from the sequence's end: causal, the last queries see the most
// keys, and the block that is not full is then the lightest one.
template <int kDimQk>
__device__ __forceinline__ Work find_work(const KernelParams& p, int64_t number) {
  const HeadSets sets{(kDimQk + kDimV) * 2, kSetBytes};
  const Block block = find_block(p.sequences, p.plan, number, p.h_q, p.group, sets);
  Work work;
  work.head = block.head;
  if (block.head < 0) return work;
  const Span queries = p.sequences.rows_of(block.sequence);
  const Span keys = p.sequences.columns_of(block.sequence);
  work.row = queries.length - (block.rank + 1) * kBlockRows;
  work.first_query = queries.first;
  work.queries = queries.length;
  work.first_key = keys.first;
  work.keys = keys.length;
  return work;
}

template <class T, int kDimQk>
__device__ __forceinline__ void schedule(const KernelParams& p, SharedStorage<T, kDimQk>& shared) {
  RingPlace<kBlocksAhead> at;
  uint32_t parity = 0;
  for (int64_t number = blockIdx.x;;) {
    const Work work = find_work<kDimQk>(p, number);
    Barrier::wait(&shared.work_empty[at.slot], at.parity ^ 1);
    shared.work[at.slot] = work;
    Barrier::arrive(&shared.work_full[at.slot]);
    at.advance();
    if (work.head < 0) return;
    Barrier::wait(&shared.work_wanted, parity);
    parity ^= 1;
    number = gridDim.x + static_cast<int64_t>(atomicAdd(p.plan.next, 1));
  }
}

// The other warps' view: the same blocks in the same order.
template <class T, int kDimQk>
class WorkQueue {
 public:
  __device__ __forceinline__ explicit WorkQueue(SharedStorage<T, kDimQk>& shared)
      : shared_(shared) {}

  // The next block; it stays where it is until `pop`.
  __device__ __forceinline__ const Work& front() const {
    Barrier::wait(&shared_.work_full[at_.slot], at_.parity);
    return shared_.work[at_.slot];
  }
  // Called by every lane that called `front`; one lane of a warp `releases` the place.
  __device__ __forceinline__ void pop(bool releases) {
    __syncwarp(__activemask());
    if (releases) Barrier::arrive(&shared_.work_empty[at_.slot]);
    at_.advance();
  }

 private:
  SharedStorage<T, kDimQk>& shared_;
  RingPlace<kBlocksAhead> at_;
};

}  // namespace flashmla::sm90::dense_prefill
