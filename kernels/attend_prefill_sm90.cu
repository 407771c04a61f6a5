// Attention of runs of queries with wgmma: Hopper's tensor cores, keys and values gathered by slot.
//
// After FlashAttention-3 (Shah et al., arXiv 2407.08608): one warpgroup gathers, two multiply, 64 rows of queries each.
// A tile's scores are made together with the sum over the values of the tile before. The two warpgroups take turns at
// the tensor cores, so that one's exponents hide behind the other's products. Blocks stay for many items, the next of
// which begins while the last product of this one runs.
//
// Tiles of keys begin at multiples of their size, so a query's sums do not depend on how its prompt was cut.
//
// Shared memory. A tile of [128][kDim] lies in panels of 64 columns, [128][64] each, so that a row of a panel is the
// 128 bytes over which wgmma's widest swizzle works: the 16-byte chunk c of row r lies at chunk c ^ r % 8. Eight rows
// are one atom of 1,024 bytes.
//   Queries and keys are K-major operands (the head's dimension is summed over). Their stride offset is that from atom
//   to atom, 1,024 bytes. A k-step of 16 numbers lies 32 bytes further on in the same atoms, since the hardware applies
//   the swizzle to the whole address; four steps exhaust a panel. The leading offset is not used.
//   Values are an MN-major operand (keys are summed over, and the head's dimension is contiguous). A step of 16 keys is
//   two atoms, 1,024 bytes apart by the stride offset; the leading offset goes to the next 64 columns, the next panel.
//   The next step begins two atoms on.

#include <algorithm>
#include <atomic>
#include <type_traits>

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

// Which item comes next, for all blocks of a launch: they take items as they get free, those with the most work first.
// The last block leaves the queue as it was found.
struct Queue {
  int taken, finished_blocks;
};

// Launches take turns at these: as many may run at once on a device.
constexpr int kQueues = 256;
[[maybe_unused]] __device__ Queue queues[kQueues];

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kKeys = 128;  // Of a tile of keys.

// ---- barriers ----

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

// ---- wgmma ----

