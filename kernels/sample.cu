// The choice of tokens, stage by stage as src/backend/cpu/sample.rs makes it.
//
// Where the device has clusters, eight blocks read a row once, keep it in shared memory, and agree by reading each
// other's; elsewhere one block works on the row in place. Nothing depends on what other rows are in the batch.
#include <algorithm>

#include "cluster.cuh"
#include "random.cuh"
#include "select.cuh"
#include "summary.cuh"
#include "watermark.cuh"

namespace kv {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kClusterBlocks = 8;
constexpr int kBlocksPerSm = 2;

// Ids of a block: whole groups of four.
constexpr uint32_t slice_ids(uint32_t vocab, uint32_t blocks) { return ((vocab + blocks - 1) / blocks + 3) / 4 * 4; }

// A row's logits, and the least of them.
struct Logits {
  Summary summary;
  float least;  // Above −∞.

  __device__ __forceinline__ static Logits none() { return {Summary::none(), kInfinity}; }

  __device__ __forceinline__ void add(uint32_t id, float4 x) {
    summary.add(id, x);
    const auto finite = [](float logit) { return logit == -kInfinity ? kInfinity : logit; };
    least = fminf(least, fminf(fminf(finite(x.x), finite(x.y)), fminf(finite(x.z), finite(x.w))));
  }

  __device__ __forceinline__ static Logits warp_merge(const Logits &part) {
    return {Summary::warp_merge(part.summary), unordered(__reduce_min_sync(0xffffffffu, ordered(part.least)))};
  }
};

// Sums over candidates.
struct Moments {
  double sum;    // Σ exp(score)
  double first;  // Σ exp(score) · score

  __device__ __forceinline__ static Moments none() { return {0., 0.}; }

  __device__ __forceinline__ static Moments warp_merge(Moments part) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
      part.sum += __shfl_xor_sync(0xffffffffu, part.sum, offset);
      part.first += __shfl_xor_sync(0xffffffffu, part.first, offset);
    }
    return part;
  }
};

// The candidate chosen: the largest key, ties to the lowest id.
struct Winner {
  uint32_t key;
  uint32_t id;
  float score;
  double sum;  // Σ exp(score) over the candidates.

  __device__ __forceinline__ static Winner none() { return {0, 0xffffffffu, 0.f, 0.}; }

  __device__ __forceinline__ static Winner warp_merge(const Winner &part) {
    Winner all;
    all.key = __reduce_max_sync(0xffffffffu, part.key);
    all.id = __reduce_min_sync(0xffffffffu, part.key == all.key ? part.id : 0xffffffffu);
    const uint32_t owners = __ballot_sync(0xffffffffu, part.key == all.key && part.id == all.id);
    all.score = __shfl_sync(0xffffffffu, part.score, __ffs(owners) - 1);
    all.sum = Moments::warp_merge({part.sum, 0.}).sum;
    return all;
  }
};

struct Alternative {
  float score;
  uint32_t id;
};

template <int kBlocks>
struct Shared {
  Selection<kBlocks, kThreads> selection;
  // What each warp, then each block of the cluster found.
  Logits warp_logits[kWarps], logits[kBlocks];
  Moments warp_moments[kWarps], moments[kBlocks];
  Winner warp_winners[kWarps], winners[kBlocks];
  uint32_t n_alternatives;
  Alternative alternatives[KV_MAX_TOP_N];
};

// Merges parts over the cluster, in a fixed order; every thread gets the result.
template <int kBlocks, typename Part>
__device__ Part merge(const Part &mine, Part *warps, Part *blocks) {
  using Blocks = Cluster<kBlocks>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Part of_warp = Part::warp_merge(mine);
  if (lane == 0) warps[warp] = of_warp;
  __syncthreads();
  if (warp == 0) {
    const Part of_block = Part::warp_merge(lane < kWarps ? warps[lane] : Part::none());
    if (lane < kBlocks) *Blocks::of(&blocks[Blocks::rank()], lane) = of_block;
  }
  Blocks::sync();
  return Part::warp_merge(lane < kBlocks ? blocks[lane] : Part::none());
}

// ---- stages ----

// Starts the copying of a block's part of a row to shared memory; a thread copies what it will read.
__device__ void copy_async(const Slice<true> &slice, const float *row) {
  const float *from = row + slice.first;
  const bool aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0;
  for (uint32_t at = 4 * threadIdx.x; at < slice.n; at += 4 * kThreads) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(slice.values + at));
    if (aligned && at + 4 <= slice.n) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from + at) : "memory");
      continue;
    }
    for (uint32_t i = 0; i < 4; ++i) {
      if (at + i < slice.n) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to + 4 * i), "l"(from + at + i) : "memory");
      } else {
        slice.values[at + i] = -kInfinity;
      }
    }
  }
}

