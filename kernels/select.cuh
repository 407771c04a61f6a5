// Finds a bound in a row of scores without sorting it: which of the least are to be dropped, by number or by
// mass.
//
// A radix selection from the top digit down, where the digits are bins of a histogram in shared memory.
// Masses are added as integers, so that the order of additions does not matter and equal rows give equal
// results.
#pragma once

#include "cluster.cuh"
#include "summary.cuh"

namespace kv {

// Ids that a row may have, so that sums of their masses fit in 64 bits.
constexpr uint32_t kMaxVocab = 1u << 18;

constexpr int kBinBits = 10;
constexpr int kBins = 1 << kBinBits;

__device__ __forceinline__ float largest_of(float4 x) { return fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)); }

// ---- pools: where candidates are found, in groups of four consecutive ids ----

// What a block holds of a row. A thread touches only groups of its own, so passes need no barrier between
// them. Ids from the end of the row to the end of a group have −∞.
template <bool kShared>
struct Slice {
  float *values;   // Shared memory, whole groups; or the row itself.
  uint32_t first;  // Id of the first, a multiple of four.
  uint32_t n;      // Ids.
  uint32_t live;   // A bit for every kPerBit groups of this thread: whether candidates are among them.

  static constexpr uint32_t kPerBit = kShared ? 1 : 4;

  __device__ __forceinline__ float4 load(uint32_t at) const {
    if constexpr (kShared) return *reinterpret_cast<const float4 *>(values + at);
    return make_float4(values[at], at + 1 < n ? values[at + 1] : -kInfinity,
                       at + 2 < n ? values[at + 2] : -kInfinity, at + 3 < n ? values[at + 3] : -kInfinity);
  }

  __device__ __forceinline__ void store(uint32_t at, float4 x) const {
    if constexpr (kShared) {
      *reinterpret_cast<float4 *>(values + at) = x;
    } else {
      values[at] = x.x;
      if (at + 1 < n) values[at + 1] = x.y;
      if (at + 2 < n) values[at + 2] = x.z;
      if (at + 3 < n) values[at + 3] = x.w;
    }
  }

  // Calls body(place, first id, numbers) for each group of this thread, by ascending id.
  template <typename Body>
  __device__ __forceinline__ void all(const Body &body) const {
#pragma unroll 2
    for (uint32_t at = 4 * threadIdx.x; at < n; at += 4 * blockDim.x) body(at, first + at, load(at));
  }

  // Groups live whose largest logit, less `max`, is at least `edge`; theirs become scores.
  template <typename Scores>
  __device__ __forceinline__ void convert(float max, float edge, const Scores &score) {
    live = 0;
    uint32_t i = 0;
    for (uint32_t at = 4 * threadIdx.x; at < n; at += 4 * blockDim.x, ++i) {
      const float4 x = load(at);
      const bool lives = largest_of(x) - max >= edge;
      if (lives) live |= 1u << (i / kPerBit);
      if (lives || kPerBit > 1) store(at, make_float4(score(x.x), score(x.y), score(x.z), score(x.w)));
    }
  }

  // Calls body(first id, scores), which tells whether candidates are among them, for each live group.
  template <typename Body>
  __device__ __forceinline__ void each(const Body &body) {
    for (uint32_t bits = live; bits != 0; bits &= bits - 1) {
      const uint32_t bit = __ffs(bits) - 1;
      bool lives = false;
      for (uint32_t i = bit * kPerBit; i < (bit + 1) * kPerBit; ++i) {
        const uint32_t at = 4 * (threadIdx.x + i * blockDim.x);
        if (at < n && body(first + at, load(at))) lives = true;
      }
      if (!lives) live &= ~(1u << bit);
    }
  }

  // The same, where whole warps call the body together; lanes with nothing to show have −∞.
  template <typename Body>
  __device__ __forceinline__ void each_together(const Body &body) {
    for (uint32_t bits = __reduce_or_sync(0xffffffffu, live); bits != 0; bits &= bits - 1) {
      const uint32_t bit = __ffs(bits) - 1;
      bool lives = false;
      for (uint32_t i = bit * kPerBit; i < (bit + 1) * kPerBit; ++i) {
        const uint32_t at = 4 * (threadIdx.x + i * blockDim.x);
        const bool mine = (live >> bit & 1) != 0 && at < n;
        if (body(first + at, mine ? load(at) : make_float4(-kInfinity, -kInfinity, -kInfinity, -kInfinity))) {
          lives = true;
        }
      }
      if (!lives) live &= ~(1u << bit);
    }
  }

