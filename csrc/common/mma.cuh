// Layouts of tiles that wgmma reads, the loop over their k, and the fence around accumulators.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>
#include <cute/tensor.hpp>

namespace flashmla {

using cute::GMMA::Major;

// Rows of 64 16-bit values: 128 bytes, the widest swizzle. A [rows, 64] tile stored this way is
// what one TMA box delivers and what wgmma reads without bank conflicts.
template <class T, int Rows>
using SwizzledTile = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<T>{},
                                                  cute::Shape<cute::Int<Rows>, cute::Int<64>>{}));

// The same bytes, [Rows, Cols] row-major as stored, read as [Cols, Rows]: V arrives as
// [tokens, d_v] and the product needs its second operand as [d_v, tokens].
template <class T, int Rows, int Cols>
using TransposedTile =
    decltype(cute::composition(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<T>{},
                                                   cute::Shape<cute::Int<Rows>, cute::Int<Cols>>{}),
                               cute::Layout<cute::Shape<cute::Int<Cols>, cute::Int<Rows>>,
                                            cute::Stride<cute::Int<Rows>, cute::_1>>{}));

// C[64, N] += A[64, K] B[N, K]ᵀ by one warpgroup, operands from shared memory (ss) or A from
// registers (rs). The caller opens with warpgroup_arrive and closes with a commit.
template <class Mma, class A, class B, class C>
__device__ __forceinline__ void gemm_k_loop(Mma& mma, const A& a, const B& b, C& c) {
  CUTE_UNROLL
  for (int k = 0; k < cute::size<2>(a); ++k) {
    cute::gemm(mma, a(cute::_, cute::_, k), b(cute::_, cute::_, k), c);
    mma.accumulate_ = cute::GMMA::ScaleOut::One;
  }
}

// Tells the compiler that registers are in use by an asynchronous wgmma across this point.
template <class Fragment>
__device__ __forceinline__ void fence_fragment(Fragment& f) {
  cute::warpgroup_fence_operand(f);
}

}  // namespace flashmla
