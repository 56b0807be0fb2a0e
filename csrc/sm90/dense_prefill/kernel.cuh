// Dense attention over sequences laid end to end, for sm_90a: out = softmax(q Kᵀ · scale) V.
//
// A CTA stays on its SM and draws blocks of 192 query rows of one head. Its four warpgroups: one
// whose warps fetch by TMA, and three consumers with 64 rows each that read the same K and V. A
// consumer never has more than one product running: scores, softmax, output, one after the other.
// It is the three of them together that keep the tensor cores busy: they take turns at issuing
// matrix work, so that while one takes exponentials the other two have products in the queue.
// NOTES.md tells why three.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "config.cuh"
#include "epilogue.cuh"
#include "scheduler.cuh"
#include "softmax.cuh"

namespace flashmla::sm90::dense_prefill {

// Fetches K and V, tile by tile, from the last that the block's rows may see down to the first.
template <class T, int kDimQk>
__device__ __forceinline__ void produce_kv(const KernelParams& p, SharedStorage<T, kDimQk>& shared,
                                           const CUtensorMap& k_map, const CUtensorMap& v_map) {
  constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  RingPlace<SharedStorage<T, kDimQk>::kSlots> place;
  WorkQueue<T, kDimQk> queue(shared);
  for (;; queue.pop(true)) {
    const Work work = queue.front();
    if (work.head < 0) return;
    const int kv_head = work.head / p.group;
    // region: producer
    const int tiles = work.tiles(work.row + kBlockRows - 1, p.causal);
    if (tiles == 0) Barrier::arrive(&shared.work_wanted);
    for (int j = tiles - 1; j >= 0; --j) {
      if (j == min(tiles - 1, kTilesAhead)) Barrier::arrive(&shared.work_wanted);
      const int token = work.first_key + j * kTokens;
      for (int i = 0; i < kPiecesQk<kDimQk> + kPiecesV; ++i, place.advance()) {
        uint64_t* full = &shared.ring_full[place.slot];
        T* to = shared.ring[place.slot];
        Barrier::wait(&shared.ring_empty[place.slot], place.parity ^ 1);
        Barrier::arrive_and_expect_tx(full, kPieceElements * sizeof(T));
        if (i < kPiecesQk<kDimQk>) {
          cute::SM90_TMA_LOAD_3D::copy(&k_map, full, kHint, to, i * kPieceCols, kv_head, token);
        } else {
          const int v_token = token + (i - kPiecesQk<kDimQk>)*kPieceTokensV;
          for (int column = 0; column < kDimV; column += kPieceCols) {
            cute::SM90_TMA_LOAD_3D::copy(&v_map, full, kHint, to + column * kPieceTokensV, column,
                                         kv_head, v_token);
          }
        }
      }
    }
    // endregion: producer
  }
}

// Fetches each consumer's rows of Q, in the consumers' order, as soon as there is a place for them.
template <class T, int kDimQk>
__device__ __forceinline__ void produce_q(const KernelParams& p, SharedStorage<T, kDimQk>& shared,
                                          const CUtensorMap& q_map) {
  constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);
  WorkQueue<T, kDimQk> queue(shared);
  RingPlace<kPlacesQ> place;
  for (;; queue.pop(true)) {
    const Work work = queue.front();
    if (work.head < 0) return;
    if (work.tiles(work.row + kBlockRows - 1, p.causal) == 0) continue;
    for (int c = 0; c < kConsumers; ++c, place.advance()) {
      uint64_t* full = &shared.q_full[place.slot];
      Barrier::wait(&shared.q_empty[place.slot], place.parity ^ 1);
      Barrier::arrive_and_expect_tx(full, sizeof(shared.q[0]));
      for (int i = 0; i < kPiecesQk<kDimQk>; ++i) {
        cute::SM90_TMA_LOAD_3D::copy(&q_map, full, kHint, shared.q[place.slot][i], i * kPieceCols,
                                     work.head, work.first_query + work.row + c * kRows);
      }
    }
  }
}

// Keys that rows may see: a thread's two, and the one of the 64 that sees the fewest.
struct Limits {
  int of_rows[2];
  int lowest;
};

template <class T, int kDimQk>
struct Consumer {
  using PieceQ = SwizzledTile<T, kRows>;                   // [64 rows, 64]
  using PieceV = TransposedTile<T, kPieceTokensV, kDimV>;  // [128 columns, 64 tokens]
  using Place = RingPlace<SharedStorage<T, kDimQk>::kSlots>;

  const KernelParams& p;
  SharedStorage<T, kDimQk>& shared;
  const int index;  // 0 to 2
  const int thread = threadIdx.x % 128;
  const int row = thread / 32 * 16 + thread % 32 / 4;  // of the 64; and row + 8
  Place place;
  RingPlace<kPlacesQ> q_place{index};

