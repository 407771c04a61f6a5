// Which experts a row goes to, with which weights, and the order of rows by expert.
//
// Nothing depends on the order in which blocks run: rows of an expert keep their own order, and ties go to
// the lower expert.

#include "direct_product.cuh"
#include "experts.cuh"

namespace kv {
namespace {

// ---- logits ----

constexpr int kLogitsWarps = 8;

// Thread blocks take a tile of rows and experts, warps a part of the inputs each.
template <typename T, int kRowTiles, int kColumnTiles>
__global__ void __launch_bounds__(kLogitsWarps *kWarp)
    router_logits(const T *x, int64_t x_stride, const T *weight, const T *bias, float *logits, int rows,
                  int inputs, int n_experts) {
  constexpr int kRows = kRowTiles * 16, kColumns = kColumnTiles * 8;
  __shared__ float parts[kLogitsWarps][kRows][kColumns + 2];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / 4, t = lane % 4;
  const int first_row = blockIdx.x * kRows, first_expert = blockIdx.y * kColumns;
  const T *own_x[kRowTiles][2], *own_w[kColumnTiles];
#pragma unroll
  for (int i = 0; i < kRowTiles * 2; ++i) {
    own_x[i / 2][i % 2] = x + min(first_row + i * 8 + g, rows - 1) * x_stride;
  }
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
    own_w[j] = weight + static_cast<int64_t>(min(first_expert + j * 8 + g, n_experts - 1)) * inputs;
  }
  grid_wait();
  grid_launch_dependents();
  float sums[kRowTiles][kColumnTiles][4] = {};
  multiply_direct<T>(sums, own_x, own_w, direct_begin(inputs, warp, kLogitsWarps),
                     direct_begin(inputs, warp + 1, kLogitsWarps));
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) parts[warp][i * 16 + e / 2 * 8 + g][j * 8 + 2 * t + e % 2] = sums[i][j][e];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kColumns; i += kLogitsWarps * kWarp) {
    const int row = i / kColumns, column = i % kColumns;
    if (first_row + row >= rows || first_expert + column >= n_experts) continue;
    float sum = 0.f;
#pragma unroll
    for (int part = 0; part < kLogitsWarps; ++part) sum += parts[part][row][column];
    const int expert = first_expert + column;
    if (bias != nullptr) sum += to_float(bias[expert]);
    logits[static_cast<int64_t>(first_row + row) * n_experts + expert] = sum;
  }
}

// ---- the choice ----

constexpr int kRouteWarps = 16;  // A row each.

// Numbers in the order of floats, above those kept for what must not be chosen. NaN is below all.
constexpr unsigned kChosen = 0, kHidden = 1, kNotANumber = 2;

