// Exact top-k: the k largest of each row, of equals the lower position, positions ascending.
//
//   1. A sample of the row gives a floor that a little more than k elements should reach.
//   2. The row is read once; what reaches the floor is kept in shared memory. Several CTAs of a
//      cluster share a row when there are few rows; the first one gets what they all have kept.
//   3. The choice is made among those few, exactly: as keys, no two of them are equal.
//   4. A bit for each position chosen; counting bits puts the positions in order.
// The floor can only cost time: should too many or too few elements reach it, the selection runs
// over the whole row instead, which is read again for each pass.
#include <cooperative_groups.h>

#include <algorithm>
#include <utility>

#include "../../common/cuda_check.h"
#include "row.cuh"
#include "select.cuh"

namespace flashmla::sm90 {
namespace topk {

namespace cg = cooperative_groups;

constexpr int kVectors = 4;      // 16-byte loads of a thread in flight
constexpr int kMinSlice = 8192;  // elements that are worth a CTA of their own
constexpr int kMaxCluster = 8;   // what every card allows
constexpr int kGroup = 128;      // positions whose bits a thread takes at a time

// What reached the floor, until keys are made of it: bits 0-31 the float, 32-63 the position.
__device__ __forceinline__ uint64_t make_candidate(float x, int position) {
  return static_cast<uint64_t>(static_cast<unsigned>(position)) << 32 |
         static_cast<unsigned>(__float_as_int(x));
}

template <int Threads, int CtasPerSm, int Capacity, int SampleVectors>
struct Config {
  static constexpr int kThreads = Threads;
  static constexpr int kCtasPerSm = CtasPerSm;
  static constexpr int kCapacity = Capacity;            // candidates
  static constexpr int kSampleVectors = SampleVectors;  // of a thread
  static_assert(kTopkMaxK <= kCapacity * 3 / 4, "the floor aims between the two");
};

// The value that about `target` elements of the row reach, from a sample spread evenly over it.
template <class C>
__device__ __forceinline__ Window sampled_window(const Row& row, int k, Scratch& scratch) {
  constexpr int kVectors = C::kSampleVectors * C::kThreads;
  constexpr int kSample = 4 * kVectors;
  constexpr int kSpots = kVectors / 2;  // two threads read 32 bytes side by side: a sector
  const int target = min(k + k / 4 + 48 * (row.length / kSample), (k + C::kCapacity) / 2);
  const int rank = max(1, kSample * target / row.length);
  const int begin = row.whole_begin();
  const int whole = row.whole_end() - begin;
  float4 sample[C::kSampleVectors];
#pragma unroll
  for (int i = 0; i < C::kSampleVectors; ++i) {
    const int vector = static_cast<int>(threadIdx.x) + i * C::kThreads;
    sample[i] = row.load_early(begin + vector / 2 * whole / kSpots + vector % 2);
  }
  const Window all(kLowest);
  const auto rise = [&](float x) { return all.holds(x) ? all.rise(x) : 0; };
  const unsigned least = kth_largest<unsigned, C::kThreads>(
      [&](auto&& use) {
#pragma unroll
        for (int i = 0; i < C::kSampleVectors; ++i) {
          use(rise(sample[i].x));
          use(rise(sample[i].y));
          use(rise(sample[i].z));
          use(rise(sample[i].w));
        }
      },
      rank, 32, 32 - 2 * kDigitBits, scratch);
  return Window(all.value(least));
}

// Collects what the window holds of vectors [begin, end), in no certain order, and counts it; what
// is beyond the capacity is only counted.
template <class C>
__device__ __forceinline__ void collect(const Row& row, int begin, int end, const Window& window,
                                        uint64_t* candidates, int* count) {
  for (int batch = begin; batch < end; batch += kVectors * C::kThreads) {
    const int first = batch + static_cast<int>(threadIdx.x);
    float4 x[kVectors];
    if (batch >= row.whole_begin() && batch + kVectors * C::kThreads <= min(end, row.whole_end())) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) x[j] = row.load_whole(first + j * C::kThreads);
    } else {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const int vector = first + j * C::kThreads;
        const float none = Row::nothing();
        x[j] = vector < end ? row.load(vector) : make_float4(none, none, none, none);
      }
    }
    int own = 0;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      own += window.holds(x[j].x);
      own += window.holds(x[j].y);
      own += window.holds(x[j].z);
      own += window.holds(x[j].w);
    }
    const int inclusive = warp_inclusive_sum(own);
    const int together = __shfl_sync(~0u, inclusive, 31);
    if (together == 0) continue;
    int base = 0;
    if (threadIdx.x % 32 == 0) base = atomicAdd(count, together);
    base = __shfl_sync(~0u, base, 0);
    if (base + together > C::kCapacity) continue;
    uint64_t* to = candidates + base + inclusive - own;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int position = row.position(first + j * C::kThreads);
      if (window.holds(x[j].x)) *to++ = make_candidate(x[j].x, position);
      if (window.holds(x[j].y)) *to++ = make_candidate(x[j].y, position + 1);
      if (window.holds(x[j].z)) *to++ = make_candidate(x[j].z, position + 2);
      if (window.holds(x[j].w)) *to++ = make_candidate(x[j].w, position + 3);
    }
  }
}

