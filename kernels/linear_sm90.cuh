// out[rows][outputs] = x[rows][inputs] · weight[outputs][inputs]ᵀ for few rows, on sm_90a.
//
// The reading of the weights bounds such a product, so the kernel is built around it: each block streams one
// tile of weight rows through a ring of TMA stages, deep enough that some 64 KB an SM are under way at any
// instant, and begins to do so before the preceding kernel has ended (weights are constants). A cluster's
// blocks work on the same tile:
//
//   split       parts of the inputs; their sums meet through distributed shared memory and are added in the
//               order of the parts, so equal inputs give equal bits.
//   row_blocks  blocks of rows; each loads a half of the weights, multicast to both.
//
// Rows are wgmma's 64 rows of A, the weight tile its columns, which makes the tile's width free in steps of
// 16: the tiling can be chosen to give every SM the same share of the weights. Rows of A beyond the real ones
// are never loaded; what lies in shared memory there only reaches sums that are not stored.
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
// Between rows of sums, so that a warp's writes of them use all banks.
constexpr int kSumsPad = 8;
// Widths of tiles that there are kernels for.
constexpr int kLinearColumns[] = {32, 48, 64, 96, 112, 128, 192, 224, 256};

// Columns of sums that one of `split` blocks finishes at most: whole groups of 8, of a gate as many of up
// beside them.
__host__ __device__ constexpr int split_columns(int columns, int split, int epilogue) {
  return epilogue == KV_GATE ? (columns / 16 + split - 1) / split * 16
                             : (columns / 8 + split - 1) / split * 8;
}

struct LinearArgs {
  const void *bias;  // [outputs] or null
  void *out;         // [rows][out_stride]
  int64_t out_stride;
  int rows, outputs;
  int steps;   // stages' worth of inputs: inputs / 64, rounded up
  int x_rows;  // rows of x loaded into a block: a multiple of 8, at most 64 a warpgroup
  int stages;
  int split, row_blocks;
  int epilogue, activation, out_f32;
  float scale, limit;
};

using LinearKernel = void (*)(const CUtensorMap, const CUtensorMap, const LinearArgs);

// The kernel for blocks of 64 * warpgroups rows by `columns` weights; null where there is none.
template <typename T>
LinearKernel linear_kernel(int warpgroups, int columns);

constexpr int linear_threads(int warpgroups) { return warpgroups * kWarpgroup + 2 * kWarp; }

#ifdef __CUDACC__

__device__ __forceinline__ float activate(float x, int activation) {
  if (activation == KV_GELU) return 0.5f * x * erfcf(-0.7071067812f * x);
  // The tanh form is x * sigmoid(2 u) with u = sqrt(2 / pi) * (x + 0.044715 x^3).
  const float exponent = activation == KV_SILU ? x : 1.5957691216f * (x + 0.044715f * x * x * x);
  return __fdividef(x, 1.f + __expf(-exponent));
}

__device__ __forceinline__ float gated(float gate, float up, const LinearArgs &args) {
  if (args.activation != KV_CLAMPED_SWIGLU) return activate(gate, args.activation) * up;
  const float g = fminf(gate, args.limit), u = fminf(fmaxf(up, -args.limit), args.limit);
  return __fdividef(g, 1.f + __expf(-1.702f * g)) * (u + 1.f);
}

// Four numbers of a row, of which the first n exist.
template <typename T>
__device__ __forceinline__ float4 load4(const T *from, int n) {
  if (n >= 4 && reinterpret_cast<uintptr_t>(from) % 8 == 0) {
    const uint2 raw = *reinterpret_cast<const uint2 *>(from);
    const float2 low = to_float2(reinterpret_cast<const typename Pair<T>::type &>(raw.x));
    const float2 high = to_float2(reinterpret_cast<const typename Pair<T>::type &>(raw.y));
    return make_float4(low.x, low.y, high.x, high.y);
  }
  return make_float4(n > 0 ? to_float(from[0]) : 0.f, n > 1 ? to_float(from[1]) : 0.f,
                     n > 2 ? to_float(from[2]) : 0.f, n > 3 ? to_float(from[3]) : 0.f);
}

