// out[rows][outputs] = x[rows][inputs] · weight[outputs][inputs]ᵀ for many rows, on sm_90a.
//
// Arithmetic bounds such a product, so all is done to keep the tensor cores fed, as in CUTLASS's
// warp-specialised persistent kernels (its documentation, "Efficient GEMM"): a block stays for many tiles of
// 128 rows by kColumns weights; one thread loads, through a ring of TMA stages, while two warpgroups multiply
// 64 rows each. The loads of the next tile go on while the sums of this one are stored. A cluster is two blocks
// with neighbouring rows and the same weights, of which each loads a half, multicast to both.
//
// Of a gate, a tile's weights are as many of gate as of up, side by side, so that the two factors of an output
// are sums of one thread: neither goes to memory.
#pragma once

#include "linear_epilogue.cuh"
#include "linear_pipeline.cuh"
#include "linear_wgmma.cuh"

namespace kv {

constexpr int kTileRows = 2 * kWarpgroupRows;
constexpr int kPersistentCluster = 2;
constexpr int kPersistentThreads = 3 * kWarpgroup;
constexpr int kPersistentMaxStages = 8;
// Widths of tiles that there are kernels for.
constexpr int kPersistentColumns[] = {256, 224, 192, 128};
// Columns of sums that a warp brings to memory at a time, by way of shared memory.
constexpr int kStagedColumns = 64;
constexpr int kPersistentBarrierBytes = 1024;
constexpr int kStagedBytes = kTileRows * kStagedColumns * static_cast<int>(sizeof(float));

struct PersistentArgs {
  const void *bias;  // [outputs] or null
  void *out;         // [rows][out_stride]
  int64_t out_stride;
  int rows, outputs;
  int steps;  // stages' worth of inputs: inputs / 64, rounded up
  int stages;
  int row_pairs, column_tiles;  // tiles, of a cluster's rows
  int is_added, is_activated, activation, out_f32;
  float scale, limit;
};

using PersistentKernel = void (*)(const CUtensorMap, const CUtensorMap, const PersistentArgs);

// The kernel for tiles of `columns` weights; null where there is none.
template <typename T>
PersistentKernel persistent_kernel(bool gate, int columns);

#ifdef __CUDACC__

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A cluster's tiles: every so-manieth in an order that keeps those made at once near to a square, so that what
// they read is read often while it lies in L2.
struct TileWalk {
  static constexpr int kSide = 8;

  int tile, row_pair, column_tile;

  __device__ __forceinline__ explicit TileWalk(const PersistentArgs &args)
      : tile(blockIdx.x / kPersistentCluster) {
    locate(args);
  }

  __device__ __forceinline__ bool is_done(const PersistentArgs &args) const {
    return tile >= args.row_pairs * args.column_tiles;
  }

  __device__ __forceinline__ void advance(const PersistentArgs &args) {
    tile += gridDim.x / kPersistentCluster;
    locate(args);
  }

 private:
  __device__ __forceinline__ void locate(const PersistentArgs &args) {
    const int band = tile / (kSide * args.column_tiles);
    const int inside = tile - band * kSide * args.column_tiles;
    const int pairs = min(kSide, args.row_pairs - band * kSide);
    column_tile = inside / max(pairs, 1);
    row_pair = band * kSide + inside - column_tile * pairs;
  }
};

// A place in the stream of stages over all of a block's tiles.
struct StreamCursor {
  TileWalk walk;
  RingPosition position;
  int step = 0;

  __device__ __forceinline__ explicit StreamCursor(const PersistentArgs &args) : walk(args) {}

