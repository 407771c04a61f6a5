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

#include "attend_prefill_gather.cuh"
#include "attend_prefill_wgmma.cuh"

namespace kv {
namespace {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

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
    if constexpr (!kQueriesInRegisters) copies_fence();
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
  copies_fence();
  wgmma_fence();
  score();
  wgmma_wait<0>(scores);
  weigh();
  pack_weights<T>(weights, scores);

  // The scores of the next tile, while the values of this one are summed.
  auto multiply = [&] {
    barrier_wait(&barriers.full_k[place_k.stage], place_k.parity);
    copies_fence();
    turn_wait(consumer);
    wgmma_fence();
    score();
    barrier_wait(&barriers.full_v[place_v.stage], place_v.parity);
    copies_fence();
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
  copies_fence();
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
