// Attention of runs of queries over cached latents, in the absorbed form: keys are whole rows, values their
// latents.
//
// A block has a tile of 64 rows, (query, head) pairs, and walks its keys in blocks of 64. One warpgroup
// gathers them; of two others each makes the scores of half of the keys, and after they have exchanged the
// weights through shared memory, half of the columns of the sum.
//
// Shared memory holds queries and keys in panels of 64 columns, [64][128 bytes], the 16-byte chunk c of row r
// at chunk c ^ r % 8: wgmma's widest swizzle. The same keys are a K-major operand of the scores and an
// MN-major one of the sum, as attend_prefill_sm90.cu explains.

#include "attend_prefill.cuh"
#include "latent.h"
#include "linear_pipeline.cuh"
#include "linear_wgmma.cuh"

namespace kv {
namespace {

constexpr int kRank = 512, kDim = 576;  // What DeepSeek's models have; others are served by the kernel below.
constexpr int kRows = prefill_tile_rows(kDim);
constexpr int kKeys = 64;
constexpr int kStages = 2;
constexpr int kGroup = 128;  // Threads of a warpgroup.
constexpr int kConsumers = 2 * kGroup;
constexpr int kThreads = kConsumers + kGroup;
constexpr int kPanelBytes = kKeys * 128;
constexpr int kTileBytes = kDim / 64 * kPanelBytes;
static_assert(kRows == kKeys);

// Shared memory, after queries, stages and weights; what aligning the first may cost comes before all.
struct Shared {
  float maxima[2][kRows];
  float sums[2][kRows];
  uint64_t queries, full[kStages], empty[kStages];
};
constexpr int kAlignment = 1024;
constexpr int kSharedBytes =
    (1 + kStages) * kTileBytes + kPanelBytes + static_cast<int>(sizeof(Shared)) + kAlignment;
static_assert(kSharedBytes <= 227 * 1024);

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives once the thread's copies so far have landed.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void copy_16(uint32_t to, const void *from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

// What threads wrote to shared memory is seen by the tensor cores after this.
__device__ __forceinline__ void shared_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void sync_consumers() {
  asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
}

// An operand whose columns are contiguous: its panels of 64 columns, and in them groups of 8 rows, 1024 bytes
// apart.
__device__ __forceinline__ uint64_t values_operand(uint32_t address) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{kPanelBytes >> 4} << 16 |
         (address & 0x3ffff) >> 4;
}

// sums[64][32] (+)= a[64][16] · b[32][16]ᵀ, both with contiguous rows.
template <typename T>
__device__ __forceinline__ void multiply_keys(float (&sums)[16], uint64_t a, uint64_t b, bool add) {
#define KV_MULTIPLY_KEYS(type)                                                         \
  asm volatile(                                                                        \
      "{.reg .pred accumulate; setp.ne.b32 accumulate, %18, 0;\n"                      \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type " {" KV_REGISTERS_32 \
      "}, %16, %17, "                                                                  \
      "accumulate, 1, 1, 0, 0;}"                                                       \
      : KV_SUMS_32                                                                     \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (std::is_same_v<T, __half>) {
    KV_MULTIPLY_KEYS("f16");
  } else {
    KV_MULTIPLY_KEYS("bf16");
  }
#undef KV_MULTIPLY_KEYS
}

// sums[64][256] += a[64][16] · b[16][256], the columns of b contiguous.
template <typename T>
__device__ __forceinline__ void add_values(float (&sums)[128], uint64_t a, uint64_t b) {
#define KV_ADD_VALUES(type)                                                              \
  asm volatile(                                                                          \
      "{.reg .pred accumulate; setp.eq.u32 accumulate, 0, 0;\n"                          \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" KV_REGISTERS_256 \
      "}, %128, %129, accumulate, 1, 1, 0, 1;}"                                          \
      : KV_SUMS_256                                                                      \
      : "l"(a), "l"(b))
  if constexpr (std::is_same_v<T, __half>) {
    KV_ADD_VALUES("f16");
  } else {
    KV_ADD_VALUES("bf16");
  }
#undef KV_ADD_VALUES
}

// Where a 16-byte chunk of a row of kDim numbers lies in its tile.
__device__ __forceinline__ uint32_t tile_offset(int row, int chunk) {
  return chunk / 8 * kPanelBytes + row * 128 + ((chunk % 8 ^ row % 8) << 4);
}

#endif

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    attend_latent_prefill(const __grid_constant__ kv_attend_prefill_params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char raw[];
  const uint32_t base = (shared_address(raw) + kAlignment - 1) / kAlignment * kAlignment;
  const uint32_t queries = base, keys = queries + kTileBytes, weights = keys + kStages * kTileBytes;
  Shared &shared = *reinterpret_cast<Shared *>(raw + (weights + kPanelBytes - shared_address(raw)));
  const uint32_t full = shared_address(shared.full), empty = shared_address(shared.empty);
  const uint32_t queries_full = shared_address(&shared.queries);
  if (threadIdx.x == 0) {
    barrier_init(queries_full, kGroup);
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full + stage * 8, kGroup);
      barrier_init(empty + stage * 8, kConsumers / kWarp);
    }
    barrier_init_fence();
  }
  __syncthreads();
  grid_wait();
  const PrefillTile tile = prefill_tile(params, blockIdx.x, kRows);
  const int first_block = tile.begin / kKeys, blocks = (tile.end - 1) / kKeys + 1 - first_block;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  constexpr int kChunks = kDim / 8;

  if (threadIdx.x >= kConsumers) {  // the copies: eight threads a row
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    const int thread = threadIdx.x - kConsumers;
    const T *const q =
        static_cast<const T *>(params.q) + tile.token * params.q_stride + tile.first_head * kDim;
    for (int row = thread / 8; row < kRows; row += kGroup / 8) {
      const int query = row / tile.heads;
      const bool valid = query < tile.queries;
      const T *const from = valid ? q + query * params.q_stride + row % tile.heads * kDim : q;
#pragma unroll
      for (int chunk = thread % 8; chunk < kChunks; chunk += 8) {
        copy_16(queries + tile_offset(row, chunk), from + chunk * 8, valid);
      }
    }
    barrier_arrive_after_copies(queries_full);
    for (int block = 0; block < blocks; ++block) {
      const int stage = block % kStages;
      const T *from[kKeys / (kGroup / 8)];
#pragma unroll
      for (int i = 0; i < kKeys / (kGroup / 8); ++i) {
        const int key = (first_block + block) * kKeys + i * (kGroup / 8) + thread / 8;
        from[i] = static_cast<const T *>(params.cache.keys) + static_cast<int64_t>(tile.slot(key)) * kDim;
      }
      if (block >= kStages) barrier_wait(empty + stage * 8, (block / kStages - 1) & 1);
#pragma unroll
      for (int i = 0; i < kKeys / (kGroup / 8); ++i) {
        const int row = i * (kGroup / 8) + thread / 8;
#pragma unroll
        for (int chunk = thread % 8; chunk < kChunks; chunk += 8) {
          copy_16(keys + stage * kTileBytes + tile_offset(row, chunk), from[i] + chunk * 8, true);
        }
      }
      barrier_arrive_after_copies(full + stage * 8);
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
  const int group = warp / 4;
  const int own_row = warp % 4 * 16 + lane / 4;  // And eight rows on.
  int positions[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    positions[c] = tile.position + min((own_row + c * 8) / tile.heads, tile.queries - 1);
  }
  const int window = params.scores.window;
  const float scale = params.scores.scale * kLog2e;
  float sums[128], scores[kKeys / 4];
#pragma unroll
  for (int i = 0; i < 128; ++i) sums[i] = 0.f;
  float maxima[2] = {-INFINITY, -INFINITY}, totals[2] = {};

  barrier_wait(queries_full, 0);
  for (int block = 0; block < blocks; ++block) {
    const int stage = block % kStages;
    const uint32_t stage_keys = keys + stage * kTileBytes;
    barrier_wait(full + stage * 8, block / kStages & 1);
    shared_fence();
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      const uint32_t offset = k / 4 * kPanelBytes + k % 4 * 32;
      multiply_keys<T>(scores, wgmma_operand(queries + offset),
                       wgmma_operand(stage_keys + group * (kKeys / 2) * 128 + offset), k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) asm volatile("" : "+f"(scores[i])::"memory");

    const int first_key = (first_block + block) * kKeys;
    const int own_key = first_key + group * (kKeys / 2) + lane % 4 * 2;
    const bool masked = tile.masked(first_key, kKeys, window);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float largest = -INFINITY;
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float &score = scores[4 * j + 2 * c + e];
          const int key = own_key + j * 8 + e;
          if (masked && (key > positions[c] || (window != 0 && positions[c] - key >= window)))
            score = -INFINITY;
          largest = fmaxf(largest, score);
        }
      }
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      if (lane % 4 == 0) shared.maxima[group][own_row + c * 8] = largest;
    }
    sync_consumers();
    float factors[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int row = own_row + c * 8;
      const float before = maxima[c];
      maxima[c] = fmaxf(before, fmaxf(shared.maxima[0][row], shared.maxima[1][row]));
      // A row that has seen no key yet has no maximum to subtract.
      const float origin = maxima[c] == -INFINITY ? 0.f : maxima[c] * scale;
      factors[c] = exp2_approx(before * scale - origin);
      totals[c] *= factors[c];
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
        const float2 weight = make_float2(exp2_approx(fmaf(scores[4 * j + 2 * c], scale, -origin)),
                                          exp2_approx(fmaf(scores[4 * j + 2 * c + 1], scale, -origin)));
        totals[c] += weight.x + weight.y;
        const int chunk = group * 4 + j;
        const auto pair = from_float2<T>(weight);
        asm volatile(
            "st.shared.b32 [%0], %1;" ::"r"(weights + row * 128 + ((chunk ^ row % 8) << 4) + lane % 4 * 4),
            "r"(reinterpret_cast<const uint32_t &>(pair))
            : "memory");
      }
    }
    shared_fence();
    if (__any_sync(0xffffffffu, factors[0] != 1.f || factors[1] != 1.f)) {
#pragma unroll
      for (int i = 0; i < 128; ++i) sums[i] *= factors[i / 2 % 2];
    }
    sync_consumers();
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      add_values<T>(sums, wgmma_operand(weights + k * 32),
                    values_operand(stage_keys + group * 4 * kPanelBytes + k * 2048));
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(sums[i])::"memory");
    if (lane == 0) barrier_arrive(empty + stage * 8);
  }
  grid_launch_dependents();

