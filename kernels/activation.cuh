// The non-linearities of a gate, in f32.
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

}  // namespace kv
