// What the threads of a cluster that chooses a token find, each in its part of a row, and how that is merged.
#pragma once

#include "cluster.cuh"
#include "select.cuh"
#include "summary.cuh"

namespace kv {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kClusterBlocks = 8;
constexpr int kBlocksPerSm = 2;

// Ids of a block: whole groups of four.
constexpr uint32_t slice_ids(uint32_t vocab, uint32_t blocks) {
  return ((vocab + blocks - 1) / blocks + 3) / 4 * 4;
}

// What a thread, a warp, a block found of a row's logits.
struct Logits {
  Summary summary;
  float least;  // Of the threads' largest logits, but for −∞.

  __device__ __forceinline__ static Logits none() { return {Summary::none(), kInfinity}; }

  __device__ __forceinline__ static Logits warp_merge(const Logits &part, float rate) {
    return {Summary::warp_merge(part.summary, rate),
            unordered(__reduce_min_sync(0xffffffffu, ordered(part.least)))};
  }
};

// Groups in which candidates are left.
struct Live {
  uint32_t groups;

  __device__ __forceinline__ static Live none() { return {0}; }
  __device__ __forceinline__ static Live warp_merge(const Live &part) {
    return {__reduce_add_sync(0xffffffffu, part.groups)};
  }
};

__device__ __forceinline__ uint64_t warp_sum(uint64_t x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Sums over candidates, in units of Mass.
struct Moments {
  uint64_t sum;    // Σ exp(score)
  uint64_t first;  // Σ exp(score) · −score

  __device__ __forceinline__ static Moments none() { return {0, 0}; }
  __device__ __forceinline__ static Moments warp_merge(const Moments &part) {
    return {warp_sum(part.sum), warp_sum(part.first)};
  }
};

// The candidate chosen: the largest key, ties to the lowest id.
struct Winner {
  uint32_t key;
  uint32_t id;
  float score;
  uint64_t sum;  // Σ exp(score) over the candidates, in units of Mass.

  __device__ __forceinline__ static Winner none() { return {0, 0xffffffffu, 0.f, 0}; }

  // Takes a candidate with a higher id than those before.
  __device__ __forceinline__ void add(uint32_t key_, uint32_t id_, float score_) {
    if (key_ <= key) return;
    key = key_;
    id = id_;
    score = score_;
  }

  __device__ __forceinline__ static Winner warp_merge(const Winner &part) {
    Winner all;
    all.key = __reduce_max_sync(0xffffffffu, part.key);
    all.id = __reduce_min_sync(0xffffffffu, part.key == all.key ? part.id : 0xffffffffu);
    const uint32_t owners = __ballot_sync(0xffffffffu, part.key == all.key && part.id == all.id);
    all.score = __shfl_sync(0xffffffffu, part.score, __ffs(owners) - 1);
    all.sum = warp_sum(part.sum);
    return all;
  }
};

struct Candidate {
  float score;
  uint32_t id;
};

// Where a selection stops: what is below this key is dropped, and of those at it, where ties are cut, the ids
// from `cut`.
struct Stop {
  uint32_t key;
  uint32_t cut;
};

// What each warp, then each block of the cluster found.
template <typename Part, int kBlocks>
struct Parts {
  Part warps[kWarps], blocks[kBlocks];
};

template <int kBlocks>
struct Shared {
  Selection<kBlocks, kThreads> selection;
  Parts<Logits, kBlocks> logits;
  Parts<Live, kBlocks> live;
  Parts<Moments, kBlocks> moments;
  Parts<Winner, kBlocks> winners;
  Stop stop;
  uint32_t n_gathered;  // By the first block.
};

// Merges parts over the scope, in a fixed order; every thread gets the result.
template <typename Scope, typename Part, int kBlocks, typename... Args>
__device__ Part merge(const Part &mine, Parts<Part, kBlocks> &parts, Args... args) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Part of_warp = Part::warp_merge(mine, args...);
  if (lane == 0) parts.warps[warp] = of_warp;
  __syncthreads();
  if (warp == 0) {
    const Part of_block = Part::warp_merge(lane < kWarps ? parts.warps[lane] : Part::none(), args...);
    if (lane < Scope::kSize) *Scope::of(&parts.blocks[Scope::rank()], lane) = of_block;
  }
  Scope::sync();
  return Part::warp_merge(lane < Scope::kSize ? parts.blocks[lane] : Part::none(), args...);
}

}  // namespace
}  // namespace kv
