// The softmax over a part of a row's keys, as a value: parts merge in any grouping, and are normalised once.
#pragma once

#include "common.cuh"

namespace kv {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kMinusInfinity = -__builtin_huge_valf();

// 2^x within 2 ulp; 0 for -inf.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Scores are in base 2, i.e. multiplied by log2(e), so that a weight is one ex2. A masked score is -inf. Whoever
// holds a state also holds a sum of values under the same weights, and scales it by the factor that `raise` returns
// (Milakov and Gimelshein, "Online normalizer calculation for softmax").
struct SoftmaxState {
  float max = kMinusInfinity;  // Largest score; -inf: no key yet, or all of them masked.
  float sum = 0.f;             // Of the weights 2^(score - max).

  // Finite, so that a masked score weighs 0 and never NaN.
  __device__ __forceinline__ float origin() const { return max == kMinusInfinity ? 0.f : max; }

  __device__ __forceinline__ float weight(float score) const { return exp2_approx(score - origin()); }

  // Makes room for scores up to `score`; returns by what earlier weights, and sums under them, are multiplied.
  __device__ __forceinline__ float raise(float score) {
    const float before = max;
    max = fmaxf(max, score);
    const float factor = weight(before);
    sum *= factor;
    return factor;
  }

  // 1 / sum; 0 where no key had a weight. A sink, in base 2, is a key without a value.
  __device__ __forceinline__ float normaliser(float sink = kMinusInfinity) const {
    const float with_sink = sum + weight(sink);
    return sum > 0.f ? 1.f / with_sink : 0.f;
  }
};

}  // namespace kv
