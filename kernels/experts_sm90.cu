// Grouped products with wgmma: rows of one of several weights each, on sm_90a.
//
// A thread block stays for many tiles, which it finds by the routing on the device. One warp streams tiles of
// weights through a ring of TMA stages, others gather rows into the same stages, warpgroups multiply; the
// loaders run ahead into the next tile while the sums of this one are stored. Rows are wgmma's 64 rows of A,
// as in linear_sm90.cuh: what lies in shared memory beyond an expert's rows only reaches sums that are not
// stored.

#include <algorithm>

#include "experts.cuh"
#include "linear_pipeline.cuh"
#include "linear_wgmma.cuh"

namespace kv {
namespace {

constexpr int kPanelInputs = 64;  // Rows of 128 bytes, the widest swizzle.
constexpr int kPanelRowBytes = 128;
// Panels of a stage. A step of the loop has a cost of its own, which a narrow tile pays with two of them
// only.
constexpr int panels_of(int warpgroups) { return warpgroups == 1 ? 2 : 1; }
constexpr int kWarpgroup = 128;
constexpr int kMaxStages = 24;
// Of shared memory, before the stages: barriers, then the experts that have rows.
constexpr int kBarrierBytes = 1024;
constexpr int kSharedBytes = 227 * 1024;
// Of products of so few rows that their start counts: the next one's blocks fit beside, and load while this
// one ends.
constexpr int kFewRows = 16;
constexpr int kFewRowsSharedBytes = 113 * 1024;
struct GroupedArgs {
  GroupedProduct product;
  int stages;
  int x_rows;      // Rows of x that a stage has room for.
  int list_bytes;  // Of the experts in shared memory; a multiple of 1024.
};

constexpr int kGatherWarps = 2;
constexpr int grouped_threads(int warpgroups) { return warpgroups * kWarpgroup + (1 + kGatherWarps) * kWarp; }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Copies 16 bytes past L1, or zeros where `valid` is false.
__device__ __forceinline__ void copy_16(uint32_t to, const void *from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

// Arrives once the thread's copies so far have landed.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// What threads copied is seen by the tensor cores after this, by those who waited for it.
__device__ __forceinline__ void copies_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <typename T>
__device__ __forceinline__ void store_pair(T *out, int column, int columns, float x, float y) {
  if (column + 1 < columns) {
    *reinterpret_cast<typename Pair<T>::type *>(out + column) = from_float2<T>(make_float2(x, y));
  } else if (column < columns) {
    out[column] = from_float<T>(x);
  }
}

template <typename T>
__device__ __forceinline__ float bias_at(const T *bias, int column, int columns) {
  return bias != nullptr && column < columns ? to_float(bias[column]) : 0.f;
}

#endif

template <typename T, int kWarpgroups, int kColumns>
__global__ void __launch_bounds__(grouped_threads(kWarpgroups), 1)
    grouped_sm90(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ GroupedArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kBlockRows = kWarpgroups * 64;
  constexpr int kConsumerWarps = kWarpgroups * 4;
  constexpr int kPanels = panels_of(kWarpgroups);
  constexpr int kStageInputs = kPanels * kPanelInputs;
  constexpr int kPanelBytes = kColumns * kPanelRowBytes;
  constexpr int kWeightBytes = kPanels * kPanelBytes;
  constexpr int kHalf = kColumns / 2;

  extern __shared__ __align__(1024) uint8_t shared[];
  const GroupedProduct &p = args.product;
  const uint32_t full = shared_address(shared);
  const uint32_t empty = full + kMaxStages * 8;
  const uint32_t x_stages = full + kBarrierBytes + args.list_bytes;
  const int x_panel_bytes = args.x_rows * kPanelRowBytes;
  const int x_bytes = kPanels * x_panel_bytes;
  const uint32_t weight_stages = x_stages + args.stages * x_bytes;
  ExpertRows *const list = reinterpret_cast<ExpertRows *>(shared + kBarrierBytes);

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (threadIdx.x == 0) {
    prefetch_map(weight_map);
    for (int stage = 0; stage < args.stages; ++stage) {
      barrier_init(full + stage * 8, 1 + kGatherWarps * kWarp);
      barrier_init(empty + stage * 8, kConsumerWarps);
    }
    barrier_init_fence();
  }
  if (!p.early) grid_wait();
  const bool routed = p.n_experts != nullptr;
  const int out_columns = p.gate ? p.outputs / 2 : p.outputs;
  const int tile_columns = p.gate ? kHalf : kColumns;
  const int n_listed = routed ? __ldcg(p.n_experts) : 0;
  const int n_blocks = routed ? __ldcg(p.n_experts + 1) : p.groups * ((p.rows + kBlockRows - 1) / kBlockRows);
  for (int i = threadIdx.x; i < n_listed; i += grouped_threads(kWarpgroups)) {
    reinterpret_cast<int4 *>(list)[i] = __ldcg(reinterpret_cast<const int4 *>(p.experts) + i);
  }
  __syncthreads();
  if (!p.early) grid_launch_dependents();

  GroupedWalk walk = {routed ? list : nullptr, n_listed, p.rows, kBlockRows,
                      (out_columns + tile_columns - 1) / tile_columns};
  const int n_tiles = walk.tiles(n_blocks);
  const int steps = (p.inputs + kStageInputs - 1) / kStageInputs;
  Ring ring;

  if (warp == kConsumerWarps) {  // the weights
    if (lane == 0) {
      const uint64_t policy = policy_evict_first();
      int loaded = 0;
      for (int number = blockIdx.x; number < n_tiles; number += gridDim.x) {
        const GroupedTile tile = walk.tile(number);
        const int row = tile.group * p.outputs + tile.column * tile_columns;
        for (int step = 0; step < steps; ++step, ++loaded) {
          const uint32_t barrier = full + ring.stage * 8;
          const uint32_t to = weight_stages + ring.stage * kWeightBytes;
          if (loaded >= args.stages) barrier_wait(empty + ring.stage * 8, ring.parity ^ 1);
          barrier_arrive_expecting(barrier, kWeightBytes);
#pragma unroll
          for (int panel = 0; panel < kPanels; ++panel) {
            const int input = step * kStageInputs + panel * kPanelInputs;
            const uint32_t at = to + panel * kPanelBytes;
            load_box(at, weight_map, input, row, barrier, policy);
            if (p.gate) load_box(at + kPanelBytes / 2, weight_map, input, row + out_columns, barrier, policy);
          }
          ring.advance(args.stages);
        }
      }
    }
    if (p.early) {
      grid_wait();
      grid_launch_dependents();
    }
    return;
  }

  if (p.early) {
    grid_wait();
    grid_launch_dependents();
  }

  if (warp > kConsumerWarps) {  // the rows
    constexpr int kThreads = kGatherWarps * kWarp;
    constexpr int kRowsAtOnce = kThreads / 8;
    constexpr int kPasses = kBlockRows / kRowsAtOnce;
    const int thread = threadIdx.x - (kConsumerWarps + 1) * kWarp;
    const int own_row = thread / 8, chunk = thread % 8;
    // Rows of passes differ by multiples of eight, so the swizzle is the same in each.
    const uint32_t own_to = x_stages + own_row * kPanelRowBytes + ((chunk ^ (own_row & 7)) << 4);
    int issued = 0;
    for (int number = blockIdx.x; number < n_tiles; number += gridDim.x) {
      const GroupedTile tile = walk.tile(number);
      const T *from[kPasses];
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int row = min(i * kRowsAtOnce + own_row, tile.count - 1) + tile.first;
        const int64_t source = p.sources != nullptr ? __ldcg(p.sources + row) : row;
        from[i] =
            static_cast<const T *>(p.x) + tile.group * p.x_group_stride + source * p.x_stride + chunk * 8;
      }
      for (int step = 0; step < steps; ++step, ++issued) {
        if (issued >= args.stages) barrier_wait(empty + ring.stage * 8, ring.parity ^ 1);
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          const int input = step * kStageInputs + panel * kPanelInputs;
          const bool inside = input + chunk * 8 < p.inputs;
          const uint32_t to = own_to + ring.stage * x_bytes + panel * x_panel_bytes;
#pragma unroll
          for (int i = 0; i < kPasses; ++i) {
            if (i * kRowsAtOnce + own_row < tile.count) {
              copy_16(to + i * kRowsAtOnce * kPanelRowBytes, inside ? from[i] + input : from[i], inside);
            }
          }
        }
        barrier_arrive_after_copies(full + ring.stage * 8);
        ring.advance(args.stages);
      }
    }
    return;
  }

