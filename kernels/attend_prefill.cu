// Attention of runs of queries with mma.sync, for every head size and device.
//
// A block has one tile of queries and walks the keys from the diagonal back, FlashAttention-2's order (Dao, arXiv
// 2307.08691): keys of the next tile arrive while the values of this one are summed, values while the scores are made.
// Tiles of keys begin at multiples of their size, so a query's sums do not depend on how its prompt was cut.

#include "attend_prefill.cuh"
#include "mma.cuh"

namespace kv {
namespace {

template <int kDim_, int kCopyBytes_>
struct Tiling {
  static constexpr int kDim = kDim_;  // head_dim, filled up with zeros.
  // Of one copy from the cache: what the rows of heads are multiples of.
  static constexpr int kCopyBytes = kCopyBytes_;
  static constexpr int kWarps = 4;
  static constexpr int kRows = prefill_tile_rows(kDim);
  static constexpr int kRowTiles = kRows / (kWarps * 16);  // Of 16 rows, a warp.
  // 48 at 256 keep within the 99 KiB of shared memory of compute capability 8.9.
  static constexpr int kKeys = kDim > 128 ? 48 : 64;
  static constexpr int kThreads = kWarps * kWarp;
  // In chunks of 16 bytes; odd, so that eight rows' chunks of one column lie in eight different banks.
  static constexpr int kPitch = kDim / 8 + 1;
  static constexpr int kSharedBytes = (kRows + 2 * kKeys) * kPitch * 16 + 2 * kKeys * 4;

  __device__ static int chunk(int row, int column) { return row * kPitch + column; }
};

// Copies kBytes, or zeros where `valid` is false.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t to, const void *from, bool valid) {
  if constexpr (kBytes == 16) {
    cp_async_16(to, from, valid);
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes),
                 "r"(valid ? kBytes : 0)
                 : "memory");
  }
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float x, float y) {
  const typename Pair<T>::type pair = from_float2<T>(make_float2(x, y));
  return reinterpret_cast<const uint32_t &>(pair);
}

// Copies heads of tokens or slots to [rows][kDim], zeros beyond head_dim; `row_address(row)` is null for a zero row.
template <typename Tiling, typename T, typename RowAddress>
__device__ __forceinline__ void copy_rows(uint32_t to, int rows, int head_dim, const T *anywhere,
                                          RowAddress row_address) {
  constexpr int kNumbers = Tiling::kCopyBytes / 2;
  constexpr int kCopies = Tiling::kDim / kNumbers;
#pragma unroll 2
  for (int i = threadIdx.x; i < rows * kCopies; i += Tiling::kThreads) {
    const int row = i / kCopies, number = i % kCopies * kNumbers;
    const T *from = row_address(row);
    const bool valid = from != nullptr && number < head_dim;
    copy_async<Tiling::kCopyBytes>(to + Tiling::chunk(row, number / 8) * 16 + number % 8 * 2,
                                   valid ? from + number : anywhere, valid);
  }
}

