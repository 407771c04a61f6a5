// Rotary embedding of queries and keys (Su et al., arXiv 2104.09864), and the store of keys and values; before it,
// the norm of each head where there is one.

#include "common.cuh"

namespace kv {
namespace {

// What a query at a position is multiplied by: Qwen v1's LogN.
__device__ __forceinline__ float log_n_factor(const kv_rope_store_params &p, int token) {
  if (p.log_n == 0) return 1.f;
  const uint32_t position = p.positions[token];
  if (position < p.log_n) return 1.f;
  return logf(static_cast<float>(position + 1)) / logf(static_cast<float>(p.log_n));
}

// Eight pairs (i, i + rotary_dim / 2) of a head, or eight numbers that are stored as they are, a thread.
template <typename T>
__global__ void rope_store(kv_rope_store_params p) {
  grid_wait();
  grid_launch_dependents();
  const int half = p.rotary_dim / 2;
  const int per_head = half / 8;                         // threads that turn a head
  const int rest = (p.head_dim - p.rotary_dim) / 8;      // threads that store what does not turn of a key
  const int n_rotated = (p.heads + p.kv_heads) * per_head;
  const int n_values = p.kv_heads * p.head_dim / 8;
  const int token = blockIdx.y;
  const int unit = blockIdx.x * blockDim.x + threadIdx.x;
  if (unit >= n_rotated + n_values + p.kv_heads * rest) return;
  T *row = static_cast<T *>(p.qkv) + token * p.stride;
  const int64_t slot = p.stores[token];
  const int64_t kv_width = static_cast<int64_t>(p.kv_heads) * p.head_dim;
  if (unit >= n_rotated) {
    if (slot < 0) return;
    int at = unit - n_rotated;
    const T *from = row + (p.heads + p.kv_heads) * p.head_dim;
    T *to = static_cast<T *>(p.values) + slot * kv_width;
    if (at >= n_values) {
      at -= n_values;
      at = (at / rest * p.head_dim + p.rotary_dim) / 8 + at % rest;
      from = row + p.heads * p.head_dim;
      to = static_cast<T *>(p.keys) + slot * kv_width;
    }
    reinterpret_cast<uint4 *>(to)[at] = reinterpret_cast<const uint4 *>(from)[at];
    return;
  }
  const int head = unit / per_head, first = unit % per_head * 8;
  T *low = row + head * p.head_dim + first;
  T *high = low + half;
  const float4 *angles =
      reinterpret_cast<const float4 *>(p.angles + (static_cast<int64_t>(token) * half + first) * 2);
  Vec8<T> a = *reinterpret_cast<Vec8<T> *>(low), b = *reinterpret_cast<Vec8<T> *>(high);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 turn = angles[i];  // cosine, sine, cosine, sine
    const float2 x = to_float2(a.pairs[i]), y = to_float2(b.pairs[i]);
    a.pairs[i] = from_float2<T>(make_float2(x.x * turn.x - y.x * turn.y, x.y * turn.z - y.y * turn.w));
    b.pairs[i] = from_float2<T>(make_float2(y.x * turn.x + x.x * turn.y, y.y * turn.z + x.y * turn.w));
  }
  if (head < p.heads) {
    *reinterpret_cast<Vec8<T> *>(low) = a;
    *reinterpret_cast<Vec8<T> *>(high) = b;
    return;
  }
  // Nobody reads the row's own keys: attention takes them from the cache.
  if (slot < 0) return;
  T *key = static_cast<T *>(p.keys) + slot * kv_width + (head - p.heads) * p.head_dim + first;
  *reinterpret_cast<Vec8<T> *>(key) = a;
  *reinterpret_cast<Vec8<T> *>(key + half) = b;
}

constexpr int kMaxDim = 256;
constexpr int kHeadWarps = 4;  // of a block

// The same for heads of every even width, with a norm and LogN: a warp a head, which lies in shared memory between
// its norm and its turn, so that any two numbers may be a pair. A thread has every 32nd pair of neighbours.
template <typename T>
__global__ void __launch_bounds__(kHeadWarps *kWarp) norm_rope_store(kv_rope_store_params p) {
  constexpr int kPairs = kMaxDim / 2 / kWarp;
  using Two = typename Pair<T>::type;
  __shared__ float2 heads_of_block[kHeadWarps][kMaxDim / 2];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int head = blockIdx.x * kHeadWarps + warp;
  const int token = blockIdx.y;
  const int n_pairs = p.head_dim / 2;
  const bool is_query = head < p.heads, is_key = !is_query && head < p.heads + p.kv_heads;
  grid_wait();
  grid_launch_dependents();
  if (head >= p.heads + 2 * p.kv_heads) return;
  const int64_t slot = p.stores[token];
  if (!is_query && slot < 0) return;
  Two *const row = reinterpret_cast<Two *>(static_cast<T *>(p.qkv) + token * p.stride + head * p.head_dim);
  const int64_t kv_width = static_cast<int64_t>(p.kv_heads) * p.head_dim;
  Two *to = row;
  if (!is_query) {
    const int kv_head = head - p.heads - (is_key ? 0 : p.kv_heads);
    T *const cache = static_cast<T *>(is_key ? p.keys : p.values);
    to = reinterpret_cast<Two *>(cache + slot * kv_width + kv_head * p.head_dim);
  }
  Two held[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int pair = i * kWarp + lane;
    if (pair < n_pairs) held[i] = row[pair];
  }
  if (!is_query && !is_key) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int pair = i * kWarp + lane;
      if (pair < n_pairs) to[pair] = held[i];
    }
    return;
  }

  float2 x[kPairs];
  float sum = 0.f, squares = 0.f;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    x[i] = i * kWarp + lane < n_pairs ? to_float2(held[i]) : make_float2(0.f, 0.f);
    sum += x[i].x + x[i].y;
    squares += x[i].x * x[i].x + x[i].y * x[i].y;
  }
  if (p.normed) {
    const kv_head_norm &norm = is_query ? p.query_norm : p.key_norm;
    const int64_t offset = static_cast<int64_t>(head - (is_query ? 0 : p.heads)) * norm.head_stride;
    const Two *const weight = reinterpret_cast<const Two *>(static_cast<const T *>(norm.weight) + offset);
    float mean = 0.f;
    if (p.kind == KV_LAYER) {
      mean = warp_sum(sum) / p.head_dim;
      squares = 0.f;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (i * kWarp + lane >= n_pairs) continue;
        const float a = x[i].x - mean, b = x[i].y - mean;
        squares += a * a + b * b;
      }
    }
    const float scale = rsqrtf(warp_sum(squares) / p.head_dim + p.eps);
    const float plus = p.kind == KV_RMS_ONE_PLUS ? 1.f : 0.f;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int pair = i * kWarp + lane;
      if (pair >= n_pairs) continue;
      const float2 factor = to_float2(weight[pair]);
      x[i] = make_float2((x[i].x - mean) * scale * (factor.x + plus),
                         (x[i].y - mean) * scale * (factor.y + plus));
    }
  }
  float2 *const shared = heads_of_block[warp];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int pair = i * kWarp + lane;
    if (pair < n_pairs) shared[pair] = x[i];
  }
  __syncwarp();
  const int half = p.rotary_dim / 2;
  const float *const numbers = reinterpret_cast<const float *>(shared);
  const float2 *const angles =
      reinterpret_cast<const float2 *>(p.angles) + static_cast<int64_t>(token) * half;
  const auto turned = [&](int i, float number) {
    if (i >= p.rotary_dim) return number;
    const bool low = i < half;
    const float2 turn = angles[low ? i : i - half];
    return low ? number * turn.x - numbers[i + half] * turn.y : number * turn.x + numbers[i - half] * turn.y;
  };
  const float factor = is_query ? log_n_factor(p, token) : 1.f;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int pair = i * kWarp + lane;
    if (pair >= n_pairs) continue;
    to[pair] = from_float2<T>(
        make_float2(factor * turned(2 * pair, x[i].x), factor * turned(2 * pair + 1, x[i].y)));
  }
}

