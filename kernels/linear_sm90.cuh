// out[rows][outputs] = x[rows][inputs] · weight[outputs][inputs]ᵀ for few rows, on sm_90a.
//
// The reading of the weights bounds such a product, so the kernel is built around it: each block streams one tile of
// weight rows through a ring of TMA stages, deep enough that some 64 KB an SM are under way at any instant, and begins
// to do so before the preceding kernel has ended (weights are constants). A cluster of blocks works together:
//
//   split       blocks take a part of the inputs each for the same tile; their partial sums meet through distributed
//               shared memory and are added in the order of the parts, so equal inputs give equal bits.
//   share       blocks with neighbouring tiles load a part of the activations each, multicast to all of them.
//   row_blocks  blocks with the same tile and other rows load a part of the weights each, multicast to all of them.
//
// Rows are wgmma's 64 rows of A, the weight tile its columns, which makes the tile's width free in steps of 16: the
// tiling can be chosen to give every SM the same share of the weights. Rows of A beyond the real ones are never loaded;
// what lies in shared memory there only reaches sums that are not stored.
#pragma once

#include "linear_pipeline.cuh"
#include "linear_wgmma.cuh"

namespace kv {

// Numbers of k in a stage: a row of 128 bytes, the widest swizzle.
constexpr int kStageInputs = 64;
constexpr int kStageRowBytes = 128;
// Rows of A of one warpgroup.
constexpr int kWarpgroupRows = 64;
constexpr int kWarpgroup = 128;
constexpr int kMaxStages = 32;
// The barriers' part of shared memory, before the stages, which begin at a multiple of 1024.
constexpr int kBarrierBytes = 1024;
// Between rows of partial sums, so that a warp's writes of them use all banks.
constexpr int kPartialPad = 8;

struct LinearArgs {
  const void *bias;   // [outputs] or null
  void *out;          // [rows][out_stride]
  int64_t out_stride;
  int rows, outputs;
  int steps;          // stages' worth of inputs: inputs / 64, rounded up
  int x_rows;         // rows of x loaded into a block: a multiple of 8 * share, at most 64 a warpgroup
  int stages;
  int split, share, row_blocks;
  int epilogue, activation, out_f32;
};

using LinearKernel = void (*)(const CUtensorMap, const CUtensorMap, const LinearArgs);

// The kernel for blocks of 64 * warpgroups rows by `columns` weights; null where there is none.
template <typename T>
LinearKernel linear_kernel(int warpgroups, int columns);

constexpr int linear_threads(int warpgroups) { return warpgroups * kWarpgroup + kWarp; }

#ifdef __CUDACC__

__device__ __forceinline__ float activate(float x, int activation) {
  switch (activation) {
    case KV_SILU:
      return x / (1.f + __expf(-x));
    case KV_GELU_TANH:
      return 0.5f * x * (1.f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
    default:
      return 0.5f * x * (1.f + erff(x * 0.7071067812f));
  }
}

// Eight numbers of a row, of which the first n exist.
template <typename T>
__device__ __forceinline__ void load8(float (&x)[8], const T *from, int n) {
  if (n >= 8 && reinterpret_cast<uintptr_t>(from) % sizeof(Vec8<T>) == 0) {
    const Vec8<T> vector = *reinterpret_cast<const Vec8<T> *>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = to_float2(vector.pairs[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = i < n ? to_float(from[i]) : 0.f;
  }
}

template <typename T>
__device__ __forceinline__ void store8(T *to, const float (&x)[8], int n) {
  if (n >= 8) {
    Vec8<T> vector;
#pragma unroll
    for (int i = 0; i < 4; ++i) vector.pairs[i] = from_float2<T>(make_float2(x[2 * i], x[2 * i + 1]));
    *reinterpret_cast<Vec8<T> *>(to) = vector;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < n) to[i] = from_float<T>(x[i]);
    }
  }
}

__device__ __forceinline__ void store8(float *to, const float (&x)[8], int n) {
  if (n >= 8) {
    reinterpret_cast<float4 *>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4 *>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < n) to[i] = x[i];
    }
  }
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Adds the eight sums that each of `split` blocks, `stride` ranks apart, holds at `address`, in their order.
__device__ __forceinline__ void sum8(float (&sums)[8], uint32_t address, int first, int stride, int split) {
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[i] = 0.f;
#pragma unroll 4
  for (int part = 0; part < split; ++part) {
    const float4 low = load_peer(address, first + part * stride);
    const float4 high = load_peer(address + 16, first + part * stride);
    sums[0] += low.x;
    sums[1] += low.y;
    sums[2] += low.z;
    sums[3] += low.w;
    sums[4] += high.x;
    sums[5] += high.y;
    sums[6] += high.z;
    sums[7] += high.w;
  }
}

#endif

// A cluster's blocks, by rank: share fastest, then row_blocks, then split.
template <typename T, int kWarpgroups, int kColumns>
__global__ void __launch_bounds__(linear_threads(kWarpgroups), kWarpgroups == 1 || kColumns <= 128 ? 2 : 1)
    linear_sm90(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap x_map,
                const __grid_constant__ LinearArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kRows = kWarpgroups * kWarpgroupRows;
  constexpr int kWeightBytes = kColumns * kStageRowBytes;
  constexpr int kConsumers = kWarpgroups * kWarpgroup;
  constexpr int kPitch = kColumns + kPartialPad;

  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t full = shared_address(shared);
  const uint32_t empty = full + kMaxStages * 8;
  // Activations first: a descriptor's rows beyond x_rows then end in the weights, inside the block's memory.
  const uint32_t x_stages = full + kBarrierBytes;
  const int x_bytes = args.x_rows * kStageRowBytes;
  const uint32_t weight_stages = x_stages + args.stages * x_bytes;

  const int team = args.share * args.row_blocks;  // blocks that load for each other
  const int cluster = team * args.split;
  const int rank = cluster_rank();
  const int part = rank / team;
  const int team_first = part * team;
  const int row_block = rank % team / args.share;
  const int tile = blockIdx.x / cluster * args.share + rank % args.share;
  const int first_step = args.steps * part / args.split;
  const int steps = args.steps * (part + 1) / args.split - first_step;

  const bool gate = args.epilogue == KV_GATE;
  const int out_columns = gate ? args.outputs / 2 : args.outputs;
  // Where the tile's two halves begin among the weight's rows: gate and up, or neighbours.
  const int half_columns = kColumns / 2;
  const int first_column = gate ? tile * half_columns : tile * kColumns;
  const int second_column = gate ? out_columns + first_column : first_column + half_columns;
  const int first_row = row_block * kRows;

  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;

  if (warp == kConsumers / kWarp) {
    const uint64_t weight_policy = policy_evict_first();
    const uint64_t x_policy = policy_evict_last();
    const auto load_weights = [&](int step, int stage) {
      const uint32_t to = weight_stages + stage * kWeightBytes;
      const uint32_t barrier = full + stage * 8;
      const int k = (first_step + step) * kStageInputs;
      barrier_arrive_expecting(barrier, kWeightBytes + x_bytes);
      if (args.row_blocks == 1) {
        load_box(to, weight_map, k, first_column, barrier, weight_policy);
        load_box(to + kWeightBytes / 2, weight_map, k, second_column, barrier, weight_policy);
      } else {
        const int member = rank % args.share + team_first;
        const auto peers = static_cast<uint16_t>(1 << member | 1 << (member + args.share));
        load_box_to(peers, to + row_block * (kWeightBytes / 2), weight_map, k,
                    row_block == 0 ? first_column : second_column, barrier, weight_policy);
      }
    };
    const auto load_x = [&](int step, int stage) {
      const uint32_t to = x_stages + stage * x_bytes;
      const uint32_t barrier = full + stage * 8;
      const int k = (first_step + step) * kStageInputs;
      if (args.share == 1) {
        load_box(to, x_map, k, first_row, barrier, x_policy);
      } else {
        const int member = rank % args.share;
        const int rows = args.x_rows / args.share;
        const auto peers = static_cast<uint16_t>(((1 << args.share) - 1) << (team_first + row_block * args.share));
        load_box_to(peers, to + member * rows * kStageRowBytes, x_map, k, first_row + member * rows, barrier,
                    x_policy);
      }
    };
    const int ahead = min(steps, args.stages);

    if (lane == 0) {
      prefetch_map(weight_map);
      prefetch_map(x_map);
#pragma unroll 1
      for (int stage = 0; stage < args.stages; ++stage) {
        barrier_init(full + stage * 8, 1);
        barrier_init(empty + stage * 8, kConsumers / kWarp * team);
      }
      barrier_init_fence();
      if (args.row_blocks == 1) {
#pragma unroll 1
        for (int step = 0; step < ahead; ++step) load_weights(step, step);
      }
    }
    __syncwarp();
    if (cluster > 1) {
      cluster_sync_relaxed();
    } else {
      __syncthreads();
    }
    if (lane == 0) {
      if (args.row_blocks > 1) {
#pragma unroll 1
        for (int step = 0; step < ahead; ++step) load_weights(step, step);
      }
      grid_launch_dependents();
      grid_wait();
      proxy_fence();
#pragma unroll 1
      for (int step = 0; step < ahead; ++step) load_x(step, step);
      int stage = 0;
      uint32_t parity = 0;
#pragma unroll 1
      for (int step = ahead; step < steps; ++step) {
        barrier_wait(empty + stage * 8, parity);
        load_weights(step, stage);
        load_x(step, stage);
        if (++stage == args.stages) {
          stage = 0;
          parity ^= 1;
        }
      }
    }
    __syncwarp();
    if (args.split > 1) {
      cluster_sync();
      cluster_sync_relaxed();
    }
    return;
  }

  if (cluster > 1) {
    cluster_sync_relaxed();
  } else {
    __syncthreads();
  }
  float sums[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) sums[i] = 0.f;
  const int warpgroup = warp / (kWarpgroup / kWarp);
  {
    const auto release = [&](int step, int stage) {
      // Beyond the last load nobody waits, and a peer may have gone.
      if (step + args.stages < steps && lane < team) barrier_arrive_at(empty + stage * 8, team_first + lane);
    };
    int stage = 0, previous = 0;
    uint32_t parity = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      barrier_wait(full + stage * 8, parity);
      const uint32_t x = x_stages + stage * x_bytes + warpgroup * kWarpgroupRows * kStageRowBytes;
      const uint32_t weights = weight_stages + stage * kWeightBytes;
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kStageRowBytes; k += 32) {
        Wgmma<kColumns>::template add<T>(sums, wgmma_operand(x + k), wgmma_operand(weights + k));
      }
      wgmma_commit();
      if (step > 0) {
        wgmma_wait<1>();
        release(step - 1, previous);
      }
      previous = stage;
      if (++stage == args.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
    wgmma_wait<0>();
  }

  // All warpgroups are done with the stages: partial sums [rows][kPitch] take their place.
  asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
  const int rows = min(args.rows - first_row, args.x_rows);
  float *partial = reinterpret_cast<float *>(shared + kBarrierBytes);
  {
    const int row = warp * 16 + lane / 4;
    float *to = partial + row * kPitch + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      if (row < rows) *reinterpret_cast<float2 *>(to + 8 * j) = make_float2(sums[4 * j], sums[4 * j + 1]);
      if (row + 8 < rows) {
        *reinterpret_cast<float2 *>(to + 8 * kPitch + 8 * j) = make_float2(sums[4 * j + 2], sums[4 * j + 3]);
      }
    }
  }
  grid_wait();
  if (args.split > 1) {
    cluster_sync();
  } else {
    asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
  }

