// The half tiles of dense decode and sparse prefill: how K, V and Q are cut into pieces, the ring
// of five halves that they pass through, and the shapes of the products that read them.
#pragma once

#include <cutlass/numeric_conversion.h>

#include "../common/mma.cuh"

namespace flashmla::sm90::half_tiles {

constexpr int kTokens = 64;        // a tile
constexpr int kDimQk = 576;        // 512 latent (NoPE) + 64 RoPE, which may be missing: then zeros
constexpr int kDimV = 512;         // the latent is also the value
constexpr int kHalfV = kDimV / 2;  // output columns a consumer warpgroup owns
constexpr int kPieceCols = 64;     // 128 bytes a row, the widest swizzle
constexpr int kPieces = kDimQk / kPieceCols;
constexpr int kPiecesHalf = kHalfV / kPieceCols;
constexpr int kPieceElements = kTokens * kPieceCols;
constexpr int kRopePiece = kPieces - 1;
constexpr int kSlots = 5;  // for halves of tiles: two and a half tiles are in flight
// Of Q, with the consumers: one of each half, each kernel's choice, and RoPE. The others are in
// shared memory.
constexpr int kRegisterPieces = 3;
constexpr int kThreads = 384;  // one producer warpgroup, two consumer warpgroups
constexpr int kConsumerThreads = 256;

// Where the n-th half of all halves lies, and the parity of that round of the ring.
struct HalfSlot {
  int slot;
  uint32_t parity;
  __device__ __forceinline__ explicit HalfSlot(int n)
      : slot(static_cast<unsigned>(n) % kSlots), parity(static_cast<unsigned>(n) / kSlots & 1) {}
};

template <class T>
struct Tiles {
  using Piece = SwizzledTile<T, kTokens>;                // [64 rows or tokens, 64]
  using ValueHalf = TransposedTile<T, kTokens, kHalfV>;  // [256 columns, 64 tokens]
  using Scores = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<T, T, float, cute::Shape<cute::_64, cute::_64, cute::_64>>()));
  using ScoresFromRegisters = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<T, T, float, cute::Shape<cute::_64, cute::_64, cute::_64>,
                                 Major::K, Major::K>()));
  using OutputFromRegisters = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<T, T, float, cute::Shape<cute::_64, cute::_256, cute::_64>,
                                 Major::K, Major::MN>()));
  using OutputFromShared = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<T, T, float, cute::Shape<cute::_64, cute::_256, cute::_64>,
                                 Major::K, Major::MN>()));
};

// The accumulator of S and the register operand of P V hold the same elements in the same order.
template <class T, class Scores, class Probabilities>
__device__ __forceinline__ void to_operand(const Scores& s, Probabilities& pr) {
  cutlass::NumericArrayConverter<T, float, 2> convert;
  CUTE_UNROLL
  for (int i = 0; i < cute::size(s); i += 2) {
    const auto pair = convert({s(i), s(i + 1)});
    pr(i) = pair[0];
    pr(i + 1) = pair[1];
  }
}

}  // namespace flashmla::sm90::half_tiles