  template <int kWidth>
  using ScoresMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<T, T, float,
                                 cute::Shape<cute::_64, cute::Int<kWidth>, cute::_64>>()));
  decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<T, T, float, cute::Shape<cute::_64, cute::_128, cute::_64>,
                                 Major::K, Major::MN>())) output_mma;

  __device__ __forceinline__ void release(uint64_t* barrier) const {
    if (thread % 32 == 0) Barrier::arrive(barrier);
  }
  // The consumers issue matrix work in turn: 0, 1, 2, 0, ...
  __device__ __forceinline__ void await_turn() const {
    cutlass::arch::NamedBarrier::sync(256, kTurn + index);
  }
  __device__ __forceinline__ void pass_turn() const {
    cutlass::arch::NamedBarrier::arrive(256, kTurn + (index + 1) % kConsumers);
  }
  template <int kPieces>
  __device__ __forceinline__ void wait_pieces() const {
    Place at = place;
    CUTE_UNROLL
    for (int i = 0; i < kPieces; ++i, at.advance()) {
      Barrier::wait(&shared.ring_full[at.slot], at.parity);
    }
  }
  template <int kPieces>
  __device__ __forceinline__ void release_pieces() {
    CUTE_UNROLL
    for (int i = 0; i < kPieces; ++i, place.advance()) release(&shared.ring_empty[place.slot]);
  }

  // S[64 rows, kWidth tokens] = Q Kᵀ, of the first tokens of a tile
  template <int kWidth, class Scores>
  __device__ __forceinline__ void compute_scores(Scores& s) {
    ScoresMma<kWidth> mma;
    auto thread_mma = mma.get_thread_slice(thread);
    mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
    wait_pieces<kPiecesQk<kDimQk>>();
    await_turn();
    Place at = place;
    fence_fragment(s);
    cute::warpgroup_arrive();
    CUTE_UNROLL
    for (int i = 0; i < kPiecesQk<kDimQk>; ++i, at.advance()) {
      auto q = cute::make_tensor(cute::make_smem_ptr(shared.q[q_place.slot][i]), PieceQ{});
      auto k =
          cute::make_tensor(cute::make_smem_ptr(shared.ring[at.slot]), SwizzledTile<T, kWidth>{});
      gemm_k_loop(mma, thread_mma.partition_fragment_A(q), thread_mma.partition_fragment_B(k), s);
    }
    cute::warpgroup_commit_batch();
    pass_turn();
    cute::warpgroup_wait<0>();
    fence_fragment(s);
    release_pieces<kPiecesQk<kDimQk>>();
  }

  // O[64 rows, 128 columns] += P V for one piece of V, left running.
  template <int kPiece, class Probabilities, class Output>
  __device__ __forceinline__ void accumulate_output(const Probabilities& pr, Output& o) {
    Place at = place;
    CUTE_UNROLL
    for (int i = 0; i < kPiece; ++i) at.advance();
    auto v = cute::make_tensor(cute::make_smem_ptr(shared.ring[at.slot]), PieceV{});
    cute::warpgroup_arrive();
    gemm_k_loop(output_mma, pr, output_mma.get_thread_slice(thread).partition_fragment_B(v), o);
    cute::warpgroup_commit_batch();
  }

  // Rows of V past the end of the sequence belong to the next one and may hold anything, NaN
  // included, and 0 · NaN is NaN, so they are cleared. Each consumer does that for itself, with
  // what the others write as well: zeros over zeros.
  __device__ __forceinline__ void clear_tail(int valid_tokens) {
    Place at = place;
    for (int i = 0; i < kPiecesV; ++i, at.advance()) {
      const int first = max(0, valid_tokens - i * kPieceTokensV);
      constexpr int kLines = kDimV / kPieceCols;  // of 128 bytes, a token
      for (int n = thread; n < (kPieceTokensV - first) * kLines * 8; n += 128) {
        const int chunk = n % 8, line = n / 8 % kLines, token = first + n / 8 / kLines;
        T* to = shared.ring[at.slot] + (line * kPieceTokensV + token) * kPieceCols;
        reinterpret_cast<uint4*>(to)[chunk] = make_uint4(0, 0, 0, 0);
      }
    }
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::arrive_and_wait(128, kTail + index);
  }

  // A tile that none of my rows may see: the others may.
  __device__ __forceinline__ void skip_tile() {
    wait_pieces<kPiecesQk<kDimQk>>();
    await_turn();
    pass_turn();
    release_pieces<kPiecesQk<kDimQk>>();
    wait_pieces<kPiecesV>();
    release_pieces<kPiecesV>();
  }

  // One tile, of which no row of mine sees more than the first kWidth tokens: all or half of it.
  template <int kWidth, class Output>
  __device__ __forceinline__ void run_tile(const Work& work, int j, const Limits& limits,
                                           OnlineSoftmax& softmax, Output& o) {
    using namespace cute;
    auto s = partition_fragment_C(ScoresMma<kWidth>{}, Shape<Int<kRows>, Int<kWidth>>{});
    // region: consumer_tile
    compute_scores<kWidth>(s);
    if (j == 0) release(&shared.q_empty[q_place.slot]);
    if (j * kTokens + kWidth > limits.lowest) {
      OnlineSoftmax::mask(s, j * kTokens, limits.of_rows);
    }
    softmax.raise_max(s, o, p.scale_log2);
    const RowPair shift = softmax.shift(p.scale_log2);
    wait_pieces<kPiecesV>();
    if ((j + 1) * kTokens > work.keys) clear_tail(work.keys - j * kTokens);

    // The product with the first half of V runs under the exponentials for the second.
    constexpr int kPiece = kRows * kPieceTokensV / 128;  // elements of a thread
    auto first = make_tensor<T>(Layout<Shape<Shape<_2, _2, _2>, _1, _4>>{});  // [64, 64]
    softmax.template exponentiate<0, kPiece>(s, p.scale_log2, shift);
    to_operand<0>(s, first);
    fence_fragment(o);
    accumulate_output<0>(first, o);
    if constexpr (kWidth == kTokens) {
      auto second = make_tensor<T>(Layout<Shape<Shape<_2, _2, _2>, _1, _4>>{});  // [64, 64]
      softmax.template exponentiate<kPiece, 2 * kPiece>(s, p.scale_log2, shift);
      to_operand<kPiece>(s, second);
      accumulate_output<1>(second, o);
    }
    warpgroup_wait<0>();
    fence_fragment(o);
    release_pieces<kPiecesV>();
    // endregion: consumer_tile
  }

  __device__ __forceinline__ void run(const Work& work) {
    using namespace cute;
    auto o = partition_fragment_C(output_mma, Shape<Int<kRows>, Int<kDimV>>{});  // [64, 128]
    clear(o);
    output_mma.accumulate_ = GMMA::ScaleOut::One;
    OnlineSoftmax softmax;

    const int first_row = work.row + index * kRows;
    const Limits limits{
        {work.key_limit(first_row + row, p.causal), work.key_limit(first_row + row + 8, p.causal)},
        work.key_limit(first_row, p.causal)};
    const int highest_limit = work.key_limit(first_row + kRows - 1, p.causal);
    const int all_tiles = work.tiles(work.row + kBlockRows - 1, p.causal);
    const int tiles = work.tiles(first_row + kRows - 1, p.causal);

    if (all_tiles > 0) Barrier::wait(&shared.q_full[q_place.slot], q_place.parity);
    // region: consumer_loop
    int j = all_tiles - 1;
    for (; j >= tiles; --j) skip_tile();
    if (j >= 0 && highest_limit <= j * kTokens + kTokens / 2) {
      run_tile<kTokens / 2>(work, j, limits, softmax, o);
      --j;
    }
    for (; j >= 0; --j) run_tile<kTokens>(work, j, limits, softmax, o);
    // endregion: consumer_loop
    if (all_tiles > 0) {
      if (tiles == 0) release(&shared.q_empty[q_place.slot]);
      for (int i = 0; i < kConsumers; ++i) q_place.advance();
    }
    store_result<T>(p, work, first_row + row, o, softmax.max, softmax.reduced_sum());
  }
};

