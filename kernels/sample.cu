// The choice of tokens, stage by stage as src/backend/cpu/sample.rs makes it.
//
// Where the device has clusters, eight blocks read a row once, keep it in shared memory, and agree by reading
// each other's; elsewhere one block works on the row in place. Nothing depends on what other rows are in the
// batch.
#include <algorithm>

#include "sample_stages.cuh"

namespace kv {
namespace {

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

// The stages over a pool that holds the candidates of interest. Without filters, `winner` and `log_sum` are
// known.
template <typename Scope, typename Pool, int kBlocks>
__device__ void finish(Pool &pool, const kv_sample_params &p, const kv_draft &draft,
                       const kv_sampling &sampling, const Narrowed &narrowed, Winner winner, double log_sum,
                       Shared<kBlocks> &shared) {
  Filter filter = Filter::from(narrowed.lowest);
  if (filters(sampling)) {
    filter = warp_scores<Scope>(pool, sampling, narrowed, shared);
    winner = choose<Scope>(pool, sampling, draft.position, filter, shared);
    log_sum = log(static_cast<double>(winner.sum) * 0x1p-44);
  }
  uint32_t n_top = min(sampling.top_n, static_cast<uint32_t>(KV_MAX_TOP_N));
  if (n_top > 0) {
    kv_alternative *out = p.tops + static_cast<int64_t>(draft.result) * KV_MAX_TOP_N;
    n_top = report<Scope>(pool, filter, n_top, log_sum, out, shared);
  }
  if (Scope::rank() == 0 && threadIdx.x == 0) {
    conclude(p, draft, sampling, {winner.id, static_cast<float>(winner.score - log_sum), 0, n_top});
  }
}

// Groups that the first block can hold, one a thread, and that fit in the scratch on their way.
constexpr uint32_t kHeld = 400;
struct Groups {
  float4 scores[kHeld];
  uint32_t ids[kHeld];
};
static_assert(kHeld <= kThreads && sizeof(Groups) <= Selection<1, kThreads>::kScratchBytes, "");
static_assert(kThreads * sizeof(Candidate) <= Selection<1, kThreads>::kScratchBytes, "");

template <int kBlocks>
__device__ void sample_row(const kv_sample_params &p, Shared<kBlocks> &shared, float *values) {
  using Blocks = Cluster<kBlocks>;
  using Alone = Cluster<1>;
  constexpr bool kShared = kBlocks > 1;
  grid_wait();
  const uint32_t row_index = blockIdx.x / kBlocks;
  const kv_draft draft = p.drafts[row_index];
  if (draft.lane < 0) return;
  // Nobody reaches into a block that has not begun.
  Blocks::arrive();
  const kv_sampling sampling = p.lanes[draft.lane];
  const bool first_thread = Blocks::rank() == 0 && threadIdx.x == 0;
  if (threadIdx.x == 0) shared.n_gathered = 0;

  float *row = p.logits + row_index * p.stride;
  const uint32_t ids = slice_ids(p.vocab, kBlocks);
  const uint32_t first = min(Blocks::rank() * ids, static_cast<uint32_t>(p.vocab));
  Slice<kShared> slice = {kShared ? values : row, first, min(ids, p.vocab - first), 0};
  if constexpr (kShared) {
    copy_async(slice, row);
    copy_wait();
  }
  bias(slice, p, draft, sampling, shared.selection.scratch());
  grid_launch_dependents();

  const float rate = fminf(kLog2e / sampling.temperature, 1e37f);
  Logits mine = Logits::none();
  slice.all([&](uint32_t, uint32_t id, float4 group) { mine.summary.add(id, group, rate); });
  if (mine.summary.max > -kInfinity) mine.least = mine.summary.max;
  Blocks::wait();
  const Logits logits = merge<Blocks>(mine, shared.logits, rate);
  const Summary &summary = logits.summary;
  if (!summary.valid()) {
    if (first_thread) conclude(p, draft, sampling, {0, 0.f, 1, 0});
    return;
  }
  const Scores scores(summary.max, sampling.temperature);
  const bool filtered = filters(sampling);
  Winner winner = Winner::none();
  winner.id = summary.argmax;
  const float log_sum = logf(summary.sum);
  if (!filtered) {
    if (sampling.draw) winner = race<Blocks>(slice, scores, summary.argmax, sampling, draft.position, shared);
    if (sampling.top_n == 0) {
      if (first_thread) conclude(p, draft, sampling, {winner.id, winner.score - log_sum, 0, 0});
      return;
    }
  }

  // Which logits, less the largest, are of interest. As many threads as are wanted have one at least as large
  // as that.
  float edge = Filter::kLowest;
  const uint32_t likeliest = filtered ? sampling.top_k : sampling.top_n;
  const bool by_mass = filtered && sampling.top_k == 0 && sampling.top_p < 1.f;
  if (likeliest != 0) {
    Held largest = Held::one(mine.summary.max - summary.max, 0);
    const ByScore order(Filter::from(fmaxf(logits.least - summary.max, edge)));
    const auto excess = [=](uint64_t n) { return n > likeliest ? n - likeliest : n; };
    Coarse coarse;
    if (shared.selection.template first_digit<Blocks>(largest, order, Count(), excess, &coarse)) {
      edge = unordered(coarse.keys.low) *
             1.000002f;  // Quotients by the temperature may be equal where logits are not.
    }
  } else if (by_mass) {
    // All that is below this is less than top-p drops.
    const float dropped = logf((1.f - sampling.top_p) / p.vocab) + log_sum - 0.01f;
    edge = fmaxf(edge, dropped * sampling.temperature);
  }
  slice.convert(summary.max, edge, scores);
  Narrowed narrowed = {fmaxf(scores.divide(edge), Filter::kLowest), 0, false, {}};
  if (by_mass) {
    const uint64_t whole = narrowed.whole = Mass::units(summary.sum);
    const auto bound = [=](uint64_t total) { return tail(whole, total, sampling.top_p); };
    const ByScore order(Filter::from(narrowed.lowest));
    narrowed.known =
        shared.selection.template first_digit<Blocks>(slice, order, Mass(), bound, &narrowed.top_p);
    narrowed.lowest = fmaxf(narrowed.lowest, unordered(narrowed.top_p.keys.low));
    slice.each([&](uint32_t, float4 group) { return largest_of(group) >= narrowed.lowest; });
  }
  // The first block goes on alone where the rest is little.
  const Live live = merge<Blocks>(Live{slice.live_groups()}, shared.live);
  if (live.groups > kHeld) {
    finish<Blocks>(slice, p, draft, sampling, narrowed, winner, log_sum, shared);
    return;
  }
  auto *groups = static_cast<Groups *>(shared.selection.scratch());
  slice.each([&](uint32_t id, float4 group) {
    const uint32_t at = atomicAdd(Blocks::of(&shared.n_gathered, 0), 1);
    Blocks::of(groups, 0)->scores[at] = group;
    Blocks::of(groups, 0)->ids[at] = id;
    return true;
  });
  Blocks::sync();
  if (Blocks::rank() != 0) return;
  Held held = Held::none();
  if (threadIdx.x < shared.n_gathered) held = {1, groups->ids[threadIdx.x], groups->scores[threadIdx.x]};
  __syncthreads();
  finish<Alone>(held, p, draft, sampling, narrowed, winner, log_sum, shared);
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
  const cudaError_t error = cudaFuncSetAttribute(
      sample_cluster_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(slice_bytes));
  if (error != cudaSuccess) return error;
  return launch(sample_cluster_kernel, dim3(params->max_rows * kClusterBlocks), dim3(kThreads), slice_bytes,
                stream, *params);
}