__device__ __forceinline__ unsigned ordered(float x) {
  if (isnan(x)) return kNotANumber;
  const unsigned bits = __float_as_uint(x + 0.f);  // −0 is 0.
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Hides the experts of all but the best groups. `scores` [n_experts] and `group_scores` [groups] are the
// warp's own shared memory; a lane's keys are those of experts lane + 32 j.
template <int kPerLane>
__device__ __forceinline__ void limit_groups(const kv_router &router, int n_experts, const float *scores,
                                             float *group_scores, unsigned (&keys)[kPerLane]) {
  const int lane = threadIdx.x % kWarp;
  const int size = n_experts / router.groups;
  for (int group = lane; group < router.groups; group += kWarp) {
    float best = -INFINITY, second = -INFINITY;
    for (int i = 0; i < size; ++i) {
      const float score = scores[group * size + i];
      if (score > best) {
        second = best;
        best = score;
      } else if (score > second) {
        second = score;
      }
    }
    group_scores[group] = router.kind == KV_SIGMOID && size > 1 ? best + second : best;
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int expert = lane + j * kWarp;
    if (j * kWarp >= n_experts) break;
    if (expert >= n_experts) continue;
    const int own = expert / size;
    const float score = group_scores[own];
    int better = 0;
    for (int group = 0; group < router.groups; ++group) {
      better += group_scores[group] > score || (group_scores[group] == score && group < own);
    }
    if (better >= router.groups_used) keys[j] = kHidden;
  }
}

// A warp chooses for its row; a lane has kPerLane experts.
template <int kPerLane>
__device__ __forceinline__ void choose(const kv_router &router, int n_experts, int n_chosen,
                                       const float *logits, float *scores, float *group_scores, int32_t *ids,
                                       float *weights) {
  const int lane = threadIdx.x % kWarp;
  float values[kPerLane];  // What weights are made of.
  unsigned keys[kPerLane];
  float largest = -INFINITY;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    values[j] = -INFINITY;
    keys[j] = kChosen;
    const int expert = lane + j * kWarp;
    if (expert >= n_experts) continue;
    float logit = logits[expert];
    float score = logit;
    if (router.kind == KV_SIGMOID) {
      logit = 1.f / (1.f + exp2f(-1.4426950408889634f * logit));
      score = router.choice_bias != nullptr ? logit + router.choice_bias[expert] : logit;
    }
    values[j] = logit;
    keys[j] = ordered(score);
    largest = fmaxf(largest, logit);
    scores[expert] = score;
  }
  __syncwarp();
  if (router.groups > 1) limit_groups(router, n_experts, scores, group_scores, keys);

  // The lane with number i keeps the i-th choice.
  int own_id = 0;
  float own_value = 0.f;
  for (int i = 0; i < n_chosen; ++i) {
    unsigned best = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) best = max(best, keys[j]);
    best = __reduce_max_sync(0xffffffffu, best);
    unsigned id = KV_MAX_EXPERTS;
#pragma unroll
    for (int j = kPerLane - 1; j >= 0; --j) {
      if (keys[j] == best && best != kChosen) id = lane + j * kWarp;
    }
    id = __reduce_min_sync(0xffffffffu, id);
    float value = 0.f;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (id == lane + j * kWarp) {
        value = values[j];
        keys[j] = kChosen;
      }
    }
    value = __shfl_sync(0xffffffffu, value, id % kWarp);
    if (lane == i) {
      own_id = static_cast<int>(id);
      own_value = value;
    }
  }

  const bool chosen = lane < n_chosen;
  float weight = own_value, total = 0.f;
  if (router.kind != KV_SIGMOID) {
    largest = warp_max(largest);
    weight = exp2f((own_value - largest) * 1.4426950408889634f);
    if (router.kind == KV_SOFTMAX) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        if (lane + j * kWarp < n_experts) total += exp2f((values[j] - largest) * 1.4426950408889634f);
      }
    }
  }
  if (router.kind != KV_SOFTMAX) total = chosen ? weight : 0.f;
  total = warp_sum(total);
  if (router.kind == KV_SIGMOID) total += 1e-20f;
  const bool scaled = router.kind == KV_SOFTMAX || router.kind == KV_SIGMOID;
  if (chosen) {
    ids[lane] = own_id;
    weights[lane] = weight / total * (scaled ? router.factor : 1.f);
  }
}

// ---- the order by expert ----

// Choices so few that each is compared with every other, by one thread block.
constexpr int kFewChoices = 128;

