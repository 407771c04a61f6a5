// Attention of one query a row over cached latents: keys are whole rows, values the rows' latents, for all
// heads.
//
// Sixteen query heads are the rows of a tensor-core product, which is bound by the reading of the cache up to
// there; more heads are cut into passes. decode_plan.cuh spreads the keys over thread blocks, one an SM. Four
// warps copy blocks of 64 keys, 16 bytes further apart than they are long, so that eight keys' chunks of a
// column lie in different banks. (Bulk copies, one a key, are a tenth slower.) Eight warps make the scores, a
// quarter of the keys and half of the inputs each, and then sum an eighth of the values each over all keys.
// What the plan cut is merged by a second kernel in the order of the keys.

#include "common.cuh"
#include "decode_plan.cuh"
#include "latent.h"
#include "mma.cuh"
#include "softmax_state.cuh"

namespace kv {

// attend_latent_any.cu: for other widths, and older devices.
int attend_latent_any(const kv_attend_latent_params &params, kv_stream stream);

namespace {

constexpr int kRank = 512,
              kRope = 64;  // What DeepSeek's models have; others are served by attend_latent_any.cu.
constexpr int kDim = kRank + kRope;
constexpr int kHeads = 16;  // Of a pass.
constexpr int kConsumerWarps = 8;
constexpr int kConsumers = kConsumerWarps * kWarp;
constexpr int kCopyWarps = 4;
constexpr int kThreads = kConsumers + kCopyWarps * kWarp;
constexpr int kStages = 3;
constexpr int kKeyBytes = kDim * 2;
constexpr int kKeyPitch = kKeyBytes + 16;
constexpr int kStageBytes = kBlockKeys * kKeyPitch;
[[maybe_unused]] constexpr int kWarpValues = kRank / kConsumerWarps;
constexpr int kWeightPitch = (kBlockKeys + 8) * 2;
constexpr int kMergeThreads = kRank / 4;

// Shared memory, after the stages.
struct Shared {
  unsigned char weights[kHeads * kWeightPitch];
  float4 partials[kConsumerWarps][kWarp];
  float maxima[kHeads][kConsumerWarps];
  float sums[kHeads][kConsumerWarps];
  uint64_t full[kStages], empty[kStages];
};
constexpr int kSharedBytes = kStages * kStageBytes + static_cast<int>(sizeof(Shared));
static_assert(kSharedBytes <= 227 * 1024);

// Pieces of rows that were cut, and which parts hold each row.
struct LatentPieces {
  float *sums;     // [2 * parts][kHeads][kRank]
  float2 *states;  // [2 * parts][kHeads] largest score, sum of weights
  int2 *cuts;      // [passes][max_rows] first and last part; the same where the row was not cut
};

// A part holds pieces of at most two rows, of which at most one begins in it.
__device__ __forceinline__ int64_t piece_at(int part, int first_part) {
  return 2 * part + (part == first_part);
}

struct LatentArgs {
  kv_attend_latent_params p;
  float scale;  // To base 2.
  int passes;
  LatentPieces pieces;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ void barrier_init(uint64_t *barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t *barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives once the thread's copies so far have landed.
__device__ __forceinline__ void barrier_arrive_after_copies(uint64_t *barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t *barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Named barriers: 0 is __syncthreads.
__device__ __forceinline__ void sync_consumers() {
  asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
}
__device__ __forceinline__ void sync_pair(int pair) {
  asm volatile("bar.sync %0, %1;" ::"r"(2 + pair), "n"(2 * kWarp) : "memory");
}

#endif

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) attend_latent(const __grid_constant__ LatentArgs args) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char stages[];
  Shared &shared = *reinterpret_cast<Shared *>(stages + kStages * kStageBytes);
  const kv_attend_latent_params &p = args.p;
  const RowTable table = {p.rows, p.window};
  const Part part = load_part(reinterpret_cast<const Part *>(p.plan), blockIdx.x);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(shared.full + stage, kCopyWarps * kWarp);
      barrier_init(shared.empty + stage, kConsumerWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (part.blocks == 0) {
    grid_wait();
    return;
  }

  if (warp >= kConsumerWarps) {  // the copies, of sixteen keys a warp
    constexpr int kKeys = kBlockKeys / kCopyWarps, kChunks = kKeyBytes / 16;
    const int first = (warp - kConsumerWarps) * kKeys;
    Cursor ahead(table, part);
    uint32_t slot;  // Of key lane % kKeys.
    bool new_keys;  // The block holds the row's last key.
    const auto take = [&] {
      // Beyond the row's end its last key again: a weight of zero must not meet a NaN.
      const int key = max(min(ahead.key(table, first + lane % kKeys), ahead.now.kv_len - 1), 0);
      slot = p.slots[ahead.now.lane * p.slots_stride + key];
      new_keys = ahead.at_row_end();
    };
    take();
    bool waited = false;
    for (int i = 0; i < part.blocks; ++i) {
      if (!waited && (new_keys || !p.only_last_is_new || i == kStages)) {
        grid_wait();
        waited = true;
      }
      const int stage = i % kStages;
      if (i >= kStages) barrier_wait(shared.empty + stage, (i / kStages - 1) & 1);
      const uint32_t to = shared_address(stages) + stage * kStageBytes + first * kKeyPitch;
#pragma unroll 12
      for (int j = 0; j < kKeys * kChunks / kWarp; ++j) {
        const int key = (j * kWarp + lane) / kChunks, chunk = (j * kWarp + lane) % kChunks;
        const int64_t from = __shfl_sync(0xffffffffu, slot, key);
        cp_async_16(to + key * kKeyPitch + chunk * 16,
                    static_cast<const T *>(p.cache) + from * kDim + chunk * 8, true);
      }
      barrier_arrive_after_copies(shared.full + stage);
      if (i + 1 < part.blocks) {
        ahead.advance(table, part);
        take();
      }
    }
    if (!waited) grid_wait();
    return;
  }

  grid_wait();
  grid_launch_dependents();
  const int g = lane / 4, t = lane % 4;  // As mma.cuh names them: heads g and g + 8.
  const int quarter = warp / 2, half = warp % 2;
  constexpr int kSteps = kDim / 16 / 2;  // Of half of the inputs.
  Cursor here(table, part);
  uint32_t q[kSteps][4];
  int first_head = 0, n_heads = 0;
  const auto load_queries = [&] {
    first_head = here.head * kHeads;
    n_heads = min(kHeads, p.heads - first_head);
    const T *const from = static_cast<const T *>(p.q) + here.now.token * p.q_stride +
                          static_cast<int64_t>(first_head + g) * kDim + half * (kDim / 2) + 2 * t;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool held = g + i % 2 * 8 < n_heads;
        q[step][i] =
            held ? *reinterpret_cast<const uint32_t *>(from + i % 2 * 8 * kDim + step * 16 + i / 2 * 8) : 0u;
      }
    }
  };
  load_queries();

