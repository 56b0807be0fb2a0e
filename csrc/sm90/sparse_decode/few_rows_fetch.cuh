// The warp that fetches: tiles of 64 tokens, as they are in the cache, into a ring.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "few_rows_config.cuh"
#include "produce.cuh"

namespace flashmla::sm90::sparse_decode::few_rows {

template <class Source, int kN>
__device__ __forceinline__ void fetch(const KernelParams& p, SharedStorage<kN>& shared) {
  constexpr int kSlots = Config<kN>::kSlots;
  const int lane = threadIdx.x % 32;
  // Where a tile's tokens lie side by side, one copy brings them all.
  const bool contiguous = Source::kPaged && p.page.divisor % kTokens == 0;
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
    const int slot = count % kSlots;
    uint32_t offset[2], exists[2];
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      offset[i] = Source::template offset<kTokenBytes>(p, found[i]);
      exists[i] = __ballot_sync(0xffffffffu, offset[i] != kNowhere);
    }
    advance();
    Barrier::wait(&shared.empty[slot], (count / kSlots & 1) ^ 1);
    const int bytes = (__popc(exists[0]) + __popc(exists[1])) * kTokenBytes;
    if (lane == 0) {
      shared.info[slot] = {{exists[0], exists[1]}, count, 0};
      Barrier::arrive_and_expect_tx(&shared.full[slot], bytes);
    }
    __syncwarp();
    uint8_t* to = shared.tiles[slot];
    if (contiguous) {  // those that exist are the first ones
      if (lane == 0 && bytes > 0) {
        cute::SM90_BULK_COPY_G2S::copy(token_address(p, offset[0]), &shared.full[slot], to, bytes);
      }
      continue;
    }
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (offset[i] == kNowhere) continue;
      cute::SM90_BULK_COPY_G2S::copy(token_address(p, offset[i]), &shared.full[slot],
                                     to + (i * 32 + lane) * kTokenBytes, kTokenBytes);
    }
  }
}

}  // namespace flashmla::sm90::sparse_decode::few_rows
