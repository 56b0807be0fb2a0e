// Exact top-k of few rows: the CTAs of a cluster share a row. The idea is topk.cu's; what differs
// is that here every wait counts, since there is no other row to work on meanwhile.
//
//   1. Each CTA asks for its part of the row, and makes a sample of what arrives first. Its floor
//      is its own: CTAs need not agree, for what reaches the highest floor, all have kept.
//   2. What they keep goes to places of their own in the first CTA's shared memory, so that one
//      barrier of the cluster is all that they wait for.
//   3. The first CTA chooses among what reaches the highest floor, and writes.
#include <cooperative_groups.h>

#include <algorithm>
#include <utility>

#include "../../common/cuda_check.h"
#include "../../common/shared_memory.h"
#include "candidates.cuh"
#include "split.h"

namespace flashmla::sm90::topk {

namespace cg = cooperative_groups;

constexpr int kThreads = 1024;
constexpr int kVectors = 4;                  // 16-byte loads of a thread, all in flight
constexpr int kCapacity = 8192;              // candidates of a row, the same number from each CTA
constexpr int kKeptWhole = kCapacity / 2;    // a row that needs no floor
constexpr int kLine = 8;                     // vectors
constexpr int kBatch = kVectors * kThreads;  // vectors that a CTA asks for at once
constexpr int kMaxRanks = 8;                 // CTAs of a cluster, as every card allows
constexpr int kMinSlice = 8192;              // elements that are worth a CTA of their own
using Work = Scratch<12>;

// What the first CTA has to know of another. Floats as their distance above kLowest.
struct alignas(16) Report {
  int count;         // candidates, kept or not
  unsigned floor;    // of the window
  unsigned largest;  // about as large as the row's values are
  int unused;
};

// The vectors of a row are dealt out by lines of 128 bytes, to the CTAs in turn: so each has its
// share of whatever clusters the large values are in, and their floors come out alike.
struct Deal {
  int ranks, rank, batches;

  __device__ __forceinline__ Deal(const Row& row, int log_ranks)
      : ranks(1 << log_ranks), rank(static_cast<int>(blockIdx.x) % (1 << log_ranks)) {
    batches = (row.count() + (kBatch << log_ranks) - 1) / kBatch >> log_ranks;
  }
  // What a lane of this warp reads as number j of a batch.
  __device__ __forceinline__ int vector(int batch, int j, int lane) const {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int read = (warp * kVectors + j) * batches + batch;
    return ((read * (32 / kLine) + lane / kLine) * ranks + rank) * kLine + lane % kLine;
  }
  __device__ __forceinline__ int vector(int batch, int j) const {
    return vector(batch, j, static_cast<int>(threadIdx.x) % 32);
  }
  // Elements in the sample: every fourth vector of a batch.
  __device__ __forceinline__ int sampled(const Row& row) const {
    return max(1, row.length / (kVectors * ranks * batches));
  }
};

__device__ __forceinline__ void load_batch(const Row& row, const Deal& deal, int batch,
                                           float4 (&x)[kVectors]) {
  if (deal.vector(batch, 0, 0) >= row.whole_begin() &&
      deal.vector(batch, kVectors - 1, 31) < row.whole_end()) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) x[j] = row.load_whole(deal.vector(batch, j));
  } else {
    const float none = Row::nothing();
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int vector = deal.vector(batch, j);
      x[j] = vector < row.count() ? row.load(vector) : make_float4(none, none, none, none);
    }
  }
}

