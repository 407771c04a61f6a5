// Log-probabilities of given ids under raw logits.
#include "summary.cuh"

namespace kv {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;

// Loads four logits, those beyond the row as −∞.
__device__ __forceinline__ float4 load_group(const float *row, int32_t vocab, int32_t at, bool aligned) {
  if (aligned && at + 4 <= vocab) return *reinterpret_cast<const float4 *>(row + at);
  return make_float4(row[at], at + 1 < vocab ? row[at + 1] : -kInfinity,
                     at + 2 < vocab ? row[at + 2] : -kInfinity, at + 3 < vocab ? row[at + 3] : -kInfinity);
}

// A block a row.
__global__ void __launch_bounds__(kThreads) target_logprobs_kernel(kv_target_logprobs_params p) {
  __shared__ Summary warps[kWarps];
  grid_wait();
  const float *row = p.logits + blockIdx.x * p.stride;
  const bool aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
  Summary summary = Summary::none();
  // Several loads are under way at once.
  constexpr int kBatch = 4;
  for (int32_t start = 4 * threadIdx.x; start < p.vocab; start += kBatch * 4 * kThreads) {
    float4 groups[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int32_t at = start + i * 4 * kThreads;
      groups[i] = at < p.vocab ? load_group(row, p.vocab, at, aligned)
                               : make_float4(-kInfinity, -kInfinity, -kInfinity, -kInfinity);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) summary.add(start + i * 4 * kThreads, groups[i], kLog2e);
  }
  grid_launch_dependents();
  summary = Summary::warp_merge(summary, kLog2e);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = summary;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  summary = Summary::warp_merge(threadIdx.x < kWarps ? warps[threadIdx.x] : Summary::none(), kLog2e);
  if (threadIdx.x > 0) return;
  const float logprob = (row[p.targets[blockIdx.x]] - summary.max) - logf(summary.sum);
  p.logprobs[blockIdx.x] = summary.valid() ? logprob : __int_as_float(0x7fc00000);
}

}  // namespace
}  // namespace kv

int kv_target_logprobs(const kv_target_logprobs_params *params, kv_stream stream) {
  if (params->rows == 0) return 0;
  return kv::launch(kv::target_logprobs_kernel, dim3(params->rows), dim3(kv::kThreads), 0, stream, *params);
}
