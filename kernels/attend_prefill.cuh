// What the prefill kernels share: which queries and keys a tile has, how scores become exponents, who serves what.
#pragma once

#include "common.cuh"

namespace kv {

constexpr float kLog2e = 1.44269504088896340736f;

// Rows of a tile. They are (query, head) pairs, the heads that share a KV head side by side: one reading of the keys
// serves them all.
constexpr int prefill_tile_rows(int head_dim) {
  return head_dim <= 32 || (head_dim <= 128 && head_dim % 8 == 0) ? 128 : 64;
}

// Query heads of a tile: all that share the KV head, unless they are more than its rows.
__host__ __device__ constexpr int prefill_tile_heads(int heads, int kv_heads, int rows) {
  return heads / kv_heads < rows ? heads / kv_heads : rows;
}

// Tiles' parts that are worked on alone: by KV head, and by part of its query heads.
__host__ __device__ constexpr int prefill_tile_items(int heads, int kv_heads, int rows) {
  return kv_heads * ((heads / kv_heads + rows - 1) / rows);
}

// Part of a row's queries, for heads of one KV head: row r is query r / heads and head r % heads.
struct PrefillTile {
  int64_t token;  // Row of the first query in q and out.
  int queries;
  int position;           // Of the first query.
  int begin, end;         // Keys that some query sees.
  const uint32_t *slots;  // By position.
  int kv_head;
  int first_head, heads;

  __device__ int last_position() const { return position + queries - 1; }

  // The slot of a key, or of the nearest one that is seen: others may hold another request's numbers, or NaN, which
  // would outlast a weight of zero.
  __device__ uint32_t slot(int key) const { return slots[min(max(key, begin), end - 1)]; }

  // Whether some query does not see some of `keys` keys from `key` on.
  __device__ bool masked(int key, int keys, int window) const {
    return key + keys - 1 > position || (window != 0 && key <= last_position() - window);
  }
};

// Items of a tile lie side by side, so that blocks that run together share a row's keys, and the longest come first.
__device__ __forceinline__ PrefillTile prefill_tile(const kv_attend_prefill_params &params, int item,
                                                    int rows) {
  const int group = params.heads / params.kv_heads;
  const int tile_heads = prefill_tile_heads(params.heads, params.kv_heads, rows);
  const int tile_items = prefill_tile_items(params.heads, params.kv_heads, rows);
  const kv_prefill_tile tile = params.tiles[item / tile_items];
  const kv_prefill_row row = params.rows[tile.row];
  const int part = item % tile_items / params.kv_heads;
  PrefillTile out;
  out.token = static_cast<int64_t>(row.token) + tile.first;
  out.queries = min(rows / tile_heads, row.n - tile.first);
  out.position = row.start + tile.first;
  out.begin = params.scores.window == 0 ? 0 : max(0, out.position - params.scores.window + 1);
  out.end = out.position + out.queries;
  out.slots = params.cache.slots + row.lane * params.cache.slots_stride;
  out.kv_head = item % tile_items % params.kv_heads;
  out.first_head = out.kv_head * group + part * tile_heads;
  out.heads = min(tile_heads, group - part * tile_heads);
  return out;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Scores beyond scaling, in powers of two: capped, and falling with distance.
struct ShapedScores {
  float scale, cap, position_slope;

  // `slope` is that of the query's head.
  __device__ ShapedScores(const kv_scores &scores, float slope)
      : scale(scores.softcap > 0.f ? scores.scale * 2.f * kLog2e / scores.softcap : scores.scale * kLog2e),
        cap(scores.softcap * kLog2e),
        position_slope(slope * kLog2e) {}

  // `distance` is key minus query position. tanh(x) = 1 − 2 / (e^2x + 1).
  __device__ float operator()(float product, float distance) const {
    float score = product * scale;
    if (cap > 0.f) score = cap - __fdividef(2.f * cap, exp2_approx(score) + 1.f);
    return fmaf(position_slope, distance, score);
  }
};

// What a head's sink adds to the sum of weights 2^(score - offset).
__device__ __forceinline__ float sink_weight(const kv_scores &scores, int head, float offset) {
  return scores.sinks != nullptr ? exp2_approx(scores.sinks[head] * kLog2e - offset) : 0.f;
}

// Whether scores are more than scaled, masked products.
inline bool is_shaped(const kv_scores &scores) {
  return scores.softcap > 0.f || scores.alibi != nullptr || scores.sinks != nullptr;
}

// Lets a kernel have more dynamic shared memory than the 48 KiB it gets unasked.
template <typename Kernel>
inline cudaError_t allow_shared(Kernel kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// attend_prefill_sm90.cu: whether it serves such heads on this device, and the launch.
bool attend_prefill_sm90_serves(int head_dim);
int attend_prefill_sm90(const kv_attend_prefill_params &params, kv_stream stream);

}  // namespace kv
