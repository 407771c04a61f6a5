// Attention of one query a row over keys and values gathered by slot: bound by the reading of those.
//
// The query heads that share a KV head are the eight columns of a tensor-core product whose sixteen rows are
// keys: Sᵀ = K · Qᵀ, then Oᵀ = Vᵀ · Pᵀ. So each key is read from shared memory once for all of them, and a small
// group leaves idle columns, half as many as it would rows. Groups above the columns of a thread block are cut
// into `passes`.
//
// decode_plan.cuh spreads the work over thread blocks, which walk over the ends of rows without letting their
// copies run dry; decode_pieces.cuh merges what it cut. Each warp has its own keys of a block, its own pipeline
// and softmax state.
//
// Copies begin before the wait for the kernel queued just before. That one may write the queries and each row's
// last key and value; rows, slots, plan and all other keys must be older, and it must call
// grid_launch_dependents only after its own grid_wait.

#include "common.cuh"
#include "decode_pieces.cuh"
#include "decode_plan.cuh"
#include "mma.cuh"
#include "softmax_state.cuh"

namespace kv {
namespace {

constexpr int kWarps = kDecodeThreads / kWarp;
constexpr int kWarpKeys = 16;  // Keys of a warp in a block: the rows of a product.
constexpr int kColumns = 8;    // Query heads of a product.
constexpr int kNewKeys = 1;    // At a row's end, written by the kernel queued just before.
constexpr int kBlocksPerSm = 2;
static_assert(kWarps * kWarpKeys == kBlockKeys);
constexpr int kMaxDim = 256;

struct Scores {
  float scale;    // To base 2 without a softcap; else to the argument of tanh.
  float softcap;  // In base 2; 0: none.
  const float *alibi;
  const float *sinks;

  // The score, in base 2, of a product of query and key; the key lies `ahead` positions after the query, 0 or
  // fewer.
  __device__ __forceinline__ float of(float product, float slope, int ahead) const {
    float score = product * scale;
    // tanh x = 1 - 2 / (1 + e^2x)
    if (softcap > 0.f) score = softcap * (1.f - 2.f / (1.f + exp2_approx(2.f * kLog2e * score)));
    return score + slope * static_cast<float>(ahead);
  }
};

struct DecodeArgs {
  const void *q;
  int64_t q_stride;
  void *out;
  int64_t out_stride;
  const void *keys;
  const void *values;
  const uint32_t *slots;
  int64_t slots_stride;
  int64_t slot_numbers;  // kv_heads * head_dim
  Scores scores;
  RowTable rows;
  const Part *plan;
  int32_t group;      // Query heads of a KV head,
  int32_t passes;     // cut into so many passes
  int32_t pass_size;  // of so many heads, the last of fewer.
  int32_t heads;      // kv_heads * passes
  Pieces pieces;
};

// Keys and values of one warp in one block, on their way to shared memory.
struct Tile {
  uint32_t slot;   // Of key lane % 16, or of the last there is.
  int32_t valid;   // Keys that there are, 16 but at a row's end; none or fewer: nothing to copy.
  int32_t kv_head;
};

// ---- the kernel ----

template <int kDim>
struct Layout {
  static constexpr int kChunks = kDim / 8;  // Sixteen bytes each.
  // Eight keys' chunks in one column must lie in different banks: by exclusive or where chunks are a power of
  // two, by an odd number of chunks a key elsewhere.
  static constexpr bool kXor = (kChunks & (kChunks - 1)) == 0;
  static constexpr int kKeyBytes = (kXor ? kChunks : kChunks + 1 - kChunks % 2) * 16;
  static constexpr int kTileBytes = kWarpKeys * kKeyBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;  // Keys, then values.
  static constexpr int kStages = kDim <= 64 ? 6 : kDim <= 80 ? 4 : 3;
  static constexpr int kSumPitch = kDim + 4;
  static constexpr int kSumsBytes = kWarps * kColumns * kSumPitch * 4;
  static constexpr int kStatesBytes = kWarps * kColumns * 8;
  static constexpr int kSharedBytes = kWarps * kStages * kStageBytes + kSumsBytes + kStatesBytes;

