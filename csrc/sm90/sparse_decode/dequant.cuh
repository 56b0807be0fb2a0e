// The producers of the FP8 cache: fetch chosen tokens, convert them, and leave them as tiles of K
// that wgmma reads. A token in the cache, 656 bytes:
//   0   float8_e4m3 [512]  NoPE
//   512 float32 [4]        a scale for each 128 of them
//   528 bfloat16 [64]      RoPE
//
// Each of the two warpgroups does half of the 512 columns, each warp of it sixteen tokens. Codes go
// straight into registers, half a tile at once, and are asked for as soon as those of the tile
// before are converted: while they are on their way, the consumers empty the place they will go to.
// All of them are waited for together (a warp has six scoreboards, too few to tell single loads
// apart), so there must be a while between the last request and the first use.
#pragma once

#include <cuda_fp8.h>
#include <cutlass/numeric_conversion.h>
#include <cute/arch/cluster_sm90.hpp>

#include "../../common/cluster.cuh"
#include "../../common/memory.cuh"
#include "../../common/registers.cuh"
#include "produce.cuh"

namespace flashmla::sm90::sparse_decode {

// region: dequantise
// Eight codes times the float32 scale, each product rounded once to T.
template <class T>
__device__ __forceinline__ uint4 dequantise(uint32_t low, uint32_t high, float scale) {
  cutlass::NumericArrayConverter<T, float, 2> round;
  uint32_t result[4];
  CUTE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = i < 2 ? low : high;
    const auto pair = static_cast<__nv_fp8x2_storage_t>(i % 2 == 0 ? word & 0xffff : word >> 16);
    const float2 value = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
    const auto rounded = round({value.x * scale, value.y * scale});
    result[i] = reinterpret_cast<const uint32_t&>(rounded);
  }
  return make_uint4(result[0], result[1], result[2], result[3]);
}
// endregion: dequantise

// kPair: the CTA and its neighbour in a cluster of two work on the same tokens for other query
// rows. Each converts half of them, and stores what comes of it on both sides.
template <class T, class Source, bool kPair>
struct Fp8ProducerOf {
  static constexpr bool kIsPair = kPair;
  static constexpr int kTokenBytes = 656;
  static constexpr int kScaleBytes = 512;                             // where the scales begin
  static constexpr int kRopeBytes = 528;                              // where the RoPE part begins
  static constexpr int kTokensHere = kTokensAWarp / (kPair ? 2 : 1);  // that a warp converts
  static constexpr int kLoads = kTokensHere / 2;  // of a thread: half the columns of a token each
  static constexpr uint32_t kRemoteBytes =        // of a half tile, a warp's share
      kPair ? kTokensHere * kHalfV * sizeof(T) : 0;
  static_assert(sizeof(T) == 2, "tiles hold 16-bit numbers");

  const KernelParams& p;
  SharedStorage<T>& shared;
  int thread =
      threadIdx.x;  // everything below follows from it, and is cheaper to find than to keep

  __device__ __forceinline__ int half() const { return thread / 128; }
  __device__ __forceinline__ int warp() const { return thread / 32 % kWarps; }
  __device__ __forceinline__ int lane() const { return thread % 32; }
  __device__ __forceinline__ int first_token() const { return warp() * kTokensAWarp; }
  __device__ __forceinline__ int column() const { return thread % 16; }  // of 16 codes
  // A load fetches half the columns of token r, and for the upper lanes of token r + kLoads, from
  // the first one that is converted here on.
  __device__ __forceinline__ int pair() const {
    return lane() / 16 * kLoads + (kPair ? blockIdx.x % 2 * kTokensHere : 0);
  }

  // A lane's offset is that of the warp's token lane % 16. First all exchanges, then all loads: a
  // wait for an exchange in between might share its scoreboard with a load, and wait for that too.
  __device__ __forceinline__ void load(uint32_t of_lane, uint4 (&codes)[kLoads]) const {
    uint32_t offset[kLoads];
    CUTE_UNROLL
    for (int r = 0; r < kLoads; ++r) offset[r] = __shfl_sync(0xffffffffu, of_lane, pair() + r);
    const uint8_t* cache = p.k_cache + half() * kHalfV + column() * 16;
    CUTE_UNROLL
    for (int r = 0; r < kLoads; ++r) {
      codes[r] = load_16_once(cache + static_cast<uint64_t>(offset[r]) * 16, offset[r] != kNowhere);
    }
  }

  // Of the warp's token lane % 16, the scale of the 128 columns lane / 16 of this half.
  __device__ __forceinline__ float load_scale(uint32_t of_lane) const {
    const int at = kScaleBytes + (half() * 2 + lane() / 16) * sizeof(float);
    return load_float_once(token_address(p, of_lane) + at, of_lane != kNowhere);
  }

