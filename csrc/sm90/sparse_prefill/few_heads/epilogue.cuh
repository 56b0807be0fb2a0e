// The end of an item: what the two consumers have is merged, and leaves by way of shared memory.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "../../../common/log_base.h"
#include "gather.cuh"
#include "softmax.cuh"

namespace flashmla::sm90::sparse_prefill::few_heads {

// The last groups of a consumer's last tile of an item, which it keeps: here Oᵀ passes from one
// consumer to the other, and then on to global memory.
template <class T, int kHeads>
struct Held {
  static constexpr int kBytes = kDimV * kHeads * 2;  // of half the output in float32
  static constexpr int kCount = (kBytes + kGroupBytes - 1) / kGroupBytes;
  static constexpr int kFirst = kTileGroups - kCount;  // of the groups of a tile

  SharedStorage<T, kHeads>& shared;
  int tile;  // of all tiles of this CTA

  __device__ __forceinline__ int slot(int i) const {
    return GroupSlot<kHeads>(tile * kTileGroups + kFirst + i).slot;
  }
  // Byte `offset` of them; what is read or written there lies in one group.
  __device__ __forceinline__ uint8_t* at(int offset) const {
    const int i = offset / kGroupBytes;
    return reinterpret_cast<uint8_t*>(shared.ring[slot(i)]) + offset % kGroupBytes;
  }
  // Back to the producer. By all warps of one consumer.
  __device__ __forceinline__ void release() const {
    CUTE_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (threadIdx.x % 32 == 0) Barrier::arrive(&shared.empty[slot(i)]);
    }
  }
};

// What a thread has to know of its heads, over both consumers. Which of them had a list's even
// tiles depends on the lists before, and the result must not: sums of both are rounded alike from
// either side, which a fused multiply and add is not.
template <int kHeads>
struct Totals {
  Columns<kHeads> factor;  // what this consumer's O has to be multiplied by
  Columns<kHeads> lse2;    // to base 2
  Columns<kHeads> top;     // the largest score
  Columns<kHeads> sum;     // relative to the larger of both maxima; 0: nothing was seen

  __device__ __forceinline__ Totals(const KernelParams& p, const HeadState<kHeads> (&state)[2],
                                    int consumer) {
    CUTE_UNROLL
    for (int c = 0; c < Columns<kHeads>::kCount; ++c) {
      const int head = Columns<kHeads>::head(c);
      const float shift = fmaxf(state[0].shift[head], state[1].shift[head]);
      float total = 0.f, largest = -INFINITY;
      CUTE_UNROLL
      for (int k = 0; k < 2; ++k) {
        float part = 0.f;
        CUTE_UNROLL
        for (int w = 0; w < kWarps; ++w) {
          part += state[k].sum[w][head];
          largest = fmaxf(largest, state[k].top[w][head]);
        }
        total = __fadd_rn(total, __fmul_rn(part, exp2f(state[k].shift[head] - shift)));
      }
      sum.v[c] = total;
      top.v[c] = largest;
      lse2.v[c] = shift + log2f(total);
      if (p.attn_sink != nullptr && head < p.h_q) {
        total += exp2f(__ldg(p.attn_sink + head) * kLog2E - shift);
      }
      // A head that has seen nothing: out 0.
      factor.v[c] = sum.v[c] == 0.f ? 0.f : exp2f(state[consumer].shift[head] - shift) / total;
    }
  }

  // By the lanes 0 to 3 of one warp.
  __device__ __forceinline__ void store(const KernelParams& p, int query) const {
    CUTE_UNROLL
    for (int c = 0; c < Columns<kHeads>::kCount; ++c) {
      const int head = Columns<kHeads>::head(c);
      if (head >= p.h_q) continue;
      const int64_t at = static_cast<int64_t>(query) * p.h_q + head;
      const bool nothing = sum.v[c] == 0.f;
      p.lse[at] = nothing ? INFINITY : lse2.v[c] * p.lse_unit;
      p.max_logits[at] = nothing ? -INFINITY : top.v[c] * p.scale;
    }
  }
};

// Four blocks of Oᵀ, from block kFirst on, in the order in which threads hold them: both
// consumers hold them alike.
template <int kFirst, class T, int kHeads, class Output>
__device__ __forceinline__ void send_blocks(const Held<T, kHeads>& to, const Output& o) {
  constexpr int kParts = kHeads / 8;  // of four elements
  CUTE_UNROLL
  for (int n = 0; n < kBlocks / 2 * kParts; ++n) {
    const auto& x = o(cute::_, 0, 0, kFirst + n / kParts);
    const int i = n % kParts * 4;
    *reinterpret_cast<float4*>(to.at(n * 128 * 16) + threadIdx.x % 128 * 16) =
        make_float4(x(i), x(i + 1), x(i + 2), x(i + 3));
  }
}

template <int kFirst, class T, int kHeads, class Output>
__device__ __forceinline__ void receive_blocks(const Held<T, kHeads>& from, Output& o) {
  constexpr int kParts = kHeads / 8;
  CUTE_UNROLL
  for (int n = 0; n < kBlocks / 2 * kParts; ++n) {
    auto x = o(cute::_, 0, 0, kFirst + n / kParts);
    const int i = n % kParts * 4;
    const float4 y =
        *reinterpret_cast<const float4*>(from.at(n * 128 * 16) + threadIdx.x % 128 * 16);
    x(i) = __fadd_rn(x(i), y.x);
    x(i + 1) = __fadd_rn(x(i + 1), y.y);
    x(i + 2) = __fadd_rn(x(i + 2), y.z);
    x(i + 3) = __fadd_rn(x(i + 3), y.w);
  }
}

// kCount blocks of Oᵀ to global memory by way of `held`, which is given back when it has been
// read.
template <int kFirst, int kCount, class T, int kHeads, class Output>
__device__ __forceinline__ void store_blocks(const Held<T, kHeads>& held, const Output& o,
                                             const CUtensorMap& out_map, int query,
                                             uint32_t barrier) {
  constexpr int kBytes = kHeads * kPieceCols * 2;  // a block
  CUTE_UNROLL
  for (int i = 0; i < kCount; ++i) {
    store_transposed<T, kHeads>(reinterpret_cast<T*>(held.at(i * kBytes)),
                                o(cute::_, 0, 0, kFirst + i));
  }
  cutlass::arch::fence_view_async_shared();
  cutlass::arch::NamedBarrier::sync(128, barrier);
  if (threadIdx.x % 128 == 0) {
    CUTE_UNROLL
    for (int i = 0; i < kCount; ++i) {
      cute::SM90_TMA_STORE_3D::copy(&out_map, held.at(i * kBytes), (kFirst + i) * kPieceCols, 0,
                                    query);
    }
    cute::tma_store_arrive();
    cute::tma_store_wait<0>();
  }
  held.release();
}

// An item that has no tiles: zeros in [h_q, 512], by all consumer threads.
template <class T>
__device__ __forceinline__ void store_nothing(const KernelParams& p, int query, int thread) {
  T* out = static_cast<T*>(p.out) + static_cast<int64_t>(query) * p.h_q * kDimV;
  for (int n = thread; n < p.h_q * (kDimV / 8); n += kConsumerThreads) {
    *reinterpret_cast<uint4*>(out + n * 8) = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace flashmla::sm90::sparse_prefill::few_heads
