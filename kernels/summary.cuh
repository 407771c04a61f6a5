// What log-probabilities need to know of a row of logits, in one pass, as a value: parts merge in any grouping.
#pragma once

#include "common.cuh"

namespace kv {

constexpr float kInfinity = __builtin_huge_valf();

// Integers in the order of IEEE 754's totalOrder.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float unordered(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The largest of some logits, the lowest id that has it, and the sum of exponentials (Milakov and Gimelshein, "Online
// normalizer calculation for softmax").
struct Summary {
  float max;
  uint32_t argmax;
  float sum;  // Σ exp(logit − max); NaN where a logit is NaN or +∞.

  // Of no logits.
  __device__ __forceinline__ static Summary none() { return {-kInfinity, 0xffffffffu, 0.f}; }

  // Takes four logits with ids from `id`, above all ids before.
  __device__ __forceinline__ void add(uint32_t id, float4 x) {
    const float largest = fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
    if (largest > max) {
      sum *= expf(max - largest);
      max = largest;
      argmax = id + (x.x == max ? 0 : x.y == max ? 1 : x.z == max ? 2 : 3);
    }
    const float origin = finite_origin(max);
    sum += (expf(x.x - origin) + expf(x.y - origin)) + (expf(x.z - origin) + expf(x.w - origin));
  }

  // The summary of a warp's parts; every lane gets it.
  __device__ __forceinline__ static Summary warp_merge(const Summary &part) {
    Summary all;
    all.max = unordered(__reduce_max_sync(0xffffffffu, ordered(part.max)));
    all.argmax = __reduce_min_sync(0xffffffffu, part.max == all.max ? part.argmax : 0xffffffffu);
    all.sum = warp_sum(part.sum * expf(part.max - finite_origin(all.max)));
    return all;
  }

  // Whether the logits are a distribution: neither NaN, nor +∞, nor nothing but −∞.
  __device__ __forceinline__ bool valid() const { return max > -kInfinity && sum == sum; }

 private:
  // What exponents are taken from, so that −∞ among nothing but −∞ weighs 0 and not NaN.
  __device__ __forceinline__ static float finite_origin(float max) { return max == -kInfinity ? 0.f : max; }
};

}  // namespace kv