// Brings the candidates of all CTAs of the cluster into the first one's shared memory, if they fit.
// Returns how many there are. The others may leave afterwards.
template <class C>
__device__ __forceinline__ int gather(uint64_t* candidates, Scratch& scratch) {
  cg::cluster_group cluster = cg::this_cluster();
  const int rank = static_cast<int>(cluster.block_rank());
  const int ranks = static_cast<int>(cluster.num_blocks());
  if (static_cast<int>(threadIdx.x) < ranks) {
    *cluster.map_shared_rank(&scratch.counts[rank], threadIdx.x) = scratch.candidates;
  }
  cluster.sync();
  int before = 0;
  int total = 0;
#pragma unroll
  for (int r = 0; r < kMaxCluster; ++r) {
    const int theirs = r < ranks ? scratch.counts[r] : 0;
    if (r < rank) before += theirs;
    total += theirs;
  }
  if (rank != 0 && total <= C::kCapacity) {
    uint64_t* to = cluster.map_shared_rank(candidates, 0) + before;
    for (int i = threadIdx.x; i < scratch.candidates; i += C::kThreads) to[i] = candidates[i];
  }
  cluster.sync();
  return total;
}

__device__ __forceinline__ void mark(unsigned* chosen, int position) {
  atomicOr(&chosen[position / 32], 1u << position % 32);
}

