// What both kernels of the indexer are built from: three warpgroups and mbarriers.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include <climits>

#include "score.cuh"

namespace flashmla::sm90::indexer {

using Barrier = cutlass::arch::ClusterTransactionBarrier;  // mbarrier

constexpr int kThreads = 384;  // a warpgroup that fetches, two that multiply

}  // namespace flashmla::sm90::indexer
