// Dense MLA decode for sm_90a: out = softmax(q Kᵀ · scale) V over a paged cache, where V is the
// first 512 columns of K.
//
// One CTA computes 64 query rows against stretches of the cache that the plan gives it. Its three
// warpgroups: a producer that fetches tiles by TMA through the block table, and two consumers. The
// 64 x 512 float32 output fills half the register file, so each consumer owns 256 of its columns.
// The consumers take turns: the owner of tile j computes scores and softmax and publishes the
// probabilities P_j; then both multiply P_j with their half of V_j. While one is busy with
// exponentials the other keeps the tensor cores running. NOTES.md tells how this came about.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/copy_sm90.hpp>

#include "../../common/registers.cuh"
#include "config.cuh"
#include "epilogue.cuh"
#include "merge.cuh"
#include "producer.cuh"
#include "softmax.cuh"

namespace flashmla::sm90::dense_decode {

// What one thread needs to know of the stretch it works on.
struct Item {
  int tiles;
  int seqlen;
  int begin;         // first token
  int lowest_limit;  // of the CTA's rows: tiles that end below it need no mask
  int limit[2];      // of this thread's two rows

  __device__ __forceinline__ Item(const KernelParams& p, const WorkItem& work, int row)
      : tiles(work.tiles), seqlen(work.seqlen), begin(work.first_tile * kTokens) {
    const int first_row = blockIdx.x * kRows;
    lowest_limit = key_limit(p, seqlen, p.group.div(first_row));
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      limit[h] = key_limit(p, seqlen, p.group.div(first_row + row + 8 * h));
    }
  }
  __device__ __forceinline__ int first_token(int j) const { return begin + j * kTokens; }
  __device__ __forceinline__ int valid_tokens(int j) const { return seqlen - first_token(j); }
  __device__ __forceinline__ bool has_tail(int j) const { return valid_tokens(j) < kTokens; }
  __device__ __forceinline__ bool needs_mask(int j) const {
    return first_token(j) + kTokens > lowest_limit;
  }
};

// One of the two consumer warpgroups. Both run the same instructions, so that the caches which
// these come through hold them once.
template <class T>
struct Consumer {
  const KernelParams& p;
  SharedStorage<T>& shared;
  const int mine;  // 0 or 1: the parity of the tiles whose scores it computes, and its half of V
  const int thread = threadIdx.x % 128;
  const int row = thread / 32 * 16 + thread % 32 / 4;  // and row + 8
  int tile_count = 0;
  int half_count = 0;  // halves that the ring has held before tile 0 of this item

  typename Tiles<T>::Scores scores_mma;
  typename Tiles<T>::ScoresFromRegisters scores_mma_rs;
  typename Tiles<T>::OutputFromRegisters output_mma_rs;
  typename Tiles<T>::OutputFromShared output_mma_ss;

  __device__ __forceinline__ void release(uint64_t* barrier) {
    if (thread % 32 == 0) Barrier::arrive(barrier);
  }
  // The halves of tile j: of the consumer that computes its scores, and of the other.
  __device__ __forceinline__ HalfSlot owners_half(int j) const {
    return HalfSlot(half_count + j * 2);
  }
  __device__ __forceinline__ HalfSlot others_half(int j) const {
    return HalfSlot(half_count + j * 2 + 1);
  }
  __device__ __forceinline__ int rope_slot(int j) const { return (tile_count + j) & 1; }
  __device__ __forceinline__ T* p_tile(int j) const { return shared.rope[rope_slot(j)]; }

