// Pieces of rows that were cut among thread blocks: where they lie, who merges them, and in which order.
#pragma once

#include "common.cuh"
#include "decode_plan.cuh"
#include "softmax_state.cuh"

namespace kv {

// The workspace of a launch. A piece is a softmax state and a sum of values under it, for each query head of a
// pass.
struct Pieces {
  float *sums;         // [4 * parts][heads][head_dim]
  float2 *states;      // [4 * parts][heads] largest score, sum of weights
  unsigned *arrivals;  // [4 * parts], 0 between launches
};

// Four numbers of an output, each times `factor`.
template <typename T>
__device__ __forceinline__ void store_4(T *to, const float (&x)[4], float factor) {
  typename Pair<T>::type pairs[2] = {from_float2<T>(make_float2(x[0] * factor, x[1] * factor)),
                                     from_float2<T>(make_float2(x[2] * factor, x[3] * factor))};
  *reinterpret_cast<uint2 *>(to) = *reinterpret_cast<uint2 *>(pairs);
}

template <int kDim>
__device__ __forceinline__ void store_piece(const Pieces &pieces, int64_t at, int d,
                                            const SoftmaxState &state, const float (&sum)[4]) {
  *reinterpret_cast<float4 *>(pieces.sums + at * kDim + d) = make_float4(sum[0], sum[1], sum[2], sum[3]);
  if (d == 0) pieces.states[at] = make_float2(state.max, state.sum);
}

// Takes other states, and sums of four numbers under them, into one.
template <int kOthers>
__device__ __forceinline__ void merge(SoftmaxState &state, float (&sum)[4], const float2 (&other)[kOthers],
                                      const float4 (&x)[kOthers]) {
  float largest = other[0].x;
#pragma unroll
  for (int i = 1; i < kOthers; ++i) largest = fmaxf(largest, other[i].x);
  const float factor = state.raise(largest);
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] *= factor;
#pragma unroll
  for (int i = 0; i < kOthers; ++i) {
    const float weight = state.weight(other[i].x);
    state.sum += weight * other[i].y;
    sum[0] += weight * x[i].x;
    sum[1] += weight * x[i].y;
    sum[2] += weight * x[i].z;
    sum[3] += weight * x[i].w;
  }
}

// A row, under some query heads, of which a part holds only a piece.
struct Cut {
  void *out;           // Of its first head.
  const float *sinks;  // Of its first head, or null.
  int32_t heads;
  int32_t first_part, last_part;  // They hold all of it.

  __device__ __forceinline__ float sink(int head) const {
    return sinks != nullptr ? sinks[head] * kLog2e : kMinusInfinity;
  }
};

// The last of up to kFan neighbouring parts to arrive merges their pieces, and the last of those that did so the
// row: two levels, since one thread block would read the pieces of all the device's parts too slowly.
constexpr int kFan = 32;
constexpr int kLevels = 2;  // Enough for kFan * kFan parts.

// Of a group of pieces, or of a piece by itself at level 0: where it lies in the workspace. A part holds at most
// two cut rows, of which at most one begins in it.
__device__ __forceinline__ int place_of(const Cut &cut, int level, int part) {
  return 2 * (level * static_cast<int>(gridDim.x) + part) + (part == cut.first_part);
}

// The parts that merge with this one at a level: `first`, and every `stride` after it.
struct Group {
  int first, stride, size;

  __device__ __forceinline__ Group(const Cut &cut, int level, int part) {
    stride = level == 0 ? 1 : kFan;
    const int span = stride * kFan;
    first = cut.first_part + (part - cut.first_part) / span * span;
    size = ceil_div(min(cut.last_part + 1 - first, span), stride);
  }
};

// Tells that this thread block's share of a group is in the workspace; true: the whole group is. What the thread
// block wrote before its last barrier is seen by those who arrive later.
__device__ __forceinline__ bool arrive(const Pieces &pieces, const Cut &cut, int level) {
  const Group group(cut, level, blockIdx.x);
  unsigned *const arrivals = pieces.arrivals + place_of(cut, level, group.first);
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrivals) : "memory");
  if (static_cast<int>(before) + 1 < group.size) return false;
  *arrivals = 0;
  return true;
}

// Takes up to kAtOnce pieces of a group into a state, from number `begin` on: four numbers of a head.
template <int kAtOnce, int kDim, int kHeads>
__device__ __forceinline__ void merge_pieces(const Pieces &pieces, const Cut &cut, int level,
                                             const Group &group, int begin, int head, int d,
                                             SoftmaxState &state, float (&sum)[4]) {
  float2 other[kAtOnce];
  float4 x[kAtOnce];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const int part = group.first + min(begin + i, group.size - 1) * group.stride;
    const int64_t at = static_cast<int64_t>(place_of(cut, level, part)) * kHeads + head;
    other[i] = __ldcg(pieces.states + at);
    x[i] = __ldcg(reinterpret_cast<const float4 *>(pieces.sums + at * kDim + d));
    if (begin + i >= group.size) other[i] = make_float2(kMinusInfinity, 0.f);
  }
  merge(state, sum, other, x);
}

// Merges a group in the order of its keys; true: that was the row, and it is written.
template <typename T, int kDim, int kHeads>
__device__ __forceinline__ bool merge_group(const Pieces &pieces, const Cut &cut, int level) {
  const Group group(cut, level, blockIdx.x);
  const bool row = group.first == cut.first_part && group.first + group.size * group.stride > cut.last_part;
  for (int e = threadIdx.x; e < cut.heads * (kDim / 4); e += kDecodeThreads) {
    const int head = e / (kDim / 4), d = e % (kDim / 4) * 4;
    SoftmaxState state;
    float sum[4] = {};
    constexpr int kFew = 4, kMany = 16;
    if (group.size <= kFew) {
      merge_pieces<kFew, kDim, kHeads>(pieces, cut, level, group, 0, head, d, state, sum);
    } else {
      for (int begin = 0; begin < group.size; begin += kMany) {
        merge_pieces<kMany, kDim, kHeads>(pieces, cut, level, group, begin, head, d, state, sum);
      }
    }
    if (row) {
      store_4(static_cast<T *>(cut.out) + head * kDim + d, sum, state.normaliser(cut.sink(head)));
    } else {
      const int64_t at = static_cast<int64_t>(place_of(cut, level + 1, group.first)) * kHeads + head;
      store_piece<kDim>(pieces, at, d, state, sum);
    }
  }
  return row;
}

}  // namespace kv
