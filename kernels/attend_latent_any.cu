// Attention of one query a row over cached latents, for widths without a kernel of their own and older
// devices.

#include "common.cuh"
#include "decode_plan.cuh"
#include "latent.h"
#include "softmax_state.cuh"

namespace kv {
namespace {

constexpr int kAnyThreads = 128;

// One thread block a row and head, in steps of 128 keys. Shared memory: the query, then the sums of values.
template <typename T>
__global__ void __launch_bounds__(kAnyThreads)
    attend_latent_of_any_width(const __grid_constant__ kv_attend_latent_params p) {
  constexpr int kAnyWarps = kAnyThreads / kWarp;
  extern __shared__ float query[];
  __shared__ float weights[kAnyThreads];
  __shared__ uint32_t slots[kAnyThreads];
  __shared__ float largest_of[kAnyWarps], sum_of[kAnyWarps];
  grid_wait();
  grid_launch_dependents();
  if (static_cast<int>(blockIdx.y) >= *p.n_rows) return;
  const kv_decode_row row = p.rows[blockIdx.y];
  const int head = blockIdx.x, dim = p.kv_rank + p.rope_dim;
  float *const sums = query + dim;
  const T *const cache = static_cast<const T *>(p.cache);
  for (int d = threadIdx.x; d < dim; d += kAnyThreads) {
    query[d] = to_float(static_cast<const T *>(p.q)[row.token * p.q_stride + head * dim + d]);
  }
  for (int d = threadIdx.x; d < p.kv_rank; d += kAnyThreads) sums[d] = 0.f;
  SoftmaxState state;
  for (int base = first_key(row, p.window); base < row.kv_len; base += kAnyThreads) {
    const int key = base + static_cast<int>(threadIdx.x);
    __syncthreads();
    float score = kMinusInfinity;
    if (key < row.kv_len) {
      const uint32_t slot = p.slots[row.lane * p.slots_stride + key];
      slots[threadIdx.x] = slot;
      const T *const from = cache + static_cast<int64_t>(slot) * dim;
      score = 0.f;
      for (int d = 0; d < dim; ++d) score += query[d] * to_float(from[d]);
      score *= p.scale * kLog2e;
    }
    const float warp_largest = warp_max(score);
    if (threadIdx.x % kWarp == 0) largest_of[threadIdx.x / kWarp] = warp_largest;
    __syncthreads();
    float largest = largest_of[0];
#pragma unroll
    for (int w = 1; w < kAnyWarps; ++w) largest = fmaxf(largest, largest_of[w]);
    const float factor = state.raise(largest);
    const float weight = state.weight(score);
    weights[threadIdx.x] = weight;
    state.sum += block_sum<kAnyWarps>(weight, sum_of);
    for (int d = threadIdx.x; d < p.kv_rank; d += kAnyThreads) {
      float sum = sums[d] * factor;
      for (int j = 0; j < min(kAnyThreads, row.kv_len - base); ++j) {
        sum += weights[j] * to_float(cache[static_cast<int64_t>(slots[j]) * dim + d]);
      }
      sums[d] = sum;
    }
  }
  T *const out = static_cast<T *>(p.out) + row.token * p.out_stride + static_cast<int64_t>(head) * p.kv_rank;
  for (int d = threadIdx.x; d < p.kv_rank; d += kAnyThreads)
    out[d] = from_float<T>(sums[d] * state.normaliser());
}

template <typename T>
int launch_any(const kv_attend_latent_params &p, kv_stream stream) {
  const int bytes = (2 * p.kv_rank + p.rope_dim) * static_cast<int>(sizeof(float));
  const cudaError_t error =
      cudaFuncSetAttribute(attend_latent_of_any_width<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return static_cast<int>(error);
  return launch(attend_latent_of_any_width<T>, dim3(p.heads, p.max_rows), dim3(kAnyThreads), bytes, stream,
                p);
}

}  // namespace

int attend_latent_any(const kv_attend_latent_params &params, kv_stream stream) {
  return KV_DISPATCH_DTYPE(params.dtype, T, [&] { return launch_any<T>(params, stream); });
}

}  // namespace kv
