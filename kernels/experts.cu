// A mixture of experts: route, gate and up, down, and the sum of what each row's experts return.

#include <algorithm>
#include <cmath>

#include "experts.cuh"
#include "mma.cuh"

namespace kv {
namespace {

int64_t align_256(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Bytes of weights up to which one row is served by experts_few.cu: above, its warps stream more slowly than
// TMA does.
constexpr int64_t kFewBytes = int64_t{256} << 20;

int64_t padded(int64_t width) { return (width + 7) / 8 * 8; }

// The workspace. Its parts lie by max_rows, so that what was zero once between the rows of `gates` stays so.
struct Workspace {
  Routing routing;
  void *gates;  // [max_rows * n_chosen][padded width]
  void *outs;   // [max_rows * n_chosen][padded hidden]
  int64_t bytes;

  Workspace(void *base, int n_experts, int n_chosen, int hidden, int width, int max_rows) {
    const int64_t routed = static_cast<int64_t>(max_rows) * n_chosen;
    bytes = 0;
    const auto take = [&](int64_t n) {
      void *const at = static_cast<unsigned char *>(base) + bytes;
      bytes += align_256(n);
      return at;
    };
    routing.arrivals = static_cast<unsigned *>(take(sizeof(unsigned)));
    routing.n_experts = static_cast<int32_t *>(take(2 * sizeof(int32_t)));
    routing.experts = static_cast<ExpertRows *>(take(n_experts * sizeof(ExpertRows)));
    routing.logits = static_cast<float *>(take(static_cast<int64_t>(max_rows) * n_experts * 4));
    routing.ids = static_cast<int32_t *>(take(routed * 4));
    routing.weights = static_cast<float *>(take(routed * 4));
    routing.places = static_cast<int32_t *>(take(routed * 4));
    routing.sources = static_cast<int32_t *>(take(routed * 4));
    gates = take(routed * padded(width) * 2);
    outs = take(routed * padded(hidden) * 2);
  }
};

// out[row] = Σ weight · outs[place], in the order of choice; eight numbers a thread.
template <typename T>
__global__ void combine(Routing routing, const T *outs, int64_t outs_stride, T *out, int64_t out_stride,
                        int hidden, int n_chosen) {
  grid_wait();
  grid_launch_dependents();
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (column >= hidden) return;
  const int64_t row = blockIdx.y;
  float sums[8] = {};
#pragma unroll 4
  for (int i = 0; i < n_chosen; ++i) {
    const float weight = routing.weights[row * n_chosen + i];
    const int64_t place = routing.places[row * n_chosen + i];
    const Vec8<T> y = *reinterpret_cast<const Vec8<T> *>(outs + place * outs_stride + column);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = to_float2(y.pairs[j]);
      sums[2 * j] += weight * pair.x;
      sums[2 * j + 1] += weight * pair.y;
    }
  }
  T *const to = out + row * out_stride + column;
  if (column + 8 <= hidden) {
    Vec8<T> sum;
#pragma unroll
    for (int j = 0; j < 4; ++j) sum.pairs[j] = from_float2<T>(make_float2(sums[2 * j], sums[2 * j + 1]));
    *reinterpret_cast<Vec8<T> *>(to) = sum;
  } else {
    for (int j = 0; column + j < hidden; ++j) to[j] = from_float<T>(sums[j]);
  }
}

template <typename T>
int launch_combine(const kv_experts_params &p, const Workspace &workspace, kv_stream stream) {
  const int threads = 128;
  const dim3 grid((p.hidden + threads * 8 - 1) / (threads * 8), p.rows);
  return launch(combine<T>, grid, dim3(threads), 0, stream, workspace.routing,
                static_cast<const T *>(workspace.outs), padded(p.hidden), static_cast<T *>(p.out),
                p.out_stride, p.hidden, p.n_chosen);
}

// ---- grouped products with mma.sync, for every device ----

constexpr int kAnyColumns = 64, kAnyInputs = 32, kAnyWarps = 4;
constexpr int kAnyPitch =
    kAnyInputs / 8 + 1;  // In chunks of 16 bytes; odd, so rows' chunks lie in different banks.

// Rows of a block in tiles of 64 by 64, a warp 16 rows; of a gate 32 gates and what they multiply.
template <typename T>
__global__ void __launch_bounds__(kAnyWarps *kWarp) grouped_any(const __grid_constant__ GroupedProduct p) {
  __shared__ __align__(16) unsigned char shared[2][(kNarrowRows + kAnyColumns) * kAnyPitch * 16];
  grid_wait();
  grid_launch_dependents();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool routed = p.n_experts != nullptr;
  const int out_columns = p.gate ? p.outputs / 2 : p.outputs;
  const int tile_columns = p.gate ? kAnyColumns / 2 : kAnyColumns;
  const int n_blocks = routed ? p.n_experts[1] : p.groups * ((p.rows + kNarrowRows - 1) / kNarrowRows);
  GroupedWalk walk = {routed ? p.experts : nullptr, routed ? p.n_experts[0] : 0, p.rows, kNarrowRows,
                      (out_columns + tile_columns - 1) / tile_columns};
  const int steps = (p.inputs + kAnyInputs - 1) / kAnyInputs;
  for (int number = blockIdx.x; number < walk.tiles(n_blocks); number += gridDim.x) {
    const GroupedTile tile = walk.tile(number);
    const T *const weight =
        static_cast<const T *>(p.weight) + static_cast<int64_t>(tile.group) * p.outputs * p.inputs;
    const auto copy = [&](int step) {
      const uint32_t to = shared_address(shared[step % 2]);
      for (int i = threadIdx.x; i < (kNarrowRows + kAnyColumns) * (kAnyInputs / 8); i += kAnyWarps * kWarp) {
        const int at = i / (kAnyInputs / 8), chunk = i % (kAnyInputs / 8);
        const int input = step * kAnyInputs + chunk * 8;
        const T *from;
        bool valid = input < p.inputs;
        if (at < kNarrowRows) {
          valid &= at < tile.count;
          const int row = tile.first + min(at, tile.count - 1);
          const int64_t source = p.sources != nullptr ? p.sources[row] : row;
          from = static_cast<const T *>(p.x) + tile.group * p.x_group_stride + source * p.x_stride;
        } else {
          // Gates, then what they multiply.
          const int column = at - kNarrowRows;
          const bool up = p.gate && column >= tile_columns;
          const int output = tile.column * tile_columns + (up ? column - tile_columns : column);
          valid &= output < out_columns;
          from = weight + static_cast<int64_t>(valid ? output + (up ? out_columns : 0) : 0) * p.inputs;
        }
        cp_async_16(to + (at * kAnyPitch + chunk) * 16, valid ? from + input : from, valid);
      }
      cp_async_commit();
    };
    float sums[kAnyColumns / 8][4] = {};
    copy(0);
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<0>();
      __syncthreads();
      if (step + 1 < steps) copy(step + 1);
      const uint32_t x = shared_address(shared[step % 2]), weights = x + kNarrowRows * kAnyPitch * 16;
#pragma unroll
      for (int k = 0; k < kAnyInputs / 16; ++k) {
        uint32_t a[4];
        ldmatrix_x4(a, x + ((warp * 16 + lane % 16) * kAnyPitch + k * 2 + lane / 16) * 16);
#pragma unroll
        for (int j = 0; j < kAnyColumns / 16; ++j) {
          uint32_t b[4];
          ldmatrix_x4(
              b, weights + ((j * 16 + lane % 8 + lane / 16 * 8) * kAnyPitch + k * 2 + lane / 8 % 2) * 16);
          mma_16x8x16<T>(sums[2 * j], a, {b[0], b[1]});
          mma_16x8x16<T>(sums[2 * j + 1], a, {b[2], b[3]});
        }
      }
    }
    __syncthreads();
    const T *const bias = p.bias == nullptr
                              ? nullptr
                              : static_cast<const T *>(p.bias) + static_cast<int64_t>(tile.group) * p.outputs;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = warp * 16 + lane / 4 + i / 2 * 8;
      if (row >= tile.count) continue;
      T *const out =
          static_cast<T *>(p.out) + (tile.first + row) * p.out_stride + tile.group * p.out_group_stride;
      constexpr int kTiles = kAnyColumns / 8;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (p.gate && j >= kTiles / 2) continue;
        const int column = tile.column * tile_columns + j * 8 + lane % 4 * 2 + i % 2;
        if (column >= out_columns) continue;
        float y = sums[j][i] + (bias != nullptr ? to_float(bias[column]) : 0.f);
        if (p.gate) {
          const float up = sums[(j + kTiles / 2) % kTiles][i] +
                           (bias != nullptr ? to_float(bias[out_columns + column]) : 0.f);
          y = gated(p.activation, p.limit, y, up);
        }
        out[column] = from_float<T>(y);
      }
    }
  }
}

