// From raw tokens in shared memory to operands of wgmma in registers. e4m3 codes become bfloat16
// exactly: the scales are applied to scores and to probabilities, in float32.
#pragma once

#include <cuda_fp8.h>
#include <cutlass/numeric_conversion.h>

#include "few_rows_config.cuh"

namespace flashmla::sm90::sparse_decode::few_rows {

// Two codes, the lower byte first.
__device__ __forceinline__ uint32_t to_bfloat16(uint32_t codes) {
  const auto pair = static_cast<__nv_fp8x2_storage_t>(codes);
  const float2 value = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
  cutlass::NumericArrayConverter<Element, float, 2> convert;
  const auto result = convert({value.x, value.y});
  return reinterpret_cast<const uint32_t&>(result);
}

// What one thread holds of an operand A [64 rows, 16 columns]: rows `lane / 4` and eight further
// down of its warp's sixteen, columns 2 (lane % 4) and the next, and eight further on. In four
// registers: low columns of both rows, high columns of both rows.

// Rows of the operand are tokens. codes: sixteen of each of the thread's two tokens, for four
// wgmma, of which each takes two for its low columns and two for its high ones.
template <class Fragment>
__device__ __forceinline__ void keys_to_operand(const uint4 (&codes)[2], Fragment& a) {
  auto registers = cute::recast<uint32_t>(a);  // [4, 1, 4]
  CUTE_UNROLL
  for (int s = 0; s < 4; ++s) {
    CUTE_UNROLL
    for (int row = 0; row < 2; ++row) {
      const uint32_t word = reinterpret_cast<const uint32_t*>(&codes[row])[s];
      registers(s * 4 + row) = to_bfloat16(word & 0xffff);
      registers(s * 4 + 2 + row) = to_bfloat16(word >> 16);
    }
  }
}

// The same of the RoPE part, which is not quantised: eight columns for two wgmma.
template <class Fragment>
__device__ __forceinline__ void rope_to_operand(const uint4 (&low)[2], const uint4 (&high)[2],
                                                Fragment& a) {
  auto registers = cute::recast<uint32_t>(a);  // [4, 1, 4]
  CUTE_UNROLL
  for (int row = 0; row < 2; ++row) {
    registers(0 + row) = low[row].x;
    registers(2 + row) = low[row].y;
    registers(4 + row) = low[row].z;
    registers(6 + row) = low[row].w;
    registers(8 + row) = high[row].x;
    registers(10 + row) = high[row].y;
    registers(12 + row) = high[row].z;
    registers(14 + row) = high[row].w;
  }
}

// Rows of the operand are columns of V. codes: four columns of each of four tokens, 2 (lane % 4)
// and the next, and eight further on; for two wgmma, of which each takes two columns.
__device__ __forceinline__ void values_to_operand(const uint32_t (&codes)[4], uint32_t (&a)[8]) {
  CUTE_UNROLL
  for (int high = 0; high < 2; ++high) {
    const uint32_t first = codes[2 * high], second = codes[2 * high + 1];
    CUTE_UNROLL
    for (int tile = 0; tile < 2; ++tile) {
      const uint32_t pairs = __byte_perm(first, second, tile == 0 ? 0x5140 : 0x7362);
      a[tile * 4 + high * 2] = to_bfloat16(pairs & 0xffff);
      a[tile * 4 + high * 2 + 1] = to_bfloat16(pairs >> 16);
    }
  }
}

}  // namespace flashmla::sm90::sparse_decode::few_rows
