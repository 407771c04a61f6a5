// Norms: one block a row, or of many rows one warp, the row kept in registers between its passes.

#include "common.cuh"

namespace kv {
namespace {

constexpr int kVectors = 2;  // of eight numbers, a thread
constexpr int kMaxThreads = 1024;

// Root mean square norm (Zhang and Sennrich, arXiv 1910.07467) and layer norm (Ba et al., arXiv 1607.06450),
// rounded once. The variance is that of the distances from the mean: a mean of squares would lose it where the
// mean is large.
template <typename T, int kThreads, int kKind>
__global__ void __launch_bounds__(kThreads) norm(kv_norm_params p) {
  __shared__ float shared[kThreads / kWarp];
  const T *weight = static_cast<const T *>(p.weight);
  const T *bias = kKind == KV_LAYER ? static_cast<const T *>(p.bias) : nullptr;
  Vec8<T> weights[kVectors], biases[kVectors] = {};
  const int n_vectors = p.width / 8;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = v * kThreads + threadIdx.x;
    if (at >= n_vectors) continue;
    weights[v] = reinterpret_cast<const Vec8<T> *>(weight)[at];
    if (bias != nullptr) biases[v] = reinterpret_cast<const Vec8<T> *>(bias)[at];
  }
  grid_wait();
  grid_launch_dependents();
  const T *x = static_cast<const T *>(p.x) + blockIdx.x * p.x_stride;
  T *out = static_cast<T *>(p.out) + blockIdx.x * p.out_stride;
  Vec8<T> held[kVectors], residual[kVectors];
  float sum = 0.f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = v * kThreads + threadIdx.x;
    if (at >= n_vectors) continue;
    held[v] = reinterpret_cast<const Vec8<T> *>(x)[at];
    if (p.add) residual[v] = reinterpret_cast<const Vec8<T> *>(out)[at];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = to_float2(held[v].pairs[i]);
      sum += kKind == KV_LAYER ? pair.x + pair.y : pair.x * pair.x + pair.y * pair.y;
    }
  }
  const int tail = n_vectors * 8 + threadIdx.x;
  const float last = tail < p.width ? to_float(x[tail]) : 0.f;
  float mean = 0.f;
  if constexpr (kKind == KV_LAYER) {
    __shared__ float shared_sums[kThreads / kWarp];
    mean = block_sum<kThreads / kWarp>(sum + last, shared_sums) / p.width;
    sum = tail < p.width ? (last - mean) * (last - mean) : 0.f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (v * kThreads + static_cast<int>(threadIdx.x) >= n_vectors) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = to_float2(held[v].pairs[i]);
        const float a = pair.x - mean, b = pair.y - mean;
        sum += a * a + b * b;
      }
    }
  } else {
    sum += last * last;
  }
  const float scale = rsqrtf(block_sum<kThreads / kWarp>(sum, shared) / p.width + p.eps);
  const auto normed = [&](float number, float factor, float offset) {
    if constexpr (kKind == KV_RMS_ONE_PLUS) factor += 1.f;
    if constexpr (kKind == KV_LAYER) return (number - mean) * scale * factor + offset;
    return number * scale * factor;
  };
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = v * kThreads + threadIdx.x;
    if (at >= n_vectors) continue;
    Vec8<T> result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = to_float2(held[v].pairs[i]);
      const float2 factor = to_float2(weights[v].pairs[i]);
      const float2 offset = to_float2(biases[v].pairs[i]);
      float2 y = make_float2(normed(pair.x, factor.x, offset.x), normed(pair.y, factor.y, offset.y));
      if (p.add) {
        const float2 before = to_float2(residual[v].pairs[i]);
        y = make_float2(before.x + y.x, before.y + y.y);
      }
      result.pairs[i] = from_float2<T>(y);
    }
    reinterpret_cast<Vec8<T> *>(out)[at] = result;
  }
  if (tail < p.width) {
    const float offset = bias != nullptr ? to_float(bias[tail]) : 0.f;
    const float y = normed(last, to_float(weight[tail]), offset);
    out[tail] = from_float<T>(p.add ? to_float(out[tail]) + y : y);
  }
}