__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading_bytes) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(kAtomBytes >> 4) << 32 | kSwizzle128;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending groups run, and lets nobody read `sums` before.
template <int kPending, int kNumbers>
__device__ __forceinline__ void wgmma_wait(float (&sums)[kNumbers]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
  for (int i = 0; i < kNumbers; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// Operands of an accumulator.
#define KV_SUMS_8(x, i)                                                                       \
  "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), \
      "+f"(x[i + 6]), "+f"(x[i + 7])
#define KV_SUMS_32(x, i) KV_SUMS_8(x, i), KV_SUMS_8(x, i + 8), KV_SUMS_8(x, i + 16), KV_SUMS_8(x, i + 24)
#define KV_NAMES_32                                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define KV_NAMES_40 KV_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define KV_NAMES_48 KV_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define KV_NAMES_64 \
  KV_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// sums[64][128] (+)= a[64][16] · b[128][16]ᵀ, both K-major in shared memory.
template <typename T>
__device__ __forceinline__ void wgmma_transposed(float (&sums)[64], uint64_t a, uint64_t b, bool add) {
#define KV_WGMMA(types)                                                                              \
  asm volatile(                                                                                      \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." types \
      " {" KV_NAMES_64 "}, %64, %65, p, 1, 1, 0, 0;\n}"                                              \
      : KV_SUMS_32(sums, 0), KV_SUMS_32(sums, 32)                                                    \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (std::is_same_v<T, __half>) {
    KV_WGMMA("f16.f16");
  } else {
    KV_WGMMA("bf16.bf16");
  }
#undef KV_WGMMA
}

// The same with a in registers.
template <typename T>
__device__ __forceinline__ void wgmma_transposed(float (&sums)[64], const uint32_t *a, uint64_t b, bool add) {
#define KV_WGMMA(types)                                                                              \
  asm volatile(                                                                                      \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." types \
      " {" KV_NAMES_64 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}"                                \
      : KV_SUMS_32(sums, 0), KV_SUMS_32(sums, 32)                                                    \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (std::is_same_v<T, __half>) {
    KV_WGMMA("f16.f16");
  } else {
    KV_WGMMA("bf16.bf16");
  }
#undef KV_WGMMA
}

// sums[64][columns] += a[64][16] · b[16][columns], a in registers, b MN-major in shared memory.
#define KV_WGMMA_REGISTERS(columns, names, a_names, b_name, ...)                                        \
  template <typename T>                                                                                 \
  __device__ __forceinline__ void wgmma_registers(float (&sums)[columns / 2], const uint32_t *a,        \
                                                  uint64_t b) {                                         \
    if constexpr (std::is_same_v<T, __half>) {                                                          \
      asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #columns \
                   "k16.f32.f16.f16 {" names "}, {" a_names "}, " b_name ", p, 1, 1, 1;\n}"             \
                   : __VA_ARGS__                                                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                               \
    } else {                                                                                            \
      asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #columns \
                   "k16.f32.bf16.bf16 {" names "}, {" a_names "}, " b_name ", p, 1, 1, 1;\n}"           \
                   : __VA_ARGS__                                                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                               \
    }                                                                                                   \
  }
KV_WGMMA_REGISTERS(64, KV_NAMES_32, "%32, %33, %34, %35", "%36", KV_SUMS_32(sums, 0))
KV_WGMMA_REGISTERS(80, KV_NAMES_40, "%40, %41, %42, %43", "%44", KV_SUMS_32(sums, 0), KV_SUMS_8(sums, 32))
KV_WGMMA_REGISTERS(96, KV_NAMES_48, "%48, %49, %50, %51", "%52", KV_SUMS_32(sums, 0), KV_SUMS_8(sums, 32),
                   KV_SUMS_8(sums, 40))
KV_WGMMA_REGISTERS(128, KV_NAMES_64, "%64, %65, %66, %67", "%68", KV_SUMS_32(sums, 0), KV_SUMS_32(sums, 32))

// Where a k-step of a K-major tile begins, in units of a descriptor.
__device__ constexpr int step_offset(int k) { return (k / 4 * kPanelBytes + k % 4 * 32) >> 4; }

// scores[64][128] = queries[64][kDim] · keys[128][kDim]ᵀ.
template <typename T, int kDim>
__device__ __forceinline__ void multiply_keys(float (&scores)[kKeys / 2], uint64_t queries, uint64_t keys) {
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    wgmma_transposed<T>(scores, queries + step_offset(k), keys + step_offset(k), k > 0);
  }
  wgmma_commit();
}

// The same with queries in registers, as `load_queries` leaves them.
template <typename T, int kDim>
__device__ __forceinline__ void multiply_keys(float (&scores)[kKeys / 2], const uint32_t (&queries)[kDim / 4],
                                              uint64_t keys) {
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    wgmma_transposed<T>(scores, &queries[k * 4], keys + step_offset(k), k > 0);
  }
  wgmma_commit();
}

// A warp's 16 rows of a tile in shared memory, of which `row` is this lane's to address.
template <int kDim>
__device__ __forceinline__ void load_queries(uint32_t (&queries)[kDim / 4], uint32_t tile, int row) {
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    const int chunk = k * 2 + threadIdx.x % kWarp / 16;
    const uint32_t address = tile + chunk / 8 * kPanelBytes + row * 128 + (chunk % 8 ^ row % 8) * 16;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(queries[k * 4]), "=r"(queries[k * 4 + 1]), "=r"(queries[k * 4 + 2]),
                   "=r"(queries[k * 4 + 3])
                 : "r"(address)
                 : "memory");
  }
}

// sums[64][kDim] += weights[64][128] · values[128][kDim].
template <typename T, int kDim>
__device__ __forceinline__ void multiply_values(float (&sums)[kDim / 2], const uint32_t (&weights)[kKeys / 4],
                                                uint64_t values) {
#pragma unroll
  for (int k = 0; k < kKeys / 16; ++k) {
    wgmma_registers<T>(sums, &weights[k * 4], values + k * (2 * kAtomBytes >> 4));
  }
  wgmma_commit();
}

// ---- the gathering warpgroup ----