  SoftmaxState states[2];  // Of heads g and g + 8: max over all keys, sum over the thread's.
  float values[kWarpValues / 8][4] = {};
  int piece_block = here.block;  // Where the piece of the present row begins in it.
  for (int i = 0; i < part.blocks; ++i) {
    const int stage = i % kStages;
    const uint32_t keys = shared_address(stages) + stage * kStageBytes;
    barrier_wait(shared.full + stage, i / kStages & 1);

    // Scores of sixteen keys over half of the inputs; each of a pair of warps completes those of eight.
    float scores[2][2][4] = {};  // Two chains of products, since one waits for itself.
    {
      const uint32_t from =
          keys + (quarter * 16 + lane % 8 + lane / 16 * 8) * kKeyPitch + half * kDim + lane / 8 % 2 * 16;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t b[4];
        ldmatrix_x4(b, from + step * 32);
        mma_16x8x16<T>(scores[step % 2][0], q[step], {b[0], b[1]});
        mma_16x8x16<T>(scores[step % 2][1], q[step], {b[2], b[3]});
      }
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[0][tile][j] += scores[1][tile][j];
    }
    float own[4];
    {
      const float (&sent)[4] = scores[0][0], (&kept)[4] = scores[0][1];
      shared.partials[warp][lane] = half == 0 ? make_float4(kept[0], kept[1], kept[2], kept[3])
                                              : make_float4(sent[0], sent[1], sent[2], sent[3]);
      sync_pair(quarter);
      const float4 other = shared.partials[warp ^ 1][lane];
      const float others[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) own[j] = (half == 0 ? sent[j] : kept[j]) + others[j];
    }
    const int offset = quarter * 16 + half * 8 + 2 * t;
    const int valid = here.now.kv_len - here.key(table, 0);
#pragma unroll
    for (int j = 0; j < 4; ++j) own[j] = offset + j % 2 < valid ? own[j] * args.scale : kMinusInfinity;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float largest = fmaxf(own[2 * c], own[2 * c + 1]);
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      if (t == 0) shared.maxima[g + c * 8][warp] = largest;
    }
    sync_consumers();
    float factors[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float4 *const maxima = reinterpret_cast<const float4 *>(shared.maxima[g + c * 8]);
      const float4 a = maxima[0], b = maxima[1];
      const float largest =
          fmaxf(fmaxf(fmaxf(a.x, a.y), fmaxf(a.z, a.w)), fmaxf(fmaxf(b.x, b.y), fmaxf(b.z, b.w)));
      factors[c] = states[c].raise(largest);
      const float2 weight = make_float2(states[c].weight(own[2 * c]), states[c].weight(own[2 * c + 1]));
      states[c].sum += weight.x + weight.y;
      *reinterpret_cast<typename Pair<T>::type *>(shared.weights + (g + c * 8) * kWeightPitch + offset * 2) =
          from_float2<T>(weight);
    }
    if (__any_sync(0xffffffffu, factors[0] != 1.f || factors[1] != 1.f)) {
#pragma unroll
      for (int n = 0; n < kWarpValues / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) values[n][j] *= factors[j / 2];
      }
    }
    sync_consumers();

#pragma unroll
    for (int k = 0; k < kBlockKeys / 16; ++k) {
      uint32_t a[4];
      ldmatrix_x4(a, shared_address(shared.weights) + lane % 16 * kWeightPitch + (k * 2 + lane / 16) * 16);
#pragma unroll
      for (int n = 0; n < kWarpValues / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4_trans(
            b, keys + (k * 16 + lane % 16) * kKeyPitch + warp * kWarpValues * 2 + (n * 2 + lane / 16) * 16);
        mma_16x8x16<T>(values[2 * n], a, {b[0], b[1]});
        mma_16x8x16<T>(values[2 * n + 1], a, {b[2], b[3]});
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(shared.empty + stage);

    const bool row_end = here.at_row_end();
    const bool ends = row_end || here.tail == 1 || i + 1 == part.blocks;
    if (ends) {
      // A whole row goes out, a piece of one to the workspace.
      const int block = static_cast<int>(blockIdx.x);
      const int first_part = piece_block > 0 ? part.first_part : block;
      const int last_part = row_end ? block : part.last_part;
      if (row_end && threadIdx.x == 0) {
        args.pieces.cuts[here.head * p.max_rows + here.row] = make_int2(first_part, last_part);
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float sum = states[c].sum;
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (t == 0) shared.sums[g + c * 8][warp] = sum;
      }
      sync_consumers();
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int head = g + c * 8;
        SoftmaxState state = states[c];
        state.sum = 0.f;
#pragma unroll
        for (int w = 0; w < kConsumerWarps; ++w) state.sum += shared.sums[head][w];
        if (head < n_heads) {
          const int column = warp * kWarpValues + 2 * t;
          if (first_part == last_part) {
            T *const out = static_cast<T *>(p.out) + here.now.token * p.out_stride +
                           static_cast<int64_t>(first_head + head) * kRank + column;
            const float factor = state.normaliser();
#pragma unroll
            for (int n = 0; n < kWarpValues / 8; ++n) {
              *reinterpret_cast<typename Pair<T>::type *>(out + n * 8) =
                  from_float2<T>(make_float2(values[n][2 * c] * factor, values[n][2 * c + 1] * factor));
            }
          } else {
            const int64_t at = piece_at(block, first_part) * kHeads + head;
            if (warp == 0 && t == 0) args.pieces.states[at] = make_float2(state.max, state.sum);
#pragma unroll
            for (int n = 0; n < kWarpValues / 8; ++n) {
              *reinterpret_cast<float2 *>(args.pieces.sums + at * kRank + column + n * 8) =
                  make_float2(values[n][2 * c], values[n][2 * c + 1]);
            }
          }
        }
        states[c] = SoftmaxState();
#pragma unroll
        for (int n = 0; n < kWarpValues / 8; ++n) values[n][2 * c] = values[n][2 * c + 1] = 0.f;
      }
      piece_block = here.tail == 1 ? part.block : 0;
    }
    here.advance(table, part);
    if (ends && i + 1 < part.blocks) load_queries();
  }
#endif
}

