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
  int half_count = 0;
  WorkList list(p);
  bool more = true;
  for (int item_count = 0; more; ++item_count) {
    WorkItem item;
    more = list.next(item);
    const bool idle = !more || item.tiles == 0;
    // Block of token t: pages[t >> page_shift].
    const int* pages = p.block_table + (idle ? 0 : item.request * p.block_table_stride);
    const int last_page = (item.seqlen - 1) >> p.page_shift;
    int page = idle ? 0 : pages[item.first_tile * kTokens >> p.page_shift];

    // The consumers are told of every item, of the end as well. Both are done with the item before
    // the last one when they have let go of the last one's Q.
    Barrier::wait(&shared.q_empty, (item_count & 1) ^ 1);
    if (!more) item.request = -1;
    shared.items[item_count & 1] = item;
    if (idle) {
      Barrier::arrive(&shared.q_full);
      continue;
    }
    Barrier::arrive_and_expect_tx(&shared.q_full, sizeof(shared.q));
    const int head_row = item.request * p.shape.h_kv + blockIdx.y;
    const auto fetch_queries = [&](int piece, uint64_t* full, T* to) {
      cute::SM90_TMA_LOAD_3D::copy(&q_map, full,
                                   static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST), to,
                                   piece * kPieceCols, blockIdx.x * kRows, head_row);
    };
    for (int i = 0; i < kPieces; ++i) {
      if (in_registers(i)) continue;
      fetch_queries(i, &shared.q_full, shared.q + shared_piece(i) * kPieceElements);
    }
    const HalfSlot passing(half_count++);
    Barrier::wait(&shared.half_empty[passing.slot], passing.parity ^ 1);
    uint64_t* full = shared.half_full[passing.slot];
    Barrier::arrive_and_expect_tx(&full[0], kRegisterPieces * kPieceElements * sizeof(T));
    for (int i = 0; i < kPieces; ++i) {
      if (!in_registers(i)) continue;
      fetch_queries(i, &full[0], shared.half[passing.slot] + register_piece(i) * kPieceElements);
    }
    for (int i = 1; i < kPiecesHalf; ++i) Barrier::arrive(&full[i]);  // every phase counts
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
        const HalfSlot at(half_count++);
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
  }
}

}  // namespace flashmla::sm90::dense_decode