#pragma unroll
  for (int c = 0; c < 2; ++c) {
    totals[c] += __shfl_xor_sync(0xffffffffu, totals[c], 1);
    totals[c] += __shfl_xor_sync(0xffffffffu, totals[c], 2);
    if (lane % 4 == 0) shared.sums[group][own_row + c * 8] = totals[c];
  }
  sync_consumers();
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int row = own_row + c * 8, query = row / tile.heads;
    if (query >= tile.queries) continue;
    const float inverse = 1.f / (shared.sums[0][row] + shared.sums[1][row]);
    T *const out = static_cast<T *>(params.out) + (tile.token + query) * params.out_stride +
                   (tile.first_head + row % tile.heads) * kRank + group * 256 + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      *reinterpret_cast<typename Pair<T>::type *>(out + j * 8) =
          from_float2<T>(make_float2(sums[4 * j + 2 * c] * inverse, sums[4 * j + 2 * c + 1] * inverse));
    }
  }
#endif
}

// ---- other widths and devices ----

constexpr int kAnyThreads = 128;

// A thread block takes the rows of a tile one by one. Shared memory: the query, the sums of values, then the
// weights of a block of keys.
template <typename T>
__global__ void __launch_bounds__(kAnyThreads)
    attend_latent_prefill_any(const __grid_constant__ kv_attend_prefill_params params, int kv_rank) {
  extern __shared__ float shared[];
  __shared__ float reduced[kAnyThreads / kWarp];
  const int dim = params.head_dim, window = params.scores.window;
  float *const query = shared, *const sums = query + dim, *const weights = sums + kv_rank;
  grid_wait();
  grid_launch_dependents();
  const PrefillTile tile = prefill_tile(params, blockIdx.x, prefill_tile_rows(dim));
  const T *const cache = static_cast<const T *>(params.cache.keys);
  for (int row = 0; row < tile.queries * tile.heads; ++row) {
    const int64_t token = tile.token + row / tile.heads;
    const int head = tile.first_head + row % tile.heads;
    const int position = tile.position + row / tile.heads;
    __syncthreads();
    for (int d = threadIdx.x; d < dim; d += kAnyThreads) {
      query[d] = to_float(static_cast<const T *>(params.q)[token * params.q_stride + head * dim + d]);
    }
    for (int d = threadIdx.x; d < kv_rank; d += kAnyThreads) sums[d] = 0.f;
    float maximum = -INFINITY, total = 0.f;
    for (int base = window == 0 ? 0 : max(0, position - window + 1); base <= position; base += kAnyThreads) {
      const int key = base + static_cast<int>(threadIdx.x);
      __syncthreads();
      float score = -INFINITY;
      if (key <= position) {
        const T *const from = cache + static_cast<int64_t>(tile.slots[key]) * dim;
        score = 0.f;
        for (int d = 0; d < dim; ++d) score += query[d] * to_float(from[d]);
        score *= params.scores.scale * kLog2e;
      }
      const float warp_largest = warp_max(score);
      if (threadIdx.x % kWarp == 0) reduced[threadIdx.x / kWarp] = warp_largest;
      __syncthreads();
      float largest = maximum;
#pragma unroll
      for (int w = 0; w < kAnyThreads / kWarp; ++w) largest = fmaxf(largest, reduced[w]);
      const float factor = exp2_approx(maximum - largest), weight = exp2_approx(score - largest);
      maximum = largest;
      weights[threadIdx.x] = weight;
      __syncthreads();
      total = total * factor + block_sum<kAnyThreads / kWarp>(weight, reduced);
      const int n = min(kAnyThreads, position + 1 - base);
      for (int d = threadIdx.x; d < kv_rank; d += kAnyThreads) {
        float sum = sums[d] * factor;
        for (int j = 0; j < n; ++j) {
          sum += weights[j] * to_float(cache[static_cast<int64_t>(tile.slots[base + j]) * dim + d]);
        }
        sums[d] = sum;
      }
    }
    T *const out =
        static_cast<T *>(params.out) + token * params.out_stride + static_cast<int64_t>(head) * kv_rank;
    for (int d = threadIdx.x; d < kv_rank; d += kAnyThreads) out[d] = from_float<T>(sums[d] / total);
  }
}

