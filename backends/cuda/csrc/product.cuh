// How a warp multiplies sixteen weight rows with eight rows of x: on tensor cores for half types,
// with fused multiply-adds for float32.
//
// Lane (g, t) = (lane / 4, lane % 4) loads 16 bytes at a time of weight rows g and g + 8. Which
// features these are is the same for weights and x, so their order within a block of 64 does not
// matter; it is chosen such that both are read in 16 bytes. Results have the layout of mma's C:
// out[0], out[1]: row g, x rows 2t and 2t + 1; out[2], out[3]: row g + 8.
#pragma once

#include "common.cuh"

namespace lmi {

constexpr int BLOCK = 64;  // features

template <typename W>
constexpr int LOADS = 2 * sizeof(W);  // of 16 bytes, by each lane for one block of 16 rows

// Where x's features at, at + 1, ... at + 7 lie in shared memory. A lane has 16 int8 features in
// one load, but reads x in two: these are put apart, so that reads do not collide.
template <typename X, typename W>
__device__ inline int place(int at) {
  if constexpr (sizeof(X) == 2 && sizeof(W) == 1) {
    return (at & ~63) + (at / 8 % 2) * 32 + (at / 16 % 4) * 8;
  } else {
    return at;
  }
}

__device__ inline uint32_t expand(uint32_t bytes, uint32_t selector, __half) {
  // 0x6400 is 1024, whose last bit is 1: a byte put below it adds its value.
  const uint32_t biased = __byte_perm(bytes ^ 0x80808080u, 0x64646464u, selector);
  const uint32_t offset = 0x64806480u;  // 1024 + 128
  const __half2 value = __hsub2(reinterpret_cast<const __half2&>(biased),
                                reinterpret_cast<const __half2&>(offset));
  return reinterpret_cast<const uint32_t&>(value);
}

__device__ inline uint32_t expand(uint32_t bytes, uint32_t selector, __nv_bfloat16) {
  // 0x4300 is 128, whose last bit is 1, so seven bits fit below it; the sign's makes it 256.
  const uint32_t spread = __byte_perm(bytes, 0u, selector);
  const uint32_t biased = (spread & 0x007f007fu) | 0x43004300u;
  const uint32_t offset = (spread & 0x00800080u) | 0x43004300u;
  const __nv_bfloat162 value = __hsub2(reinterpret_cast<const __nv_bfloat162&>(biased),
                                       reinterpret_cast<const __nv_bfloat162&>(offset));
  return reinterpret_cast<const uint32_t&>(value);
}

template <typename X>
__device__ inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                           uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<X, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// x of a half type; NT times eight rows.
template <typename X_, typename W_, int NT>
struct TensorProduct {
  using X = X_;
  using W = W_;
  static constexpr int AT_ONCE = NT < 4 ? 2 : 1;  // blocks on a processor
  float sums[NT][4] = {};

  // Eight features of a lane, the first or second half of a block.
  static __device__ uint4 features(const uint4* loaded, int half) {
    if constexpr (sizeof(W) == 2) {
      return loaded[half];
    } else {
      const uint32_t low = half ? loaded[0].z : loaded[0].x;
      const uint32_t high = half ? loaded[0].w : loaded[0].y;
      return make_uint4(expand(low, 0x4140, X()), expand(low, 0x4342, X()),
                        expand(high, 0x4140, X()), expand(high, 0x4342, X()));
    }
  }

  // x: the block's first feature in row 0; rows above the last are copies of it.
  __device__ void add(const uint4* loaded, const X* x, int stride, int rows) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 low = features(loaded, half);
      const uint4 high = features(loaded + LOADS<W> / 2, half);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const X* row = x + min(n * 8 + g, rows - 1) * stride;
        const uint4 b = *reinterpret_cast<const uint4*>(row + half * 32 + t * 8);
        mma<X>(sums[n], low.x, high.x, low.y, high.y, b.x, b.y);
        mma<X>(sums[n], low.z, high.z, low.w, high.w, b.z, b.w);
      }
    }
  }

  __device__ void finish(float (&out)[NT][4]) const {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = sums[n][i];
    }
  }
};

// x of float32.
template <typename W_, int NT>
struct PlainProduct {
  using X = float;
  using W = W_;
  static constexpr int AT_ONCE = NT == 1 ? 2 : 1;
  float sums[NT * 8][2] = {};

  static __device__ float4 features(const uint4* loaded, int quarter) {
    if constexpr (sizeof(W) == 4) {
      return reinterpret_cast<const float4*>(loaded)[quarter];
    } else {
      const uint4 all = loaded[0];
      const uint32_t own = quarter == 0 ? all.x : quarter == 1 ? all.y : quarter == 2 ? all.z : all.w;
      const char4 bytes = reinterpret_cast<const char4&>(own);
      return make_float4(bytes.x, bytes.y, bytes.z, bytes.w);
    }
  }

  __device__ void add(const uint4* loaded, const float* x, int stride, int rows) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const float4 low = features(loaded, quarter);
      const float4 high = features(loaded + LOADS<W> / 2, quarter);
      const int at = sizeof(W) == 4 ? quarter * 16 + t * 4 : t * 16 + quarter * 4;
#pragma unroll
      for (int n = 0; n < NT * 8; ++n) {
        if (n >= rows) break;
        const float4 b = *reinterpret_cast<const float4*>(x + n * stride + at);
        sums[n][0] += low.x * b.x + low.y * b.y + low.z * b.z + low.w * b.w;
        sums[n][1] += high.x * b.x + high.y * b.y + high.z * b.z + high.w * b.w;
      }
    }
  }

  __device__ void finish(float (&out)[NT][4]) const {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < NT * 8; ++n) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float sum = sums[n][side];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (n % 8 / 2 == t) out[n / 8][side * 2 + n % 2] = sum;
      }
    }
  }
};

}  // namespace lmi
