// The green list of src/backend/cpu/watermark.rs: the same ids, where the rounds of its Feistel network are
// looked up.
//
// Kirchenbauer et al., "A Watermark for Large Language Models", arXiv 2301.10226.
#pragma once

#include <cstdint>

namespace kv {

// Which ids are green after a given token.
class GreenList {
 public:
  static constexpr int kRounds = 4;
  static constexpr uint32_t kMaxVocab = 1u << 18;
  static constexpr int kTableNumbers = kRounds << 9;

  // Fills `table`, kTableNumbers in shared memory. Called by every thread of the block, which is to be
  // synchronised before `contains`.
  __device__ GreenList(uint16_t *table, uint32_t vocab, float gamma, uint32_t previous)
      : table_(table), vocab_(vocab), n_green_(static_cast<uint32_t>(static_cast<double>(vocab) * gamma)) {
    const int bits = vocab > 1 ? 32 - __clz(vocab - 1) : 0;
    half_bits_ = max(1, (bits + 1) / 2);
    const uint64_t seed = 15485863ull * previous;
    for (uint32_t i = threadIdx.x; i < kRounds << half_bits_; i += blockDim.x) {
      const uint64_t round = i >> half_bits_;
      const uint64_t half = i & mask();
      table[i] = static_cast<uint16_t>(splitmix(seed + round * 0x9E3779B97F4A7C15ull + half) & mask());
    }
  }

  // Whether `id`, which is below the vocabulary, is green.
  __device__ bool contains(uint32_t id) const {
    uint32_t image = feistel(id);
    while (image >= vocab_) image = feistel(image);
    return image < n_green_;
  }

 private:
  __device__ uint32_t mask() const { return (1u << half_bits_) - 1; }

  __device__ uint32_t feistel(uint32_t number) const {
    uint32_t left = number >> half_bits_, right = number & mask();
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const uint32_t next = left ^ table_[(round << half_bits_) + right];
      left = right;
      right = next;
    }
    return left << half_bits_ | right;
  }

  // The finaliser of SplitMix64 (Steele et al., OOPSLA 2014).
  __device__ static uint64_t splitmix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }

  const uint16_t *table_;  // [kRounds][1 << half_bits] a round's function of each half
  uint32_t vocab_;
  uint32_t n_green_;
  int half_bits_;
};

}  // namespace kv
