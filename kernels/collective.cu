// What ranks do together, over peer memory: sums, logits brought to rank 0, tokens taken from it.
//
// Sums are made in the order of ranks, in f32, and rounded once: one-shot or two-shot, on whichever rank, the bits are the
// same. Every rank queues the same kernels in the same order; blocks that wait are few enough to be resident at once.

#include "peers.cuh"

namespace kv {
namespace {

// ---- one-shot: every rank sends all it has to all others, and sums for itself ----

constexpr int kOneShotThreads = 256;
constexpr int kMaxOneShotBlocks = 512;  // A power of two.
constexpr int kHeld = 2;                // Vectors of eight numbers, a thread.

// So many are resident at once on 132 multiprocessors.
template <int kRanks>
constexpr int kOneShotBlocks = kRanks == 2 ? kMaxOneShotBlocks : kMaxOneShotBlocks / 2;

// Adds eight numbers to f32 sums.
template <typename T>
__device__ __forceinline__ void add(float2 (&sum)[4], uint4 numbers) {
  const uint32_t words[4] = {numbers.x, numbers.y, numbers.z, numbers.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = to_float2(reinterpret_cast<const typename Pair<T>::type &>(words[i]));
    sum[i].x += pair.x;
    sum[i].y += pair.y;
  }
}

template <typename T>
__device__ __forceinline__ uint4 rounded(const float2 (&sum)[4]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) reinterpret_cast<typename Pair<T>::type &>(words[i]) = from_float2<T>(sum[i]);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <typename T, int kRanks, int kVectors>
__global__ void __launch_bounds__(kOneShotThreads, kRanks == 2 ? 4 : 2) one_shot(const __grid_constant__ kv_all_reduce_params p) {
  grid_wait();
  grid_launch_dependents();
  const kv_world &world = p.world;
  // Every block adds its share of a turn at its end, so a turn has passed only when the last has.
  const int64_t turn = *static_cast<volatile uint32_t *>(world.turns) / kMaxOneShotBlocks % 2;
  const int64_t vectors_of_inbox = world.inbox_bytes / 16;
  const int64_t inbox = turn * kRanks * vectors_of_inbox;
  const int64_t n = p.n / 8;
  const int64_t first = blockIdx.x * kOneShotThreads + threadIdx.x;
  const int64_t step = gridDim.x * kOneShotThreads;
  uint4 *sums = static_cast<uint4 *>(entry<kRanks>(p.sums, world.rank));
  const uint4 *own_parts = static_cast<const uint4 *>(entry<kRanks>(p.parts, world.rank));
  uint4 mine[kVectors], before[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = first + v * step;
    if (at >= n) continue;
    mine[v] = own_parts[at];
    if (p.add) before[v] = sums[at];
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = first + v * step;
    if (at >= n) continue;
    mine[v] = sendable(mine[v]);
#pragma unroll
    for (int peer = 0; peer < kRanks; ++peer) {
      if (peer == world.rank) continue;
      uint4 *to = static_cast<uint4 *>(world.inboxes[peer]) + inbox + world.rank * vectors_of_inbox;
      store_shared_with_peers(to + at, mine[v]);
    }
  }
  uint32_t waits = 0;
  uint4 *received = static_cast<uint4 *>(entry<kRanks>(world.inboxes, world.rank)) + inbox;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = first + v * step;
    if (at >= n) continue;
    uint4 parts[kRanks];
    bool whole;
    do {
      whole = true;
#pragma unroll
      for (int rank = 0; rank < kRanks; ++rank) {
        if (rank != world.rank) parts[rank] = load_shared_with_peers(received + rank * vectors_of_inbox + at);
      }
#pragma unroll
      for (int rank = 0; rank < kRanks; ++rank) whole = whole && (rank == world.rank || is_whole(parts[rank]));
    } while (!whole && !is_aborted(world, waits));
    float2 sum[4] = {};
#pragma unroll
    for (int rank = 0; rank < kRanks; ++rank) {
      if (rank == world.rank) parts[rank] = mine[v];
      add<T>(sum, parts[rank]);
      if (rank == world.rank) continue;
      received[rank * vectors_of_inbox + at] = make_uint4(kNothing, kNothing, kNothing, kNothing);
    }
    if (p.add) add<T>(sum, before[v]);
    sums[at] = rounded<T>(sum);
  }
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(world.turns, kMaxOneShotBlocks / gridDim.x);
}

// ---- two-shot: every rank sums its share, and brings the sums to all others ----

constexpr int kTwoShotThreads = 512;

template <typename T, int kRanks>
__global__ void __launch_bounds__(kTwoShotThreads) two_shot(const __grid_constant__ kv_all_reduce_params p) {
  constexpr int kAtOnce = kRanks > 4 ? 2 : 4;
  grid_wait();
  grid_launch_dependents();
  const kv_world &world = p.world;
  Meetings meetings(world);
  // All parts are there.
  meetings.meet();
  const int64_t n = p.n / 8;
  const int64_t share = (n + kRanks - 1) / kRanks;
  const int64_t end = min(n, share * (world.rank + 1));
  const int64_t step = gridDim.x * kTwoShotThreads;
  const uint4 *sums = static_cast<const uint4 *>(entry<kRanks>(p.sums, world.rank));
  for (int64_t at = share * world.rank + blockIdx.x * kTwoShotThreads + threadIdx.x; at < end; at += kAtOnce * step) {
    uint4 parts[kAtOnce][kRanks], before[kAtOnce];
#pragma unroll
    for (int v = 0; v < kAtOnce; ++v) {
      if (at + v * step >= end) continue;
#pragma unroll
      for (int rank = 0; rank < kRanks; ++rank) {
        parts[v][rank] = load_shared_with_peers(static_cast<const uint4 *>(p.parts[rank]) + at + v * step);
      }
      if (p.add) before[v] = sums[at + v * step];
    }
#pragma unroll
    for (int v = 0; v < kAtOnce; ++v) {
      if (at + v * step >= end) continue;
      float2 sum[4] = {};
#pragma unroll
      for (int rank = 0; rank < kRanks; ++rank) add<T>(sum, sendable(parts[v][rank]));
      if (p.add) add<T>(sum, before[v]);
      const uint4 words = rounded<T>(sum);
#pragma unroll
      for (int rank = 0; rank < kRanks; ++rank) {
        store_shared_with_peers(static_cast<uint4 *>(p.sums[rank]) + at + v * step, words);
      }
    }
  }
  // All sums are there, and nobody reads parts any more.
  meetings.meet();
  meetings.end();
}

template <typename T, int kRanks>
int launch_all_reduce(const kv_all_reduce_params &p, kv_stream stream) {
  const int64_t n = p.n / 8;
  if (p.way == KV_TWO_SHOT) {
    const int64_t wanted = (n / kRanks + kTwoShotThreads - 1) / kTwoShotThreads;
    const int blocks = static_cast<int>(wanted < 1 ? 1 : wanted > KV_MEETING_BLOCKS ? KV_MEETING_BLOCKS : wanted);
    return launch(two_shot<T, kRanks>, dim3(blocks), dim3(kTwoShotThreads), 0, stream, p);
  }
  int blocks = 1;
  while (blocks < kOneShotBlocks<kRanks> && blocks * kOneShotThreads < n) blocks *= 2;
  const dim3 grid(blocks), block(kOneShotThreads);
  if (n <= blocks * kOneShotThreads) return launch(one_shot<T, kRanks, 1>, grid, block, 0, stream, p);
  if (n <= blocks * kOneShotThreads * kHeld) return launch(one_shot<T, kRanks, kHeld>, grid, block, 0, stream, p);
  return static_cast<int>(cudaErrorInvalidValue);
}

template <typename T>
int launch_all_reduce(const kv_all_reduce_params &p, kv_stream stream) {
  switch (p.world.n_ranks) {
    case 2: return launch_all_reduce<T, 2>(p, stream);
    case 4: return launch_all_reduce<T, 4>(p, stream);
    case 8: return launch_all_reduce<T, 8>(p, stream);
    default: return static_cast<int>(cudaErrorInvalidValue);
  }
}

// ---- logits to rank 0 ----

constexpr int kGatherThreads = 512;

// `Words` are as many numbers as rows of both sides can be cut into.
template <typename Words>
__global__ void __launch_bounds__(kGatherThreads) gather(const __grid_constant__ kv_gather_params p) {
  grid_wait();
  grid_launch_dependents();
  Meetings meetings(p.world);
  // Rank 0 has done with what it gathered before.
  meetings.meet();
  constexpr int kNumbers = sizeof(Words) / sizeof(float);
  const int64_t width = p.width / kNumbers, all = p.rows * width, step = gridDim.x * kGatherThreads;
#pragma unroll 4
  for (int64_t at = blockIdx.x * kGatherThreads + threadIdx.x; at < all; at += step) {
    const int64_t row = at / width, column = at % width * kNumbers;
    *reinterpret_cast<Words *>(p.out + row * p.out_stride + p.first + column) =
        *reinterpret_cast<const Words *>(p.part + row * p.part_stride + column);
  }
  meetings.meet();
  meetings.end();
}

// ---- tokens from rank 0 ----

__global__ void share_tokens(const __grid_constant__ kv_share_tokens_params p) {
  grid_wait();
  grid_launch_dependents();
  const kv_world &world = p.world;
  Meetings meetings(world);
  if (world.rank == 0) {
    for (int draft = threadIdx.x; draft < p.n_drafts; draft += blockDim.x) {
      const int lane = p.drafts[draft].lane;
      if (lane < 0) continue;
      const uint32_t token = p.lane_last[0][lane];
      for (int peer = 1; peer < world.n_ranks; ++peer) p.lane_last[peer][lane] = token;
    }
  }
  meetings.meet();
  meetings.end();
}

}  // namespace
}  // namespace kv

