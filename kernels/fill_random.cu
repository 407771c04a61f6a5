// Weights that no file holds: the numbers of `model::checkpoint`, made where they are needed.

#include "common.cuh"

namespace kv {
namespace {

// One output of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), counter in, number out.
__device__ __forceinline__ uint64_t mix(uint64_t counter) {
  uint64_t z = counter * 0x9e3779b97f4a7c15ull + 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

template <typename T>
__global__ void fill_random(kv_fill_random_params p) {
  grid_wait();
  grid_launch_dependents();
  const int64_t n = p.rows * p.columns;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    const int64_t row = i / p.columns, column = i % p.columns;
    const uint64_t at = p.first + row * p.row_step + column * p.column_step;
    const float unit = static_cast<float>(mix(p.stream + at) >> 40) / 8388608.f - 1.f;
    static_cast<T *>(p.out)[row * p.out_stride + column] = from_float<T>(p.reach * unit);
  }
}

}  // namespace
}  // namespace kv

extern "C" int kv_fill_random(const kv_fill_random_params *params, kv_stream stream) {
  return KV_DISPATCH_DTYPE(params->dtype, T, [&] {
    return kv::launch(kv::fill_random<T>, dim3(132 * 8), dim3(256), 0, stream, *params);
  });
}
