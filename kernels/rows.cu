// Rows taken by number (the embedding's, those whose logits are wanted), and what is done to each number of a
// row.

#include "common.cuh"

namespace kv {
namespace {

__global__ void copy_rows(kv_take_rows_params p) {
  grid_wait();
  grid_launch_dependents();
  const int row = blockIdx.x;
  const uint32_t wanted = p.wanted[row] - p.first;
  const bool held = wanted < p.table_rows;
  const uint16_t *from = static_cast<const uint16_t *>(p.table) + (held ? wanted : 0) * p.table_stride;
  uint16_t *to = static_cast<uint16_t *>(p.out) + row * p.out_stride;
  const int n_vectors = p.width / 8;
  const uint4 zeros = make_uint4(0, 0, 0, 0);
  for (int i = threadIdx.x; i < n_vectors; i += blockDim.x) {
    reinterpret_cast<uint4 *>(to)[i] = held ? reinterpret_cast<const uint4 *>(from)[i] : zeros;
  }
  for (int i = n_vectors * 8 + threadIdx.x; i < p.width; i += blockDim.x) to[i] = held ? from[i] : 0;
}

// out = multiplier * x (+ out), over the numbers of a row, by a block.
template <typename T>
__device__ __forceinline__ void scale_row(const T *x, T *out, int width, float multiplier, bool add) {
  const int n_vectors = width / 8;
  for (int i = threadIdx.x; i < n_vectors; i += blockDim.x) {
    const Vec8<T> numbers = reinterpret_cast<const Vec8<T> *>(x)[i];
    Vec8<T> result = {};
    if (add) result = reinterpret_cast<const Vec8<T> *>(out)[i];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 a = to_float2(numbers.pairs[j]), b = to_float2(result.pairs[j]);
      result.pairs[j] = from_float2<T>(make_float2(b.x + multiplier * a.x, b.y + multiplier * a.y));
    }
    reinterpret_cast<Vec8<T> *>(out)[i] = result;
  }
  for (int i = n_vectors * 8 + threadIdx.x; i < width; i += blockDim.x) {
    out[i] = from_float<T>((add ? to_float(out[i]) : 0.f) + multiplier * to_float(x[i]));
  }
}

template <typename T>
__global__ void take_rows(kv_take_rows_params p) {
  grid_wait();
  grid_launch_dependents();
  const int row = blockIdx.x;
  const uint32_t wanted = p.wanted[row] - p.first;
  T *out = static_cast<T *>(p.out) + row * p.out_stride;
  if (wanted < p.table_rows) {
    scale_row(static_cast<const T *>(p.table) + wanted * p.table_stride, out, p.width, p.multiplier, p.add);
  } else if (!p.add) {
    for (int i = threadIdx.x; i < p.width; i += blockDim.x) out[i] = from_float<T>(0.f);
  }
}

template <typename T>
__global__ void add_rows(kv_add_rows_params p) {
  grid_wait();
  grid_launch_dependents();
  const int row = blockIdx.x;
  scale_row(static_cast<const T *>(p.x) + row * p.x_stride, static_cast<T *>(p.out) + row * p.out_stride,
            p.width, p.multiplier, true);
}

__global__ void warp_logits(kv_warp_logits_params p) {
  grid_wait();
  grid_launch_dependents();
  float *row = p.logits + blockIdx.y * p.stride;
  const int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= p.width) return;
  float logit = p.multiplier * row[at];
  if (p.softcap > 0.f) logit = p.softcap * tanhf(logit / p.softcap);
  row[at] = logit;
}

constexpr int kNormaliseThreads = 256;

template <typename T>
__global__ void normalise_rows(kv_normalise_rows_params p) {
  __shared__ float shared[kNormaliseThreads / kWarp];
  grid_wait();
  grid_launch_dependents();
  T *row = static_cast<T *>(p.rows_of) + blockIdx.x * p.stride;
  float sum = 0.f;
  for (int i = threadIdx.x; i < p.width; i += kNormaliseThreads) {
    const float x = to_float(row[i]);
    sum += x * x;
  }
  const float length = fmaxf(sqrtf(block_sum<kNormaliseThreads / kWarp>(sum, shared)), 1e-12f);
  for (int i = threadIdx.x; i < p.width; i += kNormaliseThreads) {
    row[i] = from_float<T>(to_float(row[i]) / length);
  }
}

}  // namespace
}  // namespace kv

extern "C" int kv_take_rows(const kv_take_rows_params *params, kv_stream stream) {
  const auto &p = *params;
  if (p.rows == 0) return 0;
  if (!p.add && p.multiplier == 1.f) {
    return kv::launch(kv::copy_rows, dim3(p.rows), dim3(128), 0, stream, p);
  }
  return KV_DISPATCH_DTYPE(p.dtype, T, [&] {
    return kv::launch(kv::take_rows<T>, dim3(p.rows), dim3(128), 0, stream, p);
  });
}

extern "C" int kv_add_rows(const kv_add_rows_params *params, kv_stream stream) {
  if (params->rows == 0) return 0;
  return KV_DISPATCH_DTYPE(params->dtype, T, [&] {
    return kv::launch(kv::add_rows<T>, dim3(params->rows), dim3(256), 0, stream, *params);
  });
}

extern "C" int kv_warp_logits(const kv_warp_logits_params *params, kv_stream stream) {
  if (params->rows == 0 || params->width == 0) return 0;
  constexpr int kThreads = 256;
  const dim3 grid((params->width + kThreads - 1) / kThreads, params->rows);
  return kv::launch(kv::warp_logits, grid, dim3(kThreads), 0, stream, *params);
}

extern "C" int kv_normalise_rows(const kv_normalise_rows_params *params, kv_stream stream) {
  if (params->rows == 0) return 0;
  return KV_DISPATCH_DTYPE(params->dtype, T, [&] {
    return kv::launch(kv::normalise_rows<T>, dim3(params->rows), dim3(kv::kNormaliseThreads), 0, stream,
                      *params);
  });
}
