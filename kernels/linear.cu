// Launches linear_sm90.cuh: which tilings a product may have, tensor maps, clusters.
#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <utility>
#include <vector>

#include "linear_sm90.cuh"

namespace kv {

extern template LinearKernel linear_kernel<__nv_bfloat16>(int, int);
extern template LinearKernel linear_kernel<__half>(int, int);

namespace {

int divide_up(int x, int by) { return (x + by - 1) / by; }

constexpr int kMaxRows = 256;
constexpr int kMaxCluster = 8;
// Tilings offered for a product: the best by measurement was among the first 12 of `cost` for every
// Llama-3.1-8B shape.
constexpr int kMaxVariants = 12;
// Shared memory of an SM, and what the system takes of it for every block.
constexpr int kSharedBytes = 228 * 1024;
constexpr int kReservedBytes = 1024;

// How a product is cut among blocks; the words are linear_sm90.cuh's.
struct Tiling {
  int columns, split;
  int resident;  // blocks that an SM has shared memory for
};

// What follows from a product and its tiling.
struct Plan {
  int warpgroups, row_blocks, x_rows, blocks, stages, shared_bytes;
  bool sums_fit;  // in the stages' place, before those gathered

  Plan(int rows, int outputs, int epilogue, const Tiling &tiling) {
    warpgroups = rows <= kWarpgroupRows ? 1 : 2;
    const int block_rows = warpgroups * kWarpgroupRows;
    row_blocks = divide_up(rows, block_rows);
    x_rows = divide_up(std::min(rows, block_rows), 8) * 8;
    blocks = divide_up(outputs, tiling.columns) * row_blocks * tiling.split;
    const int row_bytes = x_rows * static_cast<int>(sizeof(float));
    const int gathered_bytes =
        tiling.split == 1 ? 0
                          : row_bytes * split_columns(tiling.columns, tiling.split, epilogue) * tiling.split;
    const int stage_bytes = (tiling.columns + x_rows) * kStageRowBytes;
    const int budget = kSharedBytes / tiling.resident - kReservedBytes - kBarrierBytes - gathered_bytes;
    stages = std::min(std::max(budget, 0) / stage_bytes, kMaxStages);
    const int sums_bytes = row_bytes * (tiling.columns + kSumsPad);
    shared_bytes = kBarrierBytes + std::max(stages * stage_bytes, sums_bytes) + gathered_bytes;
    sums_fit = tiling.split == 1 || sums_bytes <= stages * stage_bytes;
  }