// Marks the k largest of the candidates, or all if there are no more; they become keys.
template <class C>
__device__ __forceinline__ void choose(uint64_t* candidates, int count, int k, const Window& window,
                                       unsigned* chosen, Scratch& scratch) {
  unsigned largest = 0;
  for (int i = threadIdx.x; i < count; i += C::kThreads) {
    const uint64_t candidate = candidates[i];
    const int position = static_cast<int>(candidate >> 32);
    if (count <= k) {
      mark(chosen, position);
    } else {
      const unsigned rise =
          window.rise(__int_as_float(static_cast<int>(static_cast<unsigned>(candidate))));
      largest = max(largest, rise);
      candidates[i] = make_key(rise, position);
    }
  }
  if (count <= k) return;
  const uint64_t* keys = candidates;
  largest = __reduce_max_sync(~0u, largest);
  if (threadIdx.x % 32 == 0) atomicMax(&scratch.largest, largest);
  __syncthreads();

  // The first digit: the upper ten of the bits in which the values differ.
  const int bits = 32 - __clz(static_cast<int>(scratch.largest));
  const int shift = kValueBit + max(0, bits - kDigitBits);
  const auto digit = [&](uint64_t key) { return static_cast<int>(key >> shift); };
  for (int i = threadIdx.x; i < count; i += C::kThreads) {
    atomicAdd(&scratch.histogram[digit(keys[i])], 1u);
  }
  __syncthreads();
  Place place;
  find_bin<C::kThreads>(k, scratch, place);
  const int wanted = k - place.above;  // of those in the bin

  constexpr int kListed = C::kThreads < kBins / 2 ? C::kThreads : kBins / 2;
  if (place.inside > wanted && place.inside > kListed) {
    const auto each = [&](auto&& use) {
      for (int i = threadIdx.x; i < count; i += C::kThreads) use(keys[i]);
    };
    const uint64_t least =
        kth_largest<uint64_t, C::kThreads>(each, k, kValueBit + bits, kKeyEnd, scratch);
    each([&](uint64_t key) {
      if (key >= least) mark(chosen, position_of(key));
    });
    return;
  }
  for (int i = threadIdx.x; i < count; i += C::kThreads) {
    const uint64_t key = keys[i];
    if (digit(key) > place.bin || (digit(key) == place.bin && place.inside == wanted)) {
      mark(chosen, position_of(key));
    } else if (digit(key) == place.bin) {
      scratch.list[atomicAdd(&scratch.listed, 1)] = key;
    }
  }
  if (place.inside == wanted) return;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < place.inside) {
    const uint64_t key = scratch.list[threadIdx.x];
    int larger = 0;
    for (int i = 0; i < place.inside; ++i) larger += scratch.list[i] > key;
    if (larger < wanted) mark(chosen, position_of(key));
  }
}

// Marks the k largest of the whole row, which is read for each digit of the keys.
template <int kThreads>
__device__ __forceinline__ void choose_from_row(const Row& row, int k, unsigned* chosen,
                                                Scratch& scratch) {
  const Window all(kLowest);
  const auto each = [&](auto&& use) {
    for (int v = threadIdx.x; v < row.count(); v += kThreads) {
      const float4 x = row.load(v);
      const int position = row.position(v);
      if (all.holds(x.x)) use(make_key(all.rise(x.x), position));
      if (all.holds(x.y)) use(make_key(all.rise(x.y), position + 1));
      if (all.holds(x.z)) use(make_key(all.rise(x.z), position + 2));
      if (all.holds(x.w)) use(make_key(all.rise(x.w), position + 3));
    }
  };
  const uint64_t least = kth_largest<uint64_t, kThreads>(each, k, 64, kKeyEnd, scratch);
  each([&](uint64_t key) {
    if (key >= least) mark(chosen, position_of(key));
  });
}

// Writes the positions whose bits are set, ascending, and then -1.
template <int kThreads>
__device__ __forceinline__ void write_row(const TopkArgs& a, int64_t row, const uint4* chosen,
                                          int groups, int* positions, Scratch& scratch) {
  int done = 0;
  for (int base = 0; base < groups; base += kThreads) {
    const int group = base + static_cast<int>(threadIdx.x);
    const uint4 word = group < groups ? chosen[group] : make_uint4(0, 0, 0, 0);
    const unsigned words[4] = {word.x, word.y, word.z, word.w};
    const int own = __popc(word.x) + __popc(word.y) + __popc(word.z) + __popc(word.w);
    int total;
    int at = done + block_exclusive_sum(own, scratch.warp_sums, total);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      for (unsigned bits = words[w]; bits != 0; bits &= bits - 1) {
        positions[at++] = kGroup * group + 32 * w + __ffs(static_cast<int>(bits)) - 1;
      }
    }
    done += total;
    __syncthreads();
  }
  for (int i = threadIdx.x; i < a.k; i += kThreads) {
    int token = i < done ? positions[i] : -1;
    if (i < done && a.block_table != nullptr) {
      const int* table = a.block_table + row * a.block_table_stride;
      token = table[token / a.page] * a.page + token % a.page;
    }
    a.out[row * a.k + i] = token;
  }
}