// The value that enough elements of the row should reach, from one of each thread's vectors: from
// another one in neighbouring lanes, since large values come in clusters. Where the elements of the
// bin lie within it is not asked unless they are many: a guess will do. Also leaves the sample's
// largest value in the scratch.
__device__ __forceinline__ Window sampled_window(const Row& row, int k,
                                                 const float4 (&vectors)[kVectors], int sample,
                                                 Work& scratch) {
  static_assert(kVectors == 4);
  const auto either = [](bool second, const float4& a, const float4& b) {
    return make_float4(second ? b.x : a.x, second ? b.y : a.y, second ? b.z : a.z,
                       second ? b.w : a.w);
  };
  const bool odd = threadIdx.x % 2 != 0, upper = threadIdx.x % 4 >= 2;
  const float4 x =
      either(upper, either(odd, vectors[0], vectors[1]), either(odd, vectors[2], vectors[3]));
  constexpr int kDigitBits = Work::kDigitBits;
  const float each = static_cast<float>(row.length) / static_cast<float>(sample);
  const int target = min(k + k / 4 + static_cast<int>(48 * each), (k + kCapacity) / 2);
  const int aim = max(1, static_cast<int>(static_cast<float>(target) / each));
  const Window all(kLowest);
  unsigned largest = 0;
  const auto raise = [&](float value) {
    if (all.holds(value)) largest = max(largest, all.rise(value));
  };
  raise(x.x), raise(x.y), raise(x.z), raise(x.w);
  largest = __reduce_max_sync(~0u, largest);
  if (threadIdx.x % 32 == 0) atomicMax(&scratch.largest, largest);
  unsigned prefix = 0;
  int rank = aim;
#pragma unroll 1  // code that has to be fetched takes longer than what it does
  for (int low = 32 - kDigitBits;; low -= kDigitBits) {
    const auto count = [&](float value) {
      const unsigned digits = all.rise(value) >> low;
      if (all.holds(value) && digits >> kDigitBits == prefix) {
        atomicAdd(&scratch.histogram[digits & (Work::kBins - 1)], 1u);
      }
    };
    count(x.x), count(x.y), count(x.z), count(x.w);
    __syncthreads();
    Place place;
    if (!find_bin<kThreads>(rank, scratch, place)) return all;
    prefix = prefix << kDigitBits | static_cast<unsigned>(place.bin);
    rank -= place.above;
    if (8 * place.inside <= 5 * aim || low < kDigitBits) {
      const float below =
          static_cast<float>(place.inside - rank) / static_cast<float>(place.inside);
      const unsigned inside = (prefix << low) + static_cast<unsigned>(below * (1u << low));
      return Window(all.value(min(inside, all.rise(INFINITY))));  // above it there are NaNs only
    }
  }
}

// The candidates that a thread of the first CTA looks at: as many threads for those of each CTA.
struct Share {
  uint64_t* candidates;  // of one CTA; once looked at, keys, or 0 for what is not in the window
  int first, count, step;

  __device__ __forceinline__ Share(uint64_t* all, const Report* reports, int log_ranks) {
    step = kThreads >> log_ranks;
    const int rank = static_cast<int>(threadIdx.x) / step;
    first = static_cast<int>(threadIdx.x) % step;
    candidates = all + rank * (kCapacity >> log_ranks);
    count = reports[rank].count;
  }

  template <class Use>
  __device__ __forceinline__ void each_key(Use use) const {
#pragma unroll 1  // code that has to be fetched takes longer than what it does
    for (int i = first; i < count; i += step) {
      const uint64_t key = candidates[i];
      if (key != 0) use(key);
    }
  }
};

// Marks the k largest of the candidates if they are the k largest of the row; false if that cannot
// be told. All of the block calls it.
__device__ __forceinline__ bool choose(const Share& share, const Report* reports, int ranks, int k,
                                       unsigned* chosen, Work& scratch) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Report report = reports[lane < ranks ? lane : 0];
  if (!__all_sync(~0u, report.count <= kCapacity / ranks)) return false;
  const unsigned floor = __reduce_max_sync(~0u, report.floor);
  const unsigned largest = max(__reduce_max_sync(~0u, report.largest), floor);
  const Window all(kLowest);
  const Window window(all.value(floor));
  // The first digit: the upper bits in which values as large as the sample's differ. What is larger
  // than those goes to the last bin.
  const int shift = max(0, 32 - Work::kDigitBits - __clz(static_cast<int>(largest - floor)));
  const auto digit = [&](uint64_t key) {
    const unsigned digits = static_cast<unsigned>(key >> kValueBit) >> shift;
    return static_cast<int>(min(digits, Work::kBins - 1u));
  };

