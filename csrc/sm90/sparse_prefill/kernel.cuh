// Sparse MLA prefill for 33 heads and more, sm_90a: out = softmax(q Kᵀ · scale) V over the
// tokens that each query's indices name, where V is the first 512 columns of K. few_heads/ serves
// fewer.
//
// One CTA computes up to 64 heads of one query after another. Its three warpgroups: a producer that
// gathers the chosen tokens into tiles of 64 (gather.cuh), and two consumers, those of dense
// decode. The 64 x 512 float32 output fills half the register file, so each consumer owns 256 of
// its columns. They take turns: the owner of tile j computes scores and softmax and publishes the
// probabilities P_j; then both multiply P_j with their half of V_j. NOTES.md tells how this came
// about.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/copy_sm90.hpp>

#include "../../common/registers.cuh"
#include "epilogue.cuh"
#include "gather.cuh"
#include "softmax.cuh"

namespace flashmla::sm90::sparse_prefill {

// One of the two consumer warpgroups. `kMine` is 0 or 1: the parity of the tiles whose scores it
// computes, and the half of the output columns it owns.
template <class T, int kMine>
struct Consumer {
  static constexpr int kOther = kMine ^ 1;

  const KernelParams& p;
  SharedStorage<T>& shared;
  const CUtensorMap& out_map;
  const int thread = threadIdx.x % 128;
  const int row = thread / 32 * 16 + thread % 32 / 4;  // and row + 8
  int tile_count = 0;
  int item_count = 0;  // of items that have tiles

  typename Tiles<T>::Scores scores_mma;
  typename Tiles<T>::ScoresFromRegisters scores_mma_rs;
  typename Tiles<T>::OutputFromRegisters output_mma_rs;
  typename Tiles<T>::OutputFromShared output_mma_ss;

  __device__ __forceinline__ void release(uint64_t* barrier) {
    if (thread % 32 == 0) Barrier::arrive(barrier);
  }
  // The halves of tile j: of the consumer that computes its scores, and of the other.
  __device__ __forceinline__ HalfSlot owners_half(int j) const {
    return HalfSlot((tile_count + j) * 2);
  }
  __device__ __forceinline__ HalfSlot others_half(int j) const {
    return HalfSlot((tile_count + j) * 2 + 1);
  }

  // Three pieces of q [64 rows, 576] from global memory, as operands from registers: of each block
  // of 16 columns two neighbours, in two row halves and two halves of the columns.
  template <class Queries>
  __device__ __forceinline__ void load_queries(const WorkItem& item, Queries& q) const {
    const T* base = static_cast<const T*>(p.q) + item.query * p.q_stride_query + thread % 4 * 2;
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int head = item.first_head + row + 8 * h;
      const T* from = base + head * p.q_stride_head;
      CUTE_UNROLL
      for (int piece = 0; piece < kPieces; ++piece) {
        if (!in_registers(piece)) continue;
        const bool exists = head < p.h_q && piece * kPieceCols < p.d_qk;
        CUTE_UNROLL
        for (int i = 0; i < 8; ++i) {  // eight columns
          const auto* at = reinterpret_cast<const uint32_t*>(from + piece * kPieceCols + i * 8);
          reinterpret_cast<uint32_t&>(q(register_piece(piece) * 32 + i * 4 + h * 2)) =
              exists ? __ldg(at) : 0u;
        }
      }
    }
  }

  // The producer's copies are ordinary writes as far as memory order goes, and wgmma reads through
  // another door: besides the barrier it takes a fence between the two.
  __device__ __forceinline__ static void wait_for_copies(uint64_t* barrier, uint32_t parity) {
    Barrier::wait(barrier, parity);
    cutlass::arch::fence_view_async_shared();
  }