// Grid: a cluster of `ranks` CTAs for each row.
template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kCtasPerSm)
    topk_kernel(const TopkArgs a, int ranks) {
  constexpr int kThreads = C::kThreads;
  extern __shared__ __align__(16) unsigned char storage[];
  __shared__ Scratch scratch;
  auto* candidates = reinterpret_cast<uint64_t*>(storage);             // [kCapacity]
  auto* chosen = reinterpret_cast<uint4*>(candidates + C::kCapacity);  // [ceil(n / 128)]: bits
  const int64_t which = blockIdx.x / ranks;
  const int rank = blockIdx.x % ranks;
  const int length = a.lengths == nullptr ? a.n : max(0, min(a.n, a.lengths[which]));
  const Row row(a.logits + which * a.logits_stride, length);
  const int slice = (row.count() + ranks - 1) / ranks;
  const int begin = min(row.count(), rank * slice);
  const int end = min(row.count(), begin + slice);

  const int groups = (length + kGroup - 1) / kGroup;

  cg::cluster_group cluster = cg::this_cluster();
  cg::cluster_group::arrival_token started = cluster.barrier_arrive();
  if (threadIdx.x == 0) {
    scratch.candidates = 0;
    scratch.listed = 0;
    scratch.largest = 0;
  }
  for (int i = threadIdx.x; i < kBins; i += kThreads) scratch.histogram[i] = 0;
  if (rank == 0) {
    for (int g = threadIdx.x; g < groups; g += kThreads) chosen[g] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
  Window window(kLowest);
  if (length > C::kCapacity) window = sampled_window<C>(row, a.k, scratch);
  collect<C>(row, begin, end, window, candidates, &scratch.candidates);
  __syncthreads();
  cluster.barrier_wait(std::move(started));  // nobody writes to a CTA that has not begun
  int count = scratch.candidates;
  if (ranks > 1) {
    count = gather<C>(candidates, scratch);
    if (rank != 0) return;
  }

  auto* bits = reinterpret_cast<unsigned*>(chosen);
  if (count <= C::kCapacity && (count >= a.k || window.floor == kLowest)) {
    choose<C>(candidates, count, a.k, window, bits, scratch);
  } else {
    choose_from_row<kThreads>(row, a.k, bits, scratch);
  }
  __syncthreads();
  auto* positions = reinterpret_cast<int*>(candidates);  // [k]
  write_row<kThreads>(a, which, chosen, groups, positions, scratch);
}

template <class C>
void launch(const TopkArgs& args, int ranks, cudaStream_t stream) {
  const auto kernel = &topk_kernel<C>;
  const int shared =
      C::kCapacity * sizeof(uint64_t) + (args.n + kGroup - 1) / kGroup * sizeof(uint4);
  FLASHMLA_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(ranks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(args.rows * ranks));
  config.blockDim = dim3(C::kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  FLASHMLA_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args, ranks));
}

// Many rows that are not too long: small CTAs, several on an SM, so that one reads while others
// choose. Otherwise an SM for each row, or for a part of it.
using ManyRows = Config<256, 5, 4096, 2>;
using LongRows = Config<1024, 1, 8192, 1>;
constexpr int kManyRowsMaxLength = 1 << 16;  // the smaller sample must be enough

}  // namespace topk

void launch_topk(const TopkArgs& args, cudaStream_t stream) {
  int device = 0, sms = 0;
  FLASHMLA_CUDA_CHECK(cudaGetDevice(&device));
  FLASHMLA_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  if (args.n <= topk::kManyRowsMaxLength && args.rows > 2 * sms) {
    return topk::launch<topk::ManyRows>(args, 1, stream);
  }
  const int64_t most = std::min<int64_t>(args.n / topk::kMinSlice, topk::kMaxCluster);
  const int64_t ranks = std::max<int64_t>(1, std::min(most, sms / args.rows));
  topk::launch<topk::LongRows>(args, static_cast<int>(ranks), stream);
}

}  // namespace flashmla::sm90
