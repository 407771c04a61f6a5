// Attention with wgmma: the warpgroup that gathers queries, keys and values, and the queue it takes items from.
#pragma once

#include "attend_prefill_ring.cuh"

namespace kv {
namespace {

// Which item comes next, for all blocks of a launch: they take items as they get free, those with the most work first.
// The last block leaves the queue as it was found.
struct Queue {
  int taken, finished_blocks;
};

// Launches take turns at these: as many may run at once on a device.
constexpr int kQueues = 256;
[[maybe_unused]] __device__ Queue queues[kQueues];

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void copy_async(uint32_t to, const void *from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Lets a barrier know once the thread's copies have landed.
__device__ __forceinline__ void announce(uint64_t *full) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(full)) : "memory");
}

// Copies a tile of keys or values. Eight threads copy a row of a panel, so all copy sixteen rows at once, in eight
// rounds; each of the eight knows the slot of one round.
template <int kDim>
__device__ __forceinline__ void gather(uint32_t to, const char *from, int chunk, uint32_t slot,
                                       uint32_t slot_bytes) {
#pragma unroll
  for (int i = 0; i < kKeys / 16; ++i) {
    const char *const row = from + static_cast<uint64_t>(__shfl_sync(0xffffffffu, slot, i, 8)) * slot_bytes;
#pragma unroll
    for (int panel = 0; panel < kPanels<kDim>; ++panel) {
      if (panel * 64 + chunk * 8 < kDim) {
        copy_async(to + panel * kPanelBytes + i * 16 * 128, row + panel * 128, true);
      }
    }
  }
}

// A block's first item is that of its own number.
__device__ __forceinline__ int take_item(Queue &queue) { return gridDim.x + atomicAdd(&queue.taken, 1); }

__device__ __forceinline__ void leave(Queue &queue) {
  __threadfence();
  if (atomicAdd(&queue.finished_blocks, 1) != gridDim.x - 1) return;
  queue.taken = 0;
  queue.finished_blocks = 0;
}

template <typename T, int kDim>
__device__ __forceinline__ void produce(const kv_attend_prefill_params &params, int n_items, Queue &queue,
                                        uint32_t shared_q, Barriers &barriers,
                                        PrefillTile (&shared_tiles)[kStages], int (&shared_items)[2]) {
  const int thread = threadIdx.x % kGroupThreads, first_row = thread / 8, chunk = thread % 8;
  const uint32_t target = shared_q + first_row * 128 + (chunk ^ first_row % 8) * 16;
  const uint32_t slot_bytes = params.kv_heads * kDim * sizeof(T);
  const int slot_row = first_row + chunk * 16;
  Place place_q, place_k, place_v;

  auto copy_queries = [&](const PrefillTile &tile) {
    barrier_wait(&barriers.empty_q[place_q.stage], place_q.parity ^ 1);
    const uint32_t to = target + place_q.stage * kTileBytes<kDim>;
    const char *const q = static_cast<const char *>(params.q) + chunk * 16;
#pragma unroll 1
    for (int row = first_row; row < kRows; row += 16) {
      const int query = row / tile.heads, head = tile.first_head + row % tile.heads;
      const bool valid = query < tile.queries;
      const int64_t number = valid ? (tile.token + query) * params.q_stride + head * kDim : 0;
#pragma unroll
      for (int panel = 0; panel < kPanels<kDim>; ++panel) {
        if (panel * 64 + chunk * 8 < kDim) {
          copy_async(to + panel * kPanelBytes + (row - first_row) * 128,
                     q + number * static_cast<int>(sizeof(T)) + panel * 128, valid);
        }
      }
    }
    if (thread == 0) {
      shared_tiles[place_q.stage] = tile;
      barrier_arrive(&barriers.full_q[place_q.stage]);
    }
    announce(&barriers.full_q[place_q.stage]);
    place_q.advance();
  };
  auto copy_keys = [&](int kv_head, uint32_t slot) {
    barrier_wait(&barriers.empty_k[place_k.stage], place_k.parity ^ 1);
    gather<kDim>(target + (kStages + place_k.stage) * kTileBytes<kDim>,
                 static_cast<const char *>(params.cache.keys) + kv_head * kDim * sizeof(T) + chunk * 16,
                 chunk, slot, slot_bytes);
    announce(&barriers.full_k[place_k.stage]);
    place_k.advance();
  };
  auto copy_values = [&](int kv_head, uint32_t slot) {
    barrier_wait(&barriers.empty_v[place_v.stage], place_v.parity ^ 1);
    gather<kDim>(target + (2 * kStages + place_v.stage) * kTileBytes<kDim>,
                 static_cast<const char *>(params.cache.values) + kv_head * kDim * sizeof(T) + chunk * 16,
                 chunk, slot, slot_bytes);
    announce(&barriers.full_v[place_v.stage]);
    place_v.advance();
  };

  // A tile's values are wanted after the next tile's keys.
  int values_head = 0;
  uint32_t values_slot = 0;
  auto first_slot = [&](const PrefillTile &of) { return of.slot((of.end - 1) / kKeys * kKeys + slot_row); };
  PrefillTile tile = prefill_tile(params, blockIdx.x, kRows);
  uint32_t slot = first_slot(tile);
  for (int round = 0; tile.queries > 0; ++round) {
    int taken = 0;
    if (thread == 0) taken = take_item(queue);
    const int first = tile.begin / kKeys, last = (tile.end - 1) / kKeys;
    PrefillTile next;
    copy_queries(tile);
    for (int key_tile = last; key_tile >= first; --key_tile) {
      // Loaded before the copies, needed after them.
      uint32_t next_slot = 0;
      if (key_tile > first) {
        next_slot = tile.slot((key_tile - 1) * kKeys + slot_row);
      } else if (key_tile < last) {
        next_slot = first_slot(next);
      }
      copy_keys(tile.kv_head, slot);
      if (round > 0 || key_tile < last) copy_values(values_head, values_slot);
      values_head = tile.kv_head, values_slot = slot;
      if (key_tile == last) {  // By now the queue has answered.
        if (thread == 0) shared_items[round % 2] = taken;
        asm volatile("bar.sync 3, %0;" ::"n"(kGroupThreads) : "memory");
        const int item = shared_items[round % 2];
        next = prefill_tile(params, min(item, n_items - 1), kRows);
        if (first == last) next_slot = first_slot(next);
        if (item >= n_items) next.queries = 0;
      }
      slot = next_slot;
    }
    tile = next;
  }
  copy_queries(tile);  // None: the end.
  copy_values(values_head, values_slot);
  if (thread == 0) leave(queue);
  grid_launch_dependents();
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace
}  // namespace kv