__device__ void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Watermark and penalties, in place.
template <typename Slice>
__device__ void bias(const Slice &slice, const kv_sample_params &p, const kv_draft &draft, const kv_sampling &sampling,
                     void *scratch) {
  const bool watermark = sampling.watermark_gamma > 0.f;
  const float repetition = sampling.repetition_penalty, frequency = sampling.frequency_penalty;
  const bool penalise = sampling.penalised && (repetition != 1.f || frequency != 0.f);
  if (!watermark && !penalise) return;
  const GreenList greens(static_cast<uint16_t *>(scratch), p.vocab, sampling.watermark_gamma, draft.previous);
  __syncthreads();
  const uint32_t *counts = p.counts + static_cast<int64_t>(draft.lane) * p.vocab;
  const float context_len = penalise ? static_cast<float>(p.context_lens[draft.lane]) : 1.f;
  slice.each([&](uint32_t at, uint32_t id, float4 group) {
    float logits[4] = {group.x, group.y, group.z, group.w};
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      if (at + i >= slice.n) break;
      if (watermark && greens.contains(id + i)) logits[i] += sampling.watermark_delta;
      const uint32_t count = penalise ? counts[id + i] : 0;
      if (count == 0) continue;
      if (repetition != 1.f) {
        logits[i] = logits[i] < 0.f ? __fmul_rn(logits[i], repetition) : logits[i] / repetition;
      }
      if (frequency != 0.f) logits[i] -= __fmul_rn(frequency, static_cast<float>(count)) / context_len;
    }
    slice.store(at, make_float4(logits[0], logits[1], logits[2], logits[3]));
  });
}

// Whether a stage after the penalties changes the distribution.
__device__ bool warps(const kv_sampling &sampling) {
  return sampling.temperature != 1.f || sampling.top_k != 0 || sampling.top_p < 1.f || sampling.typical_p < 1.f;
}

// The most that may be dropped of a mass so that `p` of it stays, and the likeliest in any case.
__device__ uint64_t tail(uint64_t mass, float p) {
  const uint64_t bound = __double2ull_rd((1. - static_cast<double>(p)) * static_cast<double>(mass));
  return min(bound, mass - 1);
}

// Drops what top-k, top-p and typical-p rule out of the scores, the least of which is `least`.
template <int kBlocks, typename Slice>
__device__ Filter warp_scores(const Slice &slice, const kv_sampling &sampling, float least, Shared<kBlocks> &shared) {
  Filter filter = Filter::all();
  Selected selected;
  if (sampling.top_k != 0) {
    const uint64_t k = sampling.top_k;
    const auto excess = [=](uint64_t n) { return n > k ? n - k : n; };
    if (shared.selection.select(slice, ByScore(filter, least), Count(), excess, &selected)) {
      filter.lowest = least = unordered(selected.key);
    }
  }
  if (sampling.top_p < 1.f) {
    const auto bound = [&](uint64_t mass) { return tail(mass, sampling.top_p); };
    if (shared.selection.select(slice, ByScore(filter, least), Mass(), bound, &selected)) {
      filter.lowest = least = unordered(selected.key);
      drop_ties(slice, selected.rest / Mass()(least), filter, shared);
    }
  }
  if (sampling.typical_p < 1.f) {
    Moments mine = Moments::none();
    slice.each([&](uint32_t, uint32_t id, float4 group) {
      const float scores[4] = {group.x, group.y, group.z, group.w};
      float sum = 0.f, first = 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!filter.keeps(scores[i], id + i)) continue;
        const float weight = expf(scores[i]);
        sum += weight;
        first = fmaf(weight, scores[i], first);
      }
      mine.sum += sum;
      mine.first += first;
    });
    const Moments all = merge<kBlocks>(mine, shared.warp_moments, shared.moments);
    // −ln p(x) less the entropy is E[score] − score.
    filter.centre = all.first / all.sum;
    const double reach = fmin(fmax(filter.centre - least, -filter.centre), 64.);
    filter.scale = reach > 0. ? Filter::kFar / reach : 0.;
    filter.typical = true;
    const auto bound = [&](uint64_t mass) { return tail(mass, sampling.typical_p); };
    if (shared.selection.select(slice, ByTypicality(filter), Mass(), bound, &selected)) {
      filter.farthest = Filter::kFar - selected.key;
    }
  }
  return filter;
}