// As few rows are one block, there are as many blocks as experts. `ids` and `firsts` are shared memory.
__device__ __forceinline__ void arrange_few(const Routing &routing, int n_chosen, int n, int32_t *ids,
                                            int32_t *firsts) {
  const int own = threadIdx.x;
  if (own < n) ids[own] = routing.ids[own];
  __syncthreads();
  int expert = 0, lower = 0, before = 0, count = 0;
  if (own < n) {
    expert = ids[own];
#pragma unroll 4
    for (int i = 0; i < n; ++i) {
      const int other = ids[i];
      lower += other < expert;
      before += other == expert && i < own;
      count += other == expert;
    }
    routing.places[own] = lower + before;
    routing.sources[lower + before] = own / n_chosen;
    firsts[own] = before == 0;
  }
  __syncthreads();
  // The first of an expert's choices writes its entry, that of the last expert also how many there are.
  if (own >= n || before > 0) return;
  int entry = 0;
#pragma unroll 4
  for (int i = 0; i < n; ++i) entry += firsts[i] && ids[i] < expert;
  routing.experts[entry] = {expert, lower, count, entry};
  if (lower + count == n) routing.n_experts[0] = routing.n_experts[1] = entry + 1;
}

// One thread block sorts all choices by expert, stably: each warp counts its part, then places it.
__device__ __forceinline__ void arrange(const Routing &routing, int n_experts, int n_chosen, int rows,
                                        int block_rows, int32_t (*counts)[KV_MAX_EXPERTS]) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int n = rows * n_chosen;
  const int part = (n + kRouteWarps * kWarp - 1) / (kRouteWarps * kWarp) * kWarp;
  const int begin = warp * part, end = min(begin + part, n);
  for (int expert = lane; expert < n_experts; expert += kWarp) counts[warp][expert] = 0;
  __syncthreads();
  const int bits = 32 - __clz(n_experts - 1);
  // The lanes that hold the same expert, by ballots, which are faster than __match_any_sync; the lowest
  // counts for all.
  const auto walk = [&](auto place) {
    constexpr int kAtOnce = 8;  // Loads under way.
    for (int base = begin; base < end; base += kAtOnce * kWarp) {
      int experts[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = base + j * kWarp + lane;
        experts[j] = i < end ? __ldcg(routing.ids + i) : -1;
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (base + j * kWarp >= end) break;
        const int expert = experts[j];
        unsigned same = __ballot_sync(0xffffffffu, expert >= 0);
        for (int bit = 0; bit < bits; ++bit) {
          const bool set = expert >> bit & 1;
          const unsigned others = __ballot_sync(0xffffffffu, set);
          same &= set ? others : ~others;
        }
        const int before = __popc(same & ((1u << lane) - 1));
        if (expert >= 0) place(base + j * kWarp + lane, expert, before);
        __syncwarp();
        if (expert >= 0 && before == 0) counts[warp][expert] += __popc(same);
        __syncwarp();
      }
    }
  };
  walk([](int, int, int) {});
  __syncthreads();
  // Each warp's first place among an expert's rows; the expert's rows in all, as the last warp's end.
  __shared__ int32_t totals[KV_MAX_EXPERTS];
  for (int expert = threadIdx.x; expert < n_experts; expert += kRouteWarps * kWarp) {
    int before = 0;
    for (int w = 0; w < kRouteWarps; ++w) {
      const int count = counts[w][expert];
      counts[w][expert] = before;
      before += count;
    }
    totals[expert] = before;
  }
  __syncthreads();
  if (warp == 0) {
    int first = 0, block = 0, entry = 0;
    for (int base = 0; base < n_experts; base += kWarp) {
      const int expert = base + lane;
      const int count = expert < n_experts ? totals[expert] : 0;
      const int blocks = (count + block_rows - 1) / block_rows;
      int count_end = count, block_end = blocks;
#pragma unroll
      for (int offset = 1; offset < kWarp; offset <<= 1) {
        const int count_below = __shfl_up_sync(0xffffffffu, count_end, offset);
        const int block_below = __shfl_up_sync(0xffffffffu, block_end, offset);
        if (lane >= offset) {
          count_end += count_below;
          block_end += block_below;
        }
      }
      const unsigned used = __ballot_sync(0xffffffffu, count > 0);
      if (expert < n_experts) totals[expert] = first + count_end - count;
      if (count > 0) {
        routing.experts[entry + __popc(used & ((1u << lane) - 1))] = {expert, first + count_end - count,
                                                                      count, block + block_end - blocks};
      }
      entry += __popc(used);
      first += __shfl_sync(0xffffffffu, count_end, kWarp - 1);
      block += __shfl_sync(0xffffffffu, block_end, kWarp - 1);
    }
    if (lane == 0) {
      routing.n_experts[0] = entry;
      routing.n_experts[1] = block;
    }
  }
  __syncthreads();
  walk([&](int i, int expert, int before) {
    const int place = totals[expert] + counts[warp][expert] + before;
    routing.places[i] = place;
    routing.sources[place] = i / n_chosen;
  });
}