  const int warpgroup = warp / 4;
  for (int number = blockIdx.x; number < n_tiles; number += gridDim.x) {
    const GroupedTile tile = walk.tile(number);
    const int own_rows =
        tile.count - warpgroup * 64;  // None or fewer: this warpgroup only keeps the ring going.
    // A chain of products for each panel, since one waits for itself.
    float chains[kPanels][kColumns / 2];
#pragma unroll
    for (int i = 0; i < kPanels * kColumns / 2; ++i) chains[i % kPanels][i / kPanels] = 0.f;
    int previous = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const uint32_t x = x_stages + ring.stage * x_bytes + warpgroup * 64 * kPanelRowBytes;
      const uint32_t weights = weight_stages + ring.stage * kWeightBytes;
      barrier_wait(full + ring.stage * 8, ring.parity);
      if (own_rows > 0) {
        copies_fence();
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kPanelRowBytes; k += 32) {
#pragma unroll
          for (int panel = 0; panel < kPanels; ++panel) {
            Wgmma<kColumns>::template add<T>(chains[panel], wgmma_operand(x + panel * x_panel_bytes + k),
                                             wgmma_operand(weights + panel * kPanelBytes + k));
          }
        }
        wgmma_commit();
        wgmma_wait<1>();
      }
      if (step > 0 && lane == 0) barrier_arrive(empty + previous * 8);
      previous = ring.stage;
      ring.advance(args.stages);
    }
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(empty + previous * 8);
    if (own_rows <= 0) continue;
    float (&sums)[kColumns / 2] = chains[0];
#pragma unroll
    for (int panel = 1; panel < kPanels; ++panel) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) sums[i] += chains[panel][i];
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp % 4 * 16 + lane / 4 + half * 8;
      if (row >= own_rows) continue;
      T *const out = static_cast<T *>(p.out) + (tile.first + warpgroup * 64 + row) * p.out_stride +
                     tile.group * p.out_group_stride;
      const T *const bias =
          p.bias == nullptr ? nullptr
                            : static_cast<const T *>(p.bias) + static_cast<int64_t>(tile.group) * p.outputs;
      if (p.gate) {
#pragma unroll
        for (int j = 0; j < kHalf / 8; ++j) {
          const int column = tile.column * kHalf + j * 8 + lane % 4 * 2;
          float y[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float gate = sums[4 * j + half * 2 + e] + bias_at(bias, column + e, out_columns);
            const float up = sums[4 * (j + kHalf / 8) + half * 2 + e] +
                             bias_at(bias == nullptr ? nullptr : bias + out_columns, column + e, out_columns);
            y[e] = gated(p.activation, p.limit, gate, up);
          }
          store_pair(out, column, out_columns, y[0], y[1]);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
          const int column = tile.column * kColumns + j * 8 + lane % 4 * 2;
          store_pair(out, column, out_columns, sums[4 * j + half * 2] + bias_at(bias, column, out_columns),
                     sums[4 * j + half * 2 + 1] + bias_at(bias, column + 1, out_columns));
        }
      }
    }
  }