// Drops so many of the candidates with the lowest score, those with the highest ids.
template <int kBlocks, typename Slice>
__device__ void drop_ties(const Slice &slice, uint64_t n, Filter &filter, Shared<kBlocks> &shared) {
  Selected selected;
  if (n == 0) return;
  shared.selection.select(slice, ById(filter, filter.lowest), Count(), [=](uint64_t) { return n; }, &selected);
  filter.cut = kMaxVocab - selected.key;
}

// Arg-max, or an exponential race: the largest p / e with e from the exponential distribution is a draw from p.
template <int kBlocks, typename Slice>
__device__ Winner choose(const Slice &slice, const kv_sampling &sampling, uint32_t position, const Filter &filter,
                         Shared<kBlocks> &shared) {
  Winner mine = Winner::none();
  slice.each([&](uint32_t, uint32_t id, float4 group) {
    const float scores[4] = {group.x, group.y, group.z, group.w};
    bool keeps[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) keeps[i] = filter.keeps(scores[i], id + i);
    if (!keeps[0] && !keeps[1] && !keeps[2] && !keeps[3]) return;
    uint4 block = {};
    if (sampling.draw) block = draw_words(sampling.seed, position, id / 4);
    const uint32_t words[4] = {block.x, block.y, block.z, block.w};
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!keeps[i]) continue;
      sum += expf(scores[i]);
      const uint32_t key = ordered(sampling.draw ? scores[i] - logf(exponential(words[i])) : scores[i]);
      if (key > mine.key) {
        mine.key = key;
        mine.id = id + i;
        mine.score = scores[i];
      }
    }
    mine.sum += sum;
  });
  return merge<kBlocks>(mine, shared.warp_winners, shared.winners);
}

// The n likeliest candidates, likeliest first, ties by the lowest id; written by the first block. Returns their number.
template <int kBlocks, typename Slice>
__device__ uint32_t report(const Slice &slice, Filter filter, uint32_t n, float least, double log_sum,
                           kv_alternative *out, Shared<kBlocks> &shared) {
  using Blocks = Cluster<kBlocks>;
  Selected selected;
  const auto excess = [=](uint64_t candidates) { return candidates > n ? candidates - n : candidates; };
  const float lowest = fmaxf(filter.lowest, least);
  if (shared.selection.select(slice, ByScore(filter, lowest), Count(), excess, &selected)) {
    filter.cut = filter.lowest == unordered(selected.key) ? filter.cut : kMaxVocab;
    filter.lowest = unordered(selected.key);
    drop_ties(slice, selected.rest, filter, shared);
  }
  uint32_t *n_found = Blocks::of(&shared.n_alternatives, 0);
  Alternative *found = Blocks::of(shared.alternatives, 0);
  slice.each([&](uint32_t, uint32_t id, float4 group) {
    const float scores[4] = {group.x, group.y, group.z, group.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (filter.keeps(scores[i], id + i)) found[atomicAdd(n_found, 1)] = {scores[i], id + i};
    }
  });
  Blocks::sync();
  if (Blocks::rank() != 0) return 0;
  n = shared.n_alternatives;
  if (threadIdx.x < n) {
    const Alternative mine = shared.alternatives[threadIdx.x];
    uint32_t rank = 0;
    for (uint32_t i = 0; i < n; ++i) {
      const Alternative other = shared.alternatives[i];
      const uint32_t a = ordered(other.score), b = ordered(mine.score);
      rank += a > b || (a == b && other.id < mine.id);
    }
    out[rank] = {mine.id, static_cast<float>(mine.score - log_sum)};
  }
  return n;
}

// ---- a row ----

// What becomes of the choice; by one thread.
__device__ void conclude(const kv_sample_params &p, const kv_draft &draft, const kv_sampling &sampling,
                         const kv_choice &choice) {
  p.choices[draft.result] = choice;
  p.lane_last[draft.lane] = choice.id;
  if (sampling.penalised) {
    ++p.counts[static_cast<int64_t>(draft.lane) * p.vocab + choice.id];
    ++p.context_lens[draft.lane];
  }
}