__device__ __forceinline__ void copy_async(uint32_t to, const void *from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

template <int kPending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// What the warpgroups tell each other.
struct Barriers {
  uint64_t full_q[kStages], empty_q[kStages];
  uint64_t full_k[kStages], empty_k[kStages];
  uint64_t full_v[kStages], empty_v[kStages];
};

// Announces copies once they have landed. wgmma reads through another proxy than cp.async writes, so the writing
// thread waits and fences before it arrives; it does so one set of copies late, so that two are under way.
struct Announcer {
  uint64_t *late = nullptr;

  __device__ void started(uint64_t *full) {
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (late != nullptr) announce<1>();
    late = full;
  }

  // Before a wait that the announced copies may have to end.
  __device__ void finish() {
    if (late != nullptr) announce<0>();
    late = nullptr;
  }

  template <int kPending>
  __device__ void announce() {
    copies_wait<kPending>();
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    barrier_arrive(late);
  }

  // Waits until a stage may be overwritten.
  __device__ void wait_empty(uint64_t *empty, uint32_t parity) {
    if (barrier_passed(empty, parity ^ 1)) return;
    finish();
    barrier_wait(empty, parity ^ 1);
  }
};

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
  Announcer announcer;
  Place place_q, place_k, place_v;

  auto copy_queries = [&](const PrefillTile &tile) {
    announcer.wait_empty(&barriers.empty_q[place_q.stage], place_q.parity);
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
    announcer.started(&barriers.full_q[place_q.stage]);
    place_q.advance();
  };
  auto copy_keys = [&](int kv_head, uint32_t slot) {
    announcer.wait_empty(&barriers.empty_k[place_k.stage], place_k.parity);
    gather<kDim>(target + (kStages + place_k.stage) * kTileBytes<kDim>,
                 static_cast<const char *>(params.cache.keys) + kv_head * kDim * sizeof(T) + chunk * 16,
                 chunk, slot, slot_bytes);
    announcer.started(&barriers.full_k[place_k.stage]);
    place_k.advance();
  };
  auto copy_values = [&](int kv_head, uint32_t slot) {
    announcer.wait_empty(&barriers.empty_v[place_v.stage], place_v.parity);
    gather<kDim>(target + (2 * kStages + place_v.stage) * kTileBytes<kDim>,
                 static_cast<const char *>(params.cache.values) + kv_head * kDim * sizeof(T) + chunk * 16,
                 chunk, slot, slot_bytes);
    announcer.started(&barriers.full_v[place_v.stage]);
    place_v.advance();
  };

  // A tile's values are wanted after the next tile's keys.
  int values_head = 0;
  uint32_t values_slot = 0;
  PrefillTile tile = prefill_tile(params, blockIdx.x, kRows);
  for (int round = 0; tile.queries > 0; ++round) {
    int taken = 0;
    if (thread == 0) taken = take_item(queue);
    const int first = tile.begin / kKeys, last = (tile.end - 1) / kKeys;
    uint32_t slot = tile.slot(last * kKeys + slot_row);
    PrefillTile next;
    copy_queries(tile);
    for (int key_tile = last; key_tile >= first; --key_tile) {
      const uint32_t next_slot = tile.slot((key_tile - 1) * kKeys + slot_row);
      copy_keys(tile.kv_head, slot);
      if (round > 0 || key_tile < last) copy_values(values_head, values_slot);
      values_head = tile.kv_head, values_slot = slot;
      slot = next_slot;
      if (key_tile == last) {  // By now the queue has answered.
        if (thread == 0) shared_items[round % 2] = taken;
        asm volatile("bar.sync 3, %0;" ::"n"(kGroupThreads) : "memory");
        const int item = shared_items[round % 2];
        next = prefill_tile(params, min(item, n_items - 1), kRows);
        if (item >= n_items) next.queries = 0;
      }
    }
    tile = next;
  }
  copy_queries(tile);  // None: the end.
  copy_values(values_head, values_slot);
  announcer.finish();
  if (thread == 0) leave(queue);
  grid_launch_dependents();
}

// ---- the multiplying warpgroups ----

// Named barriers 1 and 2: a consumer's turn at the tensor cores.
__device__ __forceinline__ void turn_wait(int consumer) {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + consumer), "n"(kConsumers * kGroupThreads) : "memory");
}
__device__ __forceinline__ void turn_give(int consumer) {
  asm volatile("bar.arrive %0, %1;" ::"r"(1 + consumer), "n"(kConsumers * kGroupThreads) : "memory");
}

