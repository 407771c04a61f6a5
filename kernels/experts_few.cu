// Products of a row with the experts that it chose, on the ordinary cores: a warp an output.
//
// These kernels start at once, need no order of rows, and the second one adds what the row's experts return:
// that counts where a product takes ten microseconds.

#include "experts.cuh"

namespace kv {
namespace {

constexpr int kWarps = 8;
constexpr int kChunk = kWarp * 8;  // Inputs of a warp's load: sixteen bytes a lane.

// Past L1, and first out of L2: weights are read once.
template <typename T>
__device__ __forceinline__ Vec8<T> load_weights(const T *from) {
  union {
    uint4 words;
    Vec8<T> numbers;
  } x;
  x.words = __ldcs(reinterpret_cast<const uint4 *>(from));
  return x.numbers;
}

template <typename T>
__device__ __forceinline__ float dot(const Vec8<T> &a, const Vec8<T> &b, float sum) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = to_float2(a.pairs[i]), y = to_float2(b.pairs[i]);
    sum = fmaf(x.x, y.x, sum);
    sum = fmaf(x.y, y.y, sum);
  }
  return sum;
}

// gates[row * n_chosen + choice][neuron]: blocks of neurons, choices, rows.
template <typename T>
__global__ void __launch_bounds__(kWarps *kWarp)
    few_gates(const __grid_constant__ kv_experts_params p, const int32_t *ids, T *gates) {
  constexpr int kDepth = 8;  // Loads of either row of weights under way.
  grid_wait();
  grid_launch_dependents();
  const int lane = threadIdx.x % kWarp;
  const int neuron = blockIdx.x * kWarps + static_cast<int>(threadIdx.x) / kWarp;
  if (neuron >= p.width) return;
  const int64_t place = static_cast<int64_t>(blockIdx.z) * p.n_chosen + blockIdx.y;
  const int64_t expert = ids[place];
  const int inputs = (p.hidden + 7) / 8 * 8;
  const T *const gate = static_cast<const T *>(p.gate_up) + (expert * 2 * p.width + neuron) * inputs;
  const T *const up = gate + static_cast<int64_t>(p.width) * inputs;
  const T *const x = static_cast<const T *>(p.x) + blockIdx.z * p.x_stride;
  float sums[2] = {};
  for (int base = lane * 8; base - lane * 8 < inputs; base += kDepth * kChunk) {
    Vec8<T> g[kDepth], u[kDepth];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      // Beyond the end another input, which is not counted.
      const int at = base + d * kChunk < inputs ? base + d * kChunk : 0;
      g[d] = load_weights(gate + at);
      u[d] = load_weights(up + at);
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if (base + d * kChunk >= inputs) continue;
      const Vec8<T> own = *reinterpret_cast<const Vec8<T> *>(x + base + d * kChunk);
      sums[0] = dot(g[d], own, sums[0]);
      sums[1] = dot(u[d], own, sums[1]);
    }
  }
  const T *const bias = static_cast<const T *>(p.gate_up_bias);
  const float gate_sum =
      warp_sum(sums[0]) + (bias != nullptr ? to_float(bias[expert * 2 * p.width + neuron]) : 0.f);
  const float up_sum =
      warp_sum(sums[1]) + (bias != nullptr ? to_float(bias[(expert * 2 + 1) * p.width + neuron]) : 0.f);
  if (lane == 0) {
    gates[place * ((p.width + 7) / 8 * 8) + neuron] =
        from_float<T>(gated(p.activation, p.limit, gate_sum, up_sum));
  }
}

// out[row][output] = Σ weight · (down · gates + bias) over the row's choices, in their order: blocks of
// outputs, rows.
template <typename T>
__global__ void __launch_bounds__(kWarps *kWarp)
    few_outs(const __grid_constant__ kv_experts_params p, const int32_t *ids, const float *weights,
             const T *gates) {
  constexpr int kDepth = 12;  // Loads under way.
  const int lane = threadIdx.x % kWarp;
  const int output = blockIdx.x * kWarps + static_cast<int>(threadIdx.x) / kWarp;
  const int64_t row = blockIdx.y;
  const int inputs = (p.width + 7) / 8 * 8;
  const int chunks = (inputs + kChunk - 1) / kChunk;
  const int n = chunks * p.n_chosen;
  // Choices were made before the kernel queued just before, so the first weights come while it ends.
  const auto load = [&](int i) {
    const int choice = min(i / chunks, p.n_chosen - 1), at = i % chunks * kChunk + lane * 8;
    const int64_t expert = __ldcg(ids + row * p.n_chosen + choice);
    const T *const from =
        static_cast<const T *>(p.down) + (expert * p.hidden + min(output, p.hidden - 1)) * inputs;
    return load_weights(from + (at < inputs ? at : 0));
  };
  Vec8<T> down[kDepth];
#pragma unroll
  for (int d = 0; d < kDepth; ++d) down[d] = load(d);
  grid_wait();
  grid_launch_dependents();
  float sum = 0.f;
  for (int base = 0; base < n; base += kDepth) {
    if (base > 0) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) down[d] = load(base + d);
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int i = base + d, choice = i / chunks, at = i % chunks * kChunk + lane * 8;
      if (i >= n || at >= inputs) continue;
      const int64_t place = row * p.n_chosen + choice;
      const Vec8<T> own = *reinterpret_cast<const Vec8<T> *>(gates + place * inputs + at);
      sum = fmaf(weights[place], dot(down[d], own, 0.f), sum);
    }
  }
  sum = warp_sum(sum);
  if (lane != 0 || output >= p.hidden) return;
  if (p.down_bias != nullptr) {
    for (int choice = 0; choice < p.n_chosen; ++choice) {
      const int64_t place = row * p.n_chosen + choice;
      const int64_t expert = ids[place];
      sum = fmaf(weights[place], to_float(static_cast<const T *>(p.down_bias)[expert * p.hidden + output]),
                 sum);
    }
  }
  static_cast<T *>(p.out)[row * p.out_stride + output] = from_float<T>(sum);
}

template <typename T>
int launch_few(const kv_experts_params &p, const Routing &routing, void *gates, kv_stream stream) {
  const int status = launch(few_gates<T>, dim3((p.width + kWarps - 1) / kWarps, p.n_chosen, p.rows),
                            dim3(kWarps * kWarp), 0, stream, p, routing.ids, static_cast<T *>(gates));
  if (status != 0) return status;
  return launch(few_outs<T>, dim3((p.hidden + kWarps - 1) / kWarps, p.rows), dim3(kWarps * kWarp), 0, stream,
                p, routing.ids, routing.weights, static_cast<const T *>(gates));
}

}  // namespace

int launch_experts_few(const kv_experts_params &params, const Routing &routing, void *gates,
                       kv_stream stream) {
  return KV_DISPATCH_DTYPE(params.dtype, T, [&] { return launch_few<T>(params, routing, gates, stream); });
}

}  // namespace kv
