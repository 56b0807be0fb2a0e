// Sparse MLA decode for sm_90a: out = softmax(q Kᵀ · scale) V over the tokens that each query's
// indices name, where V is the first 512 columns of K. And dense decode over an FP8 cache, where
// the tokens are all those of a request's pages: only where tokens come from differs (source.cuh).
//
// One CTA computes up to 64 heads of one query, or 64 query rows of a request. Two warpgroups fetch
// the chosen tokens, half of the columns each, convert them and lay them out as tiles of 64
// (dequant.cuh, gather.cuh). Two more multiply, as in dense decode: the 64 x 512 float32 output
// fills half the register file, so each owns 256 of its columns, and they take turns with the
// scores: the owner of tile j computes S_j and P_j and publishes P_j; then both multiply it with
// their half of V_j. Where two CTAs work on the same tokens for different rows, they can be a
// cluster, and each converts half of the tokens for both (kPair). NOTES.md tells how this came
// about.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90.hpp>

#include "../../common/registers.cuh"
#include "../dense_decode/softmax.cuh"
#include "dequant.cuh"
#include "epilogue.cuh"
#include "gather.cuh"
#include "merge.cuh"

namespace flashmla::sm90::sparse_decode {

using dense_decode::any_rescale;
using dense_decode::OnlineSoftmax;
using dense_decode::rescale;

template <class T>
struct Tiles {
  using Piece = SwizzledTile<T, kTokens>;                // [64 rows or tokens, 64]
  using ValueHalf = TransposedTile<T, kTokens, kHalfV>;  // [256 columns, 64 tokens]
  using Scores = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<T, T, float, cute::Shape<cute::_64, cute::_64, cute::_64>>()));
  // 128 columns an instruction: of 256, ptxas says that a kernel of 512 threads has no room for
  // one.
  using Output = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<T, T, float, cute::Shape<cute::_64, cute::_128, cute::_64>,
                                 Major::K, Major::MN>()));
};

// One of the two consumer warpgroups. Both run the same instructions, so that the caches which
// these come through hold them once.
template <class T, class Source, bool kPair, Parts kParts>
struct Consumer {
  const KernelParams& p;
  SharedStorage<T>& shared;
  const int mine;  // 0 or 1: the parity of the tiles whose scores it computes, and its half of V
  const int thread = threadIdx.x % 128;
  const int row = thread / 32 * 16 + thread % 32 / 4;  // and row + 8
  int tile_count = 0;
  int sums_parity = 0;  // a place for row sums is written again two items later

  typename Tiles<T>::Scores scores_mma;
  typename Tiles<T>::Output output_mma;

  __device__ __forceinline__ void release(uint64_t* barrier) {
    if (thread % 32 == 0) Barrier::arrive(barrier);
  }
  __device__ __forceinline__ int stage(int j) const { return (tile_count + j) % kStages; }
  __device__ __forceinline__ int phase(int j) const { return (tile_count + j) / kStages & 1; }
  __device__ __forceinline__ int rope_stage(int j) const { return (tile_count + j) % kRopeStages; }
  __device__ __forceinline__ int rope_phase(int j) const {
    return (tile_count + j) / kRopeStages & 1;
  }

  // S[64 rows, 64 tokens] = Q Kᵀ for tile j, left running. 36 wgmma, four for each piece.
  template <class Scores>
  __device__ __forceinline__ void start_scores(int j, Scores& s) {
    auto thread_mma = scores_mma.get_thread_slice(thread);
    scores_mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
    fence_fragment(s);
    CUTE_UNROLL
    for (int g = 0; g < 3; ++g) {
      const int half = g ^ mine;
      if (g < 2) {
        Barrier::wait(&shared.kv_full[stage(j)][half], phase(j));
      } else {
        Barrier::wait(&shared.rope_full[rope_stage(j)], rope_phase(j));
      }
      cute::warpgroup_arrive();
      CUTE_UNROLL
      for (int i = 0; i < (g < 2 ? kPiecesHalf : 1); ++i) {
        const int piece = g < 2 ? half * kPiecesHalf + i : kPieces - 1;
        const T* tokens =
            g < 2 ? shared.kv[stage(j)] + piece * kPieceElements : shared.rope[rope_stage(j)];
        auto q = cute::make_tensor(cute::make_smem_ptr(shared.q + piece * kPieceElements),
                                   typename Tiles<T>::Piece{});  // [64 rows, 64]
        auto k = cute::make_tensor(cute::make_smem_ptr(tokens),
                                   typename Tiles<T>::Piece{});  // [64 tokens, 64]
        gemm_k_loop(scores_mma, thread_mma.partition_fragment_A(q),
                    thread_mma.partition_fragment_B(k), s);
      }
    }
    cute::warpgroup_commit_batch();
  }