template <typename T, typename Tiling, bool kShaped>
__global__ void __launch_bounds__(Tiling::kThreads)
    attend_prefill_kernel(const __grid_constant__ kv_attend_prefill_params params) {
  constexpr int kDim = Tiling::kDim, kKeys = Tiling::kKeys, kRowTiles = Tiling::kRowTiles;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t shared_q = shared_address(shared);
  const uint32_t shared_k = shared_q + Tiling::kRows * Tiling::kPitch * 16;
  const uint32_t shared_v = shared_k + kKeys * Tiling::kPitch * 16;
  uint32_t *const shared_slots =
      reinterpret_cast<uint32_t *>(shared + (Tiling::kRows + 2 * kKeys) * Tiling::kPitch * 16);

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int head_dim = params.head_dim, window = params.scores.window;

  grid_wait();
  const PrefillTile tile = prefill_tile(params, blockIdx.x, Tiling::kRows);

  // Of its warp's rows a thread has lane / 4 and lane / 4 + 8 of each 16.
  const int warp_row = warp * kRowTiles * 16;
  int positions[kRowTiles * 2];
  float slopes[kRowTiles * 2];
#pragma unroll
  for (int i = 0; i < kRowTiles * 2; ++i) {
    const int row = warp_row + i * 8 + lane / 4;
    positions[i] = tile.position + min(row / tile.heads, tile.queries - 1);
    slopes[i] = kShaped && params.scores.alibi != nullptr
                    ? params.scores.alibi[tile.first_head + row % tile.heads]
                    : 0.f;
  }

  const T *const q =
      static_cast<const T *>(params.q) + tile.token * params.q_stride + tile.first_head * head_dim;
  copy_rows<Tiling>(shared_q, Tiling::kRows, head_dim, q, [&](int row) -> const T * {
    const int query = row / tile.heads;
    return query < tile.queries ? q + query * params.q_stride + row % tile.heads * head_dim : nullptr;
  });

  const int64_t cache_stride = static_cast<int64_t>(params.kv_heads) * head_dim;
  const T *const keys = static_cast<const T *>(params.cache.keys) + tile.kv_head * head_dim;
  const T *const values = static_cast<const T *>(params.cache.values) + tile.kv_head * head_dim;
  auto copy_tile = [&](uint32_t to, const T *from, int key_tile) {
    const uint32_t *slots = shared_slots + key_tile % 2 * kKeys;
    copy_rows<Tiling>(to, kKeys, head_dim, from, [&](int row) { return from + slots[row] * cache_stride; });
  };
  auto slot_of = [&](int key_tile) {
    return threadIdx.x < kKeys ? tile.slot(key_tile * kKeys + threadIdx.x) : 0u;
  };

  const int first_tile = tile.begin / kKeys;
  int key_tile = (tile.end - 1) / kKeys;
  if (threadIdx.x < kKeys) shared_slots[key_tile % 2 * kKeys + threadIdx.x] = slot_of(key_tile);
  __syncthreads();
  copy_tile(shared_k, keys, key_tile);
  cp_async_commit();

  float sums[kRowTiles][kDim / 8][4] = {};
  float maxima[kRowTiles * 2], totals[kRowTiles * 2];
#pragma unroll
  for (int i = 0; i < kRowTiles * 2; ++i) maxima[i] = -INFINITY, totals[i] = 0.f;
  const float exponent_scale = kShaped ? 1.f : params.scores.scale * kLog2e;

  // Which row and chunk of a 16 × 16 part ldmatrix wants of a lane.
  const int part_row = lane % 16, part_chunk = lane / 16;
  const int part_key = lane % 8 + lane / 16 * 8, part_key_chunk = lane / 8 % 2;

  for (; key_tile >= first_tile; --key_tile) {
    const uint32_t next_slot = key_tile > first_tile ? slot_of(key_tile - 1) : 0u;
    cp_async_wait<0>();
    __syncthreads();
    copy_tile(shared_v, values, key_tile);
    cp_async_commit();

    float scores[kRowTiles][kKeys / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        ldmatrix_x4(a[m], shared_q + Tiling::chunk(warp_row + m * 16 + part_row, k * 2 + part_chunk) * 16);
      }
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4(b, shared_k + Tiling::chunk(n * 16 + part_key, k * 2 + part_key_chunk) * 16);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma_16x8x16<T>(scores[m][n * 2], a[m], {b[0], b[1]});
          mma_16x8x16<T>(scores[m][n * 2 + 1], a[m], {b[2], b[3]});
        }
      }
    }

    if (threadIdx.x < kKeys) shared_slots[(key_tile + 1) % 2 * kKeys + threadIdx.x] = next_slot;
    cp_async_wait<0>();
    __syncthreads();
    if (key_tile > first_tile) copy_tile(shared_k, keys, key_tile - 1);
    cp_async_commit();

    const int thread_key = key_tile * kKeys + lane % 4 * 2;
    if constexpr (kShaped) {
#pragma unroll
      for (int i = 0; i < kRowTiles * 2; ++i) {
        const ShapedScores shape(params.scores, slopes[i]);
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float &score = scores[i / 2][n][i % 2 * 2 + e];
            score = shape(score, static_cast<float>(thread_key + n * 8 + e - positions[i]));
          }
        }
      }
    }
    if (tile.masked(key_tile * kKeys, kKeys, window)) {
#pragma unroll
      for (int i = 0; i < kRowTiles * 2; ++i) {
        const int last = positions[i] - thread_key, first = window == 0 ? -kKeys : last - window + 1;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (n * 8 + e > last || n * 8 + e < first) scores[i / 2][n][i % 2 * 2 + e] = -INFINITY;
          }
        }
      }
    }

