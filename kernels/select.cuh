// Finds a bound in a row of scores without sorting it: which of the least are to be dropped, by number or by mass.
//
// A radix selection from the top digit down, where the digits are bins of a histogram in shared memory. Masses are added as
// integers, so that the order of additions does not matter and equal rows give equal results.
#pragma once

#include "cluster.cuh"
#include "summary.cuh"

namespace kv {

// Ids that a row may have, so that sums of their masses fit in 64 bits.
constexpr uint32_t kMaxVocab = 1u << 18;

constexpr int kBinBits = 10;
constexpr int kBins = 1 << kBinBits;

// What a block holds of a row: scores of consecutive ids, in groups of four. A thread touches only groups of its own, so
// passes need no barrier between them. Ids from the end of the row to the end of a group have −∞.
template <bool kShared>
struct Slice {
  float *values;   // Shared memory, whole groups; or the row itself.
  uint32_t first;  // Id of the first, a multiple of four.
  uint32_t n;      // Ids.

  __device__ __forceinline__ float4 load(uint32_t at) const {
    if constexpr (kShared) return *reinterpret_cast<const float4 *>(values + at);
    return make_float4(values[at], at + 1 < n ? values[at + 1] : -kInfinity, at + 2 < n ? values[at + 2] : -kInfinity,
                       at + 3 < n ? values[at + 3] : -kInfinity);
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

  // Calls body(place, first id, scores) for each group of this thread, by ascending id.
  template <typename Body>
  __device__ __forceinline__ void each(const Body &body) const {
    for (uint32_t at = 4 * threadIdx.x; at < n; at += 4 * blockDim.x) body(at, first + at, load(at));
  }
};

// Which candidates stay.
struct Filter {
  float lowest;   // Scores above it,
  uint32_t cut;   // and of those equal to it the ids below this one.
  bool typical;   // Of these, where set, only scores whose distance from `centre`
  double centre;
  double scale;   // in units of 1 / scale
  uint32_t farthest;  // is at most this.

  static constexpr uint32_t kFar = (1u << 30) - 1;

  __device__ __forceinline__ static Filter all() { return {-3.402823466e38f, kMaxVocab, false, 0., 0., kFar}; }

  __device__ __forceinline__ uint32_t distance(float score) const {
    return min(__double2uint_rz(fabs(score - centre) * scale), kFar);
  }

  __device__ __forceinline__ bool keeps(float score, uint32_t id) const {
    if (!(score > lowest || (score == lowest && id < cut))) return false;
    return !typical || distance(score) <= farthest;
  }
};

// ---- orders: which candidates are dropped first; keys ascend ----

struct Keys {
  uint32_t low, high;  // The least and the greatest that a bin may hold.
};

// By score; −∞ < lowest ≤ score ≤ 0.
class ByScore {
 public:
  // Scores below −40, which weigh nothing, share a bin: the others get finer ones.
  __device__ __forceinline__ ByScore(const Filter &filter, float lowest)
      : filter_(filter), lowest_(lowest), scale_((kBins - 1) / fmaxf(fminf(-lowest, 40.f), 1e-30f)) {}

  __device__ __forceinline__ bool has(float score, uint32_t id) const { return filter_.keeps(score, id); }
  __device__ __forceinline__ uint32_t key(float score, uint32_t) const { return ordered(score); }

  // Bins of equal width, rounded by an addition to 2^23.
  __device__ __forceinline__ uint32_t bin(float score, uint32_t) const {
    constexpr float kUnits = 8388608.f;
    return __float_as_uint(fmaxf(fmaf(score, scale_, kUnits + (kBins - 1)), kUnits)) & (kBins - 1);
  }

