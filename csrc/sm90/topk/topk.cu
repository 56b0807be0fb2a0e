// Exact top-k: the k largest of each row, of equals the lower position, positions ascending.
//
//   1. A sample of the row gives a floor that a little more than k elements should reach.
//   2. The row is read once; what reaches the floor is kept as keys in shared memory. Several CTAs
//      of a cluster share a row when there are few; the first one gets all their keys.
//   3. The k-th largest key is found among those few, exactly: the keys of a row are distinct.
//   4. A bit for each position chosen; counting bits puts the positions in order.
// The floor can only cost time: should too many or too few elements reach it, the selection runs
// over the whole row instead, which is read again for each pass.
#include <cooperative_groups.h>

#include <algorithm>

#include "../../common/cuda_check.h"
#include "row.cuh"
#include "select.cuh"

namespace flashmla::sm90 {
namespace topk {

namespace cg = cooperative_groups;

constexpr int kVectors = 4;      // 16-byte loads of a thread in flight
constexpr int kMinSlice = 8192;  // elements that are worth a CTA of their own
constexpr int kMaxCluster = 8;   // what every card allows

// What a CTA keeps of an element that reached the floor.
struct Candidate {
  float value;
  int position;
};

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
  constexpr int kSpots = C::kSampleVectors * C::kThreads;
  constexpr int kSample = 4 * kSpots;
  const int target = min(k + k / 4 + 64 * (row.length / kSample), (k + C::kCapacity) / 2);
  const int rank = max(1, kSample * target / row.length);
  const int begin = row.whole_begin();
  const int whole = row.whole_end() - begin;
  float4 sample[C::kSampleVectors];
#pragma unroll
  for (int i = 0; i < C::kSampleVectors; ++i) {
    const int spot = static_cast<int>(threadIdx.x) + i * C::kThreads;
    sample[i] = row.load_whole(begin + spot * whole / kSpots);
  }
  const Window all(kLowest);
  const uint64_t least = kth_largest<C::kThreads>(
      [&](auto&& use) {
#pragma unroll
        for (int i = 0; i < C::kSampleVectors; ++i) {
          for (const float x : {sample[i].x, sample[i].y, sample[i].z, sample[i].w}) {
            use(all.holds(x) ? all.key(x, kTopkMaxRow - 1) : 0, 0);
          }
        }
      },
      rank, 64, 64 - 2 * kDigitBits, scratch);
  return Window(value_of(least, all));
}

// Collects what the window holds of vectors [begin, end), in no certain order, and counts it; what
// is beyond the capacity is only counted.
template <class C>
__device__ __forceinline__ void collect(const Row& row, int begin, int end, const Window& window,
                                        Candidate* candidates, int* count) {
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
    Candidate* to = candidates + base + inclusive - own;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int position = row.position(first + j * C::kThreads);
      if (window.holds(x[j].x)) *to++ = {x[j].x, position};
      if (window.holds(x[j].y)) *to++ = {x[j].y, position + 1};
      if (window.holds(x[j].z)) *to++ = {x[j].z, position + 2};
      if (window.holds(x[j].w)) *to++ = {x[j].w, position + 3};
    }
  }
}

// Brings the candidates of all CTAs of the cluster into the first one's shared memory, if they fit.
// Returns how many there are. The others may leave afterwards.
template <class C>
__device__ __forceinline__ int gather(Candidate* candidates, int* count) {
  cg::cluster_group cluster = cg::this_cluster();
  const int rank = static_cast<int>(cluster.block_rank());
  const int ranks = static_cast<int>(cluster.num_blocks());
  cluster.sync();
  int before = 0;
  int total = 0;
  for (int r = 0; r < ranks; ++r) {
    const int theirs = *cluster.map_shared_rank(count, r);
    if (r < rank) before += theirs;
    total += theirs;
  }
  if (rank != 0 && total <= C::kCapacity) {
    Candidate* to = cluster.map_shared_rank(candidates, 0) + before;
    for (int i = threadIdx.x; i < *count; i += C::kThreads) to[i] = candidates[i];
  }
  cluster.sync();
  return total;
}

// How many bits of a key tell these candidates apart: all keys are below 2^result.
template <class C, class ForEach>
__device__ __forceinline__ int key_bits(ForEach each, Scratch& scratch) {
  unsigned largest = 0;
  each([&](uint64_t key, int) { largest = max(largest, static_cast<unsigned>(key >> kValueBit)); });
  largest = __reduce_max_sync(~0u, largest);
  if (threadIdx.x % 32 == 0) atomicMax(&scratch.largest, largest);
  __syncthreads();
  return 64 - __clz(static_cast<int>(scratch.largest));
}

