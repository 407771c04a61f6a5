// wgmma of sm_90a: products of 64 rows by kColumns, both operands in shared memory.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace kv {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Describes an operand whose rows are 128 bytes of k, swizzled by 128 bytes: groups of 8 rows lie 1024 bytes
// apart. PTX ISA, "Matrix-descriptor Format". `address` is the operand's first byte in shared memory plus 32
// for every 16 numbers of k that were passed; the tile itself begins at a multiple of 1024.
__device__ __forceinline__ uint64_t wgmma_operand(uint32_t address) {
  constexpr uint64_t kGroupStride = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | kGroupStride | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending of the committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// sums[64][kColumns] += a[64][16] · b[kColumns][16]ᵀ, for T of 16 bits. A thread of the warpgroup holds, of
// row 16 * warp + lane / 4 (and, in numbers 2 and 3 of each four, of the row 8 below), columns 8 * j + 2 *
// (lane % 4) + {0, 1} in sums[4 * j ..].
template <int kColumns>
struct Wgmma;

// The operands of wgmma by their numbers, and the sums that they are, for each count of columns.
#define KV_REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define KV_REGISTERS_32 KV_REGISTERS_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define KV_REGISTERS_48 KV_REGISTERS_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define KV_REGISTERS_64 KV_REGISTERS_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define KV_REGISTERS_80 KV_REGISTERS_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define KV_REGISTERS_96 KV_REGISTERS_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define KV_REGISTERS_112 KV_REGISTERS_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define KV_REGISTERS_128 KV_REGISTERS_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define KV_REGISTERS_144 KV_REGISTERS_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define KV_REGISTERS_160 KV_REGISTERS_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define KV_REGISTERS_176 KV_REGISTERS_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define KV_REGISTERS_192 KV_REGISTERS_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define KV_REGISTERS_208 KV_REGISTERS_192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define KV_REGISTERS_224 KV_REGISTERS_208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define KV_REGISTERS_240 KV_REGISTERS_224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define KV_REGISTERS_256 KV_REGISTERS_240 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define KV_SUMS(i)                                                                           \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), \
      "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define KV_SUMS_16 KV_SUMS(0)
#define KV_SUMS_32 KV_SUMS_16, KV_SUMS(8)
#define KV_SUMS_48 KV_SUMS_32, KV_SUMS(16)
#define KV_SUMS_64 KV_SUMS_48, KV_SUMS(24)
#define KV_SUMS_80 KV_SUMS_64, KV_SUMS(32)
#define KV_SUMS_96 KV_SUMS_80, KV_SUMS(40)
#define KV_SUMS_112 KV_SUMS_96, KV_SUMS(48)
#define KV_SUMS_128 KV_SUMS_112, KV_SUMS(56)
#define KV_SUMS_144 KV_SUMS_128, KV_SUMS(64)
#define KV_SUMS_160 KV_SUMS_144, KV_SUMS(72)
#define KV_SUMS_176 KV_SUMS_160, KV_SUMS(80)
#define KV_SUMS_192 KV_SUMS_176, KV_SUMS(88)
#define KV_SUMS_208 KV_SUMS_192, KV_SUMS(96)
#define KV_SUMS_224 KV_SUMS_208, KV_SUMS(104)
#define KV_SUMS_240 KV_SUMS_224, KV_SUMS(112)
#define KV_SUMS_256 KV_SUMS_240, KV_SUMS(120)

#define KV_WGMMA_ASM(columns, type, a_operand, b_operand)                                               \
  asm volatile(                                                                                         \
      "{.reg .pred accumulate; setp.eq.u32 accumulate, 0, 0;\n"                                         \
      "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" KV_REGISTERS_##columns \
      "}, %" #a_operand ", %" #b_operand ", accumulate, 1, 1, 0, 0;}"                                   \
      : KV_SUMS_##columns                                                                               \
      : "l"(a), "l"(b))

#define KV_WGMMA(columns, a_operand, b_operand)                                                      \
  template <>                                                                                        \
  struct Wgmma<columns> {                                                                            \
    template <typename T>                                                                            \
    static __device__ __forceinline__ void add(float (&sums)[columns / 2], uint64_t a, uint64_t b) { \
      if constexpr (std::is_same_v<T, __half>) {                                                     \
        KV_WGMMA_ASM(columns, "f16", a_operand, b_operand);                                          \
      } else {                                                                                       \
        KV_WGMMA_ASM(columns, "bf16", a_operand, b_operand);                                         \
      }                                                                                              \
    }                                                                                                \
  };

// Operands are numbered: the sums, half as many as columns, then a and b.
KV_WGMMA(32, 16, 17)
KV_WGMMA(48, 24, 25)
KV_WGMMA(64, 32, 33)
KV_WGMMA(96, 48, 49)
KV_WGMMA(112, 56, 57)
KV_WGMMA(128, 64, 65)
KV_WGMMA(192, 96, 97)
KV_WGMMA(224, 112, 113)
KV_WGMMA(256, 128, 129)

#undef KV_WGMMA
#undef KV_WGMMA_ASM

#endif  // sm_90a

}  // namespace kv
