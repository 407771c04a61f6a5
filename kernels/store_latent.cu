// Rotary embedding of the queries' and keys' rope parts (Su et al., arXiv 2104.09864), the norm of the
// latents, and the store of both.

#include "common.cuh"
#include "latent.h"

namespace kv {
namespace {

constexpr int kThreads = 128;

// The pair (x[i], x[i + half]) of a token, turned.
template <typename T>
__device__ __forceinline__ void turn(const T *x, T *out, int i, int half, const float2 *angles) {
  const float2 angle = angles[i];
  const float a = to_float(x[i]), b = to_float(x[i + half]);
  out[i] = from_float<T>(a * angle.x - b * angle.y);
  out[i + half] = from_float<T>(b * angle.x + a * angle.y);
}

// One thread block a token.
template <typename T>
__global__ void __launch_bounds__(kThreads) store_latent(const __grid_constant__ kv_store_latent_params p) {
  __shared__ float shared[kThreads / kWarp];
  grid_wait();
  grid_launch_dependents();
  const int64_t token = blockIdx.x;
  const int half = p.rope_dim / 2;
  const float2 *const angles = reinterpret_cast<const float2 *>(p.angles) + token * half;
  const T *const queries = static_cast<const T *>(p.queries) + token * p.queries_stride;
  T *const absorbed = static_cast<T *>(p.absorbed) + token * p.absorbed_stride;
  for (int i = threadIdx.x; i < p.heads * half; i += kThreads) {
    const int head = i / half;
    turn(queries + head * (p.nope_dim + p.rope_dim) + p.nope_dim,
         absorbed + head * (p.kv_rank + p.rope_dim) + p.kv_rank, i % half, half, angles);
  }
  const int64_t slot = p.stores[token];
  if (slot < 0) return;
  const T *const latent = static_cast<const T *>(p.latents) + token * p.latents_stride;
  T *const cached = static_cast<T *>(p.cache) + slot * (p.kv_rank + p.rope_dim);
  for (int i = threadIdx.x; i < half; i += kThreads) {
    turn(latent + p.kv_rank, cached + p.kv_rank, i, half, angles);
  }
  float sum = 0.f;
  for (int i = threadIdx.x; i < p.kv_rank; i += kThreads) {
    const float x = to_float(latent[i]);
    sum += x * x;
  }
  sum = block_sum<kThreads / kWarp>(sum, shared);
  const float scale = rsqrtf(sum / p.kv_rank + p.eps);
  const T *const weight = static_cast<const T *>(p.norm_weight);
  for (int i = threadIdx.x; i < p.kv_rank; i += kThreads) {
    cached[i] = from_float<T>(to_float(latent[i]) * scale * to_float(weight[i]));
  }
}

}  // namespace
}  // namespace kv

extern "C" int kv_store_latent(const kv_store_latent_params *params, kv_stream stream) {
  using namespace kv;
  if (params->tokens == 0) return static_cast<int>(cudaSuccess);
  return KV_DISPATCH_DTYPE(params->dtype, T, [&] {
    return launch(store_latent<T>, dim3(params->tokens), dim3(kThreads), 0, stream, *params);
  });
}
