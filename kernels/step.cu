// Lanes, and the arrays of the step under way.
//
// All that changes from one decode step to the next lies here and is advanced here: a recorded step of the same
// members needs nothing from the host.

#include "common.cuh"

namespace kv {
namespace {

__global__ void start_lanes(kv_start_lanes_params p) {
  grid_wait();
  grid_launch_dependents();
  const kv_lane_start &start = p.starts[blockIdx.x];
  uint32_t *slots = p.slots + start.lane * p.slots_stride;
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < start.n_slots; i += gridDim.y * blockDim.x) {
    slots[i] = p.staged[start.slots + i];
  }
  if (blockIdx.y == 0 && threadIdx.x == 0) {
    p.prompt_lens[start.lane] = start.prompt_len;
    p.lane_last[start.lane] = 0;
    p.lanes[start.lane] = start.sampling;
  }
}

// The frequency of a pair for a prompt and a sequence of so many tokens: `model::rope::Frequencies::for_position`.
__device__ float frequency(const kv_rotary &f, int pair, uint32_t prompt_len, uint32_t len) {
  if (f.growth == KV_GROWS_WITH_PROMPT) len = prompt_len;
  if (len <= f.original) return f.usual[pair];
  if (f.longer != nullptr) return f.longer[pair];
  double growth = f.factor * len / f.original - (f.factor - 1.0);
  if (f.growth == KV_GROWS_WITH_PROMPT) {
    int doublings = 1;  // ceil(log2(len / original) + 1)
    while (static_cast<uint64_t>(f.original) << (doublings - 1) < len) ++doublings;
    growth = static_cast<double>((uint64_t{1} << doublings) - 1);
  }
  const double d = 2.0 * f.half;
  const double base = f.base * pow(growth, d / (d - 2.0));
  return static_cast<float>(pow(base, -2.0 * pair / d));
}

// A warp a token.
__global__ void lay_out(kv_lay_out_params p) {
  grid_wait();
  grid_launch_dependents();
  const int token = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  const int thread = threadIdx.x % kWarp;
  if (token >= p.max_tokens) return;
  const bool padding = p.decode && token >= *p.n_rows;
  const kv_row row = padding ? kv_row{-1, 0, 0, 0, -1} : p.rows[p.decode ? token : p.token_rows[token]];
  uint32_t id = 0, position = 0, prompt_len = 0;
  if (!padding) {
    const int offset = p.decode ? 0 : token - row.token;
    position = row.start + offset;
    id = row.prompt < 0 ? p.lane_last[row.lane] : p.prompt[row.prompt + offset];
    prompt_len = p.prompt_lens[row.lane];
  }
  if (thread == 0) {
    p.tokens[token] = id;
    p.positions[token] = position;
    const bool stored = !padding && position >= row.store_from;
    p.stores[token] = stored ? static_cast<int32_t>(p.slots[row.lane * p.slots_stride + position]) : -1;
    if (p.decode) {
      const int first = *p.finished % 2 * p.max_results;
      p.decode_rows[token] = {token, row.lane, static_cast<int32_t>(position + 1), 0};
      p.drafts[token] = {row.lane, position + 1, id, first + token};
      p.sampled_tokens[token] = token;
    }
  }
  for (int rotary = 0; rotary < p.n_rotaries; ++rotary) {
    const kv_rotary &f = p.rotaries[rotary];
    float2 *angles = reinterpret_cast<float2 *>(f.angles) + static_cast<int64_t>(token) * f.half;
    for (int pair = thread; pair < f.half; pair += kWarp) {
      float sine, cosine;
      const float turn = frequency(f, pair, prompt_len, max(prompt_len, position + 1));
      sincosf(static_cast<float>(position) * turn, &sine, &cosine);
      angles[pair] = make_float2(cosine * f.amplitude, sine * f.amplitude);
    }
  }
}

// What a row that feeds its last token follows is known on the device only.
__global__ void set_previous(kv_lay_out_params p) {
  grid_wait();
  grid_launch_dependents();
  const int draft = blockIdx.x * blockDim.x + threadIdx.x;
  if (draft < p.n_drafts) p.drafts[draft].previous = p.tokens[p.sampled_tokens[draft]];
}

__global__ void finish(kv_finish_params p) {
  grid_wait();
  grid_launch_dependents();
  const int n_rows = p.max_rows > 0 ? *p.n_rows : 0;
  for (int row = threadIdx.x; row < n_rows; row += blockDim.x) {
    p.rows[row].start += 1;
    p.rows[row].store_from = 0;
  }
  if (threadIdx.x == 0) {
    const uint32_t finished = *p.finished + 1;
    *p.finished = finished;
    // Results were written by kernels before this one; the number must not overtake them on their way to the host.
    __threadfence_system();
    *p.host_finished = finished;
  }
}

}  // namespace
}  // namespace kv

extern "C" int kv_start_lanes(const kv_start_lanes_params *params, kv_stream stream) {
  if (params->n == 0) return 0;
  return kv::launch(kv::start_lanes, dim3(params->n, 8), dim3(256), 0, stream, *params);
}

extern "C" int kv_lay_out(const kv_lay_out_params *params, kv_stream stream) {
  constexpr int kWarps = 4;
  if (params->max_tokens == 0) return 0;
  const dim3 grid((params->max_tokens + kWarps - 1) / kWarps);
  const int error = kv::launch(kv::lay_out, grid, dim3(kWarps * kv::kWarp), 0, stream, *params);
  if (error != 0 || params->decode || params->n_drafts == 0) return error;
  return kv::launch(kv::set_previous, dim3((params->n_drafts + 127) / 128), dim3(128), 0, stream, *params);
}

extern "C" int kv_finish(const kv_finish_params *params, kv_stream stream) {
  return kv::launch(kv::finish, dim3(1), dim3(256), 0, stream, *params);
}
