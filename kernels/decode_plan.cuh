// How the keys of a decode step's rows are cut among thread blocks, and how one walks over its share.
//
// The keys that rows read, in blocks of kBlockKeys, stand in one line, head by head, row by row. Each thread block
// takes an equal, contiguous part of it, as in stream-K (Osama et al., 2023). Parts at the same keys under
// neighbouring heads run side by side, so that the pieces of a slot's line in DRAM are asked for at about the
// same time.
#pragma once

#include "common.cuh"

namespace kv {

constexpr int kBlockKeys = 64;
constexpr int kDecodeThreads = 128;  // Of a thread block.

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// What a thread block does: `blocks` of the line, from `block` of `row` under `head` on. Where its last row begins
// in the part but ends in another, it takes that row's `tail_blocks` before all others: so the pieces of cut rows
// are in the workspace long before the end.
struct alignas(16) Part {
  int32_t blocks;
  int32_t head;  // A pass of a KV head.
  int32_t row;
  int32_t block;
  kv_decode_row first;  // That row.
  int32_t tail_blocks;
  int32_t tail_head;
  int32_t tail_row;
  int32_t rows;        // Of the step.
  kv_decode_row tail;  // That row.
  int32_t first_part;  // Where the first row begins.
  int32_t last_part;   // Where the last row ends.
  int32_t pad[2];
};

__device__ __forceinline__ int first_key(const kv_decode_row &row, int window) {
  return window > 0 ? max(row.kv_len - window, 0) : 0;
}

// At least one, so that every row has an end at which its output is written.
__device__ __forceinline__ int blocks_of(const kv_decode_row &row, int window) {
  return max(ceil_div(row.kv_len - first_key(row, window), kBlockKeys), 1);
}

constexpr int kPlanThreads = 1024;
// Blocks from which a part is long: measured with 128 to 256 rows of 512 to 2048 keys on an H200.
constexpr int kLongPart = 24;

// plan: [max_parts]; heads: kv_heads times their passes. One thread block.
static __global__ void __launch_bounds__(kPlanThreads)
    plan_decode(const __grid_constant__ kv_plan_decode_params params, int heads, int max_parts) {
  extern __shared__ int32_t row_end[];  // [max_rows] blocks up to and including the row's
  __shared__ int32_t warp_end[kPlanThreads / kWarp];
  grid_wait();
  const int rows = min(*params.n_rows, params.max_rows);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  int before = 0;
  for (int base = 0; base < rows; base += kPlanThreads) {
    const int row = base + static_cast<int>(threadIdx.x);
    int end = row < rows ? blocks_of(params.rows[row], params.window) : 0;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset <<= 1) {
      const int below = __shfl_up_sync(0xffffffffu, end, offset);
      if (lane >= offset) end += below;
    }
    if (lane == kWarp - 1) warp_end[warp] = end;
    __syncthreads();
    int through = 0;
    for (int i = 0; i < kPlanThreads / kWarp; ++i) {
      if (i < warp) end += warp_end[i];
      through += warp_end[i];
    }
    if (row < rows) row_end[row] = before + end;
    before += through;
    __syncthreads();
  }
  const int64_t blocks = static_cast<int64_t>(before) * heads;
  int parts = static_cast<int>(min(blocks, static_cast<int64_t>(max_parts)));
  bool even = true;
  for (int row = threadIdx.x; row < rows; row += kPlanThreads) even &= row_end[row] == (row + 1) * row_end[0];
  if (__syncthreads_and(even)) {
    // Rows of one length are cut into whole numbers of parts, or parts made of whole numbers of rows, if that
    // leaves few thread blocks without work. Where parts are long, merging costs less than those do.
    const int64_t items = static_cast<int64_t>(rows) * heads;
    const int64_t whole = items <= parts ? parts / max(items, int64_t{1}) * items
                                         : items / ((items + max_parts - 1) / max_parts);
    const bool divides = items <= parts || items % whole == 0;
    if (divides && 10 * whole >= 9 * parts && blocks < kLongPart * parts) parts = static_cast<int>(whole);
  }
  const auto row_at = [&](int block) {  // The first row that ends above it.
    int low = 0, high = rows - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (row_end[middle] > block) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  };
  const auto row_begin = [&](int row) { return row > 0 ? row_end[row - 1] : 0; };
  // The largest p with p * blocks / parts <= at.
  const auto part_at = [&](int64_t at) { return static_cast<int32_t>(((at + 1) * parts - 1) / blocks); };
  for (int i = threadIdx.x; i < max_parts; i += kPlanThreads) {
    Part part = {};
    if (i < parts) {
      const int64_t begin = i * blocks / parts, end = (i + 1) * blocks / parts;
      const int at = static_cast<int>(begin % before), last = static_cast<int>((end - 1) % before);
      const int last_row = row_at(last);
      part.blocks = static_cast<int32_t>(end - begin);
      part.head = static_cast<int32_t>(begin / before);
      part.row = row_at(at);
      part.block = at - row_begin(part.row);
      part.first = params.rows[part.row];
      part.rows = rows;
      part.first_part = part_at(begin - part.block);
      part.last_part = part_at(end - 1 - last + row_end[last_row] - 1);
      const int tail_blocks = last + 1 - row_begin(last_row);
      if (tail_blocks < part.blocks && last + 1 < row_end[last_row]) {
        part.tail_blocks = tail_blocks;
        part.tail_head = static_cast<int32_t>((end - 1) / before);
        part.tail_row = last_row;
        part.tail = params.rows[last_row];
      }
    }
    reinterpret_cast<Part *>(params.plan)[i] = part;
  }
}