constexpr int kWarpsOfRows = 8;  // of a block, each with its row
// Rows from which there are warps enough for every multiprocessor.
constexpr int kManyRows = 1024;

// The root mean square norm with a warp a row, with kPerLane vectors a lane under way.
template <typename T, int kKind, int kPerLane>
__global__ void __launch_bounds__(kWarpsOfRows *kWarp) norm_by_warps(kv_norm_params p) {
  grid_wait();
  grid_launch_dependents();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsOfRows + threadIdx.x / kWarp;
  if (row >= p.rows) return;
  const int lane = threadIdx.x % kWarp, n_vectors = p.width / 8;
  const auto *const x = reinterpret_cast<const Vec8<T> *>(static_cast<const T *>(p.x) + row * p.x_stride);
  const auto *const weight = static_cast<const Vec8<T> *>(p.weight);
  auto *const out = reinterpret_cast<Vec8<T> *>(static_cast<T *>(p.out) + row * p.out_stride);
  Vec8<T> held[kPerLane] = {};
#pragma unroll
  for (int v = 0; v < kPerLane; ++v) {
    if (v * kWarp + lane < n_vectors) held[v] = x[v * kWarp + lane];
  }
  float sum = 0.f;
#pragma unroll
  for (int v = 0; v < kPerLane; ++v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = to_float2(held[v].pairs[i]);
      sum += pair.x * pair.x + pair.y * pair.y;
    }
  }
  const float scale = rsqrtf(warp_sum(sum) / p.width + p.eps);
#pragma unroll
  for (int v = 0; v < kPerLane; ++v) {
    const int at = v * kWarp + lane;
    if (at >= n_vectors) continue;
    const Vec8<T> factors = weight[at];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = to_float2(held[v].pairs[i]);
      float2 factor = to_float2(factors.pairs[i]);
      if constexpr (kKind == KV_RMS_ONE_PLUS) factor = make_float2(factor.x + 1.f, factor.y + 1.f);
      held[v].pairs[i] = from_float2<T>(make_float2(pair.x * scale * factor.x, pair.y * scale * factor.y));
    }
    out[at] = held[v];
  }
}

template <typename T, int kKind>
int launch_norm(const kv_norm_params &p, kv_stream stream) {
  if constexpr (kKind != KV_LAYER) {
    constexpr int kFew = 16, kMany = 32;
    if (p.rows >= kManyRows && !p.add && p.width % 8 == 0 && p.width <= 8 * kWarp * kMany) {
      const auto kernel =
          p.width <= 8 * kWarp * kFew ? norm_by_warps<T, kKind, kFew> : norm_by_warps<T, kKind, kMany>;
      const dim3 blocks((p.rows + kWarpsOfRows - 1) / kWarpsOfRows);
      return launch(kernel, blocks, dim3(kWarpsOfRows * kWarp), 0, stream, p);
    }
  }
  const dim3 grid(p.rows);
  if (p.width <= 8 * kVectors * 256) return launch(norm<T, 256, kKind>, grid, dim3(256), 0, stream, p);
  if (p.width <= 8 * kVectors * 512) return launch(norm<T, 512, kKind>, grid, dim3(512), 0, stream, p);
  if (p.width > 8 * kVectors * kMaxThreads) return static_cast<int>(cudaErrorInvalidValue);
  return launch(norm<T, kMaxThreads, kKind>, grid, dim3(kMaxThreads), 0, stream, p);
}

template <typename T>
int launch_norm(const kv_norm_params &p, kv_stream stream) {
  switch (p.kind) {
    case KV_RMS:
      return launch_norm<T, KV_RMS>(p, stream);
    case KV_RMS_ONE_PLUS:
      return launch_norm<T, KV_RMS_ONE_PLUS>(p, stream);
    case KV_LAYER:
      return launch_norm<T, KV_LAYER>(p, stream);
    default:
      return static_cast<int>(cudaErrorInvalidValue);
  }
}

}  // namespace
}  // namespace kv

extern "C" int kv_norm(const kv_norm_params *params, kv_stream stream) {
  if (params->rows == 0) return 0;
  return KV_DISPATCH_DTYPE(params->dtype, T, [&] { return kv::launch_norm<T>(*params, stream); });
}
