// Shapes, shared memory and barriers of the kernel for few query rows over the FP8 cache.
#pragma once

#include "config.cuh"

namespace flashmla::sm90::sparse_decode::few_rows {

using Element = cutlass::bfloat16_t;

constexpr int kTokenBytes = 656;  // 512 codes, 4 float32 scales, 64 bfloat16 of RoPE
constexpr int kScaleBytes = 512;  // where the scales begin
constexpr int kRopeBytes = 528;   // where the RoPE part begins
constexpr int kTileBytes = kTokens * kTokenBytes;
constexpr int kGroups = 4;  // of 128 codes with one scale
constexpr int kGroupCols = kDimV / kGroups;
constexpr int kColumnTiles = kDimV / 64;  // of the output, one wgmma each

// kN: query rows, missing ones included.
template <int kN>
struct Config {
  static_assert(kN % 16 == 0, "probabilities are stored for 16 rows at a time");
  // Warpgroups that convert and multiply, each a tile of its own: as many as have registers for the
  // whole output, 512 x kN.
  static constexpr int kWarpgroups = kN <= 16 ? 3 : 2;
  static constexpr int kConsumerThreads = kWarpgroups * 128;
  // And one that fetches.
  static constexpr int kThreads = kConsumerThreads + 128;
  static constexpr int kRegistersConsumer = kN <= 16 ? 160 : 240;
  static constexpr int kRegistersProducer = kN <= 16 ? 32 : 24;
  static_assert(kRegistersConsumer * kWarpgroups + kRegistersProducer <=
                    65536 / kThreads / 8 * 8 * (kWarpgroups + 1),
                "more registers than the CTA was started with: it would hang");
  static constexpr int kSlots = kN <= 16 ? 4 : 3;  // of the ring of raw tiles
  static constexpr int kPieceElements = kN * kPieceCols;
};

// Barriers between warps, as CUTLASS numbers them.
enum BarrierId : uint32_t {
  kConsumers = 1,
  kWarpgroup = 2  // and those behind it, one a warpgroup
};

// Where column c of Q lies in shared memory, [9 pieces][kN rows][64], 128-byte swizzle. A thread's
// part of the operand K comes from 16 neighbouring codes of a row, so the order in which columns
// are summed is the order in which threads find them:
//   NoPE column 128 g + 32 t + 16 b + 4 s + 2 h + e -> piece 2 g + b, element 16 s + 8 h + 2 t + e
//   RoPE column        16 t + 4 s + 2 h + e         -> piece 8,       element 16 s + 8 h + 2 t + e
// with t the thread's place among the four that share a row of the operand, s the wgmma of a piece,
// h the half of its 16 columns and e of two neighbours the one.
__device__ __forceinline__ int query_offset_bytes(int rows, int row, int pair) {
  const int column = pair * 2;
  const bool rope = column >= kDimV;
  const int t = (rope ? column / 16 : column / 32) % 4;
  const int piece = rope ? kPieces - 1 : column / 128 * 2 + column / 16 % 2;
  const int element = column / 4 % 4 * 16 + column / 2 % 2 * 8 + t * 2;
  return (piece * rows + row) * 128 + ((element / 8 ^ (row % 8)) * 16) + element % 8 * 2;
}

// What the fetching warps say of the tile in a slot.
struct TileInfo {
  uint32_t exists[2];  // a bit for each token
  int number;          // among all tiles of the CTA
  int unused;
};

template <int kN>
struct SharedStorage {
  using C = Config<kN>;
  static constexpr int kSlots = C::kSlots;
  alignas(1024) Element q[kPieces * C::kPieceElements];  // [9 pieces][kN][64]
  // For each warpgroup and group of columns, times that group's scales: [kN rows][64 tokens].
  alignas(1024) Element probabilities[C::kWarpgroups][kGroups][C::kPieceElements];
  alignas(128) uint8_t tiles[C::kSlots][kTileBytes];  // as in the cache
  alignas(16) TileInfo info[C::kSlots];
  float largest[C::kWarpgroups][kWarps][kN];  // scores of the tile at hand, a warp's tokens each
  float max[C::kWarpgroups][kN];              // in use, of each row
  float sum[C::kWarpgroups][kWarps][kN];      // of a warp's tokens, of each row
  uint64_t full[C::kSlots];
  uint64_t empty[C::kSlots];

  // At the end of an item Q and P make room for the output of one warpgroup.
  __device__ __forceinline__ float* output() { return reinterpret_cast<float*>(q); }
  static_assert(sizeof(q) + sizeof(probabilities) >= kDimV * kN * sizeof(float));
};
static_assert(sizeof(SharedStorage<16>) <= 232448 && sizeof(SharedStorage<32>) <= 232448,
              "227 KB a CTA");

}  // namespace flashmla::sm90::sparse_decode::few_rows