  __device__ __forceinline__ void advance(const PersistentArgs &args) {
    position.advance(args.stages);
    if (++step == args.steps) {
      step = 0;
      walk.advance(args);
    }
  }
};

__device__ __forceinline__ void prefetch_l2(const void *address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Where a warp's staged sums lie: 16 rows of kStagedColumns, in chunks of four, so permuted that lanes which write
// accumulators are at different banks, and those which read rows at most two at one.
__device__ __forceinline__ int staged_at(int row, int chunk) {
  return row * kStagedColumns + (chunk ^ 2 * (row % 8)) * 4;
}

#endif  // sm_90a

template <typename T, bool kGate, int kColumns>
__global__ void __launch_bounds__(kPersistentThreads, 1)
    linear_persistent(const __grid_constant__ CUtensorMap weight_map,
                      const __grid_constant__ CUtensorMap x_map,
                      const __grid_constant__ PersistentArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kHalf = kColumns / 2;
  constexpr int kOutColumns = kGate ? kHalf : kColumns;
  constexpr int kXBytes = kTileRows * kStageRowBytes;
  constexpr int kHalfBytes = kHalf * kStageRowBytes;
  constexpr int kStageBytes = kXBytes + 2 * kHalfBytes;
  constexpr int kConsumerWarps = 2 * kWarpgroup / kWarp;

  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t full = shared_address(shared);
  const uint32_t empty = full + kPersistentMaxStages * 8;
  const uint32_t stages = full + kPersistentBarrierBytes;
  const int rank = cluster_rank();
  const int out_columns = kGate ? args.outputs / 2 : args.outputs;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < args.stages; ++stage) {
      barrier_init(full + stage * 8, 1);
      barrier_init(empty + stage * 8, kConsumerWarps * kPersistentCluster);
    }
    barrier_init_fence();
  }
  __syncthreads();
  cluster_arrive();
  cluster_wait();