// Of a warpgroup's 64 rows a thread has two, eight apart; of each eight columns two, side by side.
template <bool kShaped>
struct Softmax {
  const kv_scores &scores;
  float exponent_scale;
  int positions[2];
  float slopes[2];
  float maxima[2], totals[2];

  __device__ void shape(float (&products)[kKeys / 2], int thread_key) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const ShapedScores shape(scores, slopes[i]);
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float &score = products[n * 4 + i * 2 + e];
          score = shape(score, static_cast<float>(thread_key + n * 8 + e - positions[i]));
        }
      }
    }
  }

  __device__ void mask(float (&products)[kKeys / 2], int thread_key) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int last = positions[i] - thread_key;
      const int first = scores.window == 0 ? -kKeys : last - scores.window + 1;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (n * 8 + e > last || n * 8 + e < first) products[n * 4 + i * 2 + e] = -INFINITY;
        }
      }
    }
  }

  // Scores become weights; `rescale` is what earlier sums are to be multiplied by.
  __device__ void weigh(float (&products)[kKeys / 2], float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float maximum = maxima[i];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        maximum = fmaxf(maximum, fmaxf(products[n * 4 + i * 2], products[n * 4 + i * 2 + 1]));
      }
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
      // A row that has seen no key yet has no maximum to subtract.
      const float offset = maximum == -INFINITY ? 0.f : maximum * exponent_scale;
      rescale[i] = exp2_approx(maxima[i] * exponent_scale - offset);
      maxima[i] = maximum;
      float total = 0.f;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float &score = products[n * 4 + i * 2 + e];
          score = exp2_approx(fmaf(score, exponent_scale, -offset));
          total += score;
        }
      }
      totals[i] = fmaf(totals[i], rescale[i], total);
    }
  }
};

// An accumulator's numbers are in the order in which wgmma takes its first operand from registers.
template <typename T>
__device__ __forceinline__ void pack_weights(uint32_t (&weights)[kKeys / 4],
                                             const float (&scores)[kKeys / 2]) {
#pragma unroll
  for (int i = 0; i < kKeys / 4; ++i) {
    const typename Pair<T>::type pair = from_float2<T>(make_float2(scores[i * 2], scores[i * 2 + 1]));
    weights[i] = reinterpret_cast<const uint32_t &>(pair);
  }
}