template <typename T>
__device__ __forceinline__ void store4(T *to, float4 x, int n) {
  if (n >= 4) {
    if constexpr (sizeof(T) == sizeof(float)) {
      *reinterpret_cast<float4 *>(to) = x;
    } else {
      const auto low = from_float2<T>(make_float2(x.x, x.y));
      const auto high = from_float2<T>(make_float2(x.z, x.w));
      *reinterpret_cast<uint2 *>(to) =
          make_uint2(reinterpret_cast<const uint32_t &>(low), reinterpret_cast<const uint32_t &>(high));
    }
  } else {
    if (n > 0) to[0] = from_float<T>(x.x);
    if (n > 1) to[1] = from_float<T>(x.y);
    if (n > 2) to[2] = from_float<T>(x.z);
  }
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

__device__ __forceinline__ float4 operator*(float a, float4 b) {
  return make_float4(a * b.x, a * b.y, a * b.z, a * b.w);
}

// Adds four sums of each of `parts`, `stride` numbers apart, in their order.
__device__ __forceinline__ float4 sum4(const float *from, int parts, int stride) {
  float4 sum = *reinterpret_cast<const float4 *>(from);
#pragma unroll 1
  for (int part = 1; part < parts; ++part)
    sum = sum + *reinterpret_cast<const float4 *>(from + part * stride);
  return sum;
}

// A place in the ring of stages.
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;  // of the phase that the ring is in at this stage

  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// A thread's places in [rows][quads], where quads are of four columns and `threads` threads take one each in
// turn.
struct QuadWalk {
  int quads, row, quad, row_advance, quad_advance;

  __device__ __forceinline__ QuadWalk(int quads, int threads)
      : quads(quads),
        row(threadIdx.x / quads),
        quad(threadIdx.x % quads),
        row_advance(threads / quads),
        quad_advance(threads % quads) {}

  __device__ __forceinline__ void advance() {
    row += row_advance;
    quad += quad_advance;
    if (quad >= quads) {
      quad -= quads;
      ++row;
    }
  }
};

// Two warps load, the weights and the activations; the others multiply. A cluster's blocks, by rank:
// row_blocks, then split.
template <typename T, int kWarpgroups, int kColumns>
__global__ void __launch_bounds__(linear_threads(kWarpgroups), kWarpgroups == 1 || kColumns <= 128 ? 2 : 1)
    linear_sm90(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap x_map,
                const __grid_constant__ LinearArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kRows = kWarpgroups * kWarpgroupRows;
  constexpr int kWeightBytes = kColumns * kStageRowBytes;
  constexpr int kConsumers = kWarpgroups * kWarpgroup;

  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t full = shared_address(shared);
  const uint32_t empty = full + kMaxStages * 8;
  const uint32_t gathered = empty + kMaxStages * 8;
  // Activations first: a descriptor's rows beyond x_rows then end in the weights, inside the block's memory.
  const uint32_t x_stages = full + kBarrierBytes;
  const int x_bytes = args.x_rows * kStageRowBytes;
  const uint32_t weight_stages = x_stages + args.stages * x_bytes;

  const int row_blocks = args.row_blocks;
  const int rank = cluster_rank();
  const int part = rank / row_blocks;
  const int row_block = rank % row_blocks;
  const int tile = blockIdx.x / (row_blocks * args.split);
  const int first_step = args.steps * part / args.split;
  const int steps = args.steps * (part + 1) / args.split - first_step;

  const bool gate = args.epilogue == KV_GATE;
  const int out_columns = gate ? args.outputs / 2 : args.outputs;
  // Where the tile's two halves begin among the weight's rows: gate and up, or neighbours.
  constexpr int kHalf = kColumns / 2;
  const int first_column = tile * (gate ? kHalf : kColumns);
  const int second_column = first_column + (gate ? out_columns : kHalf);
  const int first_row = row_block * kRows;
  const int rows = min(args.rows - first_row, args.x_rows);

  // The columns of the tile that this block finishes, in groups of 8; of a gate, and as many of up.
  const int groups = (gate ? kHalf : kColumns) / 8;
  const int first_group = groups * part / args.split;
  const int part_groups = groups * (part + 1) / args.split - first_group;

  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;

  if (warp == kConsumers / kWarp) {  // the weights
    RingPosition position;
    int step = 0;
    const uint64_t policy = policy_evict_first();
    const auto load = [&](int end) {
#pragma unroll 1
      for (; step < end; ++step) {
        const uint32_t barrier = full + position.stage * 8;
        const uint32_t to = weight_stages + position.stage * kWeightBytes;
        const int k = (first_step + step) * kStageInputs;
        if (step >= args.stages) barrier_wait(empty + position.stage * 8, position.parity ^ 1);
        barrier_arrive_expecting(barrier, kWeightBytes + x_bytes);
        if (row_blocks > 1) {
          const auto peers = static_cast<uint16_t>(3 << (part * 2));
          load_box_to(peers, to + row_block * (kWeightBytes / 2), weight_map, k,
                      row_block == 0 ? first_column : second_column, barrier, policy);
        } else {
          load_box(to, weight_map, k, first_column, barrier, policy);
          if (gate) load_box(to + kWeightBytes / 2, weight_map, k, second_column, barrier, policy);
        }
        position.advance(args.stages);
      }
    };
    if (lane == 0) {
#pragma unroll 1
      for (int stage = 0; stage < args.stages; ++stage) {
        barrier_init(full + stage * 8, 1);
        barrier_init(empty + stage * 8, kConsumers / kWarp * row_blocks);
      }
      barrier_init(gathered, 1);
      barrier_init_fence();
      barrier_arrive_expecting(gathered, args.split * rows * part_groups * (gate ? 64 : 32));
    }
    __syncwarp();
    cluster_arrive();
    // Constants: loaded before the preceding kernel has ended.
    if (lane == 0 && row_blocks == 1) load(min(steps, args.stages));
    __syncwarp();
    cluster_wait();
    if (lane == 0) {
      grid_launch_dependents();
      load(steps);
    }
    return;
  }

  if (warp == kConsumers / kWarp + 1) {  // the activations
    if (lane == 0) prefetch_map(x_map);
    __syncwarp();
    cluster_arrive();
    cluster_wait();
    if (lane == 0) {
      const uint64_t policy = policy_evict_last();
      grid_wait();
      RingPosition position;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        if (step >= args.stages) barrier_wait(empty + position.stage * 8, position.parity ^ 1);
        load_box(x_stages + position.stage * x_bytes, x_map, (first_step + step) * kStageInputs, first_row,
                 full + position.stage * 8, policy);
        position.advance(args.stages);
      }
    }
    return;
  }

  cluster_arrive();
  cluster_wait();
  float sums[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) sums[i] = 0.f;
  {
    const uint32_t x_rows_offset = warp / (kWarpgroup / kWarp) * kWarpgroupRows * kStageRowBytes;
    RingPosition position;
    int previous = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const uint32_t x = x_stages + position.stage * x_bytes + x_rows_offset;
      const uint32_t weights = weight_stages + position.stage * kWeightBytes;
      barrier_wait(full + position.stage * 8, position.parity);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kStageRowBytes; k += 32) {
        Wgmma<kColumns>::template add<T>(sums, wgmma_operand(x + k), wgmma_operand(weights + k));
      }
      wgmma_commit();
      wgmma_wait<1>();
      // Beyond the last load nobody waits for an empty stage, and a peer may have gone.
      if (step > 0 && step - 1 + args.stages < steps && lane < row_blocks) {
        barrier_arrive_at(empty + previous * 8, part * row_blocks + lane);
      }
      previous = position.stage;
      position.advance(args.stages);
    }
    wgmma_wait<0>();
  }

  // The sums take the stages' place as [rows][kPitch], once all warpgroups are done with them.
  constexpr int kPitch = kColumns + kSumsPad;
  const auto consumers_sync = [] { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); };
  float *own = reinterpret_cast<float *>(shared + kBarrierBytes);
  consumers_sync();
  {
    const int row = warp * 16 + lane / 4;
    float *to = own + row * kPitch + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      if (row < rows) *reinterpret_cast<float2 *>(to + 8 * j) = make_float2(sums[4 * j], sums[4 * j + 1]);
      if (row + 8 < rows) {
        *reinterpret_cast<float2 *>(to + 8 * kPitch + 8 * j) = make_float2(sums[4 * j + 2], sums[4 * j + 3]);
      }
    }
  }
  consumers_sync();

  // Where they are split, they go to the blocks that finish them, as [split][rows][pitch].
  const float *sum_rows = own;
  int pitch = kPitch, part_stride = 0, up_offset = kHalf;
  if (args.split > 1) {
    pitch = split_columns(kColumns, args.split, args.epilogue);
    part_stride = rows * pitch;
    up_offset = part_groups * 8;
    sum_rows = reinterpret_cast<const float *>(shared + (weight_stages - full) + args.stages * kWeightBytes);
    const uint32_t to = shared_address(sum_rows + part * part_stride);
#pragma unroll 1
    for (int owner = 0; owner < args.split; ++owner) {
      const int owner_first = groups * owner / args.split;
      const int owner_groups = groups * (owner + 1) / args.split - owner_first;
      if (owner_groups == 0) continue;
#pragma unroll 1
      for (QuadWalk at(owner_groups * (gate ? 4 : 2), kConsumers); at.row < rows; at.advance()) {
        const int up_column = at.quad < 2 * owner_groups ? 0 : kHalf - 8 * owner_groups;
        const float *from = own + at.row * kPitch + 8 * owner_first + 4 * at.quad + up_column;
        store_peer(to + (at.row * pitch + 4 * at.quad) * 4, *reinterpret_cast<const float4 *>(from), gathered,
                   owner * row_blocks + row_block);
      }
    }
  }

  grid_wait();
  const T *bias = static_cast<const T *>(args.bias);
  if (part_groups == 0) return;
  const int part_column = first_column + 8 * first_group;
  const auto load_residual = [&](const QuadWalk &at) {
    const int column = part_column + 4 * at.quad;
    if (args.epilogue != KV_ADD || at.row >= rows || column >= out_columns)
      return make_float4(0.f, 0.f, 0.f, 0.f);
    return load4(static_cast<const T *>(args.out) + (first_row + at.row) * args.out_stride + column,
                 out_columns - column);
  };
  QuadWalk at(2 * part_groups, kConsumers);
  float4 residual = load_residual(at);
  if (args.split > 1) barrier_wait(gathered, 0);

#pragma unroll 1
  while (at.row < rows) {
    const int column = part_column + 4 * at.quad;
    const int n = out_columns - column;
    const float *from = sum_rows + at.row * pitch + 4 * at.quad;
    const bool biased = bias != nullptr && n > 0;
    float4 x = args.scale * sum4(from, args.split, part_stride) + residual;
    if (biased) x = x + load4(bias + column, n);
    if (gate) {
      float4 up = args.scale * sum4(from + up_offset, args.split, part_stride);
      if (biased) up = up + load4(bias + out_columns + column, n);
      x = make_float4(gated(x.x, up.x, args), gated(x.y, up.y, args), gated(x.z, up.z, args),
                      gated(x.w, up.w, args));
    } else if (args.epilogue == KV_ACTIVATE) {
      x = make_float4(activate(x.x, args.activation), activate(x.y, args.activation),
                      activate(x.z, args.activation), activate(x.w, args.activation));
    }
    const int64_t offset = (first_row + at.row) * args.out_stride + column;
    at.advance();
    residual = load_residual(at);
    if (args.out_f32) {
      store4(static_cast<float *>(args.out) + offset, x, n);
    } else {
      store4(static_cast<T *>(args.out) + offset, x, n);
    }
  }
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