  __device__ static __forceinline__ int at(int key, int chunk) {
    return key * kKeyBytes + (kXor ? chunk ^ (key & 7) : chunk) * 16;
  }
};

// kTiles: products side by side, of eight query heads each.
template <typename T, int kDim, int kTiles>
__global__ void __launch_bounds__(kDecodeThreads, kDim <= 128 ? kBlocksPerSm : 1)
    attend_decode(const __grid_constant__ DecodeArgs args) {
  using L = Layout<kDim>;
  constexpr int kSteps = kDim / 16;
  constexpr int kHeads = kTiles * kColumns;
  extern __shared__ __align__(128) unsigned char shared[];
  float *const shared_sums = reinterpret_cast<float *>(shared + kWarps * L::kStages * L::kStageBytes);
  float2 *const shared_states = reinterpret_cast<float2 *>(shared_sums + kWarps * kColumns * L::kSumPitch);
  __shared__ Cut shared_cuts[2];
  __shared__ bool shared_last[2];

  const Part part = load_part(args.plan, blockIdx.x);
  if (part.blocks == 0) {
    grid_wait();
    return;
  }

  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int g = lane / 4, t = lane % 4;  // As mma.cuh names them.
  const uint32_t stages = shared_address(shared) + warp * L::kStages * L::kStageBytes;

  // Copies.

  Cursor ahead(args.rows, part);
  int to_take = part.blocks;
  const auto take = [&](Tile &tile) {
    const int key = ahead.key(args.rows, warp * kWarpKeys);
    // Loaded whether needed or not, so that nothing waits for it before `copy` does. By way of L1: the SM's
    // other thread block is often at the same keys, under another head. Slots change only between steps.
    const int held = max(min(key + lane % kWarpKeys, ahead.now.kv_len - 1), 0);
    tile.slot = args.slots[ahead.now.lane * args.slots_stride + held];
    tile.valid = to_take > 0 ? ahead.now.kv_len - key : 0;
    tile.kv_head = ahead.head / args.passes;
    if (--to_take > 0) ahead.advance(args.rows, part);
  };
  // Of the tile's keys those from `begin` to `end`, or zeros where there are none.
  const auto copy = [&](const Tile &tile, int stage, int begin, int end) {
    if (tile.valid <= 0 || begin >= end) return;
    const uint32_t to = stages + stage * L::kStageBytes;
    const T *const keys = static_cast<const T *>(args.keys) + tile.kv_head * kDim;
    const T *const values = static_cast<const T *>(args.values) + tile.kv_head * kDim;
#pragma unroll
    for (int i = 0; i < kWarpKeys * L::kChunks / kWarp; ++i) {
      const int key = (i * kWarp + lane) / L::kChunks;
      const int chunk = (i * kWarp + lane) % L::kChunks;
      const int64_t from = __shfl_sync(0xffffffffu, tile.slot, key) * args.slot_numbers + chunk * 8;
      if (key < begin || key >= end) continue;
      cp_async_16(to + L::at(key, chunk), keys + from, key < tile.valid);
      cp_async_16(to + L::kTileBytes + L::at(key, chunk), values + from, key < tile.valid);
    }
  };

  Tile first[L::kStages - 1];
#pragma unroll
  for (int i = 0; i < L::kStages - 1; ++i) take(first[i]);
  Tile coming;
  take(coming);
#pragma unroll
  for (int i = 0; i < L::kStages - 1; ++i) copy(first[i], i, 0, min(first[i].valid - kNewKeys, kWarpKeys));
  grid_wait();
  grid_launch_dependents();
#pragma unroll
  for (int i = 0; i < L::kStages - 1; ++i) {
    copy(first[i], i, max(first[i].valid - kNewKeys, 0), kWarpKeys);
    cp_async_commit();
  }

  // Queries of the row at hand: b fragments.

  Cursor here(args.rows, part);
  uint32_t q[kTiles][kSteps][2];
  float slopes[kTiles][2] = {};
  int first_head, n_heads;
  const auto load_queries = [&](int head, int token) {
    const int pass = head % args.passes;
    first_head = head / args.passes * args.group + pass * args.pass_size;
    n_heads = min(args.pass_size, args.group - pass * args.pass_size);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int h = tile * kColumns + g;
      const T *const from = static_cast<const T *>(args.q) + token * args.q_stride +
                            static_cast<int64_t>(first_head + h) * kDim + 2 * t;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          q[tile][step][half] =
              h < n_heads ? *reinterpret_cast<const uint32_t *>(from + step * 16 + half * 8) : 0u;
        }
      }
      if (args.scores.alibi != nullptr) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = tile * kColumns + 2 * t + i;
          slopes[tile][i] = column < n_heads ? args.scores.alibi[first_head + column] * kLog2e : 0.f;
        }
      }
    }
  };
  load_queries(here.head, here.now.token);

  SoftmaxState states[kTiles][2];  // Of heads 2t and 2t + 1: max over the warp's keys, sum over the lane's.
  float sums[kTiles][kSteps][4] = {};  // Oᵀ: c fragments, rows are numbers of a value.

  int piece_block = here.block;  // Where the piece of the present row begins in it.
  int stage = 0;
  int cuts = 0;
  for (int i = 0; i < part.blocks; ++i) {
    cp_async_wait<L::kStages - 2>();
    __syncwarp();
    copy(coming, stage == 0 ? L::kStages - 1 : stage - 1, 0, kWarpKeys);
    cp_async_commit();
    take(coming);

    const int key = here.key(args.rows, warp * kWarpKeys);
    const int valid = here.now.kv_len - key;
    const bool ends = here.at_row_end() || here.tail == 1 || i + 1 == part.blocks;
    const uint32_t keys = stages + stage * L::kStageBytes;
    const uint32_t values = keys + L::kTileBytes;
    float scores[kTiles][4] = {};
    if (valid > 0) {
      float odd_scores[kTiles][4] = {};  // Two chains of products, since one waits for itself.
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a[4];
        ldmatrix_x4(a, keys + L::at(lane % 16, step * 2 + lane / 16));
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          mma_16x8x16<T>(step % 2 == 0 ? scores[tile] : odd_scores[tile], a, q[tile][step]);
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int j = 0; j < 4; ++j) scores[tile][j] += odd_scores[tile][j];
      }
    }
    const int piece_first_head = first_head, piece_heads = n_heads;
    float piece_slopes[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      piece_slopes[tile][0] = slopes[tile][0];
      piece_slopes[tile][1] = slopes[tile][1];
    }
    // The next row's queries come while this one's last block and its merge go on.
    if (ends && i + 1 < part.blocks) load_queries(here.next_head(part), here.next.token);

    if (valid > 0) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float &score = scores[tile][j];
          const int at = g + j / 2 * 8;
          score = args.scores.of(score, piece_slopes[tile][j % 2], key + at + 1 - here.now.kv_len);
          if (at >= valid) score = kMinusInfinity;
        }
      }
      float factors[kTiles][2];
      bool raised = false;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float largest = fmaxf(scores[tile][c], scores[tile][c + 2]);
