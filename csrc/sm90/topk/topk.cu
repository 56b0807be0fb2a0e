// Exact top-k: the k largest of each row, of equals the lower position, positions ascending.
//
//   1. A sample of the row gives a floor that a little more than k elements should reach.
//   2. The row is read once; what reaches the floor is kept in shared memory.
//   3. The choice is made among those few, exactly: as keys, no two of them are equal.
//   4. A bit for each position chosen; counting bits puts the positions in order.
// The floor can only cost time: should too many or too few elements reach it, the selection runs
// over the whole row instead, which is read again for each pass.
//
// Here a CTA has a row to itself; in split.cu a cluster shares one.
#include "../../common/cuda_check.h"
#include "../../common/shared_memory.h"
#include "candidates.cuh"
#include "split.h"

namespace flashmla::sm90 {
namespace topk {

constexpr int kVectors = 4;  // 16-byte loads of a thread in flight

template <int Threads, int CtasPerSm, int Capacity, int SampleVectors>
struct Config {
  static constexpr int kThreads = Threads;
  static constexpr int kCtasPerSm = CtasPerSm;
  static constexpr int kCapacity = Capacity;            // candidates
  static constexpr int kSampleVectors = SampleVectors;  // of a thread
  using Scratch = topk::Scratch<10>;
  static_assert(kTopkMaxK <= kCapacity * 3 / 4, "the floor aims between the two");
};

// The value that about `target` elements of the row reach, from a sample spread evenly over it.
template <class C>
__device__ __forceinline__ Window sampled_window(const Row& row, int k,
                                                 typename C::Scratch& scratch) {
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
      rank, 32, 32 - 2 * C::Scratch::kDigitBits, scratch);
  return Window(all.value(least));
}

// Collects what the window holds of the row, in no certain order, and counts it.
template <class C>
__device__ __forceinline__ void collect(const Row& row, const Window& window, uint64_t* candidates,
                                        int* count) {
  const int end = row.count();
  for (int batch = 0; batch < end; batch += kVectors * C::kThreads) {
    const int first = batch + static_cast<int>(threadIdx.x);
    float4 x[kVectors];
    if (batch >= row.whole_begin() && batch + kVectors * C::kThreads <= row.whole_end()) {
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
    keep(
        x, [&](int j) { return row.position(first + j * C::kThreads); }, window, C::kCapacity,
        candidates, count);
  }
}

// Marks the k largest of the candidates, or all if there are no more; they become keys.
template <class C>
__device__ __forceinline__ void choose(uint64_t* candidates, int count, int k, const Window& window,
                                       unsigned* chosen, typename C::Scratch& scratch) {
  constexpr int kBins = C::Scratch::kBins;
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
  const int shift = kValueBit + max(0, bits - C::Scratch::kDigitBits);
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

// Grid: a CTA for each row.
template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kCtasPerSm) topk_kernel(const TopkArgs a) {
  constexpr int kThreads = C::kThreads;
  extern __shared__ __align__(16) unsigned char storage[];
  __shared__ typename C::Scratch scratch;
  auto* candidates = reinterpret_cast<uint64_t*>(storage);             // [kCapacity]
  auto* chosen = reinterpret_cast<uint4*>(candidates + C::kCapacity);  // [ceil(n / 128)]: bits
  const int64_t which = blockIdx.x;
  const int length = a.lengths == nullptr ? a.n : max(0, min(a.n, a.lengths[which]));
  const Row row(a.logits + which * a.logits_stride, length);
  const int groups = (length + kGroup - 1) / kGroup;
  if (threadIdx.x == 0) {
    scratch.candidates = 0;
    scratch.listed = 0;
    scratch.largest = 0;
  }
  for (int i = threadIdx.x; i < C::Scratch::kBins; i += kThreads) scratch.histogram[i] = 0;
  for (int g = threadIdx.x; g < groups; g += kThreads) chosen[g] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  Window window(kLowest);
  if (length > C::kCapacity) window = sampled_window<C>(row, a.k, scratch);
  collect<C>(row, window, candidates, &scratch.candidates);
  __syncthreads();
  const int count = scratch.candidates;
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
void launch(const TopkArgs& args, cudaStream_t stream) {
  constexpr int kMost = C::kCapacity * sizeof(uint64_t) + kTopkMaxRow / kGroup * sizeof(uint4);
  allow_shared_memory<&topk_kernel<C>>(kMost);
  const int groups = (args.n + kGroup - 1) / kGroup;
  const int shared = C::kCapacity * sizeof(uint64_t) + groups * sizeof(uint4);
  topk_kernel<C><<<static_cast<unsigned>(args.rows), C::kThreads, shared, stream>>>(args);
  FLASHMLA_CUDA_CHECK(cudaGetLastError());
}

// Many rows that are not too long: small CTAs, several on an SM, so that one reads while others
// choose. Otherwise an SM for each row.
using ManyRows = Config<256, 5, 4096, 2>;
using LongRows = Config<1024, 1, 8192, 1>;
constexpr int kManyRowsMaxLength = 1 << 16;  // the smaller sample must be enough

}  // namespace topk

void launch_topk(const TopkArgs& args, cudaStream_t stream) {
  int device = 0, sms = 0;
  FLASHMLA_CUDA_CHECK(cudaGetDevice(&device));
  FLASHMLA_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  if (args.n <= topk::kManyRowsMaxLength && args.rows > 2 * sms) {
    return topk::launch<topk::ManyRows>(args, stream);
  }
  const int ranks = topk::cluster_size(args, sms);
  if (ranks > 1) return topk::launch_split(args, ranks, stream);
  topk::launch<topk::LongRows>(args, stream);
}

}  // namespace flashmla::sm90
