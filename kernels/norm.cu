// Norms: one block a row, the row kept in registers between its two passes.

#include "common.cuh"

namespace kv {
namespace {

constexpr int kVectors = 2;  // of eight numbers, a thread
constexpr int kMaxThreads = 1024;

// Root mean square norm (Zhang and Sennrich, arXiv 1910.07467), rounded once.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) rms_norm(kv_norm_params p) {
  __shared__ float shared[kThreads / kWarp];
  const T *weight = static_cast<const T *>(p.weight);
  Vec8<T> weights[kVectors];
  const int n_vectors = p.width / 8;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = v * kThreads + threadIdx.x;
    if (at < n_vectors) weights[v] = reinterpret_cast<const Vec8<T> *>(weight)[at];
  }
  grid_wait();
  grid_launch_dependents();
  const T *x = static_cast<const T *>(p.x) + blockIdx.x * p.x_stride;
  T *out = static_cast<T *>(p.out) + blockIdx.x * p.out_stride;
  Vec8<T> held[kVectors];
  float sum = 0.f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = v * kThreads + threadIdx.x;
    if (at >= n_vectors) continue;
    held[v] = reinterpret_cast<const Vec8<T> *>(x)[at];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = to_float2(held[v].pairs[i]);
      sum += pair.x * pair.x + pair.y * pair.y;
    }
  }
  const int tail = n_vectors * 8 + threadIdx.x;
  const float last = tail < p.width ? to_float(x[tail]) : 0.f;
  sum = block_sum<kThreads / kWarp>(sum + last * last, shared);
  const float scale = rsqrtf(sum / p.width + p.eps);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = v * kThreads + threadIdx.x;
    if (at >= n_vectors) continue;
    Vec8<T> result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = to_float2(held[v].pairs[i]);
      const float2 factor = to_float2(weights[v].pairs[i]);
      result.pairs[i] = from_float2<T>(make_float2(pair.x * scale * factor.x, pair.y * scale * factor.y));
    }
    reinterpret_cast<Vec8<T> *>(out)[at] = result;
  }
  if (tail < p.width) out[tail] = from_float<T>(last * scale * to_float(weight[tail]));
}

template <typename T>
int launch_rms_norm(const kv_norm_params &p, kv_stream stream) {
  const dim3 grid(p.rows);
  if (p.width <= 8 * kVectors * 256) return launch(rms_norm<T, 256>, grid, dim3(256), 0, stream, p);
  if (p.width <= 8 * kVectors * 512) return launch(rms_norm<T, 512>, grid, dim3(512), 0, stream, p);
  if (p.width > 8 * kVectors * kMaxThreads) return static_cast<int>(cudaErrorInvalidValue);
  return launch(rms_norm<T, kMaxThreads>, grid, dim3(kMaxThreads), 0, stream, p);
}

}  // namespace
}  // namespace kv

extern "C" int kv_norm(const kv_norm_params *params, kv_stream stream) {
  if (params->rows == 0) return 0;
  return KV_DISPATCH_DTYPE(params->dtype, T, [&] { return kv::launch_rms_norm<T>(*params, stream); });
}