// Warps choose for a row each; the last block to end arranges what all have chosen.
template <int kPerLane>
__global__ void __launch_bounds__(kRouteWarps *kWarp)
    route(kv_router router, Routing routing, int n_experts, int n_chosen, int rows, int block_rows) {
  __shared__ union {
    float scores[kRouteWarps][KV_MAX_EXPERTS];
    int32_t counts[kRouteWarps][KV_MAX_EXPERTS];
  } shared;
  __shared__ float group_scores[kRouteWarps][KV_MAX_EXPERTS / 4];
  __shared__ bool last;
  grid_wait();
  grid_launch_dependents();
  const int warp = threadIdx.x / kWarp;
  const int row = blockIdx.x * kRouteWarps + warp;
  if (row < rows) {
    const int64_t at = static_cast<int64_t>(row) * n_chosen;
    choose<kPerLane>(router, n_experts, n_chosen, routing.logits + static_cast<int64_t>(row) * n_experts,
                     shared.scores[warp], group_scores[warp], routing.ids + at, routing.weights + at);
  }
  if (block_rows == 0) return;
  __syncthreads();
  if (gridDim.x == 1 && rows * n_chosen <= kFewChoices) {
    arrange_few(routing, n_chosen, rows * n_chosen, shared.counts[0], shared.counts[1]);
    return;
  }
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(routing.arrivals, 1u) + 1 == gridDim.x;
    if (last) *routing.arrivals = 0;
    __threadfence();
  }
  __syncthreads();
  if (last) arrange(routing, n_experts, n_chosen, rows, block_rows, shared.counts);
}

template <typename T, int kRowTiles, int kColumnTiles>
int launch_logits(const kv_experts_params &p, const Routing &routing, kv_stream stream) {
  const dim3 grid((p.rows + kRowTiles * 16 - 1) / (kRowTiles * 16),
                  (p.n_experts + kColumnTiles * 8 - 1) / (kColumnTiles * 8));
  return launch(router_logits<T, kRowTiles, kColumnTiles>, grid, dim3(kLogitsWarps * kWarp), 0, stream,
                static_cast<const T *>(p.x), p.x_stride, static_cast<const T *>(p.router.weight),
                static_cast<const T *>(p.router.bias), routing.logits, p.rows, (p.hidden + 7) / 8 * 8,
                p.n_experts);
}

}  // namespace

int launch_route(const kv_experts_params &p, const Routing &routing, int block_rows, kv_stream stream) {
  const int status = KV_DISPATCH_DTYPE(p.dtype, T, [&] {
    // Few rows: many thread blocks; many: each operand read by few of them.
    return p.rows <= 64 ? launch_logits<T, 1, 1>(p, routing, stream)
                        : launch_logits<T, 2, 4>(p, routing, stream);
  });
  if (status != 0) return status;
  const auto kernel = p.n_experts <= 2 * kWarp   ? route<2>
                      : p.n_experts <= 8 * kWarp ? route<8>
                                                 : route<KV_MAX_EXPERTS / kWarp>;
  return launch(kernel, dim3((p.rows + kRouteWarps - 1) / kRouteWarps), dim3(kRouteWarps * kWarp), 0, stream,
                p.router, routing, p.n_experts, p.n_chosen, p.rows, block_rows);
}

}  // namespace kv
