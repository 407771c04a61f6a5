// The choice of tokens, stage by stage as src/backend/cpu/sample.rs makes it.
//
// Where the device has clusters, eight blocks read a row once, keep it in shared memory, and agree by reading
// each other's; elsewhere one block works on the row in place. Nothing depends on what other rows are in the
// batch.
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

// ---- before the choice ----

// Starts the copying of a block's part of a row to shared memory; a thread copies what it will read.
template <typename Slice>
__device__ void copy_async(const Slice &slice, const float *row) {
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
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to + 4 * i), "l"(from + at + i)
                     : "memory");
      } else {
        slice.values[at + i] = -kInfinity;
      }
    }
  }
}

__device__ void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Watermark and penalties, in place.
template <typename Slice>
__device__ void bias(const Slice &slice, const kv_sample_params &p, const kv_draft &draft,
                     const kv_sampling &sampling, void *scratch) {
  const bool watermark = sampling.watermark_gamma > 0.f;
  const float repetition = sampling.repetition_penalty, frequency = sampling.frequency_penalty;
  const bool penalise = sampling.penalised && (repetition != 1.f || frequency != 0.f);
  if (!watermark && !penalise) return;
  const GreenList greens(static_cast<uint16_t *>(scratch), p.vocab, sampling.watermark_gamma, draft.previous);
  __syncthreads();
  const uint32_t *counts = p.counts + static_cast<int64_t>(draft.lane) * p.vocab + slice.first;
  const bool aligned = reinterpret_cast<uintptr_t>(counts) % 16 == 0;
  const float context_len = penalise ? static_cast<float>(p.context_lens[draft.lane]) : 1.f;
  // Counts of several groups are under way at once.
  constexpr uint32_t kBatch = 4;
  for (uint32_t start = 4 * threadIdx.x; start < slice.n; start += kBatch * 4 * kThreads) {
    uint4 seen[kBatch] = {};
#pragma unroll
    for (uint32_t j = 0; j < kBatch; ++j) {
      const uint32_t at = start + j * 4 * kThreads;
      if (!penalise || at >= slice.n) continue;
      if (aligned && at + 4 <= slice.n) {
        seen[j] = *reinterpret_cast<const uint4 *>(counts + at);
      } else {
        seen[j].x = counts[at];
        if (at + 1 < slice.n) seen[j].y = counts[at + 1];
        if (at + 2 < slice.n) seen[j].z = counts[at + 2];
        if (at + 3 < slice.n) seen[j].w = counts[at + 3];
      }
    }
#pragma unroll
    for (uint32_t j = 0; j < kBatch; ++j) {
      const uint32_t at = start + j * 4 * kThreads;
      if (at >= slice.n || !(watermark || (seen[j].x | seen[j].y | seen[j].z | seen[j].w) != 0)) continue;
      const float4 group = slice.load(at);
      float logits[4] = {group.x, group.y, group.z, group.w};
      const uint32_t group_counts[4] = {seen[j].x, seen[j].y, seen[j].z, seen[j].w};
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        if (watermark && at + i < slice.n && greens.contains(slice.first + at + i)) {
          logits[i] += sampling.watermark_delta;
        }
        if (group_counts[i] == 0) continue;
        if (repetition != 1.f) {
          logits[i] = logits[i] < 0.f ? __fmul_rn(logits[i], repetition) : logits[i] / repetition;
        }
        if (frequency != 0.f) {
          logits[i] -= __fmul_rn(frequency, static_cast<float>(group_counts[i])) / context_len;
        }
      }
      slice.store(at, make_float4(logits[0], logits[1], logits[2], logits[3]));
    }
  }
}

// Scores: logits from the largest down, so that no temperature overflows, divided by the temperature.
struct Scores {
  float max;
  float temperature;
  float reciprocal;  // 1 / temperature
  bool plain;        // Whether the quotient is to be left to the division.

  __device__ __forceinline__ Scores(float max, float temperature)
      : max(max),
        temperature(temperature),
        reciprocal(1.f / temperature),
        plain(!(temperature > 0x1p-60f && temperature < 0x1p60f)) {}

  // Rounded like the division: a quotient corrected by its exact remainder (Markstein, 1990).
  __device__ __forceinline__ float divide(float x) const {
    if (temperature == 1.f) return x;
    if (plain) return x / temperature;
    const float quotient = x * reciprocal;
    const float corrected = fmaf(fmaf(-quotient, temperature, x), reciprocal, quotient);
    return quotient == -kInfinity ? quotient : corrected;
  }

