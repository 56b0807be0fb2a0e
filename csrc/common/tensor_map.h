// Host side of TMA: encodes the descriptor that tells the copy engine the shape of a tensor in
// global memory and of the box that one instruction moves.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <tvm/ffi/tvm_ffi.h>

#include <array>
#include <cstdint>

#include "cuda_check.h"

namespace flashmla {

using EncodeTiledFn = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                   const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                   const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                   CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's encoder, looked up at run time so that the library links no libcuda and therefore
// loads on a machine without a driver.
inline EncodeTiledFn encode_tiled() {
  static const EncodeTiledFn fn = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    FLASHMLA_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                         cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess) {
      TVM_FFI_THROW(RuntimeError) << "this driver has no cuTensorMapEncodeTiled (CUDA 12.0)";
    }
    return reinterpret_cast<EncodeTiledFn>(entry);
  }();
  return fn;
}

// A tensor of elements of `element` bytes seen as `Rank` dimensions, innermost first. `strides` are
// in elements and leave out the innermost (1). What a box covers outside the tensor arrives as
// zeros and is never read. What L2 has to fetch it fetches in pieces of `promotion`.
template <int Rank>
CUtensorMap make_tensor_map(CUtensorMapDataType type, int element, CUtensorMapSwizzle swizzle,
                            const void* base, const std::array<uint64_t, Rank>& shape,
                            const std::array<uint64_t, Rank - 1>& strides,
                            const std::array<uint32_t, Rank>& box,
                            CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  std::array<cuuint64_t, Rank> dims{};
  std::array<cuuint64_t, Rank> bytes{};  // one more than is read: a Rank of 1 has no stride
  std::array<cuuint32_t, Rank> extent{};
  std::array<cuuint32_t, Rank> step{};
  for (int i = 0; i < Rank; ++i) {
    dims[i] = shape[i];
    extent[i] = box[i];
    step[i] = 1;
    // The stride of a dimension of one is never used, and may be anything in the caller's tensor.
    if (i + 1 < Rank) bytes[i] = (shape[i + 1] == 1 ? shape[0] : strides[i]) * element;
  }
  CUtensorMap map;
  const CUresult status =
      encode_tiled()(&map, type, Rank, const_cast<void*>(base), dims.data(), bytes.data(),
                     extent.data(), step.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    TVM_FFI_THROW(ValueError) << "cuTensorMapEncodeTiled refused a tensor (code "
                              << static_cast<int>(status)
                              << "): its address and strides must be multiples of 16 bytes";
  }
  return map;
}

// 16-bit elements; boxes land in shared memory in the 128-byte swizzle that wgmma reads.
template <int Rank>
CUtensorMap make_tensor_map_16bit(
    const void* base, bool is_bf16, const std::array<uint64_t, Rank>& shape,
    const std::array<uint64_t, Rank - 1>& strides, const std::array<uint32_t, Rank>& box,
    CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  const auto type = is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return make_tensor_map<Rank>(type, 2, CU_TENSOR_MAP_SWIZZLE_128B, base, shape, strides, box,
                               promotion);
}

}  // namespace flashmla