#pragma unroll
          for (int offset = 4; offset < kWarp; offset <<= 1) {
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
          }
          factors[tile][c] = states[tile][c].raise(largest);
          raised |= factors[tile][c] != 1.f;
        }
      }
      if (__any_sync(0xffffffffu, raised)) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[tile][step][j] *= factors[tile][j % 2];
          }
        }
      }
      uint32_t weights[kTiles][2];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 w = make_float2(states[tile][0].weight(scores[tile][2 * half]),
                                       states[tile][1].weight(scores[tile][2 * half + 1]));
          states[tile][0].sum += w.x;
          states[tile][1].sum += w.y;
          auto pair = from_float2<T>(w);
          weights[tile][half] = transpose_8x8(*reinterpret_cast<uint32_t *>(&pair));
        }
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, values + L::at(lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) mma_16x8x16<T>(sums[tile][step], a, weights[tile]);
      }
    }
    stage = stage + 1 == L::kStages ? 0 : stage + 1;

    if (ends) {
      // The warps' states become one; a whole row goes out, a piece of one to the workspace.
      const int block = static_cast<int>(blockIdx.x);
      const Cut cut = {static_cast<T *>(args.out) + here.now.token * args.out_stride +
                           static_cast<int64_t>(piece_first_head) * kDim,
                       args.scores.sinks != nullptr ? args.scores.sinks + piece_first_head : nullptr,
                       piece_heads, piece_block > 0 ? part.first_part : block,
                       here.at_row_end() ? block : part.last_part};
      const bool whole = cut.first_part == cut.last_part;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          SoftmaxState &state = states[tile][c];
#pragma unroll
          for (int offset = 4; offset < kWarp; offset <<= 1) {
            state.sum += __shfl_xor_sync(0xffffffffu, state.sum, offset);
          }
          const int column = warp * kColumns + 2 * t + c;
          if (g == 0) shared_states[column] = make_float2(state.max, state.sum);
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            shared_sums[column * L::kSumPitch + step * 16 + g] = sums[tile][step][c];
            shared_sums[column * L::kSumPitch + step * 16 + g + 8] = sums[tile][step][c + 2];
            sums[tile][step][c] = sums[tile][step][c + 2] = 0.f;
          }
          state = SoftmaxState();
        }
        __syncthreads();
        const int columns = min(piece_heads - tile * kColumns, kColumns);
        for (int e = threadIdx.x; e < columns * (kDim / 4); e += kDecodeThreads) {
          const int column = e / (kDim / 4), d = e % (kDim / 4) * 4;
          float2 other[kWarps];
          float4 x[kWarps];
#pragma unroll
          for (int w = 0; w < kWarps; ++w) {
            other[w] = shared_states[w * kColumns + column];
            x[w] = *reinterpret_cast<const float4 *>(shared_sums + (w * kColumns + column) * L::kSumPitch +
                                                     d);
          }
          SoftmaxState state;
          float sum[4] = {};
          merge(state, sum, other, x);
          const int head = tile * kColumns + column;
          if (whole) {
            store_4(static_cast<T *>(cut.out) + head * kDim + d, sum, state.normaliser(cut.sink(head)));
          } else {
            const int64_t at = static_cast<int64_t>(place_of(cut, 0, block)) * kHeads + head;
            store_piece<kDim>(args.pieces, at, d, state, sum);
          }
        }
        __syncthreads();
      }
      if (!whole) {
        if (threadIdx.x == 0) {
          shared_cuts[cuts] = cut;
          shared_last[cuts] = arrive(args.pieces, cut, 0);
        }
        ++cuts;
      }
      piece_block = here.tail == 1 ? part.block : 0;
    }
    here.advance(args.rows, part);
  }

  __syncthreads();
  for (int i = 0; i < cuts; ++i) {
    const Cut cut = shared_cuts[i];
    for (int level = 0; level < kLevels && shared_last[i]; ++level) {
      if (merge_group<T, kDim, kHeads>(args.pieces, cut, level)) break;
      __syncthreads();
      if (threadIdx.x == 0) shared_last[i] = arrive(args.pieces, cut, level + 1);
      __syncthreads();
    }
  }
}

