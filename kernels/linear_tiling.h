#pragma once
#include <vector>

#include "kvshard.h"

namespace kv {

// How a product is cut among blocks; the words are linear_sm90.cuh's.
struct LinearTiling {
  int columns, split, share;
  int resident;  // blocks an SM has room for
};

std::vector<LinearTiling> linear_tilings(int rows, int outputs, int inputs);
int linear_launch(const kv_linear_params &params, const LinearTiling &tiling, kv_stream stream);

}  // namespace kv
