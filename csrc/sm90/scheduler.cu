// get_mla_metadata on the device: one block computes the whole plan, in closed form, so that it
// can be recomputed inside a CUDA graph when lengths change.
//
// All requests lie on one line: request r covers [C_r, C_{r+1}), C_{r+1} = C_r + overhead +
// tiles_r. The line is cut into equal stretches, one a part. A cut that falls on a request's
// overhead moves to the request's first tile, so a request is never split for less than a tile.
// Where moving every cut to the nearest start of a request costs little balance, that is done, and
// nothing is split. Where there are as many parts to every request, and the requests are nearly of
// one length, each is cut into so many pieces by itself, if these are of kLeast tiles or more.
//
// A batch-invariant plan lays chunks of chunk_tiles on the line, each with an overhead of its own,
// and moves every cut to the nearest start of a chunk: what a chunk holds, and how many a request
// has, then follows from the request's own length.
#include <climits>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "../common/cuda_check.h"
#include "launch.h"
#include "schedule.h"

namespace flashmla::sm90 {
namespace {

constexpr int kThreads = 512;
constexpr int kLeast = 4;  // tiles that a piece has at least where requests are cut alike

// Largest p < active whose position floor(p * length / active) is at most y.
__device__ int last_part_at_or_before(int y, int active, int64_t length) {
  const int64_t p = ((static_cast<int64_t>(y) + 1) * active - 1) / length;
  return static_cast<int>(p < active - 1 ? p : active - 1);
}

struct Cut {
  int request;
  int tile;
};

// How many tiles are one unit that is never cut, the request's start counted along: a chunk.
struct Chunks {
  int tiles;  // 0: no chunks
  __device__ int width() const { return kStartOverhead + tiles; }
  __device__ int count(int places) const { return (places + width() - 1) / width(); }
};

// Places of one request on the line. Capped so that garbage lengths cannot overflow the line's.
__device__ int places_of(int seqlen, int batch, Chunks chunks) {
  const int tiles = tiles_of(seqlen);
  const int starts = chunks.tiles > 0 ? max(1, (tiles + chunks.tiles - 1) / chunks.tiles) : 1;
  return min(kStartOverhead * starts + tiles, INT_MAX / batch);
}

// Parts that get anything, at least one.
__device__ int active_parts(int length, int parts, int batch, Chunks chunks) {
  if (chunks.tiles > 0) return min(parts, length);
  const int active = min(parts, max(length / kFull, min(length, kFew)));
  const int over = active % batch;  // requests of one length are to be cut alike
  return over < active && over * 8 <= active ? active - over : active;
}

// region: cut
// The line of all requests: starts[r] = C_r for r in [0, batch], starts[batch] = length.
struct Line {
  const int* starts;
  int batch;
  int length;
  int active;  // parts that get anything: a part is at least one place long
  Chunks chunks;
  int pieces;  // of every request, where all are cut alike, else 0

