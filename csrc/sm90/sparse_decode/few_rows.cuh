// Decode over the FP8 cache for up to 32 query rows a request, where memory is the limit. Both
// products have their operands exchanged,
//   Sᵀ[64 tokens, rows] = K Qᵀ   and   Oᵀ[512, rows] += Vᵀ Pᵀ,
// so that the many tokens and columns fill the tensor cores' 64 rows, and the few query rows their
// other side. K and V are then operands from registers: a warp reads codes as they came from the
// cache, converts them there, and nothing converted is ever stored. Tiles of 64 tokens come whole,
// by one warp and the copy unit, where pages allow it; else four warps gather them. Each of the
// other warpgroups takes every second or third tile of a request for itself, with maximum, sums and
// output of its own; at the end they are added up.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "../../common/vote.cuh"
#include "few_rows_fetch.cuh"
#include "few_rows_mask.cuh"
#include "few_rows_operand.cuh"
#include "few_rows_result.cuh"

namespace flashmla::sm90::sparse_decode::few_rows {

// Four wgmma's worth of an operand in registers.
using Operand = decltype(cute::make_tensor<Element>(
    cute::Shape<cute::Shape<cute::_2, cute::_2, cute::_2>, cute::_1, cute::_4>{}));

template <int kN>
struct Tiles {
  using Piece = SwizzledTile<Element, kN>;  // [kN rows, 64 columns or tokens]
  using Scores = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 cute::Shape<cute::_64, cute::Int<kN>, cute::_64>, Major::K,
                                 Major::K>()));
};

// ---- the warpgroups that convert and multiply ----

template <class Source, int kN>
struct Consumer {
  using C = Config<kN>;
  static constexpr int kOwn = Rows<kN>::kCount;

  const KernelParams& p;
  SharedStorage<kN>& shared;
  const int warpgroup = threadIdx.x / 128;
  const int thread = threadIdx.x % 128;
  const int warp = thread / 32;
  const int lane = threadIdx.x % 32;
  const int quad_lane = lane % 4;
  const int token = warp * 16 + lane / 4;  // of a tile, and the one eight further on
  int tile_count = 0;
  Rows<kN> rows;  // of sums, this thread's tokens only

  typename Tiles<kN>::Scores mma;

  __device__ __forceinline__ void meet() const {
    cutlass::arch::NamedBarrier::sync(128, kWarpgroup + warpgroup);
  }
  __device__ __forceinline__ void meet_all() const {
    cutlass::arch::NamedBarrier::sync(C::kConsumerThreads, kConsumers);
  }

  // Q of an item, [kN rows, 576]; rows that do not exist become zeros.
  __device__ __forceinline__ void load_query(const UnitRows& from) {
    constexpr int kPairs = kDimQk / 2;
    const auto* q = static_cast<const Element*>(p.q) + from.offset;
    auto* to = reinterpret_cast<uint8_t*>(shared.q);
    CUTE_UNROLL
    for (int n = threadIdx.x; n < kN * kPairs; n += C::kConsumerThreads) {
      const int row = n / kPairs, pair = n % kPairs;
      uint32_t value = 0;
      if (from.first + row < from.count) {
        value = __ldg(reinterpret_cast<const uint32_t*>(q + (from.first + row) * p.q_stride_head) +
                      pair);
      }
      *reinterpret_cast<uint32_t*>(to + query_offset_bytes(kN, row, pair)) = value;
    }
    cutlass::arch::fence_view_async_shared();
    meet_all();
  }

  __device__ __forceinline__ auto query_piece(int piece) const {
    auto q = cute::make_tensor(cute::make_smem_ptr(shared.q + piece * C::kPieceElements),
                               typename Tiles<kN>::Piece{});  // [kN rows, 64]
    return mma.get_thread_slice(thread).partition_fragment_B(q);
  }

  // Sᵀ[64 tokens, kN] = K Qᵀ of a tile. here: this thread's first token.
  template <class Scores>
  __device__ __forceinline__ void multiply_keys(const uint8_t* here, const float4 (&scale)[2],
                                                Scores& s) {
    using namespace cute;
    const auto load = [&](int bytes, uint4(&to)[2]) {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        to[h] = *reinterpret_cast<const uint4*>(here + h * 8 * kTokenBytes + bytes);
      }
    };
    Operand a, next;
    auto part = partition_fragment_C(mma, Shape<_64, Int<kN>>{});
    {
      uint4 low[2], high[2];
      load(kRopeBytes + quad_lane * 32, low);
      load(kRopeBytes + quad_lane * 32 + 16, high);
      rope_to_operand(low, high, next);
    }
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    fence_fragment(s);
    fence_fragment(next);
    warpgroup_arrive();
    gemm_k_loop(mma, next, query_piece(kPieces - 1), s);
    warpgroup_commit_batch();

