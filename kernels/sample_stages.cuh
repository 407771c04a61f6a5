// The stages of the choice of a token, over the candidates of a row or of a few that were narrowed down to.
#pragma once

#include "random.cuh"
#include "sample_parts.cuh"
#include "watermark.cuh"

namespace kv {
namespace {

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

}  // namespace
}  // namespace kv
