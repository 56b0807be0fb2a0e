// Gradients of dense attention, for sm_90a. With S = q Kᵀ · scale and P = exp(S - lse):
//
//   dV = Pᵀ dO;   dS = P ∘ (dO Vᵀ - delta);   dK = scale · dSᵀ q;   dQ = scale · dS K
//
// A CTA keeps 128 keys and their values and runs over the queries that see them, 64 at a time. Of
// its three warpgroups one fetches by TMA. The other two own 64 keys each: their dK and dV stay in
// registers, 320 columns of float32, which is why the tile of queries is no larger. Everything is
// computed transposed (Sᵀ = K qᵀ), so that Pᵀ and dSᵀ are in registers what the products
// with dO and q take as they are. Only dQ needs the keys of both: dSᵀ goes to shared memory,
// each consumer takes some of dQ's columns and adds them to float32 sums in memory. The CTA that is
// the last to add to a head makes dQ of its sums.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "../../common/reduce.cuh"
#include "../dense_prefill/rows.cuh"
#include "config.cuh"

namespace flashmla::sm90::dense_prefill_backward {

using dense_prefill::to_operand;

template <class T, int kDimQk>
__device__ __forceinline__ void produce(const KernelParams& p, SharedStorage<T, kDimQk>& shared,
                                        const Work& work, const CUtensorMap& q_map,
                                        const CUtensorMap& k_map, const CUtensorMap& v_map,
                                        const CUtensorMap& d_out_map) {
  constexpr auto kOnce = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);
  constexpr auto kAgain = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);
  constexpr int kPiece = kQueries * kPieceCols;
  const int key = work.first_key + work.row;
  Barrier::arrive_and_expect_tx(&shared.kv_full, sizeof(shared.k) + sizeof(shared.v));
  for (int i = 0; i < kPiecesQk<kDimQk>; ++i) {
    cute::SM90_TMA_LOAD_3D::copy(&k_map, &shared.kv_full, kOnce, shared.k[i], i * kPieceCols,
                                 work.head, key);
  }
  for (int i = 0; i < kPiecesV; ++i) {
    cute::SM90_TMA_LOAD_3D::copy(&v_map, &shared.kv_full, kOnce, shared.v[i], i * kPieceCols,
                                 work.head, key);
  }
  int count = 0;
  for (int h = work.head * p.group; h < (work.head + 1) * p.group; ++h) {
    for (int m = work.first_tile; m < work.query_tiles; ++m, ++count) {
      const int stage = count % kStages;
      const uint32_t free = (count / kStages & 1) ^ 1;
      const int query = work.first_query + m * kQueries;
      const int64_t at = (static_cast<int64_t>(h) * p.tiles + work.tile_base() + m) * kQueries;

      uint64_t* full = &shared.q_full[stage];
      Barrier::wait(&shared.q_empty[stage], free);
      Barrier::arrive_and_expect_tx(full, sizeof(shared.q[0]) + sizeof(shared.lse2[0]));
      for (int i = 0; i < kPiecesQk<kDimQk>; ++i) {
        cute::SM90_TMA_LOAD_3D::copy(&q_map, full, kAgain, shared.q[stage] + i * kPiece,
                                     i * kPieceCols, h, query);
      }
      cute::SM90_BULK_COPY_G2S::copy(p.lse2 + at, full, shared.lse2[stage],
                                     static_cast<int32_t>(sizeof(shared.lse2[0])));

      full = &shared.d_out_full[stage];
      Barrier::wait(&shared.d_out_empty[stage], free);
      Barrier::arrive_and_expect_tx(full, sizeof(shared.d_out[0]) + sizeof(shared.delta[0]));
      for (int i = 0; i < kPiecesV; ++i) {
        cute::SM90_TMA_LOAD_3D::copy(&d_out_map, full, kAgain, shared.d_out[stage] + i * kPiece,
                                     i * kPieceCols, h, query);
      }
      cute::SM90_BULK_COPY_G2S::copy(p.delta + at, full, shared.delta[stage],
                                     static_cast<int32_t>(sizeof(shared.delta[0])));
    }
  }
}

