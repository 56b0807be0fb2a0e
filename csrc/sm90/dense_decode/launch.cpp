#include <atomic>

#include "../../common/cuda_check.h"
#include "instances.h"

namespace flashmla::sm90 {
namespace {

int multiprocessors() {
  constexpr int kKnown = 64;
  static std::atomic<int> known[kKnown];
  int device = 0;
  FLASHMLA_CUDA_CHECK(cudaGetDevice(&device));
  int count = device < kKnown ? known[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    FLASHMLA_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    if (device < kKnown) known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

}  // namespace

// A CTA takes an SM for itself.
unsigned* dense_decode_meeting(const DecodeShape& shape, cudaStream_t stream) {
  const int64_t row_tiles = (shape.rows() + dense_decode::kRowsACta - 1) / dense_decode::kRowsACta;
  const int64_t ctas = row_tiles * shape.h_kv * shape.parts;
  return ctas <= multiprocessors() ? grid_counter(stream) : nullptr;
}

void launch_dense_decode(const DenseDecodeArgs& args, cudaStream_t stream) {
  (args.is_bf16 ? dense_decode::launch_bf16 : dense_decode::launch_fp16)(args, stream);
}

}  // namespace flashmla::sm90
