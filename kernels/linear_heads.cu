// Products of each head with a weight of its own: what takes queries into the latents' space, and values out
// of it.

#include "direct_product.cuh"
#include "experts.cuh"
#include "latent.h"

namespace kv {
namespace {

// Rows up to which the reading of the weights is the limit.
constexpr int kFewRows = 32;
constexpr int kWarps = 4;
constexpr int kColumnTiles = 2;
constexpr int kColumns = kColumnTiles * 8;

// Of few rows: a thread block has a tile of outputs of a head, its warps a part of the inputs each.
template <typename T>
__global__ void __launch_bounds__(kWarps *kWarp)
    linear_heads(const __grid_constant__ kv_linear_heads_params p) {
  __shared__ float parts[kWarps][16][kColumns + 2];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / 4, t = lane % 4;
  const int column = blockIdx.x * kColumns, head = blockIdx.y, first_row = blockIdx.z * 16;
  const T *x[1][2], *w[kColumnTiles];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    x[0][i] = static_cast<const T *>(p.x) + min(first_row + i * 8 + g, p.rows - 1) * p.x_stride +
              head * p.x_head_stride;
  }
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
    const int64_t output = static_cast<int64_t>(head) * p.outputs + min(column + j * 8 + g, p.outputs - 1);
    w[j] = static_cast<const T *>(p.weight) + output * p.inputs;
  }
  grid_wait();
  grid_launch_dependents();
  float sums[1][kColumnTiles][4] = {};
  multiply_direct<T>(sums, x, w, direct_begin(p.inputs, warp, kWarps),
                     direct_begin(p.inputs, warp + 1, kWarps));
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) parts[warp][e / 2 * 8 + g][j * 8 + 2 * t + e % 2] = sums[0][j][e];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 16 * kColumns; i += kWarps * kWarp) {
    const int row = first_row + i / kColumns, output = column + i % kColumns;
    if (row >= p.rows || output >= p.outputs) continue;
    float sum = 0.f;
#pragma unroll
    for (int part = 0; part < kWarps; ++part) sum += parts[part][i / kColumns][i % kColumns];
    static_cast<T *>(p.out)[row * p.out_stride + head * p.out_head_stride + output] = from_float<T>(sum);
  }
}

// Of heads whose numbers are not aligned: a thread an output.
template <typename T>
__global__ void linear_heads_any(const __grid_constant__ kv_linear_heads_params p) {
  grid_wait();
  grid_launch_dependents();
  const int output = blockIdx.x * blockDim.x + threadIdx.x, head = blockIdx.y;
  if (output >= p.outputs) return;
  const int64_t row = blockIdx.z;
  const T *const x = static_cast<const T *>(p.x) + row * p.x_stride + head * p.x_head_stride;
  const T *const w = static_cast<const T *>(p.weight) +
                     (static_cast<int64_t>(head) * p.outputs + output) * ((p.inputs + 7) / 8 * 8);
  float sum = 0.f;
  for (int i = 0; i < p.inputs; ++i) sum += to_float(x[i]) * to_float(w[i]);
  static_cast<T *>(p.out)[row * p.out_stride + head * p.out_head_stride + output] = from_float<T>(sum);
}

bool aligned(const kv_linear_heads_params &p) {
  return p.inputs % 8 == 0 && p.x_head_stride % 8 == 0 && p.out_head_stride % 8 == 0;
}

template <typename T>
int launch_few(const kv_linear_heads_params &p, kv_stream stream) {
  const dim3 grid((p.outputs + kColumns - 1) / kColumns, p.heads, (p.rows + 15) / 16);
  return launch(linear_heads<T>, grid, dim3(kWarps * kWarp), 0, stream, p);
}

template <typename T>
int launch_any(const kv_linear_heads_params &p, kv_stream stream) {
  const int threads = 64;
  const dim3 grid((p.outputs + threads - 1) / threads, p.heads, p.rows);
  return launch(linear_heads_any<T>, grid, dim3(threads), 0, stream, p);
}

}  // namespace
}  // namespace kv

extern "C" int kv_linear_heads(const kv_linear_heads_params *params, kv_stream stream) {
  using namespace kv;
  const auto &p = *params;
  if (p.rows == 0) return static_cast<int>(cudaSuccess);
  if (!aligned(p)) return KV_DISPATCH_DTYPE(p.dtype, T, [&] { return launch_any<T>(p, stream); });
  if (p.rows <= kFewRows) return KV_DISPATCH_DTYPE(p.dtype, T, [&] { return launch_few<T>(p, stream); });
  GroupedProduct product = {};
  product.weight = p.weight;
  product.x = p.x;
  product.x_stride = p.x_stride;
  product.x_group_stride = p.x_head_stride;
  product.out = p.out;
  product.out_stride = p.out_stride;
  product.out_group_stride = p.out_head_stride;
  product.groups = p.heads;
  product.rows = p.rows;
  product.inputs = p.inputs;
  product.outputs = p.outputs;
  product.expected_groups = p.heads;
  product.expected_rows = p.rows;
  product.dtype = p.dtype;
  return launch_grouped(product, stream);
}
