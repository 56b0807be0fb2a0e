// Sparse MLA prefill for 1 to 32 heads, sm_90a: out = softmax(q Kᵀ · scale) V over the tokens
// that each query's indices name, where V is the first 512 columns of K.
//
// wgmma has 64 rows whatever they are used for. So the operands change places: in Sᵀ = K Qᵀ the
// rows are tokens, in Oᵀ = Vᵀ Pᵀ output columns; heads are the columns, of which 8 will do.
//
// One CTA computes one query after another. A producer warpgroup gathers the chosen tokens into
// tiles of 64 (gather.cuh). Two consumers take every other tile each, from scores to output, on
// their own: all of Oᵀ, [512, heads], is 128 registers a thread at most. What they have is merged
// at the query's end. NOTES.md tells what bounds this.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "../../../common/registers.cuh"
#include "../../../common/vote.cuh"
#include "epilogue.cuh"
#include "gather.cuh"
#include "softmax.cuh"

namespace flashmla::sm90::sparse_prefill::few_heads {

template <class T, int kHeads>
struct Consumer {
  using Slot = GroupSlot<kHeads>;
  using Softmax = OnlineSoftmax<kHeads>;

  const KernelParams& p;
  SharedStorage<T, kHeads>& shared;
  const CUtensorMap& q_map;
  const CUtensorMap& out_map;
  const int consumer;  // 0 or 1
  const int thread = threadIdx.x % 128;
  const uint32_t barrier = kConsumer0 + consumer;  // of this consumer's warps
  int tile_count = 0;
  int item_count = 0;

  typename Tiles<T, kHeads>::Scores scores_mma;
  typename Tiles<T, kHeads>::Output output_mma;

  __device__ __forceinline__ void release(int slot) {
    if (thread % 32 == 0) Barrier::arrive(&shared.empty[slot]);
  }

  // All pieces of Q, by one thread: [heads, 64] each, zeros behind the last head and column.
  __device__ __forceinline__ void fetch_queries(int query) const {
    Barrier::arrive_and_expect_tx(&shared.q_full, sizeof(shared.q));
    for (int i = 0; i < kPieces; ++i) {
      cute::SM90_TMA_LOAD_3D::copy(&q_map, &shared.q_full,
                                   static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST),
                                   shared.q[i], i * kPieceCols, 0, query);
    }
  }
  __device__ __forceinline__ void prefetch_queries(int query) const {
    for (int i = 0; i < kPieces; ++i) {
      cute::SM90_TMA_LOAD_3D::PREFETCH::copy(&q_map, i * kPieceCols, 0, query);
    }
  }

  // Sᵀ[64 tokens, heads] = K Qᵀ. 36 wgmma, four for each piece, as they arrive.
  template <class Scores>
  __device__ __forceinline__ void compute_scores(int tile, Scores& s) {
    auto thread_mma = scores_mma.get_thread_slice(thread);
    scores_mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
    fence_fragment(s);
    CUTE_UNROLL
    for (int g = 0; g < kTileGroups; ++g) {
      const Slot at(tile * kTileGroups + g);
      // The producer's copies are ordinary writes as far as memory order goes, and wgmma reads
      // through another door: besides the barrier it takes a fence between the two.
      Barrier::wait(&shared.full[at.slot], at.parity);
      cutlass::arch::fence_view_async_shared();
      cute::warpgroup_arrive();
      CUTE_UNROLL
      for (int i = 0; i < kGroupPieces; ++i) {
        auto k = cute::make_tensor(cute::make_smem_ptr(shared.ring[at.slot][i]),
                                   typename Tiles<T, kHeads>::Keys{});  // [64 tokens, 64]
        auto q = cute::make_tensor(cute::make_smem_ptr(shared.q[piece_at(g * kGroupPieces + i)]),
                                   typename Tiles<T, kHeads>::Heads{});  // [heads, 64]
        gemm_k_loop(scores_mma, thread_mma.partition_fragment_A(k),
                    thread_mma.partition_fragment_B(q), s);
      }
    }
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    fence_fragment(s);
  }

