// The producers of a plain cache, [blocks, page, 1, 576] numbers of q's type: chosen tokens are
// copied as they are, by the copy unit, into the same arrangement of columns as FP8 tokens get.
#pragma once

#include "produce.cuh"

namespace flashmla::sm90::sparse_decode {

template <class T, class Source>
struct GatherProducer {
  static constexpr bool kIsPair = false;
  static constexpr int kTokenBytes = kDimQk * 2;
  static_assert(sizeof(T) == 2, "tiles hold 16-bit numbers");
  const KernelParams& p;
  SharedStorage<T>& shared;
  const int half = threadIdx.x / 128;
  const int warp = threadIdx.x / 32 % kWarps;
  const int lane = threadIdx.x % 32;
  const int first_token = warp * kTokensAWarp;

  __device__ __forceinline__ void copy(uint32_t of_lane, int token, int bytes, int piece, int chunk,
                                       uint8_t* to) const {
    const uint32_t offset = __shfl_sync(0xffffffffu, of_lane, token);
    const bool exists = offset != kNowhere;
    cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(
        to + chunk_offset_bytes(piece, first_token + token, chunk),
        token_address(p, exists ? offset : 0) + bytes, exists);
  }

  // A lane's offset is that of the warp's token lane % 16. A warp copies half a token's values at a
  // time, each eight lanes to one piece.
  __device__ __forceinline__ void start_half(uint32_t of_lane, uint8_t* stage) const {
    const int group = lane / 16, h = lane / 8 % 2, i = lane % 8;
    const int piece = half * kPiecesHalf + group * 2 + h;
    const int bytes = (half * kHalfV + group * 128 + i * 16 + h * 8) * 2;
    CUTE_UNROLL
    for (int r = 0; r < kTokensAWarp; ++r) copy(of_lane, r, bytes, piece, i, stage);
  }

  // The two warpgroups share out the tokens.
  __device__ __forceinline__ void start_rope(uint32_t of_lane, uint8_t* rope) const {
    CUTE_UNROLL
    for (int n = 0; n < kTokensAWarp / 8; ++n) {
      const int token = half * (kTokensAWarp / 2) + n * 4 + lane / 8;
      copy(of_lane, token, (kDimV + lane % 8 * 8) * 2, 0, lane % 8, rope);
    }
  }

  __device__ __forceinline__ void run() {
    const int listed = first_token + lane % kTokensAWarp;
    typename Source::Cursor cursor(p);
    int step = cursor.advance(listed);
    typename Source::Found index = step == kEnd ? Source::kNothing : cursor.index();

    int item_count = 0;
    for (int count = 0; step != kEnd; ++count) {
      const int stage = count % kStages;
      const int rope_stage = count % kRopeStages;
      if (step >= 0) {
        Barrier::wait(&shared.q_empty, (item_count++ & 1) ^ 1);
        start_query<Source>(p, shared, step);
      }
      const uint32_t of_lane = Source::template offset<kTokenBytes>(p, index);
      step = cursor.advance(listed);
      index = step == kEnd ? Source::kNothing : cursor.index();

      Barrier::wait(&shared.rope_empty[rope_stage], (count / kRopeStages & 1) ^ 1);
      start_rope(of_lane, reinterpret_cast<uint8_t*>(shared.rope[rope_stage]));
      const unsigned counts = __ballot_sync(0xffffffffu, of_lane != kNowhere);
      if (half == 0 && lane == 0) shared.valid[rope_stage][warp] = counts;
      Barrier::wait(&shared.kv_empty[stage][half], (count / kStages & 1) ^ 1);
      start_half(of_lane, reinterpret_cast<uint8_t*>(shared.kv[stage]));
      cutlass::arch::cp_async_wait<0>();
      declare_full(&shared.kv_full[stage][half]);
      declare_full(&shared.rope_full[rope_stage]);
    }
  }
};

}  // namespace flashmla::sm90::sparse_decode