  __device__ __forceinline__ float operator()(float logit) const { return divide(logit - max); }
};

// ---- stages ----

// Whether top-k, top-p or typical-p may rule candidates out.
__device__ bool filters(const kv_sampling &sampling) {
  return sampling.top_k != 0 || sampling.top_p < 1.f || sampling.typical_p < 1.f;
}

// The most that may be dropped so that `p` of the mass `whole` stays, and the likeliest in any case; of this,
// `total` has not been dropped before.
__device__ uint64_t tail(uint64_t whole, uint64_t total, float p) {
  const uint64_t bound = __double2ull_rd((1. - static_cast<double>(p)) * static_cast<double>(whole));
  const uint64_t dropped = whole > total ? whole - total : 0;
  return min(bound > dropped ? bound - dropped : 0, total - 1);
}

// Candidates in the scratch of the scope's first block, one for each of its threads. All threads call; with
// more than that they are not kept. Returns how many there are.
template <typename Scope, typename Pool, typename Wanted, int kBlocks>
__device__ uint32_t gather(Pool &pool, const Wanted &wanted, Shared<kBlocks> &shared) {
  uint32_t *n = Scope::of(&shared.n_gathered, 0);
  if (Scope::rank() == 0 && threadIdx.x == 0) *n = 0;
  Scope::sync();
  Candidate *gathered = Scope::of(static_cast<Candidate *>(shared.selection.scratch()), 0);
  pool.each([&](uint32_t id, float4 group) {
    const float scores[4] = {group.x, group.y, group.z, group.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!wanted(scores[i], id + i)) continue;
      const uint32_t at = atomicAdd(n, 1);
      if (at < kThreads) gathered[at] = {scores[i], id + i};
    }
    return true;
  });
  Scope::sync();
  return *n;
}

// Ends a selection whose first digit is known.
template <typename Scope, typename Pool, typename Order, typename Weight, int kBlocks>
__device__ Stop settle(Pool &pool, const Order &order, const Weight &weight, const Coarse &coarse,
                       bool cut_ties, Shared<kBlocks> &shared) {
  if constexpr (Scope::kSize > 1) {
    // The first block settles it alone among the few that the digit leaves.
    const auto wanted = [&](float score, uint32_t id) {
      const uint32_t key = order.key(score, id);
      return (key >= coarse.keys.low) & (key <= coarse.keys.high) & order.has(score, id);
    };
    const uint32_t n = gather<Scope>(pool, wanted, shared);
    if (n <= kThreads) {
      if (Scope::rank() == 0) {
        const auto *gathered = static_cast<const Candidate *>(shared.selection.scratch());
        Held held = Held::none();
        if (threadIdx.x < n) held = Held::one(gathered[threadIdx.x].score, gathered[threadIdx.x].id);
        __syncthreads();
        const Stop stop = settle<Cluster<1>>(held, order, weight, coarse, cut_ties, shared);
        if (threadIdx.x < Scope::kSize) *Scope::of(&shared.stop, threadIdx.x) = stop;
      }
      Scope::sync();
      return shared.stop;
    }
  }
  const Selected selected = shared.selection.template refine<Scope>(pool, order, weight, coarse);
  Stop stop = {selected.key, kMaxVocab};
  const float score = unordered(selected.key);
  const uint64_t excess = cut_ties ? selected.rest / weight(score) : 0;
  if (excess > 0) {
    const ById by_id(order, score);
    const auto bound = [=](uint64_t) { return excess; };
    Coarse highest;
    shared.selection.template first_digit<Scope>(pool, by_id, Count(), bound, &highest);
    stop.cut = kMaxVocab - shared.selection.template refine<Scope>(pool, by_id, Count(), highest).key;
  }
  return stop;
}

