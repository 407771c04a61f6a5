// Ranks that read and write each other's memory: flags to meet by, and words that say by themselves that they are there.
//
// A block that waits for a peer must not wait for ever: once a rank has failed, `kv_world::aborted` ends every wait, and
// whatever comes out of it is read by nobody.
#pragma once

#include "common.cuh"

namespace kv {

// Waits between two looks at host memory, which costs as much as hundreds of them.
constexpr uint32_t kWaitsPerLook = 1024;

__device__ __forceinline__ bool is_aborted(const kv_world &world, uint32_t &waits) {
  return ++waits % kWaitsPerLook == 0 && *static_cast<const volatile uint32_t *>(world.aborted) != 0;
}

__device__ __forceinline__ void store_release(uint32_t *to, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t *from) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

// Sixteen bytes that a peer writes or reads while this kernel runs.
__device__ __forceinline__ uint4 load_shared_with_peers(const void *from) {
  uint4 value;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from)
               : "memory");
  return value;
}

__device__ __forceinline__ void store_shared_with_peers(void *to, uint4 value) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

// An array's entry without the array in memory: a parameter indexed by what is known at run time would be copied there.
template <int kEntries, typename Entry>
__device__ __forceinline__ Entry entry(Entry const (&array)[KV_MAX_RANKS], int index) {
  Entry found = array[0];
#pragma unroll
  for (int i = 1; i < kEntries; ++i) found = index == i ? array[i] : found;
  return found;
}

// ---- meetings ----

// Blocks of one number meet, one of each rank: what any of them, or a kernel before it, wrote is seen by all afterwards.
// Numbers of meetings are kept for each block on its own device, so that a recorded kernel goes on counting.
class Meetings {
 public:
  __device__ explicit Meetings(const kv_world &world) : world_(world) { count_ = world.meetings[blockIdx.x]; }

  __device__ void meet() {
    ++count_;
    __syncthreads();
    const int peer = threadIdx.x;
    if (peer < world_.n_ranks && peer != world_.rank) {
      const int at = blockIdx.x * KV_MAX_RANKS;
      store_release(entry<KV_MAX_RANKS>(world_.flags, peer) + at + world_.rank, count_);
      const uint32_t *flag = entry<KV_MAX_RANKS>(world_.flags, world_.rank) + at + peer;
      uint32_t waits = 0;
      // Wrapping, as the count does; a peer may be one meeting ahead already.
      while (static_cast<int32_t>(load_acquire(flag) - count_) < 0 && !is_aborted(world_, waits)) {
      }
    }
    __syncthreads();
  }

  // The block's last act with its peers.
  __device__ void end() {
    if (threadIdx.x == 0) world_.meetings[blockIdx.x] = count_;
  }

 private:
  const kv_world &world_;
  uint32_t count_;
};

// ---- inboxes ----
//
// A word of an inbox is `kNothing` until its sender has written it, and again once it was read ("Lamport" style, as
// TensorRT-LLM's one-shot all-reduce: no flag, no fence). Two inboxes take turns: a sender writes to one again only after
// it has the reader's numbers of the turn between, which the reader sends after it has emptied that inbox.

constexpr uint32_t kNothing = 0xffffffffu;  // Two NaNs of either 16-bit dtype.

__device__ __forceinline__ bool is_whole(const uint4 &words) {
  return words.x != kNothing && words.y != kNothing && words.z != kNothing && words.w != kNothing;
}

// Two NaNs stay two NaNs, but other ones.
__device__ __forceinline__ uint32_t sendable(uint32_t word) { return word == kNothing ? 0x7fff7fffu : word; }

__device__ __forceinline__ uint4 sendable(const uint4 &words) {
  return make_uint4(sendable(words.x), sendable(words.y), sendable(words.z), sendable(words.w));
}

}  // namespace kv