// The rows of a step, and how far back each sees.
struct RowTable {
  const kv_decode_row *rows;
  int32_t window;  // 0: to its first key.
};

// Past L1: what is read before the wait may lie there as an earlier step left it.
__device__ __forceinline__ kv_decode_row load_row(const kv_decode_row *rows, int row) {
  const int4 r = __ldcg(reinterpret_cast<const int4 *>(rows + row));
  return {r.x, r.y, r.z, r.w};
}

__device__ __forceinline__ Part load_part(const Part *parts, int part) {
  union {
    int4 words[sizeof(Part) / sizeof(int4)];
    Part value;
  } loaded = {};
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Part) / sizeof(int4)); ++i) {
    loaded.words[i] = __ldcg(reinterpret_cast<const int4 *>(parts + part) + i);
  }
  return loaded.value;
}

// A place on a part's way. The row to come is read while the present one is walked.
struct Cursor {
  int head, row, block;
  int blocks;  // Of the row.
  int tail;    // Blocks left of the tail, from where the way leads to the first row; 0 or less: none.
  kv_decode_row now, next;

  __device__ __forceinline__ Cursor(const RowTable &table, const Part &part) : tail(part.tail_blocks) {
    if (tail > 0) {
      head = part.tail_head;
      row = part.tail_row;
      block = 0;
      now = part.tail;
      next = part.first;
      blocks = blocks_of(now, table.window);
    } else {
      enter_first(table, part);
    }
  }

  __device__ __forceinline__ void enter_first(const RowTable &table, const Part &part) {
    head = part.head;
    row = part.row;
    block = part.block;
    enter(table, part, part.first);
  }

  __device__ __forceinline__ void enter(const RowTable &table, const Part &part,
                                        const kv_decode_row &entered) {
    now = entered;
    blocks = blocks_of(now, table.window);
    next = load_row(table.rows, row + 1 < part.rows ? row + 1 : 0);
  }

  __device__ __forceinline__ void advance(const RowTable &table, const Part &part) {
    if (--tail == 0) {
      enter_first(table, part);
    } else if (++block == blocks) {
      head = next_head(part);
      row = row + 1 < part.rows ? row + 1 : 0;
      block = 0;
      enter(table, part, next);
    }
  }

  __device__ __forceinline__ bool at_row_end() const { return block + 1 == blocks; }

  // Under which head the next row is walked.
  __device__ __forceinline__ int next_head(const Part &part) const {
    return tail > 0 ? part.head : row + 1 < part.rows ? head : head + 1;
  }

  // The key at an offset in the block.
  __device__ __forceinline__ int key(const RowTable &table, int offset) const {
    return first_key(now, table.window) + block * kBlockKeys + offset;
  }
};

}  // namespace kv