  __device__ __forceinline__ uint32_t live_groups() const { return __popc(live) * kPerBit; }
};

// At most one group a thread.
struct Held {
  uint32_t live;
  uint32_t id;
  float4 scores;

  __device__ __forceinline__ static Held none() {
    return {0, 0, make_float4(-kInfinity, -kInfinity, -kInfinity, -kInfinity)};
  }
  __device__ __forceinline__ static Held one(float score, uint32_t id) {
    return {1, id, make_float4(score, -kInfinity, -kInfinity, -kInfinity)};
  }

  template <typename Body>
  __device__ __forceinline__ void each(const Body &body) {
    if (live != 0 && !body(id, scores)) live = 0;
  }

  template <typename Body>
  __device__ __forceinline__ void each_together(const Body &body) {
    if (__any_sync(0xffffffffu, live != 0) && !body(id, scores)) live = 0;
  }
};

// Which candidates stay.
struct Filter {
  float lowest;   // Scores above it,
  uint32_t cut;   // and of those equal to it the ids below this one,
  float highest;  // unless they are above this.

  static constexpr float kLowest = -3.402823466e38f;

  __device__ __forceinline__ static Filter from(float lowest) { return {lowest, kMaxVocab, 0.f}; }

  // Without branches, in which the threads of a warp would wait for each other.
  __device__ __forceinline__ bool keeps(float score, uint32_t id) const {
    return ((score > lowest) | ((score == lowest) & (id < cut))) & (score <= highest);
  }
};

// ---- orders: which candidates are dropped first; keys ascend ----

struct Keys {
  uint32_t low, high;  // The least and the greatest that a bin may hold.
};

// By score, at most 0. Those below −40, which weigh nothing, share a bin, so that the others get finer ones.
class ByScore {
 public:
  __device__ __forceinline__ explicit ByScore(const Filter &filter)
      : filter_(filter), scale_((kBins - 1) / fmaxf(fminf(-filter.lowest, 40.f), 1e-30f)) {}

  // Whether what it has not is no candidate any more.
  static constexpr bool kPrunes = true;
  __device__ __forceinline__ bool has(float score, uint32_t id) const { return filter_.keeps(score, id); }
  __device__ __forceinline__ uint32_t key(float score, uint32_t) const { return ordered(score); }

  // Bins of equal width, rounded by an addition to 2^23.
  __device__ __forceinline__ uint32_t bin(float score, uint32_t) const {
    constexpr float kUnits = 8388608.f;
    return __float_as_uint(fmaxf(fmaf(score, scale_, kUnits + (kBins - 1)), kUnits)) & (kBins - 1);
  }

  __device__ Keys keys(uint32_t bin) const {
    Keys keys = {ordered(filter_.lowest), ordered(0.f)};
    // The edges to within a float, then exactly.
    const double width = 1. / scale_, centre = (static_cast<double>(bin) - (kBins - 1)) * width;
    if (bin > 0) keys.low = max(keys.low, ordered(__double2float_rd(centre - 0.5 * width)) - 1);
    if (bin < kBins - 1) keys.high = min(keys.high, ordered(__double2float_ru(centre + 0.5 * width)) + 1);
    while (this->bin(unordered(keys.low), 0) < bin) ++keys.low;
    while (this->bin(unordered(keys.high), 0) > bin) --keys.high;
    return keys;
  }

  // Whether a candidate's key may be one of these, without looking closely.
  __device__ __forceinline__ bool near(float score, Keys keys) const {
    return (score >= unordered(keys.low)) & (score <= unordered(keys.high));
  }

 private:
  Filter filter_;
  float scale_;
};

// By distance from the typical score: the farthest first.
class ByTypicality {
 public:
  // Scores from `low` up have their own distances; those below weigh nothing.
  __device__ __forceinline__ ByTypicality(const Filter &filter, double centre, double low)
      : filter_(filter), centre_(static_cast<int32_t>(rint(centre * kUnits))) {
    const double reach = fmin(fmax(centre - low, -centre), 31.) * kUnits;
    shift_ = max(0, (32 - kBinBits) - __clz(static_cast<uint32_t>(reach) + 2));
  }