  // P_j to where the tile's RoPE part was, in the 128-byte swizzle: both products read it there.
  template <class Scores>
  __device__ __forceinline__ void publish(int j, const Scores& s, const RowPair& max,
                                          const RowPair& alpha) {
    cutlass::NumericArrayConverter<T, float, 8> convert;
    const int lane = thread % 32;
    const int matrix_row = thread / 32 * 16 + lane % 16;
    T* p_row = shared.rope[rope_stage(j)] + matrix_row * kTokens;
    CUTE_UNROLL
    for (int k = 0; k < kTokens / 16; ++k) {
      const int chunk = (k * 2 + lane / 16) ^ (matrix_row % 8);
      const auto part = convert({s(k * 8), s(k * 8 + 1), s(k * 8 + 2), s(k * 8 + 3), s(k * 8 + 4),
                                 s(k * 8 + 5), s(k * 8 + 6), s(k * 8 + 7)});
      const auto* from = reinterpret_cast<const uint32_t*>(&part);
      cute::SM90_U32x4_STSM_N::copy(from[0], from[1], from[2], from[3],
                                    *reinterpret_cast<cute::uint128_t*>(p_row + chunk * 8));
    }
    if (lane % 4 == 0) {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        shared.row_max[mine][row + 8 * h] = max.v[h];
        shared.row_alpha[mine][row + 8 * h] = alpha.v[h];
      }
    }
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::arrive(kConsumerThreads, kProbabilitiesEven + mine);
    cutlass::arch::NamedBarrier::sync(kConsumerThreads / 2, kOwn + mine);
  }

  // O += P_j V_j, left running.
  template <class Output>
  __device__ __forceinline__ void start_output(int j, Output& o) {
    auto v = cute::make_tensor(
        cute::make_smem_ptr(shared.kv[stage(j)] + mine * kPiecesHalf * kPieceElements),
        typename Tiles<T>::ValueHalf{});  // [256 columns, 64 tokens]
    auto pr = cute::make_tensor(cute::make_smem_ptr(shared.rope[rope_stage(j)]),
                                typename Tiles<T>::Piece{});  // [64 rows, 64 tokens]
    auto thread_mma = output_mma.get_thread_slice(thread);
    fence_fragment(o);
    cute::warpgroup_arrive();
    gemm_k_loop(output_mma, thread_mma.partition_fragment_A(pr), thread_mma.partition_fragment_B(v),
                o);
    cute::warpgroup_commit_batch();
  }

  // This consumer is through with tile j.
  __device__ __forceinline__ void release_tile(int j) {
    uint64_t* empty = &shared.kv_empty[stage(j)][mine];
    release(empty);
    if (kPair && thread % 32 == 0) Barrier::arrive(empty, blockIdx.x % 2 ^ 1, 1);
    release(&shared.rope_empty[rope_stage(j)]);
  }

  // A tile whose scores the other consumer computes: take over its maximum, then O += P_j V_j, left
  // running.
  template <class Output>
  __device__ __forceinline__ void start_other_tile(int j, OnlineSoftmax& softmax, Output& o) {
    cutlass::arch::NamedBarrier::sync(kConsumerThreads, kProbabilitiesEven + (mine ^ 1));
    RowPair max, alpha;
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      max.v[h] = shared.row_max[mine ^ 1][row + 8 * h];
      alpha.v[h] = shared.row_alpha[mine ^ 1][row + 8 * h];
    }
    softmax.follow(max, alpha);
    if (any_rescale(alpha)) rescale(o, alpha);
    Barrier::wait(&shared.kv_full[stage(j)][mine], phase(j));
    start_output(j, o);
  }

  // region: own_tile
  // First the product with the other's tile before this one, so that its place comes free and the
  // producers, whose conversion takes longest, can fill it; then a tile whose scores are mine.
  template <bool kFirst, class Mask, class Output, class Scores>
  __device__ __forceinline__ void own_tile(int tiles, int j, const Mask& mask,
                                           OnlineSoftmax& softmax, Output& o, Scores& s) {
    if (!kFirst) start_other_tile(j - 1, softmax, o);
    start_scores(j, s);
    if (!kFirst) {
      cute::warpgroup_wait<1>();
      release_tile(j - 1);
    }
    cute::warpgroup_wait<0>();
    fence_fragment(s);
    fence_fragment(o);
    cutlass::arch::NamedBarrier::sync(kConsumerThreads / 2, kOwn + mine);  // P goes where RoPE is
    mask.apply(j, shared.valid[rope_stage(j)], s);
    if (j + 2 >= tiles) release(&shared.q_empty);

    const RowPair alpha = softmax.step(s, p.scale_log2);
    publish(j, s, softmax.max, alpha);
    if (any_rescale(alpha)) rescale(o, alpha);
    start_output(j, o);
    cute::warpgroup_wait<0>();
    fence_fragment(o);
    release_tile(j);
  }
  // endregion: own_tile

  __device__ __forceinline__ void run_item(const typename Source::Item& work) {
    using namespace cute;
    auto o = partition_fragment_C(output_mma, Shape<Int<kRows>, Int<kHalfV>>{});   // [64, 256]
    auto s = partition_fragment_C(scores_mma, Shape<Int<kRows>, Int<kTokens>>{});  // [64, 64]
    clear(o);
    output_mma.accumulate_ = GMMA::ScaleOut::One;
    OnlineSoftmax softmax;
    const typename Source::Mask mask(p, work, row);
    const int n = work.tiles;

    // region: consumer_loop
    // Consumer 0 opens with tile 0; then each takes the other's tile and its own, in turn.
    if (n <= mine && n > 0) release(&shared.q_empty);

    if (mine == 0 && n > 0) {
      // Q arrives with the RoPE part of the first tile.
      Barrier::wait(&shared.rope_full[rope_stage(0)], rope_phase(0));
      own_tile<true>(n, 0, mask, softmax, o, s);
    }
    int j = 2 - mine;
    for (; j < n; j += 2) own_tile<false>(n, j, mask, softmax, o, s);
    if (j == n) {  // the last tile was the other's
      start_other_tile(n - 1, softmax, o);
      cute::warpgroup_wait<0>();
      fence_fragment(o);
      release_tile(n - 1);
    }
    // endregion: consumer_loop

    const RowPair own_sum = softmax.reduced_sum();
    if (thread % 4 == 0) {
      for (int h = 0; h < 2; ++h) shared.row_sum[sums_parity][mine][row + 8 * h] = own_sum.v[h];
    }
    cutlass::arch::NamedBarrier::sync(kConsumerThreads, kRowSums);
    RowPair total;
    for (int h = 0; h < 2; ++h) {
      total.v[h] = own_sum.v[h] + shared.row_sum[sums_parity][mine ^ 1][row + 8 * h];
    }
    store_result<T, kParts>(p, work, mine, row, o, softmax.max, total);
    sums_parity ^= 1;
    tile_count += n;
  }
};