  // Three pieces of q [64 rows, 576] as operands from registers, in the order in which they are
  // needed. They come through the ring.
  template <class Queries>
  __device__ __forceinline__ void load_queries(Queries& q) {
    const HalfSlot at(half_count++);
    Barrier::wait(&shared.half_full[at.slot][0], at.parity);
    const int lane = thread % 32;
    const int matrix_row = thread / 32 * 16 + lane % 16;
    CUTE_UNROLL
    for (int i = 0; i < kRegisterPieces * kPieceCols / 16; ++i) {  // 16 columns
      const int chunk = (i % 4 * 2 + lane / 16) ^ (matrix_row % 8);
      const int nth = i / 4 < 2 ? i / 4 ^ mine : i / 4;
      const T* from = shared.half[at.slot] + nth * kPieceElements + matrix_row * kPieceCols;
      auto* to = reinterpret_cast<uint32_t*>(&q(i * 8));
      cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(from + chunk * 8),
                                    to[0], to[1], to[2], to[3]);
    }
    // TMA overwrites what was read here. The loads may still queue behind the stores of the item
    // before, for longer than a tile takes to arrive; a barrier between warps does not wait for
    // them.
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(kConsumerThreads, kBothConsumers);
    if (mine == 0) release(&shared.half_empty[at.slot]);
  }

  // S[64 rows, 64 tokens] = Q Kᵀ for tile j but for RoPE, left running. 32 wgmma, four for each
  // piece.
  template <class Scores, class Queries>
  __device__ __forceinline__ void start_scores(int j, Scores& s, const Queries& q) {
    auto thread_mma = scores_mma.get_thread_slice(thread);
    auto tile = [](const T* from) {
      return cute::make_tensor(cute::make_smem_ptr(from), typename Tiles<T>::Piece{});
    };
    const HalfSlot halves[2] = {owners_half(j), others_half(j)};
    scores_mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
    scores_mma_rs.accumulate_ = cute::GMMA::ScaleOut::One;
    fence_fragment(s);
    CUTE_UNROLL
    for (int n = 0; n < kRopePiece; ++n) {  // in the order of their arrival
      const HalfSlot& at = halves[n / kPiecesHalf];
      Barrier::wait(&shared.half_full[at.slot][n % kPiecesHalf], at.parity);
      const T* from = shared.half[at.slot] + n % kPiecesHalf * kPieceElements;
      cute::warpgroup_arrive();
      auto k = thread_mma.partition_fragment_B(tile(from));  // [64 tokens, 64]
      if (in_registers(n)) {
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) {
          cute::gemm(scores_mma_rs, q(cute::_, cute::_, register_piece(n) * 4 + i),
                     k(cute::_, cute::_, i), s);
        }
      } else {
        // [64 rows, 64]; piece n of the own half's eight, counted from its first on
        constexpr int kSharedHalf = shared_piece(kPiecesHalf);
        const int half = n / kPiecesHalf ^ mine;
        const T* rows = shared.q + (half * kSharedHalf + n % kPiecesHalf) * kPieceElements;
        gemm_k_loop(scores_mma, thread_mma.partition_fragment_A(tile(rows)), k, s);
      }
    }
    cute::warpgroup_commit_batch();
  }

  // The part of RoPE, which comes last: its place comes free after the other consumer's product.
  template <class Scores, class Queries>
  __device__ __forceinline__ void finish_scores(int j, Scores& s, const Queries& q) {
    auto thread_mma = scores_mma.get_thread_slice(thread);
    Barrier::wait(&shared.rope_full[rope_slot(j)], (tile_count + j) >> 1 & 1);
    auto tile = cute::make_tensor(cute::make_smem_ptr(shared.rope[rope_slot(j)]),
                                  typename Tiles<T>::Piece{});
    auto k = thread_mma.partition_fragment_B(tile);  // [64 tokens, 64]
    cute::warpgroup_arrive();
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      cute::gemm(scores_mma_rs, q(cute::_, cute::_, register_piece(kRopePiece) * 4 + i),
                 k(cute::_, cute::_, i), s);
    }
    cute::warpgroup_commit_batch();
  }

  // Rows of V past the end of the request may hold anything, NaN included, and 0 · NaN is NaN, so
  // they are cleared. Their scores are masked already: QKᵀ may read either content.
  __device__ __forceinline__ void clear_tail(T* v, int valid_tokens) {
    for (int i = thread; i < kPiecesHalf * (kTokens - valid_tokens) * 8; i += 128) {
      const int chunk = i % 8, rest = i / 8;
      const int piece = rest % kPiecesHalf, token = valid_tokens + rest / kPiecesHalf;
      auto* line = reinterpret_cast<uint4*>(v + piece * kPieceElements + token * kPieceCols);
      line[chunk] = make_uint4(0, 0, 0, 0);
    }
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::arrive_and_wait(128, kTailZero0 + mine);
  }

  // P_j to where RoPE was, for the other consumer's product, in the 128-byte swizzle.
  template <class Probabilities>
  __device__ __forceinline__ void publish(int j, const Probabilities& pr, const RowPair& max,
                                          const RowPair& alpha) {
    const int lane = thread % 32;
    const int matrix_row = thread / 32 * 16 + lane % 16;
    CUTE_UNROLL
    for (int k = 0; k < kTokens / 16; ++k) {
      const int chunk = (k * 2 + lane / 16) ^ (matrix_row % 8);
      auto* to = reinterpret_cast<cute::uint128_t*>(p_tile(j) + matrix_row * kTokens + chunk * 8);
      const auto* from = reinterpret_cast<const uint32_t*>(&pr(k * 8));
      cute::SM90_U32x4_STSM_N::copy(from[0], from[1], from[2], from[3], *to);
    }
    if (lane % 4 == 0) {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        shared.row_max[j & 1][row + 8 * h] = max.v[h];
        shared.row_alpha[j & 1][row + 8 * h] = alpha.v[h];
      }
    }
  }

  // Tells the other consumer of P_j, once this one's own product runs: the fence waits for what was
  // stored, a few hundred cycles.
  __device__ __forceinline__ void announce(int j) const {
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::arrive(kConsumerThreads, kProbabilitiesEven + (j & 1));
  }

  // The rows' maximum and factor as the other consumer published them with P_j.
  __device__ __forceinline__ void read_row_state(int j, RowPair& max, RowPair& alpha) const {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      max.v[h] = shared.row_max[j & 1][row + 8 * h];
      alpha.v[h] = shared.row_alpha[j & 1][row + 8 * h];
    }
  }

  // A tile whose scores the other consumer computes: take over its maximum, then O += P_j V_j, left
  // running. That P_j is there says that all of K_j is.
  template <class Output>
  __device__ __forceinline__ void start_other_tile(const Item& it, int j, OnlineSoftmax& softmax,
                                                   Output& o) {
    cutlass::arch::NamedBarrier::sync(kConsumerThreads, kProbabilitiesEven + (j & 1));
    RowPair max, alpha;
    read_row_state(j, max, alpha);
    softmax.follow(max, alpha);
    if (any_rescale(alpha)) {
      cute::warpgroup_wait<0>();
      fence_fragment(o);
      rescale(o, alpha);
    }
    T* half = shared.half[others_half(j).slot];
    if (it.has_tail(j)) clear_tail(half, it.valid_tokens(j));

    // V [256 columns, 64 tokens]
    auto v = cute::make_tensor(cute::make_smem_ptr(half), typename Tiles<T>::ValueHalf{});
    // P [64 rows, 64 tokens]
    auto probabilities =
        cute::make_tensor(cute::make_smem_ptr(p_tile(j)), typename Tiles<T>::Piece{});
    auto thread_mma = output_mma_ss.get_thread_slice(thread);
    fence_fragment(o);
    cute::warpgroup_arrive();
    gemm_k_loop(output_mma_ss, thread_mma.partition_fragment_A(probabilities),
                thread_mma.partition_fragment_B(v), o);
    cute::warpgroup_commit_batch();
  }

  __device__ __forceinline__ void finish_other_tile(const Item& it, int j) {
    if (j + 1 < it.tiles) release(&shared.half_empty[others_half(j).slot]);
    release(&shared.rope_empty[rope_slot(j)]);
  }

  // region: own_tile
  // A tile whose scores are mine, and the product with the other's tile before it, which follows
  // the latent's part of the scores through the tensor cores. All is waited for before the softmax:
  // under it the other consumer's products run, and what this one has read comes free so much
  // sooner.
  template <bool kFirst, class Output, class Scores, class Probabilities, class Queries>
  __device__ __forceinline__ void own_tile(const Item& it, int j, OnlineSoftmax& softmax, Output& o,
                                           Scores& s, Probabilities& pr, const Queries& q) {
    start_scores(j, s, q);
    if (!kFirst) start_other_tile(it, j - 1, softmax, o);
    finish_scores(j, s, q);
    if (!kFirst) {
      cute::warpgroup_wait<1>();
      fence_fragment(o);
      finish_other_tile(it, j - 1);
    }
    cute::warpgroup_wait<0>();
    fence_fragment(s);
    cutlass::arch::NamedBarrier::sync(128, kScored0 + mine);  // P goes where RoPE is
    if (j + 2 >= it.tiles) release(&shared.q_empty);

    if (it.needs_mask(j)) OnlineSoftmax::mask(s, it.first_token(j), it.limit);
    const RowPair alpha = softmax.step(s, p.scale_log2);
    to_operand<T>(s, pr);
    publish(j, pr, softmax.max, alpha);
    if (any_rescale(alpha)) rescale(o, alpha);
    T* half = shared.half[owners_half(j).slot];
    if (it.has_tail(j)) clear_tail(half, it.valid_tokens(j));
    // V [256 columns, 64 tokens]
    auto v = cute::make_tensor(cute::make_smem_ptr(half), typename Tiles<T>::ValueHalf{});
    fence_fragment(o);
    cute::warpgroup_arrive();
    gemm_k_loop(output_mma_rs, pr, output_mma_rs.get_thread_slice(thread).partition_fragment_B(v),
                o);
    cute::warpgroup_commit_batch();
    announce(j);
    cute::warpgroup_wait<0>();
    fence_fragment(o);
    if (j + 1 < it.tiles) release(&shared.half_empty[owners_half(j).slot]);
  }
  // endregion: own_tile

  // parity: of the item among all of this CTA's, empty ones too.
  __device__ __forceinline__ void run_item(const WorkItem& work, int parity) {
    using namespace cute;
    auto o = partition_fragment_C(output_mma_rs, Shape<Int<kRows>, Int<kHalfV>>{});  // [64, 256]
    auto s = partition_fragment_C(scores_mma, Shape<Int<kRows>, Int<kTokens>>{});    // [64, 64]
    auto pr = make_tensor<T>(Layout<Shape<Shape<_2, _2, _2>, _1, _4>>{});            // [64, 64]
    auto q = make_tensor<T>(                                                         // [64, 192]
        Layout<Shape<Shape<_2, _2, _2>, _1, Int<kRegisterPieces * kPieceCols / 16>>>{});
    clear(o);
    output_mma_rs.accumulate_ = GMMA::ScaleOut::One;
    output_mma_ss.accumulate_ = GMMA::ScaleOut::One;
    OnlineSoftmax softmax;
    const Item it(p, work, row);
    const int n = it.tiles;

    // region: consumer_loop
    // Consumer 0 opens with tile 0; then each takes the other's tile and its own, in turn.
    if (n > 0) load_queries(q);
    if (n <= mine) release(&shared.q_empty);
    if (mine == 0 && n > 0) own_tile<true>(it, 0, softmax, o, s, pr, q);
    int j = 2 - mine;
    for (; j < n; j += 2) own_tile<false>(it, j, softmax, o, s, pr, q);
    if (j == n) {  // the last tile was the other's
      start_other_tile(it, n - 1, softmax, o);
      cute::warpgroup_wait<0>();
      fence_fragment(o);
      finish_other_tile(it, n - 1);
    }
    // endregion: consumer_loop

    const RowPair own_sum = softmax.reduced_sum();
    if (thread % 4 == 0) {
      for (int h = 0; h < 2; ++h) shared.row_sum[parity][mine][row + 8 * h] = own_sum.v[h];
    }
    cutlass::arch::NamedBarrier::sync(kConsumerThreads, kBothConsumers);
    RowPair total;
    for (int h = 0; h < 2; ++h) {
      total.v[h] = own_sum.v[h] + shared.row_sum[parity][mine ^ 1][row + 8 * h];
    }
    // No warp reads the half that came last any more: it serves to put O in order.
    const int last = ((n - 1) & 1) == mine ? owners_half(n - 1).slot : others_half(n - 1).slot;
    // `thread`, though only the item says so: else the compiler works out every address of the end
    // ahead of the tiles, and has no registers to keep them in.
    const int here = thread + min(n, 0);
    store_result<T>(p, work, mine, here, o, softmax.max, total, n > 0 ? shared.half[last] : nullptr,
                    [&] {
                      cutlass::arch::fence_view_async_shared();  // TMA writes there next
                      __syncwarp();
                      release(&shared.half_empty[last]);
                    });
    tile_count += n;
    half_count += 2 * n;
  }
};