// Drops all but the most typical candidates.
template <typename Scope, typename Pool, int kBlocks>
__device__ Filter typical(Pool &pool, float p, Filter filter, Shared<kBlocks> &shared) {
  Moments mine = Moments::none();
  pool.each([&](uint32_t id, float4 group) {
    const float scores[4] = {group.x, group.y, group.z, group.w};
    float sum = 0.f, first = 0.f;
    bool any = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool keeps = filter.keeps(scores[i], id + i);
      const float weight = Mass::weight(keeps ? scores[i] : -kInfinity);
      sum += weight;
      first = fmaf(weight, keeps ? -scores[i] : 0.f, first);
      any |= keeps;
    }
    mine.sum += Mass::units(sum);
    mine.first += Mass::units(first);
    return any;
  });
  const Moments all = merge<Scope>(mine, shared.moments);
  // −ln p(x) less the entropy is E[score] − score.
  const double centre = -static_cast<double>(all.first) / static_cast<double>(all.sum);
  // What is farther below the centre than any is above, and less in all than may be dropped, is among what is
  // dropped.
  const double least = log((1. - p) * static_cast<double>(all.sum) * 0x1p-44 / kMaxVocab);
  const float lowest = static_cast<float>(fmin(least, 2. * centre)) - 0.01f;
  if (lowest > filter.lowest) filter = Filter::from(lowest);
  const ByTypicality order(filter, centre, fmax(filter.lowest, centre - 32.));
  const auto bound = [&](uint64_t total) { return tail(all.sum, total, p); };
  Coarse coarse;
  if (!shared.selection.template first_digit<Scope>(pool, order, Mass(), bound, &coarse)) return filter;
  return order.typical(settle<Scope>(pool, order, Mass(), coarse, false, shared).key);
}

// What is known of the bounds before the stages: candidates of interest are those from `lowest` up.
struct Narrowed {
  float lowest;
  uint64_t whole;  // The mass of all candidates, where top-p comes first; else 0.
  bool known;      // Whether top-p is known to stop within these keys.
  Coarse top_p;
};

// Drops what top-k, top-p and typical-p rule out.
template <typename Scope, typename Pool, int kBlocks>
__device__ Filter warp_scores(Pool &pool, const kv_sampling &sampling, const Narrowed &narrowed,
                              Shared<kBlocks> &shared) {
  Filter filter = Filter::from(narrowed.lowest);
  Coarse coarse;
  if (sampling.top_k != 0) {
    const ByScore order(filter);
    const uint64_t k = sampling.top_k;
    const auto excess = [=](uint64_t n) { return n > k ? n - k : n; };
    if (shared.selection.template first_digit<Scope>(pool, order, Count(), excess, &coarse)) {
      filter.lowest = unordered(settle<Scope>(pool, order, Count(), coarse, false, shared).key);
    }
  }
  if (sampling.top_p < 1.f) {
    const ByScore order(filter);
    const uint64_t whole = narrowed.whole;
    const auto bound = [=](uint64_t total) {
      return tail(whole != 0 ? whole : total, total, sampling.top_p);
    };
    bool found = narrowed.known;
    if (found) {
      coarse = narrowed.top_p;
    } else {
      found = shared.selection.template first_digit<Scope>(pool, order, Mass(), bound, &coarse);
    }
    if (found) {
      const Stop stop = settle<Scope>(pool, order, Mass(), coarse, true, shared);
      filter.lowest = unordered(stop.key);
      filter.cut = stop.cut;
    }
  }
  if (sampling.typical_p < 1.f) filter = typical<Scope>(pool, sampling.typical_p, filter, shared);
  return filter;
}

// Whether a candidate may be ahead of `bar` in the exponential race, without looking closely. Its exponential
// draw is above its uniform one, so it is only if that is at most exp(score − bar).
__device__ __forceinline__ bool may_win(float score_log2, float bar, uint32_t word) {
  const float limit = exp2f(fmaf(-bar, kLog2e, score_log2));
  const float uniform = __uint_as_float(0x3f800000u | word >> 9) - 1.f;
  return !(uniform > fmaf(limit, 1.001f, 0x1p-22f));
}

// Arg-max, or an exponential race: the largest p / e with e from the exponential distribution is a draw from
// p.
template <typename Scope, typename Pool, int kBlocks>
__device__ Winner choose(Pool &pool, const kv_sampling &sampling, uint32_t position, const Filter &filter,
                         Shared<kBlocks> &shared) {
  Winner mine = Winner::none();
  float bar = -kInfinity;
  pool.each_together([&](uint32_t id, float4 group) {
    const float scores[4] = {group.x, group.y, group.z, group.w};
    bool keeps[4];
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      keeps[i] = filter.keeps(scores[i], id + i);
      sum += Mass::weight(keeps[i] ? scores[i] : -kInfinity);
    }
    mine.sum += Mass::units(sum);
    if (!sampling.draw) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (keeps[i]) mine.add(ordered(scores[i]), id + i, scores[i]);
      }
    } else {
      const uint4 block = draw_words(sampling.seed, position, id / 4);
      const uint32_t words[4] = {block.x, block.y, block.z, block.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (keeps[i] & may_win(scores[i] * kLog2e, bar, words[i])) {
          const float value = scores[i] - logf(exponential(words[i]));
          mine.add(ordered(value), id + i, scores[i]);
          bar = fmaxf(bar, value);
        }
        // The lanes' best is the bar for all of them.
        bar = unordered(__reduce_max_sync(0xffffffffu, ordered(bar)));
      }
    }
    return keeps[0] | keeps[1] | keeps[2] | keeps[3];
  });
  return merge<Scope>(mine, shared.winners);
}

