// Which requests have partial results to be merged.
#pragma once

#include "schedule.h"

namespace flashmla::sm90 {

// What was split, as the plan has it: each such request shows there exactly once as the part that
// does its second split. In the order of the plan, so that all blocks number the rows alike.
struct SplitRequests {
  int request[kMaxParts];
  int count;

  // By one warp.
  __device__ void collect(const PlanRow* __restrict__ plan, int parts, int batch) {
    const int lane = threadIdx.x % 32;
    int found = 0;
    for (int first = 0; first < parts; first += 32) {
      const int p = first + lane;
      const PlanRow row = p < parts ? plan[p] : PlanRow{};
      const bool split =
          row.begin_split == 1 && row.begin_request >= 0 && row.begin_request < batch;
      const unsigned mask = __ballot_sync(0xffffffffu, split);
      if (split) request[found + __popc(mask & ((1u << lane) - 1))] = row.begin_request;
      found += __popc(mask);
    }
    if (lane == 0) count = found;
  }
};

}  // namespace flashmla::sm90