// ---- head sizes without a kernel of their own ----

constexpr int kAnyThreads = 128;

// One thread block a row and query head, in steps of 128 keys: any even head_dim, aligned to a number only.
template <typename T>
__global__ void __launch_bounds__(kAnyThreads)
    attend_decode_any(const __grid_constant__ DecodeArgs args, const int32_t *n_rows, int dim) {
  constexpr int kPerThread = kMaxDim / kAnyThreads;
  constexpr int kAnyWarps = kAnyThreads / kWarp;
  __shared__ float query[kMaxDim];
  __shared__ float weights[kAnyThreads];
  __shared__ uint32_t slots[kAnyThreads];
  __shared__ float largest_of[kAnyWarps], sum_of[kAnyWarps];
  grid_wait();
  grid_launch_dependents();
  const int head = blockIdx.x;
  if (static_cast<int>(blockIdx.y) >= *n_rows) return;
  const kv_decode_row row = args.rows.rows[blockIdx.y];
  const int64_t offset = static_cast<int64_t>(head / args.group) * dim;
  const float slope = args.scores.alibi != nullptr ? args.scores.alibi[head] * kLog2e : 0.f;
  for (int d = threadIdx.x; d < dim; d += kAnyThreads) {
    query[d] = to_float(static_cast<const T *>(args.q)[row.token * args.q_stride + head * dim + d]);
  }
  SoftmaxState state;
  float sums[kPerThread] = {};
  for (int base = first_key(row, args.rows.window); base < row.kv_len; base += kAnyThreads) {
    const int key = base + static_cast<int>(threadIdx.x);
    __syncthreads();
    float score = kMinusInfinity;
    if (key < row.kv_len) {
      const uint32_t slot = args.slots[row.lane * args.slots_stride + key];
      slots[threadIdx.x] = slot;
      const T *const from = static_cast<const T *>(args.keys) + slot * args.slot_numbers + offset;
      score = 0.f;
      for (int d = 0; d < dim; ++d) score += query[d] * to_float(from[d]);
      score = args.scores.of(score, slope, key + 1 - row.kv_len);
    }
    const float warp_largest = warp_max(score);
    if (threadIdx.x % kWarp == 0) largest_of[threadIdx.x / kWarp] = warp_largest;
    __syncthreads();
    float largest = largest_of[0];
#pragma unroll
    for (int w = 1; w < kAnyWarps; ++w) largest = fmaxf(largest, largest_of[w]);
    const float factor = state.raise(largest);
    const float weight = state.weight(score);
    weights[threadIdx.x] = weight;
    state.sum += block_sum<kAnyWarps>(weight, sum_of);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int d = static_cast<int>(threadIdx.x) + i * kAnyThreads;
      if (d >= dim) continue;
      sums[i] *= factor;
      for (int j = 0; j < min(kAnyThreads, row.kv_len - base); ++j) {
        sums[i] += weights[j] *
                   to_float(static_cast<const T *>(args.values)[slots[j] * args.slot_numbers + offset + d]);
      }
    }
  }
  const float sink = args.scores.sinks != nullptr ? args.scores.sinks[head] * kLog2e : kMinusInfinity;
  T *const out = static_cast<T *>(args.out) + row.token * args.out_stride + head * dim;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int d = static_cast<int>(threadIdx.x) + i * kAnyThreads;
    if (d < dim) out[d] = from_float<T>(sums[i] * state.normaliser(sink));
  }
}