  __device__ Keys keys(uint32_t bin) const {
    Keys keys = {ordered(lowest_), ordered(0.f)};
    // The edges to within a float, then exactly.
    const double width = 1. / scale_, centre = (static_cast<double>(bin) - (kBins - 1)) * width;
    if (bin > 0) keys.low = max(keys.low, ordered(__double2float_rd(centre - 0.5 * width)) - 1);
    if (bin < kBins - 1) keys.high = min(keys.high, ordered(__double2float_ru(centre + 0.5 * width)) + 1);
    while (this->bin(unordered(keys.low), 0) < bin) ++keys.low;
    while (this->bin(unordered(keys.high), 0) > bin) --keys.high;
    return keys;
  }

 private:
  Filter filter_;
  float lowest_;
  float scale_;
};

// By distance from the typical score: the farthest first.
class ByTypicality {
 public:
  __device__ __forceinline__ explicit ByTypicality(const Filter &filter) : filter_(filter) {}

  __device__ __forceinline__ bool has(float score, uint32_t id) const { return filter_.keeps(score, id); }
  __device__ __forceinline__ uint32_t key(float score, uint32_t) const {
    return Filter::kFar - filter_.distance(score);
  }
  __device__ __forceinline__ uint32_t bin(float score, uint32_t id) const { return key(score, id) >> (30 - kBinBits); }
  __device__ Keys keys(uint32_t bin) const {
    return {bin << (30 - kBinBits), (bin << (30 - kBinBits)) + ((1u << (30 - kBinBits)) - 1)};
  }

 private:
  Filter filter_;
};

// Candidates of one score by id: the highest first.
class ById {
 public:
  __device__ __forceinline__ ById(const Filter &filter, float score) : filter_(filter), score_(score) {}

  __device__ __forceinline__ bool has(float score, uint32_t id) const {
    return score == score_ && filter_.keeps(score, id);
  }
  __device__ __forceinline__ uint32_t key(float, uint32_t id) const { return kMaxVocab - 1 - id; }
  __device__ __forceinline__ uint32_t bin(float score, uint32_t id) const { return key(score, id) >> (18 - kBinBits); }
  __device__ Keys keys(uint32_t bin) const {
    return {bin << (18 - kBinBits), (bin << (18 - kBinBits)) + ((1u << (18 - kBinBits)) - 1)};
  }

 private:
  Filter filter_;
  float score_;
};

// ---- weights ----

struct Count {
  __device__ __forceinline__ uint32_t operator()(float) const { return 1; }
};

// exp(score) in units of 2^−44.
struct Mass {
  __device__ __forceinline__ uint64_t operator()(float score) const { return __float2ull_rn(expf(score) * 0x1p44f); }
};

// ---- the selection ----

// Where to stop dropping.
struct Selected {
  uint32_t key;   // The least that is not dropped, or not all of it.
  uint64_t rest;  // What may yet be dropped of it, by weight.
};

// Of a cluster of kBlocks blocks; in shared memory.
template <int kBlocks, int kThreads>
class Selection {
 public:
  // Drops candidates in the order while their weights add up to at most bound(sum of all weights). False, at every
  // thread of the cluster: that is everyone or no one, so nothing is to be dropped.
  template <typename Slice, typename Order, typename Weight, typename Bound>
  __device__ bool select(const Slice &slice, const Order &order, const Weight &weight, const Bound &bound,
                         Selected *selected) {
    Crossing crossing;
    clear();
    add(slice, order, weight, [&](float score, uint32_t id, uint32_t *bin) {
      *bin = order.bin(score, id);
      return true;
    });
    if (!cross(bound, &crossing)) return false;
    Keys keys = order.keys(crossing.bin);
    while (keys.low < keys.high) {
      const int shift = max(0, (32 - kBinBits) - __clz(keys.high - keys.low));
      clear();
      add(slice, order, weight, [&](float score, uint32_t id, uint32_t *bin) {
        const uint32_t key = order.key(score, id);
        *bin = (key - keys.low) >> shift;
        return key >= keys.low && key <= keys.high;
      });
      const uint64_t rest = crossing.rest;
      cross([=](uint64_t) { return rest; }, &crossing);
      keys.low += crossing.bin << shift;
      keys.high = min(keys.high, keys.low + ((1u << shift) - 1));
    }
    *selected = {keys.low, crossing.rest};
    return true;
  }

