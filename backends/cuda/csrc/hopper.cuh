// Hopper's copy engine, its barriers, and its products of warpgroups.
#pragma once

#include <cuda.h>

#include "common.cuh"

namespace lmi {

// A barrier in shared memory that also counts bytes of copies. Its phases alternate between 0 and 1.
struct Barrier {
  uint64_t state;

  __device__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)),
                 "r"(arrivals)
                 : "memory");
  }

  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }

  // One arrival, and so many bytes that are still to come.
  __device__ void arrive_and_expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(this)),
                 "r"(bytes)
                 : "memory");
  }

  __device__ void wait(int phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra ready;\n"
        "bra again;\n"
        "ready:\n"
        "}\n" ::"r"(shared_address(this)),
        "r"(phase)
        : "memory");
  }

  // The same for what other blocks of the cluster have done.
  __device__ void wait_for_cluster(int phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@done bra ready;\n"
        "bra again;\n"
        "ready:\n"
        "}\n" ::"r"(shared_address(this)),
        "r"(phase)
        : "memory");
  }
};

// Where in the ring a step is, and the phase of its barriers.
struct RingSlot {
  int at = 0, phase = 0;

  __device__ void next(int depth) {
    if (++at == depth) at = 0, phase ^= 1;
  }
};

// Makes initialized barriers visible to the copy engine.
__device__ inline void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Copy a box whose first element is [row, feature] to shared memory.
__device__ inline void copy_box(void* to, const CUtensorMap* from, int row, int feature,
                                Barrier* done) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
      "l"(from), "r"(feature), "r"(row), "r"(shared_address(done))
      : "memory");
}

// The same of a tensor whose rows have several parts: the box's first element is [row, part, feature].
__device__ inline void copy_box(void* to, const CUtensorMap* from, int row, int part, int feature,
                                Barrier* done) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(to)),
      "l"(from), "r"(feature), "r"(part), "r"(row), "r"(shared_address(done))
      : "memory");
}

// Have the description itself at hand before the first copy.
__device__ inline void prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Where a tile of rows of 128 bytes begins, which lies as the copy engine swizzles it. A product that
// takes rows for what it sums over, and more columns than these have, finds the next `panel` bytes
// further.
__device__ inline uint64_t matrix(const void* rows, int panel = 16) {
  constexpr uint64_t SWIZZLE_128 = 1, EIGHT_ROWS = 8 * 128;
  return (shared_address(rows) & 0x3ffff) >> 4 | static_cast<uint64_t>(panel >> 4) << 16 |
         EIGHT_ROWS >> 4 << 32 | SWIZZLE_128 << 62;
}

#define LMI_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LMI_D8(i) LMI_D4(i), LMI_D4(i + 4)
#define LMI_D16(i) LMI_D8(i), LMI_D8(i + 8)
#define LMI_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LMI_R16 LMI_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LMI_R32 \
  LMI_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LMI_R64 \
  LMI_R32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LMI_R128 \
  LMI_R64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define LMI_D32 LMI_D16(0), LMI_D16(16)
#define LMI_D64 LMI_D32, LMI_D16(32), LMI_D16(48)
#define LMI_D128 LMI_D64, LMI_D16(64), LMI_D16(80), LMI_D16(96), LMI_D16(112)
#define LMI_SHARED(SHAPE, TYPE, D, A, B, ...)                                               \
  asm volatile("wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" D "}, %" A  \
               ", %" B ", 1, 1, 1, 0, 0;"                                                   \
               : __VA_ARGS__                                                                \
               : "l"(a), "l"(b))