// ---- launches ----

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

// Shared memory of the kernel made for a head size; 0: there is none.
int own_kernel_bytes(int head_dim) {
  switch (head_dim) {
    case 64: return Layout<64>::kSharedBytes;
    case 80: return Layout<80>::kSharedBytes;
    case 96: return Layout<96>::kSharedBytes;
    case 128: return Layout<128>::kSharedBytes;
    case 160: return Layout<160>::kSharedBytes;
    case 256: return Layout<256>::kSharedBytes;
    default: return 0;
  }
}

bool has_own_kernel(int head_dim) {
  const int bytes = own_kernel_bytes(head_dim);
  return bytes > 0 && bytes <= device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// How the query heads of a KV head are cut.
struct Passes {
  int count, size, columns;
};

Passes passes_of(int heads, int kv_heads, int head_dim) {
  const int group = heads / kv_heads;
  // Sixteen columns where the sums still fit the registers and groups of that size are common.
  const int columns = group > kColumns && (head_dim == 64 || head_dim == 128) ? 2 * kColumns : kColumns;
  const int count = ceil_div(group, columns);
  return {count, ceil_div(group, count), columns};
}

int max_parts() { return device_attribute(cudaDevAttrMultiProcessorCount) * kBlocksPerSm; }

int parts_of(int head_dim) { return head_dim <= 128 ? max_parts() : max_parts() / kBlocksPerSm; }

int64_t align_256(int64_t bytes) { return (bytes + 255) / 256 * 256; }

template <typename T>
int launch_any(const kv_attend_decode_params &params, const DecodeArgs &args, kv_stream stream) {
  return launch(attend_decode_any<T>, dim3(params.heads, params.max_rows), dim3(kAnyThreads), 0, stream, args,
                params.n_rows, params.head_dim);
}

template <typename T, int kDim, int kTiles>
int launch_own(const DecodeArgs &args, kv_stream stream) {
  constexpr int bytes = Layout<kDim>::kSharedBytes;
  const auto kernel = attend_decode<T, kDim, kTiles>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  return launch(kernel, dim3(parts_of(kDim)), dim3(kDecodeThreads), bytes, stream, args);
}

template <typename T>
int launch_dim(const kv_attend_decode_params &params, const DecodeArgs &args, int columns, kv_stream stream) {
  switch (has_own_kernel(params.head_dim) ? params.head_dim : 0) {
    case 64:
      return columns == kColumns ? launch_own<T, 64, 1>(args, stream) : launch_own<T, 64, 2>(args, stream);
    case 80: return launch_own<T, 80, 1>(args, stream);
    case 96: return launch_own<T, 96, 1>(args, stream);
    case 128:
      return columns == kColumns ? launch_own<T, 128, 1>(args, stream) : launch_own<T, 128, 2>(args, stream);
    case 160: return launch_own<T, 160, 1>(args, stream);
    case 256: return launch_own<T, 256, 1>(args, stream);
    default: return launch_any<T>(params, args, stream);
  }
}

}  // namespace
}  // namespace kv