  if (threadIdx.x < kWarpgroup) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      const uint64_t policy = policy_evict_normal();
      // This block's half of the weights, to both blocks.
      const auto load_weights = [&](const StreamCursor &at) {
        const uint32_t barrier = full + at.position.stage * 8;
        const uint32_t to = stages + at.position.stage * kStageBytes + kXBytes + rank * kHalfBytes;
        const int first = at.walk.column_tile * kOutColumns;
        barrier_wait(empty + at.position.stage * 8, at.position.parity ^ 1);
        barrier_arrive_expecting(barrier, kStageBytes);
        load_box_to(3, to, weight_map, at.step * kStageInputs,
                    first + (rank == 0 ? 0 : kGate ? out_columns : kHalf), barrier, policy);
      };
      const auto load_x = [&](const StreamCursor &at) {
        load_box(stages + at.position.stage * kStageBytes, x_map, at.step * kStageInputs,
                 (at.walk.row_pair * kPersistentCluster + rank) * kTileRows, full + at.position.stage * 8,
                 policy);
      };
      // Weights are constants: the first are loaded before the preceding kernel has ended.
      StreamCursor weights(args), x(args);
      for (int stage = 0; stage < min(args.stages, args.steps); ++stage, weights.advance(args)) {
        load_weights(weights);
      }
      grid_wait();
      for (; !x.walk.is_done(args); x.advance(args)) {
        if (x.walk.tile == weights.walk.tile && x.step == weights.step) {
          load_weights(weights);
          weights.advance(args);
        }
        load_x(x);
      }
      grid_launch_dependents();
    }
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int warpgroup = threadIdx.x / kWarpgroup - 1;
    const int warp = threadIdx.x / kWarp - kWarpgroup / kWarp;
    const int lane = threadIdx.x % kWarp;
    float *const staged =
        reinterpret_cast<float *>(shared + kPersistentBarrierBytes + args.stages * kStageBytes) +
        warp * 16 * kStagedColumns;
    const T *const bias = static_cast<const T *>(args.bias);
    const auto release = [&](int stage) {
      if (lane < kPersistentCluster) barrier_arrive_at(empty + stage * 8, lane);
    };
    // Of a part of a tile: eight columns a lane, four rows at a time.
    constexpr int kRounds = 4;
    const bool is_aligned = reinterpret_cast<uintptr_t>(args.out) % 16 == 0 && args.out_stride % 8 == 0;
    const auto load_added = [&](uint4(&added)[kRounds], int first_row, int first_column) {
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
        const int row = first_row + 4 * round + lane / 8;
        const int64_t offset = row * args.out_stride + first_column + 8 * (lane % 8);
        if (row < args.rows) {
          added[round] = *reinterpret_cast<const uint4 *>(static_cast<const T *>(args.out) + offset);
        }
      }
    };
    const auto store_rows = [&](const uint4(&added)[kRounds], int first_row, int first_column) {
      const int column = first_column + 8 * (lane % 8);
      float biases[8] = {};
      if (!kGate && bias != nullptr) {
#pragma unroll
        for (int i = 0; i < 8; ++i) biases[i] = to_float(bias[column + i]);
      }
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
        const int row = 4 * round + lane / 8;
        float x[8];
        *reinterpret_cast<float4 *>(x) =
            *reinterpret_cast<const float4 *>(staged + staged_at(row, 2 * (lane % 8)));
        *reinterpret_cast<float4 *>(x + 4) =
            *reinterpret_cast<const float4 *>(staged + staged_at(row, 2 * (lane % 8) + 1));
        if (first_row + row >= args.rows) continue;
        const Vec8<T> residual = reinterpret_cast<const Vec8<T> &>(added[round]);
        Vec8<T> out;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 more = to_float2(residual.pairs[i]);
          x[2 * i] += biases[2 * i] + more.x;
          x[2 * i + 1] += biases[2 * i + 1] + more.y;
          if (!kGate && args.is_activated) {
            x[2 * i] = activate(x[2 * i], args.activation);
            x[2 * i + 1] = activate(x[2 * i + 1], args.activation);
          }
          out.pairs[i] = from_float2<T>(make_float2(x[2 * i], x[2 * i + 1]));
        }
        const int64_t offset = (first_row + row) * args.out_stride + column;
        if (args.out_f32) {
          float4 *const to = reinterpret_cast<float4 *>(static_cast<float *>(args.out) + offset);
          to[0] = make_float4(x[0], x[1], x[2], x[3]);
          to[1] = make_float4(x[4], x[5], x[6], x[7]);
        } else {
          *reinterpret_cast<Vec8<T> *>(static_cast<T *>(args.out) + offset) = out;
        }
      }
    };
    // The same where the tile ends beyond the outputs, or rows begin anywhere.
    const auto store_numbers = [&](int first_row, int first_column, int columns) {
      columns = min(columns, out_columns - first_column);
#pragma unroll 1
      for (int i = lane; i < 16 * kStagedColumns; i += kWarp) {
        const int row = i / kStagedColumns, column = i % kStagedColumns;
        if (first_row + row >= args.rows || column >= columns) continue;
        float x = staged[staged_at(row, column / 4) + column % 4];
        if (!kGate && bias != nullptr) x += to_float(bias[first_column + column]);
        if (!kGate && args.is_activated) x = activate(x, args.activation);
        const int64_t offset = (first_row + row) * args.out_stride + first_column + column;
        if (args.is_added) x += to_float(static_cast<const T *>(args.out)[offset]);
        if (args.out_f32) {
          static_cast<float *>(args.out)[offset] = x;
        } else {
          static_cast<T *>(args.out)[offset] = from_float<T>(x);
        }
      }
    };
    RingPosition position;
    bool may_write = false;
    for (TileWalk walk(args); !walk.is_done(args); walk.advance(args)) {
      const int first_row = (walk.row_pair * kPersistentCluster + rank) * kTileRows + warp * 16;
      const int first_column = walk.column_tile * kOutColumns;
      if (args.is_added) {
        // What the sums will be added to is in L2 by then.
        constexpr int kLine = 128 / sizeof(T);
#pragma unroll
        for (int i = lane; i < 16 * kOutColumns / kLine; i += kWarp) {
          const int row = first_row + i % 16, column = first_column + i / 16 * kLine;
          if (row < args.rows && column < out_columns) {
            prefetch_l2(static_cast<const T *>(args.out) + row * args.out_stride + column);
          }
        }
      }
      float sums[kColumns / 2];
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) sums[i] = 0.f;
      int previous = 0;