  __device__ __forceinline__ void store(const uint4 (&codes)[kLoads], float scales, uint32_t stage,
                                        uint32_t full) const {
    const uint32_t neighbour = blockIdx.x % 2 ^ 1;
    const uint32_t apart = kPair ? cute::set_block_rank(stage, neighbour) - stage : 0;
    const uint32_t full_there = kPair ? cute::set_block_rank(full, neighbour) : 0;
    const int piece = half() * kPiecesHalf + column() / 8 * 2;
    // Of token `pair`; for row r more, which is in the same eight, the chunk is another, by xor.
    const uint32_t first = stage + chunk_offset_bytes(piece, first_token() + pair(), column() % 8);
    CUTE_UNROLL
    for (int r = 0; r < kLoads; ++r) {
      const float scale = __shfl_sync(0xffffffffu, scales, column() / 8 * 16 + pair() + r);
      const uint32_t to = (first ^ (r * 16)) + r * 128;
      const uint4 even = dequantise<T>(codes[r].x, codes[r].y, scale);
      store_shared_16(to, even);
      if (kPair) store_remote_16(to + apart, even, full_there);
      const uint4 odd = dequantise<T>(codes[r].z, codes[r].w, scale);
      store_shared_16(to + kPieceBytes, odd);
      if (kPair) store_remote_16(to + apart + kPieceBytes, odd, full_there);
    }
  }

  // The RoPE part is copied as it is, by the copy unit, without a detour through registers. The two
  // warpgroups share out the tokens.
  __device__ __forceinline__ void start_rope(uint32_t of_lane, uint8_t* rope) const {
    CUTE_UNROLL
    for (int n = 0; n < kTokensAWarp / 8; ++n) {
      const int token = half() * (kTokensAWarp / 2) + n * 4 + lane() / 8;
      const uint32_t offset = __shfl_sync(0xffffffffu, of_lane, token);
      const bool exists = offset != kNowhere;
      const uint8_t* from = token_address(p, exists ? offset : 0) + kRopeBytes + lane() % 8 * 16;
      uint8_t* to = rope + chunk_offset_bytes(0, first_token() + token, lane() % 8);
      cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(to, from, exists);
    }
  }

  // Everything that tile `count` of this CTA needs is asked for.
  __device__ __forceinline__ void start_tile(int count, uint32_t of_lane, uint4 (&codes)[kLoads],
                                             float& scales) const {
    const int stage = count % kRopeStages;
    Barrier::wait(&shared.rope_empty[stage], (count / kRopeStages & 1) ^ 1);
    const unsigned counts = __ballot_sync(0xffffffffu, of_lane != kNowhere);
    if (half() == 0 && lane() == 0) shared.valid[stage][warp()] = counts;
    start_rope(of_lane, reinterpret_cast<uint8_t*>(shared.rope[stage]));
    load(of_lane, codes);
    scales = load_scale(of_lane);
  }

  __device__ __forceinline__ int listed() const { return first_token() + thread % kTokensAWarp; }

  __device__ __forceinline__ void run() {
    typename Source::Cursor cursor(p);
    int step = cursor.advance(listed());
    if (step == kEnd) return;
    uint4 codes[kLoads];
    float scales;
    // Q of few rows is asked for while the first index is on its way; of many, behind the codes,
    // which need the time.
    const bool early = p.h_q <= kFewRows;
    const typename Source::Found first_index = cursor.index();
    if (early) start_query<Source>(p, shared, step);
    start_tile(0, Source::template offset<kTokenBytes>(p, first_index), codes, scales);
    int next_step = cursor.advance(listed());
    typename Source::Found next_index = next_step == kEnd ? Source::kNothing : cursor.index();

    int item_count = early;
    // region: producer
    for (int count = 0;; ++count) {
      forget(thread);
      const int stage = count % kStages;
      if (step >= 0 && !(early && count == 0)) {
        Barrier::wait(&shared.q_empty, (item_count++ & 1) ^ 1);
        start_query<Source>(p, shared, step);
      }
      Barrier::wait(&shared.kv_empty[stage][half()], (count / kStages & 1) ^ 1);
      uint64_t* full = &shared.kv_full[stage][half()];
      store(codes, scales, cute::cast_smem_ptr_to_uint(shared.kv[stage]),
            cute::cast_smem_ptr_to_uint(full));
      cutlass::arch::cp_async_wait<0>();  // RoPE, asked for a tile ago
      declare_full(full, kRemoteBytes);
      if (lane() == 0) Barrier::arrive(&shared.rope_full[count % kRopeStages]);

      if (next_step == kEnd) break;
      forget(thread);
      start_tile(count + 1, Source::template offset<kTokenBytes>(p, next_index), codes, scales);
      step = next_step;
      next_step = cursor.advance(listed());
      next_index = next_step == kEnd ? Source::kNothing : cursor.index();
    }
    // endregion: producer
  }
};

template <class T, class Source>
using Fp8Producer = Fp8ProducerOf<T, Source, false>;
template <class T, class Source>
using Fp8PairProducer = Fp8ProducerOf<T, Source, true>;

}  // namespace flashmla::sm90::sparse_decode
