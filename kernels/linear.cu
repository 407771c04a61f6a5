// The launcher of linear_sm90.cuh: tilings, tensor maps, clusters.
#include <algorithm>
#include <mutex>
#include <vector>

#include "linear_sm90.cuh"
#include "linear_tiling.h"

namespace kv {

extern template LinearKernel linear_kernel<__nv_bfloat16>(int, int);
extern template LinearKernel linear_kernel<__half>(int, int);

namespace {

int divide_up(int x, int by) { return (x + by - 1) / by; }

// Shared memory of an SM, and what the system takes of it for every block.
constexpr int kSharedBytes = 228 * 1024;
constexpr int kReservedBytes = 1024;

// What follows from a product's shape and its tiling.
struct Plan {
  int warpgroups, row_blocks, x_rows, tiles, stages, shared_bytes;

  Plan(int rows, int outputs, const LinearTiling &tiling) {
    warpgroups = rows <= kWarpgroupRows ? 1 : 2;
    const int block_rows = warpgroups * kWarpgroupRows;
    row_blocks = divide_up(rows, block_rows);
    const int box = 8 * tiling.share;
    x_rows = divide_up(std::min(rows, block_rows), box) * box;
    tiles = divide_up(outputs, tiling.columns);
    const int stage_bytes = (tiling.columns + x_rows) * kStageRowBytes;
    const int budget = kSharedBytes / tiling.resident - kReservedBytes - kBarrierBytes;
    stages = std::min(budget / stage_bytes, kMaxStages);
    const int partial_bytes = x_rows * (tiling.columns + kPartialPad) * static_cast<int>(sizeof(float));
    shared_bytes = kBarrierBytes + std::max(stages * stage_bytes, partial_bytes);
  }

  int blocks(const LinearTiling &tiling) const {
    return divide_up(tiles, tiling.share) * tiling.share * row_blocks * tiling.split;
  }
};

bool feasible(int rows, int outputs, int inputs, const LinearTiling &tiling) {
  const Plan plan(rows, outputs, tiling);
  return tiling.split * tiling.share * plan.row_blocks <= 8 && plan.row_blocks <= 2 && plan.stages >= 3 &&
         plan.shared_bytes <= kSharedBytes / tiling.resident - kReservedBytes &&
         (tiling.share == 1 || 8 * tiling.share <= rows) &&
         tiling.split <= divide_up(inputs, kStageInputs);
}

// Whether the device has what sm_90a has: 9.x only.
bool has_wgmma() {
  static const bool has = [] {
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
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
    return status == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(entry)
                                                                          : nullptr;
  }();
  return function;
}

// A map of boxes of `box_rows` rows by one stage's inputs over [rows][stride] 16-bit numbers.
bool make_map(CUtensorMap *map, const void *data, int rows, int inputs, int64_t stride, int box_rows, int dtype) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(inputs), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {kStageInputs, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  return encode_tiled()(map, dtype == KV_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                        const_cast<void *>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

std::vector<LinearTiling> linear_tilings(int rows, int outputs, int inputs) {
  std::vector<LinearTiling> tilings;
  for (int columns : {32, 48, 64, 96, 112, 128, 192, 224, 256}) {
    for (int split : {1, 2, 4, 8}) {
      for (int share : {1, 2, 4}) {
        for (int resident : {1, 2}) {
          const LinearTiling tiling = {columns, split, share, resident};
          if (feasible(rows, outputs, inputs, tiling)) tilings.push_back(tiling);
        }
      }
    }
  }
  return tilings;
}

int linear_launch(const kv_linear_params &params, const LinearTiling &tiling, kv_stream stream) {
  const Plan plan(params.rows, params.outputs, tiling);
  const LinearKernel kernel = params.dtype == KV_BF16
                                  ? linear_kernel<__nv_bfloat16>(plan.warpgroups, tiling.columns)
                                  : linear_kernel<__half>(plan.warpgroups, tiling.columns);
  CUtensorMap weight_map, x_map;
  if (kernel == nullptr || encode_tiled() == nullptr ||
      !make_map(&weight_map, params.weight, params.outputs, params.inputs, params.inputs, tiling.columns / 2,
                params.dtype) ||
      !make_map(&x_map, params.x, params.rows, params.inputs, params.x_stride, plan.x_rows / tiling.share,
                params.dtype)) {
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
  args.share = tiling.share;
  args.row_blocks = plan.row_blocks;
  args.epilogue = params.epilogue;
  args.activation = params.activation;
  args.out_f32 = params.out_f32;

  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = tiling.split * tiling.share * plan.row_blocks;
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.blocks(tiling));
  config.blockDim = dim3(linear_threads(plan.warpgroups));
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, weight_map, x_map, args));
}

}  // namespace kv

int32_t kv_linear_variants(int32_t rows, int32_t outputs, int32_t inputs, int32_t epilogue, int32_t dtype) {
  if (rows < 1 || rows > 256 || outputs < 1 || inputs < 8 || inputs % 8 != 0) return 0;
  if (epilogue == KV_GATE && outputs % 2 != 0) return 0;
  if ((dtype != KV_BF16 && dtype != KV_F16) || !kv::has_wgmma()) return 0;
  return static_cast<int32_t>(kv::linear_tilings(rows, outputs, inputs).size());
}

int64_t kv_linear_workspace_bytes(void) { return 0; }

int kv_linear(const kv_linear_params *params, kv_stream stream) {
  const auto tilings = kv::linear_tilings(params->rows, params->outputs, params->inputs);
  if (params->variant < 0 || params->variant >= static_cast<int>(tilings.size())) {
    return static_cast<int>(cudaErrorInvalidValue);
  }
  return kv::linear_launch(*params, tilings[params->variant], stream);
}
