// Counters at which the blocks of a grid meet (csrc/common/grid_barrier.cuh).
#include <atomic>
#include <map>
#include <mutex>
#include <tuple>

#include "../common/cuda_check.h"
#include "launch.h"

namespace flashmla::sm90 {
namespace {

constexpr int kPlaces = 4096;
constexpr int kPlaceWords = 32;  // a line of its own

__device__ unsigned counters[kPlaces * kPlaceWords];

unsigned* first_counter(int device) {
  constexpr int kKnown = 64;
  static std::atomic<unsigned*> known[kKnown];
  unsigned* at = device < kKnown ? known[device].load(std::memory_order_relaxed) : nullptr;
  if (at == nullptr) {
    void* address = nullptr;
    FLASHMLA_CUDA_CHECK(cudaGetSymbolAddress(&address, counters));
    at = static_cast<unsigned*>(address);
    if (device < kKnown) known[device].store(at, std::memory_order_relaxed);
  }
  return at;
}

}  // namespace

// Grids that may run at the same time must not meet in the same place. Those of one stream, or
// captured from one stream into one graph, may overlap at their ends, but a later one comes to its
// counter only when the one before is over: whoever launches so that it may begin early waits first
// (cudaGridDependencySynchronize).
unsigned* grid_counter(cudaStream_t stream) {
  if (stream == cudaStreamPerThread) return nullptr;  // one handle for many streams
  int device = 0;
  FLASHMLA_CUDA_CHECK(cudaGetDevice(&device));
  cudaStreamCaptureStatus status{};
  unsigned long long capture = 0;
  FLASHMLA_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &capture));
  if (status != cudaStreamCaptureStatusActive) capture = 0;

  using Key = std::tuple<int, cudaStream_t, unsigned long long>;
  static thread_local Key last_key{-1, nullptr, 0};
  static thread_local int last_place = 0;
  const Key key{device, stream, capture};
  if (key != last_key) {
    static std::mutex mutex;
    static std::map<Key, int> places;
    const std::lock_guard<std::mutex> lock(mutex);
    last_place = places.emplace(key, static_cast<int>(places.size())).first->second;
    last_key = key;
  }
  return last_place < kPlaces ? first_counter(device) + last_place * kPlaceWords : nullptr;
}

}  // namespace flashmla::sm90