template <int kBlocks>
__device__ void sample_row(const kv_sample_params &p, Shared<kBlocks> &shared, float *values) {
  using Blocks = Cluster<kBlocks>;
  constexpr bool kShared = kBlocks > 1;
  grid_wait();
  const uint32_t row_index = blockIdx.x / kBlocks;
  const kv_draft draft = p.drafts[row_index];
  if (draft.lane < 0) return;
  // Nobody reaches into a block that has not begun.
  Blocks::arrive();
  const kv_sampling sampling = p.lanes[draft.lane];
  const bool first_thread = Blocks::rank() == 0 && threadIdx.x == 0;
  if (threadIdx.x == 0) shared.n_alternatives = 0;

  float *row = p.logits + row_index * p.stride;
  const uint32_t ids = slice_ids(p.vocab, kBlocks);
  const uint32_t first = min(Blocks::rank() * ids, static_cast<uint32_t>(p.vocab));
  const Slice<kShared> slice = {kShared ? values : row, first, min(ids, p.vocab - first)};
  if constexpr (kShared) {
    copy_async(slice, row);
    copy_wait();
  }
  bias(slice, p, draft, sampling, shared.selection.scratch());
  grid_launch_dependents();

  Logits mine = Logits::none();
  slice.each([&](uint32_t, uint32_t id, float4 group) { mine.add(id, group); });
  Blocks::wait();
  const Logits logits = merge<kBlocks>(mine, shared.warp_logits, shared.logits);
  const Summary &summary = logits.summary;
  if (!summary.valid()) {
    if (first_thread) conclude(p, draft, sampling, {0, 0.f, 1, 0});
    return;
  }
  if (!sampling.draw && sampling.top_n == 0 && !warps(sampling)) {
    if (first_thread) conclude(p, draft, sampling, {summary.argmax, -logf(summary.sum), 0, 0});
    return;
  }

  // From the largest down, so that no temperature overflows.
  const float temperature = sampling.temperature;
  const auto score = [&](float logit) { return (logit - summary.max) / temperature; };
  slice.each([&](uint32_t at, uint32_t, float4 x) {
    slice.store(at, make_float4(score(x.x), score(x.y), score(x.z), score(x.w)));
  });
  const float least = fmaxf(score(logits.least), Filter::all().lowest);
  const Filter filter = warp_scores(slice, sampling, least, shared);
  const Winner winner = choose(slice, sampling, draft.position, filter, shared);
  const double log_sum = log(winner.sum);
  uint32_t n_top = min(sampling.top_n, static_cast<uint32_t>(KV_MAX_TOP_N));
  if (n_top > 0) {
    kv_alternative *out = p.tops + static_cast<int64_t>(draft.result) * KV_MAX_TOP_N;
    n_top = report(slice, filter, n_top, least, log_sum, out, shared);
  }
  if (first_thread) {
    conclude(p, draft, sampling, {winner.id, static_cast<float>(winner.score - log_sum), 0, n_top});
  }
}

__global__ void KV_CLUSTER_DIMS(kClusterBlocks) __launch_bounds__(kThreads, kBlocksPerSm)
    sample_cluster_kernel(const __grid_constant__ kv_sample_params p) {
#if __CUDA_ARCH__ >= 900
  __shared__ Shared<kClusterBlocks> shared;
  extern __shared__ float4 values[];
  sample_row<kClusterBlocks>(p, shared, reinterpret_cast<float *>(values));
#endif
}

__global__ void __launch_bounds__(kThreads) sample_block_kernel(const __grid_constant__ kv_sample_params p) {
  __shared__ Shared<1> shared;
  sample_row<1>(p, shared, nullptr);
}

}  // namespace
}  // namespace kv

int64_t kv_sample_workspace_bytes(int32_t, int32_t) { return 0; }

int kv_sample(const kv_sample_params *params, kv_stream stream) {
  using namespace kv;
  if (params->vocab < 1 || static_cast<uint32_t>(params->vocab) > kMaxVocab) return cudaErrorInvalidValue;
  if (params->max_rows == 0) return cudaSuccess;
  int device, major, shared_bytes;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const size_t slice_bytes = slice_ids(params->vocab, kClusterBlocks) * sizeof(float);
  if (major < 9 || sizeof(Shared<kClusterBlocks>) + slice_bytes > static_cast<size_t>(shared_bytes)) {
    return launch(sample_block_kernel, dim3(params->max_rows), dim3(kThreads), 0, stream, *params);
  }
  const cudaError_t error = cudaFuncSetAttribute(sample_cluster_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(slice_bytes));
  if (error != cudaSuccess) return error;
  return launch(sample_cluster_kernel, dim3(params->max_rows * kClusterBlocks), dim3(kThreads), slice_bytes, stream,
                *params);
}