  // Shared memory that is free between selections.
  __device__ void *scratch() { return low_; }
  static constexpr int kScratchBytes = 2 * kBins * sizeof(uint32_t);

 private:
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kShare = kBins / kBlocks;  // Bins that a block adds up over the cluster.
  static constexpr int kOwn = kBins / kThreads;   // Bins that a thread looks at.

  struct Crossing {
    uint32_t bin;
    uint64_t rest;  // The bound less the weights of the bins below.
  };

  __device__ void clear() {
    for (int i = threadIdx.x; i < kBins; i += kThreads) low_[i] = high_[i] = 0;
    __syncthreads();
  }

  __device__ __forceinline__ void add(uint32_t bin, uint32_t count) { atomicAdd(&low_[bin], count); }

  // Shared memory adds 32 bits at a time; the carry goes to the upper half.
  __device__ __forceinline__ void add(uint32_t bin, uint64_t mass) {
    const uint32_t low = static_cast<uint32_t>(mass);
    const uint32_t before = atomicAdd(&low_[bin], low);
    const uint32_t high = static_cast<uint32_t>(mass >> 32) + (before + low < before ? 1 : 0);
    if (high != 0) atomicAdd(&high_[bin], high);
  }

  template <typename Slice, typename Order, typename Weight, typename Bin>
  __device__ __forceinline__ void add(const Slice &slice, const Order &order, const Weight &weight, const Bin &bin_of) {
    slice.each([&](uint32_t, uint32_t id, float4 group) {
      const float scores[4] = {group.x, group.y, group.z, group.w};
      uint32_t bins[4];
      bool in[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) in[i] = bin_of(scores[i], id + i, &bins[i]) && order.has(scores[i], id + i);
      // Flat rows would have every thread of a warp wait for the same bin four times.
      if (in[0] && in[1] && in[2] && in[3] && bins[0] == bins[1] && bins[1] == bins[2] && bins[2] == bins[3]) {
        add(bins[0], weight(scores[0]) + weight(scores[1]) + weight(scores[2]) + weight(scores[3]));
        return;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (in[i]) add(bins[i], weight(scores[i]));
      }
    });
  }

  // The bin at which the weights, added up from bin 0, first exceed the bound. False: they never do.
  template <typename Bound>
  __device__ bool cross(const Bound &bound_of, Crossing *crossing) {
    using Blocks = Cluster<kBlocks>;
    Blocks::sync();
    for (int i = threadIdx.x; i < kShare; i += kThreads) {
      const uint32_t bin = Blocks::rank() * kShare + i;
      uint64_t sum = 0;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        sum += *Blocks::of(&low_[bin], block) + (static_cast<uint64_t>(*Blocks::of(&high_[bin], block)) << 32);
      }
      share_[i] = sum;
    }
    Blocks::sync();
    const uint32_t first = threadIdx.x * kOwn;
    uint64_t weights[kOwn], mine = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      weights[i] = *Blocks::of(&share_[(first + i) % kShare], (first + i) / kShare);
      mine += weights[i];
    }
    uint64_t up_to = mine;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset <<= 1) {
      const uint64_t before = __shfl_up_sync(0xffffffffu, up_to, offset);
      if (threadIdx.x % kWarp >= offset) up_to += before;
    }
    if (threadIdx.x % kWarp == kWarp - 1) warp_sums_[threadIdx.x / kWarp] = up_to;
    __syncthreads();
    uint64_t below = up_to - mine, total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      if (warp < threadIdx.x / kWarp) below += warp_sums_[warp];
      total += warp_sums_[warp];
    }
    const uint64_t bound = bound_of(total);
    if (bound >= total) return false;
    if (below <= bound && bound < below + mine) {
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
    return true;
  }

  uint32_t low_[kBins], high_[kBins];  // Weights of the block's candidates by bin.
  uint64_t share_[kShare];             // Weights of the cluster's, of some bins.
  uint64_t warp_sums_[kWarps];
  Crossing crossing_;
};

}  // namespace kv