// All CTAs of the cluster.
__device__ __forceinline__ void meet() {
  cute::cluster_arrive();
  cute::cluster_wait();
}

template <class T, class Source, bool kPair, Parts kParts>
__device__ __forceinline__ void consume(const KernelParams& p, SharedStorage<T>& shared,
                                        unsigned* meeting, int mine) {
  Consumer<T, Source, kPair, kParts> consumer{p, shared, mine};
  if constexpr (Source::kPaged) {
    PagedWorkList list(p);
    for (PagedItem work; list.next(work);) consumer.run_item(work);
  } else {
    for (int number = blockIdx.x; number < p.items; number += gridDim.x) {
      consumer.run_item(work_item(p, number));
    }
  }
  if (kPair) return meet();  // the neighbour may still let go of tiles here
  if (Source::kPaged || kParts == Parts::kWhole || meeting == nullptr) return;
  meet_in_unit(p, meeting);
  // Where Q and tiles of K were.
  static_assert(sizeof(MergeStorage) <= sizeof(SharedStorage<T>::q) + sizeof(SharedStorage<T>::kv));
  merge_share<T>(p, reinterpret_cast<MergeStorage&>(shared), blockIdx.x,
                 threadIdx.x - kProducerThreads);
}

template <class T, class Source, template <class, class> class Producer, Parts kParts>
__global__ void __launch_bounds__(kThreads, 1)
    sparse_decode_kernel(const __grid_constant__ KernelParams p, unsigned* meeting) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<SharedStorage<T>*>(raw);
  constexpr bool kPair = Producer<T, Source>::kIsPair;
  if (threadIdx.x == 0) {
    Barrier::init(&shared.q_empty, 2 * kWarps);  // of the consumers
    for (int s = 0; s < kStages; ++s) {
      for (int h = 0; h < kHalves; ++h) {
        Barrier::init(&shared.kv_full[s][h], kWarps);  // of the producer of this half
        // of its consumer, and of the neighbour's
        Barrier::init(&shared.kv_empty[s][h], kPair ? 2 * kWarps : kWarps);
      }
    }
    for (int s = 0; s < kRopeStages; ++s) {
      Barrier::init(&shared.rope_full[s], 2 * kWarps);
      Barrier::init(&shared.rope_empty[s], 2 * kWarps);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  if (kPair) meet();
  // So far the kernel before may still be at work; what comes now needs its results. What follows
  // this one may begin likewise, as soon as there is room.
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();

  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup < 2) {
    cutlass::arch::warpgroup_reg_dealloc<kRegistersProducer>();
    Producer<T, Source>{p, shared}.run();
    if (kParts == Parts::kSplit && meeting != nullptr) {
      cutlass::arch::NamedBarrier::arrive(kThreads, kMeeting);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<kRegistersConsumer>();
    consume<T, Source, kPair, kParts>(p, shared, meeting, warpgroup - 2);
  }
}

}  // namespace flashmla::sm90::sparse_decode