template <class T, int kDimQk>
__global__ void __launch_bounds__(kThreads, 1)
    dense_prefill_kernel(const __grid_constant__ KernelParams p,
                         const __grid_constant__ CUtensorMap q_map,
                         const __grid_constant__ CUtensorMap k_map,
                         const __grid_constant__ CUtensorMap v_map) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<SharedStorage<T, kDimQk>*>(raw);
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(&q_map);
    cute::prefetch_tma_descriptor(&k_map);
    cute::prefetch_tma_descriptor(&v_map);
    for (int i = 0; i < kPlacesQ; ++i) {
      Barrier::init(&shared.q_full[i], 1);
      Barrier::init(&shared.q_empty[i], 4);  // one arrival a warp
    }
    for (int i = 0; i < SharedStorage<T, kDimQk>::kSlots; ++i) {
      Barrier::init(&shared.ring_full[i], 1);
      Barrier::init(&shared.ring_empty[i], 4 * kConsumers);
    }
    Barrier::init(&shared.work_wanted, 1);
    for (int i = 0; i < kBlocksAhead; ++i) {
      Barrier::init(&shared.work_full[i], 1);
      Barrier::init(&shared.work_empty[i], 4 * kConsumers + 2);  // and the two fetching threads
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = cutlass::canonical_warp_group_idx();
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<32>();
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) {
      if (warp == 0) schedule<T, kDimQk>(p, shared);
      if (warp == 1) produce_q<T, kDimQk>(p, shared, q_map);
      if (warp == 2) produce_kv<T, kDimQk>(p, shared, k_map, v_map);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<160>();
    Consumer<T, kDimQk> consumer{p, shared, warpgroup - 1};
    if (warpgroup == kConsumers) consumer.pass_turn();  // consumer 0 begins
    WorkQueue<T, kDimQk> queue(shared);
    for (; queue.front().head >= 0; queue.pop(threadIdx.x % 32 == 0)) consumer.run(queue.front());
    if (warpgroup == 1) consumer.await_turn();  // leaves no barrier half used
  }
}

}  // namespace flashmla::sm90::dense_prefill