  static constexpr bool kPrunes = true;
  __device__ __forceinline__ bool has(float score, uint32_t id) const { return filter_.keeps(score, id); }
  __device__ __forceinline__ uint32_t key(float score, uint32_t) const {
    return kFar - static_cast<uint32_t>(abs(units(score) - centre_));
  }
  __device__ __forceinline__ uint32_t bin(float score, uint32_t id) const {
    return kBins - 1 - min((kFar - key(score, id)) >> shift_, kBins - 1);
  }
  __device__ Keys keys(uint32_t bin) const {
    const uint32_t nearest = (kBins - 1 - bin) << shift_;
    return {bin == 0 ? 0 : kFar - (nearest + ((1u << shift_) - 1)), kFar - nearest};
  }
  __device__ __forceinline__ bool near(float, Keys) const { return true; }

  // The filter less the candidates with keys below this one: those of an interval stay. Called by whole
  // warps.
  __device__ Filter typical(uint32_t key_) const {
    const uint32_t all_low = ordered(filter_.lowest), all_high = ordered(0.f);
    const auto stays = [&](uint32_t score) { return key(unordered(score), 0) >= key_; };
    const uint32_t low = warp_first(all_low, all_high, [&](uint32_t score) {
      return units(unordered(score)) >= centre_ || stays(score);
    });
    const uint32_t above = warp_first(low, all_high + 1, [&](uint32_t score) {
      return score > all_high || (units(unordered(score)) > centre_ && !stays(score));
    });
    return {unordered(low), low == all_low ? filter_.cut : kMaxVocab, unordered(above - 1)};
  }

 private:
  // The least of low .. high for which `holds`; it does for all that follow, and for `high`.
  template <typename Holds>
  __device__ static uint32_t warp_first(uint32_t low, uint32_t high, const Holds &holds) {
    while (low < high) {
      const uint32_t step = (high - low) / kWarp + 1;
      const uint32_t mine = low + min(threadIdx.x % kWarp * step, high - low);
      const uint32_t holding = __ballot_sync(0xffffffffu, holds(mine));
      const uint32_t first = holding != 0 ? __ffs(holding) - 1 : kWarp;
      if (first < kWarp) high = low + min(first * step, high - low);
      if (first > 0) low = min(low + (first - 1) * step + 1, high);
    }
    return low;
  }

  // Fixed point: exact for scores from −16 to −1/4, and to 1.5e-8 above.
  static constexpr float kUnits = 0x1p26f;
  __device__ __forceinline__ static int32_t units(float score) {
    return __float2int_rn(fmaxf(score, -31.f) * kUnits);
  }

  static constexpr uint32_t kFar = 0x7fffffffu;
  Filter filter_;
  int32_t centre_;
  int shift_;
};

// Candidates of one score, of those that another order has, by id: the highest first.
template <typename Order>
class ById {
 public:
  __device__ __forceinline__ ById(const Order &order, float score) : order_(order), score_(score) {}

  static constexpr bool kPrunes = false;
  __device__ __forceinline__ bool has(float score, uint32_t id) const {
    return (score == score_) & order_.has(score, id);
  }
  __device__ __forceinline__ uint32_t key(float, uint32_t id) const { return kMaxVocab - 1 - id; }
  __device__ __forceinline__ uint32_t bin(float score, uint32_t id) const { return key(score, id) >> kShift; }
  __device__ Keys keys(uint32_t bin) const { return {bin << kShift, (bin << kShift) + ((1u << kShift) - 1)}; }
  __device__ __forceinline__ bool near(float score, Keys) const { return score == score_; }

 private:
  static constexpr int kShift = 18 - kBinBits;
  Order order_;
  float score_;
};

// ---- weights ----

struct Count {
  using Sum = uint32_t;
  __device__ __forceinline__ uint32_t operator()(float) const { return 1; }
};

// exp(score) in units of 2^−44.
struct Mass {
  using Sum = uint64_t;
  __device__ __forceinline__ static float weight(float score) { return exp2_approx(score * kLog2e); }
  __device__ __forceinline__ static uint64_t units(float weight) { return __float2ull_rn(weight * 0x1p44f); }
  __device__ __forceinline__ uint64_t operator()(float score) const { return units(weight(score)); }
};

// ---- the selection ----

// Where to stop dropping.
struct Selected {
  uint32_t key;   // The least that is not dropped, or not all of it.
  uint64_t rest;  // What may yet be dropped of it, by weight.
};