// Merges a row's pieces for a head, four numbers a thread.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads) merge_latent(const __grid_constant__ LatentArgs args) {
  const kv_attend_latent_params &p = args.p;
  grid_wait();
  grid_launch_dependents();
  const int rows = min(*p.n_rows, p.max_rows);
  for (int item = blockIdx.x; item < rows * p.heads; item += gridDim.x) {
    const int row = item / p.heads, head = item % p.heads;
    const int2 cut = args.pieces.cuts[head / kHeads * p.max_rows + row];
    if (cut.x == cut.y) continue;
    SoftmaxState state;
    float sum[4] = {};
    constexpr int kAtOnce = 8;
    for (int begin = cut.x; begin <= cut.y; begin += kAtOnce) {
      float2 others[kAtOnce];
      float4 x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t at = piece_at(min(begin + i, cut.y), cut.x) * kHeads + head % kHeads;
        others[i] = __ldcg(args.pieces.states + at);
        x[i] = __ldcg(reinterpret_cast<const float4 *>(args.pieces.sums + at * kRank) + threadIdx.x);
        if (begin + i > cut.y) others[i] = make_float2(kMinusInfinity, 0.f);
      }
      float largest = others[0].x;
#pragma unroll
      for (int i = 1; i < kAtOnce; ++i) largest = fmaxf(largest, others[i].x);
      const float factor = state.raise(largest);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] *= factor;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float weight = state.weight(others[i].x);
        state.sum += weight * others[i].y;
        sum[0] += weight * x[i].x;
        sum[1] += weight * x[i].y;
        sum[2] += weight * x[i].z;
        sum[3] += weight * x[i].w;
      }
    }
    const float factor = state.normaliser();
    T *const out = static_cast<T *>(p.out) + p.rows[row].token * p.out_stride +
                   static_cast<int64_t>(head) * kRank + threadIdx.x * 4;
    typename Pair<T>::type pairs[2] = {from_float2<T>(make_float2(sum[0] * factor, sum[1] * factor)),
                                       from_float2<T>(make_float2(sum[2] * factor, sum[3] * factor))};
    *reinterpret_cast<uint2 *>(out) = *reinterpret_cast<uint2 *>(pairs);
  }
}

