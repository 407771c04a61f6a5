// Products of few rows or short inputs, whose operands go from global memory straight to the fragments of mma.sync.
//
// A product sums over its inputs, so these may be taken in any order, the same for both operands: a lane reads
// eight neighbouring inputs, sixteen bytes, and feeds the first four to one instruction and the rest to the next.
#pragma once

#include "mma.cuh"

namespace kv {

constexpr int kDirectInputs = 32;  // Of a step: eight for each of the four lanes that share a row.

// Volatile, so that a step's loads stand together before what uses them.
__device__ __forceinline__ uint4 load_direct(const void *from) {
  uint4 x;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from));
  return x;
}

// sums += x · wᵀ over inputs from `begin` to `end`, multiples of 8. A lane's rows of x are `x[i][0]` and, eight rows
// on, `x[i][1]`; its row of w is `w[j]`; see mma.cuh for which of the tile's these are, and for the sums.
template <typename T, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void multiply_direct(float (&sums)[kRowTiles][kColumnTiles][4],
                                                const T *const (&x)[kRowTiles][2],
                                                const T *const (&w)[kColumnTiles], int begin, int end) {
  // Steps whose loads are under way together: as many as the registers hold.
  constexpr int kDepth = kRowTiles * kColumnTiles == 1 ? 8 : kRowTiles * kColumnTiles == 2 ? 4 : 2;
  const int own = threadIdx.x % 4 * 8;
  for (int base = begin; base < end; base += kDepth * kDirectInputs) {
    uint4 a[kDepth][kRowTiles][2], b[kDepth][kColumnTiles];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      // Beyond the end other inputs are read, times zero: so that no load waits for a branch.
      const bool inside = base + d * kDirectInputs + own < end;
      const int k = inside ? base + d * kDirectInputs + own : 0;
#pragma unroll
      for (int i = 0; i < kRowTiles * 2; ++i) {
        a[d][i / 2][i % 2] = load_direct(x[i / 2][i % 2] + k);
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) b[d][j] = load_direct(w[j] + k);
      if (!inside) {
#pragma unroll
        for (int i = 0; i < kRowTiles * 2; ++i) a[d][i / 2][i % 2] = make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const uint4 &low = a[d][i][0], &high = a[d][i][1];
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          mma_16x8x16<T>(sums[i][j], {low.x, high.x, low.y, high.y}, {b[d][j].x, b[d][j].y});
          mma_16x8x16<T>(sums[i][j], {low.z, high.z, low.w, high.w}, {b[d][j].z, b[d][j].w});
        }
      }
    }
  }
}

// The part of `inputs` that one of `parts` takes: whole steps.
__device__ __forceinline__ int direct_begin(int inputs, int part, int parts) {
  const int steps = (inputs + kDirectInputs - 1) / kDirectInputs;
  return min(steps * part / parts * kDirectInputs, inputs);
}

}  // namespace kv