#endif
}

// ---- launches ----

int divide_up(int x, int by) { return (x + by - 1) / by; }

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

int multiprocessors() {
  static const int count = std::max(device_attribute(cudaDevAttrMultiProcessorCount), 1);
  return count;
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled encode_tiled() {
  static const EncodeTiled function = []() -> EncodeTiled {
    void *entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
    return status == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<EncodeTiled>(entry)
               : nullptr;
  }();
  return function;
}

// A map of boxes of `box_rows` rows by one panel's inputs over the weights of all groups.
bool make_map(CUtensorMap *map, const GroupedProduct &p, int box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(p.inputs),
                               static_cast<cuuint64_t>(p.groups) * static_cast<cuuint64_t>(p.outputs)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(p.inputs) * 2};
  const cuuint32_t box[2] = {kPanelInputs, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const auto type = p.dtype == KV_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode_tiled() != nullptr &&
         encode_tiled()(map, type, 2, const_cast<void *>(p.weight), sizes, strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Cycles that the busiest SM needs, roughly: of memory, of the tensor cores, of the way from L2.
double cost(const GroupedProduct &p, int warpgroups, int columns) {
  const int block_rows = warpgroups * 64;
  const double blocks = static_cast<double>(divide_up(std::max(p.expected_rows, 1), block_rows)) *
                        std::max(p.expected_groups, 1);
  const double tiles = blocks * divide_up(p.outputs, columns);
  const int stage_inputs = panels_of(warpgroups) * kPanelInputs;
  const double tile_inputs = divide_up(p.inputs, stage_inputs) * stage_inputs;
  const double rows = std::min(p.expected_rows, block_rows);
  const double busy = std::ceil(tiles / multiprocessors());
  const double weight_bytes = tile_inputs * columns * 2, x_bytes = tile_inputs * rows * 2;
  const double from_memory = weight_bytes / 19 * std::max(p.expected_groups, 1) / blocks;
  const double from_cache = (weight_bytes + x_bytes) / 42;
  const double multiplied = tile_inputs * columns * block_rows / 2048 * 1.15;
  // A tile has an end that nothing hides.
  return busy * (std::max({from_memory, from_cache, multiplied}) + 600);
}

template <typename T, int kWarpgroups, int kColumns>
int launch_tiling(const GroupedProduct &p, kv_stream stream) {
  const auto kernel = grouped_sm90<T, kWarpgroups, kColumns>;
  CUtensorMap map;
  if (!make_map(&map, p, p.gate ? kColumns / 2 : kColumns)) return static_cast<int>(cudaErrorInvalidValue);
  GroupedArgs args = {};
  args.product = p;
  args.x_rows = std::min(kWarpgroups * 64, divide_up(p.rows, 8) * 8);
  args.list_bytes =
      p.n_experts == nullptr ? 0 : divide_up(p.groups * static_cast<int>(sizeof(ExpertRows)), 1024) * 1024;
  const int stage_bytes = panels_of(kWarpgroups) * (args.x_rows + kColumns) * kPanelRowBytes;
  const int before = kBarrierBytes + args.list_bytes;
  // Descriptors reach over a warpgroup's 64 rows, also where a stage has fewer: the last one's end in the
  // weights.
  const int budget = p.rows <= kFewRows ? kFewRowsSharedBytes : kSharedBytes;
  args.stages = std::min((budget - before) / stage_bytes, kMaxStages);
  const int bytes = before + args.stages * stage_bytes;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return static_cast<int>(status);
  return launch(kernel, dim3(multiprocessors()), dim3(grouped_threads(kWarpgroups)), bytes, stream, map,
                args);
}

template <typename T>
int launch_columns(const GroupedProduct &p, kv_stream stream) {
  const bool wide = grouped_block_rows(p.expected_rows) == kWideRows;
  int best = 0;
  double least = 0;
  for (const int columns : {256, 128, 64}) {
    if (wide ? columns < 128 : columns == 256) continue;
    const double needed = cost(p, wide ? 2 : 1, columns);
    if (best == 0 || needed < least) best = columns, least = needed;
  }
  if (wide) return best == 256 ? launch_tiling<T, 2, 256>(p, stream) : launch_tiling<T, 2, 128>(p, stream);
  return best == 128 ? launch_tiling<T, 1, 128>(p, stream) : launch_tiling<T, 1, 64>(p, stream);
}

}  // namespace

// wgmma is sm_90a's: devices of 9.x have it, later ones do not.
bool grouped_sm90_serves() {
  static const bool serves = device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
  return serves;
}

int launch_grouped_sm90(const GroupedProduct &product, kv_stream stream) {
  return KV_DISPATCH_DTYPE(product.dtype, T, [&] { return launch_columns<T>(product, stream); });
}

}  // namespace kv