// Thread blocks of grouped_any: some for each SM.
int any_blocks() {
  static const int blocks = [] {
    int device = 0, count = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
      return 4;
    }
    return count * 4;
  }();
  return blocks;
}

}  // namespace

int grouped_block_rows(int expected_rows) {
  return grouped_sm90_serves() && expected_rows > kNarrowRows / 2 ? kWideRows : kNarrowRows;
}

int launch_grouped(const GroupedProduct &product, kv_stream stream) {
  if (grouped_sm90_serves()) return launch_grouped_sm90(product, stream);
  return KV_DISPATCH_DTYPE(product.dtype, T, [&] {
    return launch(grouped_any<T>, dim3(any_blocks()), dim3(kAnyWarps * kWarp), 0, stream, product);
  });
}

}  // namespace kv

extern "C" int64_t kv_experts_workspace_bytes(int32_t n_experts, int32_t n_chosen, int32_t hidden,
                                              int32_t width, int32_t max_rows) {
  return kv::Workspace(nullptr, n_experts, n_chosen, hidden, width, max_rows).bytes;
}

extern "C" int kv_experts(const kv_experts_params *params, kv_stream stream) {
  using namespace kv;
  const auto &p = *params;
  if (p.n_experts < 1 || p.n_experts > KV_MAX_EXPERTS || p.n_chosen < 1 || p.n_chosen > p.n_experts ||
      p.n_chosen > KV_MAX_CHOSEN || p.router.groups < 1 || p.n_experts % p.router.groups != 0 ||
      p.router.groups > KV_MAX_EXPERTS / 4 || p.rows > p.max_rows) {
    return static_cast<int>(cudaErrorInvalidValue);
  }
  if (p.rows == 0) return static_cast<int>(cudaSuccess);
  const Workspace workspace(p.workspace, p.n_experts, p.n_chosen, p.hidden, p.width, p.max_rows);
  const Routing &routing = workspace.routing;
  const int64_t read = int64_t{3} * p.n_chosen * p.hidden * p.width * 2;
  if (p.rows == 1 && read <= kFewBytes) {
    const int status = launch_route(p, routing, 0, stream);
    return status != 0 ? status : launch_experts_few(p, routing, workspace.gates, stream);
  }
  // As if rows chose at random.
  const double touched =
      p.n_experts * (1 - std::pow(1 - static_cast<double>(p.n_chosen) / p.n_experts, p.rows));
  const int expected_groups = std::max(static_cast<int>(std::lround(touched)), 1);
  const int expected_rows = (p.rows * p.n_chosen + expected_groups - 1) / expected_groups;

  int status = launch_route(p, routing, grouped_block_rows(expected_rows), stream);
  if (status != 0) return status;
  GroupedProduct product = {};
  product.weight = p.gate_up;
  product.bias = p.gate_up_bias;
  product.x = p.x;
  product.x_stride = p.x_stride;
  product.out = workspace.gates;
  product.out_stride = padded(p.width);
  product.sources = routing.sources;
  product.n_experts = routing.n_experts;
  product.experts = routing.experts;
  product.groups = p.n_experts;
  product.rows = p.rows;
  product.inputs = static_cast<int>(padded(p.hidden));
  product.outputs = 2 * p.width;
  product.gate = 1;
  product.activation = p.activation;
  product.limit = p.limit;
  product.expected_groups = expected_groups;
  product.expected_rows = expected_rows;
  product.dtype = p.dtype;
  status = launch_grouped(product, stream);
  if (status != 0) return status;
  product.weight = p.down;
  product.bias = p.down_bias;
  product.x = workspace.gates;
  product.x_stride = padded(p.width);
  product.out = workspace.outs;
  product.out_stride = padded(p.hidden);
  product.sources = nullptr;
  product.inputs = static_cast<int>(padded(p.width));
  product.outputs = p.hidden;
  product.gate = 0;
  product.early = 1;
  status = launch_grouped(product, stream);
  if (status != 0) return status;
  return KV_DISPATCH_DTYPE(p.dtype, T, [&] { return launch_combine<T>(p, workspace, stream); });
}