#pragma unroll 1
  for (int i = share.first; i < share.count; i += share.step) {
    const uint64_t candidate = share.candidates[i];
    const float x = __int_as_float(static_cast<int>(candidate));
    uint64_t key = 0;
    if (window.holds(x)) {
      key = make_key(window.rise(x), static_cast<int>(candidate >> 32)) | 1;
      atomicAdd(&scratch.histogram[digit(key)], 1u);
    }
    share.candidates[i] = key;
  }
  __syncthreads();
  Place place;
  if (!find_bin<kThreads>(k, scratch, place)) {
    if (floor > 0) return false;
    share.each_key([&](uint64_t key) { mark(chosen, position_of(key)); });  // all there are
    return true;
  }
  const int wanted = k - place.above;  // of those in the bin
  if (place.inside > wanted && place.inside > kThreads) {
    const uint64_t least = kth_largest<uint64_t, kThreads>([&](auto&& use) { share.each_key(use); },
                                                           k, 64, kKeyEnd, scratch);
    share.each_key([&](uint64_t key) {
      if (key >= least) mark(chosen, position_of(key));
    });
    return true;
  }
  share.each_key([&](uint64_t key) {
    if (digit(key) > place.bin || (digit(key) == place.bin && place.inside == wanted)) {
      mark(chosen, position_of(key));
    } else if (digit(key) == place.bin) {
      scratch.list[atomicAdd(&scratch.listed, 1)] = key;
    }
  });
  if (place.inside == wanted) return true;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < place.inside) {
    const uint64_t key = scratch.list[threadIdx.x];
    int larger = 0;
#pragma unroll 1
    for (int i = 0; i < place.inside; ++i) larger += scratch.list[i] > key;
    if (larger < wanted) mark(chosen, position_of(key));
  }
  return true;
}

// Writes the chosen of the candidates, each behind as many as are marked before it, and then -1.
__device__ __forceinline__ void write_share(const TopkArgs& a, int64_t row, const Share& share,
                                            const uint4* chosen, int4* before, int groups,
                                            Work& scratch) {
  int done = 0;
#pragma unroll 1
  for (int base = 0; base < groups; base += kThreads) {
    const int group = base + static_cast<int>(threadIdx.x);
    const uint4 word = group < groups ? chosen[group] : make_uint4(0, 0, 0, 0);
    const int x = __popc(word.x), xy = x + __popc(word.y), xyz = xy + __popc(word.z);
    int total;
    const int at = done + block_exclusive_sum(xyz + __popc(word.w), scratch.warp_sums, total);
    if (group < groups) before[group] = make_int4(at, at + x, at + xy, at + xyz);
    done += total;
    __syncthreads();
  }
  const auto* bits = reinterpret_cast<const unsigned*>(chosen);
  const auto* words_before = reinterpret_cast<const int*>(before);
  int* out = a.out + row * a.k;
  share.each_key([&](uint64_t key) {
    const int position = position_of(key);
    const unsigned word = bits[position / 32], bit = 1u << position % 32;
    if ((word & bit) == 0) return;
    out[words_before[position / 32] + __popc(word & (bit - 1))] = cache_place(a, row, position);
  });
  for (int i = done + static_cast<int>(threadIdx.x); i < a.k; i += kThreads) out[i] = -1;
}