  __device__ int position(int p) const {
    if (pieces > 0 && p < active) {
      const int r = p / pieces, piece = p % pieces;
      const int64_t tiles = starts[r + 1] - starts[r] - kStartOverhead;
      return starts[r] +
             (piece > 0 ? kStartOverhead + static_cast<int>(piece * tiles / pieces) : 0);
    }
    return p < active ? static_cast<int>(static_cast<int64_t>(p) * length / active) : length;
  }
  // The request with starts[r] <= position < starts[r + 1]; batch at the line's end.
  __device__ int request_at(int position) const {
    int low = 0, high = batch + 1;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (starts[middle] <= position ? low : high) = middle;
    }
    return low;
  }
  // The start of a request, or of a chunk, that lies nearest, the earlier one of two.
  __device__ int nearest_start(int position) const {
    const int r = request_at(position);
    int before = starts[r];
    int after = starts[min(r + 1, batch)];
    if (chunks.tiles > 0) {
      before += (position - before) / chunks.width() * chunks.width();
      after = min(after, before + chunks.width());
    }
    return after - position < position - before ? after : before;
  }
  __device__ Cut cut(int p, bool at_starts) const {
    const int place = at_starts ? nearest_start(position(p)) : position(p);
    const int r = request_at(place);
    const int offset = place - starts[r];
    if (chunks.tiles > 0) return {r, offset / chunks.width() * chunks.tiles};
    return {r, max(0, offset - kStartOverhead)};
  }
};
// endregion: cut

// cache_seqlens [batch], plan [parts], with chunks [parts, 2]; num_splits [batch + 1]
__global__ void __launch_bounds__(kThreads)
    plan_kernel(const int* __restrict__ cache_seqlens, PlanRow* __restrict__ plan,
                int* __restrict__ num_splits, int batch, int parts, Chunks chunks) {
  using Scan = cub::BlockScan<int, kThreads>;
  using Reduce = cub::BlockReduce<int2, kThreads>;
  __shared__ typename Scan::TempStorage scan_storage;
  __shared__ typename Reduce::TempStorage reduce_storage;
  __shared__ bool whole_shared, alike_shared;

  // Each thread owns a contiguous run of requests. num_splits holds C_r until its last use.
  const int per_thread = (batch + kThreads - 1) / kThreads;
  const int first = min(batch, static_cast<int>(threadIdx.x) * per_thread);
  const int last = min(batch, first + per_thread);

  int sum = 0;
  for (int r = first; r < last; ++r) sum += places_of(cache_seqlens[r], batch, chunks);
  int start, length;
  Scan(scan_storage).ExclusiveSum(sum, start, length);
  if (threadIdx.x == 0) num_splits[0] = 0;
  const int first_start = start;
  for (int r = first; r < last; ++r) {
    start += places_of(cache_seqlens[r], batch, chunks);
    num_splits[r + 1] = start;
  }
  __syncthreads();

  const int active = active_parts(length, parts, batch, chunks);
  Line line{num_splits, batch, length, active, chunks, 0};
  int longest = 0;  // of the parts, if no request is split
  for (int p = threadIdx.x; p < parts; p += kThreads) {
    const int begin = line.nearest_start(line.position(p));
    longest = max(longest, line.nearest_start(line.position(p + 1)) - begin);
  }
  const bool chunked = chunks.tiles > 0;
  const int pieces = !chunked && active % batch == 0 ? active / batch : 0;
  int longest_piece = 0;  // of the requests, if all are cut alike
  if (pieces > 0) {
    for (int r = first, s = first_start; r < last; ++r) {
      const int tiles = num_splits[r + 1] - s - kStartOverhead;
      longest_piece =
          max(longest_piece, tiles / kLeast < pieces ? INT_MAX : (tiles - 1) / pieces + 1);
      s = num_splits[r + 1];
    }
  }
  const int2 most =
      Reduce(reduce_storage)
          .Reduce(make_int2(longest, longest_piece), [](const int2& a, const int2& b) {
            return make_int2(max(a.x, b.x), max(a.y, b.y));
          });
  if (threadIdx.x == 0) {
    const int share = (length + active - 1) / active;
    whole_shared = !chunked && most.x <= share + min(kMostSlack, max(kSlack, share / 2));
    alike_shared = !whole_shared && pieces > 0 && most.y <= share;
  }
  __syncthreads();
  const bool whole = whole_shared;
  if (alike_shared) line.pieces = pieces;

  for (int p = threadIdx.x; p < parts; p += kThreads) {
    const Cut begin = line.cut(p, whole || chunked);
    const Cut end = line.cut(p + 1, whole || chunked);
    int split = 0;
    if (chunked) {
      split = begin.tile / chunks.tiles;
    } else if (line.pieces > 0) {
      split = p < active ? p % pieces : 0;
    } else if (begin.tile > 0) {
      const int first_tile = num_splits[begin.request] + kStartOverhead;
      split = p - last_part_at_or_before(first_tile, active, length);
    }
    PlanRow* row = plan + (chunked ? 2 * p : p);
    row[0] = {begin.request, begin.tile, end.request, end.tile, split, chunks.tiles, {0, 0}};
    if (chunked) row[1] = {};
  }

  // Splits of request r: its chunks, or from the last part that starts at or before its first tile
  // to the last part that starts before its end.
  auto splits_of = [&](int r_start, int r_end) {
    if (chunked) return chunks.count(r_end - r_start);
    if (whole) return 1;
    if (line.pieces > 0) return pieces;
    const int from = last_part_at_or_before(r_start + kStartOverhead, active, length);
    const int to = last_part_at_or_before(r_end - 1, active, length);
    return max(1, to - from + 1);
  };
  int splits = 0;
  for (int r = first, s = first_start; r < last; ++r) {
    const int e = num_splits[r + 1];
    splits += splits_of(s, e);
    s = e;
  }
  __syncthreads();  // the scan storage is used again, and everybody has read C for the cuts
  int before;
  Scan(scan_storage).ExclusiveSum(splits, before);
  for (int r = first, s = first_start; r < last; ++r) {
    const int e = num_splits[r + 1];
    before += splits_of(s, e);
    s = e;
    num_splits[r + 1] = before;
  }
}

}  // namespace

void launch_plan(const int* cache_seqlens, int* plan, int* num_splits, int batch, int parts,
                 int chunk_tiles, cudaStream_t stream) {
  plan_kernel<<<1, kThreads, 0, stream>>>(cache_seqlens, reinterpret_cast<PlanRow*>(plan),
                                          num_splits, batch, parts, Chunks{chunk_tiles});
  FLASHMLA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace flashmla::sm90
