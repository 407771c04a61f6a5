// The end of a product: what becomes of its sums on their way to memory.
#pragma once

#include "common.cuh"

namespace kv {

#ifdef __CUDACC__

__device__ __forceinline__ float activate(float x, int activation) {
  if (activation == KV_GELU) return 0.5f * x * erfcf(-0.7071067812f * x);
  // The tanh form is x * sigmoid(2 u) with u = sqrt(2 / pi) * (x + 0.044715 x^3).
  const float exponent = activation == KV_SILU ? x : 1.5957691216f * (x + 0.044715f * x * x * x);
  return __fdividef(x, 1.f + __expf(-exponent));
}

// A gate's two factors; `limit` bounds them where the activation is KV_CLAMPED_SWIGLU.
__device__ __forceinline__ float gated(float gate, float up, int activation, float limit) {
  if (activation != KV_CLAMPED_SWIGLU) return activate(gate, activation) * up;
  const float g = fminf(gate, limit), u = fminf(fmaxf(up, -limit), limit);
  return __fdividef(g, 1.f + __expf(-1.702f * g)) * (u + 1.f);
}

// Four numbers of a row, of which the first n exist.
template <typename T>
__device__ __forceinline__ float4 load4(const T *from, int n) {
  if (n >= 4 && reinterpret_cast<uintptr_t>(from) % 8 == 0) {
    const uint2 raw = *reinterpret_cast<const uint2 *>(from);
    const float2 low = to_float2(reinterpret_cast<const typename Pair<T>::type &>(raw.x));
    const float2 high = to_float2(reinterpret_cast<const typename Pair<T>::type &>(raw.y));
    return make_float4(low.x, low.y, high.x, high.y);
  }
  return make_float4(n > 0 ? to_float(from[0]) : 0.f, n > 1 ? to_float(from[1]) : 0.f,
                     n > 2 ? to_float(from[2]) : 0.f, n > 3 ? to_float(from[3]) : 0.f);
}

template <typename T>
__device__ __forceinline__ void store4(T *to, float4 x, int n) {
  if (n >= 4) {
    if constexpr (sizeof(T) == sizeof(float)) {
      *reinterpret_cast<float4 *>(to) = x;
    } else {
      const auto low = from_float2<T>(make_float2(x.x, x.y));
      const auto high = from_float2<T>(make_float2(x.z, x.w));
      *reinterpret_cast<uint2 *>(to) =
          make_uint2(reinterpret_cast<const uint32_t &>(low), reinterpret_cast<const uint32_t &>(high));
    }
  } else {
    if (n > 0) to[0] = from_float<T>(x.x);
    if (n > 1) to[1] = from_float<T>(x.y);
    if (n > 2) to[2] = from_float<T>(x.z);
  }
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

__device__ __forceinline__ float4 operator*(float a, float4 b) {
  return make_float4(a * b.x, a * b.y, a * b.z, a * b.w);
}

#endif  // __CUDACC__

}  // namespace kv