// The race where nothing is ruled out, over logits. Few can beat the likeliest, and most are told from those
// by a bound.
template <typename Scope, typename Slice, int kBlocks>
__device__ Winner race(const Slice &slice, const Scores &scores, uint32_t likeliest,
                       const kv_sampling &sampling, uint32_t position, Shared<kBlocks> &shared) {
  const auto words_of = [&](uint32_t id) { return draw_words(sampling.seed, position, id / 4); };
  const float rate = kLog2e * scores.reciprocal;
  const uint4 first = words_of(likeliest);
  const uint32_t of_likeliest = likeliest % 4 == 0   ? first.x
                                : likeliest % 4 == 1 ? first.y
                                : likeliest % 4 == 2 ? first.z
                                                     : first.w;
  float bar = -logf(exponential(of_likeliest));
  Winner mine = Winner::none();
  slice.all([&](uint32_t, uint32_t id, float4 group) {
    const float logits[4] = {group.x, group.y, group.z, group.w};
    const uint4 block = words_of(id);
    const uint32_t words[4] = {block.x, block.y, block.z, block.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!may_win((logits[i] - scores.max) * rate, bar, words[i])) continue;
      const float score = scores(logits[i]);
      const float value = score - logf(exponential(words[i]));
      mine.add(ordered(value), id + i, score);
      bar = fmaxf(bar, value);
    }
  });
  return merge<Scope>(mine, shared.winners);
}

// The n likeliest candidates, likeliest first, ties by the lowest id; written by the first block. Returns
// their number.
template <typename Scope, typename Pool, int kBlocks>
__device__ uint32_t report(Pool &pool, Filter filter, uint32_t n, double log_sum, kv_alternative *out,
                           Shared<kBlocks> &shared) {
  const auto excess = [=](uint64_t candidates) { return candidates > n ? candidates - n : candidates; };
  const auto keeps = [&](float score, uint32_t id) { return filter.keeps(score, id); };
  const auto raise = [&](float lowest, uint32_t cut) {
    if (lowest == filter.lowest) cut = min(cut, filter.cut);
    if (lowest >= filter.lowest) filter = {lowest, cut, filter.highest};
  };
  // As many threads have a candidate at least as likely as the n-th of the threads' likeliest.
  float likeliest = -kInfinity;
  pool.each([&](uint32_t id, float4 group) {
    const float scores[4] = {group.x, group.y, group.z, group.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      likeliest = fmaxf(likeliest, keeps(scores[i], id + i) ? scores[i] : -kInfinity);
    return true;
  });
  Held of_thread = Held::one(likeliest, 0);
  Coarse coarse;
  if (shared.selection.template first_digit<Scope>(of_thread, ByScore(filter), Count(), excess, &coarse)) {
    raise(unordered(coarse.keys.low), kMaxVocab);
  }
  uint32_t n_gathered = gather<Scope>(pool, keeps, shared);
  if (n_gathered > kThreads) {
    const ByScore order(filter);
    if (shared.selection.template first_digit<Scope>(pool, order, Count(), excess, &coarse)) {
      const Stop stop = settle<Scope>(pool, order, Count(), coarse, true, shared);
      raise(unordered(stop.key), stop.cut);
    }
    n_gathered = gather<Scope>(pool, keeps, shared);
  }
  const auto *gathered = static_cast<const Candidate *>(shared.selection.scratch());
  if (Scope::rank() == 0 && threadIdx.x < n_gathered) {
    const Candidate mine = gathered[threadIdx.x];
    uint32_t rank = 0;
    for (uint32_t i = 0; i < n_gathered; ++i) {
      const Candidate other = gathered[i];
      const uint32_t a = ordered(other.score), b = ordered(mine.score);
      rank += a > b || (a == b && other.id < mine.id);
    }
    if (rank < n) out[rank] = {mine.id, static_cast<float>(mine.score - log_sum)};
  }
  // The others have read the number in the first block.
  Scope::sync();
  return min(n, n_gathered);
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