#pragma unroll
    for (int i = 0; i < kRowTiles * 2; ++i) {
      float maximum = maxima[i];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        maximum = fmaxf(maximum, fmaxf(scores[i / 2][n][i % 2 * 2], scores[i / 2][n][i % 2 * 2 + 1]));
      }
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
      // A row that has seen no key yet has no maximum to subtract.
      const float offset = maximum == -INFINITY ? 0.f : maximum * exponent_scale;
      const float rescale = exp2_approx(maxima[i] * exponent_scale - offset);
      maxima[i] = maximum;
      float total = 0.f;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float &score = scores[i / 2][n][i % 2 * 2 + e];
          score = exp2_approx(fmaf(score, exponent_scale, -offset));
          total += score;
        }
      }
      totals[i] = fmaf(totals[i], rescale, total);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        sums[i / 2][n][i % 2 * 2] *= rescale;
        sums[i / 2][n][i % 2 * 2 + 1] *= rescale;
      }
    }

#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float (&from)[4] = scores[m][k * 2 + i / 2];
          a[m][i] = pack<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, shared_v + Tiling::chunk(k * 16 + part_row, n * 2 + part_chunk) * 16);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma_16x8x16<T>(sums[m][n * 2], a[m], {b[0], b[1]});
          mma_16x8x16<T>(sums[m][n * 2 + 1], a[m], {b[2], b[3]});
        }
      }
    }
  }
  grid_launch_dependents();

  T *const out = static_cast<T *>(params.out) + tile.token * params.out_stride + tile.first_head * head_dim;
#pragma unroll
  for (int i = 0; i < kRowTiles * 2; ++i) {
    float total = totals[i];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    const int row = warp_row + i * 8 + lane / 4, query = row / tile.heads;
    if (query >= tile.queries) continue;
    if constexpr (kShaped) total += sink_weight(params.scores, tile.first_head + row % tile.heads, maxima[i]);
    const float inverse = 1.f / total;
    T *const to = out + query * params.out_stride + row % tile.heads * head_dim;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const int number = n * 8 + lane % 4 * 2;
      if (number >= head_dim) continue;
      *reinterpret_cast<uint32_t *>(to + number) =
          pack<T>(sums[i / 2][n][i % 2 * 2] * inverse, sums[i / 2][n][i % 2 * 2 + 1] * inverse);
    }
  }
}

template <typename T, typename Tiling, bool kShaped>
int launch_prefill(const kv_attend_prefill_params &params, kv_stream stream) {
  const auto kernel = attend_prefill_kernel<T, Tiling, kShaped>;
  const cudaError_t error = allow_shared(kernel, Tiling::kSharedBytes);
  if (error != cudaSuccess) return static_cast<int>(error);
  const dim3 grid(params.n_tiles * prefill_tile_items(params.heads, params.kv_heads, Tiling::kRows));
  return launch(kernel, grid, dim3(Tiling::kThreads), Tiling::kSharedBytes, stream, params);
}

template <typename T, typename Tiling>
int launch_prefill(const kv_attend_prefill_params &params, kv_stream stream) {
  return is_shaped(params.scores) ? launch_prefill<T, Tiling, true>(params, stream)
                                  : launch_prefill<T, Tiling, false>(params, stream);
}

template <typename T>
int launch_prefill(const kv_attend_prefill_params &params, kv_stream stream) {
  const int head_dim = params.head_dim;
  if (head_dim % 8 != 0) {
    return head_dim <= 32 ? launch_prefill<T, Tiling<32, 4>, true>(params, stream)
                          : launch_prefill<T, Tiling<256, 4>, true>(params, stream);
  }
  if (head_dim <= 64) return launch_prefill<T, Tiling<64, 16>>(params, stream);
  if (head_dim <= 80) return launch_prefill<T, Tiling<80, 16>>(params, stream);
  if (head_dim <= 96) return launch_prefill<T, Tiling<96, 16>>(params, stream);
  if (head_dim <= 128) return launch_prefill<T, Tiling<128, 16>>(params, stream);
  return launch_prefill<T, Tiling<256, 16>>(params, stream);
}

}  // namespace
}  // namespace kv

extern "C" int32_t kv_prefill_tile_tokens(int32_t heads, int32_t kv_heads, int32_t head_dim) {
  const int rows = kv::prefill_tile_rows(head_dim);
  return rows / kv::prefill_tile_heads(heads, kv_heads, rows);
}

extern "C" int kv_attend_prefill(const kv_attend_prefill_params *params, kv_stream stream) {
  if (params->head_dim <= 0 || params->head_dim > 256 || params->head_dim % 2 != 0) {
    return static_cast<int>(cudaErrorInvalidValue);
  }
  if (params->n_tiles == 0) return static_cast<int>(cudaSuccess);
  if (kv::attend_prefill_sm90_serves(params->head_dim)) return kv::attend_prefill_sm90(*params, stream);
  return KV_DISPATCH_DTYPE(params->dtype, T, [&] { return kv::launch_prefill<T>(*params, stream); });
}