// A bit for each element whose key is at least `least`.
template <class ForEach>
__device__ __forceinline__ void mark(ForEach each, uint64_t least, unsigned* chosen) {
  each([&](uint64_t key, int position) {
    if (key >= least) atomicOr(&chosen[position / 32], 1u << position % 32);
  });
}

// Writes the positions whose bits are set, ascending, and then -1.
template <int kThreads>
__device__ __forceinline__ void write_row(const TopkArgs& a, int64_t row, const unsigned* chosen,
                                          int length, int* positions, Scratch& scratch) {
  const int words = (length + 31) / 32;
  const int each = (words + kThreads - 1) / kThreads;
  const int begin = min(words, static_cast<int>(threadIdx.x) * each);
  const int end = min(words, begin + each);
  int own = 0;
  for (int w = begin; w < end; ++w) own += __popc(chosen[w]);
  int total;
  int at = block_exclusive_sum(own, scratch.warp_sums, total);
  for (int w = begin; w < end; ++w) {
    for (unsigned bits = chosen[w]; bits != 0; bits &= bits - 1) {
      positions[at++] = 32 * w + __ffs(static_cast<int>(bits)) - 1;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < a.k; i += kThreads) {
    int token = i < total ? positions[i] : -1;
    if (i < total && a.block_table != nullptr) {
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
  auto* candidates = reinterpret_cast<Candidate*>(storage);               // [kCapacity]
  auto* chosen = reinterpret_cast<unsigned*>(candidates + C::kCapacity);  // [ceil(n / 32)] of bits
  const int64_t which = blockIdx.x / ranks;
  const int rank = blockIdx.x % ranks;
  const int length = a.lengths == nullptr ? a.n : max(0, min(a.n, a.lengths[which]));
  const Row row(a.logits + which * a.logits_stride, length);
  const int slice = (row.count() + ranks - 1) / ranks;
  const int begin = min(row.count(), rank * slice);
  const int end = min(row.count(), begin + slice);

  if (threadIdx.x == 0) {
    scratch.candidates = 0;
    scratch.largest = 0;
  }
  for (int i = threadIdx.x; i < kBins; i += kThreads) scratch.histogram[i] = 0;
  if (rank == 0) {
    for (int w = threadIdx.x; w < (length + 31) / 32; w += kThreads) chosen[w] = 0;
  }
  __syncthreads();
  Window window(kLowest);
  if (length > C::kCapacity) window = sampled_window<C>(row, a.k, scratch);
  collect<C>(row, begin, end, window, candidates, &scratch.candidates);
  int count;
  if (ranks > 1) {
    count = gather<C>(candidates, &scratch.candidates);
    if (rank != 0) return;
  } else {
    __syncthreads();
    count = scratch.candidates;
  }

  if (count <= C::kCapacity && (count >= a.k || window.floor == kLowest)) {
    const auto each = [&](auto&& use) {
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const Candidate c = candidates[i];
        use(window.key(c.value, c.position), c.position);
      }
    };
    uint64_t least = 0;
    if (count > a.k) {
      const int bits = key_bits<C>(each, scratch);
      least = kth_largest<kThreads>(each, a.k, bits, kKeyEnd, scratch);
    }
    mark(each, least, chosen);
  } else {
    const Window all(kLowest);
    const auto each = [&](auto&& use) {
      for (int v = threadIdx.x; v < row.count(); v += kThreads) {
        const float4 x = row.load(v);
        const int position = row.position(v);
        if (all.holds(x.x)) use(all.key(x.x, position), position);
        if (all.holds(x.y)) use(all.key(x.y, position + 1), position + 1);
        if (all.holds(x.z)) use(all.key(x.z, position + 2), position + 2);
        if (all.holds(x.w)) use(all.key(x.w, position + 3), position + 3);
      }
    };
    mark(each, kth_largest<kThreads>(each, a.k, 64, kKeyEnd, scratch), chosen);
  }
  __syncthreads();
  auto* positions = reinterpret_cast<int*>(candidates);  // [k]
  write_row<kThreads>(a, which, chosen, length, positions, scratch);
}

template <class C>
void launch(const TopkArgs& args, int ranks, cudaStream_t stream) {
  const auto kernel = &topk_kernel<C>;
  const int shared = C::kCapacity * sizeof(Candidate) + (args.n + 31) / 32 * sizeof(unsigned);
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
using ManyRows = Config<256, 4, 4096, 2>;
using LongRows = Config<1024, 1, 6144, 2>;
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
