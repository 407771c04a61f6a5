// The counts that penalties are made from, at the start of a request.
#include "common.cuh"

namespace kv {
namespace {

constexpr int kThreads = 512;
constexpr int kIds = 8192;  // Ids of a block, counted in shared memory.

// A block owns a range of ids and looks at every token, so that nothing is to be zeroed before the counting.
__global__ void __launch_bounds__(kThreads) count_prompt_kernel(kv_count_prompt_params p) {
  __shared__ uint32_t counts[kIds];
  for (int i = threadIdx.x; i < kIds; i += kThreads) counts[i] = 0;
  __syncthreads();
  grid_wait();
  grid_launch_dependents();
  const uint32_t first = blockIdx.x * kIds;
  const uint32_t n = min(static_cast<uint32_t>(p.vocab) - first, static_cast<uint32_t>(kIds));
  for (int i = threadIdx.x; i < p.n; i += kThreads) {
    const uint32_t id = p.tokens[i] - first;
    if (id < n) atomicAdd(&counts[id], 1);
  }
  __syncthreads();
  uint32_t *row = p.counts + static_cast<int64_t>(p.lane) * p.vocab + first;
  for (int i = threadIdx.x; i < n; i += kThreads) row[i] = counts[i];
  if (blockIdx.x == 0 && threadIdx.x == 0) p.context_lens[p.lane] = p.n;
}

}  // namespace
}  // namespace kv

int kv_count_prompt(const kv_count_prompt_params *params, kv_stream stream) {
  const int blocks = (params->vocab + kv::kIds - 1) / kv::kIds;
  return kv::launch(kv::count_prompt_kernel, dim3(blocks), dim3(kv::kThreads), 0, stream, *params);
}
