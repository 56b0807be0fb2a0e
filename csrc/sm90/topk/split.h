// Top-k of few rows: a cluster of CTAs for each.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"

namespace flashmla::sm90::topk {

// How many CTAs should share a row; 1: none.
int cluster_size(const TopkArgs& args, int sms);

void launch_split(const TopkArgs& args, int ranks, cudaStream_t stream);

}  // namespace flashmla::sm90::topk