#define LMI_REGISTERS(SHAPE, TYPE, TRANSPOSED, D, A0, A1, A2, A3, B, ...)                      \
  asm volatile("wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" D "}, {%" A0 \
               ", %" A1 ", %" A2 ", %" A3 "}, %" B ", 1, 1, 1, " TRANSPOSED ";"             \
               : __VA_ARGS__                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// d += a [64, 16] times b [N, 16] transposed, of a warpgroup, both in shared memory.
template <typename T, int N>
__device__ void multiply_add(float (&d)[N / 2], uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool half = std::is_same_v<T, __half>;
  static_assert(N == 16 || N == 32 || N == 64 || N == 128 || N == 256);
  if constexpr (N == 128 && half) {
    LMI_SHARED("m64n128k16", "f16", LMI_R64, "64", "65", LMI_D64);
  } else if constexpr (N == 128) {
    LMI_SHARED("m64n128k16", "bf16", LMI_R64, "64", "65", LMI_D64);
  } else if constexpr (N == 256 && half) {
    LMI_SHARED("m64n256k16", "f16", LMI_R128, "128", "129", LMI_D128);
  } else if constexpr (N == 256) {
    LMI_SHARED("m64n256k16", "bf16", LMI_R128, "128", "129", LMI_D128);
  } else if constexpr (N == 16 && half) {
    LMI_SHARED("m64n16k16", "f16", LMI_R8, "8", "9", LMI_D8(0));
  } else if constexpr (N == 16) {
    LMI_SHARED("m64n16k16", "bf16", LMI_R8, "8", "9", LMI_D8(0));
  } else if constexpr (N == 32 && half) {
    LMI_SHARED("m64n32k16", "f16", LMI_R16, "16", "17", LMI_D16(0));
  } else if constexpr (N == 32) {
    LMI_SHARED("m64n32k16", "bf16", LMI_R16, "16", "17", LMI_D16(0));
  } else if constexpr (half) {
    LMI_SHARED("m64n64k16", "f16", LMI_R32, "32", "33", LMI_D32);
  } else {
    LMI_SHARED("m64n64k16", "bf16", LMI_R32, "32", "33", LMI_D32);
  }
#endif
}

// The same with a in registers, which must stay as they are until the product is done: rows g and
// g + 8 of a warp's sixteen, columns 2t and 2t + 1; and the same rows, eight columns further.
template <typename T, int N>
__device__ void multiply_add(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool half = std::is_same_v<T, __half>;
  static_assert(N == 16 || N == 32 || N == 64);
  if constexpr (N == 16 && half) {
    LMI_REGISTERS("m64n16k16", "f16", "0", LMI_R8, "8", "9", "10", "11", "12", LMI_D8(0));
  } else if constexpr (N == 16) {
    LMI_REGISTERS("m64n16k16", "bf16", "0", LMI_R8, "8", "9", "10", "11", "12", LMI_D8(0));
  } else if constexpr (N == 32 && half) {
    LMI_REGISTERS("m64n32k16", "f16", "0", LMI_R16, "16", "17", "18", "19", "20", LMI_D16(0));
  } else if constexpr (N == 32) {
    LMI_REGISTERS("m64n32k16", "bf16", "0", LMI_R16, "16", "17", "18", "19", "20", LMI_D16(0));
  } else if constexpr (half) {
    LMI_REGISTERS("m64n64k16", "f16", "0", LMI_R32, "32", "33", "34", "35", "36", LMI_D32);
  } else {
    LMI_REGISTERS("m64n64k16", "bf16", "0", LMI_R32, "32", "33", "34", "35", "36", LMI_D32);
  }
#endif
}

// The same with b [16, N] as it is: rows are what is summed over.
template <typename T, int N>
__device__ void multiply_add_rows(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool half = std::is_same_v<T, __half>;
  static_assert(N == 64 || N == 128 || N == 256);
  if constexpr (N == 64 && half) {
    LMI_REGISTERS("m64n64k16", "f16", "1", LMI_R32, "32", "33", "34", "35", "36", LMI_D32);
  } else if constexpr (N == 64) {
    LMI_REGISTERS("m64n64k16", "bf16", "1", LMI_R32, "32", "33", "34", "35", "36", LMI_D32);
  } else if constexpr (N == 128 && half) {
    LMI_REGISTERS("m64n128k16", "f16", "1", LMI_R64, "64", "65", "66", "67", "68", LMI_D64);
  } else if constexpr (N == 128) {
    LMI_REGISTERS("m64n128k16", "bf16", "1", LMI_R64, "64", "65", "66", "67", "68", LMI_D64);
  } else if constexpr (half) {
    LMI_REGISTERS("m64n256k16", "f16", "1", LMI_R128, "128", "129", "130", "131", "132", LMI_D128);
  } else {
    LMI_REGISTERS("m64n256k16", "bf16", "1", LMI_R128, "128", "129", "130", "131", "132", LMI_D128);
  }
#endif
}

// Before the first product on registers that other instructions have written, and behind `hold` of
// these: what reads no memory the compiler may else move here and further.
__device__ inline void begin_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// The products since the last call are a group.
__device__ inline void close_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until at most so many groups are under way.
template <int PENDING>
__device__ inline void await_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#endif
}

// These registers are written before here and read behind: the compiler does not know when products
// read and write them.
template <int N>
__device__ inline void hold(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int N>
__device__ inline void hold(uint32_t (&a)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

}  // namespace lmi