// Adds to the sums in memory what one consumer hands over. A warp that does nothing else: neither
// memory that is slow to add nor, deterministic, other blocks whose turn it is hold up a consumer.
template <class T, int kDimQk, bool kDeterministic>
struct Adder {
  static constexpr int kPieces = kPiecesQk<kDimQk>;
  static constexpr int kPiece = kQueries * kPieceCols;

  const KernelParams& p;
  const Work& work;
  SharedStorage<T, kDimQk>& shared;
  const int index;      // of the consumer
  int* owed = nullptr;  // the counter of the turn that is to be passed on
  int patience = 1 << 22;

  // One thread's work: the blocks of keys take turns at adding to a tile. Causal, the next one
  // comes two tiles behind, and a turn is passed on only before the next addition, when this one is
  // done.
  __device__ __forceinline__ void await_turn(int64_t tile, int m) {
    pass_turn();
    owed = p.counters + tile * kCounters + index;
    const int mine = work.turn(m, p.causal);
    // Prefix sums that lie can make two sequences wait for each other: not for ever.
    while (*const_cast<volatile int*>(owed) != mine && patience > 0) --patience;
    __threadfence();
  }
  __device__ __forceinline__ void pass_turn() {
    if (owed == nullptr) return;
    wait_until_added();
    __threadfence();
    atomicAdd(owed, 1);
    owed = nullptr;
  }

  __device__ __forceinline__ void run() {
    const bool one_thread = threadIdx.x % 32 == 0;
    for (int h = work.head * p.group; h < (work.head + 1) * p.group; ++h) {
      const int64_t tiles = static_cast<int64_t>(h) * p.tiles + work.tile_base();
      for (int m = work.first_tile; m < work.query_tiles; ++m) {
        const Share<kPieces> share(m, index);
        for (int i = 0; i < share.count; ++i) {
          cutlass::arch::NamedBarrier::arrive(128 + 32, kFree + index);
          cutlass::arch::NamedBarrier::sync(128 + 32, kFilled + index);
          if (kDeterministic && one_thread && i == 0) await_turn(tiles + m, m);
          if (one_thread) {
            const int64_t at = (tiles + m) * kPieces + share.first + i;
            add_to_global_async(p.dq_sums + at * kPiece, shared.dq[index], kPiece * sizeof(float));
            cute::tma_store_arrive();
            cute::tma_store_wait<0>();
          }
          __syncwarp();
        }
        if (kDeterministic && one_thread && !p.causal) pass_turn();
      }
    }
    if (one_thread) {
      if (kDeterministic) pass_turn();
      wait_until_added();
      __threadfence();
    }
    __syncwarp();
    if (work.queries > 0) {
      cutlass::arch::NamedBarrier::arrive(kConsumers * 128 + kAdders, kBlockDone);
    }
  }
};

template <class T, int kDimQk, bool kHasAdder>
struct Consumer {
  static constexpr int kPieces = kPiecesQk<kDimQk>;
  static constexpr bool kBothAtOnce = kDimQk == 128;         // two products: there are registers
  using Rows64 = SwizzledTile<T, 64>;                        // [64 keys or queries, 64]
  using QueriesT = TransposedTile<T, kQueries, kDimQk>;      // [d_qk, 64 queries]
  using DOutT = TransposedTile<T, kQueries, kDimV>;          // [128, 64 queries]
  using BlockT = TransposedTile<T, kBlockKeys, kPieceCols>;  // [64, 128 keys]

  const KernelParams& p;
  const Work& work;
  SharedStorage<T, kDimQk>& shared;
  const int index;  // 0 or 1
  const int thread = threadIdx.x % 128;
  const int row = thread / 32 * 16 + thread % 32 / 4;  // of the 64 keys; and row + 8

  decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<T, T, float, cute::Shape<cute::_64, cute::_64, cute::_64>>()))
      scores_mma;  // 64 keys x 64 queries, over d
  decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<T, T, float, cute::Shape<cute::_64, cute::_128, cute::_64>,
                                 Major::K, Major::MN>())) dv_mma;  // 64 keys x 128, over queries
  decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<T, T, float, cute::Shape<cute::_64, cute::Int<kDimQk>, cute::_64>,
                                 Major::K,
                                 Major::MN>())) dk_mma;  // 64 keys x d_qk, over queries
  decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<T, T, float, cute::Shape<cute::_64, cute::_64, cute::_64>,
                                 Major::MN, Major::MN>())) dq_mma;  // 64 queries x 64, over keys

  __device__ __forceinline__ void release(uint64_t* barrier) const {
    if (thread % 32 == 0) Barrier::arrive(barrier);
  }
  __device__ __forceinline__ void sync_own(uint32_t id) const {
    cutlass::arch::NamedBarrier::sync(128, id + index);
  }

  // My 64 keys against a tile of queries, left running: Kᵀ q over d_qk, or Vᵀ dO over 128.
  template <int kCount, class Fragment>
  __device__ __forceinline__ void start_scores(const T (*keys)[kBlockKeys * kPieceCols],
                                               const T* queries, Fragment& s) {
    auto thread_mma = scores_mma.get_thread_slice(thread);
    scores_mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
    fence_fragment(s);
    cute::warpgroup_arrive();
    CUTE_UNROLL
    for (int i = 0; i < kCount; ++i) {
      auto a = cute::make_tensor(
          cute::make_smem_ptr(const_cast<T*>(keys[i]) + index * kKeys * kPieceCols), Rows64{});
      auto b = cute::make_tensor(
          cute::make_smem_ptr(const_cast<T*>(queries) + i * kQueries * kPieceCols), Rows64{});
      gemm_k_loop(scores_mma, thread_mma.partition_fragment_A(a),
                  thread_mma.partition_fragment_B(b), s);
    }
    cute::warpgroup_commit_batch();
  }

  // Rows past a sequence's end may hold anything, NaN included, and 0 · NaN is NaN. Each consumer
  // clears them for itself, with what the other writes as well: zeros over zeros.
  template <int kCount, int kRowsOfPiece>
  __device__ __forceinline__ void clear_rows(T* pieces, int first) const {
    for (int n = thread; n < (kRowsOfPiece - first) * kCount * 8; n += 128) {
      const int chunk = n % 8, piece = n / 8 % kCount, r = first + n / 8 / kCount;
      T* to = pieces + (piece * kRowsOfPiece + r) * kPieceCols;
      reinterpret_cast<uint4*>(to)[chunk] = make_uint4(0, 0, 0, 0);
    }
    cutlass::arch::fence_view_async_shared();
    sync_own(kCleared);
  }

  // Whether a key of mine, `row` or `row + 8`, is seen by a query of tile m.
  __device__ __forceinline__ bool visible(int m, int i) const {
    const int key = work.row + index * kKeys + row + 8 * row_half(i);
    const int query = m * kQueries + (i / 4) * 8 + thread % 4 * 2 + (i & 1);
    return key < work.keys && query < work.queries &&
           (!p.causal || key <= work.keys - work.queries + query);
  }
  __device__ __forceinline__ bool needs_mask(int m) const {
    const int first = work.row + index * kKeys;
    return first + kKeys > work.keys || (m + 1) * kQueries > work.queries ||
           (p.causal && first + kKeys - 1 > work.keys - work.queries + m * kQueries);
  }

  // Two neighbouring queries' numbers at a time, each for both of a thread's keys.
  __device__ __forceinline__ float2 of_queries(const float (&values)[kQueries], int i) const {
    return *reinterpret_cast<const float2*>(&values[(i / 4) * 8 + thread % 4 * 2]);
  }

  // Pᵀ = exp2(Sᵀ · scale - lse)
  template <class Fragment>
  __device__ __forceinline__ void exponentiate(Fragment& s, int stage, int m) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(s); i += 4) {
      const float2 lse2 = of_queries(shared.lse2[stage], i);
      CUTE_UNROLL
      for (int e = 0; e < 4; ++e) {
        s(i + e) = exp2f(fmaf(s(i + e), p.scale_log2, -(e & 1 ? lse2.y : lse2.x)));
      }
    }
    if (needs_mask(m)) {
      CUTE_UNROLL
      for (int i = 0; i < cute::size(s); ++i) {
        if (!visible(m, i)) s(i) = 0.f;
      }
    }
  }

  // dSᵀ = Pᵀ ∘ (dPᵀ - delta), where P is 0 also where dP is garbage.
  template <class Fragment, class Probabilities>
  __device__ __forceinline__ void differentiate(Fragment& dp, const Probabilities& pr, int stage,
                                                int m) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(dp); i += 4) {
      const float2 delta = of_queries(shared.delta[stage], i);
      CUTE_UNROLL
      for (int e = 0; e < 4; ++e) {
        dp(i + e) = static_cast<float>(pr(i + e)) * (dp(i + e) - (e & 1 ? delta.y : delta.x));
      }
    }
    if (needs_mask(m)) {
      CUTE_UNROLL
      for (int i = 0; i < cute::size(dp); ++i) {
        if (!visible(m, i)) dp(i) = 0.f;
      }
    }
  }

  // My 64 keys of dSᵀ to shared memory, [64 keys, 64 queries] in the 128-byte swizzle.
  template <class Operand>
  __device__ __forceinline__ void publish(int parity, const Operand& ds) {
    const int lane = thread % 32;
    const int key = thread / 32 * 16 + lane % 16;
    T* tile = shared.ds[parity] + (index * kKeys + key) * kQueries;
    CUTE_UNROLL
    for (int k = 0; k < kQueries / 16; ++k) {
      const int chunk = (k * 2 + lane / 16) ^ (key % 8);
      auto* to = reinterpret_cast<cute::uint128_t*>(tile + chunk * 8);
      const auto* from = reinterpret_cast<const uint32_t*>(&ds(k * 8));
      cute::SM90_U32x4_STSM_N::copy(from[0], from[1], from[2], from[3], *to);
    }
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    release(&shared.ds_full[parity]);
  }

  // dQ[64 queries, 64 columns of a piece] = dS K over the block's 128 keys, left running.
  template <class Fragment>
  __device__ __forceinline__ void start_dq(int parity, int piece, Fragment& dq) {
    auto thread_mma = dq_mma.get_thread_slice(thread);
    dq_mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
    auto ds = cute::make_tensor(cute::make_smem_ptr(shared.ds[parity]), BlockT{});
    auto k = cute::make_tensor(cute::make_smem_ptr(shared.k[piece]), BlockT{});
    fence_fragment(dq);
    cute::warpgroup_arrive();
    gemm_k_loop(dq_mma, thread_mma.partition_fragment_A(ds), thread_mma.partition_fragment_B(k),
                dq);
    cute::warpgroup_commit_batch();
  }

  // Adds a piece of dQ to the sums, whose order is the accumulator's: a warp's 512 bytes side by
  // side. Or leaves it to the warp that adds for this consumer.
  template <class Fragment>
  __device__ __forceinline__ void add_dq(int64_t tile, int piece, const Fragment& dq) const {
    float4* to;
    if constexpr (kHasAdder) {
      cutlass::arch::NamedBarrier::sync(128 + 32, kFree + index);
      to = reinterpret_cast<float4*>(shared.dq[index]) + thread;
    } else {
      const int64_t at = (tile * kPieces + piece) * kQueries * kPieceCols;
      to = reinterpret_cast<float4*>(p.dq_sums + at) + thread;
    }
    CUTE_UNROLL
    for (int i = 0; i < cute::size(dq); i += 4) {
      const float4 part = make_float4(dq(i), dq(i + 1), dq(i + 2), dq(i + 3));
      if constexpr (kHasAdder) {
        to[i / 4 * 128] = part;
      } else {
        add_to_global(to + i / 4 * 128, part);
      }
    }
    if constexpr (kHasAdder) {
      cutlass::arch::fence_view_async_shared();
      cutlass::arch::NamedBarrier::arrive(128 + 32, kFilled + index);
    }
  }

  // After a block's last addition: the last block of all turns the sums into dQ, each consumer
  // every other tile.
  __device__ __forceinline__ void finish() {
    if constexpr (!kHasAdder) __threadfence();
    cutlass::arch::NamedBarrier::sync(kConsumers * 128 + (kHasAdder ? kAdders : 0), kBlockDone);
    const int64_t first = static_cast<int64_t>(work.head) * p.group * p.tiles + work.tile_base();
    if (index == 0 && thread == 0) {
      __threadfence();
      const int before = atomicAdd(p.counters + first * kCounters + kConsumers, 1);
      shared.head_done = before == (work.keys - 1) / kBlockKeys;
      __threadfence();
    }
    cutlass::arch::NamedBarrier::sync(kConsumers * 128, kBlockDone);
    if (!shared.head_done) return;
    const int h_q = p.h_kv * p.group;
    const float scale[2] = {p.scale, p.scale};
    for (int h = 0; h < p.group; ++h) {
      for (int m = index; m < work.query_tiles; m += kConsumers) {
        auto dq = cute::make_tensor<float>(cute::Int<kDimQk / 2>{});
        const int64_t tile = first + static_cast<int64_t>(h) * p.tiles + m;
        const auto* from = reinterpret_cast<const float4*>(p.dq_sums + tile * kQueries * kDimQk);
        CUTE_UNROLL
        for (int i = 0; i < kDimQk / 2; i += 4) {
          const float4 x = __ldcg(from + i / 4 * 128 + thread);
          dq(i) = x.x;
          dq(i + 1) = x.y;
          dq(i + 2) = x.z;
          dq(i + 3) = x.w;
        }
        const int query = m * kQueries + row;
        const bool exists[2] = {query < work.queries, query + 8 < work.queries};
        const int64_t at = (static_cast<int64_t>(work.first_query) + query) * h_q +
                           static_cast<int64_t>(work.head) * p.group + h;
        dense_prefill::store_rows<kDimQk>(static_cast<T*>(p.dq) + at * kDimQk,
                                          int64_t{8} * h_q * kDimQk, dq, scale, exists);
      }
    }
  }

  __device__ __forceinline__ void run() {
    using namespace cute;
    auto dk = partition_fragment_C(dk_mma, Shape<Int<kKeys>, Int<kDimQk>>{});  // [64 keys, d_qk]
    auto dv = partition_fragment_C(dv_mma, Shape<Int<kKeys>, Int<kDimV>>{});   // [64 keys, 128]
    clear(dk);
    clear(dv);
    dk_mma.accumulate_ = GMMA::ScaleOut::One;
    dv_mma.accumulate_ = GMMA::ScaleOut::One;

    Barrier::wait(&shared.kv_full, 0);
    if (work.row + kBlockKeys > work.keys) {
      clear_rows<kPieces, kBlockKeys>(shared.k[0], work.keys - work.row);
    }
    int count = 0;
    Owed owed{-1, 0, 0};
    for (int h = work.head * p.group; h < (work.head + 1) * p.group; ++h) {
      const int64_t tiles = static_cast<int64_t>(h) * p.tiles + work.tile_base();
      for (int m = work.first_tile; m < work.query_tiles; ++m, ++count) {
        run_tile(count, m, owed, dk, dv);
        owed = {count, m, tiles + m};
      }
    }
    if (count > 0) run_dq(owed);
    const int key = work.row + index * kKeys + row;
    const int64_t first = (static_cast<int64_t>(work.first_key) + key) * p.h_kv + work.head;
    const bool exists[2] = {key < work.keys, key + 8 < work.keys};
    const float one[2] = {1.f, 1.f}, scale[2] = {p.scale, p.scale};
    dense_prefill::store_rows<kDimQk>(static_cast<T*>(p.dk) + first * kDimQk,
                                      int64_t{8} * p.h_kv * kDimQk, dk, scale, exists);
    dense_prefill::store_rows<kDimV>(static_cast<T*>(p.dv) + first * kDimV,
                                     int64_t{8} * p.h_kv * kDimV, dv, one, exists);
    if (work.queries > 0) finish();
  }

  // A tile whose dQ has not been computed yet. It is one behind, so that the consumers need not be
  // at the same place: while one takes exponentials, the other has products in the queue.
  struct Owed {
    int count, m;
    int64_t tile;
    __device__ __forceinline__ int parity() const { return count & 1; }
    __device__ __forceinline__ uint32_t phase() const { return count / 2 & 1; }
  };

  // region: backward_tile
  template <class DK, class DV>
  __device__ __forceinline__ void run_tile(int count, int m, const Owed& owed, DK& dk, DV& dv) {
    using namespace cute;
    const int stage = count % kStages, parity = count % 2;
    const uint32_t phase = count / 2 & 1;
    static_assert(kStages == 2, "stages and places of dS are counted alike");
    const int valid = work.queries - m * kQueries;
    // Sᵀ, then Pᵀ: [keys, queries]
    auto s = partition_fragment_C(scores_mma, Shape<Int<kKeys>, Int<kQueries>>{});
    auto pr = make_tensor<T>(Layout<Shape<Shape<_2, _2, _2>, _1, _4>>{});  // [64 keys, 64 queries]
    auto ds = make_tensor<T>(Layout<Shape<Shape<_2, _2, _2>, _1, _4>>{});

    Barrier::wait(&shared.q_full[stage], phase);
    if (valid < kQueries) clear_rows<kPieces, kQueries>(shared.q[stage], valid);
    start_scores<kPieces>(shared.k, shared.q[stage], s);
    auto dp = partition_fragment_C(scores_mma, Shape<Int<kKeys>, Int<kQueries>>{});
    if constexpr (kBothAtOnce) {
      Barrier::wait(&shared.d_out_full[stage], phase);
      if (valid < kQueries) clear_rows<kPiecesV, kQueries>(shared.d_out[stage], valid);
      start_scores<kPiecesV>(shared.v, shared.d_out[stage], dp);
      warpgroup_wait<1>();
    } else {
      warpgroup_wait<0>();
    }
    fence_fragment(s);
    exponentiate(s, stage, m);
    to_operand<0>(s, pr);

    if constexpr (!kBothAtOnce) {
      Barrier::wait(&shared.d_out_full[stage], phase);
      if (valid < kQueries) clear_rows<kPiecesV, kQueries>(shared.d_out[stage], valid);
      start_scores<kPiecesV>(shared.v, shared.d_out[stage], dp);
    }
    // dV = Pᵀ dO runs under the arithmetic for dS.
    auto d_out = make_tensor(make_smem_ptr(shared.d_out[stage]), DOutT{});
    fence_fragment(dv);
    warpgroup_arrive();
    gemm_k_loop(dv_mma, pr, dv_mma.get_thread_slice(thread).partition_fragment_B(d_out), dv);
    warpgroup_commit_batch();
    warpgroup_wait<1>();
    fence_fragment(dp);
    differentiate(dp, pr, stage, m);
    to_operand<0>(dp, ds);
    Barrier::wait(&shared.ds_empty[parity], phase ^ 1);
    publish(parity, ds);
    warpgroup_wait<0>();
    fence_fragment(dv);
    release(&shared.d_out_empty[stage]);

    // dK = dSᵀ q, and dQ of the tile before: what the other consumer gives to it is there.
    auto q = make_tensor(make_smem_ptr(shared.q[stage]), QueriesT{});
    fence_fragment(dk);
    warpgroup_arrive();
    gemm_k_loop(dk_mma, ds, dk_mma.get_thread_slice(thread).partition_fragment_B(q), dk);
    warpgroup_commit_batch();
    if constexpr (kBothAtOnce) {
      if (count > 0) Barrier::wait(&shared.ds_full[owed.parity()], owed.phase());
      const Share<kPieces> share(owed.m, index);
      auto dq = partition_fragment_C(dq_mma, Shape<Int<kQueries>, Int<kPieceCols>>{});
      start_dq(1 - parity, share.first, dq);  // of nothing before the first tile: not used
      warpgroup_wait<1>();
      fence_fragment(dk);
      release(&shared.q_empty[stage]);
      warpgroup_wait<0>();
      fence_fragment(dq);
      if (count > 0) finish_piece(owed, share.first, true, dq);
    } else {
      warpgroup_wait<0>();
      fence_fragment(dk);
      release(&shared.q_empty[stage]);
      if (count > 0) run_dq(owed);
    }
  }

  // dQ = dS K of a tile, my pieces of 64 columns one after the other.
  __device__ __forceinline__ void run_dq(const Owed& owed) {
    using namespace cute;
    Barrier::wait(&shared.ds_full[owed.parity()], owed.phase());
    const Share<kPieces> share(owed.m, index);
    auto dq = partition_fragment_C(dq_mma, Shape<Int<kQueries>, Int<kPieceCols>>{});
    for (int i = 0; i < share.count; ++i) {
      start_dq(owed.parity(), share.first + i, dq);
      warpgroup_wait<0>();
      fence_fragment(dq);
      finish_piece(owed, share.first + i, i + 1 == share.count, dq);
    }
  }

  template <class Fragment>
  __device__ __forceinline__ void finish_piece(const Owed& owed, int piece, bool last,
                                               const Fragment& dq) const {
    if (last) release(&shared.ds_empty[owed.parity()]);
    add_dq(owed.tile, piece, dq);
  }
  // endregion: backward_tile
};