template <typename T, int kDim, bool kShaped>
__device__ __forceinline__ void consume(const kv_attend_prefill_params &params, uint32_t shared_q,
                                        Barriers &barriers, const PrefillTile (&shared_tiles)[kStages]) {
  const int consumer = threadIdx.x / kGroupThreads - 1;
  const int thread = threadIdx.x % kGroupThreads, lane = thread % kWarp;
  const int row = consumer * 64 + thread / kWarp * 16 + lane / 4;
  // Queries in registers spare shared memory a third of what it delivers for the scores.
  constexpr bool kQueriesInRegisters = kDim == 128;
  uint32_t q_numbers[kDim / 4];
  const uint64_t q = descriptor(shared_q + consumer * 64 * 128, 16);
  const uint64_t k = descriptor(shared_q + kStages * kTileBytes<kDim>, 16);
  const uint64_t v = descriptor(shared_q + 2 * kStages * kTileBytes<kDim>, kPanelBytes);
  constexpr int kStageOffset = kTileBytes<kDim> >> 4;
  auto release = [&](uint64_t *empty) {
    if (lane == 0) barrier_arrive(empty);
  };
  Softmax<kShaped> softmax{params.scores, kShaped ? 1.f : params.scores.scale * kLog2e};
  Place place_q, place_k, place_v;
  if (consumer == 1) turn_give(0);

  int key_tile, first_tile, unmasked_begin, unmasked_end;
  // Waits for the item's queries; false where no item follows.
  auto begin_item = [&] {
    barrier_wait(&barriers.full_q[place_q.stage], place_q.parity);
    const PrefillTile &tile = shared_tiles[place_q.stage];
    if (tile.queries == 0) return false;
    if constexpr (kQueriesInRegisters) {
      load_queries<kDim>(q_numbers, shared_q + place_q.stage * kTileBytes<kDim>,
                         consumer * 64 + thread / kWarp * 16 + lane % 16);
    }
    key_tile = (tile.end - 1) / kKeys;
    first_tile = tile.begin / kKeys;
    unmasked_begin = params.scores.window == 0 ? 0 : tile.last_position() - params.scores.window + 1;
    unmasked_end = tile.position + 1;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = (row + i * 8) / tile.heads, head = tile.first_head + (row + i * 8) % tile.heads;
      softmax.positions[i] = tile.position + min(query, tile.queries - 1);
      softmax.slopes[i] = kShaped && params.scores.alibi != nullptr ? params.scores.alibi[head] : 0.f;
      softmax.maxima[i] = -INFINITY;
      softmax.totals[i] = 0.f;
    }
    return true;
  };
  // A thread's part of the sum of a row's weights.
  auto total_of = [&](int stage, int i) {
    float total = softmax.totals[i];
    if constexpr (kShaped) {
      const PrefillTile &tile = shared_tiles[stage];
      const int head = tile.first_head + (row + i * 8) % tile.heads;
      if (lane % 4 == 0) total += sink_weight(params.scores, head, softmax.maxima[i]);
    }
    return total;
  };
  auto end_item = [&](int stage, const float (&totals)[2], const float (&sums)[kDim / 2]) {
    const PrefillTile &tile = shared_tiles[stage];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float total = totals[i];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const float inverse = 1.f / total;
      const int query = (row + i * 8) / tile.heads, head = tile.first_head + (row + i * 8) % tile.heads;
      if (query >= tile.queries) continue;
      T *const to = static_cast<T *>(params.out) + (tile.token + query) * params.out_stride + head * kDim +
                    lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        *reinterpret_cast<typename Pair<T>::type *>(to + n * 8) =
            from_float2<T>(make_float2(sums[n * 4 + i * 2] * inverse, sums[n * 4 + i * 2 + 1] * inverse));
      }
    }
    __syncwarp();
    release(&barriers.empty_q[stage]);
  };

  float sums[kDim / 2] = {};
  float scores[kKeys / 2];
  float rescale[2];
  uint32_t weights[kKeys / 4];
  // Scores of a tile have been made: gives the keys back, and makes weights of the scores.
  auto weigh = [&] {
    release(&barriers.empty_k[place_k.stage]);
    place_k.advance();
    const int key = key_tile * kKeys;
    if constexpr (kShaped) softmax.shape(scores, key + lane % 4 * 2);
    if (key < unmasked_begin || key + kKeys > unmasked_end) softmax.mask(scores, key + lane % 4 * 2);
    softmax.weigh(scores, rescale);
  };
  auto score = [&] {
    const uint64_t keys = k + place_k.stage * kStageOffset;
    if constexpr (kQueriesInRegisters) {
      multiply_keys<T, kDim>(scores, q_numbers, keys);
    } else {
      multiply_keys<T, kDim>(scores, q + place_q.stage * kStageOffset, keys);
    }
  };

  begin_item();
  barrier_wait(&barriers.full_k[place_k.stage], place_k.parity);
  wgmma_fence();
  score();
  wgmma_wait<0>(scores);
  weigh();
  pack_weights<T>(weights, scores);

  // The scores of the next tile, while the values of this one are summed.
  auto multiply = [&] {
    barrier_wait(&barriers.full_k[place_k.stage], place_k.parity);
    turn_wait(consumer);
    wgmma_fence();
    score();
    barrier_wait(&barriers.full_v[place_v.stage], place_v.parity);
    wgmma_fence();
    multiply_values<T, kDim>(sums, weights, v + place_v.stage * kStageOffset);
    turn_give(1 - consumer);
    wgmma_wait<1>(scores);
    weigh();
    wgmma_wait<0>(sums);
    release(&barriers.empty_v[place_v.stage]);
    place_v.advance();
    pack_weights<T>(weights, scores);
  };

  for (;;) {
    while (key_tile > first_tile) {
      --key_tile;
      multiply();
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) sums[i] *= rescale[i / 2 % 2];
    }
    const int done_stage = place_q.stage;
    const float done_totals[2] = {total_of(done_stage, 0), total_of(done_stage, 1)};
    place_q.advance();
    if (!begin_item()) break;
    multiply();
    end_item(done_stage, done_totals, sums);
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) sums[i] = 0.f;
  }

  barrier_wait(&barriers.full_v[place_v.stage], place_v.parity);
  wgmma_fence();
  multiply_values<T, kDim>(sums, weights, v + place_v.stage * kStageOffset);
  wgmma_wait<0>(sums);
  const int last_stage = place_q.stage ^ 1;
  const float last_totals[2] = {total_of(last_stage, 0), total_of(last_stage, 1)};
  end_item(last_stage, last_totals, sums);
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <typename T, int kDim, bool kShaped>
__global__ void __launch_bounds__(kThreads, 1)
    attend_prefill_sm90_kernel(const __grid_constant__ kv_attend_prefill_params params, int n_items,
                               int queue) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char shared[];
  __shared__ Barriers barriers;
  __shared__ PrefillTile shared_tiles[kStages];
  __shared__ int shared_items[2];
  const uint32_t shared_q = (shared_address(shared) + kAtomBytes - 1) & ~(kAtomBytes - 1);

  if (threadIdx.x == 0) {
    constexpr int kReleases = kConsumers * kGroupThreads / kWarp;
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&barriers.full_q[stage], kGroupThreads + 1);
      barrier_init(&barriers.empty_q[stage], kReleases);
      barrier_init(&barriers.full_k[stage], kGroupThreads);
      barrier_init(&barriers.full_v[stage], kGroupThreads);
      barrier_init(&barriers.empty_k[stage], kReleases);
      barrier_init(&barriers.empty_v[stage], kReleases);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  grid_wait();
  if (threadIdx.x < kGroupThreads) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    produce<T, kDim>(params, n_items, queues[queue], shared_q, barriers, shared_tiles, shared_items);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume<T, kDim, kShaped>(params, shared_q, barriers, shared_tiles);
  }