extern "C" int kv_all_reduce(const kv_all_reduce_params *params, kv_stream stream) {
  if (params->n == 0) return 0;
  return KV_DISPATCH_DTYPE(params->dtype, T, [&] { return kv::launch_all_reduce<T>(*params, stream); });
}

namespace kv {
namespace {

template <typename... Kernels>
int load(Kernels... kernels) {
  cudaFuncAttributes attributes;
  int error = 0;
  ((error = error != 0 ? error : static_cast<int>(cudaFuncGetAttributes(&attributes, kernels))), ...);
  return error;
}

template <typename T, int kRanks>
int load_collectives() {
  return load(one_shot<T, kRanks, 1>, one_shot<T, kRanks, kHeld>, two_shot<T, kRanks>, gather<float>, gather<float4>,
              share_tokens);
}

template <typename T>
int load_collectives(int n_ranks) {
  switch (n_ranks) {
    case 2: return load_collectives<T, 2>();
    case 4: return load_collectives<T, 4>();
    case 8: return load_collectives<T, 8>();
    default: return static_cast<int>(cudaErrorInvalidValue);
  }
}

}  // namespace
}  // namespace kv

extern "C" int kv_load_collectives(int32_t n_ranks, int32_t dtype) {
  return KV_DISPATCH_DTYPE(dtype, T, [&] { return kv::load_collectives<T>(n_ranks); });
}

extern "C" int kv_gather(const kv_gather_params *params, kv_stream stream) {
  if (params->rows == 0) return 0;
  const bool by_four = (params->width | params->first | params->part_stride | params->out_stride) % 4 == 0;
  const int64_t n = params->rows * ((params->all_width + 3) / 4);
  const int64_t wanted = (n + kv::kGatherThreads - 1) / kv::kGatherThreads;
  const dim3 grid(static_cast<unsigned>(wanted > KV_MEETING_BLOCKS ? KV_MEETING_BLOCKS : wanted));
  const dim3 block(kv::kGatherThreads);
  return by_four ? kv::launch(kv::gather<float4>, grid, block, 0, stream, *params)
                 : kv::launch(kv::gather<float>, grid, block, 0, stream, *params);
}

extern "C" int kv_share_tokens(const kv_share_tokens_params *params, kv_stream stream) {
  return kv::launch(kv::share_tokens, dim3(1), dim3(256), 0, stream, *params);
}