#pragma unroll 1
      for (int step = 0; step < args.steps; ++step) {
        const uint32_t stage = stages + position.stage * kStageBytes;
        const uint32_t x = stage + warpgroup * kWarpgroupRows * kStageRowBytes;
        const uint32_t weights = stage + kXBytes;
        barrier_wait(full + position.stage * 8, position.parity);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kStageRowBytes; k += 32) {
          Wgmma<kColumns>::template add<T>(sums, wgmma_operand(x + k), wgmma_operand(weights + k));
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0) release(previous);
        previous = position.stage;
        position.advance(args.stages);
      }
      wgmma_wait_for(sums);
      release(previous);

      // A warp's 16 rows, some columns at a time: sums to shared memory, and whole rows from there to `out`.
      if (!may_write) grid_wait();
      may_write = true;
      const bool whole = is_aligned && first_column + kOutColumns <= out_columns;
      uint4 added[kRounds] = {};
      if (whole && args.is_added) load_added(added, first_row, first_column);
#pragma unroll
      for (int part = 0; part < kOutColumns; part += kStagedColumns) {
#pragma unroll
        for (int j = 0; j < kStagedColumns / 8; ++j) {
          const int at = part / 8 + j;  // among the groups of eight columns of the tile
          if (at >= kOutColumns / 8) continue;
          float x[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            x[i] = args.scale * sums[4 * at + i];
            if constexpr (kGate) {
              float up = args.scale * sums[4 * at + kColumns / 4 + i];
              const int column = first_column + 8 * at + 2 * (lane % 4) + i % 2;
              if (bias != nullptr && column < out_columns) {
                x[i] += to_float(bias[column]);
                up += to_float(bias[out_columns + column]);
              }
              x[i] = gated(x[i], up, args.activation, args.limit);
            }
          }
          float *const to = staged + staged_at(lane / 4, 2 * j + lane % 4 / 2) + 2 * (lane % 2);
          *reinterpret_cast<float2 *>(to) = make_float2(x[0], x[1]);
          *reinterpret_cast<float2 *>(to + 8 * kStagedColumns) = make_float2(x[2], x[3]);
        }
        __syncwarp();
        if (whole) {
          uint4 next[kRounds] = {};
          if (args.is_added && part + kStagedColumns < kOutColumns) {
            load_added(next, first_row, first_column + part + kStagedColumns);
          }
          if (part + 8 * (lane % 8) < kOutColumns) store_rows(added, first_row, first_column + part);
#pragma unroll
          for (int round = 0; round < kRounds; ++round) added[round] = next[round];
        } else {
          store_numbers(first_row, first_column + part, min(kStagedColumns, kOutColumns - part));
        }
        __syncwarp();
      }
    }
  }
  // A peer may still load into this block, and report to its barriers.
  cluster_arrive();
  cluster_wait();
#endif
}

template <typename T>
PersistentKernel persistent_kernel(bool gate, int columns) {
#define KV_PERSISTENT_KERNEL(c) \
  case c:                       \
    return gate ? linear_persistent<T, true, c> : linear_persistent<T, false, c>;
  switch (columns) {
    KV_PERSISTENT_KERNEL(128)
    KV_PERSISTENT_KERNEL(192)
    KV_PERSISTENT_KERNEL(224)
    KV_PERSISTENT_KERNEL(256)
    default:
      return nullptr;
  }
#undef KV_PERSISTENT_KERNEL
}

#endif  // __CUDACC__

}  // namespace kv