// wgmma is sm_90a's: devices of 9.x have it, later ones do not.
bool has_own_kernel(int head_dim, int kv_rank) {
  static const bool able = [] {
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
           major == 9;
  }();
  return able && head_dim == kDim && kv_rank == kRank;
}

template <typename T>
int launch_prefill(const kv_attend_prefill_params &params, int kv_rank, kv_stream stream) {
  const int items = params.n_tiles * prefill_tile_items(params.heads, 1, prefill_tile_rows(params.head_dim));
  if (has_own_kernel(params.head_dim, kv_rank)) {
    const cudaError_t error = allow_shared(attend_latent_prefill<T>, kSharedBytes);
    if (error != cudaSuccess) return static_cast<int>(error);
    return launch(attend_latent_prefill<T>, dim3(items), dim3(kThreads), kSharedBytes, stream, params);
  }
  const int bytes = (params.head_dim + kv_rank + kAnyThreads) * static_cast<int>(sizeof(float));
  const cudaError_t error = allow_shared(attend_latent_prefill_any<T>, bytes);
  if (error != cudaSuccess) return static_cast<int>(error);
  return launch(attend_latent_prefill_any<T>, dim3(items), dim3(kAnyThreads), bytes, stream, params, kv_rank);
}

}  // namespace
}  // namespace kv

extern "C" int kv_attend_latent_prefill(const kv_attend_prefill_params *params, int32_t kv_rank,
                                        kv_stream stream) {
  using namespace kv;
  if (params->n_tiles == 0) return static_cast<int>(cudaSuccess);
  if (params->kv_heads != 1) return static_cast<int>(cudaErrorInvalidValue);
  return KV_DISPATCH_DTYPE(params->dtype, T, [&] { return launch_prefill<T>(*params, kv_rank, stream); });
}