template <typename T>
int launch_rope_store(const kv_rope_store_params &p, kv_stream stream) {
  const bool plain = !p.normed && p.log_n == 0;
  if (plain && p.rotary_dim % 16 == 0 && p.head_dim % 8 == 0) {
    const int rest = p.head_dim - p.rotary_dim;
    const int units = ((p.heads + p.kv_heads) * p.rotary_dim / 2 + p.kv_heads * (p.head_dim + rest)) / 8;
    const int threads = 128;
    const dim3 grid((units + threads - 1) / threads, p.tokens);
    return launch(rope_store<T>, grid, dim3(threads), 0, stream, p);
  }
  if (p.head_dim % 2 != 0 || p.head_dim > kMaxDim) return static_cast<int>(cudaErrorInvalidValue);
  const dim3 grid((p.heads + 2 * p.kv_heads + kHeadWarps - 1) / kHeadWarps, p.tokens);
  return launch(norm_rope_store<T>, grid, dim3(kHeadWarps * kWarp), 0, stream, p);
}

}  // namespace
}  // namespace kv

extern "C" int kv_rope_store(const kv_rope_store_params *params, kv_stream stream) {
  if (params->tokens == 0) return 0;
  return KV_DISPATCH_DTYPE(params->dtype, T, [&] { return kv::launch_rope_store<T>(*params, stream); });
}