  // Each part finishes some of the columns, eight at a time.
  const int groups = (gate ? half_columns : kColumns) / 8;
  const int first_group = groups * part / args.split;
  const int part_groups = groups * (part + 1) / args.split - first_group;
  const T *bias = static_cast<const T *>(args.bias);
  for (int item = threadIdx.x; item < rows * part_groups; item += kConsumers) {
    const int row = item / part_groups;
    const int column = 8 * (first_group + item % part_groups);
    const int out_column = first_column + column;
    const int n = out_columns - out_column;
    if (n <= 0) continue;
    const int64_t offset = (first_row + row) * args.out_stride + out_column;
    const uint32_t address = shared_address(partial + row * kPitch + column);
    float x[8];
    sum8(x, address, rank % team, team, args.split);
    if (bias != nullptr) {
      float b[8];
      load8(b, bias + out_column, n);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] += b[i];
    }
    if (gate) {
      float up[8];
      sum8(up, address + half_columns * sizeof(float), rank % team, team, args.split);
      if (bias != nullptr) {
        float b[8];
        load8(b, bias + out_columns + out_column, n);
#pragma unroll
        for (int i = 0; i < 8; ++i) up[i] += b[i];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = activate(x[i], args.activation) * up[i];
    } else if (args.epilogue == KV_ADD) {
      float residual[8];
      load8(residual, static_cast<const T *>(args.out) + offset, n);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] += residual[i];
    }
    if (args.out_f32) {
      store8(static_cast<float *>(args.out) + offset, x, n);
    } else {
      store8(static_cast<T *>(args.out) + offset, x, n);
    }
  }
  if (args.split > 1) cluster_sync_relaxed();
#endif
}

template <typename T>
LinearKernel linear_kernel(int warpgroups, int columns) {
#define KV_LINEAR_KERNEL(c) \
  case c:                   \
    return warpgroups == 1 ? linear_sm90<T, 1, c> : linear_sm90<T, 2, c>;
  switch (columns) {
    KV_LINEAR_KERNEL(32)
    KV_LINEAR_KERNEL(48)
    KV_LINEAR_KERNEL(64)
    KV_LINEAR_KERNEL(96)
    KV_LINEAR_KERNEL(112)
    KV_LINEAR_KERNEL(128)
    KV_LINEAR_KERNEL(192)
    KV_LINEAR_KERNEL(224)
    KV_LINEAR_KERNEL(256)
    default:
      return nullptr;
  }
#undef KV_LINEAR_KERNEL
}

#endif  // __CUDACC__

}  // namespace kv