extern "C" {

int32_t kv_plan_decode_ints(int32_t) {
  return static_cast<int32_t>(kv::max_parts() * sizeof(kv::Part) / sizeof(int32_t));
}

int64_t kv_attend_decode_workspace_bytes(int32_t, int32_t heads, int32_t kv_heads, int32_t head_dim) {
  if (!kv::has_own_kernel(head_dim)) return 0;
  const int64_t places = 4 * kv::parts_of(head_dim);
  const int64_t columns = kv::passes_of(heads, kv_heads, head_dim).columns;
  return kv::align_256(places * sizeof(unsigned)) + kv::align_256(places * columns * sizeof(float2)) +
         places * columns * head_dim * static_cast<int64_t>(sizeof(float));
}

int kv_plan_decode(const kv_plan_decode_params *params, kv_stream stream) {
  using namespace kv;
  const int heads = params->kv_heads * passes_of(params->heads, params->kv_heads, params->head_dim).count;
  return launch(plan_decode, dim3(1), dim3(kPlanThreads), params->max_rows * sizeof(int32_t), stream, *params,
                heads, parts_of(params->head_dim));
}

int kv_attend_decode(const kv_attend_decode_params *params, kv_stream stream) {
  using namespace kv;
  const auto &p = *params;
  if (p.head_dim > kMaxDim || p.head_dim % 2 != 0 || p.heads % p.kv_heads != 0) return cudaErrorInvalidValue;
  const Passes passes = passes_of(p.heads, p.kv_heads, p.head_dim);
  const float softcap = p.scores.softcap;
  DecodeArgs args = {};
  args.q = p.q;
  args.q_stride = p.q_stride;
  args.out = p.out;
  args.out_stride = p.out_stride;
  args.keys = p.cache.keys;
  args.values = p.cache.values;
  args.slots = p.cache.slots;
  args.slots_stride = p.cache.slots_stride;
  args.slot_numbers = static_cast<int64_t>(p.kv_heads) * p.head_dim;
  args.scores = {softcap > 0.f ? p.scores.scale / softcap : p.scores.scale * kLog2e, softcap * kLog2e,
                 p.scores.alibi, p.scores.sinks};
  args.rows = {p.rows, p.scores.window};
  args.plan = reinterpret_cast<const Part *>(p.plan);
  args.group = p.heads / p.kv_heads;
  args.passes = passes.count;
  args.pass_size = passes.size;
  args.heads = p.kv_heads * passes.count;
  if (has_own_kernel(p.head_dim)) {
    const int64_t places = 4 * parts_of(p.head_dim);
    auto *const workspace = static_cast<unsigned char *>(p.workspace);
    auto *const states = workspace + align_256(places * sizeof(unsigned));
    auto *const sums = states + align_256(places * passes.columns * sizeof(float2));
    args.pieces = {reinterpret_cast<float *>(sums), reinterpret_cast<float2 *>(states),
                   reinterpret_cast<unsigned *>(workspace)};
  }
  return KV_DISPATCH_DTYPE(p.dtype, T, [&] { return launch_dim<T>(p, args, passes.columns, stream); });
}

}  // extern "C"
