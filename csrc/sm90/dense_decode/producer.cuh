// Keeps the ring of tiles full.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "config.cuh"

namespace flashmla::sm90::dense_decode {

using Barrier = cutlass::arch::ClusterTransactionBarrier;  // mbarrier

// One thread walks the work list and has queries and tiles fetched by TMA, each half of a tile as
// soon as its owner has let go of what lay there before.
template <class T>
__device__ __forceinline__ void produce(const KernelParams& p, SharedStorage<T>& shared,
                                        const CUtensorMap& q_map, const CUtensorMap& k_map) {
  // What nobody else reads need not stay in L2.
  const auto hint = static_cast<uint64_t>(gridDim.x == 1 ? cute::TMA::CacheHintSm90::EVICT_FIRST
                                                         : cute::TMA::CacheHintSm90::EVICT_NORMAL);
  const int in_page = (1 << p.page_shift) - 1;
  const int copies = max(1, kTokens >> p.page_shift);  // that a tile takes, of a page or less
  int tile_count = 0;
  int item_count = 0;
  WorkList list(p);
  for (WorkItem item; list.next(item);) {
    if (item.tiles == 0) continue;
    // Block of token t: pages[t >> page_shift].
    const int* pages = p.block_table + item.request * p.block_table_stride;
    const int last_page = (item.seqlen - 1) >> p.page_shift;
    int page = pages[item.first_tile * kTokens >> p.page_shift];

    Barrier::wait(&shared.q_empty, (item_count & 1) ^ 1);
    Barrier::arrive_and_expect_tx(&shared.q_full, sizeof(shared.q));
    const int head_row = item.request * p.shape.h_kv + blockIdx.y;
    for (int i = 0; i < kPieces; ++i) {
      if (in_registers(i)) continue;
      cute::SM90_TMA_LOAD_3D::copy(&q_map, &shared.q_full,
                                   static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST),
                                   shared.q + shared_piece(i) * kPieceElements, i * kPieceCols,
                                   blockIdx.x * kRows, head_row);
    }
    // region: producer
    for (int j = 0; j < item.tiles; ++j, ++tile_count) {
      const int token = (item.first_tile + j) * kTokens;
      const int next_page = j + 1 < item.tiles ? pages[(token + kTokens) >> p.page_shift] : 0;
      auto fetch = [&](int piece, uint64_t* full, T* to) {
        Barrier::arrive_and_expect_tx(full, kPieceElements * sizeof(T));
        cute::SM90_TMA_LOAD_4D::copy(&k_map, full, hint, to, piece * kPieceCols, token & in_page,
                                     blockIdx.y, page);
        // Pages behind the last one are not looked up: the first stands in for them.
#pragma unroll 1
        for (int c = 1; c < copies; ++c) {
          const int at = (token >> p.page_shift) + c;
          cute::SM90_TMA_LOAD_4D::copy(&k_map, full, hint, to + (c << p.page_shift) * kPieceCols,
                                       piece * kPieceCols, 0, blockIdx.y,
                                       at <= last_page ? pages[at] : page);
        }
      };
      // First the half of the consumer that computes the scores.
      for (int k = 0; k < 2; ++k) {
        const int first = ((j & 1) ^ k) * kPiecesHalf;
        const HalfSlot at(2 * tile_count + k);
        Barrier::wait(&shared.half_empty[at.slot], at.parity ^ 1);
        for (int i = 0; i < kPiecesHalf; ++i) {
          fetch(first + i, &shared.half_full[at.slot][i],
                shared.half[at.slot] + i * kPieceElements);
        }
      }
      const int slot = tile_count & 1;
      Barrier::wait(&shared.rope_empty[slot], (tile_count >> 1 & 1) ^ 1);
      fetch(kRopePiece, &shared.rope_full[slot], shared.rope[slot]);

      if (p.tiles_ahead > 0 && j + p.tiles_ahead < item.tiles) {  // each row tile its share
        const int at = token + p.tiles_ahead * kTokens;
        const int ahead = pages[at >> p.page_shift];
        for (int i = blockIdx.x; i < kPieces; i += gridDim.x) {
          cute::SM90_TMA_LOAD_4D::PREFETCH::copy(&k_map, i * kPieceCols, at & in_page, blockIdx.y,
                                                 ahead);
        }
      }
      page = next_page;
    }
    // endregion: producer
    ++item_count;
  }
}

}  // namespace flashmla::sm90::dense_decode