template <class T, int kDimQk, bool kDeterministic>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ KernelParams p,
                    const __grid_constant__ CUtensorMap q_map,
                    const __grid_constant__ CUtensorMap k_map,
                    const __grid_constant__ CUtensorMap v_map,
                    const __grid_constant__ CUtensorMap d_out_map) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<SharedStorage<T, kDimQk>*>(raw);
  // What a query costs in L2: its rows of Q and dO, and its float32 sums.
  const HeadSets sets{p.group * (kDimQk * 6 + kDimV * 2), kSetBytes};
  const Block block = dense_prefill::find_block(p.sequences, p.plan, blockIdx.x, p.h_kv, 1, sets);
  if (block.head < 0) return;
  const Work work(p, block, kDeterministic);
  if (threadIdx.x == 0) {
    Barrier::init(&shared.kv_full, 1);
    for (int i = 0; i < kStages; ++i) {
      Barrier::init(&shared.q_full[i], 1);
      Barrier::init(&shared.q_empty[i], 4 * kConsumers);  // one arrival a warp
      Barrier::init(&shared.d_out_full[i], 1);
      Barrier::init(&shared.d_out_empty[i], 4 * kConsumers);
      Barrier::init(&shared.ds_full[i], 4 * kConsumers);
      Barrier::init(&shared.ds_empty[i], 4 * kConsumers);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = cutlass::canonical_warp_group_idx();
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<24>();
    const int warp = threadIdx.x / 32;
    if (threadIdx.x == 0) produce<T, kDimQk>(p, shared, work, q_map, k_map, v_map, d_out_map);
    if (kHasAdders<kDimQk, kDeterministic> && (warp == 1 || warp == 2)) {
      Adder<T, kDimQk, kDeterministic>{p, work, shared, warp - 1}.run();
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<240>();
    Consumer<T, kDimQk, kHasAdders<kDimQk, kDeterministic>>{p, work, shared, warpgroup - 1}.run();
  }
}

}  // namespace flashmla::sm90::dense_prefill_backward
