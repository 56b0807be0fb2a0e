// The warpgroup that fetches: tiles of 64 tokens, as they are in the cache, into a ring.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/arch/copy_sm90_tma.hpp>

#include "few_rows_config.cuh"
#include "produce.cuh"

namespace flashmla::sm90::sparse_decode::few_rows {

// Whether a tile's tokens lie side by side, so that one copy brings them all.
template <class Source>
__device__ __forceinline__ bool contiguous(const KernelParams& p) {
  return Source::kPaged && p.page.divisor % kTokens == 0;
}

// What the barrier of a full slot counts beside bytes.
template <class Source>
__device__ __forceinline__ int arrivals_of_full(const KernelParams& p) {
  return contiguous<Source>(p) ? 1 : 128 + kWarps;
}

// By one warp; the places of tokens behind the last keep what they held (clear_missing).
template <class Source, class Shared>
__device__ __forceinline__ void fetch_tiles(const KernelParams& p, Shared& shared) {
  const int lane = threadIdx.x % 32;
  typename Source::Cursor cursor[2] = {typename Source::Cursor(p), typename Source::Cursor(p)};
  typename Source::Found found[2];
  int step;
  const auto advance = [&] {
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      step = cursor[i].advance(i * 32 + lane);
      found[i] = step == kEnd ? Source::kNothing : cursor[i].index();
    }
  };
  advance();
  for (int count = 0; step != kEnd; ++count) {
    const int slot = count % Shared::kSlots;
    uint32_t offset[2], exists[2];
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      offset[i] = Source::template offset<kTokenBytes>(p, found[i]);
      exists[i] = __ballot_sync(0xffffffffu, offset[i] != kNowhere);
    }
    advance();
    if (lane != 0) continue;
    Barrier::wait(&shared.empty[slot], (count / Shared::kSlots & 1) ^ 1);
    const int bytes = (__popc(exists[0]) + __popc(exists[1])) * kTokenBytes;
    shared.info[slot] = {{exists[0], exists[1]}, count, 0};
    Barrier::arrive_and_expect_tx(&shared.full[slot], bytes);
    if (bytes > 0) {
      cute::SM90_BULK_COPY_G2S::copy(token_address(p, offset[0]), &shared.full[slot],
                                     shared.tiles[slot], bytes);
    }
  }
}

// By four warps, sixteen tokens each; what does not exist becomes zeros. Nobody waits for a copy:
// it reports to the barrier by itself.
template <class Source, class Shared>
__device__ __forceinline__ void gather(const KernelParams& p, Shared& shared) {
  constexpr int kChunks = kTokenBytes / 16;
  constexpr int kCopies = kTokensAWarp * kChunks;  // of a warp
  const int warp = threadIdx.x / 32 % kWarps, lane = threadIdx.x % 32;
  const int listed = warp * kTokensAWarp + lane % kTokensAWarp;
  typename Source::Cursor cursor(p);
  int step = cursor.advance(listed);
  typename Source::Found found = step == kEnd ? Source::kNothing : cursor.index();
  for (int count = 0; step != kEnd; ++count) {
    const int slot = count % Shared::kSlots;
    const uint32_t of_lane = Source::template offset<kTokenBytes>(p, found);
    step = cursor.advance(listed);
    found = step == kEnd ? Source::kNothing : cursor.index();
    const unsigned exists = __ballot_sync(0xffffffffu, of_lane != kNowhere);
    Barrier::wait(&shared.empty[slot], (count / Shared::kSlots & 1) ^ 1);
    uint8_t* const to = shared.tiles[slot] + warp * kTokensAWarp * kTokenBytes + lane * 16;
#pragma unroll 7
    for (int n = 0; n < kCopies; n += 32) {
      const int token = (n + lane) / kChunks, chunk = (n + lane) % kChunks;
      const uint32_t offset = __shfl_sync(0xffffffffu, of_lane, token);
      const bool found_there = offset != kNowhere;
      if (n + lane < kCopies) {
        cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(
            to + n * 16, token_address(p, found_there ? offset : 0) + chunk * 16, found_there);
      }
    }
    if (lane == 0) {
      reinterpret_cast<uint16_t*>(shared.info[slot].exists)[warp] = static_cast<uint16_t>(exists);
      if (warp == 0) shared.info[slot].number = count;
      Barrier::arrive(&shared.full[slot]);
    }
    cutlass::arch::cpasync_barrier_arrive_noinc(&shared.full[slot]);
  }
  cutlass::arch::cp_async_wait<0>();
}

template <class Source, class Shared>
__device__ __forceinline__ void fetch(const KernelParams& p, Shared& shared) {
  if (!contiguous<Source>(p)) {
    gather<Source>(p, shared);
  } else if (threadIdx.x / 32 % kWarps == 0) {
    fetch_tiles<Source>(p, shared);
  }
}

}  // namespace flashmla::sm90::sparse_decode::few_rows
