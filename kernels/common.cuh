// What every kernel needs: dtypes, reductions, programmatic dependent launch. No more.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "kvshard.h"

namespace kv {

constexpr int kWarp = 32;

// ---- programmatic dependent launch ----
//
// A kernel may begin while its predecessor in the stream still runs. So every kernel of ours waits before it reads what
// any earlier kernel wrote, or writes what an earlier one reads; only constants (weights, tables) may be touched before.
// Every kernel must wait, or the order would not hold over two kernels.

__device__ __forceinline__ void grid_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks be scheduled; they still wait for this grid to end.
__device__ __forceinline__ void grid_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Queues a kernel that may begin before its predecessor has ended.
template <typename... Params, typename... Args>
inline int launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, kv_stream stream,
                  Args &&...args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...));
}

// ---- dtypes ----

template <typename T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
};
template <>
struct Pair<__half> {
  using type = __half2;
};

__device__ __forceinline__ float2 to_float2(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ __forceinline__ float2 to_float2(__half2 x) { return __half22float2(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

template <typename T>
__device__ __forceinline__ typename Pair<T>::type from_float2(float2 x);
template <>
__device__ __forceinline__ __nv_bfloat162 from_float2<__nv_bfloat16>(float2 x) {
  return __float22bfloat162_rn(x);
}
template <>
__device__ __forceinline__ __half2 from_float2<__half>(float2 x) {
  return __float22half2_rn(x);
}

// Sixteen bytes: eight numbers of a 16-bit dtype.
template <typename T>
struct alignas(16) Vec8 {
  typename Pair<T>::type pairs[4];
};

// Calls `body` with a value of the type that a dtype names.
#define KV_DISPATCH_DTYPE(dtype, T, ...)                   \
  [&]() -> int {                                           \
    if ((dtype) == KV_BF16) {                              \
      using T = __nv_bfloat16;                             \
      return __VA_ARGS__();                                \
    }                                                      \
    if ((dtype) == KV_F16) {                               \
      using T = __half;                                    \
      return __VA_ARGS__();                                \
    }                                                      \
    return static_cast<int>(cudaErrorInvalidValue);        \
  }()

// ---- reductions, in a fixed order ----

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// Sum over a block of `kWarps` warps; `shared` holds kWarps numbers. Every thread gets it.
template <int kWarps>
__device__ __forceinline__ float block_sum(float x, float *shared) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp];
  return sum;
}

}  // namespace kv