  // Oᵀ[512, heads] += Vᵀ Pᵀ. 32 wgmma, four for each block of 64 columns. Groups are given
  // back when they have been read, except those that are kept for the end of the item.
  template <class Output>
  __device__ __forceinline__ void add_output(int tile, bool keep, const T* probabilities,
                                             Output& o) {
    auto thread_mma = output_mma.get_thread_slice(thread);
    auto pr = cute::make_tensor(cute::make_smem_ptr(probabilities),
                                typename Tiles<T, kHeads>::Heads{});  // [heads, 64 tokens]
    fence_fragment(o);
    cute::warpgroup_arrive();
    CUTE_UNROLL
    for (int place = 1; place < kPieces; ++place) {
      const Slot at(tile * kTileGroups + place / kGroupPieces);
      auto v = cute::make_tensor(cute::make_smem_ptr(shared.ring[at.slot][place % kGroupPieces]),
                                 typename Tiles<T, kHeads>::Values{});  // [64 columns, 64 tokens]
      auto block = o(cute::_, cute::_, cute::_, piece_at(place));
      gemm_k_loop(output_mma, thread_mma.partition_fragment_A(v),
                  thread_mma.partition_fragment_B(pr), block);
      if (place % kGroupPieces == kGroupPieces - 1) cute::warpgroup_commit_batch();
    }
    const auto give_back = [&](int g) {
      if (g < Held<T, kHeads>::kFirst || !keep) release(Slot(tile * kTileGroups + g).slot);
    };
    cute::warpgroup_wait<2>();
    give_back(0);
    cute::warpgroup_wait<1>();
    give_back(1);
    cute::warpgroup_wait<0>();
    give_back(2);
    fence_fragment(o);
  }

  template <class Output>
  __device__ __forceinline__ void run_tile(int tile, bool keep, Softmax& softmax, Output& o) {
    using namespace cute;
    auto s = partition_fragment_C(scores_mma, Shape<Int<kTokens>, Int<kHeads>>{});
    auto pr = make_fragment_like(s);
    compute_scores(tile, s);
    const auto valid = *reinterpret_cast<const uint64_t*>(shared.valid[tile % kValidSlots]);
    if (valid != ~uint64_t{0}) Softmax::mask(s, valid);

    // The probabilities are published on the assumption that the maximum still serves. The barrier
    // that says that they are there also says whether it does.
    T* to = shared.p[tile & 1][tile >> 1 & 1];
    bool grown = softmax.exponentiate(s, p.scale_log2, pr);
    store_transposed<T, kHeads>(to, pr);
    cutlass::arch::fence_view_async_shared();
    grown = sync_or(kBarriersOfCutlass + barrier, 128, grown);
    if (grown) {
      Softmax::leave_tops(s, shared.tile_top[consumer][thread / 32]);
      cutlass::arch::NamedBarrier::sync(128, barrier);
      const auto alpha = softmax.raise(shared.tile_top[consumer], p.scale_log2);
      CUTE_UNROLL
      for (int b = 0; b < kBlocks; ++b) scale_block(o(_, 0, 0, b), alpha);
      softmax.exponentiate(s, p.scale_log2, pr);
      store_transposed<T, kHeads>(to, pr);
      cutlass::arch::fence_view_async_shared();
      cutlass::arch::NamedBarrier::sync(128, barrier);
    }
    softmax.add(s, pr);
    add_output(tile, keep, to, o);
  }