// The same, to within some keys.
struct Coarse {
  Keys keys;
  uint64_t rest;  // What may be dropped of them.
};

// In shared memory, for clusters of kBlocks blocks. Every thread of the scope, the cluster or one block of
// it, takes part in a selection and gets its outcome.
template <int kBlocks, int kThreads>
class Selection {
 public:
  // Where to stop if candidates are dropped in the order while their weights add up to at most bound(sum of
  // all weights), as the first digit has it. False: that is everyone or no one, so nothing is to be dropped.
  template <typename Scope, typename Pool, typename Order, typename Weight, typename Bound>
  __device__ bool first_digit(Pool &pool, const Order &order, const Weight &weight, const Bound &bound,
                              Coarse *coarse) {
    clear();
    pool.each([&](uint32_t id, float4 group) {
      const float scores[4] = {group.x, group.y, group.z, group.w};
      uint32_t bins[4];
      bool in[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) in[i] = order.has(scores[i], id + i);
      if (!(in[0] | in[1] | in[2] | in[3])) return !Order::kPrunes;
#pragma unroll
      for (int i = 0; i < 4; ++i) bins[i] = order.bin(scores[i], id + i);
      add(scores, bins, in, weight);
      return true;
    });
    Crossing crossing;
    if (!cross<Scope, Weight>(bound, &crossing)) return false;
    *coarse = {order.keys(crossing.bin), crossing.rest};
    return true;
  }

  // The other digits.
  template <typename Scope, typename Pool, typename Order, typename Weight>
  __device__ Selected refine(Pool &pool, const Order &order, const Weight &weight, Coarse coarse) {
    Keys &keys = coarse.keys;
    while (keys.low < keys.high) {
      const int shift = max(0, (32 - kBinBits) - __clz(keys.high - keys.low));
      clear();
      pool.each([&](uint32_t id, float4 group) {
        const float scores[4] = {group.x, group.y, group.z, group.w};
        bool in[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) in[i] = order.near(scores[i], keys);
        if (!(in[0] | in[1] | in[2] | in[3])) return true;
        uint32_t bins[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t key = order.key(scores[i], id + i);
          in[i] = in[i] & (key >= keys.low) & (key <= keys.high) & order.has(scores[i], id + i);
          bins[i] = (key - keys.low) >> shift;
        }
        add(scores, bins, in, weight);
        return true;
      });
      const uint64_t rest = coarse.rest;
      Crossing crossing;
      cross<Scope, Weight>([=](uint64_t) { return rest; }, &crossing);
      keys.low += crossing.bin << shift;
      keys.high = min(keys.high, keys.low + ((1u << shift) - 1));
      coarse.rest = crossing.rest;
    }
    return {keys.low, coarse.rest};
  }

  // Shared memory that is free between selections.
  static constexpr int kScratchBytes = 2 * kBins * sizeof(uint32_t);
  __device__ void *scratch() { return low_; }

 private:
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kShare = kBins / kBlocks;  // Bins that a block adds up over the cluster.
  static constexpr int kOwn = kBins / kThreads;   // Bins that a thread looks at.

