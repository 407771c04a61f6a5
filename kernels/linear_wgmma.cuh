// wgmma of sm_90a: products of 64 rows by kColumns, both operands in shared memory.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace kv {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Describes an operand whose rows are 128 bytes of k, swizzled by 128 bytes: groups of 8 rows lie 1024 bytes apart.
// PTX ISA, "Matrix-descriptor Format". `address` is the operand's first byte in shared memory plus 32 for every 16
// numbers of k that were passed; the tile itself begins at a multiple of 1024.
__device__ __forceinline__ uint64_t wgmma_operand(uint32_t address) {
  constexpr uint64_t kGroupStride = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | kGroupStride | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending of the committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// sums[64][kColumns] += a[64][16] · b[kColumns][16]ᵀ, for T of 16 bits. A thread of the warpgroup holds, of row
// 16 * warp + lane / 4 (and, in numbers 2 and 3 of each four, of the row 8 below), columns 8 * j + 2 * (lane % 4) + {0, 1}
// in sums[4 * j ..].
template <int kColumns>
struct Wgmma;

#define KV_WGMMA_REGISTERS_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define KV_WGMMA_REGISTERS_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define KV_WGMMA_REGISTERS_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define KV_WGMMA_REGISTERS_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define KV_WGMMA_REGISTERS_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define KV_WGMMA_REGISTERS_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define KV_WGMMA_REGISTERS_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define KV_WGMMA_REGISTERS_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define KV_WGMMA_REGISTERS_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define KV_WGMMA_REGISTERS_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define KV_WGMMA_REGISTERS_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define KV_WGMMA_REGISTERS_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define KV_WGMMA_REGISTERS_12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define KV_WGMMA_REGISTERS_13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define KV_WGMMA_REGISTERS_14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define KV_WGMMA_REGISTERS_15 "%120, %121, %122, %123, %124, %125, %126, %127"

#define KV_WGMMA_SUMS(i)                                                                                   \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
      "+f"(sums[i + 6]), "+f"(sums[i + 7])

#define KV_WGMMA_ASM(columns, type, registers, a_operand, b_operand, ...)                                      \
  asm volatile("{.reg .pred accumulate; setp.eq.u32 accumulate, 0, 0;\n"                                       \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" registers "}, " a_operand \
               ", " b_operand ", accumulate, 1, 1, 0, 0;}"                                                     \
               : __VA_ARGS__                                                                                   \
               : "l"(a), "l"(b))

#define KV_WGMMA(columns, registers, a_operand, b_operand, ...)                                         \
  template <>                                                                                           \
  struct Wgmma<columns> {                                                                               \
    template <typename T>                                                                               \
    static __device__ __forceinline__ void add(float (&sums)[columns / 2], uint64_t a, uint64_t b) {    \
      if constexpr (std::is_same_v<T, __half>) {                                                        \
        KV_WGMMA_ASM(columns, "f16", registers, a_operand, b_operand, __VA_ARGS__);                     \
      } else {                                                                                          \
        KV_WGMMA_ASM(columns, "bf16", registers, a_operand, b_operand, __VA_ARGS__);                    \
      }                                                                                                 \
    }                                                                                                   \
  };

KV_WGMMA(32, KV_WGMMA_REGISTERS_0 ", " KV_WGMMA_REGISTERS_1,
         "%16", "%17", KV_WGMMA_SUMS(0), KV_WGMMA_SUMS(8))
KV_WGMMA(48, KV_WGMMA_REGISTERS_0 ", " KV_WGMMA_REGISTERS_1 ", " KV_WGMMA_REGISTERS_2,
         "%24", "%25", KV_WGMMA_SUMS(0), KV_WGMMA_SUMS(8), KV_WGMMA_SUMS(16))
KV_WGMMA(64, KV_WGMMA_REGISTERS_0 ", " KV_WGMMA_REGISTERS_1 ", " KV_WGMMA_REGISTERS_2 ", " KV_WGMMA_REGISTERS_3,
         "%32", "%33", KV_WGMMA_SUMS(0), KV_WGMMA_SUMS(8), KV_WGMMA_SUMS(16), KV_WGMMA_SUMS(24))
KV_WGMMA(96, KV_WGMMA_REGISTERS_0 ", " KV_WGMMA_REGISTERS_1 ", " KV_WGMMA_REGISTERS_2 ", " KV_WGMMA_REGISTERS_3 ", "
         KV_WGMMA_REGISTERS_4 ", " KV_WGMMA_REGISTERS_5,
         "%48", "%49", KV_WGMMA_SUMS(0), KV_WGMMA_SUMS(8), KV_WGMMA_SUMS(16), KV_WGMMA_SUMS(24), KV_WGMMA_SUMS(32),
         KV_WGMMA_SUMS(40))
KV_WGMMA(112, KV_WGMMA_REGISTERS_0 ", " KV_WGMMA_REGISTERS_1 ", " KV_WGMMA_REGISTERS_2 ", " KV_WGMMA_REGISTERS_3 ", "
         KV_WGMMA_REGISTERS_4 ", " KV_WGMMA_REGISTERS_5 ", " KV_WGMMA_REGISTERS_6,
         "%56", "%57", KV_WGMMA_SUMS(0), KV_WGMMA_SUMS(8), KV_WGMMA_SUMS(16), KV_WGMMA_SUMS(24), KV_WGMMA_SUMS(32),
         KV_WGMMA_SUMS(40), KV_WGMMA_SUMS(48))