#endif
}

// Multiprocessors of the current device, 0 where these kernels do not run; asked once a device.
int multiprocessors() {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // 1 + multiprocessors
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 0;
  if (known[device] == 0) {
    int major = 0, minor = 0, count = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    // A build without sm_90a has kernels without a body, and so without barriers.
    cudaFuncAttributes kernel = {};
    const bool serves = major == 9 && minor == 0 &&
                        cudaFuncGetAttributes(
                            &kernel, attend_prefill_sm90_kernel<__nv_bfloat16, 128, false>) == cudaSuccess &&
                        kernel.sharedSizeBytes > 0;
    known[device] = 1 + (serves ? count : 0);
  }
  return known[device] - 1;
}

std::atomic<unsigned> launches;

template <typename T, int kDim>
int launch_prefill(const kv_attend_prefill_params &params, kv_stream stream) {
  const auto kernel =
      is_shaped(params.scores) ? attend_prefill_sm90_kernel<T, kDim, true> : attend_prefill_sm90_kernel<T, kDim, false>;
  const cudaError_t error = allow_shared(kernel, kSharedBytes<kDim>);
  if (error != cudaSuccess) return static_cast<int>(error);
  const int n_items = params.n_tiles * prefill_tile_items(params.heads, params.kv_heads, kRows);
  const dim3 grid(std::min(n_items, multiprocessors()));
  const int queue = launches++ % kQueues;
  return launch(kernel, grid, dim3(kThreads), kSharedBytes<kDim>, stream, params, n_items, queue);
}

}  // namespace

bool attend_prefill_sm90_serves(int head_dim) {
  return (head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128) && multiprocessors() > 0;
}

int attend_prefill_sm90(const kv_attend_prefill_params &params, kv_stream stream) {
  return KV_DISPATCH_DTYPE(params.dtype, T, [&] {
    switch (params.head_dim) {
      case 64:
        return launch_prefill<T, 64>(params, stream);
      case 80:
        return launch_prefill<T, 80>(params, stream);
      case 96:
        return launch_prefill<T, 96>(params, stream);
      case 128:
        return launch_prefill<T, 128>(params, stream);
      default:
        return static_cast<int>(cudaErrorInvalidValue);
    }
  });
}

}  // namespace kv
