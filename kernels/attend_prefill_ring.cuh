// Attention with wgmma: its tiles in shared memory, and the barriers by which gatherers and multipliers pass them on.
#pragma once

#include "attend_prefill.cuh"

namespace kv {
namespace {

constexpr int kRows = 128;          // Of a tile of queries.
constexpr int kGroupThreads = 128;  // Of a warpgroup.
constexpr int kConsumers = 2;
constexpr int kThreads = (1 + kConsumers) * kGroupThreads;
constexpr int kStages = 2;  // Of items' queries, and of keys and of values.
constexpr int kAtomBytes = 1024, kPanelBytes = 128 * 128;

template <int kDim>
constexpr int kPanels = (kDim + 63) / 64;
template <int kDim>
constexpr int kTileBytes = kPanels<kDim> * kPanelBytes;
// Stages of queries, keys and values, and what aligning the first may cost.
template <int kDim>
constexpr int kSharedBytes = 3 * kStages * kTileBytes<kDim> + kAtomBytes;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kKeys = 128;  // Of a tile of keys.

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint64_t *barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t *barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ bool barrier_passed(uint64_t *barrier, uint32_t parity) {
  uint32_t passed;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
      : "=r"(passed)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return passed != 0;
}

__device__ __forceinline__ void barrier_wait(uint64_t *barrier, uint32_t parity) {
  while (!barrier_passed(barrier, parity)) {
  }
}

// A place in a ring of stages, and whether the ring has been gone round an odd number of times.
struct Place {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// What the warpgroups tell each other.
struct Barriers {
  uint64_t full_q[kStages], empty_q[kStages];
  uint64_t full_k[kStages], empty_k[kStages];
  uint64_t full_v[kStages], empty_v[kStages];
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace
}  // namespace kv
