// Writing and reading token caches: what api_fp8.cpp may call.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../launch.h"

namespace flashmla::sm90 {

#ifdef __CUDACC__
#define FLASHMLA_DEVICE __device__ __forceinline__
#else
#define FLASHMLA_DEVICE inline
#endif

// Where tokens go: slot = block * page + offset of each, in a cache whose pages may lie apart.
struct Slots {
  const void* slots;  // [tokens] int32 or int64; null: token i goes to slot i
  bool wide;          // int64
  int64_t capacity;   // blocks * page, below 2^32
  uint32_t page;

  // False: the token is dropped. Negative numbers are, and so is whatever lies beyond the cache.
  FLASHMLA_DEVICE bool find(int64_t token, uint32_t& block, uint32_t& offset) const {
    int64_t slot = token;
    if (slots != nullptr) {
      slot = wide ? static_cast<const int64_t*>(slots)[token]
                  : static_cast<const int32_t*>(slots)[token];
    }
    if (slot < 0 || slot >= capacity) return false;
    block = static_cast<uint32_t>(slot) / page;
    offset = static_cast<uint32_t>(slot) % page;
    return true;
  }
};

// Addresses and strides are multiples of 16 bytes throughout. Strides of x are in elements, those
// of caches in bytes.

struct PackArgs {
  const void* x;  // [tokens, 576] of `element`
  int64_t x_stride;
  Element element;
  int64_t tokens;
  bool power_of_two;
  uint8_t* cache;  // [blocks, page, 656]
  int64_t stride_block, stride_token;
  Slots slots;
};
void launch_fp8_pack(const PackArgs& args, cudaStream_t stream);

struct UnpackArgs {
  const uint8_t* cache;  // [outer, inner, 656]
  int64_t stride_outer, stride_inner;
  uint32_t inner;
  int64_t tokens;  // outer * inner, below 2^32
  float* out;      // [tokens, 576]
};
void launch_fp8_unpack(const UnpackArgs& args, cudaStream_t stream);

// Keys of the indexer: 128 values a token, one scale. In its cache a page holds the codes of all
// its tokens and then their scales; packed on their own, codes and scales lie apart.
struct IndexPackArgs {
  const void* x;  // [tokens, 128] of `element`
  int64_t x_stride;
  Element element;
  int64_t tokens;
  bool power_of_two;
  uint8_t* codes;        // of block 0, [page, 128]
  float* scales;         // of block 0, [page]
  int64_t stride_block;  // bytes from a block's codes to the next one's, and so for scales
  Slots slots;
};
void launch_index_pack(const IndexPackArgs& args, cudaStream_t stream);

struct AppendArgs {
  const uint8_t* x;  // [tokens, width]
  int64_t x_stride;  // bytes, as all strides here
  int width;         // bytes of a token, a multiple of 16
  int64_t tokens;
  uint8_t* cache;  // [blocks, page, width]
  int64_t stride_block, stride_token;
  Slots slots;
};
void launch_append(const AppendArgs& args, cudaStream_t stream);

}  // namespace flashmla::sm90
