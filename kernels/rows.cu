// Rows copied by number: the embedding's, and those whose logits are wanted.

#include "common.cuh"

namespace kv {
namespace {

__global__ void copy_rows(kv_copy_rows_params p) {
  grid_wait();
  grid_launch_dependents();
  const int row = blockIdx.x;
  const uint32_t wanted = p.wanted[row] - p.first;
  const bool held = wanted < p.table_rows;
  const uint16_t *from = static_cast<const uint16_t *>(p.table) + (held ? wanted : 0) * p.table_stride;
  uint16_t *to = static_cast<uint16_t *>(p.out) + row * p.out_stride;
  const int n_vectors = p.width / 8;
  const uint4 zeros = make_uint4(0, 0, 0, 0);
  for (int i = threadIdx.x; i < n_vectors; i += blockDim.x) {
    reinterpret_cast<uint4 *>(to)[i] = held ? reinterpret_cast<const uint4 *>(from)[i] : zeros;
  }
  for (int i = n_vectors * 8 + threadIdx.x; i < p.width; i += blockDim.x) to[i] = held ? from[i] : 0;
}

}  // namespace
}  // namespace kv

extern "C" int kv_copy_rows(const kv_copy_rows_params *params, kv_stream stream) {
  if (params->rows == 0) return 0;
  return kv::launch(kv::copy_rows, dim3(params->rows), dim3(128), 0, stream, *params);
}
