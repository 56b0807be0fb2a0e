// The split plan: which stretch of which requests each part of the grid works on.
// Readable form and derivation: flashmla/schedule.py, which computes the same numbers.
#pragma once

#include <cstdint>

namespace flashmla::sm90 {

constexpr int kTileTokens = 64;    // the plan counts tiles of 64 tokens whatever the page size
constexpr int kStartOverhead = 5;  // what starting a request is worth, in tiles
constexpr int kSlack = 10;       // how much a part may exceed its share for requests to stay whole
constexpr int kMostSlack = 24;   // what that grows to for long shares: half the share, up to this
constexpr int kFull = 6;         // places that are worth a part of its own, however many parts
constexpr int kFew = 32;         // parts that get work whether they are full or not
constexpr int kMaxParts = 1024;  // more than any card has SMs
constexpr int kPlanColumns = 8;  // int32 a part in tile_scheduler_metadata; a batch-invariant plan
                                 // has twice as many, the second half zero

// One row of tile_scheduler_metadata: the half-open range of (request, tile) of a part, in
// lexicographic order, and which split of its first request the part computes. With chunk_tiles
// each chunk of so many tiles, counted from the request's start, is a split of its own.
struct alignas(16) PlanRow {
  int begin_request;
  int begin_tile;
  int end_request;  // not touched when end_tile is 0
  int end_tile;
  int begin_split;
  int chunk_tiles;  // 0 unless the plan is batch-invariant
  int unused[2];
};
static_assert(sizeof(PlanRow) == kPlanColumns * sizeof(int), "a plan row is 8 int32");

#ifdef __CUDACC__
__host__ __device__ constexpr int tiles_of(int seqlen) {
  return seqlen <= 0 ? 0 : (seqlen - 1) / kTileTokens + 1;
}
#endif

}  // namespace flashmla::sm90