// ---- launches ----

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

int max_parts() {
  static const int parts = device_attribute(cudaDevAttrMultiProcessorCount);
  return parts;
}

bool has_own_kernel(int row_width) {
  static const bool able = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 &&
                           device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= kSharedBytes;
  return able && row_width == kDim;
}

int64_t align_256(int64_t bytes) { return (bytes + 255) / 256 * 256; }

int64_t sums_bytes() {
  return align_256(int64_t{2} * max_parts() * kHeads * kRank * static_cast<int64_t>(sizeof(float)));
}
int64_t states_bytes() {
  return align_256(int64_t{2} * max_parts() * kHeads * static_cast<int64_t>(sizeof(float2)));
}

template <typename T>
int launch_own(const LatentArgs &args, kv_stream stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(attend_latent<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return static_cast<int>(error);
  const int status = launch(attend_latent<T>, dim3(max_parts()), dim3(kThreads), kSharedBytes, stream, args);
  if (status != 0) return status;
  const int items = args.p.max_rows * args.p.heads, resident = max_parts() * (2048 / kMergeThreads);
  return launch(merge_latent<T>, dim3(items < resident ? items : resident), dim3(kMergeThreads), 0, stream,
                args);
}

}  // namespace
}  // namespace kv

extern "C" {

int64_t kv_attend_latent_workspace_bytes(int32_t max_rows, int32_t heads, int32_t row_width) {
  using namespace kv;
  if (!has_own_kernel(row_width)) return 0;
  return sums_bytes() + states_bytes() +
         static_cast<int64_t>(max_rows) * ceil_div(heads, kHeads) * static_cast<int64_t>(sizeof(int2));
}

int kv_plan_latent(const kv_plan_latent_params *params, kv_stream stream) {
  using namespace kv;
  if (!has_own_kernel(params->row_width)) return static_cast<int>(cudaSuccess);
  const int bytes = params->max_rows * static_cast<int>(sizeof(int32_t));
  const cudaError_t error =
      cudaFuncSetAttribute(plan_decode, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return static_cast<int>(error);
  kv_plan_decode_params plan = {};
  plan.rows = params->rows;
  plan.n_rows = params->n_rows;
  plan.max_rows = params->max_rows;
  plan.window = params->window;
  plan.plan = params->plan;
  return launch(plan_decode, dim3(1), dim3(kPlanThreads), bytes, stream, plan,
                ceil_div(params->heads, kHeads), max_parts());
}

int kv_attend_latent(const kv_attend_latent_params *params, kv_stream stream) {
  using namespace kv;
  const auto &p = *params;
  if (p.max_rows == 0) return static_cast<int>(cudaSuccess);
  if (!has_own_kernel(p.kv_rank + p.rope_dim) || p.kv_rank != kRank) {
    return attend_latent_any(p, stream);
  }
  LatentArgs args = {};
  args.p = p;
  args.scale = p.scale * kLog2e;
  args.passes = ceil_div(p.heads, kHeads);
  auto *const workspace = static_cast<unsigned char *>(p.workspace);
  args.pieces = {reinterpret_cast<float *>(workspace), reinterpret_cast<float2 *>(workspace + sums_bytes()),
                 reinterpret_cast<int2 *>(workspace + sums_bytes() + states_bytes())};
  return KV_DISPATCH_DTYPE(p.dtype, T, [&] { return launch_own<T>(args, stream); });
}

}  // extern "C"
