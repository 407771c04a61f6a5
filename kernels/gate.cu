// Non-linearities of products that are too large to take them as they are made.

#include "activation.cuh"
#include "common.cuh"

namespace kv {
namespace {

constexpr int kThreads = 128;

// Eight numbers a thread where the halves begin at multiples of sixteen bytes, else one.
template <typename T, bool kWide>
__global__ void gate(kv_gate_params p) {
  grid_wait();
  grid_launch_dependents();
  const int unit = blockIdx.x * blockDim.x + threadIdx.x;
  const T *row = static_cast<const T *>(p.gate_up) + blockIdx.y * p.stride;
  T *out = static_cast<T *>(p.out) + blockIdx.y * p.out_stride;
  if constexpr (kWide) {
    if (unit >= p.width / 8) return;
    const Vec8<T> gates = reinterpret_cast<const Vec8<T> *>(row)[unit];
    const Vec8<T> ups = reinterpret_cast<const Vec8<T> *>(row + p.width)[unit];
    Vec8<T> result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 g = to_float2(gates.pairs[i]), u = to_float2(ups.pairs[i]);
      result.pairs[i] = from_float2<T>(
          make_float2(gated(p.activation, p.limit, g.x, u.x), gated(p.activation, p.limit, g.y, u.y)));
    }
    reinterpret_cast<Vec8<T> *>(out)[unit] = result;
  } else if (unit < p.width) {
    const float g = to_float(row[unit]), u = to_float(row[p.width + unit]);
    out[unit] = from_float<T>(gated(p.activation, p.limit, g, u));
  }
}

// Eight numbers a thread, or the last few of a row.
template <typename T>
__global__ void activate_rows(kv_activate_params p) {
  grid_wait();
  grid_launch_dependents();
  const int at = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
  T *row = static_cast<T *>(p.x) + blockIdx.y * p.stride;
  if (at + 8 <= p.width) {
    Vec8<T> held = *reinterpret_cast<const Vec8<T> *>(row + at);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = to_float2(held.pairs[i]);
      held.pairs[i] = from_float2<T>(make_float2(activate(p.activation, x.x), activate(p.activation, x.y)));
    }
    *reinterpret_cast<Vec8<T> *>(row + at) = held;
  } else {
    for (int i = at; i < p.width; ++i) row[i] = from_float<T>(activate(p.activation, to_float(row[i])));
  }
}

template <typename T>
int launch_gate(const kv_gate_params &p, kv_stream stream) {
  const bool wide = p.width % 8 == 0;
  const int units = wide ? p.width / 8 : p.width;
  const dim3 grid((units + kThreads - 1) / kThreads, p.rows);
  return launch(wide ? gate<T, true> : gate<T, false>, grid, dim3(kThreads), 0, stream, p);
}

template <typename T>
int launch_activate(const kv_activate_params &p, kv_stream stream) {
  const int units = (p.width + 7) / 8;
  const dim3 grid((units + kThreads - 1) / kThreads, p.rows);
  return launch(activate_rows<T>, grid, dim3(kThreads), 0, stream, p);
}

}  // namespace
}  // namespace kv

extern "C" int kv_gate(const kv_gate_params *params, kv_stream stream) {
  if (params->rows == 0) return 0;
  return KV_DISPATCH_DTYPE(params->dtype, T, [&] { return kv::launch_gate<T>(*params, stream); });
}

extern "C" int kv_activate(const kv_activate_params *params, kv_stream stream) {
  if (params->rows == 0 || params->width == 0) return 0;
  if (params->activation == KV_CLAMPED_SWIGLU) return static_cast<int>(cudaErrorInvalidValue);
  return KV_DISPATCH_DTYPE(params->dtype, T, [&] { return kv::launch_activate<T>(*params, stream); });
}