  // S[64 rows, 64 tokens] = Q Kᵀ for tile j, left running. 36 wgmma, four for each piece.
  template <class Scores, class Queries>
  __device__ __forceinline__ void start_scores(int j, Scores& s, const Queries& q) {
    auto thread_mma = scores_mma.get_thread_slice(thread);
    auto tile = [](const T* from) {
      return cute::make_tensor(cute::make_smem_ptr(from), typename Tiles<T>::Piece{});
    };
    // Nothing of this is worth keeping from tile to tile: registers are what there is least of.
    int base = 0;
    forget(base);
    const HalfSlot halves[2] = {owners_half(j), others_half(j)};
    // The first piece, which is in registers, begins the sum.
    static_assert(in_registers(0) && in_registers(kPiecesHalf));
    scores_mma_rs.accumulate_ = cute::GMMA::ScaleOut::Zero;
    scores_mma.accumulate_ = cute::GMMA::ScaleOut::One;
    fence_fragment(s);
    CUTE_UNROLL
    for (int n = 0; n < kPieces; ++n) {  // in the order of their arrival
      const int piece = n == kRopePiece ? n : n ^ (kMine * kPiecesHalf);
      const HalfSlot& at = halves[n / kPiecesHalf % 2];
      constexpr int kGroup = kPiecesHalf / kGroups;
      const T* from;
      if (n == kRopePiece) {
        const int tile = tile_count + j;
        wait_for_copies(&shared.rope_full[tile & 1], tile >> 1 & 1);
        from = shared.rope;
      } else {
        if (n % kGroup == 0) {
          wait_for_copies(&shared.half_full[at.slot][n % kPiecesHalf / kGroup], at.parity);
        }
        from = shared.half[at.slot] + n % kPiecesHalf * kPieceElements;
      }
      cute::warpgroup_arrive();
      auto k = thread_mma.partition_fragment_B(tile(from));  // [64 tokens, 64]
      if (in_registers(piece)) {
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) {
          cute::gemm(scores_mma_rs, q(cute::_, cute::_, register_piece(piece) * 4 + i),
                     k(cute::_, cute::_, i), s);
          scores_mma_rs.accumulate_ = cute::GMMA::ScaleOut::One;
        }
      } else {
        const T* rows = shared.q + base + shared_piece(piece) * kPieceElements;  // [64 rows, 64]
        gemm_k_loop(scores_mma, thread_mma.partition_fragment_A(tile(rows)), k, s);
      }
    }
    cute::warpgroup_commit_batch();
  }

  // P_j to where P_{j-1} was, for the other consumer's product, in the 128-byte swizzle; and the
  // largest score of each row so far, which only whoever has the next tile looks at.
  template <class Probabilities>
  __device__ __forceinline__ void publish(int j, const Probabilities& pr, const RowPair& max,
                                          const RowPair& alpha) {
    const int lane = thread % 32;
    const int matrix_row = thread / 32 * 16 + lane % 16;
    cutlass::arch::NamedBarrier::sync(128, kFollowed0 + kMine);
    CUTE_UNROLL
    for (int k = 0; k < kTokens / 16; ++k) {
      const int chunk = (k * 2 + lane / 16) ^ (matrix_row % 8);
      auto* to = reinterpret_cast<cute::uint128_t*>(shared.p + matrix_row * kTokens + chunk * 8);
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
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::arrive(kConsumerThreads, kProbabilitiesEven + (j & 1));
  }

  // The largest score of each row in this consumer's tiles so far.
  __device__ __forceinline__ void note_largest(int j, const RowPair& top) {
    if (thread % 4 != 0) return;
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      float& so_far = shared.row_top[kMine][row + 8 * h];
      so_far = j == kMine ? top.v[h] : fmaxf(so_far, top.v[h]);
    }
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
  __device__ __forceinline__ void start_other_tile(int j, OnlineSoftmax& softmax, Output& o) {
    cutlass::arch::NamedBarrier::sync(kConsumerThreads, kProbabilitiesEven + (j & 1));
    RowPair max, alpha;
    read_row_state(j, max, alpha);
    softmax.follow(max, alpha);
    if (any_rescale(alpha)) {
      cute::warpgroup_wait<0>();
      fence_fragment(o);
      rescale(o, alpha);
    }
    // V [256 columns, 64 tokens]
    auto v = cute::make_tensor(cute::make_smem_ptr(shared.half[others_half(j).slot]),
                               typename Tiles<T>::ValueHalf{});
    // P [64 rows, 64 tokens]
    auto probabilities =
        cute::make_tensor(cute::make_smem_ptr(shared.p), typename Tiles<T>::Piece{});
    auto thread_mma = output_mma_ss.get_thread_slice(thread);
    fence_fragment(o);
    cute::warpgroup_arrive();
    gemm_k_loop(output_mma_ss, thread_mma.partition_fragment_A(probabilities),
                thread_mma.partition_fragment_B(v), o);
    cute::warpgroup_commit_batch();
  }

  // The half of the last tile is not given back: the output is staged there. Before the first tile
  // there is no other.
  template <class Output>
  __device__ __forceinline__ void finish_other_tile(int j, bool last, Output& o) {
    cute::warpgroup_wait<0>();
    fence_fragment(o);
    if (j >= 0 && !last) release(&shared.half_empty[others_half(j).slot]);
  }

  // region: own_tile
  // The scores of a tile that is mine, and the product with the other's tile before it, which
  // follows them through the tensor cores.
  template <bool kAlone, class Output, class Scores, class Queries>
  __device__ __forceinline__ void compute_scores(int j, int tiles, OnlineSoftmax& softmax,
                                                 Output& o, Scores& s, const Queries& q) {
    start_scores(j, s, q);
    if (!kAlone) start_other_tile(j - 1, softmax, o);
    cute::warpgroup_wait<kAlone ? 0 : 1>();
    fence_fragment(s);
    const auto valid = *reinterpret_cast<const uint64_t*>(shared.valid[(tile_count + j) & 1]);
    __syncwarp();  // one lane speaks for all
    release(&shared.rope_empty);
    if (j + 2 >= tiles) release(&shared.q_empty);
    if (valid != ~uint64_t{0}) OnlineSoftmax::mask(s, valid);
  }

  // The end of the product with the other's tile, this one's probabilities, and its own product.
  template <class Output, class Scores, class Probabilities>
  __device__ __forceinline__ void finish_own_tile(int j, int tiles, OnlineSoftmax& softmax,
                                                  Output& o, Scores& s, Probabilities& pr) {
    const RowPair top = OnlineSoftmax::largest(s);
    const RowPair alpha = softmax.raise_max(top, p.scale_log2);
    finish_other_tile(j - 1, false, o);  // before the exponentials: its place is wanted
    softmax.exponentiate(s, p.scale_log2);
    to_operand<T>(s, pr);
    publish(j, pr, softmax.max, alpha);
    if (any_rescale(alpha)) rescale(o, alpha);
    // V [256 columns, 64 tokens]
    auto v = cute::make_tensor(cute::make_smem_ptr(shared.half[owners_half(j).slot]),
                               typename Tiles<T>::ValueHalf{});
    fence_fragment(o);
    cute::warpgroup_arrive();
    gemm_k_loop(output_mma_rs, pr, output_mma_rs.get_thread_slice(thread).partition_fragment_B(v),
                o);
    cute::warpgroup_commit_batch();
    note_largest(j, OnlineSoftmax::of_quad(top));
    cute::warpgroup_wait<0>();
    fence_fragment(o);
    if (j + 1 < tiles) release(&shared.half_empty[owners_half(j).slot]);
  }
  // endregion: own_tile

  // The rows' sums over both consumers' tiles.
  __device__ __forceinline__ RowPair total_sum(const OnlineSoftmax& softmax) {
    const RowPair mine = softmax.reduced_sum();
    if (thread % 4 == 0) {
      for (int h = 0; h < 2; ++h) shared.row_sum[item_count & 1][kMine][row + 8 * h] = mine.v[h];
    }
    cutlass::arch::NamedBarrier::sync(kConsumerThreads, kRowSums);
    RowPair total;
    for (int h = 0; h < 2; ++h) {
      total.v[h] = mine.v[h] + shared.row_sum[item_count & 1][kOther][row + 8 * h];
    }
    return total;
  }

  // O by way of this consumer's half of the last tile, which is given back when it has been read.
  template <class Output>
  __device__ __forceinline__ void store_output(const WorkItem& item, int slot, const Output& o,
                                               const RowPair& factor) {
    stage_output(shared.half[slot], o, factor);
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(128, kStaged0 + kMine);
    if (thread == 0) {
      for (int i = 0; i < kPiecesHalf; ++i) {
        cute::SM90_TMA_STORE_3D::copy(&out_map, shared.half[slot] + i * kPieceElements,
                                      kMine * kHalfV + i * kPieceCols, item.first_head, item.query);
      }
      cute::tma_store_arrive();
      cute::tma_store_wait<0>();
    }
    release(&shared.half_empty[slot]);
  }

  template <class Queries>
  __device__ __forceinline__ void run_item(int number, Queries& q) {
    using namespace cute;
    auto o = partition_fragment_C(output_mma_rs, Shape<Int<kRows>, Int<kHalfV>>{});  // [64, 256]
    auto s = partition_fragment_C(scores_mma, Shape<Int<kRows>, Int<kTokens>>{});    // [64, 64]
    auto pr = make_tensor<T>(Layout<Shape<Shape<_2, _2, _2>, _1, _4>>{});            // [64, 64]
    const int n = WorkItem(p, number).tiles();
    clear(o);
    output_mma_rs.accumulate_ = GMMA::ScaleOut::One;
    output_mma_ss.accumulate_ = GMMA::ScaleOut::One;
    OnlineSoftmax softmax;

    // region: consumer_loop
    // Consumer 0 opens with tile 0; then each takes the other's tile and its own, in turn.
    if (n > 0) Barrier::wait(&shared.q_full, item_count & 1);
    if (n <= kMine && n > 0) release(&shared.q_empty);
    int j = kMine;
    if (j < n) {
      compute_scores<kMine == 0>(j, n, softmax, o, s, q);
      CUTE_NO_UNROLL
      while (true) {
        finish_own_tile(j, n, softmax, o, s, pr);
        j += 2;
        if (j >= n) break;
        compute_scores<false>(j, n, softmax, o, s, q);
      }
    }
    if (n > 0 && j == n) {  // the last tile was the other's
      start_other_tile(n - 1, softmax, o);
      finish_other_tile(n - 1, true, o);
    }
    // endregion: consumer_loop

    forget(number);
    const int next = number + gridDim.x;
    if (next < p.items) load_queries(WorkItem(p, next), q);
    const WorkItem item(p, number);
    RowPair total{{0.f, 0.f}}, top{{0.f, 0.f}};
    if (n == 0) {
      store_nothing<T, kMine>(p, item);
    } else {
      total = total_sum(softmax);
      const bool mine_was_last = (n - 1) % 2 == kMine;
      const int slot = (mine_was_last ? owners_half(n - 1) : others_half(n - 1)).slot;
      store_output(item, slot, o, output_factor(p, item, row, softmax.max, total));
      ++item_count;
    }
    if (kMine == 0 && thread % 4 == 0) {
      for (int h = 0; h < 2; ++h) {
        top.v[h] = shared.row_top[0][row + 8 * h];
        if (n > 1) top.v[h] = fmaxf(top.v[h], shared.row_top[1][row + 8 * h]);
      }
      store_row_results(p, item, row, softmax.max, total, top);
    }
    tile_count += n;
  }

  __device__ __forceinline__ void run() {
    using namespace cute;
    int number = blockIdx.x;
    auto q = make_tensor<T>(  // [64, 192]
        Layout<Shape<Shape<_2, _2, _2>, _1, Int<kRegisterPieces * kPieceCols / 16>>>{});
    if (number < p.items) load_queries(WorkItem(p, number), q);
    CUTE_NO_UNROLL
    for (; number < p.items; number += gridDim.x) {
      run_item(number, q);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    sparse_prefill_kernel(const __grid_constant__ KernelParams p,
                          const __grid_constant__ CUtensorMap q_map,
                          const __grid_constant__ CUtensorMap out_map) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<SharedStorage<T>*>(raw);
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(&q_map);
    cute::prefetch_tma_descriptor(&out_map);
    Barrier::init(&shared.q_full, 1);
    Barrier::init(&shared.q_empty, 2 * kWarps);
    for (int s = 0; s < kSlots; ++s) {
      for (int i = 0; i < kGroups; ++i) Barrier::init(&shared.half_full[s][i], kProducerThreads);
      Barrier::init(&shared.half_empty[s], kWarps);  // of the half's owner
    }
    for (int s = 0; s < 2; ++s) {
      Barrier::init(&shared.rope_full[s], kProducerThreads + kWarps);  // copies, and valid bits
    }
    Barrier::init(&shared.rope_empty, kWarps);  // of the consumer that computes the scores
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kRegistersProducer>();
    Gatherer<T>(p, shared, q_map).run();
  } else if (warpgroup == 1) {
    cutlass::arch::warpgroup_reg_alloc<kRegistersConsumer>();
    Consumer<T, 0>{p, shared, out_map}.run();
  } else {
    cutlass::arch::warpgroup_reg_alloc<kRegistersConsumer>();
    Consumer<T, 1>{p, shared, out_map}.run();
  }
}

}  // namespace flashmla::sm90::sparse_prefill