KV_WGMMA(128, KV_WGMMA_REGISTERS_0 ", " KV_WGMMA_REGISTERS_1 ", " KV_WGMMA_REGISTERS_2 ", " KV_WGMMA_REGISTERS_3 ", "
         KV_WGMMA_REGISTERS_4 ", " KV_WGMMA_REGISTERS_5 ", " KV_WGMMA_REGISTERS_6 ", " KV_WGMMA_REGISTERS_7,
         "%64", "%65", KV_WGMMA_SUMS(0), KV_WGMMA_SUMS(8), KV_WGMMA_SUMS(16), KV_WGMMA_SUMS(24), KV_WGMMA_SUMS(32),
         KV_WGMMA_SUMS(40), KV_WGMMA_SUMS(48), KV_WGMMA_SUMS(56))
KV_WGMMA(192, KV_WGMMA_REGISTERS_0 ", " KV_WGMMA_REGISTERS_1 ", " KV_WGMMA_REGISTERS_2 ", " KV_WGMMA_REGISTERS_3 ", "
         KV_WGMMA_REGISTERS_4 ", " KV_WGMMA_REGISTERS_5 ", " KV_WGMMA_REGISTERS_6 ", " KV_WGMMA_REGISTERS_7 ", "
         KV_WGMMA_REGISTERS_8 ", " KV_WGMMA_REGISTERS_9 ", " KV_WGMMA_REGISTERS_10 ", " KV_WGMMA_REGISTERS_11,
         "%96", "%97", KV_WGMMA_SUMS(0), KV_WGMMA_SUMS(8), KV_WGMMA_SUMS(16), KV_WGMMA_SUMS(24), KV_WGMMA_SUMS(32),
         KV_WGMMA_SUMS(40), KV_WGMMA_SUMS(48), KV_WGMMA_SUMS(56), KV_WGMMA_SUMS(64), KV_WGMMA_SUMS(72),
         KV_WGMMA_SUMS(80), KV_WGMMA_SUMS(88))
KV_WGMMA(224, KV_WGMMA_REGISTERS_0 ", " KV_WGMMA_REGISTERS_1 ", " KV_WGMMA_REGISTERS_2 ", " KV_WGMMA_REGISTERS_3 ", "
         KV_WGMMA_REGISTERS_4 ", " KV_WGMMA_REGISTERS_5 ", " KV_WGMMA_REGISTERS_6 ", " KV_WGMMA_REGISTERS_7 ", "
         KV_WGMMA_REGISTERS_8 ", " KV_WGMMA_REGISTERS_9 ", " KV_WGMMA_REGISTERS_10 ", " KV_WGMMA_REGISTERS_11 ", "
         KV_WGMMA_REGISTERS_12 ", " KV_WGMMA_REGISTERS_13,
         "%112", "%113", KV_WGMMA_SUMS(0), KV_WGMMA_SUMS(8), KV_WGMMA_SUMS(16), KV_WGMMA_SUMS(24), KV_WGMMA_SUMS(32),
         KV_WGMMA_SUMS(40), KV_WGMMA_SUMS(48), KV_WGMMA_SUMS(56), KV_WGMMA_SUMS(64), KV_WGMMA_SUMS(72),
         KV_WGMMA_SUMS(80), KV_WGMMA_SUMS(88), KV_WGMMA_SUMS(96), KV_WGMMA_SUMS(104))
KV_WGMMA(256, KV_WGMMA_REGISTERS_0 ", " KV_WGMMA_REGISTERS_1 ", " KV_WGMMA_REGISTERS_2 ", " KV_WGMMA_REGISTERS_3 ", "
         KV_WGMMA_REGISTERS_4 ", " KV_WGMMA_REGISTERS_5 ", " KV_WGMMA_REGISTERS_6 ", " KV_WGMMA_REGISTERS_7 ", "
         KV_WGMMA_REGISTERS_8 ", " KV_WGMMA_REGISTERS_9 ", " KV_WGMMA_REGISTERS_10 ", " KV_WGMMA_REGISTERS_11 ", "
         KV_WGMMA_REGISTERS_12 ", " KV_WGMMA_REGISTERS_13 ", " KV_WGMMA_REGISTERS_14 ", " KV_WGMMA_REGISTERS_15,
         "%128", "%129", KV_WGMMA_SUMS(0), KV_WGMMA_SUMS(8), KV_WGMMA_SUMS(16), KV_WGMMA_SUMS(24), KV_WGMMA_SUMS(32),
         KV_WGMMA_SUMS(40), KV_WGMMA_SUMS(48), KV_WGMMA_SUMS(56), KV_WGMMA_SUMS(64), KV_WGMMA_SUMS(72),
         KV_WGMMA_SUMS(80), KV_WGMMA_SUMS(88), KV_WGMMA_SUMS(96), KV_WGMMA_SUMS(104), KV_WGMMA_SUMS(112),
         KV_WGMMA_SUMS(120))

#undef KV_WGMMA
#undef KV_WGMMA_ASM
#undef KV_WGMMA_SUMS
#undef KV_WGMMA_REGISTERS_0
#undef KV_WGMMA_REGISTERS_1
#undef KV_WGMMA_REGISTERS_2
#undef KV_WGMMA_REGISTERS_3
#undef KV_WGMMA_REGISTERS_4
#undef KV_WGMMA_REGISTERS_5
#undef KV_WGMMA_REGISTERS_6
#undef KV_WGMMA_REGISTERS_7
#undef KV_WGMMA_REGISTERS_8
#undef KV_WGMMA_REGISTERS_9
#undef KV_WGMMA_REGISTERS_10
#undef KV_WGMMA_REGISTERS_11
#undef KV_WGMMA_REGISTERS_12
#undef KV_WGMMA_REGISTERS_13
#undef KV_WGMMA_REGISTERS_14
#undef KV_WGMMA_REGISTERS_15

#endif  // sm_90a

}  // namespace kv