  struct Crossing {
    uint32_t bin;
    uint64_t rest;  // The bound less the weights of the bins below.
  };

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) low_[threadIdx.x + i * kThreads] = high_[threadIdx.x + i * kThreads] = 0;
    __syncthreads();
  }

  // Adds to a number in shared memory unless that changes nothing; returns what it was. Predicated: no
  // branch.
  __device__ __forceinline__ static uint32_t add(uint32_t *number, uint32_t x) {
    uint32_t before = 0;
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %2, 0;\n\t@p atom.shared.add.u32 %0, [%1], %2;\n\t}"
                 : "+r"(before)
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(number))), "r"(x)
                 : "memory");
    return before;
  }

  // Adds those of a group that are in. Flat rows would have every thread of a warp wait for the same bin four
  // times: a group of one bin is added at once.
  __device__ __forceinline__ void add(const float (&)[4], const uint32_t (&bins)[4], const bool (&in)[4],
                                      Count) {
    uint32_t counts[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) counts[i] = in[i];
    const bool same = (bins[0] == bins[1]) & (bins[0] == bins[2]) & (bins[0] == bins[3]);
    counts[0] += same ? counts[1] + counts[2] + counts[3] : 0;
    add(&low_[bins[0] % kBins], counts[0]);
#pragma unroll
    for (int i = 1; i < 4; ++i) add(&low_[bins[i] % kBins], same ? 0 : counts[i]);
  }

  // Shared memory adds 32 bits at a time; carries go to the upper half.
  __device__ __forceinline__ void add(const float (&scores)[4], const uint32_t (&bins)[4],
                                      const bool (&in)[4], Mass mass) {
    uint64_t masses[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) masses[i] = mass(in[i] ? scores[i] : -kInfinity);
    const bool same = (bins[0] == bins[1]) & (bins[0] == bins[2]) & (bins[0] == bins[3]);
    masses[0] += same ? masses[1] + masses[2] + masses[3] : 0;
#pragma unroll
    for (int i = 1; i < 4; ++i) masses[i] = same ? 0 : masses[i];
    uint32_t before[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) before[i] = add(&low_[bins[i] % kBins], static_cast<uint32_t>(masses[i]));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = static_cast<uint32_t>(masses[i]);
      add(&high_[bins[i] % kBins], static_cast<uint32_t>(masses[i] >> 32) + (before[i] + low < low ? 1 : 0));
    }
  }

  // A bin's weight in this block, or in that of the given rank.
  template <typename Scope, typename Weight>
  __device__ __forceinline__ uint64_t weight_of(uint32_t bin, uint32_t rank) {
    uint64_t weight = *Scope::of(&low_[bin], rank);
    if constexpr (sizeof(typename Weight::Sum) == 8) {
      weight += static_cast<uint64_t>(*Scope::of(&high_[bin], rank)) << 32;
    }
    return weight;
  }

  // The sum up to and including each lane.
  __device__ __forceinline__ static uint64_t warp_scan(uint64_t x) {
#pragma unroll
    for (int offset = 1; offset < kWarp; offset <<= 1) {
      const uint64_t before = __shfl_up_sync(0xffffffffu, x, offset);
      x += threadIdx.x % kWarp >= offset ? before : 0;
    }
    return x;
  }

  // The bin at which the weights, added up from bin 0, first exceed the bound. False: they never do.
  template <typename Scope, typename Weight, typename Bound>
  __device__ bool cross(const Bound &bound_of, Crossing *crossing) {
    const uint32_t first = threadIdx.x * kOwn;
    uint64_t weights[kOwn], mine = 0;
    Scope::sync();
    if constexpr (Scope::kSize > 1) {
      for (int i = threadIdx.x; i < kShare; i += kThreads) {
        uint64_t sum = 0;
#pragma unroll
        for (int rank = 0; rank < Scope::kSize; ++rank) {
          sum += weight_of<Scope, Weight>(Scope::rank() * kShare + i, rank);
        }
        share_[i] = sum;
      }
      Scope::sync();
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const uint32_t bin = first + i;
      weights[i] = Scope::kSize > 1 ? *Scope::of(&share_[bin % kShare], bin / kShare)
                                    : weight_of<Scope, Weight>(bin, 0);
      mine += weights[i];
    }
    const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const uint64_t up_to = warp_scan(mine);
    if (lane == kWarp - 1) warp_sums_[warp] = up_to;
    __syncthreads();
    const uint64_t warps_up_to = warp_scan(lane < kWarps ? warp_sums_[lane] : 0);
    const uint64_t total = __shfl_sync(0xffffffffu, warps_up_to, kWarps - 1);
    const uint64_t before = __shfl_sync(0xffffffffu, warps_up_to, warp == 0 ? 0 : warp - 1);
    uint64_t below = (warp == 0 ? 0 : before) + up_to - mine;
    const uint64_t bound = bound_of(total);
    if (bound < total && below <= bound && bound < below + mine) {
      uint32_t bin = first;
#pragma unroll
      for (int i = 0; i + 1 < kOwn; ++i) {
        if (bin == first + i && bound >= below + weights[i]) {
          below += weights[i];
          ++bin;
        }
      }
      crossing_ = {bin, bound - below};
    }
    __syncthreads();
    *crossing = crossing_;
    return bound < total;
  }

  alignas(16) uint32_t low_[kBins];  // Weights of the block's candidates by bin: the lower halves,
  uint32_t high_[kBins];             // and the upper.
  uint64_t share_[kShare];           // Weights of the cluster's, of some bins.
  uint64_t warp_sums_[kWarps];
  Crossing crossing_;
};

}  // namespace kv