  bool fits(const Tiling &tiling, int inputs) const {
    return row_blocks * tiling.split <= kMaxCluster && tiling.split <= divide_up(inputs, kStageInputs) &&
           stages >= 3 && sums_fit && shared_bytes <= kSharedBytes / tiling.resident - kReservedBytes;
  }
};

int multiprocessors() {
  static const int count = [] {
    int device = 0, n = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
      return 1;
    }
    return n;
  }();
  return count;
}

// An order of tilings, the likely good ones first; the terms were fitted to measurements of Llama-3.1-8B's
// shapes on an H200. What counts most is that the busiest SM has little more than its share of the weights.
double cost(const Plan &plan, const Tiling &tiling) {
  const double blocks_per_sm = static_cast<double>(plan.blocks) / multiprocessors();
  const double busiest = std::ceil(blocks_per_sm);
  const double under_way =
      plan.stages * tiling.columns * kStageRowBytes * std::min<double>(tiling.resident, busiest);
  const bool waves = blocks_per_sm > tiling.resident && blocks_per_sm < 6;
  return std::max(busiest / blocks_per_sm, 1.04) + 0.02 * std::log2(tiling.split) +
         0.02 * std::abs(std::log2(tiling.columns / 80.0)) + 0.05 * plan.x_rows / tiling.columns +
         (under_way < 90 * 1024 ? 0.1 : 0) + (waves ? 0.04 : 0);
}

// The tilings that a product may have, the likely good ones first; remembered, since every launch asks.
const std::vector<Tiling> &tilings(int rows, int outputs, int inputs, int epilogue) {
  static thread_local std::map<std::array<int, 4>, std::vector<Tiling>> known;
  const auto [entry, is_new] = known.try_emplace({rows, outputs, inputs, epilogue});
  std::vector<Tiling> &best = entry->second;
  if (!is_new) return best;
  std::vector<std::pair<double, Tiling>> found;
  for (const int columns : kLinearColumns) {
    for (const int split : {1, 2, 4, 8}) {
      for (const int resident : {1, 2, 3}) {
        const Tiling tiling = {columns, split, resident};
        const Plan plan(rows, outputs, epilogue, tiling);
        if (plan.fits(tiling, inputs)) found.emplace_back(cost(plan, tiling), tiling);
      }
    }
  }
  std::stable_sort(found.begin(), found.end(),
                   [](const auto &a, const auto &b) { return a.first < b.first; });
  for (const auto &[_, tiling] : found) {
    if (best.size() < kMaxVariants) best.push_back(tiling);
  }
  return best;
}

// wgmma is sm_90a's: devices of 9.x have it, later ones do not.
bool has_wgmma() {
  static const bool has = [] {
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
           major == 9;
  }();
  return has;
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

// A map of boxes of `box_rows` rows by one stage's inputs over [rows][stride] 16-bit numbers.
bool make_map(CUtensorMap *map, const void *data, int rows, int inputs, int64_t stride, int box_rows,
              int dtype) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(inputs), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {kStageInputs, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const auto type = dtype == KV_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode_tiled()(map, type, 2, const_cast<void *>(data), sizes, strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

int launch_linear(const kv_linear_params &params, const Tiling &tiling, kv_stream stream) {
  const Plan plan(params.rows, params.outputs, params.epilogue, tiling);
  const LinearKernel kernel = params.dtype == KV_BF16
                                  ? linear_kernel<__nv_bfloat16>(plan.warpgroups, tiling.columns)
                                  : linear_kernel<__half>(plan.warpgroups, tiling.columns);
  // Gate and up lie apart, and blocks of rows load a half each; else a tile is one box.
  const bool halves = params.epilogue == KV_GATE || plan.row_blocks > 1;
  CUtensorMap weight_map, x_map;
  if (kernel == nullptr || encode_tiled() == nullptr ||
      !make_map(&weight_map, params.weight, params.outputs, params.inputs, params.inputs,
                halves ? tiling.columns / 2 : tiling.columns, params.dtype) ||
      !make_map(&x_map, params.x, params.rows, params.inputs, params.x_stride, plan.x_rows, params.dtype)) {
    return static_cast<int>(cudaErrorInvalidValue);
  }
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (status != cudaSuccess) return static_cast<int>(status);

  LinearArgs args = {};
  args.bias = params.bias;
  args.out = params.out;
  args.out_stride = params.out_stride;
  args.rows = params.rows;
  args.outputs = params.outputs;
  args.steps = divide_up(params.inputs, kStageInputs);
  args.x_rows = plan.x_rows;
  args.stages = plan.stages;
  args.split = tiling.split;
  args.row_blocks = plan.row_blocks;
  args.epilogue = params.epilogue;
  args.activation = params.activation;
  args.out_f32 = params.out_f32;
  args.scale = params.scale;
  args.limit = params.limit;

  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = plan.row_blocks * tiling.split;
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.blocks);
  config.blockDim = dim3(linear_threads(plan.warpgroups));
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, weight_map, x_map, args));
}

}  // namespace
}  // namespace kv

int32_t kv_linear_variants(int32_t rows, int32_t outputs, int32_t inputs, int32_t epilogue, int32_t dtype) {
  if (rows < 1 || rows > kv::kMaxRows || outputs < 1 || inputs < 8 || inputs % 8 != 0) return 0;
  if (epilogue == KV_GATE && outputs % 2 != 0) return 0;
  if ((dtype != KV_BF16 && dtype != KV_F16) || !kv::has_wgmma()) return 0;
  return static_cast<int32_t>(kv::tilings(rows, outputs, inputs, epilogue).size());
}

int64_t kv_linear_workspace_bytes(void) { return 0; }

int kv_linear(const kv_linear_params *params, kv_stream stream) {
  const int variants =
      kv_linear_variants(params->rows, params->outputs, params->inputs, params->epilogue, params->dtype);
  if (params->variant < 0 || params->variant >= variants) return static_cast<int>(cudaErrorInvalidValue);
  const auto &tilings = kv::tilings(params->rows, params->outputs, params->inputs, params->epilogue);
  return kv::launch_linear(*params, tilings[params->variant], stream);
}
