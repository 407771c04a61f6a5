// What the kernels of a mixture of experts share: which rows an expert has, and products of an expert's rows.
#pragma once

#include "activation.cuh"
#include "common.cuh"
#include "experts.h"

namespace kv {

// An expert that some row chose. Routed rows stand in one line, expert by expert; those of an expert are cut into
// blocks.
struct alignas(16) ExpertRows {
  int32_t expert;
  int32_t first;  // Its first routed row.
  int32_t count;
  int32_t block;  // Blocks of all experts before it.
};

// What was chosen, as route.cu leaves it.
struct Routing {
  float *logits;         // [rows][n_experts]
  int32_t *ids;          // [rows][n_chosen] experts, best first
  float *weights;        // [rows][n_chosen]
  int32_t *places;       // [rows][n_chosen] routed row of each choice
  int32_t *sources;      // [rows * n_chosen] row of each routed row
  int32_t *n_experts;    // entries of `experts`, then blocks
  ExpertRows *experts;   // those with rows, by number
  unsigned *arrivals;    // 0 between launches
};

// Logits, choice, and the order of the routed rows by expert, in blocks of `block_rows`; 0: without the order.
int launch_route(const kv_experts_params &params, const Routing &routing, int block_rows, kv_stream stream);

// Products of some rows with one of several weights each: out = x · weightᵀ + bias, gated or not.
struct GroupedProduct {
  const void *weight;        // [groups][outputs][inputs]
  const void *bias;          // [groups][outputs] or null
  const void *x;             // [rows][x_stride]
  int64_t x_stride;
  int64_t x_group_stride;    // From a group's first column of x to the next one's.
  void *out;                 // [rows][out_stride]
  int64_t out_stride;
  int64_t out_group_stride;
  const int32_t *sources;    // Row of x of each row; null: the same.
  const int32_t *n_experts;  // As in Routing; null: each of `groups` has `rows` rows, in blocks of its kernel's.
  const ExpertRows *experts;
  int32_t groups, rows;
  int32_t inputs;            // A multiple of 8.
  int32_t outputs;           // Of a group; of a gate, gates and what they multiply.
  int32_t gate;              // out = activation(first half) * second half.
  int32_t activation;
  float limit;
  int32_t expected_groups;   // Of those that have rows, and how many each: what the tiling is chosen by.
  int32_t expected_rows;
  int32_t early;             // Which rows there are was known before the preceding kernel.
  int32_t dtype;
};

// Rows of a block, by how many are expected.
int grouped_block_rows(int expected_rows);
int launch_grouped(const GroupedProduct &product, kv_stream stream);
// experts_sm90.cu: whether this device has wgmma, and the launch there.
bool grouped_sm90_serves();
int launch_grouped_sm90(const GroupedProduct &product, kv_stream stream);

// experts_few.cu: both products and the sum for a row, or very few, that have chosen. `gates` is
// [rows * n_chosen][width padded to 8].
int launch_experts_few(const kv_experts_params &params, const Routing &routing, void *gates, kv_stream stream);

constexpr int kNarrowRows = 64, kWideRows = 128;  // Of a block.

// A block of rows and a tile of outputs. Tiles of a group stand together, its blocks side by side under each tile of
// outputs, so that thread blocks that run together read the same weights.
struct GroupedTile {
  int group;
  int first, count;  // Rows.
  int column;        // Number of the tile of outputs.
};

// Walks over a thread block's tiles, in the order of their numbers.
struct GroupedWalk {
  const ExpertRows *experts;  // In shared memory; null: every group has all rows.
  int n_experts;              // Entries.
  int rows, block_rows, columns;
  int at = 0;

  __device__ __forceinline__ int tiles(int n_blocks) const { return n_blocks * columns; }

  __device__ __forceinline__ GroupedTile tile(int number) {
    if (experts == nullptr) {
      const int blocks = (rows + block_rows - 1) / block_rows;
      const int in_group = number % (blocks * columns);
      const int first = in_group % blocks * block_rows;
      return {number / (blocks * columns), first, min(block_rows, rows - first), in_group / blocks};
    }
    ExpertRows expert = experts[at];
    int blocks = (expert.count + block_rows - 1) / block_rows;
    while (number >= (expert.block + blocks) * columns) {
      expert = experts[++at];
      blocks = (expert.count + block_rows - 1) / block_rows;
    }
    const int in_group = number - expert.block * columns;
    const int first = in_group % blocks * block_rows;
    return {expert.expert, expert.first + first, min(block_rows, expert.count - first), in_group / blocks};
  }
};

}  // namespace kv
