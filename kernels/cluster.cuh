// Thread blocks that share a piece of work, and reach into each other's shared memory where the device has
// clusters.
#pragma once

#include "common.cuh"

// The size of a kernel's clusters, where the device has them.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define KV_CLUSTER_DIMS(blocks) __cluster_dims__(blocks)
#else
#define KV_CLUSTER_DIMS(blocks)
#endif

namespace kv {

// A cluster of `kBlocks` blocks along x; of one block on any device.
template <int kBlocks>
struct Cluster {
  static constexpr int kSize = kBlocks;

  __device__ __forceinline__ static uint32_t rank() {
    uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks > 1) asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
  }

  // What every thread wrote before its arrival, every thread may read after its wait.
  __device__ __forceinline__ static void arrive() {
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks > 1) asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
  }

  __device__ __forceinline__ static void wait() {
    if constexpr (kBlocks == 1) {
      __syncthreads();
    } else {
#if __CUDA_ARCH__ >= 900
      asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
    }
  }

  __device__ __forceinline__ static void sync() {
    arrive();
    wait();
  }

  // A variable in shared memory as the block of that rank has it. No block may end while others use its
  // variables.
  template <typename T>
  __device__ __forceinline__ static T *of(T *variable, uint32_t rank) {
    T *theirs = variable;
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks > 1) asm volatile("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(variable), "r"(rank));
#endif
    return theirs;
  }
};

}  // namespace kv