    uint4 codes[2];
    load(quad_lane * 32, codes);
    CUTE_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      keys_to_operand(codes, a);
      load(g * kGroupCols + quad_lane * 32 + 16, codes);
      mma.accumulate_ = GMMA::ScaleOut::Zero;
      fence_fragment(part);
      fence_fragment(a);
      warpgroup_arrive();
      gemm_k_loop(mma, a, query_piece(2 * g), part);
      warpgroup_commit_batch();
      if (g == 0) {  // the RoPE part is done, whose registers come next
        warpgroup_wait<1>();
        fence_fragment(s);
      }
      keys_to_operand(codes, next);
      if (g + 1 < kGroups) load((g + 1) * kGroupCols + quad_lane * 32, codes);
      fence_fragment(next);
      warpgroup_arrive();
      gemm_k_loop(mma, next, query_piece(2 * g + 1), part);
      warpgroup_commit_batch();
      warpgroup_wait<0>();
      fence_fragment(part);
      CUTE_UNROLL
      for (int i = 0; i < size(s); ++i) {
        s(i) = fmaf(reinterpret_cast<const float*>(&scale[i / 2 % 2])[g], part(i), s(i));
      }
    }
  }

  // What everything accumulated before must be multiplied by, once some score of the tile has
  // outgrown the maximum in use.
  template <class Scores, class Output>
  __device__ __forceinline__ void grow(const Scores& s, Output& o) {
    float m[kOwn];
    CUTE_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      m[i] = fmaxf(s(i / 2 * 4 + i % 2), s(i / 2 * 4 + 2 + i % 2));
      CUTE_UNROLL
      for (int d = 4; d < 32; d *= 2) m[i] = fmaxf(m[i], __shfl_xor_sync(0xffffffffu, m[i], d));
      if (lane < 4) shared.largest[warpgroup][warp][Rows<kN>::number(i)] = m[i];
    }
    meet();
    CUTE_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      CUTE_UNROLL
      for (int w = 0; w < kWarps; ++w) {
        m[i] = fmaxf(m[i], shared.largest[warpgroup][w][Rows<kN>::number(i)]);
      }
      if (!dense_decode::OnlineSoftmax::outgrows(m[i], rows.max[i], p.scale_log2)) continue;
      const float alpha = exp2f((rows.max[i] - m[i]) * p.scale_log2);
      rows.max[i] = m[i];
      rows.sum[i] *= alpha;
      CUTE_UNROLL
      for (int n = 0; n < kColumnTiles; ++n) {
        o(i / 2 * 4 + i % 2, n, 0) *= alpha;
        o(i / 2 * 4 + 2 + i % 2, n, 0) *= alpha;
      }
    }
  }

  // Pᵀ times the scales of each group of columns, to shared memory.
  template <class Scores>
  __device__ __forceinline__ void publish(const Scores& s, const float4 (&scale)[2]) {
    cutlass::NumericArrayConverter<Element, float, 2> convert;
    CUTE_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      store_transposed<kN>(shared.probabilities[warpgroup][g], [&](int i) {
        const float factor = reinterpret_cast<const float*>(&scale[row_half(i)])[g];
        const auto pair = convert({s(i) * factor, s(i + 1) * factor});
        return reinterpret_cast<const uint32_t&>(pair);
      });
    }
  }

  // Codes of what does not exist become zeros: whatever a place held, NaN too, would reach the
  // output in spite of a probability of zero.
  __device__ __forceinline__ void clear_missing(uint8_t* tile, const TileInfo& info) {
    CUTE_NO_UNROLL
    for (int n = thread; n < kTokens * 32; n += 128) {
      const int at = n / 32;
      if ((at < 32 ? info.exists[0] : info.exists[1]) >> (at % 32) & 1) continue;
      *reinterpret_cast<uint4*>(tile + at * kTokenBytes + n % 32 * 16) = make_uint4(0, 0, 0, 0);
    }
  }

  // Oᵀ[512, kN] += Vᵀ Pᵀ, 64 columns an instruction. Row r of column tile 2 g + i of the
  // operand is column 128 g + 4 (8 w + r % 8) + 2 i + r / 8 % 2 of V, w being its warp: a thread
  // finds its columns of two tiles in one word.
  template <class Output>
  __device__ __forceinline__ void multiply_values(const uint8_t* tile, Output& o) {
    using namespace cute;
    const uint8_t* here = tile + quad_lane * 2 * kTokenBytes + (warp * 8 + lane / 4) * 4;
    constexpr int kSteps = 8;  // of 16 tokens and 256 columns
    uint32_t codes[2][4];
    const auto load = [&](int step) {
      CUTE_UNROLL
      for (int g = 0; g < 2; ++g) {
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int at = step / 2 * 16 + i / 2 * 8 + i % 2;
          codes[g][i] = *reinterpret_cast<const uint32_t*>(here + at * kTokenBytes +
                                                           (step % 2 * 2 + g) * kGroupCols);
        }
      }
    };
    Operand a[2];
    load(0);
    CUTE_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      if (step >= 2) warpgroup_wait<1>();
      auto& operand = a[step % 2];
      auto registers = recast<uint32_t>(operand);
      CUTE_UNROLL
      for (int g = 0; g < 2; ++g) {
        uint32_t x[8];
        values_to_operand(codes[g], x);
        CUTE_UNROLL
        for (int i = 0; i < 8; ++i) registers(g * 8 + i) = x[i];
      }
      if (step + 1 < kSteps) load(step + 1);
      fence_fragment(operand);
      if (step == 0) fence_fragment(o);
      warpgroup_arrive();
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int n = step % 2 * 4 + i;
        auto pr = make_tensor(make_smem_ptr(shared.probabilities[warpgroup][n / 2]),
                              typename Tiles<kN>::Piece{});  // [kN rows, 64 tokens]
        auto b = mma.get_thread_slice(thread).partition_fragment_B(pr);
        auto columns = o(_, n, 0);
        cute::gemm(mma, operand(_, 0, i), b(_, 0, step / 2), columns);
      }
      warpgroup_commit_batch();
    }
    warpgroup_wait<0>();
    fence_fragment(o);
  }

  // A warpgroup may be ahead of the one that has the tile before in this slot, and the barrier,
  // which knows the parity of rounds only, then answers for the round before that. The tile's
  // number says that this round has come, if perhaps not to its end: then the barrier's answer
  // counts.
  __device__ __forceinline__ TileInfo wait_for(int count) const {
    const int slot = count % C::kSlots;
    const auto wait = [&] { Barrier::wait(&shared.full[slot], count / C::kSlots & 1); };
    do {
      wait();
    } while (shared.info[slot].number != count);
    wait();
    return shared.info[slot];
  }

  template <class Mask, class Output>
  __device__ __forceinline__ void tile(int count, int j, const Mask& mask, Output& o) {
    using namespace cute;
    const int slot = count % C::kSlots;
    uint8_t* const raw = shared.tiles[slot];
    const uint8_t* const here = raw + token * kTokenBytes;
    const TileInfo info = wait_for(count);
    float4 scale[2];
    bool found[2];
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      found[h] = (warp < 2 ? info.exists[0] : info.exists[1]) >> (token % 32 + 8 * h) & 1;
      scale[h] = *reinterpret_cast<const float4*>(here + h * 8 * kTokenBytes + kScaleBytes);
      if (!found[h]) scale[h] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
    auto s = partition_fragment_C(mma, Shape<_64, Int<kN>>{});
    multiply_keys(here, scale, s);

    bool grown = false;
    CUTE_UNROLL
    for (int i = 0; i < size(s); ++i) {
      if (!found[i / 2 % 2]) s(i) = -INFINITY;
    }
    mask.apply(p, j, token, s);
    CUTE_UNROLL
    for (int i = 0; i < size(s); ++i) {
      grown |=
          dense_decode::OnlineSoftmax::outgrows(s(i), rows.max[i / 4 * 2 + i % 2], p.scale_log2);
    }
    if (sync_or(kBarriersOfCutlass + kWarpgroup + warpgroup, 128, grown)) grow(s, o);
    if (contiguous<Source>(p) && (info.exists[0] & info.exists[1]) != 0xffffffffu) {
      clear_missing(raw, info);
    }
    CUTE_UNROLL
    for (int i = 0; i < size(s); ++i) {
      const int row = i / 4 * 2 + i % 2;
      // A row that has seen nothing keeps max -inf; shifting by 0 then gives exp2(-inf) = 0.
      const float shift = rows.max[row] == -INFINITY ? 0.f : rows.max[row] * p.scale_log2;
      s(i) = exp2f(fmaf(s(i), p.scale_log2, -shift));
      rows.sum[row] += s(i);
    }
    publish(s, scale);
    cutlass::arch::fence_view_async_shared();
    meet();
    multiply_values(raw, o);
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (lane == 0) Barrier::arrive(&shared.empty[slot]);
  }

  template <class Item>
  __device__ __forceinline__ void run_item(const Item& work, const UnitRows& query) {
    using namespace cute;
    load_query(query);
    auto o = partition_fragment_C(mma, Shape<Int<kDimV>, Int<kN>>{});  // [512, kN]
    clear(o);
    CUTE_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      rows.max[i] = -INFINITY;
      rows.sum[i] = 0.f;
    }
    const TokenMask<Item> mask(p, work);
    CUTE_NO_UNROLL
    for (int j = warpgroup; j < work.tiles; j += C::kWarpgroups) {
      tile(tile_count + j, j, mask, o);
    }
    tile_count += work.tiles;
    add_up(work, o);
  }

  // The warpgroups' results into one, and that to where it belongs.
  template <class Item, class Output>
  __device__ __forceinline__ void add_up(const Item& work, Output& o) {
    CUTE_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      CUTE_UNROLL
      for (int d = 4; d < 32; d *= 2) rows.sum[i] += __shfl_xor_sync(0xffffffffu, rows.sum[i], d);
      if (lane < 4) {
        shared.sum[warpgroup][warp][Rows<kN>::number(i)] = rows.sum[i];
        if (warp == 0) shared.max[warpgroup][Rows<kN>::number(i)] = rows.max[i];
      }
    }
    meet_all();
    CUTE_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      const float mine = rows.max[i];
      CUTE_UNROLL
      for (int g = 0; g < C::kWarpgroups; ++g) {
        rows.max[i] = fmaxf(rows.max[i], shared.max[g][Rows<kN>::number(i)]);
      }
      const float shift = rows.max[i] == -INFINITY ? 0.f : rows.max[i];
      rows.sum[i] = 0.f;
      CUTE_UNROLL
      for (int g = 0; g < C::kWarpgroups; ++g) {
        float of_group = 0.f;
        CUTE_UNROLL
        for (int w = 0; w < kWarps; ++w) of_group += shared.sum[g][w][Rows<kN>::number(i)];
        rows.sum[i] +=
            of_group * exp2f((shared.max[g][Rows<kN>::number(i)] - shift) * p.scale_log2);
      }
      const float factor = exp2f((mine - shift) * p.scale_log2);
      CUTE_UNROLL
      for (int n = 0; n < kColumnTiles; ++n) {
        o(i / 2 * 4 + i % 2, n, 0) *= factor;
        o(i / 2 * 4 + 2 + i % 2, n, 0) *= factor;
      }
    }
    float* const exchange = shared.output() + thread;  // [elements of a thread][128 threads]
    CUTE_UNROLL
    for (int g = 1; g < C::kWarpgroups; ++g) {
      if (warpgroup == g) {
        CUTE_UNROLL
        for (int i = 0; i < cute::size(o); ++i) exchange[i * 128] = o(i);
      }
      meet_all();
      if (warpgroup == 0) {
        CUTE_UNROLL
        for (int i = 0; i < cute::size(o); ++i) o(i) += exchange[i * 128];
      }
      meet_all();
    }
    if (warpgroup != 0) return;
    const bool partial = Source::kPaged && !work.whole(p);
    if (partial) {
      leave_largest(o);
      meet();
    }
    store(p, work, rows, shared.largest[0], o);
    if (partial) meet();  // the next tile's scores go where the largest were
  }

  // The largest magnitude in each row of a warp's part of O, for all warps. By the first warpgroup.
  template <class Output>
  __device__ __forceinline__ void leave_largest(const Output& o) {
    CUTE_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      float largest = 0.f;
      CUTE_UNROLL
      for (int n = 0; n < kColumnTiles; ++n) {
        largest = fmaxf(largest, fabsf(o(i / 2 * 4 + i % 2, n, 0)));
        largest = fmaxf(largest, fabsf(o(i / 2 * 4 + 2 + i % 2, n, 0)));
      }
      CUTE_UNROLL
      for (int d = 4; d < 32; d *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, d));
      }
      if (lane < 4) shared.largest[0][warp][Rows<kN>::number(i)] = largest;
    }
  }
};

template <class Source, int kN>
__global__ void __launch_bounds__(Config<kN>::kThreads, 1)
    few_rows_kernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<SharedStorage<kN>*>(raw);
  if (threadIdx.x == 0) {
    for (int s = 0; s < Config<kN>::kSlots; ++s) {
      Barrier::init(&shared.full[s], arrivals_of_full<Source>(p));
      Barrier::init(&shared.empty[s], kWarps);
      shared.info[s].number = -1;
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= Config<kN>::kConsumerThreads) {
    cutlass::arch::warpgroup_reg_dealloc<Config<kN>::kRegistersProducer>();
    fetch<Source>(p, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Config<kN>::kRegistersConsumer>();
    Consumer<Source, kN> consumer{p, shared};
    if constexpr (Source::kPaged) {
      PagedWorkList list(p);
      for (PagedItem work; list.next(work);) {
        consumer.run_item(work, Source::rows(p, work.request));
      }
    } else {
      for (int number = blockIdx.x; number < p.items; number += gridDim.x) {
        consumer.run_item(work_item(p, number), Source::rows(p, number));
      }
    }
  }
}

}  // namespace flashmla::sm90::sparse_decode::few_rows