template <class T>
__device__ __forceinline__ void consume(const KernelParams& p, SharedStorage<T>& shared, int mine) {
  Consumer<T> consumer{p, shared, mine};
  for (int i = 0;; ++i) {
    Barrier::wait(&shared.q_full, i & 1);
    __syncwarp();  // no lane is still at the item before when another lets go of this one
    const WorkItem& work = shared.items[i & 1];
    if (work.request < 0) break;
    consumer.run_item(work, i & 1);
  }
  if (p.meeting != nullptr) merge_splits<T>(p, shared.half);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    dense_decode_kernel(const __grid_constant__ KernelParams p,
                        const __grid_constant__ CUtensorMap q_map,
                        const __grid_constant__ CUtensorMap k_map) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<SharedStorage<T>*>(raw);
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(&q_map);
    cute::prefetch_tma_descriptor(&k_map);
    Barrier::init(&shared.q_full, 1);
    Barrier::init(&shared.q_empty, 8);  // one arrival a consumer warp
    for (int s = 0; s < kSlots; ++s) {
      for (int i = 0; i < kPiecesHalf; ++i) Barrier::init(&shared.half_full[s][i], 1);
      Barrier::init(&shared.half_empty[s], 4);  // the warps of the half's owner
    }
    for (int s = 0; s < 2; ++s) {
      Barrier::init(&shared.rope_full[s], 1);
      Barrier::init(&shared.rope_empty[s], 4);  // the warps of the consumer that reads P there
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  // All of this may go on while the kernel before is still at work; what comes now needs its
  // results. What follows this one may begin likewise as soon as there is room.
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();

  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<24>();
    if (threadIdx.x == 0) produce<T>(p, shared, q_map, k_map);
  } else {
    cutlass::arch::warpgroup_reg_alloc<240>();
    consume<T>(p, shared, warpgroup - 1);
  }
}

}  // namespace flashmla::sm90::dense_decode
