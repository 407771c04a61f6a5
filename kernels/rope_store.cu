// Rotary embedding of queries and keys (Su et al., arXiv 2104.09864), and the store of keys and values.

#include "common.cuh"

namespace kv {
namespace {

// Eight pairs (i, i + d/2) of a head, or eight numbers of a value, a thread.
template <typename T>
__global__ void rope_store(kv_rope_store_params p) {
  grid_wait();
  grid_launch_dependents();
  const int half = p.head_dim / 2;
  const int per_head = half / 8;                      // threads that turn a head
  const int n_rotated = (p.heads + p.kv_heads) * per_head;
  const int n_values = p.kv_heads * p.head_dim / 8;
  const int token = blockIdx.y;
  const int unit = blockIdx.x * blockDim.x + threadIdx.x;
  if (unit >= n_rotated + n_values) return;
  T *row = static_cast<T *>(p.qkv) + token * p.stride;
  const int64_t slot = p.stores[token];
  const int64_t kv_width = static_cast<int64_t>(p.kv_heads) * p.head_dim;
  if (unit >= n_rotated) {
    if (slot < 0) return;
    const int at = unit - n_rotated;
    const T *values = row + (p.heads + p.kv_heads) * p.head_dim;
    reinterpret_cast<uint4 *>(static_cast<T *>(p.values) + slot * kv_width)[at] =
        reinterpret_cast<const uint4 *>(values)[at];
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

// The same for heads whose halves are no multiples of eight numbers: a pair, or a value, a thread.
template <typename T>
__global__ void rope_store_any(kv_rope_store_params p) {
  grid_wait();
  grid_launch_dependents();
  const int half = p.head_dim / 2;
  const int n_rotated = (p.heads + p.kv_heads) * half;
  const int kv_width = p.kv_heads * p.head_dim;
  const int token = blockIdx.y;
  const int unit = blockIdx.x * blockDim.x + threadIdx.x;
  if (unit >= n_rotated + kv_width) return;
  T *row = static_cast<T *>(p.qkv) + token * p.stride;
  const int64_t slot = p.stores[token];
  if (unit >= n_rotated) {
    const int at = unit - n_rotated;
    if (slot >= 0) static_cast<T *>(p.values)[slot * kv_width + at] = row[(p.heads + p.kv_heads) * p.head_dim + at];
    return;
  }
  const int head = unit / half, i = unit % half;
  const float2 turn = reinterpret_cast<const float2 *>(p.angles)[static_cast<int64_t>(token) * half + i];
  T *low = row + head * p.head_dim + i;
  const float x = to_float(low[0]), y = to_float(low[half]);
  const T a = from_float<T>(x * turn.x - y * turn.y), b = from_float<T>(y * turn.x + x * turn.y);
  if (head < p.heads) {
    low[0] = a;
    low[half] = b;
  } else if (slot >= 0) {
    T *key = static_cast<T *>(p.keys) + slot * kv_width + (head - p.heads) * p.head_dim + i;
    key[0] = a;
    key[half] = b;
  }
}

template <typename T>
int launch_rope_store(const kv_rope_store_params &p, kv_stream stream) {
  const bool wide = p.head_dim % 16 == 0;
  const int units = wide ? ((p.heads + p.kv_heads) * p.head_dim / 2 + p.kv_heads * p.head_dim) / 8
                         : (p.heads + p.kv_heads) * p.head_dim / 2 + p.kv_heads * p.head_dim;
  const int threads = 128;
  const dim3 grid((units + threads - 1) / threads, p.tokens);
  return launch(wide ? rope_store<T> : rope_store_any<T>, grid, dim3(threads), 0, stream, p);
}

}  // namespace
}  // namespace kv

extern "C" int kv_rope_store(const kv_rope_store_params *params, kv_stream stream) {
  if (params->tokens == 0) return 0;
  return KV_DISPATCH_DTYPE(params->dtype, T, [&] { return kv::launch_rope_store<T>(*params, stream); });
}