// Grid: a cluster of 1 << log_ranks CTAs for each row.
__global__ void __launch_bounds__(kThreads, 1) split_kernel(const TopkArgs a, int log_ranks) {
  extern __shared__ __align__(16) unsigned char storage[];
  __shared__ Work scratch;
  __shared__ Report reports[kMaxRanks];
  auto* candidates = reinterpret_cast<uint64_t*>(storage);          // [kCapacity]
  auto* chosen = reinterpret_cast<uint4*>(candidates + kCapacity);  // [ceil(n / 128)]: bits
  auto* before = reinterpret_cast<int4*>(chosen + (a.n + kGroup - 1) / kGroup);  // as many
  const int64_t which = blockIdx.x >> log_ranks;
  const int length = a.lengths == nullptr ? a.n : max(0, min(a.n, a.lengths[which]));
  const Row row(a.logits + which * a.logits_stride, length);
  const Deal deal(row, log_ranks);
  const int rank = deal.rank, part = kCapacity >> log_ranks;
  const int groups = (length + kGroup - 1) / kGroup;

  float4 x[kVectors];
  load_batch(row, deal, 0, x);
  if (threadIdx.x == 0) {
    scratch.candidates = 0;
    scratch.listed = 0;
    scratch.largest = 0;
  }
  for (int i = threadIdx.x; i < Work::kBins / 4; i += kThreads) {
    reinterpret_cast<uint4*>(scratch.histogram)[i] = make_uint4(0, 0, 0, 0);
  }
  if (rank == 0) {
    for (int g = threadIdx.x; g < groups; g += kThreads) chosen[g] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
  cg::cluster_group cluster = cg::this_cluster();
  cg::cluster_group::arrival_token started = cluster.barrier_arrive();

  const Window all(kLowest);
  Window window = all;
  if (length > kKeptWhole) window = sampled_window(row, a.k, x, deal.sampled(row), scratch);
#pragma unroll 1
  for (int batch = 0; batch < deal.batches; ++batch) {
    if (batch > 0) load_batch(row, deal, batch, x);
    keep(
        x, [&](int j) { return row.position(deal.vector(batch, j)); }, window, part, candidates,
        &scratch.candidates);
  }
  __syncthreads();

  cluster.barrier_wait(std::move(started));  // nobody writes to a CTA that has not begun
  if (threadIdx.x == 0) {
    const unsigned largest = length > kKeptWhole ? scratch.largest : all.rise(INFINITY);
    *cluster.map_shared_rank(&reports[rank], 0) =
        Report{scratch.candidates, all.rise(window.floor), largest, 0};
  }
  if (rank != 0) {
    uint64_t* to = cluster.map_shared_rank(candidates, 0) + rank * part;
    const int count = min(scratch.candidates, part);
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kThreads) to[i] = candidates[i];
  }
  cg::cluster_group::arrival_token done = cluster.barrier_arrive();
  if (rank != 0) return;
  cluster.barrier_wait(std::move(done));

  auto* bits = reinterpret_cast<unsigned*>(chosen);
  const Share share(candidates, reports, log_ranks);
  if (choose(share, reports, deal.ranks, a.k, bits, scratch)) {
    __syncthreads();
    write_share(a, which, share, chosen, before, groups, scratch);
  } else {
    choose_from_row<kThreads>(row, a.k, bits, scratch);
    __syncthreads();
    write_row<kThreads>(a, which, chosen, groups, reinterpret_cast<int*>(candidates), scratch);
  }
}

int cluster_size(const TopkArgs& args, int sms) {
  const int64_t most = std::min<int64_t>(args.n / kMinSlice, sms / args.rows);
  int ranks = 1;
  while (2 * ranks <= std::min<int64_t>(most, kMaxRanks)) ranks *= 2;
  return ranks;
}

void launch_split(const TopkArgs& args, int ranks, cudaStream_t stream) {
  constexpr int kGroupBytes = sizeof(uint4) + sizeof(int4);
  constexpr int kMost = kCapacity * sizeof(uint64_t) + kTopkMaxRow / kGroup * kGroupBytes;
  allow_shared_memory<&split_kernel>(kMost);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(ranks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(args.rows * ranks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes =
      kCapacity * sizeof(uint64_t) + (args.n + kGroup - 1) / kGroup * kGroupBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  FLASHMLA_CUDA_CHECK(cudaLaunchKernelEx(&config, &split_kernel, args, __builtin_ctz(ranks)));
}

}  // namespace flashmla::sm90::topk
