// The counter-based generator of src/backend/random.rs, bit for bit.
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
#pragma once

#include <cstdint>

namespace kv {

// Four random words for a counter and a key.
__device__ __forceinline__ uint4 philox(uint4 counter, uint2 key) {
  constexpr uint32_t kMultipliers[2] = {0xD2511F53u, 0xCD9E8D57u};
  constexpr uint32_t kWeyl[2] = {0x9E3779B9u, 0xBB67AE85u};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t x = static_cast<uint64_t>(kMultipliers[0]) * counter.x;
    const uint64_t z = static_cast<uint64_t>(kMultipliers[1]) * counter.z;
    counter = make_uint4(static_cast<uint32_t>(z >> 32) ^ counter.y ^ key.x, static_cast<uint32_t>(z),
                         static_cast<uint32_t>(x >> 32) ^ counter.w ^ key.y, static_cast<uint32_t>(x));
    key.x += kWeyl[0];
    key.y += kWeyl[1];
  }
  return counter;
}

// The words of ids 4 * group .. 4 * group + 3 for the token at `position` of a request with this seed.
__device__ __forceinline__ uint4 draw_words(uint64_t seed, uint32_t position, uint32_t group) {
  return philox(make_uint4(group, position, 0, 0),
                make_uint2(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)));
}

// A draw from the exponential distribution of rate 1: positive and finite.
__device__ __forceinline__ float exponential(uint32_t word) {
  // Small values win a race, so the word counts up from 0, where floats are dense.
  const float uniform = fminf((__uint2float_rn(word) + 0.5f) * 0x1p-32f, 1.f - 0x1p-24f);
  return -log1pf(-uniform);
}

}  // namespace kv
