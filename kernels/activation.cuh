// Non-linearities, in f32.
#pragma once

#include "common.cuh"

namespace kv {

__device__ __forceinline__ float silu(float x) { return x / (1.f + exp2f(-1.4426950408889634f * x)); }

__device__ __forceinline__ float gelu_tanh(float x) {
  return 0.5f * x * (1.f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.7071067811865476f)); }

__device__ __forceinline__ float activate(int activation, float x) {
  switch (activation) {
    case KV_SILU:
      return silu(x);
    case KV_GELU_TANH:
      return gelu_tanh(x);
    default:
      return gelu(x);
  }
}

// activation(gate) * up, but for the one that bounds both.
__device__ __forceinline__ float gated(int activation, float limit, float gate, float up) {
  if (activation != KV_CLAMPED_SWIGLU) return activate(activation, gate) * up;
  const float g = fminf(gate, limit), u = fminf(fmaxf(up, -limit), limit);
  return g / (1.f + exp2f(-1.702f * 1.4426950408889634f * g)) * (u + 1.f);
}

}  // namespace kv
