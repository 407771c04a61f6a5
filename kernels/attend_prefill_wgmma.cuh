// Attention with wgmma: its two products, of tiles that lie in shared memory as attend_prefill_sm90.cu says.
#pragma once

#include <type_traits>

#include "attend_prefill_ring.cuh"

namespace kv {
namespace {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading_bytes) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(kAtomBytes >> 4) << 32 | kSwizzle128;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending groups run, and lets nobody read `sums` before.
template <int kPending, int kNumbers>
__device__ __forceinline__ void wgmma_wait(float (&sums)[kNumbers]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
  for (int i = 0; i < kNumbers; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// Operands of an accumulator.
#define KV_SUMS_8(x, i)                                                                       \
  "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), \
      "+f"(x[i + 6]), "+f"(x[i + 7])
#define KV_SUMS_32(x, i) KV_SUMS_8(x, i), KV_SUMS_8(x, i + 8), KV_SUMS_8(x, i + 16), KV_SUMS_8(x, i + 24)
#define KV_NAMES_32                                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define KV_NAMES_40 KV_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define KV_NAMES_48 KV_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define KV_NAMES_64 \
  KV_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// sums[64][128] (+)= a[64][16] · b[128][16]ᵀ, both K-major in shared memory.
template <typename T>
__device__ __forceinline__ void wgmma_transposed(float (&sums)[64], uint64_t a, uint64_t b, bool add) {
#define KV_WGMMA(types)                                                                              \
  asm volatile(                                                                                      \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." types \
      " {" KV_NAMES_64 "}, %64, %65, p, 1, 1, 0, 0;\n}"                                              \
      : KV_SUMS_32(sums, 0), KV_SUMS_32(sums, 32)                                                    \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (std::is_same_v<T, __half>) {
    KV_WGMMA("f16.f16");
  } else {
    KV_WGMMA("bf16.bf16");
  }
#undef KV_WGMMA
}

// The same with a in registers.
template <typename T>
__device__ __forceinline__ void wgmma_transposed(float (&sums)[64], const uint32_t *a, uint64_t b, bool add) {
#define KV_WGMMA(types)                                                                              \
  asm volatile(                                                                                      \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." types \
      " {" KV_NAMES_64 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}"                                \
      : KV_SUMS_32(sums, 0), KV_SUMS_32(sums, 32)                                                    \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (std::is_same_v<T, __half>) {
    KV_WGMMA("f16.f16");
  } else {
    KV_WGMMA("bf16.bf16");
  }
#undef KV_WGMMA
}

// sums[64][columns] += a[64][16] · b[16][columns], a in registers, b MN-major in shared memory.
#define KV_WGMMA_REGISTERS(columns, names, a_names, b_name, ...)                                        \
  template <typename T>                                                                                 \
  __device__ __forceinline__ void wgmma_registers(float (&sums)[columns / 2], const uint32_t *a,        \
                                                  uint64_t b) {                                         \
    if constexpr (std::is_same_v<T, __half>) {                                                          \
      asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #columns \
                   "k16.f32.f16.f16 {" names "}, {" a_names "}, " b_name ", p, 1, 1, 1;\n}"             \
                   : __VA_ARGS__                                                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                               \
    } else {                                                                                            \
      asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #columns \
                   "k16.f32.bf16.bf16 {" names "}, {" a_names "}, " b_name ", p, 1, 1, 1;\n}"           \
                   : __VA_ARGS__                                                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                               \
    }                                                                                                   \
  }
KV_WGMMA_REGISTERS(64, KV_NAMES_32, "%32, %33, %34, %35", "%36", KV_SUMS_32(sums, 0))
KV_WGMMA_REGISTERS(80, KV_NAMES_40, "%40, %41, %42, %43", "%44", KV_SUMS_32(sums, 0), KV_SUMS_8(sums, 32))
KV_WGMMA_REGISTERS(96, KV_NAMES_48, "%48, %49, %50, %51", "%52", KV_SUMS_32(sums, 0), KV_SUMS_8(sums, 32),
                   KV_SUMS_8(sums, 40))
KV_WGMMA_REGISTERS(128, KV_NAMES_64, "%64, %65, %66, %67", "%68", KV_SUMS_32(sums, 0), KV_SUMS_32(sums, 32))

// wgmma reads through another proxy than cp.async writes: a fence must lie between, after the barrier that says the
// copies have landed (PTX ISA, "Proxies" and "Causality order": the fence counts anywhere on the way from write to read).
__device__ __forceinline__ void copies_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Where a k-step of a K-major tile begins, in units of a descriptor.
__device__ constexpr int step_offset(int k) { return (k / 4 * kPanelBytes + k % 4 * 32) >> 4; }

// scores[64][128] = queries[64][kDim] · keys[128][kDim]ᵀ.
template <typename T, int kDim>
__device__ __forceinline__ void multiply_keys(float (&scores)[kKeys / 2], uint64_t queries, uint64_t keys) {
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    wgmma_transposed<T>(scores, queries + step_offset(k), keys + step_offset(k), k > 0);
  }
  wgmma_commit();
}

// The same with queries in registers, as `load_queries` leaves them.
template <typename T, int kDim>
__device__ __forceinline__ void multiply_keys(float (&scores)[kKeys / 2], const uint32_t (&queries)[kDim / 4],
                                              uint64_t keys) {
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    wgmma_transposed<T>(scores, &queries[k * 4], keys + step_offset(k), k > 0);
  }
  wgmma_commit();
}

// A warp's 16 rows of a tile in shared memory, of which `row` is this lane's to address.
template <int kDim>
__device__ __forceinline__ void load_queries(uint32_t (&queries)[kDim / 4], uint32_t tile, int row) {
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    const int chunk = k * 2 + threadIdx.x % kWarp / 16;
    const uint32_t address = tile + chunk / 8 * kPanelBytes + row * 128 + (chunk % 8 ^ row % 8) * 16;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(queries[k * 4]), "=r"(queries[k * 4 + 1]), "=r"(queries[k * 4 + 2]),
                   "=r"(queries[k * 4 + 3])
                 : "r"(address)
                 : "memory");
  }
}

// sums[64][kDim] += weights[64][128] · values[128][kDim].
template <typename T, int kDim>
__device__ __forceinline__ void multiply_values(float (&sums)[kDim / 2], const uint32_t (&weights)[kKeys / 4],
                                                uint64_t values) {
#pragma unroll
  for (int k = 0; k < kKeys / 16; ++k) {
    wgmma_registers<T>(sums, &weights[k * 4], values + k * (2 * kAtomBytes >> 4));
  }
  wgmma_commit();
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace
}  // namespace kv
