// What log-probabilities need to know of a row of logits, in one pass, as a value: parts merge in any
// grouping.
#pragma once

#include "common.cuh"

namespace kv {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLog2e = 1.4426950408889634f;

// 2^x within 2 ulp.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Integers in the order of IEEE 754's totalOrder.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float unordered(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The largest of some logits, the lowest id that has it, and the sum of exponentials (Milakov and Gimelshein,
// "Online normalizer calculation for softmax").
struct Summary {
  float max;
  uint32_t argmax;
  float sum;  // Σ exp((logit − max) / temperature); NaN where a logit is NaN or +∞.

  // Of no logits.
  __device__ __forceinline__ static Summary none() { return {-kInfinity, 0xffffffffu, 0.f}; }

  // Takes four logits with ids from `id`, above all ids before. `rate` is log2(e) / temperature.
  __device__ __forceinline__ void add(uint32_t id, float4 x, float rate) {
    const float largest = fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
    if (largest > max) {
      sum *= exp2_approx((max - largest) * rate);
      max = largest;
      argmax = id + (x.x == max ? 0 : x.y == max ? 1 : x.z == max ? 2 : 3);
    }
    const float origin = finite_origin(max);
    sum += (exp2_approx((x.x - origin) * rate) + exp2_approx((x.y - origin) * rate)) +
           (exp2_approx((x.z - origin) * rate) + exp2_approx((x.w - origin) * rate));
  }

  // The summary of a warp's parts; every lane gets it.
  __device__ __forceinline__ static Summary warp_merge(const Summary &part, float rate) {
    Summary all;
    all.max = unordered(__reduce_max_sync(0xffffffffu, ordered(part.max)));
    all.argmax = __reduce_min_sync(0xffffffffu, part.max == all.max ? part.argmax : 0xffffffffu);
    all.sum = warp_sum(part.sum * exp2_approx((part.max - finite_origin(all.max)) * rate));
    return all;
  }

  // Whether the logits are a distribution: neither NaN, nor +∞, nor nothing but −∞.
  __device__ __forceinline__ bool valid() const { return max > -kInfinity && sum == sum; }

 private:
  // What exponents are taken from, so that −∞ among nothing but −∞ weighs 0 and not NaN.
  __device__ __forceinline__ static float finite_origin(float max) { return max == -kInfinity ? 0.f : max; }
};

}  // namespace kv