  // One block, [64 columns, heads], by a factor for each head.
  template <class Block>
  __device__ __forceinline__ static void scale_block(Block&& block, const Columns<kHeads>& by) {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(block); ++i) block(i) *= by.v[Columns<kHeads>::column(i)];
  }

  // This consumer's part of what is known of the heads.
  __device__ __forceinline__ void leave_state(const Softmax& softmax, HeadState<kHeads>& state) {
    CUTE_UNROLL
    for (int c = 0; c < Softmax::kCount; ++c) {
      const int head = Columns<kHeads>::head(c);
      const float sum = reduce_rows(softmax.sum.v[c], [](float a, float b) { return a + b; });
      const float top = reduce_rows(softmax.top.v[c], [](float a, float b) { return fmaxf(a, b); });
      if (thread % 32 < 4) {
        state.sum[thread / 32][head] = sum;
        state.top[thread / 32][head] = top;
        if (thread < 32) state.shift[head] = softmax.shift.v[c];
      }
    }
  }

  // Consumer k finishes half k of the columns: the other half goes to the other consumer.
  template <int kMine, class Output>
  __device__ __forceinline__ void exchange(int query, const Held<T, kHeads>& mine,
                                           const Held<T, kHeads>& other, Output& o) {
    constexpr int kFirst = kMine * kBlocks / 2, kOthers = kBlocks / 2 - kFirst;
    send_blocks<kOthers>(mine, o);
    cutlass::arch::NamedBarrier::sync(kConsumerThreads, kConsumers);
    receive_blocks<kFirst>(other, o);
    cutlass::arch::NamedBarrier::sync(128, barrier);  // all have read what is now written over
    store_blocks<kFirst, kBlocks / 2>(other, o, out_map, query, barrier);
  }

  __device__ __forceinline__ void run_item(int number) {
    using namespace cute;
    const WorkItem item(p, number);
    const int n = item.tiles();
    const int next = number + gridDim.x;
    // Oᵀ, eight blocks of [64 columns, heads]
    auto o =
        make_tensor<float>(Layout<Shape<Shape<_2, _2, Int<kHeads / 8>>, _1, _1, Int<kBlocks>>>{});
    clear(o);
    output_mma.accumulate_ = GMMA::ScaleOut::One;
    Softmax softmax;
    softmax.clear();
    const int item_parity = item_count++ & 1;
    Barrier::wait(&shared.q_full, item_parity);
    const bool chosen = consumer == 0 && thread == 0;
    if (chosen && next < p.items) prefetch_queries(next);

    // Tiles alternate over all items, so that lists of an odd number of tiles do no harm.
    const int first = (tile_count + consumer) & 1;  // of mine
    CUTE_NO_UNROLL
    for (int j = first; j < n; j += 2) run_tile(uniform(tile_count + j), j + 2 >= n, softmax, o);

    leave_state(softmax, shared.state[item_parity][consumer]);
    cutlass::arch::NamedBarrier::sync(kConsumerThreads, kConsumers);
    if (chosen && next < p.items) fetch_queries(next);  // nobody reads this item's any more
    const Totals<kHeads> totals(p, shared.state[item_parity], consumer);
    if (consumer == 0 && thread < 4) totals.store(p, item.query);
    if (n == 0) {
      store_nothing<T>(p, item.query, consumer * 128 + thread);
    } else if (first < n) {  // else all was the other's
      CUTE_UNROLL
      for (int b = 0; b < kBlocks; ++b) scale_block(o(_, 0, 0, b), totals.factor);
      // The last tile that is mine, and the other's.
      const int last = n - 1 - ((n - 1 - first) & 1), others = n - 1 - ((n - first) & 1);
      const Held<T, kHeads> mine{shared, tile_count + last}, other{shared, tile_count + others};
      if (n == 1) {
        store_blocks<0, kBlocks>(mine, o, out_map, item.query, barrier);
      } else if (consumer == 0) {
        exchange<0>(item.query, mine, other, o);
      } else {
        exchange<1>(item.query, mine, other, o);
      }
    }
    tile_count += n;
  }

  __device__ __forceinline__ void run() {
    if (consumer == 0 && thread == 0) fetch_queries(blockIdx.x);
    CUTE_NO_UNROLL
    for (int number = blockIdx.x; number < p.items; number += gridDim.x) run_item(number);
  }
};

template <class T, int kHeads>
__global__ void __launch_bounds__(kThreads, 1)
    few_heads_kernel(const __grid_constant__ KernelParams p,
                     const __grid_constant__ CUtensorMap q_map,
                     const __grid_constant__ CUtensorMap out_map) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<SharedStorage<T, kHeads>*>(raw);
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(&q_map);
    cute::prefetch_tma_descriptor(&out_map);
    Barrier::init(&shared.q_full, 1);
    for (int s = 0; s < kRing<kHeads>; ++s) {
      Barrier::init(&shared.full[s], kProducerThreads + kWarps);
      Barrier::init(&shared.empty[s], kWarps);  // of the consumer that is done with it
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  if (threadIdx.x < kProducerThreads) {
    cutlass::arch::warpgroup_reg_dealloc<kRegistersProducer>();
    Gatherer<T, kHeads>{p, shared}.run();
  } else {
    cutlass::arch::warpgroup_reg_alloc<kRegistersConsumer>();
    const int consumer = uniform((threadIdx.x - kProducerThreads) / 128);
    Consumer<T, kHeads>{p, shared, q_map, out_map, consumer}.run();
  }
}

}  // namespace flashmla::sm90::sparse_prefill::few_heads
